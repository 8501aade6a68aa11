//! `netmon-server verify` and `export`.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use jiff::tz::TimeZone;
use netmon_common::enroll::{Hex, unhex};
use netmon_common::logline;
use netmon_common::raw::Escaped;
use netmon_common::wire::Checkpoint;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{find, open, print, read_failed};
use crate::ca::{log_public_key, spki_sha256_of, uuid_text};
use crate::chain::{self, Entry};
use crate::cli::{Export, Verify};
use crate::datadir::DataDir;
use crate::store::history::{self, Stored};
use crate::store::{self, Agent, Item};
use crate::verification::{Bad, FirstLine, Good, Late, SignedEnd, Verifier};
use crate::{clock, render};

/// Items that are read at once.
const PAGE: usize = 1000;
/// Longest line of an exported history: a record of the largest size in hex, and room.
const MAX_LINE: u64 = 256 * 1024;
/// Most checkpoints of an exported history: one a minute for nine years.
const MAX_CHECKPOINTS: usize = 5_000_000;

/// One line of an exported history.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line {
    /// First line.
    Netmon {
        history: u32,
        seat: String,
        agent: String,
        ca: String,
        log: String,
        exported: String,
    },
    Record {
        n: u64,
        epoch: u64,
        seq: u64,
        received_ns: i64,
        link: i64,
        bytes: String,
    },
    Gap {
        n: u64,
        epoch: u64,
        from: u64,
        to: u64,
        since_ns: i64,
        noticed_ns: i64,
        link: i64,
    },
    Notice {
        n: u64,
        noticed_ns: i64,
        link: i64,
        bytes: String,
    },
    Checkpoint {
        size: u64,
        head: String,
        signed_ns: i64,
        signature: String,
    },
    /// Last line. `signed` is missing in format 1.
    End {
        size: u64,
        head: String,
        #[serde(default)]
        signed: Option<Signed>,
    },
}

/// What the server signed at the end: [`chain::Export`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signed {
    seat: String,
    exported_ns: i64,
    signature: String,
}

/// Version of the exported format. In format 1 the end was not signed.
const FORMAT: u32 = 2;

/// Proves histories complete and unedited; an error names the first thing that is wrong.
pub fn verify(data: &DataDir, options: &Verify) -> anyhow::Result<()> {
    match &options.file {
        Some(file) => verify_file(file, options),
        None => verify_store(data, options),
    }
}

fn verify_store(data: &DataDir, options: &Verify) -> anyhow::Result<()> {
    let store = open(data)?;
    let ca = data.ca()?;
    let log_key = data.log_key()?;
    let key = log_public_key(log_key.certificate(), ca.der())?;
    let agents: Vec<Agent> = match &options.seat {
        Some(seat) => vec![find(data, &store, seat)?],
        None => {
            let all = store::summaries(store.conn()).with_context(|| read_failed(data))?;
            all.into_iter().map(|summary| summary.agent).collect()
        }
    };
    let mut bad = 0;
    for agent in &agents {
        // One moment of the store: a running server goes on adding.
        let tx = store.conn().unchecked_transaction().with_context(|| read_failed(data))?;
        let verdict = verify_agent(&tx, agent, &key).with_context(|| read_failed(data))?;
        bad += usize::from(verdict.is_err());
        print(&verdict_line(&agent.seat, &verdict))?;
    }
    // Where not all is well, not all is signed.
    let how = if bad == 0 { "signed by" } else { "checked with the key of" };
    print(&format!("{how} the server whose CA has the fingerprint {}\n", Hex(&ca.spki_sha256())))?;
    if bad > 0 {
        bail!(
            "{bad} of {} histories cannot be relied on: what is wrong with them stands above",
            agents.len()
        );
    }
    Ok(())
}

