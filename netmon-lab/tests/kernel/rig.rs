//! What the tests stand on: threads with namespaces of their own, and the programs loaded under a private pin
//! directory. Namespaces end with their thread; nothing is left on the machine.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::Command,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use netmon_agent::kernel::{FlowDelta, FlowId, Kernel, KernelError, LoadOptions};
use netmon_common::abi::{FlowOpened, FlowState, OPENED_UNKNOWN, Stats, programs};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    process::geteuid,
    thread::{UnshareFlags, gettid, unshare_unsafe},
};

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network and a mount namespace of its own, with a BPF file system at `/sys/fs/bpf`-like `bpffs`.
pub struct Host {
    pub tid: i32,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    pub bpffs: PathBuf,
    _directory: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        assert!(
            geteuid().is_root(),
            "these tests need root: sudo -E cargo test -p netmon-agent --test kernel"
        );
        let directory = tempfile::tempdir().unwrap();
        let bpffs = directory.path().to_owned();
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, wait) = mpsc::channel();
        let mount_point = bpffs.clone();
        let thread = thread::spawn(move || {
            // SAFETY: file system attributes and namespaces of this thread alone; no file descriptors are unshared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            mount("bpf", &mount_point, "bpf", MountFlags::empty(), None).unwrap();
            ip("link set lo up");
            ready.send(gettid().as_raw_nonzero().get()).unwrap();
            for job in queue {
                job();
            }
        });
        let tid = wait.recv().expect("the host's thread could not make its namespaces");
        Self { tid, jobs: Some(jobs), thread: Some(thread), bpffs, _directory: directory }
    }

    /// Runs something in the host, and waits for it. A panic in there is one here.
    pub fn run<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> R {
        self.start(job).recv().expect("the job in the host panicked")
    }

    /// Starts something in the host that runs beside the caller.
    pub fn start<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> mpsc::Receiver<R> {
        let (result, wait) = mpsc::channel();
        let job = Box::new(move || {
            // The receiver has gone when its test has failed already.
            let _ = result.send(job());
        });
        self.jobs.as_ref().unwrap().send(job).expect("an earlier job in the host panicked");
        wait
    }

    pub fn ip(&self, arguments: &str) -> String {
        let arguments = arguments.to_owned();
        self.run(move || ip(&arguments))
    }

    pub fn options(&self) -> LoadOptions {
        LoadOptions { pin_dir: self.bpffs.join("netmon"), ..LoadOptions::default() }
    }

    pub fn load(&self, options: LoadOptions) -> Loaded {
        let kernel =
            self.run(move || Kernel::load(options)).unwrap_or_else(|error| panic!("{}", chain(&error)));
        Loaded {
            kernel: Some(kernel),
            jobs: self.jobs.clone().unwrap(),
            flows: BTreeMap::new(),
            opened: Vec::new(),
        }
    }

    pub fn ifindex(&self, name: &str) -> u32 {
        let links: serde_json::Value =
            serde_json::from_str(&self.ip(&format!("-j link show dev {name}"))).unwrap();
        links[0]["ifindex"].as_u64().unwrap() as u32
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A `Kernel` that attaches and ends in its host's namespaces, whoever holds it. Must not outlive its host.
pub struct Loaded {
    kernel: Option<Kernel>,
    jobs: mpsc::Sender<Job>,
    /// What was read so far.
    flows: BTreeMap<FlowId, FlowState>,
    /// Records that were read and not asked for yet.
    opened: Vec<FlowOpened>,
}

impl Loaded {
    /// Does something with it in its host.
    pub fn run<R: Send + 'static>(&mut self, job: impl FnOnce(&mut Kernel) -> R + Send + 'static) -> R {
        let mut kernel = self.kernel.take().unwrap();
        let (result, wait) = mpsc::channel();
        self.send(move || {
            let answer = job(&mut kernel);
            let _ = result.send((kernel, answer));
        });
        let (kernel, answer) = wait.recv().expect("the job in the host panicked");
        self.kernel = Some(kernel);
        answer
    }

    /// Adds up what was read.
    pub fn take_in(&mut self, mut deltas: Vec<FlowDelta>) {
        deltas.sort_by_key(|delta| delta.first_ns);
        for delta in deltas {
            let state = self.flows.entry(delta.flow).or_insert_with(|| FlowState {
                first_ns: delta.first_ns,
                opened: delta.opened,
                ifindex: delta.ifindex,
                ..FlowState::default()
            });
            *state += delta.moved;
            if state.opened == OPENED_UNKNOWN {
                state.opened = delta.opened;
            }
            state.last_ns = state.last_ns.max(delta.last_ns);
            (state.class, state.label) = (delta.class, delta.label);
            state.tcp_flags |= delta.tcp_flags;
            state.hints |= delta.hints;
        }
    }

    /// Forgets what was read.
    pub fn forget(&mut self) {
        flows(self);
        self.flows.clear();
    }

    /// A clean end.
    pub fn shutdown(mut self) -> Result<(), KernelError> {
        let kernel = self.kernel.take().unwrap();
        let (result, wait) = mpsc::channel();
        self.send(move || {
            let _ = result.send(kernel.shutdown());
        });
        wait.recv().expect("the job in the host panicked")
    }

    /// As SIGKILL does it to clsact filters and pins: nothing is taken away.
    pub fn die(mut self) {
        std::mem::forget(self.kernel.take());
    }

    /// False: the host has ended.
    fn send(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let result = self.jobs.send(Box::new(job));
        let sent = result.is_ok();
        if let Err(unsent) = result {
            // Dropping it here would take away what stands in the namespaces of this thread.
            std::mem::forget(unsent);
        }
        sent
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let Some(kernel) = self.kernel.take() else { return };
        let (result, wait) = mpsc::channel();
        let sent = self.send(move || {
            drop(kernel);
            let _ = result.send(());
        });
        // A host whose job has panicked ends without an answer.
        if sent {
            let _ = wait.recv();
        }
    }
}

