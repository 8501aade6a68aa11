//! Is this a kernel and a process that can watch? Asked before anything is touched.

use std::{fs, io, path::Path};

use rustix::{
    fs::{Mode, mkdirat, statfs},
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
    thread::{CapabilitySet, capabilities},
};

use super::KernelError;

/// The oldest kernel: `bpf_ktime_get_boot_ns` and the ring buffer are of 5.8, bpf links of XDP of 5.9, and 5.10
/// is the long-term kernel behind them. The kernel's own BTF is not needed: nothing is relocated against it.
const OLDEST: (u32, u32) = (5, 10);

/// Where distributions mount the BPF file system, and the only place where the agent would do so.
const BPFFS: &str = "/sys/fs/bpf";

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// What it takes to load the programs and read their maps (CAP_BPF), to have the verifier let them read packets
/// directly (CAP_PERFMON), and to attach them (CAP_NET_ADMIN).
pub const CAPABILITIES: CapabilitySet =
    CapabilitySet::BPF.union(CapabilitySet::PERFMON).union(CapabilitySet::NET_ADMIN);

/// Checks kernel and privileges.
///
/// # Errors
/// [`KernelError::KernelTooOld`], [`KernelError::UnknownRelease`], [`KernelError::NotPermitted`].
pub fn check() -> Result<(), KernelError> {
    check_release(&rustix::system::uname().release().to_string_lossy())?;
    let effective =
        capabilities(None).map_err(|source| KernelError::UnknownCapabilities(source.into()))?.effective;
    check_capabilities(effective)
}

fn check_release(release: &str) -> Result<(), KernelError> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Err(KernelError::UnknownRelease { release: release.to_owned() });
    };
    if (major, minor) < OLDEST {
        return Err(KernelError::KernelTooOld { release: release.to_owned() });
    }
    Ok(())
}

fn check_capabilities(effective: CapabilitySet) -> Result<(), KernelError> {
    let needed = [
        ("CAP_BPF", CapabilitySet::BPF),
        ("CAP_PERFMON", CapabilitySet::PERFMON),
        ("CAP_NET_ADMIN", CapabilitySet::NET_ADMIN),
    ];
    // CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON (capabilities(7)).
    let admin = effective.contains(CapabilitySet::SYS_ADMIN);
    let has = |set| effective.contains(set) || (admin && set != CapabilitySet::NET_ADMIN);
    let missing: Vec<_> = needed.iter().filter(|(_, set)| !has(*set)).map(|(name, _)| *name).collect();
    if missing.is_empty() { Ok(()) } else { Err(KernelError::NotPermitted { missing: missing.join(", ") }) }
}

/// Lifts the limit of locked memory. Kernels before 5.11 count maps (some 25 MiB) against it, newer ones do not: a
/// failure shows, if at all, when the maps are made.
pub(super) fn allow_locked_memory() {
    let unlimited = Rlimit { current: None, maximum: None };
    if let Err(error) = setrlimit(Resource::Memlock, unlimited) {
        tracing::debug!(%error, "cannot lift the limit of locked memory");
    }
}

/// Does what takes more privileges than watching: mounts the BPF file system where there is none, and lifts the limit of
/// locked memory. For who gives these privileges up before [`super::Kernel::load`], which tells of what failed here.
pub fn prepare() {
    if let Err(error) = mount_bpffs(Path::new(BPFFS)) {
        tracing::debug!(error = &error as &dyn std::error::Error, "cannot mount the BPF file system");
    }
    allow_locked_memory();
    allow_priority();
}

/// To a thread that asks for it: the limit is 20 less that (getrlimit(2)).
fn allow_priority() {
    let limit = Rlimit { current: Some(35), maximum: Some(35) };
    if let Err(error) = setrlimit(Resource::Nice, limit) {
        tracing::debug!(%error, "cannot allow threads more priority");
    }
}