fn verify_agent(
    conn: &rusqlite::Connection,
    agent: &Agent,
    public_key: &[u8],
) -> rusqlite::Result<Result<Good, Bad>> {
    let end = history::size_and_head(conn, agent.id)?;
    let mut verifier = match Verifier::new(&agent.uuid, public_key, history::checkpoints(conn, agent.id)?) {
        Ok(verifier) => verifier,
        Err(bad) => return Ok(Err(bad)),
    };
    let mut next = 1;
    loop {
        let items = history::stored_from(conn, agent.id, next, PAGE)?;
        let Some(last) = items.last() else { return Ok(verifier.finish(end)) };
        next = last.n + 1;
        for item in &items {
            if let Err(bad) = verifier.take(item.n as u64, &item.entry(), item.link) {
                return Ok(Err(bad));
            }
        }
    }
}

fn verdict_line(seat: &str, verdict: &Result<Good, Bad>) -> String {
    let zone = TimeZone::system();
    let time = |ns| logline::time(ns, &zone);
    match verdict {
        Ok(good) => {
            let as_of = good.exported_ns.map(|at| format!(" as of {}", time(at))).unwrap_or_default();
            if good.items == 0 {
                return format!("{seat}: nothing was recorded yet{as_of}\n");
            }
            // The end of an export is signed with it.
            let before = if good.exported_ns.is_some() { "before" } else { "yet" };
            let signed = match (good.signed_ns, good.exported_ns) {
                (None, _) => format!("none of them signed {before}"),
                (Some(at), None) => format!("the first {} signed, last at {}", good.signed, time(at)),
                (Some(at), Some(_)) => {
                    format!("the first {} signed before, last at {}", good.signed, time(at))
                }
            };
            let remarks = remarks(good);
            format!("{seat}: {} items, complete and unedited{as_of}; {signed}{remarks}\n", good.items)
        }
        Err(bad @ Bad::Against { noticed_ns, notice, .. }) => {
            format!("{seat}: BAD: {bad}: {} {}\n", time(*noticed_ns), notice.text(*noticed_ns, &zone))
        }
        Err(bad) => format!("{seat}: BAD: {bad}\n"),
    }
}

/// What a good history should be read with.
fn remarks(good: &Good) -> String {
    let mut remarks = String::new();
    match good.clones {
        0 => {}
        1 => remarks += "; 1 line says that two machines used this identity",
        clones => remarks += &format!("; {clones} lines say that two machines used this identity"),
    }
    match good.strange {
        0 => {}
        1 => remarks += "; 1 line says that this PC showed a signature that is not this server's",
        strange => {
            remarks +=
                &format!("; {strange} lines say that this PC showed a signature that is not this server's");
        }
    }
    if good.unread > 0 {
        remarks += &format!(
            "; {} of the server's own notices cannot be read here: verify it with the newer netmon-server that made them",
            good.unread
        );
    }
    if let Some(Late { n, delay_ns }) = good.late {
        let delay = delay(delay_ns);
        remarks += &format!(
            "; item {n} was signed only {delay} after it was received: the server did not run meanwhile, or the history was signed again"
        );
    }
    remarks
}

/// A time of more than ten minutes.
fn delay(ns: i64) -> String {
    let minutes = ns / 60_000_000_000;
    match minutes {
        ..120 => format!("{minutes} min"),
        120..2880 => format!("{} h", minutes / 60),
        _ => format!("{} d", minutes / 1440),
    }
}

