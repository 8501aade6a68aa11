//! Ending what a room started: on drop, on SIGINT and SIGTERM, and what a dead run left behind.
//!
//! Every process of a room carries the room's name in its environment, and inherits it to its children. That is how
//! they are found; nothing is ever ended by its program's name.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::wait;

/// Names the room in the environment of each of its processes.
pub(crate) const ROOM_VARIABLE: &str = "NETMON_LAB_ROOM";
/// Begin of the name of a room's directory.
const PREFIX: &str = "netmon-lab-";
/// File in a room's directory: pid and start time of the process that made it.
const OWNER: &str = "owner";
/// How long processes may take to end in good order.
const PATIENCE: Duration = Duration::from_secs(3);

/// The rooms of this process, by name, with their directories.
static LIVE: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());

/// Makes a room's directory and has the room ended with this process.
pub(crate) fn register(room: &str) -> io::Result<PathBuf> {
    static SIGNALS: Once = Once::new();
    let directory = std::env::temp_dir().join(format!("{PREFIX}{room}"));
    fs::create_dir(&directory)?;
    let pid = process::id();
    fs::write(directory.join(OWNER), format!("{pid} {}", start_time(pid).unwrap_or_default()))?;
    live(|rooms| rooms.insert(room.to_owned(), directory.clone()));
    SIGNALS.call_once(|| {
        // Without the handler a Ctrl-C leaves a stale room, which `netmon-lab clean` removes.
        if let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) {
            thread::spawn(move || {
                if let Some(signal) = signals.forever().next() {
                    for (room, directory) in live(std::mem::take) {
                        end(&room, &directory, false);
                    }
                    process::exit(128 + signal);
                }
            });
        }
    });
    Ok(directory)
}

/// Ends a room of this process.
pub(crate) fn unregister(room: &str, keep_directory: bool) {
    if let Some(directory) = live(|rooms| rooms.remove(room)) {
        end(room, &directory, keep_directory);
    }
}

/// Removes what runs that did not end in good order left behind: processes and directories.
///
/// # Errors
/// When the directory for temporary files cannot be read.
pub fn clean() -> io::Result<Vec<String>> {
    let mut cleaned = Vec::new();
    for entry in fs::read_dir(std::env::temp_dir())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(room) = name.strip_prefix(PREFIX) else { continue };
        let owner = fs::read_to_string(entry.path().join(OWNER)).unwrap_or_default();
        if !is_alive(&owner) {
            end(room, &entry.path(), false);
            cleaned.push(room.to_owned());
        }
    }
    cleaned.sort();
    Ok(cleaned)
}

fn live<T>(change: impl FnOnce(&mut BTreeMap<String, PathBuf>) -> T) -> T {
    change(&mut LIVE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// True while the process that wrote `owner` runs.
fn is_alive(owner: &str) -> bool {
    let mut words = owner.split_whitespace();
    let (Some(pid), Some(started)) = (words.next().and_then(|pid| pid.parse().ok()), words.next()) else {
        return false;
    };
    start_time(pid).as_deref() == Some(started)
}

/// Field 22 of `/proc/PID/stat` (proc(5)): tells a process from a later one with the same number.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let behind_name = stat.rsplit_once(')')?.1;
    behind_name.split_whitespace().nth(19).map(str::to_owned)
}

fn end(room: &str, directory: &Path, keep_directory: bool) {
    for process in processes_of(room) {
        let _ = pidfd_send_signal(process, Signal::TERM);
    }
    let gone =
        wait::until(PATIENCE, "the room's processes to end", || processes_of(room).is_empty().then_some(()));
    if gone.is_err() {
        for process in processes_of(room) {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
    }
    if keep_directory {
        eprintln!("netmon-lab: the room's files are kept in {}", directory.display());
    } else if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("netmon-lab: cannot remove {}: {error}", directory.display());
    }
}

/// The room's processes. A descriptor is opened before the environment is read: it cannot come to mean another
/// process meanwhile.
fn processes_of(room: &str) -> Vec<OwnedFd> {
    let mark = format!("{ROOM_VARIABLE}={room}");
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let found = entries.filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let descriptor = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let ours = environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes());
        (ours && pid.unsigned_abs() != process::id()).then_some(descriptor)
    });
    found.collect()
}
