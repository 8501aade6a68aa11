//! What the simulated agents deliver: records as a PC of a room makes them.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use jiff::tz::TimeZone;
use netmon_common::logline;
use netmon_common::model::{
    Channel, Counterpart, Coverage, EndReason, Event, Muted, Opened, Phase, Record, Service, Traffic,
    Transfer, UsbDevice, UsbInterface,
};
use netmon_common::wire::{BatchBuilder, Item, MAX_BATCH_RECORDS, ToServer, encode_frame};

/// Epoch of every simulated agent's spool.
pub const EPOCH: u64 = 7;

/// Record number `seq`, some milliseconds before `wall_ns`. Of twenty records fourteen are about transfers, four are muted
/// totals, one is "still watching" and one a USB device.
pub fn record(seq: u64, wall_ns: i64) -> Record {
    // No two times are alike, and none follows from the one before: that would compress too well.
    let ago_ns = mixed(seq) >> 32 & 0xfff_ffff;
    let wall_ns = wall_ns - ago_ns as i64;
    let event = match seq % 20 {
        5 => coverage(seq),
        10 => Event::DeviceAdded(stick(seq)),
        3 | 8 | 13 | 18 => Event::Muted(Muted {
            label: ["service:dns", "google", "cloudflare", "service:ntp"][(seq / 5 % 4) as usize].into(),
            from_wall_ns: wall_ns - 60_000_000_000,
            to_wall_ns: wall_ns,
            traffic: traffic(seq * 300),
            flows: seq % 50,
        }),
        kind => Event::Transfer(transfer(seq, kind, wall_ns)),
    };
    Record { seq, run: 3, boot_ns: 5_000_000_000_000 + seq * 250_000_000 - ago_ns, wall_ns, event }
}

fn transfer(seq: u64, kind: u64, wall_ns: i64) -> Transfer {
    let is_lan = seq.is_multiple_of(3);
    let [.., high, low] = mixed(seq).to_be_bytes();
    let address = if is_lan { Ipv4Addr::new(10, 77, 0, low) } else { Ipv4Addr::new(198, 51, high, low) };
    let (phase, moved) = match kind % 5 {
        0 | 2 => (Phase::Started, 1_400),
        1 | 4 => (Phase::Ended(EndReason::Silence), mixed(seq) % 50_000_000),
        _ => (Phase::Progress, mixed(seq) % 50_000_000),
    };
    Transfer {
        id: seq / 2,
        phase,
        channel: if is_lan { Channel::Lan } else { Channel::Internet },
        counterpart: Counterpart::Host(IpAddr::V4(address)),
        services: vec![if is_lan { Service::Tcp(445) } else { Service::Quic(443) }],
        opened: Opened::Here,
        interface: "enp0s31f6".into(),
        first_wall_ns: wall_ns - 2_400_000_000 - (mixed(seq) >> 40) as i64,
        last_wall_ns: wall_ns - 2_000_000_000 - (mixed(seq) >> 41) as i64,
        traffic: traffic(moved),
    }
}

/// A number that looks like none before it: the finalizer of SplitMix64 (Steele, Lea, Flood: "Fast splittable
/// pseudorandom number generators", 2014).
fn mixed(number: u64) -> u64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn traffic(payload: u64) -> Traffic {
    let packets = payload / 1_400 + 1;
    Traffic {
        tx_bytes: payload / 20 + packets * 40,
        rx_bytes: payload + packets * 40,
        tx_payload: payload / 20,
        rx_payload: payload,
        tx_packets: packets / 2 + 1,
        rx_packets: packets,
    }
}

fn stick(seq: u64) -> UsbDevice {
    UsbDevice {
        devpath: "/devices/pci0000:00/0000:00:14.0/usb2/2-1".into(),
        bus: 2,
        number: (seq % 128) as u16,
        vendor_id: 0x0951,
        product_id: 0x1666,
        vendor: "Kingston".into(),
        model: "DataTraveler 3.0".into(),
        serial: format!("60A44C41{seq:08X}").as_str().into(),
        interfaces: vec![UsbInterface { class: 8, subclass: 6, protocol: 80 }],
    }
}

fn coverage(seq: u64) -> Event {
    Event::Coverage(Coverage {
        interfaces: vec!["enp0s31f6".into()],
        usb: true,
        flows: seq % 700,
        transfers: seq % 9,
        seen: seq * 12_345,
        counted: seq * 12_300,
        not_ip: seq * 40,
        not_ip_bytes: seq * 2_400,
        other_protocol: seq * 5,
        other_protocol_bytes: seq * 420,
        ..Coverage::default()
    })
}

/// A batch as it goes over the wire, and the number of its last record.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// The ack for this number is the ack for all of it.
    pub last_seq: u64,
}

/// Batches of at most `size` records from number `first_seq` on, `count` records in all. They are recorded at `wall_ns`.
///
/// # Errors
/// A batch does not fit into a frame.
pub fn frames(first_seq: u64, count: u64, size: u32, wall_ns: i64) -> Result<Vec<Frame>> {
    let size = u64::from(size.clamp(1, MAX_BATCH_RECORDS));
    let end = first_seq + count;
    let firsts = (first_seq..end).step_by(size as usize);
    firsts
        .map(|first| {
            let last_seq = (first + size).min(end) - 1;
            let mut batch = BatchBuilder::default();
            for seq in first..=last_seq {
                anyhow::ensure!(
                    batch.push(&Item::Record(record(seq, wall_ns).to_bytes()?)),
                    "a batch of {size} records is too large"
                );
            }
            let bytes = encode_frame(&ToServer::Batch(batch.finish(EPOCH, first)?))?;
            Ok(Frame { bytes, last_seq })
        })
        .collect()
}

/// The same events as lines of text, for those who take such.
pub fn lines(count: u64, wall_ns: i64) -> Vec<String> {
    (1..=count).map(|seq| logline::line(&record(seq, wall_ns), &TimeZone::system())).collect()
}

#[cfg(test)]
mod tests {
    use netmon_common::wire::FrameHeader;

    use super::*;

    const AT: i64 = 1_795_437_725_000_000_000;

    #[test]
    fn records_are_of_the_usual_size_and_of_every_kind() {
        let records: Vec<Record> = (1..=1000).map(|seq| record(seq, AT)).collect();
        let bytes: usize = records.iter().map(|record| record.to_bytes().unwrap().len()).sum();
        assert!((60..140).contains(&(bytes / records.len())), "{} bytes", bytes / records.len());
        let usb = records.iter().filter(|record| logline::is_usb(&record.event)).count();
        let transfers = records.iter().filter(|record| matches!(record.event, Event::Transfer(_))).count();
        assert_eq!((usb >= 50, transfers), (true, 700));
    }

    #[test]
    fn frames_hold_every_record_once() {
        let frames = frames(11, 1203, 500, AT).unwrap();
        let mut next = 11;
        for frame in &frames {
            let (header, payload) = frame.bytes.split_first_chunk().unwrap();
            let message = FrameHeader::parse(*header).unwrap().decode(payload).unwrap();
            let ToServer::Batch(batch) = message else { panic!("no batch") };
            assert_eq!(batch.first_seq, next);
            next += batch.unpack().unwrap().len() as u64;
            assert_eq!(frame.last_seq, next - 1);
        }
        assert_eq!((frames.len(), next), (3, 1214));
    }
}
