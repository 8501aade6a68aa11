//! What hangs on the interface while packets arrive: netmon's programs, or what they are compared with.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::maps::MapData;
use aya::programs::links::LinkOrder;
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions, TcAttachType};
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{ProgramInfo, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use netmon_agent::clock::Now;
use netmon_agent::kernel::{Kernel, LoadOptions, Mode, Sizes};
use netmon_agent::pace::Pace;
use netmon_common::abi;
use netmon_common::prefixes::PrefixList;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::frames;
use super::pair::INTERFACE;
use super::readings::Readings;
use super::shared::{maps, programs};
use super::source::{idle, missing, object};

/// The tries are as full as an agent's.
const IP_TXT: &str = include_str!("../../../ip.txt");
/// Label of all that is in it: who it is does not matter here.
const LIST_LABEL: u16 = 1;

fn boot_ns() -> u64 {
    Now::read().boot_ns
}

/// Run time that the kernel has summed up for a program while statistics were enabled.
#[derive(Clone, Copy, Debug)]
pub struct RunTime {
    ns: u64,
    runs: u64,
}

impl RunTime {
    fn of(info: &ProgramInfo) -> Self {
        Self { ns: info.run_time().as_nanos() as u64, runs: info.run_count() }
    }

    /// Nanoseconds per run since an earlier moment; not a number without a run.
    pub fn per_run_since(self, before: Self) -> f64 {
        (self.ns - before.ns) as f64 / (self.runs - before.runs) as f64
    }

    /// Runs since an earlier moment.
    pub fn runs_since(self, before: Self) -> u64 {
        self.runs - before.runs
    }
}

/// The reference programs.
pub struct Reference {
    ebpf: Ebpf,
    program: &'static str,
    link: Option<ReferenceLink>,
}

/// Detaches when it is dropped.
enum ReferenceLink {
    Tc { _link: SchedClassifierLink },
    Xdp { _link: XdpLink },
}

impl Reference {
    /// The program that does nothing, at the hook of this mode.
    ///
    /// # Errors
    /// The object is missing, or the kernel refuses it.
    pub fn empty(mode: Mode) -> Result<Self> {
        match mode {
            Mode::Tc => Self::load(programs::EMPTY, 1),
            Mode::Xdp => Self::load(programs::XDP_EMPTY, 1),
        }
    }

    /// The hash map counter with room for so many flows of each family.
    ///
    /// # Errors
    /// As [`Reference::empty`].
    pub fn hash(flows: u32) -> Result<Self> {
        Self::load(programs::HASH, flows)
    }

    fn load(program: &'static str, flows: u32) -> Result<Self> {
        let path = object();
        let mut loader = EbpfLoader::new();
        let mut ebpf = loader
            .map_max_entries(maps::HASH4, flows)
            .map_max_entries(maps::HASH6, flows)
            // The packet source has its own.
            .map_max_entries(maps::ORDER, 1)
            .load_file(&path)
            .with_context(|| missing(&path))?;
        let refused = || format!("the kernel refused {program}");
        match ebpf.program_mut(program).with_context(|| format!("the reference has no {program}"))? {
            aya::programs::Program::Xdp(program) => program.load().with_context(refused)?,
            aya::programs::Program::SchedClassifier(program) => program.load().with_context(refused)?,
            _ => anyhow::bail!("{program} is of another type"),
        }
        Ok(Self { ebpf, program, link: None })
    }

    /// Attaches to what arrives at the interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach(&mut self) -> Result<()> {
        self.link = Some(if self.program == programs::XDP_EMPTY {
            let program = self.xdp()?;
            let id = program.attach(INTERFACE, XdpMode::Default)?;
            ReferenceLink::Xdp { _link: program.take_link(id)? }
        } else {
            let program = self.tc()?;
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = program.attach_with_options(INTERFACE, TcAttachType::Ingress, options)?;
            ReferenceLink::Tc { _link: program.take_link(id)? }
        });
        Ok(())
    }

    /// The TC program, for a test run.
    ///
    /// # Errors
    /// It is an XDP program.
    pub fn tc(&mut self) -> Result<&mut SchedClassifier> {
        Ok(self.ebpf.program_mut(self.program).context("the program has gone")?.try_into()?)
    }

    /// The XDP program, for a test run.
    ///
    /// # Errors
    /// It is a TC program.
    pub fn xdp(&mut self) -> Result<&mut Xdp> {
        Ok(self.ebpf.program_mut(self.program).context("the program has gone")?.try_into()?)
    }

    fn run_time(&mut self) -> Result<RunTime> {
        let info = if self.program == programs::XDP_EMPTY { self.xdp()?.info() } else { self.tc()?.info() };
        Ok(RunTime::of(&info?))
    }
}

