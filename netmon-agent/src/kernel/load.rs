//! Loading and pinning.

use std::{collections::BTreeMap, io, os::fd::AsFd as _, path::Path, sync::Arc};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, RingBuf},
    programs::{Program, ProgramError, SchedClassifier, Xdp},
};
use netmon_common::abi::{
    FlowOpened, HASH_KEYS, REGION_SETS, STAMPS, TableLayout, WAYS, constants, maps, programs,
};

use super::{
    Kernel, KernelError, LoadOptions, OBJECT, TcKind, Tries, cpus, map_error,
    mapping::{Mapping, RingPositions},
    table::{Shared, Table},
    words,
};

/// All TC programs, with what they are called in the kernel.
pub(super) const TC_PROGRAMS: [&str; 4] =
    [programs::TC_INGRESS, programs::TC_EGRESS, programs::TC_L3_INGRESS, programs::TC_L3_EGRESS];

fn regions_each(slots: u32, cpus: u32) -> u32 {
    (slots / cpus / (REGION_SETS * WAYS) as u32).max(1)
}

/// How `slots` in all are shared: slots for each CPU in each table, and CPUs that there can be.
///
/// # Errors
/// [`KernelError::Cpus`]
pub fn shares(slots: u32) -> Result<(u32, u32), KernelError> {
    let cpus = u32::try_from(cpus::count()?).unwrap_or(u32::MAX);
    Ok((regions_each(slots, cpus) * (REGION_SETS * WAYS) as u32, cpus))
}

/// As many sets for each CPU as `slots` in all allow, in whole regions.
fn table_layout(slots: u32, cpus: usize) -> Result<TableLayout, KernelError> {
    let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
    let regions_each = regions_each(slots, cpus);
    let mut hash_keys = [0; HASH_KEYS];
    for key in &mut hash_keys {
        *key = getrandom::u64().map_err(KernelError::Random)?;
    }
    Ok(TableLayout { sets: regions_each * REGION_SETS as u32, regions: regions_each * cpus, hash_keys })
}

/// Loads a program, anew when the verifier was interrupted: it gives up with `EAGAIN` when anything wants the thread's
/// attention (kernel/bpf/verifier.c, `do_check`).
fn patiently(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    /// The library tries twice in each.
    const ATTEMPTS: usize = 10;
    let interrupted = |result: &Result<(), ProgramError>| matches!(result, Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == io::ErrorKind::WouldBlock);
    let mut result = load();
    for _ in 1..ATTEMPTS {
        if !interrupted(&result) {
            break;
        }
        std::thread::yield_now();
        result = load();
    }
    result
}

fn array(map: &Map) -> Result<&MapData, KernelError> {
    match map {
        Map::Array(data) => Ok(data),
        _ => Err(KernelError::Missing { name: "an array map" }),
    }
}

fn memory_error(name: &'static str) -> impl Fn(io::Error) -> KernelError {
    move |source| KernelError::MapMemory { name, source }
}

