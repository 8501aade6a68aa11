//! What a fresh machine needs, installed once.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{ebpf, sh};

/// Debian packages that building and running takes, beside what [`ebpf`] installs.
const BUILD: [&str; 4] = ["gcc", "libc6-dev", "pkg-config", "libudev-dev"];
/// Debian packages that the unprivileged tests take: systemd's tools judge the units in `deploy`.
const UNIT: [&str; 1] = ["systemd"];
/// Debian packages that the lab and the privileged tests take. Captures are made and read by tcpdump and tshark, which
/// comes with dumpcap, text2pcap and mergecap.
const LAB: [&str; 8] =
    ["iproute2", "util-linux", "e2fsprogs", "bpftool", "procps", "ethtool", "tcpdump", "tshark"];

/// Everything to build netmon: packages, the eBPF linker, the eBPF object.
pub fn build() -> Result<()> {
    sh::ensure_packages(&BUILD)?;
    ebpf::build(&ebpf::Options::installing())
}

/// What the tests take that need no privilege.
pub fn unit() -> Result<()> {
    sh::ensure_packages(&UNIT)
}

/// What the lab and the privileged tests take.
pub fn lab() -> Result<()> {
    sh::ensure_packages(&LAB)
}

/// Attaching programs and making network namespaces takes root.
pub fn require_root(what: &str) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("{what} loads programs into the kernel and makes network namespaces: run it as root");
    }
    Ok(())
}

/// A tool from crates.io in exactly this version, installed for this workspace alone when it is missing.
pub fn cargo_tool(name: &str, version: &str) -> Result<PathBuf> {
    if let Some(tool) = sh::find_version(name, version) {
        return Ok(tool);
    }
    eprintln!("installing {name} {version} into {}", sh::tools().display());
    let mut install = Command::new("cargo");
    install.args(["install", name, "--version", version, "--locked", "--root"]).arg(sh::tools());
    sh::run(&mut install)?;
    sh::find_version(name, version).with_context(|| format!("{name} was installed, but is not there"))
}
