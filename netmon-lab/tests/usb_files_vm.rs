//! The real agent, a stick with FAT and what is copied to it and from it, on stock Debian kernels: `cargo xtask vm`.
//!
//!     cargo xtask vm 5.10 6.1 6.12 --test usb_files_vm --add target/debug/netmon-agent --time-limit 900 \
//!         -- usb_files_vm --ignored --nocapture --test-threads=1
#![expect(clippy::unwrap_used, reason = "a test that cannot prepare its machine has failed")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use netmon_lab::wait;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};

/// The verifier of the oldest kernel takes half a minute under emulation.
const PATIENCE: Duration = Duration::from_secs(300);
const STUDENT: u32 = 1005;

/// Asks the machine around this one.
fn ask(request: &str) {
    let mut line = OpenOptions::new().read(true).write(true).open("/dev/ttyS2").unwrap();
    writeln!(line, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(line).read_line(&mut answer).unwrap();
    assert_eq!(answer.trim(), "ok", "{request}");
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

fn as_student(script: &str, directory: &str) {
    let status = Command::new("sh")
        .args(["-c", script])
        .uid(STUDENT)
        .gid(STUDENT)
        .current_dir(directory)
        .status()
        .unwrap();
    assert!(status.success(), "{script}: {status}");
}

/// A running agent, ended when it is dropped.
struct Agent {
    process: Child,
    directory: &'static str,
}

impl Agent {
    /// `before`: a command that becomes the agent.
    fn start(directory: &'static str, before: &[&str], arguments: &[&str]) -> Self {
        let mut command: Vec<&str> = before.to_vec();
        command.push("netmon-agent");
        let directories = ["--state-dir", "--log-dir", "--runtime-dir"];
        let places = directories.map(|option| [option.to_owned(), format!("{directory}/{}", &option[2..5])]);
        let said = File::create(format!("{directory}.said")).unwrap();
        let process = Command::new(command[0])
            .args(&command[1..])
            .args(places.iter().flatten())
            .arg("run")
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(said)
            .spawn()
            .unwrap();
        let agent = Self { process, directory };
        agent.says("watching USB", |_| agent.said().contains("watching USB").then_some(()));
        agent
    }

    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(format!("{}/log/log.txt", self.directory)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn said(&self) -> String {
        fs::read_to_string(format!("{}.said", self.directory)).unwrap_or_default()
    }

    fn says<T>(&self, what: &str, found: impl Fn(&[String]) -> Option<T>) -> T {
        wait::until(PATIENCE, what, || found(&self.log()))
            .unwrap_or_else(|error| panic!("{error}\n{}\n{}", self.log().join("\n"), self.said()))
    }

    /// The first line with all of these.
    fn line(&self, parts: &[&str]) -> String {
        self.says(&format!("{parts:?}"), |lines| {
            lines.iter().find(|line| parts.iter().all(|part| line.contains(part))).cloned()
        })
    }

    /// Names and counts so far.
    fn files(&self) -> (usize, u64) {
        let lines = self.log();
        let named = lines.iter().filter(|line| line.contains("USB file ")).count();
        let counted = lines.iter().filter_map(|line| {
            line.split_once("there were too many at once, ")?.1.split(' ').next()?.parse::<u64>().ok()
        });
        (named, counted.sum())
    }
}

/// Whatever became of the test, the next one finds no stick.
impl Drop for Stick {
    fn drop(&mut self) {
        let _ = unmount("/media/STICK", UnmountFlags::DETACH);
        if Path::new("/sys/block/sda").exists() {
            self.unplug();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.process),
            rustix::process::Signal::TERM,
        );
        let _ = self.process.wait();
    }
}

/// A stick with FAT, mounted for the student as a desktop does it.
struct Stick {
    id: &'static str,
}

impl Stick {
    fn plug(id: &'static str) -> Self {
        ask(&format!("plug {id} usb-storage serial={id} size=64"));
        let disk = wait::until(PATIENCE, "the disk", || {
            let disks = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().file_name());
            let disks = disks.map(|name| name.into_string().unwrap());
            disks
                .filter(|name| name.starts_with("sd"))
                .find(|name| Path::new(&format!("/dev/{name}")).exists())
        })
        .unwrap();
        let node = format!("/dev/{disk}");
        run("mkdosfs", &[&node]);
        fs::create_dir_all("/media/STICK").unwrap();
        let options = c"uid=1005,gid=1005,utf8";
        mount(&node, "/media/STICK", "vfat", MountFlags::NOEXEC, options).unwrap();
        Self { id }
    }

    fn unmount(&self) {
        // At once: nothing of the agent's keeps it.
        unmount("/media/STICK", UnmountFlags::empty()).unwrap();
    }

    fn unplug(&self) {
        ask(&format!("unplug {}", self.id));
        wait::until(PATIENCE, "the disk to be gone", || {
            let mut disks = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().file_name());
            disks.all(|name| !name.to_string_lossy().starts_with("sd")).then_some(())
        })
        .unwrap();
    }
}

