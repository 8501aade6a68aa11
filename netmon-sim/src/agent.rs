//! An agent's process: spool and session, and between them what the uplink does. This is the only place that knows how
//! these three fit together.

use std::io;

use netmon_agent::spool::{Limits, OpenError, ReadTicket, Recovered, Spool, Stats, SyncTicket};
use netmon_agent::uplink::session::{Effect, Session, Step};
use netmon_common::model::{Event, Gap, GapReason, Record};
use netmon_common::wire::{
    self, About, BatchBuilder, Checkpoint, FRAME_HEADER, FrameHeader, Heartbeat, Hello, Item,
    MAX_BATCH_RECORDS, MAX_FRAME, Open, ToAgent, ToServer,
};

use crate::ledger::{Ledger, Readable};
use crate::machine::{self, Machine};
use crate::mutants::Mutant;

/// More records than a simulation has.
const MANY: usize = 100_000;
/// Bytes for one batch, as the uplink has it.
const BYTES: usize = MAX_FRAME / 2 - 2 * MAX_BATCH_RECORDS as usize;

/// Why an agent ends a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hangup {
    /// The server broke the protocol, by the session's word.
    Violation(String),
    /// The server refused it.
    Refused(String),
    /// Its own disk.
    Spool(String),
    /// What the simulation does not allow.
    Broken(String),
}

/// What an agent was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// The server has these now.
    Acked(Vec<u64>),
    /// A new epoch began, because the server knows other records.
    BeganEpoch,
    /// A checkpoint to be kept.
    Checkpoint(Checkpoint),
}

enum Sync {
    Begun(SyncTicket<Machine>),
    Ran(SyncTicket<Machine>, io::Result<()>),
}

/// A connection as the agent sees it.
pub struct Call {
    /// Its number in the simulation.
    pub link: u64,
    session: Session,
    inbox: Vec<u8>,
    /// The server has answered a hello.
    is_welcome: bool,
    read: Option<(ReadTicket<Machine>, u64, u64)>,
}

/// An agent's process.
pub struct SimAgent {
    spool: Spool<Machine>,
    /// What the start found.
    pub recovered: Recovered,
    /// Its disk.
    pub machine: Machine,
    /// Its connection.
    pub call: Option<Call>,
    sync: Option<Sync>,
    /// The spool's counters when it was looked at last.
    seen: Stats,
    batch_records: usize,
    mutant: Option<Mutant>,
}

impl SimAgent {
    /// Starts with what is in the directory.
    ///
    /// # Errors
    /// The spool cannot be opened. The inner error: it broke its promise.
    pub fn start(
        machine: Machine,
        limits: Limits,
        seed: u64,
        batch_records: usize,
        mutant: Option<Mutant>,
        ledger: &mut Ledger,
    ) -> Result<Result<Self, String>, OpenError> {
        let mut random = fastrand::Rng::with_seed(seed);
        let (spool, recovered) =
            Spool::open_in(machine.clone(), "spool".as_ref(), limits, move || Ok(random.u64(1..)))?;
        let seen = spool.stats();
        let mut agent =
            Self { spool, recovered, machine, call: None, sync: None, seen, batch_records, mutant };
        Ok(agent.look_around(ledger).map(|()| agent))
    }

    fn look_around(&mut self, ledger: &mut Ledger) -> Result<(), String> {
        if !ledger.is_disturbed && self.recovered.new_epoch && self.recovered.run > 1 {
            return Err("a new epoch begins without a reason".into());
        }
        let readable = self.readable();
        self.check_durable(&readable, ledger)?;
        ledger.started(&readable, self.spool.is_settled())?;
        ledger.began(self.spool.stats().epoch);
        self.seen = self.spool.stats();
        Ok(())
    }

    /// What the spool hands out would be there after a power cut in this moment.
    fn check_durable(&self, readable: &Readable, ledger: &Ledger) -> Result<(), String> {
        let durable = machine::durable(self.machine.memory());
        // A file with a damaged header is readable until the next start.
        match readable.iter().find(|(id, _)| !durable.contains(id) && !ledger.is_hit(**id)) {
            None => Ok(()),
            Some((id, place)) => {
                Err(format!("record {id} at {place:x?} is handed out and would not outlast a power cut"))
            }
        }
    }

    /// How the spool stands.
    pub fn stats(&self) -> Stats {
        self.spool.stats()
    }

    /// Everything is at the server, and nothing is left to be told.
    pub fn is_drained(&mut self) -> bool {
        let stats = self.spool.stats();
        let is_welcome = self.call.as_ref().is_some_and(|call| call.is_welcome);
        is_welcome && stats.backlog == 0 && stats.next_seq == stats.synced_seq + 1 && self.sync.is_none()
    }

