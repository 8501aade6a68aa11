//! Whose address is it? Asked on a flow's first packet, and again when the agent has refilled the tries.

use aya_ebpf::btf_maps::lpm_trie::Key;
use netmon_common::abi::{CLASS_GROUP, CLASS_INTERNET, CLASS_LAN, CLASS_MUTED};

use crate::{
    key::bytes,
    maps::{LAN4, LAN6, MUTE4, MUTE6},
};

/// What a counterpart is, and under which label it is muted.
#[derive(Clone, Copy)]
pub struct Class {
    /// One of the `CLASS_` constants.
    pub class: u8,
    /// 0 unless muted.
    pub label: u16,
}

impl Class {
    const fn plain(class: u8) -> Self {
        Self { class, label: 0 }
    }
}

/// Classifies an IPv4 flow by its addresses in memory order. A private prefix wins over a muted one: what stays in the
/// house is always shown.
///
/// Its own subprogram, as is everything that happens once a flow: a program has 512 bytes of stack.
#[inline(never)]
pub fn ipv4(local: u32, remote: u32, group_frame: bool) -> Class {
    if group_frame || is_group4(local) || is_group4(remote) {
        return Class::plain(CLASS_GROUP);
    }
    let remote = Key::new(32, remote.to_ne_bytes());
    if LAN4.get(&remote).is_some() {
        return Class::plain(CLASS_LAN);
    }
    match MUTE4.get(&remote) {
        Some(value) => Class { class: CLASS_MUTED, label: value.label },
        None => Class::plain(CLASS_INTERNET),
    }
}

/// Classifies an IPv6 flow; see [`ipv4`].
#[inline(never)]
pub fn ipv6(local: &[u64; 2], remote: &[u64; 2], group_frame: bool) -> Class {
    if group_frame || is_group6(local) || is_group6(remote) {
        return Class::plain(CLASS_GROUP);
    }
    let remote = Key::new(128, bytes(*remote));
    if LAN6.get(&remote).is_some() {
        return Class::plain(CLASS_LAN);
    }
    match MUTE6.get(&remote) {
        Some(value) => Class { class: CLASS_MUTED, label: value.label },
        None => Class::plain(CLASS_INTERNET),
    }
}

/// 224.0.0.0/4 (RFC 5771) or the limited broadcast address (RFC 919).
#[inline(always)]
fn is_group4(address: u32) -> bool {
    address & 0xf0 == 0xe0 || address == u32::MAX
}

/// ff00::/8 (RFC 4291, section 2.7).
#[inline(always)]
fn is_group6(address: &[u64; 2]) -> bool {
    address[0] & 0xff == 0xff
}
