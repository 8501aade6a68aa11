//! A directory in memory for simulations: it fails on demand, and at a power cut it forgets what was not synced.
//!
//! The same calls and the same seed give the same run. What it does as a disk does:
//!
//! * a write takes half of the bytes it is given: short writes are the normal case here, and a failure in the middle of
//!   a longer write leaves it torn;
//! * after a failed fsync the next one says "done" without having brought to disk what the failed one lost;
//! * a power cut leaves what was synced, and any part of what was not: the beginning of what was appended, then maybe
//!   zeros; names that were made, renamed or removed since the directory was synced, each for itself.
//!
//! ```
//! use netmon_agent::spool::{Limits, Spool, sim::Memory};
//!
//! let (disk, mut rng) = (Memory::default(), fastrand::Rng::with_seed(7));
//! let mut numbers = rng.fork();
//! let random = move || Ok(numbers.u64(..));
//! let (mut spool, _) = Spool::open_in(disk.clone(), "sim".as_ref(), Limits::default(), random).unwrap();
//! spool.append(1, 1, netmon_common::model::Event::AgentStopped).unwrap();
//! disk.fail_after(Some(0));
//! assert!(spool.sync().is_err());
//! let disk = disk.power_cut(&mut rng);
//! # drop(disk);
//! ```

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::files::Files;

#[derive(Clone, Debug, Default)]
struct Content {
    /// What a reader sees.
    seen: Vec<u8>,
    /// What a power cut leaves.
    synced: Vec<u8>,
    /// What the next fsync brings to disk.
    dirty: Range<usize>,
    /// From here on, reading fails; `None`: nowhere.
    unreadable_from: Option<usize>,
}

/// An open file of a [`Memory`].
#[derive(Clone, Debug, Default)]
pub struct Node(Arc<Mutex<Content>>);

impl Node {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct State {
    names: BTreeMap<String, Node>,
    synced_names: BTreeMap<String, Node>,
    /// Calls until one fails; `None`: none fails.
    fails_in: Option<u64>,
    read_only: bool,
    /// There is no directory.
    is_missing: bool,
    /// Bytes that still fit; `None`: any number.
    space: Option<usize>,
}

/// The directory. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Memory(Arc<Mutex<State>>);

impl Memory {
    /// Lets so many calls that change something pass, then one fails with `EIO` (an fsync, too). `None`: none fails.
    pub fn fail_after(&self, calls: Option<u64>) {
        self.state().fails_in = calls;
    }

    /// While it is set, every call that changes something fails with `EROFS`.
    pub fn set_read_only(&self, read_only: bool) {
        self.state().read_only = read_only;
    }

    /// So many bytes more fit, and what removed files free. `None`: any number.
    pub fn set_space(&self, bytes: Option<usize>) {
        self.state().space = bytes;
    }

    /// What a power cut leaves; this directory goes on as if there had been none. It takes the content of the files, not
    /// the faults that were set.
    pub fn power_cut(&self, rng: &mut fastrand::Rng) -> Self {
        let state = self.state();
        let mut names = state.synced_names.clone();
        for (name, node) in &state.names {
            if rng.bool() {
                names.insert(name.clone(), node.clone());
            }
        }
        names.retain(|name, _| state.names.contains_key(name) || rng.bool());
        let left = names.into_iter().map(|(name, node)| {
            let content = node.content();
            let mut bytes = content.synced.clone();
            let unsynced = content.seen.get(bytes.len()..).unwrap_or_default();
            if !unsynced.is_empty() && rng.bool() {
                bytes.extend_from_slice(&unsynced[..rng.usize(..=unsynced.len())]);
                if rng.u8(..3) == 0 {
                    // Length without data, as journals of metadata leave it.
                    bytes.resize(bytes.len() + rng.usize(..40), 0);
                }
            }
            (name, Node::of(bytes))
        });
        let names: BTreeMap<String, Node> = left.collect();
        Self(Arc::new(Mutex::new(State { names: names.clone(), synced_names: names, ..State::default() })))
    }

    /// Somebody removes a file; false: there is none of this name.
    pub fn remove_file(&self, name: &str) -> bool {
        let mut state = self.state();
        state.synced_names.remove(name);
        state.names.remove(name).is_some()
    }

    /// Somebody removes the directory with all its files.
    pub fn remove_directory(&self) {
        let mut state = self.state();
        state.names.clear();
        state.synced_names.clear();
        state.is_missing = true;
    }

    /// While it is set, the directory is somewhere else, with all its files, and there is none of its name.
    pub fn set_missing(&self, missing: bool) {
        self.state().is_missing = missing;
    }

    /// The directory as it is now, in another one: an image to be set back to.
    pub fn image(&self) -> Self {
        let names = self.state().names.clone().into_iter();
        let names: BTreeMap<String, Node> =
            names.map(|(name, node)| (name, Node::of(node.content().seen.clone()))).collect();
        Self(Arc::new(Mutex::new(State { names: names.clone(), synced_names: names, ..State::default() })))
    }

