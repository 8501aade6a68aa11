//! What goes when something has to go, and how it is told.

use std::time::Duration;

use netmon_common::model::{Channel, Counterpart, Coverage, EndReason, Opened, Phase, Traffic, Transfer};

use super::*;

const DAY_NS: u64 = 24 * 3_600_000_000_000;

fn transfer(phase: Phase) -> Event {
    Event::Transfer(Transfer {
        id: 1,
        phase,
        channel: Channel::Lan,
        counterpart: Counterpart::Host([10, 0, 0, 1].into()),
        services: Vec::new(),
        opened: Opened::Here,
        interface: "eth0".into(),
        first_wall_ns: 0,
        last_wall_ns: 0,
        traffic: Traffic::default(),
    })
}

/// A minor one, but for every fifth.
fn mixed(n: u64) -> Event {
    match n % 5 {
        0 => event(n),
        1 => Event::Coverage(Coverage { seen: n, ..Coverage::default() }),
        _ => transfer(Phase::Progress),
    }
}

fn important(left: &[(u64, u64, Event)]) -> Vec<u64> {
    left.iter().filter(|(_, seq, _)| seq % 5 == 0).map(|(_, seq, _)| *seq).collect()
}

/// Items of the only epoch, from its oldest number on.
fn items(spool: &mut Spool<Memory>) -> Vec<Item> {
    let range = spool.epochs()[0];
    let (mut seq, mut items) = (range.oldest, Vec::new());
    while let Some(chunk) = spool.read(range.epoch, seq, 4, 200).unwrap() {
        assert_eq!(chunk.first_seq, seq);
        seq = chunk.next_seq();
        items.extend(chunk.items);
    }
    items
}

#[test]
fn minor_records_give_way_before_any_important_one() {
    let memory = Memory::default();
    let limits = Limits { bytes: 6000, ..SMALL };
    let (mut spool, _) = open(&memory, limits);
    let mut n = 0;
    while spool.stats().dropped == 0 || important(&all(&mut spool)).len() as u64 == n / 5 {
        n += 1;
        spool.append(n, n as i64, mixed(n)).unwrap();
        spool.sync().unwrap();
        let stats = spool.stats();
        assert!(stats.bytes <= 6000, "{stats:?}");
        let left = all(&mut spool);
        // Until the first important one goes, nothing minor is left but in the segment that is being written.
        let first_important = important(&left).first().copied();
        if first_important.is_some_and(|first| first > 5) {
            assert!(left.iter().filter(|(_, seq, _)| seq % 5 != 0).count() < 20, "{left:?}");
        }
        // Every number that is not there any more was counted.
        assert_eq!(left.len() as u64 + stats.dropped, n);
        assert_eq!(stats.backlog, left.len() as u64);
    }
    let stats = spool.stats();
    assert!(n > 100, "{n}");
    let gaps = spool.take_gaps();
    let [Gap { reason: GapReason::SpoolFull, from_wall_ns: 1, count: Some(count), .. }] = gaps[..] else {
        panic!("{gaps:?}")
    };
    assert_eq!(count, stats.dropped);
}

#[test]
fn a_transfers_start_and_end_are_no_minor_records() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    let phases = [Phase::Started, Phase::Progress, Phase::Ended(EndReason::Silence)];
    for phase in phases.into_iter().cycle().take(60) {
        spool.append(0, 0, transfer(phase)).unwrap();
        spool.sync().unwrap();
    }
    let bytes = spool.stats().bytes;
    spool.limits.bytes = bytes - 200;
    spool.sync().unwrap();
    let dropped = spool.stats().dropped;
    assert!((5..20).contains(&dropped), "{dropped}");
    let kept = all(&mut spool)
        .into_iter()
        .filter(|(.., event)| !matches!(event, Event::Transfer(Transfer { phase: Phase::Progress, .. })));
    assert_eq!(kept.count(), 40);
}

