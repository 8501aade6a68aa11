//! `netmon-agent`: command line of the agent.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use netmon_agent::clock::Now;
use netmon_agent::config::{Config, ConfigError, Mode};
use netmon_agent::filter::FilterError;
use netmon_agent::identity::EnrollError;
use netmon_agent::kernel::{Sizes, WordLevel};
use netmon_agent::run::{self, Paths, UsageError};
use netmon_agent::usb::marker::{self, Marker};
use netmon_agent::usb::recording::FileNames;
use netmon_agent::{doctor, identity, kernel, privileges, status, words};
use netmon_common::enroll::{Token, TokenError};
use tracing_subscriber::EnvFilter;

/// Watches this PC: USB devices, transfers in the local network, transfers to the Internet.
///
/// What happens goes into <log-dir>/log.txt and usb.log, waits in the spool and goes to the server, if this PC is
/// enrolled at one. Nothing is ever blocked or changed: netmon observes.
#[derive(Parser)]
#[command(version, after_help = EXIT_STATUS, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    places: Places,
    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "\
Exit status: 0 done; 1 it failed; 2 something given is wrong (flag, configuration, filter list, interface, token).

Settings: flags overrule NETMON_* variables, which overrule /etc/netmon/agent.toml.
NETMON_LOG says how much is said on standard error: error, warn, info (default), debug, or by part, as in
\"info,netmon_agent::uplink=debug\".";

/// What the netlink libraries say of messages that they do not understand is of no use: what it means for the watch
/// is said by [`netmon_agent::links`].
const SAID: &str =
    "info,netlink_proto=off,netlink_packet_core=off,netlink_packet_route=off,netlink_packet_utils=off";

#[derive(Args)]
struct Places {
    /// Configuration file [default: /etc/netmon/agent.toml, if there is one]
    #[arg(long, global = true, env = "NETMON_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Identity, spool and last good filter list
    #[arg(
        long,
        global = true,
        env = "NETMON_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/lib/netmon"
    )]
    state_dir: PathBuf,
    /// log.txt and usb.log
    #[arg(
        long,
        global = true,
        env = "NETMON_LOG_DIR",
        value_name = "DIR",
        default_value = "/var/log/netmon"
    )]
    log_dir: PathBuf,
    /// Status of the running agent
    #[arg(
        long,
        global = true,
        env = "NETMON_RUNTIME_DIR",
        value_name = "DIR",
        default_value = "/run/netmon"
    )]
    runtime_dir: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Watch this PC until SIGTERM or Ctrl-C (needs root)
    ///
    /// Without an enrolment, or while the server cannot be reached, everything is recorded here and sent later.
    Run {
        /// Interface to watch: a name, a glob such as "usb*", or "auto" (every real interface); may be repeated
        #[arg(
            long = "interface",
            short,
            env = "NETMON_INTERFACES",
            value_delimiter = ',',
            value_name = "NAME"
        )]
        interfaces: Vec<String>,
        /// How arriving packets are seen
        #[arg(long, env = "NETMON_MODE")]
        mode: Option<Mode>,
        /// Size of the flow tables [default: 65536]
        #[arg(long, env = "NETMON_FLOWS", value_name = "SLOTS", value_parser = flows())]
        flows: Option<u64>,
        /// List of muted prefixes; read again when it changes [default: the ip.txt that came with this netmon]
        #[arg(long, env = "NETMON_FILTER_LIST", value_name = "FILE")]
        filter_list: Option<PathBuf>,
        /// Whether to record which files of USB disks are read and written (docs/usb.md) [default: true]
        #[arg(long, env = "NETMON_USB_FILES", value_name = "BOOL")]
        usb_files: Option<bool>,
        /// What the kernel programs say of themselves on standard error, to find a fault (docs/bpftool.md) [default: off]
        #[arg(long, env = "NETMON_KERNEL_LOG", value_name = "LEVEL")]
        kernel_log: Option<WordLevel>,
    },
    /// Make this PC one of a server's agents
    ///
    /// On the server, `netmon-server token` prints the command. The token is read from a file or from standard input,
    /// because a command line can be read by every user of this PC.
    Enroll {
        /// File with the token, or - for standard input
        #[arg(long, value_name = "FILE")]
        token_file: PathBuf,
        /// How the server calls this PC [default: its host name]
        #[arg(long, value_name = "LABEL")]
        seat: Option<String>,
        /// Give up an enrolment that is there already
        #[arg(long)]
        replace: bool,
    },
    /// Show what the running agent watches; exit status 0 only if it watches
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Check whether this PC can be watched, and say what to do where it cannot
    Doctor,
    /// The process that marks file systems for a running agent, which starts it
    #[command(name = marker::SUBCOMMAND, hide = true)]
    UsbMarks,
}

fn flows() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(Sizes::FLOWS)
}

fn main() -> ExitCode {
    match command(Cli::parse()) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("netmon-agent: {error:#}");
            if is_usage(&error) { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// What is said on standard error. Lines of the kernel programs that were asked for are among it, whatever else is.
fn speak(kernel: WordLevel) {
    let said = EnvFilter::try_from_env("NETMON_LOG").unwrap_or_else(|_| EnvFilter::new(SAID));
    let said = match format!("{}=trace", words::TARGET).parse() {
        Ok(all_of_them) if kernel != WordLevel::Off => said.add_directive(all_of_them),
        _ => said,
    };
    tracing_subscriber::fmt()
        .with_env_filter(said)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// True when what was given is wrong, as opposed to what went wrong with it.
fn is_usage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<UsageError>()
            || cause.is::<ConfigError>()
            || cause.is::<FilterError>()
            || cause.is::<TokenError>()
            || cause.is::<TokenUnreadable>()
            || matches!(cause.downcast_ref(), Some(EnrollError::Refused { .. }))
    })
}

