//! `netmon-server log`.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::Context as _;
use jiff::tz::TimeZone;
use notify::{RecursiveMode, Watcher as _};

use super::{find, open, read_failed};
use crate::cli::Log;
use crate::datadir::DataDir;
use crate::render;
use crate::store::{self, AgentId, Store};

/// Items that are read at once.
const PAGE: usize = 1000;
/// With `--follow`: how often the store is looked into where no event says that something is new.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Prints a seat's history and, with `--follow`, what comes after it.
pub fn log(data: &DataDir, options: &Log) -> anyhow::Result<()> {
    let store = open(data)?;
    let agent = find(data, &store, &options.host)?;
    let mut printer = Printer { data, store, agent: agent.id, next_n: 1, usb: options.usb };
    if !options.follow {
        return printer.print_first(options.lines).map(drop);
    }
    // The server writes the seat's log after each commit: that wakes this. Watched first, so nothing is missed.
    let (wake, woken) = mpsc::channel();
    let on_event = move |event: notify::Result<notify::Event>| {
        if event.map_or(true, |event| !event.kind.is_access()) {
            // Whoever does not listen any more needs no waking.
            let _ = wake.send(());
        }
    };
    let watcher = notify::recommended_watcher(on_event).context("cannot use inotify")?;
    let mut watch = Watch { watcher, watched: None };
    watch.renew(&data.logs().join(&agent.seat));
    let mut is_read = printer.print_first(options.lines)?;
    while is_read {
        // Deleted, replaced, renamed: no event tells all of it, so this looks on its own, too.
        match woken.recv_timeout(LOOK_EVERY) {
            Ok(()) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("inotify ended"),
        }
        // One look serves all that woke so far.
        while woken.try_recv().is_ok() {}
        watch.renew(&data.logs().join(printer.seat()?));
        is_read = printer.print_new()?;
    }
    Ok(())
}

/// Watches the directory of a seat's log, or the one above while it is missing. It makes nothing: it may run as
/// another user than the server.
struct Watch {
    watcher: notify::RecommendedWatcher,
    /// Path, device and inode.
    watched: Option<(PathBuf, u64, u64)>,
}

impl Watch {
    /// Watches what is at `directory` now. What cannot be watched is looked at every second.
    fn renew(&mut self, directory: &Path) {
        let there = directory.ancestors().take(2).find_map(|path| {
            let metadata = path.metadata().ok()?;
            Some((path.to_owned(), metadata.dev(), metadata.ino()))
        });
        if self.watched == there {
            return;
        }
        if let Some((path, ..)) = self.watched.take() {
            // A directory that is gone took its watch along.
            let _ = self.watcher.unwatch(&path);
        }
        if let Some(there) = there
            && self.watcher.watch(&there.0, RecursiveMode::NonRecursive).is_ok()
        {
            self.watched = Some(there);
        }
    }
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

    /// The label of the seat now: a revoked agent's may change.
    fn seat(&self) -> anyhow::Result<String> {
        let agent =
            store::agent_by_id(self.store.conn(), self.agent).with_context(|| read_failed(self.data))?;
        Ok(agent.context("the agent is no longer in the store")?.seat)
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
