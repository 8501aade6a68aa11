//! Every target on its seeds and on what fuzzing has found.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its corpus has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use netmon_fuzz::TARGETS;

/// Fewer inputs than this are no corpus.
const LEAST: usize = 10;
/// What the repository is willing to carry.
const MOST_BYTES: u64 = 2 << 20;

fn here(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(below)
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn names_in(directory: &Path) -> BTreeSet<String> {
    files_in(directory).iter().map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn no_seed_breaks_a_promise() {
    for target in &TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        for (number, seed) in seeds.iter().enumerate() {
            catch_unwind(|| (target.run)(seed))
                .unwrap_or_else(|_| panic!("{}: seed {number}, see above", target.name));
        }
    }
}

#[test]
fn no_input_that_was_ever_found_breaks_a_promise() {
    for target in &TARGETS {
        let corpus = files_in(&here("corpus").join(target.name));
        assert!(corpus.len() >= LEAST, "{}: only {} inputs", target.name, corpus.len());
        for file in corpus {
            let input = fs::read(&file).unwrap();
            catch_unwind(|| (target.run)(&input))
                .unwrap_or_else(|_| panic!("{}: {}, see above", target.name, file.display()));
        }
    }
}

#[test]
fn targets_binaries_and_directories_are_the_same() {
    let targets: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(names_in(&here("corpus")), targets);
    assert_eq!(names_in(&here("fuzz/fuzz_targets")), targets);
}

#[test]
fn the_corpus_stays_small() {
    let files = files_in(&here("corpus")).into_iter().flat_map(|directory| files_in(&directory));
    let bytes: u64 = files.map(|file| fs::metadata(file).unwrap().len()).sum();
    assert!(bytes <= MOST_BYTES, "{bytes} bytes");
}
