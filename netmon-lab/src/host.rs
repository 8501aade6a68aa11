//! One machine of the room: a network, mount and UTS namespace, held by one process.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::cleanup::ROOM_VARIABLE;
use crate::room::RoomError;

/// What the holder does before it says "ready". It then waits for the end of its input, which comes when the lab
/// lets go of it or dies.
///
/// - The network namespace needs a sysfs of its own, or `/sys/class/net` shows the interfaces of the real machine.
/// - libudev listens to nothing, silently, where `/run/udev/control` is missing.
/// - Autoconfiguration, duplicate address detection and router solicitations are off: an idle interface is silent.
const SET_UP: &str = r#"set -e
echo "$1" > /proc/sys/kernel/hostname
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/udev/data
touch /run/udev/control
mount -t sysfs sysfs /sys
mount -t bpf -o mode=700 bpf /sys/fs/bpf
for which in all default; do
    for setting in accept_ra=0 accept_dad=0 dad_transmits=0 router_solicitations=0 \
        mldv1_unsolicited_report_interval=10 mldv2_unsolicited_report_interval=10 disable_ipv6=$2; do
        echo "${setting#*=}" > "/proc/sys/net/ipv6/conf/$which/${setting%=*}"
    done
done
ip link set lo up
echo ready
exec cat > /dev/null
"#;

/// One machine of the room.
#[derive(Debug)]
pub struct Host {
    name: String,
    room: String,
    holder: Child,
}

/// What an interface counted since it was made. Bytes include the 14 bytes of each Ethernet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that arrived, from the Ethernet header on.
    pub rx_bytes: u64,
    /// Frames that arrived.
    pub rx_packets: u64,
    /// Bytes that left, from the Ethernet header on.
    pub tx_bytes: u64,
    /// Frames that left.
    pub tx_packets: u64,
}

/// Length of an Ethernet header without a VLAN tag (IEEE 802.3).
const ETHERNET_HEADER: u64 = 14;

impl Counters {
    /// What was counted between `before` and this.
    pub fn since(self, before: Self) -> Self {
        Self {
            rx_bytes: self.rx_bytes - before.rx_bytes,
            rx_packets: self.rx_packets - before.rx_packets,
            tx_bytes: self.tx_bytes - before.tx_bytes,
            tx_packets: self.tx_packets - before.tx_packets,
        }
    }

    /// Bytes that arrived, from the IP header on.
    pub fn rx_l3(self) -> u64 {
        self.rx_bytes - ETHERNET_HEADER * self.rx_packets
    }

    /// Bytes that left, from the IP header on.
    pub fn tx_l3(self) -> u64 {
        self.tx_bytes - ETHERNET_HEADER * self.tx_packets
    }
}

impl Host {
    /// Makes the namespaces. The host has no interface but `lo`.
    pub(crate) fn start(room: &str, name: &str, ipv6: bool) -> Result<Self, RoomError> {
        let failed = |source| RoomError::Holder { host: name.to_owned(), source };
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--uts", "--", "sh", "-c", SET_UP, "netmon-lab"])
            .arg(name)
            .arg(if ipv6 { "0" } else { "1" })
            .env(ROOM_VARIABLE, room)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let answer = ready_line(&mut holder);
        let host = Self { name: name.to_owned(), room: room.to_owned(), holder };
        answer.map_err(failed)?;
        Ok(host)
    }

    /// The host's name, which is also its hostname.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process that holds the namespaces: `nsenter --target PID --net --mount --uts` enters the host.
    pub fn holder_pid(&self) -> u32 {
        self.holder.id()
    }

    /// A command that will run inside the host. Its process is the program itself; it is killed with the room.
    ///
    /// It runs in a process group of its own, so that Ctrl-C reaches the lab alone, and with `/` as its directory.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.holder_pid().to_string(), "--net", "--mount", "--uts", "--"])
            .arg(program)
            .env(ROOM_VARIABLE, &self.room)
            .current_dir("/")
            .process_group(0);
        command
    }

    /// Runs a command inside to its end.
    ///
    /// # Errors
    /// [`RoomError::Command`] when it cannot be started or fails; holds what it wrote to stderr.
    pub fn run(&self, command: &[&str]) -> Result<String, RoomError> {
        self.run_with_input(command, "")
    }

    /// Runs a command inside to its end; `input` is its standard input.
    ///
    /// # Errors
    /// As [`Host::run`].
    pub fn run_with_input(&self, command: &[&str], input: &str) -> Result<String, RoomError> {
        let failed = |message: String| RoomError::Command {
            host: self.name.clone(),
            command: command.join(" "),
            message,
        };
        let (program, arguments) = command.split_first().ok_or_else(|| failed("no program".into()))?;
        let mut child = self
            .command(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        // A program that ends before it read its input is judged by its exit status, not by the broken pipe.
        if let Some(mut stdin) = child.stdin.take() {
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(failed(format!("{}: {}", output.status, stderr.trim())));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What an interface counted since it was made.
    ///
    /// # Errors
    /// [`RoomError::Command`] when the host has no such interface.
    pub fn counters(&self, interface: &str) -> Result<Counters, RoomError> {
        const NAMES: [&str; 4] = ["rx_bytes", "rx_packets", "tx_bytes", "tx_packets"];
        let files = NAMES.map(|name| format!("/sys/class/net/{interface}/statistics/{name}"));
        let [rx_bytes, rx_packets, tx_bytes, tx_packets] = &files;
        let text = self.run(&["cat", rx_bytes, rx_packets, tx_bytes, tx_packets])?;
        let numbers: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
        let [rx_bytes, rx_packets, tx_bytes, tx_packets] = numbers[..] else {
            return Err(RoomError::Command {
                host: self.name.clone(),
                command: files.join(" "),
                message: format!("no counters: {text:?}"),
            });
        };
        Ok(Counters { rx_bytes, rx_packets, tx_bytes, tx_packets })
    }

    /// Mounts a file system of `bytes` in memory at `path`, for this host alone. It goes with the host.
    ///
    /// # Errors
    /// [`RoomError::Command`] when `path` cannot be made or mounted.
    pub fn mount_small_disk(&self, path: &Path, bytes: u64) -> Result<(), RoomError> {
        let path = path.to_string_lossy();
        self.run(&["mkdir", "-p", &path])?;
        self.run(&["mount", "-t", "tmpfs", "-o", &format!("size={bytes},mode=700"), "tmpfs", &path])?;
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        // The namespaces live on while a process is in them: the room ends those first.
        let _ = self.holder.wait();
    }
}

/// Waits until the process wrote the line "ready".
///
/// # Errors
/// What it wrote instead, or that it ended without a word.
pub(crate) fn ready_line(child: &mut Child) -> io::Result<()> {
    let Some(stdout) = child.stdout.as_mut() else { return Err(io::Error::other("no standard output")) };
    let mut line = String::new();
    // One byte at a time: what follows the line is for whoever reads next.
    BufReader::with_capacity(1, stdout).read_line(&mut line)?;
    match line.trim_end() {
        "ready" => Ok(()),
        "" => Err(io::Error::other(format!("ended without getting ready ({})", child.wait()?))),
        other => Err(io::Error::other(format!("expected \"ready\", got {other:?}"))),
    }
}
