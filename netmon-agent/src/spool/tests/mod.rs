//! The spool against a directory in memory that fails on demand and forgets what was not synced.

use std::path::Path;

use netmon_common::model::{Event, Filter, Gap, GapReason, Record};
use netmon_common::wire::Item;

use super::sim::Memory;
use super::*;

mod giving_way;
mod random;
mod recovery;

const SMALL: Limits = Limits { bytes: 1 << 20, segment_bytes: 400, unsynced_bytes: 4096, max_age: None };

fn try_open(memory: &Memory, limits: Limits, seed: u64) -> Result<(Spool<Memory>, Recovered), OpenError> {
    let mut rng = fastrand::Rng::with_seed(seed);
    Spool::open_in(memory.clone(), Path::new("spool"), limits, move || Ok(rng.u64(..)))
}

fn open(memory: &Memory, limits: Limits) -> (Spool<Memory>, Recovered) {
    try_open(memory, limits, fastrand::u64(..)).unwrap()
}

fn segments(memory: &Memory) -> Vec<String> {
    memory.names().into_iter().filter(|name| name.ends_with(".seg")).collect()
}

/// An event that can be told from all others.
fn event(n: u64) -> Event {
    Event::Filter(Filter::Refused { error: format!("{n}").as_str().into() })
}

fn append(spool: &mut Spool<Memory>, n: u64) -> Result<u64, SpoolError> {
    spool.append(n, n as i64, event(n))
}

/// Everything that waits, in order: (epoch, seq, event); holes are left out.
fn all(spool: &mut Spool<Memory>) -> Vec<(u64, u64, Event)> {
    let mut found = Vec::new();
    let damaged = spool.stats().damaged_bytes;
    for range in spool.epochs() {
        let mut seq = range.oldest;
        while let Some(chunk) = spool.read(range.epoch, seq, 3, 100).unwrap() {
            assert!(chunk.first_seq >= seq);
            seq = chunk.first_seq;
            for item in &chunk.items {
                if let Item::Record(bytes) = item {
                    let record = Record::from_bytes(bytes).unwrap();
                    assert_eq!(record.seq, seq);
                    found.push((range.epoch, record.seq, record.event));
                }
                seq += item.span();
            }
            assert_eq!(seq, chunk.next_seq());
        }
        let is_damaged = spool.stats().damaged_bytes > damaged;
        assert!(seq >= range.next || is_damaged, "{range:?} ended at {seq}");
    }
    found
}

fn events(spool: &mut Spool<Memory>) -> Vec<Event> {
    all(spool).into_iter().map(|(_, _, event)| event).collect()
}

#[test]
fn synced_records_are_read_back_in_order_over_many_segments() {
    let memory = Memory::default();
    let (mut spool, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.run, recovered.previous_run_died, recovered.backlog), (1, false, 0));
    for n in 1..=100 {
        assert_eq!(append(&mut spool, n).unwrap(), n);
        spool.sync().unwrap();
    }
    assert!(segments(&memory).len() > 3);
    assert_eq!(events(&mut spool), (1..=100).map(event).collect::<Vec<_>>());
    assert_eq!(spool.stats().backlog, 100);
}

#[test]
fn records_that_are_not_synced_are_not_handed_out() {
    let (mut spool, _) = open(&Memory::default(), SMALL);
    append(&mut spool, 1).unwrap();
    spool.sync().unwrap();
    append(&mut spool, 2).unwrap();
    assert_eq!(events(&mut spool), [event(1)]);
    assert_eq!((spool.stats().synced_seq, spool.stats().next_seq), (1, 3));
}

#[test]
fn a_clean_stop_goes_on_in_the_same_epoch_also_when_all_was_acked() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=30 {
        append(&mut spool, n).unwrap();
        spool.sync().unwrap();
    }
    let epoch = spool.stats().epoch;
    spool.acked(epoch, 30);
    spool.close().unwrap();
    let (mut spool, recovered) = open(&memory, SMALL);
    assert!(!recovered.previous_run_died && !recovered.new_epoch);
    assert_eq!((recovered.run, recovered.damaged_bytes, recovered.last_wall_ns), (2, 0, Some(30)));
    assert_eq!(append(&mut spool, 31).unwrap(), 31);
    assert_eq!(spool.stats().epoch, epoch);
}

#[test]
fn a_killed_agent_loses_nothing_that_it_appended() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    let epoch = spool.stats().epoch;
    for n in 1..=7 {
        append(&mut spool, n).unwrap();
    }
    drop(spool);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert!(recovered.previous_run_died && !recovered.new_epoch);
    assert_eq!(recovered.backlog, 7);
    assert_eq!(append(&mut spool, 8).unwrap(), 8);
    spool.sync().unwrap();
    assert_eq!(spool.stats().epoch, epoch);
    assert_eq!(events(&mut spool), (1..=8).map(event).collect::<Vec<_>>());
}

