//! The server's disk, in memory: it fails on demand, and at a power cut it forgets what was not synced.
//!
//! What it does as a disk under Linux does:
//!
//! * a power cut keeps what was synced, and any part of what was not, sector by sector, in any order; names that were made
//!   or removed since they were synced, each for itself;
//! * after a failed fsync readers still see what it was to bring to disk, and the next fsync says "done" without bringing
//!   it: only what is written again comes to disk;
//! * a call that is interrupted by the machine's death may be done in part.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What comes to disk wholly or not at all.
const SECTOR: usize = 512;

/// Why a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// I/O error.
    Io,
    /// No space left.
    Full,
    /// There is no such file.
    NotFound,
}

/// What went wrong on a disk, counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mishaps {
    /// Calls other than fsync that failed.
    pub io_errors: u64,
    /// Failed fsyncs.
    pub failed_syncs: u64,
    /// Writes for which there was no space.
    pub full: u64,
    /// Power cuts that lost something that was written and not synced.
    pub lossy_cuts: u64,
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Truncate(usize),
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => write(content, *offset, bytes),
            Self::Truncate(length) => content.truncate(*length),
        }
    }

    /// As much of it as chance wants.
    fn apply_in_part(&self, content: &mut Vec<u8>, rng: &mut fastrand::Rng) {
        let Self::Write { offset, bytes } = self else {
            if rng.bool() {
                self.apply(content);
            }
            return;
        };
        let mut at = 0;
        while at < bytes.len() {
            let length = (SECTOR - (offset + at) % SECTOR).min(bytes.len() - at);
            if rng.bool() {
                write(content, offset + at, &bytes[at..at + length]);
            }
            at += length;
        }
    }
}

fn write(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(bytes);
}

#[derive(Debug, Default)]
struct Content {
    /// What a reader sees.
    seen: Vec<u8>,
    /// What surely is on disk.
    synced: Vec<u8>,
    /// What the next fsync brings there.
    pending: Vec<Change>,
}

/// A file, with a name or not any more.
#[derive(Clone, Debug, Default)]
pub struct File(Arc<Mutex<Content>>);

impl File {
    fn of(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Content { seen: bytes.clone(), synced: bytes, pending: Vec::new() })))
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the disk is to do wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trouble {
    /// Calls that change something until one fails.
    pub fails_in: Option<u64>,
    /// Calls that change something until the process or the machine dies in the middle of one.
    pub dies_in: Option<u64>,
    /// Of 256 calls so many fail.
    pub rate: u8,
    /// Bytes that still fit.
    pub space: Option<usize>,
}

#[derive(Debug)]
struct State {
    names: BTreeMap<String, File>,
    synced_names: BTreeMap<String, File>,
    trouble: Trouble,
    /// Counts the processes that use it: the files that an earlier one opened are of no use any more.
    life: u64,
    is_dead: bool,
    skips_syncs: bool,
    rng: fastrand::Rng,
    mishaps: Mishaps,
    /// What was asked of it, where that is wanted.
    log: Option<Vec<String>>,
}

