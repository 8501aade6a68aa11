//! Real agent and server while the clock is set to 1970 and to 2038, in a virtual machine, whose clock is its own. Run by
//! `cargo xtask test vm`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use netmon_lab::wait;
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

/// The machine is emulated, and a refused agent tries again after a minute at the latest.
const PATIENCE: Duration = Duration::from_secs(200);
const DAY: i64 = 86_400;
/// 2038-01-20T00:00:00Z: behind what 32 bits of seconds can say.
const YEAR_2038: i64 = 2_147_558_400;

fn said() -> String {
    ["/run/server.txt", "/run/agent.txt"].map(|file| fs::read_to_string(file).unwrap_or_default()).concat()
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let waited = wait::until(PATIENCE, what, || is_so().then_some(()));
    waited.unwrap_or_else(|timeout| panic!("{timeout}\n{}\n{}", said(), log()));
}

fn log() -> String {
    fs::read_to_string("/var/lib/netmon-server/logs/vm/log.txt").unwrap_or_default()
}

fn start(program: &str, output: &str) -> Child {
    let output = File::options().create(true).append(true).open(output).unwrap();
    Command::new(program).arg("run").stderr(output).spawn().unwrap()
}

fn start_server() -> Child {
    start("netmon-server", "/run/server.txt")
}

fn start_agent() -> Child {
    start("netmon-agent", "/run/agent.txt")
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn set_clock(seconds: i64) {
    clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: 0 }).unwrap();
}

fn success(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}\n{}", said());
    String::from_utf8(output.stdout).unwrap()
}

/// Starts of the agent that the server knows of.
fn starts() -> usize {
    log().lines().filter(|line| line.contains(" agent started")).count()
}

#[test]
#[ignore = "needs the virtual machine: cargo xtask test vm"]
fn nothing_is_lost_while_the_clock_is_set_to_1970_and_to_2038() {
    assert!(Path::new("/vm/command").exists(), "this is for the guest of `cargo xtask vm`");
    for directory in ["/etc/netmon", "/var/lib", "/var/log"] {
        fs::create_dir_all(directory).unwrap();
    }
    fs::write("/etc/netmon/agent.toml", "[capture]\ninterfaces = [\"hot*\"]\n[report]\ncoverage_s = 1\n")
        .unwrap();
    success("netmon-server", &["init"]);
    let server = start_server();
    until("the server to listen", || said().contains("netmon-server listening"));
    fs::write("/run/token", success("netmon-server", &["token", "--raw", "--address", "127.0.0.1"])).unwrap();
    success("netmon-agent", &["enroll", "--token-file", "/run/token"]);
    let agent = start_agent();
    until("the first start", || starts() == 1);

    // The connection that stands goes on, and a new one is made.
    let good = clock_gettime(ClockId::Realtime).tv_sec;
    set_clock(DAY);
    until("records of 1970", || log().lines().any(|line| line.starts_with("1970-01-02")));
    kill(agent);
    let agent = start_agent();
    until("a start in 1970", || starts() == 2);

    // A server whose own clock is twelve years ahead takes every certificate for expired. Nothing is lost by that.
    set_clock(YEAR_2038);
    until("records of 2038", || log().lines().any(|line| line.starts_with("2038-01-20")));
    kill(agent);
    let agent = start_agent();
    until("the refusal", || said().contains("certificate expired"));
    kill(server);
    let server = start_server();
    until("the server to listen again", || said().matches("netmon-server listening").count() == 2);

    set_clock(good);
    until("the start of 2038", || starts() == 3);
    until("an empty spool", || {
        let status = Command::new("netmon-agent").args(["status", "--json"]).output().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        status["server"].as_str().is_some_and(|server| server.starts_with("connected"))
    });
    let log = log();
    assert!(!log.contains("records never came"), "{log}");
    assert!(!log.contains("another history"), "{log}");
    for child in [agent, server] {
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        assert!({ child }.wait().unwrap().success(), "{}", said());
    }
    let verdict = success("netmon-server", &["verify"]);
    assert!(verdict.contains("complete and unedited"), "{verdict}");
}
