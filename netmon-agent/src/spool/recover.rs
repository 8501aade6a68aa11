//! What a start finds on disk.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use netmon_common::model::Record;
use serde::{Deserialize, Serialize};

use super::files::{Disk, Files, remove_if_there, replace};
use super::format::{HEADER, Header, HeaderError, MAX_SEQ, frames};
use super::log::{Limits, Spool, SpoolError};
use super::segment::Segment;

/// Why the spool cannot be used. A directory that cannot be read or written is no reason: it is waited for.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another agent runs with the same state directory.
    #[error("the spool {0} is in use: another netmon-agent runs; stop it first")]
    InUse(PathBuf),
    /// The system has no random number.
    #[error("cannot get a random number for a new spool epoch")]
    Random(#[source] io::Error),
}

/// What the run before left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// This run's number: 1 for the first one with this spool; 0 if the spool could not be read.
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
    /// Something of the directory could not be read, repaired or written: each sync tries again. What is not known here
    /// and what is then found damaged comes with [`Spool::take_gaps`].
    pub is_incomplete: bool,
}

pub(super) const RUN_FILE: &str = "run.json";

/// The file that counts the runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RunFile {
    /// The newest run's number.
    pub run: u32,
    /// Epoch and next number at its end in good order.
    pub stopped: Option<(u64, u64)>,
    /// The epoch in which it recorded last. Written before damage is cut off: where the segments end in another epoch, that
    /// one is over, and its numbers may have been given to records that are not there any more.
    #[serde(default)]
    pub epoch: Option<u64>,
}

/// The file as it is written.
#[derive(Serialize, Deserialize)]
struct Checked {
    #[serde(flatten)]
    file: RunFile,
    #[serde(default)]
    crc: Option<u32>,
}

impl RunFile {
    /// `None` when it is damaged.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let Checked { file, crc } = serde_json::from_slice(bytes).ok()?;
        let possible = file.stopped.is_none_or(|(_, next_seq)| (1..=MAX_SEQ).contains(&next_seq));
        // Netmon 0.1.0 wrote neither epoch nor checksum.
        let is_whole = crc.map_or(file.epoch.is_none(), |crc| crc == file.crc());
        (possible && is_whole).then_some(file)
    }

    fn crc(&self) -> u32 {
        let (epoch, next_seq) = self.stopped.unwrap_or_default();
        let words = [self.run.into(), epoch, next_seq, self.epoch.unwrap_or_default()];
        words.iter().fold(0, |crc, word: &u64| crc32c::crc32c_append(crc, &word.to_le_bytes()))
    }

    /// Where an epoch surely ended, so that a run may go on in it. `segments`: in order, none of them empty.
    fn go_on_at<'a>(&self, segments: impl Iterator<Item = &'a Segment> + Clone) -> Option<(u64, u64)> {
        let end = segments.clone().last().map(|last| {
            let same = segments.filter(|segment| segment.epoch == last.epoch);
            (last.epoch, same.map(Segment::end).max().unwrap_or(1))
        });
        let position = match (self.stopped, end) {
            // All was acknowledged and removed.
            (Some(stopped), None) => Some(stopped),
            (Some(stopped), Some(end)) => (stopped == end).then_some(end),
            (None, end) => end,
        };
        position.filter(|(epoch, _)| self.epoch.is_none_or(|own| own == *epoch))
    }

    pub fn write<F: Files>(&self, files: &F) -> io::Result<()> {
        let checked = Checked { file: *self, crc: Some(self.crc()) };
        replace(files, RUN_FILE, &serde_json::to_vec(&checked)?)?;
        files.sync_directory()
    }
}

pub(super) fn segment_name(number: u64) -> String {
    format!("{number:010}.seg")
}

/// Files with more digits get lower numbers at a start: no spool counts that far, and behind the highest number of all
/// there would be none for the next file.
const MAX_NUMBER: u64 = 9_999_999_999;

fn segment_number(name: &str) -> Option<u64> {
    let number = name.strip_suffix(".seg")?.parse().ok()?;
    (segment_name(number) == name).then_some(number)
}

impl Spool<Disk> {
    /// Opens (or makes) the spool in `directory`, repairs what a crash left, and begins a run. Reads every
    /// segment: blocks for as long as that takes. Where that fails, the run begins nevertheless, in memory.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(directory: &Path, limits: Limits) -> Result<(Self, Recovered), OpenError> {
        Self::open_in(Disk::new(directory), directory, limits, || Ok(getrandom::u64()?))
    }
}

/// A segment as it was found.
struct Found {
    segment: Segment,
    header: Header,
    /// Header and whole frames; kept only while they may have to be written again.
    whole: Option<Vec<u8>>,
    /// Bytes behind the whole frames.
    rest: u64,
    newest: Option<Record>,
}

