//! Random work, faults, kills and power cuts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use netmon_common::model::Coverage;

use super::*;

/// Random work, faults, kills and power cuts: what was synced is read back once and in order, and no number
/// ever stands for two records.
#[test]
fn no_synced_record_is_lost_or_doubled_and_no_number_is_used_twice() {
    let (mut crashes, mut failed_starts) = (0, 0);
    for seed in 1..=150_u64 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut memory = Memory::default();
        let (mut spool, _) = try_open(&memory, SMALL, rng.u64(..)).unwrap();
        // Everything that was ever synced, by its name at the server; what of it is not acked, in order.
        let mut known: BTreeMap<(u64, u64), Event> = BTreeMap::new();
        let mut waiting: Vec<(u64, u64)> = Vec::new();
        let mut n = 0;
        for _ in 0..120 {
            match rng.u8(..20) {
                0..=9 => {
                    n += 1;
                    let _ = append(&mut spool, n);
                }
                10..=13 => {
                    let _ = spool.sync();
                }
                14 => memory.fail_after(Some(rng.u64(..4))),
                15 => {
                    memory.set_space(rng.bool().then(|| rng.usize(..300)));
                }
                16 => {
                    // The server acknowledges some of what it was sent.
                    let count = rng.usize(..=waiting.len());
                    let acked = waiting.drain(..count).next_back();
                    if let Some((epoch, seq)) = acked {
                        for older in known.keys().map(|(epoch, _)| *epoch).filter(|e| *e != epoch) {
                            let waits = waiting.iter().any(|(e, _)| *e == older);
                            if !waits {
                                spool.acked(older, u64::MAX);
                            }
                        }
                        spool.acked(epoch, seq);
                    }
                }
                17 => {
                    memory.fail_after(None);
                    memory.set_space(None);
                }
                18 => {
                    // A ticket that is out while more is recorded.
                    if let Ok(Some(ticket)) = spool.begin_sync() {
                        n += 1;
                        let _ = append(&mut spool, n);
                        let result = ticket.run();
                        let _ = spool.finish_sync(ticket, result);
                    }
                }
                _ => {
                    crashes += 1;
                    let cut = rng.bool();
                    drop(spool);
                    memory.fail_after(None);
                    memory.set_space(None);
                    if cut {
                        memory = memory.power_cut(&mut rng);
                    }
                    // A start that fails half-way is a crash, too.
                    memory.fail_after(rng.bool().then(|| rng.u64(..8)));
                    let opened = try_open(&memory, SMALL, rng.u64(..));
                    memory.fail_after(None);
                    let (opened, recovered) = opened.unwrap();
                    spool = opened;
                    if recovered.is_incomplete {
                        // What could not be repaired is handed out once it could.
                        failed_starts += 1;
                        spool.sync().unwrap();
                    }
                }
            }
            let found = all(&mut spool);
            let keys: Vec<_> = found.iter().map(|(epoch, seq, _)| (*epoch, *seq)).collect();
            for (key, event) in keys.iter().zip(found.iter().map(|(_, _, event)| event)) {
                let first = known.entry(*key).or_insert_with(|| event.clone());
                assert_eq!(first, event, "seed {seed}: {key:?} stands for two records");
            }
            let mut last = keys.iter();
            for key in &waiting {
                assert!(last.any(|found| found == key), "seed {seed}: {key:?} is gone or out of order");
            }
            // What was acked may come back after a crash (the server ignores it), in its old place.
            waiting.retain(|key| keys.contains(key));
            let newest = waiting.last().and_then(|key| keys.iter().position(|found| found == key));
            let fresh = newest.map_or(0, |at| at + 1);
            waiting.extend(keys[fresh..].iter().copied());
            let mut unique = keys.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), keys.len(), "seed {seed}: a record is read twice");
        }
    }
    assert!(crashes > 500 && failed_starts > 50, "{crashes} {failed_starts}");
}

/// One that can be told from all others; three of four are minor.
fn mixed(n: u64) -> Event {
    match n % 4 {
        0 => event(n),
        _ => Event::Coverage(Coverage { seen: n, ..Coverage::default() }),
    }
}

fn number(event: &Event) -> u64 {
    match event {
        Event::Coverage(coverage) => coverage.seen,
        Event::Filter(Filter::Refused { error }) => error.escaped().to_string().parse().unwrap(),
        other => panic!("{other:?} was never recorded"),
    }
}

