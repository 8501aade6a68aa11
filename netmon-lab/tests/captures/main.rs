//! Captures, played past netmon's programs and compared with tshark, flow by flow. All of them are made here, with real
//! tools or with a seed: none is kept in the repository. Needs root, tshark and tcpdump.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod crafted;
mod formats;
#[path = "../kernel/frames.rs"]
mod frames;
mod making;
mod mutated;
mod recorded;

use std::path::Path;

use netmon_lab::replay::{self, Replay};

/// Plays a capture and insists on equal counts at every hook.
fn equal(path: &Path) -> Replay {
    let replay = replay::replay(path).unwrap_or_else(|error| panic!("{:#}", anyhow::Error::from(error)));
    assert!(replay.agrees(), "{replay}");
    assert_eq!(replay.hooks.len(), 3, "{replay}");
    replay
}
