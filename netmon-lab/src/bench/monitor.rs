//! Whole monitors beside each other: netmon's agent and other people's, each started, stopped and asked for what it saw.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use netmon_agent::kernel::Mode;
use rustix::process::{Pid, Signal, kill_process};

use super::pair::{INTERFACE, Pair, inside};
use super::process::cpu_of_group;
use super::subject::{Reference, Subject};
use crate::netmon::{Daemon, PATIENCE, program};
use crate::wait;

/// Who watches the receiver's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// Nobody.
    Nothing,
    /// A TC program that does nothing.
    Empty,
    /// A TC program that counts flows in a hash map; nobody reads it.
    Hash,
    /// netmon's agent, as it runs on a PC.
    Netmon,
    /// netmon's agent in its XDP mode.
    NetmonXdp,
    /// softflowd (NetFlow).
    Softflowd,
    /// pmacct's pmacctd, flows by the five numbers.
    Pmacctd,
    /// argus.
    Argus,
    /// tcpdump, 96 bytes of each packet, to nowhere.
    Tcpdump,
}

impl Monitor {
    /// All, in the order in which a round goes through them.
    pub const ALL: [Self; 9] = [
        Self::Nothing,
        Self::Empty,
        Self::Hash,
        Self::Netmon,
        Self::NetmonXdp,
        Self::Softflowd,
        Self::Pmacctd,
        Self::Argus,
        Self::Tcpdump,
    ];

    /// As the tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Empty => "empty program",
            Self::Hash => "hash program",
            Self::Netmon => "**netmon-agent**",
            Self::NetmonXdp => "netmon-agent, XDP",
            Self::Softflowd => "softflowd",
            Self::Pmacctd => "pmacctd",
            Self::Argus => "argus",
            Self::Tcpdump => "tcpdump -s 96",
        }
    }

    fn is_netmon(self) -> bool {
        matches!(self, Self::Netmon | Self::NetmonXdp)
    }

    /// Starts it; it watches when this returns.
    ///
    /// # Errors
    /// It cannot be started, or does not get ready; with what it said.
    pub fn start(self, pair: &Pair) -> Result<Running<'_>> {
        let directory = tempdir(pair, self)?;
        let mut running = Running { monitor: self, pair, directory, daemon: None, program: None };
        match self {
            Self::Nothing => {}
            Self::Empty | Self::Hash => {
                let program = inside(pair.receiver(), || {
                    let reference = if self == Self::Empty {
                        Reference::empty(Mode::Tc)
                    } else {
                        Reference::hash(65_536)
                    };
                    let mut program = Subject::Reference(reference?);
                    program.attach()?;
                    Ok(program)
                })?;
                running.program = Some(program);
            }
            _ => {
                let command = running.command()?;
                let output = running.file("output.txt");
                let mut daemon = Daemon::start(format!("{self:?}"), command, &output)?;
                daemon.wait_until("it to watch", || running.watches())?;
                running.daemon = Some(daemon);
            }
        }
        Ok(running)
    }
}

fn tempdir(pair: &Pair, monitor: Monitor) -> Result<PathBuf> {
    let directory = pair.directory().join(format!("{monitor:?}").to_lowercase());
    // Of the round before.
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// A monitor that watches.
pub struct Running<'a> {
    monitor: Monitor,
    pair: &'a Pair,
    directory: PathBuf,
    daemon: Option<Daemon>,
    program: Option<Subject>,
}

