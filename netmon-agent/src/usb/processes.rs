//! Who did something: the program and the user of a process, as `/proc` has them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;

use netmon_common::raw::Raw;

use super::files::Who;
use super::metadata::Happened;

/// How long what a process was found to be is taken for granted, boot clock: a copy of many files does not cost a look for
/// each of them.
const FRESH_NS: u64 = 100_000_000;
/// How long a process that is gone is still known. Its number is not given to another one so soon: the kernel goes through all
/// of them (32,768 at least) before.
const REMEMBERED_NS: u64 = 1_000_000_000;
/// Processes that are remembered.
const MAX: usize = 1_024;

/// Reads the text of `/proc/PID/status` (proc_pid_status(5)); `None` when it is not what the kernel writes.
pub fn parse(status: &[u8]) -> Option<Who> {
    let field = |name: &[u8]| {
        status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name)?.strip_prefix(b":\t"))
    };
    let uids = std::str::from_utf8(field(b"Uid")?).ok()?;
    let uid = uids.split('\t').next()?.parse().ok()?;
    Some(Who { program: Raw::new(unescaped(field(b"Name")?)), uid })
}

/// The kernel escapes line feeds and backslashes of a program's name (`proc_task_name` in fs/proc/array.c), nothing else.
fn unescaped(name: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = name;
    loop {
        rest = match rest {
            [] => return bytes,
            [b'\\', b'n', rest @ ..] => {
                bytes.push(b'\n');
                rest
            }
            [b'\\', b'\\', rest @ ..] => {
                bytes.push(b'\\');
                rest
            }
            [byte, rest @ ..] => {
                bytes.push(*byte);
                rest
            }
        };
    }
}

/// What processes were found to be.
#[derive(Debug, Default)]
pub struct Processes {
    known: BTreeMap<u32, Known>,
}

#[derive(Debug)]
struct Known {
    who: Who,
    read_ns: u64,
    /// It was read because the process had opened a file. A shell does that before it becomes the program that uses it.
    by_opening: bool,
}

impl Processes {
    /// Who the process is that did this; `None`: it is gone, or hidden. `read` looks: it is called as rarely as possible.
    pub fn who(
        &mut self,
        pid: u32,
        happened: Happened,
        boot_ns: u64,
        read: impl FnOnce(u32) -> Option<Who>,
    ) -> Option<Who> {
        if pid == 0 {
            return None;
        }
        let age = |known: &Known| boot_ns.saturating_sub(known.read_ns);
        let by_opening = !happened.beyond_opening();
        let known = self.known.get(&pid).filter(|known| age(known) < REMEMBERED_NS);
        if let Some(known) = known.filter(|known| age(known) < FRESH_NS && (by_opening || !known.by_opening))
        {
            return Some(known.who.clone());
        }
        let Some(who) = read(pid) else { return known.map(|known| known.who.clone()) };
        if self.known.len() >= MAX {
            self.known.retain(|_, known| age(known) < REMEMBERED_NS);
        }
        if self.known.len() >= MAX {
            self.known.clear();
        }
        self.known.insert(pid, Known { who: who.clone(), read_ns: boot_ns, by_opening });
        Some(who)
    }
}

/// Reads `/proc/PID/status`.
pub fn read(pid: u32) -> Option<Who> {
    // Name and Uid are among the first lines.
    let mut status = [0; 2_048];
    let mut file = File::open(format!("/proc/{pid}/status")).ok()?;
    let length = file.read(&mut status).ok()?;
    parse(&status[..length])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const OPENED: Happened = Happened {
        opened: true,
        read: false,
        written: false,
        closed_after_reading: false,
        closed_after_writing: false,
    };
    const READ: Happened = Happened { read: true, ..OPENED };

    fn who(program: &str) -> Option<Who> {
        Some(Who { program: program.into(), uid: 1005 })
    }

    #[test]
    fn the_real_user_and_the_name_are_read_as_they_are() {
        let status = b"Name:\tc\\n\\\\p \x1b\nUmask:\t0022\nState:\tR (running)\nTgid:\t7\nUid:\t1005\t0\t0\t0\nGid:\t1\t1\t1\t1\n";
        assert_eq!(parse(status), Some(Who { program: Raw::new(b"c\n\\p \x1b"), uid: 1005 }));
        for wrong in [
            &b""[..],
            b"Name:\tcp\n",
            b"Uid:\t0\t0\n",
            b"Name:\tcp\nUid:\tx\n",
            b"Name:\tcp\nUid:\t4294967296\n",
        ] {
            assert_eq!(parse(wrong), None);
        }
    }

    #[test]
    fn the_test_itself_is_found() {
        let found = read(std::process::id()).unwrap();
        assert_eq!(found.uid, rustix::process::getuid().as_raw());
        assert!(!found.program.is_empty());
        assert_eq!(read(u32::MAX), None);
    }

    #[test]
    fn a_process_is_looked_at_again_once_it_may_have_become_another_program() {
        let mut processes = Processes::default();
        let unread = |_| panic!("was known");
        assert_eq!(processes.who(7, OPENED, 0, |_| who("sh")), who("sh"));
        assert_eq!(processes.who(7, OPENED, 99 * MS, unread), who("sh"));
        assert_eq!(processes.who(7, READ, 99 * MS, |_| who("cat")), who("cat"));
        assert_eq!(processes.who(7, READ, 198 * MS, unread), who("cat"));
        assert_eq!(processes.who(7, READ, 199 * MS, |_| who("cp")), who("cp"));
    }

    #[test]
    fn a_process_that_is_gone_is_known_for_a_second_and_then_unknown() {
        let mut processes = Processes::default();
        assert_eq!(processes.who(7, READ, 0, |_| who("cp")), who("cp"));
        assert_eq!(processes.who(7, READ, 999 * MS, |_| None), who("cp"));
        assert_eq!(processes.who(7, READ, 1_000 * MS, |_| None), None);
        assert_eq!(processes.who(0, READ, 0, |_| panic!("is no process")), None);
    }

    #[test]
    fn a_flood_of_processes_takes_bounded_memory() {
        let mut processes = Processes::default();
        for pid in 1..=3 * MAX as u32 {
            processes.who(pid, READ, 0, |_| who("fork"));
            assert!(processes.known.len() <= MAX);
        }
    }
}