/// What is in the directory, repaired as far as it can be written.
pub struct Survey {
    recovered: Recovered,
    segments: VecDeque<Segment>,
    next_number: u64,
    /// Where the run before stopped, if it is sure that this one may go on there.
    position: Option<(u64, u64)>,
    /// The run file could not be written.
    run_file_due: bool,
    leftovers: Vec<String>,
}

/// The reading of a directory that could not be read so far; see [`Spool::begin_recovery`].
pub struct RecoveryTicket<F: Files = Disk> {
    files: Arc<F>,
    epoch: u64,
}

impl<F: Files> RecoveryTicket<F> {
    /// Reads every segment: may take long, needs no lock. Give the result to [`Spool::finish_recovery`].
    ///
    /// # Errors
    /// [`SpoolError::Recover`]: worth another try.
    pub fn run(&self) -> Result<Survey, SpoolError> {
        // Records wait for their disk under this epoch's numbers.
        survey(&*self.files, self.epoch, false)
    }
}

impl<F: Files> Spool<F> {
    /// [`Spool::open`] in any directory; `path` is for messages, `random` makes the numbers of new epochs.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_in(
        files: F,
        path: &Path,
        limits: Limits,
        mut random: impl FnMut() -> io::Result<u64> + Send + 'static,
    ) -> Result<(Self, Recovered), OpenError> {
        let epoch = random().map_err(OpenError::Random)?;
        let mut spool = Self::new(files, limits, epoch, Box::new(random));
        let mut recovered = match survey(&*spool.files, spool.epoch, true) {
            Ok(survey) => {
                let recovered = survey.recovered;
                spool.run = recovered.run;
                if let Some((epoch, next_seq)) = survey.position {
                    (spool.epoch, spool.next_seq, spool.synced_next) = (epoch, next_seq, next_seq);
                }
                spool.install(survey);
                recovered
            }
            Err(SpoolError::Recover { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                return Err(OpenError::InUse(path.to_owned()));
            }
            Err(error) => {
                spool.trouble = Some(crate::chain(&error));
                Recovered { new_epoch: true, ..Recovered::default() }
            }
        };
        recovered.is_incomplete = spool.run_file_due || !spool.leftovers.is_empty() || !spool.is_settled();
        if recovered.is_incomplete {
            let trouble = spool.trouble.as_deref().unwrap_or("a file cannot be written or removed");
            tracing::error!(
                spool = %path.display(),
                trouble,
                "the spool cannot be read or written; records wait in memory, trying again"
            );
        }
        recovered.backlog = spool.stats().backlog;
        Ok((spool, recovered))
    }

    /// `None`: the directory was read.
    pub fn begin_recovery(&self) -> Option<RecoveryTicket<F>> {
        let ticket = || RecoveryTicket { files: Arc::clone(&self.files), epoch: self.epoch };
        (!self.is_surveyed).then(ticket)
    }

    /// Takes note of what was found; this run's epoch goes on behind it.
    ///
    /// # Errors
    /// [`SpoolError::Recover`]: the ticket's own; another one will be handed out.
    pub fn finish_recovery(&mut self, result: Result<Survey, SpoolError>) -> Result<(), SpoolError> {
        let survey = result.inspect_err(|error| self.trouble = Some(crate::chain(error)))?;
        let Recovered { damaged_bytes, last_wall_ns, .. } = survey.recovered;
        self.total_damaged += damaged_bytes;
        let last = last_wall_ns.unwrap_or_default();
        self.damaged.add(damaged_bytes, (last, last));
        self.install(survey);
        Ok(())
    }

    fn install(&mut self, survey: Survey) {
        self.is_surveyed = true;
        self.counted_run = survey.recovered.run;
        self.next_number = survey.next_number;
        self.run_file_due = survey.run_file_due;
        self.segments = survey.segments;
        self.leftovers = survey.leftovers;
    }
}

