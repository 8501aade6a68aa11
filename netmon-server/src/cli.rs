//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::builder::Resettable;
use clap::{Arg, Args, CommandFactory as _, Parser, Subcommand};
use netmon_common::{enroll, wire};

use crate::tokens;

/// Collects what netmon's agents record and keeps a log of every PC.
///
/// First `init`, then `run`; then, for each PC, `token`, and on the PC the line that it prints. `agents` shows who
/// delivers, `log HOST --follow` what happens there.
///
/// Exit status: 0 success, 1 failure (with the reason on stderr), 2 wrong usage.
#[derive(Debug, Parser)]
#[command(version, name = "netmon-server")]
pub struct Cli {
    /// Directory of the server: keys, store, logs
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "NETMON_SERVER_DATA",
        default_value = "/var/lib/netmon-server"
    )]
    pub data: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The command line as clap knows it. An environment variable that is empty counts as unset.
pub fn command() -> clap::Command {
    let is_empty = |arg: &Arg| arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    let unset = |arg: Arg| if is_empty(&arg) { arg.env(Resettable::Reset) } else { arg };
    Cli::command().mut_args(unset).mut_subcommand("run", |run| run.mut_args(unset))
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new server: certificate authority, certificate, store
    ///
    /// Refuses where one exists: there is no way to overwrite a server but to remove its directory.
    Init {
        /// Succeed without doing anything where a server exists
        #[arg(long, alias = "force-nothing")]
        if_needed: bool,
    },
    /// Serve agents until SIGTERM or Ctrl-C
    ///
    /// As soon as both ports are open, one line on stderr says `netmon-server listening: events udp ADDR, enrolment
    /// udp ADDR`. How much else is said there: RUST_LOG (error, warn, info, debug; default info).
    Run(Run),
    /// Make a token with which PCs can enrol, and print the command to do so
    ///
    /// The token is shown once: the server keeps a hash of it. Works while the server runs.
    Token(Token),
    /// List the tokens that were made, or withdraw one
    ///
    /// A token that got into the wrong hands enrols whoever shows it, until it has expired or is used up. One that is
    /// withdrawn enrols nobody any more; who has enrolled with it stays: see `revoke`. Works while the server runs.
    Tokens {
        /// Withdraw the token with this ID
        #[arg(long, value_name = "ID", value_parser = tokens::id)]
        withdraw: Option<[u8; 8]>,
    },
    /// List the agents: connected or last seen, newest record, backlog, gaps
    ///
    /// STATE: MISSING is a PC that was not heard for eleven seconds, though it says every four that it watches.
    /// BACKLOG: records that waited in the agent's spool at its last heartbeat. GAPS: records that never
    /// came, or another history of the PC that began (its spool was lost).
    Agents {
        /// As JSON, times in RFC 3339
        #[arg(long)]
        json: bool,
    },
    /// List the USB devices that were seen, and at which PCs
    ///
    /// Only devices with a serial number: the others cannot be told apart. COPIES: the same number was at two PCs at once,
    /// so several devices have it.
    Devices {
        /// Only devices whose names, serial number, IDs (`0951:1666`) or seats contain this
        #[arg(value_name = "TEXT")]
        text: Option<String>,
        /// As JSON, times in RFC 3339
        #[arg(long)]
        json: bool,
    },
    /// Take an agent off the allow-list; its history stays
    ///
    /// A live connection is closed at once. The PC can enrol again with a new token. When a PC enrols that asks for the
    /// label of a revoked agent, it gets it, and the revoked one is called LABEL-old from then on, its log too.
    Revoke {
        /// Label of the seat, or the start of the agent's UUID
        #[arg(value_name = "SEAT")]
        seat: String,
    },
    /// Print what a PC recorded, oldest first, in order of arrival
    ///
    /// Times are in this machine's time zone (TZ). Records that came more than 5 s late say so; records that never
    /// came are a GAP line.
    Log(Log),
    /// Check that the histories are complete and unedited, or name the first thing that is wrong
    ///
    /// Every item of a history is chained to the one before, and once a minute the server signs how long each history is
    /// and where its chain ends; an export is signed at its end as well, with the label of the seat. Exit status 1 when
    /// what is signed was changed, removed, added or cut off, or when the server itself noticed that its store was set
    /// back. In the store, what came after the newest signature is chained, and not signed yet:
    /// the verdict says how many items are.
    Verify(Verify),
    /// Write a PC's history to stdout, signed at its end, with all that `verify --file` needs on another machine
    ///
    /// The signature says that the server's store had this history of this seat at the time of the export, and no more.
    Export(Export),
}

/// `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Address for events [default: all addresses, UDP port 7443]
    #[arg(long, value_name = "ADDR[:PORT]", env = "NETMON_SERVER_LISTEN", value_parser = event_address)]
    pub listen: Option<SocketAddr>,
    /// Address for enrolment [default: all addresses, UDP port 7444]
    #[arg(long, value_name = "ADDR[:PORT]", env = "NETMON_SERVER_ENROLL_LISTEN", value_parser = enrolment_address)]
    pub enroll_listen: Option<SocketAddr>,
}

/// `token`.
#[derive(Debug, Args)]
pub struct Token {
    /// Where PCs reach this server's enrolment port
    #[arg(long, value_name = "HOST[:PORT]", value_parser = tokens::address)]
    pub address: String,
    /// How many PCs it may enrol
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub uses: u32,
    /// How long it is valid: 30m, 24h, 7d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = tokens::ttl)]
    pub ttl: i64,
    /// Print the token alone
    #[arg(long)]
    pub raw: bool,
}

/// `log`.
#[derive(Debug, Args)]
pub struct Log {
    /// Label of the seat, or the start of the agent's UUID
    #[arg(value_name = "HOST")]
    pub host: String,
    /// Go on with new events as they arrive, until Ctrl-C
    #[arg(long, short)]
    pub follow: bool,
    /// Only the newest N lines [default: all]
    #[arg(long, short = 'n', value_name = "N")]
    pub lines: Option<u64>,
    /// Only what concerns USB
    #[arg(long)]
    pub usb: bool,
}

/// `verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// Only this seat: its label, or the start of the agent's UUID [default: all]
    #[arg(value_name = "SEAT", conflicts_with = "file")]
    pub seat: Option<String>,
    /// An exported history instead of this server's store; - for standard input
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// With --file: the fingerprint of the CA of the server that it must be from, as `verify` prints it there
    #[arg(long, value_name = "HEX", requires = "file")]
    pub ca: Option<String>,
    /// With --file: print the lines of the log, too; the verdict on them comes last, on stderr
    #[arg(long, requires = "file")]
    pub print: bool,
}

/// `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// Label of the seat, or the start of the agent's UUID
    #[arg(value_name = "SEAT")]
    pub seat: String,
}

fn event_address(text: &str) -> Result<SocketAddr, String> {
    address(text, wire::DEFAULT_PORT)
}

fn enrolment_address(text: &str) -> Result<SocketAddr, String> {
    address(text, enroll::DEFAULT_PORT)
}

fn address(text: &str, port: u16) -> Result<SocketAddr, String> {
    text.parse()
        .or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port)))
        .map_err(|_| format!("expected an address of this machine such as 0.0.0.0:{port} or [::]:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_names_the_ports_that_are_really_used() {
        let help = Cli::command().find_subcommand_mut("run").unwrap().render_long_help().to_string();
        for port in [wire::DEFAULT_PORT, enroll::DEFAULT_PORT] {
            assert!(help.contains(&format!("UDP port {port}")), "{help}");
        }
    }
}
