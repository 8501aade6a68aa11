use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;

use netmon_common::wire::ToAgent;

use crate::harness::*;

const EPOCH: u64 = u64::MAX - 5;

struct Room {
    data: tempfile::TempDir,
    server: Option<Server>,
}

impl Room {
    fn new() -> Self {
        Self::within(&std::env::temp_dir())
    }

    fn within(directory: &Path) -> Self {
        let data = tempfile::tempdir_in(directory).unwrap();
        success(data.path(), &["init"]);
        let server = Some(Server::start(data.path()));
        Self { data, server }
    }

    fn path(&self) -> &Path {
        self.data.path()
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    async fn agent(&self, hostname: &str) -> Agent {
        Agent::enrol(&token(self.path(), self.server(), &[]), hostname).await.unwrap()
    }

    fn kill_and_restart(&mut self) {
        self.server.take().unwrap().kill();
        self.server = Some(Server::start(self.path()));
    }

    fn numbers(&self, seat: &str) -> Vec<u64> {
        numbers(&success(self.path(), &["log", seat]))
    }

    fn file(&self, seat: &str, name: &str) -> String {
        std::fs::read_to_string(self.path().join("logs").join(seat).join(name)).unwrap()
    }
}

fn ack(seq: u64) -> Result<ToAgent, String> {
    Ok(ToAgent::Ack { epoch: EPOCH, seq })
}

#[tokio::test]
async fn what_is_acknowledged_is_in_the_log_once_however_often_it_is_sent() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, next) = agent.deliver(room.server(), EPOCH).await;
    assert_eq!(next, 1);
    assert_eq!(session.batch(EPOCH, 1..=3).await, ack(3));
    assert_eq!(session.batch(EPOCH, 1..=3).await, ack(3));
    drop(session);
    let (mut session, next) = agent.deliver(room.server(), EPOCH).await;
    assert_eq!(next, 4);
    assert_eq!(session.batch(EPOCH, 2..=5).await, ack(5));
    assert_eq!(room.numbers("pc"), [1, 2, 3, 4, 5]);
    let log = success(room.path(), &["log", "pc"]);
    assert!(log.lines().all(|line| line.contains(" (received late, 20")), "{log}");
    assert_eq!(numbers(&success(room.path(), &["log", "pc", "--lines", "2"])), [4, 5]);
    assert!(success(room.path(), &["log", "pc", "--usb"]).is_empty());
}

#[tokio::test]
async fn a_batch_out_of_order_is_asked_for_again_and_the_connection_goes_on() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    assert_eq!(session.batch(EPOCH, 3..=4).await, Ok(ToAgent::Resume { next_seq: 1 }));
    assert_eq!(session.batch(EPOCH, 1..=4).await, ack(4));
    assert_eq!(room.numbers("pc"), [1, 2, 3, 4]);
}

#[tokio::test]
async fn records_that_never_came_are_a_gap_at_their_place() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=2).await.unwrap();
    let welcome = session.hello(EPOCH, 9).await;
    assert_eq!(welcome, Ok(ToAgent::Welcome { version: 1, next_seq: 9 }));
    assert_eq!(session.batch(EPOCH, 9..=9).await, ack(9));
    assert_eq!(room.numbers("pc"), [1, 2, 0, 9]);
    let usb = success(room.path(), &["log", "pc", "--usb", "--lines", "1"]);
    assert_eq!(usb, success(room.path(), &["log", "pc", "--usb"]));
    assert!(usb.contains("GAP from") && usb.contains("never came from this PC, 6 records"), "{usb}");
    let agents = success(room.path(), &["agents"]);
    assert!(agents.contains("1 (6 records)") && agents.contains("connected since"), "{agents}");
}

#[tokio::test]
async fn an_agent_drains_an_older_epoch_before_it_goes_on() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), 1).await;
    session.batch(1, 1..=2).await.unwrap();
    let welcome = session.hello(EPOCH, 1).await;
    assert_eq!(welcome, Ok(ToAgent::Welcome { version: 1, next_seq: 1 }));
    assert_eq!(session.batch(EPOCH, 1..=1).await, ack(1));
    assert_eq!(room.numbers("pc"), [1, 2, 0, 1]);
}