#[test]
fn a_torn_end_is_cut_off_counted_once_and_begins_a_new_epoch() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=3 {
        append(&mut spool, n).unwrap();
    }
    spool.sync().unwrap();
    let epoch = spool.stats().epoch;
    drop(spool);
    memory.damage(&segments(&memory)[0], |bytes| bytes.truncate(bytes.len() - 1));
    let (mut spool, recovered) = open(&memory, SMALL);
    assert!(recovered.damaged_bytes > 0 && recovered.new_epoch && recovered.previous_run_died);
    assert_eq!(append(&mut spool, 4).unwrap(), 1);
    spool.sync().unwrap();
    assert_ne!(spool.stats().epoch, epoch);
    assert_eq!(events(&mut spool), [1, 2, 4].map(event));
    spool.close().unwrap();
    let (_, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.damaged_bytes, recovered.new_epoch), (0, false));
}

#[test]
fn damage_in_an_older_segment_costs_only_what_stands_behind_it_there() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=200 {
        append(&mut spool, n).unwrap();
        spool.sync().unwrap();
    }
    spool.close().unwrap();
    let before = events(&mut spool);
    drop(spool);
    memory.damage(&segments(&memory)[1], |bytes| bytes[100] ^= 1);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert!(recovered.damaged_bytes > 0 && recovered.new_epoch);
    let after = all(&mut spool).into_iter().map(|(_, _, event)| event).collect::<Vec<_>>();
    assert!(after.len() < before.len() && after.len() > 170, "{}", after.len());
    assert!(before.ends_with(&after[after.len() - 20..]));
}

#[test]
fn damage_that_happens_while_the_agent_runs_is_cut_out_and_reported() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=200 {
        append(&mut spool, n).unwrap();
        spool.sync().unwrap();
    }
    memory.damage(&segments(&memory)[1], |bytes| bytes[60] ^= 1);
    let found = events(&mut spool);
    assert!(found.len() < 200 && found.len() > 170 && found.ends_with(&[event(200)]));
    let gaps = spool.take_gaps();
    assert!(matches!(gaps[..], [Gap { reason: GapReason::SpoolDamaged, count: Some(1..), .. }]), "{gaps:?}");
    assert_eq!(spool.take_gaps(), []);
}

#[test]
fn a_full_disk_is_waited_out_in_memory_then_counted_then_reported() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    append(&mut spool, 1).unwrap();
    spool.sync().unwrap();
    memory.set_space(Some(5));
    let mut n = 2;
    while append(&mut spool, n).is_ok() {
        n += 1;
    }
    assert!(n > 20, "memory took {n}");
    assert!(append(&mut spool, n + 1).is_err());
    assert!(matches!(spool.sync(), Err(SpoolError::Write { .. })));
    assert_eq!(spool.stats().lost, 2);
    assert_eq!(spool.take_gaps(), [], "nothing could take them");

    memory.set_space(None);
    spool.sync().unwrap();
    let gaps = spool.take_gaps();
    let gap = Gap {
        reason: GapReason::SpoolUnwritable,
        from_wall_ns: n as i64,
        to_wall_ns: n as i64 + 1,
        count: Some(2),
    };
    assert_eq!(gaps, std::slice::from_ref(&gap));
    assert_eq!(spool.append(0, 0, Event::Gap(gap.clone())).unwrap(), n);
    spool.sync().unwrap();
    let mut expected: Vec<_> = (1..n).map(event).collect();
    expected.push(Event::Gap(gap));
    assert_eq!(events(&mut spool), expected);
}

#[test]
fn a_gap_that_cannot_be_recorded_is_handed_out_again() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    memory.set_read_only(true);
    let mut n = 1;
    while append(&mut spool, n).is_ok() {
        n += 1;
    }
    let gap = Gap { reason: GapReason::SpoolFull, from_wall_ns: 1, to_wall_ns: 2, count: Some(7) };
    assert!(spool.append(0, 0, Event::Gap(gap.clone())).is_err());
    memory.set_read_only(false);
    spool.sync().unwrap();
    assert!(spool.take_gaps().contains(&gap));
}

#[test]
fn a_failed_fsync_is_not_repeated_on_the_same_file() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    append(&mut spool, 1).unwrap();
    spool.sync().unwrap();
    append(&mut spool, 2).unwrap();
    memory.fail_after(Some(0));
    assert!(matches!(spool.sync(), Err(SpoolError::Sync { .. })));
    assert_eq!(events(&mut spool), [event(1)]);
    append(&mut spool, 3).unwrap();
    spool.sync().unwrap();
    assert_eq!(segments(&memory).len(), 2);
    assert_eq!(events(&mut spool), [1, 2, 3].map(event));
    assert_eq!(spool.stats().backlog, 3);
    drop(spool);
    // The old segment's unsynced end is torn: no damage, its records are in the new one.
    memory.damage(&segments(&memory)[0], |bytes| bytes.truncate(bytes.len() - 1));
    let (mut spool, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.damaged_bytes, recovered.backlog), (0, 3));
    assert_eq!(events(&mut spool), [1, 2, 3].map(event));
}