/// Writes a history to stdout, signed at its end, so that it can be verified elsewhere.
pub fn export(data: &DataDir, options: &Export) -> anyhow::Result<()> {
    let store = open(data)?;
    let agent = find(data, &store, &options.seat)?;
    let ca = data.ca()?;
    let log_key = data.log_key()?;
    let mut out = BufWriter::new(io::stdout().lock());
    let written = (|| {
        // From the first look on this is one moment of the store; the time is not before it.
        let tx = store.conn().unchecked_transaction()?;
        let (size, head) = history::size_and_head(&tx, agent.id)?;
        let exported_ns = clock::wall_ns();
        write_line(
            &mut out,
            &Line::Netmon {
                history: FORMAT,
                seat: agent.seat.clone(),
                agent: uuid_text(&agent.uuid),
                ca: Hex(ca.der()).to_string(),
                log: Hex(log_key.certificate()).to_string(),
                exported: logline::time(exported_ns, &TimeZone::UTC).to_string(),
            },
        )?;
        let checkpoints = history::checkpoints(&tx, agent.id)?;
        let end = chain::Export {
            uuid: &agent.uuid,
            seat: &agent.seat,
            size,
            head,
            checkpoints: checkpoints.len() as u64,
            exported_ns,
        };
        let signature = log_key.sign_export(&end)?;
        for checkpoint in checkpoints {
            let Checkpoint { size, head, signed_ns, signature } = checkpoint;
            let (head, signature) = (Hex(&head).to_string(), Hex(signature.as_flattened()).to_string());
            write_line(&mut out, &Line::Checkpoint { size, head, signed_ns, signature })?;
        }
        let mut next = 1;
        loop {
            let items = history::stored_from(&tx, agent.id, next, PAGE)?;
            let Some(last) = items.last() else { break };
            next = last.n + 1;
            items.iter().try_for_each(|item| write_line(&mut out, &line(item)))?;
        }
        let signature = Hex(&signature).to_string();
        let signed = Some(Signed { seat: agent.seat.clone(), exported_ns, signature });
        write_line(&mut out, &Line::End { size, head: Hex(&head).to_string(), signed })?;
        out.flush()?;
        Ok::<_, anyhow::Error>(())
    })();
    written.context("cannot export")
}

fn write_line(out: &mut impl io::Write, line: &Line) -> anyhow::Result<()> {
    serde_json::to_writer(&mut *out, line)?;
    Ok(out.write_all(b"\n")?)
}

fn line(item: &Stored) -> Line {
    let (n, link) = (item.n as u64, item.link);
    match item.entry() {
        Entry::Record { epoch, seq, received_ns, bytes } => {
            Line::Record { n, epoch, seq, received_ns, link, bytes: Hex(bytes).to_string() }
        }
        Entry::Gap { epoch, from, to, since_ns, noticed_ns } => {
            Line::Gap { n, epoch, from, to, since_ns, noticed_ns, link }
        }
        Entry::Notice { noticed_ns, bytes } => {
            Line::Notice { n, noticed_ns, link, bytes: Hex(bytes).to_string() }
        }
    }
}

