//! A flood of small packets: how much of the rate is left under each monitor, what it costs, and how much it saw.

use std::time::Duration;

use anyhow::Result;

use super::frames::Shape;
use super::monitor::Monitor;
use super::numbers::{median, median_ratio};
use super::order::Order;
use super::pair::Pair;
use super::report::{Findings, Table, Target, number};
use super::source::{Source, Until, idle};

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds through all monitors.
    pub rounds: usize,
    /// Length of each flood.
    pub length: Duration,
}

/// A room of PCs that all talk at once.
const FLOWS: u32 = 1_000;

/// One flood under one monitor.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Packets that arrived, per second.
    rate: f64,
    /// Packets that arrived, per second of CPU time that sending and receiving took.
    by_cpu: f64,
    /// CPU time of the monitor by the flood's time.
    cpu: f64,
    /// Of what arrived; not a number where nobody counts.
    seen: f64,
}

/// Measures.
///
/// # Errors
/// A monitor cannot be started or stopped, or nothing can be sent.
pub fn run(pair: &Pair, plan: Plan) -> Result<Findings> {
    let mut source = Source::load(pair)?;
    source.prepare(Shape::SMALL, Order::Random, FLOWS)?;
    let mut rounds: Vec<Vec<Round>> = vec![Vec::new(); Monitor::ALL.len()];
    for round in 1..=plan.rounds {
        for (monitor, rounds) in Monitor::ALL.into_iter().zip(&mut rounds) {
            let measured = flood(pair, &mut source, monitor, plan.length)?;
            eprintln!(
                "  round {round}, {}: {} Mpps, CPU {} %, seen {} %",
                monitor.name(),
                number(measured.rate / 1e6, 2),
                number(measured.cpu * 100.0, 1),
                number(measured.seen * 100.0, 2)
            );
            rounds.push(measured);
        }
    }
    let of_all = |what: fn(&Round) -> f64| -> Vec<Vec<f64>> {
        rounds.iter().map(|rounds| rounds.iter().map(what).collect()).collect()
    };
    let (rates, by_cpu) = (of_all(|round| round.rate), of_all(|round| round.by_cpu));
    let mut table = Table::new(
        &format!("Flood of small packets ({}, {FLOWS} flows, random order)", Shape::SMALL),
        &format!(
            "Packets per second that arrive over veth, sent and received on one CPU as fast as it can; median of {} \
             rounds of {} s. The ratios are medians of the rounds' ratios. CPU is that of the monitor's processes \
             during the flood, in percent of one core; what it costs in the kernel shows in the rate. `seen` is what \
             the monitor itself says that it counted, by what arrived. `by CPU time` compares packets per second of CPU \
             time instead of packets per second: the same on a quiet machine, and less disturbed on a busy one.",
            plan.rounds,
            plan.length.as_secs_f64()
        ),
        &["monitor", "Mpps", "/ nothing", "/ empty program", "by CPU time", "CPU %", "seen %"],
    );
    let mut targets = Vec::new();
    for (((monitor, rounds), rate), by_cpu_time) in
        Monitor::ALL.into_iter().zip(&rounds).zip(&rates).zip(&by_cpu)
    {
        let by_empty = median_ratio(rate, &rates[1]);
        let cpu = median(rounds.iter().map(|round| round.cpu)) * 100.0;
        let seen = median(rounds.iter().map(|round| round.seen)) * 100.0;
        table.row([
            monitor.name().into(),
            number(median(rate.iter().copied()) / 1e6, 2),
            number(median_ratio(rate, &rates[0]), 2),
            number(by_empty, 2),
            number(median_ratio(by_cpu_time, &by_cpu[1]), 2),
            number(cpu, 1),
            number(seen, 2),
        ]);
        if monitor == Monitor::Netmon {
            let least = rounds.iter().map(|round| round.seen * 100.0).fold(f64::INFINITY, f64::min);
            targets.push(Target::at_least("flood, rate by the empty program's", 0.9, by_empty, 2, ""));
            targets.push(Target::at_least("flood, seen in every round", 100.0, least, 4, " %"));
            targets.push(Target::at_most("flood, agent's CPU", 2.0, cpu, 2, " % of a core"));
        }
    }
    Ok(Findings { tables: vec![table], targets })
}

fn flood(pair: &Pair, source: &mut Source<'_>, monitor: Monitor, length: Duration) -> Result<Round> {
    let before = pair.arrived()?;
    let running = monitor.start(pair)?;
    let cpu_before = running.cpu()?;
    let sent = source.send(Until::Time(length), None, idle)?;
    let cpu = running.cpu()? - cpu_before;
    let arrived = pair.arrived()? - before;
    let seen = running.stop()?;
    Ok(Round {
        rate: arrived as f64 / sent.took.as_secs_f64(),
        by_cpu: arrived as f64 / sent.cpu.as_secs_f64(),
        cpu: cpu.as_secs_f64() / sent.took.as_secs_f64(),
        seen: seen.map_or(f64::NAN, |seen| seen as f64 / arrived as f64),
    })
}
