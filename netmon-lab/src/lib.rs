//! A room on one machine: hosts out of network namespaces, real traffic between them, and netmon's real programs
//! watching it. It carries the end-to-end tests and `cargo xtask lab`. Needs root.

pub mod bench;
pub mod cleanup;
pub mod clock;
pub mod demo;
pub mod follower;
pub mod generator;
pub mod host;
pub mod lines;
pub mod netmon;
pub mod objects;
pub mod packet;
pub mod replay;
pub mod room;
pub mod torture;
pub mod traffic;
pub mod udev_inject;
pub mod wait;
