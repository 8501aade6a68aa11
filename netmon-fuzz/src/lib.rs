//! What netmon makes of any bytes at all.
//!
//! A target is a function that takes bytes, hands them to one of the places where something comes in from outside, and
//! panics when that one breaks a promise. Coverage-guided fuzzing calls the targets (`cargo xtask fuzz`, docs/fuzzing.md);
//! `cargo test` calls them with the seeds and the committed corpus.
//!
//! Checksums are put right where a target can: else hardly an input would get past them.
//!
//! * [`wire`]: frames, batches, enrolment, tokens
//! * [`records`]: records and their lines of text
//! * [`server`]: signing requests, seats' labels, the order of what an agent sends
//! * [`spool`]: the agent's spool, found on disk
//! * [`kernel`]: ring records and flow tables, netlink's datagrams
//! * [`packet`]: the kernel programs' parser, built for the host
//! * [`usb`], [`mounts`]: udev's messages, disks' counters, the list of mounts
//! * [`usb_files`]: the kernel's file events, and what is made of them
//! * [`names`]: what flows say first
//! * [`files`]: `ip.txt`, `agent.toml`

pub mod files;
mod frame;
mod input;
pub mod kernel;
pub mod mounts;
pub mod names;
pub mod packet;
// Its comments speak to those who read it in its own crate.
#[path = "../../netmon-ebpf/src/parse.rs"]
mod parse;
pub mod records;
pub mod seeds;
pub mod server;
pub mod spool;
pub mod usb;
pub mod usb_files;
pub mod wire;

/// One place where something comes in.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name: of its binary in `fuzz/fuzz_targets` and of its directory in `corpus`.
    pub name: &'static str,
    /// Panics when a promise is broken.
    pub run: fn(&[u8]),
    /// Real inputs, from which fuzzing starts.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 20] = [
    Target { name: "batch", run: wire::batch, seeds: seeds::batch },
    Target { name: "config", run: files::config, seeds: seeds::config },
    Target { name: "csr", run: server::csr, seeds: seeds::csr },
    Target { name: "dns", run: names::dns, seeds: seeds::dns },
    Target { name: "enrolment", run: wire::enrolment, seeds: seeds::enrolment },
    Target { name: "frame", run: wire::frame, seeds: seeds::frame },
    Target { name: "ingest", run: server::ingest, seeds: seeds::ingest },
    Target { name: "kernel", run: kernel::tables, seeds: seeds::kernel },
    Target { name: "logline", run: records::logline, seeds: seeds::logline },
    Target { name: "names-tcp", run: names::tcp, seeds: seeds::names_tcp },
    Target { name: "names-udp", run: names::udp, seeds: seeds::names_udp },
    Target { name: "netlink", run: kernel::netlink, seeds: seeds::netlink },
    Target { name: "packet", run: packet::packet, seeds: seeds::packet },
    Target { name: "prefixes", run: files::prefixes, seeds: seeds::prefixes },
    Target { name: "record", run: records::record, seeds: seeds::record },
    Target { name: "seat", run: server::seat, seeds: seeds::seat },
    Target { name: "spool", run: spool::spool, seeds: seeds::spool },
    Target { name: "token", run: wire::token, seeds: seeds::token },
    Target { name: "usb", run: usb::usb, seeds: seeds::usb },
    Target { name: "usb-files", run: usb_files::usb_files, seeds: seeds::usb_files },
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
