//! Starting the traffic of [`crate::traffic`] inside a host, and what it reports.

use std::io::{self, Read as _};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::{env, thread};

use crate::host::{self, Host};
use crate::traffic::Report;

/// Traffic that runs inside a host. It is killed when this is dropped.
#[derive(Debug)]
pub struct Generator {
    what: String,
    child: Child,
}

/// Why there was no traffic.
#[derive(Debug, thiserror::Error)]
pub enum GeneratorError {
    /// The program cannot be started, or a server did not get ready.
    #[error("cannot start `{what}`")]
    Start {
        /// Host and arguments.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// It ended with an error.
    #[error("`{what}` failed: {message}")]
    Failed {
        /// Host and arguments.
        what: String,
        /// Its status and what it said.
        message: String,
    },
}

impl Generator {
    /// Starts a server inside a host; it is bound when this returns. `arguments` are those of
    /// `netmon-lab traffic`, in words.
    ///
    /// # Errors
    /// [`GeneratorError::Start`], for example when the port is taken.
    pub fn serve(host: &Host, arguments: &str) -> Result<Self, GeneratorError> {
        let mut generator = Self::start(host, arguments)?;
        let ready = host::ready_line(&mut generator.child);
        ready.map_err(|source| GeneratorError::Start { what: generator.what.clone(), source })?;
        Ok(generator)
    }

    /// Starts a client inside a host and does not wait for it.
    ///
    /// # Errors
    /// [`GeneratorError::Start`].
    pub fn start(host: &Host, arguments: &str) -> Result<Self, GeneratorError> {
        let what = format!("{}: {arguments}", host.name());
        let child = lab_program().and_then(|program| {
            let mut command = host.command(program);
            command.arg("traffic").args(arguments.split_whitespace());
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
        });
        match child {
            Ok(child) => Ok(Self { what, child }),
            Err(source) => Err(GeneratorError::Start { what, source }),
        }
    }

    /// Runs a client to its end.
    ///
    /// # Errors
    /// [`GeneratorError`] when it cannot be started, fails, or makes more or less than one report.
    pub fn run(host: &Host, arguments: &str) -> Result<Report, GeneratorError> {
        Self::start(host, arguments)?.report()
    }

    /// Waits for the end; the one report of a client, or of a server with one connection.
    ///
    /// # Errors
    /// As [`Generator::run`].
    pub fn report(self) -> Result<Report, GeneratorError> {
        let what = self.what.clone();
        match self.reports()?[..] {
            [report] => Ok(report),
            ref reports => {
                Err(GeneratorError::Failed { what, message: format!("expected one report, got {reports:?}") })
            }
        }
    }

    /// Waits for the end; one report a connection, in the order in which the connections ended.
    ///
    /// # Errors
    /// [`GeneratorError::Failed`].
    pub fn reports(mut self) -> Result<Vec<Report>, GeneratorError> {
        let failed = |message: String| GeneratorError::Failed { what: self.what.clone(), message };
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let (out, err) = (self.child.stdout.take(), self.child.stderr.take());
        thread::scope(|scope| {
            let reader = scope.spawn(|| err.map(|mut err| err.read_to_string(&mut stderr)).transpose());
            out.map(|mut out| out.read_to_string(&mut stdout)).transpose()?;
            reader.join().map_err(|_| io::Error::other("the reader's thread died"))?
        })
        .map_err(|error| failed(error.to_string()))?;
        let status = self.child.wait().map_err(|error| failed(error.to_string()))?;
        if !status.success() {
            return Err(failed(format!("{status}: {}", stderr.trim())));
        }
        let reports = stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>();
        reports.map_err(|error| failed(format!("{error} in {stdout:?}")))
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// This program: `netmon-lab` itself, or the one that cargo built beside the test that runs.
fn lab_program() -> io::Result<PathBuf> {
    Ok(built_programs()?.join("netmon-lab"))
}

/// The directory with the programs of the build that this process belongs to.
///
/// # Errors
/// When the kernel does not tell where this program is.
pub fn built_programs() -> io::Result<PathBuf> {
    let mut directory = env::current_exe()?;
    directory.pop();
    if directory.ends_with("deps") {
        directory.pop();
    }
    Ok(directory)
}
