//! An agent on a PC where nothing happens: what it costs to wait.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::monitor::Monitor;
use super::pair::Pair;
use super::process::resident;
use super::report::{Findings, Table, Target, number};
use crate::clock;

/// After its start the agent reads lists, fills maps and takes stock.
const SETTLE: Duration = Duration::from_secs(3);

/// Measures for `length`.
///
/// # Errors
/// The agent cannot be started.
pub fn run(pair: &Pair, length: Duration) -> Result<Findings> {
    let running = Monitor::Netmon.start(pair)?;
    let pid = running.pid().context("the agent has no process")?;
    thread::sleep(SETTLE);
    let (start, before) = (clock::now(), running.cpu()?);
    // Time is what is measured here.
    thread::sleep(length);
    let cpu = (running.cpu()? - before).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
    let memory = resident(pid)?;
    running.stop()?;

    const MIB: f64 = (1 << 20) as f64;
    let (process, maps) = (memory.process as f64 / MIB, memory.maps as f64 / MIB);
    let mut table = Table::new(
        "Idle agent",
        &format!(
            "One interface, no traffic, {} s. Memory is what is present in RAM (smaps); the maps that the agent has in \
             its address space are told apart, and their whole size is in the table of kernel memory.",
            length.as_secs()
        ),
        &["CPU, % of a core", "RSS without maps, MiB", "maps present, MiB"],
    );
    table.row([number(cpu, 3), number(process, 1), number(maps, 1)]);
    Ok(Findings {
        tables: vec![table],
        targets: vec![
            Target::at_most("idle agent's CPU", 0.1, cpu, 3, " % of a core"),
            Target::at_most("idle agent's RSS without maps", 20.0, process, 1, " MiB"),
        ],
    })
}
