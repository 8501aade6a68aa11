//! What differs between the two tables: keys, slots, hashes.

use netmon_common::abi::{Counts, HASH_KEYS, Life, Ports, Slot4, Slot6};

use crate::{
    classify::{self, Class},
    flow::Direction,
    maps::{TABLE4, TABLE6},
};

/// A slot's parts. Only the places: reading and writing them is the caller's.
pub trait Slot {
    /// Ports, protocol, flags.
    fn ports(slot: *mut Self) -> *mut Ports;
    /// Counters.
    fn counts(slot: *mut Self) -> *mut Counts;
    /// Beginning, and what was read.
    fn life(slot: *mut Self) -> *mut Life;
}

macro_rules! slot {
    ($slot:ty) => {
        impl Slot for $slot {
            #[inline(always)]
            fn ports(slot: *mut Self) -> *mut Ports {
                // SAFETY: a place in the slot, computed and not read.
                unsafe { &raw mut (*slot).ports }
            }

            #[inline(always)]
            fn counts(slot: *mut Self) -> *mut Counts {
                // SAFETY: as above.
                unsafe { &raw mut (*slot).counts }
            }

            #[inline(always)]
            fn life(slot: *mut Self) -> *mut Life {
                // SAFETY: as above.
                unsafe { &raw mut (*slot).life }
            }
        }
    };
}
slot!(Slot4);
slot!(Slot6);

/// A flow's key.
pub trait Key: Copy {
    /// Its slot.
    type Slot: Slot;
    /// 4 or 6.
    const FAMILY: u32;
    /// Which table's regions: 0 or 1.
    const FIRST_REGION: u32;

    /// The set with this number, as a pointer to its first slot.
    fn set(index: u32) -> Option<*mut Self::Slot>;
    /// A number that is spread evenly, and that nobody can foretell who does not know the random `keys`; see
    /// [`product`].
    fn hash(&self, keys: &[u64; HASH_KEYS]) -> u32;
    /// Is the slot this flow's? An empty slot has protocol 0, so it is nobody's.
    fn is_in(&self, slot: *mut Self::Slot) -> bool;
    /// Writes the key; what stands behind the protocol in its word becomes 0.
    ///
    /// # Safety
    /// `slot` must be a slot of this CPU.
    unsafe fn write_to(&self, slot: *mut Self::Slot);
    /// Writes the addresses, IPv4 in the first four bytes.
    ///
    /// # Safety
    /// Both must have room for sixteen aligned bytes.
    unsafe fn write_addresses(&self, local: *mut u64, remote: *mut u64);
    /// Looks the counterpart up in the tries.
    fn classify(&self, group_frame: bool) -> Class;
}

/// A word's part of the hash; the upper half of the sum of all is the hash. Each half of the word meets a random number
/// of its own, one multiplication for both ("Multilinear-HM" of Lemire and Kaser, Strongly universal string hashing is
/// fast, 2014). The lower half is not cut out of the word: what that adds depends on the upper half and `second` alone, so
/// two words that differ still differ by `first` or `second` times something that is not 0.
#[inline(always)]
fn product(word: u64, first: u64, second: u64) -> u64 {
    word.wrapping_add(first).wrapping_mul((word >> 32).wrapping_add(second))
}

/// Local and remote port as they are in [`Ports`], and the protocol in the byte behind: the part of that word that is
/// compared.
#[derive(Clone, Copy)]
struct PortsWord(u64);

impl PortsWord {
    const COMPARED: u64 = 0xff_ffff_ffff;

    /// Of the source port in the upper and the destination port in the lower half.
    #[inline(always)]
    fn new(ports: u32, protocol: u8, direction: Direction) -> Self {
        let ports = match direction {
            Direction::Sent => ports.rotate_left(16),
            Direction::Received => ports,
        };
        Self(u64::from(ports) | u64::from(protocol) << 32)
    }

    #[inline(always)]
    fn is_in<S: Slot>(self, slot: *mut S) -> bool {
        // SAFETY: the caller's slot; the word is aligned.
        let word = unsafe { S::ports(slot).cast::<u64>().read() };
        word & Self::COMPARED == self.0
    }

    /// # Safety
    /// `slot` must be a slot of this CPU.
    #[inline(always)]
    unsafe fn write_to<S: Slot>(self, slot: *mut S) {
        // SAFETY: the caller's promise; the word is aligned.
        unsafe { S::ports(slot).cast::<u64>().write(self.0) };
    }
}

/// Key of an IPv4 flow.
#[derive(Clone, Copy)]
pub struct Key4 {
    /// Local address in the lower, remote address in the upper half, each as in memory.
    addresses: u64,
    ports: PortsWord,
}

impl Key4 {
    /// Of a packet's numbers, as in [`crate::parse::Plain`].
    #[inline(always)]
    pub fn new(addresses: u64, ports: u32, protocol: u8, direction: Direction) -> Self {
        let addresses = match direction {
            Direction::Sent => addresses,
            Direction::Received => addresses.rotate_left(32),
        };
        Self { addresses, ports: PortsWord::new(ports, protocol, direction) }
    }
}

