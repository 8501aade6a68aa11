//! What the running agent says of itself: `<runtime>/status.json`, written anew every second.
//!
//! A file, not a socket: it can be read by anything, and a file that grows old shows that nobody watches.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use netmon_common::model::{Coverage, Interface};
use serde::{Deserialize, Serialize};

use crate::clock::Now;
use crate::privileges::Privileges;

/// An agent that did not write for this long is not watching.
pub const STALE_NS: u64 = 5_000_000_000;

/// Interfaces that are left by name: what a person reads.
pub const MAX_LEFT: usize = 16;

/// `status.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// `watching`, or why not.
    pub state: State,
    /// The agent's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// How often it had been started with this spool.
    pub run: u32,
    /// When this was written, boot clock.
    pub updated_boot_ns: u64,
    /// When this was written, wall clock.
    pub updated_wall_ns: i64,
    /// What is watched, by name.
    pub interfaces: Vec<WatchedInterface>,
    /// Interfaces that were chosen and cannot be watched, with the reason.
    pub failed_interfaces: Vec<String>,
    /// Interfaces that are left and that somebody may ask about, each with the reason; [`MAX_LEFT`] at most.
    #[serde(default)]
    pub left_interfaces: Vec<String>,
    /// How many more there are.
    #[serde(default)]
    pub left_unnamed: usize,
    /// Where the filter list comes from.
    pub filter: String,
    /// The connection to the server.
    pub server: String,
    /// What the agent may do.
    #[serde(default)]
    pub privileges: Option<Privileges>,
    /// Epoch and number of the newest record that the server acknowledged in this run.
    #[serde(default)]
    pub acked: Option<(u64, u64)>,
    /// The latest sockets to the server, local port and remote address: an agent that starts after this one was killed
    /// still gets the old connection's packets, and knows them by this.
    pub sockets: Vec<(u16, SocketAddr)>,
    /// Bytes that wait in the spool.
    pub spool_bytes: u64,
    /// As the next "still watching" record would say it.
    pub coverage: Coverage,
}

/// Whether transfers can be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// At least one interface is watched.
    Watching,
    /// No interface is there to be watched.
    NoInterface,
}

/// An interface and how its packets are seen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WatchedInterface {
    /// Name, escaped.
    pub name: String,
    /// Index.
    pub index: u32,
    /// Hook.
    pub hook: String,
}

impl From<&Interface> for WatchedInterface {
    fn from(interface: &Interface) -> Self {
        Self {
            name: interface.name.escaped().to_string(),
            index: interface.index,
            hook: format!("{:?}", interface.hook).to_lowercase(),
        }
    }
}

/// Why the status cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// There is no file.
    #[error("no agent is running here ({} is missing): start it with `netmon-agent run`", .0.display())]
    NotRunning(PathBuf),
    /// The file cannot be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not a status.
    #[error("{} is not a status of this netmon", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Nobody has written for a while.
    #[error(
        "the agent (process {pid}) last reported {seconds} s ago: it is not running or held up, nothing is watched"
    )]
    Stale {
        /// Process that wrote last.
        pid: u32,
        /// Seconds since.
        seconds: u64,
    },
}

fn file(runtime: &Path) -> PathBuf {
    runtime.join("status.json")
}

/// Replaces the status.
///
/// # Errors
/// What the file system said.
pub fn write(runtime: &Path, status: &Status) -> io::Result<()> {
    let new = runtime.join("status.json.new");
    std::fs::write(&new, serde_json::to_vec(status)?)?;
    std::fs::rename(new, file(runtime))
}

/// Takes the status away: the agent ends in good order.
pub fn remove(runtime: &Path) {
    if let Err(error) = std::fs::remove_file(file(runtime)) {
        tracing::debug!(%error, "no status to remove");
    }
}

/// The sockets of an agent that died here, as it last wrote them.
pub fn sockets_left(runtime: &Path) -> Vec<(u16, SocketAddr)> {
    let status =
        std::fs::read(file(runtime)).ok().and_then(|bytes| serde_json::from_slice::<Status>(&bytes).ok());
    status.map(|status| status.sockets).unwrap_or_default()
}

/// The status of the agent that runs now.
///
/// # Errors
/// [`StatusError`] says why nothing is known, or that nobody watches.
pub fn read(runtime: &Path, now: &Now) -> Result<Status, StatusError> {
    let file = file(runtime);
    let bytes = match std::fs::read(&file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StatusError::NotRunning(file)),
        Err(source) => return Err(StatusError::Read { file, source }),
    };
    let status: Status =
        serde_json::from_slice(&bytes).map_err(|source| StatusError::Malformed { file, source })?;
    // A boot time from before a reboot may lie in the future.
    let age = now.boot_ns.abs_diff(status.updated_boot_ns);
    if age > STALE_NS {
        return Err(StatusError::Stale { pid: status.pid, seconds: age / 1_000_000_000 });
    }
    Ok(status)
}

