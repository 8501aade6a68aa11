//! The kernel programs and the agent's border to them, on a real kernel. Needs root: BPF, network namespaces, a
//! private BPF file system. Each test has its own namespaces, so they run side by side.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod counting;
mod frames;
mod limits;
mod network;
mod readers;
mod rig;
mod words;
