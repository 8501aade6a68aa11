//! TCP throughput: what is left of it while somebody watches.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use aya::sys::{Stats, enable_stats};
use netmon_agent::kernel::{Mode, Sizes};

use super::numbers::{median, median_ratio};
use super::pair::{INTERFACE, Pair, RECEIVER, inside};
use super::report::{Findings, Table, Target, number, spread};
use super::source::{idle, index_of};
use super::subject::{Netmon, Reference, Subject};
use crate::clock;
use crate::netmon::Daemon;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How often each has the connection.
    pub rounds: usize,
}

/// Each has the connection for so long before the next one gets it.
const SLICE: Duration = Duration::from_millis(300);
/// After a change, this is not measured.
const SETTLE: Duration = Duration::from_millis(50);

/// Measures: all within one connection, whose two ends keep their CPUs, for no two connections are equally fast.
///
/// # Errors
/// iperf3 cannot be started or ends, or the kernel refuses a program.
pub fn run(pair: &Pair, plan: Plan) -> Result<Findings> {
    let (rates, times) = inside(pair.receiver(), || {
        let connection = Connection::open(pair)?;
        let mut netmon = Netmon::load("bench-tcp", Mode::Tc, Sizes::default(), index_of(pair.receiver())?)?;
        netmon.readings.discard = true;
        let mut netmon = Subject::Netmon(Box::new(netmon));
        let mut empty = Subject::Reference(Reference::empty(Mode::Tc)?);
        let mut hash = Subject::Reference(Reference::hash(65_536)?);

        let mut rates: [Vec<f64>; 3] = Default::default();
        for round in 0..plan.rounds {
            // Nobody is always the first.
            for turn in 0..3 {
                let which = (round + turn) % 3;
                let watcher = match which {
                    0 => None,
                    1 => Some(&mut empty),
                    _ => Some(&mut netmon),
                };
                rates[which].push(connection.slice(watcher)?.rate);
            }
        }
        // The statistics cost throughput themselves.
        let _statistics = enable_stats(Stats::RunTime).context("cannot enable run-time statistics")?;
        let mut times: [Vec<f64>; 3] = Default::default();
        for _ in 0..plan.rounds.div_ceil(4) {
            for (subject, times) in [&mut empty, &mut hash, &mut netmon].into_iter().zip(&mut times) {
                times.push(connection.slice(Some(subject))?.run_ns);
            }
        }
        Ok((rates, times))
    })?;
    let mut table = Table::new(
        "TCP throughput over veth (iperf3, one connection)",
        &format!(
            "All take turns within one connection, {} times {} ms each; medians, and medians of the ratios within each \
             turn. netmon's programs see both directions and are read as by the agent.",
            plan.rounds,
            SLICE.as_millis()
        ),
        &["watcher", "Gbit/s", "/ nothing", "/ empty program"],
    );
    for (name, rate) in ["nothing", "empty program", "**netmon**"].into_iter().zip(&rates) {
        table.row([
            name.into(),
            number(median(rate.iter().copied()) * 8.0 / 1e9, 2),
            number(median_ratio(rate, &rates[0]), 3),
            number(median_ratio(rate, &rates[1]), 3),
        ]);
    }
    let kept = median_ratio(&rates[2], &rates[0]);
    let target = Target::at_least("TCP over veth, throughput by the unmonitored one's", 0.99, kept, 3, "");
    Ok(Findings { tables: vec![table, run_times(&times)], targets: vec![target] })
}

/// What a super-packet costs.
fn run_times(times: &[Vec<f64>; 3]) -> Table {
    let [empty, hash, netmon] = times;
    let net =
        |times: &[f64]| -> Vec<f64> { times.iter().zip(empty).map(|(time, empty)| time - empty).collect() };
    let (hash, netmon) = (net(hash), net(netmon));
    let mut table = Table::new(
        "Cost of a TCP super-packet (run time during iperf3)",
        "Nanoseconds per run of the ingress program, net of the empty program of the same round: median, and the least \
         in brackets. A run is a super-packet of up to 64 KiB, whose segments netmon counts.",
        &["empty, gross", "netmon", "hash", "netmon / hash"],
    );
    table.row([
        number(median(empty.iter().copied()), 0),
        spread(&netmon),
        spread(&hash),
        number(median_ratio(&netmon, &hash), 2),
    ]);
    table
}

