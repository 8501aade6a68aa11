//! Many flows: what a packet costs when the caches do not help. Packets arrive through the cable, and the kernel's own
//! statistics tell how long the program ran (`BPF_ENABLE_STATS`).

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};
use netmon_agent::kernel::{Mode, Sizes};

use super::frames::{Family, Protocol, Shape, Size};
use super::numbers::median;
use super::order::Order;
use super::pair::{Pair, inside};
use super::report::{Cell, Findings, Table, Target, number, spread};
use super::source::{Source, Until, index_of};
use super::subject::{Netmon, Reference, Subject};

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds of each case.
    pub rounds: usize,
    /// Packets that each program gets in a round, after those that fill its tables.
    pub packets: u64,
    /// Leave out what only rounds off the picture.
    pub quick: bool,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
struct Case {
    mode: Mode,
    flows: u32,
    order: Order,
    shape: Shape,
    /// Belongs to the short form, too.
    quick: bool,
}

const K: u32 = 1 << 10;
const M: u32 = 1 << 20;

/// Every axis is varied: flows, order, length, protocol, family, hook.
fn cases() -> Vec<Case> {
    let case = |flows, order, shape, quick| Case { mode: Mode::Tc, flows, order, shape, quick };
    let small = Shape::SMALL;
    let tcp = Shape { protocol: Protocol::Tcp, ..small };
    let v6 = Shape { family: Family::V6, ..small };
    let full = Shape { size: Size::Full, ..small };
    let full_tcp6 = Shape { family: Family::V6, protocol: Protocol::Tcp, size: Size::Full };
    let mut cases = vec![
        case(1, Order::Random, small, true),
        case(16 * K, Order::Random, small, true),
        case(128 * K, Order::Random, small, false),
        case(M, Order::Random, small, true),
        case(16 * K, Order::Bursty, small, true),
        case(128 * K, Order::Bursty, small, false),
        case(M, Order::Bursty, small, false),
        case(1, Order::Random, tcp, false),
        case(1, Order::Random, full, false),
        case(16 * K, Order::Random, tcp, false),
        case(16 * K, Order::Random, v6, true),
        case(16 * K, Order::Random, full, false),
        case(16 * K, Order::Random, full_tcp6, false),
        case(M, Order::Random, v6, false),
    ];
    for (flows, quick) in [(1, false), (16 * K, true), (M, false)] {
        cases.push(Case { mode: Mode::Xdp, ..case(flows, Order::Random, small, quick) });
    }
    cases
}

/// Measures.
///
/// # Errors
/// Something could not be loaded, attached or sent.
pub fn run(pair: &Pair, plan: Plan) -> Result<Findings> {
    let ifindex = index_of(pair.receiver())?;
    inside(pair.receiver(), move || {
        let _statistics = enable_stats(Stats::RunTime).context("cannot enable run-time statistics")?;
        let mut source = Source::load(pair)?;
        let mut table = Table::new(
            "Many flows (run time under traffic over veth)",
            &format!(
                "Nanoseconds per packet, net of the empty program of the same round: median of {} rounds of {} packets, \
                 and the least in brackets. Everything is loaded anew in each round. `netmon` has its default tables, \
                 `netmon, sized` has two slots for each flow on the CPU that sees it, `hash` an entry for each flow. \
                 `counted` is what netmon counted in a flow; the rest was refused, and a refusal costs something else \
                 than counting. The user-space side empties the ring and sweeps the tables meanwhile, at the \
                 agent's pace; it keeps nothing of what it reads.",
                plan.rounds, plan.packets
            ),
            &[
                "hook",
                "flows",
                "order",
                "packets",
                "empty, gross",
                "netmon",
                "netmon, sized",
                "hash",
                "netmon / hash",
                "sized / hash",
                "netmon, counted %",
                "sized, counted %",
            ],
        );
        let mut memory = Table::new(
            "Kernel memory of the maps",
            "As the kernel accounts for it (`memlock` in fdinfo).",
            &["tables", "MiB", "of which"],
        );
        let mut targets = Vec::new();
        for case in cases().into_iter().filter(|case| case.quick || !plan.quick) {
            let mut measured = measure(&mut source, ifindex, case, plan)?;
            table.row(measured.row(case));
            if case.flows == M && case.order == Order::Random && case.mode == Mode::Tc {
                let ratio = median(measured.ratios(measured.best_for_target()));
                let what = format!("{M} random flows ({}), netmon / hash", case.shape);
                targets.push(Target::at_most(&what, 0.5, ratio, 2, ""));
                if memory.rows.is_empty() {
                    memory.rows.append(&mut measured.memory);
                }
            }
        }
        let tables = if memory.rows.is_empty() { vec![table] } else { vec![table, memory] };
        Ok(Findings { tables, targets })
    })
}

/// Which program a time belongs to.
#[derive(Clone, Copy)]
enum Column {
    Empty,
    Netmon,
    Sized,
    Hash,
}

/// Nanoseconds per packet, round by round.
#[derive(Default)]
struct Measured {
    empty: Vec<f64>,
    netmon: Vec<f64>,
    sized: Vec<f64>,
    hash: Vec<f64>,
    /// Of netmon's packets, how many are in a flow and how many there were: default tables, sized tables. The others were
    /// refused, counted.
    counted: [(u64, u64); 2],
    memory: Vec<Vec<Cell>>,
}

