//! What became of every frame. One call per frame raises `seen` and exactly one other counter, so that their
//! sums stay equal.

use crate::maps::STATS;

/// What became of a frame.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// It is in a flow.
    Counted,
    /// Its flow found no room in the table.
    TableFull,
    /// It is not IP.
    NotIp,
    /// It is neither TCP nor UDP.
    OtherProtocol,
    /// It cannot be read.
    Malformed,
}

/// Counts a frame by its own length or, where that is known, by its length from the IP header on.
///
/// Plain additions: the slot belongs to this CPU, and neither TC nor XDP is interrupted by another of these programs
/// on it.
#[inline(always)]
pub fn record(outcome: Outcome, frame_bytes: u32, l3_bytes: u32) {
    let Some(stats) = STATS.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: entry 0 of an array with one entry is there as long as the program is; see above for writers.
    let stats = unsafe { &mut *stats };
    stats.seen += 1;
    let (frames, sum, bytes) = match outcome {
        Outcome::Counted => (&mut stats.counted, &mut stats.counted_bytes, l3_bytes),
        Outcome::TableFull => (&mut stats.table_full, &mut stats.table_full_bytes, l3_bytes),
        Outcome::OtherProtocol => (&mut stats.other_protocol, &mut stats.other_protocol_bytes, l3_bytes),
        Outcome::NotIp => (&mut stats.not_ip, &mut stats.not_ip_bytes, frame_bytes),
        Outcome::Malformed => (&mut stats.malformed, &mut stats.malformed_bytes, frame_bytes),
    };
    *frames += 1;
    *sum += u64::from(bytes);
}

/// Counts a record of a flow in the table that found no room in the ring buffer.
#[inline(always)]
pub fn ring_full() {
    if let Some(stats) = STATS.get_ptr_mut(0) {
        // SAFETY: as in `record`.
        unsafe { (*stats).ring_full += 1 };
    }
}
