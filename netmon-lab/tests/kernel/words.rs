//! What the programs say of themselves, and that they are silent unless they are asked.

use std::sync::{Arc, Mutex};

use aya::{
    maps::{Map, MapData, MapInfo, RingBuf},
    programs::{SchedClassifier, Xdp},
};
use aya_obj::programs::XdpAttachType;
use log::{Level, Log, Metadata, Record};
use netmon_agent::kernel::{Sizes, WordLevel, Words};
use netmon_common::abi::{Stats, programs};

use crate::{
    frames::*,
    rig::{Bench, ENTRIES},
};

/// Keeps the lines.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<(Level, String)>>>);

impl Lines {
    fn take(&self) -> Vec<(Level, String)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        assert_eq!(record.target(), netmon_agent::words::TARGET);
        self.0.lock().unwrap().push((record.level(), record.args().to_string()));
    }

    fn flush(&self) {}
}

/// With the least room for flows and for what is handed over.
fn bench(words: WordLevel) -> Bench {
    Bench::with(|options| {
        options.words = words;
        options.sizes = Sizes { flows: 1, ring_bytes: 4096, ..Sizes::default() };
    })
}

fn listen(bench: &mut Bench) -> (Words<Lines>, Lines) {
    let lines = Lines::default();
    (bench.kernel.words(lines.clone()).unwrap().unwrap(), lines)
}

fn malformed() -> Vec<u8> {
    udp_out(1000, 2000, b"")[..40].to_vec()
}

fn orphan() -> Vec<u8> {
    eth4(&ipv4(HERE4, THERE4, UDP, &[], 0x00b9, &[9; 100]))
}

fn orphan6() -> Vec<u8> {
    eth6(&ipv6(HERE6, THERE6, 44, &cat(&[&[UDP, 0, 5, 0xa9, 0, 0, 0xab, 0xcd], &[7; 64]])))
}

/// Everything that the programs have words for, by every program.
fn odd_traffic(bench: &Bench) -> Stats {
    for (program, _, verdict) in ENTRIES {
        for frame in [malformed(), orphan(), orphan6()] {
            assert_eq!(bench.run(program, &frame), verdict);
        }
        for port in 0..400 {
            assert_eq!(bench.run(program, &udp_out(1000 + port, 53, b"x")), verdict);
        }
    }
    bench.stats()
}

/// Instructions' bytes in the kernel, and the ring for words that the program holds.
fn loaded(bench: &Bench, program: &'static str) -> (u32, MapInfo) {
    let pin = bench.pin(program);
    bench.host.run(move || {
        let info = if program == programs::XDP_INGRESS {
            Xdp::from_pin(pin, XdpAttachType::Interface).unwrap().info().unwrap()
        } else {
            SchedClassifier::from_pin(pin).unwrap().info().unwrap()
        };
        let maps = info.map_ids().unwrap().unwrap();
        let mut maps = maps.into_iter().map(|id| MapInfo::from_id(id).unwrap());
        let ring = maps.find(|map| map.name_as_str() == Some("AYA_LOGS")).unwrap();
        (info.size_translated().unwrap(), ring)
    })
}

#[test]
fn silent_programs_hold_no_code_for_words_and_write_none() {
    let (mut silent, speaking) = (bench(WordLevel::Off), bench(WordLevel::Trace));
    assert!(silent.kernel.words(Lines::default()).unwrap().is_none());
    let stats = odd_traffic(&silent);
    assert!(stats.table_full > 0 && stats.malformed == 3, "{stats:?}");
    for (program, ..) in ENTRIES {
        let ((bytes, ring), (speaking_bytes, speaking_ring)) =
            (loaded(&silent, program), loaded(&speaking, program));
        // Four lines are some hundred instructions each.
        assert!(bytes + 4 * 100 * 8 < speaking_bytes, "{program}: {bytes} against {speaking_bytes} bytes");
        assert_eq!(ring.max_entries() as usize, rustix::param::page_size());
        assert!(speaking_ring.max_entries() > ring.max_entries());
        let written = silent.host.run(move || {
            let ring = Map::RingBuf(MapData::from_id(ring.id()).unwrap());
            RingBuf::try_from(ring).unwrap().next().is_some()
        });
        assert!(!written, "{program}");
    }
}

