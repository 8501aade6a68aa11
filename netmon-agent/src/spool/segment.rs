//! What is known of a segment without reading it. Pure.

use std::collections::VecDeque;

use netmon_common::model::{Gap, GapReason, Record};

use super::format::{Frame, HEADER, Header, frames};
use super::recover::segment_name;

/// When a record was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The agent's run.
    pub run: u32,
    /// Boot clock.
    pub boot_ns: u64,
    /// Wall clock.
    pub wall_ns: i64,
}

impl From<&Record> for Stamp {
    fn from(record: &Record) -> Self {
        Self { run: record.run, boot_ns: record.boot_ns, wall_ns: record.wall_ns }
    }
}

impl Stamp {
    /// A time in which the agent did not run counts as no more than this, whatever the wall clock says: a long weekend.
    pub const MOST_OFF_NS: u64 = 3 * 24 * 3_600_000_000_000;

    /// How long after this one `later` was, in nanoseconds. Within a run the boot clock tells, which nobody can set.
    /// Between runs there is only the wall clock, and it may have been set, so what it says is bounded.
    pub fn until(&self, later: &Self) -> u64 {
        if self.run == later.run && later.boot_ns >= self.boot_ns {
            return later.boot_ns - self.boot_ns;
        }
        let by_wall = later.wall_ns.saturating_sub(self.wall_ns);
        u64::try_from(by_wall).unwrap_or(0).min(Self::MOST_OFF_NS)
    }
}

/// When the records of a segment were made, roughly: some (number, wall clock) of them, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Marks {
    marks: VecDeque<(u64, i64)>,
    /// One of so many is kept.
    every: u32,
    skipped: u32,
}

impl Marks {
    const MOST: usize = 256;

    pub fn push(&mut self, seq: u64, wall_ns: i64) {
        self.skipped += 1;
        if self.skipped < self.every {
            return;
        }
        self.skipped = 0;
        self.marks.push_back((seq, wall_ns));
        if self.marks.len() == Self::MOST {
            let mut keep = false;
            self.marks.retain(|_| {
                keep = !keep;
                keep
            });
            self.every = self.every.max(1) * 2;
        }
    }

    /// Wall clock of record `seq`, or of one not long before it.
    pub fn at(&self, seq: u64) -> Option<i64> {
        let behind = self.marks.partition_point(|(at, _)| *at <= seq);
        self.marks.get(behind.saturating_sub(1)).map(|(_, wall_ns)| *wall_ns)
    }

    /// Nobody will ask for records before `seq` any more.
    fn forget(&mut self, seq: u64) {
        while self.marks.get(1).is_some_and(|(at, _)| *at <= seq) {
            self.marks.pop_front();
        }
    }
}

/// One file of records, as far as it is synced.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub number: u64,
    pub epoch: u64,
    pub first_seq: u64,
    /// Numbers that it covers.
    pub span: u64,
    /// Records among them; the others are holes.
    pub records: u64,
    /// Length of the header and the frames.
    pub bytes: u64,
    /// Everything below is acknowledged.
    pub acked_next: u64,
    /// The first and the newest record.
    pub stamps: Option<(Stamp, Stamp)>,
    pub marks: Marks,
    /// How often it was written anew: offsets are those of one version.
    pub version: u32,
    /// Minor records were looked for and are gone.
    pub is_thinned: bool,
    /// The disk may not have what a reader sees: not to be handed out before it is written anew.
    pub is_held: bool,
}

impl Segment {
    /// One without records.
    pub fn new(header: &Header) -> Self {
        Self {
            number: header.number,
            epoch: header.epoch,
            first_seq: header.first_seq,
            span: 0,
            records: 0,
            bytes: HEADER as u64,
            acked_next: header.first_seq,
            stamps: None,
            marks: Marks::default(),
            version: 0,
            is_thinned: false,
            is_held: false,
        }
    }

