//! What a start finds on disk.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};

use netmon_common::model::Record;
use serde::{Deserialize, Serialize};

use super::files::{Disk, Files, read_at_most, replace};
use super::format::{HEADER, Header, HeaderError, MAX_SEQ, frames};
use super::log::{Limits, Segment, Spool};

/// Why the spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another agent runs with the same state directory.
    #[error("the spool {0} is in use: another netmon-agent runs; stop it first")]
    InUse(PathBuf),
    /// The directory cannot be made, opened or locked.
    #[error("cannot open the spool directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read spool file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file cannot be repaired, or the start of this run cannot be noted.
    #[error("cannot write spool file {path}; is the disk full or read-only?")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The system has no random number.
    #[error("cannot get a random number for a new spool epoch")]
    Random(#[source] getrandom::Error),
}

/// What the run before left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// This run's number: 1 for the first one with this spool.
    pub run: u32,
    /// The run before did not end in good order.
    pub previous_run_died: bool,
    /// Wall clock of the newest readable record: since then, no agent is known to have recorded.
    pub last_wall_ns: Option<i64>,
    /// Boot clock of the same record (of an earlier boot, maybe).
    pub last_boot_ns: Option<u64>,
    /// Bytes that were cut off because they are no whole records.
    pub damaged_bytes: u64,
    /// Records that wait for the server, as far as the agent knows.
    pub backlog: u64,
    /// True when this run goes on in a new epoch.
    pub new_epoch: bool,
    /// Segments of a newer agent's format, left alone for it.
    pub newer_segments: u32,
}

const RUN_FILE: &str = "run.json";

/// The file that counts the runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RunFile {
    /// The newest run's number.
    pub run: u32,
    /// Epoch and next number at its end in good order.
    pub stopped: Option<(u64, u64)>,
}

impl RunFile {
    /// `None` when it is damaged.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let file: Self = serde_json::from_slice(bytes).ok()?;
        let possible = file.stopped.is_none_or(|(_, next_seq)| (1..=MAX_SEQ).contains(&next_seq));
        possible.then_some(file)
    }

    pub fn write<F: Files>(&self, files: &F) -> Result<(), super::SpoolError> {
        let json = serde_json::to_vec(self).map_err(io::Error::from);
        json.and_then(|json| replace(files, RUN_FILE, &json))
            .map_err(|source| super::SpoolError::RunFile { name: RUN_FILE, source })
    }
}

pub(super) fn segment_name(number: u64) -> String {
    format!("{number:010}.seg")
}

/// Higher numbers are in no name of ours: the next one must fit, too.
const MAX_NUMBER: u64 = u64::MAX / 2;

fn segment_number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(".seg")?.parse().ok()?;
    (number <= MAX_NUMBER && segment_name(number) == name).then_some(number)
}

impl Spool<Disk> {
    /// Opens (or makes) the spool in `directory`, repairs what a crash left, and begins a run. Reads every
    /// segment: blocks for as long as that takes.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(directory: &Path, limits: Limits) -> Result<(Self, Recovered), OpenError> {
        let files = Disk::open(directory).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => OpenError::InUse(directory.to_owned()),
            _ => OpenError::Directory { path: directory.to_owned(), source },
        })?;
        Self::open_in(files, directory, limits)
    }
}

/// A segment as it was found.
struct Found {
    segment: Segment,
    run: u32,
    /// Header and whole records; kept only while it may have to be written again.
    whole: Option<Vec<u8>>,
    /// Bytes behind the whole records.
    rest: u64,
    newest: Option<Record>,
}

impl<F: Files> Spool<F> {
    /// [`Spool::open`] in any directory; `path` is for messages.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_in(files: F, path: &Path, limits: Limits) -> Result<(Self, Recovered), OpenError> {
        let read_failed = |name: &str, source| OpenError::Read { path: path.join(name), source };
        let write_failed = |name: &str, source| OpenError::Write { path: path.join(name), source };
        let mut recovered = Recovered::default();

        let mut names =
            files.list().map_err(|source| OpenError::Directory { path: path.to_owned(), source })?;
        names.sort_unstable();
        for tmp in names.iter().filter(|name| name.ends_with(".tmp")) {
            files.remove(tmp).map_err(|source| write_failed(tmp, source))?;
        }
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
        // Beyond ten digits, names sort in another order.
        numbers.sort_unstable();
        let next_number = numbers.iter().max().map_or(1, |newest| newest + 1);

        let run_file: Option<RunFile> = if names.iter().any(|name| name == RUN_FILE) {
            let bytes = read_all(&files, RUN_FILE).map_err(|source| read_failed(RUN_FILE, source))?;
            // Damaged: as good as missing; the run is known from the segments, and a new epoch begins.
            RunFile::parse(&bytes)
        } else {
            None
        };

        let mut found: Vec<Found> = Vec::new();
        for number in numbers {
            let name = segment_name(number);
            let bytes = read_all(&files, &name).map_err(|source| read_failed(&name, source))?;
            match Header::decode(&bytes) {
                Ok(header) if header.number == number => found.push(examine(header, bytes)),
                Err(HeaderError::Newer(version)) => {
                    tracing::warn!(segment = name, version, "spool segment of a newer agent is left alone");
                    recovered.newer_segments += 1;
                }
                Ok(_) | Err(HeaderError::Damaged) => {
                    // Without a byte behind its header it never held a record.
                    if bytes.len() > HEADER {
                        recovered.damaged_bytes += bytes.len() as u64;
                    }
                    files.remove(&name).map_err(|source| write_failed(&name, source))?;
                }
            }
        }

