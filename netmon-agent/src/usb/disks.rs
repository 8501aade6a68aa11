//! What USB disks read and write, by the kernel's counters of the whole disk.
//!
//! These are bytes that the disk has completed: metadata, read-ahead and the probing after plugging in are among them,
//! and what a program wrote comes when the page cache is written back, which can be much later. Partitions and what is
//! stacked on a disk (dm, loop) repeat the same bytes and are not looked at.

use std::time::Duration;

use netmon_common::model::{Disk, Traffic};

/// Between two samples: four times a second, so that a burst is announced within a second. A sample costs some
/// microseconds.
pub const SAMPLE_PERIOD: Duration = Duration::from_millis(250);

/// For so long after its last activity, it is said at every sample that a disk is quiet: longer than any silence that
/// ends a transfer. Who takes that in late is not misled, as he would be by the time.
pub const QUIET_TOLD_NS: u64 = 10_000_000_000;

/// A USB disk did something, or nothing since it did something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskActivity {
    /// Which disk.
    pub disk: Disk,
    /// The sample before, boot clock: the activity came after it.
    pub first_boot_ns: u64,
    /// The sample that showed it, boot clock: the activity came before it.
    pub last_boot_ns: u64,
    /// What the disk completed in between: `rx` read from it, `tx` written to it; packets are I/O requests. All zero
    /// when it completed nothing.
    pub traffic: Traffic,
    /// True when requests wait for the disk.
    pub in_flight: bool,
    /// How the disk is used from now on.
    pub usage: Usage,
}

/// How a disk is used: what its reads and writes mean depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Usage {
    /// No file system of it was mounted since it came.
    #[default]
    Fresh,
    /// A file system that can be written to is mounted, or on its way to be unmounted: the page cache writes it back when
    /// it likes to.
    Writable,
    /// Nothing of it can be in the page cache and not on the disk.
    Unwritable,
}

/// Counters of a disk since it appeared (`/sys/block/*/stat`; kernel: Documentation/block/stat.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Read requests completed.
    pub reads: u64,
    /// Sectors of 512 bytes read.
    pub read_sectors: u64,
    /// Write requests completed.
    pub writes: u64,
    /// Sectors of 512 bytes written.
    pub written_sectors: u64,
    /// Requests that wait for the disk.
    pub in_flight: u64,
}

impl Stat {
    /// Reads the file's text; `None` when it is not what the kernel writes.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut fields =
            std::str::from_utf8(text).ok()?.split_ascii_whitespace().map(|field| field.parse().ok());
        let mut field = |skipped| fields.nth(skipped)?;
        Some(Self {
            reads: field(0)?,
            read_sectors: field(1)?,
            writes: field(1)?,
            written_sectors: field(1)?,
            in_flight: field(1)?,
        })
    }

    /// What was completed since `before`.
    pub fn since(&self, before: &Self) -> Traffic {
        /// The unit of the kernel's sector counts, whatever the disk's own sectors are.
        const SECTOR: u64 = 512;
        let bytes = |now: u64, before: u64| now.saturating_sub(before).saturating_mul(SECTOR);
        let read = bytes(self.read_sectors, before.read_sectors);
        let written = bytes(self.written_sectors, before.written_sectors);
        Traffic {
            tx_bytes: written,
            rx_bytes: read,
            tx_payload: written,
            rx_payload: read,
            tx_packets: self.writes.saturating_sub(before.writes),
            rx_packets: self.reads.saturating_sub(before.reads),
        }
    }
}

/// Turns one disk's samples into activities.
#[derive(Debug)]
pub struct Meter {
    disk: Disk,
    counted: Stat,
    sampled_boot_ns: u64,
    active_boot_ns: u64,
}

impl Meter {
    /// Counts from `counted` on: the disk's counters now, or zeros for a disk that was plugged in just now, whose first
    /// sectors count too.
    pub fn new(disk: Disk, counted: Stat, boot_ns: u64) -> Self {
        Self { disk, counted, sampled_boot_ns: boot_ns, active_boot_ns: boot_ns }
    }