#[tokio::test]
async fn a_lost_spool_leaves_a_mark() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), 1).await;
    session.batch(1, 1..=2).await.unwrap();
    drop(session);
    for _ in 0..2 {
        let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
        assert_eq!(session.batch(EPOCH, 1..=1).await, ack(1));
    }
    assert_eq!(room.numbers("pc"), [1, 2, 0, 1]);
    let log = success(room.path(), &["log", "pc", "--usb"]);
    assert!(log.contains("another history of this PC begins") && log.contains("count unknown"), "{log}");
    let agents = success(room.path(), &["agents"]);
    assert!(agents.contains("1 (unknown number of records)"), "{agents}");
}

#[tokio::test]
async fn absurd_holes_are_a_fault_and_histories_without_end_are_refused() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let mut session = agent.connect(room.server()).await.unwrap();
    assert!(session.hello(1, 1 << 62).await.is_err());
    assert!(session.closed().await.contains("a hole of "));
    let mut session = agent.connect(room.server()).await.unwrap();
    for epoch in 0..=100 {
        assert!(matches!(session.hello(epoch, 1).await, Ok(ToAgent::Welcome { .. })), "epoch {epoch}");
    }
    let Ok(ToAgent::Refused { reason }) = session.hello(101, 1).await else { panic!("welcome") };
    assert!(reason.escaped().to_string().contains("histories within an hour"), "{reason:?}");
}

#[tokio::test]
async fn a_server_that_was_killed_and_started_again_tells_its_agents_so() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=1).await.unwrap();
    let events = room.server().events;
    room.server.take().unwrap().kill();
    room.server = Some(Server::start_again(room.path(), events));
    session.send_batch(EPOCH, 2..=2).await.unwrap();
    let reason = session.closed().await;
    assert!(reason.contains("reset by peer"), "not by the idle timeout: {reason}");
}

#[tokio::test]
async fn who_breaks_the_protocol_is_closed_and_the_others_go_on() {
    let room = Room::new();
    let good = room.agent("good").await;
    let (mut honest, _) = good.deliver(room.server(), EPOCH).await;
    honest.batch(EPOCH, 1..=1).await.unwrap();

    let bad = room.agent("bad").await;
    for (frame, says) in [
        (vec![0xff; 64], "outside 1..="),
        (oversized_frame(), "outside 1..="),
        (vec![1, 0, 0, 0, 0, 0, 0, 0, 7], "checksum"),
    ] {
        let (mut session, _) = bad.deliver(room.server(), EPOCH).await;
        session.raw(&frame).await;
        let reason = session.closed().await;
        assert!(reason.contains(says), "{reason}");
    }
    // Three times are enough: it stays outside for a while, and its log says so.
    room.server().says("agent is in quarantine");
    let mut session = bad.connect(room.server()).await.unwrap();
    let Ok(ToAgent::Refused { reason }) = session.hello(EPOCH, 1).await else { panic!("let in") };
    assert!(reason.escaped().to_string().contains("seat bad is in quarantine until "), "{reason:?}");
    let log = success(room.path(), &["log", "bad"]);
    assert!(log.contains(" SERVER QUARANTINED until ") && log.contains("checksum"), "{log}");

    let worse = room.agent("worse").await;
    let (mut session, _) = worse.deliver(room.server(), EPOCH).await;
    session.send_batch(EPOCH - 1, 1..=1).await.unwrap();
    assert!(session.closed().await.contains("without a hello"));

    let mut session = worse.connect(room.server()).await.unwrap();
    session.send_batch(EPOCH, 1..=1).await.unwrap();
    assert!(session.closed().await.contains("without a hello"));

    room.server().says("faults=5");
    assert_eq!(honest.batch(EPOCH, 2..=2).await, ack(2));
    assert_eq!(room.numbers("good"), [1, 2]);
    assert_eq!(room.numbers("bad"), [0]);
    assert!(room.numbers("worse").is_empty());
}