/// `epoch`: where this run records, unless it `may_go_on` in the one before.
fn survey<F: Files>(files: &F, epoch: u64, may_go_on: bool) -> Result<Survey, SpoolError> {
    let failed = |name: &str, source| SpoolError::Recover { name: name.to_owned(), source };
    let mut recovered = Recovered::default();

    let names = files.make_directory().and_then(|()| files.list());
    let mut names = names.map_err(|source| failed("the directory", source))?;
    names.sort_unstable();
    let mut useless: Vec<String> = names.iter().filter(|name| name.ends_with(".tmp")).cloned().collect();
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
    // Beyond ten digits, names sort in another order.
    numbers.sort_unstable();
    let mut newest_number = numbers.iter().copied().filter(|number| *number <= MAX_NUMBER).max().unwrap_or(0);

    let run_file: Option<RunFile> = if names.iter().any(|name| name == RUN_FILE) {
        let (bytes, _) = read_all(files, RUN_FILE).map_err(|source| failed(RUN_FILE, source))?;
        // Damaged: as good as missing; the run is known from the segments, and a new epoch begins.
        RunFile::parse(&bytes)
    } else {
        None
    };

    let mut found: Vec<Found> = Vec::new();
    let mut unreadable = None;
    for number in numbers.iter().copied() {
        let name = segment_name(number);
        let (mut bytes, error) = read_all(files, &name).map_err(|source| failed(&name, source))?;
        let is_whole = error.is_none();
        if let Some(error) = error {
            tracing::error!(segment = name, %error, "a spool segment cannot be read to its end");
            unreadable.get_or_insert((name.clone(), error));
        }
        match Header::decode(&bytes) {
            Ok(mut header) if header.number == number && may_follow(&found, &header) => {
                if number > MAX_NUMBER {
                    // Not the next one: what was between the two files is not known.
                    header.number = free_number(newest_number + 2, &numbers).min(number);
                    move_segment(files, number, &header, &mut bytes)
                        .map_err(|source| failed(&name, source))?;
                    newest_number = header.number;
                }
                let mut new = examine(header, bytes);
                // How much there was is not known.
                new.rest = new.rest.max(u64::from(!is_whole));
                push(&mut found, new);
            }
            Err(HeaderError::Newer(version)) => {
                tracing::warn!(segment = name, version, "spool segment of a newer agent is left alone");
                recovered.newer_segments += 1;
            }
            Ok(_) | Err(HeaderError::Damaged) => {
                // Without a byte behind its header it never held a record.
                if bytes.len() > HEADER || !is_whole {
                    recovered.damaged_bytes += (bytes.len() as u64).max(1);
                }
                useless.push(name);
            }
        }
    }

    let known_runs = found.iter().map(|found| found.header.run).chain(run_file.map(|file| file.run));
    let last_run = known_runs.max().unwrap_or(0);
    recovered.run = last_run.saturating_add(1);
    // A later run that could not write the file did not end in good order.
    let stopped = run_file.filter(|file| file.run == last_run).and_then(|file| file.stopped);
    recovered.previous_run_died = last_run > 0 && stopped.is_none();

    count_torn(&found, &mut recovered);
    let is_whole = recovered.damaged_bytes == 0 && recovered.newer_segments == 0;
    let filled = || found.iter().map(|found| &found.segment).filter(|segment| segment.span > 0);
    let mut position = run_file.filter(|_| is_whole && may_go_on).and_then(|file| file.go_on_at(filled()));
    let epoch = Some(position.map_or(epoch, |(epoch, _)| epoch));
    // Before what tells of damage goes.
    let mut run_file_due = RunFile { run: recovered.run, stopped: None, epoch }.write(files).is_err();
    if let Some((name, source)) = unreadable.filter(|_| run_file_due) {
        // The disk as a whole is in trouble: nothing is given up yet.
        return Err(failed(&name, source));
    }
    repair(files, &mut found, stopped, !run_file_due);
    useless.extend(found.extract_if(.., |found| found.segment.span == 0).map(|found| found.segment.name()));
    useless.retain(|name| run_file_due || remove_if_there(files, name).is_err());
    if found.iter().any(|found| found.segment.is_held) {
        // It must not seem to have given way, and this run's records need not wait for it.
        (position, run_file_due) = (None, true);
    }
    recovered.new_epoch = position.is_none();

    let newest = found.iter().rev().find_map(|found| found.newest.as_ref());
    recovered.last_wall_ns = newest.map(|record| record.wall_ns);
    recovered.last_boot_ns = newest.map(|record| record.boot_ns);

    let segments: VecDeque<Segment> = found.into_iter().map(|found| found.segment).collect();
    let next_number = free_number(newest_number + 1, &numbers);
    Ok(Survey { recovered, segments, next_number, position, run_file_due, leftovers: useless })
}

/// The first one from here on that is not in use.
fn free_number(from: u64, taken: &[u64]) -> u64 {
    (from..=u64::MAX).find(|number| taken.binary_search(number).is_err()).unwrap_or(u64::MAX)
}

/// Gives the segment `number` the number in `header`. A crash leaves it under either, or under both, one behind the other:
/// then the next start takes the records of one of them.
fn move_segment<F: Files>(files: &F, number: u64, header: &Header, bytes: &mut [u8]) -> io::Result<()> {
    if header.number == number {
        return Ok(());
    }
    bytes[..HEADER].copy_from_slice(&header.encode());
    replace(files, &segment_name(header.number), bytes)?;
    files.sync_directory()?;
    remove_if_there(files, &segment_name(number))?;
    files.sync_directory()
}

