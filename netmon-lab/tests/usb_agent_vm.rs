//! The agent itself with USB devices, in a virtual machine: what its log says of a phone that shares its connection, and of
//! a stick that is plugged in fifty times. Run by `cargo xtask test vm`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_lab::follower::Follower;
use netmon_lab::lines::{Kind, Line};
use netmon_lab::wait;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "usb_vm/phone.rs"]
mod phone;

use phone::Phone;

/// The machine is emulated, on a PC that may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// Asks the machine around this one.
fn ask(request: &str) {
    let mut line = OpenOptions::new().read(true).write(true).open("/dev/ttyS2").unwrap();
    writeln!(line, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(line).read_line(&mut answer).unwrap();
    assert_eq!(answer.trim(), "ok", "{request}");
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// An agent and its log.
struct Agent {
    child: Child,
    log: Follower,
}

impl Agent {
    fn start() -> Self {
        assert!(Path::new("/vm/command").exists(), "this is for the guest of `cargo xtask vm`");
        fs::create_dir_all("/etc/netmon").unwrap();
        // As on a PC that has another interface: the kernel's modules for filters are there already.
        if !Path::new("/sys/class/net/other").exists() {
            ip("link add other type dummy");
        }
        let settings = "[capture]\ninterfaces = [\"auto\", \"other\"]\n[report]\ncoverage_s = 1\n";
        fs::write("/etc/netmon/agent.toml", settings).unwrap();
        for file in ["/var/log/netmon/log.txt", "/var/log/netmon/usb.log"] {
            // Of the test before.
            let _ = fs::remove_file(file);
        }
        let said = File::options().create(true).append(true).open("/run/agent.txt").unwrap();
        let child = Command::new("netmon-agent").arg("run").stderr(said).spawn().unwrap();
        let agent = Self { child, log: Follower::start(Path::new("/var/log/netmon/log.txt")) };
        agent.find("the watch of USB", |line| line.text.contains("other, USB; ").then_some(()));
        agent
    }

    /// What the first such line gives, and when it could be read, wall clock.
    fn find<T>(&self, what: &str, wanted: impl FnMut(&Line) -> Option<T>) -> (T, i64) {
        let found = self.log.find(PATIENCE, what, wanted);
        let (found, seen) = found.unwrap_or_else(|timeout| {
            panic!("{timeout}\n{}", fs::read_to_string("/run/agent.txt").unwrap_or_default())
        });
        (found, seen.seen_ns)
    }

    /// When the first line with all of these words could be read.
    fn says(&self, words: &[&str]) -> i64 {
        let has_all = |line: &Line| words.iter().all(|word| line.text.contains(word)).then_some(());
        self.find(&format!("{words:?}"), has_all).1
    }

    /// Lines of devices that were `added`, `removed` ...
    fn devices(&self, what: &str) -> usize {
        let lines = self.log.lines();
        lines.iter().filter(|seen| matches!(&seen.line.kind, Kind::Device(found, _) if found == what)).count()
    }

    fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let limit = wait::until(PATIENCE, what, || is_so().then_some(()));
        limit.unwrap_or_else(|timeout| panic!("{timeout}"));
    }

    /// Memory that it takes, in kB: of `VmRSS` (proc_pid_status(5)) what is its own, and pages of its files and maps.
    fn memory(&self) -> [u64; 3] {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        ["RssAnon:", "RssFile:", "RssShmem:"].map(|field| {
            let line = status.lines().find(|line| line.starts_with(field)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        })
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Fails when it has ended already; a test that failed must not leave it to the next one.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The network behind the phone: a thread in a network namespace of its own; says its thread's number, then waits for the
/// address at which to take one connection to its end, and says how many bytes came.
fn behind_the_phone() -> (i32, mpsc::Sender<&'static str>, mpsc::Receiver<usize>) {
    let (ready, tid) = mpsc::channel();
    let (listen, address) = mpsc::channel::<&'static str>();
    let (done, bytes) = mpsc::channel();
    thread::spawn(move || {
        // SAFETY: no file descriptor table is unshared, so no descriptor of another thread changes its meaning.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        ready.send(gettid().as_raw_nonzero().get()).unwrap();
        let interface = address.recv().unwrap();
        ip(&format!("address add 192.168.42.129/24 dev {interface}"));
        ip(&format!("link set {interface} up"));
        let listener = TcpListener::bind("192.168.42.129:5000").unwrap();
        done.send(0).unwrap();
        let mut content = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut content).unwrap();
        done.send(content.len()).unwrap();
    });
    (tid.recv().unwrap(), listen, bytes)
}

/// Name of the interface with this address.
fn by_address(address: &str) -> String {
    let found = wait::until(PATIENCE, format!("an interface {address}"), || {
        fs::read_dir("/sys/class/net").unwrap().find_map(|entry| {
            let entry = entry.ok()?;
            let found = fs::read_to_string(entry.path().join("address")).ok()?;
            (found.trim() == address).then(|| entry.file_name().into_string().ok())?
        })
    });
    found.unwrap()
}

#[test]
#[ignore = "needs the virtual machine: cargo xtask test vm"]
fn a_phone_that_shares_its_connection_is_named_watched_and_its_traffic_marked() {
    const BYTES: usize = 3_000_000;
    // udev renames what it knows, as it does on any PC.
    fs::create_dir_all("/run/udev/rules.d").unwrap();
    let rule = "SUBSYSTEM==\"net\", ACTION==\"add\", ATTR{address}==\"52:54:00:00:05:01\", NAME=\"enx525400000501\"\n";
    fs::write("/run/udev/rules.d/99-phone.rules", rule).unwrap();
    assert!(Command::new("udevadm").args(["control", "--reload"]).status().unwrap().success());

    let agent = Agent::start();
    let phone = Phone::new();
    phone.plug();
    let plugged = Now::read().wall_ns;
    // The driver tells when the interface is there; its name is udev's to change.
    by_address("52:54:00:00:05:01");
    let there = Now::read().wall_ns;
    let device = agent.says(&["USB device added", "Google Pixel 7", "network adapter (RNDIS)"]);
    let tethering = agent.says(&["PHONE TETHERING on this PC", "Google Pixel 7", "\"enx525400000501\""]);
    agent.says(&["watching interface \"enx525400000501\""]);
    let names = ["watching interface \"usb", "watching interface \"enx"];
    let (_, watched) = agent.find("the interface's watch", |line| {
        names.iter().any(|name| line.text.contains(name)).then_some(())
    });
    let ms = |at: i64| (at - plugged) / 1_000_000;
    println!(
        "after the plug: device {} ms, interface {} ms, watched {} ms, tethering {} ms",
        ms(device),
        ms(there),
        ms(watched),
        ms(tethering)
    );
    assert!(watched - there < 1_000_000_000, "watched {} ms after it was there", ms(watched) - ms(there));
    let told = |lines: &[netmon_lab::follower::Seen]| {
        lines.iter().filter(|seen| seen.line.text.contains("PHONE TETHERING")).count()
    };
    assert_eq!(told(&agent.log.lines()), 1, "with its final name, once");

    let (tid, listen, bytes) = behind_the_phone();
    let far = by_address("52:54:00:00:05:02");
    ip(&format!("link set {far} netns {tid}"));
    listen.send(far.leak()).unwrap();
    bytes.recv().unwrap();
    ip("address add 192.168.42.10/24 dev enx525400000501");
    ip("link set enx525400000501 up");
    let mut stream = TcpStream::connect("192.168.42.129:5000").unwrap();
    stream.write_all(&vec![7; BYTES]).unwrap();
    drop(stream);
    assert_eq!(bytes.recv().unwrap(), BYTES);
    agent.says(&["LAN transfer started over USB: 192.168.42.129 tcp/5000", "enx525400000501"]);
    let ended = |line: &Line| {
        let (transfer, moved) = line.ended()?;
        (transfer.over_usb && transfer.counterpart == "192.168.42.129").then_some(moved.sent_payload)
    };
    let (sent, _) = agent.find("the transfer's end", ended);
    assert!((BYTES as u64..BYTES as u64 * 21 / 20).contains(&sent), "{sent}");

    phone.unplug();
    agent.says(&["USB device removed", "Google Pixel 7"]);
    agent.says(&["no longer watching interface \"enx525400000501\""]);
    agent.stop();
    fs::remove_file("/run/udev/rules.d/99-phone.rules").unwrap();
}

#[test]
#[ignore = "needs the virtual machine: cargo xtask test vm"]
fn fifty_times_plugged_in_and_out_make_fifty_lines_each_and_no_memory() {
    const TIMES: usize = 50;
    /// Until then caches fill.
    const WARM: usize = 10;
    /// In kB: what malloc may keep, and no more than 20 kB for each time.
    const SPARE: u64 = 800;
    let agent = Agent::start();
    let mut warm = 0;
    for time in 1..=TIMES {
        ask("plug again usb-storage serial=AGAIN size=16");
        agent.until("it to be added", || agent.devices("added") >= time);
        agent.until("its disk", || {
            let disks = agent.log.lines();
            disks.iter().filter(|seen| seen.line.text.contains(" USB disk: ")).count() >= time
        });
        ask("unplug again");
        agent.until("it to be removed", || agent.devices("removed") >= time);
        if time % WARM == 0 {
            println!("{time} times: {:?} kB", agent.memory());
        }
        if time == WARM {
            [warm, ..] = agent.memory();
        }
    }
    // Another device: whatever was still to come of the stick is there before it.
    ask("plug k1 usb-kbd");
    agent.says(&["USB device added", "QEMU USB Keyboard", "keyboard"]);
    let [memory, ..] = agent.memory();
    assert_eq!((agent.devices("added"), agent.devices("removed")), (TIMES + 1, TIMES));
    let disks = agent.log.lines();
    let disks = disks.iter().filter(|seen| seen.line.text.contains(" USB disk: ")).count();
    assert_eq!(disks, TIMES);
    assert!(memory <= warm + SPARE, "{memory} kB");
    ask("unplug k1");
    agent.stop();
}
