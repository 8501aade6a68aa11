//! `cargo xtask bench`: what watching costs, beside others.

use std::process::Command;

use anyhow::Result;

use crate::{setup, sh};

/// The monitors that netmon is compared with, and what makes the TCP traffic (Debian packages).
const MONITORS: [&str; 6] = ["softflowd", "pmacct", "argus-server", "argus-client", "tcpdump", "iperf3"];
/// The collectors that the server is compared with.
const COLLECTORS: [&str; 4] = ["rsyslog", "rsyslog-relp", "nfdump", "softflowd"];

/// What can be measured.
#[derive(clap::Subcommand)]
pub enum Bench {
    /// Costs of the kernel programs and of the agent (docs/performance.md); needs root and Linux 5.18
    Kernel {
        /// Options of `netmon-lab bench kernel`: --only hot,many,flood,tcp,idle,fresh, --quick, --json FILE
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// What an event costs the server, and what hostile peers do to it (docs/performance.md)
    Delivery {
        /// Options of `netmon-lab bench delivery`: --only throughput,hostile, --quick, --json FILE, --directory DIR
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

/// Installs what is missing, builds as for a release, and measures.
pub fn run(bench: &Bench) -> Result<()> {
    let (name, packages, options) = match bench {
        Bench::Kernel { options } => ("kernel", &MONITORS[..], options),
        Bench::Delivery { options } => ("delivery", &COLLECTORS[..], options),
    };
    setup::require_root("the benchmark")?;
    setup::build()?;
    setup::lab()?;
    sh::ensure_packages(packages)?;
    let cargo = || {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(sh::workspace());
        cargo
    };
    let packages = ["netmon-agent", "netmon-server", "netmon-lab"].map(|name| ["--package", name]);
    sh::run(cargo().args(["build", "--locked", "--release", "--bins"]).args(packages.as_flattened()))?;
    let program = ["run", "--locked", "--release", "--quiet", "--package", "netmon-lab", "--"];
    sh::run(cargo().args(program).args(["bench", name]).args(options))
}
