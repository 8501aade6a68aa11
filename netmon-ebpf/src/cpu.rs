//! What belongs to this CPU alone: its counters and its clock.
//!
//! Plain reads and writes are enough: programs of one CPU run one after the other. TC and XDP programs run with bottom
//! halves disabled, so neither another task nor another packet comes between.

use aya_ebpf::helpers::{
    bpf_get_smp_processor_id,
    generated::{bpf_jiffies64, bpf_ktime_get_boot_ns},
};
use netmon_common::abi::CpuStats;

use crate::maps::STATS;

/// This CPU.
#[derive(Clone, Copy)]
pub struct Cpu {
    /// Its number.
    pub number: u32,
    state: *mut CpuStats,
}

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// It is in a flow.
    Counted,
    /// Its flow found no slot.
    TableFull,
    /// It is not IP.
    NotIp,
    /// It is neither TCP nor UDP.
    OtherProtocol,
    /// It cannot be read.
    Malformed,
}

impl Cpu {
    /// The one that runs this program. `None` never happens: the map has an element for each CPU that there can be.
    #[inline(always)]
    pub fn this() -> Option<Self> {
        // SAFETY: the helper takes no arguments.
        Self::of(unsafe { bpf_get_smp_processor_id() })
    }

    /// The one with this number, which must be the one that runs this program.
    #[inline(always)]
    pub fn of(number: u32) -> Option<Self> {
        Some(Self { number, state: STATS.get_ptr_mut(number)? })
    }

    /// Of the prefixes by which flows are classified.
    #[inline(always)]
    pub fn generation(&self) -> u16 {
        // SAFETY: the map gave the pointer; the agent writes at any time, and any value of its is one.
        unsafe { (&raw const (*self.state).generation).read_volatile() as u16 }
    }

    /// Boot clock, nanoseconds, as it was at this jiffy's first packet. The clock itself costs as much as all the rest of
    /// the hot path; jiffies cost next to nothing.
    #[inline(always)]
    pub fn now_ns(&self) -> u64 {
        // SAFETY: the helper takes no arguments.
        let jiffies = unsafe { bpf_jiffies64() };
        // SAFETY: the map gave the pointer; see the module for other writers.
        unsafe {
            if (*self.state).clock_jiffies != jiffies {
                (*self.state).clock_ns = bpf_ktime_get_boot_ns();
                (*self.state).clock_jiffies = jiffies;
            }
            (*self.state).clock_ns
        }
    }

    /// Boot clock, nanoseconds, as it is: for the few packets whose order between CPUs matters.
    #[inline(always)]
    pub fn exact_ns(&self) -> u64 {
        // SAFETY: the helper takes no arguments.
        unsafe { bpf_ktime_get_boot_ns() }
    }

    /// May the agent be woken for a new flow? Not more often than every ten milliseconds: what comes in between is
    /// found by the sweep that follows.
    #[inline(always)]
    pub fn may_wake(&self, now_ns: u64) -> bool {
        const PAUSE_NS: u64 = 10_000_000;
        // SAFETY: as above.
        unsafe {
            let may = now_ns.saturating_sub((*self.state).woken_ns) >= PAUSE_NS;
            if may {
                (*self.state).woken_ns = now_ns;
            }
            may
        }
    }

    /// A frame has reached a hook.
    #[inline(always)]
    pub fn seen(&self) {
        // SAFETY: as above.
        unsafe { (*self.state).stats.seen += 1 };
    }

    /// What has become of it, with its own length or, where that is known, its length from the IP header on. Once for
    /// every [`Self::seen`].
    #[inline(always)]
    pub fn record(&self, outcome: Outcome, bytes: u32) {
        // SAFETY: as above.
        let stats = unsafe { &mut (*self.state).stats };
        let (frames, sum) = match outcome {
            Outcome::Counted => (&mut stats.counted, &mut stats.counted_bytes),
            Outcome::TableFull => (&mut stats.table_full, &mut stats.table_full_bytes),
            Outcome::OtherProtocol => (&mut stats.other_protocol, &mut stats.other_protocol_bytes),
            Outcome::NotIp => (&mut stats.not_ip, &mut stats.not_ip_bytes),
            Outcome::Malformed => (&mut stats.malformed, &mut stats.malformed_bytes),
        };
        *frames += 1;
        *sum += u64::from(bytes);
    }

    /// Counts a "flow opened" record that was not written.
    #[inline(always)]
    pub fn ring_full(&self) {
        // SAFETY: as above.
        unsafe { (*self.state).stats.ring_full += 1 };
    }

    /// Counts a line of [`crate::diagnostics`].
    #[inline(always)]
    pub fn said(&self) {
        // SAFETY: as above.
        unsafe { (*self.state).said = (*self.state).said.wrapping_add(1) };
    }
}
