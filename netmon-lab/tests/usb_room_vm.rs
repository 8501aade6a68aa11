//! A stick in the whole of netmon: from the port to the server's log, with files, users and bytes. Real agent, real server,
//! real kernel and udevd, in a virtual machine. Run by `cargo xtask test vm`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_agent::usb::disks::Stat;
use netmon_lab::follower::Follower;
use netmon_lab::lines::{Kind, Line};
use netmon_lab::wait;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};

/// The machine is emulated, on a PC that may be busy.
const PATIENCE: Duration = Duration::from_secs(120);
/// The promise: from the plug to the server's log.
const A_SECOND: i64 = 1_000_000_000;
const STUDENT: u32 = 1005;
const COPIED_TO: usize = 20_000_000;
const COPIED_FROM: usize = 5_000_000;

/// Asks the machine around this one.
fn ask(request: &str) {
    let mut line = OpenOptions::new().read(true).write(true).open("/dev/ttyS2").unwrap();
    writeln!(line, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(line).read_line(&mut answer).unwrap();
    assert_eq!(answer.trim(), "ok", "{request}");
}

fn said() -> String {
    ["/run/server.txt", "/run/agent.txt"].map(|file| fs::read_to_string(file).unwrap_or_default()).concat()
}

fn success(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}\n{}", said());
    String::from_utf8(output.stdout).unwrap()
}

fn start(program: &str, output: &str) -> Child {
    let output = File::options().create(true).append(true).open(output).unwrap();
    Command::new(program).arg("run").stderr(output).spawn().unwrap()
}

/// Server and agent of this machine, and the server's log of it.
struct Room {
    server: Child,
    agent: Child,
    log: Follower,
}

impl Room {
    fn start() -> Self {
        assert!(Path::new("/vm/command").exists(), "this is for the guest of `cargo xtask vm`");
        fs::create_dir_all("/etc/netmon").unwrap();
        fs::write("/etc/netmon/agent.toml", "[report]\ncoverage_s = 1\nmuted_s = 1\n").unwrap();
        let mut users = File::options().append(true).open("/etc/passwd").unwrap();
        writeln!(users, "student5:x:{STUDENT}:{STUDENT}::/tmp:/bin/sh").unwrap();
        success("netmon-server", &["init"]);
        let server = start("netmon-server", "/run/server.txt");
        let listens = || said().contains("netmon-server listening").then_some(());
        wait::until(PATIENCE, "the server to listen", listens).unwrap();
        let token = success("netmon-server", &["token", "--raw", "--address", "127.0.0.1"]);
        fs::write("/run/token", token).unwrap();
        success("netmon-agent", &["enroll", "--token-file", "/run/token"]);
        let agent = start("netmon-agent", "/run/agent.txt");
        let log = Follower::start(Path::new("/var/lib/netmon-server/logs/vm/log.txt"));
        let room = Self { server, agent, log };
        room.find("the watch of USB", |line| line.text.contains(", USB; ").then_some(()));
        room
    }

    /// What the first such line of the server's log gives, and when it could be read there, wall clock.
    fn find<T>(&self, what: &str, wanted: impl FnMut(&Line) -> Option<T>) -> (T, i64) {
        match self.log.find(PATIENCE, what, wanted) {
            Ok((found, seen)) => (found, seen.seen_ns),
            Err(timeout) => panic!("{timeout}\n{}", said()),
        }
    }

    /// The first line with all of these words, and when it could be read.
    fn says(&self, words: &[&str]) -> (String, i64) {
        let all = |line: &Line| words.iter().all(|word| line.text.contains(word)).then(|| line.text.clone());
        self.find(&format!("{words:?}"), all)
    }

