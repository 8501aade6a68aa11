//! The simulation itself: it replays, it makes every fault, and it finds mistakes that are made on purpose.

use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use netmon_sim::mutants::Mutant;
use netmon_sim::tally::{FAULTS, Tally};
use netmon_sim::world;

use clap::ValueEnum as _;

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 1..20 {
        let [one, two] = [1, 2].map(|_| world::run(seed, true, None));
        assert_eq!(one.trace, two.trace);
        assert_eq!((one.tally, one.failure), (two.tally, two.failure));
    }
}

/// More than these: `cargo xtask simulate`.
const SEEDS: u64 = 1000;

#[test]
fn every_promise_is_kept_whatever_goes_wrong() {
    let next = AtomicU64::new(1);
    let all = Mutex::new(Tally::default());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > SEEDS {
                        break;
                    }
                    let report = world::run(seed, false, None);
                    assert_eq!(report.failure, None, "seed {seed}");
                    all.lock().unwrap().add(&report.tally);
                }
            });
        }
    });
    let all = all.into_inner().unwrap();
    let never: Vec<_> = FAULTS.iter().filter(|fault| !all.faults.contains_key(fault)).collect();
    assert!(never.is_empty(), "{never:?}");
}

/// Each found a fault once. What a seed brings about changes with the simulation, so they may be rooms like any other now.
#[test]
fn seeds_that_found_a_fault_find_none_any_more() {
    for seed in [2_003_281, 3_007_741, 5_054_308, 5_060_423, 6_080_465, 7_068_573, 7_113_284] {
        assert_eq!(world::run(seed, false, None).failure, None, "seed {seed}");
    }
}

#[test]
fn every_mistake_is_found() {
    for mutant in Mutant::value_variants() {
        let found = (1..300).find(|seed| world::run(*seed, false, Some(*mutant)).failure.is_some());
        assert!(found.is_some(), "{mutant:?} is not found");
    }
}
