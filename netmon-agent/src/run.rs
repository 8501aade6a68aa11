//! `netmon-agent run`: one loop in which all sources meet. It waits and hands over; [`Watch`] does the rest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::tz::TimeZone;
use netmon_common::model::{Event, Gap, GapReason};
use netmon_common::raw::Raw;
use netmon_common::wire::Heartbeat;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::clock::Now;
use crate::config::{Config, Mode};
use crate::filter::FilterFile;
use crate::journal::Journal;
use crate::kernel::{self, Kernel, LoadOptions, Sizes};
use crate::links::{self, Choice, Link};
use crate::privileges;
use crate::recorder::Recorder;
use crate::spool::{Spool, SpoolHandle};
use crate::supervisor::Supervisor;
use crate::timer::BootTimer;
use crate::uplink::{self, Introduction, Sources, UplinkStatus};
use crate::usb::recording::FileNames;
use crate::usb::{self, UsbOutput, UsbWatch};
use crate::watch::{Start, Watch};
use crate::words::{Listener, Teller};

/// Where things are.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Spool, identity, last good filter list.
    pub state: PathBuf,
    /// `log.txt` and `usb.log`.
    pub log: PathBuf,
    /// `status.json` and the lock.
    pub runtime: PathBuf,
}

/// What the user gave wrong, as opposed to what went wrong: the exit status differs.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// Interfaces that were named and are not there.
    #[error("no such interface: {missing}. This PC has: {present}")]
    NoSuchInterface {
        /// Names that were asked for.
        missing: String,
        /// Names that exist.
        present: String,
    },
    /// A pattern that can name no interface.
    #[error("the interfaces to watch: {0}")]
    Interface(String),
    /// Another agent has the lock.
    #[error("another netmon-agent is running here: {} is locked. `netmon-agent status` shows it", .0.display())]
    Running(PathBuf),
}

/// What woke the loop.
#[derive(Debug)]
enum Wake {
    /// The ring buffer has "flow opened" records.
    Opened,
    /// A sweep or another timed duty is due.
    Due,
    /// Something about USB.
    Usb(UsbOutput),
    /// The interfaces or addresses changed.
    Links(Vec<Link>),
    /// SIGTERM, SIGINT or SIGHUP.
    Stop,
}

