//! The commands beside `run`. They work while a server runs on the same directory.

mod devices;
mod log;
mod verify;

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context as _, bail};
use jiff::tz::TimeZone;
use netmon_common::enroll::Hex;
use netmon_common::logline;
use netmon_common::raw::Escaped;
use serde_json::json;

use crate::ca::uuid_text;
use crate::cli::{Cli, Command, Token};
use crate::datadir::{DataDir, DataDirError};
use crate::store::{self, Agent, AgentSummary, Store};
use crate::{clock, serve, tokens};

/// Does what the command line says.
///
/// # Errors
/// A chain of messages that says what is wrong and what to do.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    let data = DataDir::new(&cli.data);
    match &cli.command {
        Command::Init { if_needed } => init(&data, *if_needed),
        Command::Run(run) => serve::run(&data, run.listen, run.enroll_listen),
        Command::Token(options) => token(&data, options),
        Command::Tokens { withdraw: None } => list_tokens(&data),
        Command::Tokens { withdraw: Some(id) } => withdraw_token(&data, id),
        Command::Agents { json } => agents(&data, *json),
        Command::Devices { text, json } => devices::devices(&data, text.as_deref(), *json),
        Command::Revoke { seat } => revoke(&data, seat),
        Command::Log(options) => log::log(&data, options),
        Command::Verify(options) => verify::verify(&data, options),
        Command::Export(options) => verify::export(&data, options),
    }
}

fn init(data: &DataDir, if_needed: bool) -> anyhow::Result<()> {
    let path = data.path().display();
    match data.init(Duration::from_nanos(u64::try_from(clock::wall_ns())?)) {
        Err(error @ DataDirError::AlreadyInitialised(_)) if if_needed => print(&format!("{error}\n")),
        Err(error) => Err(error.into()),
        Ok(()) => print(&format!(
            "initialised at {path}\nstart it:    netmon-server --data {path} run\n\
             enrol a PC:  netmon-server --data {path} token --address HOST\n"
        )),
    }
}

fn token(data: &DataDir, options: &Token) -> anyhow::Result<()> {
    let mut store = open_to_write(data)?;
    let ca_spki_sha256 = data.ca()?.spki_sha256();
    let mut random = [0; 40];
    getrandom::fill(&mut random).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    let now_ns = clock::wall_ns();
    let (token, stored) =
        tokens::make(options.address.clone(), ca_spki_sha256, &random, options.uses, options.ttl, now_ns);
    store.write(|tx| store::add_token(tx, &stored)).with_context(|| write_failed(data))?;
    if options.raw {
        return print(&format!("{token}\n"));
    }
    let pcs = if stored.uses == 1 { "one PC".to_owned() } else { format!("{} PCs", stored.uses) };
    let until = logline::time(stored.expires_ns, &TimeZone::system());
    // On stderr: stdout is the one line to copy.
    eprintln!("Enrols {pcs}, until {until}. On the PC:");
    // Quoted: the brackets of an IPv6 address are a pattern to the shell.
    print(&format!("echo '{token}' | sudo netmon-agent enroll --token-file -\n"))
}

fn list_tokens(data: &DataDir) -> anyhow::Result<()> {
    let store = open(data)?;
    let tokens = store::tokens(store.conn()).with_context(|| read_failed(data))?;
    if tokens.is_empty() {
        return print("no tokens; `netmon-server token --address HOST` makes one\n");
    }
    let (now_ns, zone) = (clock::wall_ns(), TimeZone::system());
    let mut rows = vec![["ID", "STATE", "USED", "MADE"].map(str::to_owned)];
    rows.extend(tokens.iter().map(|token| {
        let expires = logline::time(token.expires_ns, &zone);
        let state = match token {
            _ if token.expires_ns <= now_ns => format!("expired {expires}"),
            _ if token.uses_left == 0 => "used up".to_owned(),
            _ => format!("valid until {expires}"),
        };
        let used = format!("{} of {}", token.uses - token.uses_left.min(token.uses), token.uses);
        [Hex(&token.id).to_string(), state, used, logline::time(token.created_ns, &zone).to_string()]
    }));
    print(&table(&rows))
}

fn withdraw_token(data: &DataDir, id: &[u8; 8]) -> anyhow::Result<()> {
    let mut store = open_to_write(data)?;
    let now_ns = clock::wall_ns();
    let changed =
        store.write(|tx| store::withdraw_token(tx, id, now_ns)).with_context(|| write_failed(data))?;
    if !changed {
        bail!("no valid token has the ID {}; `netmon-server tokens` lists them", Hex(id));
    }
    print(&format!("token {} enrols nobody any more\n", Hex(id)))
}

