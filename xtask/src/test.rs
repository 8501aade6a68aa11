//! `cargo xtask test`: what CI runs.

use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::{setup, sh, vm};

/// cargo-deny's version: licences, bans and sources of all dependencies.
const DENY: &str = "0.20.2";

/// Parts of the test, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Part {
    /// Formatting, clippy, dependencies.
    Lint,
    /// Everything that needs no privilege.
    Unit,
    /// Kernel programs, USB messages and the room, with real packets and real programs; needs root.
    Lab,
    /// Real USB devices, stacks on network cards and older kernels, in virtual machines.
    Vm,
    /// The lab's long forms (docs/exactness.md); only where they are asked for.
    Full,
}

/// Tests of the lab that have a form with millions of packets, ignored by default; and whether it takes a release build.
const FULL: [(&str, bool); 5] =
    [("exact", false), ("stopped", false), ("killed", false), ("torture", false), ("million", true)];

/// The kernels that run the kernel tests and the USB tests at every change: the oldest one that is promised, those of Debian 12
/// and 13. `cargo xtask vm --matrix` has more.
const KERNELS: [&str; 3] = [OLDEST_KERNEL, "6.1", "6.12"];
/// The oldest kernel that is promised. Under emulation its verifier takes half a minute a load.
const OLDEST_KERNEL: &str = "5.10";
/// Where the tests run that are not about the kernel: Debian 12's.
const ONE_KERNEL: &str = "6.1";

/// Where the stacks on network cards are tested: kernels without TCX and with it.
const STACK_KERNELS: [&str; 2] = ["6.1", "6.12"];
/// As much of it as the oldest kernel's verifier, under emulation, has time for: one load.
const OLDEST_STACKS: &str = "whatever_stands";

/// Where the units run under systemd: Debian 12's kernel, and the oldest one that is promised.
const UNIT_KERNELS: [&str; 2] = ["6.1", "5.10"];

/// Runs the parts, or all of them but [`Part::Full`].
pub fn run(parts: &[Part]) -> Result<()> {
    let wanted = |part| parts.is_empty() || parts.contains(&part);
    setup::build()?;
    if wanted(Part::Lint) {
        lint()?;
    }
    if wanted(Part::Unit) {
        setup::unit()?;
        sh::run(cargo().args(["test", "--locked"]))?;
    }
    if wanted(Part::Lab) {
        setup::require_root("the lab")?;
        require_tcx()?;
        setup::lab()?;
        sh::run(cargo().args(["build", "--locked", "--workspace", "--bins"]))?;
        // The room's tests judge seconds: two rooms at once, whatever the number of CPUs.
        sh::run(cargo().args(["test", "--locked", "--package", "netmon-lab", "--", "--test-threads", "2"]))?;
        full_disk()?;
    }
    if wanted(Part::Vm) {
        vm::run(&vm::Args::matrix(&KERNELS))?;
        vm::run(&vm::Args::storage_tests(ONE_KERNEL))?;
        let stacks = |kernel, which: &str| {
            let command = format!("stacks_vm --ignored --nocapture --test-threads=1 {which}");
            vm::run(&vm::Args::command(kernel, "stacks_vm", &["ip", "tc", "ethtool", "wg"], &command))
        };
        for kernel in STACK_KERNELS {
            stacks(kernel, "")?;
        }
        stacks(OLDEST_KERNEL, OLDEST_STACKS)?;
        setup::unit()?;
        sh::run(cargo().args(["build", "--locked", "--bin", "netmon-agent", "--bin", "netmon-server"]))?;
        for kernel in UNIT_KERNELS {
            vm::run(&vm::Args::units(kernel))?;
        }
        for test in ["clock_vm", "usb_agent_vm", "usb_room_vm"] {
            vm::run(&vm::Args::programs(ONE_KERNEL, test, &["ip"]))?;
        }
        vm::run(&vm::Args::programs(ONE_KERNEL, "disk_vm", &["ip", "dmsetup", "mkfs.ext4"]))?;
        for kernel in [ONE_KERNEL, OLDEST_KERNEL] {
            vm::run(&vm::Args::programs(kernel, "usb_files_vm", &["unshare"]))?;
        }
    }
    if parts.contains(&Part::Full) {
        full()?;
    }
    Ok(())
}

fn full() -> Result<()> {
    setup::require_root("the lab")?;
    require_tcx()?;
    setup::lab()?;
    for release in [false, true] {
        let form: &[&str] = if release { &["--release"] } else { &[] };
        sh::run(cargo().args(["build", "--locked", "--workspace", "--bins"]).args(form))?;
        for (test, _) in FULL.iter().filter(|(_, in_release)| *in_release == release) {
            let cargo = &mut cargo();
            cargo.args(["test", "--locked", "--package", "netmon-lab", "--test", test]).args(form);
            sh::run(cargo.args(["--", "--ignored", "--nocapture", "--test-threads", "1"]))?;
        }
    }
    Ok(())
}

/// The lab's tests look at TCX. What older kernels do is tested in the virtual machines.
fn require_tcx() -> Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    if (numbers.next(), numbers.next()) < (Some(6_u32), Some(6_u32)) {
        bail!(
            "the lab's tests need Linux 6.6 or later (TCX), this is {release}; the parts lint, unit and vm run here"
        );
    }
    Ok(())
}

/// The server and the agent's spool on disks that become full: each needs a small file system of its own.
fn full_disk() -> Result<()> {
    for (package, test) in [("netmon-server", "server"), ("netmon-agent", "small_disk")] {
        let disk = tempfile::tempdir()?;
        let script = "mount -t tmpfs -o size=2m small \"$NETMON_TEST_SMALL_DISK\" && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.current_dir(sh::workspace()).env("NETMON_TEST_SMALL_DISK", disk.path());
        command.args(["--mount", "sh", "-c", script, "sh", "cargo", "test", "--locked"]);
        sh::run(command.args(["--package", package, "--test", test, "--", "--ignored"]))?;
    }
    Ok(())
}

fn lint() -> Result<()> {
    sh::run(cargo().args(["fmt", "--all", "--check"]))?;
    for other in ["netmon-ebpf/Cargo.toml", "netmon-fuzz/fuzz/Cargo.toml"] {
        sh::run(cargo().args(["fmt", "--check", "--manifest-path", other]))?;
    }
    sh::run(cargo().args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    let deny = setup::cargo_tool("cargo-deny", DENY)?;
    sh::run(Command::new(deny).current_dir(sh::workspace()).args(["check", "bans", "licenses", "sources"]))
}

fn cargo() -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(sh::workspace());
    cargo
}
