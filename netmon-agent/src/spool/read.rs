//! Reading back what waits for the server.

use std::io;

use netmon_common::model::MAX_RECORD;

use super::files::{Files, read_at_most};
use super::format::{FRAME, HEADER, Next, frames, next_frame};
use super::log::{Segment, Spool, SpoolError};

/// The synced records of one epoch that wait for the server: `oldest .. next`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochRange {
    /// The epoch.
    pub epoch: u64,
    /// The oldest record that waits; `next` when none does.
    pub oldest: u64,
    /// Behind the newest synced record.
    pub next: u64,
}

/// Records read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Number of the first one.
    pub first_seq: u64,
    /// Their bytes, numbered on from there. Never empty.
    pub records: Vec<Vec<u8>>,
}

/// Where the last read ended, so that the next one need not search.
pub(super) struct Cursor<H> {
    pub number: u64,
    pub file: H,
    pub seq: u64,
    pub offset: u64,
}

impl<F: Files> Spool<F> {
    /// What waits for the server, epoch by epoch, oldest first. The last one is the epoch that is being
    /// written, even when nothing of it waits.
    pub fn epochs(&self) -> Vec<EpochRange> {
        let mut ranges: Vec<EpochRange> = Vec::new();
        for segment in self.segments.iter().filter(|segment| !segment.is_done()) {
            let oldest = segment.first_seq.max(segment.acked_next);
            match ranges.last_mut().filter(|range| range.epoch == segment.epoch) {
                Some(range) => range.next = range.next.max(segment.end()),
                None => ranges.push(EpochRange { epoch: segment.epoch, oldest, next: segment.end() }),
            }
        }
        if ranges.last().is_none_or(|range| range.epoch != self.epoch) {
            let (epoch, next) = (self.epoch, self.synced_next);
            ranges.push(EpochRange { epoch, oldest: next, next });
        }
        ranges
    }

    /// Synced records of `epoch` from `seq` on, or from the next one that is still there: compare
    /// [`Chunk::first_seq`]. At most `max_records` and some `max_bytes`, at least one; `None`: there is none.
    ///
    /// Damage is cut out, counted, and leads to a [`Gap`].
    ///
    /// # Errors
    /// [`SpoolError::Open`]: worth another try.
    pub fn read(
        &mut self,
        epoch: u64,
        seq: u64,
        max_records: usize,
        max_bytes: usize,
    ) -> Result<Option<Chunk>, SpoolError> {
        loop {
            let wanted =
                |segment: &&Segment| segment.epoch == epoch && segment.records > 0 && segment.end() > seq;
            let Some(segment) = self.segments.iter().find(wanted).cloned() else { return Ok(None) };
            let start = seq.max(segment.first_seq);
            let Some((file, offset)) = self.seek(&segment, start)? else { continue };
            let left = (segment.bytes - offset) as usize;
            let length = left.min(max_bytes.max(MAX_RECORD) + (max_records.max(1) + 1) * FRAME);
            let bytes = self.read_bytes(&segment, &file, offset, length);
            let mut found = frames(&bytes, start);
            let mut size = 0;
            let mut records = Vec::new();
            while records.len() < max_records.max(1) && start + (records.len() as u64) < segment.end() {
                let behind = found.clone();
                match found.next() {
                    Some(record) if records.is_empty() || size + record.len() <= max_bytes => {
                        size += record.len();
                        records.push(record.to_vec());
                    }
                    _ => {
                        found = behind;
                        break;
                    }
                }
            }
            if records.is_empty() {
                self.cut(&segment, start, offset);
                continue;
            }
            self.cursor = Some(Cursor {
                number: segment.number,
                file,
                seq: start + records.len() as u64,
                offset: offset + (bytes.len() - found.rest()) as u64,
            });
            return Ok(Some(Chunk { first_seq: start, records }));
        }
    }

    /// What cannot be read is as good as damaged: a local disk that fails to read once will do so again.
    fn read_bytes(&self, segment: &Segment, file: &F::File, offset: u64, length: usize) -> Vec<u8> {
        read_at_most(&*self.files, file, offset, length).unwrap_or_else(|error| {
            tracing::error!(segment = segment.name(), %error, "cannot read a spool segment");
            Vec::new()
        })
    }

    /// Where record `seq` of a segment stands; `None`: something in front of it is damaged (and cut now).
    fn seek(&mut self, segment: &Segment, seq: u64) -> Result<Option<(F::File, u64)>, SpoolError> {
        if let Some(cursor) = &self.cursor
            && (cursor.number, cursor.seq) == (segment.number, seq)
        {
            return Ok(Some((cursor.file.clone(), cursor.offset)));
        }
        let file = match self.files.open(&segment.name()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.cut(segment, segment.first_seq, HEADER as u64);
                return Ok(None);
            }
            Err(source) => return Err(SpoolError::Open { name: segment.name(), source }),
        };
        let all = self.read_bytes(segment, &file, HEADER as u64, segment.bytes as usize - HEADER);
        let mut offset = HEADER;
        for at in segment.first_seq..seq {
            let Next::Record(record) = next_frame(&all[offset - HEADER..], at) else {
                self.cut(segment, at, offset as u64);
                return Ok(None);
            };
            offset += FRAME + record.len();
        }
        Ok(Some((file, offset as u64)))
    }

    /// Gives up a segment's records from `seq` on: they cannot be read.
    fn cut(&mut self, segment: &Segment, seq: u64, offset: u64) {
        let lost = segment.bytes - offset;
        tracing::error!(segment = segment.name(), seq, bytes = lost, "spool segment is damaged and was cut");
        self.total_damaged += lost;
        let (from, to) = segment.walls.unwrap_or_default();
        self.damaged.add(lost, from, to);
        if self.active.is_some() && self.segments.back().is_some_and(|last| last.number == segment.number) {
            self.leave_segment();
        }
        for cut in self.segments.iter_mut().filter(|other| other.number == segment.number) {
            cut.records = seq - cut.first_seq;
            cut.bytes = offset;
            cut.acked_next = cut.acked_next.max(cut.first_seq);
        }
    }
}
