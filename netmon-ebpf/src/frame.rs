//! One way to read what a hook sees.

use core::arch::asm;

use aya_ebpf::programs::{TcContext, XdpContext};

/// Highest offset that is read; the verifier wants a bound, and headers end long before it.
const MAX_OFFSET: u32 = 0x3fff;

/// A frame at a hook.
pub trait Frame {
    /// Bytes of the frame, link-layer header included.
    fn len(&self) -> u32;
    /// Interface that the frame arrives at or leaves by.
    fn ifindex(&self) -> u32;
    /// Packets on the wire: above 1 for a GSO or GRO super-packet. The lengths are those of [`crate::parse::Measure`].
    fn segments(&self, l3_bytes: u32, payload: u32) -> u32;
    /// Where the frame's linear part starts and ends: its headers, nearly always. A program may read there as far as it
    /// has compared with the end.
    fn linear(&self) -> (usize, usize);
    /// `N` bytes from `offset` on, or `None` when the frame ends before.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

/// A load of a fixed width from a packet, at `$at + $offset`: the compiler would read a number that may be unaligned byte
/// by byte, and the kernel refuses unaligned loads only on machines that cannot do them.
macro_rules! load {
    ($width:literal, $at:expr, $offset:expr) => {{
        let value: u64;
        // SAFETY: the verifier refuses a load outside of what was compared with the packet's end.
        unsafe {
            core::arch::asm!(
                concat!("{value} = *(", $width, " *)({at} + {offset})"),
                value = lateout(reg) value,
                at = in(reg) $at,
                offset = const $offset,
                options(nostack, readonly, preserves_flags)
            );
        }
        value
    }};
}
pub(crate) use load;

/// 1 or 0, without a branch.
#[inline(always)]
pub fn not_zero(value: u16) -> u32 {
    let mut result = u64::from(value);
    // SAFETY: arithmetic: the sign bit of the negated value. Written out, or the compiler makes a branch of it.
    unsafe { asm!("{value} = -{value}", "{value} >>= 63", value = inout(reg) result) };
    result as u32
}

/// A frame in a TC program. Its data may be spread over pages, so it is read by helper.
pub struct SkbFrame<'a>(pub &'a TcContext);

impl Frame for SkbFrame<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the kernel hands a valid context to the program; the verifier checks the access.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    fn segments(&self, l3_bytes: u32, payload: u32) -> u32 {
        /// Longer packets than Ethernet's are few, or super-packets.
        const ETHERNET_MTU: u32 = 1500;
        // SAFETY: as above.
        let segments = unsafe { (*self.0.skb.skb).gso_segs };
        if segments != 0 {
            return segments;
        }
        if l3_bytes <= ETHERNET_MTU {
            return 1;
        }
        // Virtual devices (virtio-net, tap) tell the segments' size, and leave their number to whoever needs it.
        // SAFETY: as above.
        match unsafe { (*self.0.skb.skb).gso_size } {
            0 => 1,
            size => payload.div_ceil(size).max(1),
        }
    }

    #[inline(always)]
    fn linear(&self) -> (usize, usize) {
        (self.0.data(), self.0.data_end())
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.load(offset as usize).ok()
    }
}

/// A frame in an XDP program: linear, read in place. It does not tell its segments (generic XDP may see a GSO
/// super-packet of a virtual link, which then counts as one).
pub struct XdpFrame<'a>(pub &'a XdpContext);

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        let mut length = self.0.data_end();
        // SAFETY: a subtraction. Written out, because the compiler would compute it in 32 bits, and the verifier
        // allows no other arithmetic on these two pointers than their difference in 64.
        unsafe { asm!("{length} -= {start}", length = inout(reg) length, start = in(reg) self.0.data()) };
        length as u32
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.0.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn segments(&self, _l3_bytes: u32, _payload: u32) -> u32 {
        1
    }

    #[inline(always)]
    fn linear(&self) -> (usize, usize) {
        (self.0.data(), self.0.data_end())
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        let mut offset = offset as usize;
        // SAFETY: changes nothing after the comparison above. The compiler may make that one of other values than
        // these; here the verifier sees the bound of the very register that is added.
        unsafe { asm!("{offset} &= 0x3fff", offset = inout(reg) offset) };
        let start = self.0.data() + offset;
        if start + N > self.0.data_end() {
            return None;
        }
        // SAFETY: `start .. start + N` lies inside the frame by the comparison above, which the verifier demands
        // too; `read_unaligned` of bytes needs no alignment.
        Some(unsafe { (start as *const [u8; N]).read_unaligned() })
    }
}
