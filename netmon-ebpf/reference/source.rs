//! Frames of many flows. The driver runs the program by `BPF_PROG_TEST_RUN` with live frames (kernel 5.18): the kernel
//! hands it one prepared frame after the other, the program writes the next flow's addresses and port into it and
//! redirects it to an interface, whose peer receives it as it would receive anything. No socket, no copy.

use aya_ebpf::{
    bindings::xdp_action::XDP_ABORTED, btf_maps::Array, helpers::generated::bpf_redirect, macros::btf_map,
    programs::XdpContext,
};

use crate::shared::{BASE4, CHUNK, Chunk, MAX_CHUNKS, Source, address_part, source_port};

/// Numbers of flows in the order in which they are sent.
#[btf_map(name = "ref_order")]
static ORDER: Array<Chunk, MAX_CHUNKS> = Array::new();

/// What the driver wants.
#[btf_map(name = "ref_source")]
static SOURCE: Array<Source, 1> = Array::new();

const ETHERNET_HEADER: usize = 14;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// Makes the next frame. Aborted: nobody said what to send, or the frame is too short.
#[inline(always)]
pub fn next(ctx: &XdpContext) -> u32 {
    let Some(source) = SOURCE.get_ptr_mut(0) else {
        return XDP_ABORTED;
    };
    // SAFETY: entry 0 of an array with one entry; one driver at a time runs this program.
    let source = unsafe { &mut *source };
    let at = source.next as u32 & source.mask;
    source.next += 1;
    let Some(chunk) = ORDER.get(at / CHUNK as u32) else {
        return XDP_ABORTED;
    };
    let flow = chunk[at as usize % CHUNK];
    let written = if source.family == 4 { ipv4(ctx, flow, source.header_sum) } else { ipv6(ctx, flow) };
    if written.is_none() {
        return XDP_ABORTED;
    }
    // SAFETY: the helper takes numbers only.
    unsafe { bpf_redirect(source.ifindex, 0) as u32 }
}

#[inline(always)]
fn ipv4(ctx: &XdpContext, flow: u32, header_sum: u32) -> Option<()> {
    let address = BASE4 + address_part(flow);
    // RFC 1071: the one's complement of the one's complement sum.
    let mut sum = header_sum + (address >> 16) + (address & 0xffff);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    write(ctx, ETHERNET_HEADER + 10, (!(sum as u16)).to_be_bytes())?;
    write(ctx, ETHERNET_HEADER + 12, address.to_be_bytes())?;
    write(ctx, ETHERNET_HEADER + IPV4_HEADER, source_port(flow).to_be_bytes())
}

#[inline(always)]
fn ipv6(ctx: &XdpContext, flow: u32) -> Option<()> {
    write(ctx, ETHERNET_HEADER + 8 + 12, address_part(flow).to_be_bytes())?;
    write(ctx, ETHERNET_HEADER + IPV6_HEADER, source_port(flow).to_be_bytes())
}

#[inline(always)]
fn write<const N: usize>(ctx: &XdpContext, offset: usize, bytes: [u8; N]) -> Option<()> {
    let start = ctx.data() + offset;
    if start + N > ctx.data_end() {
        return None;
    }
    // SAFETY: inside the frame by the comparison above, which the verifier demands too.
    unsafe { (start as *mut [u8; N]).write_unaligned(bytes) };
    Some(())
}
