//! netmon's chores.

mod ip_txt;

use std::path::PathBuf;

use clap::Parser;

#[derive(Parser)]
#[command(about = "netmon's chores")]
enum Chore {
    /// Make ip.txt out of published provider ranges.
    IpTxt {
        /// Directory with <provider>-ipv4.txt and <provider>-ipv6.txt.
        directory: PathBuf,
        /// File to write.
        #[arg(long, default_value = "ip.txt")]
        out: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Chore::parse() {
        Chore::IpTxt { directory, out } => ip_txt::run(&directory, &out),
    }
}
