//! Directories that are missing, full, or cannot be written for a while; and new epochs.

use super::*;
use crate::spool::files::Files;
use crate::spool::format::{HEADER, Header};
use crate::spool::recover::{RUN_FILE, segment_name};

fn filled(memory: &Memory, records: u64) -> Spool<Memory> {
    let (mut spool, _) = open(memory, SMALL);
    for n in 1..=records {
        append(&mut spool, n).unwrap();
        spool.sync().unwrap();
    }
    spool
}

/// Segments of two epochs, some of them with numbers that nobody counts to.
fn with_high_numbers(numbers: &[u64]) -> (Memory, Vec<(u64, u64, Event)>) {
    let memory = Memory::default();
    let mut expected = Vec::new();
    for part in 0..2 {
        let (mut spool, _) = open(&memory, SMALL);
        for n in 0..60 {
            append(&mut spool, part * 60 + n).unwrap();
            spool.sync().unwrap();
        }
        expected = all(&mut spool);
        drop(spool);
        memory.remove(RUN_FILE).unwrap();
    }
    let names = segments(&memory);
    assert!(names.len() >= numbers.len());
    for (name, number) in names.iter().rev().zip(numbers.iter().rev()) {
        memory.damage(name, |bytes| {
            let header = Header { number: *number, ..Header::decode(bytes).unwrap() };
            bytes[..HEADER].copy_from_slice(&header.encode());
        });
        memory.rename(name, &segment_name(*number)).unwrap();
    }
    (memory.image(), expected)
}

#[test]
fn a_file_with_the_highest_number_of_all_is_not_the_end() {
    const LAST: u64 = u64::MAX;
    const TEN_DIGITS: u64 = 9_999_999_999;
    for numbers in [
        &[LAST][..],
        &[LAST - 2, LAST - 1, LAST],
        &[LAST / 2, LAST / 2 + 1],
        &[TEN_DIGITS, TEN_DIGITS + 1, TEN_DIGITS + 2, TEN_DIGITS + 4, LAST],
    ] {
        let (image, expected) = with_high_numbers(numbers);
        // Crashes at every call.
        let mut calls = 0;
        loop {
            let memory = image.image();
            memory.fail_after(Some(calls));
            let (spool, recovered) = open(&memory, SMALL);
            drop(spool);
            let memory = memory.power_cut(&mut fastrand::Rng::with_seed(calls));
            let (mut spool, again) = open(&memory, SMALL);
            assert_eq!((again.damaged_bytes, again.is_incomplete), (0, false), "{numbers:?}, call {calls}");
            assert_eq!(all(&mut spool), expected, "{numbers:?}, call {calls}");
            append(&mut spool, 1_000).unwrap();
            spool.sync().unwrap();
            drop(spool);
            let (mut spool, last) = open(&memory, SMALL);
            assert_eq!((last.damaged_bytes, last.new_epoch), (0, false), "{numbers:?}, call {calls}");
            assert_eq!(events(&mut spool).last(), Some(&event(1_000)), "{numbers:?}, call {calls}");
            assert_eq!(all(&mut spool).len(), expected.len() + 1);
            if !recovered.is_incomplete {
                break;
            }
            calls += 1;
        }
        assert!(calls > 10, "{calls} calls");
    }
}

#[test]
fn a_directory_that_is_removed_is_made_again_and_what_it_held_is_counted() {
    let memory = Memory::default();
    let mut spool = filled(&memory, 50);
    let (epoch, bytes) = (spool.stats().epoch, spool.stats().bytes);
    spool.acked(epoch, 50);
    append(&mut spool, 51).unwrap();
    spool.sync().unwrap();
    let acked_bytes = bytes - memory.names().len() as u64;
    memory.remove_directory();
    append(&mut spool, 52).unwrap();
    // The first one notices.
    assert!(matches!(spool.sync(), Err(SpoolError::Sync { .. })));
    append(&mut spool, 53).unwrap();
    spool.sync().unwrap();
    assert_eq!(events(&mut spool), [52, 53].map(event));
    assert_eq!(spool.stats().epoch, epoch);
    let damaged = spool.stats().damaged_bytes;
    assert!((1..acked_bytes).contains(&damaged), "{damaged}");
    let gaps = spool.take_gaps();
    assert!(
        matches!(gaps[..], [Gap { reason: GapReason::SpoolDamaged, count: Some(count), .. }] if count == damaged),
        "{gaps:?}"
    );
    drop(spool);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.run, recovered.damaged_bytes, recovered.new_epoch), (2, 0, false));
    assert_eq!(events(&mut spool), [52, 53].map(event));
}

