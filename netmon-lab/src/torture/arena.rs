//! The two programs, and the strikes.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, Result, bail, ensure};
use netmon_agent::status::{State, Status};
use rustix::process::Signal;

use super::plan::{HELD_UP, How, Moment, Strike, Victims};
use super::store::Store;
use crate::bench::process::resident;
use crate::netmon::{self, Agent, Daemon, Server};
use crate::room::Room;
use crate::{clock, wait};

/// Longest wait for anything: far above what it takes, for slow machines.
pub const LIMIT: Duration = Duration::from_secs(120);
/// The PC whose agent is struck, and its seat.
const PC: &str = "pc-1";
/// How long a stopped agent's last records may take to be in the server's log, before it is started once more.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// Most starts until the last records are delivered.
const ATTEMPTS: u32 = 5;
/// An agent with no more than this waiting has delivered its backlog: new records come all the time.
const FEW: u64 = 50;
/// The PC's log is compared as one file: it must not begin anew.
const LOG_SETTINGS: &str = "\n[log]\nmax_mib = 65536\n";

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Strikes with SIGKILL: agent alone, server alone, both.
    pub killed: [u32; 3],
    /// Of these, while a program was starting.
    pub killed_starting: u32,
    /// Strikes with SIGTERM.
    pub terminated: u32,
    /// Strikes with SIGSTOP.
    pub held_up: u32,
    /// Starts of the agent.
    pub agent_starts: u32,
    /// Starts of the server.
    pub server_starts: u32,
    /// Ends of the server after which the store was looked at.
    pub looks: u32,
    /// How often that was compared with what the agent takes for acknowledged.
    pub compared: u32,
}

impl Tally {
    /// All strikes with SIGKILL.
    pub fn kills(&self) -> u32 {
        self.killed.iter().sum()
    }
}

/// What a process takes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    /// Bytes of memory, without BPF maps.
    pub memory: u64,
    /// Open descriptors.
    pub files: usize,
}

impl Display for Taken {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB and {} descriptors", self.memory as f64 / f64::from(1 << 20), self.files)
    }
}

/// What both take.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resources {
    /// The agent.
    pub agent: Taken,
    /// The server.
    pub server: Taken,
}

/// Remembers what was acknowledged: it must stay so.
#[derive(Debug, Default)]
pub struct Witness {
    watermarks: BTreeMap<u64, u64>,
    /// What is wrong, in words.
    pub findings: Vec<String>,
}

impl Witness {
    /// Takes in what the store says now, while no server runs.
    fn look(&mut self, store: &Store) -> rusqlite::Result<()> {
        for (epoch, extent) in store.extents()? {
            if !extent.is_whole() {
                self.findings.push(format!("epoch {epoch:x} has holes: {extent:?}"));
            }
            let before = self.watermarks.insert(epoch, extent.next_seq).unwrap_or(0);
            if extent.next_seq < before {
                let now = extent.next_seq;
                self.findings
                    .push(format!("epoch {epoch:x}: the watermark went back from {before} to {now}"));
            }
        }
        Ok(())
    }

    /// An agent says that it was told that the server has this record.
    fn is_acknowledged(&mut self, (epoch, seq): (u64, u64)) {
        let watermark = self.watermarks.get(&epoch).copied().unwrap_or(0);
        if seq >= watermark {
            self.findings.push(format!(
                "epoch {epoch:x}: record {seq} was acknowledged, and the store of the ended server has those below {watermark}"
            ));
        }
    }
}

/// A program that is struck.
#[derive(Debug)]
struct Program {
    daemon: Option<Daemon>,
    /// It got ready.
    is_ready: bool,
    /// How long a start takes.
    start: Duration,
}

impl Program {
    fn launched(&mut self, daemon: Daemon) {
        (self.daemon, self.is_ready) = (Some(daemon), false);
    }

    fn signal(&self, which: Signal) {
        if let Some(daemon) = &self.daemon {
            daemon.signal(which);
        }
    }

    /// Nobody but a strike ends it.
    fn must_run(&mut self) -> Result<()> {
        if let Some(daemon) = &mut self.daemon
            && !daemon.is_running()
        {
            let status = ended(daemon)?;
            return Err(daemon.behaviour(format!("it ended by itself ({status})")).into());
        }
        Ok(())
    }

