//! The `netmon-server` binary: see [`netmon_server::cli`].

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::FromArgMatches as _;
use netmon_server::cli::{self, Cli};
use netmon_server::commands;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let cli = Cli::from_arg_matches(&cli::command().get_matches()).unwrap_or_else(|error| error.exit());
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    // It speaks of directories that are gone, which is no news to anybody.
    let filter = match "notify=warn".parse() {
        Ok(quiet) => filter.add_directive(quiet),
        Err(_) => filter,
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match commands::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netmon-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}