fn home() -> &'static str {
    fs::create_dir_all("/home/student").unwrap();
    std::os::unix::fs::chown("/home/student", Some(STUDENT), Some(STUDENT)).unwrap();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    if !passwd.contains("student5") {
        let line = format!("student5:x:{STUDENT}:{STUDENT}::/home/student:/bin/sh\n");
        OpenOptions::new()
            .append(true)
            .create(true)
            .open("/etc/passwd")
            .unwrap()
            .write_all(line.as_bytes())
            .unwrap();
    }
    "/home/student"
}

fn copies_are_told(agent: &Agent, stick: &Stick) {
    agent.line(&["USB file system mounted", stick.id]);
    as_student("dd if=/dev/urandom of=exam.bin bs=100000 count=50 2> /dev/null", home());
    // Under emulation a copy may have ended before anybody could look who it was. Then that is said, and another one is made.
    let is_known = |line: &String| line.contains(&format!(" of \"student5\" (uid {STUDENT})"));
    let known = |number: u32, script: &str, name: &str, what: &str| {
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        as_student(&script.replace('#', &number.to_string()), home());
        let line = agent.line(&[what, &name.replace('#', &number.to_string())]);
        let told = line.contains("5.0 MB (5000000 B) by ") && line.contains(stick.id);
        assert!(told && (is_known(&line) || line.contains("unknown")), "{line}");
        println!("{line}");
        is_known(&line)
    };
    let written =
        |number| known(number, "cp exam.bin /media/STICK/exam#", "/media/STICK/exam#\"", "USB file written");
    assert!((1..=5).any(written), "nobody knows who wrote");
    let read = |number| {
        let script = "cp exam.bin /media/STICK/back#; cp /media/STICK/back# back.bin; cmp exam.bin back.bin";
        known(number, script, "/media/STICK/back#\"", "USB file read")
    };
    assert!((1..=5).any(read), "nobody knows who read");

    // FAT has no name with a line feed; an escape sequence that turns text around it has.
    as_student("printf x > \"$(printf '\\342\\200\\256fdp.exe')\"", "/media/STICK");
    agent.line(&[r#"USB file written: "/media/STICK/\u{202e}fdp.exe" 1 B (1 B)"#]);
    let long = format!("{}.txt", "n".repeat(251));
    as_student(&format!("printf x > {long}"), "/media/STICK");
    agent.line(&[&long]);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn what_is_copied_to_a_stick_and_from_it_is_told() {
    home();
    let agent = Agent::start("/tmp/agent", &[], &[]);
    let stick = Stick::plug("FILES1");
    copies_are_told(&agent, &stick);

    let before = agent.files();
    as_student("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo > $i; done", "/media/STICK");
    let (named, counted) = agent.says("2,000 files", |_| {
        let (named, counted) = agent.files();
        let (named, counted) = (named - before.0, counted - before.1);
        (named as u64 + counted >= 2_000).then_some((named, counted))
    });
    println!("of 2,000 files {named} were named, {counted} counted");
    assert_eq!(named as u64 + counted, 2_000);

    stick.unmount();
    agent.line(&["USB file system unmounted", stick.id]);
    stick.unplug();
    assert!(!agent.log().iter().any(|line| line.contains("queue was full")), "{:?}", agent.log());
}

/// As systemd starts it: a mount namespace of its own that follows the PC's.
#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn an_agent_in_a_mount_namespace_of_its_own_sees_the_same() {
    home();
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).unwrap();
    let agent = Agent::start("/tmp/own", &["unshare", "--mount", "--propagation", "slave"], &[]);
    let stick = Stick::plug("FILES2");
    copies_are_told(&agent, &stick);
    stick.unmount();
    agent.line(&["USB file system unmounted", stick.id]);
    stick.unplug();
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn where_files_are_not_recorded_that_is_recorded() {
    home();
    let agent = Agent::start("/tmp/off", &[], &["--usb-files", "false"]);
    let stick = Stick::plug("FILES3");
    agent.line(&["they are not recorded (settings of this PC), 1 file systems"]);
    as_student("echo secret > secret.txt", "/media/STICK");
    stick.unmount();
    agent.line(&["USB file system unmounted", stick.id]);
    stick.unplug();
    assert!(!agent.log().iter().any(|line| line.contains("secret")), "{:?}", agent.log());
}
