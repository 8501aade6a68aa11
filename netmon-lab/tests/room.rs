//! The room itself: hosts reach each other and nothing else, idle interfaces are silent, traffic is what it says.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::process::Command;
use std::time::Duration;

use netmon_lab::generator::Generator;
use netmon_lab::room::{self, Room};
use netmon_lab::traffic::Report;
use netmon_lab::wait;

const MEGABYTE: u64 = 1_000_000;

#[test]
fn a_copy_is_on_the_interface_counters_of_both_pcs_alike() {
    let room = Room::build(2).unwrap();
    let [before_1, before_2] = [1, 2].map(|pc| room.pc(pc).counters("lan0").unwrap());
    let to = format!("{}:9000", room::lan(2));
    let server = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to} --reply 300000")).unwrap();
    let copied = Generator::run(room.pc(1), &format!("tcp-copy --to {to} --send 5MB")).unwrap();
    assert_eq!(copied, Report { sent: 5 * MEGABYTE, received: 300_000 });
    assert_eq!(server.report().unwrap(), Report { sent: 300_000, received: 5 * MEGABYTE });

    let after_1 = room.pc(1).counters("lan0").unwrap().since(before_1);
    let after_2 = room.pc(2).counters("lan0").unwrap().since(before_2);
    assert_eq!((after_1.tx_bytes, after_1.tx_packets), (after_2.rx_bytes, after_2.rx_packets));
    assert_eq!((after_1.rx_bytes, after_1.rx_packets), (after_2.tx_bytes, after_2.tx_packets));
    // At least 40 bytes of headers a frame (a super-packet has one set of them), and retransmissions, which a bridge
    // without loss has few of.
    let headers = after_1.tx_l3() - 5 * MEGABYTE;
    assert!(headers >= 40 * after_1.tx_packets && headers < MEGABYTE, "{headers} B of headers, {after_1:?}");
}

#[test]
fn every_kind_of_traffic_passes_the_router() {
    let room = Room::build(1).unwrap();
    let (web, cloud, dns) = (room.host("web"), room.host("cloud"), room.host("dns"));
    let certificate = room.directory().join("web.pem").display().to_string();
    let body = 300_000;

    for address in [room::WEB.to_owned(), format!("[{}]", room::WEB6)] {
        let cases = [
            ("http", 80, String::new()),
            ("https", 443, format!("--certificate {certificate}")),
            ("quic", 443, format!("--certificate {certificate}")),
        ];
        for (protocol, port, identity) in cases {
            let serve = format!("{protocol}-serve --listen {address}:{port} --size {body} {identity}");
            let server = Generator::serve(web, &serve).unwrap();
            let get = format!("{protocol}-get --to {address}:{port} {identity}");
            let got = Generator::run(room.pc(1), &get).unwrap();
            let served = server.report().unwrap();
            assert_eq!((got.sent, got.received), (served.received, served.sent), "{protocol} over {address}");
            assert!((body..body + 200).contains(&got.received), "{protocol} over {address}: {got:?}");
        }
    }

    let to = format!("{}:5000", room::CLOUD);
    let server = Generator::serve(cloud, &format!("udp-serve --listen {to} --count 10")).unwrap();
    Generator::run(room.pc(1), &format!("udp-send --to {to} --count 10 --size 900")).unwrap();
    assert_eq!(server.report().unwrap(), Report { sent: 0, received: 9_000 });

    let to = format!("{}:53", room::DNS);
    let server = Generator::serve(dns, &format!("dns-serve --listen {to}")).unwrap();
    let asked = Generator::run(room.pc(1), &format!("dns-query --to {to}")).unwrap();
    assert_eq!(server.report().unwrap(), Report { sent: asked.received, received: asked.sent });
}

