//! Filling the tries while the programs look things up in them.

use std::collections::BTreeMap;

use aya::{
    Pod,
    maps::{LpmTrie, Map, lpm_trie::Key},
};
use ipnet::IpNet;
use netmon_common::abi::PrefixValue;

use super::{KernelError, map_error};

/// What changed in the tries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixChange {
    /// Prefixes that were not there before.
    pub added: usize,
    /// Prefixes that have another label than before.
    pub relabelled: usize,
    /// Prefixes that are not there any more.
    pub removed: usize,
}

impl std::ops::AddAssign for PrefixChange {
    fn add_assign(&mut self, other: Self) {
        self.added += other.added;
        self.relabelled += other.relabelled;
        self.removed += other.removed;
    }
}

/// (length, address) → label. One per trie.
pub(super) type Prefixes<A> = BTreeMap<(u32, A), u16>;

/// Prefixes by family; a prefix that comes twice has the last label.
pub(super) fn by_family(list: impl Iterator<Item = (IpNet, u16)>) -> (Prefixes<[u8; 4]>, Prefixes<[u8; 16]>) {
    let (mut v4, mut v6) = (BTreeMap::new(), BTreeMap::new());
    for (prefix, label) in list {
        match prefix {
            IpNet::V4(prefix) => v4.insert((prefix.prefix_len().into(), prefix.network().octets()), label),
            IpNet::V6(prefix) => v6.insert((prefix.prefix_len().into(), prefix.network().octets()), label),
        };
    }
    (v4, v6)
}

/// Makes a trie hold exactly `wanted`. A prefix that is in it before and after is never missing: it is left alone,
/// or its value is overwritten in place. What is stale goes first, so that old and new need not fit at once.
pub(super) fn refill<A: Pod + Ord>(
    trie: &mut Map,
    name: &'static str,
    wanted: &Prefixes<A>,
) -> Result<PrefixChange, KernelError> {
    let mut trie: LpmTrie<_, A, PrefixValue> = LpmTrie::try_from(trie).map_err(map_error("open", name))?;
    let mut present = BTreeMap::new();
    for entry in trie.iter() {
        let (key, value) = entry.map_err(map_error("read", name))?;
        present.insert((key.prefix_len(), key.data()), value.label);
    }
    let mut change = PrefixChange::default();
    for (length, address) in present.keys().filter(|key| !wanted.contains_key(*key)) {
        trie.remove(&Key::new(*length, *address)).map_err(map_error("remove a prefix from", name))?;
        change.removed += 1;
    }
    for (key, label) in wanted {
        match present.get(key) {
            Some(known) if known == label => continue,
            Some(_) => change.relabelled += 1,
            None => change.added += 1,
        }
        let value = PrefixValue { label: *label, pad: 0 };
        trie.insert(&Key::new(key.0, key.1), value, 0).map_err(map_error("add a prefix to", name))?;
    }
    Ok(change)
}