    /// Bytes written to the stick and read from it, in transfers that are over and in what was looking only.
    fn told(&self, serial: &str) -> (u64, u64) {
        let (mut written, mut read) = (0, 0);
        for seen in self.log.lines() {
            if let Some((transfer, moved)) = seen.line.ended()
                && transfer.channel == "USB"
                && transfer.counterpart.contains(serial)
            {
                written += moved.sent;
                read += moved.received;
            }
            if let Kind::Muted(muted) = &seen.line.kind
                && muted.label == "usb:probe"
            {
                written += muted.sent;
                read += muted.received;
            }
        }
        (written, read)
    }

    /// The written and the read bytes of the first transfer with the stick that is over and that `wanted` takes.
    fn transfer(&self, what: &str, serial: &str, wanted: impl Fn(u64, u64) -> bool) -> (u64, u64) {
        let (moved, _) = self.find(what, |line| {
            let (transfer, moved) = line.ended()?;
            let ours = transfer.channel == "USB" && transfer.counterpart.contains(serial);
            (ours && wanted(moved.sent, moved.received)).then_some((moved.sent, moved.received))
        });
        moved
    }

    /// Plugs a small stick in and out; from the plug to the server's log, in nanoseconds.
    fn plugged_and_seen(&self, serial: &str) -> i64 {
        let asked = Now::read().wall_ns;
        ask(&format!("plug {serial} usb-storage size=1 serial={serial}"));
        let (_, seen) = self.says(&["USB device added", serial]);
        ask(&format!("unplug {serial}"));
        self.says(&["USB device removed", serial]);
        seen - asked
    }

    fn stop(mut self) {
        for child in [&mut self.agent, &mut self.server] {
            kill_process(Pid::from_child(child), Signal::TERM).unwrap();
            assert!(child.wait().unwrap().success(), "{}", said());
        }
        let verdict = success("netmon-server", &["verify"]);
        assert!(verdict.contains("complete and unedited"), "{verdict}");
    }
}

