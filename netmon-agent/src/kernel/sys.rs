//! The commands of bpf(2) that aya does not offer: two for hash maps, and which programs hang on an interface (aya
//! opens each of them by its number, which takes CAP_SYS_ADMIN).

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd as _},
};

use aya::Pod;

/// `BPF_MAP_LOOKUP_AND_DELETE_ELEM`; for hash maps since kernel 5.14.
const LOOKUP_AND_DELETE: libc::c_long = 21;
/// `BPF_MAP_LOOKUP_BATCH`; kernel 5.6.
const LOOKUP_BATCH: libc::c_long = 24;

/// `BPF_PROG_QUERY`; TCX answers it since kernel 6.6.
const PROG_QUERY: libc::c_long = 16;
/// `BPF_TCX_INGRESS`
const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`
const TCX_EGRESS: u32 = 47;
/// `BPF_MPROG_MAX` of kernel/bpf/mprog.c: no hook has more programs.
const MPROG_MAX: usize = 64;

/// Entries asked for at once: some 130 KiB of buffers.
const BATCH: usize = 1024;

/// The part of `union bpf_attr` for commands on one element.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The part of `union bpf_attr` for batches.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The part of `union bpf_attr` for `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Kernel's numbers of the programs on an interface's TCX hook; none when the interface has gone.
pub(super) fn tcx_programs(ifindex: u32, egress: bool) -> io::Result<Vec<u32>> {
    let mut numbers = [0_u32; MPROG_MAX];
    let mut attr = QueryAttr {
        target_ifindex: ifindex,
        attach_type: if egress { TCX_EGRESS } else { TCX_INGRESS },
        prog_ids: numbers.as_mut_ptr() as u64,
        count: MPROG_MAX as u32,
        ..QueryAttr::default()
    };
    // SAFETY: `attr` has the layout of linux/bpf.h and its length is given; `numbers` has room for `count` numbers,
    // and the other arrays are not asked for (null).
    let result = unsafe { libc::syscall(libc::SYS_bpf, PROG_QUERY, &raw mut attr, size_of::<QueryAttr>()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        let none = matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV));
        return if none { Ok(Vec::new()) } else { Err(error) };
    }
    Ok(numbers.into_iter().take(attr.count as usize).collect())
}

/// Appends all entries of a hash map. An entry that is there all the while is read exactly once.
pub(super) fn read_all<K: Pod, V: Pod>(map: impl AsFd, out: &mut Vec<(K, V)>) -> io::Result<()> {
    let map_fd = map.as_fd().as_raw_fd().cast_unsigned();
    let mut size = BATCH;
    let mut keys = Vec::<MaybeUninit<K>>::with_capacity(size);
    let mut values = Vec::<MaybeUninit<V>>::with_capacity(size);
    // Opaque to us; hash maps keep the number of the next bucket in four bytes.
    let mut position = 0_u32;
    let mut started = false;
    loop {
        keys.reserve(size);
        values.reserve(size);
        let mut attr = BatchAttr {
            in_batch: if started { (&raw const position) as u64 } else { 0 },
            out_batch: (&raw mut position) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: size as u32,
            map_fd,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: `attr` has the layout of linux/bpf.h and its length is given; the buffers hold `count` keys and
        // values of the map's sizes (`K` and `V` are the map's types, checked by aya when it was opened), and
        // `position` has the four bytes that a hash map writes.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut attr, size_of::<BatchAttr>()) };
        let error = (result < 0).then(io::Error::last_os_error);
        let finished = match error.as_ref().map(io::Error::raw_os_error) {
            None => false,
            // No bucket is left; the last entries are in the buffers.
            Some(Some(libc::ENOENT)) => true,
            // A bucket has more entries than fit: nothing was read, ask again with more room.
            Some(Some(libc::ENOSPC)) => {
                size *= 2;
                continue;
            }
            Some(Some(libc::EINTR)) => continue,
            Some(_) => return Err(error.unwrap_or_else(io::Error::last_os_error)),
        };
        let count = (attr.count as usize).min(size);
        // SAFETY: the kernel has written `count` keys and values, at most `size`, the capacity; both are `Pod`.
        unsafe {
            let keys = keys.as_ptr().cast::<K>();
            let values = values.as_ptr().cast::<V>();
            out.extend((0..count).map(|index| (*keys.add(index), *values.add(index))));
        }
        if finished {
            return Ok(());
        }
        started = true;
    }
}

/// Reads an entry of a hash map and removes it in one step. `None`: it is not there.
///
/// # Errors
/// `EINVAL` or 524 (`ENOTSUPP`) on kernels that cannot do it with hash maps.
pub(super) fn take<K: Pod, V: Pod>(map: impl AsFd, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::zeroed();
    let mut attr = ElementAttr {
        map_fd: map.as_fd().as_raw_fd().cast_unsigned(),
        pad: 0,
        key: std::ptr::from_ref(key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: as above; `key` and `value` have the map's sizes.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_AND_DELETE, &raw mut attr, size_of::<ElementAttr>()) };
    if result == 0 {
        // SAFETY: zeroed, and written by the kernel; every byte pattern of a `Pod` is a value.
        return Ok(Some(unsafe { value.assume_init() }));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) }
}
