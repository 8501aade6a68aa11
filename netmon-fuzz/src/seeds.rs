//! Inputs that fuzzing starts from: what agents, servers, kernels, devices and people really send and write, in the shape
//! that each target takes.

use std::net::IpAddr;

use netmon_agent::spool::format::{Header, push_frame};
use netmon_common::enroll::{Granted, Reply, Request, Token};
use netmon_common::model::*;
use netmon_common::raw::Raw;
use netmon_common::wire::{
    About, BatchBuilder, Checkpoint, FRAME_HEADER, Heartbeat, Hello, Item, Newest, Open, ToAgent, ToServer,
    encode_frame,
};
use rcgen::{
    CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
};
use serde::Serialize;

use crate::names::protected;
use crate::spool::{RUN_FILE_AS_IT_IS, SEGMENT_AS_IT_IS};

/// 2026-11-23T12:42:05Z.
const WALL_NS: i64 = 1_795_437_725_000_000_000;

/// A record of every kind of event.
fn records() -> Vec<Vec<u8>> {
    let record = |(seq, event)| Record { seq, run: 3, boot_ns: seq << 30, wall_ns: WALL_NS, event };
    (1..).zip(events()).map(record).map(|record| record.to_bytes().expect("a small record")).collect()
}

fn events() -> Vec<Event> {
    let hostile = Raw::new(b"Stick\n\x1b[2J\xc2\x9b\xe2\x80\xae\"\\\xff");
    let stick = UsbDevice {
        devpath: "/devices/pci0000:00/0000:00:14.0/usb2/2-1".into(),
        bus: 2,
        number: 2,
        vendor_id: 0x0951,
        product_id: 0x1666,
        vendor: "Kingston".into(),
        model: hostile.clone(),
        serial: "60A44C413FAE".into(),
        interfaces: vec![UsbInterface { class: 8, subclass: 6, protocol: 0x50 }],
    };
    let disk =
        Disk { name: "sdb".into(), vendor: "Kingston".into(), model: hostile.clone(), serial: "60A4".into() };
    let traffic = Traffic {
        tx_bytes: 20_019_872,
        rx_bytes: 12_696,
        tx_payload: 20_000_000,
        rx_payload: 0,
        tx_packets: 13_812,
        rx_packets: 244,
    };
    let function = |function| Event::UsbFunction(UsbFunction { device: stick.clone(), function });
    let volume = |change| {
        Event::UsbVolume(UsbVolume {
            disk: disk.clone(),
            device: "sdb1".into(),
            file_system: "vfat".into(),
            mount_point: "/media/student5/USB".into(),
            read_only: false,
            change,
        })
    };
    let file = UsbFile {
        disk: disk.clone(),
        directory: "/media/student5/USB".into(),
        name: hostile.clone(),
        access: FileAccess::Written,
        bytes: Some(20_000_000),
        program: "cp".into(),
        pid: 4711,
        uid: Some(1005),
        user: "student5".into(),
    };
    let transfer = |phase, channel, counterpart, services| {
        Event::Transfer(Transfer {
            id: 7,
            phase,
            channel,
            counterpart,
            services,
            opened: Opened::Here,
            interface: "enx00e04c68".into(),
            first_wall_ns: WALL_NS - 3_000_000_000,
            last_wall_ns: WALL_NS - 2_000_000_000,
            traffic,
        })
    };
    let host = |address: [u16; 8]| Counterpart::Host(IpAddr::from(address));
    let lan = Counterpart::Host(IpAddr::from([10, 77, 0, 12]));
    let interface = Interface { name: "eth0".into(), index: 2, hook: Hook::Tcx };
    let gap = |reason, count| {
        Event::Gap(Gap { reason, from_wall_ns: WALL_NS - 9_000_000_000, to_wall_ns: WALL_NS, count })
    };
    let coverage = Coverage {
        interfaces: vec!["eth0".into(), "wlan0".into()],
        usb: true,
        flows: 412,
        transfers: 3,
        seen: 1_000_000,
        counted: 999_000,
        not_ip: 900,
        not_ip_bytes: 54_000,
        other_protocol: 100,
        other_protocol_bytes: 8_400,
        backlog: 17,
        ..Coverage::default()
    };
    vec![
        Event::AgentStarted(AgentStarted {
            version: "0.1.0".into(),
            kernel: "6.1.0-40-amd64".into(),
            hostname: "pc-17".into(),
            boot_id: [0x5a; 16],
            previous_run_died: true,
        }),
        Event::AgentStopped,
        Event::InterfaceAttached(interface.clone()),
        Event::InterfaceDetached(Interface { hook: Hook::XdpClsact, ..interface }),
        Event::InterfaceFailed(InterfaceFailed {
            name: "usb0".into(),
            index: 9,
            error: "no such device".into(),
        }),
        function(Function::Disk { name: "sdb".into(), bytes: 32_010_928_128 }),
        function(Function::Network { interface: "usb0".into(), kind: UsbNetwork::Phone }),
        function(Function::Serial { tty: "ttyUSB0".into() }),
        volume(VolumeChange::Mounted),
        volume(VolumeChange::Unmounted { moved: traffic }),
        volume(VolumeChange::PulledOut { moved: traffic, unwritten: 4096 }),
        Event::UsbFile(UsbFile { bytes: None, uid: None, access: FileAccess::Read, ..file.clone() }),
        Event::UsbFile(file),
        Event::UsbFilesUnseen(UsbFilesUnseen {
            reason: FilesUnseen::TooMany,
            from_wall_ns: WALL_NS - 1_000_000_000,
            to_wall_ns: WALL_NS,
            count: Some(4711),
        }),
        Event::DevicePresent(stick.clone()),
        Event::DeviceAdded(stick.clone()),
        Event::DeviceRemoved(UsbDevice { interfaces: Vec::new(), ..stick }),
        transfer(Phase::Started, Channel::Lan, lan.clone(), vec![Service::Tcp(9000), Service::Udp(5004)]),
        match transfer(Phase::Progress, Channel::Lan, lan, vec![Service::Tcp(9000)]) {
            Event::Transfer(transfer) => Event::TransferOverUsb(transfer),
            other => other,
        },
        transfer(
            Phase::Progress,
            Channel::Internet,
            host([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
            vec![Service::Quic(443)],
        ),
        transfer(
            Phase::Ended(EndReason::Silence),
            Channel::Internet,
            host([0, 0, 0, 0, 0, 0xffff, 0xc633, 0x640a]),
            vec![Service::Tcp(443)],
        ),
        transfer(
            Phase::Ended(EndReason::DeviceRemoved),
            Channel::Usb,
            Counterpart::Disk(disk),
            vec![Service::Storage],
        ),
        Event::Muted(Muted {
            label: "service:dns".into(),
            from_wall_ns: WALL_NS - 30_000_000_000,
            to_wall_ns: WALL_NS,
            traffic,
            flows: 12,
        }),
        Event::Coverage(coverage),
        gap(GapReason::SpoolFull, Some(4711)),
        gap(GapReason::UsbMessagesLost, None),
        gap(GapReason::HistoryRestarted, None),
        Event::Filter(Filter::Loaded { prefixes: 3_791, labels: 4 }),
        Event::Filter(Filter::Refused { error: "ip.txt: line 4: `10.0.0.1/8` is not a prefix".into() }),
    ]
}

/// For [`crate::records::record`].
pub fn record() -> Vec<Vec<u8>> {
    records()
}

/// For [`crate::records::logline`].
pub fn logline() -> Vec<Vec<u8>> {
    let received = (WALL_NS + 6_000_000_000).to_le_bytes();
    (0..).zip(records()).map(|(zone, record)| [&[zone], &received[..], &record].concat()).collect()
}

/// The payload of a message's frame, and for some of them the frame.
fn payload(message: &impl Serialize) -> Vec<u8> {
    encoded(message)[FRAME_HEADER..].to_vec()
}

fn encoded(message: &impl Serialize) -> Vec<u8> {
    encode_frame(message).expect("a small message")
}

/// For [`crate::wire::frame`].
pub fn frame() -> Vec<Vec<u8>> {
    let checkpoint =
        Checkpoint { size: 4711, head: [7; 32], signed_ns: WALL_NS, signature: [[8; 32], [9; 32]] };
    let hello = Hello {
        version: 1,
        agent_version: "0.1.0".into(),
        hostname: "pc-17".into(),
        epoch: 0x1122_3344_5566_7788,
        oldest_seq: 40,
    };
    let about = About {
        agent_version: "0.1.0".into(),
        hostname: "pc-17".into(),
        boot_id: [0x5a; 16],
        run: 3,
        previous_died: false,
        instance: 0x99aa_bbcc_ddee_ff00,
        connect: 2,
        witness: Some(checkpoint.clone()),
    };
    let heartbeat = Heartbeat {
        boot_ns: 1 << 40,
        wall_ns: WALL_NS,
        spool_bytes: 4096,
        oldest_wall_ns: Some(WALL_NS),
        ..Heartbeat::default()
    };
    let csr_der = csr().swap_remove(0);
    let mut builder = BatchBuilder::default();
    for record in records() {
        builder.push(&Item::Record(record));
    }
    builder.push(&Item::Hole(300));
    let batch = builder.finish(7, 1).expect("it has items");
    let to_server = [
        ToServer::Hello(hello),
        ToServer::Batch(batch),
        ToServer::About(about),
        ToServer::Heartbeat(heartbeat),
        ToServer::Renew { csr_der },
        ToServer::Open(Open { epoch: 7, oldest_seq: 40, next_seq: 41 }),
    ];
    let to_agent = [
        ToAgent::Welcome { version: 1, next_seq: 41 },
        ToAgent::Ack { epoch: 7, seq: 60 },
        ToAgent::Resume { next_seq: 41 },
        ToAgent::Refused { reason: "this agent was revoked".into() },
        ToAgent::Expect { next_seq: 41, last: Some(Newest { seq: 40, fingerprint: [3; 16] }) },
        ToAgent::Heard { server_ns: WALL_NS, checkpoint: Some(checkpoint) },
        ToAgent::Renewed { certificate_der: vec![0x30; 300] },
    ];
    let payloads = to_server.iter().map(payload).chain(to_agent.iter().map(payload));
    payloads.chain([encoded(&to_server[0]), encoded(&to_agent[1])]).collect()
}

/// For [`crate::wire::batch`].
pub fn batch() -> Vec<Vec<u8>> {
    let content = |items: &[Item]| {
        let mut content = Vec::new();
        for item in items {
            match item {
                Item::Record(record) => {
                    content.extend((record.len() as u16).to_le_bytes());
                    content.extend(record);
                }
                Item::Hole(count) => {
                    content.extend(u16::MAX.to_le_bytes());
                    content.extend(count.to_le_bytes());
                }
            }
        }
        [&(items.len() as u16).to_le_bytes()[..], &1_u64.to_le_bytes(), &content].concat()
    };
    let items: Vec<_> = records().into_iter().map(Item::Record).collect();
    let with_holes = [items[0].clone(), Item::Hole(18), Item::Record(Vec::new())];
    let mut seeds = vec![content(&items), content(&with_holes), content(&[Item::Hole(1 << 40)])];
    seeds.extend(items.chunks(3).map(content));
    seeds
}

/// For [`crate::wire::enrolment`].
pub fn enrolment() -> Vec<Vec<u8>> {
    let request = Request {
        token_id: [1; 8],
        secret: [2; 32],
        csr_der: csr().swap_remove(0),
        hostname: "pc-17".into(),
        seat: "".into(),
    };
    let granted = Granted {
        agent: [3; 16],
        certificate_der: vec![0x30; 400],
        ca_der: vec![0x31; 300],
        event_port: 7443,
        seat: "pc-17".into(),
    };
    let replies = [Reply::Granted(granted), Reply::Refused { reason: "the token has expired".into() }];
    let mut seeds = vec![payload(&request), encoded(&request), payload(&replies[0]), payload(&replies[1])];
    seeds.push(encoded(&replies[1]));
    seeds
}

/// For [`crate::wire::token`].
pub fn token() -> Vec<Vec<u8>> {
    let token = |address: &str| {
        let token =
            Token { address: address.into(), ca_spki_sha256: [0xab; 32], id: [1; 8], secret: [0xcd; 32] };
        token.to_string()
    };
    let addresses = ["192.0.2.7:7444", "[2001:db8::1]:7444", "server.lab.example:7444"];
    let tokens = addresses.iter().map(|address| token(address));
    let texts =
        ["192.0.2.7", "::1", "[::1]:7444", "server.lab.example", "server:0", "24h", "30m", "7d", "1w2d"];
    tokens.chain(texts.map(str::to_owned)).map(String::into_bytes).collect()
}

/// For [`crate::server::csr`].
pub fn csr() -> Vec<Vec<u8>> {
    let keys = [&PKCS_ECDSA_P256_SHA256, &PKCS_ED25519, &PKCS_ECDSA_P384_SHA384]
        .map(|kind| KeyPair::generate_for(kind).expect("a key can be made"));
    let mut named = CertificateParams::new(["pc-17".to_owned()]).expect("a DNS name");
    named.distinguished_name.push(DnType::CommonName, "pc-17");
    let mut seeds = Vec::new();
    for params in [CertificateParams::default(), named] {
        for key in &keys {
            let request = params.serialize_request(key).expect("it can be signed");
            seeds.push(request.der().to_vec());
        }
        seeds.push(params.self_signed(&keys[0]).expect("it can be signed").der().to_vec());
    }
    seeds
}

/// For [`crate::server::ingest`].
pub fn ingest() -> Vec<Vec<u8>> {
    let hello = |oldest: u16| [&[0][..], &oldest.to_le_bytes()].concat();
    let batch = |first: u16, items: &[&[u8]]| {
        [&[2][..], &first.to_le_bytes(), &[items.len() as u8], &items.concat()].concat()
    };
    let (record, hole) = (&[7][..], &[1, 5][..]);
    let long_hole = &[&[0][..], &(1_u64 << 40).to_le_bytes()].concat();
    vec![
        [hello(1), batch(1, &[record, record, hole, record]), batch(3, &[record, record, record])].concat(),
        [hello(40), batch(40, &[hole, record]), hello(90), batch(80, &[long_hole, record])].concat(),
        [hello(1), batch(1, &[record; 15]), batch(1, &[record; 15]), batch(9, &[record; 15])].concat(),
        [&[1][..], &u64::MAX.to_le_bytes()].concat(),
        [&[1][..], &(i64::MAX as u64).to_le_bytes(), &[3], &(i64::MAX as u64).to_le_bytes(), &[1, 7]]
            .concat(),
    ]
}

/// For [`crate::server::seat`].
pub fn seat() -> Vec<Vec<u8>> {
    let long = [b'a'; 80];
    [&b"PC-17\0ubuntu"[..], b"\0ubuntu.lab.example", b"../../etc\0", b"\0", b"-rf", "Größe".as_bytes(), &long]
        .map(<[u8]>::to_vec)
        .into()
}

/// For [`crate::spool::spool`]: segments as the agent writes them, whole, torn and damaged.
pub fn spool() -> Vec<Vec<u8>> {
    let segment = |number: u8, epoch: u64, first_seq: u64, records: &[Vec<u8>]| {
        let mut bytes = Header { run: 3, number: number.into(), epoch, first_seq }.encode().to_vec();
        for (seq, record) in (first_seq..).zip(records) {
            push_frame(&mut bytes, seq, record);
        }
        (number, bytes)
    };
    let piece = |(number, bytes): (u8, Vec<u8>)| {
        [&[SEGMENT_AS_IT_IS, number][..], &(bytes.len() as u16).to_le_bytes(), &bytes].concat()
    };
    let run_file =
        |text: &str| [&[RUN_FILE_AS_IT_IS][..], &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat();
    let cut = |(number, mut bytes): (u8, Vec<u8>), at: usize| {
        bytes.truncate(at);
        (number, bytes)
    };
    let damaged = |(number, mut bytes): (u8, Vec<u8>)| {
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        (number, bytes)
    };
    let records = records();
    let first = segment(1, 7, 1, &records[..3]);
    let second = segment(2, 7, 4, &records[3..6]);
    let third = segment(3, 8, 1, &records[6..8]);
    let died = run_file(r#"{"run":3,"stopped":null}"#);
    // Two small records each, with right checksums by construction.
    let built = |number: u8, epoch: u8, first_seq: u8, how: u8| {
        [1, number, 3, epoch, first_seq, 0, 0, 2, 9, 3, 0, b'o', b'n', b'e', how, 3, 0, b't', b'w', b'o']
    };
    vec![
        [piece(first.clone()), piece(second.clone()), run_file(r#"{"run":3,"stopped":[7,7]}"#)].concat(),
        [piece(first.clone()), piece(second.clone()), piece(third.clone()), died.clone()].concat(),
        [piece(first.clone()), piece(cut(second.clone(), 100)), died.clone()].concat(),
        [piece(cut(first.clone(), 20)), piece(second.clone()), died.clone()].concat(),
        [piece(first.clone()), piece(damaged(second)), died.clone()].concat(),
        [piece(first.clone()), run_file("not JSON")].concat(),
        [piece(cut(first, 70)), piece(third)].concat(),
        [&built(1, 1, 1, 9)[..], &built(2, 1, 3, 9), &died].concat(),
        [&built(1, 1, 1, 0)[..], &built(2, 1, 2, 1), &built(3, 2, 1, 2), &died].concat(),
        [&[3, 9, 0, 0, 0, 5, 12, 0, 0][..], &built(7, 5, 10, 9)].concat(),
        [&[4, 3, 2, 0, b'x', b'y'][..], &[5, 9, 0, 0, 2, 0, b'x', b'y']].concat(),
    ]
}

/// For [`crate::kernel::tables`].
pub fn kernel() -> Vec<Vec<u8>> {
    // As `netmon_common::abi` has them: addresses, ports and what was seen, counters.
    let counts = |packets: u32| {
        let mut bytes = Vec::new();
        for word in [u64::from(packets) * 1500, 0, u64::from(packets) * 1448, 0] {
            bytes.extend(word.to_le_bytes());
        }
        let last_tick = (crate::kernel::NOW_NS >> netmon_common::abi::TICK_SHIFT) as u32;
        bytes.extend(last_tick.to_le_bytes());
        bytes.extend([1, 0, 0, 0]);
        bytes.extend([packets.to_le_bytes(), [0; 4]].concat());
        bytes
    };
    let ports = [&9000_u16.to_le_bytes()[..], &443_u16.to_le_bytes(), &[6, 0x12, 0, 2]].concat();
    let slot4 = |packets| {
        let slot = [&[10, 0, 0, 1, 198, 51, 100, 10][..], &ports, &counts(packets)].concat();
        [&slot[..], &[0; 32]].concat()
    };
    let slot6 = |packets| {
        let addresses = [&[0xfd][..], &[0; 14], &[1, 0x20, 1, 0xd, 0xb8], &[0; 11], &[2]].concat();
        [&addresses[..], &ports, &counts(packets), &[0; 8]].concat()
    };
    let life = |incarnation: u32| {
        let first_ns = crate::kernel::NOW_NS - 1_000_000;
        let head = [&incarnation.to_le_bytes()[..], &2_u32.to_le_bytes(), &first_ns.to_le_bytes()].concat();
        [&head[..], &[1], &[0; 15]].concat()
    };
    let evicted = |family: u32, slot: Vec<u8>, incarnation| {
        [&5_u32.to_le_bytes()[..], &family.to_le_bytes(), &slot, &life(incarnation)].concat()
    };
    let opened = |family: u8| {
        let mut record = vec![0; 64];
        (record[0], record[16], record[58], record[59], record[60]) = (10, 198, family, 17, 2);
        record
    };
    let write4 = |packets, incarnation| [&[0, 5][..], &slot4(packets), &[1, 5], &life(incarnation)].concat();
    let write6 =
        |packets, incarnation| [&[0x80, 5][..], &slot6(packets), &[0x81, 5], &life(incarnation)].concat();
    let sweep = [7, 0];
    let later = [5, 0, 0, 0, 0, 9];
    vec![
        [&write4(50, 1)[..], &sweep, &later, &write4(70, 1), &sweep].concat(),
        [&write6(50, 1)[..], &sweep, &write6(3, 2), &sweep, &[3, 0], &evicted(6, slot6(70), 1), &sweep]
            .concat(),
        [&write4(70, 1)[..], &[3, 0], &evicted(4, slot4(70), 1), &sweep, &write4(9, 4), &sweep].concat(),
        [&[2, 0][..], &opened(4), &[2, 0], &opened(6), &[2, 0], &opened(5), &[3, 0], &opened(4)].concat(),
        [&write4(50, 1)[..], &write6(4, 1), &[6, 0], &1_000_000_000_u64.to_le_bytes()].concat(),
    ]
}

/// For [`crate::kernel::netlink`]: answers as the kernel writes them.
pub fn netlink() -> Vec<Vec<u8>> {
    let attribute = |kind: u16, value: &[u8]| {
        let padding = value.len().next_multiple_of(4) - value.len();
        let length = value.len() as u16 + 4;
        [&length.to_le_bytes()[..], &kind.to_le_bytes(), value, &vec![0; padding]].concat()
    };
    let message = |kind: u16, body: &[u8]| {
        let length = body.len() as u32 + 16;
        let head = [&length.to_le_bytes()[..], &kind.to_le_bytes(), &[2, 0], &[1, 0, 0, 0], &[9, 0, 0, 0]];
        [&head.concat()[..], body].concat()
    };
    // RTM_NEWLINK (16): family, link type, index, flags; IFLA_IFNAME (3), IFLA_LINK (5), IFLA_MASTER (10),
    // IFLA_LINKINFO (18) with IFLA_INFO_KIND (1), IFLA_XDP (43) with IFLA_XDP_PROG_ID (4).
    let link_head = [0, 0, 1, 0, 2, 0, 0, 0, 0x43, 0x10, 1, 0, 0, 0, 0, 0];
    let link = message(
        16,
        &[
            &link_head[..],
            &attribute(3, b"eth0.7\0"),
            &attribute(5, &[3, 0, 0, 0]),
            &attribute(10, &[4, 0, 0, 0]),
            &attribute(18, &attribute(1, b"vlan\0")),
            &attribute(43, &attribute(4, &[77, 0, 0, 0])),
        ]
        .concat(),
    );
    // RTM_NEWTFILTER (44): index, handle, parent, info; TCA_KIND (1), TCA_OPTIONS (2) with TCA_BPF_NAME (7) and
    // TCA_BPF_ID (11).
    let filter_head = [0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0xf2, 0xff, 0xff, 0xff, 3, 0, 1, 0];
    let options = [attribute(7, b"nm_tc_ingress\0"), attribute(11, &[78, 0, 0, 0])].concat();
    let filter = message(44, &[&filter_head[..], &attribute(1, b"bpf\0"), &attribute(2, &options)].concat());
    // NLMSG_DONE (3), NLMSG_ERROR (2) with ENODEV.
    let done = message(3, &[0; 4]);
    let error = message(2, &[&(-19_i32).to_le_bytes()[..], &[0; 16]].concat());
    let asked = 2_u32.to_le_bytes();
    vec![
        [&asked[..], &link].concat(),
        [&asked[..], &filter, &filter, &done].concat(),
        [&asked[..], &error].concat(),
        [&asked[..], &link, &link, &done].concat(),
    ]
}

/// For [`crate::packet::packet`].
pub fn packet() -> Vec<Vec<u8>> {
    let ethernet = |kind: [u8; 2], rest: &[u8]| {
        let stations = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        [&[0xff][..], &stations, &kind, rest].concat()
    };
    let ipv4 = |options: u8, fragment: u16, protocol: u8, rest: &[u8]| {
        let header_words = 5 + options;
        let total = u16::from(header_words) * 4 + rest.len() as u16;
        let [total, fragment] = [total, fragment].map(u16::to_be_bytes);
        let head = [
            &[0x40 | header_words, 0][..],
            &total,
            &[0x12, 0x34],
            &fragment,
            &[64, protocol, 0, 0, 10, 0, 0, 1, 198, 51, 100, 10],
        ];
        [&head.concat()[..], &vec![1; usize::from(options) * 4], rest].concat()
    };
    let ipv6 = |next: u8, rest: &[u8]| {
        let addresses = [&[0xfd][..], &[0; 14], &[1, 0x20, 1, 0xd, 0xb8], &[0; 11], &[2]].concat();
        let length = (rest.len() as u16).to_be_bytes();
        [&[0x60, 0, 0, 0][..], &length, &[next, 64], &addresses, rest].concat()
    };
    let tcp =
        [&[0x23, 0x28, 1, 0xbb, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0][..], b"data"].concat();
    let tcp_with_options = [&tcp[..12], &[0x80, 2, 1, 0, 0, 0, 0, 0], &[1; 12]].concat();
    let quic = [&[0x23, 0x28, 1, 0xbb, 0, 20, 0, 0][..], &[0xc3, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6]].concat();
    let hop_by_hop = |rest: &[u8]| [&[44, 0, 5, 2, 0, 0, 1, 0][..], rest].concat();
    let fragment = |offset: [u8; 2], rest: &[u8]| [&[17, 0][..], &offset, &[1, 2, 3, 4], rest].concat();
    let authentication = [&[6, 4, 0, 0][..], &[7; 20], &tcp].concat();
    let vlan = |inner: [u8; 2], rest: &[u8]| [&[0, 7][..], &inner, rest].concat();
    let bare = |rest: Vec<u8>| [&[0xfe][..], &rest].concat();
    let partly = |mut seed: Vec<u8>| {
        seed[0] = 1 | 20 << 1;
        seed
    };
    let (v4, v6) = ([8, 0], [0x86, 0xdd]);
    vec![
        ethernet(v4, &ipv4(0, 0x4000, 6, &tcp)),
        ethernet(v4, &ipv4(0, 0, 17, &quic)),
        ethernet(v4, &ipv4(2, 0, 6, &tcp_with_options)),
        ethernet(v4, &ipv4(0, 0x2000, 17, &quic)),
        ethernet(v4, &ipv4(0, 0x2002, 17, &quic)),
        ethernet(v4, &ipv4(0, 0, 1, &[8, 0, 0, 0])),
        ethernet(v6, &ipv6(6, &tcp)),
        ethernet(v6, &ipv6(17, &quic)),
        ethernet(v6, &ipv6(0, &hop_by_hop(&fragment([0, 1], &quic)))),
        ethernet(v6, &ipv6(44, &fragment([0, 0x19], &quic))),
        ethernet(v6, &ipv6(51, &authentication)),
        ethernet([0x81, 0], &vlan(v4, &ipv4(0, 0, 6, &tcp))),
        ethernet([0x88, 0xa8], &vlan([0x81, 0], &vlan(v6, &ipv6(17, &quic)))),
        ethernet([8, 6], &[0, 1, 8, 0, 6, 4]),
        bare(ipv4(0, 0, 6, &tcp)),
        bare(ipv6(17, &quic)),
        partly(ethernet(v4, &ipv4(0, 0, 6, &tcp))),
        // With the padding of a short frame.
        [&ethernet(v4, &ipv4(0, 0, 17, &quic[..10]))[..], &[0; 20]].concat(),
    ]
}

/// For [`crate::usb::usb`]: as udevd and the kernel say it.
pub fn usb() -> Vec<Vec<u8>> {
    let message = |properties: &[&str]| properties.join("\0");
    let device = |action: &str, rest: &[&str]| {
        let action = format!("ACTION={action}");
        let common = [
            &action,
            "DEVPATH=/devices/pci0000:00/0000:00:14.0/usb2/2-1",
            "SUBSYSTEM=usb",
            "DEVTYPE=usb_device",
            "SEQNUM=4711",
            "DEVNAME=/dev/bus/usb/002/002",
            "BUSNUM=002",
            "DEVNUM=002",
            "PRODUCT=951/1666/110",
            "TYPE=0/0/0",
        ];
        message(&[&common, rest].concat())
    };
    let by_udevd = [
        "ID_BUS=usb",
        "ID_VENDOR_ID=0951",
        "ID_MODEL_ID=1666",
        "ID_VENDOR=Kingston",
        "ID_VENDOR_ENC=Kingston",
        "ID_VENDOR_FROM_DATABASE=Kingston Technology",
        "ID_MODEL=DataTraveler_3.0",
        r"ID_MODEL_ENC=DataTraveler\x203.0\x0a\x5c",
        "ID_SERIAL=Kingston_DataTraveler_3.0_60A44C413FAE",
        "ID_SERIAL_SHORT=60A44C413FAE",
        "ID_USB_INTERFACES=:080650:030101:",
    ];
    let disk = |action: &str| {
        let action = format!("ACTION={action}");
        let disk =
            "DEVPATH=/devices/pci0000:00/0000:00:14.0/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0/block/sdb";
        message(&[
            &action,
            disk,
            "SUBSYSTEM=block",
            "DEVTYPE=disk",
            "DEVNAME=/dev/sdb",
            "MAJOR=8",
            "MINOR=16",
        ])
    };
    let hub = "ACTION=add\0DEVPATH=/devices/pci0000:00/0000:00:14.0/usb2/2-1\0SUBSYSTEM=usb\0\
               DEVTYPE=usb_device\0PRODUCT=1d6b/3/515\0TYPE=9/0/3\0ID_MODEL=Hub\0ID_USB_INTERFACES=:090000:";
    let stat = "@stat=     118        0     7424       15     8193        0        1        0        0        0        0";
    let descriptors = [
        &b"\0@manufacturer=Kingston\0@product=Data Traveler\0@serial=60A4\0@descriptors="[..],
        // Without zeros: they separate.
        &[18, 1, 1, 2, 1, 1, 1, 64, 0x51, 9, 0x66, 0x16, 0x10, 1, 1, 2, 3, 1],
        &[9, 4, 1, 1, 2, 8, 6, 0x50, 1, 7, 5, 0x81, 2, 1, 2, 1],
    ]
    .concat();
    let several = |messages: &[&str]| messages.join("\0\0").into_bytes();
    let mounts = "@mounts=21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/8:1 rw,errors=remount-ro\n\
                  90 21 8:17 / /media/1 rw,nosuid shared:50 - vfat /dev/8:17 ro,fmask=0022\n\
                  91 21 7:1 / /image\\040of\\134it rw - ext4 /dev/7:1 rw\n\
                  92 21 253:7 / /secret ro master:2 propagate_from:1 - xfs /dev/mapper/secret rw\n\
                  93 21 0:40 /sub /b rw - btrfs /dev/8:18 rw\n94 21 0:41 / /c rw - bcachefs /dev/8:1:/dev/8:2 rw\n\
                  95 21 8:17 /dir /bind rw - vfat /dev/8:17 ro\n";
    let added = device("add", &by_udevd);
    vec![
        added.clone().into_bytes(),
        several(&[&added, &disk("add"), stat, &disk("remove"), &device("remove", &[])]),
        several(&[&added, &device("bind", &by_udevd), &device("add", &["ID_MODEL=Another"])]),
        several(&[hub, &added, &device("remove", &[])]),
        [device("add", &[]).as_bytes(), &descriptors].concat(),
        several(&[&device("remove", &[]), &device("remove", &[]), stat]),
        several(&[stat, mounts]),
    ]
}

/// For [`crate::files::prefixes`].
pub fn prefixes() -> Vec<Vec<u8>> {
    let real: String = include_str!("../../ip.txt").lines().take(40).flat_map(|line| [line, "\n"]).collect();
    let texts = [
        &real,
        "# head\n[a]\n198.51.100.0/24 # behind\n\n[b]\n2001:db8::/32\n[a]\n192.0.2.0/24\n",
        "[a]\n10.0.0.1/8",
        "10.0.0.0/8",
        "[a]\n\n10.0.0.0/33",
        "[a]\n192.0.2.0/24\n[b]\n192.0.2.0/24",
        "[a",
        "[a b]",
        "[a]\n0.0.0.0/0",
        "[x]\r\n\u{1b}[2J",
    ];
    texts.map(|text| text.as_bytes().to_vec()).into()
}

/// For [`crate::usb_files::usb_files`]: a file that is written, one that is read, a full queue, another version.
pub fn usb_files() -> Vec<Vec<u8>> {
    let event = |version: u8, mask: u64, descriptor: i32| {
        let mut bytes = 24_u32.to_le_bytes().to_vec();
        bytes.extend([version, 0, 24, 0]);
        bytes.extend(mask.to_le_bytes());
        bytes.extend(descriptor.to_le_bytes());
        bytes.extend(4_711_u32.to_le_bytes());
        bytes
    };
    let turn = |events: &[Vec<u8>], path: &[u8]| {
        let status = b"Name:\tcp\nUmask:\t0022\nPid:\t4711\nUid:\t1005\t1005\t1005\t1005\n";
        let mut bytes = Vec::new();
        for block in [&events.concat(), path, status] {
            bytes.extend((block.len() as u16).to_le_bytes());
            bytes.extend(block);
        }
        // A tenth of a second later each time, the same file, changed just now.
        bytes.extend(events.iter().flat_map(|_| [0xe8, 3, 7, 0, 0x10, 0, 0, 0, 0, 0, 0, 0]));
        bytes
    };
    let written = turn(&[event(3, 0x22, 9), event(3, 0x02, 10), event(3, 0x08, 11)], b"/media/USB/exam.pdf");
    let read = turn(&[event(3, 0x20, 9), event(3, 0x11, 10)], b"/media/USB/a\n\x1b[2J (deleted)");
    let lost = turn(&[event(3, 0x4000, -1), event(3, 0x01, -1)], b"");
    let other = turn(&[event(4, 0x20, 9)], b"/x");
    vec![[&written[..], &read, &written].concat(), read, lost, other]
}

/// For [`crate::files::config`].
pub fn config() -> Vec<Vec<u8>> {
    let example = include_str!("../../deploy/agent.toml");
    // The settings alone, commented in.
    let settings: String =
        example.lines().filter_map(|line| line.strip_prefix("#= ")).flat_map(|l| [l, "\n"]).collect();
    let texts = [
        &settings,
        "",
        "[capture]\nmode = \"xdp\"\ninterfaces = [\"eth0\", \"usb*\", \"auto\"]\nlan = [\"2001:db8::/48\"]\nflows = 1024\n",
        "[capture]\ninterfaces = [\"a/b\"]\n",
        "[filter]\nlist = \"/etc/netmon/ip.txt\"\n[filter.services]\nssh = [\"tcp/22\"]\n",
        "[filter.services]\ndns = [\"53\"]\n",
        "[report]\ncoverage_s = 0\n",
        "report = { muted_s = 3600, coverage_s = 1 }\nspool.max_mib = 1048576\n",
        "[log]\nkernel = \"trace\"\nmax_mib = 18446744073709551615\n",
    ];
    texts.map(|text| text.as_bytes().to_vec()).into()
}

/// Payload with a byte in front that says how, its offset where it has one, and its length.
fn piece(how: u8, seq: Option<u16>, bytes: &[u8]) -> Vec<u8> {
    let seq = seq.map(u16::to_le_bytes).unwrap_or_default();
    let at: &[u8] = if seq == [0, 0] { &[] } else { &seq };
    [&[how], at, &(bytes.len() as u16).to_le_bytes(), bytes].concat()
}

fn quic_hello() -> Vec<u8> {
    let name = "quic.example.org".try_into().expect("a name");
    let mut client =
        rustls::quic::ClientConnection::new(client_config(), rustls::quic::Version::V1, name, vec![1; 60])
            .expect("a client");
    let mut hello = Vec::new();
    client.write_hs(&mut hello);
    hello
}

fn client_config() -> std::sync::Arc<rustls::ClientConfig> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h3".to_vec()];
    std::sync::Arc::new(config)
}

/// A hello in one segment and in three, a request, mail that becomes TLS, a tunnel; a question and an answer over TCP.
pub fn names_tcp() -> Vec<Vec<u8>> {
    let name = "www.example.org".try_into().expect("a name");
    let mut client = rustls::ClientConnection::new(client_config(), name).expect("a client");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("memory");
    let sent = |port: u8, at: usize, bytes: &[u8]| piece(4 | port, Some(0x100 + at as u16), bytes);
    let request = b"GET / HTTP/1.1\r\nHost: www.example.org:8080\r\nUser-Agent: curl\r\n\r\n";
    let ech = {
        // As a hello without extensions, with some put in.
        let extensions = b"\0\0\0\x17\0\x15\0\0\x12cloudflare-ech.com\xfe\x0d\0\x04\0\0\x01\0";
        let body =
            [b"\x03\x03", &[7; 32][..], b"\0\0\x02\x13\x01\x01\0\0", &[extensions.len() as u8], extensions]
                .concat();
        [b"\x16\x03\x01\0", &[body.len() as u8 + 4][..], b"\x01\0\0", &[body.len() as u8], &body].concat()
    };
    vec![
        sent(0, 0, &hello),
        [sent(0, 200, &hello[200..]), sent(0, 0, &hello[..90]), sent(0, 90, &hello[90..200])].concat(),
        sent(1, 0, request),
        [sent(1, 30, &request[30..]), sent(1, 0, &request[..30])].concat(),
        [sent(3, 0, b"EHLO pc\r\n"), sent(3, 9, b"STARTTLS\r\n"), sent(3, 19, &hello)].concat(),
        [sent(1, 0, b"CONNECT 192.0.2.1:443 HTTP/1.1\r\n\r\n"), sent(1, 34, &hello)].concat(),
        sent(1, 0, b"GET http://proxied.example/ HTTP/1.1\r\nHost: other.example\r\n\r\n"),
        sent(0, 0, &ech),
        [
            piece(4 | 2, Some(0x100), &[&[0, question().len() as u8], &question()[..]].concat()),
            piece(2, Some(0x100), &[&[0, answer().len() as u8], &answer()[..]].concat()),
        ]
        .concat(),
    ]
}

/// Initial packets whole, in pieces, after a Retry, in version 2; Google's hello, a DTLS hello; multicast DNS and DHCP.
pub fn names_udp() -> Vec<Vec<u8>> {
    let hello = quic_hello();
    let crypto = |from: usize, to: usize| {
        let number = |value: usize| (value as u16 | 0x4000).to_be_bytes();
        [&[6], &number(from)[..], &number(to - from), &hello[from..to]].concat()
    };
    let (half, all) = (hello.len() / 2, hello.len());
    let sent = |how: u8, bytes: &[u8]| piece(4 | how, None, bytes);
    let whole = protected(rustls::quic::Version::V1, b"outside", b"outside", 0, &crypto(0, all));
    let chlo = b"CHLO\x02\0\0\0SNI\0\x0f\0\0\0VER\0\x13\0\0\0www.example.orgQ046";
    let dtls_body =
        [b"\xfe\xfd", &[7; 32][..], b"\0\0\0\x02\x13\x01\x01\0\0\x0e\0\0\0\x0a\0\x08\0\0\x05a.org"].concat();
    let length = dtls_body.len() as u8;
    let dtls = [
        &[
            22,
            0xfe,
            0xff,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            length + 12,
            1,
            0,
            0,
            length,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            length,
        ][..],
        &dtls_body,
    ]
    .concat();
    let mut dhcp =
        [&[1, 1, 6, 0, 1, 2, 3, 4][..], &[0; 20], &[2, 0, 0, 0, 0, 9], &[0; 10], &[0; 192]].concat();
    dhcp.extend(b"\x63\x82\x53\x63\x35\x01\x03\x32\x04\x0a\x4d\x00\x09\x0c\x05pc-23\xff");
    let mdns =
        b"\0\0\x84\0\0\0\0\x01\0\0\0\0\x05pc-23\x05local\0\0\x01\x80\x01\0\0\0\x78\0\x04\xcb\0\x71\x09";
    vec![
        sent(0x10, &crypto(0, all)),
        [sent(0x10, &crypto(half, all)), sent(0x50, &[&[1, 0, 0][..], &crypto(0, half)].concat())].concat(),
        [sent(0x10, &crypto(0, half)), sent(0x20, &crypto(0, half)), sent(0x20, &crypto(half, all))].concat(),
        [sent(0x10, &crypto(0, half)), sent(0x70, &crypto(half, all))].concat(),
        sent(0x30, &crypto(0, all)),
        sent(0, &whole),
        sent(0, &[b"\x09outside.Q043\x01", &[0x22; 12][..], b"\xa0\x01\x40\x00", chlo].concat()),
        sent(0, &[b"\xc3Q046\x50outside.\0\0\0\x01", &[0x22; 12][..], b"\xa0\x01\x40\x00", chlo].concat()),
        sent(0, &dtls),
        piece(2, None, mdns),
        piece(3, None, &dhcp),
        [sent(1, &question()), piece(1, None, &answer())].concat(),
    ]
}

/// Question 7 for the address of www.example.org.
fn question() -> Vec<u8> {
    b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x03www\x07example\x03org\0\0\x01\0\x01".to_vec()
}

/// Its answer, over an alias.
fn answer() -> Vec<u8> {
    let mut answer = question();
    answer[2..8].copy_from_slice(b"\x81\x80\0\x01\0\x02");
    answer.extend(b"\xc0\x0c\0\x05\0\x01\0\0\0\x3c\0\x06\x03cdn\xc0\x10");
    answer.extend(b"\xc0\x2d\0\x01\0\x01\0\0\0\x3c\0\x04\xcb\0\x71\x03");
    answer
}

/// Question, answer and a list of domains.
pub fn dns() -> Vec<Vec<u8>> {
    let block = |bytes: &[u8]| [&(bytes.len() as u16).to_le_bytes(), bytes].concat();
    let mut https = question();
    https[2..8].copy_from_slice(b"\x81\x80\0\x01\0\x01");
    // Priority 1, the owner itself; hints of both families; an ECH configuration with its public name.
    let ech =
        [b"\0\x24\xfe\x0d\0\x20\x09\0\x20\0\x04aaaa\0\x04\0\x01\0\x01\0", &[13][..], b"front.example\0\0"]
            .concat();
    let value = [
        b"\0\x01\0\0\x04\0\x04\xcb\0\x71\x06\0\x05",
        &(ech.len() as u16).to_be_bytes()[..],
        &ech,
        b"\0\x06\0\x10\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x06",
    ]
    .concat();
    https.extend(
        [b"\xc0\x0c\0\x41\0\x01\0\0\x01\x2c", &(value.len() as u16).to_be_bytes()[..], &value].concat(),
    );
    let list = "# rules\nexample.org\n=www.example.net\nb\u{fc}cher.example\n".as_bytes();
    vec![
        [block(&question()), block(&answer()), block(list)].concat(),
        [block(&question()), block(&https), block(b"*.example.org\n")].concat(),
        [block(&question()), block(&question()), block(b"10.0.0.0/8\n")].concat(),
    ]
}
