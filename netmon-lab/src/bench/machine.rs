//! On what it was measured: numbers without this say nothing.

use std::fs;
use std::process::Command;

use jiff::Timestamp;
use serde::Serialize;

use crate::clock;

/// The machine, the kernel, the day, the commit.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Processor, and how many of them.
    pub cpu: String,
    /// Memory, in GiB.
    pub memory_gib: f64,
    /// Kernel.
    pub kernel: String,
    /// Distribution.
    pub system: String,
    /// Day and time, UTC.
    pub date: String,
    /// Commit of this netmon; with a `+` when there are changes on top of it.
    pub commit: String,
    /// Load average of the last minute before the start: other work disturbs.
    pub load: String,
    /// The command line.
    pub command: String,
}

impl Machine {
    /// Asks. What cannot be found out is said to be unknown.
    pub fn ask() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let model = field(&cpuinfo, "model name").unwrap_or("unknown processor");
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let kib = field(&read("/proc/meminfo"), "MemTotal")
            .and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok())
            .unwrap_or(f64::NAN);
        Self {
            cpu: format!("{model}, {cpus} CPUs"),
            memory_gib: (kib / (1024.0 * 102.4)).round() / 10.0,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            system: field(&read("/etc/os-release").replace('=', ":"), "PRETTY_NAME")
                .map_or("unknown".to_owned(), |name| name.trim_matches('"').to_owned()),
            date: Timestamp::from_nanosecond(clock::wall_ns().into())
                .map_or("unknown".to_owned(), |now| now.strftime("%Y-%m-%d %H:%M UTC").to_string()),
            commit: commit().unwrap_or_else(|| "unknown".to_owned()),
            load: read("/proc/loadavg").split_whitespace().next().unwrap_or("unknown").to_owned(),
            command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        }
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        format!(
            "{}; {} GiB; Linux {}, {}; {}; commit {}; load before the start {}; `netmon-lab {}`\n",
            self.cpu,
            self.memory_gib,
            self.kernel,
            self.system,
            self.date,
            self.commit,
            self.load,
            self.command
        )
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The value behind `name :`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.split_once(':').filter(|(key, _)| key.trim() == name);
    text.lines().find_map(value).map(|(_, value)| value.trim())
}

fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        let output = command.arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() { commit } else { commit + "+" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "model\t\t: 1\nmodel name\t: AMD EPYC\n";
        assert_eq!(field(text, "model name"), Some("AMD EPYC"));
        assert_eq!(field(text, "name"), None);
    }
}
