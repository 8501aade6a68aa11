//! What the store promises, on a real file.

use std::ops::RangeInclusive;

use jiff::tz::TimeZone;
use netmon_common::model::{Event, Hook, Interface, Record};
use netmon_common::wire::{self, About, Checkpoint};

use super::*;
use crate::ingest::{Checked, Fault, check};
use crate::notice::Notice;
use crate::tokens;

const HOUR: i64 = 3_600_000_000_000;

/// A store in a directory of its own.
pub struct Fixture {
    store: Store,
    directory: tempfile::TempDir,
}

impl Fixture {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::create(&directory.path().join("store.sqlite")).unwrap();
        Self { store, directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn conn(&self) -> &Connection {
        self.store.conn()
    }

    /// Closes the store and opens it again.
    fn reopen(mut self) -> Self {
        let path = self.directory.path().join("store.sqlite");
        drop(self.store);
        self.store = Store::open(&path).unwrap();
        self
    }

    fn token(&self, uses: u32) -> [u8; 32] {
        let (token, stored) = tokens::make("a:1".into(), [0; 32], &[5; 40], uses, HOUR, 0);
        add_token(self.conn(), &stored).unwrap();
        token.secret
    }

    fn enrol(&self, secret: [u8; 32], key: u8, hostname: &str) -> Enrolled {
        let newcomer = Newcomer {
            token_id: [5; 8],
            secret,
            uuid: [key; 16],
            spki_sha256: [key; 32],
            hostname: hostname.into(),
            wanted_seat: Vec::new(),
        };
        enrol(self.conn(), &newcomer, 1, &TimeZone::UTC).unwrap()
    }

    /// A new agent with this label.
    pub fn agent(&self, seat: &str) -> AgentId {
        let [agent] = self.agents([seat]);
        agent
    }

    /// New agents with these labels.
    pub fn agents<const N: usize>(&self, seats: [&str; N]) -> [AgentId; N] {
        let secret = self.token(N as u32);
        let mut key = 0;
        seats.map(|seat| {
            key += 1;
            assert_eq!(self.enrol(secret, key, seat), granted(seat));
            agent_by_key(self.conn(), &[key; 32]).unwrap().unwrap().id
        })
    }

    pub fn append(&self, agent: AgentId, epoch: u64, seqs: RangeInclusive<u64>) -> BatchOutcome {
        append(self.conn(), agent, epoch, *seqs.start(), &records(seqs), 0).unwrap()
    }

    fn seqs(&self, agent: AgentId) -> Vec<u64> {
        let items = items_from(self.conn(), agent, 1, 10_000).unwrap();
        let seq = |item: &Item| match &item.what {
            What::Record { bytes, .. } => Some(Record::from_bytes(bytes).unwrap().seq),
            What::Gap { .. } | What::Notice { .. } => None,
        };
        items.iter().filter_map(seq).collect()
    }
}

fn records(seqs: RangeInclusive<u64>) -> Vec<Checked> {
    let record = |seq: u64| {
        let interface =
            Interface { name: format!("eth{seq}").as_str().into(), index: seq as u32, hook: Hook::Tcx };
        let event = Event::InterfaceDetached(interface);
        Record { seq, run: 1, boot_ns: seq, wall_ns: seq as i64, event }.to_bytes().unwrap()
    };
    check(*seqs.start(), seqs.map(|seq| wire::Item::Record(record(seq))).collect()).unwrap()
}

fn granted(seat: &str) -> Enrolled {
    Enrolled::As { seat: seat.into(), renamed: None }
}

fn stored(through: u64, new: usize) -> BatchOutcome {
    BatchOutcome::Stored { through, new }
}

#[test]
fn a_log_that_is_not_settled_stays_out_of_the_file() {
    let Fixture { store, directory } = Fixture::new();
    let path = directory.path().join("store.sqlite");
    let files =
        || (std::fs::read(&path).unwrap(), std::fs::metadata(log_of(&path)).map_or(0, |log| log.len()));
    add_token(store.conn(), &tokens::make("a:1".into(), [0; 32], &[5; 40], 1, HOUR, 0).1).unwrap();
    drop(store);
    let left = files();
    assert!(left.1 > 0, "the token is in the log");

    let reader = Store::open(&path).unwrap();
    assert_eq!(tokens(reader.conn()).unwrap().len(), 1);
    drop(reader);
    assert_eq!(files(), left);

    let failed = Store::open(&path).unwrap().settled(&path, || Err(std::io::Error::other("sync")));
    assert!(matches!(failed, Err(StoreError::Settle { .. })), "{failed:?}");
    assert_eq!(files(), left);

    drop(Store::open_to_write(&path).unwrap());
    assert_eq!(files(), left, "its last step may have failed");
    Store::open_to_write(&path).unwrap().close();
    let (file, log) = files();
    assert_eq!(log, 0, "what is settled goes into the file with the last connection");
    assert_ne!(file, left.0);
    assert_eq!(tokens(Store::open(&path).unwrap().conn()).unwrap().len(), 1);
}

#[test]
fn a_log_that_grew_while_somebody_read_for_long_is_cut_when_he_is_done() {
    let Fixture { store, directory } = Fixture::new();
    drop(store);
    let path = directory.path().join("store.sqlite");
    let mut store = Store::open_to_write(&path).unwrap();
    let add = |store: &mut Store, id: u8, bytes: i64| {
        let insert = "INSERT INTO tokens VALUES (?1, zeroblob(?2), 0, 0, 1, 1)";
        store.write(|tx| tx.execute(insert, rusqlite::params![[id], bytes])).unwrap();
        std::fs::metadata(log_of(&path)).unwrap().len() as i64
    };
    let mut reader = Store::open(&path).unwrap();
    let moment = reader.conn.transaction().unwrap();
    assert!(tokens(&moment).unwrap().is_empty());
    assert!(add(&mut store, 1, LOG_BYTES + (8 << 20)) > LOG_BYTES);
    drop(moment);
    let longest = (2..6).map(|id| add(&mut store, id, 1)).collect::<Vec<_>>();
    assert!(longest.last().unwrap() <= &LOG_BYTES, "{longest:?}");
}

#[test]
fn a_log_of_several_parts_is_written_again_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    for length in [0, 1, REWRITE_PART, 2 * REWRITE_PART + 7] {
        let bytes: Vec<u8> = (0..length).map(|at| (at / 1000) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        rewrite(&path).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes, "{length}");
    }
}

