//! The units of `deploy` under a real systemd, in a virtual machine: agent and server start, have what the units leave
//! them and nothing else, and work. Run by `cargo xtask test vm`.
//!
//! systemd has a process namespace of its own, because the guest's first process is another one. It starts nothing but
//! these two units. Not for a real machine: it would do there what a boot does, such as emptying `/tmp`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::UdpSocket;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use netmon_lab::wait;
use serde_json::Value;

/// The verifier of the oldest kernel takes half a minute under emulation.
const PATIENCE: Duration = Duration::from_secs(300);
const UNITS: [(&str, &str); 2] = [
    ("netmon-agent", include_str!("../../deploy/netmon-agent.service")),
    ("netmon-server", include_str!("../../deploy/netmon-server.service")),
];
/// What a whole Debian has around the units is not there; what netmon says is kept.
const DROP_IN: &str =
    "[Unit]\nDefaultDependencies=no\n[Service]\nTimeoutStartSec=300\nStandardError=append:/run/";
const TARGET: &str = "[Unit]\nDefaultDependencies=no\nWants=netmon-agent.service netmon-server.service\n";
/// CAP_NET_ADMIN (12), CAP_PERFMON (38), CAP_BPF (39) of linux/capability.h.
const THREE: u64 = 1 << 12 | 1 << 38 | 1 << 39;
/// CAP_SYS_ADMIN (21): for the process that marks file systems alone.
const SYS_ADMIN: u64 = 1 << 21;
/// The server's user here.
const NETMON: u32 = 990;

fn install() {
    for directory in ["/etc/systemd/system", "/etc/netmon", "/home", "/var/lib", "/var/log", "/var/tmp"] {
        fs::create_dir_all(directory).unwrap();
    }
    let system = Path::new("/etc/systemd/system");
    for (name, text) in UNITS {
        fs::write(system.join(format!("{name}.service")), text).unwrap();
        let drop_in = system.join(format!("{name}.service.d"));
        fs::create_dir(&drop_in).unwrap();
        fs::write(drop_in.join("vm.conf"), format!("{DROP_IN}{name}.txt\n")).unwrap();
    }
    fs::write(system.join("vm.target"), TARGET).unwrap();
    fs::write("/etc/netmon/agent.toml", "[capture]\ninterfaces = [\"hot*\"]\n[report]\ncoverage_s = 1\n")
        .unwrap();
    fs::write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n").unwrap();
    let user = format!("netmon:x:{NETMON}:{NETMON}::/:/bin/false\n");
    File::options().append(true).open("/etc/passwd").unwrap().write_all(user.as_bytes()).unwrap();
    let group = format!("netmon:x:{NETMON}:\n");
    File::options().append(true).open("/etc/group").unwrap().write_all(group.as_bytes()).unwrap();
}

/// What systemd and the two programs said.
fn said() -> String {
    let files = ["/run/systemd.txt", "/run/netmon-agent.txt", "/run/netmon-server.txt"];
    files.map(|file| fs::read_to_string(file).unwrap_or_default()).concat()
}

fn until<T>(what: &str, ready: impl FnMut() -> Option<T>) -> T {
    wait::until(PATIENCE, what, ready).unwrap_or_else(|timeout| panic!("{timeout}\n{}", said()))
}

