//! The flow counter that anyone would write first: a shared hash map from the five numbers to counters, the clock read
//! for every packet, atomic additions. It reads less than netmon does (no VLAN tags, options, fragments or extension
//! headers, no classes), so that nobody can say that it was made slow.

use core::arch::asm;

use aya_ebpf::{
    btf_maps::HashMap,
    helpers::generated::{bpf_ktime_get_ns, bpf_skb_pull_data},
    macros::btf_map,
    programs::TcContext,
};

#[repr(C)]
pub struct Key4 {
    source: u32,
    destination: u32,
    ports: u32,
    protocol: u32,
}

#[repr(C)]
pub struct Key6 {
    source: [u32; 4],
    destination: [u32; 4],
    ports: u32,
    protocol: u32,
}

#[repr(C)]
pub struct Counters {
    packets: u64,
    bytes: u64,
    first_ns: u64,
    last_ns: u64,
}

/// Flows, IPv4. The driver gives it its size.
#[btf_map(name = "ref_hash4")]
static HASH4: HashMap<Key4, Counters, 65_536> = HashMap::new();

/// Flows, IPv6.
#[btf_map(name = "ref_hash6")]
static HASH6: HashMap<Key6, Counters, 65_536> = HashMap::new();

const ETHERNET_HEADER: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Ethernet, IPv6 and ports.
const HEADERS: u32 = 14 + 40 + 4;

/// Counts a frame; what is neither TCP nor UDP is passed by.
#[inline(always)]
pub fn count(ctx: &TcContext) {
    let Some(header) = read::<[u8; ETHERNET_HEADER]>(ctx, 0) else {
        return;
    };
    let counted = match u16::from_be_bytes([header[12], header[13]]) {
        ETHERTYPE_IPV4 => ipv4(ctx),
        ETHERTYPE_IPV6 => ipv6(ctx),
        _ => Some(()),
    };
    if counted.is_none() {
        // The headers may be in another page: the next packet of this flow finds them here.
        // SAFETY: the context is the kernel's.
        unsafe { bpf_skb_pull_data(ctx.skb.skb, HEADERS) };
    }
}

#[inline(always)]
fn ipv4(ctx: &TcContext) -> Option<()> {
    let header: [u8; IPV4_HEADER] = read(ctx, ETHERNET_HEADER)?;
    let protocol = header[9];
    if protocol != TCP && protocol != UDP {
        return Some(());
    }
    let key = Key4 {
        source: u32::from_ne_bytes([header[12], header[13], header[14], header[15]]),
        destination: u32::from_ne_bytes([header[16], header[17], header[18], header[19]]),
        ports: read(ctx, ETHERNET_HEADER + IPV4_HEADER)?,
        protocol: u32::from(protocol),
    };
    match HASH4.get_ptr_mut(&key) {
        Some(counters) => add(counters, ctx.len()),
        // Full: such a counter does not even notice.
        None => drop(HASH4.insert(&key, &first(ctx.len()), 0)),
    }
    Some(())
}

#[inline(always)]
fn ipv6(ctx: &TcContext) -> Option<()> {
    let header: [u8; 8] = read(ctx, ETHERNET_HEADER)?;
    let protocol = header[6];
    if protocol != TCP && protocol != UDP {
        return Some(());
    }
    let key = Key6 {
        source: read(ctx, ETHERNET_HEADER + 8)?,
        destination: read(ctx, ETHERNET_HEADER + 24)?,
        ports: read(ctx, ETHERNET_HEADER + IPV6_HEADER)?,
        protocol: u32::from(protocol),
    };
    match HASH6.get_ptr_mut(&key) {
        Some(counters) => add(counters, ctx.len()),
        None => drop(HASH6.insert(&key, &first(ctx.len()), 0)),
    }
    Some(())
}

#[inline(always)]
fn first(bytes: u32) -> Counters {
    let now = now_ns();
    Counters { packets: 1, bytes: u64::from(bytes), first_ns: now, last_ns: now }
}

#[inline(always)]
fn add(counters: *mut Counters, bytes: u32) {
    // SAFETY: the map gave the pointer, and its entries stay readable and writable until the program ends.
    unsafe {
        lock_add(&raw mut (*counters).packets, 1);
        lock_add(&raw mut (*counters).bytes, u64::from(bytes));
        (*counters).last_ns = now_ns();
    }
}

#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// # Safety
/// `target` must point to an aligned, writable `u64` of a map value.
#[inline(always)]
unsafe fn lock_add(target: *mut u64, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("lock *(u64 *)({target} + 0) += {value}", target = in(reg) target, value = in(reg) value, options(nostack));
    }
}

/// Reads in place, as fast as it can be done.
#[inline(always)]
fn read<T: Copy>(ctx: &TcContext, offset: usize) -> Option<T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: inside the frame by the comparison above, which the verifier demands too. Only integers and arrays of
    // them are read.
    Some(unsafe { (start as *const T).read_unaligned() })
}