#[test]
fn the_oldest_segment_gives_way_and_its_records_are_counted() {
    let memory = Memory::default();
    let limits = Limits { bytes: 2000, ..SMALL };
    let (mut spool, _) = open(&memory, limits);
    for n in 1..=500 {
        append(&mut spool, n).unwrap();
        spool.sync().unwrap();
        assert!(spool.stats().bytes <= 2000);
    }
    let left = events(&mut spool);
    let dropped = spool.stats().dropped;
    assert_eq!(left, (dropped + 1..=500).map(event).collect::<Vec<_>>());
    let expected = Gap {
        reason: GapReason::SpoolFull,
        from_wall_ns: 1,
        to_wall_ns: dropped as i64,
        count: Some(dropped),
    };
    assert_eq!(spool.take_gaps(), [expected]);
}

#[test]
fn acks_free_segments_but_never_the_last() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=100 {
        append(&mut spool, n).unwrap();
        spool.sync().unwrap();
    }
    let epoch = spool.stats().epoch;
    let many = segments(&memory).len();
    spool.acked(epoch, 50);
    assert!(segments(&memory).len() < many);
    assert_eq!(events(&mut spool), (51..=100).map(event).collect::<Vec<_>>());
    spool.acked(epoch, 100);
    assert_eq!(segments(&memory).len(), 1);
    assert_eq!(spool.stats().backlog, 0);
    assert_eq!(spool.epochs(), [EpochRange { epoch, oldest: 101, next: 101 }]);
}

#[test]
fn a_server_that_knows_more_makes_the_spool_record_again_under_new_numbers() {
    let (mut spool, _) = open(&Memory::default(), SMALL);
    for n in 1..=30 {
        append(&mut spool, n).unwrap();
        spool.sync().unwrap();
    }
    let old = spool.stats().epoch;
    spool.acked(old, 10);
    let old = spool.stats().epoch;
    spool.begin_epoch(old).unwrap();
    let found = all(&mut spool);
    assert!(found.iter().all(|(epoch, ..)| *epoch != old));
    assert_eq!(found.iter().map(|(_, seq, _)| *seq).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
    assert_eq!(events(&mut spool), (11..=30).map(event).collect::<Vec<_>>());
    assert_eq!(append(&mut spool, 31).unwrap(), 21);
}

#[test]
fn a_segment_of_a_newer_agent_is_left_alone() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    append(&mut spool, 1).unwrap();
    spool.close().unwrap();
    drop(spool);
    memory.damage(&segments(&memory)[0], |bytes| {
        bytes[8] = 9;
        let crc = crc32c::crc32c(&bytes[..40]);
        bytes[40..44].copy_from_slice(&crc.to_le_bytes());
    });
    let (mut spool, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.newer_segments, recovered.damaged_bytes, recovered.new_epoch), (1, 0, true));
    append(&mut spool, 2).unwrap();
    spool.sync().unwrap();
    assert_eq!(segments(&memory).len(), 2);
}

#[test]
fn a_directory_on_disk_is_private_and_held_by_one_spool() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/spool");
    let (mut spool, _) = Spool::open(&path, Limits::default()).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    assert!(matches!(Spool::open(&path, Limits::default()), Err(OpenError::InUse(_))));
    spool.append(1, 1, event(1)).unwrap();
    spool.close().unwrap();
    let epoch = spool.stats().epoch;
    drop(spool);
    let (mut spool, recovered) = Spool::open(&path, Limits::default()).unwrap();
    assert_eq!((recovered.run, recovered.previous_run_died, recovered.backlog), (2, false, 1));
    assert_eq!(spool.read(epoch, 1, 10, 1000).unwrap().unwrap().items.len(), 1);
}

#[test]
fn a_segment_that_gives_way_while_it_is_read_is_no_damage() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=100 {
        append(&mut spool, n).unwrap();
        spool.sync().unwrap();
    }
    let epoch = spool.stats().epoch;
    let ticket = spool.begin_read(epoch, 1, 10, 1000).unwrap();
    spool.acked(epoch, 60);
    let result = ticket.run().unwrap();
    assert!(spool.finish_read(result).is_none());
    assert_eq!(spool.stats().damaged_bytes, 0);
    assert!(spool.read(epoch, 61, 10, 1000).unwrap().unwrap().first_seq <= 61);
}

#[test]
fn damage_in_a_segment_that_grows_while_it_is_read_is_cut_with_what_came_behind() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, Limits::default());
    append(&mut spool, 1).unwrap();
    spool.sync().unwrap();
    memory.damage(&segments(&memory)[0], |bytes| *bytes.last_mut().unwrap() ^= 1);
    let epoch = spool.stats().epoch;
    let result = spool.begin_read(epoch, 1, 10, 1000).unwrap().run().unwrap();
    append(&mut spool, 2).unwrap();
    spool.sync().unwrap();
    let bytes = spool.stats().bytes;
    assert!(spool.finish_read(result).is_none());
    assert_eq!(spool.stats().damaged_bytes, bytes - format::HEADER as u64);
    append(&mut spool, 3).unwrap();
    spool.sync().unwrap();
    assert_eq!(events(&mut spool), [event(3)]);
}
