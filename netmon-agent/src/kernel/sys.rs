//! The command of bpf(2) that aya offers only to who may open programs by their number (CAP_SYS_ADMIN): which programs
//! hang on an interface.

use std::io;

/// `BPF_PROG_QUERY`; TCX answers it since kernel 6.6.
const PROG_QUERY: libc::c_long = 16;
/// `BPF_TCX_INGRESS`
const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`
const TCX_EGRESS: u32 = 47;
/// `BPF_MPROG_MAX` of kernel/bpf/mprog.c: no hook has more programs.
const MPROG_MAX: usize = 64;

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