#[test]
fn a_quarantine_ends_with_its_time_and_with_a_clock_that_was_ahead() {
    const SECOND: i64 = 1_000_000_000;
    let room = Fixture::new();
    let id = room.agent("pc");
    let at = |now_ns| agent_by_id(room.conn(), id).unwrap().unwrap().quarantine(now_ns);
    assert_eq!(at(0), None);
    quarantine(room.conn(), id, 2 * HOUR).unwrap();
    assert_eq!([at(HOUR), at(2 * HOUR - 1)], [Some(2 * HOUR); 2]);
    assert_eq!(at(2 * HOUR), None);
    assert_eq!(at(HOUR - SECOND), None, "none lasts longer than an hour");
}

#[test]
fn a_token_that_was_withdrawn_does_not_come_back_with_a_clock_that_is_set_back() {
    let room = Fixture::new();
    let mut random = [5; 40];
    // Made while the clock was right, and withdrawn while it was behind or ahead; and one of which a use was left.
    for (id, withdrawn_ns, uses) in [(1, HOUR, 1), (2, 9 * HOUR, 1), (3, 2 * HOUR, 30)] {
        random[0] = id;
        let (token, stored) = tokens::make("a:1".into(), [0; 32], &random, uses, 3 * HOUR, 2 * HOUR);
        add_token(room.conn(), &stored).unwrap();
        assert!(withdraw_token(room.conn(), &token.id, withdrawn_ns).unwrap());
        assert!(!withdraw_token(room.conn(), &token.id, withdrawn_ns).unwrap());
        let kept = tokens(room.conn()).unwrap().into_iter().find(|kept| kept.id == token.id).unwrap();
        for now_ns in [0, HOUR / 2, 2 * HOUR, 4 * HOUR, 20 * HOUR] {
            let verdict = tokens::check(Some(&kept), &token.id, &token.secret, now_ns, &TimeZone::UTC);
            assert!(verdict.is_err(), "{id} at {now_ns}");
        }
    }
}

