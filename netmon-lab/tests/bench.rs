//! The benchmark's parts do what its numbers rest on. Needs root.

use std::time::Duration;

use netmon_agent::kernel::{Mode, Sizes};
use netmon_lab::bench::frames::{Family, Protocol, Shape, Size};
use netmon_lab::bench::fresh::{Outcome, offer};
use netmon_lab::bench::order::Order;
use netmon_lab::bench::pair::{Pair, inside};
use netmon_lab::bench::source::{Source, Until, idle, index_of};
use netmon_lab::bench::subject::{Netmon, Reference, Subject};

#[test]
fn the_source_sends_every_flow_and_netmon_counts_each_with_its_class() {
    const FLOWS: u32 = 20_000;
    let pair = Pair::build().unwrap();
    for family in [Family::V4, Family::V6] {
        for (protocol, size) in [(Protocol::Udp, Size::Small), (Protocol::Tcp, Size::Full)] {
            let shape = Shape { family, protocol, size };
            let (outcome, _) = offer(&pair, shape, FLOWS, Some(50_000)).unwrap();
            let all = u64::from(FLOWS);
            let expected = Outcome {
                offered: all,
                arrived: all,
                seen: all,
                counted: all,
                refused: 0,
                read: all,
                classified: all,
            };
            assert_eq!(outcome, expected, "{shape}");
        }
    }
}

#[test]
fn what_is_sent_arrives_and_runs_through_each_program_once() {
    const FLOWS: u32 = 1_000;
    const FRAMES: u64 = 50_000;
    let pair = Pair::build().unwrap();
    let ifindex = index_of(pair.receiver()).unwrap();
    inside(pair.receiver(), || {
        let _statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
        let mut source = Source::load(&pair)?;
        source.prepare(Shape::SMALL, Order::Random, FLOWS)?;
        for mode in [Mode::Tc, Mode::Xdp] {
            let netmon = Netmon::load("bench-test", mode, Sizes::default(), ifindex)?;
            let mut subjects = vec![
                Subject::Reference(Reference::empty(mode)?),
                Subject::Reference(Reference::hash(FLOWS)?),
                Subject::Netmon(Box::new(netmon)),
            ];
            for subject in &mut subjects {
                subject.attach()?;
                let (before, arrived) = (subject.run_time()?, pair.arrived()?);
                // Slow enough for a busy machine: the cable drops what nobody fetches in time.
                let sent = source.send(Until::Frames(FRAMES), Some(200_000), |wait| subject.tend(wait))?;
                let arrived = pair.arrived()? - arrived;
                let after = subject.run_time()?;
                subject.detach()?;
                assert_eq!((sent.frames, arrived), (FRAMES, FRAMES));
                assert_eq!(after.runs_since(before), FRAMES);
                assert!(after.per_run_since(before) > 0.0);
                if let Subject::Netmon(netmon) = subject {
                    assert_eq!(netmon.kernel.stats().counted, FRAMES);
                    let (memory, maps) = netmon.memory()?;
                    assert!(memory > 1 << 20 && maps.len() >= 8, "{memory} {maps:?}");
                }
            }
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_load_ends_in_time_and_keeps_its_rate() {
    let pair = Pair::build().unwrap();
    let mut source = Source::load(&pair).unwrap();
    source.prepare(Shape::SMALL, Order::Bursty, 100).unwrap();
    let length = Duration::from_millis(500);
    let sent = source.send(Until::Time(length), Some(10_000), idle).unwrap();
    assert!(sent.took >= length && sent.took < length * 4, "{sent:?}");
    // Never more than what is due; a busy machine may leave some out.
    assert!((1_000..=10_000 * sent.took.as_millis() as u64 / 1_000 + 1).contains(&sent.frames), "{sent:?}");
}
