//! What can go wrong at the kernel's border, one variant per failed action, each with what to do.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, pin::PinError, programs::ProgramError};
use netmon_common::raw::Escaped;

/// An action at the kernel's border that failed. The cause is in `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// Capabilities are missing.
    #[error(
        "missing privileges: {missing}. Run as root; where root is restricted, allow CAP_BPF, CAP_PERFMON and \
         CAP_NET_ADMIN (systemd: CapabilityBoundingSet=, containers: --cap-add)"
    )]
    NotPermitted {
        /// The missing capabilities.
        missing: String,
    },
    /// Our own capabilities could not be read.
    #[error("cannot read the capabilities of this process")]
    UnknownCapabilities(#[source] io::Error),
    /// The kernel lacks something that the programs need.
    #[error(
        "kernel {release} is too old: netmon needs Linux 5.10 or newer. The agent does not start here, so nothing is recorded on this PC, neither transfers nor USB devices; enrolment, `doctor` and what was recorded before work"
    )]
    KernelTooOld {
        /// What `uname -r` says.
        release: String,
    },
    /// `uname -r` does not start with a version.
    #[error("cannot read a version in the kernel's release `{release}`; netmon needs Linux 5.10 or newer")]
    UnknownRelease {
        /// What `uname -r` says.
        release: String,
    },
    /// There is no BPF file system where the pins should go, and we could not mount one.
    #[error("no BPF file system at {path}. Run: mount -t bpf bpf {path}")]
    NoBpffs {
        /// Where it should be.
        path: PathBuf,
        /// Why the agent did not mount it; `None` when it only mounts at /sys/fs/bpf.
        source: Option<io::Error>,
    },
    /// The directory for the pins cannot be made, emptied or removed.
    #[error("cannot {action} {path}")]
    PinDirectory {
        /// What was tried.
        action: &'static str,
        /// The directory or the pin in it.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A pin could not be made.
    #[error("cannot pin {name} in {directory}")]
    Pin {
        /// Map or program.
        name: &'static str,
        /// Where.
        directory: PathBuf,
        /// Why not.
        source: PinError,
    },
    /// The object could not be loaded (maps created, programs relocated).
    #[error(
        "cannot load the kernel programs; is the limit of locked memory (ulimit -l) too low, or BPF locked down?"
    )]
    Load(#[source] Box<EbpfError>),
    /// The kernel refused a program.
    #[error("the kernel refused the program {name}")]
    LoadProgram {
        /// Program.
        name: &'static str,
        /// The verifier's words.
        source: Box<ProgramError>,
    },
    /// The object does not hold what `netmon_common::abi` names: agent and object are of different builds.
    #[error("the embedded kernel object has no {name}: rebuild with `cargo xtask build-ebpf`")]
    Missing {
        /// Map or program.
        name: &'static str,
    },
    /// A map could not be opened as what it should be, read or written.
    #[error("cannot {action} the map {name}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// Map.
        name: &'static str,
        /// Why not.
        source: Box<MapError>,
    },
    /// A map's memory could not be mapped.
    #[error("cannot map the memory of {name}")]
    MapMemory {
        /// Map.
        name: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The programs' words could not be listened to.
    #[error("cannot listen to what the kernel programs say of themselves")]
    Words(#[source] Box<aya_log::Error>),
    /// The kernel did not say how many CPUs there can be.
    #[error("cannot tell how many CPUs there can be from {file}")]
    Cpus {
        /// Where that stands.
        file: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// No random numbers.
    #[error("the kernel gave no random numbers for the flow tables' hash")]
    Random(#[source] getrandom::Error),
    /// More prefixes than a trie holds.
    #[error("{count} {what} prefixes of one family, but at most {limit} fit")]
    TooManyPrefixes {
        /// `private` or `muted`.
        what: &'static str,
        /// How many were given.
        count: usize,
        /// How many fit.
        limit: usize,
    },
    /// There is no such interface (any more).
    #[error("no network interface with index {ifindex}")]
    NoSuchInterface {
        /// Kernel's index.
        ifindex: u32,
    },
    /// The interface carries neither Ethernet nor bare IP.
    #[error(
        "interface {} carries frames of link type {link_type} (ARPHRD), which netmon does not read",
        Escaped(.interface.as_bytes())
    )]
    UnsupportedLink {
        /// Name.
        interface: String,
        /// `ARPHRD_` number.
        link_type: u16,
    },
    /// Only one XDP program fits on an interface.
    #[error(
        "interface {} already has an XDP program; remove it or use the TC mode",
        Escaped(.interface.as_bytes())
    )]
    XdpBusy {
        /// Name.
        interface: String,
    },
    /// A program could not be attached.
    #[error("cannot attach {program} to interface {}", Escaped(.interface.as_bytes()))]
    Attach {
        /// Program.
        program: &'static str,
        /// Name.
        interface: String,
        /// Why not.
        source: Box<ProgramError>,
    },
    /// The filters that a dead agent left could not be looked for or removed.
    #[error(
        "cannot remove the filters that an earlier agent left on interface {}",
        Escaped(.interface.as_bytes())
    )]
    StaleFilters {
        /// Name.
        interface: String,
        /// Why not.
        source: Box<ProgramError>,
    },
    /// The kernel did not tell which programs hang on an interface.
    #[error("cannot list the programs on interface {}", Escaped(.interface.as_bytes()))]
    ListPrograms {
        /// Name.
        interface: String,
        /// Why not.
        source: io::Error,
    },
    /// The kernel did not answer a question about an interface.
    #[error("netlink: cannot {action}")]
    Netlink {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_interface_name_cannot_steer_a_terminal() {
        let error = KernelError::XdpBusy { interface: "v\x1b[2J".to_owned() };
        assert_eq!(
            error.to_string(),
            r"interface v\u{1b}[2J already has an XDP program; remove it or use the TC mode"
        );
    }
}
