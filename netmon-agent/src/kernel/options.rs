//! How to load the programs.

use std::{ops::RangeInclusive, path::PathBuf};

use netmon_common::abi::{MAX_FLOWS, MAX_LAN_PREFIXES, MAX_MUTED_PREFIXES, RING_BYTES};

use super::{PIN_DIRECTORY, WordLevel};

/// Which hook sees what arrives. What leaves is always seen by TC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// TC ingress: behind GRO, ahead of the firewall.
    #[default]
    Tc,
    /// XDP: ahead of everything else, in the driver where it can, which may interrupt the link for a moment while
    /// attaching. Interfaces without Ethernet header are watched by TC nevertheless.
    Xdp,
}

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcKind {
    /// TCX where the kernel has it (6.6), else clsact.
    #[default]
    Best,
    /// clsact filters even where the kernel has TCX.
    Clsact,
}

/// How to load.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Directory for the pins; its parent must be in a BPF file system.
    pub pin_dir: PathBuf,
    /// Which hook sees what arrives.
    pub mode: Mode,
    /// How TC programs are attached.
    pub tc: TcKind,
    /// Sizes of the maps.
    pub sizes: Sizes,
    /// What the programs say of themselves: [`super::Kernel::words`].
    pub words: WordLevel,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            pin_dir: PIN_DIRECTORY.into(),
            mode: Mode::default(),
            tc: TcKind::default(),
            sizes: Sizes::default(),
            words: WordLevel::default(),
        }
    }
}

/// Sizes of the maps; the default is what [`netmon_common::abi`] names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Slots in each flow table, over all CPUs: 96 bytes each for IPv4, 128 for IPv6. Rounded down to what the CPUs can
    /// share evenly, but each has 64 at least.
    pub flows: u32,
    /// Prefixes in each trie of private networks.
    pub lan_prefixes: u32,
    /// Prefixes in each trie of muted prefixes.
    pub muted_prefixes: u32,
    /// Ring buffer, in bytes; rounded up to a power of two of pages.
    pub ring_bytes: u32,
}

impl Sizes {
    /// What a PC's settings may say of [`Self::flows`]. Less than the least is rounded up on most PCs, whose CPUs have 64
    /// each; the most is 900 MiB for both tables in the kernel, and 400 MiB of what was read in the agent.
    pub const FLOWS: RangeInclusive<u64> = 1_024..=4_194_304;
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            flows: MAX_FLOWS as u32,
            lan_prefixes: MAX_LAN_PREFIXES as u32,
            muted_prefixes: MAX_MUTED_PREFIXES as u32,
            ring_bytes: RING_BYTES as u32,
        }
    }
}
