//! A room: some PCs, a server, the network between them, and what goes wrong. One step at a time, drawn by chance.

use std::collections::{BTreeMap, VecDeque};
use std::sync::OnceLock;

use netmon_agent::spool::Limits;
use netmon_agent::spool::format::HEADER;
use netmon_agent::spool::sim::Memory;
use netmon_common::model::{AgentStarted, Event, Gap, GapReason, Hook, Interface};
use netmon_common::raw::Raw;
use netmon_common::wire::{About, Checkpoint};
use netmon_server::conversation::Stop;
use netmon_server::store::{AgentId, Store};

use crate::agent::{Hangup, News, SimAgent};
use crate::disk::{Disk, Trouble};
use crate::ledger::{Excuse, Ledger, Snapshot};
use crate::machine::{self, Machine};
use crate::mutants::Mutant;
use crate::oracle;
use crate::server::{self, Output, Server};
use crate::tally::{FAULTS, Fault, Tally};
use crate::vfs;

/// Most PCs of a room.
const PCS: usize = 3;
/// Rounds in which everything must have come to the server once nothing goes wrong any more.
const ROUNDS: u32 = 5_000;
/// Rounds without progress after which an agent takes its connection for dead, and how often that may happen then.
const PATIENCE: u32 = 60;
const STUCK: u32 = 3;

/// Weight of what is no fault, beside faults of 1 to 16.
const USUAL: u32 = 5;

const SECOND: i64 = 1_000_000_000;
/// 2026-01-01T00:00:00Z.
const START_NS: i64 = 1_767_225_600 * SECOND;
/// Where clocks are set to: 1970, shortly before it, 2038 and today.
const CLOCKS: [i64; 4] = [0, -SECOND, 2_147_483_647 * SECOND, START_NS];

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// How often what happened.
    pub tally: Tally,
    /// What is wrong, and at which step.
    pub failure: Option<String>,
    /// What happened, where that was asked for.
    pub trace: Vec<String>,
}

/// What may happen with a seed.
struct Plan {
    steps: u32,
    /// How often each fault happens, in parts of the weight of everything else.
    faults: Vec<(u32, Fault)>,
    limits: Limits,
    checkpoint_pages: u32,
}

struct Pc {
    id: AgentId,
    uuid: [u8; 16],
    memory: Memory,
    agent: Option<SimAgent>,
    ledger: Ledger,
    /// Something is wrong with its disk.
    trouble: bool,
    version: u16,
    wall_ns: i64,
    witness: Option<Checkpoint>,
    is_cut_off: bool,
    images: Vec<(Memory, Snapshot)>,
    connects: u32,
    /// When the agent dies in a call: the machine does, too.
    loses_power: bool,
}

/// A connection. Each end learns of its end in its own time.
struct Link {
    pc: usize,
    /// On their way to the server, to the agent.
    up: VecDeque<u8>,
    down: VecDeque<u8>,
    agent_open: bool,
    server_open: bool,
    is_accepted: bool,
    /// Nothing more comes after what is on its way.
    is_cut: bool,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Record(usize),
    Losses(usize),
    Sync(usize),
    Step(usize),
    Connect(usize),
    Heartbeat(usize),
    GiveUp(usize),
    StartAgent(usize),
    Mend(usize),
    Heal(usize),
    SpoolImage(usize),
    Up(u64),
    Down(u64),
    ServerNotices(u64),
    Commit,
    Sign,
    StartServer,
    MendStore,
    StoreImage,
    Fault(Fault),
}

struct World {
    rng: fastrand::Rng,
    plan: Plan,
    now_ns: i64,
    pcs: Vec<Pc>,
    server: Option<Server>,
    disk: Disk,
    store_trouble: bool,
    server_loses_power: bool,
    store_images: Vec<Disk>,
    links: BTreeMap<u64, Link>,
    next_link: u64,
    tally: Tally,
    trace: Option<Vec<String>>,
    mutant: Option<Mutant>,
    step: u32,
}

/// Runs one seed.
pub fn run(seed: u64, with_trace: bool, mutant: Option<Mutant>) -> Report {
    let mut world = World::new(seed, with_trace, mutant);
    let failure = world.live().err().map(|what| format!("step {}: {what}", world.step));
    // Whatever is still open must not touch the disk any more.
    world.disk.kill();
    Report { seed, tally: world.tally, failure, trace: world.trace.unwrap_or_default() }
}

/// A disk with a new store.
fn new_store(seed: u64) -> Disk {
    static NEW: OnceLock<Disk> = OnceLock::new();
    let new = NEW.get_or_init(|| {
        let disk = Disk::new(0);
        let uuids: Vec<_> = (0..PCS).map(uuid).collect();
        let made = server::make_store(&disk, &uuids);
        assert_eq!(made, Ok(()), "nothing is wrong with this disk");
        disk
    });
    new.image(seed)
}

fn uuid(pc: usize) -> [u8; 16] {
    [pc as u8 + 1; 16]
}