/// A file may hold anything: every line is bounded and every field checked.
fn verify_file(file: &Path, options: &Verify) -> anyhow::Result<()> {
    let reader: Box<dyn io::Read> =
        if file.as_os_str() == "-" { Box::new(io::stdin()) } else { Box::new(open_file(file)?) };
    let mut lines = Lines { reader: BufReader::new(reader), file, number: 0 };
    let Some(Line::Netmon { history, seat, agent, ca, log, exported }) = lines.next()? else {
        bail!("{}: not a history that `netmon-server export` wrote", file.display());
    };
    // An older one is read as far as its end, which nobody signed.
    if history > FORMAT {
        bail!("{}: format {history} of a newer netmon-server; verify it with that one", file.display());
    }
    let bad = |what: &str| anyhow!("{}: line 1: {what} cannot be read", file.display());
    let uuid = unhex::<16>(&agent.replace('-', "")).ok_or_else(|| bad("agent"))?;
    let ca = CertificateDer::from(unhex_any(&ca).ok_or_else(|| bad("ca"))?);
    let log = CertificateDer::from(unhex_any(&log).ok_or_else(|| bad("log"))?);
    let fingerprint = Hex(&spki_sha256_of(&ca)?).to_string();
    if let Some(wanted) = &options.ca
        && wanted.to_ascii_lowercase() != fingerprint
    {
        bail!("{}: it is from the server with CA fingerprint {fingerprint}, not {wanted}", file.display());
    }
    let key = log_public_key(&log, &ca).with_context(|| format!("{}: line 1", file.display()))?;
    let mut checkpoints: Vec<Checkpoint> = Vec::new();
    let mut next = lines.next()?;
    while let Some(Line::Checkpoint { size, head, signed_ns, signature }) = &next {
        let bad = || anyhow!("{}: line {}: not a checkpoint", file.display(), lines.number);
        let signature = unhex::<64>(signature).ok_or_else(bad)?;
        let mut halves = [[0; 32]; 2];
        halves.as_flattened_mut().copy_from_slice(&signature);
        let (size, head, signed_ns) = (*size, unhex::<32>(head).ok_or_else(bad)?, *signed_ns);
        if checkpoints.last().is_some_and(|before| before.size >= size) {
            bail!("{}: line {}: this checkpoint is not in its place", file.display(), lines.number);
        }
        checkpoints.push(Checkpoint { size, head, signed_ns, signature: halves });
        if checkpoints.len() > MAX_CHECKPOINTS {
            bail!("{}: more than {MAX_CHECKPOINTS} checkpoints", file.display());
        }
        next = lines.next()?;
    }
    let first = FirstLine { seat: &seat, exported: &exported };
    let verifier = Verifier::new(&uuid, &key, checkpoints);
    let verdict = check_items(&mut lines, next, verifier, first, options.print)?;
    let line = verdict_line(&Escaped(seat.as_bytes()).to_string(), &verdict);
    if options.print {
        // On stderr: stdout is the log.
        eprint!("{line}");
    } else {
        print(&line)?;
    }
    match verdict {
        Ok(_) => {
            let known =
                if options.ca.is_some() { "" } else { "; compare that with what the server says (`verify`)" };
            eprintln!("signed by the server whose CA has the fingerprint {fingerprint}{known}");
            Ok(())
        }
        Err(Bad::Against { .. }) => {
            bail!(
                "{} is what the server had, and its own notice says that this cannot be relied on",
                file.display()
            )
        }
        Err(_) => bail!("{} was changed after its export, or what it was exported from was", file.display()),
    }
}

fn check_items(
    lines: &mut Lines<'_>,
    mut next: Option<Line>,
    verifier: Result<Verifier, Bad>,
    first: FirstLine<'_>,
    show: bool,
) -> anyhow::Result<Result<Good, Bad>> {
    let mut verifier = match verifier {
        Ok(verifier) => verifier,
        Err(bad) => return Ok(Err(bad)),
    };
    let zone = TimeZone::system();
    loop {
        let bad = || anyhow!("{}: line {}: not an item of a history", lines.file.display(), lines.number);
        let bytes_of = |hex: &str| unhex_any(hex).ok_or_else(bad);
        let bytes;
        let (n, link, entry) = match next {
            Some(Line::Record { n, epoch, seq, received_ns, link, bytes: hex }) => {
                bytes = bytes_of(&hex)?;
                (n, link, Entry::Record { epoch, seq, received_ns, bytes: &bytes })
            }
            Some(Line::Gap { n, epoch, from, to, since_ns, noticed_ns, link }) => {
                (n, link, Entry::Gap { epoch, from, to, since_ns, noticed_ns })
            }
            Some(Line::Notice { n, noticed_ns, link, bytes: hex }) => {
                bytes = bytes_of(&hex)?;
                (n, link, Entry::Notice { noticed_ns, bytes: &bytes })
            }
            Some(Line::End { size, head, signed }) => {
                let head: chain::Head = unhex(&head).ok_or_else(bad)?;
                let signed = match &signed {
                    None => None,
                    Some(Signed { seat, exported_ns, signature }) => {
                        let signature = unhex(signature).ok_or_else(bad)?;
                        Some(SignedEnd { seat, exported_ns: *exported_ns, signature })
                    }
                };
                if lines.next()?.is_some() {
                    bail!("{}: something follows the end", lines.file.display());
                }
                return Ok(verifier.finish_export((size, head), first, signed));
            }
            None => bail!("{}: the end is missing: the file was cut off", lines.file.display()),
            Some(_) => return Err(bad()),
        };
        if let Err(bad) = verifier.take(n, &entry, link) {
            return Ok(Err(bad));
        }
        if show {
            let n = i64::try_from(n).unwrap_or(i64::MAX);
            print(&format!("{}\n", render::line(&Item { n, what: entry.into() }, &zone).text))?;
        }
        next = lines.next()?;
    }
}

