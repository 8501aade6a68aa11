//! How many events a second are stored, at what price; beside others that carry such events.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::agents::{self, Agent, PATIENCE, Session};
use super::nfcapd;
use super::records::{self, Frame};
use super::rsyslog::{self, Queue};
use super::server::Server;
use crate::bench::numbers::{median, median_ratio};
use crate::bench::report::{Findings, Table, Target, number};
use crate::{clock, wait};

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds through all.
    pub rounds: usize,
    /// Agents, or hosts that send to rsyslog.
    pub agents: usize,
    /// Events of each in a round: at most the server's burst, so that nobody is held back.
    pub events: u64,
    /// Events of each of sixteen hosts that rsyslog takes into its synced queue in a round.
    pub synced_events: usize,
    /// How long each rate of NetFlow is tried.
    pub flows: Duration,
    /// How long the moderate load lasts.
    pub moderate: Duration,
}

/// Connections that share rsyslog's synced queue: enough to fill its batches.
const SYNCED_HOSTS: usize = 16;
/// Agents of the moderate load, which say two events a second each: a room of PCs.
const MODERATE_AGENTS: usize = 100;
/// Between two events of such an agent.
const MODERATE_PAUSE: Duration = Duration::from_millis(500);
/// A process that takes no CPU time for so long is done.
const QUIET: Duration = Duration::from_millis(300);

/// What a round cost.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Events delivered.
    pub events: u64,
    /// From the first one sent to the last one acknowledged, or written where nothing durable is acknowledged.
    pub took: Duration,
    /// CPU time of the receiving processes.
    pub cpu: Duration,
    /// Bytes over the network, both ways, without UDP, TCP and IP headers.
    pub wire: Option<u64>,
    /// Bytes that the store grew by.
    pub store: Option<u64>,
    /// Bytes of readable lines.
    pub logs: Option<u64>,
}

impl Measured {
    fn rate(&self) -> f64 {
        self.events as f64 / self.took.as_secs_f64()
    }

    fn cpu_us(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.events as f64
    }

    fn per_event(&self, bytes: Option<u64>) -> f64 {
        bytes.map_or(f64::NAN, |bytes| bytes as f64 / self.events as f64)
    }
}

/// Who is measured, in the order of a round.
const SUBJECTS: [&str; 4] = [
    "**netmon-server**",
    "rsyslog, RELP, memory queue",
    "rsyslog, RELP, synced disk queue",
    "nfcapd -z, NetFlow v5",
];

/// Measures in `directory`, which is on a real disk.
///
/// # Errors
/// Somebody cannot be started, or loses events that were acknowledged.
pub fn run(directory: &Path, plan: Plan) -> Result<Findings> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut netmon = Netmon::start(&runtime, directory, plan.agents)?;
    let (idle, idle_targets) = netmon.idle(&runtime)?;
    let mut rounds: [Vec<Measured>; 4] = Default::default();
    let mut waits = Vec::new();
    for round in 1..=plan.rounds {
        for (subject, rounds) in rounds.iter_mut().enumerate() {
            let place = tempfile::Builder::new().prefix("round-").tempdir_in(directory)?;
            let lines = |count: u64| records::lines(count, clock::wall_ns());
            let measured = match subject {
                0 => netmon.round(&runtime, plan.events)?,
                1 => rsyslog::measure(
                    &place.path().join("r"),
                    Queue::Memory,
                    plan.agents,
                    &lines(plan.events),
                )?,
                2 => {
                    let lines = lines(plan.synced_events as u64);
                    rsyslog::measure(&place.path().join("r"), Queue::Synced, SYNCED_HOSTS, &lines)?
                }
                _ => nfcapd::measure(&place.path().join("n"), plan.flows)?,
            };
            eprintln!(
                "  round {round}, {}: {} events/s, {} µs of CPU",
                SUBJECTS[subject],
                number(measured.rate(), 0),
                number(measured.cpu_us(), 2)
            );
            rounds.push(measured);
        }
        waits.extend(netmon.moderate(&runtime, plan.moderate)?);
    }
    let mut findings = summary(&rounds, plan);
    findings.tables.push(latency(&mut waits));
    findings.tables.push(idle);
    findings.targets.extend(idle_targets);
    Ok(findings)
}

