//! TCP throughput: what is left of it while somebody watches.

use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};
use netmon_agent::kernel::{Mode, Sizes};

use super::monitor::Monitor;
use super::numbers::{median, median_ratio};
use super::pair::{Pair, RECEIVER, inside};
use super::report::{Findings, Table, Target, number, spread};
use super::source::index_of;
use super::subject::{Netmon, Reference, Subject};
use crate::netmon::Daemon;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds through all monitors.
    pub rounds: usize,
    /// Length of each transfer.
    pub length: Duration,
}

const MONITORS: [Monitor; 3] = [Monitor::Nothing, Monitor::Empty, Monitor::Netmon];

/// Measures.
///
/// # Errors
/// iperf3 or the agent cannot be started, or iperf3 says something else than it should.
pub fn run(pair: &Pair, plan: Plan) -> Result<Findings> {
    let output = pair.directory().join("iperf3.txt");
    let mut command = pair.receiver().command("iperf3");
    command.args(["--server", "--bind", RECEIVER]);
    let mut server = Daemon::start("iperf3 --server".to_owned(), command, &output)?;
    server.wait_until("it to listen", || listens(pair))?;

    let mut rates: [Vec<f64>; 3] = Default::default();
    for round in 1..=plan.rounds {
        for (monitor, rates) in MONITORS.into_iter().zip(&mut rates) {
            let running = monitor.start(pair)?;
            let rate = transfer(pair, plan.length)?;
            eprintln!("  round {round}, {}: {:.2} Gbit/s", monitor.name(), rate / 1e9);
            rates.push(rate);
            running.stop()?;
        }
    }
    let mut table = Table::new(
        "TCP throughput over veth (iperf3, one connection)",
        &format!(
            "Median of {} rounds of {} s; ratios are medians of the rounds' ratios.",
            plan.rounds,
            plan.length.as_secs()
        ),
        &["monitor", "Gbit/s", "/ nothing", "/ empty program"],
    );
    for (monitor, rate) in MONITORS.into_iter().zip(&rates) {
        table.row([
            monitor.name().into(),
            number(median(rate.iter().copied()) / 1e9, 2),
            number(median_ratio(rate, &rates[0]), 3),
            number(median_ratio(rate, &rates[1]), 3),
        ]);
    }
    let kept = median_ratio(&rates[2], &rates[0]);
    let target = Target::at_least("TCP over veth, throughput by the unmonitored one's", 0.99, kept, 3, "");
    Ok(Findings { tables: vec![table, run_times(pair, plan)?], targets: vec![target] })
}

/// What a super-packet costs: the same transfer once more, with the kernel's run-time statistics, which cost
/// throughput themselves.
fn run_times(pair: &Pair, plan: Plan) -> Result<Table> {
    let ifindex = index_of(pair.receiver())?;
    let mut times: [Vec<f64>; 3] = Default::default();
    inside(pair.receiver(), || {
        let _statistics = enable_stats(Stats::RunTime).context("cannot enable run-time statistics")?;
        let mut subjects = [
            Subject::Reference(Reference::empty(Mode::Tc)?),
            Subject::Reference(Reference::hash(65_536)?),
            Subject::Netmon(Box::new(Netmon::load("bench-tcp", Mode::Tc, Sizes::default(), ifindex)?)),
        ];
        for _ in 0..plan.rounds {
            for (subject, times) in subjects.iter_mut().zip(&mut times) {
                subject.attach()?;
                let before = subject.run_time()?;
                transfer(pair, plan.length)?;
                times.push(subject.run_time()?.per_run_since(before));
                subject.detach()?;
            }
        }
        Ok(())
    })?;
    let [empty, hash, netmon] = &times;
    let net =
        |times: &[f64]| -> Vec<f64> { times.iter().zip(empty).map(|(time, empty)| time - empty).collect() };
    let (hash, netmon) = (net(hash), net(netmon));
    let mut table = Table::new(
        "Cost of a TCP super-packet (run time during iperf3)",
        "Nanoseconds per run of the ingress program, net of the empty program of the same round: median, and the least \
         in brackets. A run is a super-packet of up to 64 KiB, whose segments netmon counts.",
        &["empty, gross", "netmon", "hash", "netmon / hash"],
    );
    table.row([
        number(median(empty.iter().copied()), 0),
        spread(&netmon),
        spread(&hash),
        number(median_ratio(&netmon, &hash), 2),
    ]);
    Ok(table)
}

/// Local address 0A63:0002, port 5201, state LISTEN, as `/proc/net/tcp` writes it.
fn listens(pair: &Pair) -> bool {
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/tcp", pair.receiver().holder_pid()));
    sockets.is_ok_and(|sockets| sockets.lines().any(|line| line.contains(":1451 ") && line.contains(" 0A ")))
}

/// Bits per second that the receiver got.
fn transfer(pair: &Pair, length: Duration) -> Result<f64> {
    let seconds = length.as_secs().max(1).to_string();
    let text = pair.sender().run(&["iperf3", "--client", RECEIVER, "--time", &seconds, "--json"])?;
    let report: serde_json::Value = serde_json::from_str(&text).context("iperf3 does not speak JSON")?;
    report["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .with_context(|| format!("iperf3 does not tell its rate: {}", report["error"]))
}