fn open_file(file: &Path) -> anyhow::Result<File> {
    File::open(file).with_context(|| format!("cannot read {}", file.display()))
}

struct Lines<'a> {
    reader: BufReader<Box<dyn io::Read>>,
    file: &'a Path,
    number: u64,
}

impl Lines<'_> {
    fn next(&mut self) -> anyhow::Result<Option<Line>> {
        let mut text = Vec::new();
        let read = (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut text);
        let length = read.with_context(|| format!("cannot read {}", self.file.display()))?;
        if length == 0 {
            return Ok(None);
        }
        self.number += 1;
        serde_json::from_slice(&text).map(Some).with_context(|| {
            format!("{}: line {}: not a line of a history", self.file.display(), self.number)
        })
    }
}

fn unhex_any(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    let digits = text.as_bytes().chunks(2);
    digits.map(|two| unhex::<1>(std::str::from_utf8(two).ok()?).map(|[byte]| byte)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice::Notice;

    const MINUTE: i64 = 60_000_000_000;

    #[test]
    fn a_good_verdict_says_what_it_should_be_read_with() {
        let good = Good { items: 9, clones: 1, ..Good::default() };
        let said = verdict_line("pc", &Ok(good));
        assert_eq!(
            said,
            "pc: 9 items, complete and unedited; none of them signed yet; \
             1 line says that two machines used this identity\n"
        );
        let late = Some(Late { n: 8, delay_ns: 190 * MINUTE });
        let said = verdict_line("pc", &Ok(Good { clones: 2, strange: 1, unread: 3, late, ..good }));
        assert!(said.contains("; 2 lines say that two machines used this identity; "), "{said}");
        assert!(said.contains("; 1 line says that this PC showed a signature that is not"), "{said}");
        assert!(said.contains("; 3 of the server's own notices cannot be read here"), "{said}");
        assert!(said.contains("; item 8 was signed only 3 h after it was received: "), "{said}");
        let said = verdict_line("pc", &Ok(Good { exported_ns: Some(0), ..good }));
        assert!(
            said.contains("unedited as of 19") && said.contains("; none of them signed before"),
            "{said}"
        );
        let said = verdict_line("pc", &Ok(Good { exported_ns: Some(0), ..Good::default() }));
        assert!(said.starts_with("pc: nothing was recorded yet as of 19"), "{said}");
    }

    #[test]
    fn a_verdict_is_one_line_and_names_the_notice_with_its_item_and_time() {
        let notice = Notice::StoreSetBack { size: 7, signed_ns: 0 };
        let said = verdict_line("pc", &Err(Bad::Against { n: 6, noticed_ns: 0, notice }));
        assert!(said.starts_with("pc: BAD: item 6 is the server's own notice that speaks "), "{said}");
        assert!(said.contains(" TAMPERED: this server's store was set back: at "), "{said}");
        assert_eq!(said.matches('\n').count(), 1, "{said}");
    }

    #[test]
    fn a_delay_is_told_in_minutes_hours_or_days() {
        let said = [11, 119, 120, 2879, 2880].map(|minutes| delay(minutes * MINUTE));
        assert_eq!(said, ["11 min", "119 min", "2 h", "47 h", "2 d"]);
    }
}
