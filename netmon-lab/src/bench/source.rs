//! The packet source: frames of many flows, made inside the kernel (`netmon-ebpf/reference/source.rs`).

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use aya::maps::Array;
use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::frames::{Family, Shape};
use super::order::Order;
use super::pair::{INTERFACE, Pair, inside};
use super::process::{cpu_of_softirq_thread, cpu_of_this_thread};
use super::shared::{CHUNK, Chunk, Source as Settings, maps, programs};
use crate::clock;
use crate::host::Host;

/// Frames of one system call: some tens of milliseconds, so that time and signals are looked at in between.
const AT_ONCE: u32 = 1 << 16;
/// Frames that the kernel prepares, redirects and flushes together (at most 256; the ring of a veth has room for
/// as many).
const BATCH: u32 = 64;
/// How long `meanwhile` may take while frames are sent.
const MEANWHILE: Duration = Duration::from_millis(20);
/// How often a limited rate is kept.
const PACE: Duration = Duration::from_millis(1);
/// No load is longer.
const LONGEST: Duration = Duration::from_secs(120);

// SAFETY: `repr(C)`, integers only, no padding (its size is proven where it is defined), so every byte pattern is a
// value.
unsafe impl Pod for Settings {}

/// When a load is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// After so many frames.
    Frames(u64),
    /// After so long.
    Time(Duration),
}

/// What was sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Frames.
    pub frames: u64,
    /// How long that took.
    pub took: Duration,
    /// CPU time in it: of sending and of all that the receiver's kernel does with the packets, for both happen on one
    /// CPU. What other processes take from that CPU is not in it.
    pub cpu: Duration,
}

/// The packet source of a host. One load at a time.
pub struct Source<'a> {
    host: &'a Host,
    ebpf: Ebpf,
    frame: Vec<u8>,
    cpu: usize,
}

impl<'a> Source<'a> {
    /// Loads that of a pair's sender; [`Source::prepare`] comes next.
    ///
    /// # Errors
    /// The object is missing, or the kernel refuses it (before 5.18 there are no live frames).
    pub fn load(pair: &'a Pair) -> Result<Self> {
        // The last CPU: interrupts and whoever is not asked mostly run on the first.
        let cpu = thread::available_parallelism().map_or(1, usize::from) - 1;
        Self::load_on(pair.sender(), cpu)
    }

    /// Loads one that sends over a host's end of a cable, on one CPU.
    ///
    /// # Errors
    /// As [`Source::load`].
    pub fn load_on(host: &'a Host, cpu: usize) -> Result<Self> {
        let path = object();
        let mut ebpf = EbpfLoader::new().load_file(&path).with_context(|| missing(&path))?;
        let program: &mut Xdp =
            ebpf.program_mut(programs::SOURCE).context("the reference has no packet source")?.try_into()?;
        program.load().context("the kernel refused the packet source")?;
        Ok(Self { host, ebpf, frame: Vec::new(), cpu })
    }

    /// Sets what will be sent: from the first flow of the order on. Returns the length of the order: after as many
    /// frames it begins again.
    ///
    /// # Errors
    /// The maps cannot be written.
    pub fn prepare(&mut self, shape: Shape, order: Order, flows: u32) -> Result<u64> {
        let numbers = order.flows(flows);
        let mut chunks: Array<_, Chunk> =
            self.ebpf.map_mut(maps::ORDER).context("the reference has no order")?.try_into()?;
        for (index, chunk) in numbers.chunks_exact(CHUNK).enumerate() {
            let chunk: &Chunk = chunk.try_into()?;
            chunks.set(index as u32, chunk, 0).context("cannot write the order of packets")?;
        }
        self.frame = shape.frame(0);
        let family = match shape.family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        let settings = Settings {
            next: 0,
            ifindex: index_of(self.host)?,
            mask: (numbers.len() - 1) as u32,
            family,
            header_sum: shape.header_sum(),
        };
        self.settings()?.set(0, settings, 0).context("cannot set up the packet source")?;
        Ok(numbers.len() as u64)
    }