#[test]
fn a_directory_that_is_removed_before_the_first_record_is_made_again() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    memory.remove_directory();
    append(&mut spool, 1).unwrap();
    spool.sync().unwrap();
    drop(spool);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.run, recovered.new_epoch), (2, false));
    assert_eq!(events(&mut spool), [event(1)]);
}

#[test]
fn files_that_are_removed_cost_what_they_held_and_no_more() {
    for victim in 0..5 {
        let memory = Memory::default();
        let mut spool = filled(&memory, 160);
        let names = segments(&memory);
        assert!(names.len() > 5);
        // The newest one is being written.
        memory.remove_file(&names[names.len() - 1 - victim]);
        let mut n = 160;
        for _ in 0..5 {
            n += 1;
            append(&mut spool, n).unwrap();
            let _ = spool.sync();
        }
        let found = events(&mut spool);
        assert!(found.len() < 165 && found.len() >= 165 - 30, "{}", found.len());
        assert!(found.ends_with(&[161, 162, 163, 164, 165].map(event)), "{victim}");
        assert!(spool.stats().damaged_bytes > 0);
    }
}

#[test]
fn a_read_only_disk_is_waited_out() {
    let memory = Memory::default();
    let mut spool = filled(&memory, 130);
    let epoch = spool.stats().epoch;
    memory.set_read_only(true);
    append(&mut spool, 131).unwrap();
    assert!(spool.sync().is_err());
    spool.acked(epoch, 130);
    let files = segments(&memory).len();
    memory.set_read_only(false);
    append(&mut spool, 132).unwrap();
    spool.sync().unwrap();
    assert_eq!(events(&mut spool), [131, 132].map(event));
    // What could not be removed is removed now.
    assert!(files > 3 && segments(&memory).len() == spool.segments.len(), "{files}");
    assert_eq!((spool.stats().lost, spool.stats().damaged_bytes), (0, 0));
}

#[test]
fn a_start_on_a_full_disk_records_in_memory_and_recovers_by_itself() {
    for cut in [false, true] {
        let memory = Memory::default();
        let mut spool = filled(&memory, 50);
        let old = spool.stats().epoch;
        append(&mut spool, 51).unwrap();
        drop(spool);
        let memory = if cut { memory.power_cut(&mut fastrand::Rng::with_seed(3)) } else { memory };
        memory.set_space(Some(0));
        let (mut spool, recovered) = open(&memory, SMALL);
        assert!(recovered.is_incomplete && recovered.new_epoch && recovered.previous_run_died);
        assert_eq!(recovered.run, 2);
        append(&mut spool, 100).unwrap();
        assert!(spool.sync().is_err());
        // The newest segment may have an end that is not on the disk: not before it is.
        let range = spool.epochs()[0];
        assert_eq!(range.epoch, old);
        let before = events(&mut spool);
        assert!(before.len() > 20 && before.len() < 50, "{}", before.len());
        // What is delivered makes room, and that is enough.
        spool.acked(range.epoch, range.next - 1);
        let _ = spool.sync();
        spool.sync().unwrap();
        let found = events(&mut spool);
        assert_eq!(found[0], event(before.len() as u64 + 1));
        assert!(found.ends_with(&[event(100)]) && found.contains(&event(50)), "{found:?}");
        assert_eq!(spool.stats().lost, 0);
        spool.close().unwrap();
        drop(spool);
        let (_, recovered) = open(&memory, SMALL);
        assert!(!recovered.is_incomplete && !recovered.previous_run_died && !recovered.new_epoch);
        assert_eq!(recovered.run, 3);
    }
}

