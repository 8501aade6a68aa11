//! The spool on a real disk that is full, read-only or emptied.
#![expect(clippy::unwrap_used, reason = "a test may end by a panic, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::Command;

use netmon_agent::spool::{Limits, Recovered, Spool, SpoolHandle};
use netmon_common::model::{Event, Filter, Gap, GapReason, Muted, Record, Traffic};
use netmon_common::wire::Item;

/// Fills the disk for as long as it lives.
struct Filler(PathBuf);

impl Filler {
    fn new(disk: &Path) -> Self {
        let path = disk.join("filler");
        std::fs::write(&path, vec![0; 64 << 20]).expect_err("the disk is too large for this test");
        Self(path)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

fn event(n: u64) -> Event {
    Event::Filter(Filter::Refused { error: format!("{n}").as_str().into() })
}

fn number(record: &[u8]) -> u64 {
    match Record::from_bytes(record).unwrap().event {
        Event::Filter(Filter::Refused { error }) => error.escaped().to_string().parse().unwrap(),
        other => panic!("{other:?} was never recorded"),
    }
}

/// Numbers of the records that wait, and how many of them are holes.
async fn waiting(spool: &SpoolHandle) -> (Vec<u64>, u64) {
    let (mut numbers, mut holes) = (Vec::new(), 0);
    for range in spool.epochs() {
        let mut seq = range.oldest;
        while let Some(chunk) = spool.read(range.epoch, seq, 500, 100_000).await.unwrap() {
            holes += chunk.first_seq - seq;
            seq = chunk.next_seq();
            for item in chunk.items {
                match item {
                    Item::Record(record) => numbers.push(number(&record)),
                    Item::Hole(count) => holes += count,
                }
            }
        }
    }
    (numbers, holes)
}

fn open(disk: &Path, limits: Limits) -> (SpoolHandle, Recovered) {
    let (spool, recovered) = Spool::open(&disk.join("spool"), limits).unwrap();
    (SpoolHandle::new(spool), recovered)
}

fn append(spool: &SpoolHandle, n: u64) {
    spool.append(n, n as i64, event(n)).unwrap();
}

fn remount(disk: &Path, how: &str) {
    let status = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(disk).status().unwrap();
    assert!(status.success(), "{how}");
}

#[tokio::test]
#[ignore = "NETMON_TEST_SMALL_DISK must name a directory on a file system of its own with some 2 MB"]
async fn a_disk_that_is_full_read_only_or_emptied_is_waited_out() {
    let disk = PathBuf::from(std::env::var_os("NETMON_TEST_SMALL_DISK").unwrap());
    // The first start of all.
    let filler = Filler::new(&disk);
    let (spool, recovered) = open(&disk, Limits::default());
    append(&spool, 1);
    assert!(recovered.is_incomplete, "{recovered:?}");
    assert!(spool.sync_in_background().await.is_err());
    drop(filler);
    append(&spool, 2);
    spool.sync_in_background().await.unwrap();
    assert_eq!(waiting(&spool).await, (vec![1, 2], 0));
    // It is there, but no start and no record can be written.
    drop(spool);
    let filler = Filler::new(&disk);
    let (spool, recovered) = open(&disk, Limits::default());
    assert!(recovered.is_incomplete);
    for n in 3..=200 {
        append(&spool, n);
    }
    assert!(spool.sync_in_background().await.is_err());
    drop(filler);
    spool.sync_in_background().await.unwrap();
    assert_eq!(waiting(&spool).await, ((1..=200).collect(), 0));
    // A start on a disk that is read-only.
    drop(spool);
    remount(&disk, "ro");
    let (spool, recovered) = open(&disk, Limits::default());
    assert!(recovered.is_incomplete);
    append(&spool, 201);
    assert!(spool.sync_in_background().await.is_err());
    remount(&disk, "rw");
    spool.sync_in_background().await.unwrap();
    assert_eq!(waiting(&spool).await, ((1..=201).collect(), 0));
    // Somebody removes it all.
    std::fs::remove_dir_all(disk.join("spool")).unwrap();
    append(&spool, 202);
    assert!(spool.sync_in_background().await.is_err());
    spool.sync_in_background().await.unwrap();
    assert_eq!(waiting(&spool).await.0, [202]);
    let gaps = spool.take_gaps();
    assert!(matches!(gaps[..], [Gap { reason: GapReason::SpoolDamaged, count: Some(1..), .. }]), "{gaps:?}");
    assert_eq!(spool.stats().lost, 0);
    spool.close().unwrap();
    drop(spool);

    // A spool that reaches its limit within a disk that has little more.
    std::fs::remove_dir_all(disk.join("spool")).unwrap();
    let limits = Limits { bytes: 1 << 20, ..Limits::default() };
    let (spool, _) = open(&disk, limits);
    let muted = Muted {
        label: "cloud".into(),
        from_wall_ns: 0,
        to_wall_ns: 0,
        traffic: Traffic::default(),
        flows: 1,
    };
    let mut n = 0;
    while spool.stats().dropped < 20_000 {
        for _ in 0..500 {
            n += 1;
            let event = if n % 50 == 0 { event(n) } else { Event::Muted(muted.clone()) };
            spool.append(n, n as i64, event).unwrap();
        }
        spool.sync_in_background().await.unwrap();
        assert!(spool.stats().bytes <= limits.bytes);
    }
    let range = spool.epochs()[0];
    assert_eq!((range.oldest, range.next), (1, n + 1));
    for seq in 1..=n {
        let record = spool.record(range.epoch, seq).await.unwrap();
        if seq % 50 == 0 {
            assert_eq!(number(&record.unwrap()), seq, "an important record gave way");
        }
        if seq == 2_000 {
            break;
        }
    }
}