    /// What whole frames behind the header say, and the newest record.
    pub fn examine(header: &Header, content: &[u8]) -> (Self, Option<Record>) {
        /// Records from one mark to the next.
        const MARKED: u64 = 1024;
        let mut segment = Self::new(header);
        let decode = |bytes: &[u8]| Record::from_bytes(bytes).ok();
        let (mut first, mut last) = (None, None);
        let mut all = frames(content, header.first_seq);
        for (seq, frame) in &mut all {
            let Frame::Record(bytes) = frame else { continue };
            if segment.records.is_multiple_of(MARKED)
                && let Some(record) = decode(bytes)
            {
                segment.marks.push(seq, record.wall_ns);
            }
            segment.records += 1;
            first = first.or(Some(bytes));
            last = Some(bytes);
        }
        segment.span = all.seq() - header.first_seq;
        segment.bytes += (content.len() - all.rest()) as u64;
        let (first, newest) = (first.and_then(decode), last.and_then(decode));
        segment.stamps =
            first.as_ref().zip(newest.as_ref()).map(|(first, newest)| (first.into(), newest.into()));
        (segment, newest)
    }

    pub fn name(&self) -> String {
        segment_name(self.number)
    }

    /// Behind the last synced record.
    pub fn end(&self) -> u64 {
        self.first_seq + self.span
    }

    pub fn is_done(&self) -> bool {
        self.acked_next >= self.end()
    }

    /// Everything up to `seq` is acknowledged.
    pub fn acked(&mut self, seq: u64) {
        self.acked_next = self.acked_next.max(seq.saturating_add(1).min(self.end()));
        self.marks.forget(self.acked_next);
    }

    /// Records that wait for the server; where there are holes, at most so many.
    pub fn waiting(&self) -> u64 {
        self.records.min(self.end() - self.acked_next.clamp(self.first_seq, self.end()))
    }

    /// Wall clock of the first and the newest record; zeros where there is none.
    pub fn walls(&self) -> (i64, i64) {
        self.stamps.map_or((0, 0), |(first, last)| (first.wall_ns, last.wall_ns))
    }
}

/// Losses that the caller has not been told of yet.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lost {
    count: u64,
    walls: Option<(i64, i64)>,
}

impl Lost {
    pub fn add(&mut self, count: u64, (from, to): (i64, i64)) {
        if count > 0 {
            self.count += count;
            self.walls = Some(self.walls.map_or((from, to), |(a, b)| (a.min(from), b.max(to))));
        }
    }

    pub fn take(&mut self, reason: GapReason) -> Option<Gap> {
        let Lost { count, walls } = std::mem::take(self);
        let (from_wall_ns, to_wall_ns) = walls.unwrap_or_default();
        (count > 0).then_some(Gap { reason, from_wall_ns, to_wall_ns, count: Some(count) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_NS: i64 = 24 * 3_600_000_000_000;

    #[test]
    fn within_a_run_the_boot_clock_tells_and_between_runs_the_wall_clock_within_bounds() {
        let at = |run, boot_ns, wall_ns| Stamp { run, boot_ns, wall_ns };
        let years = 12 * 365 * DAY_NS;
        assert_eq!(at(1, 100, 0).until(&at(1, 350, years)), 250);
        assert_eq!(at(1, 900, 0).until(&at(2, 100, DAY_NS)), DAY_NS as u64);
        assert_eq!(at(1, 900, 0).until(&at(2, 100, years)), Stamp::MOST_OFF_NS);
        assert_eq!(at(1, 900, years).until(&at(2, 100, 0)), 0);
        assert_eq!(at(1, 900, i64::MIN).until(&at(2, 100, i64::MAX)), Stamp::MOST_OFF_NS);
    }

    #[test]
    fn marks_stay_few_and_answer_with_the_one_before() {
        let mut marks = Marks::default();
        assert_eq!(marks.at(5), None);
        for seq in 1..=10_000 {
            marks.push(seq, seq as i64 * 10);
        }
        assert!(marks.marks.len() <= Marks::MOST);
        let found = marks.at(5_000).unwrap();
        assert!((49_000..=50_000).contains(&found), "{found}");
        marks.forget(5_000);
        assert_eq!(marks.at(5_000), Some(found));
        let newest = marks.at(10_000).unwrap();
        assert!((99_000..=100_000).contains(&newest), "{newest}");
    }
}