#[test]
fn a_batch_that_comes_twice_is_stored_once() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    assert_eq!(room.append(agent, 7, 1..=3), stored(3, 3));
    assert_eq!(room.append(agent, 7, 1..=3), stored(3, 0));
    assert_eq!(room.append(agent, 7, 2..=5), stored(5, 2));
    assert_eq!(room.seqs(agent), [1, 2, 3, 4, 5]);
}

#[test]
fn a_batch_too_far_ahead_stores_nothing_and_asks_for_the_expected_record() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    assert_eq!(room.append(agent, 7, 2..=3), BatchOutcome::Resume { next_seq: 1 });
    assert!(room.seqs(agent).is_empty());
}

#[test]
fn the_watermark_outlives_the_process_and_a_transaction_that_is_not_committed_never_was() {
    let mut room = Fixture::new();
    let agent = room.agent("pc");
    room.append(agent, u64::MAX, 1..=3);
    {
        let tx = room.store.begin().unwrap();
        append(&tx, agent, u64::MAX, 4, &records(4..=9), 0).unwrap();
    }
    let room = room.reopen();
    assert_eq!(room.seqs(agent), [1, 2, 3]);
    assert_eq!(open_epoch(room.conn(), agent, u64::MAX, 1, 0).unwrap(), Ok(4));
}

#[test]
fn epochs_are_counted_on_their_own_and_shown_in_order_of_arrival() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    room.append(agent, 9, 1..=2);
    room.append(agent, 3, 1..=1);
    room.append(agent, 9, 3..=3);
    assert_eq!(room.seqs(agent), [1, 2, 1, 3]);
}

#[test]
fn a_hole_is_kept_with_its_size_and_moves_the_watermark() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    room.append(agent, 7, 1..=3);
    assert_eq!(open_epoch(room.conn(), agent, 7, 10, 99).unwrap(), Ok(10));
    assert_eq!(open_epoch(room.conn(), agent, 7, 10, 99).unwrap(), Ok(10), "told twice, kept once");
    room.append(agent, 7, 10..=10);
    let items = items_from(room.conn(), agent, 1, 100).unwrap();
    assert_eq!(items.iter().map(|item| item.n).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert_eq!(items[3].what, What::Gap { count: Some(6), since_ns: 3, noticed_ns: 99 });
    let summary = &summaries(room.conn()).unwrap()[0];
    assert_eq!((summary.gaps, summary.gap_records), (1, 6));
}

#[test]
fn an_agent_that_names_absurd_holes_is_at_fault_and_nothing_is_kept() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    let fault = open_epoch(room.conn(), agent, 1, i64::MAX as u64, 0).unwrap();
    assert_eq!(fault, Err(Fault::Hole(i64::MAX as u64 - 1)));
    assert_eq!(summaries(room.conn()).unwrap()[0].gaps, 0);
}

#[test]
fn another_history_is_a_gap_of_unknown_size_once() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    assert_eq!(open_epoch(room.conn(), agent, 7, 1, 50).unwrap(), Ok(1));
    assert_eq!(open_epoch(room.conn(), agent, 7, 1, 51).unwrap(), Ok(1));
    assert_eq!(summaries(room.conn()).unwrap()[0].gaps, 0, "the first history is none");
    room.append(agent, 7, 1..=3);
    for hello in 0..2 {
        assert_eq!(open_epoch(room.conn(), agent, 8, 1, 99 + hello).unwrap(), Ok(1));
    }
    assert_eq!(open_epoch(room.conn(), agent, 7, 4, 110).unwrap(), Ok(4), "the old one is known");
    room.append(agent, 8, 1..=1);
    let items = items_from(room.conn(), agent, 1, 100).unwrap();
    assert_eq!(items.iter().map(|item| item.n).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert_eq!(items[3].what, What::Gap { count: None, since_ns: 3, noticed_ns: 99 });
    let summary = &summaries(room.conn()).unwrap()[0];
    assert_eq!((summary.gaps, summary.gap_records, summary.restarts), (1, 0, 1));
}

#[test]
fn an_agent_that_begins_histories_without_end_is_refused_for_a_while() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    for epoch in 0..=100 {
        assert_eq!(open_epoch(room.conn(), agent, epoch, 1, 99).unwrap(), Ok(1));
    }
    assert_eq!(open_epoch(room.conn(), agent, 101, 1, 100).unwrap(), Err(Fault::Epochs));
    assert_eq!(open_epoch(room.conn(), agent, 50, 1, 100).unwrap(), Ok(1), "the known ones go on");
    assert_eq!(open_epoch(room.conn(), agent, 101, 1, 100 + HOUR).unwrap(), Ok(1));
    assert_eq!(summaries(room.conn()).unwrap()[0].gaps, 101);
}

