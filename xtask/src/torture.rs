//! `cargo xtask torture`: agent and server killed at random under load, and nothing lost, nothing doubled.

use std::process::Command;

use anyhow::Result;

use crate::{setup, sh};

/// Installs what is missing, builds, and strikes; `options` are those of `netmon-lab torture`.
pub fn run(options: &[String]) -> Result<()> {
    setup::require_root("the torture")?;
    setup::build()?;
    setup::lab()?;
    let cargo = || {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(sh::workspace());
        cargo
    };
    let packages = ["--package", "netmon-agent", "--package", "netmon-server", "--package", "netmon-lab"];
    sh::run(cargo().args(["build", "--locked", "--bins"]).args(packages))?;
    let program = ["run", "--locked", "--quiet", "--package", "netmon-lab", "--", "torture"];
    sh::run(cargo().args(program).args(options))
}
