//! What becomes of what an agent says: order, duplicates, gaps. No I/O, no clock.
//!
//! The server expects one record next in every epoch of every agent, and only ever goes forward. An agent's
//! history is therefore a run of records without holes, or a hole that was named when it was found.

use netmon_common::model::{Event, Record, RecordError, RecordHead};
use netmon_common::wire::Item;

use crate::passport::Sighting;

/// Numbers are kept as signed 64-bit integers in the store.
const MAX_SEQ: u64 = i64::MAX as u64;

/// Where an epoch stands that the server has never heard of: records are numbered from 1.
pub const FIRST_SEQ: u64 = 1;

/// Most records that one hole may have: an agent that records 10,000 a second gets there in three years.
const MAX_HOLE: u64 = 1 << 40;

/// Most epochs that an agent may begin within [`EPOCHS_TIME_NS`]. A new one is the rare case of a spool that was
/// lost; each costs the store a line for ever.
pub const MAX_NEW_EPOCHS: u64 = 100;
/// One hour.
pub const EPOCHS_TIME_NS: i64 = 3_600_000_000_000;

/// What the server knows of the epoch for which an agent says hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// It expects this record next.
    Expecting(u64),
    /// The agent's first epoch.
    First,
    /// The agent has another history already.
    Another {
        /// Epochs that this agent began within the last [`EPOCHS_TIME_NS`].
        begun: u64,
    },
}

/// What a hello leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Another history ends here, nobody knows how much of it is missing.
    pub restarts: bool,
    /// The record that is expected next from now on.
    pub next_seq: u64,
    /// Records that can never come: first and last.
    pub gap: Option<(u64, u64)>,
}

/// What an item of a batch leads to, when some record is expected next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// It is there already, or lies in a hole that was named before; `None`: a hole.
    Known(Option<&'a Received>),
    /// It is the expected record.
    Next(&'a Received),
    /// Records that can never come: first and last.
    Gap(u64, u64),
}

/// Why an agent's message cannot be: its connection is closed, nothing of the message is stored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A number that no agent reaches.
    #[error("record number {0} is out of range")]
    Number(u64),
    /// A hole that no agent makes.
    #[error("a hole of {0} records is out of range")]
    Hole(u64),
    /// It is refused, rather than at fault: it may come again later.
    #[error(
        "this agent began more than {MAX_NEW_EPOCHS} histories within an hour; find out why its spool is lost again and again"
    )]
    Epochs,
    /// A record's bytes are not a record.
    #[error("record {seq} of the batch is broken")]
    Record {
        /// Its number by its place.
        seq: u64,
        /// What is wrong with it.
        source: RecordError,
    },
    /// A record says that it is another one.
    #[error("a record says it is number {says} at the place of number {at}")]
    Order {
        /// Its number by its place.
        at: u64,
        /// Its number by its content.
        says: u64,
    },
}

/// One item of a batch that was looked at: a record, or a hole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Its number within the epoch; of a hole the first one.
    pub seq: u64,
    /// The number behind it.
    pub next_seq: u64,
    /// `None`: a hole.
    pub record: Option<Received>,
}

/// What the store needs of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// When it was recorded, the PC's wall clock.
    pub wall_ns: i64,
    /// The backlog that it reports, if it is a heartbeat.
    pub backlog: Option<u64>,
    /// What it says of where USB devices are.
    pub sighting: Option<Box<Sighting>>,
    /// The bytes as they came.
    pub bytes: Vec<u8>,
}

/// An agent says that `oldest` is the oldest record that it still has of an epoch.
///
/// # Errors
/// [`Fault::Number`], [`Fault::Hole`], [`Fault::Epochs`].
pub fn open(known: Known, oldest: u64) -> Result<Opening, Fault> {
    if !(FIRST_SEQ..=MAX_SEQ).contains(&oldest) {
        return Err(Fault::Number(oldest));
    }
    let (expected, restarts) = match known {
        Known::Expecting(next_seq) => (next_seq, false),
        Known::First => (FIRST_SEQ, false),
        Known::Another { begun } if begun >= MAX_NEW_EPOCHS => return Err(Fault::Epochs),
        Known::Another { .. } => (FIRST_SEQ, true),
    };
    match oldest.saturating_sub(expected) {
        0 => Ok(Opening { restarts, next_seq: expected, gap: None }),
        hole if hole > MAX_HOLE => Err(Fault::Hole(hole)),
        _ => Ok(Opening { restarts, next_seq: oldest, gap: Some((expected, oldest - 1)) }),
    }
}

