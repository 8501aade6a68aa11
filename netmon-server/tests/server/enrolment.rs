use netmon_common::enroll::Reply;

use crate::harness::*;

fn initialised() -> tempfile::TempDir {
    let data = tempfile::tempdir().unwrap();
    success(data.path(), &["init"]);
    data
}

#[tokio::test]
async fn a_token_enrols_one_pc_and_then_no_other() {
    let data = initialised();
    let server = Server::start(data.path());
    let token = token(data.path(), &server, &[]);
    let agent = Agent::enrol(&token, "lab pc/1").await.unwrap();
    assert_eq!(agent.seat(), "lab-pc-1");
    assert_eq!(agent.granted.event_port, server.events.port());
    let refused = Agent::enrol(&token, "other").await.err().unwrap();
    assert!(refused.contains("already used 1 of 1 times"), "{refused}");
}

#[tokio::test]
async fn a_token_that_was_withdrawn_enrols_nobody_any_more() {
    let data = tempfile::tempdir().unwrap();
    success(data.path(), &["init"]);
    let server = Server::start(data.path());
    assert!(success(data.path(), &["tokens"]).starts_with("no tokens; "));
    let [withdrawn, other] =
        [["--uses", "3"], ["--uses", "2"]].map(|uses| token(data.path(), &server, &uses));
    Agent::enrol(&withdrawn, "pc").await.unwrap();
    let listed = success(data.path(), &["tokens"]);
    assert!(!listed.contains(&withdrawn), "the secret is nowhere");
    let line = listed.lines().find(|line| line.contains("1 of 3")).unwrap();
    assert!(line.contains("  valid until 20"), "{line}");
    let id = line.split_whitespace().next().unwrap();
    let said = success(data.path(), &["tokens", "--withdraw", id]);
    assert_eq!(said, format!("token {id} enrols nobody any more\n"));
    let refused = Agent::enrol(&withdrawn, "stranger").await.err().unwrap();
    assert!(refused.contains(&format!("token {id} expired at 20")), "{refused}");
    Agent::enrol(&other, "another").await.unwrap();
    let again = run(data.path(), &["tokens", "--withdraw", id]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("no valid token has the ID"), "{}", stderr(&again));
    assert!(success(data.path(), &["tokens"]).contains("expired 20"));
}

#[tokio::test]
async fn a_token_for_many_enrols_many_under_labels_of_their_own() {
    let data = initialised();
    let server = Server::start(data.path());
    let token = token(data.path(), &server, &["--uses", "3"]);
    let enrolments = [1, 2, 3, 4].map(|_| Agent::enrol(&token, "ubuntu"));
    let [a, b, c, d] = enrolments;
    let (a, b, c, d) = tokio::join!(a, b, c, d);
    let mut seats: Vec<_> = [a, b, c, d].into_iter().flatten().map(|agent| agent.seat()).collect();
    seats.sort();
    assert_eq!(seats, ["ubuntu", "ubuntu-2", "ubuntu-3"]);
}

#[tokio::test]
async fn an_expired_token_and_one_that_was_never_made_say_so() {
    let data = initialised();
    let server = Server::start(data.path());
    let expired = token(data.path(), &server, &["--ttl", "1ms"]);
    let refused = Agent::enrol(&expired, "pc").await.err().unwrap();
    assert!(refused.contains("expired at"), "{refused}");
    let good = token(data.path(), &server, &[]);
    let flipped = if good.ends_with('0') { "1" } else { "0" };
    let wrong = format!("{}{flipped}", &good[..good.len() - 1]);
    let refused = Agent::enrol(&wrong, "pc").await.err().unwrap();
    assert!(refused.contains("not known to this server"), "{refused}");
    Agent::enrol(&good, "pc").await.unwrap();
}

#[tokio::test]
async fn a_server_with_another_ca_is_not_spoken_to() {
    let (data, other_data) = (initialised(), initialised());
    let (server, other) = (Server::start(data.path()), Server::start(other_data.path()));
    let token = token(data.path(), &server, &[]);
    let diverted = token.replace(&server.enrolment.to_string(), &other.enrolment.to_string());
    let error = Agent::enrol(&diverted, "pc").await.err().unwrap();
    assert!(error.contains("the pinned CA is not shown"), "{error}");
    Agent::enrol(&token, "pc").await.unwrap();
}