#[test]
fn a_spool_that_was_set_back_and_counts_anew_is_not_taken_for_duplicates() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    room.append(agent, 7, 1..=3);
    let mut other = records(3..=4);
    other[0].record.as_mut().unwrap().bytes[1] ^= 1;
    let outcome = append(room.conn(), agent, 7, 3, &other, 0).unwrap();
    assert_eq!(outcome, BatchOutcome::Rewritten { seq: 3 });
    assert_eq!(room.seqs(agent), [1, 2, 3]);
}

#[test]
fn a_token_enrols_as_many_pcs_as_it_was_made_for() {
    let room = Fixture::new();
    let secret = room.token(2);
    assert_eq!(room.enrol(secret, 1, "ubuntu"), granted("ubuntu"));
    assert_eq!(room.enrol(secret, 2, "Ubuntu"), granted("Ubuntu-2"));
    let Enrolled::Refused(why) = room.enrol(secret, 3, "ubuntu") else { panic!("enrolled a third") };
    assert!(why.contains("already used 2 of 2 times"), "{why}");
}

#[test]
fn a_refused_enrolment_costs_no_use() {
    let room = Fixture::new();
    let secret = room.token(1);
    assert!(matches!(room.enrol([0; 32], 1, "pc"), Enrolled::Refused(_)));
    assert_eq!(room.enrol(secret, 1, "pc"), granted("pc"));
}

#[test]
fn one_key_is_one_agent() {
    let room = Fixture::new();
    let secret = room.token(3);
    room.enrol(secret, 1, "pc");
    let agent = agent_by_key(room.conn(), &[1; 32]).unwrap().unwrap().id;
    open_epoch(room.conn(), agent, 7, 1, 0).unwrap().unwrap();
    let Enrolled::Refused(why) = room.enrol(secret, 1, "pc") else { panic!("enrolled twice") };
    assert!(why.contains("already, as seat pc"), "{why}");
}

#[test]
fn a_key_whose_reply_was_lost_is_granted_its_seat_again_without_a_use() {
    let room = Fixture::new();
    let secret = room.token(2);
    assert_eq!(room.enrol(secret, 1, "pc"), granted("pc"));
    assert_eq!(room.enrol(secret, 1, "pc"), granted("pc"));
    assert_eq!(room.enrol(secret, 2, "pc"), granted("pc-2"));
    assert_eq!(room.enrol(secret, 1, "pc"), granted("pc"), "the token is used up");
    assert!(matches!(room.enrol([0; 32], 1, "pc"), Enrolled::Refused(_)), "the wrong secret");
    let agent = agent_by_key(room.conn(), &[1; 32]).unwrap().unwrap().id;
    revoke(room.conn(), agent, 9).unwrap();
    assert!(matches!(room.enrol(secret, 1, "pc"), Enrolled::Refused(_)), "revoked");
}

#[test]
fn a_revoked_agents_label_goes_to_the_newcomer_that_asks_for_it() {
    let room = Fixture::new();
    let secret = room.token(3);
    let mut ids = Vec::new();
    for key in 1..=3 {
        let Enrolled::As { seat, renamed } = room.enrol(secret, key, "PC") else { panic!("refused") };
        assert_eq!((seat.as_str(), renamed), ("PC", ids.last().copied()));
        let agent = agent_by_key(room.conn(), &[key; 32]).unwrap().unwrap().id;
        revoke(room.conn(), agent, 9).unwrap();
        ids.push(agent);
    }
    let seats: Vec<_> = ids.iter().map(|id| agent_by_id(room.conn(), *id).unwrap().unwrap().seat).collect();
    assert_eq!(seats, ["PC-old", "PC-old-2", "PC"]);
}

#[test]
fn a_revoked_agent_is_not_allowed_but_its_history_stays() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    room.append(agent, 7, 1..=3);
    connected(room.conn(), agent, 4, &"pc".into(), &"1".into(), 5).unwrap();
    assert!(is_allowed(room.conn(), agent).unwrap());
    assert!(revoke(room.conn(), agent, 9).unwrap());
    assert!(!revoke(room.conn(), agent, 10).unwrap(), "already");
    assert!(!is_allowed(room.conn(), agent).unwrap());
    assert_eq!(revoked_connections(room.conn()).unwrap(), [(agent, 4)]);
    assert_eq!(room.seqs(agent), [1, 2, 3]);
}

