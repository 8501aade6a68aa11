//! Runs targets on inputs without a fuzzer.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use netmon_fuzz::{TARGETS, target};

/// netmon's fuzz targets without a fuzzer.
#[derive(Parser)]
#[command(name = "netmon-fuzz")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a target on inputs; panics where the fuzzer's target does.
    Replay {
        /// The target's name.
        target: String,
        /// Inputs.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Write every target's seeds into <DIRECTORY>/<TARGET>.
    Seeds {
        /// Where to.
        directory: PathBuf,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Replay { target: name, files } => {
            let target = target(&name).with_context(|| format!("there is no target `{name}`"))?;
            for file in files {
                let input = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
                (target.run)(&input);
                println!("{}: nothing found", file.display());
            }
            Ok(())
        }
        Command::Seeds { directory } => TARGETS.iter().try_for_each(|target| {
            let directory = directory.join(target.name);
            write_all(&directory, &(target.seeds)())
                .with_context(|| format!("cannot write seeds into {}", directory.display()))
        }),
    }
}

fn write_all(directory: &Path, seeds: &[Vec<u8>]) -> std::io::Result<()> {
    fs::create_dir_all(directory)?;
    for (number, seed) in seeds.iter().enumerate() {
        fs::write(directory.join(format!("seed-{number:02}")), seed)?;
    }
    Ok(())
}
