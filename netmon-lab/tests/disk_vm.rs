//! Real agent and server on disks whose fsyncs fail with an I/O error, in a virtual machine. Run by `cargo xtask test vm`.
//!
//! Agent and server have a device of the device mapper each, which passes everything on to a loop device, or fails every
//! write behind its first MiB; reads go through. On it is an ext4 without a journal: one with a journal makes itself read-only
//! for good at its first failed write, and no program sees the fsync that is tested here. Its inodes and bitmaps are in the
//! first MiB: a file system that lost its own order is not what is tested either.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::fs::{self, File};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use netmon_lab::lines::{Kind, Line};
use netmon_lab::wait;
use rustix::process::{Pid, Signal, kill_process};

/// The machine is emulated, and a refused agent tries again after a minute at the latest.
const PATIENCE: Duration = Duration::from_secs(200);
/// Transfers of which the records do not fit into the memory that an agent has for them while its disk fails (1 MiB).
const FLOOD: u16 = 8_500;
const PC_LOG: &str = "/run/pc-log/log.txt";
const SERVER_LOG: &str = "/var/lib/netmon-server/logs/vm/log.txt";

fn said() -> String {
    ["/run/server.txt", "/run/agent.txt"].map(|file| fs::read_to_string(file).unwrap_or_default()).concat()
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let waited = wait::until(PATIENCE, what, || is_so().then_some(()));
    waited.unwrap_or_else(|timeout| panic!("{timeout}\n{}", said()));
}

fn until_said(what: &str) {
    until(what, || said().contains(what));
}

fn success(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}\n{}", said());
    String::from_utf8(output.stdout).unwrap()
}

/// Killed where the test fails: the guest would wait for it.
struct Daemon(Child);

impl Daemon {
    fn start(program: &str, arguments: &[&str], output: &str) -> Self {
        let output = File::options().create(true).append(true).open(output).unwrap();
        Self(Command::new(program).args(arguments).stderr(output).spawn().unwrap())
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success(), "{}", said());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail where it has ended in order.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An ext4 on a device that can be told to fail writes.
struct Stick {
    name: &'static str,
    at: &'static str,
    lower: String,
    sectors: u64,
}

impl Stick {
    fn make(name: &'static str, at: &'static str, mib: u64) -> Self {
        let image = format!("/tmp/{name}.img");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let lower = success("losetup", &["-f"]).trim().to_owned();
        success("losetup", &[&lower, &image]);
        let stick = Self { name, at, lower, sectors: mib << 11 };
        stick.dmsetup("create", &[Self::table(&stick.good())]);
        // One group of blocks, its inodes in 64 of them.
        success("mkfs.ext4", &["-q", "-O", "^has_journal,^resize_inode", "-N", "1024", &stick.device()]);
        fs::create_dir_all(at).unwrap();
        stick.mount();
        stick
    }

    fn good(&self) -> String {
        format!("0 {} linear {} 0\n", self.sectors, self.lower)
    }

    /// "Up" for no second, "down" for one, and so on; reads go through.
    fn bad(&self) -> String {
        const MIB: u64 = 2048;
        let (rest, lower) = (self.sectors - MIB, &self.lower);
        format!("0 {MIB} linear {lower} 0\n{MIB} {rest} flakey {lower} {MIB} 0 1 1 error_writes\n")
    }

    fn device(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    fn mount(&self) {
        success("mount", &["-t", "ext4", "-o", "errors=continue", &self.device(), self.at]);
    }

    /// The guest's udevd would be waited for, though the node is all that is wanted: hence the options.
    fn dmsetup(&self, verb: &str, more: &[&str]) {
        success("dmsetup", &[&[verb, "--noudevsync", "--noudevrules", self.name], more].concat());
    }

    /// `dmsetup` takes several lines from a file only.
    fn table(lines: &str) -> &'static str {
        fs::write("/run/table", lines).unwrap();
        "/run/table"
    }

    /// Without `--nolockfs` the file system would bring everything to the disk before.
    fn switch(&self, lines: &str) {
        self.dmsetup("load", &[Self::table(lines)]);
        self.dmsetup("suspend", &["--nolockfs", "--noflush"]);
        self.dmsetup("resume", &[]);
    }

    fn fail(&self) {
        self.switch(&self.bad());
    }

    fn work(&self) {
        self.switch(&self.good());
    }