/// So that a test that fails ends.
impl Drop for Room {
    fn drop(&mut self) {
        for child in [&mut self.agent, &mut self.server] {
            // Fails only when it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Bytes that the kernel counts as written to the disk and read from it.
fn counters(disk: &str) -> (u64, u64) {
    let text = fs::read(format!("/sys/block/{disk}/stat")).unwrap();
    let stat = Stat::parse(&text).unwrap();
    (stat.written_sectors * 512, stat.read_sectors * 512)
}

fn copy_as_student(from: &str, to: &str) {
    let status = Command::new("/bin/cp").args([from, to]).uid(STUDENT).gid(STUDENT).status().unwrap();
    assert!(status.success(), "cp {from} {to}");
}

/// A stick as a student brings it: formatted, with a file on it.
fn prepare(plug: &str) {
    ask(plug);
    let disk = wait::until(PATIENCE, "the stick's disk", || {
        fs::read_dir("/sys/block").unwrap().find_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let path = fs::canonicalize(format!("/sys/block/{name}")).ok()?;
            let is_usb = path.to_string_lossy().contains("/usb");
            (is_usb && Path::new("/dev").join(&name).exists()).then_some(name)
        })
    });
    let node = format!("/dev/{}", disk.unwrap());
    success("mkdosfs", &[&node]);
    mount(&node, "/media", "vfat", MountFlags::empty(), None).unwrap();
    fs::write("/media/exam.bin", vec![0x17; COPIED_FROM]).unwrap();
    unmount("/media", UnmountFlags::empty()).unwrap();
    rustix::fs::sync();
    ask("unplug room");
}

fn within(bytes: u64, size: usize) -> bool {
    (size as u64..=size as u64 * 105 / 100).contains(&bytes)
}

#[test]
#[ignore = "needs the virtual machine: cargo xtask test vm"]
fn what_happens_with_a_stick_is_in_the_servers_log_with_bytes_files_and_who_it_was() {
    let plug = "plug room usb-storage serial=ROOM17 size=64";
    fs::create_dir_all("/media").unwrap();
    prepare(plug);
    let content: Vec<u8> = (0..COPIED_TO).map(|at| (at / 7) as u8).collect();
    fs::write("/tmp/answers.bin", &content).unwrap();

    let room = Room::start();
    // The machine is emulated: what is promised must be kept more often than not, however busy the PC around it is.
    let mut after: Vec<i64> = (0..5).map(|time| room.plugged_and_seen(&format!("TIME{time}"))).collect();
    after.sort_unstable();
    println!(
        "in the server's log after the plug, ms: {:?}",
        after.iter().map(|ns| ns / 1_000_000).collect::<Vec<_>>()
    );
    assert!(after[2] < A_SECOND, "{after:?}");

    ask(plug);
    room.says(&["USB device added", "serial \"ROOM17\"", "storage"]);
    let (line, _) = room.says(&["USB disk: ", "serial \"ROOM17\"", "(67108864 B)"]);
    let disk = line.split(" disk ").nth(1).unwrap().split(',').next().unwrap().to_owned();

    let node = format!("/dev/{disk}");
    let options = format!("uid={STUDENT},gid={STUDENT}");
    let options = std::ffi::CString::new(options).unwrap();
    mount(&node, "/media", "vfat", MountFlags::empty(), options.as_c_str()).unwrap();
    room.says(&["USB file system mounted", "serial \"ROOM17\"", "vfat", "\"/media\""]);

    copy_as_student("/tmp/answers.bin", "/media/answers.bin");
    room.says(&[
        "USB file written: \"/media/answers.bin\"",
        "(20000000 B) by \"cp\"",
        "of \"student5\" (uid 1005)",
        "serial \"ROOM17\"",
    ]);
    rustix::fs::sync();
    let (written, read) = room.transfer("the copy to it", "ROOM17", |written, _| written > 1_000_000);
    println!("copied 20000000 B to it: written {written} B, read {read} B");
    assert!(within(written, COPIED_TO), "{written}");

    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    copy_as_student("/media/exam.bin", "/tmp/exam.bin");
    assert_eq!(fs::read("/tmp/exam.bin").unwrap(), vec![0x17; COPIED_FROM]);
    room.says(&["USB file read: \"/media/exam.bin\"", "(5000000 B) by \"cp\"", "\"student5\""]);
    let (written, read) = room.transfer("the copy from it", "ROOM17", |_, read| read > 4_000_000);
    println!("copied 5000000 B from it: written {written} B, read {read} B");
    assert!(within(read, COPIED_FROM), "{read}");

    unmount("/media", UnmountFlags::empty()).unwrap();
    let (line, _) = room.says(&["USB file system unmounted", "serial \"ROOM17\"", "meanwhile written"]);
    println!("{line}");
    // Every byte that the kernel counted since the plug is in a transfer or among what only looked.
    let counted = wait::until(PATIENCE, "all bytes that the kernel counted", || {
        let counted = counters(&disk);
        (room.told("ROOM17") == counted).then_some(counted)
    });
    let counted = counted.unwrap_or_else(|timeout| {
        panic!("{timeout}: {:?}, told {:?}\n{}", counters(&disk), room.told("ROOM17"), said())
    });
    println!("the kernel counted {} B written, {} B read; the log has the same", counted.0, counted.1);

    ask("unplug room");
    room.says(&["USB device removed", "serial \"ROOM17\""]);
    let lines = room.log.lines();
    let count = |words: &str| lines.iter().filter(|seen| seen.line.text.contains(words)).count();
    assert_eq!((count("USB device added"), count("USB device removed")), (6, 6));
    for once in ["file system mounted", "file system unmounted"] {
        assert_eq!(count(once), 1, "{once}");
    }
    assert_eq!(count("GAP from"), 0, "{}", room_log());
    let devices = success("netmon-server", &["devices", "ROOM17"]);
    println!("{devices}");
    assert!(devices.contains("ROOM17") && devices.lines().count() == 2);
    room.stop();
}

fn room_log() -> String {
    fs::read_to_string("/var/lib/netmon-server/logs/vm/log.txt").unwrap_or_default()
}