    fn settings(&mut self) -> Result<Array<&mut aya::maps::MapData, Settings>> {
        Ok(self.ebpf.map_mut(maps::SOURCE).context("the reference has no settings")?.try_into()?)
    }

    /// Frames that the source has made since it was prepared.
    fn made(&mut self) -> Result<u64> {
        Ok(self.settings()?.get(&0, 0).context("cannot ask the packet source")?.next)
    }

    /// Sends, as fast as it can be done or at `rate` frames a second; `meanwhile` is called again and again on
    /// the calling thread, told how long it may wait for something to do, and not after the end.
    ///
    /// # Errors
    /// The kernel refused to run the source, or what `meanwhile` failed with.
    pub fn send(
        &mut self,
        until: Until,
        rate: Option<u64>,
        mut meanwhile: impl FnMut(Duration) -> Result<()>,
    ) -> Result<Sent> {
        let before = self.made()?;
        let program: &Xdp =
            self.ebpf.program(programs::SOURCE).context("the reference has no packet source")?.try_into()?;
        let (frame, cpu, sender) = (self.frame.as_slice(), self.cpu, self.host);
        let (took, cpu) = thread::scope(|scope| {
            let sending = scope.spawn(move || {
                inside(sender, || {
                    let mut here = CpuSet::new();
                    here.set(cpu);
                    sched_setaffinity(None, &here).context("cannot stay on one CPU")?;
                    let before = cpu_of_this_thread()? + cpu_of_softirq_thread(cpu);
                    let took = drive(program, frame, until, rate)?;
                    Ok((took, cpu_of_this_thread()? + cpu_of_softirq_thread(cpu) - before))
                })
            });
            let mut result = Ok(());
            while !sending.is_finished() {
                result = match result {
                    Ok(()) => meanwhile(MEANWHILE),
                    Err(error) => idle(MEANWHILE).and(Err(error)),
                };
            }
            let sent = sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result.and(sent)
        })?;
        Ok(Sent { frames: self.made()? - before, took, cpu })
    }
}

/// For those who have nothing to do while frames are sent.
///
/// # Errors
/// None.
pub fn idle(wait: Duration) -> Result<()> {
    thread::sleep(wait);
    Ok(())
}

/// Runs the program on live frames until it is enough.
fn drive(program: &Xdp, frame: &[u8], until: Until, rate: Option<u64>) -> Result<Duration> {
    let start = clock::now();
    let (wanted, limit) = match until {
        Until::Frames(frames) => (frames, LONGEST),
        Until::Time(time) => (u64::MAX, time.min(LONGEST)),
    };
    let mut sent = 0;
    while sent < wanted && start.elapsed() < limit {
        let due = match rate {
            // What should have been sent by now.
            Some(rate) => (start.elapsed().as_nanos() * u128::from(rate) / 1_000_000_000) as u64 - sent,
            None => u64::from(AT_ONCE),
        };
        if due == 0 {
            thread::sleep(PACE);
            continue;
        }
        let repeat = due.min(wanted - sent).min(AT_ONCE.into()) as u32;
        let options = TestRunOptions {
            data_in: Some(frame),
            repeat,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH.min(repeat)),
            ..TestRunOptions::new()
        };
        program.test_run(options).context("cannot send live frames (they need Linux 5.18)")?;
        sent += u64::from(repeat);
    }
    if matches!(until, Until::Frames(_)) && sent < wanted {
        bail!("only {sent} of {wanted} frames were sent in {LONGEST:?}");
    }
    Ok(start.elapsed())
}

/// Index of the cable's end in a host.
///
/// # Errors
/// The host has lost it.
pub fn index_of(host: &Host) -> Result<u32> {
    let text = host.run(&["cat", &format!("/sys/class/net/{INTERFACE}/ifindex")])?;
    text.trim().parse().with_context(|| format!("{} has no index of {INTERFACE}: {text:?}", host.name()))
}

/// Where `cargo xtask build-ebpf` puts the reference programs.
pub fn object() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/netmon-reference")
}

/// What to say when they cannot be loaded.
pub fn missing(path: &Path) -> String {
    format!("cannot load {}: `cargo xtask build-ebpf` builds it", path.display())
}
