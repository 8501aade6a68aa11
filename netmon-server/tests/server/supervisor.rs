use std::os::unix::net::UnixDatagram;

use crate::harness::*;

/// The next word to systemd.
fn word(socket: &UnixDatagram) -> String {
    let mut word = [0; 100];
    let length = socket.recv(&mut word).unwrap();
    String::from_utf8(word[..length].to_vec()).unwrap().trim().to_owned()
}

#[test]
fn systemd_is_told_that_the_server_listens_lives_and_ends() {
    let data = tempfile::tempdir().unwrap();
    success(data.path(), &["init"]);
    let path = data.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let server = Server::start_with(data.path(), "127.0.0.1:0", |command| {
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "100000");
    });
    assert_eq!(word(&socket), "READY=1");
    for _ in 0..3 {
        assert_eq!(word(&socket), "WATCHDOG=1");
    }
    assert_eq!(server.stop(), 0);
    while word(&socket) != "STOPPING=1" {}
}

#[test]
fn a_server_that_runs_as_root_says_that_it_needs_no_root() {
    let data = tempfile::tempdir().unwrap();
    success(data.path(), &["init"]);
    let output = command(data.path(), &["run", "--listen", "127.0.0.1:9", "--enroll-listen", "127.0.0.1:9"])
        .output()
        .unwrap();
    let said = stderr(&output);
    assert_eq!(
        said.contains("which the server does not need"),
        rustix::process::geteuid().is_root(),
        "{said}"
    );
}