fn summary(rounds: &[Vec<Measured>; 4], plan: Plan) -> Findings {
    let all = |what: fn(&Measured) -> f64| {
        rounds.each_ref().map(|rounds| -> Vec<f64> { rounds.iter().map(what).collect() })
    };
    let (rates, cpu) = (all(Measured::rate), all(Measured::cpu_us));
    let mut table = Table::new(
        "Events of many PCs to one server",
        &format!(
            "Medians of {} rounds in which all take turns. netmon: {} agents deliver {} records each, in batches of 500, over \
             QUIC with mutual TLS; every ack is behind a synced commit. rsyslog: the same events as the lines that netmon \
             writes, as many hosts, a connection each, until the lines are in the files; with the synced queue {SYNCED_HOSTS} \
             hosts and {} lines each. nfcapd: the highest of some rates at which it lost nothing; NetFlow says less than a \
             record does. The load runs on the same CPUs. `wire` is the payload of UDP or TCP, both ways; `store` is netmon's \
             database behind a checkpoint, or nfcapd's files; `log` the readable lines. The ratios are medians of the rounds' \
             ratios.",
            plan.rounds, plan.agents, plan.events, plan.synced_events
        ),
        &[
            "server",
            "events/s",
            "CPU µs/event",
            "wire B/event",
            "store B/event",
            "log B/event",
            "durable ack",
            "netmon's rate / its",
            "netmon's CPU / its",
        ],
    );
    for (subject, rounds) in rounds.iter().enumerate() {
        let bytes = |what: fn(&Measured) -> Option<u64>| median(rounds.iter().map(|m| m.per_event(what(m))));
        table.row([
            SUBJECTS[subject].into(),
            number(median(rates[subject].iter().copied()), 0),
            number(median(cpu[subject].iter().copied()), 2),
            number(bytes(|m| m.wire), 1),
            number(bytes(|m| m.store), 1),
            number(bytes(|m| m.logs), 1),
            if matches!(subject, 0 | 2) { "yes" } else { "no" }.into(),
            number(median_ratio(&rates[0], &rates[subject]), 2),
            number(median_ratio(&cpu[0], &cpu[subject]), 2),
        ]);
    }
    let targets = vec![
        Target::at_most("whole server, CPU/event by rsyslog's", 1.2, median_ratio(&cpu[0], &cpu[1]), 2, ""),
        Target::at_least("whole server, rate by rsyslog's", 0.75, median_ratio(&rates[0], &rates[1]), 2, ""),
        Target::at_least(
            "whole server, rate by that of rsyslog's synced queue",
            500.0,
            median_ratio(&rates[0], &rates[2]),
            0,
            "",
        ),
    ];
    Findings { tables: vec![table], targets }
}

fn latency(waits: &mut [f64]) -> Table {
    let mut table = Table::new(
        "From an event to its ack, moderate load",
        &format!(
            "{MODERATE_AGENTS} agents, two events a second each, each event a batch of its own; milliseconds from its sending \
             to its ack."
        ),
        &["events", "p50 ms", "p99 ms", "most ms"],
    );
    table.row([
        (waits.len() as u64).into(),
        number(percentile(waits, 0.5), 1),
        number(percentile(waits, 0.99), 1),
        number(percentile(waits, 1.0), 1),
    ]);
    table
}

/// The value that the share `part` of them does not exceed; not a number when there is none.
pub fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    let index = (values.len() as f64 * part).ceil() as usize;
    values.get(index.saturating_sub(1).min(last)).copied().unwrap_or(f64::NAN)
}

/// The server with its agents.
struct Netmon {
    server: Server,
    agents: Vec<Agent>,
    /// For the moderate load: these have other histories.
    room: Vec<Agent>,
    _identities: TempDir,
}

impl Netmon {
    fn start(runtime: &Runtime, directory: &Path, agents: usize) -> Result<Self> {
        let server = Server::start(directory)?;
        let identities = tempfile::Builder::new().prefix("identities-").tempdir_in(directory)?;
        let all = agents + MODERATE_AGENTS;
        let token = server.token(all)?;
        let enrolled = agents::enrol(&token, "pc", 1, all, identities.path());
        let mut room = runtime.block_on(enrolled).context("enrolment")?;
        let agents = room.split_off(MODERATE_AGENTS);
        Ok(Self { server, agents, room, _identities: identities })
    }

