//! `cargo xtask fuzz`: netmon's targets under libFuzzer (docs/fuzzing.md).
//!
//! cargo-fuzz builds them, with coverage counters and without a sanitizer, which the stable compiler does. What is found
//! is kept in `target/fuzz`; the smallest inputs that reach everything come back into the repository.

use std::env::consts::ARCH;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{setup, sh};

const CARGO_FUZZ: &str = "0.13.2";
/// libFuzzer is C++.
const PACKAGES: [&str; 1] = ["g++"];
/// The crate of the targets' binaries, and their sources, from the workspace's root.
const CRATE: &str = "netmon-fuzz/fuzz";
const CORPUS: &str = "netmon-fuzz/corpus";
/// What the repository keeps for a target: together they are within the 2 MiB that netmon-fuzz's tests allow.
const KEPT_BYTES: u64 = 96 << 10;
/// An input that takes longer has found something: all of them together take seconds.
const TIMEOUT_S: u32 = 25;

/// Options of `fuzz`.
#[derive(clap::Args)]
pub struct Options {
    /// Only these targets
    targets: Vec<String>,
    /// Minutes for each target
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
}

/// Builds the targets, runs one after the other, and minimises what they found into the corpus.
///
/// # Errors
/// A target found something (the message says how to replay it), or a step failed.
pub fn run(options: &Options) -> Result<()> {
    let targets = chosen(&options.targets)?;
    setup::build()?;
    sh::ensure_packages(&PACKAGES)?;
    let cargo_fuzz = setup::cargo_tool("cargo-fuzz", CARGO_FUZZ)?;
    let place = Place { root: sh::workspace().join("target/fuzz") };
    for target in &targets {
        let mut build = Command::new(&cargo_fuzz);
        build.current_dir(sh::workspace()).args(["build", "--fuzz-dir", CRATE, "--sanitizer", "none"]);
        sh::run(build.arg("--target-dir").arg(place.root.join("build")).arg(target))?;
    }
    let mut seeds = Command::new("cargo");
    seeds.current_dir(sh::workspace()).args(["run", "--locked", "--package", "netmon-fuzz", "--", "seeds"]);
    sh::run(seeds.arg(place.root.join("seeds")))?;

    let outcomes: Vec<Outcome> =
        targets.iter().map(|target| place.fuzz(target, options.minutes)).collect::<Result<_>>()?;
    println!("{}", Outcome::HEADING);
    outcomes.iter().for_each(|outcome| println!("{}", outcome.row()));
    let crashes: Vec<String> = outcomes.iter().filter_map(Outcome::advice).collect();
    ensure!(crashes.is_empty(), "{}", crashes.join("\n"));
    Ok(())
}

/// The targets of these names; all of them when there is none.
fn chosen(names: &[String]) -> Result<Vec<String>> {
    let mut all: Vec<String> = files(&sh::workspace().join(CRATE).join("fuzz_targets"))?
        .iter()
        .filter_map(|file| Some(file.file_stem()?.to_str()?.to_owned()))
        .collect();
    all.sort();
    for name in names {
        ensure!(all.contains(name), "there is no target `{name}`; there are {}", all.join(" "));
    }
    Ok(if names.is_empty() { all } else { names.to_vec() })
}

/// Where everything is that is not committed.
struct Place {
    root: PathBuf,
}

impl Place {
    fn fuzz(&self, target: &str, minutes: f64) -> Result<Outcome> {
        let seconds = (minutes * 60.0).ceil() as u64;
        let (work, artifacts) =
            (self.root.join("corpus").join(target), self.root.join("artifacts").join(target));
        for directory in [&work, &artifacts] {
            fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let committed = sh::workspace().join(CORPUS).join(target);
        for file in files(&self.root.join("seeds").join(target))?.iter().chain(&files(&committed)?) {
            let name = file.file_name().context("a file without a name")?;
            fs::copy(file, work.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
        }

        let log = self.root.join(format!("{target}.log"));
        eprintln!("fuzzing {target} for {seconds} s: {}", log.display());
        let status = self
            .binary(target)
            .arg(&work)
            .args([format!("-max_total_time={seconds}"), format!("-timeout={TIMEOUT_S}")])
            .arg("-print_final_stats=1")
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .stderr(File::create(&log).with_context(|| format!("cannot create {}", log.display()))?)
            .status()
            .with_context(|| format!("cannot start the target {target}"))?;
        let said = fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let mut outcome = Outcome::of(target, &said);
        if status.success() {
            let minimal = self.minimised(target, &work)?;
            keep(&committed, &minimal)?;
        } else if outcome.crash.is_none() {
            bail!("the target {target} ended with {status}: see {}", log.display());
        }
        let kept = files(&committed)?;
        outcome.inputs = kept.len();
        outcome.bytes = kept.iter().map(|file| length(file)).sum::<Result<_>>()?;
        Ok(outcome)
    }

    fn binary(&self, target: &str) -> Command {
        let directory = self.root.join("build").join(format!("{ARCH}-unknown-linux-gnu/release"));
        Command::new(directory.join(target))
    }

    /// As few inputs as reach every place in the code that the corpus reaches, smallest first. How often they get there (which
    /// is what the fuzzer goes by, too) does not count here: that would be five times as many.
    fn minimised(&self, target: &str, work: &Path) -> Result<Vec<PathBuf>> {
        let minimal = self.root.join("minimal").join(target);
        if minimal.exists() {
            fs::remove_dir_all(&minimal).with_context(|| format!("cannot remove {}", minimal.display()))?;
        }
        fs::create_dir_all(&minimal).with_context(|| format!("cannot make {}", minimal.display()))?;
        let log = self.root.join(format!("{target}.merge.log"));
        let status = self
            .binary(target)
            .args(["-set_cover_merge=1", "-use_counters=0"])
            .args([&minimal, work])
            .stderr(File::create(&log).with_context(|| format!("cannot create {}", log.display()))?)
            .status()
            .with_context(|| format!("cannot start the target {target}"))?;
        ensure!(status.success(), "the corpus of {target} cannot be minimised: see {}", log.display());
        let mut inputs = files(&minimal)?;
        inputs.sort_by_cached_key(|file| (length(file).unwrap_or(u64::MAX), file.clone()));
        Ok(inputs)
    }
}

/// Puts the first inputs, as far as there is room, in the place of those that were found before. What has a name of its own
/// (libFuzzer's are hashes) was put there by hand and stays.
fn keep(committed: &Path, inputs: &[PathBuf]) -> Result<()> {
    fs::create_dir_all(committed).with_context(|| format!("cannot make {}", committed.display()))?;
    let (found, named): (Vec<_>, Vec<_>) = files(committed)?.into_iter().partition(|file| is_hash(file));
    for file in found {
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
    }
    let mut left = KEPT_BYTES.saturating_sub(named.iter().map(|file| length(file)).sum::<Result<_>>()?);
    for input in inputs {
        let length = length(input)?;
        if length > left {
            break;
        }
        left -= length;
        let name = input.file_name().context("a file without a name")?;
        fs::copy(input, committed.join(name)).with_context(|| format!("cannot copy {}", input.display()))?;
    }
    Ok(())
}

fn is_hash(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().as_encoded_bytes();
    name.len() == 40 && name.iter().all(u8::is_ascii_hexdigit)
}

/// None where there is no directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let read = || fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>();
    read().with_context(|| format!("cannot list {}", directory.display()))
}

fn length(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file).with_context(|| format!("cannot look at {}", file.display()))?.len())
}