impl Status {
    /// For people.
    pub fn describe(&self) -> String {
        let c = &self.coverage;
        let interfaces: Vec<_> = self.interfaces.iter().map(|i| format!("{} ({})", i.name, i.hook)).collect();
        let watching = match self.state {
            State::Watching => format!("watching {}", interfaces.join(", ")),
            State::NoInterface => "NOT WATCHING: no interface is there to be watched".to_owned(),
        };
        let mut text = format!("netmon-agent {}, process {}, run {}\n", self.version, self.pid, self.run);
        text += &format!("state     {watching}\n");
        for failed in &self.failed_interfaces {
            text += &format!("          CANNOT WATCH {failed}\n");
        }
        for left in &self.left_interfaces {
            text += &format!("          not {left}\n");
        }
        if self.left_unnamed > 0 {
            text += &format!("          not {} more: `netmon-agent doctor` names them\n", self.left_unnamed);
        }
        text += &format!("usb       {}\n", if c.usb { "watched" } else { "NOT WATCHED" });
        text += &format!("server    {}\n", self.server);
        if let Some(privileges) = &self.privileges {
            text += &format!("rights    {privileges}\n");
        }
        text +=
            &format!("spool     {} records wait, {} B, {} lost\n", c.backlog, self.spool_bytes, c.spool_lost);
        text += &format!("filter    {}\n", self.filter);
        text += &format!("now       {} transfers, {} flows\n", c.transfers, c.flows);
        text += &format!(
            "frames    {} seen, {} counted, {} not IP ({} B), {} other protocols ({} B)\n",
            c.seen, c.counted, c.not_ip, c.not_ip_bytes, c.other_protocol, c.other_protocol_bytes
        );
        text += &format!(
            "lost      {} malformed, {} table full, {} ring full\n",
            c.malformed, c.table_full, c.ring_full
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(updated_boot_ns: u64) -> Status {
        Status {
            state: State::Watching,
            version: "0.1.0".into(),
            pid: 7,
            run: 1,
            updated_boot_ns,
            updated_wall_ns: 0,
            interfaces: Vec::new(),
            failed_interfaces: Vec::new(),
            left_interfaces: Vec::new(),
            left_unnamed: 0,
            filter: String::new(),
            server: String::new(),
            privileges: None,
            acked: None,
            sockets: Vec::new(),
            spool_bytes: 0,
            coverage: Coverage::default(),
        }
    }

    #[test]
    fn interfaces_that_are_left_are_told_with_their_reasons() {
        let mut status = status(0);
        assert!(!status.describe().contains("  not "));
        status.left_interfaces = vec!["br0: no device".into()];
        status.left_unnamed = 7;
        let text = status.describe();
        assert!(
            text.contains("\n          not br0: no device\n          not 7 more: `netmon-agent"),
            "{text}"
        );
    }

    #[test]
    fn a_status_of_an_agent_before_this_one_is_understood() {
        let mut json = serde_json::to_value(status(0)).unwrap();
        json.as_object_mut().unwrap().retain(|field, _| !field.starts_with("left_") && field != "privileges");
        let status: Status = serde_json::from_value(json).unwrap();
        assert_eq!((status.left_interfaces.len(), status.left_unnamed), (0, 0));
    }

    #[test]
    fn a_status_that_grew_old_says_that_nothing_is_watched() {
        let directory = tempfile::tempdir().unwrap();
        let at = |seconds: u64| Now { boot_ns: seconds * 1_000_000_000, wall_ns: 0 };
        assert!(matches!(read(directory.path(), &at(1)), Err(StatusError::NotRunning(_))));
        write(directory.path(), &status(10_000_000_000)).unwrap();
        assert_eq!(read(directory.path(), &at(15)).unwrap().pid, 7);
        assert!(matches!(read(directory.path(), &at(16)), Err(StatusError::Stale { pid: 7, seconds: 6 })));
        assert!(matches!(read(directory.path(), &at(1)), Err(StatusError::Stale { .. })));
        std::fs::write(directory.path().join("status.json"), "{}").unwrap();
        assert!(matches!(read(directory.path(), &at(1)), Err(StatusError::Malformed { .. })));
    }
}
