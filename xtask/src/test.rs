//! `cargo xtask test`: what CI runs.

use std::process::Command;

use anyhow::Result;
use clap::ValueEnum;

use crate::{setup, sh};

/// cargo-deny's version: licences, bans and sources of all dependencies.
const DENY: &str = "0.20.2";

/// Parts of the test, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Part {
    /// Formatting, clippy, dependencies.
    Lint,
    /// Everything that needs no privilege.
    Unit,
    /// Kernel programs, USB messages and the room, with real packets and real programs; needs root.
    Lab,
}

/// Runs the parts, or all of them.
pub fn run(parts: &[Part]) -> Result<()> {
    let wanted = |part| parts.is_empty() || parts.contains(&part);
    setup::build()?;
    if wanted(Part::Lint) {
        lint()?;
    }
    if wanted(Part::Unit) {
        sh::run(cargo().args(["test", "--locked"]))?;
    }
    if wanted(Part::Lab) {
        setup::require_root("the lab")?;
        setup::lab()?;
        sh::run(cargo().args(["build", "--locked", "--workspace", "--bins"]))?;
        sh::run(cargo().args(["test", "--locked", "--package", "netmon-lab"]))?;
    }
    Ok(())
}

fn lint() -> Result<()> {
    sh::run(cargo().args(["fmt", "--all", "--check"]))?;
    sh::run(cargo().args(["fmt", "--check", "--manifest-path", "netmon-ebpf/Cargo.toml"]))?;
    sh::run(cargo().args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    let deny = setup::cargo_tool("cargo-deny", DENY)?;
    sh::run(Command::new(deny).current_dir(sh::workspace()).args(["check", "bans", "licenses", "sources"]))
}

fn cargo() -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(sh::workspace());
    cargo
}
