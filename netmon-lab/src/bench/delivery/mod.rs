//! `netmon-lab bench delivery`: what the server costs, and what hostile peers do to it. docs/performance.md says how to
//! read it.
//!
//! * [`records`], [`agents`], [`server`]: the load and the real server
//! * [`relp`], [`rsyslog`], [`nfcapd`]: who else carries such events
//! * [`attack`]: what hostile peers do
//! * [`throughput`], [`hostile`]: the sections

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

pub mod agents;
pub mod attack;
pub mod hostile;
pub mod nfcapd;
pub mod records;
pub mod relp;
pub mod rsyslog;
pub mod server;
pub mod throughput;

use super::machine::Machine;
use super::report::{self, Findings};

/// Options of `bench delivery`.
#[derive(Args, Debug)]
pub struct Options {
    /// Only these sections
    #[arg(long, value_delimiter = ',')]
    only: Vec<Section>,
    /// A short form: fewer rounds, fewer agents. For a look, not for the record
    #[arg(long)]
    quick: bool,
    /// Write the findings into this file, too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the stores are made: on a real disk, for syncing is a part of the price
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    directory: PathBuf,
}

/// A section of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// Events per second and their price, beside rsyslog and nfcapd
    Throughput,
    /// A good agent beside hostile peers
    Hostile,
}

impl Options {
    /// Measures, and prints the findings as Markdown.
    ///
    /// # Errors
    /// What could not be started or measured.
    pub fn run(&self) -> Result<()> {
        let machine = Machine::ask();
        println!("{}", machine.markdown());
        let mut findings = Vec::new();
        for section in Section::value_variants() {
            if !self.only.is_empty() && !self.only.contains(section) {
                continue;
            }
            eprintln!("measuring: {section:?}");
            let found = self.measure(*section).with_context(|| format!("section {section:?}"))?;
            found.tables.iter().for_each(|table| println!("{}", table.markdown()));
            findings.push(found);
        }
        report::conclude(&machine, &findings, self.json.as_deref())
    }

    fn measure(&self, section: Section) -> Result<Findings> {
        let pick = |quick, full| if self.quick { quick } else { full };
        let seconds = |quick, full| Duration::from_secs(pick(quick, full));
        let place = tempfile::Builder::new()
            .prefix("netmon-bench-")
            .tempdir_in(&self.directory)
            .with_context(|| format!("cannot make a directory in {}", self.directory.display()))?;
        match section {
            Section::Throughput => {
                let plan = throughput::Plan {
                    rounds: pick(1, 5) as usize,
                    agents: pick(64, 256) as usize,
                    events: pick(1_000, 4_000),
                    synced_events: pick(10, 50) as usize,
                    flows: seconds(1, 2),
                    moderate: seconds(5, 10),
                };
                throughput::run(place.path(), plan)
            }
            Section::Hostile => {
                let plan = hostile::Plan { rounds: pick(2, 10) as usize, length: seconds(3, 5) };
                hostile::run(place.path(), plan)
            }
        }
    }
}