#[test]
fn what_gave_way_is_a_hole_also_for_the_next_run() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=60 {
        spool.append(n, n as i64, mixed(n)).unwrap();
        spool.sync().unwrap();
    }
    spool.limits.bytes = spool.stats().bytes / 2;
    spool.sync().unwrap();
    let before = items(&mut spool);
    let holes: u64 = before.iter().filter(|item| matches!(item, Item::Hole(_))).map(Item::span).sum();
    assert_eq!((holes, before.iter().map(Item::span).sum::<u64>()), (spool.stats().dropped, 60));
    assert!(before.len() < 60 && holes > 10, "{holes}");
    drop(spool);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.damaged_bytes, recovered.new_epoch), (0, false));
    assert_eq!(recovered.backlog, 60 - holes);
    assert_eq!(items(&mut spool), before);
    // From within a hole, too: the rest of it.
    let epoch = spool.stats().epoch;
    assert!(matches!(before[0], Item::Hole(4)), "{before:?}");
    let chunk = spool.read(epoch, 3, 1, 100).unwrap().unwrap();
    assert_eq!(chunk, Chunk { first_seq: 3, items: vec![Item::Hole(2)] });
    assert_eq!(spool.record(epoch, 3).unwrap(), None);
    let record = spool.record(epoch, 5).unwrap().unwrap();
    assert_eq!(Record::from_bytes(&record).unwrap().event, event(5));
    assert_eq!(spool.record(epoch, 61).unwrap(), None);
    assert_eq!(spool.record(epoch + 1, 5).unwrap(), None);
}

#[test]
fn a_segment_without_important_records_goes_altogether() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=200 {
        spool.append(n, n as i64, if n > 190 { event(n) } else { mixed(1) }).unwrap();
        spool.sync().unwrap();
    }
    let before = segments(&memory).len();
    spool.limits.bytes = spool.stats().bytes / 2;
    spool.sync().unwrap();
    assert!(segments(&memory).len() < before, "{before}");
    let left = all(&mut spool);
    assert_eq!(left.iter().filter(|(_, seq, _)| *seq > 190).count(), 10);
    assert_eq!(left.len() as u64 + spool.stats().dropped, 200);
}

#[test]
fn recording_goes_on_while_a_segment_is_thinned_and_its_readers_read_on() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=60 {
        spool.append(n, n as i64, mixed(n)).unwrap();
        spool.sync().unwrap();
    }
    let epoch = spool.stats().epoch;
    // One reader has a cursor, one is under way, one begins while the new file is there and nobody knows.
    assert_eq!(spool.read(epoch, 1, 2, 1000).unwrap().unwrap().next_seq(), 3);
    let under_way = spool.begin_read(epoch, 1, 4, 1000).unwrap();
    spool.limits.bytes = spool.stats().bytes - 10;
    let ticket = spool.begin_rewrite().unwrap();
    spool.append(61, 61, event(61)).unwrap();
    let rewritten = ticket.run();
    let result = spool.begin_read(epoch, 3, 4, 1000).unwrap().run().unwrap();
    let chunk = spool.finish_read(result).unwrap();
    assert_eq!((chunk.first_seq, &chunk.items[0]), (3, &spool_item(&mut spool, 3)));
    spool.finish_rewrite(rewritten).unwrap();
    let result = under_way.run().unwrap();
    assert_eq!(spool.finish_read(result).unwrap().first_seq, 1);
    assert_eq!(items(&mut spool).iter().map(Item::span).sum::<u64>(), 60);
    assert_eq!(spool.stats().damaged_bytes, 0);
    spool.sync().unwrap();
    assert_eq!(all(&mut spool).last().unwrap().2, event(61));
}

/// As the file had it before.
fn spool_item(spool: &mut Spool<Memory>, seq: u64) -> Item {
    let epoch = spool.stats().epoch;
    spool.read(epoch, seq, 1, 1000).unwrap().unwrap().items.remove(0)
}

#[test]
fn a_segment_that_was_acknowledged_while_it_was_thinned_does_not_come_back() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=60 {
        spool.append(n, n as i64, mixed(n)).unwrap();
        spool.sync().unwrap();
    }
    spool.limits.bytes = spool.stats().bytes - 10;
    let ticket = spool.begin_rewrite().unwrap();
    spool.acked(spool.stats().epoch, 59);
    let rewritten = ticket.run();
    spool.finish_rewrite(rewritten).unwrap();
    spool.sync().unwrap();
    assert_eq!(segments(&memory).len(), spool.segments.len());
    assert_eq!(spool.stats().dropped, 0);
}

#[test]
fn a_segment_that_cannot_be_written_anew_stays_as_it_is() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    for n in 1..=60 {
        spool.append(n, n as i64, mixed(n)).unwrap();
        spool.sync().unwrap();
    }
    let before = items(&mut spool);
    spool.limits.bytes = spool.stats().bytes - 10;
    for call in 0..5 {
        let ticket = spool.begin_rewrite().unwrap();
        memory.fail_after(Some(call));
        let rewritten = ticket.run();
        memory.fail_after(None);
        assert!(spool.finish_rewrite(rewritten).is_err(), "{call}");
        assert_eq!(items(&mut spool), before);
    }
    spool.sync().unwrap();
    assert_eq!(items(&mut spool).iter().map(Item::span).sum::<u64>(), 60);
    assert!(spool.stats().dropped > 0);
}

