//! What became of every frame.

use std::sync::atomic::Ordering;

use netmon_common::abi::{CpuStats, Stats};

use super::mapping::Mapping;

/// Sums over so many CPUs.
pub(super) fn sum(mapping: &Mapping, cpus: usize) -> Stats {
    (0..cpus).map(|cpu| cpu_stats(mapping, cpu)).fold(Stats::default(), add)
}

/// One CPU's statistics, word by word.
fn cpu_stats(mapping: &Mapping, cpu: usize) -> Stats {
    let first = cpu * (size_of::<CpuStats>() / 8);
    let word = |offset: usize| mapping.word(first + offset / 8).load(Ordering::Relaxed);
    macro_rules! read {
        ($($field:ident),*) => {
            Stats { $($field: word(std::mem::offset_of!(Stats, $field))),* }
        };
    }
    read!(
        seen,
        counted,
        counted_bytes,
        not_ip,
        not_ip_bytes,
        other_protocol,
        other_protocol_bytes,
        malformed,
        malformed_bytes,
        table_full,
        table_full_bytes,
        ring_full
    )
}

fn add(a: Stats, b: Stats) -> Stats {
    Stats {
        seen: a.seen + b.seen,
        counted: a.counted + b.counted,
        counted_bytes: a.counted_bytes + b.counted_bytes,
        not_ip: a.not_ip + b.not_ip,
        not_ip_bytes: a.not_ip_bytes + b.not_ip_bytes,
        other_protocol: a.other_protocol + b.other_protocol,
        other_protocol_bytes: a.other_protocol_bytes + b.other_protocol_bytes,
        malformed: a.malformed + b.malformed,
        malformed_bytes: a.malformed_bytes + b.malformed_bytes,
        table_full: a.table_full + b.table_full,
        table_full_bytes: a.table_full_bytes + b.table_full_bytes,
        ring_full: a.ring_full + b.ring_full,
    }
}