/// The same with a spool that is too small, records that become too old, files that somebody removes, and servers that
/// know other records: what was synced and not acknowledged is read back or counted.
#[test]
fn what_gives_way_or_is_removed_is_counted_and_no_number_is_used_twice() {
    const HOUR_NS: u64 = 3_600_000_000_000;
    let limits = Limits { bytes: 2500, max_age: Some(Duration::from_secs(20 * 24 * 3600)), ..SMALL };
    let (mut crashes, mut dropped_in_all, mut removed, mut renewed) = (0, 0, 0, 0);
    for seed in 1..=50_u64 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut memory = Memory::default();
        let (mut spool, _) = try_open(&memory, limits, rng.u64(..)).unwrap();
        let mut known: BTreeMap<(u64, u64), Event> = BTreeMap::new();
        let mut waiting: Vec<((u64, u64), u64)> = Vec::new();
        let (mut n, mut hours) = (0, 0);
        for _ in 0..150 {
            let before = spool.stats();
            let (mut is_removed, mut is_renewed, mut is_synced) = (false, false, false);
            match rng.u8(..24) {
                0..=9 => {
                    for _ in 0..rng.u8(1..8) {
                        n += 1;
                        hours += rng.u64(..3);
                        let _ = spool.append(hours * HOUR_NS, (hours * HOUR_NS) as i64, mixed(n));
                    }
                }
                10..=14 => is_synced = spool.sync().is_ok(),
                15 => memory.fail_after(Some(rng.u64(..8))),
                16 => memory.set_space(rng.bool().then(|| rng.usize(..800))),
                17 => {
                    memory.fail_after(None);
                    memory.set_space(None);
                }
                18 => {
                    let EpochRange { epoch, oldest, next } = spool.epochs()[0];
                    let seq = rng.u64(oldest..=next);
                    spool.acked(epoch, seq - 1);
                    waiting.retain(|((e, s), _)| *e != epoch || *s >= seq);
                }
                19 => {
                    hours += rng.u64(..48);
                    while spool.expire(hours * HOUR_NS, (hours * HOUR_NS) as i64) {}
                }
                20 => {
                    is_renewed = true;
                    renewed += u64::from(spool.begin_epoch(spool.stats().epoch).is_ok());
                }
                21 if rng.u8(..4) == 0 => {
                    is_removed = true;
                    removed += 1;
                    match rng.choice(&segments(&memory)) {
                        Some(name) if rng.bool() => drop(memory.remove_file(name)),
                        _ => memory.remove_directory(),
                    }
                    memory.fail_after(None);
                    memory.set_space(None);
                    // So that it notices, and then that it is well again.
                    n += 1;
                    let _ = spool.append(hours * HOUR_NS, (hours * HOUR_NS) as i64, mixed(n));
                    let _ = spool.sync();
                    spool.sync().unwrap();
                }
                22 => {
                    // Tickets that are out while more is recorded and read.
                    if let Some(ticket) = spool.begin_rewrite() {
                        n += 1;
                        let _ = spool.append(hours * HOUR_NS, (hours * HOUR_NS) as i64, mixed(n));
                        let EpochRange { epoch, oldest, .. } = spool.epochs()[0];
                        let reading = spool.begin_read(epoch, oldest, 4, 200);
                        let rewritten = ticket.run();
                        let read = reading.map(|reading| reading.run().unwrap());
                        let _ = spool.finish_rewrite(rewritten);
                        if let Some(read) = read {
                            let _ = spool.finish_read(read);
                        }
                    }
                }
                _ => {
                    crashes += 1;
                    drop(spool);
                    memory.fail_after(None);
                    memory.set_space(None);
                    if rng.bool() {
                        memory = memory.power_cut(&mut rng);
                    }
                    memory.fail_after(rng.bool().then(|| rng.u64(..8)));
                    spool = try_open(&memory, limits, rng.u64(..)).unwrap().0;
                    memory.fail_after(None);
                    spool.sync().unwrap();
                }
            }
            let found = all(&mut spool);
            let after = spool.stats();
            let keys: BTreeSet<_> = found.iter().map(|(epoch, seq, _)| (*epoch, *seq)).collect();
            assert_eq!(keys.len(), found.len(), "seed {seed}: a record is read twice");
            for (epoch, seq, event) in &found {
                let first = known.entry((*epoch, *seq)).or_insert_with(|| event.clone());
                assert_eq!(first, event, "seed {seed}: {epoch} {seq} stands for two records");
            }
            let numbers: BTreeSet<u64> = found.iter().map(|(.., event)| number(event)).collect();
            let is_gone = |(key, n): &&((u64, u64), u64)| {
                if is_renewed { !numbers.contains(n) } else { !keys.contains(key) }
            };
            let gone = waiting.iter().filter(is_gone).count() as u64;
            // A new spool counts from 0 on.
            let dropped = after.dropped - if after.run == before.run { before.dropped } else { 0 };
            dropped_in_all += dropped;
            if is_removed {
                assert!(gone <= dropped || after.damaged_bytes > before.damaged_bytes, "seed {seed}");
            } else {
                assert!(gone <= dropped, "seed {seed}: {gone} are gone, {dropped} are counted");
            }
            if is_synced {
                let files = segments(&memory).len();
                assert!(after.bytes <= limits.bytes || files <= 2, "seed {seed}: {after:?}");
            }
            waiting = found.iter().map(|(epoch, seq, event)| ((*epoch, *seq), number(event))).collect();
        }
    }
    assert!(
        crashes > 200 && dropped_in_all > 2_000 && removed > 30 && renewed > 100,
        "{crashes} {dropped_in_all} {removed} {renewed}"
    );
}
