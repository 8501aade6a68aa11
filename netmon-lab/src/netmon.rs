//! netmon's real programs, running in the room.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;
use std::{env, thread};

use rustix::process::{Pid, Signal, kill_process};

use crate::follower::Follower;
use crate::generator::built_programs;
use crate::host::Host;
use crate::room::{self, FILTER_LIST, Room};
use crate::wait;

/// Port of the server's collector.
pub const PORT: u16 = 7443;
/// Port of the server's enrolment.
pub const ENROLL_PORT: u16 = 7444;
/// How long a program may take to get ready, to end, or to do one chore. Starting an agent loads kernel programs.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a server says when it is ready.
const LISTENING: &str = "netmon-server listening";

/// Settings of the lab's agents: "still watching" and muted totals every second, so that tests need not wait.
const AGENT_CONFIG: &str = "[report]\ncoverage_s = 1\nmuted_s = 1\n";

/// Why a program of netmon does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum NetmonError {
    /// It was not built.
    #[error(
        "{} is missing: build it with `cargo build -p {program}`, or say where it is with NETMON_BIN_DIR",
        path.display()
    )]
    NotBuilt {
        /// Its name.
        program: String,
        /// Where it was expected.
        path: PathBuf,
    },
    /// It cannot be started, or its files cannot be made.
    #[error("cannot start {what}")]
    Start {
        /// Program and host.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// It did not get ready, or did not end, in time; or it ended when it should not.
    #[error("{what}: {problem}; it said:\n{said}")]
    Behaviour {
        /// Program and host.
        what: String,
        /// What went wrong.
        problem: String,
        /// End of its standard error.
        said: String,
    },
    /// A chore failed.
    #[error("`{command}` failed ({status}): {stderr}")]
    Chore {
        /// The command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
}

/// Where `netmon-agent` or `netmon-server` was built to.
///
/// # Errors
/// [`NetmonError::NotBuilt`].
pub fn program(name: &str) -> Result<PathBuf, NetmonError> {
    let directory = match env::var_os("NETMON_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => built_programs().map_err(|source| NetmonError::Start { what: name.to_owned(), source })?,
    };
    let path = directory.join(name);
    if path.is_file() { Ok(path) } else { Err(NetmonError::NotBuilt { program: name.to_owned(), path }) }
}

/// Runs a program of netmon inside a host to its end. A status other than success is no error here.
///
/// # Errors
/// [`NetmonError`] when it is not there or does not end in time.
pub fn chore<A: AsRef<OsStr>>(
    host: &Host,
    name: &str,
    arguments: &[A],
    input: &str,
) -> Result<Output, NetmonError> {
    let mut command = host.command(program(name)?);
    command.args(arguments);
    finish(&format!("{name} in {}", host.name()), command, input)
}

/// Runs a command to its end, at most for [`PATIENCE`].
///
/// # Errors
/// [`NetmonError`] when it cannot be started or does not end in time; it is killed then.
pub fn finish(what: &str, mut command: Command, input: &str) -> Result<Output, NetmonError> {
    let start = |source| NetmonError::Start { what: what.to_owned(), source };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends before it read its input is judged by its exit status, not by the broken pipe.
        let _ = stdin.write_all(input.as_bytes());
    }
    let pid = child.id();
    let reader = thread::spawn(move || child.wait_with_output());
    let ended = wait::until(PATIENCE, "it to end", || reader.is_finished().then_some(()));
    if ended.is_err() {
        // The reader has not collected its status: the number is still this process's.
        signal(pid, Signal::KILL);
    }
    let output =
        reader.join().unwrap_or_else(|_| Err(io::Error::other("the reader's thread died"))).map_err(start)?;
    match ended {
        Ok(()) => Ok(output),
        Err(timeout) => Err(NetmonError::Behaviour {
            what: what.to_owned(),
            problem: timeout.to_string(),
            said: String::from_utf8_lossy(&output.stderr).into_owned(),
        }),
    }
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

fn succeeded(command: &str, output: Output) -> Result<String, NetmonError> {
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(NetmonError::Chore { command: command.to_owned(), status: output.status, stderr });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program that runs until it is told to stop. What it says goes to a file of the room.
#[derive(Debug)]
pub struct Daemon {
    what: String,
    child: Child,
    output: PathBuf,
    /// Length of `output` when it was started.
    said_before: u64,
}

impl Daemon {
    /// Starts it; its standard output and error are appended to `output`.
    ///
    /// # Errors
    /// [`NetmonError::Start`].
    pub fn start(what: String, mut command: Command, output: &Path) -> Result<Self, NetmonError> {
        let child = open_append(output).and_then(|file| {
            let (error, said_before) = (file.try_clone()?, file.metadata()?.len());
            let child = command.stdin(Stdio::null()).stdout(file).stderr(error).spawn()?;
            Ok((child, said_before))
        });
        match child {
            Ok((child, said_before)) => Ok(Self { what, child, output: output.to_owned(), said_before }),
            Err(source) => Err(NetmonError::Start { what, source }),
        }
    }

    /// Waits until `ready` is true.
    ///
    /// # Errors
    /// [`NetmonError::Behaviour`] when it is not in time, or when the program ended meanwhile.
    pub fn wait_until(&mut self, what: &str, mut ready: impl FnMut() -> bool) -> Result<(), NetmonError> {
        let mut ended = None;
        let waited = wait::until(PATIENCE, what, || {
            ended = self.child.try_wait().ok().flatten();
            (ended.is_some() || ready()).then_some(())
        });
        match (ended, waited) {
            (Some(status), _) => Err(self.behaviour(format!("it ended ({status})"))),
            (None, Err(timeout)) => Err(self.behaviour(timeout.to_string())),
            (None, Ok(())) => Ok(()),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`NetmonError::Behaviour`] when it goes on.
    pub fn wait_end(&mut self) -> Result<ExitStatus, NetmonError> {
        let waited = wait::until(PATIENCE, "its end", || self.child.try_wait().ok().flatten());
        waited.map_err(|timeout| self.behaviour(timeout.to_string()))
    }

    /// True while it runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// How it ended, once it has.
    pub fn try_end(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to its standard output and error, of all its runs.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// What it wrote to its standard output and error since it was started.
    pub fn said_now(&self) -> String {
        let mut said = Vec::new();
        let read = File::open(&self.output).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.said_before))?;
            file.read_to_end(&mut said)
        });
        // A file that cannot be read says nothing.
        read.map(|_| String::from_utf8_lossy(&said).into_owned()).unwrap_or_default()
    }

    /// Sends it a signal, unless its end was seen already.
    pub fn signal(&self, which: Signal) {
        // The child was not waited for: the number is still this process's.
        signal(self.child.id(), which);
    }

    /// An error about it, with the end of what it said.
    pub fn behaviour(&self, problem: String) -> NetmonError {
        let said = self.said();
        let lines: Vec<_> = said.lines().collect();
        let end = lines[lines.len().saturating_sub(40)..].join("\n");
        NetmonError::Behaviour { what: self.what.clone(), problem, said: end }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn open_append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// The room's netmon server.
#[derive(Debug)]
pub struct Server<'a> {
    host: &'a Host,
    data: PathBuf,
    output: PathBuf,
    daemon: Option<Daemon>,
}

impl<'a> Server<'a> {
    /// Initialises a server and starts it; it listens when this returns.
    ///
    /// # Errors
    /// [`NetmonError`].
    pub fn start(room: &'a Room) -> Result<Self, NetmonError> {
        let mut server = Self {
            host: room.host("server"),
            data: room.directory().join("server"),
            output: room.directory().join("server.txt"),
            daemon: None,
        };
        server.chore(&["init"])?;
        server.start_again()?;
        Ok(server)
    }

    /// Starts it after [`Server::stop`] or [`Server::kill`]; it listens when this returns.
    ///
    /// # Errors
    /// [`NetmonError`].
    pub fn start_again(&mut self) -> Result<(), NetmonError> {
        let said = || fs::read_to_string(&self.output).unwrap_or_default();
        let before = said().matches(LISTENING).count();
        let mut daemon = self.launch()?;
        daemon.wait_until("it to listen", || said().matches(LISTENING).count() > before)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Starts it and does not wait until it listens: [`Server::is_listening`].
    ///
    /// # Errors
    /// [`NetmonError::Start`].
    pub fn launch(&self) -> Result<Daemon, NetmonError> {
        let listen = format!("{}:{PORT}", room::SERVER);
        let enroll = format!("{}:{ENROLL_PORT}", room::SERVER);
        let mut command = self.host.command(program("netmon-server")?);
        command.arg("--data").arg(&self.data);
        command.args(["run", "--listen", &listen, "--enroll-listen", &enroll]);
        Daemon::start("netmon-server".to_owned(), command, &self.output)
    }

    /// True when this server, launched by [`Server::launch`], is ready.
    pub fn is_listening(daemon: &Daemon) -> bool {
        daemon.said_now().contains(LISTENING)
    }

    /// Stops it in good order.
    ///
    /// # Errors
    /// [`NetmonError::Behaviour`] when it does not end, or not with success.
    pub fn stop(&mut self) -> Result<(), NetmonError> {
        stop(self.daemon.take())
    }

    /// Kills it.
    ///
    /// # Errors
    /// [`NetmonError::Behaviour`] when it lives on.
    pub fn kill(&mut self) -> Result<(), NetmonError> {
        kill(self.daemon.take())
    }

    /// A new token that enrols one PC.
    ///
    /// # Errors
    /// [`NetmonError::Chore`].
    pub fn token(&self, options: &[&str]) -> Result<String, NetmonError> {
        let address = format!("{}:{ENROLL_PORT}", room::SERVER);
        let mut arguments = vec!["token", "--address", &address, "--raw"];
        arguments.extend(options);
        Ok(self.chore(&arguments)?.trim().to_owned())
    }

    /// The seat's log as `netmon-server log` prints it.
    ///
    /// # Errors
    /// [`NetmonError::Chore`].
    pub fn log(&self, seat: &str) -> Result<String, NetmonError> {
        self.chore(&["log", seat])
    }

    /// The seat's log file.
    pub fn log_file(&self, seat: &str) -> PathBuf {
        self.data.join("logs").join(seat).join("log.txt")
    }

    /// Reads the seat's log file as it grows.
    pub fn follow(&self, seat: &str) -> Follower {
        Follower::start(&self.log_file(seat))
    }

    /// Reads the seat's USB log file as it grows.
    pub fn follow_usb(&self, seat: &str) -> Follower {
        Follower::start(&self.log_file(seat).with_file_name("usb.log"))
    }

    /// Where it runs.
    pub fn host(&self) -> &Host {
        self.host
    }

    /// The directory with its store.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What it said, of all its runs.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    fn chore(&self, arguments: &[&str]) -> Result<String, NetmonError> {
        let data = self.data.to_string_lossy();
        let all = [&["--data", &data], arguments].concat();
        succeeded(&format!("netmon-server {}", all.join(" ")), chore(self.host, "netmon-server", &all, "")?)
    }
}

/// The netmon agent of one PC. Its seat is the PC's name.
#[derive(Debug)]
pub struct Agent<'a> {
    host: &'a Host,
    directory: PathBuf,
    daemon: Option<Daemon>,
    interfaces: Vec<String>,
    wrapper: Vec<String>,
}

