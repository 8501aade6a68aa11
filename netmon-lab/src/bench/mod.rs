//! `netmon-lab bench kernel`: what watching costs, in one run and with ratios; [`delivery`] is `netmon-lab bench delivery`.
//! docs/performance.md says how to read it.
//!
//! * [`frames`], [`order`]: which packets, in which order
//! * [`source`]: sends them, out of the kernel, through the cable of a [`pair`] of hosts
//! * [`subject`], [`monitor`]: who watches: programs alone, whole monitors
//! * [`hot`], [`many`], [`flood`], [`tcp`], [`idle`], [`fresh`]: the sections
//! * [`numbers`], [`report`], [`machine`], [`process`]: what is said about it

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand, ValueEnum};

pub mod delivery;
pub mod flood;
pub mod frames;
pub mod fresh;
pub mod hot;
pub mod idle;
pub mod machine;
pub mod many;
pub mod monitor;
pub mod numbers;
pub mod order;
pub mod pair;
pub mod process;
pub mod readings;
pub mod report;
pub mod source;
pub mod subject;
pub mod tcp;

#[path = "../../../netmon-ebpf/reference/shared.rs"]
pub mod shared;

use machine::Machine;
use pair::Pair;
use report::Findings;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Costs of netmon's kernel programs and of its agent, beside those of others
    Kernel(Options),
    /// Costs of netmon's server, beside those of others, and what hostile peers do to it
    Delivery(delivery::Options),
}

/// Options of `bench kernel`.
#[derive(Args, Debug)]
pub struct Options {
    /// Only these sections
    #[arg(long, value_delimiter = ',')]
    only: Vec<Section>,
    /// A short form: fewer rounds, fewer cases. For a look, not for the record
    #[arg(long)]
    quick: bool,
    /// Write the findings into this file, too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A section of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// One hot flow, by test runs
    Hot,
    /// 1 to 1 Mi flows, by run-time statistics
    Many,
    /// A flood of small packets under several monitors
    Flood,
    /// TCP throughput
    Tcp,
    /// An agent that has nothing to do
    Idle,
    /// Nothing but new flows
    Fresh,
}

impl Bench {
    /// Measures, and prints the findings as Markdown.
    ///
    /// # Errors
    /// What could not be built, started or measured.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Kernel(options) => options.run(),
            Self::Delivery(options) => options.run(),
        }
    }
}

impl Options {
    fn run(&self) -> Result<()> {
        let machine = Machine::ask();
        let pair = Pair::build()?;
        let mut findings: Vec<Findings> = Vec::new();
        println!("{}", machine.markdown());
        for section in Section::value_variants() {
            if !self.only.is_empty() && !self.only.contains(section) {
                continue;
            }
            eprintln!("measuring: {section:?}");
            let found = self.measure(&pair, *section).with_context(|| format!("section {section:?}"))?;
            // At once: a run that ends early has still shown what it found.
            found.tables.iter().for_each(|table| println!("{}", table.markdown()));
            findings.push(found);
        }
        report::conclude(&machine, &findings, self.json.as_deref())
    }

    fn measure(&self, pair: &Pair, section: Section) -> Result<Findings> {
        let pick = |quick, full| if self.quick { quick } else { full };
        let seconds = |quick, full| Duration::from_secs(if self.quick { quick } else { full });
        match section {
            Section::Hot => {
                let packets = if self.quick { 200_000 } else { 1_000_000 };
                hot::run(pair, hot::Plan { rounds: pick(5, 21), packets })
            }
            Section::Many => {
                let packets = if self.quick { 500_000 } else { 2_000_000 };
                many::run(pair, many::Plan { rounds: pick(2, 5), packets, quick: self.quick })
            }
            Section::Flood => flood::run(pair, flood::Plan { rounds: pick(1, 5), length: seconds(2, 5) }),
            Section::Tcp => tcp::run(pair, tcp::Plan { rounds: pick(10, 120) }),
            Section::Idle => idle::run(pair, seconds(5, 20)),
            Section::Fresh => fresh::run(pair, fresh::Plan { rate: 100_000, length: seconds(2, 5) }),
        }
    }
}
