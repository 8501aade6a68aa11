//! Reading back what waits for the server.

use std::io;
use std::sync::Arc;

use netmon_common::model::MAX_RECORD;

use super::files::{Disk, Files, read_at_most};
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
#[derive(Clone)]
pub(super) struct Cursor<H> {
    pub number: u64,
    pub file: H,
    pub seq: u64,
    pub offset: u64,
}

/// What one read has to do; see [`Spool::begin_read`].
pub struct ReadTicket<F: Files = Disk> {
    files: Arc<F>,
    segment: Segment,
    /// The first record that is wanted.
    start: u64,
    cursor: Option<Cursor<F::File>>,
    max_records: usize,
    max_bytes: usize,
}

/// What a read found; see [`Spool::finish_read`].
pub struct ReadResult<F: Files = Disk> {
    number: u64,
    found: Found<F::File>,
}

enum Found<H> {
    Chunk(Chunk, Cursor<H>),
    /// Nothing can be read from record `seq` on, which stands or stood at `offset`.
    Damaged {
        seq: u64,
        offset: u64,
    },
}

/// A file and an offset in it, or the damage in front of that.
type Place<H> = Result<(H, u64), Found<H>>;

impl<F: Files> ReadTicket<F> {
    /// Reads: may take long, needs no lock. Give the result to [`Spool::finish_read`].
    ///
    /// # Errors
    /// [`SpoolError::Open`]: worth another try.
    pub fn run(&self) -> Result<ReadResult<F>, SpoolError> {
        Ok(ReadResult { number: self.segment.number, found: self.find()? })
    }

    fn find(&self) -> Result<Found<F::File>, SpoolError> {
        let (segment, start) = (&self.segment, self.start);
        let (file, offset) = match self.seek()? {
            Ok(place) => place,
            Err(damaged) => return Ok(damaged),
        };
        let left = (segment.bytes - offset) as usize;
        let length = left.min(self.max_bytes.max(MAX_RECORD) + (self.max_records.max(1) + 1) * FRAME);
        let bytes = self.read_bytes(&file, offset, length);
        let mut found = frames(&bytes, start);
        let mut size = 0;
        let mut records = Vec::new();
        while records.len() < self.max_records.max(1) && start + (records.len() as u64) < segment.end() {
            let behind = found.clone();
            match found.next() {
                Some(record) if records.is_empty() || size + record.len() <= self.max_bytes => {
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
            return Ok(Found::Damaged { seq: start, offset });
        }
        let cursor = Cursor {
            number: segment.number,
            file,
            seq: start + records.len() as u64,
            offset: offset + (bytes.len() - found.rest()) as u64,
        };
        Ok(Found::Chunk(Chunk { first_seq: start, records }, cursor))
    }

    /// What cannot be read is as good as damaged: a local disk that fails to read once will do so again.
    fn read_bytes(&self, file: &F::File, offset: u64, length: usize) -> Vec<u8> {
        read_at_most(&*self.files, file, offset, length).unwrap_or_else(|error| {
            tracing::error!(segment = self.segment.name(), %error, "cannot read a spool segment");
            Vec::new()
        })
    }

    /// Where the first wanted record stands, or the damage in front of it.
    fn seek(&self) -> Result<Place<F::File>, SpoolError> {
        let segment = &self.segment;
        if let Some(cursor) = &self.cursor {
            return Ok(Ok((cursor.file.clone(), cursor.offset)));
        }
        let file = match self.files.open(&segment.name()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Err(Found::Damaged { seq: segment.first_seq, offset: HEADER as u64 }));
            }
            Err(source) => return Err(SpoolError::Open { name: segment.name(), source }),
        };
        let all = self.read_bytes(&file, HEADER as u64, segment.bytes as usize - HEADER);
        let mut offset = HEADER;
        for at in segment.first_seq..self.start {
            let Next::Record(record) = next_frame(&all[offset - HEADER..], at) else {
                return Ok(Err(Found::Damaged { seq: at, offset: offset as u64 }));
            };
            offset += FRAME + record.len();
        }
        Ok(Ok((file, offset as u64)))
    }
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
            let Some(ticket) = self.begin_read(epoch, seq, max_records, max_bytes) else { return Ok(None) };
            if let Some(chunk) = self.finish_read(ticket.run()?) {
                return Ok(Some(chunk));
            }
        }
    }

    /// [`Spool::read`] in three steps, of which the middle one, [`ReadTicket::run`], needs no lock. `None`: there
    /// is nothing to read.
    pub fn begin_read(
        &self,
        epoch: u64,
        seq: u64,
        max_records: usize,
        max_bytes: usize,
    ) -> Option<ReadTicket<F>> {
        let wanted =
            |segment: &&Segment| segment.epoch == epoch && segment.records > 0 && segment.end() > seq;
        let segment = self.segments.iter().find(wanted)?.clone();
        let start = seq.max(segment.first_seq);
        let fits = |cursor: &&Cursor<F::File>| (cursor.number, cursor.seq) == (segment.number, start);
        let cursor = self.cursor.as_ref().filter(fits).cloned();
        Some(ReadTicket { files: Arc::clone(&self.files), segment, start, cursor, max_records, max_bytes })
    }

    /// Takes note of what a read found; `None`: damage was cut out, or the segment gave way meanwhile: begin again.
    pub fn finish_read(&mut self, result: ReadResult<F>) -> Option<Chunk> {
        // As it is now: it may have grown, or be gone and its file with it.
        let segment = self.segments.iter().find(|segment| segment.number == result.number).cloned();
        match (result.found, segment) {
            (Found::Chunk(chunk, cursor), segment) => {
                if segment.is_some() {
                    self.cursor = Some(cursor);
                }
                Some(chunk)
            }
            (Found::Damaged { seq, offset }, Some(segment)) if seq < segment.end() => {
                self.cut(&segment, seq, offset);
                None
            }
            (Found::Damaged { .. }, _) => None,
        }
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