/// Makes the directory for the pins, for root's eyes only, and removes the pins of an agent that died.
///
/// Whether another agent is alive cannot be told from its pins: the caller holds a lock file.
pub(super) fn prepare_pin_directory(directory: &Path) -> Result<(), KernelError> {
    mount_bpffs(directory.parent().unwrap_or(Path::new("/")))?;
    let failed = |action, path: &Path, source: io::Error| KernelError::PinDirectory {
        action,
        path: path.to_owned(),
        source,
    };
    match mkdirat(rustix::fs::CWD, directory, Mode::RWXU) {
        Err(source) if source != rustix::io::Errno::EXIST => {
            return Err(failed("make the directory", directory, source.into()));
        }
        _ => {}
    }
    rustix::fs::chmod(directory, Mode::RWXU)
        .map_err(|source| failed("restrict the directory", directory, source.into()))?;
    remove_pins(directory)
}

/// Mounts the BPF file system, if it is not there and this is where it belongs.
fn mount_bpffs(path: &Path) -> Result<(), KernelError> {
    if is_bpffs(path) {
        return Ok(());
    }
    let no_bpffs = |source| KernelError::NoBpffs { path: path.to_owned(), source };
    if path != Path::new(BPFFS) {
        return Err(no_bpffs(None));
    }
    mount("bpf", BPFFS, "bpf", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)
        .map_err(|source| no_bpffs(Some(source.into())))
}

/// Removes our pins (`nm_…`) from the directory.
pub(super) fn remove_pins(directory: &Path) -> Result<(), KernelError> {
    let failed = |path: &Path, source| KernelError::PinDirectory {
        action: "remove the pins in",
        path: path.to_owned(),
        source,
    };
    for entry in fs::read_dir(directory).map_err(|source| failed(directory, source))? {
        let entry = entry.map_err(|source| failed(directory, source))?;
        if entry.file_name().as_encoded_bytes().starts_with(b"nm_") {
            fs::remove_file(entry.path()).map_err(|source| failed(&entry.path(), source))?;
        }
    }
    Ok(())
}

fn is_bpffs(path: &Path) -> bool {
    #[expect(clippy::unnecessary_cast, reason = "the type of f_type differs between architectures")]
    statfs(path).is_ok_and(|found| found.f_type as i64 == BPF_FS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_5_10_are_refused_with_their_release() {
        for good in ["5.10.0-30-amd64", "5.10", "6.18.44-fc-v657", "10.0.1"] {
            assert!(check_release(good).is_ok(), "{good}");
        }
        for old in ["5.9.16", "4.19.0-27-amd64", "5.4.0"] {
            let error = check_release(old).unwrap_err().to_string();
            let begin = format!(
                "kernel {old} is too old: netmon needs Linux 5.10 or newer. The agent does not start"
            );
            assert!(error.starts_with(&begin), "{error}");
        }
        for odd in ["", "six", "6"] {
            assert!(matches!(check_release(odd), Err(KernelError::UnknownRelease { .. })), "{odd}");
        }
    }

    #[test]
    fn missing_capabilities_are_named() {
        let all = CapabilitySet::BPF | CapabilitySet::PERFMON | CapabilitySet::NET_ADMIN;
        assert!(check_capabilities(all).is_ok());
        assert!(check_capabilities(CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN).is_ok());
        let missing = |set| match check_capabilities(set) {
            Err(KernelError::NotPermitted { missing }) => missing,
            other => panic!("{other:?}"),
        };
        assert_eq!(missing(CapabilitySet::empty()), "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN");
        assert_eq!(missing(CapabilitySet::SYS_ADMIN), "CAP_NET_ADMIN");
        assert_eq!(missing(all - CapabilitySet::PERFMON), "CAP_PERFMON");
    }

    #[test]
    fn a_pin_directory_outside_a_bpf_file_system_is_refused_with_the_command() {
        let directory = tempfile::tempdir().unwrap();
        let error = prepare_pin_directory(&directory.path().join("netmon")).unwrap_err();
        let path = directory.path().display();
        assert_eq!(error.to_string(), format!("no BPF file system at {path}. Run: mount -t bpf bpf {path}"));
    }
}