impl Key for Key4 {
    type Slot = Slot4;
    const FAMILY: u32 = 4;
    const FIRST_REGION: u32 = 0;

    #[inline(always)]
    fn set(index: u32) -> Option<*mut Slot4> {
        TABLE4.get_ptr_mut(index).map(|set| set.cast())
    }

    #[inline(always)]
    fn hash(&self, keys: &[u64; HASH_KEYS]) -> u32 {
        let sum =
            product(self.addresses, keys[0], keys[1]).wrapping_add(product(self.ports.0, keys[2], keys[3]));
        (sum >> 32) as u32
    }

    #[inline(always)]
    fn is_in(&self, slot: *mut Slot4) -> bool {
        // SAFETY: a slot's first eight bytes are its addresses.
        let addresses = unsafe { slot.cast::<u64>().read() };
        addresses == self.addresses && self.ports.is_in(slot)
    }

    #[inline(always)]
    unsafe fn write_to(&self, slot: *mut Slot4) {
        // SAFETY: the caller's promise, and as above.
        unsafe {
            slot.cast::<u64>().write(self.addresses);
            self.ports.write_to(slot);
        }
    }

    #[inline(always)]
    unsafe fn write_addresses(&self, local: *mut u64, remote: *mut u64) {
        // SAFETY: the caller's promise.
        unsafe {
            local.write(self.addresses & 0xffff_ffff);
            local.add(1).write(0);
            remote.write(self.addresses >> 32);
            remote.add(1).write(0);
        }
    }

    #[inline(always)]
    fn classify(&self, group_frame: bool) -> Class {
        classify::ipv4(self.addresses as u32, (self.addresses >> 32) as u32, group_frame)
    }
}

/// Key of an IPv6 flow: words as in memory.
#[derive(Clone, Copy)]
pub struct Key6 {
    local: [u64; 2],
    remote: [u64; 2],
    ports: PortsWord,
}

impl Key6 {
    /// Of a packet's numbers, as in [`crate::parse::Plain`].
    #[inline(always)]
    pub fn new(addresses: [u64; 4], ports: u32, protocol: u8, direction: Direction) -> Self {
        let [a, b, c, d] = addresses;
        let (local, remote) = match direction {
            Direction::Sent => ([a, b], [c, d]),
            Direction::Received => ([c, d], [a, b]),
        };
        Self { local, remote, ports: PortsWord::new(ports, protocol, direction) }
    }
}

impl Key for Key6 {
    type Slot = Slot6;
    const FAMILY: u32 = 6;
    const FIRST_REGION: u32 = 1;

    #[inline(always)]
    fn set(index: u32) -> Option<*mut Slot6> {
        TABLE6.get_ptr_mut(index).map(|set| set.cast())
    }

    #[inline(always)]
    fn hash(&self, keys: &[u64; HASH_KEYS]) -> u32 {
        let sum = product(self.local[0], keys[0], keys[1])
            .wrapping_add(product(self.local[1], keys[2], keys[3]))
            .wrapping_add(product(self.remote[0], keys[4], keys[5]))
            .wrapping_add(product(self.remote[1], keys[6], keys[7]))
            .wrapping_add(product(self.ports.0, keys[8], keys[9]));
        (sum >> 32) as u32
    }

    #[inline(always)]
    fn is_in(&self, slot: *mut Slot6) -> bool {
        // SAFETY: a slot's first 32 bytes are its addresses.
        let [a, b, c, d] = unsafe { slot.cast::<[u64; 4]>().read() };
        let different =
            (a ^ self.local[0]) | (b ^ self.local[1]) | (c ^ self.remote[0]) | (d ^ self.remote[1]);
        different == 0 && self.ports.is_in(slot)
    }

    #[inline(always)]
    unsafe fn write_to(&self, slot: *mut Slot6) {
        // SAFETY: the caller's promise, and as above.
        unsafe {
            let words = slot.cast::<u64>();
            self.write_addresses(words, words.add(2));
            self.ports.write_to(slot);
        }
    }

    #[inline(always)]
    unsafe fn write_addresses(&self, local: *mut u64, remote: *mut u64) {
        // SAFETY: the caller's promise.
        unsafe {
            local.write(self.local[0]);
            local.add(1).write(self.local[1]);
            remote.write(self.remote[0]);
            remote.add(1).write(self.remote[1]);
        }
    }

    #[inline(always)]
    fn classify(&self, group_frame: bool) -> Class {
        classify::ipv6(&self.local, &self.remote, group_frame)
    }
}

/// An address as in memory.
#[inline(always)]
pub fn bytes(words: [u64; 2]) -> [u8; 16] {
    // SAFETY: sixteen bytes, and every pattern is a value.
    unsafe { core::mem::transmute(words) }
}