    fn wait_ready(&mut self, ready: impl Fn(&Daemon) -> bool) -> Result<()> {
        if self.is_ready {
            return self.must_run();
        }
        let answer = wait::until(LIMIT, "it to get ready", || {
            if let Err(error) = self.must_run() {
                return Some(Err(error));
            }
            self.daemon.as_ref().is_none_or(&ready).then_some(Ok(()))
        });
        match (answer, &self.daemon) {
            (Ok(answer), _) => answer?,
            (Err(timeout), Some(daemon)) => {
                return Err(daemon
                    .behaviour(format!("{timeout}; it stands in {}", stands_in(daemon)))
                    .into());
            }
            (Err(timeout), None) => return Err(timeout.into()),
        }
        self.is_ready = true;
        Ok(())
    }

    /// Waits for its end, after it was told to end by this signal.
    fn wait_end(&mut self, by: Signal) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        let status = ended(&mut daemon)?;
        let in_good_order = by == Signal::TERM && status.success();
        // One that has not got ready may not listen to signals yet.
        let by_signal = (by == Signal::KILL || !self.is_ready) && status.signal() == Some(by.as_raw());
        if in_good_order || by_signal {
            return Ok(());
        }
        Err(daemon.behaviour(format!("it ended with {status} after {by:?}")).into())
    }

    fn taken(&self) -> Result<Taken> {
        let pid = self.daemon.as_ref().context("it does not run")?.pid();
        let files = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        Ok(Taken { memory: resident(pid)?.process, files })
    }
}

/// What the threads of a program wait for in the kernel: it is ended with the room, and nobody can look later.
fn stands_in(daemon: &Daemon) -> String {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).into_iter().flatten().flatten();
    let threads = tasks.map(|task| {
        let told = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default().trim().to_owned();
        format!("{} ({})", told("wchan"), told("comm"))
    });
    threads.collect::<Vec<_>>().join(", ")
}

fn ended(daemon: &mut Daemon) -> Result<ExitStatus> {
    let end = wait::until(LIMIT, "its end", || daemon.try_end());
    end.map_err(|timeout| daemon.behaviour(timeout.to_string()).into())
}

/// A server and an agent that can be struck.
#[derive(Debug)]
pub struct Arena<'a> {
    server: Server<'a>,
    agent: Agent<'a>,
    of_server: Program,
    of_agent: Program,
    /// What was acknowledged.
    pub witness: Witness,
    /// What was done.
    pub tally: Tally,
}

impl<'a> Arena<'a> {
    /// Enrols an agent with the server and starts it. It has delivered its first records when this returns.
    ///
    /// # Errors
    /// What did not work or did not get ready.
    pub fn open(room: &'a Room, mut server: Server<'a>) -> Result<Self> {
        let agent = Agent::prepare(room, 1)?;
        let settings = fs::read_to_string(agent.config_file())? + LOG_SETTINGS;
        fs::write(agent.config_file(), settings)?;
        agent.enroll(&server.token(&[])?)?;
        server.stop()?;
        let program = || Program { daemon: None, is_ready: false, start: Duration::ZERO };
        let mut arena = Self {
            server,
            agent,
            of_server: program(),
            of_agent: program(),
            witness: Witness::default(),
            tally: Tally::default(),
        };
        let asked = clock::now();
        arena.launch_server()?;
        arena.of_server.wait_ready(Server::is_listening)?;
        arena.of_server.start = asked.elapsed();
        let asked = clock::now();
        arena.launch_agent()?;
        arena.wait_ready()?;
        arena.of_agent.start = asked.elapsed();
        arena.wait_delivered()?;
        Ok(arena)
    }

    fn launch_server(&mut self) -> Result<()> {
        self.of_server.launched(self.server.launch()?);
        self.tally.server_starts += 1;
        Ok(())
    }

    fn launch_agent(&mut self) -> Result<()> {
        self.of_agent.launched(self.agent.launch()?);
        self.tally.agent_starts += 1;
        Ok(())
    }

    fn launch_missing(&mut self) -> Result<()> {
        if self.of_server.daemon.is_none() {
            self.launch_server()?;
        }
        if self.of_agent.daemon.is_none() {
            self.launch_agent()?;
        }
        Ok(())
    }

    fn wait_ready(&mut self) -> Result<()> {
        self.of_server.wait_ready(Server::is_listening)?;
        let agent = &self.agent;
        self.of_agent
            .wait_ready(|daemon| status(agent, daemon).is_some_and(|status| status.state == State::Watching))
    }

