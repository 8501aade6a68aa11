//! `netmon-server log`.

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
    let first = match options.lines {
        Some(lines) => {
            store::first_of_last(store.conn(), agent.id, lines).with_context(|| read_failed(data))?
        }
        None => 1,
    };
    let mut printer = Printer { data, store, agent: agent.id, next_n: first, usb: options.usb };
    if !options.follow {
        return printer.print_new().map(drop);
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
    while printer.print_new()? {
        woken.recv().context("inotify ended")?;
        // One look serves all that woke so far.
        while woken.try_recv().is_ok() {}
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
    /// Prints what is new; false when nobody reads any more (`| head`).
    fn print_new(&mut self) -> anyhow::Result<bool> {
        let zone = TimeZone::system();
        loop {
            let items = store::items_from(self.store.conn(), self.agent, self.next_n, PAGE)
                .with_context(|| read_failed(self.data))?;
            let Some(last) = items.last() else { return Ok(true) };
            self.next_n = last.n + 1;
            let lines = items.iter().map(|item| render::line(item, &zone));
            let text: String =
                lines.filter(|line| line.usb || !self.usb).map(|line| line.text + "\n").collect();
            let mut out = io::stdout().lock();
            match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(false),
                Err(error) => return Err(error).context("cannot write to stdout"),
            }
        }
    }
}