/// Watches until SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// What prevents the start. Once it watches it goes on, whatever fails, and reports it.
pub async fn run(config: Config, paths: Paths, files: FileNames) -> Result<()> {
    // First: a signal must not end a start halfway.
    let mut stop = StopSignals::new()?;
    let choice = Choice::new(&config.capture.interfaces).map_err(UsageError::Interface)?;
    kernel::preflight()?;
    let present = links::list().await?;
    check_interfaces(&choice, &present)?;
    for directory in [&paths.state, &paths.log, &paths.runtime] {
        privileges::check_directory(directory)?;
    }
    for directory in [&paths.state, &paths.runtime] {
        create(directory)?;
    }
    let _locks = (lock(&paths.state)?, lock(&paths.runtime)?);
    let mut filter = FilterFile::new(config.filter.list.clone(), &paths.state);
    let list = filter.start()?;
    let journal = Journal::open(&paths.log, config.log.max_mib << 20, TimeZone::system())
        .with_context(|| format!("cannot open the logs in {}", paths.log.display()))?;
    let mode = match config.capture.mode {
        Mode::Tc => kernel::Mode::Tc,
        Mode::Xdp => kernel::Mode::Xdp,
    };
    // In their range since they were read.
    let flows = u32::try_from(config.capture.flows).unwrap_or(u32::MAX);
    let sizes = Sizes { flows, ..Sizes::default() };
    let words = config.log.kernel;
    let mut kernel = Kernel::load(LoadOptions { mode, sizes, words, ..LoadOptions::default() })?;
    let teller = Teller::default();
    let listener = kernel.words(teller.clone())?.map(|words| Listener::start(words, teller)).transpose();
    let listener = listener.context("cannot listen to the kernel programs")?;
    // SAFETY: the `AsyncFd` owns the descriptor, so it stays open for as long as it is registered, and an `OwnedFd`
    // gives the same descriptor every time.
    let ring = unsafe { AsyncFd::register_with_interest(kernel.ring_fd()?, Interest::READABLE)? };

    // Last of what can fail: opening the spool begins a run.
    let (spool, recovered) = Spool::open(&paths.state.join("spool"), config.spool.limits())?;
    let spool = SpoolHandle::new(spool);
    let recorder = Recorder::new(spool.clone(), journal, recovered.run);
    let (heartbeat, beats) = watch::channel(Heartbeat::default());
    let introduction = Introduction {
        agent_version: env!("CARGO_PKG_VERSION").into(),
        hostname: hostname(),
        boot_id: boot_id(),
        run: recovered.run,
        previous_died: recovered.previous_run_died,
        instance: getrandom::u64().context("the system has no random numbers")?,
    };
    let sources = Sources { spool: spool.clone(), heartbeat: beats, introduction };
    let uplink = Uplink::start(&paths.state.join("identity"), sources);
    let mut usb = Usb::start(files);
    let mut links = follow_links();

    let mut watch = Watch::start(Start {
        kernel,
        recorder,
        spool: spool.clone(),
        recovered,
        filter,
        list,
        choice,
        config,
        runtime: paths.runtime.clone(),
        hostname: hostname(),
        boot_id: boot_id(),
        uplink: uplink.status.clone(),
        heartbeat,
        now: Now::read(),
    })?;
    watch.links(&Now::read(), present);
    let mut supervisor = Supervisor::from_environment().context("cannot start a thread")?;
    supervisor.ready();

    let mut timer = BootTimer::new().context("cannot make a timer")?;

    loop {
        let wake = tokio::select! {
            () = stop.received() => Wake::Stop,
            due = timer.reached(watch.due_ns()) => {
                due.context("cannot wait for the next sweep")?;
                Wake::Due
            }
            output = usb.next() => Wake::Usb(output),
            Some(links) = links.recv() => Wake::Links(links),
            // An error means that the runtime ends; the sweeps empty the ring as well.
            Ok(mut ready) = ring.readable() => {
                ready.clear_ready();
                Wake::Opened
            }
        };
        let now = Now::read();
        match wake {
            Wake::Opened => watch.opened(&now),
            Wake::Due => {
                watch.due(&now);
                watch.done(&Now::read());
            }
            Wake::Usb(output) => watch.usb(&now, output),
            Wake::Links(links) => watch.links(&now, links),
            Wake::Stop => break,
        }
        supervisor.alive(now.boot_ns);
    }
    supervisor.stopping();
    let now = Now::read();
    for output in usb.end().await {
        watch.usb(&now, output);
    }
    watch.stop(&now);
    if let Some(listener) = listener {
        listener.stop();
    }
    // From here on a second signal ends the process at once: everything is recorded and nothing is attached.
    let finish = async {
        if let Err(error) = spool.sync_in_background().await {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot write the spool's end");
        }
        // The last records are worth a moment; whatever is not acknowledged by then stays in the spool.
        uplink.stop().await;
        usb.stop().await;
        spool.close()
    };
    tokio::select! {
        closed = finish => Ok(closed?),
        () = stop.received() => Ok(()),
    }
}

/// SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal is gone).
struct StopSignals([Signal; 3]);

impl StopSignals {
    fn new() -> Result<Self> {
        let on = |kind| signal(kind).context("cannot listen to signals");
        Ok(Self([on(SignalKind::terminate())?, on(SignalKind::interrupt())?, on(SignalKind::hangup())?]))
    }

