//! The programs' own words (aya-log): for those who look for a fault. Off, they cost nothing: the kernel takes the code
//! out of the programs when it loads them.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use aya::Ebpf;
use aya_log::{EbpfLogger, Level};
use log::{Log, Metadata, Record};
use netmon_common::abi::CpuStats;

use super::{KernelError, mapping::Mapping};

/// The ring in which the programs' words wait; its name is aya-log's.
pub(super) const RING: &str = "AYA_LOGS";
/// Its size while the programs speak, bytes: some 700 lines. While they are silent, it has the page that is the least.
pub(super) const RING_BYTES: u32 = 1 << 17;
/// The constant that the programs compare with; its name is aya-log's.
pub(super) const LEVEL: &str = aya_log::LEVEL;

/// What the programs say of themselves: lines of this weight and heavier ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WordLevel {
    /// Nothing, at no cost.
    #[default]
    Off,
    /// As yet as `off`.
    Error,
    /// Packets that were refused.
    Warn,
    /// As yet as `warn`.
    Info,
    /// And frames that cannot be read, and fragments whose first one is not known.
    Debug,
    /// And flows that gave up their slot before it was read.
    Trace,
}

impl WordLevel {
    /// As the programs know it.
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::Error => Level::Error.into(),
            Self::Warn => Level::Warn.into(),
            Self::Info => Level::Info.into(),
            Self::Debug => Level::Debug.into(),
            Self::Trace => Level::Trace.into(),
        }
    }
}

/// Reads what the programs say and gives it to a logger, line by line. The descriptor becomes readable when there is
/// something.
pub struct Words<L> {
    logger: EbpfLogger<Counting<L>>,
    received: Arc<AtomicU64>,
    stats: Arc<Mapping>,
    /// What the programs have said: each CPU's counter as it was read last, and all of it.
    counters: Vec<u32>,
    said: u64,
    /// As far as was told.
    lost: u64,
}

impl<L> std::fmt::Debug for Words<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Words")
            .field("received", &self.received)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

impl<L: Log> Words<L> {
    pub(super) fn new(
        ebpf: &mut Ebpf,
        stats: Arc<Mapping>,
        cpus: usize,
        logger: L,
    ) -> Result<Self, KernelError> {
        let received = Arc::new(AtomicU64::new(0));
        let counting = Counting { logger, received: received.clone() };
        let logger = EbpfLogger::init_with_logger(ebpf, counting)
            .map_err(|source| KernelError::Words(Box::new(source)))?;
        Ok(Self { logger, received, stats, counters: vec![0; cpus], said: 0, lost: 0 })
    }

    /// Gives all lines that wait to the logger, and returns how many found no room in the ring and were not told of
    /// before. A line that is being written is taken for lost by who asks in that very moment; over time, none is
    /// missing in the sum.
    ///
    /// Does not return while the programs speak faster than the logger listens: for a thread of its own.
    pub fn read(&mut self) -> u64 {
        for (cpu, counter) in self.counters.iter_mut().enumerate() {
            let now = self.stats.half(said_at(cpu)).load(Ordering::Relaxed);
            self.said += u64::from(now.wrapping_sub(std::mem::replace(counter, now)));
        }
        self.logger.flush();
        let missing = self.said.saturating_sub(self.received.load(Ordering::Relaxed));
        let lost = missing.saturating_sub(self.lost);
        self.lost += lost;
        lost
    }
}

impl<L> AsFd for Words<L> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.logger.as_fd()
    }
}

/// Where a CPU's counter is, in words of four bytes.
fn said_at(cpu: usize) -> usize {
    (cpu * size_of::<CpuStats>() + std::mem::offset_of!(CpuStats, said)) / 4
}

/// Counts what it hands on.
struct Counting<L> {
    logger: L,
    received: Arc<AtomicU64>,
}

impl<L: Log> Log for Counting<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.received.fetch_add(1, Ordering::Relaxed);
        self.logger.log(record);
    }

    fn flush(&self) {
        self.logger.flush();
    }
}
