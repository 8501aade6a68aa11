//! Version 2 of the protocol: who is heard, who is missing and why; clones; renewal; what can be proved later.

use std::path::Path;
use std::process::Output;

use netmon_common::enroll::{Hex, unhex};
use netmon_common::model::Coverage;
use netmon_common::wire::{self, About, Checkpoint, Heartbeat, Item, Newest, Open, ToAgent, ToServer};
use netmon_server::chain::{self, Entry};
use netmon_server::notice::Notice;
use netmon_server::store::{self, history};
use rcgen::KeyPair;
use rusqlite::Connection;
use serde_json::{Value, json};

use crate::harness::{
    Agent, Server, Session, about, patience, record, run, signing_request, stderr, stdout, success, token,
};

const EPOCH: u64 = 7;

struct Room {
    data: tempfile::TempDir,
    server: Option<Server>,
}

impl Room {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        success(data.path(), &["init"]);
        let server = Some(Server::start(data.path()));
        Self { data, server }
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    async fn agent(&self, seat: &str) -> Agent {
        Agent::enrol(&token(self.data.path(), self.server(), &[]), seat).await.unwrap()
    }

    fn log(&self, seat: &str) -> String {
        success(self.data.path(), &["log", seat])
    }

    /// Waits until the seat's log has a line with this.
    async fn logs(&self, seat: &str, part: &str) -> String {
        let look = async {
            loop {
                let log = self.log(seat);
                if let Some(line) = log.lines().find(|line| line.contains(part)) {
                    return line.to_owned();
                }
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        patience(look).await
    }

    /// In good order: everything is signed.
    fn stop(&mut self) {
        assert_eq!(self.server.take().unwrap().stop(), 0);
    }

    fn store(&self) -> Connection {
        Connection::open(self.data.path().join("store.sqlite")).unwrap()
    }

    fn verify(&self) -> Output {
        run(self.data.path(), &["verify"])
    }

    fn export(&self, seat: &str) -> String {
        success(self.data.path(), &["export", seat])
    }

    /// Adds to a seat's history what the server might have; it must not run.
    fn add(&self, seat: &str, add: impl FnOnce(&mut history::History<'_>)) {
        let store = self.store();
        let agent = store::find_seat(&store, seat).unwrap().remove(0);
        let mut history = history::History::open(&store, agent.id).unwrap();
        add(&mut history);
        history.close().unwrap();
    }

    fn notice(&self, seat: &str, notice: &Notice) {
        self.add(seat, |history| history.notice(notice, wall_ns()).unwrap());
    }
}

/// `verify --file` where nobody knows the server.
fn verify_file(exported: &str, more: &[&str]) -> Output {
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("pc.history");
    std::fs::write(&file, exported).unwrap();
    verify_at(&file, more)
}

fn verify_at(file: &Path, more: &[&str]) -> Output {
    let arguments = [&["verify", "--file", file.to_str().unwrap()], more].concat();
    run(file.parent().unwrap(), &arguments)
}

fn hello(epoch: u64) -> ToServer {
    ToServer::Open(Open { epoch, oldest_seq: 1, next_seq: 1000 })
}

fn beat(wall_ns: i64) -> ToServer {
    ToServer::Heartbeat(Heartbeat { boot_ns: 1, wall_ns, ..Heartbeat::default() })
}

fn wall_ns() -> i64 {
    netmon_server::clock::wall_ns()
}

/// Delivers records 1 to 5.
async fn deliver(session: &mut Session) {
    assert_eq!(session.ask(&hello(EPOCH)).await, ToAgent::Expect { next_seq: 1, last: None });
    let ack = session.batch(EPOCH, 1..=5).await.unwrap();
    assert_eq!(ack, ToAgent::Ack { epoch: EPOCH, seq: 5 });
}

#[tokio::test]
async fn a_pc_that_falls_silent_is_missing_and_its_next_life_says_why() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let mut session = agent.introduce(room.server(), about()).await;
    deliver(&mut session).await;
    let ToAgent::Heard { server_ns, checkpoint: None } = session.ask(&beat(wall_ns())).await else {
        panic!("not heard")
    };
    assert!(server_ns.abs_diff(wall_ns()) < 10_000_000_000);
    // The connection stays up, but nobody says that it watches.
    let line = room.logs("pc", " SERVER MISSING: nothing heard since ").await;
    let heard_ns: Option<i64> =
        room.store().query_row("SELECT missing_ns FROM agents", [], |row| row.get(0)).unwrap();
    assert!(heard_ns.unwrap().abs_diff(server_ns) < 1_000_000_000, "{line}");
    let agents = success(room.data.path(), &["agents"]);
    assert!(agents.contains("MISSING since "), "{agents}");

    let next = About { boot_id: [2; 16], run: 2, previous_died: true, instance: 2, ..about() };
    let _session = agent.introduce(room.server(), next).await;
    let line = room.logs("pc", " SERVER back after ").await;
    assert!(line.contains("without shutting down"), "{line}");
    assert!(!success(room.data.path(), &["agents"]).contains("MISSING"));
}

#[tokio::test]
async fn a_hello_is_answered_with_what_the_newest_record_looks_like_and_holes_are_gaps() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let mut session = agent.introduce(room.server(), about()).await;
    deliver(&mut session).await;
    let known = |seq| Some(Newest { seq, fingerprint: wire::fingerprint(&record(seq).to_bytes().unwrap()) });
    assert_eq!(session.ask(&hello(EPOCH)).await, ToAgent::Expect { next_seq: 6, last: known(5) });
    // A spool that ends before that is told of its own end, and one that has lost more of the newest record.
    let shorter = Open { epoch: EPOCH, oldest_seq: 1, next_seq: 4 };
    let answer = session.ask(&ToServer::Open(shorter)).await;
    assert_eq!(answer, ToAgent::Expect { next_seq: 6, last: known(3) });
    let mut batch = wire::BatchBuilder::default();
    assert!(batch.push(&Item::Hole(10)) && batch.push(&Item::Record(record(16).to_bytes().unwrap())));
    let batch = ToServer::Batch(batch.finish(EPOCH, 6).unwrap());
    assert_eq!(session.ask(&batch).await, ToAgent::Ack { epoch: EPOCH, seq: 16 });
    assert!(room.log("pc").contains("records never came from this PC, 10 records"));
    let longer = Open { epoch: EPOCH, oldest_seq: 20, next_seq: 30 };
    let answer = session.ask(&ToServer::Open(longer)).await;
    assert_eq!(answer, ToAgent::Expect { next_seq: 20, last: known(16) });
}

#[tokio::test]
async fn a_pcs_clock_that_is_off_is_noticed() {
    let room = Room::new();
    // 1970 and 2038.
    for (seat, clock, says) in [("early", 0, "s behind"), ("late", 2_145_916_800_000_000_000, "s ahead of")] {
        let mut session = room.agent(seat).await.introduce(room.server(), about()).await;
        // One heartbeat alone may be late.
        for _ in 0..2 {
            assert!(matches!(session.ask(&beat(clock)).await, ToAgent::Heard { .. }));
        }
        room.logs(seat, &format!("{says} the server's")).await;
    }
}

#[tokio::test]
async fn a_process_that_comes_back_behind_another_one_is_a_clone() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let mut first = agent.introduce(room.server(), about()).await;
    // Its introduction is taken in before the next one comes.
    assert!(matches!(first.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    let mut second = agent.introduce(room.server(), About { instance: 2, ..about() }).await;
    assert!(first.closed().await.contains("connected again"));
    assert!(matches!(second.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    assert!(!room.log("pc").contains("CLONE"), "a restart is none");
    let mut back = agent.introduce(room.server(), About { connect: 2, ..about() }).await;
    assert!(matches!(back.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    room.logs("pc", " SERVER CLONE: two machines use this agent's identity").await;
}

#[tokio::test]
async fn a_certificate_is_renewed_for_a_new_key_and_the_old_one_ends_with_its_use() {
    let room = Room::new();
    let mut agent = room.agent("pc").await;
    let key = KeyPair::generate().unwrap();
    let renew = ToServer::Renew { csr_der: signing_request(&key) };
    // Not for one that is young: a copied key must not be able to leave its owner without one at any time.
    let mut session = agent.introduce(room.server(), about()).await;
    assert_eq!(session.ask(&renew).await, ToAgent::Renewed { certificate_der: Vec::new() });
    agent.age(room.data.path(), 21);
    let mut session = agent.introduce(room.server(), About { connect: 2, ..about() }).await;
    let answer = session.ask(&renew).await;
    let ToAgent::Renewed { certificate_der } = answer else { panic!("{answer:?}") };
    assert!(!certificate_der.is_empty());
    room.logs("pc", " SERVER certificate renewed, valid until ").await;

    // Until the new one is used, the old one still is: the answer may have been lost.
    let mut session = agent.introduce(room.server(), About { connect: 3, ..about() }).await;
    assert!(matches!(session.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    let old = std::mem::replace(&mut agent.key, key);
    let old_certificate = std::mem::replace(&mut agent.granted.certificate_der, certificate_der);
    let mut session = agent.introduce(room.server(), About { connect: 4, ..about() }).await;
    assert!(matches!(session.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    agent.key = old;
    agent.granted.certificate_der = old_certificate;
    let mut session = agent.introduce(room.server(), About { connect: 5, ..about() }).await;
    let ToAgent::Refused { reason } = session.ask(&beat(wall_ns())).await else { panic!("let in") };
    assert!(reason.escaped().to_string().contains("there is a copy of its identity"), "{reason:?}");
    room.logs("pc", " SERVER CLONE: two machines use this agent's identity").await;
}

#[tokio::test]
async fn who_spoke_the_newer_version_cannot_fall_back_to_the_one_without_heartbeats() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let mut session = agent.introduce(room.server(), about()).await;
    assert!(matches!(session.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    let mut older = agent.connect(room.server()).await.unwrap();
    let answer = older.hello(EPOCH, 1).await;
    let Ok(ToAgent::Refused { reason }) = answer else { panic!("{answer:?}") };
    assert!(reason.escaped().to_string().contains("spoke version 2"), "{reason:?}");
}

#[tokio::test]
async fn a_heartbeat_names_no_more_interfaces_than_are_told() {
    let room = Room::new();
    let mut session = room.agent("pc").await.introduce(room.server(), about()).await;
    let mut heartbeat = Heartbeat { boot_ns: 1, wall_ns: wall_ns(), ..Heartbeat::default() };
    heartbeat.coverage.interfaces = vec!["x".into(); Coverage::MAX_INTERFACES];
    assert!(matches!(session.ask(&ToServer::Heartbeat(heartbeat.clone())).await, ToAgent::Heard { .. }));
    heartbeat.coverage.interfaces.push("x".into());
    session.say(&ToServer::Heartbeat(heartbeat)).await;
    assert!(session.closed().await.contains("too many interfaces"));
}

#[tokio::test]
async fn a_history_that_lacks_what_was_signed_before_is_not_signed_again() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    deliver(&mut agent.introduce(room.server(), about()).await).await;
    room.stop();
    room.server = Some(Server::start(room.data.path()));
    let mut session = agent.introduce(room.server(), About { instance: 2, ..about() }).await;
    assert!(matches!(session.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    // Whoever wants to write the history anew has to take the signatures out of the way.
    room.store().execute("DELETE FROM checkpoints", []).unwrap();
    assert_eq!(session.ask(&hello(EPOCH + 1)).await, ToAgent::Expect { next_seq: 1, last: None });
    room.stop();
    let signed: i64 =
        room.store().query_row("SELECT count(*) FROM checkpoints", [], |row| row.get(0)).unwrap();
    assert_eq!(signed, 0);
    room.logs("pc", " SERVER TAMPERED: ").await;
}

/// Everything that can be done to a store behind the server's back is named by `verify`.
#[tokio::test]
async fn a_history_that_was_changed_is_found_and_the_first_bad_item_is_named() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    deliver(&mut agent.introduce(room.server(), about()).await).await;
    room.stop();
    let good = room.verify();
    assert!(good.status.success(), "{}", stderr(&good));
    let said = stdout(&good);
    assert!(said.contains("pc: 5 items, complete and unedited; the first 5 signed, last at "), "{said}");

    let path = room.data.path().join("store.sqlite");
    let untouched = std::fs::read(&path).unwrap();
    for (change, says) in [
        ("UPDATE events SET record = CAST(record || x'00' AS BLOB) WHERE n = 3", "item 3 (record 3 of epoch"),
        ("UPDATE events SET received_ns = received_ns + 1 WHERE n = 5", "item 5 (record 5 of epoch"),
        ("DELETE FROM events WHERE n = 2", "item 2 is missing"),
        (
            "DELETE FROM events WHERE n = 5",
            "the end was cut off: this server signed for 5 items, 4 are there",
        ),
        ("UPDATE agents SET next_n = 9", "the end does not fit"),
        ("UPDATE checkpoints SET head = zeroblob(32)", "is not signed by this server"),
    ] {
        room.store().execute(change, []).unwrap();
        let bad = room.verify();
        assert_eq!(bad.status.code(), Some(1), "{change}");
        assert!(
            stdout(&bad).contains(&format!("pc: BAD: {says}")) || stdout(&bad).contains(says),
            "{}",
            stdout(&bad)
        );
        std::fs::write(&path, &untouched).unwrap();
    }
    assert!(room.verify().status.success());
}

#[tokio::test]
async fn an_exported_history_is_verified_elsewhere_and_a_changed_one_is_not() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    deliver(&mut agent.introduce(room.server(), about()).await).await;
    room.stop();
    let exported = room.export("pc");
    let fingerprint = stdout(&room.verify()).trim().rsplit(' ').next().unwrap().to_owned();

    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("pc.history");
    let path = file.to_str().unwrap();
    std::fs::write(&file, &exported).unwrap();
    let arguments = ["verify", "--file", path, "--ca", &fingerprint];
    let said = success(elsewhere.path(), &arguments);
    assert!(said.starts_with("pc: 5 items, complete and unedited as of 20"), "{said}");
    assert!(said.contains("; the first 5 signed before, last at 20"), "{said}");
    let shown = verify_at(&file, &["--print"]);
    assert!(shown.status.success());
    assert_eq!(stdout(&shown), room.log("pc"), "the same lines");
    assert!(stderr(&shown).starts_with(&said), "and the verdict beside them: {}", stderr(&shown));
    let other = run(elsewhere.path(), &["verify", "--file", path, "--ca", &"0".repeat(64)]);
    assert!(stderr(&other).contains("it is from the server with CA fingerprint"), "{}", stderr(&other));

    let lines: Vec<_> = exported.lines().collect();
    let without = |at: usize| {
        let kept = lines.iter().enumerate().filter(|(line, _)| *line != at).map(|(_, line)| *line);
        kept.collect::<Vec<_>>().join("\n") + "\n"
    };
    for at in 0..lines.len() {
        std::fs::write(&file, without(at)).unwrap();
        let verdict = run(elsewhere.path(), &arguments);
        assert!(!verdict.status.success(), "line {at}: {}", stdout(&verdict));
        assert!(!stderr(&verdict).contains("signed by the server"), "line {at}: {}", stderr(&verdict));
    }
    // Behind the first line: of that, the CA is compared by its key.
    for at in (lines[0].len()..exported.len()).step_by(97) {
        let mut bytes = exported.clone().into_bytes();
        bytes[at] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        let verdict = run(elsewhere.path(), &arguments);
        assert!(!verdict.status.success(), "byte {at}: {}", stdout(&verdict));
    }
}

/// An export with its lines taken apart.
struct Exported(Vec<Value>);

impl Exported {
    fn new(text: &str) -> Self {
        Self(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn text(&self) -> String {
        self.0.iter().map(|line| format!("{line}\n")).collect()
    }

    fn header(&mut self) -> &mut Value {
        &mut self.0[0]["netmon"]
    }

    fn end(&mut self) -> &mut Value {
        &mut self.0.last_mut().unwrap()["end"]
    }

    fn without_checkpoints(mut self) -> Self {
        self.0.retain(|line| line.get("checkpoint").is_none());
        self
    }

    /// What somebody does who has everything but the key: places, links and the end are made anew.
    fn relinked(mut self) -> Self {
        let agent = self.header()["agent"].as_str().unwrap().replace('-', "");
        let (mut head, mut size) = (chain::start(&unhex(&agent).unwrap()), 0);
        for line in &mut self.0 {
            let Some(item) = line.get_mut("record") else { continue };
            let hex = item["bytes"].as_str().unwrap().as_bytes().chunks(2);
            let bytes: Vec<u8> =
                hex.map(|two| unhex::<1>(std::str::from_utf8(two).unwrap()).unwrap()[0]).collect();
            let entry = Entry::Record {
                epoch: item["epoch"].as_u64().unwrap(),
                seq: item["seq"].as_u64().unwrap(),
                received_ns: item["received_ns"].as_i64().unwrap(),
                bytes: &bytes,
            };
            size += 1;
            head = chain::link(&head, size, &entry);
            item["n"] = json!(size);
            item["link"] = json!(chain::short(&head));
        }
        self.end()["size"] = json!(size);
        self.end()["head"] = json!(Hex(&head).to_string());
        self
    }
}

const UNSIGNED: &str = "BAD: this export is not signed at its end: it was shortened, or edited";

/// The chain has no secret, and checkpoints can be left out: that nothing follows must be signed, too.
#[tokio::test]
async fn an_export_whose_chain_and_end_were_made_anew_is_not_signed_at_its_end() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    deliver(&mut agent.introduce(room.server(), about()).await).await;
    room.stop();
    let exported = room.export("pc");
    let unchanged = Exported::new(&exported).relinked();
    assert!(verify_file(&unchanged.text(), &[]).status.success(), "the test makes the same chain");

    let record = |n: usize| move |e: &Exported| e.0.iter().position(|l| l["record"]["n"] == n).unwrap();
    let changes: [&dyn Fn(&mut Exported); 5] = [
        &|e| {
            let at = record(4)(e);
            e.0[at]["record"]["received_ns"] = json!(1);
        },
        &|e| drop(e.0.remove(record(4)(e))),
        &|e| {
            let (at, end) = (record(4)(e), e.0.len() - 1);
            e.0.drain(at..end);
        },
        &|e| {
            let (from, end) = (record(1)(e), e.0.len() - 1);
            e.0.drain(from..end);
        },
        // Nothing but the checkpoints.
        &|_| {},
    ];
    for (number, change) in changes.iter().enumerate() {
        for keeps_signature in [true, false] {
            let mut forged = Exported::new(&exported).without_checkpoints();
            change(&mut forged);
            let mut forged = forged.relinked();
            if !keeps_signature {
                forged.end().as_object_mut().unwrap().remove("signed").unwrap();
            }
            for more in [&[][..], &["--print"]] {
                let verdict = verify_file(&forged.text(), more);
                let said = stdout(&verdict) + &stderr(&verdict);
                assert_eq!(verdict.status.code(), Some(1), "change {number}: {said}");
                assert!(said.contains(UNSIGNED), "change {number}: {said}");
                assert!(!said.contains("signed by the server"), "change {number}: {said}");
            }
        }
    }
    // As an older netmon wrote it.
    let mut old = Exported::new(&exported);
    old.header()["history"] = json!(1);
    old.end().as_object_mut().unwrap().remove("signed").unwrap();
    let verdict = verify_file(&old.text(), &[]);
    assert_eq!(verdict.status.code(), Some(1));
    assert!(stdout(&verdict).contains("or made by an older netmon; export it again"), "{}", stdout(&verdict));
}

#[tokio::test]
async fn exports_whose_labels_were_swapped_are_both_bad() {
    let mut room = Room::new();
    for seat in ["pc-1", "pc-2"] {
        let agent = room.agent(seat).await;
        deliver(&mut agent.introduce(room.server(), about()).await).await;
    }
    room.stop();
    for (seat, other) in [("pc-1", "pc-2"), ("pc-2", "pc-1")] {
        let exported = room.export(seat);
        assert!(verify_file(&exported, &[]).status.success());
        let mut swapped = Exported::new(&exported);
        swapped.header()["seat"] = json!(other);
        let verdict = verify_file(&swapped.text(), &[]);
        assert_eq!(verdict.status.code(), Some(1), "{}", stdout(&verdict));
        let says = format!("it says seat \"{other}\", the server signed \"{seat}\"");
        assert!(stdout(&verdict).contains(&says), "{}", stdout(&verdict));
        // In the signed end, too; and with the other one's end.
        swapped.end()["signed"]["seat"] = json!(other);
        let verdict = verify_file(&swapped.text(), &[]);
        assert_eq!(verdict.status.code(), Some(1));
        assert!(stdout(&verdict).contains(UNSIGNED), "{}", stdout(&verdict));
        let signed = Exported::new(&room.export(other)).end()["signed"].take();
        swapped.end()["signed"] = signed;
        let verdict = verify_file(&swapped.text(), &[]);
        assert_eq!(verdict.status.code(), Some(1));
        assert!(stdout(&verdict).contains(UNSIGNED), "{}", stdout(&verdict));
    }
}

#[tokio::test]
async fn what_the_server_noticed_against_a_history_makes_it_bad_in_the_store_and_in_an_export() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    deliver(&mut agent.introduce(room.server(), about()).await).await;
    room.stop();
    room.notice("pc", &Notice::StoreSetBack { size: 9, signed_ns: 0 });
    // Signed, as everything is.
    room.server = Some(Server::start(room.data.path()));
    room.stop();
    let exported = room.export("pc");
    for verdict in [room.verify(), verify_file(&exported, &[]), verify_file(&exported, &["--print"])] {
        let said = stdout(&verdict) + &stderr(&verdict);
        assert_eq!(verdict.status.code(), Some(1), "{said}");
        let line = said.lines().find(|line| line.starts_with("pc: BAD: item 6 is ")).unwrap_or_default();
        assert!(line.contains(" speaks against this history: 20"), "{said}");
        assert!(line.contains("TAMPERED: this server's store was set back"), "{said}");
        assert!(!said.contains("complete and unedited"), "{said}");
    }
    let shown = stdout(&verify_file(&exported, &["--print"]));
    assert_eq!(shown, room.log("pc"), "the lines behind it are shown as well");
}

#[tokio::test]
async fn clones_and_late_signatures_are_named_beside_a_good_verdict() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    deliver(&mut agent.introduce(room.server(), about()).await).await;
    room.stop();
    let said = stdout(&room.verify());
    assert!(!said.contains("two machines") && !said.contains("was signed only"), "{said}");
    for _ in 0..2 {
        room.notice("pc", &Notice::Cloned { older: "a".into(), newer: "b".into() });
    }
    let long_ago = wall_ns() - 3 * 3_600_000_000_000;
    let bytes = record(1).to_bytes().unwrap();
    room.add("pc", |history| history.record(8, 1, long_ago, long_ago, &bytes).unwrap());
    // Not signed yet in the store; in the export by its end.
    let unsigned = stdout(&room.verify());
    assert!(unsigned.contains("; the first 5 signed, ") && !unsigned.contains("signed only"), "{unsigned}");
    let exported = [room.export("pc"), {
        room.server = Some(Server::start(room.data.path()));
        room.stop();
        room.export("pc")
    }];
    let verdicts = exported.map(|exported| verify_file(&exported, &[]));
    for verdict in verdicts.into_iter().chain([room.verify()]) {
        let said = stdout(&verdict);
        assert!(verdict.status.success(), "{said}");
        assert!(said.starts_with("pc: 8 items, complete and unedited"), "{said}");
        assert!(said.contains("; 2 lines say that two machines used this identity"), "{said}");
        assert!(said.contains("; item 8 was signed only 3 h after it was received"), "{said}");
    }
}

#[tokio::test]
async fn a_store_that_was_set_back_is_noticed_by_the_agents_witness() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    let path = room.data.path().join("store.sqlite");
    room.stop();
    let older = std::fs::read(&path).unwrap();
    room.server = Some(Server::start(room.data.path()));
    deliver(&mut agent.introduce(room.server(), about()).await).await;
    room.stop();
    let witness: Checkpoint = {
        let store = room.store();
        let checkpoint =
            store.query_row("SELECT size, head, signed_ns, signature FROM checkpoints", [], |row| {
                let signature: [u8; 64] = row.get(3)?;
                let mut halves = [[0; 32]; 2];
                halves.as_flattened_mut().copy_from_slice(&signature);
                let size: i64 = row.get(0)?;
                Ok(Checkpoint {
                    size: size as u64,
                    head: row.get(1)?,
                    signed_ns: row.get(2)?,
                    signature: halves,
                })
            });
        checkpoint.unwrap()
    };
    let witnessing = |connect| About { connect, witness: Some(witness.clone()), ..about() };
    room.server = Some(Server::start(room.data.path()));
    let mut session = agent.introduce(room.server(), witnessing(2)).await;
    assert!(matches!(session.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    assert!(!room.log("pc").contains("TAMPERED"));
    room.stop();

    std::fs::write(&path, older).unwrap();
    room.server = Some(Server::start(room.data.path()));
    let _session = agent.introduce(room.server(), witnessing(3)).await;
    room.logs("pc", " SERVER TAMPERED: this server's store was set back").await;

    // One that it cannot have signed keeps nobody out.
    let forged = Checkpoint { size: 99, ..witness.clone() };
    for connect in 4..8 {
        let lie = About { connect, witness: Some(forged.clone()), ..about() };
        let mut liar = agent.introduce(room.server(), lie).await;
        assert!(matches!(liar.ask(&beat(wall_ns())).await, ToAgent::Heard { .. }));
    }
    room.logs("pc", "that is not this server's").await;
    // What is said already is not said with each connection.
    room.stop();
    let said = room.log("pc").matches("that is not this server's").count();
    assert_eq!(said, 1);
    let verdict = room.verify();
    assert_eq!(verdict.status.code(), Some(1));
    assert!(stdout(&verdict).contains(" TAMPERED: this server's store was set back"), "{}", stdout(&verdict));
}

#[tokio::test]
async fn an_agent_gets_the_newest_checkpoint_with_the_answer_to_a_heartbeat() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    deliver(&mut agent.introduce(room.server(), about()).await).await;
    room.stop();
    room.server = Some(Server::start(room.data.path()));
    let mut session = agent.introduce(room.server(), About { connect: 2, ..about() }).await;
    let answer = session.ask(&beat(wall_ns())).await;
    let ToAgent::Heard { checkpoint: Some(checkpoint), .. } = answer else { panic!("{answer:?}") };
    assert_eq!(checkpoint.size, 5);
    // Once is enough.
    assert!(matches!(session.ask(&beat(wall_ns())).await, ToAgent::Heard { checkpoint: None, .. }));
}
