use std::net::UdpSocket;
use std::path::Path;

use crate::harness::*;

fn initialised() -> tempfile::TempDir {
    let data = tempfile::tempdir().unwrap();
    success(data.path(), &["init"]);
    data
}

/// Runs a command that must fail with this status; what it said on stderr.
fn fails(data: &Path, arguments: &[&str], status: i32) -> String {
    let output = run(data, arguments);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", stdout(&output));
    said
}

#[test]
fn init_refuses_where_a_server_exists_and_changes_nothing() {
    let data = initialised();
    let before = std::fs::read(data.path().join("ca.pem")).unwrap();
    let said = fails(data.path(), &["init"], 1);
    assert!(
        said.contains(&format!("already initialised at {}, nothing changed", data.path().display())),
        "{said}"
    );
    success(data.path(), &["init", "--if-needed"]);
    assert_eq!(std::fs::read(data.path().join("ca.pem")).unwrap(), before);
}

#[test]
fn every_command_but_init_says_that_there_is_no_server() {
    let data = tempfile::tempdir().unwrap();
    let commands: [&[&str]; 5] =
        [&["run"], &["token", "--address", "a"], &["agents"], &["revoke", "pc"], &["log", "pc"]];
    for arguments in commands {
        let said = fails(data.path(), arguments, 1);
        assert!(said.contains("not initialised") && said.contains("init"), "{arguments:?}: {said}");
    }
    assert_eq!(std::fs::read_dir(data.path()).unwrap().count(), 0, "a command left something behind");
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let data = initialised();
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    for option in ["--listen", "--enroll-listen"] {
        let other = if option == "--listen" { "--enroll-listen" } else { "--listen" };
        let arguments = ["run", option, &address.to_string(), other, "127.0.0.1:0"];
        let said = fails(data.path(), &arguments, 1);
        assert!(said.contains(&format!("udp port {}", address.port())), "{said}");
        assert!(said.contains("in use by another program") && said.contains(option), "{said}");
    }
}

#[test]
fn the_same_port_for_both_is_named_as_such() {
    let data = initialised();
    let said = fails(data.path(), &["run", "--listen", "127.0.0.1:9", "--enroll-listen", "127.0.0.1:9"], 1);
    assert!(said.contains("both 127.0.0.1:9") && said.contains("different ports"), "{said}");
}

#[test]
fn an_empty_variable_counts_as_unset() {
    let data = initialised();
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut command =
        command(data.path(), &["run", "--enroll-listen", &taken.local_addr().unwrap().to_string()]);
    command.env("NETMON_SERVER_LISTEN", "").env("NETMON_SERVER_DATA", "");
    let said = stderr(&command.output().unwrap());
    assert!(said.contains("in use by another program"), "{said}");
}

#[test]
fn a_second_server_on_the_same_directory_is_refused() {
    let data = initialised();
    let _server = Server::start(data.path());
    let arguments = ["run", "--listen", "127.0.0.1:0", "--enroll-listen", "127.0.0.1:0"];
    let said = fails(data.path(), &arguments, 1);
    assert!(said.contains("another netmon-server (process ") && !said.contains("unknown"), "{said}");
    std::fs::remove_file(data.path().join("lock")).unwrap();
    let said = fails(data.path(), &arguments, 1);
    assert!(said.contains("another netmon-server (process unknown)"), "{said}");
    assert!(netmon_server::datadir::DataDir::new(data.path()).is_running());
}

#[test]
fn an_unknown_seat_lists_the_known_ones() {
    let data = initialised();
    let said = fails(data.path(), &["log", "pc-9"], 1);
    assert!(said.contains("no PC has enrolled yet"), "{said}");
    let server = Server::start(data.path());
    let token = token(data.path(), &server, &["--uses", "2"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for name in ["pc-1", "pc-2"] {
        runtime.block_on(Agent::enrol(&token, name)).unwrap();
    }
    for command in ["log", "revoke"] {
        let said = fails(data.path(), &[command, "pc-9\u{1b}[2J"], 1);
        assert!(said.contains("no seat \"pc-9\\u{1b}[2J\"; known seats: pc-1, pc-2"), "{said:?}");
    }
    let agents = success(data.path(), &["agents"]);
    assert!(agents.contains("never connected"), "{agents}");
}

#[test]
fn a_token_is_one_line_to_copy_and_only_its_hash_is_kept() {
    let data = initialised();
    let said = success(data.path(), &["token", "--address", "192.0.2.7"]);
    let token =
        said.strip_prefix("echo '").unwrap().strip_suffix("' | sudo netmon-agent enroll --token-file -\n");
    let parsed: netmon_common::enroll::Token = token.unwrap().parse().unwrap();
    assert_eq!(parsed.address, "192.0.2.7:7444");
    let raw = success(data.path(), &["token", "--address", "192.0.2.7", "--raw"]);
    raw.trim_end().parse::<netmon_common::enroll::Token>().unwrap();
    let contains = |name: &str, what: &[u8]| {
        let bytes = std::fs::read(data.path().join(name)).unwrap_or_default();
        bytes.windows(what.len()).any(|window| window == what)
    };
    for file in ["store.sqlite", "store.sqlite-wal"] {
        assert!(!contains(file, &parsed.secret), "{file} holds the secret");
    }
    assert!(contains("store.sqlite", &parsed.id) || contains("store.sqlite-wal", &parsed.id));
}

#[test]
fn wrong_usage_has_its_own_status() {
    let data = initialised();
    let commands: [&[&str]; 6] = [
        &[],
        &["walk"],
        &["token"],
        &["token", "--address", "a", "--ttl", "soon"],
        &["token", "--address", "a", "--uses", "0"],
        &["run", "--listen", "nowhere"],
    ];
    for arguments in commands {
        fails(data.path(), arguments, 2);
    }
}

#[test]
fn a_damaged_or_foreign_store_is_named() {
    let data = initialised();
    std::fs::write(
        data.path().join("store.sqlite"),
        b"this is not a database, whatever its name says........",
    )
    .unwrap();
    for name in ["store.sqlite-wal", "store.sqlite-shm"] {
        let _ = std::fs::remove_file(data.path().join(name));
    }
    let said = fails(data.path(), &["run", "--listen", "127.0.0.1:0", "--enroll-listen", "127.0.0.1:0"], 1);
    assert!(said.contains("store.sqlite") && said.contains("damaged"), "{said}");
}
