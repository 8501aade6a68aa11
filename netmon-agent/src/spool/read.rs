//! Reading back what waits for the server.

use std::io;
use std::sync::Arc;

use netmon_common::model::MAX_RECORD;
use netmon_common::wire::Item;

use super::files::{Disk, Files, read_at_most};
use super::format::{Frame, HEADER, HOLE_FRAME, frames};
use super::log::{Spool, SpoolError};
use super::segment::Segment;

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

/// Records read back, and holes where some gave way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Number of the first item.
    pub first_seq: u64,
    /// Numbered on from there; each takes [`Item::span`] numbers. Never empty.
    pub items: Vec<Item>,
}

impl Chunk {
    /// The number behind the last item.
    pub fn next_seq(&self) -> u64 {
        self.first_seq + self.items.iter().map(Item::span).sum::<u64>()
    }

    /// Record `seq`, if that is what it begins with.
    pub(super) fn into_record(self, seq: u64) -> Option<Vec<u8>> {
        match self.items.into_iter().next() {
            Some(Item::Record(record)) if self.first_seq == seq => Some(record),
            _ => None,
        }
    }
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
    max_items: usize,
    max_bytes: usize,
}

/// What a read found; see [`Spool::finish_read`].
pub struct ReadResult<F: Files = Disk> {
    number: u64,
    version: u32,
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

/// Where the frame with the first wanted number stands, as a cursor, or the damage in front of that.
type Place<H> = Result<Cursor<H>, Found<H>>;

impl<F: Files> ReadTicket<F> {
    /// Reads: may take long, needs no lock. Give the result to [`Spool::finish_read`].
    ///
    /// # Errors
    /// [`SpoolError::Open`]: worth another try.
    pub fn run(&self) -> Result<ReadResult<F>, SpoolError> {
        Ok(ReadResult { number: self.segment.number, version: self.segment.version, found: self.find()? })
    }

    fn find(&self) -> Result<Found<F::File>, SpoolError> {
        let (segment, start) = (&self.segment, self.start);
        let Cursor { file, seq, offset, .. } = match self.seek()? {
            Ok(place) => place,
            Err(damaged) => return Ok(damaged),
        };
        // The segment's file may be another one by now, with holes where there were records.
        let left = segment.bytes.saturating_sub(offset) as usize;
        let length = left.min(self.max_bytes.max(MAX_RECORD) + (self.max_items.max(1) + 1) * HOLE_FRAME);
        let bytes = self.read_bytes(&file, offset, length);
        let mut found = frames(&bytes, seq);
        let mut size = 0;
        let mut items = Vec::new();
        while items.len() < self.max_items.max(1) && found.seq() < segment.end() {
            let behind = found.clone();
            match found.next() {
                Some((_, Frame::Record(record)))
                    if items.is_empty() || size + record.len() <= self.max_bytes =>
                {
                    size += record.len();
                    items.push(Item::Record(record.to_vec()));
                }
                Some((at, Frame::Hole(count))) => items.push(Item::Hole(at + count - at.max(start))),
                _ => {
                    found = behind;
                    break;
                }
            }
        }
        if items.is_empty() {
            return Ok(Found::Damaged { seq, offset });
        }
        let cursor = Cursor {
            number: segment.number,
            file,
            seq: found.seq(),
            offset: offset + (bytes.len() - found.rest()) as u64,
        };
        Ok(Found::Chunk(Chunk { first_seq: start, items }, cursor))
    }

    /// What cannot be read is as good as damaged: a local disk that fails to read once will do so again.
    fn read_bytes(&self, file: &F::File, offset: u64, length: usize) -> Vec<u8> {
        read_at_most(&*self.files, file, offset, length).unwrap_or_else(|error| {
            tracing::error!(segment = self.segment.name(), %error, "cannot read a spool segment");
            Vec::new()
        })
    }

    fn seek(&self) -> Result<Place<F::File>, SpoolError> {
        let segment = &self.segment;
        if let Some(cursor) = &self.cursor {
            return Ok(Ok(cursor.clone()));
        }
        let file = match self.files.open(&segment.name()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Err(Found::Damaged { seq: segment.first_seq, offset: HEADER as u64 }));
            }
            Err(source) => return Err(SpoolError::Open { name: segment.name(), source }),
        };
        let all = self.read_bytes(&file, HEADER as u64, segment.bytes as usize - HEADER);
        let mut found = frames(&all, segment.first_seq);
        loop {
            let behind = found.clone();
            let offset = (HEADER + all.len() - behind.rest()) as u64;
            let seq = behind.seq();
            match found.next() {
                Some((at, frame)) if at + frame.span() > self.start => {
                    return Ok(Ok(Cursor { number: segment.number, file, seq, offset }));
                }
                Some(_) => {}
                None => return Ok(Err(Found::Damaged { seq, offset })),
            }
        }
    }
}

