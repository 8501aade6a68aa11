//! The simulation itself: it replays, it makes every fault, and it finds mistakes that are made on purpose.

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

#[test]
fn every_kind_of_fault_is_made() {
    let mut all = Tally::default();
    for seed in 1..60 {
        let report = world::run(seed, false, None);
        assert_eq!(report.failure, None, "seed {seed}");
        all.add(&report.tally);
    }
    let never: Vec<_> = FAULTS.iter().filter(|fault| !all.faults.contains_key(fault)).collect();
    assert!(never.is_empty(), "{never:?}");
}

#[test]
fn every_mistake_is_found() {
    for mutant in Mutant::value_variants() {
        let found = (1..300).find(|seed| world::run(*seed, false, Some(*mutant)).failure.is_some());
        assert!(found.is_some(), "{mutant:?} is not found");
    }
}