#[tokio::test]
async fn a_batch_with_one_broken_record_is_refused_as_a_whole() {
    use netmon_common::wire::{BatchBuilder, Item, ToServer, encode_frame};
    let room = Room::new();
    let agent = room.agent("pc").await;
    for second in [record(7).to_bytes().unwrap(), b"garbage".to_vec()] {
        let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
        let mut batch = BatchBuilder::default();
        assert!(
            [record(1).to_bytes().unwrap(), second]
                .into_iter()
                .all(|record| batch.push(&Item::Record(record)))
        );
        let batch = ToServer::Batch(batch.finish(EPOCH, 1).unwrap());
        session.raw(&encode_frame(&batch).unwrap()).await;
        let reason = session.closed().await;
        assert!(reason.contains("protocol error"), "{reason}");
    }
    assert!(room.numbers("pc").is_empty());
}

#[tokio::test]
async fn another_version_of_the_protocol_is_refused_with_a_reason() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let mut session = agent.connect(room.server()).await.unwrap();
    let Ok(ToAgent::Refused { reason }) = session.hello_of_version(9, EPOCH, 1).await else {
        panic!("not refused")
    };
    assert!(reason.escaped().to_string().contains("speaks version 9"), "{reason:?}");
}

#[tokio::test]
async fn everything_acknowledged_survives_sigkill_and_the_rest_comes_once() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    let mut next = 1;
    for round in 0..4 {
        let (mut session, expected) = agent.deliver(room.server(), EPOCH).await;
        assert!(expected >= next, "round {round}: {next} was acknowledged, {expected} is expected");
        for _ in 0..5 {
            // Overlaps on purpose.
            let first = next.saturating_sub(3).max(1);
            assert_eq!(session.batch(EPOCH, first..=next + 9).await, ack(next + 9));
            next += 10;
        }
        // Sent, never acknowledged: it may be in the store or not.
        session.send_batch(EPOCH, next..=next + 9).await.unwrap();
        room.kill_and_restart();
    }
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    assert_eq!(session.batch(EPOCH, next - 5..=next + 9).await, ack(next + 9));
    let all: Vec<u64> = (1..=next + 9).collect();
    assert_eq!(room.numbers("pc"), all);
    drop(session);
    // The readable log is complete when the server has ended in good order.
    assert_eq!(room.server.take().unwrap().stop(), 0);
    assert_eq!(numbers(&room.file("pc", "log.txt")), all);
}

#[tokio::test]
async fn a_room_of_agents_delivers_at_once_and_nothing_mixes() {
    const AGENTS: usize = 25;
    const BATCHES: u64 = 20;
    let room = Room::new();
    let token = token(room.path(), room.server(), &["--uses", &AGENTS.to_string()]);
    let deliver = async |number: usize| {
        let agent = Agent::enrol(&token, &format!("pc-{number}")).await.unwrap();
        let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
        for batch in 0..BATCHES {
            // Each agent cuts its history differently.
            let size = number as u64 + 1;
            let first = batch * size + 1;
            assert_eq!(session.batch(EPOCH, first..=first + size - 1).await, ack(first + size - 1));
        }
        session
    };
    let sessions = futures_util::future::join_all((0..AGENTS).map(deliver)).await;
    for number in [0, 7, AGENTS - 1] {
        let expected: Vec<u64> = (1..=BATCHES * (number as u64 + 1)).collect();
        assert_eq!(room.numbers(&format!("pc-{number}")), expected);
    }
    assert_eq!(success(room.path(), &["agents"]).matches("connected since").count(), AGENTS);
    drop(sessions);
}

#[tokio::test]
async fn sigterm_says_goodbye_and_exits_with_success() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=1).await.unwrap();
    assert_eq!(room.server.take().unwrap().stop(), 0);
    assert!(session.closed().await.contains("the server is stopping"));
    let agents = success(room.path(), &["agents"]);
    assert!(agents.contains("last seen"), "{agents}");
}

