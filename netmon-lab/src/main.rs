//! `netmon-lab`: see [`netmon_lab`].

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use netmon_lab::bench::Bench;
use netmon_lab::traffic::Traffic;
use netmon_lab::{cleanup, demo};

/// A room on one machine: PCs, a server and an Internet out of network namespaces, real traffic, netmon's programs.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Builds a room, runs netmon in it, makes traffic, and shows what the server recorded
    Demo {
        /// Leave the room standing until Ctrl-C
        #[arg(long)]
        keep: bool,
    },
    /// Measures what watching costs
    #[command(subcommand)]
    Bench(Bench),
    /// Removes what runs that did not end in good order left behind
    Clean,
    /// Makes traffic; runs inside a host of the room
    #[command(subcommand, hide = true)]
    Traffic(Traffic),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netmon-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Clean => {
            for room in cleanup::clean()? {
                println!("removed room {room}");
            }
            Ok(())
        }
        Command::Demo { keep } => demo::run(keep),
        Command::Bench(bench) => bench.run(),
        Command::Traffic(traffic) => traffic.run(),
    }
}
