//! Agent and server are killed at random under load, and nothing is lost or doubled. Needs root.
//!
//! `cargo xtask test` runs a short form. The full form, with a table of what happened:
//!
//! ```text
//! cargo xtask torture --kills 1000
//! ```

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use netmon_lab::torture::{Options, run};

fn nothing_is_lost_or_doubled(kills: u32, seed: Option<u64>) {
    let report = run(&Options { kills, seed }).unwrap();
    println!("{report}");
    assert!(report.findings.is_empty(), "{report}the files are in {}", report.files.display());
    assert!(report.kills() >= kills && report.records() > u64::from(kills), "{report}");
}

#[test]
fn what_an_agent_recorded_is_stored_once_whoever_is_killed() {
    nothing_is_lost_or_doubled(25, Some(0x6e65_746d_6f6e));
}

#[test]
#[ignore = "the full form: a thousand kills, other ones each time"]
fn what_an_agent_recorded_is_stored_once_after_a_thousand_kills() {
    nothing_is_lost_or_doubled(1_000, None);
}