#[test]
fn a_start_without_a_directory_that_can_be_made_recovers_by_itself() {
    let memory = Memory::default();
    memory.remove_directory();
    memory.set_read_only(true);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.run, recovered.is_incomplete, recovered.new_epoch), (0, true, true));
    append(&mut spool, 1).unwrap();
    assert!(matches!(spool.sync(), Err(SpoolError::Recover { .. })));
    assert!(spool.close().is_err());
    memory.set_read_only(false);
    append(&mut spool, 2).unwrap();
    spool.sync().unwrap();
    assert_eq!(events(&mut spool), [1, 2].map(event));
    spool.close().unwrap();
    drop(spool);
    let (_, recovered) = open(&memory, SMALL);
    assert_eq!((recovered.run, recovered.new_epoch, recovered.backlog), (2, false, 2));
}

#[test]
fn what_was_there_before_an_unreadable_start_is_delivered_first() {
    let memory = Memory::default();
    let mut old = filled(&memory, 20);
    old.close().unwrap();
    drop(old);
    // Somebody moves the directory away and back.
    let image = memory.image();
    image.set_missing(true);
    image.set_read_only(true);
    let (mut spool, _) = open(&image, SMALL);
    append(&mut spool, 21).unwrap();
    assert!(spool.sync().is_err());
    image.set_missing(false);
    image.set_read_only(false);
    spool.sync().unwrap();
    assert_eq!(events(&mut spool), (1..=21).map(event).collect::<Vec<_>>());
    assert_eq!(spool.epochs().len(), 2);
    drop(spool);
    let (mut spool, recovered) = open(&image, SMALL);
    assert_eq!((recovered.run, recovered.damaged_bytes), (3, 0));
    assert_eq!(events(&mut spool), (1..=21).map(event).collect::<Vec<_>>());
}

#[test]
fn a_bad_block_costs_what_stands_on_it_and_not_the_spool() {
    for (from, victim) in [(0, 1), (HEADER + 1, 1), (200, 2), (0, 0), (200, 0)] {
        let memory = Memory::default();
        drop(filled(&memory, 60));
        let names = segments(&memory);
        assert!(memory.fail_reads(&names[names.len() - 1 - victim], from));
        let (mut spool, recovered) = open(&memory, SMALL);
        assert!(!recovered.is_incomplete && recovered.new_epoch && recovered.damaged_bytes > 0);
        append(&mut spool, 61).unwrap();
        spool.sync().unwrap();
        let found = events(&mut spool);
        assert!((40..61).contains(&found.len()) && found.ends_with(&[event(61)]), "{from}: {found:?}");
        drop(spool);
        let (mut spool, recovered) = open(&memory, SMALL);
        assert_eq!(
            (recovered.damaged_bytes, recovered.new_epoch, recovered.is_incomplete),
            (0, false, false)
        );
        assert_eq!(events(&mut spool), found);
    }
    let memory = Memory::default();
    drop(filled(&memory, 10));
    assert!(memory.fail_reads(RUN_FILE, 0));
    let (mut spool, recovered) = open(&memory, SMALL);
    assert!(!recovered.is_incomplete && recovered.new_epoch);
    assert_eq!(events(&mut spool), (1..=10).map(event).collect::<Vec<_>>());
}

#[test]
fn nothing_is_given_up_while_the_whole_disk_can_neither_be_read_nor_written() {
    let memory = Memory::default();
    drop(filled(&memory, 60));
    let good = memory.image();
    let names = segments(&memory);
    assert!(names.iter().all(|name| memory.fail_reads(name, 0)));
    memory.set_read_only(true);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert!(recovered.is_incomplete);
    append(&mut spool, 61).unwrap();
    assert!(matches!(spool.sync(), Err(SpoolError::Recover { .. })));
    // It works again.
    memory.set_read_only(false);
    assert!(names.iter().all(|name| memory.fail_reads(name, usize::MAX)));
    spool.sync().unwrap();
    assert_eq!(events(&mut spool), (1..=61).map(event).collect::<Vec<_>>());
    assert!(names.iter().all(|name| good.names().contains(name)));
    assert!(spool.take_gaps().is_empty());
}