impl Plan {
    fn new(rng: &mut fastrand::Rng) -> Self {
        // Some kinds of faults, not all: each hides some of the others. Sometimes none at all.
        let share = if rng.u8(..16) == 0 { 0 } else { rng.u8(1..12) };
        let mut faults: Vec<(u32, Fault)> = Vec::new();
        for fault in FAULTS {
            if rng.u8(..16) < share {
                let most = if fault.is_destructive() { 2 } else { 16 };
                faults.push((rng.u32(1..=most), fault));
            }
        }
        let bytes = match rng.u8(..4) {
            0 if !faults.is_empty() => rng.u64(2_000..12_000),
            _ => 1 << 20,
        };
        let limits = Limits {
            bytes,
            segment_bytes: rng.u64(200..4_000),
            unsynced_bytes: rng.usize(1_500..12_000),
            max_age: None,
        };
        Self { steps: rng.u32(300..1000), faults, limits, checkpoint_pages: rng.u32(2..60) }
    }

    fn is_calm(&self) -> bool {
        self.faults.is_empty()
    }

    fn has(&self, fault: Fault) -> bool {
        self.faults.iter().any(|(_, other)| *other == fault)
    }
}

impl World {
    fn new(seed: u64, with_trace: bool, mutant: Option<Mutant>) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let plan = Plan::new(&mut rng);
        let disk = new_store(rng.u64(..));
        if with_trace {
            disk.keep_log();
        }
        if mutant == Some(Mutant::StoreSkipsSync) {
            disk.skip_syncs();
        }
        let pcs = (0..rng.usize(1..=PCS))
            .map(|pc| Pc {
                id: AgentId(pc as i64 + 1),
                uuid: uuid(pc),
                memory: Memory::default(),
                agent: None,
                ledger: Ledger::default(),
                trouble: false,
                // Version 1 does not notice a spool that was set back and has grown since.
                version: if rng.u8(..8) == 0 && !plan.has(Fault::SpoolSetBack) { 1 } else { 2 },
                wall_ns: START_NS,
                witness: None,
                is_cut_off: false,
                images: Vec::new(),
                connects: 0,
                loses_power: false,
            })
            .collect();
        Self {
            rng,
            plan,
            now_ns: START_NS,
            pcs,
            server: None,
            disk,
            store_trouble: false,
            server_loses_power: false,
            store_images: Vec::new(),
            links: BTreeMap::new(),
            next_link: 1,
            tally: Tally::default(),
            trace: with_trace.then(Vec::new),
            mutant,
            step: 0,
        }
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:4} {}", self.step, what()));
        }
    }

    /// What the store's disk was asked for since the last time.
    fn note_disk(&mut self) {
        if let Some(trace) = &mut self.trace {
            trace.extend(self.disk.take_log().iter().map(|line| format!("{:4}          {line}", self.step)));
        }
    }

    fn live(&mut self) -> Result<(), String> {
        self.start_server()?;
        for _ in 0..self.plan.steps {
            self.step += 1;
            let time = self.rng.i64(0..50_000_000);
            self.now_ns += time;
            self.pcs.iter_mut().for_each(|pc| pc.wall_ns += time);
            let action = self.choose();
            let done = self.act(action);
            self.note_disk();
            done?;
            self.bury()?;
        }
        self.drain()?;
        self.judge()
    }

    /// What could happen now, and how likely each is.
    fn choose(&mut self) -> Action {
        let mut all: Vec<(u32, Action)> = Vec::new();
        for (at, pc) in self.pcs.iter().enumerate() {
            match &pc.agent {
                None => all.push((10, Action::StartAgent(at))),
                Some(agent) => {
                    all.extend([(20, Action::Record(at)), (15, Action::Sync(at)), (3, Action::Losses(at))]);
                    if self.plan.has(Fault::SpoolSetBack) && pc.images.len() < 3 {
                        all.push((2, Action::SpoolImage(at)));
                    }
                    match &agent.call {
                        None if pc.is_cut_off => {}
                        None => all.push((10, Action::Connect(at))),
                        Some(_) => {
                            all.extend([(40, Action::Step(at)), (2, Action::Heartbeat(at))]);
                            if pc.is_cut_off {
                                all.push((4, Action::GiveUp(at)));
                            }
                        }
                    }
                }
            }
            if pc.trouble {
                all.push((5, Action::Mend(at)));
            }
            if pc.is_cut_off {
                all.push((5, Action::Heal(at)));
            }
        }
        for (number, link) in &self.links {
            let pc = &self.pcs[link.pc];
            if !pc.is_cut_off && link.server_open {
                all.push((20, Action::Up(*number)));
            }
            if !pc.is_cut_off && link.agent_open {
                all.push((20, Action::Down(*number)));
            }
            let is_newest =
                self.links.iter().filter(|(_, other)| other.pc == link.pc).max_by_key(|(n, _)| **n);
            if link.server_open && (pc.is_cut_off || is_newest.is_some_and(|(newest, _)| newest != number)) {
                all.push((3, Action::ServerNotices(*number)));
            }
        }
        match &self.server {
            None => all.push((10, Action::StartServer)),
            Some(server) => {
                if server.has_work() {
                    all.push((40, Action::Commit));
                }
                all.push((1, Action::Sign));
                if self.plan.has(Fault::StoreSetBack) && self.store_images.len() < 3 {
                    all.push((2, Action::StoreImage));
                }
            }
        }
        if self.store_trouble {
            all.push((5, Action::MendStore));
        }
        // Faults are rare beside what they disturb.
        all.iter_mut().for_each(|(weight, _)| *weight *= USUAL);
        all.extend(self.plan.faults.iter().map(|(weight, fault)| (*weight, Action::Fault(*fault))));
        let sum: u32 = all.iter().map(|(weight, _)| weight).sum();
        let mut at = self.rng.u32(..sum);
        for (weight, action) in &all {
            match at.checked_sub(*weight) {
                None => return *action,
                Some(rest) => at = rest,
            }
        }
        Action::StartServer
    }

    fn act(&mut self, action: Action) -> Result<(), String> {
        if !matches!(action, Action::Up(_) | Action::Down(_)) {
            self.note(|| format!("{action:?}"));
        }
        match action {
            Action::Record(pc) => self.record(pc),
            Action::Losses(pc) => self.record_losses(pc),
            Action::Sync(pc) => {
                let Pc { agent: Some(agent), ledger, .. } = &mut self.pcs[pc] else { return Ok(()) };
                agent.sync_step(ledger).map(drop)
            }
            Action::Step(pc) => self.step_session(pc),
            Action::Connect(pc) => {
                self.connect(pc);
                Ok(())
            }
            Action::Heartbeat(pc) => {
                let Some(agent) = &self.pcs[pc].agent else { return Ok(()) };
                if let (Some(call), Some(bytes)) = (&agent.call, agent.heartbeat()) {
                    let link = call.link;
                    self.send_up(link, &bytes);
                }
                Ok(())
            }
            Action::GiveUp(pc) => {
                self.agent_hangs_up(pc);
                Ok(())
            }
            Action::StartAgent(pc) => self.start_agent(pc),
            Action::Mend(pc) => {
                self.mend(pc);
                Ok(())
            }
            Action::Heal(pc) => {
                self.pcs[pc].is_cut_off = false;
                Ok(())
            }
            Action::SpoolImage(pc) => {
                let Pc { memory, images, ledger, .. } = &mut self.pcs[pc];
                images.push((memory.image(), ledger.snapshot()));
                Ok(())
            }
            Action::Up(link) => {
                let some = if self.rng.u8(..4) > 0 { usize::MAX } else { self.rng.usize(1..200) };
                self.deliver_up(link, some)
            }
            Action::Down(link) => {
                let some = if self.rng.u8(..4) > 0 { usize::MAX } else { self.rng.usize(1..40) };
                self.deliver_down(link, some)
            }
            Action::ServerNotices(link) => {
                self.server_hangs_up(link);
                Ok(())
            }
            Action::Commit => {
                let jobs = self.rng.usize(1..8);
                self.commit(jobs)
            }
            Action::Sign => {
                if let Some(server) = &mut self.server {
                    server.sign(self.now_ns);
                }
                Ok(())
            }
            Action::StartServer => self.start_server(),
            Action::MendStore => {
                self.disk.set_trouble(Trouble::default());
                self.store_trouble = false;
                Ok(())
            }
            Action::StoreImage => {
                let image = self.disk.image(0);
                self.store_images.push(image);
                Ok(())
            }
            Action::Fault(fault) => self.harm(fault),
        }
    }

    fn record(&mut self, pc: usize) -> Result<(), String> {
        let event = match self.rng.u8(..10) {
            0 => Event::AgentStopped,
            _ => {
                let name: Vec<u8> = (0..self.rng.usize(..120)).map(|_| self.rng.u8(..)).collect();
                Event::InterfaceAttached(Interface {
                    name: Raw::new(name),
                    index: self.rng.u32(..),
                    hook: Hook::Tcx,
                })
            }
        };
        let Pc { agent: Some(agent), ledger, wall_ns, .. } = &mut self.pcs[pc] else { return Ok(()) };
        let seq = agent.record(*wall_ns, event, ledger)?;
        self.tally.event(if seq == 0 { "records refused by a spool" } else { "records" }, 1);
        self.note(|| format!("     record {seq}"));
        Ok(())
    }

    fn record_losses(&mut self, pc: usize) -> Result<(), String> {
        let Pc { agent: Some(agent), ledger, wall_ns, .. } = &mut self.pcs[pc] else { return Ok(()) };
        let gaps = agent.record_losses(*wall_ns, ledger)?;
        self.tally.event("gaps told by a spool", gaps as u64);
        Ok(())
    }

    fn step_session(&mut self, pc: usize) -> Result<(), String> {
        let Pc { agent: Some(agent), ledger, .. } = &mut self.pcs[pc] else { return Ok(()) };
        let Some(link) = agent.call.as_ref().map(|call| call.link) else { return Ok(()) };
        match agent.step(ledger) {
            Ok(Some(bytes)) => {
                self.note(|| format!("     {} bytes on link {link}", bytes.len()));
                self.send_up(link, &bytes);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(hangup) => self.hang_up(pc, hangup),
        }
    }

    fn connect(&mut self, at: usize) {
        let instance = self.rng.u64(..);
        let pc = &mut self.pcs[at];
        let Some(agent) = &mut pc.agent else { return };
        pc.connects += 1;
        let about = About {
            agent_version: "sim".into(),
            hostname: "pc".into(),
            boot_id: [0; 16],
            run: agent.recovered.run,
            previous_died: agent.recovered.previous_run_died,
            instance,
            connect: pc.connects,
            witness: pc.witness.clone(),
        };
        let link = self.next_link;
        self.next_link += 1;
        let up = agent.connect(link, pc.version, about).into();
        self.links.insert(
            link,
            Link {
                pc: at,
                up,
                down: VecDeque::new(),
                agent_open: true,
                server_open: true,
                is_accepted: false,
                is_cut: false,
            },
        );
        self.tally.event("connections", 1);
        self.note(|| format!("     link {link}"));
    }

    fn send_up(&mut self, link: u64, bytes: &[u8]) {
        if let Some(link) = self.links.get_mut(&link).filter(|link| !link.is_cut) {
            link.up.extend(bytes);
        }
    }

    fn agent_hangs_up(&mut self, pc: usize) {
        let Some(call) = self.pcs[pc].agent.as_mut().and_then(|agent| agent.call.take()) else { return };
        if let Some(link) = self.links.get_mut(&call.link) {
            // What is on its way may still come; the rest is not sent any more.
            link.agent_open = false;
            link.is_cut = true;
            link.up.truncate(self.rng.usize(..=link.up.len()));
        }
        self.drop_dead_links();
    }

    fn server_hangs_up(&mut self, number: u64) {
        if let Some(server) = &mut self.server {
            server.hang_up(number);
        }
        if let Some(link) = self.links.get_mut(&number) {
            link.server_open = false;
            link.is_cut = true;
        }
        self.drop_dead_links();
    }

    fn drop_dead_links(&mut self) {
        self.links.retain(|_, link| link.agent_open || link.server_open);
    }

    /// An agent ends its connection.
    fn hang_up(&mut self, pc: usize, hangup: Hangup) -> Result<(), String> {
        if self.pcs[pc].agent.as_ref().is_some_and(|agent| agent.machine.is_dead()) {
            return Ok(());
        }
        self.note(|| format!("     pc {pc} hangs up: {hangup:?}"));
        let Pc { ledger, trouble, .. } = &self.pcs[pc];
        let is_explained = match &hangup {
            Hangup::Violation(_) => ledger.is_set_back || ledger.is_store_set_back,
            Hangup::Refused(_) | Hangup::Broken(_) => false,
            Hangup::Spool(_) => *trouble || ledger.is_damaged,
        };
        if !is_explained {
            return Err(format!("pc {pc}: {hangup:?}"));
        }
        self.tally.event("connections ended by an agent", 1);
        self.agent_hangs_up(pc);
        Ok(())
    }

    fn deliver_up(&mut self, number: u64, some: usize) -> Result<(), String> {
        let Some(link) = self.links.get_mut(&number) else { return Ok(()) };
        let Some(server) = &mut self.server else {
            self.server_hangs_up(number);
            return Ok(());
        };
        if !link.is_accepted {
            let Pc { id, version, .. } = self.pcs[link.pc];
            link.is_accepted = server.accept(number, link.pc, id, version);
            if !link.is_accepted {
                self.server_hangs_up(number);
                return Ok(());
            }
        }
        if link.up.is_empty() {
            if link.is_cut {
                self.server_hangs_up(number);
            }
            return Ok(());
        }
        if !server.listens() {
            return Ok(());
        }
        let bytes: Vec<u8> = link.up.drain(..some.min(link.up.len())).collect();
        let pc = link.pc;
        if self.links.iter().any(|(newer, link)| link.pc == pc && *newer > number && link.is_accepted) {
            self.tally.event("deliveries on an older connection", 1);
        }
        let Some(server) = &mut self.server else { return Ok(()) };
        let outputs = server.receive(number, &bytes, self.now_ns);
        self.note(|| format!("Up({number}) {} bytes", bytes.len()));
        self.take(outputs)
    }

    fn deliver_down(&mut self, number: u64, some: usize) -> Result<(), String> {
        let Some(link) = self.links.get_mut(&number) else { return Ok(()) };
        let pc = link.pc;
        if link.down.is_empty() {
            if link.is_cut {
                self.agent_hangs_up(pc);
            }
        } else {
            let bytes: Vec<u8> = link.down.drain(..some.min(link.down.len())).collect();
            if let Some(agent) = &mut self.pcs[pc].agent {
                agent.receive(&bytes);
            }
            self.note(|| format!("Down({number}) {} bytes", bytes.len()));
        }
        self.listen(pc)
    }

    /// An agent takes in what it was told.
    fn listen(&mut self, pc: usize) -> Result<(), String> {
        loop {
            let Pc { agent: Some(agent), ledger, .. } = &mut self.pcs[pc] else { return Ok(()) };
            let heard = agent.hear(ledger);
            let is_dead = agent.machine.is_dead();
            let news = match heard {
                Ok(Some(news)) => news,
                Ok(None) => return Ok(()),
                Err(hangup) => return self.hang_up(pc, hangup),
            };
            self.note(|| format!("     pc {pc} hears {news:?}"));
            match news {
                None => {}
                Some(News::Acked(ids)) => {
                    self.tally.event("acks", 1);
                    if self.rng.u8(..6) == 0 {
                        self.check_durable(pc, &ids)?;
                    }
                }
                Some(News::BeganEpoch) => {
                    self.tally.event("epochs begun as the server knew other records", 1)
                }
                Some(News::Checkpoint(checkpoint)) => self.pcs[pc].witness = Some(checkpoint),
            }
            if is_dead {
                return Ok(());
            }
        }
    }

    /// What is acknowledged would be there after a power cut in this moment.
    fn check_durable(&mut self, pc: usize, ids: &[u64]) -> Result<(), String> {
        self.tally.event("acks compared with the durable store", 1);
        let differences = self.disk.differences();
        self.note(|| format!("     {differences:?}"));
        let disk = self.disk.durable();
        let mount = vfs::mount(&disk);
        let store = Store::open_with(&mount.path(server::STORE), vfs::NAME)
            .map_err(|error| format!("the store would not outlast a power cut: {error}"))?;
        let Pc { id, ledger, .. } = &self.pcs[pc];
        let held = oracle::held(store.conn(), *id)?;
        let missing = ids.iter().find(|id| {
            let is_excused = ledger.entries.get(id).is_some_and(|entry| entry.excuse.is_some());
            !held.contains_key(id) && !is_excused && !ledger.is_mistakable(**id)
        });
        match missing {
            None => Ok(()),
            Some(id) => {
                Err(format!("pc {pc}: record {id} is acknowledged and would not outlast a power cut"))
            }
        }
    }

    fn commit(&mut self, jobs: usize) -> Result<(), String> {
        let Some(server) = &mut self.server else { return Ok(()) };
        let outputs = server.commit(jobs, &self.disk);
        self.tally.event("commits", 1);
        self.take(outputs)
    }

    fn take(&mut self, outputs: Vec<(u64, Output)>) -> Result<(), String> {
        for (number, output) in outputs {
            match output {
                Output::Bytes(bytes) => {
                    if let Some(link) = self.links.get_mut(&number).filter(|link| !link.is_cut) {
                        link.down.extend(&bytes);
                    }
                }
                Output::Close(stop) => {
                    self.note(|| format!("     the server ends link {number}: {stop:?}"));
                    if let (Some(stop), Some(link)) = (&stop, self.links.get(&number)) {
                        let ledger = &self.pcs[link.pc].ledger;
                        let is_explained = matches!(stop, Stop::Fault(_))
                            && (ledger.is_set_back || ledger.is_store_set_back);
                        if !is_explained {
                            return Err(format!("the server ends link {number}: {stop}"));
                        }
                        self.tally.event("protocol errors after a spool was set back", 1);
                    }
                    self.tally.event("connections ended by the server", 1);
                    self.server_hangs_up(number);
                }
            }
        }
        Ok(())
    }

    fn start_agent(&mut self, at: usize) -> Result<(), String> {
        let seed = self.rng.u64(..);
        let records = if self.rng.bool() { self.rng.usize(1..6) } else { 500 };
        let (limits, mutant) = (self.plan.limits, self.mutant);
        let files = self.trace.as_ref().map(|_| machine::describe(&self.pcs[at].memory));
        self.note(|| format!("     {}", files.unwrap_or_default()));
        let pc = &mut self.pcs[at];
        let machine = Machine::new(pc.memory.clone(), None, mutant);
        let mut agent = match SimAgent::start(machine, limits, seed, records, mutant, &mut pc.ledger) {
            Ok(started) => started.map_err(|what| format!("pc {at}: {what}"))?,
            Err(error) if pc.trouble => {
                self.note(|| format!("     {error}"));
                self.tally.event("starts of an agent that failed", 1);
                return Ok(());
            }
            Err(error) => return Err(format!("pc {at} cannot start without a reason: {error}")),
        };
        let recovered = agent.recovered;
        self.tally.event("starts of an agent", 1);
        self.tally.event("epochs begun at a start", u64::from(recovered.new_epoch && recovered.run > 1));
        // As the agent's `watch` does it.
        let to_wall_ns = pc.wall_ns;
        let started = AgentStarted {
            version: "sim".into(),
            kernel: "6.1".into(),
            hostname: "pc".into(),
            boot_id: [1; 16],
            previous_run_died: recovered.previous_run_died,
        };
        agent.record(to_wall_ns, Event::AgentStarted(started), &mut pc.ledger)?;
        let down = recovered.last_wall_ns.map(|last| (GapReason::AgentDown, last, None));
        let bytes = Some(recovered.damaged_bytes).filter(|bytes| *bytes > 0);
        let last = recovered.last_wall_ns.unwrap_or(to_wall_ns);
        let damaged = bytes.map(|bytes| (GapReason::SpoolDamaged, last, Some(bytes)));
        for (reason, from_wall_ns, count) in down.into_iter().chain(damaged) {
            let gap = Gap { reason, from_wall_ns, to_wall_ns, count };
            agent.record(to_wall_ns, Event::Gap(gap), &mut pc.ledger)?;
        }
        pc.agent = Some(agent);
        if !pc.ledger.is_unsettled() && !pc.trouble {
            pc.ledger.is_calm_again();
        }
        self.note(|| format!("     {recovered:?}"));
        Ok(())
    }

    fn start_server(&mut self) -> Result<(), String> {
        if self.server.is_some() {
            return Ok(());
        }
        match Server::start(&self.disk, self.plan.checkpoint_pages, self.mutant) {
            Ok(server) => {
                self.server = Some(server);
                self.tally.event("starts of the server", 1);
                Ok(())
            }
            Err(error) if self.store_trouble => {
                self.note(|| format!("     {error}"));
                self.tally.event("starts of the server that failed", 1);
                Ok(())
            }
            Err(error) => Err(format!("the server cannot start without a reason: {error}")),
        }
    }

    fn mend(&mut self, at: usize) {
        let pc = &mut self.pcs[at];
        pc.memory.fail_after(None);
        pc.memory.set_read_only(false);
        pc.memory.set_space(None);
        pc.trouble = false;
    }

    /// Whoever died in the middle of a call is dead now.
    fn bury(&mut self) -> Result<(), String> {
        for at in 0..self.pcs.len() {
            if self.pcs[at].agent.as_ref().is_some_and(|agent| agent.machine.is_dead()) {
                let power = self.pcs[at].loses_power;
                self.note(|| format!("     pc {at} died in a call; power cut: {power}"));
                self.tally.event("deaths of an agent in a call", 1);
                self.pcs[at].ledger.disturb();
                self.agent_dies(at, power);
            }
        }
        if self.disk.is_dead() {
            let power = self.server_loses_power;
            self.note(|| format!("     the server died in a call; power cut: {power}"));
            self.tally.event("deaths of the server in a call", 1);
            self.server_dies(power);
        }
        Ok(())
    }

    fn agent_dies(&mut self, at: usize, power: bool) {
        self.agent_hangs_up(at);
        let pc = &mut self.pcs[at];
        if power {
            pc.ledger.disturb();
        }
        if let Some(agent) = pc.agent.take() {
            agent.die(&mut pc.ledger);
        }
        if power {
            pc.memory = pc.memory.power_cut(&mut self.rng);
            pc.trouble = false;
        }
    }

    fn server_dies(&mut self, power: bool) {
        if power {
            self.disk.cut_power();
        } else {
            self.disk.kill();
        }
        self.server_is_gone();
    }

    fn server_is_gone(&mut self) {
        self.server = None;
        for link in self.links.values_mut() {
            link.server_open = false;
            link.is_cut = true;
        }
        self.drop_dead_links();
    }

    /// Makes something go wrong.
    fn harm(&mut self, fault: Fault) -> Result<(), String> {
        let at = self.rng.usize(..self.pcs.len());
        let is_done = match fault {
            Fault::Cut => self.cut_link(),
            Fault::Partition => !std::mem::replace(&mut self.pcs[at].is_cut_off, true),
            Fault::AgentStop => self.stop_agent(at)?,
            Fault::AgentKill | Fault::PcPowerCut => {
                let was_up = self.pcs[at].agent.is_some();
                self.agent_dies(at, fault == Fault::PcPowerCut);
                was_up
            }
            Fault::AgentDiesInCall => {
                let calls = self.rng.u64(..12);
                self.pcs[at].loses_power = self.rng.bool();
                self.pcs[at].agent.as_ref().map(|agent| agent.machine.die_in(calls)).is_some()
            }
            Fault::SpoolError | Fault::SpoolReadOnly | Fault::SpoolDiskFull => {
                self.harm_spool_disk(at, fault);
                true
            }
            Fault::SpoolDamage => self.damage_spool(at),
            Fault::SpoolDeleted => {
                self.agent_dies(at, false);
                let pc = &mut self.pcs[at];
                pc.memory = Memory::default();
                pc.trouble = false;
                pc.ledger.set_back(&Snapshot::default(), Excuse::Deleted);
                true
            }
            Fault::SpoolSetBack => self.set_spool_back(at),
            Fault::PcClock => {
                self.pcs[at].wall_ns = self.rng.choice(CLOCKS).unwrap_or_default();
                true
            }
            Fault::ServerStop => {
                let was_up = self.server.take().map(Server::stop).is_some();
                self.server_is_gone();
                was_up
            }
            Fault::ServerKill | Fault::ServerPowerCut => {
                let was_up = self.server.is_some();
                self.server_dies(fault == Fault::ServerPowerCut);
                was_up
            }
            Fault::ServerDiesInCall | Fault::StoreError | Fault::StoreFails | Fault::StoreDiskFull => {
                self.harm_store_disk(fault);
                true
            }
            Fault::StoreSetBack => self.set_store_back()?,
            Fault::ServerClock => {
                self.now_ns = self.rng.choice(CLOCKS).unwrap_or_default();
                true
            }
        };
        self.note(|| format!("     at pc {at} if at a PC; done: {is_done}"));
        if is_done {
            self.tally.fault(fault);
        }
        Ok(())
    }

    fn stop_agent(&mut self, at: usize) -> Result<bool, String> {
        self.agent_hangs_up(at);
        let pc = &mut self.pcs[at];
        let Some(agent) = pc.agent.take() else { return Ok(false) };
        let machine = agent.machine.clone();
        agent.close(&mut pc.ledger)?;
        if machine.is_dead() {
            pc.ledger.disturb();
            let power = pc.loses_power;
            self.agent_dies(at, power);
        }
        Ok(true)
    }

    fn cut_link(&mut self) -> bool {
        let numbers: Vec<u64> =
            self.links.iter().filter(|(_, link)| !link.is_cut).map(|(number, _)| *number).collect();
        let Some(number) = self.rng.choice(numbers) else { return false };
        let Some(link) = self.links.get_mut(&number) else { return false };
        link.is_cut = true;
        link.up.truncate(self.rng.usize(..=link.up.len()));
        link.down.truncate(self.rng.usize(..=link.down.len()));
        true
    }

    fn harm_spool_disk(&mut self, at: usize, fault: Fault) {
        let pc = &mut self.pcs[at];
        pc.trouble = true;
        pc.ledger.disturb();
        match fault {
            Fault::SpoolError => pc.memory.fail_after(Some(self.rng.u64(..8))),
            Fault::SpoolReadOnly => pc.memory.set_read_only(true),
            _ => pc.memory.set_space(Some(self.rng.usize(..500))),
        }
    }

    fn damage_spool(&mut self, at: usize) -> bool {
        let pc = &mut self.pcs[at];
        let Some(name) = self.rng.choice(pc.memory.names()) else { return false };
        let rng = &mut self.rng;
        let is_newest = pc.memory.names().iter().filter(|name| name.ends_with(".seg")).max() == Some(&name);
        pc.ledger.hit(&machine::records(&pc.memory, &name), is_newest);
        pc.memory.damage(&name, |bytes| match rng.u8(..4) {
            _ if bytes.is_empty() => {}
            // A file that ends behind a whole record looks like one that was set back.
            0 if bytes.len() > HEADER => {
                bytes.truncate(rng.usize(HEADER..bytes.len()));
                bytes.extend([0xff; 3]);
            }
            1 => {
                let from = rng.usize(..bytes.len());
                let to = rng.usize(from..bytes.len());
                bytes[from..to].fill(0);
            }
            _ => {
                let at = rng.usize(..bytes.len());
                bytes[at] ^= 1 << rng.u8(..8);
            }
        })
    }

    fn set_spool_back(&mut self, at: usize) -> bool {
        let images = self.pcs[at].images.len();
        if images == 0 {
            return false;
        }
        self.agent_dies(at, false);
        let pc = &mut self.pcs[at];
        let (memory, snapshot) = &pc.images[self.rng.usize(..images)];
        pc.memory = memory.image();
        pc.trouble = false;
        pc.ledger.set_back(snapshot, Excuse::SpoolSetBack);
        true
    }

    fn harm_store_disk(&mut self, fault: Fault) {
        self.store_trouble = true;
        let trouble = match fault {
            Fault::ServerDiesInCall => {
                self.server_loses_power = self.rng.bool();
                Trouble { dies_in: Some(self.rng.u64(..15)), ..Trouble::default() }
            }
            Fault::StoreError => Trouble { fails_in: Some(self.rng.u64(..15)), ..Trouble::default() },
            Fault::StoreFails => Trouble { rate: self.rng.u8(20..200), ..Trouble::default() },
            _ => Trouble { space: Some(self.rng.usize(..20_000)), ..Trouble::default() },
        };
        self.disk.set_trouble(trouble);
    }

    fn set_store_back(&mut self) -> Result<bool, String> {
        if self.store_images.is_empty() {
            return Ok(false);
        }
        self.server_dies(false);
        // That takes a while: nothing is on its way any more.
        for pc in 0..self.pcs.len() {
            self.agent_hangs_up(pc);
        }
        self.links.clear();
        let seed = self.rng.u64(..);
        self.disk = self.store_images[self.rng.usize(..self.store_images.len())].image(seed);
        if self.trace.is_some() {
            self.disk.keep_log();
        }
        self.store_trouble = false;
        let copy = self.disk.image(0);
        let mount = vfs::mount(&copy);
        let store = Store::open_with(&mount.path(server::STORE), vfs::NAME)
            .map_err(|error| format!("a copy of the store cannot be opened: {error}"))?;
        for pc in &mut self.pcs {
            let held = oracle::held(store.conn(), pc.id)?;
            pc.ledger.store_set_back(&held.into_keys().collect());
        }
        Ok(true)
    }

    /// Nothing goes wrong any more: everything must come to the server.
    fn drain(&mut self) -> Result<(), String> {
        self.note(|| "nothing goes wrong any more".into());
        self.disk.set_trouble(Trouble::default());
        for at in 0..self.pcs.len() {
            self.mend(at);
            self.pcs[at].is_cut_off = false;
            if let Some(agent) = &self.pcs[at].agent {
                agent.machine.die_in(u64::MAX);
            }
        }
        let (mut waiting, mut since, mut stuck) = (u64::MAX, 0, 0);
        for round in 0..ROUNDS {
            self.step += 1;
            self.now_ns += SECOND / 10;
            self.start_server()?;
            let mut is_done = true;
            for pc in 0..self.pcs.len() {
                is_done &= self.drain_step(pc)?;
            }
            if is_done {
                self.tally.event("rounds until everything was there", u64::from(round));
                return Ok(());
            }
            let backlog = self.pcs.iter().filter_map(|pc| Some(pc.agent.as_ref()?.stats().backlog)).sum();
            if backlog != waiting {
                (waiting, since) = (backlog, round);
            } else if round - since > PATIENCE {
                stuck += 1;
                since = round;
                self.tally.event("connections that an agent gave up at the end", 1);
                for pc in 0..self.pcs.len() {
                    self.agent_hangs_up(pc);
                }
                if stuck > STUCK || self.plan.is_calm() {
                    return Err(format!(
                        "{waiting} records do not come to the server though nothing is wrong any more"
                    ));
                }
            }
        }
        Err(format!("{waiting} records did not come to the server within {ROUNDS} rounds"))
    }

    fn drain_step(&mut self, pc: usize) -> Result<bool, String> {
        if self.pcs[pc].agent.is_none() {
            self.start_agent(pc)?;
        }
        self.record_losses(pc)?;
        if let Pc { agent: Some(agent), ledger, .. } = &mut self.pcs[pc] {
            agent.sync(ledger)?;
            if agent.call.is_none() {
                self.connect(pc);
            }
        }
        for _ in 0..4 {
            self.step_session(pc)?;
        }
        for link in self.links.keys().copied().collect::<Vec<_>>() {
            self.deliver_up(link, usize::MAX)?;
        }
        self.commit(usize::MAX)?;
        self.note_disk();
        for link in self.links.keys().copied().collect::<Vec<_>>() {
            if self.links.get(&link).is_some_and(|link| link.agent_open) {
                self.deliver_down(link, usize::MAX)?;
            }
        }
        let Pc { agent: Some(agent), ledger, .. } = &mut self.pcs[pc] else { return Ok(false) };
        if !agent.is_drained() || agent.expects_answer() {
            return Ok(false);
        }
        let refusals = ledger.refusals();
        // What is told last shows that something is missing in front of it.
        self.record_losses(pc)?;
        let Pc { agent: Some(agent), ledger, .. } = &mut self.pcs[pc] else { return Ok(false) };
        if !agent.is_drained() || refusals != ledger.refusals() {
            return Ok(false);
        }
        let (refused, reported) = refusals;
        if refused != reported {
            return Err(format!("pc {pc}: the spool refused {refused} records and told of {reported}"));
        }
        Ok(true)
    }

    /// Is the store, as it would outlast a power cut now, what the agents promised?
    fn judge(&mut self) -> Result<(), String> {
        let mishaps = self.disk.mishaps();
        self.tally.event("I/O errors of the store's disk", mishaps.io_errors);
        self.tally.event("failed fsyncs of the store's disk", mishaps.failed_syncs);
        self.tally.event("writes of the store that found no space", mishaps.full);
        self.tally.event("power cuts that lost something written", mishaps.lossy_cuts);
        let disk = self.disk.durable();
        let mount = vfs::mount(&disk);
        let store =
            Store::open_with(&mount.path(server::STORE), vfs::NAME).map_err(|error| error.to_string())?;
        let check: String = store
            .conn()
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .map_err(|error| error.to_string())?;
        if check != "ok" {
            return Err(format!("SQLite finds its file damaged: {check}"));
        }
        for (at, pc) in self.pcs.iter().enumerate() {
            if let Some(trace) = &mut self.trace {
                trace.push(format!("{:4} pc {at}: {}", self.step, oracle::describe(store.conn(), pc.id)));
            }
            let verdict = oracle::verify(store.conn(), pc.id, &pc.uuid, &pc.ledger)
                .map_err(|what| format!("pc {at}: {what}"))?;
            let tally = &mut self.tally;
            tally.event("records in the store", verdict.records);
            tally.event("gaps in the store", verdict.gaps);
            tally.event("records in gaps", verdict.gap_records);
            tally.event("histories that began anew", verdict.restarts);
            tally.event("histories that began anew though nothing was lost", verdict.needless_restarts);
            tally.event("records that came twice after a spool was set back", verdict.doubles);
            tally.event("promised records that are missing with a reason", verdict.missing);
            tally.event("of these told by the spool alone", verdict.told);
            tally.event(
                "of these not told: their epoch gave way before the server heard of it",
                verdict.unheard,
            );
            tally.event("of these not seen by the server: they were on the lost disk alone", verdict.unseen);
            if self.plan.is_calm() && (verdict.gaps, verdict.restarts, verdict.missing) != (0, 0, 0) {
                return Err(format!("pc {at}: nothing went wrong, and yet there is {verdict:?}"));
            }
        }
        Ok(())
    }
}
