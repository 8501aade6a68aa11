//! When to read the kernel's tables. Pure: told the boot time, in nanoseconds.
//!
//! Four times a second, and sooner when a flow begins. Reading a million flows takes longer than the time between two
//! readings, so whoever has much to read takes a break: a reading and what follows from it get a quarter of a CPU, as long
//! as what moved is still known within a second.

const SECOND_NS: u64 = 1_000_000_000;
/// The tables are read this often: a transfer is announced within twice this time.
pub const USUAL_NS: u64 = SECOND_NS / 4;
/// A new flow brings the next reading forward, but two of them keep at least this distance.
const EAGER_NS: u64 = SECOND_NS / 20;
/// However long a reading takes, the next one begins no later after its beginning.
const LONGEST_NS: u64 = SECOND_NS;
/// From the beginning of a reading to that of the next one, as a multiple of the time that it took.
const SHARE: u64 = 4;

/// Tells when the next reading is due.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    began_ns: u64,
    /// Not before.
    earliest_ns: u64,
    due_ns: u64,
    reading: bool,
}

impl Pace {
    /// The first reading is due now.
    pub fn new(now_ns: u64) -> Self {
        Self { began_ns: now_ns, earliest_ns: now_ns, due_ns: now_ns, reading: false }
    }

    /// When the next reading is due.
    pub fn due_ns(&self) -> u64 {
        self.due_ns
    }

    /// When the last reading began.
    pub fn began_ns(&self) -> u64 {
        self.began_ns
    }

    /// There is something to read.
    pub fn hasten(&mut self, now_ns: u64) {
        self.due_ns = self.due_ns.min(self.earliest_ns.max(now_ns));
    }

    /// A reading begins.
    pub fn begin(&mut self, now_ns: u64) {
        self.began_ns = now_ns;
        self.earliest_ns = now_ns + EAGER_NS;
        self.due_ns = now_ns + USUAL_NS;
        self.reading = true;
    }

    /// The reading, if there was one, and all that followed from it has ended.
    pub fn end(&mut self, now_ns: u64) {
        if !std::mem::take(&mut self.reading) {
            return;
        }
        let distance = now_ns.saturating_sub(self.began_ns).saturating_mul(SHARE);
        self.earliest_ns = self.began_ns + distance.clamp(EAGER_NS, LONGEST_NS);
        self.due_ns = self.began_ns + distance.clamp(USUAL_NS, LONGEST_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// When the next reading is due after one that began at 10 s and took so long; and if a flow begins right after it.
    fn after(took_ns: u64) -> (u64, u64) {
        let began = 10 * SECOND_NS;
        let mut pace = Pace::new(0);
        pace.begin(began);
        pace.end(began + took_ns);
        let mut hastened = pace;
        hastened.hasten(began + took_ns);
        (pace.due_ns() - began, hastened.due_ns() - began)
    }

    #[test]
    fn readings_come_four_times_a_second_and_sooner_for_a_new_flow() {
        assert_eq!(Pace::new(7).due_ns(), 7);
        assert_eq!(after(0), (250 * MS, 50 * MS));
        assert_eq!(after(10 * MS), (250 * MS, 50 * MS));
    }

    #[test]
    fn long_readings_take_a_quarter_of_the_time_and_come_every_second_all_the_same() {
        assert_eq!(after(30 * MS), (250 * MS, 120 * MS));
        assert_eq!(after(100 * MS), (400 * MS, 400 * MS));
        assert_eq!(after(240 * MS), (960 * MS, 960 * MS));
        assert_eq!(after(900 * MS), (1_000 * MS, 1_000 * MS));
        // Held up: at once.
        assert_eq!(after(5_000 * MS), (1_000 * MS, 1_000 * MS));
    }

    #[test]
    fn hurry_brings_a_reading_forward_and_never_puts_it_off() {
        let mut pace = Pace::new(0);
        pace.begin(SECOND_NS);
        pace.end(SECOND_NS);
        pace.hasten(SECOND_NS + 100 * MS);
        assert_eq!(pace.due_ns(), SECOND_NS + 100 * MS);
        pace.hasten(SECOND_NS + 300 * MS);
        assert_eq!(pace.due_ns(), SECOND_NS + 100 * MS);
        // Something else was done.
        pace.end(SECOND_NS + 300 * MS);
        assert_eq!(pace.due_ns(), SECOND_NS + 100 * MS);
    }
}