/// Where an item belongs, when `expected` is expected and nothing lies between.
pub fn place(expected: u64, item: &Checked) -> Place<'_> {
    match &item.record {
        record if item.next_seq <= expected => Place::Known(record.as_ref()),
        Some(record) => Place::Next(record),
        // A part of it may be there: what an agent had given up after it was sent.
        None => Place::Gap(expected, item.next_seq - 1),
    }
}

/// Holes that follow each other are one: each costs an item of the history.
fn join_holes(items: Vec<Item>) -> Vec<Item> {
    let mut joined: Vec<Item> = Vec::with_capacity(items.len());
    for item in items {
        if let (Item::Hole(more), Some(Item::Hole(count))) = (&item, joined.last_mut())
            && let Some(sum) = count.checked_add(*more).filter(|sum| *sum <= MAX_HOLE)
        {
            *count = sum;
        } else {
            joined.push(item);
        }
    }
    joined
}

/// Decodes every record of a batch and compares its number with its place.
///
/// # Errors
/// [`Fault`]; the batch is refused as a whole.
pub fn check(first_seq: u64, items: Vec<Item>) -> Result<Vec<Checked>, Fault> {
    if first_seq < FIRST_SEQ {
        return Err(Fault::Number(first_seq));
    }
    let mut seq = first_seq;
    let items = join_holes(items);
    let checked = items.into_iter().map(|item| {
        let at = seq;
        seq = at.saturating_add(item.span());
        if seq > MAX_SEQ {
            return Err(Fault::Number(seq));
        }
        let bytes = match item {
            Item::Hole(count) if count > MAX_HOLE => return Err(Fault::Hole(count)),
            Item::Hole(_) => return Ok(Checked { seq: at, next_seq: seq, record: None }),
            Item::Record(bytes) => bytes,
        };
        let (mut backlog, mut sighting) = (None, None);
        let (says, wall_ns) = match (Record::from_bytes(&bytes), RecordHead::of_newer(&bytes)) {
            (Ok(Record { seq, wall_ns, event, .. }), _) => {
                match &event {
                    Event::Coverage(coverage) => backlog = Some(coverage.backlog),
                    event => sighting = Sighting::of(event).map(Box::new),
                }
                (seq, wall_ns)
            }
            (Err(_), Some(newer)) => (newer.seq, newer.wall_ns),
            (Err(source), None) => return Err(Fault::Record { seq: at, source }),
        };
        if says != at {
            return Err(Fault::Order { at, says });
        }
        let record = Received { wall_ns, backlog, sighting, bytes };
        Ok(Checked { seq: at, next_seq: seq, record: Some(record) })
    });
    checked.collect()
}

#[cfg(test)]
mod tests {
    use netmon_common::model::Coverage;

    use super::*;

    fn opening(next_seq: u64, gap: Option<(u64, u64)>) -> Opening {
        Opening { restarts: false, next_seq, gap }
    }

    fn stopped(seq: u64) -> Item {
        Item::Record(record(seq, Event::AgentStopped))
    }

    fn record(seq: u64, event: Event) -> Vec<u8> {
        Record { seq, run: 1, boot_ns: 0, wall_ns: seq as i64, event }.to_bytes().unwrap()
    }

    #[test]
    fn holes_that_follow_each_other_are_one() {
        let holes = |counts: &[u64]| counts.iter().map(|count| Item::Hole(*count)).collect::<Vec<_>>();
        let spans =
            |checked: Vec<Checked>| checked.iter().map(|item| (item.seq, item.next_seq)).collect::<Vec<_>>();
        assert_eq!(spans(check(5, holes(&[1; 500])).unwrap()), [(5, 505)]);
        let longest = check(1, holes(&[MAX_HOLE, 1, 1])).unwrap();
        assert_eq!(spans(longest), [(1, MAX_HOLE + 1), (MAX_HOLE + 1, MAX_HOLE + 3)]);
    }

    #[test]
    fn an_agent_that_has_everything_goes_on_where_the_server_is() {
        assert_eq!(open(Known::First, 1).unwrap(), opening(1, None));
        assert_eq!(open(Known::Expecting(100), 40).unwrap(), opening(100, None));
        assert_eq!(open(Known::Expecting(100), 100).unwrap(), opening(100, None));
    }

    #[test]
    fn what_an_agent_no_longer_has_is_a_gap_from_the_expected_record_on() {
        assert_eq!(open(Known::Expecting(100), 101).unwrap(), opening(101, Some((100, 100))));
        assert_eq!(open(Known::First, 500).unwrap(), opening(500, Some((1, 499))));
    }

