//! Watching a log file grow: which line could be seen when.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::clock;
use crate::lines::Line;
use crate::wait::{self, Timeout};

/// How often the file is looked at.
const PAUSE: Duration = Duration::from_millis(5);

/// A line, and when it could be read in the file.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The line.
    pub line: Line,
    /// When it could be read, wall clock, nanoseconds.
    pub seen_ns: i64,
}

/// Reads a log file as it grows, until it is dropped. The file may come into being later.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<Vec<Seen>>,
    refused: Mutex<Vec<String>>,
}

impl Follower {
    /// Begins to read the file, from its beginning.
    pub fn start(path: &Path) -> Self {
        let shared = Arc::new(Shared::default());
        let thread = {
            let (shared, path) = (Arc::clone(&shared), path.to_owned());
            thread::spawn(move || follow(&path, &shared))
        };
        Self { path: path.to_owned(), shared, thread: Some(thread) }
    }

    /// All lines so far.
    ///
    /// # Panics
    /// When a line is not one of netmon's log.
    pub fn lines(&self) -> Vec<Seen> {
        let refused = lock(&self.shared.refused);
        assert!(refused.is_empty(), "{}: {refused:?}", self.path.display());
        lock(&self.shared.seen).clone()
    }

    /// Waits for the first line that `wanted` takes something from.
    ///
    /// # Errors
    /// [`Timeout`], with the lines that there are instead.
    pub fn find<T>(
        &self,
        limit: Duration,
        what: &str,
        mut wanted: impl FnMut(&Line) -> Option<T>,
    ) -> Result<(T, Seen), Timeout> {
        self.when(limit, what, |lines| {
            lines.iter().find_map(|seen| Some((wanted(&seen.line)?, seen.clone())))
        })
    }

    /// Waits until `wanted` takes something from all lines so far.
    ///
    /// # Errors
    /// [`Timeout`], with the lines that there are instead.
    pub fn when<T>(
        &self,
        limit: Duration,
        what: &str,
        mut wanted: impl FnMut(&[Seen]) -> Option<T>,
    ) -> Result<T, Timeout> {
        wait::until(limit, what, || wanted(&self.lines())).map_err(|mut timeout| {
            let lines: String = self.lines().iter().map(|seen| format!("\n    {}", seen.line.text)).collect();
            timeout.what = format!("{what} in {}; it has:{lines}", self.path.display());
            timeout
        })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn follow(path: &Path, shared: &Shared) {
    let mut file = None;
    let mut pending = Vec::new();
    while !shared.stop.load(Ordering::Relaxed) {
        if file.is_none() {
            file = match File::open(path) {
                Ok(file) => Some(file),
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                Err(error) => return lock(&shared.refused).push(error.to_string()),
            };
        }
        if let Some(Err(error)) = file.as_mut().map(|file| file.read_to_end(&mut pending)) {
            return lock(&shared.refused).push(error.to_string());
        }
        let seen_ns = clock::wall_ns();
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let text: Vec<u8> = pending.drain(..=end).collect();
            match Line::parse(String::from_utf8_lossy(&text).trim_end_matches('\n')) {
                Ok(line) => lock(&shared.seen).push(Seen { line, seen_ns }),
                Err(error) => lock(&shared.refused).push(error),
            }
        }
        thread::sleep(PAUSE);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
