//! The server's process: conversations, the queue of their work, and the store on its simulated disk.

use std::collections::{BTreeMap, VecDeque};

use jiff::tz::TimeZone;
use netmon_common::wire::{self, Checkpoint, ToAgent, ToServer};
use netmon_server::conversation::{Action, Applied, Conversation, Stop, Work};
use netmon_server::store::{self, AgentId, Enrolled, Newcomer, Store, history};
use netmon_server::tokens;
use netmon_server::writer::Committer;

use crate::agent::take_frame;
use crate::disk::Disk;
use crate::mutants::Mutant;
use crate::vfs::{self, Mount};

/// Jobs that wait for their group; whoever brings more waits.
const QUEUE: usize = 32;
/// The store's file.
pub const STORE: &str = "store.sqlite";
/// Its write-ahead log.
const LOG: &str = "store.sqlite-wal";

/// What one connection's agent is told, in this order.
enum Slot {
    Ready(ToAgent),
    /// Of this job.
    Waiting(u64),
}

struct Talk {
    conversation: Conversation,
    pc: usize,
    inbox: Vec<u8>,
    slots: VecDeque<Slot>,
    /// Size of the newest checkpoint that was said.
    said: u64,
}

struct Job {
    number: u64,
    link: u64,
    work: Work,
    now_ns: i64,
    is_hello: bool,
}

/// What came of a server's step, for each connection: bytes for the agent, or its end.
#[derive(Debug)]
pub enum Output {
    /// Bytes for the agent.
    Bytes(Vec<u8>),
    /// The connection is to be closed; protocol error or refusal, if that is why.
    Close(Option<Stop>),
}

/// The server's process.
pub struct Server {
    committer: Committer,
    /// Its file system; must outlive the store.
    _mount: Mount,
    talks: BTreeMap<u64, Talk>,
    queue: VecDeque<Job>,
    jobs: u64,
    connections: u64,
    checkpoints: BTreeMap<i64, Checkpoint>,
    mutant: Option<Mutant>,
}

/// A new store, with these agents enrolled, numbered from 1.
pub fn make_store(disk: &Disk, agents: &[[u8; 16]]) -> Result<(), String> {
    let mount = vfs::mount(disk);
    let mut store = Store::create_with(&mount.path(STORE), vfs::NAME).map_err(|error| error.to_string())?;
    let enrolled = store.write(|tx| {
        let uses = agents.len() as u32;
        let (token, stored) = tokens::make("server:1".into(), [0; 32], &[5; 40], uses, i64::MAX, 0);
        store::add_token(tx, &stored)?;
        agents
            .iter()
            .map(|uuid| {
                let newcomer = Newcomer {
                    token_id: token.id,
                    secret: token.secret,
                    uuid: *uuid,
                    spki_sha256: [uuid[0]; 32],
                    hostname: b"pc".into(),
                    wanted_seat: Vec::new(),
                };
                store::enrol(tx, &newcomer, 0, &TimeZone::UTC)
            })
            .collect::<rusqlite::Result<Vec<_>>>()
    });
    let enrolled = enrolled.map_err(|error| error.to_string())?;
    let all = enrolled.iter().all(|enrolled| matches!(enrolled, Enrolled::As { .. }));
    if all { Ok(()) } else { Err(format!("not enrolled: {enrolled:?}")) }
}

impl Server {
    /// Starts with what is on the disk. `checkpoint_pages`: the log is brought into the store after so many pages.
    ///
    /// # Errors
    /// It cannot read or write the store.
    pub fn start(disk: &Disk, checkpoint_pages: u32, mutant: Option<Mutant>) -> Result<Self, String> {
        let mount = vfs::mount(disk);
        let path = mount.path(STORE);
        let disk = disk.clone();
        let open = move || {
            let rewrite = || disk.rewrite(LOG).map_err(|error| std::io::Error::other(format!("{error:?}")));
            let store = Store::open_with(&path, vfs::NAME)?.settled(&path, rewrite)?;
            // Where it fails, the store's own figure stays.
            let _ = store.conn().pragma_update(None, "wal_autocheckpoint", checkpoint_pages);
            Ok(store)
        };
        // Which number the mount has is by chance.
        let directory = mount.path("").display().to_string();
        let mut store =
            open().map_err(|error: store::StoreError| error.to_string().replace(&directory, ""))?;
        store.write(|tx| store::forget_connections(tx)).map_err(|error| error.to_string())?;
        Ok(Self {
            committer: Committer::new(store, open),
            _mount: mount,
            talks: BTreeMap::new(),
            queue: VecDeque::new(),
            jobs: 0,
            connections: 0,
            checkpoints: BTreeMap::new(),
            mutant,
        })
    }

