//! netmon's chores.

mod clock;
mod vm;

use clap::Parser;

#[derive(Parser)]
#[command(about = "netmon's chores")]
enum Chore {
    /// Runs a test, or any command, on stock Debian kernels with USB devices that are really plugged in
    Vm(vm::Args),
}

fn main() -> anyhow::Result<()> {
    match Chore::parse() {
        Chore::Vm(args) => vm::run(&args),
    }
}
