//! netmon's kernel programs. They count and never interfere: every path of every program returns "go on".
//!
//! * [`frame`]: one way to read an skb and an XDP buffer
//! * [`parse`]: frame → addresses, ports and lengths, or why not
//! * [`fragments`]: the ports of later fragments
//! * [`key`], [`flow`]: the flow table and the records to the agent
//! * [`classify`]: whose address is it?
//! * [`cpu`]: what became of every frame, and the clock
//! * [`maps`]: the maps
//!
//! Only what kernel 5.10 has is used. The borders to the agent are in `netmon_common::abi`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod classify;
mod cpu;
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
    key::{Key4, Key6},
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
    let plain = match link {
        Link::Ethernet => watch_plain::<F, ETHERNET_HEADER>(frame, cpu.number, direction),
        Link::None => watch_plain::<F, 0>(frame, cpu.number, direction),
    };
    if !plain {
        watch_any(frame, cpu.number, link, direction);
    }
}

/// Counts a plain packet whose IP header is `AT` bytes behind the frame's start. False: it is none.
///
/// Its own subprogram: its stack is free again when a frame is read by [`watch_any`].
#[inline(never)]
fn watch_plain<F: Frame, const AT: usize>(frame: &F, cpu: u32, direction: Direction) -> bool {
    let Some(cpu) = Cpu::of(cpu) else {
        return false;
    };
    let (start, end) = frame.linear();
    if start + AT + PLAIN_BYTES > end {
        return false;
    }
    // In memory order.
    let (is_ipv4, is_ipv6, group_frame) = if AT == ETHERNET_HEADER {
        let ethertype = load!("u16", start, 12);
        (ethertype == 0x0008, ethertype == 0xdd86, load!("u8", start, 0) & 1 != 0)
    } else {
        let version = load!("u8", start, 0) >> 4;
        (version == 4, version == 6, false)
    };
    let (counted, bytes) = if is_ipv4 {
        let Some(plain) = parse::plain4::<F, AT>(frame, start, end) else {
            return false;
        };
        let measure = Measure { group_frame, ..plain.measure };
        let key = Key4::of_plain(plain.addresses, plain.ports, measure.protocol, direction);
        (flow::count(cpu, frame, &key, &measure, direction), measure.l3_bytes)
    } else if is_ipv6 {
        let Some(plain) = parse::plain6::<F, AT>(frame, start, end) else {
            return false;
        };
        let measure = Measure { group_frame, ..plain.measure };
        let key = Key6::of_plain(plain.addresses, plain.ports, measure.protocol, direction);
        (flow::count(cpu, frame, &key, &measure, direction), measure.l3_bytes)
    } else {
        return false;
    };
    cpu.record(if counted { Outcome::Counted } else { Outcome::TableFull }, bytes);
    true
}

/// Counts any frame. Its own subprogram: few frames come here, and it needs much stack.
#[inline(never)]
fn watch_any<F: Frame>(frame: &F, cpu: u32, link: Link, direction: Direction) {
    let Some(cpu) = Cpu::of(cpu) else {
        return;
    };
    let mut packet = Packet::default();
    let parsed = parse::parse(frame, link, &mut packet);
    if parsed == Parsed::Packet && (packet.first_fragment || packet.measure.later_fragment) {
        fragments::follow(&mut packet);
    }
    let outcome = match parsed {
        Parsed::Packet => {
            let measure = &packet.measure;
            let counted = if packet.family == 4 {
                flow::count(cpu, frame, &Key4::of(&packet, direction), measure, direction)
            } else {
                flow::count(cpu, frame, &Key6::of(&packet, direction), measure, direction)
            };
            if counted { Outcome::Counted } else { Outcome::TableFull }
        }
        Parsed::NotIp => Outcome::NotIp,
        Parsed::OtherProtocol => Outcome::OtherProtocol,
        Parsed::Malformed => Outcome::Malformed,
    };
    let bytes = match parsed {
        Parsed::Packet | Parsed::OtherProtocol => packet.measure.l3_bytes,
        Parsed::NotIp | Parsed::Malformed => frame.len(),
    };
    cpu.record(outcome, bytes);
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
