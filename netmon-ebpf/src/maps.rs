//! The maps. Their names are in `netmon_common::abi::maps`; attributes take literals only, so a test of the
//! agent compares the two.

use aya_ebpf::{
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf},
    macros::btf_map,
};
use netmon_common::abi::{
    Config, Flow4Key, Flow6Key, FlowOpened, FlowState, MAX_FLOWS, MAX_LAN_PREFIXES, MAX_MUTED_PREFIXES,
    PrefixValue, RING_BYTES, Stats,
};

/// Flow table, IPv4. Memory for all entries is reserved at load, so an insert cannot fail for want of memory.
#[btf_map(name = "nm_flows4")]
pub static FLOWS4: HashMap<Flow4Key, FlowState, MAX_FLOWS> = HashMap::new();

/// Flow table, IPv6.
#[btf_map(name = "nm_flows6")]
pub static FLOWS6: HashMap<Flow6Key, FlowState, MAX_FLOWS> = HashMap::new();

/// Private prefixes, IPv4.
#[btf_map(name = "nm_lan4")]
pub static LAN4: LpmTrie<[u8; 4], PrefixValue, MAX_LAN_PREFIXES> = LpmTrie::new();

/// Private prefixes, IPv6.
#[btf_map(name = "nm_lan6")]
pub static LAN6: LpmTrie<[u8; 16], PrefixValue, MAX_LAN_PREFIXES> = LpmTrie::new();

/// Muted prefixes, IPv4.
#[btf_map(name = "nm_mute4")]
pub static MUTE4: LpmTrie<[u8; 4], PrefixValue, MAX_MUTED_PREFIXES> = LpmTrie::new();

/// Muted prefixes, IPv6.
#[btf_map(name = "nm_mute6")]
pub static MUTE6: LpmTrie<[u8; 16], PrefixValue, MAX_MUTED_PREFIXES> = LpmTrie::new();

/// "Flow opened" records.
#[btf_map(name = "nm_events")]
pub static EVENTS: RingBuf<FlowOpened, RING_BYTES> = RingBuf::new();

/// What became of every frame.
#[btf_map(name = "nm_stats")]
pub static STATS: PerCpuArray<Stats, 1> = PerCpuArray::new();

/// What the agent tells us.
#[btf_map(name = "nm_config")]
pub static CONFIG: Array<Config, 1> = Array::new();