#[test]
fn far_over_its_limit_the_spool_does_not_wait_for_the_next_sync() {
    let memory = Memory::default();
    let limits = Limits { bytes: 4000, unsynced_bytes: 1 << 20, ..SMALL };
    let (mut spool, _) = open(&memory, limits);
    for n in 1..=500 {
        append(&mut spool, n).unwrap();
        // Synced, but nothing gives way.
        spool.sync_records().unwrap();
        assert!(spool.stats().bytes <= 4000 + 400 + 100, "{}", spool.stats().bytes);
    }
    assert!(spool.stats().dropped > 0);
}

fn aged(days: u64) -> Limits {
    Limits { max_age: Some(Duration::from_nanos(days * DAY_NS)), ..SMALL }
}

/// Records one event a day, on `days`, by a wall clock that is off by `off_ns`.
fn daily(spool: &mut Spool<Memory>, days: std::ops::Range<u64>, off_ns: i64) {
    for day in days {
        spool.append(day * DAY_NS, (day * DAY_NS) as i64 + off_ns, event(day)).unwrap();
        spool.sync().unwrap();
        while spool.expire(day * DAY_NS, (day * DAY_NS) as i64 + off_ns) {}
    }
}

#[test]
fn records_that_are_too_old_give_way_and_are_counted() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, aged(30));
    daily(&mut spool, 0..30, 0);
    assert_eq!((spool.stats().dropped, all(&mut spool).len()), (0, 30));
    daily(&mut spool, 30..100, 0);
    let left = events(&mut spool);
    assert!((30..=33).contains(&left.len()), "{}", left.len());
    assert_eq!(left.last(), Some(&event(99)));
    assert_eq!(spool.stats().dropped, 100 - left.len() as u64);
    assert!(matches!(
        spool.take_gaps()[..],
        [Gap { reason: GapReason::SpoolFull, from_wall_ns: 0, count: Some(67..=70), .. }]
    ));
}

#[test]
fn a_wall_clock_that_jumps_makes_no_record_old() {
    let years = 12 * 365 * DAY_NS as i64;
    for (before, after) in [(0, years), (years, 0), (-years, 0)] {
        let memory = Memory::default();
        let (mut spool, _) = open(&memory, aged(30));
        daily(&mut spool, 0..10, before);
        // Within a run the wall clock does not count at all.
        daily(&mut spool, 10..20, after);
        assert_eq!(spool.stats().dropped, 0);
        spool.close().unwrap();
        drop(spool);
        // Between two runs it counts no more than three days.
        let (mut spool, _) = open(&memory, aged(30));
        daily(&mut spool, 0..5, before);
        assert_eq!((spool.stats().dropped, all(&mut spool).len()), (0, 25));
        drop(spool);
        let (mut spool, _) = open(&memory, aged(20));
        daily(&mut spool, 0..1, after);
        assert!((1..=10).contains(&spool.stats().dropped), "{}", spool.stats().dropped);
    }
}

#[test]
fn what_waits_longest_is_told_by_its_wall_clock() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    assert_eq!(spool.stats().oldest_wall_ns, None);
    for n in 1..=100 {
        append(&mut spool, n).unwrap();
        assert_eq!(spool.stats().oldest_wall_ns, Some(1));
        if n < 100 {
            spool.sync().unwrap();
        }
    }
    let epoch = spool.stats().epoch;
    for acked in [7, 50, 98] {
        spool.acked(epoch, acked);
        assert_eq!(spool.stats().oldest_wall_ns, Some(acked as i64 + 1));
    }
    spool.acked(epoch, 99);
    assert_eq!(spool.stats().oldest_wall_ns, Some(100), "it waits for its sync");
    spool.sync().unwrap();
    spool.acked(epoch, 100);
    assert_eq!(spool.stats().oldest_wall_ns, None);
    append(&mut spool, 101).unwrap();
    assert_eq!(spool.stats().oldest_wall_ns, Some(101));
}

#[test]
fn far_over_the_limit_without_a_file_nothing_is_there_to_give_way() {
    let memory = Memory::default();
    memory.set_read_only(true);
    let limits = Limits { bytes: 100, segment_bytes: 100, ..SMALL };
    let (mut spool, _) = open(&memory, limits);
    for n in 1..=10 {
        append(&mut spool, n).unwrap();
    }
    memory.set_read_only(false);
    spool.sync().unwrap();
    assert!(events(&mut spool).ends_with(&[event(10)]));
}