#[test]
fn words_change_no_verdict_and_no_count() {
    let [silent, speaking] = [WordLevel::Off, WordLevel::Trace].map(|level| odd_traffic(&bench(level)));
    assert_eq!(silent.malformed, 3);
    // Which flows share a set is random, so how many find a slot is as well; all of them are in one of the two.
    let sum = |stats: Stats| Stats {
        counted: stats.counted + stats.table_full,
        counted_bytes: stats.counted_bytes + stats.table_full_bytes,
        table_full: 0,
        table_full_bytes: 0,
        ring_full: 0,
        ..stats
    };
    assert_eq!(sum(silent), sum(speaking));
}

#[test]
fn each_oddity_has_its_line() {
    let mut bench = bench(WordLevel::Trace);
    let (mut words, lines) = listen(&mut bench);
    for (program, ..) in ENTRIES {
        for (frame, expected) in [
            (malformed(), "malformed frame of 40 bytes"),
            (orphan(), "IPv4 fragment of datagram 7: its first one is not known"),
            (orphan6(), "IPv6 fragment of datagram abcd: its first one is not known"),
        ] {
            bench.run(program, &frame);
            assert_eq!(words.read(), 0);
            let said = lines.take();
            let [(Level::Debug, line)] = said.as_slice() else { panic!("{program}: {said:?}") };
            assert!(line.ends_with(expected), "{program}: {line}");
        }
        bench.run(program, &udp_out(1000, 2000, b"x"));
        words.read();
        assert_eq!(lines.take(), [], "{program}: nothing is odd in that");

        let before = bench.stats().table_full;
        let (mut handed_over, mut refused) = (0, 0);
        for port in 0..400 {
            bench.run(program, &udp_out(1000 + port, 53, b"x"));
            assert_eq!(words.read(), 0);
            for (level, line) in lines.take() {
                if level == Level::Trace && line.ends_with("of nm_table4 handed over unread") {
                    handed_over += 1;
                } else if level == Level::Warn && line.ends_with("of nm_table4, no room in nm_events") {
                    refused += 1;
                } else {
                    panic!("{program}: {level} {line}");
                }
            }
        }
        assert_eq!(refused, bench.stats().table_full - before, "{program}");
        assert!(refused > 0 && handed_over > 0, "{program}: {refused} refused, {handed_over} handed over");
        // Room for the next program's.
        bench.flows();
    }
}

#[test]
fn a_level_leaves_out_what_weighs_less() {
    for (level, expected) in [
        (WordLevel::Error, [].as_slice()),
        (WordLevel::Warn, &[Level::Warn]),
        (WordLevel::Info, &[Level::Warn]),
        (WordLevel::Debug, &[Level::Warn, Level::Debug]),
        (WordLevel::Trace, &[Level::Warn, Level::Debug, Level::Trace]),
    ] {
        let mut bench = bench(level);
        let (mut words, lines) = listen(&mut bench);
        odd_traffic(&bench);
        words.read();
        let mut said: Vec<_> = lines.take().into_iter().map(|(level, _)| level).collect();
        said.sort();
        said.dedup();
        assert_eq!(said, expected, "{level:?}");
    }
}

#[test]
fn lines_without_room_are_counted() {
    const FRAMES: u64 = 2_000;
    let mut bench = bench(WordLevel::Debug);
    let (mut words, lines) = listen(&mut bench);
    for _ in 0..FRAMES {
        bench.receive(&malformed());
    }
    let lost = words.read();
    let said = lines.take().len() as u64;
    assert!(lost > 0 && said > 0, "{lost} lost, {said} said");
    assert_eq!(lost + said, FRAMES);
    bench.receive(&malformed());
    assert_eq!((words.read(), lines.take().len()), (0, 1), "there is room again");
}
