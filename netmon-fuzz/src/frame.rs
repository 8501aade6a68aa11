//! What [`crate::parse`] takes from netmon-ebpf's `frame.rs`, for the host: a frame is a slice, and every read is checked
//! as the kernel's verifier would.

use std::cell::RefCell;

/// A frame at a hook.
pub trait Frame {
    /// Bytes of the frame, link-layer header included.
    fn len(&self) -> u32;
    /// `N` bytes from `offset` on, or `None` when the frame ends before.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Frame for &[u8] {
    fn len(&self) -> u32 {
        <[u8]>::len(self) as u32
    }

    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(offset as usize..)?.first_chunk().copied()
    }
}

/// Where the linear part seems to start.
pub(crate) const START: usize = 0x1000;

thread_local! {
    static LINEAR: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// This is the frame's linear part from now on. Returns where it ends.
pub(crate) fn set_linear(bytes: &[u8]) -> usize {
    LINEAR.with_borrow_mut(|linear| {
        linear.clear();
        linear.extend_from_slice(bytes);
    });
    START + bytes.len()
}

/// `N` bytes of the linear part, in the order of memory; panics behind its end.
pub(crate) fn at<const N: usize>(address: usize) -> [u8; N] {
    LINEAR.with_borrow(|linear| {
        let offset = address.checked_sub(START).expect("a read in front of the frame");
        let bytes = linear.get(offset..).and_then(|rest| rest.first_chunk());
        *bytes.unwrap_or_else(|| panic!("{N} bytes at {offset} are behind the end, {}", linear.len()))
    })
}

/// A load of a fixed width from a packet, at `$at + $offset`.
macro_rules! load {
    ("u8", $at:expr, $offset:expr) => {
        u64::from(u8::from_ne_bytes(crate::frame::at($at + $offset)))
    };
    ("u16", $at:expr, $offset:expr) => {
        u64::from(u16::from_ne_bytes(crate::frame::at($at + $offset)))
    };
    ("u32", $at:expr, $offset:expr) => {
        u64::from(u32::from_ne_bytes(crate::frame::at($at + $offset)))
    };
    ("u64", $at:expr, $offset:expr) => {
        u64::from_ne_bytes(crate::frame::at($at + $offset))
    };
}
pub(crate) use load;

/// 1 or 0.
pub fn not_zero(value: u16) -> u32 {
    u32::from(value != 0)
}