    /// Records an event. Its number and the bytes that the spool must keep go into the ledger.
    pub fn record(&mut self, wall_ns: i64, event: Event, ledger: &mut Ledger) -> Result<u64, String> {
        let Stats { run, epoch, .. } = self.spool.stats();
        let boot_ns = ledger.next_id();
        let seq = match self.spool.append(boot_ns, wall_ns, event.clone()) {
            Ok(seq) => seq,
            Err(_) => {
                match event {
                    // Handed out again later.
                    Event::Gap(Gap { reason: GapReason::SpoolUnwritable, .. }) => {}
                    Event::Gap(Gap { reason: GapReason::SpoolFull | GapReason::SpoolDamaged, .. }) => {}
                    _ => ledger.refused(1),
                }
                return Ok(0);
            }
        };
        if let Event::Gap(Gap { reason: GapReason::SpoolUnwritable, count: Some(count), .. }) = event {
            ledger.reported(count);
        }
        ledger.appended(epoch, Record { seq, run, boot_ns, wall_ns, event });
        self.audit(ledger)?;
        Ok(seq)
    }

    /// Records what the spool lost.
    pub fn record_losses(&mut self, wall_ns: i64, ledger: &mut Ledger) -> Result<usize, String> {
        let gaps = self.spool.take_gaps();
        let count = gaps.len();
        for gap in gaps {
            self.record(wall_ns, Event::Gap(gap), ledger)?;
        }
        Ok(count)
    }

    /// One of a sync's three steps; true when something was synced with this one.
    pub fn sync_step(&mut self, ledger: &mut Ledger) -> Result<bool, String> {
        let is_done = match self.sync.take() {
            None => {
                // A failure is told by the next one, too.
                if let Ok(Some(ticket)) = self.spool.begin_sync() {
                    self.sync = Some(Sync::Begun(ticket));
                }
                false
            }
            Some(Sync::Begun(ticket)) => {
                let result = ticket.run();
                self.sync = Some(Sync::Ran(ticket, result));
                false
            }
            Some(Sync::Ran(ticket, result)) => self.spool.finish_sync(ticket, result).is_ok(),
        };
        if is_done {
            self.has_synced(ledger)?;
        }
        self.audit(ledger)?;
        Ok(is_done)
    }

    /// The whole of a sync, after the one that was begun.
    pub fn sync(&mut self, ledger: &mut Ledger) -> Result<(), String> {
        while self.sync.is_some() {
            self.sync_step(ledger)?;
        }
        if self.spool.sync().is_ok() {
            self.has_synced(ledger)?;
        }
        self.audit(ledger)
    }

    fn has_synced(&mut self, ledger: &mut Ledger) -> Result<(), String> {
        let stats = self.spool.stats();
        ledger.synced(stats.epoch, stats.synced_seq);
        Ok(())
    }

    /// Ends in good order.
    pub fn close(mut self, ledger: &mut Ledger) -> Result<(), String> {
        self.sync(ledger)?;
        // Where it fails, the next run says that this one died.
        let _ = self.spool.close();
        if !self.machine.is_dead() {
            self.has_synced(ledger)?;
        }
        self.audit(ledger)?;
        self.die(ledger);
        Ok(())
    }

    /// Dies, and with it the count of what gave way in its last call.
    pub fn die(self, ledger: &mut Ledger) {
        ledger.forgotten(self.spool.stats().dropped - self.seen.dropped);
    }

    /// Connects; the first bytes.
    pub fn connect(&mut self, link: u64, version: u16, about: About) -> Vec<u8> {
        self.call = Some(Call {
            link,
            session: Session::new(version),
            inbox: Vec::new(),
            is_welcome: false,
            read: None,
        });
        if version > 1 { frame(&ToServer::About(about)) } else { Vec::new() }
    }

    /// Says that it watches, where the version has a word for that.
    pub fn heartbeat(&self) -> Option<Vec<u8>> {
        let call = self.call.as_ref()?;
        (call.session.version() > 1).then(|| frame(&ToServer::Heartbeat(Heartbeat::default())))
    }

    /// Is it the server's turn to say something?
    pub fn expects_answer(&self) -> bool {
        self.call.as_ref().is_some_and(|call| call.session.expects_answer())
    }

