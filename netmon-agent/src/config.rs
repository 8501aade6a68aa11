//! The agent's settings: `agent.toml`, overruled by `NETMON_*` variables, overruled by flags.
//!
//! The file is optional where it was not asked for by name; a key that is not known is an error, because a
//! misspelt setting would otherwise be silently without effect.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use netmon_common::model::Service;
use serde::Deserialize;

use crate::kernel::{Sizes, WordLevel};
use crate::links::Choice;
use crate::spool::Limits;

/// Where the settings are looked for when no file is named.
pub const DEFAULT_FILE: &str = "/etc/netmon/agent.toml";

/// `agent.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What is watched.
    pub capture: Capture,
    /// What makes no transfer lines.
    pub filter: Filter,
    /// What is recorded of USB.
    pub usb: Usb,
    /// The PC's own logs.
    pub log: Log,
    /// What waits for the server.
    pub spool: Spool,
    /// How often something is reported.
    pub report: Report,
}

/// `[capture]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Capture {
    /// Names, globs, or `auto`: see [`Choice`].
    pub interfaces: Vec<String>,
    /// How arriving packets are seen.
    pub mode: Mode,
    /// Prefixes that count as the private network, beside the built-in ones and the PC's own.
    pub lan: Vec<IpNet>,
    /// Slots in each of the two flow tables, over all CPUs: see [`Sizes::flows`].
    pub flows: u64,
}

impl Default for Capture {
    fn default() -> Self {
        Self {
            interfaces: vec![Choice::AUTO.to_owned()],
            mode: Mode::Tc,
            lan: Vec::new(),
            flows: Sizes::default().flows.into(),
        }
    }
}

/// How arriving packets are seen; leaving ones are always seen by TC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// TC ingress (TCX on kernel 6.6 and later, clsact before).
    #[default]
    Tc,
    /// XDP, native where the driver has it.
    Xdp,
}

/// `[filter]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// The filter list; none: the one that came with this netmon.
    pub list: Option<PathBuf>,
    /// Service ports that make no transfer lines: label = ports, each `udp/53` or `tcp/53`.
    pub services: HashMap<String, Vec<ServicePort>>,
}

impl Default for Filter {
    fn default() -> Self {
        let udp = |port| ServicePort(Service::Udp(port));
        let tcp = |port| ServicePort(Service::Tcp(port));
        let services = [
            ("dns", vec![udp(53), tcp(53)]),
            ("ntp", vec![udp(123)]),
            ("dhcp", vec![udp(67), udp(68), udp(546), udp(547)]),
            ("mdns", vec![udp(5353)]),
            ("llmnr", vec![udp(5355), tcp(5355)]),
            ("ssdp", vec![udp(1900)]),
            ("netbios", vec![udp(137), udp(138)]),
        ];
        Self { list: None, services: services.map(|(name, ports)| (name.to_owned(), ports)).into() }
    }
}

/// `udp/53` or `tcp/53` (as netmon writes services elsewhere).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct ServicePort(pub Service);

impl TryFrom<String> for ServicePort {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let service = match text.split_once('/').map(|(protocol, port)| (protocol, port.parse())) {
            Some(("tcp", Ok(port))) => Service::Tcp(port),
            Some(("udp", Ok(port))) => Service::Udp(port),
            _ => return Err(format!("`{}` is not a service: write udp/53 or tcp/53", text.escape_debug())),
        };
        Ok(Self(service))
    }
}

/// `[usb]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Usb {
    /// Whether names of files on USB disks are recorded when they are read or written, with the program and the user.
    pub files: bool,
}

impl Default for Usb {
    fn default() -> Self {
        Self { files: true }
    }
}

/// `[log]`: the PC's own logs, and what is said for those who look for a fault.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `log.txt` and `usb.log` begin anew at this size; the file before is kept as `.1`.
    pub max_mib: u64,
    /// What the kernel programs say of themselves, on standard error.
    pub kernel: WordLevel,
}

impl Default for Log {
    fn default() -> Self {
        Self { max_mib: 64, kernel: WordLevel::Off }
    }
}

/// `[spool]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Spool {
    /// Size limit; beyond it minor records give way first, then the oldest, and a gap is recorded.
    pub max_mib: u64,
    /// Age limit in days, 0 for none; beyond it records give way and a gap is recorded. Off by default: who asks for
    /// delivery expects it after the summer, too.
    pub max_days: u64,
}

impl Default for Spool {
    fn default() -> Self {
        Self { max_mib: 256, max_days: 0 }
    }
}

impl Spool {
    /// What it sets of the spool's limits.
    pub fn limits(&self) -> Limits {
        const DAY: u64 = 24 * 3600;
        let max_age = (self.max_days > 0).then(|| Duration::from_secs(self.max_days.saturating_mul(DAY)));
        Limits { bytes: self.max_mib << 20, max_age, ..Limits::default() }
    }
}

