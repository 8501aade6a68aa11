//! `cargo xtask simulate`: delivery, simulated in one process, driven by seeds (docs/simulation.md).

use std::process::Command;

use anyhow::Result;

use crate::{setup, sh};

/// What to simulate.
#[derive(clap::Args)]
pub struct Options {
    /// How many seeds
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first one [default: from the time, and said]
    #[arg(long)]
    from: Option<u64>,
    /// So many at a time [default: one per processor]
    #[arg(long)]
    jobs: Option<u32>,
    /// Print everything that happens
    #[arg(long)]
    trace: bool,
    /// Make this mistake on purpose: it must be found (`--mutant help` lists them)
    #[arg(long)]
    mutant: Option<String>,
}

/// Builds as for a release, and runs the seeds.
pub fn run(options: &Options) -> Result<()> {
    setup::build()?;
    let mut simulation = simulation();
    simulation.args(["--seeds", &options.seeds.to_string()]);
    if let Some(from) = options.from {
        simulation.args(["--from", &from.to_string()]);
    }
    if let Some(jobs) = options.jobs {
        simulation.args(["--jobs", &jobs.to_string()]);
    }
    if options.trace {
        simulation.arg("--trace");
    }
    if let Some(mutant) = &options.mutant {
        simulation.args(["--mutant", mutant]);
    }
    sh::run(&mut simulation)
}

fn simulation() -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(sh::workspace());
    cargo.args(["run", "--locked", "--release", "--quiet", "--package", "netmon-sim", "--"]);
    cargo
}