impl<F: Files> Spool<F> {
    /// What waits for the server, epoch by epoch, oldest first. The last one is the epoch that is being
    /// written, even when nothing of it waits.
    pub fn epochs(&self) -> Vec<EpochRange> {
        let mut ranges: Vec<EpochRange> = Vec::new();
        let mut held = None;
        for segment in self.segments.iter().filter(|segment| !segment.is_done()) {
            // What stands behind it waits with it, so that nobody takes it for a hole.
            if segment.is_held {
                held = Some(segment.epoch);
            }
            if held == Some(segment.epoch) {
                continue;
            }
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

    /// Synced records of `epoch` from `seq` on, or from the next number that is still there: compare
    /// [`Chunk::first_seq`]. At most `max_items` and some `max_bytes`, at least one item; `None`: there is none.
    ///
    /// Damage is cut out, counted, and leads to a [`Gap`](netmon_common::model::Gap).
    ///
    /// # Errors
    /// [`SpoolError::Open`]: worth another try.
    pub fn read(
        &mut self,
        epoch: u64,
        seq: u64,
        max_items: usize,
        max_bytes: usize,
    ) -> Result<Option<Chunk>, SpoolError> {
        loop {
            let Some(ticket) = self.begin_read(epoch, seq, max_items, max_bytes) else { return Ok(None) };
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
        max_items: usize,
        max_bytes: usize,
    ) -> Option<ReadTicket<F>> {
        let wanted = |segment: &&Segment| segment.epoch == epoch && segment.span > 0 && segment.end() > seq;
        let segment = self.segments.iter().find(wanted).filter(|segment| !segment.is_held)?.clone();
        let start = seq.max(segment.first_seq);
        let fits = |cursor: &&Cursor<F::File>| (cursor.number, cursor.seq) == (segment.number, start);
        let cursor = self.cursor.as_ref().filter(fits).cloned();
        Some(ReadTicket { files: Arc::clone(&self.files), segment, start, cursor, max_items, max_bytes })
    }

    /// Takes note of what a read found; `None`: damage was cut out, or the segment gave way meanwhile: begin again.
    pub fn finish_read(&mut self, result: ReadResult<F>) -> Option<Chunk> {
        // As it is now: it may have grown, or be gone and its file with it. While it is written anew, its file may be the
        // old one or the new one, and offsets say nothing.
        let is_same =
            |segment: &&Segment| (segment.number, segment.version) == (result.number, result.version);
        let segment = self.segments.iter().find(is_same).cloned();
        let segment = segment.filter(|_| self.rewriting != Some(result.number));
        match result.found {
            Found::Chunk(chunk, cursor) => {
                if segment.is_some() {
                    self.cursor = Some(cursor);
                }
                Some(chunk)
            }
            Found::Damaged { seq, offset } => {
                if let Some(segment) = segment.filter(|segment| seq < segment.end()) {
                    self.cut(&segment, seq, offset);
                }
                None
            }
        }
    }

    /// One synced record's bytes; `None`: it is not there, or not any more.
    ///
    /// # Errors
    /// [`SpoolError::Open`]: worth another try.
    pub fn record(&mut self, epoch: u64, seq: u64) -> Result<Option<Vec<u8>>, SpoolError> {
        Ok(self.read(epoch, seq, 1, 0)?.and_then(|chunk| chunk.into_record(seq)))
    }

    /// Gives up a segment's numbers from `seq` on: they cannot be read.
    pub(super) fn cut(&mut self, segment: &Segment, seq: u64, offset: u64) {
        self.count_damage(segment, offset);
        if self.active.is_some() && self.segments.back().is_some_and(|last| last.number == segment.number) {
            self.leave_segment();
        }
        for cut in self.segments.iter_mut().filter(|other| other.number == segment.number) {
            cut.span = seq - cut.first_seq;
            cut.records = cut.records.min(cut.span);
            cut.bytes = offset;
            cut.is_held = false;
        }
    }
}