/// The token cannot be read from where it was said to be.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the token from {place}")]
struct TokenUnreadable {
    place: String,
    source: std::io::Error,
}

fn command(cli: Cli) -> Result<ExitCode> {
    let Places { config, state_dir, log_dir, runtime_dir } = cli.places;
    if !matches!(cli.command, Command::Run { .. }) {
        speak(WordLevel::Off);
    }
    match cli.command {
        Command::Run { interfaces, mode, flows, filter_list, usb_files, kernel_log } => {
            let mut config = Config::load(config.as_deref())?;
            if !interfaces.is_empty() {
                config.capture.interfaces = interfaces;
            }
            if let Some(mode) = mode {
                config.capture.mode = mode;
            }
            if let Some(flows) = flows {
                config.capture.flows = flows;
            }
            if filter_list.is_some() {
                config.filter.list = filter_list;
            }
            if let Some(files) = usb_files {
                config.usb.files = files;
            }
            if let Some(level) = kernel_log {
                config.log.kernel = level;
            }
            speak(config.log.kernel);
            let paths = Paths { state: state_dir, log: log_dir, runtime: runtime_dir };
            // Before the runtime's threads: they have the rights that this one has.
            kernel::prepare();
            let files = if config.usb.files { file_names() } else { FileNames::SwitchedOff };
            let privileges = privileges::restrict(privileges::WATCHING)?;
            tracing::debug!(%privileges, "gave up the rest");
            // As a task: whoever drives the timers runs it, too. From here each timer would wake two threads.
            runtime()?.block_on(async { tokio::spawn(run::run(config, paths, files)).await })??;
            Ok(ExitCode::SUCCESS)
        }
        Command::Enroll { token_file, seat, replace } => {
            let token: Token = read_token(&token_file)?.parse()?;
            let directory = state_dir.join("identity");
            privileges::restrict(privileges::NONE)?;
            let enrolled = runtime()?.block_on(identity::enroll(
                &token,
                seat.unwrap_or_default().as_str().into(),
                run::hostname(),
                &directory,
                replace,
            ))?;
            println!("enrolled as seat {}", enrolled.seat.escaped());
            if status::read(&runtime_dir, &Now::read()).is_ok() {
                println!("an agent is running: it takes the new identity within some seconds");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Status { json } => {
            let status = status::read(&runtime_dir, &Now::read())?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print!("{}", status.describe());
            }
            let watching = status.state == status::State::Watching;
            Ok(if watching { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::UsbMarks => {
            privileges::restrict(marker::CAPABILITIES)?;
            marker::serve(std::io::stdin().as_fd(), marker::is_on_usb)
                .context("cannot serve the agent; `netmon-agent run` starts this process")?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor => {
            // It finds what `run` finds, with the rights of `run`.
            privileges::restrict(privileges::WATCHING)?;
            let checks =
                runtime()?.block_on(doctor::examine(config.as_deref(), &state_dir, &log_dir, &runtime_dir));
            checks.iter().for_each(|check| print!("{check}"));
            let well = checks.iter().all(|check| !check.is_failure());
            Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// With the rights that are still there, and that a process of its own keeps.
fn file_names() -> FileNames {
    match std::env::current_exe().and_then(|agent| Marker::start(&agent)) {
        Ok(marker) => FileNames::Marker(Arc::new(marker)),
        Err(error) => {
            tracing::error!(%error, "no process that marks file systems: files on USB disks are not recorded");
            // With the rights that are left nothing can be marked, and that is recorded.
            FileNames::Own
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}

/// A token is one line; a file that is much longer is something else.
fn read_token(file: &Path) -> Result<String, TokenUnreadable> {
    const LONGEST: u64 = 1024;
    let mut text = String::new();
    let (place, read) = if file.as_os_str() == "-" {
        ("standard input".to_owned(), std::io::stdin().take(LONGEST).read_to_string(&mut text))
    } else {
        let read = File::open(file).and_then(|file| file.take(LONGEST).read_to_string(&mut text));
        (format!("the file {}", file.display()), read)
    };
    match read {
        Ok(_) => Ok(text),
        Err(source) => Err(TokenUnreadable { place, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_of_the_flow_tables_that_is_out_of_range_is_refused_with_the_limits() {
        let parse = |flows| Cli::try_parse_from(["netmon-agent", "run", "--flows", flows]);
        assert!(parse("4194304").is_ok());
        for flows in ["1023", "4194305", "many"] {
            let message = parse(flows).err().unwrap().to_string();
            assert!(message.contains("--flows") && message.contains(flows), "{message}");
        }
        assert!(parse("0").err().unwrap().to_string().contains("1024..=4194304"));
    }

    #[test]
    fn a_wrong_token_is_the_givers_and_a_missing_server_is_not() {
        let missing = read_token(Path::new("/nowhere/token")).unwrap_err();
        assert!(is_usage(&missing.into()));
        let malformed = "nonsense".parse::<Token>().unwrap_err();
        assert!(is_usage(&malformed.into()));
        let refused = EnrollError::Refused { reason: "the token is used up".into() };
        assert!(is_usage(&refused.into()));
        let away = EnrollError::Unreachable { address: "192.0.2.1:7444".into() };
        assert!(!is_usage(&away.into()));
    }
}