    /// All agents connect, and say nothing but that they watch.
    fn idle(&mut self, runtime: &Runtime) -> Result<(Table, Vec<Target>)> {
        self.server.stop()?;
        self.server.start_again()?;
        // The first connections pay for what the process needs once.
        drop(runtime.block_on(agents::call_all(&self.agents[..1]))?);
        let (cpu, memory) = (self.settled()?, self.server.memory()?);
        let sessions = runtime.block_on(agents::call_all(&self.agents))?;
        let count = sessions.len() as f64;
        let handshake = (self.server.cpu()? - cpu).as_secs_f64() * 1e3 / count;
        let memory = (self.server.memory()?.saturating_sub(memory)) as f64 / 1024.0 / count;
        drop(sessions);
        let mut table = Table::new(
            "Idle agents",
            &format!(
                "{count} agents connect and say hello: what each takes of the server, all its work included."
            ),
            &["memory, KiB", "CPU of connecting, ms"],
        );
        table.row([number(memory, 1), number(handshake, 2)]);
        let targets = vec![
            Target::at_most("server's memory for an idle agent", 40.0, memory, 1, " KiB"),
            Target::at_most("server's CPU for an agent that connects", 0.6, handshake, 2, " ms"),
        ];
        Ok((table, targets))
    }

    fn round(&mut self, runtime: &Runtime, events: u64) -> Result<Measured> {
        // One file, and buckets that are full.
        self.server.stop()?;
        let (store, logs) = (self.server.store_bytes(), self.server.log_bytes());
        self.server.start_again()?;
        let sessions = runtime.block_on(agents::call_all(&self.agents))?;
        let first_seq = sessions.first().context("no agents")?.next_seq;
        // Recorded a little ahead, so that no line says that it came late.
        let frames: std::sync::Arc<[Frame]> =
            records::frames(first_seq, events, 500, clock::wall_ns() + 30_000_000_000)?.into();
        let cpu = self.settled()?;
        let began = clock::now();
        let wire = runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for mut session in sessions {
                let frames = frames.clone();
                tasks.spawn(async move {
                    let before = session.wire_bytes();
                    session.deliver(&frames).await?;
                    Ok::<_, anyhow::Error>((session.wire_bytes() - before, session))
                });
            }
            tasks.join_all().await.into_iter().collect::<Result<Vec<_>>>()
        })?;
        let took = began.elapsed();
        // The readable logs are complete a moment after the ack.
        let cpu = self.settled()? - cpu;
        let events = events * wire.len() as u64;
        let wire = wire.iter().map(|(bytes, _)| bytes).sum();
        self.server.stop()?;
        let (store, logs) = (self.server.store_bytes() - store, self.server.log_bytes() - logs);
        self.server.start_again()?;
        Ok(Measured { events, took, cpu, wire: Some(wire), store: Some(store), logs: Some(logs) })
    }

    /// CPU time of the server once it takes no more than the agents' heartbeats.
    fn settled(&self) -> Result<Duration> {
        let hundredths = || self.server.cpu().unwrap_or_default().as_millis() / 10;
        wait::unchanged(QUIET, PATIENCE, "the server to be done", hundredths)?;
        self.server.cpu()
    }

    /// Milliseconds until each ack.
    fn moderate(&mut self, runtime: &Runtime, length: Duration) -> Result<Vec<f64>> {
        let sessions = runtime.block_on(agents::call_all(&self.room))?;
        runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for (number, session) in sessions.into_iter().enumerate() {
                // Spread over the pause.
                let delay = MODERATE_PAUSE * number as u32 / MODERATE_AGENTS as u32;
                tasks.spawn(talk(session, delay, MODERATE_PAUSE, length));
            }
            Ok(tasks.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat())
        })
    }
}

/// One event each `pause` for a while; milliseconds until each ack.
///
/// # Errors
/// The server does not acknowledge one.
pub async fn talk(
    mut session: Session,
    delay: Duration,
    pause: Duration,
    length: Duration,
) -> Result<Vec<f64>> {
    sleep(delay).await;
    let (began, mut waits) = (clock::now(), Vec::new());
    let mut due = Duration::ZERO;
    while due < length {
        if let Ok(ended) = timeout(due.saturating_sub(began.elapsed()), session.stay()).await {
            ended?;
        }
        let frames = records::frames(session.next_seq, 1, 1, clock::wall_ns())?;
        let sent = clock::now();
        session.deliver(&frames).await?;
        waits.push(sent.elapsed().as_secs_f64() * 1e3);
        due += pause;
    }
    Ok(waits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let mut values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|part| percentile(&mut values, part)), [50.0, 99.0, 100.0]);
        assert!(percentile(&mut [], 0.5).is_nan());
    }
}