    /// Does what is to be done next on the connection; bytes to be sent, if any. Reading from the spool takes two
    /// steps: it holds no lock, and things happen meanwhile.
    ///
    /// # Errors
    /// The connection is to be ended.
    pub fn step(&mut self, ledger: &mut Ledger) -> Result<Option<Vec<u8>>, Hangup> {
        let result = self.try_step();
        self.audit(ledger).map_err(Hangup::Broken)?;
        result
    }

    fn try_step(&mut self) -> Result<Option<Vec<u8>>, Hangup> {
        let Some(call) = &mut self.call else { return Ok(None) };
        let Call { session, read, .. } = call;
        if let Some((ticket, epoch, seq)) = read.take() {
            let result = ticket.run().map_err(|error| Hangup::Spool(error.to_string()))?;
            let Some(chunk) = self.spool.finish_read(result) else {
                *read = self.spool.begin_read(epoch, seq, self.batch_records, BYTES).map(|t| (t, epoch, seq));
                return Ok(None);
            };
            let items = match session.fit(seq, chunk) {
                Ok(items) => items,
                Err(Step::Hello { epoch, oldest_seq, next_seq }) => {
                    return Ok(Some(hello(session.version(), Open { epoch, oldest_seq, next_seq })));
                }
                Err(Step::Send { .. } | Step::Wait) => return Ok(None),
            };
            let mut batch = BatchBuilder::default();
            let span: u64 = items.iter().take_while(|item| batch.push(item)).map(Item::span).sum();
            let batch = batch.finish(epoch, seq).map_err(|error| Hangup::Broken(error.to_string()))?;
            session.sent(seq + span - 1);
            if self.mutant == Some(Mutant::AgentTakesSentForAcked) {
                self.spool.acked(epoch, seq + span - 1);
            }
            return Ok(Some(frame(&ToServer::Batch(batch))));
        }
        match session.step(&self.spool.epochs()) {
            Step::Hello { epoch, oldest_seq, next_seq } => {
                Ok(Some(hello(session.version(), Open { epoch, oldest_seq, next_seq })))
            }
            Step::Send { epoch, seq } => {
                *read = self.spool.begin_read(epoch, seq, self.batch_records, BYTES).map(|t| (t, epoch, seq));
                Ok(None)
            }
            Step::Wait => Ok(None),
        }
    }

    /// Bytes of the server's.
    pub fn receive(&mut self, bytes: &[u8]) {
        if let Some(call) = &mut self.call {
            call.inbox.extend_from_slice(bytes);
        }
    }

    /// Takes in one of the server's messages; `None`: there is none.
    ///
    /// # Errors
    /// The connection is to be ended.
    pub fn hear(&mut self, ledger: &mut Ledger) -> Result<Option<Option<News>>, Hangup> {
        let Some(call) = &mut self.call else { return Ok(None) };
        // While it reads from the spool it does not listen.
        if call.read.is_some() {
            return Ok(None);
        }
        let message = match take_frame(&mut call.inbox) {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(None),
            Err(error) => return Err(Hangup::Broken(error)),
        };
        let news = self.take(message, ledger);
        if !self.machine.is_dead() {
            self.audit(ledger).map_err(Hangup::Broken)?;
        }
        news.map(Some)
    }

    fn take(&mut self, message: ToAgent, ledger: &mut Ledger) -> Result<Option<News>, Hangup> {
        let Some(call) = &mut self.call else { return Ok(None) };
        let session = &mut call.session;
        if let ToAgent::Heard { checkpoint, .. } = message {
            return Ok(checkpoint.map(News::Checkpoint));
        }
        call.is_welcome |= matches!(message, ToAgent::Welcome { .. } | ToAgent::Expect { .. });
        let mut effect = session
            .receive(message, &self.spool.epochs())
            .map_err(|violation| Hangup::Violation(violation.to_string()))?;
        while let Effect::Compare { epoch, seq } = effect {
            let record = self.spool.record(epoch, seq).map_err(|error| Hangup::Spool(error.to_string()))?;
            effect = session
                .compared(record.map(|record| wire::fingerprint(&record)))
                .map_err(|violation| Hangup::Violation(violation.to_string()))?;
        }
        match effect {
            Effect::None | Effect::Compare { .. } => Ok(None),
            Effect::Acked { epoch, seq } => {
                self.spool.acked(epoch, seq);
                let news = ledger.acked(epoch, seq).map_err(Hangup::Broken)?;
                Ok((!news.is_empty()).then_some(News::Acked(news)))
            }
            Effect::LeaveEpoch { epoch, acked } => {
                self.spool.acked(epoch, acked);
                ledger.acked(epoch, acked).map_err(Hangup::Broken)?;
                // Or a file is back of which the server was told that it is gone.
                if !ledger.is_set_back && !ledger.entries.values().any(|entry| entry.was_excused) {
                    return Err(Hangup::Broken("the server knows records that the spool never had".into()));
                }
                // Until the run file says so, another start begins one more.
                ledger.disturb();
                ledger.has_left = true;
                self.begin_epoch(epoch, ledger)?;
                Ok(Some(News::BeganEpoch))
            }
            Effect::Refused(reason) => Err(Hangup::Refused(reason.escaped().to_string())),
        }
    }

