//! netmon's chores. Each has a room of its own; this file only says which one.

mod bench;
mod clock;
mod ebpf;
mod ebpf_sources;
mod fuzz;
mod ip_txt;
mod setup;
mod sh;
mod simulate;
mod test;
mod torture;
mod up;
mod vm;

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// netmon's chores.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build everything, start a server and an agent on this machine, and show the live log.
    Up(up::Options),
    /// Lints, unit tests, kernel tests, the lab: what CI runs.
    Test {
        /// Only these parts.
        parts: Vec<test::Part>,
    },
    /// Build a room out of network namespaces, run netmon in it and show what it saw.
    Lab {
        /// Options of `netmon-lab demo`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Kill agent and server at random under load; compare both logs and the store.
    Torture {
        /// Options of `netmon-lab torture`: --kills N (1000), --seed S.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Measure what watching costs, beside other monitors.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Simulate delivery in one process, driven by seeds: faults of disks, network and clocks (docs/simulation.md).
    Simulate(simulate::Options),
    /// Run a test, or any command, on stock Debian kernels with USB devices that are really plugged in.
    Vm(vm::Args),
    /// Feed whatever comes from outside with any bytes at all, guided by coverage, and keep what is found.
    Fuzz(fuzz::Options),
    /// Build the kernel programs into target/bpf/netmon-ebpf, where the agent's build takes them from.
    BuildEbpf(ebpf::Options),
    /// Make ip.txt out of published provider ranges.
    IpTxt {
        /// Directory with <provider>-ipv4.txt and <provider>-ipv6.txt.
        directory: PathBuf,
        /// File to write.
        #[arg(long, default_value = "ip.txt")]
        out: PathBuf,
    },
}

fn main() -> Result<()> {
    match Cli::parse().chore {
        Chore::Up(options) => up::run(&options),
        Chore::Test { parts } => test::run(&parts),
        Chore::Lab { options } => lab(&options),
        Chore::Torture { options } => torture::run(&options),
        Chore::Bench(bench) => bench::run(&bench),
        Chore::Simulate(options) => simulate::run(&options),
        Chore::Vm(args) => vm::run(&args),
        Chore::Fuzz(options) => fuzz::run(&options),
        Chore::BuildEbpf(options) => ebpf::build(&options),
        Chore::IpTxt { directory, out } => ip_txt::run(&directory, &out),
    }
}

fn lab(options: &[String]) -> Result<()> {
    setup::require_root("the lab")?;
    setup::build()?;
    setup::lab()?;
    let cargo = || {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(sh::workspace());
        cargo
    };
    sh::run(cargo().args(["build", "--locked", "--workspace", "--bins"]))?;
    sh::run(
        cargo().args(["run", "--locked", "--quiet", "--package", "netmon-lab", "--", "demo"]).args(options),
    )
}
