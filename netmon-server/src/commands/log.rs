//! `netmon-server log`.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::sync::mpsc;

use anyhow::Context as _;
use jiff::tz::TimeZone;
use notify::{RecursiveMode, Watcher as _};

use super::{find, open, read_failed};
use crate::cli::Log;
use crate::datadir::{DataDir, make_dir};
use crate::render;
use crate::store::{self, AgentId, Store};

/// Items that are read at once.
const PAGE: usize = 1000;

/// Prints a seat's history and, with `--follow`, what comes after it.
pub fn log(data: &DataDir, options: &Log) -> anyhow::Result<()> {
    let store = open(data)?;
    let agent = find(data, &store, &options.host)?;
    let mut printer = Printer { data, store, agent: agent.id, next_n: 1, usb: options.usb };
    if !options.follow {
        return printer.print_first(options.lines).map(drop);
    }
    // The server writes the seat's log after each commit: that wakes this. Watched first, so nothing is missed.
    let directory = data.logs().join(&agent.seat);
    make_dir(&directory)?;
    let (wake, woken) = mpsc::channel();
    let on_event = move |event: notify::Result<notify::Event>| {
        if event.map_or(true, |event| !event.kind.is_access()) {
            // Whoever does not listen any more needs no waking.
            let _ = wake.send(());
        }
    };
    let mut watcher = notify::recommended_watcher(on_event).context("cannot use inotify")?;
    watcher
        .watch(&directory, RecursiveMode::NonRecursive)
        .with_context(|| format!("cannot watch {}", directory.display()))?;
    let mut is_read = printer.print_first(options.lines)?;
    while is_read {
        woken.recv().context("inotify ended")?;
        // One look serves all that woke so far.
        while woken.try_recv().is_ok() {}
        is_read = printer.print_new()?;
    }
    Ok(())
}

struct Printer<'a> {
    data: &'a DataDir,
    store: Store,
    agent: AgentId,
    next_n: i64,
    usb: bool,
}

impl Printer<'_> {
    /// Prints the newest `count` lines, or all; false when nobody reads any more (`| head`).
    fn print_first(&mut self, count: Option<u64>) -> anyhow::Result<bool> {
        let Some(count) = count else { return self.print_new() };
        if !self.usb {
            self.next_n = store::first_of_last(self.store.conn(), self.agent, count)
                .with_context(|| read_failed(self.data))?;
            return self.print_new();
        }
        // Where the last USB lines begin is known only at the end.
        let keep = usize::try_from(count).unwrap_or(usize::MAX);
        let mut newest = VecDeque::new();
        while let Some(lines) = self.page()? {
            newest.extend(lines);
            newest.drain(..newest.len().saturating_sub(keep));
        }
        print(newest)
    }

    /// Prints what is new; false when nobody reads any more.
    fn print_new(&mut self) -> anyhow::Result<bool> {
        while let Some(lines) = self.page()? {
            if !print(lines)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The next lines; `None` when nothing more is there.
    fn page(&mut self) -> anyhow::Result<Option<Vec<String>>> {
        let items = store::items_from(self.store.conn(), self.agent, self.next_n, PAGE)
            .with_context(|| read_failed(self.data))?;
        let Some(last) = items.last() else { return Ok(None) };
        self.next_n = last.n + 1;
        let zone = TimeZone::system();
        let lines = items.iter().map(|item| render::line(item, &zone));
        Ok(Some(lines.filter(|line| line.usb || !self.usb).map(|line| line.text + "\n").collect()))
    }
}

/// Writes lines to stdout; false when nobody reads any more.
fn print(lines: impl IntoIterator<Item = String>) -> anyhow::Result<bool> {
    let text: String = lines.into_iter().collect();
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to stdout"),
    }
}