impl std::ops::Deref for Loaded {
    type Target = Kernel;

    fn deref(&self) -> &Kernel {
        self.kernel.as_ref().unwrap()
    }
}

impl std::ops::DerefMut for Loaded {
    fn deref_mut(&mut self) -> &mut Kernel {
        self.kernel.as_mut().unwrap()
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Runs a command in the namespaces of the calling thread and returns what it prints.
pub fn sh(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn ip(arguments: &str) -> String {
    sh("ip", arguments)
}

/// Asks until the answer is `Ok`, for ten seconds at most; then fails with the last `Err`.
pub fn eventually<T>(mut ask: impl FnMut() -> Result<T, String>) -> T {
    #[expect(clippy::disallowed_methods, reason = "a test waits in real time")]
    let start = Instant::now();
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(why) => assert!(start.elapsed() < Duration::from_secs(10), "{why}"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The programs, run by `BPF_PROG_TEST_RUN` on frames that the test makes.
pub struct Bench {
    // First: it ends before its host.
    pub kernel: Loaded,
    pub host: Host,
}

/// Every entry point for Ethernet frames: name, direction, verdict "go on".
pub const ENTRIES: [(&str, bool, u32); 3] = [
    (programs::TC_INGRESS, false, u32::MAX),
    (programs::TC_EGRESS, true, u32::MAX),
    (programs::XDP_INGRESS, false, 2),
];

impl Bench {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut LoadOptions)) -> Self {
        let host = Host::new();
        let mut options = host.options();
        change(&mut options);
        let kernel = host.load(options);
        Self { kernel, host }
    }

    pub fn pin(&self, name: &str) -> PathBuf {
        self.host.bpffs.join("netmon").join(name)
    }

    /// Runs a frame through a program and returns the verdict.
    pub fn run(&self, program: &'static str, frame: &[u8]) -> u32 {
        let (pin, frame) = (self.pin(program), frame.to_vec());
        self.host.run(move || {
            let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::default() };
            if program == programs::XDP_INGRESS {
                Xdp::from_pin(pin, XdpAttachType::Interface).unwrap().test_run(options).unwrap().return_value
            } else {
                SchedClassifier::from_pin(pin).unwrap().test_run(options).unwrap().return_value
            }
        })
    }

    /// A frame that arrives (TC).
    pub fn receive(&self, frame: &[u8]) {
        assert_eq!(self.run(programs::TC_INGRESS, frame), u32::MAX);
    }

    /// A frame that leaves.
    pub fn send(&self, frame: &[u8]) {
        assert_eq!(self.run(programs::TC_EGRESS, frame), u32::MAX);
    }

    pub fn stats(&self) -> Stats {
        stats(&self.kernel)
    }

    pub fn flows(&mut self) -> BTreeMap<FlowId, FlowState> {
        flows(&mut self.kernel)
    }

    /// The only flow.
    pub fn flow(&mut self) -> (FlowId, FlowState) {
        let flows = self.flows();
        assert_eq!(flows.len(), 1, "{flows:#?}");
        flows.into_iter().next().unwrap()
    }

    pub fn opened(&mut self) -> Vec<FlowOpened> {
        take_records(&mut self.kernel);
        std::mem::take(&mut self.kernel.opened)
    }
}

/// Boot clock, nanoseconds.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The statistics, after checking that every frame is in exactly one of them.
pub fn stats(kernel: &Kernel) -> Stats {
    let stats = kernel.stats();
    let sum = stats.counted + stats.not_ip + stats.other_protocol + stats.malformed + stats.table_full;
    assert_eq!(stats.seen, sum, "{stats:?}");
    stats
}

fn take_records(kernel: &mut Loaded) {
    let mut deltas = Vec::new();
    let now = now();
    while let Some(opened) = kernel.next_opened(now, &mut deltas) {
        kernel.opened.push(opened);
    }
    kernel.take_in(deltas);
}

/// Every flow with the sum of all that it has moved.
pub fn flows(kernel: &mut Loaded) -> BTreeMap<FlowId, FlowState> {
    take_records(kernel);
    let mut deltas = Vec::new();
    kernel.sweep_all(now(), &mut deltas);
    kernel.take_in(deltas);
    kernel.flows.clone()
}
