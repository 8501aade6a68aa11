//! What became of every frame. One call per frame raises `seen` and exactly one other counter, so that their
//! sums stay equal.

use crate::{frame::Frame, maps::STATS, parse::Refusal};

/// What became of a frame.
pub enum Outcome {
    /// It is in a flow.
    Counted {
        /// Bytes from the IP header on.
        l3_bytes: u32,
    },
    /// Its flow found no room in the table.
    TableFull {
        /// Bytes from the IP header on.
        l3_bytes: u32,
    },
    /// It is not for the table.
    Refused(Refusal),
}

impl From<Refusal> for Outcome {
    #[inline(always)]
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Counts a frame. Plain additions: the slot belongs to this CPU, and neither TC nor XDP is interrupted by
/// another of these programs on it.
#[inline(always)]
pub fn record<F: Frame>(frame: &F, outcome: Outcome) {
    let Some(stats) = STATS.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: entry 0 of an array with one entry is there as long as the program is; see above for writers.
    let stats = unsafe { &mut *stats };
    stats.seen += 1;
    match outcome {
        Outcome::Counted { l3_bytes } => {
            stats.counted += 1;
            stats.counted_bytes += u64::from(l3_bytes);
        }
        Outcome::TableFull { l3_bytes } => {
            stats.table_full += 1;
            stats.table_full_bytes += u64::from(l3_bytes);
        }
        Outcome::Refused(Refusal::NotIp) => {
            stats.not_ip += 1;
            stats.not_ip_bytes += u64::from(frame.len());
        }
        Outcome::Refused(Refusal::OtherProtocol { l3_bytes }) => {
            stats.other_protocol += 1;
            stats.other_protocol_bytes += u64::from(l3_bytes);
        }
        Outcome::Refused(Refusal::Malformed) => {
            stats.malformed += 1;
            stats.malformed_bytes += u64::from(frame.len());
        }
    }
}

/// Counts a record that found no room in the ring buffer.
#[inline(always)]
pub fn ring_full() {
    if let Some(stats) = STATS.get_ptr_mut(0) {
        // SAFETY: as in `record`.
        unsafe { (*stats).ring_full += 1 };
    }
}