#[tokio::test]
async fn a_certificate_of_somebody_else_is_refused_in_the_handshake() {
    let room = Room::new();
    let stranger = room.agent("pc").await.with_own_certificate();
    let result = match stranger.connect(room.server()).await {
        // In TLS 1.3 the client learns of it after its own handshake is done.
        Ok(mut session) => session.hello(EPOCH, 1).await.map(|_| ()),
        Err(error) => Err(error),
    };
    assert!(result.is_err());
    room.server().says("refused in the handshake");
}

#[tokio::test]
async fn a_key_that_the_ca_signed_but_the_allow_list_does_not_have_is_refused() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let store = rusqlite::Connection::open(room.path().join("store.sqlite")).unwrap();
    assert_eq!(store.execute("DELETE FROM agents", []).unwrap(), 1);
    let mut session = agent.connect(room.server()).await.unwrap();
    let Ok(ToAgent::Refused { reason }) = session.hello(EPOCH, 1).await else { panic!("let in") };
    assert!(reason.escaped().to_string().contains("does not know this agent's key"), "{reason:?}");
}

#[tokio::test]
async fn a_revoked_agent_is_cut_off_at_once_and_not_let_in_again() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=1).await.unwrap();
    let said = success(room.path(), &["revoke", "pc"]);
    assert!(said.contains("seat pc is revoked"), "{said}");
    assert!(session.closed().await.contains("revoked"));
    let mut session = agent.connect(room.server()).await.unwrap();
    let Ok(ToAgent::Refused { reason }) = session.hello(EPOCH, 1).await else { panic!("let in again") };
    assert!(reason.escaped().to_string().contains("revoked"), "{reason:?}");
    assert_eq!(room.numbers("pc"), [1, 0]);
    assert!(success(room.path(), &["log", "pc"]).contains(" SERVER REVOKED: "));
}

#[tokio::test]
async fn the_newest_connection_of_an_identity_wins() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut older, _) = agent.deliver(room.server(), EPOCH).await;
    older.batch(EPOCH, 1..=1).await.unwrap();
    let (mut newer, next) = agent.deliver(room.server(), EPOCH).await;
    assert_eq!(next, 2);
    assert!(older.closed().await.contains("connected again"));
    assert_eq!(newer.batch(EPOCH, 2..=2).await, ack(2));
    room.server().says("the same identity connected again");
    let agents = success(room.path(), &["agents", "--json"]);
    assert!(agents.contains("\"connected\": true"), "{agents}");
}

#[tokio::test]
async fn follow_shows_events_as_they_arrive() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=2).await.unwrap();
    let (follower, lines) = follow(room.path(), &["--lines", "1"]);
    assert_eq!(numbers(&wait_for(&lines, "")), [2]);
    for seq in 3..=5 {
        session.batch(EPOCH, seq..=seq).await.unwrap();
        assert_eq!(numbers(&wait_for(&lines, "")), [seq]);
    }
    end(follower);
}

fn follow(data: &Path, more: &[&str]) -> (Child, mpsc::Receiver<String>) {
    let mut arguments = vec!["log", "pc", "--follow"];
    arguments.extend(more);
    let mut follower = command(data, &arguments).stdout(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(follower.stdout.take().unwrap());
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    (follower, lines)
}

fn end(mut follower: Child) {
    follower.kill().unwrap();
    follower.wait().unwrap();
}

#[tokio::test]
async fn follow_goes_on_when_the_readable_log_is_deleted() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=1).await.unwrap();
    let (follower, lines) = follow(room.path(), &[]);
    assert_eq!(numbers(&wait_for(&lines, "")), [1]);
    let directory = room.path().join("logs/pc");
    for seq in 2..=6 {
        // The follower reads the store, which is ahead of the readable log.
        wait_until("the seat's log", || directory.join("log.txt").exists()).await;
        match seq {
            2 | 4 => std::fs::remove_dir_all(&directory).unwrap(),
            3 => std::fs::remove_file(directory.join("log.txt")).unwrap(),
            5 => std::fs::rename(&directory, room.path().join("elsewhere")).unwrap(),
            _ => {}
        }
        session.batch(EPOCH, seq..=seq).await.unwrap();
        assert_eq!(numbers(&wait_for(&lines, "")), [seq]);
    }
    end(follower);
}

