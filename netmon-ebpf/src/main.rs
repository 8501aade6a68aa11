//! netmon's kernel programs. They count and never interfere: every path of every program returns "go on".
//!
//! * [`frame`]: one way to read an skb and an XDP buffer
//! * [`parse`]: frame → [`parse::Packet`], or why not
//! * [`classify`]: whose address is it?
//! * [`flow`]: the flow table and the "flow opened" record
//! * [`stats`]: what became of every frame
//! * [`maps`]: the maps
//!
//! Only what kernel 5.10 has is used. The borders to the agent are in `netmon_common::abi`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod classify;
mod flow;
mod frame;
mod maps;
mod parse;
mod stats;

use aya_ebpf::{
    bindings::xdp_action::XDP_PASS,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

use crate::{
    flow::Direction,
    frame::{Frame, SkbFrame, XdpFrame},
    parse::{Link, Packet, Parsed},
    stats::Outcome,
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
    let mut packet = Packet::default();
    let outcome = match parse::parse(frame, link, &mut packet) {
        Parsed::Packet if flow::count(frame, &packet, direction) => Outcome::Counted,
        Parsed::Packet => Outcome::TableFull,
        Parsed::NotIp => Outcome::NotIp,
        Parsed::OtherProtocol => Outcome::OtherProtocol,
        Parsed::Malformed => Outcome::Malformed,
    };
    stats::record(outcome, frame.len(), packet.l3_bytes);
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