/// May a segment of ours stand behind the others? No run records in an epoch again that another one followed, nor under
/// numbers again behind which the spool went on.
fn may_follow(found: &[Found], header: &Header) -> bool {
    let Header { epoch, first_seq, .. } = *header;
    let mut filled = found.iter().rev().filter(|found| found.segment.span > 0).peekable();
    while let Some(before) = filled.next_if(|found| found.segment.epoch == epoch) {
        if before.segment.end() > first_seq && before.whole.is_none() {
            return false;
        }
    }
    !filled.any(|found| found.segment.epoch == epoch)
}

fn examine(header: Header, mut bytes: Vec<u8>) -> Found {
    let (segment, newest) = Segment::examine(&header, &bytes[HEADER..]);
    let rest = bytes.len() as u64 - segment.bytes;
    bytes.truncate(segment.bytes as usize);
    Found { segment, header, whole: Some(bytes), rest, newest }
}

/// Adds a segment behind the others. What it begins with was not synced in the one before, which a failed fsync ended
/// there: what is seen of it there counts for nothing, or it would be taken for synced as soon as this one is gone.
fn push(found: &mut Vec<Found>, new: Found) {
    let Segment { epoch, first_seq, span, .. } = new.segment;
    if span > 0 {
        let same = found
            .iter_mut()
            .rev()
            .take_while(|found| found.segment.span == 0 || found.segment.epoch == epoch);
        same.filter(|found| found.segment.end() > first_seq).for_each(|found| found.cut(first_seq));
    }
    let before = found.iter_mut().rev().find(|found| found.segment.span > 0);
    if span > 0
        && let Some(before) = before
    {
        let is_next = new.header.number == before.header.number + 1;
        if is_next && (before.segment.epoch, before.segment.end()) == (epoch, first_seq) && before.rest == 0 {
            // It was synced before this one began. One between them, which is not there any more, would have told that.
            before.whole = None;
        }
    }
    found.push(new);
}

impl Found {
    /// Ends it before record `seq`.
    fn cut(&mut self, seq: u64) {
        let Some(whole) = &mut self.whole else { return };
        let mut all = frames(&whole[HEADER..], self.header.first_seq);
        let mut kept = 0;
        while let Some((at, frame)) = all.next()
            && at + frame.span() <= seq
        {
            kept += frame.length();
        }
        let cut = whole.len() - HEADER - kept;
        whole.truncate(HEADER + kept);
        self.rest += cut as u64;
        (self.segment, self.newest) = Segment::examine(&self.header, &whole[HEADER..]);
    }
}

/// Counts the bytes behind whole records, but for what a segment did not sync: that was written again into a later one.
fn count_torn(found: &[Found], recovered: &mut Recovered) {
    for (index, this) in found.iter().enumerate().filter(|(_, found)| found.rest > 0) {
        let end = this.segment.end();
        let goes_on = found[index + 1..].iter().map(|later| &later.segment).any(|later| {
            later.epoch == this.segment.epoch
                && later.span > 0
                && (later.first_seq..=later.end()).contains(&end)
        });
        if !goes_on {
            recovered.damaged_bytes += this.rest;
        }
    }
}

/// Cuts torn ends off, and writes every segment anew that no next one goes on from, but for the one whose end a run closed:
/// after a failed fsync the page cache may show what the disk does not have. A segment that cannot be written is held back
/// until it can.
fn repair<F: Files>(files: &F, found: &mut [Found], stopped: Option<(u64, u64)>, is_writable: bool) {
    let last = found.len().saturating_sub(1);
    for (index, this) in found.iter_mut().enumerate() {
        let is_closed = index == last && stopped == Some((this.segment.epoch, this.segment.end()));
        let doubtful = this.whole.take().filter(|_| this.segment.span > 0 && (this.rest > 0 || !is_closed));
        if let Some(whole) = doubtful {
            let write = || replace(files, &this.segment.name(), &whole).and_then(|()| files.sync_directory());
            this.segment.is_held = !is_writable || write().is_err();
        }
    }
}

/// What is in a file, and why that is not all. What cannot be read is as good as damaged, as for a reader: otherwise one bad
/// block would keep the whole spool from being used.
///
/// # Errors
/// It cannot be opened: worth another try.
fn read_all<F: Files>(files: &F, name: &str) -> io::Result<(Vec<u8>, Option<io::Error>)> {
    const STEP: usize = 1 << 20;
    let file = files.open(name)?;
    let (mut all, mut part) = (Vec::new(), vec![0; STEP]);
    loop {
        match files.read_at(&file, &mut part, all.len() as u64) {
            Ok(0) => return Ok((all, None)),
            Ok(n) => all.extend_from_slice(&part[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Ok((all, Some(error))),
        }
    }
}