#[test]
fn nothing_has_a_way_out() {
    let room = Room::build(1).unwrap();
    // The PCs' default route ends at the router, which has none.
    for host in ["router", "server", "switch"] {
        for family in ["-4", "-6"] {
            let routes = room.host(host).run(&["ip", family, "route", "show", "default"]).unwrap();
            assert_eq!(routes, "", "{host}");
        }
    }
    let refused = Generator::run(room.pc(1), "tcp-copy --to 8.8.8.8:53 --send 1B --seconds 20").unwrap_err();
    assert!(refused.to_string().contains("unreachable"), "{refused}");
    for host in room.hosts() {
        let names = host.run(&["ls", "/sys/class/net"]).unwrap();
        let ours = ["lo", "lan0", "net0", "mgmt0", "lan", "mgmt", "internet"];
        let foreign = names.split_whitespace().find(|name| !ours.contains(name) && !name.contains('.'));
        assert_eq!(foreign, None, "{}", host.name());
    }
}

#[test]
fn hosts_have_their_own_name_bpffs_and_udev() {
    let room = Room::build(2).unwrap();
    let (one, two) = (room.pc(1), room.pc(2));
    assert_eq!(one.run(&["cat", "/proc/sys/kernel/hostname"]).unwrap(), "pc-1\n");
    for path in ["/sys/fs/bpf/here", "/run/here"] {
        one.run(&["mkdir", path]).unwrap();
        assert!(two.run(&["ls", path]).is_err(), "{path} is seen in the other host");
        assert!(!std::path::Path::new(path).exists(), "{path} is seen outside");
    }
    assert_eq!(one.run(&["stat", "-f", "-c", "%T", "/sys/fs/bpf"]).unwrap(), "bpf_fs\n");
    one.run(&["test", "-e", "/run/udev/control"]).unwrap();
}

#[test]
fn an_idle_interface_is_silent() {
    let room = Room::build(2).unwrap();
    let seen = || [1, 2].map(|pc| room.pc(pc).counters("lan0").unwrap());
    let before = seen();
    let quiet = Duration::from_secs(3);
    assert_eq!(wait::unchanged(quiet, quiet * 2, "silence", seen).unwrap(), before);
}

#[test]
fn a_pause_on_a_connection_is_a_pause_on_the_wire() {
    let room = Room::build(2).unwrap();
    let to = format!("{}:9000", room::lan(2));
    let server = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}")).unwrap();
    let copy =
        Generator::start(room.pc(1), &format!("tcp-copy --to {to} --send 100kB,1500ms,100kB")).unwrap();
    let seen = || room.pc(1).counters("lan0").unwrap();
    let limit = Duration::from_secs(10);
    wait::until(limit, "the first 100 kB", || (seen().tx_bytes > 100_000).then_some(())).unwrap();
    let half = wait::unchanged(Duration::from_millis(1_000), limit, "the pause", seen).unwrap();
    assert!(half.tx_bytes < 200_000, "{half:?}");
    assert_eq!(copy.report().unwrap().sent, 200_000);
    assert_eq!(server.report().unwrap().received, 200_000);
}

#[test]
fn a_room_takes_its_processes_and_files_with_it() {
    let room = Room::build(1).unwrap();
    let directory = room.directory().to_owned();
    let holders: Vec<_> = room.hosts().map(|host| host.holder_pid()).collect();
    // A process that somebody in the room started and forgot.
    room.pc(1).run(&["sh", "-c", "sleep 1000 > /dev/null 2>&1 & echo $!"]).unwrap();
    let mark =
        format!("NETMON_LAB_ROOM={}", directory.display().to_string().rsplit_once("netmon-lab-").unwrap().1);
    let alive = || Command::new("grep").args(["-ls", &mark]).args(environments()).output().unwrap().stdout;
    assert!(alive().split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count() > holders.len());
    drop(room);
    assert_eq!(String::from_utf8_lossy(&alive()), "");
    assert!(!directory.exists());
}

fn environments() -> Vec<String> {
    let entries = std::fs::read_dir("/proc").unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let pids = names.filter(|name| name.parse::<u32>().is_ok_and(|pid| pid != std::process::id()));
    pids.map(|pid| format!("/proc/{pid}/environ")).collect()
}