    fn begin_epoch(&mut self, old: u64, ledger: &mut Ledger) -> Result<(), Hangup> {
        while self.sync.is_some() {
            self.sync_step(ledger).map_err(Hangup::Broken)?;
        }
        let result = self.spool.begin_epoch(old);
        if self.machine.is_dead() {
            ledger.may_have_moved = true;
            return Err(Hangup::Spool("died".into()));
        }
        // Where it was broken off, some have their new numbers and some have not.
        let readable = self.readable();
        self.check_durable(&readable, ledger).map_err(Hangup::Broken)?;
        ledger.began(self.spool.stats().epoch);
        ledger.found(&readable, true).map_err(Hangup::Broken)?;
        self.has_synced(ledger).map_err(Hangup::Broken)?;
        self.audit(ledger).map_err(Hangup::Broken)?;
        result.map_err(|error| Hangup::Spool(error.to_string()))
    }

    /// Everything that the spool would hand out, from its files.
    fn readable(&mut self) -> Readable {
        let mut readable = Readable::new();
        for range in self.spool.epochs() {
            let mut seq = range.oldest;
            while seq < range.next {
                let Ok(Some(chunk)) = self.spool.read(range.epoch, seq, MANY, BYTES) else { break };
                let mut at = chunk.first_seq;
                for item in &chunk.items {
                    if let Item::Record(bytes) = item
                        && let Ok(record) = Record::from_bytes(bytes)
                    {
                        readable.insert(record.boot_ns, (range.epoch, at));
                    }
                    at += item.span();
                }
                seq = chunk.next_seq();
            }
        }
        readable
    }

    /// Compares the spool with what it promised.
    fn audit(&mut self, ledger: &mut Ledger) -> Result<(), String> {
        if self.machine.is_dead() {
            return Ok(());
        }
        let Stats { damaged_bytes, dropped, .. } = self.seen;
        let is_settled = ledger.is_unsettled() && self.spool.is_settled();
        let now = self.spool.stats();
        if is_settled || now.damaged_bytes > damaged_bytes || now.dropped > dropped {
            // Which may find more damage.
            let readable = self.readable();
            self.seen = self.spool.stats();
            if self.seen.damaged_bytes > damaged_bytes {
                if !ledger.is_damaged {
                    return Err("the spool finds damage that nobody made".into());
                }
                ledger.cut(&readable);
            }
            ledger.audit(|id, _| readable.contains_key(&id), self.seen.dropped - dropped)?;
            if is_settled {
                self.check_durable(&readable, ledger)?;
                ledger.settled(&readable)?;
            }
        }
        let ranges = self.spool.epochs();
        let is_there = |_, (epoch, seq)| {
            ranges.iter().any(|range| range.epoch == epoch && (range.oldest..range.next).contains(&seq))
        };
        ledger.audit(is_there, 0)
    }
}

fn hello(version: u16, open: Open) -> Vec<u8> {
    if version > 1 {
        return frame(&ToServer::Open(open));
    }
    let Open { epoch, oldest_seq, .. } = open;
    let (agent_version, hostname) = ("sim".into(), "pc".into());
    frame(&ToServer::Hello(Hello { version, agent_version, hostname, epoch, oldest_seq }))
}

fn frame(message: &ToServer) -> Vec<u8> {
    // Only a batch could be too long, and its builder sees to that.
    wire::encode_frame(message).unwrap_or_default()
}

/// Takes one whole message from the beginning of what came.
pub fn take_frame<T: serde::de::DeserializeOwned>(inbox: &mut Vec<u8>) -> Result<Option<T>, String> {
    let Some((header, rest)) = inbox.split_first_chunk::<FRAME_HEADER>() else { return Ok(None) };
    let header = FrameHeader::parse(*header).map_err(|error| error.to_string())?;
    let Some(payload) = rest.get(..header.length) else { return Ok(None) };
    let message = header.decode(payload).map_err(|error| error.to_string())?;
    inbox.drain(..FRAME_HEADER + header.length);
    Ok(Some(message))
}