/// What the agent says of itself, as soon as this is true of it.
fn status(what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    until(what, || {
        let output = Command::new("netmon-agent").args(["status", "--json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).ok().filter(&wanted)
    })
}

/// The program of this name and all its threads, as the kernel describes them.
fn process(name: &str) -> (String, Vec<BTreeMap<String, String>>) {
    let directories = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let is_it = |path: &std::path::PathBuf| {
        fs::read_link(path.join("exe")).is_ok_and(|exe| exe.ends_with(format!("bin/{name}")))
    };
    // Not the process that marks file systems for the agent.
    let is_main = |path: &std::path::PathBuf| {
        let command = fs::read(path.join("cmdline")).unwrap_or_default();
        !command.split(|byte| *byte == 0).any(|word| word == b"usb-marks")
    };
    let path = directories
        .filter(|path| path.join("task").exists())
        .find(|path| is_it(path) && is_main(path))
        .unwrap();
    let describe = |entry: std::io::Result<fs::DirEntry>| {
        let text = fs::read_to_string(entry.unwrap().path().join("status")).ok()?;
        let lines = text.lines().filter_map(|line| line.split_once(":\t"));
        Some(lines.map(|(field, value)| (field.to_owned(), value.to_owned())).collect())
    };
    let threads = fs::read_dir(path.join("task")).unwrap().filter_map(describe).collect();
    (path.display().to_string(), threads)
}

/// All threads have these capabilities, a system call filter and no way to more, and cannot write to these places.
fn is_closed(name: &str, capabilities: u64, bounding: u64, places: &[&str]) {
    let (path, threads) = process(name);
    assert!(threads.len() > 1, "{threads:#?}");
    for thread in threads {
        for (field, expected) in [("CapPrm", capabilities), ("CapEff", capabilities), ("CapBnd", bounding)] {
            let set = u64::from_str_radix(&thread[field], 16).unwrap();
            assert_eq!(set, expected, "{field} of {name}: {thread:#?}");
        }
        assert_eq!((&*thread["NoNewPrivs"], &*thread["Seccomp"]), ("1", "2"), "{name}");
    }
    for place in places {
        // Through its own eyes, but with root's rights.
        let error = fs::write(format!("{path}/root{place}/probe"), "").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{name}: {place}");
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

#[test]
#[ignore = "needs the virtual machine: cargo xtask test vm"]
fn agent_and_server_work_with_what_the_units_leave_them() {
    // Here it does no harm: a guest's root is in its memory.
    assert!(Path::new("/vm/command").exists(), "this is for the guest of `cargo xtask vm`");
    install();
    let output = File::create("/run/systemd.txt").unwrap();
    let mut systemd = Command::new("unshare");
    systemd.args(["--pid", "--fork", "--mount", "--mount-proc", "/lib/systemd/systemd", "--system"]);
    systemd.args(["--unit=vm.target", "--log-target=console", "--show-status=no"]).env("container", "vm");
    systemd.stdin(Stdio::null()).stderr(output.try_clone().unwrap()).stdout(output);
    let mut systemd = systemd.spawn().unwrap();

    status("the agent to start", |_| true);
    ip("link add hot0 type veth peer name far");
    ip("link set far up");
    ip("link set hot0 up");
    status("hot0 to be watched", |status| status["interfaces"][0]["name"] == "hot0");
    ip("address add 10.99.0.1/24 dev hot0");
    // Nobody is there; the frame leaves all the same.
    ip("neigh add 10.99.0.2 lladdr 02:00:00:00:00:02 dev hot0");
    UdpSocket::bind("10.99.0.1:0").unwrap().send_to(&[7; 100], "10.99.0.2:9000").unwrap();
    status("frames to be counted", |status| status["coverage"]["counted"].as_u64() > Some(0));
    is_closed("netmon-agent", THREE, THREE | SYS_ADMIN, &["/etc", "/usr", "/var/lib", "/root"]);

    until("the server to listen", || said().contains("netmon-server listening").then_some(()));
    is_closed("netmon-server", 0, 0, &["/etc", "/usr", "/var/lib"]);
    let mut token = Command::new("netmon-server");
    token.args(["token", "--raw", "--address", "127.0.0.1"]).uid(NETMON).gid(NETMON);
    let token = token.output().unwrap();
    assert!(token.status.success(), "{}", String::from_utf8_lossy(&token.stderr));
    fs::write("/run/token", token.stdout).unwrap();
    let enrolled =
        Command::new("netmon-agent").args(["enroll", "--token-file", "/run/token"]).status().unwrap();
    assert!(enrolled.success());
    until("the server to have it", || {
        let log = fs::read_to_string("/var/lib/netmon-server/logs/vm/log.txt").ok()?;
        log.contains("watching interface \"hot0\"").then_some(())
    });
    let restarts = said().matches("Scheduled restart job").count();
    assert_eq!(restarts, 0, "{}", said());
    systemd.kill().unwrap();
    systemd.wait().unwrap();
}