/// iperf3, for as long as this is there.
struct Connection {
    _client: Daemon,
    _server: Daemon,
}

impl Connection {
    /// To be called inside the receiver.
    fn open(pair: &Pair) -> Result<Self> {
        let mut command = pair.receiver().command("iperf3");
        command.args(["--server", "--bind", RECEIVER]);
        let output = pair.directory().join("iperf3-server.txt");
        let mut server = Daemon::start("iperf3 --server".to_owned(), command, &output)?;
        server.wait_until("it to listen", || listens(pair))?;

        let mut command = pair.sender().command("iperf3");
        command.args(["--client", RECEIVER, "--time", "86400"]);
        if thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1) {
            command.args(["--affinity", "0,1"]);
        }
        let output = pair.directory().join("iperf3-client.txt");
        let mut client = Daemon::start("iperf3 --client".to_owned(), command, &output)?;
        client.wait_until("its connection to be in full swing", || {
            arrived().is_ok_and(|bytes| bytes > 1 << 30)
        })?;
        Ok(Self { _client: client, _server: server })
    }

    /// Lets somebody watch for a while.
    fn slice(&self, mut watcher: Option<&mut Subject>) -> Result<Slice> {
        let mut ran = None;
        if let Some(subject) = &mut watcher {
            subject.attach()?;
        }
        pass(&mut watcher, SETTLE)?;
        if let Some(subject) = &mut watcher {
            ran = Some(subject.run_time()?);
        }
        let (began, before) = (clock::now(), arrived()?);
        pass(&mut watcher, SLICE)?;
        let (bytes, took) = (arrived()? - before, began.elapsed());
        if bytes == 0 {
            bail!("iperf3 has stopped sending");
        }
        let mut run_ns = f64::NAN;
        if let (Some(subject), Some(before)) = (&mut watcher, ran) {
            run_ns = subject.run_time()?.per_run_since(before);
            subject.detach()?;
        }
        Ok(Slice { rate: bytes as f64 / took.as_secs_f64(), run_ns })
    }
}

/// What somebody saw.
struct Slice {
    /// Bytes per second.
    rate: f64,
    /// Nanoseconds that a run of the program took; not a number unless that is told.
    run_ns: f64,
}

/// Lets time pass.
fn pass(watcher: &mut Option<&mut Subject>, length: Duration) -> Result<()> {
    let began = clock::now();
    while let Some(rest) = length.checked_sub(began.elapsed()) {
        match watcher {
            Some(subject) => subject.tend(rest)?,
            None => idle(rest)?,
        }
    }
    Ok(())
}

/// Bytes that have arrived at the interface of the calling thread's network namespace.
fn arrived() -> Result<u64> {
    let devices = fs::read_to_string("/proc/thread-self/net/dev").context("/proc/thread-self/net/dev")?;
    let numbers =
        devices.lines().find_map(|line| line.trim_start().strip_prefix(INTERFACE)?.strip_prefix(':'));
    let bytes = numbers.and_then(|numbers| numbers.split_ascii_whitespace().next()?.parse().ok());
    bytes.with_context(|| format!("/proc/thread-self/net/dev tells nothing of {INTERFACE}"))
}

/// Local address 0A63:0002, port 5201, state LISTEN, as `/proc/net/tcp` writes it.
fn listens(pair: &Pair) -> bool {
    let sockets = fs::read_to_string(format!("/proc/{}/net/tcp", pair.receiver().holder_pid()));
    sockets.is_ok_and(|sockets| sockets.lines().any(|line| line.contains(":1451 ") && line.contains(" 0A ")))
}
