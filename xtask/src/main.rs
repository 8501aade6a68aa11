//! netmon's chores. Each has a room of its own; this file only says which one.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod ebpf;
mod ebpf_sources;
mod sh;

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
}

fn main() -> Result<()> {
    match Cli::parse().chore {
        Chore::BuildEbpf(options) => ebpf::build(&options),
    }
}
