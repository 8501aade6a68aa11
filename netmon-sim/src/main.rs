//! Runs seeds on all processors and says what happened; see docs/simulation.md.

mod clock;

use std::collections::BTreeSet;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use clap::Parser;
use netmon_sim::mutants::Mutant;
use netmon_sim::tally::{FAULTS, Tally};
use netmon_sim::world::{self, Report};

/// Progress is said this often.
const PROGRESS: Duration = Duration::from_secs(10);
/// Failures after which no new seed is begun.
const ENOUGH: usize = 10;

/// Simulates delivery, driven by seeds.
#[derive(Parser)]
struct Options {
    /// How many seeds
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first one [default: from the time, and said]
    #[arg(long)]
    from: Option<u64>,
    /// So many at a time [default: one per processor]
    #[arg(long)]
    jobs: Option<NonZero<usize>>,
    /// Print everything that happens
    #[arg(long)]
    trace: bool,
    /// Make this mistake on purpose: it must be found
    #[arg(long)]
    mutant: Option<Mutant>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    // A panic is a failure of its seed, and said with it.
    std::panic::set_hook(Box::new(|_| {}));
    let from = options.from.unwrap_or_else(|| clock::unix_seconds() * 1_000_000);
    println!("seeds {from} to {}", from.saturating_add(options.seeds).saturating_sub(1));
    let (failed, tally) = run(from, &options);
    show(&tally);
    for report in failed.iter().take(ENOUGH) {
        println!("seed {} FAILED at {}", report.seed, report.failure.as_deref().unwrap_or_default());
        println!("    cargo xtask simulate --from {} --seeds 1 --trace", report.seed);
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the seeds; those that failed, in order, and what happened in all.
fn run(from: u64, options: &Options) -> (Vec<Report>, Tally) {
    let jobs = options.jobs.or_else(|| thread::available_parallelism().ok()).map_or(1, NonZero::get);
    let watch = clock::Stopwatch::start();
    let next = AtomicU64::new(from);
    let end = from.saturating_add(options.seeds);
    let failed: Mutex<Vec<Report>> = Mutex::default();
    let (mut tally, mut done, mut said) = (Tally::default(), 0_u64, Duration::ZERO);
    thread::scope(|scope| {
        let (reports, all) = mpsc::sync_channel::<Report>(64);
        for _ in 0..jobs {
            let (reports, next, failed) = (reports.clone(), &next, &failed);
            scope.spawn(move || {
                while lock(failed).len() < ENOUGH {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || reports.send(one(seed, options)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(reports);
        for report in all {
            done += 1;
            tally.add(&report.tally);
            report.trace.iter().for_each(|line| println!("{line}"));
            if report.failure.is_some() {
                lock(&failed).push(report);
            }
            if watch.elapsed() - said >= PROGRESS {
                said = watch.elapsed();
                progress(done, &failed, said);
            }
        }
    });
    progress(done, &failed, watch.elapsed());
    let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.sort_by_key(|report| report.seed);
    (failed, tally)
}

/// One seed. A panic of what is tested is a failure.
fn one(seed: u64, options: &Options) -> Report {
    catch_unwind(AssertUnwindSafe(|| world::run(seed, options.trace, options.mutant))).unwrap_or_else(
        |panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text =
                text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
            Report {
                seed,
                tally: Tally::default(),
                failure: Some(format!("a panic: {text}")),
                trace: Vec::new(),
            }
        },
    )
}

fn progress(done: u64, failed: &Mutex<Vec<Report>>, time: Duration) {
    let rate = done as f64 / time.as_secs_f64();
    println!(
        "{done} seeds in {:.0} s, {rate:.0} a second, {} failed",
        time.as_secs_f64(),
        lock(failed).len()
    );
}

fn show(tally: &Tally) {
    println!("faults:");
    for fault in FAULTS {
        println!("{:>12} {fault:?}", tally.faults.get(&fault).copied().unwrap_or_default());
    }
    println!("what happened:");
    let mut shown: BTreeSet<&str> = BTreeSet::new();
    for (event, count) in &tally.events {
        if shown.insert(event) {
            println!("{count:>12} {event}");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
