//! A real agent and a real server, killed at random moments under load, again and again; then both logs and the store are
//! compared. `cargo xtask torture`; what it shows: `docs/torture.md`.
//!
//! * [`plan`]: whom it strikes, how and when; pure
//! * [`arena`]: the programs, and the strikes
//! * [`load`]: what the agent has to record
//! * [`store`]: the server's store, read without the server's code
//! * [`judge`]: the PC's log against the server's; pure

mod arena;
mod judge;
mod load;
mod plan;
mod store;

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::clock;
use crate::netmon::Server;
use crate::objects::{Kernel, Objects};
use crate::room::Room;
use crate::wait;

use arena::{Arena, LIMIT, Resources, Tally};
use judge::Account;
use load::Load;
use plan::Plan;
use store::Audit;

/// Between two lines that say how far it is, in kills.
const TELL_EVERY: u32 = 25;
/// What a program may take more in the end than in the beginning. Both remember what is going on, and the agent flows of
/// the last five minutes: megabytes.
const MORE_MEMORY: u64 = 64 << 20;
/// Descriptors that a program may have more in the end than in the beginning: connections, files that are being read.
const MORE_FILES: usize = 16;
/// Most that the spool's directory holds when everything is delivered: some segments of 4 MiB.
const SPOOL_LEFT: u64 = 16 << 20;

/// What is to be done.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// How often agent or server or both are killed (SIGKILL); SIGTERM and SIGSTOP come on top
    #[arg(long, default_value_t = 1_000)]
    pub kills: u32,
    /// Repeats the strikes of another run, as far as timing allows
    #[arg(long)]
    pub seed: Option<u64>,
}

/// What happened, and what is wrong.
#[derive(Debug)]
pub struct Report {
    /// The strikes' seed.
    pub seed: u64,
    /// What is wrong; empty: nothing.
    pub findings: Vec<String>,
    /// Where the room's files are kept when something is wrong.
    pub files: PathBuf,
    tally: Tally,
    /// Lines of the PC's log.
    recorded: usize,
    account: Account,
    audit: Audit,
    sent: (u64, u64),
    took: Duration,
    resources: [Resources; 2],
}

/// Strikes as often as asked, and judges.
///
/// # Errors
/// What could not be built, or did not get ready or end when it should: the message has the seed, and where the files are.
/// What is wrong with the delivery is no error, but in [`Report::findings`].
pub fn run(options: &Options) -> Result<Report> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..));
    let room = Room::build(2)?;
    let result = torture(&room, seed, options.kills);
    if !result.as_ref().is_ok_and(|report| report.findings.is_empty()) {
        room.keep_files();
    }
    result.with_context(|| format!("--seed {seed}; its files are in {}", room.directory().display()))
}

fn torture(room: &Room, seed: u64, kills: u32) -> Result<Report> {
    let began = clock::now();
    let before = Kernel::look()?.netmon;
    let server = Server::start(room)?;
    let mut arena = Arena::open(room, server)?;
    let first = arena.resources()?;

    let load = Load::default();
    let struck = thread::scope(|scope| {
        let traffic = scope.spawn(|| load.run(room));
        let struck = strike(&mut arena, seed, kills, began);
        load.stop();
        let traffic = traffic.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the load died")));
        struck.and(traffic)
    });
    struck?;

    let last = arena.settle()?;
    let mut findings = arena.witness.findings.clone();
    findings.extend(too_much(first, last));
    findings.extend(left_in_the_kernel(&before, &arena).err().map(|error| format!("{error:#}")));
    arena.stop()?;
    let spool = arena.spool_bytes()?;
    if spool > SPOOL_LEFT {
        findings.push(format!("everything is delivered, and the spool has {spool} bytes"));
    }

    let (own, at_server) = (arena.own_log()?, arena.server_log()?);
    let account = judge::compare(&own, &at_server);
    findings.extend(account.findings.iter().cloned());
    let audit = arena.store()?.audit().context("the store cannot be read")?;
    findings.extend(audit.findings.iter().cloned());
    let lines = at_server.lines().count() as u64;
    let items = audit.records + audit.never_received + audit.restarts + audit.notices;
    if items != lines {
        findings.push(format!("the store has {items} items, the server's log {lines} lines"));
    }
    findings.extend(arena.unlike_rendered()?);
    findings.extend(arena.unproven()?);
    findings.extend(arena.panics());
    Ok(Report {
        seed,
        findings,
        files: room.directory().to_owned(),
        tally: arena.tally,
        recorded: own.lines().count(),
        account,
        audit,
        sent: load.sent(),
        took: began.elapsed(),
        resources: [first, last],
    })
}

