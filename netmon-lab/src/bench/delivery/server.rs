//! The real server, on loopback, with its store on a disk.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::process::{cpu_of_group, resident};
use crate::netmon::{Daemon, finish, program};

/// What the server says when both ports are open.
const READY: &str = "netmon-server listening";

/// `netmon-server run`.
pub struct Server {
    data: PathBuf,
    output: PathBuf,
    events: SocketAddr,
    enrolment: SocketAddr,
    daemon: Daemon,
}

impl Server {
    /// Makes a server below `directory` and starts it; it listens when this returns.
    ///
    /// # Errors
    /// It is not built, or does not start.
    pub fn start(directory: &Path) -> Result<Self> {
        let (data, output) = (directory.join("server"), directory.join("server.txt"));
        chore(&data, &["init"])?;
        let (events, enrolment) = free_ports()?;
        let daemon = launch(&data, &output, events, enrolment)?;
        Ok(Self { data, output, events, enrolment, daemon })
    }

    /// Starts it again after [`Server::stop`], at the same addresses.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_again(&mut self) -> Result<()> {
        self.daemon = launch(&self.data, &self.output, self.events, self.enrolment)?;
        Ok(())
    }

    /// Where agents call.
    pub fn events(&self) -> SocketAddr {
        self.events
    }

    /// A token for `uses` PCs.
    ///
    /// # Errors
    /// The server's.
    pub fn token(&self, uses: usize) -> Result<String> {
        let (address, uses) = (self.enrolment.to_string(), uses.to_string());
        Ok(chore(&self.data, &["token", "--raw", "--address", &address, "--uses", &uses])?.trim().to_owned())
    }

    /// CPU time so far.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu(&self) -> Result<Duration> {
        Ok(cpu_of_group(self.daemon.pid())?)
    }

    /// Memory that is present now, in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> Result<u64> {
        Ok(resident(self.daemon.pid())?.process)
    }

    /// The most memory that was ever present, in bytes (proc(5), `VmHWM`).
    ///
    /// # Errors
    /// It has ended.
    pub fn most_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }

    /// Bytes of the store, with what waits beside it.
    pub fn store_bytes(&self) -> u64 {
        let size = |name: &str| fs::metadata(self.data.join(name)).map_or(0, |file| file.len());
        ["store.sqlite", "store.sqlite-wal"].map(size).iter().sum()
    }

    /// Bytes of the readable logs.
    pub fn log_bytes(&self) -> u64 {
        bytes_below(&self.data.join("logs"))
    }

    /// What it said.
    pub fn said(&self) -> String {
        said(&self.output)
    }

    /// Stops it in good order. The store is one file then.
    ///
    /// # Errors
    /// It does not end, or not with success.
    pub fn stop(&mut self) -> Result<()> {
        interrupt(&self.daemon)?;
        let status = self.daemon.wait_end()?;
        ensure!(status.success(), "netmon-server ended with {status}:\n{}", self.said());
        Ok(())
    }
}

/// SIGTERM.
///
/// # Errors
/// There is no such process any more.
pub fn interrupt(daemon: &Daemon) -> Result<()> {
    let pid = i32::try_from(daemon.pid()).ok().and_then(Pid::from_raw).context("no such process")?;
    Ok(kill_process(pid, Signal::TERM)?)
}

/// Bytes of all files below a directory. What is not there has none.
pub fn bytes_below(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

fn said(output: &Path) -> String {
    fs::read_to_string(output).unwrap_or_default()
}

fn launch(data: &Path, output: &Path, events: SocketAddr, enrolment: SocketAddr) -> Result<Daemon> {
    let mut command = command(data)?;
    let (events, enrolment) = (events.to_string(), enrolment.to_string());
    // A group of its own: its CPU time is that of the group.
    command.args(["run", "--listen", &events, "--enroll-listen", &enrolment]).process_group(0);
    let before = said(output).matches(READY).count();
    let mut daemon = Daemon::start("netmon-server".to_owned(), command, output)?;
    daemon.wait_until("it to listen", || said(output).matches(READY).count() > before)?;
    Ok(daemon)
}

/// Two UDP ports that nobody uses now.
fn free_ports() -> Result<(SocketAddr, SocketAddr)> {
    let sockets = [UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?];
    Ok((sockets[0].local_addr()?, sockets[1].local_addr()?))
}

fn command(data: &Path) -> Result<Command> {
    let mut command = Command::new(program("netmon-server")?);
    command.arg("--data").arg(data).env_remove("RUST_LOG");
    for name in ["NETMON_SERVER_DATA", "NETMON_SERVER_LISTEN", "NETMON_SERVER_ENROLL_LISTEN"] {
        command.env_remove(name);
    }
    Ok(command)
}

fn chore(data: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = command(data)?;
    command.args(arguments);
    let output = finish("netmon-server", command, "")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "netmon-server {arguments:?} failed: {stderr}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