#[tokio::test]
async fn a_request_without_a_proper_key_is_refused_and_costs_no_use() {
    let data = initialised();
    let server = Server::start(data.path());
    let token = token(data.path(), &server, &[]);
    let Ok(Reply::Refused { reason }) = enrol_with(&token, "pc", b"garbage".to_vec()).await else {
        panic!("garbage was signed")
    };
    assert!(reason.escaped().to_string().contains("does not parse"), "{reason:?}");
    assert!(enrol_with(&token, "pc", vec![0; 100_000]).await.is_err(), "a request of 100 kB was read");
    Agent::enrol(&token, "pc").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_words_stay_on_their_line_of_the_servers_log() {
    let data = initialised();
    let server = Server::start(data.path());
    let token = token(data.path(), &server, &[]);
    let connection = call_enrolment(&token, [127, 0, 0, 1]).await.unwrap();
    connection.close(7_u8.into(), b"x\n2026-11-23T07:00:00Z INFO agent connected FORGED \x1b[2J\xe2\x80\xae");
    let line = server.says("FORGED");
    assert!(line.contains("enrolment failed") && line.contains("x\\u{a}2026"), "{line:?}");
    assert!(!line.contains(['\u{1b}', '\u{202e}']), "{line:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_strangers_do_not_keep_others_from_enrolling() {
    let data = initialised();
    let server = Server::start(data.path());
    let token = token(data.path(), &server, &[]);
    let strangers: Vec<_> = (0..300)
        .map(|_| {
            let token = token.clone();
            tokio::spawn(async move { call_enrolment(&token, [127, 0, 0, 2]).await })
        })
        .collect();
    let line = server.says("connections were not let in");
    assert!(line.contains("listener=\"enrolment\"") && line.contains("refused="), "{line}");
    Agent::enrol(&token, "pc").await.unwrap();
    strangers.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_who_says_nothing_is_closed() {
    let data = initialised();
    let server = Server::start(data.path());
    let connection = call_enrolment(&token(data.path(), &server, &[]), [127, 0, 0, 1]).await.unwrap();
    server.says("no request came in time");
    patience(connection.closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reply_costs_neither_token_nor_seat() {
    let data = initialised();
    let server = Server::start(data.path());
    let token = token(data.path(), &server, &[]);
    let key = rcgen::KeyPair::generate().unwrap();
    let (connection, _) = request(&token, "pc", signing_request(&key)).await.unwrap();
    server.says("agent enrolled");
    connection.close(0_u8.into(), b"the cable is out");
    let agent = Agent::enrol_key(&token, "pc", key).await.unwrap();
    assert_eq!(agent.seat(), "pc");
    let (mut session, _) = agent.deliver(&server, 7).await;
    session.batch(7, 1..=1).await.unwrap();
    let agents = success(data.path(), &["agents"]);
    assert_eq!(agents.lines().count(), 2, "{agents}");
    let refused = Agent::enrol(&token, "other").await.err().unwrap();
    assert!(refused.contains("already used"), "{refused}");
}

#[tokio::test]
async fn a_pc_that_was_revoked_enrols_again_under_its_label_and_its_history_stays() {
    let data = initialised();
    let server = Server::start(data.path());
    let token = token(data.path(), &server, &["--uses", "2"]);
    let before = Agent::enrol(&token, "pc").await.unwrap();
    let (mut session, _) = before.deliver(&server, 7).await;
    session.batch(7, 1..=2).await.unwrap();
    success(data.path(), &["revoke", "pc"]);
    session.closed().await;
    let after = Agent::enrol(&token, "pc").await.unwrap();
    assert_eq!(after.seat(), "pc");
    let (mut session, _) = after.deliver(&server, 8).await;
    session.batch(8, 1..=1).await.unwrap();
    for (seat, expected) in [("pc-old", vec![1, 2, 0]), ("pc", vec![1])] {
        assert_eq!(numbers(&success(data.path(), &["log", seat])), expected, "{seat}");
    }
    assert_eq!(server.stop(), 0);
    for (seat, expected) in [("pc-old", vec![1, 2, 0]), ("pc", vec![1])] {
        let log = std::fs::read_to_string(data.path().join("logs").join(seat).join("log.txt")).unwrap();
        assert_eq!(numbers(&log), expected, "{seat}");
    }
}
