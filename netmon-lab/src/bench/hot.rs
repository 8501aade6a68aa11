//! One hot flow: the least that a packet costs, by `BPF_PROG_TEST_RUN` with repetition.

use anyhow::{Context as _, Result};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp};
use aya_obj::programs::XdpAttachType;
use netmon_agent::kernel::{Mode, Sizes};
use netmon_common::abi;

use super::frames::{Family, Protocol, Shape, Size};
use super::numbers::median;
use super::pair::{Pair, inside};
use super::report::{Findings, Table, Target, number, spread};
use super::source::index_of;
use super::subject::{Netmon, Reference};

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Runs of each program and frame.
    pub rounds: usize,
    /// Packets in a run.
    pub packets: u32,
}

const SHAPES: [Shape; 6] = [
    Shape::SMALL,
    Shape { protocol: Protocol::Tcp, ..Shape::SMALL },
    Shape { family: Family::V6, ..Shape::SMALL },
    Shape { family: Family::V6, protocol: Protocol::Tcp, size: Size::Small },
    Shape { size: Size::Full, ..Shape::SMALL },
    Shape { protocol: Protocol::Tcp, size: Size::Full, ..Shape::SMALL },
];

/// Measures.
///
/// # Errors
/// Something could not be loaded or run.
pub fn run(pair: &Pair, plan: Plan) -> Result<Findings> {
    let ifindex = index_of(pair.receiver())?;
    inside(pair.receiver(), move || measure(ifindex, plan))
}

fn measure(ifindex: u32, plan: Plan) -> Result<Findings> {
    let mut empty = Reference::empty(Mode::Tc)?;
    let mut hash = Reference::hash(65_536)?;
    let mut xdp_empty = Reference::empty(Mode::Xdp)?;
    let mut netmon = Netmon::load("bench-hot", Mode::Tc, Sizes::default(), ifindex)?;
    let pinned = |name| SchedClassifier::from_pin(netmon.pin(name)).context("cannot open netmon's program");
    let (ingress, egress) = (pinned(abi::programs::TC_INGRESS)?, pinned(abi::programs::TC_EGRESS)?);
    let xdp = Xdp::from_pin(netmon.pin(abi::programs::XDP_INGRESS), XdpAttachType::Interface)?;

    let mut table = Table::new(
        "One hot flow (`BPF_PROG_TEST_RUN`)",
        &format!(
            "Nanoseconds per packet, net of the empty program in the same round: median of {} rounds of {} packets, \
             and the least in brackets. `hash` is the reference: a shared hash map with atomic additions and the clock \
             read for every packet.",
            plan.rounds, plan.packets
        ),
        &[
            "packets",
            "empty, gross",
            "netmon ingress",
            "netmon egress",
            "netmon XDP",
            "hash",
            "netmon ingress / hash",
        ],
    );
    let mut worst = f64::NAN;
    let mut ratios = Vec::new();
    for shape in SHAPES {
        let frame = shape.frame(0);
        let mut nets: [Vec<f64>; 4] = Default::default();
        let mut gross = Vec::new();
        for round in 0..=plan.rounds {
            let base = per_packet(empty.tc()?, &frame, plan.packets)?;
            let xdp_base = per_packet(xdp_empty.xdp()?, &frame, plan.packets)?;
            let measured = [
                per_packet(&ingress, &frame, plan.packets)? - base,
                per_packet(&egress, &frame, plan.packets)? - base,
                per_packet(&xdp, &frame, plan.packets)? - xdp_base,
                per_packet(hash.tc()?, &frame, plan.packets)? - base,
            ];
            netmon.readings.drain(&mut netmon.kernel);
            // The first round only opens the flows and warms the caches.
            if round > 0 {
                gross.push(base);
                nets.iter_mut().zip(measured).for_each(|(net, measured)| net.push(measured));
            }
        }
        let [ingress, egress, xdp, hash] = &nets;
        let ratio = median(ingress.iter().copied()) / median(hash.iter().copied());
        for net in [ingress, egress] {
            worst = f64::max(worst, median(net.iter().copied()));
        }
        ratios.push(ratio);
        table.row([
            shape.to_string().into(),
            number(median(gross), 0),
            spread(ingress),
            spread(egress),
            spread(xdp),
            spread(hash),
            number(ratio, 2),
        ]);
    }
    let target =
        Target::at_most("hot flow, net, the worst of all packets and directions", 20.0, worst, 1, " ns");
    Ok(Findings { tables: vec![table], targets: vec![target] })
}

/// The kernel's own clock around all repetitions, divided by their number; whole nanoseconds.
fn per_packet<P>(program: &P, frame: &[u8], packets: u32) -> Result<f64>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let options = TestRunOptions { data_in: Some(frame), repeat: packets, ..TestRunOptions::new() };
    Ok(program.test_run(options).context("cannot run a program on a frame")?.duration.as_nanos() as f64)
}