    /// Which disk it is.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What it has completed, by the last sample.
    pub fn counted(&self) -> Stat {
        self.counted
    }

    /// What the disk did since the last sample, if anything, or that it has been quiet since it did something.
    pub fn sample(&mut self, stat: Stat, boot_ns: u64) -> Option<DiskActivity> {
        let traffic = stat.since(&self.counted);
        let first_boot_ns = self.sampled_boot_ns;
        self.counted = stat;
        self.sampled_boot_ns = boot_ns;
        if traffic != Traffic::default() || stat.in_flight > 0 {
            self.active_boot_ns = boot_ns;
        }
        (boot_ns < self.active_boot_ns.saturating_add(QUIET_TOLD_NS)).then(|| DiskActivity {
            disk: self.disk.clone(),
            first_boot_ns,
            last_boot_ns: boot_ns,
            traffic,
            in_flight: stat.in_flight > 0,
            usage: Usage::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(reads: u64, read_sectors: u64, writes: u64, written_sectors: u64, in_flight: u64) -> Stat {
        Stat { reads, read_sectors, writes, written_sectors, in_flight }
    }

    fn disk() -> Disk {
        Disk {
            name: "sdb".into(),
            vendor: "Kingston".into(),
            model: "DataTraveler".into(),
            serial: "A1".into(),
        }
    }

    #[test]
    fn the_kernels_line_is_read_by_its_columns() {
        let line = b"     118     2    7424      92       15        3     8193       44        1      100      136   0 0 0 0 0 0\n";
        assert_eq!(Stat::parse(line), Some(stat(118, 7424, 15, 8193, 1)));
        for wrong in [&b""[..], b"1 2 3 4 5 6 7 8", b"a b c d e f g h i", b"-1 0 0 0 0 0 0 0 0", b"\xff"] {
            assert_eq!(Stat::parse(wrong), None);
        }
    }

    #[test]
    fn activity_is_what_was_completed_between_two_samples() {
        let mut meter = Meter::new(disk(), stat(10, 100, 5, 50, 0), 1_000);
        let quiet = meter.sample(stat(10, 100, 5, 50, 0), 2_000).unwrap();
        assert_eq!((quiet.traffic, quiet.in_flight), (Traffic::default(), false));
        let activity = meter.sample(stat(12, 108, 6, 2_050, 0), 3_000).unwrap();
        assert_eq!((activity.first_boot_ns, activity.last_boot_ns), (2_000, 3_000));
        let expected = Traffic {
            tx_bytes: 2_000 * 512,
            rx_bytes: 8 * 512,
            tx_payload: 2_000 * 512,
            rx_payload: 8 * 512,
            tx_packets: 1,
            rx_packets: 2,
        };
        assert_eq!(activity.traffic, expected);
    }

    #[test]
    fn that_a_disk_is_quiet_is_said_for_a_while() {
        let mut meter = Meter::new(disk(), Stat::default(), 0);
        meter.sample(stat(1, 8, 0, 0, 0), 1_000);
        let quiet = meter.sample(stat(1, 8, 0, 0, 0), QUIET_TOLD_NS + 999).unwrap();
        assert_eq!((quiet.traffic, quiet.last_boot_ns), (Traffic::default(), QUIET_TOLD_NS + 999));
        assert_eq!(meter.sample(stat(1, 8, 0, 0, 0), QUIET_TOLD_NS + 1_000), None);
    }

    #[test]
    fn requests_that_wait_for_the_disk_are_activity() {
        let mut meter = Meter::new(disk(), Stat::default(), 1_000);
        let waiting = meter.sample(stat(0, 0, 0, 0, 3), 2_000).unwrap();
        assert_eq!((waiting.traffic, waiting.in_flight), (Traffic::default(), true));
        assert_eq!(waiting.disk, disk());
    }

    #[test]
    fn counters_that_went_back_are_no_traffic() {
        let mut meter = Meter::new(disk(), stat(9, 9, 9, 9, 0), 0);
        assert_eq!(meter.sample(stat(1, 1, 1, 1, 0), 1).unwrap().traffic, Traffic::default());
    }
}