/// The disk. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    /// An empty one.
    pub fn new(seed: u64) -> Self {
        Self::with(BTreeMap::new(), fastrand::Rng::with_seed(seed))
    }

    fn with(names: BTreeMap<String, File>, rng: fastrand::Rng) -> Self {
        Self(Arc::new(Mutex::new(State {
            synced_names: names.clone(),
            names,
            trouble: Trouble::default(),
            life: 0,
            is_dead: false,
            skips_syncs: false,
            rng,
            mishaps: Mishaps::default(),
            log: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it does this wrong.
    pub fn set_trouble(&self, trouble: Trouble) {
        self.state().trouble = trouble;
    }

    /// Makes it a disk that lies: fsync does nothing.
    pub fn skip_syncs(&self) {
        self.state().skips_syncs = true;
    }

    /// From now on it remembers what was asked of it, for [`Disk::take_log`].
    pub fn keep_log(&self) {
        self.state().log = Some(Vec::new());
    }

    /// What was asked of it since the last call.
    pub fn take_log(&self) -> Vec<String> {
        self.state().log.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Has the process or the machine died in the middle of a call?
    pub fn is_dead(&self) -> bool {
        self.state().is_dead
    }

    /// What went wrong so far.
    pub fn mishaps(&self) -> Mishaps {
        self.state().mishaps
    }

    /// Which process uses it now.
    pub fn life(&self) -> u64 {
        self.state().life
    }

    /// The process that uses it is killed: what it had open is of no use any more, what it has written stays.
    pub fn kill(&self) {
        let mut state = self.state();
        state.life += 1;
        state.is_dead = false;
        state.trouble.fails_in = None;
        state.trouble.dies_in = None;
    }

    /// The machine loses its power.
    pub fn cut_power(&self) {
        self.kill();
        let mut state = self.state();
        let mut rng = state.rng.fork();
        let (names, is_lossy) = state.left_by_power_cut(&mut rng);
        state.mishaps.lossy_cuts += u64::from(is_lossy);
        state.synced_names = names.clone();
        state.names = names;
    }

    /// What a power cut leaves at least.
    pub fn durable(&self) -> Self {
        let state = self.state();
        let durable = state.synced_names.iter().map(|(name, file)| {
            let synced = file.content().synced.clone();
            (name.clone(), File::of(synced))
        });
        Self::with(durable.collect(), fastrand::Rng::with_seed(0))
    }

    /// In which files what is seen is not what surely is on disk, for people who look for a mistake.
    pub fn differences(&self) -> Vec<String> {
        let state = self.state();
        let mut all = Vec::new();
        for (name, file) in &state.names {
            let is_named = state.synced_names.get(name).is_some_and(|synced| Arc::ptr_eq(&synced.0, &file.0));
            let content = file.content();
            let at = content.seen.iter().zip(&content.synced).position(|(seen, synced)| seen != synced);
            all.push(format!(
                "{name}: {} bytes seen, {} synced, first difference {at:?}, name synced {is_named}",
                content.seen.len(),
                content.synced.len()
            ));
        }
        all
    }

    /// What is seen now, on a disk of its own: a copy of the files that is consistent.
    pub fn image(&self, seed: u64) -> Self {
        let state = self.state();
        let seen =
            state.names.iter().map(|(name, file)| (name.clone(), File::of(file.content().seen.clone())));
        Self::with(seen.collect(), fastrand::Rng::with_seed(seed))
    }

    /// Writes a file's bytes over themselves and syncs it, if it is there.
    pub fn rewrite(&self, name: &str) -> Result<(), DiskError> {
        let file = match self.open(name, false) {
            Err(DiskError::NotFound) => return Ok(()),
            file => file?,
        };
        let mut bytes = vec![0; self.size(&file)];
        self.read(&file, 0, &mut bytes)?;
        self.write(&file, 0, &bytes)?;
        self.sync(&file)
    }

    /// Opens a file, making it where it is missing and `create` is set.
    ///
    /// # Errors
    /// [`DiskError`]; so for all the others.
    pub fn open(&self, name: &str, create: bool) -> Result<File, DiskError> {
        let mut state = self.state();
        if let Some(file) = state.names.get(name) {
            let file = file.clone();
            return if state.is_dead { Err(DiskError::Io) } else { Ok(file) };
        }
        if !create {
            return Err(DiskError::NotFound);
        }
        state.change()?;
        let file = File::default();
        state.names.insert(name.into(), file.clone());
        Ok(file)
    }

    /// Removes a name; with `sync`, so that it does not come back.
    pub fn remove(&self, name: &str, sync: bool) -> Result<(), DiskError> {
        let mut state = self.state();
        let result = state.change();
        if let Some(log) = &mut state.log {
            log.push(format!("{name}: remove, synced {sync}: {result:?}"));
        }
        result?;
        let removed = state.names.remove(name).ok_or(DiskError::NotFound)?;
        state.free(removed.content().seen.len());
        if sync {
            state.synced_names.remove(name);
        }
        Ok(())
    }

    /// Length of a file with this name.
    pub fn length(&self, name: &str) -> Option<usize> {
        self.state().names.get(name).map(|file| file.content().seen.len())
    }

    /// Reads; says how many bytes there were.
    pub fn read(&self, file: &File, offset: usize, bytes: &mut [u8]) -> Result<usize, DiskError> {
        let mut state = self.state();
        let rate = state.trouble.rate;
        if state.is_dead || (rate > 0 && state.rng.u8(..) < rate / 8) {
            state.mishaps.io_errors += 1;
            return Err(DiskError::Io);
        }
        let content = file.content();
        let rest = content.seen.get(offset..).unwrap_or_default();
        let length = rest.len().min(bytes.len());
        bytes[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    /// Writes all bytes, or maybe some of them where it fails.
    pub fn write(&self, file: &File, offset: usize, bytes: &[u8]) -> Result<(), DiskError> {
        let mut state = self.state();
        let was_dead = state.is_dead;
        let result = state.change();
        state.note(file, || format!("write {} at {offset}: {result:?}", bytes.len()));
        let mut content = file.content();
        if result.is_err() {
            if !was_dead {
                let part = Change::Write { offset, bytes: bytes[..state.rng.usize(..=bytes.len())].to_vec() };
                part.apply(&mut content.seen);
                content.pending.push(part);
            }
            return result;
        }
        let grows = (offset + bytes.len()).saturating_sub(content.seen.len());
        if let Some(space) = &mut state.trouble.space {
            match space.checked_sub(grows) {
                Some(rest) => *space = rest,
                None => {
                    state.mishaps.full += 1;
                    return Err(DiskError::Full);
                }
            }
        }
        let change = Change::Write { offset, bytes: bytes.to_vec() };
        change.apply(&mut content.seen);
        content.pending.push(change);
        Ok(())
    }

    /// Cuts a file's end off.
    pub fn truncate(&self, file: &File, length: usize) -> Result<(), DiskError> {
        let mut state = self.state();
        let result = state.change();
        state.note(file, || format!("truncate to {length}: {result:?}"));
        result?;
        let mut content = file.content();
        state.free(content.seen.len().saturating_sub(length));
        let change = Change::Truncate(length);
        change.apply(&mut content.seen);
        content.pending.push(change);
        Ok(())
    }

    /// Length of an open file.
    pub fn size(&self, file: &File) -> usize {
        file.content().seen.len()
    }

    /// Makes a file's content outlast a power cut; of a file whose name was not synced yet all names of the directory, too.
    pub fn sync(&self, file: &File) -> Result<(), DiskError> {
        let mut state = self.state();
        if state.skips_syncs && !state.is_dead {
            return Ok(());
        }
        let was_dead = state.is_dead;
        let result = state.change();
        state.note(file, || format!("sync: {result:?}"));
        let mut guard = file.content();
        let content = &mut *guard;
        if let Err(error) = result {
            if !was_dead && !state.is_dead {
                state.mishaps.failed_syncs += 1;
                state.mishaps.io_errors -= 1;
                // The system takes the pages for clean from now on.
                for change in std::mem::take(&mut content.pending) {
                    change.apply_in_part(&mut content.synced, &mut state.rng);
                }
            }
            return Err(error);
        }
        for change in content.pending.drain(..) {
            change.apply(&mut content.synced);
        }
        drop(guard);
        // SQLite syncs the directory with the first sync of a log that it has made.
        let is_named =
            |names: &BTreeMap<String, File>| names.values().any(|other| Arc::ptr_eq(&other.0, &file.0));
        if is_named(&state.names) && !is_named(&state.synced_names) {
            state.synced_names = state.names.clone();
        }
        Ok(())
    }
}

impl State {
    /// For each call that changes something.
    fn change(&mut self) -> Result<(), DiskError> {
        if self.is_dead {
            return Err(DiskError::Io);
        }
        let is_due = |left: &mut Option<u64>| {
            let is_due = *left == Some(0);
            *left = left.and_then(|calls| calls.checked_sub(1));
            is_due
        };
        if is_due(&mut self.trouble.dies_in) {
            self.is_dead = true;
            return Err(DiskError::Io);
        }
        let rate = self.trouble.rate;
        if is_due(&mut self.trouble.fails_in) || (rate > 0 && self.rng.u8(..) < rate) {
            self.mishaps.io_errors += 1;
            return Err(DiskError::Io);
        }
        Ok(())
    }

    fn note(&mut self, file: &File, what: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            let name = self.names.iter().find(|(_, other)| Arc::ptr_eq(&other.0, &file.0));
            log.push(format!("{}: {}", name.map_or("no name", |(name, _)| name), what()));
        }
    }

    fn free(&mut self, bytes: usize) {
        if let Some(space) = &mut self.trouble.space {
            *space += bytes;
        }
    }

    /// The files after a power cut, and whether something that was written is not among them.
    fn left_by_power_cut(&self, rng: &mut fastrand::Rng) -> (BTreeMap<String, File>, bool) {
        let mut is_lossy = false;
        let mut names = self.synced_names.clone();
        for (name, file) in &self.names {
            let is_synced = names.get(name).is_some_and(|synced| Arc::ptr_eq(&synced.0, &file.0));
            if !is_synced && rng.bool() {
                names.insert(name.clone(), file.clone());
            }
        }
        names.retain(|name, _| self.names.contains_key(name) || rng.bool());
        let left = names.into_iter().map(|(name, file)| {
            let content = file.content();
            let mut bytes = content.synced.clone();
            if rng.bool() {
                for change in &content.pending {
                    change.apply_in_part(&mut bytes, rng);
                }
            }
            is_lossy |= bytes != content.seen;
            (name, File::of(bytes))
        });
        (left.collect(), is_lossy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(disk: &Disk, file: &File) -> Vec<u8> {
        let mut bytes = vec![0; disk.size(file)];
        assert_eq!(disk.read(file, 0, &mut bytes), Ok(bytes.len()));
        bytes
    }

    #[test]
    fn a_power_cut_keeps_what_was_synced_and_maybe_sectors_of_the_rest() {
        let mut kept = [0; 3];
        for seed in 0..100 {
            let disk = Disk::new(seed);
            let file = disk.open("a", true).unwrap();
            disk.write(&file, 0, &[1; 1024]).unwrap();
            disk.sync(&file).unwrap();
            disk.write(&file, 0, &[2; 1024]).unwrap();
            disk.cut_power();
            let bytes = read(&disk, &disk.open("a", false).unwrap());
            let sectors: Vec<u8> = bytes.chunks(SECTOR).map(|sector| sector[0]).collect();
            assert!(bytes.chunks(SECTOR).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
            kept[sectors.iter().filter(|byte| **byte == 2).count()] += 1;
        }
        assert!(kept.iter().all(|count| *count > 0), "{kept:?}");
    }

    #[test]
    fn a_name_that_was_not_synced_may_be_gone_and_a_removed_one_may_come_back() {
        let (mut gone, mut back) = (0, 0);
        for seed in 0..100 {
            let disk = Disk::new(seed);
            let removed = disk.open("removed", true).unwrap();
            disk.sync(&removed).unwrap();
            disk.remove("removed", false).unwrap();
            disk.open("made", true).unwrap();
            disk.cut_power();
            gone += u32::from(disk.length("made").is_none());
            back += u32::from(disk.length("removed").is_some());
        }
        assert!((1..100).contains(&gone) && (1..100).contains(&back), "{gone} {back}");
    }

    #[test]
    fn what_a_failed_sync_has_lost_the_next_one_does_not_bring_back() {
        let mut lost = 0;
        for seed in 0..100 {
            let disk = Disk::new(seed);
            let file = disk.open("a", true).unwrap();
            disk.sync(&file).unwrap();
            disk.write(&file, 0, &[1; SECTOR]).unwrap();
            disk.set_trouble(Trouble { fails_in: Some(0), ..Trouble::default() });
            assert_eq!(disk.sync(&file), Err(DiskError::Io));
            assert_eq!(disk.sync(&file), Ok(()));
            assert_eq!(read(&disk, &file), [1; SECTOR], "it is still seen");
            let durable = disk.durable();
            lost += u32::from(durable.length("a") == Some(0));
        }
        assert!((1..100).contains(&lost), "{lost}");
    }

    #[test]
    fn a_dead_process_changes_nothing_any_more() {
        let disk = Disk::new(1);
        let file = disk.open("a", true).unwrap();
        disk.set_trouble(Trouble { dies_in: Some(1), ..Trouble::default() });
        disk.write(&file, 0, b"one").unwrap();
        assert_eq!(disk.truncate(&file, 0), Err(DiskError::Io));
        assert!(disk.is_dead());
        assert_eq!(disk.write(&file, 0, b"two"), Err(DiskError::Io));
        disk.kill();
        assert_eq!(read(&disk, &file), b"one");
    }

    #[test]
    fn a_full_disk_takes_what_fits() {
        let disk = Disk::new(1);
        disk.set_trouble(Trouble { space: Some(5), ..Trouble::default() });
        let file = disk.open("a", true).unwrap();
        disk.write(&file, 0, b"12345").unwrap();
        assert_eq!(disk.write(&file, 3, b"xyz"), Err(DiskError::Full));
        disk.write(&file, 0, b"54321").unwrap();
        disk.truncate(&file, 1).unwrap();
        disk.write(&file, 1, b"0000").unwrap();
    }
}