    /// What a power cut leaves at least, in another directory.
    pub fn durable(&self) -> Self {
        let names = self.state().synced_names.clone().into_iter();
        let names: BTreeMap<String, Node> =
            names.map(|(name, node)| (name, Node::of(node.content().synced.clone()))).collect();
        Self(Arc::new(Mutex::new(State { names: names.clone(), synced_names: names, ..State::default() })))
    }

    /// Changes a file behind everybody's back; false: there is none of this name.
    pub fn damage(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> bool {
        let Some(node) = self.state().names.get(name).cloned() else { return false };
        let mut content = node.content();
        change(&mut content.seen);
        content.synced = content.seen.clone();
        content.dirty = 0..0;
        true
    }

    /// A bad block: reading this file fails with `EIO` from this byte on. What is written in its place can be read. False:
    /// there is none of this name.
    pub fn fail_reads(&self, name: &str, from: usize) -> bool {
        let Some(node) = self.state().names.get(name).cloned() else { return false };
        node.content().unreadable_from = Some(from);
        true
    }

    /// The files' names, in order.
    pub fn names(&self) -> Vec<String> {
        self.state().names.keys().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn directory(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state();
        if state.is_missing { Err(io::ErrorKind::NotFound.into()) } else { Ok(state) }
    }

    /// For each call that changes something.
    fn fault(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        let due = state.fails_in == Some(0);
        state.fails_in = state.fails_in.and_then(|calls| calls.checked_sub(1));
        if due {
            return Err(rustix::io::Errno::IO.into());
        }
        if state.read_only {
            return Err(rustix::io::Errno::ROFS.into());
        }
        Ok(state)
    }
}

impl Node {
    fn of(bytes: Vec<u8>) -> Self {
        let (seen, synced) = (bytes.clone(), bytes);
        Self(Arc::new(Mutex::new(Content { seen, synced, ..Content::default() })))
    }
}

impl State {
    fn free(&mut self, removed: &Node) {
        if let Some(space) = &mut self.space {
            *space += removed.content().seen.len();
        }
    }
}

impl Files for Memory {
    type File = Node;

    fn make_directory(&self) -> io::Result<()> {
        if self.directory().is_err() {
            self.fault()?.is_missing = false;
        }
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.directory()?.names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Node> {
        drop(self.fault()?);
        let mut state = self.directory()?;
        if state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let node = Node::default();
        state.names.insert(name.into(), node.clone());
        Ok(node)
    }

    fn open(&self, name: &str) -> io::Result<Node> {
        self.state().names.get(name).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn write_at(&self, file: &Node, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let mut state = self.fault()?;
        let mut content = file.content();
        let start = offset as usize;
        let mut length = bytes.len().div_ceil(2);
        if let Some(space) = &mut state.space {
            let fits = (content.seen.len() + *space).saturating_sub(start);
            length = length.min(fits);
            if length == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            *space -= (start + length).saturating_sub(content.seen.len());
        }
        let end = start + length;
        if content.seen.len() < end {
            content.seen.resize(end, 0);
        }
        content.seen[start..end].copy_from_slice(&bytes[..length]);
        let dirty = &mut content.dirty;
        *dirty =
            if dirty.start == dirty.end { start..end } else { dirty.start.min(start)..dirty.end.max(end) };
        Ok(length)
    }

    fn read_at(&self, file: &Node, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = file.content();
        let rest = content.seen.get(offset as usize..).unwrap_or_default();
        let good = content.unreadable_from.map_or(usize::MAX, |from| from.saturating_sub(offset as usize));
        if good == 0 {
            return Err(rustix::io::Errno::IO.into());
        }
        let length = rest.len().min(bytes.len()).min(good);
        bytes[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn sync(&self, file: &Node) -> io::Result<()> {
        let fault = self.fault().map(drop);
        let mut content = file.content();
        // Also when it fails: the system takes the pages for clean then.
        let dirty = std::mem::take(&mut content.dirty);
        fault?;
        let Content { seen, synced, .. } = &mut *content;
        if synced.len() < dirty.end {
            synced.resize(dirty.end, 0);
        }
        synced[dirty.clone()].copy_from_slice(&seen[dirty]);
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        drop(self.fault()?);
        let mut state = self.directory()?;
        state.synced_names = state.names.clone();
        Ok(())
    }

    fn is_there(&self, file: &Node, name: &str) -> io::Result<bool> {
        Ok(self.state().names.get(name).is_some_and(|there| Arc::ptr_eq(&there.0, &file.0)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.fault()?;
        let node = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        if let Some(replaced) = state.names.insert(to.into(), node) {
            state.free(&replaced);
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.fault()?;
        let removed = state.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        state.free(&removed);
        Ok(())
    }
}