/// `[report]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Report {
    /// Seconds between two "still watching" records.
    pub coverage_s: u64,
    /// Seconds between two muted totals.
    pub muted_s: u64,
}

impl Default for Report {
    fn default() -> Self {
        Self { coverage_s: 10, muted_s: 30 }
    }
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key or value that is not known. The message names line and column.
    #[error("the configuration {} is wrong:\n{problem}", file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// Line, column, the line itself and what is wrong with it.
        problem: String,
    },
    /// A value is out of its range.
    #[error("the configuration {}: {field} {problem}", file.display())]
    Value {
        /// The file.
        file: PathBuf,
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl Config {
    /// Reads `file`, or [`DEFAULT_FILE`] if there is one.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the line or field.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, wanted) = match file {
            Some(file) => (file, true),
            None => (Path::new(DEFAULT_FILE), false),
        };
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !wanted => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { file: path.to_owned(), source }),
        }
    }

    /// Reads the settings; `file` is for messages.
    ///
    /// # Errors
    /// [`ConfigError::Parse`], [`ConfigError::Value`].
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let file = || file.to_owned();
        let config: Self = toml::from_str(text)
            .map_err(|error| ConfigError::Parse { file: file(), problem: error.to_string() })?;
        let range = |field, value: u64, range: std::ops::RangeInclusive<u64>| {
            if range.contains(&value) {
                return Ok(());
            }
            let problem = format!("= {value} is outside {} to {}", range.start(), range.end());
            Err(ConfigError::Value { file: file(), field, problem })
        };
        range("capture.flows", config.capture.flows, Sizes::FLOWS)?;
        range("report.coverage_s", config.report.coverage_s, 1..=3_600)?;
        range("report.muted_s", config.report.muted_s, 1..=3_600)?;
        range("spool.max_mib", config.spool.max_mib, 1..=1 << 20)?;
        range("spool.max_days", config.spool.max_days, 0..=36_500)?;
        range("log.max_mib", config.log.max_mib, 1..=1 << 20)?;
        for label in config.filter.services.keys() {
            if label.is_empty() || label.len() > 32 || !label.chars().all(|c| c.is_ascii_alphanumeric()) {
                let problem = format!("has the label `{}`: write letters and digits", label.escape_debug());
                return Err(ConfigError::Value { file: file(), field: "filter.services", problem });
            }
        }
        Choice::new(&config.capture.interfaces).map_err(|problem| ConfigError::Value {
            file: file(),
            field: "capture.interfaces",
            problem,
        })?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Config::parse(text, Path::new("agent.toml")).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(Config::parse("", Path::new("agent.toml")).unwrap(), Config::default());
    }

    #[test]
    fn every_setting_of_the_example_file_is_understood_and_is_the_default() {
        let example = include_str!("../../deploy/agent.toml");
        let commented_in: String = example
            .lines()
            .map(|line| line.strip_prefix("#= ").unwrap_or(line))
            .flat_map(|line| [line, "\n"])
            .collect();
        assert_ne!(commented_in, example);
        assert_eq!(Config::parse(&commented_in, Path::new("agent.toml")).unwrap(), Config::default());
    }

    #[test]
    fn a_broken_line_is_named_with_its_number() {
        let message = error("[capture]\nmode = \"tc\"\ninterfaces = eth0\n");
        assert!(message.contains("agent.toml") && message.contains("line 3"), "{message}");
    }

    #[test]
    fn an_unknown_key_is_an_error_that_says_what_is_known() {
        let message = error("[capture]\ninterface = [\"eth0\"]\n");
        assert!(message.contains("line 2") && message.contains("expected one of"), "{message}");
    }

    #[test]
    fn values_out_of_range_name_their_field() {
        assert_eq!(
            error("[report]\ncoverage_s = 0\n"),
            "the configuration agent.toml: report.coverage_s = 0 is outside 1 to 3600"
        );
        for flows in [0, 1_023, 4_194_305, 1_u64 << 32] {
            assert_eq!(
                error(&format!("[capture]\nflows = {flows}\n")),
                format!("the configuration agent.toml: capture.flows = {flows} is outside 1024 to 4194304")
            );
        }
        assert!(
            error("[spool]\nmax_days = 36501\n").contains("spool.max_days = 36501 is outside 0 to 36500")
        );
        let message = error("[filter.services]\ndns = [\"53\"]\n");
        assert!(message.contains("`53` is not a service: write udp/53 or tcp/53"), "{message}");
        assert!(error("[capture]\ninterfaces = [\"a/b\"]\n").contains("capture.interfaces"));
    }
}
