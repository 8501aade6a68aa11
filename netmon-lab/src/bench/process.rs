//! What a process costs: CPU time and memory, from /proc.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Memory that is mapped in and present, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Without BPF maps.
    pub process: u64,
    /// Maps that the process has in its address space.
    pub maps: u64,
}

/// CPU time of a process group: of all threads that are alive in it, user and system, to the nanosecond.
///
/// # Errors
/// The group is empty, or the kernel does not tell (CONFIG_SCHED_INFO).
pub fn cpu_of_group(group: u32) -> io::Result<Duration> {
    let mut sum = None;
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        // A process that has ended meanwhile has no time any more.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        if process_group(&stat) == Some(group) {
            *sum.get_or_insert(Duration::ZERO) += cpu_of_threads(pid);
        }
    }
    sum.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no process in the group {group}")))
}

/// Field 5 of `/proc/PID/stat` (proc(5)).
fn process_group(stat: &str) -> Option<u32> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    behind_name.split_whitespace().nth(2)?.parse().ok()
}

fn cpu_of_threads(pid: u32) -> Duration {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Duration::ZERO };
    threads.filter_map(|thread| on_cpu(&thread.ok()?.path().join("schedstat")).ok()).sum()
}

/// Time that the calling thread has been on a CPU.
///
/// # Errors
/// The kernel does not tell.
pub fn cpu_of_this_thread() -> io::Result<Duration> {
    on_cpu(Path::new("/proc/thread-self/schedstat"))
}

/// Time that the kernel's thread for postponed packets of a CPU has been on it; zero where it cannot be found.
pub fn cpu_of_softirq_thread(cpu: usize) -> Duration {
    let name = format!("ksoftirqd/{cpu}\n");
    let Ok(entries) = fs::read_dir("/proc") else { return Duration::ZERO };
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let thread = paths.find(|path| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm == name));
    thread.and_then(|path| on_cpu(&path.join("schedstat")).ok()).unwrap_or_default()
}

/// The first number of a `schedstat` file: nanoseconds on a CPU.
fn on_cpu(file: &Path) -> io::Result<Duration> {
    let text = fs::read_to_string(file)?;
    let ns = text.split_whitespace().next().and_then(|ns| ns.parse().ok());
    ns.map(Duration::from_nanos).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Memory of a process.
///
/// # Errors
/// There is no such process.
pub fn resident(pid: u32) -> io::Result<Resident> {
    Ok(resident_in(&fs::read_to_string(format!("/proc/{pid}/smaps"))?))
}

/// proc(5), `/proc/PID/smaps`: a line that names the mapping, then lines about it.
fn resident_in(smaps: &str) -> Resident {
    let mut sum = Resident::default();
    let mut is_map = false;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if first == "Rss:" {
            let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(0);
            *if is_map { &mut sum.maps } else { &mut sum.process } += kib * 1024;
        } else if !first.ends_with(':') {
            is_map = line.contains("bpf-map") || line.contains("bpf_map");
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_maps_is_told_apart_from_that_of_the_process() {
        let smaps = "\
55d0a000-55d0b000 r--p 00000000 08:01 42 /usr/bin/netmon-agent
Size:                  8 kB
Rss:                   4 kB
VmFlags: rd mr mw me
7f00a000-7f00b000 rw-s 00000000 00:0e 1036 anon_inode:bpf-map
Rss:                 128 kB
7f00c000-7f00d000 rw-p 00000000 00:00 0
Rss:                  16 kB
";
        assert_eq!(resident_in(smaps), Resident { process: 20 * 1024, maps: 128 * 1024 });
    }

    #[test]
    fn a_group_is_read_behind_a_name_with_blanks_and_brackets() {
        assert_eq!(process_group("12 (a) b (c)) S 1 77 12 0 -1"), Some(77));
    }

    #[test]
    fn the_time_of_this_process_grows() {
        let group = rustix::process::getpgrp().as_raw_nonzero().get().unsigned_abs();
        let before = cpu_of_group(group).unwrap();
        let mut sum = 0_u64;
        while cpu_of_group(group).unwrap() <= before {
            sum = std::hint::black_box(sum + 1);
        }
    }
}
