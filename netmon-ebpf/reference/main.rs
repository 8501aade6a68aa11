//! What netmon's programs are compared with (`cargo xtask bench kernel`), and what makes the packets for it. None of
//! this is in the agent.
//!
//! * `ref_empty`, `ref_xdp_empty`: the cost of being called at all
//! * [`hash`]: the flow counter that anyone would write first
//! * [`source`]: frames of many flows, faster than any socket sends them
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod hash;
#[expect(dead_code, reason = "some of it is for the driver alone")]
mod shared;
mod source;

use aya_ebpf::{
    bindings::xdp_action::XDP_PASS,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

/// `TCX_NEXT` and `TC_ACT_UNSPEC`: the next program of the chain decides.
const NEXT: i32 = -1;

/// Does nothing.
#[classifier]
pub fn ref_empty(_ctx: TcContext) -> i32 {
    NEXT
}

/// Does nothing.
#[xdp]
pub fn ref_xdp_empty(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

/// Counts the flow in a hash map.
#[classifier]
pub fn ref_hash(ctx: TcContext) -> i32 {
    hash::count(&ctx);
    NEXT
}

/// Makes a frame of the next flow and sends it.
#[xdp]
pub fn ref_source_xdp(ctx: XdpContext) -> u32 {
    source::next(&ctx)
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
