//! netmon's chores. Each has a room of its own; this file only says which one.

mod ebpf;
mod ebpf_sources;
mod ip_txt;
mod sh;

use std::path::PathBuf;

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
        Chore::BuildEbpf(options) => ebpf::build(&options),
        Chore::IpTxt { directory, out } => ip_txt::run(&directory, &out),
    }
}