    /// Ends in good order.
    pub fn stop(self) {
        self.committer.close();
    }

    /// An agent calls. False: it is not let in now.
    pub fn accept(&mut self, link: u64, pc: usize, id: AgentId, version: u16) -> bool {
        // The collector looks an agent up in a step of the writer's, which opens the store again.
        if self.committer.commit([|_: &rusqlite::Connection| Ok(())]).is_err() {
            return false;
        }
        let Some(store) = self.committer.store() else { return false };
        let Ok(Some(agent)) = store::agent_by_id(store.conn(), id) else { return false };
        self.connections += 1;
        let conversation = Conversation::new(&agent, self.connections, version);
        let talk = Talk { conversation, pc, inbox: Vec::new(), slots: VecDeque::new(), said: 0 };
        self.talks.insert(link, talk);
        true
    }

    /// Is there a conversation?
    pub fn talks(&self, link: u64) -> bool {
        self.talks.contains_key(&link)
    }

    /// Ends a conversation. What it has in the queue is still done.
    pub fn hang_up(&mut self, link: u64) {
        self.talks.remove(&link);
    }

    /// Does work wait?
    pub fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Has it room for more work?
    pub fn listens(&self) -> bool {
        self.queue.len() < QUEUE
    }

    /// Bytes from an agent.
    pub fn receive(&mut self, link: u64, bytes: &[u8], now_ns: i64) -> Vec<(u64, Output)> {
        let Some(talk) = self.talks.get_mut(&link) else { return Vec::new() };
        talk.inbox.extend_from_slice(bytes);
        loop {
            let message = match take_frame::<ToServer>(&mut talk.inbox) {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(error) => return vec![(link, Output::Close(Some(Stop::Fault(error))))],
            };
            let is_hello = matches!(message, ToServer::Hello(_) | ToServer::Open(_));
            match talk.conversation.receive(message) {
                Ok(Action::Store(work)) => {
                    self.jobs += 1;
                    let number = self.jobs;
                    talk.slots.push_back(Slot::Waiting(number));
                    self.queue.push_back(Job { number, link, work, now_ns, is_hello });
                }
                Ok(Action::Heartbeat(_)) => {
                    let newest = self.checkpoints.get(&(talk.pc as i64 + 1));
                    let checkpoint = newest.filter(|newest| newest.size > talk.said).cloned();
                    talk.said = checkpoint.as_ref().map_or(talk.said, |new| new.size);
                    talk.slots.push_back(Slot::Ready(ToAgent::Heard { server_ns: now_ns, checkpoint }));
                }
                Ok(Action::Renew(_)) => {
                    talk.slots.push_back(Slot::Ready(ToAgent::Renewed { certificate_der: Vec::new() }));
                }
                Err(stop) => return vec![(link, Output::Close(Some(stop)))],
            }
        }
        self.flush()
    }