impl Running<'_> {
    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn command(&self) -> Result<Command> {
        let host = self.pair.receiver();
        let inside = |program: &str, arguments: &[&str]| {
            let mut command = host.command(program);
            command.args(arguments);
            command
        };
        let path = |name: &str| self.file(name).to_string_lossy().into_owned();
        Ok(match self.monitor {
            Monitor::Nothing | Monitor::Empty | Monitor::Hash => bail!("no process"),
            Monitor::Netmon | Monitor::NetmonXdp => {
                // Nothing but defaults, whatever this machine's own agent is told.
                fs::write(self.file("agent.toml"), "")?;
                let mut command = host.command(program("netmon-agent")?);
                command.arg("--config").arg(self.file("agent.toml"));
                for (option, name) in
                    [("--state-dir", "state"), ("--log-dir", "log"), ("--runtime-dir", "run")]
                {
                    command.arg(option).arg(self.file(name));
                }
                let mode = if self.monitor == Monitor::NetmonXdp { "xdp" } else { "tc" };
                command.args(["run", "--interface", INTERFACE, "--mode", mode]);
                command
            }
            Monitor::Softflowd => {
                inside("softflowd", &["-d", "-i", INTERFACE, "-c", &path("control"), "-p", &path("pid")])
            }
            Monitor::Pmacctd => {
                let configuration = format!(
                    "daemonize: false\npcap_interface: {INTERFACE}\nplugins: print\n\
                     aggregate: src_host,dst_host,src_port,dst_port,proto\nprint_refresh_time: 60\n\
                     print_output: csv\nprint_output_file: {}\nprint_output_file_append: true\n",
                    path("flows.csv")
                );
                fs::write(self.file("pmacctd.conf"), configuration)?;
                inside("pmacctd", &["-f", &path("pmacctd.conf")])
            }
            Monitor::Argus => inside("argus", &["-i", INTERFACE, "-w", &path("argus.out")]),
            Monitor::Tcpdump => inside("tcpdump", &["-i", INTERFACE, "-n", "-s", "96", "-w", "/dev/null"]),
        })
    }

    /// Whether it is ready: the agent says so, the others have a packet socket.
    fn watches(&self) -> bool {
        if self.monitor.is_netmon() {
            return self.status().is_some_and(|status| status["state"] == "watching");
        }
        let sockets = fs::read_to_string(format!("/proc/{}/net/packet", self.pair.receiver().holder_pid()));
        sockets.is_ok_and(|sockets| sockets.lines().count() > 1)
    }

    /// What the agent says of itself, once a second; none for the others.
    pub fn status(&self) -> Option<serde_json::Value> {
        let bytes = fs::read(self.file("run").join("status.json")).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Its process; none for programs in the kernel alone.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// CPU time of its processes so far.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu(&self) -> Result<Duration> {
        match self.pid() {
            Some(pid) => Ok(cpu_of_group(pid)?),
            None => Ok(Duration::ZERO),
        }
    }

    /// Lets it finish what it has buffered, stops it, and returns how many packets it says that it saw; none for those
    /// that do not count.
    ///
    /// # Errors
    /// It does not stop, or its count cannot be found in what it wrote.
    pub fn stop(mut self) -> Result<Option<u64>> {
        let before = match self.monitor {
            Monitor::Netmon | Monitor::NetmonXdp => Some(self.netmon_counted()?),
            Monitor::Softflowd => Some(self.softflowd_processed()?),
            _ => None,
        };
        drop(self.program.take());
        let Some(mut daemon) = self.daemon.take() else { return Ok(None) };
        let pid = i32::try_from(daemon.pid()).ok().and_then(Pid::from_raw).context("no such process")?;
        kill_process(pid, Signal::INT)?;
        daemon.wait_end()?;
        let said = daemon.said();
        let counted = match self.monitor {
            Monitor::Nothing | Monitor::Empty | Monitor::Hash => None,
            Monitor::Netmon | Monitor::NetmonXdp | Monitor::Softflowd => before,
            Monitor::Tcpdump => number_before(&said, " packets captured"),
            Monitor::Pmacctd => {
                sum_of_column(&fs::read_to_string(self.file("flows.csv")).unwrap_or_default(), "PACKETS")
            }
            Monitor::Argus => racount(&self.file("argus.out"))?,
        };
        counted
            .with_context(|| {
                format!("{:?} does not say how many packets it saw; it said:\n{said}", self.monitor)
            })
            .map(Some)
    }

    /// The agent writes its status every second: the number is final when it does not change any more.
    fn netmon_counted(&self) -> Result<u64> {
        const QUIET: Duration = Duration::from_millis(2_500);
        let counted = || self.status().and_then(|status| status["coverage"]["counted"].as_u64());
        let last = wait::unchanged(QUIET, PATIENCE, "a count that does not grow", counted)?;
        last.context("the agent's status has no count")
    }

    /// softflowd handles what is in its buffer before it answers, or soon afterwards.
    fn softflowd_processed(&self) -> Result<u64> {
        const QUIET: Duration = Duration::from_millis(500);
        let control = self.file("control");
        let ask = || {
            let output =
                Command::new("softflowctl").arg("-c").arg(&control).arg("statistics").output().ok()?;
            number_behind(&String::from_utf8_lossy(&output.stdout), "Packets processed: ")
        };
        let last = wait::unchanged(QUIET, PATIENCE, "a count that does not grow", ask)?;
        last.context("softflowctl does not tell how many packets were processed")
    }
}

fn racount(file: &Path) -> Result<Option<u64>> {
    let output = Command::new("racount").arg("-r").arg(file).output().context("cannot run racount")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // racount   records   total_pkts …
    //     sum   58        1010       …
    let sum = text.lines().find(|line| line.trim_start().starts_with("sum"));
    Ok(sum.and_then(|line| line.split_whitespace().nth(2)?.parse().ok()))
}

fn number_before(text: &str, mark: &str) -> Option<u64> {
    let (before, _) = text.split_once(mark)?;
    before.split_whitespace().last()?.parse().ok()
}

fn number_behind(text: &str, mark: &str) -> Option<u64> {
    let (_, behind) = text.split_once(mark)?;
    behind.split_whitespace().next()?.parse().ok()
}

/// Of a table of comma-separated values with a line of names. Such a line may come again.
fn sum_of_column(table: &str, name: &str) -> Option<u64> {
    let column = table.lines().next()?.split(',').position(|column| column == name)?;
    let cells = table.lines().filter_map(|line| line.split(',').nth(column)?.parse::<u64>().ok());
    Some(cells.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packets_are_found_in_what_the_monitors_write() {
        assert_eq!(number_before("a\n1010 packets captured\n7 packets", " packets captured"), Some(1010));
        assert_eq!(number_behind("Packets processed: 42\nx", "Packets processed: "), Some(42));
        let csv = "SRC_IP,PACKETS,BYTES\n10.0.0.1,5,300\nSRC_IP,PACKETS,BYTES\n10.0.0.2,6,300\n";
        assert_eq!(sum_of_column(csv, "PACKETS"), Some(11));
        assert_eq!(sum_of_column("", "PACKETS"), None);
    }
}
