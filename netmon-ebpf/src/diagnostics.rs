//! The programs' own words, for those who look for a fault: off unless the agent is told otherwise
//! (`netmon-agent run --kernel-log debug`).
//!
//! The level is a constant to the kernel: when it is off, the verifier removes everything below but its load and a
//! return. Nothing below is called for a packet of a flow that has its slot.

use aya_log_ebpf::{
    log,
    macro_support::{Level, level_enabled},
};

use crate::{cpu::Cpu, frame::Frame};

/// Says a line, if its level is asked for. Lines are counted here, so that the agent knows how many found no room in
/// their ring.
macro_rules! say {
    ($level:expr, $($words:tt)*) => {
        if level_enabled($level) {
            if let Some(cpu) = Cpu::this() {
                cpu.said();
            }
            log!((), target: "netmon_ebpf", $level, $($words)*);
        }
    };
}

/// A frame cannot be read. Asks the frame itself, so that the caller keeps nothing at hand for it.
#[inline(never)]
pub fn malformed<F: Frame>(frame: &F) {
    say!(Level::Debug, "interface {}: malformed frame of {} bytes", frame.ifindex(), frame.len());
}

/// A flow got no slot.
#[inline(never)]
pub fn refused(ifindex: u32, family: u32, set: u32) {
    say!(
        Level::Warn,
        "interface {}: no slot in set {} of nm_table{}, no room in nm_events",
        ifindex,
        set,
        family
    );
}

/// A flow gave up its slot before it was read.
#[inline(never)]
pub fn handed_over(slot: u32, family: u32) {
    say!(Level::Trace, "slot {} of nm_table{} handed over unread", slot, family);
}

/// A later fragment came before its first one, or long after it: its datagram's ports are not known. The identification is
/// as in [`crate::parse::Packet`].
#[inline(never)]
pub fn fragment_without_first(id: u32, family: u32) {
    // IPv4 has two bytes of it.
    let id = u32::from_be(id) >> if family == 4 { 16 } else { 0 };
    say!(Level::Debug, "IPv{} fragment of datagram {:x}: its first one is not known", family, id);
}
