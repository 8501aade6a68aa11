//! netmon's programs on one end of the cable, read as the agent reads them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;
use netmon_agent::clock::Now;
use netmon_agent::kernel::{FlowDelta, FlowId, Kernel, LoadOptions, Moved};
use netmon_common::abi::Stats;
use netmon_lab::bench::pair::inside;
use netmon_lab::bench::source::index_of;
use netmon_lab::clock;
use netmon_lab::host::Host;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The agent reads its tables this often.
const SWEEP: Duration = Duration::from_millis(250);

/// All that was counted since the reading before.
#[derive(Debug)]
pub struct Reading {
    pub flows: HashMap<FlowId, Moved>,
    pub stats: Stats,
}

/// Reads on a thread of its own until it is dropped.
pub struct Watcher<'scope> {
    asks: Option<Sender<Sender<Reading>>>,
    thread: Option<ScopedJoinHandle<'scope, Result<()>>>,
}

impl<'scope> Watcher<'scope> {
    /// Attaches; it watches when this returns.
    pub fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        host: &'env Host,
        mut options: LoadOptions,
    ) -> Self {
        let (asks, queue) = channel();
        options.pin_dir = format!("/sys/fs/bpf/exact-{}", host.name()).into();
        let thread = scope.spawn(move || inside(host, move || watch(host, options, &queue)));
        let mut watcher = Self { asks: Some(asks), thread: Some(thread) };
        watcher.read();
        watcher
    }

    /// Reads all that there is.
    pub fn read(&mut self) -> Reading {
        let (reply, answer) = channel();
        let asked = self.asks.as_ref().is_some_and(|asks| asks.send(reply).is_ok());
        match answer.recv() {
            Ok(reading) if asked => reading,
            _ => {
                let ended = self.thread.take().map(ScopedJoinHandle::join);
                panic!("the watcher ended: {ended:?}");
            }
        }
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(std::thread::panicking() || matches!(ended, Ok(Ok(()))), "{ended:?}");
        }
    }
}

fn watch(host: &Host, options: LoadOptions, asks: &Receiver<Sender<Reading>>) -> Result<()> {
    let mut kernel = Kernel::load(options)?;
    kernel.attach(index_of(host)?)?;
    let ring = kernel.ring_fd()?;
    let mut deltas = Vec::new();
    let mut flows: HashMap<FlowId, Moved> = HashMap::new();
    let mut before = Stats::default();
    let mut swept = clock::now();
    loop {
        wait(&ring);
        kernel.take_records(Now::read().boot_ns, &mut deltas);
        if due(&mut swept) {
            kernel.sweep(Now::read().boot_ns, &mut deltas);
        }
        let reply = match asks.try_recv() {
            Ok(reply) => Some(reply),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => return Ok(kernel.shutdown()?),
        };
        if reply.is_some() {
            kernel.sweep_all(Now::read().boot_ns, &mut deltas);
        }
        for FlowDelta { flow, moved, .. } in deltas.drain(..) {
            *flows.entry(flow).or_default() += moved;
        }
        if let Some(reply) = reply {
            assert_eq!(kernel.refused_records(), 0);
            let stats = kernel.stats();
            let since = std::mem::replace(&mut before, stats);
            // Who asked waits for it.
            let _ =
                reply.send(Reading { flows: std::mem::take(&mut flows), stats: since_then(stats, since) });
        }
    }
}

fn wait(ring: &OwnedFd) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    // Interrupted or not: what is there is read.
    let _ = poll(&mut [PollFd::new(ring, PollFlags::IN)], Some(&timeout));
}

fn due(swept: &mut Instant) -> bool {
    let due = swept.elapsed() >= SWEEP;
    if due {
        *swept = clock::now();
    }
    due
}

fn since_then(now: Stats, then: Stats) -> Stats {
    Stats {
        seen: now.seen - then.seen,
        counted: now.counted - then.counted,
        counted_bytes: now.counted_bytes - then.counted_bytes,
        not_ip: now.not_ip - then.not_ip,
        not_ip_bytes: now.not_ip_bytes - then.not_ip_bytes,
        other_protocol: now.other_protocol - then.other_protocol,
        other_protocol_bytes: now.other_protocol_bytes - then.other_protocol_bytes,
        malformed: now.malformed - then.malformed,
        malformed_bytes: now.malformed_bytes - then.malformed_bytes,
        table_full: now.table_full - then.table_full,
        table_full_bytes: now.table_full_bytes - then.table_full_bytes,
        ring_full: now.ring_full - then.ring_full,
    }
}