#[test]
fn a_new_epoch_begins_while_recording_goes_on() {
    let memory = Memory::default();
    let mut spool = filled(&memory, 60);
    let old = spool.stats().epoch;
    spool.acked(old, 10);
    spool.begin_renewal(old).unwrap();
    let mut n = 60;
    loop {
        spool.sync_records().unwrap();
        let Some(ticket) = spool.begin_renumbering() else {
            if !spool.is_renewing() {
                break;
            }
            continue;
        };
        // So little comes meanwhile that it ends.
        if n < 75 {
            n += 1;
            append(&mut spool, n).unwrap();
        }
        let result = ticket.run();
        spool.finish_rewrite(result).unwrap();
    }
    let found = all(&mut spool);
    assert!(found.iter().all(|(epoch, ..)| *epoch == spool.stats().epoch && *epoch != old));
    assert_eq!(found.iter().map(|(_, seq, _)| *seq).collect::<Vec<_>>(), (1..=n - 10).collect::<Vec<_>>());
    assert_eq!(events(&mut spool), (11..=n).map(event).collect::<Vec<_>>());
    assert_eq!(append(&mut spool, n + 1).unwrap(), n - 9);
    spool.close().unwrap();
    drop(spool);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert!(!recovered.new_epoch);
    assert_eq!(events(&mut spool), (11..=n + 1).map(event).collect::<Vec<_>>());
}

#[test]
fn a_new_epoch_that_is_cut_short_at_any_moment_loses_nothing_and_leaves_the_old_one_the_newest() {
    let mut unfinished = 0;
    for calls in 0..60 {
        let memory = Memory::default();
        let mut spool = filled(&memory, 90);
        let old = spool.stats().epoch;
        memory.fail_after(Some(calls));
        let result = spool.begin_epoch(old);
        memory.fail_after(None);
        drop(spool);
        let left = memory.power_cut(&mut fastrand::Rng::with_seed(calls));
        let (mut spool, recovered) = open(&left, SMALL);
        assert_eq!(recovered.damaged_bytes, 0, "{calls}");
        assert_eq!(events(&mut spool), (1..=90).map(event).collect::<Vec<_>>(), "{calls}");
        if result.is_err() {
            unfinished += 1;
            assert_eq!(spool.stats().epoch, old, "{calls}");
        }
        // Once more, and it is done.
        let newest = spool.stats().epoch;
        spool.begin_epoch(newest).unwrap();
        assert_eq!(events(&mut spool), (1..=90).map(event).collect::<Vec<_>>(), "{calls}");
        assert!(spool.epochs().iter().all(|range| range.epoch != old));
    }
    assert!(unfinished > 30, "{unfinished}");
}

#[test]
fn a_directory_on_disk_that_is_removed_is_made_again() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/spool");
    let (mut spool, _) = Spool::open(&path, Limits::default()).unwrap();
    spool.append(1, 1, event(1)).unwrap();
    spool.sync().unwrap();
    std::fs::remove_dir_all(dir.path().join("state")).unwrap();
    spool.append(2, 2, event(2)).unwrap();
    assert!(spool.sync().is_err());
    spool.sync().unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    assert!(matches!(Spool::open(&path, Limits::default()), Err(OpenError::InUse(_))));
    drop(spool);
    let (mut spool, recovered) = Spool::open(&path, Limits::default()).unwrap();
    assert_eq!((recovered.run, recovered.backlog), (2, 1));
    let epoch = spool.stats().epoch;
    let record = spool.record(epoch, 2).unwrap().unwrap();
    assert_eq!(Record::from_bytes(&record).unwrap().event, event(2));
}

#[test]
fn a_segment_stays_while_the_disk_may_not_have_the_one_behind_it() {
    let memory = Memory::default();
    let (mut spool, _) = open(&memory, SMALL);
    let epoch = spool.stats().epoch;
    for n in 1..=10 {
        append(&mut spool, n).unwrap();
    }
    spool.sync().unwrap();
    drop(spool);
    let synced = segments(&memory);
    // Another run's records are written and not synced, for it is killed.
    let (mut spool, _) = open(&memory, SMALL);
    append(&mut spool, 11).unwrap();
    drop(spool);
    let unsynced = segments(&memory).into_iter().find(|name| !synced.contains(name)).unwrap();
    memory.set_read_only(true);
    let (mut spool, recovered) = open(&memory, SMALL);
    assert!(recovered.is_incomplete);
    memory.set_read_only(false);
    // The server has all that the disk has. A power cut now leaves the one behind it out.
    spool.acked(epoch, 10);
    let newest = synced.last().unwrap();
    assert!(segments(&memory).contains(newest), "{newest} before {unsynced}");
    spool.sync().unwrap();
    spool.acked(epoch, 10);
    assert!(!segments(&memory).contains(newest), "the disk has what is behind it");
}