impl<'a> Agent<'a> {
    /// Enrols the PC and starts its agent; it watches when this returns.
    ///
    /// # Errors
    /// [`NetmonError`].
    pub fn start(room: &'a Room, pc: u8, server: &Server<'_>) -> Result<Self, NetmonError> {
        let mut agent = Self::prepare(room, pc)?;
        agent.enroll(&server.token(&[])?)?;
        agent.start_again()?;
        Ok(agent)
    }

    /// An agent with its files, neither enrolled nor started.
    ///
    /// # Errors
    /// [`NetmonError::Start`] when the files cannot be written.
    pub fn prepare(room: &'a Room, pc: u8) -> Result<Self, NetmonError> {
        let host = room.pc(pc);
        let directory = room.directory().join(host.name());
        let interfaces = ["lan0", "mgmt0"].map(str::to_owned).into();
        let agent = Self { host, directory, daemon: None, interfaces, wrapper: Vec::new() };
        let write = || {
            fs::create_dir(&agent.directory)?;
            fs::write(agent.config_file(), AGENT_CONFIG)?;
            fs::write(agent.filter_file(), FILTER_LIST)
        };
        write().map_err(|source| NetmonError::Start { what: agent.what(), source })?;
        Ok(agent)
    }

    /// Enrols the PC.
    ///
    /// # Errors
    /// [`NetmonError::Chore`] when the server refuses or is not there.
    pub fn enroll(&self, token: &str) -> Result<(), NetmonError> {
        let output = self.try_enroll(token)?;
        succeeded(&format!("{} enroll", self.what()), output).map(drop)
    }