    async fn received(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// The USB watch, started again when it cannot be started or dies.
struct Usb {
    files: FileNames,
    watch: Option<UsbWatch>,
    /// Boot time of the next attempt to start it.
    retry_ns: u64,
    /// Since when there is none, wall clock.
    blind_since_ns: Option<i64>,
}

impl Usb {
    /// Between two attempts to start it.
    const RETRY_NS: u64 = 1_000_000_000;
    /// Its thread may wait for a device that hangs; the agent's end does not.
    const END: Duration = Duration::from_secs(1);

    fn start(files: FileNames) -> Self {
        let now = Now::read();
        let retry_ns = now.boot_ns + Self::RETRY_NS;
        let watch = usb::watch(usb::Options { files: files.clone(), ..usb::Options::default() })
            .inspect_err(|error| {
                tracing::error!(error = error as &dyn std::error::Error, "cannot watch USB, trying again");
            })
            .ok();
        let blind_since_ns = watch.is_none().then_some(now.wall_ns);
        Self { files, watch, retry_ns, blind_since_ns }
    }

    /// Cancel safe.
    async fn next(&mut self) -> UsbOutput {
        if let Some(watch) = &mut self.watch {
            if let Some(output) = watch.next().await {
                return output;
            }
            tracing::error!("the USB watch died, starting it again");
            self.watch = None;
            self.blind_since_ns = Some(Now::read().wall_ns);
            return UsbOutput::Watching(false);
        }
        let pause = self.retry_ns.saturating_sub(Now::read().boot_ns);
        tokio::time::sleep(Duration::from_nanos(pause)).await;
        let since_ns = self.blind_since_ns;
        *self = Self::start(self.files.clone());
        match since_ns {
            Some(from_wall_ns) if self.watch.is_some() => {
                let now = Now::read();
                let reason = GapReason::UsbNotWatched;
                let gap = Gap { reason, from_wall_ns, to_wall_ns: now.wall_ns, count: None };
                UsbOutput::Event { boot_ns: now.boot_ns, event: Event::Gap(gap) }
            }
            since_ns => {
                self.blind_since_ns = since_ns;
                UsbOutput::Watching(false)
            }
        }
    }

    /// What the watch has still to say.
    async fn end(&mut self) -> Vec<UsbOutput> {
        let mut outputs = Vec::new();
        if let Some(watch) = &mut self.watch {
            watch.end();
            let rest = async {
                while let Some(output) = watch.next().await {
                    outputs.push(output);
                }
            };
            // What it has not said by then it will not say.
            let _ = tokio::time::timeout(Self::END, rest).await;
        }
        outputs
    }

    async fn stop(self) {
        let (ended, end) = tokio::sync::oneshot::channel();
        // A thread, not a task: the runtime would wait for it.
        std::thread::spawn(move || {
            drop(self.watch);
            let _ = ended.send(());
        });
        if tokio::time::timeout(Self::END, end).await.is_err() {
            tracing::warn!("the USB watch does not end, a device seems to hang");
        }
    }
}

/// The delivery, on a task of its own.
struct Uplink {
    status: watch::Receiver<UplinkStatus>,
    shutdown: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Uplink {
    fn start(identity: &Path, sources: Sources) -> Self {
        let (shutdown, stopped) = watch::channel(false);
        let (sender, status) = watch::channel(UplinkStatus::default());
        let identity = identity.to_owned();
        let task = tokio::spawn(async move {
            uplink::run_whenever_enrolled(&identity, sources, stopped, sender).await;
        });
        Self { status, shutdown, task }
    }

    async fn stop(self) {
        self.shutdown.send_replace(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the delivery did not end in good order");
        }
    }
}

fn check_interfaces(choice: &Choice, present: &[Link]) -> Result<(), UsageError> {
    let missing: Vec<_> = choice.missing(present).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let present: Vec<_> =
        present.iter().map(|link| Raw::from(link.name.as_str()).escaped().to_string()).collect();
    Err(UsageError::NoSuchInterface { missing: missing.join(" "), present: present.join(" ") })
}

/// The interfaces, followed for as long as the agent runs: when netlink fails, it is tried again.
fn follow_links() -> mpsc::Receiver<Vec<Link>> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        while let Err(error) = links::follow(sender.clone()).await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "cannot follow the interfaces, trying again"
            );
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    receiver
}

fn create(directory: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(directory)
        .with_context(|| format!("cannot create {}", directory.display()))
}

/// Two agents on one spool or on the same hooks would count and ship everything twice.
fn lock(directory: &Path) -> Result<std::fs::File> {
    let path = directory.join("agent.lock");
    let file = std::fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(UsageError::Running(path).into()),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// The PC's host name: a label, not an identity.
pub fn hostname() -> Raw {
    Raw::new(rustix::system::uname().nodename().to_bytes())
}

/// `/proc/sys/kernel/random/boot_id`; zeros where it cannot be read.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    netmon_common::enroll::unhex(&text.trim().replace('-', "")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_usb_watch_that_died_leaves_a_gap_up_to_the_next_one() {
        let files = FileNames::default();
        let mut usb = Usb { files, watch: None, retry_ns: 0, blind_since_ns: Some(5) };
        let UsbOutput::Event { event: Event::Gap(gap), .. } = usb.next().await else { panic!("no gap") };
        assert_eq!((gap.reason, gap.from_wall_ns), (GapReason::UsbNotWatched, 5));
        assert!(usb.watch.is_some() && usb.blind_since_ns.is_none());
    }
}