impl Kernel {
    pub(super) fn load_and_pin(options: LoadOptions) -> Result<Self, KernelError> {
        let sizes = options.sizes;
        let cpus = cpus::count()?;
        let layout = table_layout(sizes.flows, cpus)?;
        let sets = layout.regions * REGION_SETS as u32;
        let words = options.words.number();
        // The programs keep the ring of their words even when the kernel has taken all its users out of them.
        let words_bytes = if words == 0 { rustix::param::page_size() as u32 } else { words::RING_BYTES };
        let mut ebpf = EbpfLoader::new()
            .override_global(constants::TABLE_LAYOUT, &layout, true)
            .override_global(words::LEVEL, &words, true)
            .map_max_entries(words::RING, words_bytes)
            .map_max_entries(maps::TABLE4, sets)
            .map_max_entries(maps::TABLE6, sets)
            .map_max_entries(maps::LIVES, 2 * sets)
            .map_max_entries(maps::TOUCHED, (2 * layout.regions).div_ceil(STAMPS as u32))
            .map_max_entries(maps::STATS, cpus as u32)
            .map_max_entries(maps::LAN4, sizes.lan_prefixes)
            .map_max_entries(maps::LAN6, sizes.lan_prefixes)
            .map_max_entries(maps::MUTE4, sizes.muted_prefixes)
            .map_max_entries(maps::MUTE6, sizes.muted_prefixes)
            .map_max_entries(maps::EVENTS, sizes.ring_bytes)
            .load(OBJECT)
            .map_err(|source| KernelError::Load(Box::new(source)))?;
        let directory = options.pin_dir.as_path();

        for name in TC_PROGRAMS {
            let program = tc_program(&mut ebpf, name)?;
            patiently(|| program.load())
                .map_err(|source| KernelError::LoadProgram { name, source: Box::new(source) })?;
            program.pin(directory.join(name)).map_err(pin_error(name, directory))?;
        }
        let program = xdp_program(&mut ebpf)?;
        let name = programs::XDP_INGRESS;
        patiently(|| program.load())
            .map_err(|source| KernelError::LoadProgram { name, source: Box::new(source) })?;
        program.pin(directory.join(name)).map_err(pin_error(name, directory))?;

        let mut take = |name: &'static str| {
            let map = ebpf.take_map(name).ok_or(KernelError::Missing { name })?;
            map.pin(directory.join(name)).map_err(pin_error(name, directory))?;
            Ok(map)
        };
        let tries = Tries {
            lan4: take(maps::LAN4)?,
            lan6: take(maps::LAN6)?,
            mute4: take(maps::MUTE4)?,
            mute6: take(maps::MUTE6)?,
        };
        take(maps::FRAGMENTS)?;
        let shown4 = HashMap::try_from(take(maps::FLOWS4)?).map_err(map_error("open", maps::FLOWS4))?;
        let shown6 = HashMap::try_from(take(maps::FLOWS6)?).map_err(map_error("open", maps::FLOWS6))?;
        let regions = layout.regions as usize;
        let table4 = take(maps::TABLE4)?;
        let table4 = Table::new(array(&table4)?, regions, 0).map_err(memory_error(maps::TABLE4))?;
        let table6 = take(maps::TABLE6)?;
        let table6 = Table::new(array(&table6)?, regions, regions).map_err(memory_error(maps::TABLE6))?;
        let tables = Shared {
            touched: Mapping::new(array(&take(maps::TOUCHED)?)?).map_err(memory_error(maps::TOUCHED))?,
            lives: Mapping::new(array(&take(maps::LIVES)?)?).map_err(memory_error(maps::LIVES))?,
        };
        let stats = Mapping::new(array(&take(maps::STATS)?)?).map_err(memory_error(maps::STATS))?;
        let ring = RingBuf::try_from(take(maps::EVENTS)?).map_err(map_error("open", maps::EVENTS))?;
        Ok(Self {
            tcx: options.tc == TcKind::Best,
            ring_records: sizes.ring_bytes as usize / size_of::<FlowOpened>(),
            options,
            pinned: true,
            attached: BTreeMap::new(),
            ebpf,
            tries,
            table4,
            table6,
            tables,
            shown4,
            shown6,
            cpus,
            stats: Arc::new(stats),
            generation: 0,
            positions: RingPositions::new(ring.as_fd()).map_err(memory_error(maps::EVENTS))?,
            events: ring,
            refused_records: 0,
            swept_ns: 0,
            swept_all_ns: None,
        })
    }
}

pub(super) fn tc_program<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, KernelError> {
    match ebpf.program_mut(name) {
        Some(Program::SchedClassifier(program)) => Ok(program),
        _ => Err(KernelError::Missing { name }),
    }
}

pub(super) fn xdp_program(ebpf: &mut Ebpf) -> Result<&mut Xdp, KernelError> {
    match ebpf.program_mut(programs::XDP_INGRESS) {
        Some(Program::Xdp(program)) => Ok(program),
        _ => Err(KernelError::Missing { name: programs::XDP_INGRESS }),
    }
}

fn pin_error(name: &'static str, directory: &Path) -> impl Fn(aya::pin::PinError) -> KernelError {
    let directory = directory.to_owned();
    move |source| KernelError::Pin { name, directory: directory.clone(), source }
}