fn strike(arena: &mut Arena<'_>, seed: u64, kills: u32, began: std::time::Instant) -> Result<()> {
    for (number, strike) in (1_u32..).zip(Plan::new(seed)) {
        let before = arena.tally.kills();
        arena.strike(&strike).with_context(|| format!("strike {number}, {strike:?}"))?;
        let done = arena.tally.kills();
        if done != before && done.is_multiple_of(TELL_EVERY) {
            eprintln!("netmon-lab: {done} of {kills} kills after {:.0} s", began.elapsed().as_secs_f64());
        }
        // What is wrong already does not get better.
        if done >= kills || !arena.witness.findings.is_empty() {
            break;
        }
    }
    Ok(())
}

fn too_much(first: Resources, last: Resources) -> Vec<String> {
    let programs = [("agent", first.agent, last.agent), ("server", first.server, last.server)];
    let grown = programs.into_iter().filter(|(_, first, last)| {
        last.memory > first.memory + MORE_MEMORY || last.files > first.files + MORE_FILES
    });
    grown.map(|(name, first, last)| format!("the {name} had {first} and has {last}")).collect()
}

/// The agent that runs has all of its programs and maps, and nothing of its predecessors is left.
fn left_in_the_kernel(before: &Objects, arena: &Arena<'_>) -> Result<()> {
    let agent = arena.agent_pid().context("no agent runs")?;
    let mut last = String::new();
    // Others on this machine may be ending their agents at this moment.
    let clean = wait::until(LIMIT, "a kernel without remains", || {
        let kernel = Kernel::look().inspect_err(|error| last = error.to_string()).ok()?;
        let orphans = kernel.orphans().inspect_err(|error| last = error.to_string()).ok()?.without(before);
        last = format!("left in the kernel, and nobody's: {orphans:?}");
        orphans.is_empty().then_some(kernel)
    });
    let kernel = clean.ok().with_context(|| last)?;
    ensure!(!kernel.held_by(agent).is_empty(), "the agent that runs has nothing in the kernel");
    Ok(())
}

impl Report {
    /// How often anybody was killed.
    pub fn kills(&self) -> u32 {
        self.tally.kills()
    }

    /// Records in the server's store.
    pub fn records(&self) -> u64 {
        self.audit.records
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { tally, account, audit, .. } = self;
        let rate = audit.records as f64 / self.took.as_secs_f64();
        let (datagrams, connections) = self.sent;
        let [first, last] = self.resources;
        let mut row = |name: &str, value: String| writeln!(f, "{name:<28}{value}");
        row("seed", self.seed.to_string())?;
        row(
            "kills (SIGKILL)",
            format!(
                "{}: agent {}, server {}, both {}",
                tally.kills(),
                tally.killed[0],
                tally.killed[1],
                tally.killed[2]
            ),
        )?;
        row("  of these during a start", tally.killed_starting.to_string())?;
        row("SIGTERM, SIGSTOP for 1 s", format!("{}, {}", tally.terminated, tally.held_up))?;
        row("starts", format!("agent {}, server {}", tally.agent_starts, tally.server_starts))?;
        row("traffic", format!("{datagrams} datagrams, {connections} TCP connections"))?;
        row("lines of the PC's log", self.recorded.to_string())?;
        row(
            "records in the store",
            format!("{} ({rate:.0} a second), {} epochs", audit.records, audit.epochs),
        )?;
        row(
            "spooled, not in PC's log",
            format!("{}, and {} torn lines", account.only_spooled, account.torn),
        )?;
        row(
            "watermark looked at",
            format!(
                "{} times after the server's end, {} times compared with the agent's",
                tally.looks, tally.compared
            ),
        )?;
        for (reason, times) in &account.gaps {
            row("gaps", format!("{times} × {reason}"))?;
        }
        row("agent, first and last", format!("{}; {}", first.agent, last.agent))?;
        row("server, first and last", format!("{}; {}", first.server, last.server))?;
        row("lost", (account.lost + audit.lost).to_string())?;
        row("doubled", (account.doubled + audit.doubled).to_string())?;
        row("took", format!("{:.0} s", self.took.as_secs_f64()))?;
        for finding in &self.findings {
            row("WRONG", finding.clone())?;
        }
        Ok(())
    }
}