/// What a run came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    target: String,
    executions: u64,
    per_second: u64,
    /// Places in the code, as libFuzzer counts them ("cov").
    edges: u64,
    /// What the repository has of it now.
    inputs: usize,
    bytes: u64,
    /// The input that broke a promise.
    crash: Option<PathBuf>,
}

impl Outcome {
    const HEADING: &'static str =
        "| target | executions | per second | edges | corpus | crashes |\n|---|--:|--:|--:|--:|--:|";

    /// By what libFuzzer said.
    fn of(target: &str, said: &str) -> Self {
        let behind =
            |line: &str, name: &str| line.split_once(name)?.1.split_whitespace().next()?.parse().ok();
        let last = |name: &str| said.lines().rev().find_map(|line| behind(line, name)).unwrap_or(0);
        let crash = said
            .lines()
            .find_map(|line| line.split_once("Test unit written to "))
            .map(|(_, path)| path.into());
        Self {
            target: target.to_owned(),
            executions: last("stat::number_of_executed_units:"),
            per_second: last("stat::average_exec_per_sec:"),
            edges: last(" cov: "),
            crash,
            ..Self::default()
        }
    }

    fn row(&self) -> String {
        let Self { target, executions, per_second, edges, inputs, bytes, crash } = self;
        let kib = bytes.div_ceil(1024);
        let crashes = usize::from(crash.is_some());
        format!("| {target} | {executions} | {per_second} | {edges} | {inputs} ({kib} KiB) | {crashes} |")
    }

    fn advice(&self) -> Option<String> {
        let (target, path) = (&self.target, self.crash.as_ref()?.display());
        Some(format!(
            "{target} found something: {path}\n  cargo run -p netmon-fuzz -- replay {target} {path}\n\
             When it is repaired, keep the input as {CORPUS}/{target}/<what it shows>"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "#2\tINITED cov: 40 ft: 41 corp: 1/1b exec/s: 0 rss: 50Mb\n\
        #9000\tDONE   cov: 911 ft: 3020 corp: 204/11Kb lim: 4096 exec/s: 4500 rss: 90Mb\n\
        stat::number_of_executed_units: 9000\nstat::average_exec_per_sec:     4500\n";

    #[test]
    fn what_libfuzzer_says_becomes_a_row() {
        let outcome = Outcome { inputs: 7, bytes: 1025, ..Outcome::of("frame", SAID) };
        assert_eq!(outcome.row(), "| frame | 9000 | 4500 | 911 | 7 (2 KiB) | 0 |");
        assert_eq!(outcome.advice(), None);
    }

    #[test]
    fn a_crash_names_its_input_and_how_to_replay_it() {
        let said = format!("{SAID}artifact_prefix='/x/'; Test unit written to /x/crash-da39\nBase64: \n");
        let advice = Outcome::of("frame", &said).advice().unwrap();
        assert!(advice.contains("cargo run -p netmon-fuzz -- replay frame /x/crash-da39"), "{advice}");
    }

    #[test]
    fn found_inputs_are_replaced_within_their_room_and_named_ones_stay() {
        let (found, committed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hash = |digit: &str| digit.repeat(40);
        let put = |directory: &Path, name: &str, length: u64| {
            fs::write(directory.join(name), vec![0; length as usize]).unwrap();
            directory.join(name)
        };
        put(committed.path(), "cut-header", KEPT_BYTES / 2);
        put(committed.path(), &hash("a"), 5);
        let inputs = [put(found.path(), &hash("b"), 9), put(found.path(), &hash("c"), KEPT_BYTES / 2)];
        keep(committed.path(), &inputs).unwrap();
        let mut names: Vec<_> = files(committed.path())
            .unwrap()
            .iter()
            .map(|file| file.file_name().unwrap().to_owned())
            .collect();
        names.sort();
        assert_eq!(names, [hash("b").as_str(), "cut-header"]);
    }
}