#[test]
fn the_end_of_an_older_connection_does_not_end_the_newer_one() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    connected(room.conn(), agent, 1, &"pc".into(), &"1".into(), 5).unwrap();
    connected(room.conn(), agent, 2, &"pc".into(), &"1".into(), 6).unwrap();
    connected(room.conn(), agent, 1, &"pc".into(), &"1".into(), 7).unwrap();
    disconnected(room.conn(), agent, 1, 7).unwrap();
    assert_eq!(summaries(room.conn()).unwrap()[0].connected_ns, Some(6));
    disconnected(room.conn(), agent, 2, 8).unwrap();
    let summary = &summaries(room.conn()).unwrap()[0];
    assert_eq!((summary.connected_ns, summary.seen_ns), (None, Some(8)));
}

#[test]
fn a_seat_is_found_by_label_or_by_the_start_of_its_uuid() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    for name in ["pc", "PC", "0101", "01010101-0101"] {
        assert_eq!(find_seat(room.conn(), name).unwrap()[0].id, agent, "{name}");
    }
    for name in ["p", "01", "0202", "%", ""] {
        assert!(find_seat(room.conn(), name).unwrap().is_empty(), "{name}");
    }
}

#[test]
fn another_database_and_a_newer_store_are_not_touched() {
    let room = Fixture::new();
    let path = room.path().join("store.sqlite");
    room.conn().pragma_update(None, "user_version", 4).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Version { found: 4, .. })));
    assert!(matches!(Store::create(&path), Err(StoreError::Version { found: 4, .. })));
    room.conn().pragma_update(None, "application_id", 1).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::NotAStore(_))));
}

/// Checks a history against its chain, as `verify` does.
fn assert_chained(conn: &Connection, agent: AgentId) {
    let uuid = agent_by_id(conn, agent).unwrap().unwrap().uuid;
    let items = history::stored_from(conn, agent, 1, 10_000).unwrap();
    let mut head = crate::chain::start(&uuid);
    for (item, n) in items.iter().zip(1..) {
        assert_eq!(item.n, n);
        head = crate::chain::link(&head, n as u64, &item.entry());
        assert_eq!(item.link, crate::chain::short(&head), "item {n}");
    }
    assert_eq!(history::size_and_head(conn, agent).unwrap(), (items.len() as u64, head));
}

#[test]
fn records_gaps_and_notices_are_one_chain() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    open_epoch(room.conn(), agent, 7, 3, 0).unwrap().unwrap();
    room.append(agent, 7, 3..=5);
    history::add_notice(room.conn(), agent, &Notice::Missing { since_ns: 1 }, 2).unwrap();
    room.append(agent, 7, 4..=9);
    assert_eq!(items_from(room.conn(), agent, 1, 100).unwrap().len(), 1 + 3 + 1 + 4);
    assert_chained(room.conn(), agent);
}

#[test]
fn a_hole_in_a_batch_is_a_gap_of_its_own() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    let item = |seq: u64| records(seq..=seq).remove(0);
    let hole = |seq, next_seq| Checked { seq, next_seq, record: None };
    let items = [item(1), hole(2, 5), item(5)];
    assert_eq!(append(room.conn(), agent, 7, 1, &items, 0).unwrap(), stored(5, 2));
    // The same again, and a hole over what is there.
    assert_eq!(append(room.conn(), agent, 7, 1, &items, 0).unwrap(), stored(5, 0));
    assert_eq!(append(room.conn(), agent, 7, 1, &[hole(1, 8)], 0).unwrap(), stored(7, 0));
    assert_eq!(room.seqs(agent), [1, 5]);
    let counts: Vec<_> = items_from(room.conn(), agent, 1, 10)
        .unwrap()
        .into_iter()
        .filter_map(|item| match item.what {
            What::Gap { count, .. } => count,
            _ => None,
        })
        .collect();
    assert_eq!(counts, [3, 2]);
    assert_chained(room.conn(), agent);
}