    /// Tries to enrol the PC and tells how that ended.
    ///
    /// # Errors
    /// [`NetmonError`] when it did not end.
    pub fn try_enroll(&self, token: &str) -> Result<Output, NetmonError> {
        let state = self.state();
        let seat = self.host.name();
        let arguments: [&OsStr; 7] = [
            "--state-dir".as_ref(),
            state.as_ref(),
            "enroll".as_ref(),
            "--token-file".as_ref(),
            "-".as_ref(),
            "--seat".as_ref(),
            seat.as_ref(),
        ];
        chore(self.host, "netmon-agent", &arguments, &format!("{token}\n"))
    }

    /// Starts it after [`Agent::stop`] or [`Agent::kill`]; it watches when this returns.
    ///
    /// # Errors
    /// [`NetmonError`].
    pub fn start_again(&mut self) -> Result<(), NetmonError> {
        let mut daemon = self.launch()?;
        let pid = format!("\"pid\":{}", daemon.pid());
        daemon.wait_until("it to watch", || {
            // The file of an agent that was killed says "watching" too.
            self.status()
                .is_ok_and(|status| status.contains(r#""state":"watching""#) && status.contains(&pid))
        })?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Starts it and does not wait until it watches.
    ///
    /// # Errors
    /// [`NetmonError::Start`].
    pub fn launch(&self) -> Result<Daemon, NetmonError> {
        let mut command = self.command()?;
        command.arg("run");
        for interface in &self.interfaces {
            command.args(["--interface", interface]);
        }
        command.arg("--filter-list").arg(self.filter_file());
        Daemon::start(self.what(), command, &self.output_file())
    }

    /// Which interfaces it watches from its next start on.
    pub fn watch(&mut self, interfaces: &[&str]) {
        self.interfaces = interfaces.iter().map(|name| (*name).to_owned()).collect();
    }

    /// A command in front of `netmon-agent` from now on, which takes rights away and becomes the agent.
    pub fn under(&mut self, wrapper: &[&str]) {
        self.wrapper = wrapper.iter().map(|word| (*word).to_owned()).collect();
    }

    /// `netmon-agent` with this agent's directories, without a subcommand.
    ///
    /// # Errors
    /// [`NetmonError::NotBuilt`].
    pub fn command(&self) -> Result<Command, NetmonError> {
        let agent = program("netmon-agent")?;
        let mut command = match self.wrapper.split_first() {
            None => self.host.command(agent),
            Some((wrapper, arguments)) => {
                let mut command = self.host.command(wrapper);
                command.args(arguments).arg(agent);
                command
            }
        };
        command.arg("--config").arg(self.config_file());
        command.arg("--state-dir").arg(self.state());
        command.arg("--log-dir").arg(self.directory.join("log"));
        command.arg("--runtime-dir").arg(self.directory.join("run"));
        Ok(command)
    }

    /// Its status as compact JSON.
    ///
    /// # Errors
    /// [`NetmonError::Chore`] when no agent runs.
    pub fn status(&self) -> Result<String, NetmonError> {
        let mut command = self.command()?;
        command.args(["status", "--json"]);
        let what = format!("{} status", self.what());
        let text = succeeded(&what, finish(&what, command, "")?)?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| NetmonError::Start {
            what,
            source: io::Error::other(format!("{error} in {text:?}")),
        })?;
        Ok(json.to_string())
    }

    /// Stops it in good order (SIGTERM).
    ///
    /// # Errors
    /// [`NetmonError::Behaviour`] when it does not end, or not with success.
    pub fn stop(&mut self) -> Result<(), NetmonError> {
        stop(self.daemon.take())
    }

    /// Kills it (SIGKILL).
    ///
    /// # Errors
    /// [`NetmonError::Behaviour`] when it lives on.
    pub fn kill(&mut self) -> Result<(), NetmonError> {
        kill(self.daemon.take())
    }

    /// True while it runs.
    pub fn is_running(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(Daemon::is_running)
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// Holds it up (SIGSTOP) until [`Agent::resume`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on (SIGCONT).
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, which: Signal) {
        if let Some(daemon) = &self.daemon {
            daemon.signal(which);
        }
    }

    /// What it said, of all its runs.
    pub fn said(&self) -> String {
        fs::read_to_string(self.output_file()).unwrap_or_default()
    }

    /// The directory of all its files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its `log.txt`.
    pub fn log_file(&self) -> PathBuf {
        self.directory.join("log").join("log.txt")
    }

    /// Reads its `log.txt` as it grows.
    pub fn follow(&self) -> Follower {
        Follower::start(&self.log_file())
    }

    /// Reads its `usb.log` as it grows.
    pub fn follow_usb(&self) -> Follower {
        Follower::start(&self.log_file().with_file_name("usb.log"))
    }

    /// What it says of itself while it runs.
    pub fn status_file(&self) -> PathBuf {
        self.directory.join("run").join("status.json")
    }

    /// Its settings.
    pub fn config_file(&self) -> PathBuf {
        self.directory.join("agent.toml")
    }

    /// Its filter list.
    pub fn filter_file(&self) -> PathBuf {
        self.directory.join("ip.txt")
    }

    /// The directory with its identity and its spool.
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The PC.
    pub fn host(&self) -> &Host {
        self.host
    }

    fn output_file(&self) -> PathBuf {
        self.directory.join("agent.txt")
    }

    fn what(&self) -> String {
        format!("netmon-agent in {}", self.host.name())
    }
}

fn stop(daemon: Option<Daemon>) -> Result<(), NetmonError> {
    let Some(mut daemon) = daemon else { return Ok(()) };
    daemon.signal(Signal::TERM);
    let status = daemon.wait_end()?;
    if status.success() {
        Ok(())
    } else {
        Err(daemon.behaviour(format!("it ended with {status} when it was stopped")))
    }
}

fn kill(daemon: Option<Daemon>) -> Result<(), NetmonError> {
    let Some(mut daemon) = daemon else { return Ok(()) };
    daemon.signal(Signal::KILL);
    daemon.wait_end().map(drop)
}