        let known_runs = found.iter().map(|found| found.run).chain(run_file.map(|file| file.run));
        let last_run = known_runs.max().unwrap_or(0);
        recovered.run = last_run.saturating_add(1);
        let stopped = run_file.and_then(|file| file.stopped);
        recovered.previous_run_died = last_run > 0 && stopped.is_none();

        repair(&files, &mut found, &mut recovered).map_err(|(name, source)| write_failed(&name, source))?;

        let newest = found.iter().rev().find_map(|found| found.newest.as_ref());
        recovered.last_wall_ns = newest.map(|record| record.wall_ns);
        recovered.last_boot_ns = newest.map(|record| record.boot_ns);

        let segments: VecDeque<Segment> = found.into_iter().map(|found| found.segment).collect();
        let position = if recovered.damaged_bytes == 0 && recovered.newer_segments == 0 {
            run_file.and_then(|_| go_on_at(stopped, &segments))
        } else {
            None
        };
        recovered.new_epoch = position.is_none();
        let position = match position {
            Some(position) => position,
            None => (getrandom::u64().map_err(OpenError::Random)?, 1),
        };

        let run_file = RunFile { run: recovered.run, stopped: None };
        if let Err(super::SpoolError::RunFile { name, source }) = run_file.write(&files) {
            return Err(write_failed(name, source));
        }
        let spool = Self::new(files, limits, recovered.run, position, next_number, segments);
        recovered.backlog = spool.stats().backlog;
        Ok((spool, recovered))
    }
}

/// Where an epoch surely ended, so that this run may go on in it.
fn go_on_at(stopped: Option<(u64, u64)>, segments: &VecDeque<Segment>) -> Option<(u64, u64)> {
    let end = segments.back().map(|last| {
        let same = segments.iter().filter(|segment| segment.epoch == last.epoch);
        (last.epoch, same.map(Segment::end).max().unwrap_or(1))
    });
    match (stopped, end) {
        // All was acknowledged and removed.
        (Some(stopped), None) => Some(stopped),
        (Some(stopped), Some(end)) => (stopped == end).then_some(end),
        (None, end) => end,
    }
}

fn examine(header: Header, mut bytes: Vec<u8>) -> Found {
    let mut all = frames(&bytes[HEADER..], header.first_seq);
    let (mut records, mut first, mut last) = (0, None, None);
    for record in &mut all {
        records += 1;
        first = first.or(Some(record));
        last = Some(record);
    }
    let rest = all.rest();
    let decode = |bytes: Option<&[u8]>| bytes.and_then(|bytes| Record::from_bytes(bytes).ok());
    let (first, newest) = (decode(first), decode(last));
    let walls = first.as_ref().zip(newest.as_ref()).map(|(first, last)| (first.wall_ns, last.wall_ns));
    bytes.truncate(bytes.len() - rest);
    let segment = Segment {
        number: header.number,
        epoch: header.epoch,
        first_seq: header.first_seq,
        records,
        bytes: bytes.len() as u64,
        acked_next: header.first_seq,
        walls,
    };
    Found { segment, run: header.run, whole: Some(bytes), rest: rest as u64, newest }
}

/// Cuts torn ends off, removes empty segments, and writes the newest segment anew after a run that died: after
/// a failed fsync the page cache may show what the disk does not have.
fn repair<F: Files>(
    files: &F,
    found: &mut Vec<Found>,
    recovered: &mut Recovered,
) -> Result<(), (String, io::Error)> {
    let failed = |segment: &Segment, source| (segment.name(), source);
    for index in 0..found.len() {
        let Some((this, later)) = found[index..].split_first_mut() else { break };
        if this.rest > 0 {
            // What the segment did not sync was written again into a later one: no damage.
            let end = this.segment.end();
            let goes_on = later.iter().any(|later| {
                later.segment.epoch == this.segment.epoch
                    && (later.segment.first_seq..=later.segment.end()).contains(&end)
                    && later.segment.records > 0
            });
            if !goes_on {
                recovered.damaged_bytes += this.rest;
            }
        }
        let is_newest = later.iter().all(|later| later.segment.records == 0);
        let must_rewrite = this.rest > 0 || (is_newest && recovered.previous_run_died);
        if let Some(whole) = this.whole.take_if(|_| must_rewrite && this.segment.records > 0) {
            replace(files, &this.segment.name(), &whole).map_err(|source| failed(&this.segment, source))?;
        }
        this.whole = None;
    }
    for empty in found.extract_if(.., |found| found.segment.records == 0) {
        files.remove(&empty.segment.name()).map_err(|source| failed(&empty.segment, source))?;
    }
    Ok(())
}

fn read_all<F: Files>(files: &F, name: &str) -> io::Result<Vec<u8>> {
    const STEP: usize = 1 << 20;
    let file = files.open(name)?;
    let mut all = Vec::new();
    loop {
        let part = read_at_most(files, &file, all.len() as u64, STEP)?;
        let is_last = part.len() < STEP;
        all.extend(part);
        if is_last {
            return Ok(all);
        }
    }
}
