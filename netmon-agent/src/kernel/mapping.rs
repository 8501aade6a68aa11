//! Maps of the kernel in the agent's memory: read and written without system calls.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering},
};

use aya::maps::MapData;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The values of an array map that may be mapped (`BPF_F_MMAPABLE`).
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: nothing but the address of memory that belongs to the process; it is read and written by atomics.
unsafe impl Send for Mapping {}

// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps all values.
    pub fn new(map: &MapData) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        let value = (info.value_size() as usize).next_multiple_of(8);
        let bytes = value * info.max_entries() as usize;
        Self::map(map.fd().as_fd(), bytes, ProtFlags::READ | ProtFlags::WRITE)
    }

    pub(super) fn map(fd: BorrowedFd<'_>, bytes: usize, access: ProtFlags) -> io::Result<Self> {
        let bytes = bytes.next_multiple_of(rustix::param::page_size());
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, fd, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, bytes })
    }

    /// Memory of nobody else's, all zeros, in a map's place.
    pub(super) fn blank(bytes: usize) -> io::Result<Self> {
        let memory = memfd_create("netmon", MemfdFlags::CLOEXEC)?;
        ftruncate(&memory, bytes as u64)?;
        Self::map(memory.as_fd(), bytes, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// The word of eight bytes with this number.
    pub fn word(&self, number: usize) -> &AtomicU64 {
        assert!(number < self.bytes / 8, "a word behind the end of a map");
        // SAFETY: inside of the mapping, which lives as long as `self`, and aligned, because it starts on a page.
        unsafe { self.start.cast::<AtomicU64>().add(number).as_ref() }
    }

    /// The word of four bytes with this number.
    pub fn half(&self, number: usize) -> &AtomicU32 {
        assert!(number < self.bytes / 4, "a word behind the end of a map");
        // SAFETY: as above.
        unsafe { self.start.cast::<AtomicU32>().add(number).as_ref() }
    }

    /// The word of two bytes with this number.
    pub fn quarter(&self, number: usize) -> &AtomicU16 {
        assert!(number < self.bytes / 2, "a word behind the end of a map");
        // SAFETY: as above.
        unsafe { self.start.cast::<AtomicU16>().add(number).as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and every reference into it lives shorter than `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// How far a ring buffer was written and read: bytes since its beginning, in the first two pages of its mapping (kernel 5.8,
/// kernel/bpf/ringbuf.c).
pub(super) struct RingPositions(Mapping);

impl RingPositions {
    /// Of a ring buffer map.
    pub fn new(ring: BorrowedFd<'_>) -> io::Result<Self> {
        Mapping::map(ring, 2 * rustix::param::page_size(), ProtFlags::READ).map(Self)
    }

    /// Everything in front of this was reserved, if not yet submitted.
    pub fn written(&self) -> u64 {
        self.0.word(rustix::param::page_size() / 8).load(Ordering::Acquire)
    }

    /// Everything in front of this was taken.
    pub fn taken(&self) -> u64 {
        self.0.word(0).load(Ordering::Acquire)
    }
}