    /// Waits until the agent is connected and has next to nothing left to deliver.
    fn wait_delivered(&mut self) -> Result<()> {
        let Self { of_agent, agent, .. } = self;
        let mut last = None;
        let delivered = wait::until(LIMIT, "the agent to deliver its backlog", || {
            if let Err(error) = of_agent.must_run() {
                return Some(Err(error));
            }
            last = of_agent.daemon.as_ref().and_then(|daemon| status(agent, daemon));
            let status = last.as_ref()?;
            (status.acked.is_some() && status.coverage.backlog <= FEW).then_some(Ok(()))
        });
        delivered.with_context(|| format!("the agent says: {last:?}"))?
    }

    /// Brings up who is down, waits for the moment, strikes.
    ///
    /// # Errors
    /// Who does not get ready, ends by itself, or does not end as told.
    pub fn strike(&mut self, strike: &Strike) -> Result<()> {
        self.launch_missing()?;
        let starting = match strike.moment {
            Moment::Starting(part) => {
                let start = if self.of_agent.is_ready { self.of_server.start } else { self.of_agent.start };
                thread::sleep(start.mul_f64(part));
                // A program that ended before it is struck did so by itself.
                self.of_server.must_run()?;
                self.of_agent.must_run()?;
                true
            }
            Moment::Running(pause) => {
                self.wait_ready()?;
                thread::sleep(pause);
                false
            }
            Moment::Delivering(pause) => {
                self.wait_ready()?;
                let before = self.log_length();
                wait::until(LIMIT, "new records", || (self.log_length() > before).then_some(()))?;
                thread::sleep(pause);
                false
            }
        };
        match strike.how {
            How::HoldUp => {
                self.signal(strike.victims, Signal::STOP);
                thread::sleep(HELD_UP);
                self.signal(strike.victims, Signal::CONT);
                self.tally.held_up += 1;
            }
            How::Terminate => {
                self.end(strike, Signal::TERM)?;
                self.tally.terminated += 1;
            }
            How::Kill => {
                self.end(strike, Signal::KILL)?;
                self.tally.killed[strike.victims as usize] += 1;
                self.tally.killed_starting += u32::from(starting);
            }
        }
        Ok(())
    }

    /// Length of the server's log of the PC; 0 while there is none.
    fn log_length(&self) -> u64 {
        self.server.log_file(PC).metadata().map_or(0, |file| file.len())
    }

    fn signal(&self, victims: Victims, which: Signal) {
        if victims.server() {
            self.of_server.signal(which);
        }
        if victims.agent() {
            self.of_agent.signal(which);
        }
    }

    fn end(&mut self, strike: &Strike, by: Signal) -> Result<()> {
        self.signal(strike.victims, by);
        if strike.victims.agent() {
            self.of_agent.wait_end(by).context("the agent")?;
        }
        if strike.victims.server() {
            self.of_server.wait_end(by).context("the server")?;
            self.bear_witness(strike)?;
        }
        Ok(())
    }

    /// No server runs: what the agent takes for acknowledged must be in the store.
    fn bear_witness(&mut self, strike: &Strike) -> Result<()> {
        self.witness.look(&self.store()?).context("the store of the ended server cannot be read")?;
        self.tally.looks += 1;
        let asked = match &mut self.of_agent {
            // It goes on without a server: its next status knows the last ack that reached it.
            Program { daemon: Some(daemon), is_ready: true, .. } if strike.ask_agent => {
                let agent = &self.agent;
                let before = status(agent, daemon).map(|status| status.updated_boot_ns);
                let newer = wait::until(LIMIT, "a new status of the agent", || {
                    status(agent, daemon).filter(|status| Some(status.updated_boot_ns) != before)
                });
                Some(newer?)
            }
            Program { daemon: Some(daemon), .. } => status(&self.agent, daemon),
            // What the agent that was struck as well wrote last.
            _ => any_status(&self.agent),
        };
        if let Some(acked) = asked.and_then(|status| status.acked) {
            self.witness.is_acknowledged(acked);
            self.tally.compared += 1;
        }
        Ok(())
    }

    /// Brings up who is down and waits until the agent's backlog is delivered. What both take then.
    ///
    /// # Errors
    /// Who does not get ready, or that the backlog is not delivered.
    pub fn settle(&mut self) -> Result<Resources> {
        self.launch_missing()?;
        self.wait_ready()?;
        self.wait_delivered()?;
        self.resources()
    }