#[tokio::test]
async fn follow_makes_nothing_on_disk_and_sees_the_first_record() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let directory = room.path().join("logs/pc");
    let before = directory.exists();
    let (follower, lines) = follow(room.path(), &[]);
    assert!(lines.recv_timeout(std::time::Duration::from_millis(500)).is_err(), "nothing was recorded");
    assert_eq!(directory.exists(), before);
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=1).await.unwrap();
    assert_eq!(numbers(&wait_for(&lines, "")), [1]);
    end(follower);
}

#[tokio::test]
async fn a_server_on_every_address_is_reached_by_ipv4_too() {
    let data = tempfile::tempdir().unwrap();
    success(data.path(), &["init"]);
    let mut server = Server::start_on(data.path(), "[::]:0");
    for address in [&mut server.events, &mut server.enrolment] {
        address.set_ip([127, 0, 0, 1].into());
    }
    let agent = Agent::enrol(&token(data.path(), &server, &[]), "pc").await.unwrap();
    let (mut session, _) = agent.deliver(&server, EPOCH).await;
    assert_eq!(session.batch(EPOCH, 1..=1).await, ack(1));
    // Callers are shown by their IPv4 addresses.
    server.says("address=127.0.0.1:");
}

#[tokio::test]
async fn nobody_is_connected_to_a_server_that_was_killed() {
    let mut room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=1).await.unwrap();
    assert!(success(room.path(), &["agents"]).contains("connected since"));
    room.server.take().unwrap().kill();
    let agents = success(room.path(), &["agents"]);
    assert!(agents.contains("last seen") && !agents.contains("connected since"), "{agents}");
}

#[tokio::test]
async fn a_spool_that_was_set_back_is_refused_rather_than_lost_in_silence() {
    let room = Room::new();
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    session.batch(EPOCH, 1..=3).await.unwrap();
    let mut other = record(3);
    other.run = 2;
    session.send_records(EPOCH, &[other]).await.unwrap();
    let reason = session.closed().await;
    assert!(reason.contains("set back"), "{reason}");
    assert_eq!(room.numbers("pc"), [1, 2, 3]);
}

#[tokio::test]
#[ignore = "NETMON_TEST_SMALL_DISK must name a directory on a file system of its own with some 2 MB"]
async fn a_full_disk_costs_nothing_that_was_acknowledged() {
    let disk = std::env::var_os("NETMON_TEST_SMALL_DISK").unwrap();
    let room = Room::within(Path::new(&disk));
    let agent = room.agent("pc").await;
    let (mut session, _) = agent.deliver(room.server(), EPOCH).await;
    let filler = Path::new(&disk).join("filler");
    std::fs::write(&filler, vec![0; 64 << 20]).expect_err("the disk is too large for this test");
    let mut acknowledged = 0;
    while let Ok(answer) = session.batch(EPOCH, acknowledged + 1..=acknowledged + 500).await {
        assert_eq!(Ok(answer), ack(acknowledged + 500));
        acknowledged += 500;
    }
    assert!(session.closed().await.contains("cannot store records now"));
    room.server().says("cannot store records; nothing is acknowledged");
    std::fs::remove_file(&filler).unwrap();
    let (mut session, next) = agent.deliver(room.server(), EPOCH).await;
    assert_eq!(next, acknowledged + 1);
    room.server().says("the store takes records again");
    assert_eq!(session.batch(EPOCH, next..=next + 9).await, ack(next + 9));
    let all: Vec<u64> = (1..=next + 9).collect();
    assert_eq!(room.numbers("pc"), all);
    let mut room = room;
    drop(session);
    assert_eq!(room.server.take().unwrap().stop(), 0);
    assert_eq!(numbers(&room.file("pc", "log.txt")), all);
}
