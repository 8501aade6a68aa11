//! `cargo xtask vm`: a stock Debian kernel under QEMU, as root, with udevd, and USB devices that are plugged in and
//! unplugged at the guest's request.
//!
//! Everything comes from Debian packages. The kernel boots into an initramfs made of busybox, udevd and its rules, the
//! modules that matter here, and the files that are to be run. Kernels are kept in `target/vm`.

mod initramfs;
mod kernel;
mod machine;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};

use machine::Outcome;

use crate::sh;

/// Arguments of `cargo xtask vm`.
#[derive(clap::Args)]
pub struct Args {
    /// Kernels: 5.10, 6.1, 6.12
    #[arg(default_values = ["6.1"])]
    kernels: Vec<String>,
    /// A file for the guest, with the libraries it needs; into /usr/local/bin unless a path in the guest follows
    #[arg(long, value_name = "FILE[:GUEST]")]
    add: Vec<String>,
    /// A test of netmon-lab to build and to put into /usr/local/bin of the guest
    #[arg(long = "test", value_name = "NAME")]
    tests: Vec<String>,
    /// Seconds that the command may take
    #[arg(long, default_value_t = 300)]
    time_limit: u64,
    /// Shell command to run in the guest [default: the agent's tests against real USB devices]
    #[arg(last = true)]
    command: Vec<String>,
}

impl Args {
    /// The tests against real USB devices.
    pub fn usb_tests(kernel: &str) -> Self {
        Self {
            kernels: vec![kernel.to_owned()],
            add: vec![],
            tests: vec![],
            time_limit: 300,
            command: vec![],
        }
    }

    /// What is copied to and from sticks, with what stands between file systems and disks.
    pub fn storage_tests(kernel: &str) -> Self {
        let command = "RUST_BACKTRACE=1 usb_storage_vm --ignored --nocapture --test-threads=1";
        Self::command(
            kernel,
            "usb_storage_vm",
            &["cryptsetup", "lvm", "mke2fs", "mkfs.fat", "sfdisk"],
            command,
        )
    }

    /// The units of `deploy` under systemd.
    pub fn units(kernel: &str) -> Self {
        let mut args = Self::programs(kernel, "units_vm", &["ip", "unshare"]);
        args.add.push("/lib/systemd/systemd:/lib/systemd/systemd".to_owned());
        args
    }

    /// A test of netmon-lab that runs netmon's own programs.
    pub fn programs(kernel: &str, test: &str, tools: &[&str]) -> Self {
        let mut args = Self::command(kernel, test, tools, &format!("{test} --ignored --nocapture"));
        for program in ["netmon-agent", "netmon-server"] {
            args.add.push(sh::workspace().join("target/debug").join(program).display().to_string());
        }
        args
    }

    /// The command's tests one after the other.
    pub fn one_by_one(mut self) -> Self {
        self.command.push("--test-threads=1".to_owned());
        self
    }

    /// A command that runs a test of netmon-lab, which finds these tools of the host in the guest.
    pub fn command(kernel: &str, test: &str, tools: &[&str], command: &str) -> Self {
        let add = tools.iter().filter_map(|tool| Some(sh::find(tool)?.display().to_string())).collect();
        let (tests, command) = (vec![test.to_owned()], vec![command.to_owned()]);
        Self { add, tests, command, time_limit: 900, ..Self::usb_tests(kernel) }
    }
}

/// Debian packages that making and running a guest takes.
const PACKAGES: [&str; 14] = [
    "qemu-system-x86",
    "busybox-static",
    "kmod",
    "cpio",
    "udev",
    "binutils",
    "debian-archive-keyring",
    "iproute2",
    "ethtool",
    "wireguard-tools",
    "cryptsetup-bin",
    "dosfstools",
    "fdisk",
    "lvm2",
];

/// About 1 boot in 100 hangs under QEMU's emulation.
const BOOT_ATTEMPTS: u32 = 3;

/// Runs the chore.
///
/// # Errors
/// When something needed is missing, or the command fails on one of the kernels.
pub fn run(args: &Args) -> anyhow::Result<()> {
    sh::ensure_packages(&PACKAGES)?;
    let cache = sh::workspace().join("target/vm");
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;

    let mut files: Vec<(PathBuf, PathBuf)> = args.add.iter().map(|file| parse_file(file)).collect();
    for test in &args.tests {
        files.push((build_test(test)?, Path::new("/usr/local/bin").join(test)));
    }
    let mut command = args.command.join(" ");
    if command.is_empty() {
        files.push((build_test("usb_vm")?, "/usr/local/bin/usb_vm".into()));
        command = "RUST_BACKTRACE=1 usb_vm --ignored --nocapture --test-threads=1".into();
    }

    let mut failed = Vec::new();
    for version in &args.kernels {
        let kernel = kernel::fetch(version, &cache)?;
        println!("vm: kernel {}: {command}", kernel.release);
        let directory = tempfile::tempdir_in(&cache)?;
        let initrd = directory.path().join("initrd");
        initramfs::build(&kernel, &files, &command, &initrd)?;
        let status = boot(&kernel, &initrd, directory.path(), args.time_limit)?;
        println!("vm: kernel {}: the command ended with status {status}", kernel.release);
        if status != 0 {
            failed.push(format!("{version} (status {status})"));
        }
    }
    ensure!(failed.is_empty(), "failed on kernel {}", failed.join(", "));
    Ok(())
}

fn boot(kernel: &kernel::Kernel, initrd: &Path, directory: &Path, time_limit: u64) -> anyhow::Result<i32> {
    for _ in 0..BOOT_ATTEMPTS {
        match machine::run(&kernel.image, initrd, directory, time_limit)? {
            Outcome::Ended(status) => return Ok(status),
            Outcome::NeverBooted => println!("vm: the guest did not boot, trying again"),
            Outcome::Misled => {
                println!("vm: the guest died of a breakpoint that the emulator kept, trying again")
            }
        }
    }
    bail!(
        "the guest did not come to its command's end in {BOOT_ATTEMPTS} attempts; see the console's output above"
    )
}

/// `FILE` or `FILE:GUEST`.
fn parse_file(argument: &str) -> (PathBuf, PathBuf) {
    let (host, guest) = argument.split_once(':').unwrap_or((argument, ""));
    let host = PathBuf::from(host);
    let guest = match guest {
        "" => Path::new("/usr/local/bin").join(host.file_name().unwrap_or_default()),
        guest => guest.into(),
    };
    (host, guest)
}

/// Builds a test of netmon-lab and says where its program is.
fn build_test(name: &str) -> anyhow::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments =
        ["test", "-p", "netmon-lab", "--test", name, "--no-run", "--message-format=json-render-diagnostics"];
    let output = Command::new(cargo)
        .args(arguments)
        .current_dir(sh::workspace())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(output.status.success(), "the test {name} does not build");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo did not say where the test is")
}

/// Runs a tool to its end; its output is shown.
fn run_tool(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Runs a tool to its end and returns its output.
fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(output.status.success(), "{command:?} failed: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_goes_where_commands_are_found_unless_told_otherwise() {
        let pair = |host: &str, guest: &str| (PathBuf::from(host), PathBuf::from(guest));
        assert_eq!(
            parse_file("target/debug/netmon-agent"),
            pair("target/debug/netmon-agent", "/usr/local/bin/netmon-agent")
        );
        assert_eq!(parse_file("ip.txt:/etc/netmon/ip.txt"), pair("ip.txt", "/etc/netmon/ip.txt"));
    }
}
