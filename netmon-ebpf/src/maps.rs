//! The maps. Their names are in `netmon_common::abi::maps`; attributes take literals only, so a test of the
//! agent compares the two.

use core::arch::asm;

use aya_ebpf::{
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, RingBuf},
    macros::btf_map,
};
use netmon_common::abi::{
    CpuStats, Evicted, Flow4Key, Flow6Key, FlowState, FragmentKey, FragmentPorts, HASH_KEYS, Lives, MAX_CPUS,
    MAX_FLOWS, MAX_FRAGMENTS, MAX_LAN_PREFIXES, MAX_MUTED_PREFIXES, MAX_SHOWN, PrefixValue, REGION_SETS,
    RING_BYTES, STAMPS, Set4, Set6, TableLayout, Touched, WAYS,
};

/// `BPF_F_MMAPABLE` (kernel 5.5): the agent reads the map without system calls.
const MMAPABLE: usize = 1 << 10;
/// `BPF_F_NO_PREALLOC`: an entry takes memory only while it is there.
const NO_PREALLOC: usize = 1;

/// Sets of a table.
const SETS: usize = MAX_FLOWS / WAYS;

/// Flow table, IPv4.
#[btf_map(name = "nm_table4")]
pub static TABLE4: Array<Set4, SETS, MMAPABLE> = Array::new();

/// Flow table, IPv6.
#[btf_map(name = "nm_table6")]
pub static TABLE6: Array<Set6, SETS, MMAPABLE> = Array::new();

/// Where the flows in the slots come from.
#[btf_map(name = "nm_lives")]
pub static LIVES: Array<Lives, { 2 * SETS }, MMAPABLE> = Array::new();

/// When a region of a table was last written to.
#[btf_map(name = "nm_touched")]
pub static TOUCHED: Array<Touched, { 2 * SETS / REGION_SETS / STAMPS }, MMAPABLE> = Array::new();

/// Datagrams in fragments.
#[btf_map(name = "nm_fragments")]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, MAX_FRAGMENTS> = LruHashMap::new();

/// For people, IPv4: written by the agent.
#[btf_map(name = "nm_flows4")]
pub static FLOWS4: HashMap<Flow4Key, FlowState, MAX_SHOWN, NO_PREALLOC> = HashMap::new();

/// For people, IPv6: written by the agent.
#[btf_map(name = "nm_flows6")]
pub static FLOWS6: HashMap<Flow6Key, FlowState, MAX_SHOWN, NO_PREALLOC> = HashMap::new();

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

/// "Flow opened" and "flow evicted" records.
#[btf_map(name = "nm_events")]
pub static EVENTS: RingBuf<Evicted, RING_BYTES> = RingBuf::new();

/// What became of every frame, one element a CPU.
#[btf_map(name = "nm_stats")]
pub static STATS: Array<CpuStats, MAX_CPUS, MMAPABLE> = Array::new();

/// How the tables are laid out. Written by the agent before the kernel sees it: read it by [`table_layout`], the compiler
/// knows only these zeros.
#[unsafe(no_mangle)]
static NM_TABLE_LAYOUT: TableLayout = TableLayout { sets: 0, regions: 0, hash_keys: [0; HASH_KEYS] };

/// How the tables are laid out.
#[inline(always)]
pub fn table_layout() -> *const TableLayout {
    let mut layout: *const TableLayout = &raw const NM_TABLE_LAYOUT;
    // SAFETY: no instruction. So that the compiler does not see what it points to.
    unsafe { asm!("/* {layout} */", layout = inout(reg) layout, options(nomem, nostack, preserves_flags)) };
    layout
}