/// netmon's programs, read as the agent reads them.
pub struct Netmon {
    /// The loaded programs.
    pub kernel: Kernel,
    ring: OwnedFd,
    /// What was read.
    pub readings: Readings,
    mode: Mode,
    pins: PathBuf,
    pace: Pace,
    ifindex: u32,
}

impl Netmon {
    /// Loads them, with the prefixes of ip.txt and those of [`frames`]; must be called inside the receiver. `name` tells their pins from those of others.
    ///
    /// # Errors
    /// As [`Kernel::load`].
    pub fn load(name: &str, mode: Mode, sizes: Sizes, ifindex: u32) -> Result<Self> {
        let pins = Path::new("/sys/fs/bpf").join(name);
        let options = LoadOptions { pin_dir: pins.clone(), mode, sizes, ..LoadOptions::default() };
        let mut kernel = Kernel::load(options)?;
        let list = PrefixList::parse(IP_TXT).context("ip.txt")?;
        let muted = list.prefixes().map(|(prefix, _)| (prefix, LIST_LABEL)).chain(frames::muted_prefixes());
        kernel.set_prefixes(&frames::private_prefixes(), muted)?;
        let ring = kernel.ring_fd()?;
        Ok(Self {
            kernel,
            ring,
            readings: Readings::default(),
            mode,
            pins,
            pace: Pace::new(boot_ns()),
            ifindex,
        })
    }

    /// Where a program is pinned.
    pub fn pin(&self, program: &str) -> PathBuf {
        self.pins.join(program)
    }

    /// Name of the program that sees what arrives.
    fn ingress(&self) -> &'static str {
        match self.mode {
            Mode::Tc => abi::programs::TC_INGRESS,
            Mode::Xdp => abi::programs::XDP_INGRESS,
        }
    }

    /// What the agent does all the time: waits for records in the ring, at most so long, empties it, and reads the
    /// tables at its pace.
    ///
    /// # Errors
    /// The ring cannot be waited for.
    pub fn tend(&mut self, wait: Duration) -> Result<()> {
        let timeout = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.ring, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the ring"),
        }
        self.readings.drain(&mut self.kernel);
        let now = boot_ns();
        if now >= self.pace.due_ns() {
            self.pace.begin(now);
            self.readings.sweep(&mut self.kernel);
            self.pace.end(boot_ns());
        }
        Ok(())
    }

    fn run_time(&self) -> Result<RunTime> {
        Ok(RunTime::of(&ProgramInfo::from_pin(self.pin(self.ingress()))?))
    }

    /// Kernel memory of all maps, in bytes, and of each by name.
    ///
    /// # Errors
    /// The pins cannot be read.
    pub fn memory(&self) -> Result<(u64, Vec<(String, u64)>)> {
        let mut maps = Vec::new();
        for entry in std::fs::read_dir(&self.pins)? {
            let path = entry?.path();
            let Ok(map) = MapData::from_pin(&path) else { continue };
            let number = map.fd().as_fd().as_raw_fd();
            // The programs are pinned here, too, and their descriptors pass for those of maps until one looks.
            let kind = std::fs::read_link(format!("/proc/self/fd/{number}"))?;
            if kind != Path::new("anon_inode:bpf-map") {
                continue;
            }
            let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
            let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok());
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            maps.push((name, bytes.context("the kernel does not tell the memory of a map")?));
        }
        maps.sort_by_key(|(name, bytes)| (std::cmp::Reverse(*bytes), name.clone()));
        Ok((maps.iter().map(|(_, bytes)| bytes).sum(), maps))
    }
}

/// One of those that are compared.
pub enum Subject {
    /// A reference program.
    Reference(Reference),
    /// netmon.
    Netmon(Box<Netmon>),
}

impl Subject {
    /// Attaches to what arrives.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn attach(&mut self) -> Result<()> {
        match self {
            Self::Reference(reference) => reference.attach(),
            Self::Netmon(netmon) => netmon.kernel.attach(netmon.ifindex).map(drop).map_err(Into::into),
        }
    }

    /// Detaches.
    ///
    /// # Errors
    /// As [`Kernel::detach`].
    pub fn detach(&mut self) -> Result<()> {
        match self {
            Self::Reference(reference) => reference.link = None,
            Self::Netmon(netmon) => {
                netmon.kernel.detach(netmon.ifindex)?;
            }
        }
        Ok(())
    }

    /// What its user-space side does all the time, at most for so long.
    ///
    /// # Errors
    /// As [`Netmon::tend`].
    pub fn tend(&mut self, wait: Duration) -> Result<()> {
        match self {
            Self::Reference(_) => idle(wait),
            Self::Netmon(netmon) => netmon.tend(wait),
        }
    }

    /// Run time of the program that sees what arrives.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn run_time(&mut self) -> Result<RunTime> {
        match self {
            Self::Reference(reference) => reference.run_time(),
            Self::Netmon(netmon) => netmon.run_time(),
        }
    }
}