    /// Stops both. Everything that the agent recorded is in the server's log when this returns.
    ///
    /// # Errors
    /// Who does not end in good order, or that something is not delivered.
    pub fn stop(&mut self) -> Result<()> {
        for _ in 0..ATTEMPTS {
            self.settle()?;
            self.of_agent.signal(Signal::TERM);
            self.of_agent.wait_end(Signal::TERM)?;
            let own = self.own_log()?;
            let last = own.lines().next_back().context("the PC's log is empty")?;
            let arrived = wait::until(LAST_WORDS, "the agent's last words", || {
                let log = self.server_log().ok()?;
                log.lines().next_back()?.starts_with(last).then_some(())
            });
            if arrived.is_ok() {
                self.of_server.signal(Signal::TERM);
                return self.of_server.wait_end(Signal::TERM);
            }
        }
        bail!(
            "the agent was started and stopped {ATTEMPTS} times, and its last words are not in the server's log"
        )
    }

    /// What both take now.
    ///
    /// # Errors
    /// One of them does not run.
    pub fn resources(&self) -> Result<Resources> {
        Ok(Resources { agent: self.of_agent.taken()?, server: self.of_server.taken()? })
    }

    /// The agent's process.
    pub fn agent_pid(&self) -> Option<u32> {
        self.of_agent.daemon.as_ref().map(Daemon::pid)
    }

    /// The store, as it lies there.
    ///
    /// # Errors
    /// SQLite's.
    pub fn store(&self) -> Result<Store> {
        let path = self.server.data().join("store.sqlite");
        Store::open(&path).with_context(|| format!("cannot open {}", path.display()))
    }

    /// The PC's `log.txt`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn own_log(&self) -> Result<String> {
        read(self.agent.log_file())
    }

    /// The server's `log.txt` of the PC.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn server_log(&self) -> Result<String> {
        read(self.server.log_file(PC))
    }

    /// Bytes in the spool's directory.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn spool_bytes(&self) -> Result<u64> {
        let files = fs::read_dir(self.agent.state().join("spool"))?;
        let bytes = files.map(|file| Ok(file?.metadata()?.len()));
        Ok(bytes.sum::<std::io::Result<u64>>()?)
    }

    /// Where the server's files differ from what it makes out of its store now.
    ///
    /// # Errors
    /// A file cannot be read, or the store is not rendered.
    pub fn unlike_rendered(&self) -> Result<Vec<String>> {
        let mut findings = Vec::new();
        for (name, options) in [("log.txt", &[][..]), ("usb.log", &["--usb"][..])] {
            let file = read(self.server.log_file(PC).with_file_name(name))?;
            let rendered = self.rendered(options)?;
            if file == rendered {
                continue;
            }
            let mut pairs = file.lines().zip(rendered.lines()).enumerate();
            let first = pairs.find(|(_, (file, rendered))| file != rendered);
            findings.push(match first {
                Some((at, (file, rendered))) => {
                    format!("the server's {name} has in line {}: {file}; the store says: {rendered}", at + 1)
                }
                None => format!(
                    "the server's {name} has {} bytes, the store makes {}",
                    file.len(),
                    rendered.len()
                ),
            });
        }
        Ok(findings)
    }

    /// What the server's own proof of its histories finds.
    ///
    /// # Errors
    /// The command cannot be run.
    pub fn unproven(&self) -> Result<Option<String>> {
        let mut command = self.server.host().command(netmon::program("netmon-server")?);
        command.arg("--data").arg(self.server.data()).arg("verify");
        let output = command.output().context("cannot start netmon-server verify")?;
        let said = || String::from_utf8_lossy(&output.stdout).into_owned();
        Ok((!output.status.success()).then(said))
    }

    /// Panics that did not end their program: of a thread, of a task.
    pub fn panics(&self) -> Vec<String> {
        let said = [("agent", self.agent.said()), ("server", self.server.said())];
        let first = |said: String| said.lines().find(|line| line.contains("panicked at")).map(str::to_owned);
        said.into_iter()
            .filter_map(|(name, said)| Some(format!("the {name} said: {}", first(said)?)))
            .collect()
    }

    /// As [`Server::log`], but takes the time it needs: the log is long.
    fn rendered(&self, options: &[&str]) -> Result<String> {
        let mut command = self.server.host().command(netmon::program("netmon-server")?);
        command.arg("--data").arg(self.server.data()).args(["log", PC]).args(options);
        let output = command.output().context("cannot start netmon-server log")?;
        ensure!(
            output.status.success(),
            "netmon-server log failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }
}

fn read(path: PathBuf) -> Result<String> {
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// The agent's status, whoever wrote it.
fn any_status(agent: &Agent<'_>) -> Option<Status> {
    serde_json::from_slice(&fs::read(agent.status_file()).ok()?).ok()
}

/// The status of this process. The file of an agent that was killed stays where it was.
fn status(agent: &Agent<'_>, daemon: &Daemon) -> Option<Status> {
    any_status(agent).filter(|status| status.pid == daemon.pid())
}