    /// Commits a group of so many jobs.
    pub fn commit(&mut self, jobs: usize, disk: &Disk) -> Vec<(u64, Output)> {
        let group: Vec<Job> = self.queue.drain(..jobs.min(self.queue.len())).collect();
        let mutant = self.mutant;
        let mut outputs = Vec::new();
        let numbers: Vec<(u64, u64)> = group.iter().map(|job| (job.number, job.link)).collect();
        if mutant == Some(Mutant::ServerAcksBeforeCommit) {
            outputs = self.answer_without_commit(&group, disk);
        }
        let steps = group.into_iter().map(|job| {
            move |conn: &rusqlite::Connection| {
                let applied = job.work.apply(conn, job.now_ns)?;
                if let Some(mutant) = mutant {
                    spoil(mutant, conn, job.is_hello)?;
                }
                Ok((job.number, applied))
            }
        });
        let committed = self.committer.commit(steps);
        if disk.is_dead() {
            // It died before it could answer.
            return outputs;
        }
        let mut results: BTreeMap<u64, Option<Applied>> = committed.unwrap_or_default().into_iter().collect();
        for (number, link) in numbers {
            let Some(talk) = self.talks.get_mut(&link) else { continue };
            let at =
                talk.slots.iter().position(|slot| matches!(slot, Slot::Waiting(this) if *this == number));
            let Some(at) = at else { continue };
            match results.remove(&number).flatten().map(Applied::committed) {
                Some(Ok(Some(answer))) => talk.slots[at] = Slot::Ready(answer),
                Some(Ok(None)) => drop(talk.slots.remove(at)),
                failed => {
                    // What stands before it is answered first.
                    let stop = failed.and_then(Result::err);
                    outputs.extend(self.flush());
                    outputs.push((link, Output::Close(stop)));
                    self.talks.remove(&link);
                }
            }
        }
        outputs.extend(self.flush());
        outputs
    }

    /// Answers whose turn it is.
    fn flush(&mut self) -> Vec<(u64, Output)> {
        let mut outputs = Vec::new();
        for (link, talk) in &mut self.talks {
            while let Some(Slot::Ready(_)) = talk.slots.front() {
                let Some(Slot::Ready(answer)) = talk.slots.pop_front() else { break };
                outputs.push((*link, Output::Bytes(wire::encode_frame(&answer).unwrap_or_default())));
            }
        }
        outputs
    }

    /// Signs the histories that grew. The signature is none: who checks it is not simulated.
    pub fn sign(&mut self, now_ns: i64) {
        let step = |conn: &rusqlite::Connection| {
            let mut signed = Vec::new();
            for history in history::unsigned(conn)? {
                let checkpoint = Checkpoint {
                    size: history.size,
                    head: history.head,
                    signed_ns: now_ns,
                    signature: [[0; 32]; 2],
                };
                history::add_checkpoint(conn, history.agent, &checkpoint)?;
                signed.push((history.agent.0, checkpoint));
            }
            Ok(signed)
        };
        let signed = self.committer.commit([step]).unwrap_or_default();
        self.checkpoints.extend(signed.into_iter().flatten());
    }

    /// The mutants that do not wait for the commit: what the steps would answer, from a transaction that is rolled back.
    fn answer_without_commit(&mut self, group: &[Job], disk: &Disk) -> Vec<(u64, Output)> {
        let image = disk.image(0);
        let mount = vfs::mount(&image);
        let Ok(mut store) = Store::open_with(&mount.path(STORE), vfs::NAME) else { return Vec::new() };
        let mut outputs = Vec::new();
        let answers = store.write(|tx| group.iter().map(|job| job.work.apply(tx, job.now_ns)).collect());
        let answers: Vec<_> = answers.unwrap_or_default();
        for (job, answer) in group.iter().zip(answers) {
            let answer = answer.map(Applied::committed);
            if let (Some(talk), Some(Ok(Some(answer)))) = (self.talks.get_mut(&job.link), answer) {
                for slot in &mut talk.slots {
                    if matches!(slot, Slot::Waiting(number) if *number == job.number) {
                        *slot = Slot::Ready(answer.clone());
                    }
                }
            }
        }
        outputs.extend(self.flush());
        outputs
    }
}

/// What the mutants do to the store behind a step.
fn spoil(mutant: Mutant, conn: &rusqlite::Connection, is_hello: bool) -> rusqlite::Result<()> {
    match mutant {
        Mutant::ServerSkipsARecord if is_hello => {
            conn.execute("UPDATE epochs SET next_seq = next_seq + 1", [])?;
        }
        Mutant::ServerForgetsTheWatermark if is_hello => {
            conn.execute("DROP INDEX IF EXISTS events_once", [])?;
            conn.execute("UPDATE epochs SET next_seq = max(1, next_seq - 2)", [])?;
        }
        Mutant::ServerForgetsGaps if is_hello => {
            conn.execute("DELETE FROM gaps", [])?;
        }
        Mutant::ServerFlipsABit => {
            conn.execute("UPDATE events SET record = record || x'00' WHERE seq % 50 = 49", [])?;
        }
        _ => {}
    }
    Ok(())
}
