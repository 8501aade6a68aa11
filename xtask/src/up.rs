//! `cargo xtask up`: a server and an agent on this machine, and the live log.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::{setup, sh};

/// Server and agent of this machine.
const SEAT: &str = "this-pc";

/// Options of `up`.
#[derive(clap::Args)]
pub struct Options {
    /// Interface to watch; may be repeated
    #[arg(long = "interface", short, default_value = "auto", value_name = "NAME")]
    interfaces: Vec<String>,
}

/// Builds, starts, shows, and on Ctrl-C stops everything again.
pub fn run(options: &Options) -> Result<()> {
    setup::require_root("netmon's agent")?;
    setup::build()?;
    let packages = ["build", "--locked", "-p", "netmon-agent", "-p", "netmon-server"];
    sh::run(Command::new("cargo").current_dir(sh::workspace()).args(packages))?;

    // Before anything is started, so that no signal falls in between.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGCHLD])?;
    let place = Place::new()?;
    let server = place.start_server()?;
    place.enroll()?;
    let agent = place.start_agent(&options.interfaces)?;
    println!("\nnetmon watches this machine. Plug in a USB stick, fetch a page; Ctrl-C stops.");
    println!("own log: {}    status: {}\n", place.log().join("log.txt").display(), place.status_command());
    let follow = Running::start("log", place.server().args(["log", SEAT, "--follow"]))?;

    let mut running = [agent, server, follow];
    let died = loop {
        match signals.forever().next() {
            Some(SIGCHLD) => {
                if let Some(died) = running.iter_mut().find_map(Running::died) {
                    break Some(died);
                }
            }
            _ => break None,
        }
    };
    // The agent first: its last records still reach the server.
    println!("\nstopping");
    for part in &mut running {
        part.stop()?;
    }
    if Path::new("/sys/fs/bpf/netmon").exists() {
        bail!("/sys/fs/bpf/netmon is still there: see {}", place.root.join("agent.log").display());
    }
    println!("stopped; nothing is attached any more");
    match died {
        Some(died) => bail!("{died}"),
        None => Ok(()),
    }
}

/// Where this machine's own netmon lives: `target/up`.
struct Place {
    root: PathBuf,
    binaries: PathBuf,
}

impl Place {
    fn new() -> Result<Self> {
        let target = sh::workspace().join("target");
        let place = Self { root: target.join("up"), binaries: target.join("debug") };
        std::fs::create_dir_all(&place.root)
            .with_context(|| format!("cannot make {}", place.root.display()))?;
        Ok(place)
    }

    fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    fn server(&self) -> Command {
        let mut command = Command::new(self.binaries.join("netmon-server"));
        command.arg("--data").arg(self.root.join("server"));
        command
    }

    fn agent(&self) -> Command {
        let mut command = Command::new(self.binaries.join("netmon-agent"));
        command.arg("--state-dir").arg(self.root.join("state"));
        command.arg("--log-dir").arg(self.log());
        command.arg("--runtime-dir").arg(self.root.join("run"));
        command
    }

    fn status_command(&self) -> String {
        let runtime = self.root.join("run");
        format!("{} --runtime-dir {} status", self.binaries.join("netmon-agent").display(), runtime.display())
    }

    fn start_server(&self) -> Result<Running> {
        sh::run(self.server().args(["init", "--if-needed"]))?;
        let log = self.root.join("server.log");
        let mut command = self.server();
        command.args(["run", "--listen", "127.0.0.1:7443", "--enroll-listen", "127.0.0.1:7444"]);
        let mut server = Running::start("server", logging_to(&mut command, &log)?)?;
        server.wait_until("listens", &log, || {
            std::fs::read_to_string(&log).is_ok_and(|text| text.contains("netmon-server listening"))
        })?;
        Ok(server)
    }

    fn enroll(&self) -> Result<()> {
        // The directory alone says nothing: an enrolment that was refused leaves one, too.
        if self.root.join("state/identity/current").exists() {
            return Ok(());
        }
        let token = sh::output(self.server().args(["token", "--address", "127.0.0.1:7444", "--raw"]))
            .context("the server made no token")?;
        let mut enroll = self.agent();
        enroll.args(["enroll", "--token-file", "-", "--seat", SEAT]).stdin(Stdio::piped());
        let mut enroll = enroll.spawn().context("cannot start the agent")?;
        enroll.stdin.take().context("no standard input")?.write_all(token.as_bytes())?;
        if !enroll.wait()?.success() {
            bail!("the agent could not enrol");
        }
        Ok(())
    }

    fn start_agent(&self, interfaces: &[String]) -> Result<Running> {
        let log = self.root.join("agent.log");
        let mut command = self.agent();
        command.arg("run");
        interfaces.iter().for_each(|interface| {
            command.arg("--interface").arg(interface);
        });
        let mut agent = Running::start("agent", logging_to(&mut command, &log)?)?;
        agent.wait_until("watches", &log, || {
            let quiet = || Stdio::null();
            self.agent()
                .arg("status")
                .stdout(quiet())
                .stderr(quiet())
                .status()
                .is_ok_and(|status| status.success())
        })?;
        Ok(agent)
    }
}

fn logging_to<'a>(command: &'a mut Command, log: &Path) -> Result<&'a mut Command> {
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    Ok(command.stderr(file).stdin(Stdio::null()))
}

/// A program of ours that runs.
struct Running {
    name: &'static str,
    child: Child,
}

impl Running {
    fn start(name: &'static str, command: &mut Command) -> Result<Self> {
        // A group of its own: Ctrl-C reaches us alone, and we stop the parts in order.
        let child = command.process_group(0).spawn().with_context(|| format!("cannot start the {name}"))?;
        Ok(Self { name, child })
    }

    fn wait_until(&mut self, what: &str, log: &Path, condition: impl Fn() -> bool) -> Result<()> {
        const STEP: Duration = Duration::from_millis(50);
        const PATIENCE: u32 = 600;
        for _ in 0..PATIENCE {
            if condition() {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                let said = std::fs::read_to_string(log).unwrap_or_default();
                bail!("the {} ended with {status}:\n{said}", self.name);
            }
            std::thread::sleep(STEP);
        }
        bail!("after {} s it is not true that the {} {what}: see {}", PATIENCE / 20, self.name, log.display())
    }

    fn died(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        Some(format!("the {} ended on its own: {status}", self.name))
    }

    /// Asks it to end and waits; one that does not listen is killed.
    fn stop(&mut self) -> Result<()> {
        const STEP: Duration = Duration::from_millis(50);
        const PATIENCE: u32 = 400;
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        kill_process(pid(&self.child)?, Signal::TERM)?;
        for _ in 0..PATIENCE {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(STEP);
        }
        self.child.kill()?;
        self.child.wait()?;
        bail!("the {} did not end within {} s of SIGTERM and was killed", self.name, PATIENCE / 20)
    }
}

/// Nothing stays behind when a later step fails: a server that runs on would keep the ports.
impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
    }
}

fn pid(child: &Child) -> Result<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process without a number")
}