fn agents(data: &DataDir, as_json: bool) -> anyhow::Result<()> {
    let store = open(data)?;
    let mut agents = store::summaries(store.conn()).with_context(|| read_failed(data))?;
    if !data.is_running() {
        for agent in &mut agents {
            (agent.connected_ns, agent.missing_ns) = (None, None);
        }
    }
    let now_ns = clock::wall_ns();
    for agent in &mut agents {
        agent.agent.quarantined_ns = agent.agent.quarantine(now_ns);
    }
    let zone = TimeZone::system();
    let time = |ns: Option<i64>| ns.map(|ns| logline::time(ns, &zone).to_string());
    if as_json {
        let rows: Vec<_> = agents.iter().map(|a| json(a, &time)).collect();
        return print(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
    }
    if agents.is_empty() {
        return print("no agents yet; `netmon-server token --address HOST` prints how to enrol a PC\n");
    }
    let mut rows =
        vec![["SEAT", "STATE", "NEWEST RECORD", "BACKLOG", "GAPS", "HOST", "AGENT"].map(str::to_owned)];
    rows.extend(agents.iter().map(|a| row(a, &time)));
    print(&table(&rows))
}

fn json(a: &AgentSummary, time: &impl Fn(Option<i64>) -> Option<String>) -> serde_json::Value {
    json!({
        "seat": a.agent.seat,
        "agent": uuid_text(&a.agent.uuid),
        "hostname": Escaped(&a.hostname).to_string(),
        "connected": a.connected_ns.is_some() && a.agent.revoked_ns.is_none(),
        "connected_since": time(a.connected_ns),
        "last_seen": time(a.seen_ns),
        "revoked": time(a.agent.revoked_ns),
        "newest_record": time(a.record_ns),
        "backlog": a.backlog,
        "gaps": a.gaps,
        "gap_records": a.gap_records,
        "gaps_of_unknown_size": a.restarts,
        "missing_since": time(a.missing_ns),
        "quarantined_until": time(a.agent.quarantined_ns),
        "clock_offset_s": a.offset_ns as f64 / 1e9,
        "heartbeat": a.heartbeat,
    })
}

fn row(a: &AgentSummary, time: &impl Fn(Option<i64>) -> Option<String>) -> [String; 7] {
    let state = if let Some(at) = time(a.agent.revoked_ns) {
        format!("revoked {at}")
    } else if let Some(until) = time(a.agent.quarantined_ns) {
        format!("QUARANTINED until {until}")
    } else if let Some(since) = time(a.missing_ns) {
        format!("MISSING since {since}")
    } else if let Some(since) = time(a.connected_ns) {
        let is_blind = a.heartbeat.as_ref().is_some_and(|beat| beat.coverage.interfaces.is_empty());
        let blind = if is_blind { ", watches NO INTERFACE" } else { "" };
        format!("connected since {since}{blind}")
    } else if let Some(at) = time(a.seen_ns) {
        format!("last seen {at}")
    } else {
        "never connected".to_owned()
    };
    let gaps = match a.gaps {
        0 => "none".to_owned(),
        gaps if a.restarts == 0 => format!("{gaps} ({} records)", a.gap_records),
        gaps if a.restarts == gaps => format!("{gaps} (unknown number of records)"),
        gaps => format!("{gaps} (more than {} records)", a.gap_records),
    };
    [
        a.agent.seat.clone(),
        state,
        time(a.record_ns).unwrap_or_else(|| "none".into()),
        a.backlog.map_or_else(|| "unknown".into(), |backlog| backlog.to_string()),
        gaps,
        Escaped(&a.hostname).to_string(),
        uuid_text(&a.agent.uuid),
    ]
}

fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn revoke(data: &DataDir, name: &str) -> anyhow::Result<()> {
    let mut store = open_to_write(data)?;
    let agent = find(data, &store, name)?;
    let now_ns = clock::wall_ns();
    let changed =
        store.write(|tx| store::revoke(tx, agent.id, now_ns)).with_context(|| write_failed(data))?;
    if !changed {
        bail!("seat {} was revoked before, nothing changed", agent.seat);
    }
    data.announce_revocation(now_ns)?;
    print(&format!(
        "seat {} is revoked: agent {} may not deliver any more\n",
        agent.seat,
        uuid_text(&agent.uuid)
    ))
}

fn open(data: &DataDir) -> anyhow::Result<Store> {
    data.check_initialised()?;
    Ok(Store::open(&data.store())?)
}

fn open_to_write(data: &DataDir) -> anyhow::Result<Store> {
    data.check_initialised()?;
    Ok(Store::open_to_write(&data.store())?)
}

/// The one agent that `name` means.
fn find(data: &DataDir, store: &Store, name: &str) -> anyhow::Result<Agent> {
    let shown = Escaped(name.as_bytes());
    let mut found = store::find_seat(store.conn(), name).with_context(|| read_failed(data))?;
    let seats = |agents: &[Agent]| agents.iter().map(|a| a.seat.clone()).collect::<Vec<_>>().join(", ");
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => {
            let all = store::summaries(store.conn()).with_context(|| read_failed(data))?;
            let all: Vec<_> = all.into_iter().map(|summary| summary.agent).collect();
            if all.is_empty() {
                bail!("no seat \"{shown}\": no PC has enrolled yet (`netmon-server token` prints how to)");
            }
            bail!("no seat \"{shown}\"; known seats: {}", seats(&all))
        }
        _ => bail!("\"{shown}\" is the start of several agents: {}; write more of it", seats(&found)),
    }
}

fn read_failed(data: &DataDir) -> String {
    format!("cannot read the store {}", data.store().display())
}

fn write_failed(data: &DataDir) -> String {
    format!(
        "cannot write the store {}; check that its disk is not full and that you may write it",
        data.store().display()
    )
}

/// Writes to stdout. A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to stdout")
        }
        _ => Ok(()),
    }
}