#[test]
fn a_store_of_format_1_is_brought_to_this_one_and_keeps_everything() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.sqlite");
    let old = Connection::open(&path).unwrap();
    old.execute_batch(include_str!("schema_1.sql")).unwrap();
    old.pragma_update(None, "application_id", APPLICATION_ID).unwrap();
    old.pragma_update(None, "user_version", 1).unwrap();
    old.execute_batch(
        "INSERT INTO agents (id, uuid, seat, spki_sha256, hostname, enrolled_ns, next_n)
             VALUES (1, zeroblob(16), 'pc', zeroblob(32), x'', 0, 4);
         INSERT INTO epochs VALUES (1, 7, 4);
         INSERT INTO gaps VALUES (1, 2, 7, 2, 2, 0, 0);",
    )
    .unwrap();
    for (n, record) in [(1, &records(1..=1)[0]), (3, &records(3..=3)[0])] {
        let bytes = &record.record.as_ref().unwrap().bytes;
        old.execute(
            "INSERT INTO events (agent, n, epoch, seq, wall_ns, received_ns, record) VALUES (1, ?1, 7, ?1, 0, 0, ?2)",
            rusqlite::params![n, bytes],
        )
        .unwrap();
    }
    drop(old);
    assert!(
        matches!(Store::open(&path), Err(StoreError::Version { found: 1, .. })),
        "a server may run on it"
    );
    let store = Store::open_or_migrate(&path).unwrap();
    assert_chained(store.conn(), AgentId(1));
    assert_eq!(append(store.conn(), AgentId(1), 7, 4, &records(4..=4), 0).unwrap(), stored(4, 1));
    assert_chained(store.conn(), AgentId(1));
    let columns = |conn: &Connection| -> Vec<String> {
        let mut names = conn.prepare("SELECT group_concat(t.name || '.' || c.name, ' ') FROM sqlite_schema t, pragma_table_info(t.name) c WHERE t.type = 'table' GROUP BY t.name ORDER BY t.name").unwrap();
        let mut names: Vec<String> =
            names.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
        names.iter_mut().for_each(|names| {
            let mut sorted: Vec<_> = names.split(' ').collect();
            sorted.sort_unstable();
            *names = sorted.join(" ");
        });
        names
    };
    assert_eq!(columns(store.conn()), columns(Fixture::new().conn()), "as if it had been made anew");
}

#[test]
fn a_renewed_key_takes_over_when_it_is_used_and_not_before() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    renew(room.conn(), agent, &[2; 32]).unwrap();
    let owner = |key: u8| agent_by_key(room.conn(), &[key; 32]).unwrap().map(|agent| agent.id);
    used_key(room.conn(), agent, &[1; 32]).unwrap();
    assert_eq!([owner(1), owner(2)], [Some(agent); 2]);
    used_key(room.conn(), agent, &[2; 32]).unwrap();
    assert_eq!([owner(1), owner(2)], [None, Some(agent)]);
}

#[test]
fn a_checkpoint_that_the_store_does_not_have_shows_that_it_was_set_back() {
    let room = Fixture::new();
    let agent = room.agent("pc");
    room.append(agent, 7, 1..=3);
    let (size, head) = history::size_and_head(room.conn(), agent).unwrap();
    let checkpoint = Checkpoint { size, head, signed_ns: 5, signature: [[0; 32]; 2] };
    history::add_checkpoint(room.conn(), agent, &checkpoint).unwrap();
    assert_eq!(history::newest_checkpoint(room.conn(), agent).unwrap(), Some(checkpoint.clone()));
    let notices = |witness: &Checkpoint| {
        let about = About {
            agent_version: "1".into(),
            hostname: "pc".into(),
            boot_id: [1; 16],
            run: 1,
            previous_died: false,
            instance: 1,
            connect: 1,
            witness: Some(witness.clone()),
        };
        let before = size_of_history(&room, agent);
        introduced(room.conn(), agent, &about, 9).unwrap();
        size_of_history(&room, agent) - before
    };
    assert_eq!(notices(&checkpoint), 0);
    assert_eq!(notices(&Checkpoint { size: 4, ..checkpoint.clone() }), 1);
    assert_eq!(notices(&Checkpoint { head: [0; 32], ..checkpoint }), 1);
}

fn size_of_history(room: &Fixture, agent: AgentId) -> u64 {
    history::size_and_head(room.conn(), agent).unwrap().0
}
