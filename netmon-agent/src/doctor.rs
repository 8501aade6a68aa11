//! `netmon-agent doctor`: can this PC be watched, and what is to be done where it cannot?

use std::fmt;
use std::path::Path;

use netmon_common::raw::Raw;

use crate::clock::Now;
use crate::config::Config;
use crate::filter::FilterFile;
use crate::identity::Identity;
use crate::links::{self, Choice, Link, Listing, Verdict};
use crate::privileges::{self, Privileges};
use crate::{chain, kernel, status};

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// What was found.
    pub finding: Finding,
}

/// See [`Check`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Good; the detail is worth knowing.
    Good(String),
    /// netmon works, but less well; says what to do.
    Weak(String),
    /// netmon does not work; says what to do.
    Bad(String),
}

impl Check {
    /// True when netmon cannot watch because of this.
    pub fn is_failure(&self) -> bool {
        matches!(self.finding, Finding::Bad(_))
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mark, text) = match &self.finding {
            Finding::Good(text) => ("ok  ", text),
            Finding::Weak(text) => ("WEAK", text),
            Finding::Bad(text) => ("FAIL", text),
        };
        writeln!(f, "{mark} {:<14} {text}", self.name)
    }
}

/// Makes all checks. Changes nothing.
pub async fn examine(config: Option<&Path>, state: &Path, log: &Path, runtime: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut found = |name, finding| checks.push(Check { name, finding });

    found(
        "kernel",
        match kernel::preflight() {
            Ok(()) => Finding::Good(format!(
                "Linux {}, allowed to load programs",
                rustix::system::uname().release().to_string_lossy()
            )),
            Err(error) => Finding::Bad(chain(&error)),
        },
    );

    found(
        "privileges",
        match Privileges::read() {
            Ok(privileges) => Finding::Good(privileges.to_string()),
            Err(error) => Finding::Weak(chain(&error)),
        },
    );

    let config = match Config::load(config) {
        Ok(config) => {
            found("configuration", Finding::Good("understood".into()));
            config
        }
        Err(error) => {
            found("configuration", Finding::Bad(chain(&error)));
            Config::default()
        }
    };

    found(
        "filter list",
        match FilterFile::new(config.filter.list.clone(), state).check() {
            Ok(list) => Finding::Good(format!("{} prefixes, {} labels", list.len(), list.labels().len())),
            Err(error) => Finding::Bad(chain(&error)),
        },
    );

    found("interfaces", interfaces(&config).await);
    found("flow tables", flow_tables(&config));

    found(
        "udev",
        if Path::new("/run/udev/control").exists() {
            Finding::Good("running".into())
        } else {
            Finding::Weak(
                "udevd is not running (/run/udev/control is missing): USB is watched through the kernel's own messages, without the names of udev's database"
                    .into(),
            )
        },
    );

    for (name, directory) in [("state", state), ("log", log)] {
        found(
            name,
            privileges::check_directory(directory)
                .map_or_else(|error| Finding::Bad(chain(&error)), |()| space(directory)),
        );
    }

    found("enrolment", match Identity::load(&state.join("identity")) {
        Ok(Some(identity)) => Finding::Good(format!("seat {} at {}", identity.seat.escaped(), identity.address)),
        Ok(None) => Finding::Weak(
            "not enrolled: this PC records for itself only. `netmon-server token` on the server prints the command".into(),
        ),
        Err(error) => Finding::Bad(chain(&error)),
    });

    found(
        "agent",
        match status::read(runtime, &Now::read()) {
            Ok(status) => {
                let rights = status.privileges.map_or_else(String::new, |rights| format!(" with {rights}"));
                Finding::Good(format!("running as process {}{rights}; server: {}", status.pid, status.server))
            }
            Err(error) => Finding::Weak(chain(&error)),
        },
    );
    checks
}

async fn interfaces(config: &Config) -> Finding {
    let choice = match Choice::new(&config.capture.interfaces) {
        Ok(choice) => choice,
        Err(problem) => return Finding::Bad(problem),
    };
    let Listing { links, hidden } = match links::list_all().await {
        Ok(listing) => listing,
        Err(error) => return Finding::Bad(chain(&error)),
    };
    let missing: Vec<_> = choice.missing(&links).map(escaped).collect();
    if !missing.is_empty() {
        return Finding::Bad(format!("there is no {}; change capture.interfaces", missing.join(", no ")));
    }
    if !hidden.is_empty() {
        let hidden: Vec<_> = hidden.iter().map(|name| name.escaped().to_string()).collect();
        return Finding::Weak(format!(
            "cannot watch {} because the name is not UTF-8: rename it (ip link set dev OLD name NEW)",
            hidden.join(", ")
        ));
    }
    let verdicts = choice.judge(&links);
    let is_watched = |link: &&Link| verdicts.get(&link.index) == Some(&Verdict::Watch);
    let watched: Vec<_> = links.iter().filter(is_watched).map(|link| escaped(&link.name)).collect();
    let left: String = links::left(&links, &verdicts).map(|left| format!("\n{NOT_WATCHED}{left}")).collect();
    if watched.is_empty() {
        return Finding::Weak(format!(
            "no interface is chosen by {:?}: name one with --interface or capture.interfaces (in a container, its only interface has no device){left}",
            config.capture.interfaces
        ));
    }
    Finding::Good(format!("would watch {}{left}", watched.join(", ")))
}

/// With fewer slots for each CPU, flows of a busy PC push each other out.
const FEW_SLOTS: u32 = 2_048;

fn flow_tables(config: &Config) -> Finding {
    let slots = u32::try_from(config.capture.flows).unwrap_or(u32::MAX);
    match kernel::shares(slots) {
        Err(error) => Finding::Bad(chain(&error)),
        Ok((each, cpus)) if each < FEW_SLOTS => {
            let wanted = u64::from(FEW_SLOTS) * u64::from(cpus);
            Finding::Weak(format!(
                "{each} slots in each table for each of the {cpus} CPUs that this PC can have: with many flows at once, set capture.flows to {wanted}"
            ))
        }
        Ok((each, cpus)) => Finding::Good(format!(
            "{each} slots in each table for each of the {cpus} CPUs that this PC can have"
        )),
    }
}

/// Stands under the text of a check.
const NOT_WATCHED: &str = "                    not ";

fn escaped(name: &str) -> String {
    Raw::from(name).escaped().to_string()
}

/// Room for some hours of records.
const LITTLE_SPACE: u64 = 64 << 20;

/// Space where `directory` is or would be made.
fn space(directory: &Path) -> Finding {
    let Some(existing) = directory.ancestors().find(|path| path.exists()) else {
        return Finding::Bad(format!("{} cannot be made", directory.display()));
    };
    match rustix::fs::statvfs(existing) {
        Err(errno) => Finding::Bad(format!("{}: {errno}", existing.display())),
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let text = format!("{}, {} MiB free", directory.display(), free >> 20);
            if stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
                Finding::Bad(format!("{} is on a read-only file system", directory.display()))
            } else if free < LITTLE_SPACE {
                Finding::Weak(format!("{text}: make room, or records will be lost while the server is away"))
            } else {
                Finding::Good(text)
            }
        }
    }
}
