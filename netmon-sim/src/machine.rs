//! A PC's disk as the agent's process sees it: the process, or the whole machine, may die in the middle of a call.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netmon_agent::spool::Files;
use netmon_agent::spool::format::{Frame, HEADER, Header, frames};
use netmon_agent::spool::sim::{Memory, Node};

use netmon_common::model::Record;

use crate::mutants::Mutant;

/// The spool's files in a few words, for people who look for a mistake.
pub fn describe(memory: &Memory) -> String {
    let shown = memory.names().into_iter().map(|name| {
        let bytes = content(memory, &name);
        let Ok(header) = Header::decode(&bytes) else { return format!("{name}: {} bytes", bytes.len()) };
        let mut records = frames(&bytes[HEADER..], header.first_seq);
        let count = records.by_ref().count();
        let (epoch, first, rest) = (header.epoch, header.first_seq, records.rest());
        format!("{name}: {count} records from {epoch:x}/{first} on, {rest} bytes behind")
    });
    shown.collect::<Vec<_>>().join("; ")
}

/// The records that a power cut would surely leave, by their identity.
pub fn durable(memory: &Memory) -> BTreeSet<u64> {
    let memory = memory.durable();
    memory.names().iter().flat_map(|name| records(&memory, name)).collect()
}

/// The records of one file, by their identity.
pub fn records(memory: &Memory, name: &str) -> BTreeSet<u64> {
    let bytes = content(memory, name);
    let Ok(header) = Header::decode(&bytes) else { return BTreeSet::new() };
    let records = frames(&bytes[HEADER..], header.first_seq).filter_map(|(_, frame)| match frame {
        Frame::Record(bytes) => Some(Record::from_bytes(bytes).ok()?.boot_ns),
        Frame::Hole(_) => None,
    });
    records.collect()
}

fn content(memory: &Memory, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let length = memory.open(name).and_then(|file| memory.read_at(&file, &mut bytes, 0)).unwrap_or(0);
    bytes.truncate(length);
    bytes
}

/// The spool's directory, until the process dies. Clones are the same one.
#[derive(Clone)]
pub struct Machine {
    memory: Memory,
    fate: Arc<Mutex<Fate>>,
    mutant: Option<Mutant>,
}

#[derive(Default)]
struct Fate {
    /// Calls that change something until it dies in the middle of one.
    dies_in: Option<u64>,
    is_dead: bool,
}

impl Machine {
    /// A process that uses this directory.
    pub fn new(memory: Memory, dies_in: Option<u64>, mutant: Option<Mutant>) -> Self {
        Self { memory, fate: Arc::new(Mutex::new(Fate { dies_in, is_dead: false })), mutant }
    }

    /// It dies with this call from now on.
    pub fn die_in(&self, calls: u64) {
        self.fate().dies_in = Some(calls);
    }

    /// Its files.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Has it died?
    pub fn is_dead(&self) -> bool {
        self.fate().is_dead
    }

    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn alive(&self) -> io::Result<()> {
        if self.is_dead() { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    fn change(&self) -> io::Result<()> {
        self.alive()?;
        let mut fate = self.fate();
        fate.is_dead = fate.dies_in == Some(0);
        fate.dies_in = fate.dies_in.and_then(|calls| calls.checked_sub(1));
        drop(fate);
        self.alive()
    }
}

impl Files for Machine {
    type File = Node;

    fn make_directory(&self) -> io::Result<()> {
        self.change()?;
        self.memory.make_directory()
    }

    fn is_there(&self, file: &Node, name: &str) -> io::Result<bool> {
        self.alive()?;
        self.memory.is_there(file, name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.alive()?;
        self.memory.list()
    }

    fn create(&self, name: &str) -> io::Result<Node> {
        self.change()?;
        self.memory.create(name)
    }

    fn open(&self, name: &str) -> io::Result<Node> {
        self.alive()?;
        self.memory.open(name)
    }

    fn write_at(&self, file: &Node, bytes: &[u8], offset: u64) -> io::Result<usize> {
        // The directory writes half of the bytes: one that dies between two halves leaves a torn record.
        self.change()?;
        self.memory.write_at(file, bytes, offset)
    }

    fn read_at(&self, file: &Node, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.alive()?;
        self.memory.read_at(file, bytes, offset)
    }

    fn sync(&self, file: &Node) -> io::Result<()> {
        self.change()?;
        if self.mutant == Some(Mutant::SpoolSkipsSync) { Ok(()) } else { self.memory.sync(file) }
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.change()?;
        if self.mutant == Some(Mutant::SpoolSkipsDirectorySync) {
            Ok(())
        } else {
            self.memory.sync_directory()
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.change()?;
        self.memory.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change()?;
        self.memory.remove(name)
    }
}
