//! New flows only: every packet opens one, as a port scan does. None may be lost, each must have its class.

use std::time::Duration;

use anyhow::Result;
use netmon_agent::kernel::{Mode, Sizes};

use super::frames::{self, Family, Shape};
use super::order::Order;
use super::pair::{Pair, inside};
use super::report::{Findings, Table, Target, number};
use super::source::{Source, Until, index_of};
use super::subject::Netmon;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// New flows per second.
    pub rate: u32,
    /// For so long.
    pub length: Duration,
}

/// What became of the flows of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Packets sent, each of a new flow.
    pub offered: u64,
    /// Packets that arrived at the interface.
    pub arrived: u64,
    /// Packets that reached the program.
    pub seen: u64,
    /// Packets that it counted in a flow.
    pub counted: u64,
    /// Packets that it refused, all of them counted, for whatever reason.
    pub refused: u64,
    /// Flows that were read, with exactly one packet of the right length.
    pub read: u64,
    /// Of these, with the right class and label.
    pub classified: u64,
}

/// Measures, IPv4 and IPv6.
///
/// # Errors
/// Something could not be loaded, attached or sent.
pub fn run(pair: &Pair, plan: Plan) -> Result<Findings> {
    let flows = (f64::from(plan.rate) * plan.length.as_secs_f64()) as u32;
    let mut table = Table::new(
        &format!("{} new flows per second", number(f64::from(plan.rate), 0)),
        "Every packet is the first of its flow; default tables, read as the agent reads them. A quarter of the \
         counterparts is private, a quarter muted, the rest on the Internet; `read` are the flows that came out with \
         exactly one packet of the right length, `classified` those of them with the right class and label.",
        &["packets", "offered", "arrived", "seen", "counted", "refused", "read", "classified", "took, s"],
    );
    let mut targets = Vec::new();
    for family in [Family::V4, Family::V6] {
        let shape = Shape { family, ..Shape::SMALL };
        let (outcome, took) = offer(pair, shape, flows, Some(plan.rate.into()))?;
        table.row([
            shape.to_string().into(),
            outcome.offered.into(),
            outcome.arrived.into(),
            outcome.seen.into(),
            outcome.counted.into(),
            outcome.refused.into(),
            outcome.read.into(),
            outcome.classified.into(),
            number(took.as_secs_f64(), 1),
        ]);
        let share = |part: u64| part as f64 / outcome.arrived as f64 * 100.0;
        let what = |what: &str| format!("new flows ({shape}), {what}");
        targets.push(Target::at_least(&what("counted of arrived"), 100.0, share(outcome.counted), 4, " %"));
        let classified = share(outcome.classified);
        targets.push(Target::at_least(&what("found with their class"), 100.0, classified, 4, " %"));
    }
    Ok(Findings { tables: vec![table], targets })
}

/// Sends one packet of each of `flows` flows to netmon's programs and looks what became of them.
///
/// # Errors
/// As [`run`].
pub fn offer(pair: &Pair, shape: Shape, flows: u32, rate: Option<u64>) -> Result<(Outcome, Duration)> {
    let ifindex = index_of(pair.receiver())?;
    inside(pair.receiver(), move || {
        let mut source = Source::load(pair)?;
        source.prepare(shape, Order::Sequential, flows)?;
        let mut netmon = Netmon::load("bench-fresh", Mode::Tc, Sizes::default(), ifindex)?;
        netmon.kernel.attach(ifindex)?;
        let before = pair.arrived()?;
        let sent = source.send(Until::Frames(flows.into()), rate, |wait| netmon.tend(wait))?;
        let arrived = pair.arrived()? - before;
        netmon.readings.sweep_all(&mut netmon.kernel);
        let stats = netmon.kernel.stats();

        let mut outcome = Outcome {
            offered: sent.frames,
            arrived,
            seen: stats.seen,
            counted: stats.counted,
            refused: stats.seen - stats.counted,
            ..Outcome::default()
        };
        for flow in 0..flows {
            let Some(state) = netmon.readings.flows.get(&shape.flow(flow)) else { continue };
            let counts = (state.tx_packets, state.rx_packets, state.rx_bytes);
            if counts == (0, 1, shape.l3_bytes()) {
                outcome.read += 1;
                outcome.classified += u64::from((state.class, state.label) == frames::class(flow));
            }
        }
        Ok((outcome, sent.took))
    })
}