    #[test]
    fn another_history_than_the_known_one_is_a_restart_and_too_many_are_refused() {
        let restart = |next_seq, gap| Opening { restarts: true, next_seq, gap };
        assert_eq!(open(Known::Another { begun: 0 }, 1).unwrap(), restart(1, None));
        assert_eq!(open(Known::Another { begun: 99 }, 3).unwrap(), restart(3, Some((1, 2))));
        assert_eq!(open(Known::Another { begun: 100 }, 1), Err(Fault::Epochs));
    }

    #[test]
    fn impossible_numbers_are_a_fault() {
        assert_eq!(open(Known::First, 0), Err(Fault::Number(0)));
        assert_eq!(open(Known::First, u64::MAX), Err(Fault::Number(u64::MAX)));
        assert_eq!(open(Known::Expecting(2), MAX_HOLE + 3), Err(Fault::Hole(MAX_HOLE + 1)));
        assert!(open(Known::Expecting(2), MAX_HOLE + 2).is_ok());
        assert!(matches!(check(0, vec![stopped(0)]), Err(Fault::Number(_))));
        assert!(matches!(check(MAX_SEQ, vec![stopped(0)]), Err(Fault::Number(_))));
        assert!(matches!(check(u64::MAX, vec![stopped(0)]), Err(Fault::Number(_))));
        assert_eq!(check(2, vec![Item::Hole(MAX_HOLE + 1)]), Err(Fault::Hole(MAX_HOLE + 1)));
    }

    fn item(seq: u64, record: bool, next_seq: u64) -> Checked {
        let received = Received { wall_ns: 0, backlog: None, sighting: None, bytes: Vec::new() };
        Checked { seq, next_seq, record: record.then_some(received) }
    }

    #[test]
    fn an_item_goes_to_its_place_whatever_came_before() {
        assert!(matches!(place(10, &item(10, true, 11)), Place::Next(_)));
        assert!(matches!(place(10, &item(9, true, 10)), Place::Known(Some(_))));
        assert_eq!(place(10, &item(10, false, 15)), Place::Gap(10, 14));
        assert_eq!(place(10, &item(7, false, 15)), Place::Gap(10, 14));
        assert_eq!(place(10, &item(7, false, 10)), Place::Known(None));
    }

    #[test]
    fn any_order_of_overlapping_batches_gives_every_record_once() {
        // Batches of an agent that resends from anywhere below the watermark, and sometimes from above it.
        let batches = [(1, 4), (3, 4), (9, 2), (7, 1), (1, 7), (8, 3), (8, 3), (11, 1)];
        let (mut expected, mut stored) = (FIRST_SEQ, Vec::new());
        for (first, count) in batches {
            if first > expected {
                continue;
            }
            for seq in first..first + count {
                if matches!(place(expected, &item(seq, true, seq + 1)), Place::Next(_)) {
                    stored.push(seq);
                    expected = seq + 1;
                }
            }
        }
        assert_eq!(stored, (1..=11).collect::<Vec<u64>>());
        assert_eq!(expected, 12);
    }

    #[test]
    fn a_record_that_does_not_decode_or_sits_at_another_place_is_a_fault() {
        let good = stopped(5);
        let checked = check(5, vec![good.clone(), Item::Hole(3)]).unwrap();
        assert_eq!(checked[0].record.as_ref().unwrap().wall_ns, 5);
        assert_eq!(checked[1], item(6, false, 9));
        assert_eq!(check(4, vec![good.clone()]), Err(Fault::Order { at: 4, says: 5 }));
        assert_eq!(check(4, vec![Item::Hole(2), good.clone()]), Err(Fault::Order { at: 6, says: 5 }));
        let Item::Record(bytes) = &good else { unreachable!() };
        let cut = Item::Record(bytes[..bytes.len() - 1].to_vec());
        assert!(matches!(check(5, vec![good, cut]), Err(Fault::Record { seq: 6, .. })));
    }

    #[test]
    fn a_record_of_a_newer_agent_is_kept() {
        let newer = postcard::to_stdvec(&(5_u64, 1_u32, 0_u64, -7_i64, 999_u32, "something")).unwrap();
        let checked = check(5, vec![Item::Record(newer.clone())]).unwrap();
        let expected = Received { wall_ns: -7, backlog: None, sighting: None, bytes: newer.clone() };
        assert_eq!(checked[0].record, Some(expected));
        assert_eq!(check(6, vec![Item::Record(newer)]), Err(Fault::Order { at: 6, says: 5 }));
    }

    #[test]
    fn a_heartbeat_tells_the_backlog() {
        let coverage = Event::Coverage(Coverage { backlog: 42, ..Coverage::default() });
        let checked = check(1, vec![Item::Record(record(1, coverage))]).unwrap();
        assert_eq!(checked[0].record.as_ref().unwrap().backlog, Some(42));
    }
}