impl Measured {
    fn column(&mut self, column: Column) -> &mut Vec<f64> {
        match column {
            Column::Empty => &mut self.empty,
            Column::Netmon => &mut self.netmon,
            Column::Sized => &mut self.sized,
            Column::Hash => &mut self.hash,
        }
    }

    /// Round by round: netmon's net time by the hash's.
    fn ratios<'a>(&'a self, netmon: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
        let net = |measured: &'a [f64]| measured.iter().zip(&self.empty).map(|(time, empty)| time - empty);
        net(netmon).zip(net(&self.hash)).map(|(netmon, hash)| netmon / hash)
    }

    /// Both hold what the hash holds only where netmon's tables are sized for it.
    fn best_for_target(&self) -> &[f64] {
        if self.sized.is_empty() { &self.netmon } else { &self.sized }
    }

    fn net(&self, measured: &[f64]) -> Cell {
        let net: Vec<f64> = measured.iter().zip(&self.empty).map(|(time, empty)| time - empty).collect();
        spread(&net)
    }

    fn counted(&self, table: usize) -> Cell {
        let (counted, seen) = self.counted[table];
        number(counted as f64 / seen as f64 * 100.0, 3)
    }

    /// What netmon says after a round.
    fn add_reading(&mut self, netmon: &Netmon, column: Column, slots: u32, first: bool) -> Result<()> {
        let sized = matches!(column, Column::Sized);
        let stats = netmon.kernel.stats();
        let (counted, seen) = &mut self.counted[usize::from(sized)];
        *counted += stats.counted;
        *seen += stats.seen;
        if first {
            let (sum, maps) = netmon.memory()?;
            let label = if sized { format!("sized: {slots} slots") } else { "default".to_owned() };
            let mib = |bytes: u64| bytes as f64 / f64::from(M);
            let largest: Vec<_> =
                maps.iter().take(4).map(|(name, bytes)| format!("{name} {:.1}", mib(*bytes))).collect();
            self.memory.push(vec![label.into(), number(mib(sum), 1), largest.join(", ").into()]);
        }
        Ok(())
    }

    fn row(&self, case: Case) -> Vec<Cell> {
        let order = match (case.flows, case.order) {
            (1, _) => "–",
            (_, Order::Sequential) => "sequential",
            (_, Order::Random) => "random",
            (_, Order::Bursty) => "bursty",
        };
        vec![
            mode(case).into(),
            u64::from(case.flows).into(),
            order.into(),
            case.shape.to_string().into(),
            number(median(self.empty.iter().copied()), 0),
            self.net(&self.netmon),
            self.net(&self.sized),
            self.net(&self.hash),
            number(median(self.ratios(&self.netmon)), 2),
            number(median(self.ratios(&self.sized)), 2),
            self.counted(0),
            self.counted(1),
        ]
    }
}

/// Each round loads anew: where in memory the tables come to lie makes some of them a fifth slower than others.
fn measure(source: &mut Source<'_>, ifindex: u32, case: Case, plan: Plan) -> Result<Measured> {
    let length = source.prepare(case.shape, case.order, case.flows)?;
    let defaults = Sizes::default();
    // A table's size is that over all CPUs, all these packets come on one, and a half-empty table has room for nearly
    // every flow where it belongs.
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u32;
    let slots = case.flows.saturating_mul(2 * cpus);
    let mut columns = vec![Column::Empty, Column::Netmon];
    if slots > defaults.flows {
        columns.push(Column::Sized);
    }
    if case.mode == Mode::Tc {
        columns.push(Column::Hash);
    }
    let netmon = |sizes: Sizes| -> Result<Subject> {
        let mut netmon = Netmon::load("bench", case.mode, sizes, ifindex)?;
        netmon.readings.discard = true;
        Ok(Subject::Netmon(Box::new(netmon)))
    };
    let mut measured = Measured::default();
    for round in 1..=plan.rounds {
        eprintln!("  {} {} flows, {:?}, {}: round {round}", mode(case), case.flows, case.order, case.shape);
        for &column in &columns {
            let mut subject = match column {
                Column::Empty => Subject::Reference(Reference::empty(case.mode)?),
                Column::Netmon => netmon(defaults)?,
                Column::Sized => netmon(Sizes { flows: slots, ..defaults })?,
                Column::Hash => Subject::Reference(Reference::hash(case.flows.max(defaults.flows))?),
            };
            subject.attach()?;
            // Fills the tables: the whole order, so every flow that will come.
            source.send(Until::Frames(length), None, |wait| subject.tend(wait))?;
            let before = subject.run_time()?;
            source.send(Until::Frames(plan.packets), None, |wait| subject.tend(wait))?;
            let after = subject.run_time()?;
            let runs = after.runs_since(before);
            anyhow::ensure!(
                runs >= plan.packets / 10,
                "only {runs} of {} packets arrived: something is wrong with the cable",
                plan.packets
            );
            measured.column(column).push(after.per_run_since(before));
            subject.detach()?;
            if let Subject::Netmon(netmon) = &subject {
                measured.add_reading(netmon, column, slots, round == 1)?;
            }
        }
    }
    Ok(measured)
}

fn mode(case: Case) -> &'static str {
    if case.mode == Mode::Xdp { "XDP" } else { "TC" }
}
