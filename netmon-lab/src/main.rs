//! `netmon-lab`: see [`netmon_lab`].

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use netmon_lab::bench::Bench;
use netmon_lab::traffic::Traffic;
use netmon_lab::{cleanup, demo, replay, torture};

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
    /// Plays captures past netmon's programs, and compares what they count with what tshark says, flow by flow
    ///
    /// pcap and pcapng files. Status 1 when a count differs. Needs tshark.
    Replay {
        /// The captures
        #[arg(required = true)]
        captures: Vec<PathBuf>,
    },
    /// Kills agent and server at random under load, and compares both logs and the store
    ///
    /// Status 1 when anything is lost or doubled; the room's files are kept then.
    Torture(torture::Options),
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
        Command::Replay { captures } => compare(&captures),
        Command::Demo { keep } => demo::run(keep),
        Command::Bench(bench) => bench.run(),
        Command::Torture(options) => {
            let report = torture::run(&options)?;
            print!("{report}");
            anyhow::ensure!(
                report.findings.is_empty(),
                "the delivery is broken; `--seed {}` repeats the strikes, the files are in {}",
                report.seed,
                report.files.display()
            );
            Ok(())
        }
        Command::Traffic(traffic) => traffic.run(),
    }
}

/// Each is compared, whatever became of those before it.
fn compare(captures: &[PathBuf]) -> anyhow::Result<()> {
    let mut differ = 0;
    for capture in captures {
        match replay::replay(capture) {
            Ok(replay) => {
                println!("{replay}");
                differ += usize::from(!replay.agrees());
            }
            Err(error) => {
                eprintln!("netmon-lab: {:#}", anyhow::Error::from(error));
                differ += 1;
            }
        }
    }
    anyhow::ensure!(differ == 0, "{differ} of {} captures differ or could not be compared", captures.len());
    Ok(())
}