    /// What is not on the disk is gone with this.
    fn mount_anew(&self) {
        success("umount", &[self.at]);
        self.mount();
    }
}

/// Has everything written that is not on its disk yet. What a disk refuses counts as written after that, but for who syncs
/// the file; and then the memory forgets it.
fn forget_what_is_not_on_disk() {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

fn text(file: &str) -> String {
    String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned()
}

fn lines(file: &str) -> Vec<Line> {
    text(file).lines().map(|line| Line::parse(line).unwrap()).collect()
}

/// "Still watching" records in the PC's own log.
fn coverages() -> usize {
    text(PC_LOG).matches(" coverage: ").count()
}

/// The watch goes on.
fn until_more_is_recorded(count: usize) {
    let before = coverages();
    until("more records in the PC's own log", || coverages() >= before + count);
}

/// The newest record that the server has acknowledged.
fn acked() -> (u64, u64) {
    let status = success("netmon-agent", &["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    serde_json::from_value(status["acked"].clone()).unwrap()
}

/// What the PC has logged until now is at the server.
fn until_delivered() {
    let own = text(PC_LOG);
    let last = own.rsplit_terminator('\n').nth(1).unwrap();
    until("the PC's newest line at the server", || text(SERVER_LOG).contains(last));
}

/// One datagram to each of many PCs of the LAN.
fn flood() {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    for host in 2..FLOOD + 2 {
        let [high, low] = host.to_be_bytes();
        socket.send_to(b"hello", (Ipv4Addr::new(10, 9, high, low), 9000)).unwrap();
    }
}

/// Reason and number of the records that are missing.
fn gap(line: &Line) -> Option<(&str, usize)> {
    let Kind::Gap(gap) = &line.kind else { return None };
    let (reason, count) = gap.rsplit_once(", ").unwrap();
    Some((reason, count.strip_suffix(" records").map_or(0, |count| count.parse().unwrap())))
}

/// The server has the PC's lines in their order, each once, but for as many as its gaps say.
fn assert_complete_but_for_gaps() {
    let own = lines(PC_LOG);
    let server: Vec<_> =
        lines(SERVER_LOG).into_iter().filter(|line| !line.text.contains(" SERVER ")).collect();
    let mut theirs = server.iter().peekable();
    let missing = own.iter().filter(|line| theirs.next_if(|next| next.text == line.text).is_none()).count();
    assert_eq!(theirs.next(), None, "doubled, or out of order, or nowhere in the PC's own log");
    let gaps: Vec<_> = server.iter().filter_map(gap).collect();
    println!("{} lines in the PC's own log, {missing} of them not at the server; gaps: {gaps:?}", own.len());
    let unwritable = gaps.iter().filter(|(reason, _)| *reason == "the spool could not be written");
    assert_eq!(unwritable.map(|(_, count)| count).sum::<usize>(), missing);
    assert!(missing > 0, "the memory had room for all: the flood is too small");
    for (reason, _) in gaps {
        let is_explained =
            reason == "the spool could not be written" || reason.starts_with("the agent was held up");
        assert!(is_explained, "{reason}");
    }
}

#[test]
#[ignore = "needs the virtual machine: cargo xtask test vm"]
fn disks_that_fail_to_sync_are_waited_for_and_what_could_not_be_kept_is_a_counted_gap() {
    assert!(Path::new("/vm/command").exists(), "this is for the guest of `cargo xtask vm`");
    for module in ["loop", "dm_mod", "dm_flakey", "ext4", "dummy"] {
        success("modprobe", &[module]);
    }
    let servers = Stick::make("server", "/var/lib/netmon-server", 128);
    let agents = Stick::make("agent", "/var/lib/netmon", 64);
    for words in ["link add hot0 type dummy", "addr add 10.9.0.1/16 dev hot0", "link set hot0 up"] {
        success("ip", &words.split(' ').collect::<Vec<_>>());
    }
    fs::create_dir_all("/etc/netmon").unwrap();
    fs::write("/etc/netmon/agent.toml", "[capture]\ninterfaces = [\"hot*\"]\n[report]\ncoverage_s = 1\n")
        .unwrap();
    success("netmon-server", &["init"]);
    let server = Daemon::start("netmon-server", &["run"], "/run/server.txt");
    until_said("netmon-server listening");
    fs::write("/run/token", success("netmon-server", &["token", "--raw", "--address", "127.0.0.1"])).unwrap();
    success("netmon-agent", &["enroll", "--token-file", "/run/token"]);
    let agent = Daemon::start("netmon-agent", &["--log-dir", "/run/pc-log", "run"], "/run/agent.txt");
    until("records at the server", || text(SERVER_LOG).lines().count() > 3);

    // Directories that were never written are gone with a failed write.
    rustix::fs::sync();

    // The server's disk: nothing is acknowledged, and the agent keeps it.
    servers.fail();
    until_said("nothing is acknowledged");
    forget_what_is_not_on_disk();
    until_more_is_recorded(2);
    let before = acked();
    until_more_is_recorded(5);
    assert_eq!(acked(), before, "acknowledged though it is not on disk");
    forget_what_is_not_on_disk();
    servers.work();
    until_said("the store takes records again");
    until_delivered();

    // The agent's disk: a little waits in memory, a flood does not.
    agents.fail();
    until_said("cannot sync spool segment");
    until_more_is_recorded(2);
    forget_what_is_not_on_disk();
    flood();
    until_said("the spool takes no records");
    until("the flood's end in the PC's own log", || {
        text(PC_LOG).matches(" transfer ended").count() >= usize::from(FLOOD)
    });
    forget_what_is_not_on_disk();
    agents.work();
    until_said("the spool can be written again");
    until_more_is_recorded(2);
    until_delivered();

    // Both at once.
    servers.fail();
    agents.fail();
    until("both to notice", || {
        ["nothing is acknowledged", "the spool cannot be written"]
            .iter()
            .all(|complaint| said().matches(complaint).count() == 2)
    });
    forget_what_is_not_on_disk();
    until_more_is_recorded(2);
    servers.work();
    agents.work();
    until_more_is_recorded(2);
    until_delivered();

    agent.stop();
    until("the agent's stop", || text(SERVER_LOG).contains(" agent stopped"));
    server.stop();
    agents.mount_anew();
    servers.mount_anew();
    assert_complete_but_for_gaps();
    let rendered = success("netmon-server", &["log", "vm"]);
    assert!(fs::read_to_string(SERVER_LOG).unwrap() == rendered, "the log on disk is not what the store has");
    let verdict = success("netmon-server", &["verify"]);
    assert!(verdict.contains("complete and unedited"), "{verdict}");
}
