//! A good agent beside hostile peers: how long it waits for its acks, and how much memory the server takes.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::agents::{self, Agent, PATIENCE};
use super::attack::{Attack, Behaviour};
use super::server::Server;
use super::throughput::{percentile, talk};
use crate::bench::report::{Findings, Table, Target, number};
use crate::{clock, wait};

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds through all situations.
    pub rounds: usize,
    /// How long each situation lasts in a round.
    pub length: Duration,
}

/// Between two events of the good agent.
const PAUSE: Duration = Duration::from_millis(50);

/// What happens beside the good agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Situation {
    /// Nothing.
    Alone,
    /// Enrolled agents do their worst.
    Enrolled,
    /// Peers call that nobody knows.
    Unknown,
    /// All of it.
    Both,
}

impl Situation {
    /// All, in the order of a round.
    pub const ALL: [Self; 4] = [Self::Alone, Self::Enrolled, Self::Unknown, Self::Both];

    fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Enrolled => "hostile enrolled agents",
            Self::Unknown => "unknown peers",
            Self::Both => "both",
        }
    }
}

/// The most memory that the server may take with so many agents connected, in bytes, by the limits in its source: batches
/// that are unpacked (128 of 256 KiB, as one piece and as records, `netmon-server/src/collector.rs`), what waits for its
/// handshake (16 MiB of packets, 1,024 handshakes of at most 64 KiB, `tls.rs`), for each connection the windows of both
/// directions and a frame (512, 512 and 256 KiB), and 32 MiB for the program, its threads and SQLite.
pub const fn memory_bound(connections: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    2 * 128 * MIB / 4 + 16 * MIB + 1_024 * 64 * 1_024 + connections * (512 + 512 + 256) * 1_024 + 32 * MIB
}

/// A server, a good agent and hostile ones.
pub struct Scene {
    /// The server.
    pub server: Server,
    good: Agent,
    hostile: Vec<Agent>,
    runtime: Runtime,
    _identities: TempDir,
}

/// What a situation came to.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Milliseconds until each ack of the good agent's.
    pub waits: Vec<f64>,
    /// What was done to the server, by name.
    pub attacks: BTreeMap<&'static str, u64>,
    /// CPU time that the server took.
    pub cpu: Duration,
    /// How long it lasted.
    pub took: Duration,
}

impl Scene {
    /// Starts a server below `directory` and enrols everybody.
    ///
    /// # Errors
    /// The server does not start, or enrols nobody.
    pub fn start(directory: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let server = Server::start(directory)?;
        let identities = tempfile::Builder::new().prefix("identities-").tempdir_in(directory)?;
        let count = Behaviour::ALL.len();
        let token = server.token(count + 1)?;
        let enrol = async {
            let good = agents::enrol(&token, "good", 1, 1, identities.path()).await?;
            let hostile = agents::enrol(&token, "hostile", 2, count, identities.path()).await?;
            Ok::<_, anyhow::Error>((good, hostile))
        };
        let (good, hostile) = runtime.block_on(enrol).context("enrolment")?;
        let good = good.into_iter().next().context("no good agent")?;
        Ok(Self { server, good, hostile, runtime, _identities: identities })
    }

    /// The good agent delivers an event every [`PAUSE`] for `length`, in this situation.
    ///
    /// # Errors
    /// It is not served.
    pub fn play(&self, situation: Situation, length: Duration) -> Result<Outcome> {
        let attack = Attack::prepare()?;
        if matches!(situation, Situation::Enrolled | Situation::Both) {
            attack.enrolled(&self.hostile);
        }
        if matches!(situation, Situation::Unknown | Situation::Both) {
            attack.unknown(self.server.events(), &self.good)?;
        }
        let began = |attacks: BTreeMap<_, u64>| attacks.values().all(|count| *count > 0);
        if situation != Situation::Alone {
            wait::until(PATIENCE, "all attacks to begin", || began(attack.counts()).then_some(()))?;
        }
        let session = self.runtime.block_on(self.good.call())?;
        let (start, cpu) = (clock::now(), self.server.cpu()?);
        let waits = self.runtime.block_on(talk(session, Duration::ZERO, PAUSE, length))?;
        Ok(Outcome { waits, attacks: attack.counts(), cpu: self.server.cpu()? - cpu, took: start.elapsed() })
    }
}

/// Measures in `directory`.
///
/// # Errors
/// The good agent is not served.
pub fn run(directory: &Path, plan: Plan) -> Result<Findings> {
    let scene = Scene::start(directory)?;
    let mut outcomes: [Outcome; 4] = Default::default();
    for round in 1..=plan.rounds {
        for (situation, all) in Situation::ALL.into_iter().zip(&mut outcomes) {
            let mut outcome = scene.play(situation, plan.length)?;
            eprintln!(
                "  round {round}, {}: p50 {} ms, p99 {} ms",
                situation.name(),
                number(percentile(&mut outcome.waits, 0.5), 1),
                number(percentile(&mut outcome.waits, 0.99), 1)
            );
            all.waits.extend(outcome.waits);
            all.cpu += outcome.cpu;
            all.took += outcome.took;
            outcome
                .attacks
                .into_iter()
                .for_each(|(name, count)| *all.attacks.entry(name).or_default() += count);
        }
    }
    const MIB: f64 = (1 << 20) as f64;
    let bound = memory_bound(1 + Behaviour::ALL.len() as u64);
    let memory = scene.server.most_memory()?;
    let mut table = Table::new(
        "A good agent beside hostile ones",
        &format!(
            "The good agent says an event every {} ms and waits for its ack; {} rounds of {} s each, all situations in turns. \
             Eight enrolled agents misbehave, each in its way; unknown peers send {} Initials a second from 64 ports of 16 \
             addresses, and four of them make handshakes without a certificate. The attackers run on the server's CPUs, at the \
             lowest priority (nice 19). The most memory that the server took is {:.1} MiB; by its limits it may be {:.0} MiB.",
            PAUSE.as_millis(),
            plan.rounds,
            plan.length.as_secs(),
            super::attack::INITIALS,
            memory as f64 / MIB,
            bound as f64 / MIB
        ),
        &[
            "beside it",
            "acks",
            "p50 ms",
            "p99 ms",
            "most ms",
            "p99 / alone",
            "server's CPU, % of a core",
            "done to the server, per second",
        ],
    );
    let mut targets = Vec::new();
    let mut alone = f64::NAN;
    for (situation, outcome) in Situation::ALL.into_iter().zip(&mut outcomes) {
        let p99 = percentile(&mut outcome.waits, 0.99);
        if situation == Situation::Alone {
            alone = p99;
        } else {
            let what = format!("good agent's p99 beside {}, by that alone", situation.name());
            targets.push(Target::at_most(&what, 1.1, p99 / alone, 2, ""));
        }
        let seconds = outcome.took.as_secs_f64();
        let attacks = outcome
            .attacks
            .iter()
            .map(|(name, count)| format!("{} {name}", number(*count as f64 / seconds, 1)));
        table.row([
            situation.name().into(),
            (outcome.waits.len() as u64).into(),
            number(percentile(&mut outcome.waits, 0.5), 1),
            number(p99, 1),
            number(percentile(&mut outcome.waits, 1.0), 1),
            number(p99 / alone, 2),
            number(outcome.cpu.as_secs_f64() / seconds * 100.0, 1),
            attacks.collect::<Vec<_>>().join(", ").into(),
        ]);
    }
    let memory = memory as f64 / MIB;
    targets.push(Target::at_most("server's memory under attack", bound as f64 / MIB, memory, 1, " MiB"));
    Ok(Findings { tables: vec![table], targets })
}
