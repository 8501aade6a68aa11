//! The border between the packet source and whoever drives it: plain numbers with a fixed layout, and which flow a
//! number stands for. The benchmark includes this file, too.

/// Names of the maps.
pub mod maps {
    /// Hash map of the reference program, IPv4. Its size is the driver's to choose.
    pub const HASH4: &str = "ref_hash4";
    /// Hash map of the reference program, IPv6.
    pub const HASH6: &str = "ref_hash6";
    /// Array of [`super::Chunk`]: the numbers of the flows in the order in which they are sent.
    pub const ORDER: &str = "ref_order";
    /// Array with one [`super::Source`].
    pub const SOURCE: &str = "ref_source";
}

/// Names of the programs.
pub mod programs {
    /// TC: lets every frame pass, does nothing.
    pub const EMPTY: &str = "ref_empty";
    /// TC: counts flows in a shared hash map.
    pub const HASH: &str = "ref_hash";
    /// XDP: lets every frame pass, does nothing.
    pub const XDP_EMPTY: &str = "ref_xdp_empty";
    /// XDP: writes the next flow into a frame and sends it through an interface.
    pub const SOURCE: &str = "ref_source_xdp";
}

/// Flow numbers in one entry of the order.
pub const CHUNK: usize = 1024;
/// One entry of the order.
pub type Chunk = [u32; CHUNK];
/// Entries that the order has at most: 4 Mi flow numbers.
pub const MAX_CHUNKS: usize = 4096;

/// What the driver tells the packet source, and how far that is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Frames made so far.
    pub next: u64,
    /// Interface through which the frames leave.
    pub ifindex: u32,
    /// Length of the order, a power of two, minus one.
    pub mask: u32,
    /// 4 or 6.
    pub family: u32,
    /// IPv4: sum of the header's 16-bit words without checksum and source address (RFC 1071). Else 0.
    pub header_sum: u32,
}

const _: () = assert!(size_of::<Source>() == 24);

/// Source addresses of IPv4 flows: 198.18.0.0/15, which is set aside for benchmarks (RFC 2544, C.2.2).
pub const BASE4: u32 = 0xc612_0000;
/// Bits of a flow's number that are in its source address; the others are in its source port.
pub const ADDRESS_BITS: u32 = 17;
/// Lowest source port. Far from the ports that mean something.
pub const BASE_PORT: u16 = 20_000;
/// Flows that can be told apart: 8 Mi.
pub const MAX_FLOWS: u32 = 1 << (ADDRESS_BITS + 6);

/// What of a flow's number is in its source address. IPv4: added to [`BASE4`]; IPv6: the last 32 bits.
#[inline(always)]
pub const fn address_part(flow: u32) -> u32 {
    flow & ((1 << ADDRESS_BITS) - 1)
}

/// A flow's source port.
#[inline(always)]
pub const fn source_port(flow: u32) -> u16 {
    BASE_PORT + ((flow >> ADDRESS_BITS) & 0x3f) as u16
}
