//! Files that are unlike others, and what `netmon-lab replay` says of them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use netmon_lab::replay::{self, NotPlayed, ReplayError, capture::CaptureError};

use crate::{
    equal,
    frames::*,
    making::{Directory, pcap},
};

fn lab_replay(paths: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_netmon-lab")).arg("replay").args(paths).output().unwrap()
}

#[test]
fn interfaces_of_different_link_types_in_one_file_are_told_apart() {
    let directory = Directory::new();
    let ip = ipv4(HERE4, THERE4, UDP, &[], 0, &udp(1000, 2000, b"payload"));
    let cooked = cat(&[&[0, 0, 0, 1, 0, 6], &[2; 8], &[8, 0], &ip]);
    let files = [(1, udp_out(1000, 2000, b"payload")), (101, ip), (113, cooked)].map(|(link, frame)| {
        let path = directory.join(&format!("{link}.pcap"));
        pcap(&path, link, &[frame.clone(), frame]);
        path
    });
    let merged = directory.join("merged.pcapng");
    let status = Command::new("mergecap").arg("-w").arg(&merged).args(&files).status().unwrap();
    assert!(status.success());
    let replay = equal(&merged);
    for compared in &replay.hooks {
        assert_eq!(compared.netmon.flows.len(), 1, "{replay}");
        assert_eq!(compared.netmon.counted.packets, 6, "{replay}");
    }
}

#[test]
fn a_file_of_the_other_byte_order_reads_the_same() {
    let directory = Directory::new();
    let path = directory.join("big-endian.pcap");
    let frame = tcp_out(ACK, b"data");
    let length = u32::try_from(frame.len()).unwrap();
    let numbers = [0xa1b2_c3d4, 2 << 16 | 4, 0, 0, 65_535, 1, 0, 0, length, length];
    fs::write(&path, cat(&[&numbers.map(u32::to_be_bytes).concat(), &frame])).unwrap();
    let replay = equal(&path);
    assert_eq!(replay.hooks[0].netmon.counted.packets, 1, "{replay}");
}

#[test]
fn a_file_that_ends_in_the_middle_of_a_frame_is_compared_up_to_there() {
    let directory = Directory::new();
    let path = directory.join("cut-short.pcap");
    pcap(&path, 1, &[udp_out(1, 2, b"one"), udp_out(1, 2, b"two")]);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 10]).unwrap();
    let replay = equal(&path);
    assert!(replay.cut_short && replay.to_string().contains("the begin of one more"), "{replay}");
    assert_eq!((replay.frames, replay.hooks[0].netmon.counted.packets), (1, 1), "{replay}");
}

#[test]
fn super_packets_are_played_up_to_what_a_veth_device_carries_and_the_others_are_named() {
    let directory = Directory::new();
    let path = directory.join("long.pcap");
    // IPv4's longest; IPv6 with a payload length of 0, as the kernel's own big TCP packets have it (RFC 2675 without
    // its option): one that fits, one that does not.
    let long4 = eth4(&ipv4(HERE4, THERE4, TCP, &[], 0, &tcp(5, 6, ACK, &[], &[7; 65_535 - 40])));
    let long6 = |payload: usize| {
        let mut frame = eth6(&ipv6(HERE6, THERE6, TCP, &tcp(5, 6, ACK, &[], &vec![7; payload])));
        frame[18..20].copy_from_slice(&[0, 0]);
        frame
    };
    pcap(&path, 1, &[long4, long6(65_535 - 60), long6(100_000)]);
    let replay = equal(&path);
    assert_eq!(replay.not_played, [(3, NotPlayed::TooLong)], "{replay}");
    for compared in &replay.hooks {
        assert_eq!(compared.netmon.counted.bytes, 2 * 65_535, "{replay}");
    }
}

#[test]
fn what_cannot_be_read_or_played_is_an_error_that_names_the_file() {
    let directory = Directory::new();
    let path = directory.join("wireless.pcap");
    pcap(&path, 127, &[vec![0; 64]]);
    let error = replay::replay(&path).unwrap_err();
    assert!(matches!(error, ReplayError::LinkType { frame: 1, link: 127, .. }), "{error}");
    let text = directory.join("notes.txt");
    fs::write(&text, "not a capture").unwrap();
    let error = replay::replay(&text).unwrap_err();
    assert!(matches!(error, ReplayError::Capture(CaptureError::Format { .. })), "{error}");
    let missing = directory.join("missing.pcap");
    let output = lab_replay(&[&path, &text, &missing]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    for file in [&path, &text, &missing] {
        assert!(said.contains(&*file.to_string_lossy()), "{said}");
    }
    assert!(said.contains("3 of 3"), "{said}");
}

#[test]
fn equal_counts_end_with_status_0_and_a_line_for_each_hook() {
    let directory = Directory::new();
    let path = directory.join("one.pcap");
    pcap(&path, 1, &[udp_out(1, 2, b"one"), tagged(0x8100, &udp_in(1, 2, b"two"))]);
    let output = lab_replay(&[&path]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    for hook in ["tc ingress", "xdp", "tc egress"] {
        assert!(said.contains(&format!("{hook}: equal (2 flows, 2 in flows)")), "{said}");
    }
}
