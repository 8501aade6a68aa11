//! netmon's kernel programs. They count and never interfere: every path of every program returns "go on".
//!
//! * [`frame`]: one way to read an skb and an XDP buffer
//! * [`parse`]: frame → addresses, ports and lengths, or why not
//! * [`fragments`]: the ports of later fragments
//! * [`key`], [`flow`]: the flow table and the records to the agent
//! * [`classify`]: whose address is it?
//! * [`diagnostics`]: what the programs say of themselves
//! * [`cpu`]: what became of every frame, and the clock
//! * [`maps`]: the maps
//!
//! Only what kernel 5.10 has is used. The borders to the agent are in `netmon_common::abi`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod classify;
mod cpu;
mod diagnostics;
mod flow;
mod fragments;
mod frame;
mod key;
mod maps;
mod parse;

use aya_ebpf::{
    bindings::xdp_action::XDP_PASS,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

use crate::{
    cpu::{Cpu, Outcome},
    flow::Direction,
    frame::{Frame, SkbFrame, XdpFrame, load},
    key::{Key, Key4, Key6},
    parse::{ETHERNET_HEADER, Link, Measure, PLAIN_BYTES, Packet, Parsed},
};

/// `TCX_NEXT` and `TC_ACT_UNSPEC`: the next program of the chain decides.
const NEXT: i32 = -1;

/// TC ingress of an interface with Ethernet headers.
#[classifier]
pub fn nm_tc_ingress(ctx: TcContext) -> i32 {
    watch(&SkbFrame(&ctx), Link::Ethernet, Direction::Received);
    NEXT
}

/// TC egress of an interface with Ethernet headers.
#[classifier]
pub fn nm_tc_egress(ctx: TcContext) -> i32 {
    watch(&SkbFrame(&ctx), Link::Ethernet, Direction::Sent);
    NEXT
}

/// TC ingress of an interface whose frames start with the IP header (tun, WireGuard, PPP, raw-IP modems).
#[classifier]
pub fn nm_tc_l3_in(ctx: TcContext) -> i32 {
    watch(&SkbFrame(&ctx), Link::None, Direction::Received);
    NEXT
}

/// TC egress of an interface whose frames start with the IP header.
#[classifier]
pub fn nm_tc_l3_out(ctx: TcContext) -> i32 {
    watch(&SkbFrame(&ctx), Link::None, Direction::Sent);
    NEXT
}

/// XDP ingress of an interface with Ethernet headers.
#[xdp]
pub fn nm_xdp_ingress(ctx: XdpContext) -> u32 {
    watch(&XdpFrame(&ctx), Link::Ethernet, Direction::Received);
    XDP_PASS
}

#[inline(always)]
fn watch<F: Frame>(frame: &F, link: Link, direction: Direction) {
    let Some(cpu) = Cpu::this() else {
        return;
    };
    cpu.seen();
    let (outcome, bytes) = match link {
        Link::Ethernet => watch_at::<F, ETHERNET_HEADER>(frame, cpu, link, direction),
        Link::None => watch_at::<F, 0>(frame, cpu, link, direction),
    };
    cpu.record(outcome, bytes);
}

/// Counts a frame whose IP header is `AT` bytes behind its start, if it is a plain packet.
#[inline(always)]
fn watch_at<F: Frame, const AT: usize>(
    frame: &F,
    cpu: Cpu,
    link: Link,
    direction: Direction,
) -> (Outcome, u32) {
    let (start, end) = frame.linear();
    if start + AT + PLAIN_BYTES <= end {
        // In memory order.
        let (is_ipv4, is_ipv6, group_frame) = if AT == ETHERNET_HEADER {
            let ethertype = load!("u16", start, 12);
            (ethertype == 0x0008, ethertype == 0xdd86, load!("u8", start, 0) & 1 != 0)
        } else {
            let version = load!("u8", start, 0) >> 4;
            (version == 4, version == 6, false)
        };
        if is_ipv4 {
            if let Some(plain) = parse::plain4::<F, AT>(frame, start, end) {
                let measure = Measure { group_frame, ..plain.measure };
                let key = Key4::new(plain.addresses, plain.ports, measure.protocol, direction);
                return count(cpu, frame, &key, &measure, direction);
            }
        } else if is_ipv6 && let Some(plain) = parse::plain6::<F, AT>(frame, start, end) {
            let measure = Measure { group_frame, ..plain.measure };
            let key = Key6::new(plain.addresses, plain.ports, measure.protocol, direction);
            return count(cpu, frame, &key, &measure, direction);
        }
    }

    let mut packet = Packet::default();
    match parse::parse(frame, link, &mut packet) {
        Parsed::Packet => {
            if packet.first_fragment || packet.measure.later_fragment {
                fragments::follow(&mut packet);
            }
            let (ports, measure) = (packet.ports(), packet.measure);
            if packet.family == 4 {
                let key = Key4::new(packet.addresses4(), ports, measure.protocol, direction);
                count(cpu, frame, &key, &measure, direction)
            } else {
                let key = Key6::new(packet.addresses6(), ports, measure.protocol, direction);
                count(cpu, frame, &key, &measure, direction)
            }
        }
        Parsed::OtherProtocol => (Outcome::OtherProtocol, packet.measure.l3_bytes),
        Parsed::NotIp => (Outcome::NotIp, frame.len()),
        Parsed::Malformed => {
            diagnostics::malformed(frame);
            (Outcome::Malformed, frame.len())
        }
    }
}

#[inline(always)]
fn count<F: Frame, K: Key>(
    cpu: Cpu,
    frame: &F,
    key: &K,
    measure: &Measure,
    direction: Direction,
) -> (Outcome, u32) {
    let counted = flow::count(cpu, frame, key, measure, direction);
    (if counted { Outcome::Counted } else { Outcome::TableFull }, measure.l3_bytes)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The programs have no panicking path; the verifier would refuse the endless loop that this is.
    loop {}
}

/// Some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
