//! The events that an agent records, as both ends know them.
//!
//! Every event goes into the agent's log, its spool, over the wire and into the server's store as one
//! [`Record`]. Times called `wall` are nanoseconds since 1970-01-01T00:00:00Z by the PC's clock; times called
//! `boot` are nanoseconds of its boot clock (`CLOCK_BOOTTIME`: goes on in suspend, cannot be set).

mod usb;
mod who;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::raw::Raw;

pub use usb::*;
pub use who::*;

/// Longest encoded record, in bytes. A record of the largest event is well below; see the test.
pub const MAX_RECORD: usize = 16 * 1024;

/// One event with its place in the agent's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Number within the spool's epoch: starts at 1, grows by 1, never repeats.
    pub seq: u64,
    /// How often the agent had been started with this spool: 1 for the first run.
    pub run: u32,
    /// When it was recorded, boot clock.
    pub boot_ns: u64,
    /// When it was recorded, the PC's wall clock.
    pub wall_ns: i64,
    /// What happened.
    pub event: Event,
}

/// Why bytes are not a record.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RecordError {
    /// Longer than [`MAX_RECORD`].
    #[error("a record of {0} bytes is longer than the limit of {MAX_RECORD}")]
    TooLong(usize),
    /// Not what postcard wrote for a [`Record`], or more than that.
    #[error("not a record: {0}")]
    Malformed(&'static str),
}

impl Record {
    /// The record's bytes in spool, wire and store.
    ///
    /// # Errors
    /// [`RecordError::TooLong`] when the event holds more than any event should.
    pub fn to_bytes(&self) -> Result<Vec<u8>, RecordError> {
        let bytes = postcard::to_stdvec(self).map_err(|_| RecordError::Malformed("does not encode"))?;
        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// Reads exactly one record; anything left over is an error.
    ///
    /// # Errors
    /// [`RecordError`] says what is wrong with the bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLong(bytes.len()));
        }
        match postcard::take_from_bytes::<Self>(bytes) {
            Ok((record, [])) => Ok(record),
            Ok(_) => Err(RecordError::Malformed("bytes follow the record")),
            Err(_) => Err(RecordError::Malformed("does not decode")),
        }
    }
}

/// The part of a record that is the same for all kinds of events, of newer agents, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordHead {
    /// [`Record::seq`].
    pub seq: u64,
    /// [`Record::run`].
    pub run: u32,
    /// [`Record::boot_ns`].
    pub boot_ns: u64,
    /// [`Record::wall_ns`].
    pub wall_ns: i64,
    /// Which kind of event follows.
    kind: u32,
}

impl RecordHead {
    /// Reads the beginning of a record whose event is of a kind that only newer agents record; `None`: it is none such.
    pub fn of_newer(bytes: &[u8]) -> Option<Self> {
        let (head, _) = postcard::take_from_bytes::<Self>(bytes).ok()?;
        (bytes.len() <= MAX_RECORD && head.kind >= Event::KINDS).then_some(head)
    }

    /// The bytes of such a record under another number; `None`: it is none such.
    pub fn renumbered(bytes: &[u8], seq: u64) -> Option<Vec<u8>> {
        Self::of_newer(bytes)?;
        // The number stands first.
        let (_, rest) = postcard::take_from_bytes::<u64>(bytes).ok()?;
        let mut renumbered = postcard::to_stdvec(&seq).ok()?;
        renumbered.extend_from_slice(rest);
        (renumbered.len() <= MAX_RECORD).then_some(renumbered)
    }
}

impl Event {
    /// Kinds that this version knows.
    const KINDS: u32 = 22;

    /// The transfer, whatever its way.
    pub fn transfer(&self) -> Option<&Transfer> {
        match self {
            Self::Transfer(transfer) | Self::TransferOverUsb(transfer) => Some(transfer),
            Self::NamedTransfer(named) => Some(&named.transfer),
            _ => None,
        }
    }
}

/// What an agent records. New kinds are added at the end: the order is the encoding. A server keeps records of kinds that
/// it does not know, so servers are updated first; nothing is ever added to a kind that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The agent began to watch.
    AgentStarted(AgentStarted),
    /// The agent ended in good order.
    AgentStopped,
    /// An interface is watched from now on.
    InterfaceAttached(Interface),
    /// An interface is gone, or no longer watched.
    InterfaceDetached(Interface),
    /// A USB device that was there when the agent started.
    DevicePresent(UsbDevice),
    /// A USB device was plugged in.
    DeviceAdded(UsbDevice),
    /// A USB device was unplugged.
    DeviceRemoved(UsbDevice),
    /// A transfer started, goes on, or ended.
    Transfer(Transfer),
    /// Traffic that makes no transfer lines, summed.
    Muted(Muted),
    /// "Still watching": what was covered, and every loss counter.
    Coverage(Coverage),
    /// Something was not seen or not kept.
    Gap(Gap),
    /// The filter list was loaded, or a new one was refused.
    Filter(Filter),
    /// An interface that was to be watched cannot be. When that ends, a [`Gap`] says how long it was so.
    InterfaceFailed(InterfaceFailed),
    /// The kernel made something of a USB device: a disk, a network interface, a serial port.
    UsbFunction(UsbFunction),
    /// A file system on a USB disk was mounted or unmounted.
    UsbVolume(UsbVolume),
    /// A file on a USB disk was read or written.
    UsbFile(UsbFile),
    /// File names of USB disks that are not known.
    UsbFilesUnseen(UsbFilesUnseen),
    /// As [`Event::Transfer`], on an interface that is a USB adapter, phone or modem.
    TransferOverUsb(Transfer),
    /// As [`Event::Transfer`], with what is known of who had it.
    NamedTransfer(Box<NamedTransfer>),
    /// Somebody logged in or out.
    Login(Login),
    /// "Still listening": what of names and programs was lost.
    NamesCoverage(NamesCoverage),
    /// Who a host of the private network is.
    Neighbour(Neighbour),
}

/// Who watches, where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStarted {
    /// The agent's version.
    pub version: Raw,
    /// The PC's kernel release.
    pub kernel: Raw,
    /// The PC's host name.
    pub hostname: Raw,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: [u8; 16],
    /// True when the run before this one did not end with [`Event::AgentStopped`].
    pub previous_run_died: bool,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name, for example `eth0`.
    pub name: Raw,
    /// Kernel's index.
    pub index: u32,
    /// How its packets are seen.
    pub hook: Hook,
}

/// An interface that cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceFailed {
    /// Name.
    pub name: Raw,
    /// Kernel's index.
    pub index: u32,
    /// Why, for people.
    pub error: Raw,
}

/// Where the programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hook {
    /// TCX links, ingress and egress (kernel 6.6).
    Tcx,
    /// clsact filters, ingress and egress.
    Clsact,
    /// XDP for ingress, TCX for egress.
    XdpTcx,
    /// XDP for ingress, clsact for egress.
    XdpClsact,
}

/// A burst of activity with one counterpart on one channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Number within the agent's run; the same in `Started`, `Progress` and `Ended`.
    pub id: u64,
    /// Started, going on, ended.
    pub phase: Phase,
    /// The way the data moved.
    pub channel: Channel,
    /// With whom.
    pub counterpart: Counterpart,
    /// What was spoken; several on one LAN transfer; at most [`Transfer::MAX_SERVICES`], in order.
    pub services: Vec<Service>,
    /// Who opened it (the first flow, where there are several).
    pub opened: Opened,
    /// Interface of the first packet; empty for USB storage.
    pub interface: Raw,
    /// First packet (or I/O), wall clock.
    pub first_wall_ns: i64,
    /// Last packet (or I/O) so far, wall clock.
    pub last_wall_ns: i64,
    /// What moved so far.
    pub traffic: Traffic,
}

impl Transfer {
    /// Most services that are listed for one transfer.
    pub const MAX_SERVICES: usize = 8;
}

/// Where in its life a transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Its first payload was seen.
    Started,
    /// It goes on.
    Progress,
    /// It is over.
    Ended(EndReason),
}

/// Why a transfer is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndReason {
    /// Two seconds without a packet (or I/O).
    Silence,
    /// The agent was stopped while it went on.
    AgentStopped,
    /// The device is gone.
    DeviceRemoved,
}

/// The three ways data moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Channel {
    /// USB storage.
    Usb,
    /// Another host of a private network.
    Lan,
    /// Everything else.
    Internet,
}

/// With whom data was exchanged.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Counterpart {
    /// A host, by address (IPv4-mapped IPv6 addresses appear as IPv4).
    Host(IpAddr),
    /// A USB disk.
    Disk(Disk),
}

/// What was spoken, by the port of the side that was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Service {
    /// TCP to this port.
    Tcp(u16),
    /// UDP to this port.
    Udp(u16),
    /// QUIC (by its header, RFC 9000 17.2) to this UDP port.
    Quic(u16),
    /// Block I/O.
    Storage,
}

/// Who opened a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Opened {
    /// This PC.
    Here,
    /// The counterpart.
    There,
    /// It was there before the agent.
    Unknown,
}

/// What moved. `tx` leaves this PC (or is written to the disk), `rx` arrives (or is read from it).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes that left, from the IP header on.
    pub tx_bytes: u64,
    /// Bytes that arrived, from the IP header on.
    pub rx_bytes: u64,
    /// Bytes that left, behind the TCP or UDP header (retransmissions included).
    pub tx_payload: u64,
    /// Bytes that arrived, behind the TCP or UDP header (retransmissions included).
    pub rx_payload: u64,
    /// Packets that left (I/O requests for disks).
    pub tx_packets: u64,
    /// Packets that arrived (I/O requests for disks).
    pub rx_packets: u64,
}

/// A sum that no number holds is the largest one.
impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.tx_bytes = self.tx_bytes.saturating_add(other.tx_bytes);
        self.rx_bytes = self.rx_bytes.saturating_add(other.rx_bytes);
        self.tx_payload = self.tx_payload.saturating_add(other.tx_payload);
        self.rx_payload = self.rx_payload.saturating_add(other.rx_payload);
        self.tx_packets = self.tx_packets.saturating_add(other.tx_packets);
        self.rx_packets = self.rx_packets.saturating_add(other.rx_packets);
    }
}

impl Traffic {
    /// True when neither side sent anything but headers.
    pub fn is_without_payload(&self) -> bool {
        self.tx_payload == 0 && self.rx_payload == 0
    }
}

/// The muted ledger's entry of one label for one period: traffic without transfer lines is never forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Muted {
    /// Why it is muted: a section of `ip.txt`, or a reason of netmon's own such as `service:dns`.
    pub label: Raw,
    /// Start of the period, wall clock.
    pub from_wall_ns: i64,
    /// End of the period, wall clock.
    pub to_wall_ns: i64,
    /// What moved in the period.
    pub traffic: Traffic,
    /// Flows that moved something in the period.
    pub flows: u64,
}

/// "Still watching." Counters are totals of this run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coverage {
    /// Watched interfaces by name, at most [`Coverage::MAX_INTERFACES`].
    pub interfaces: Vec<Raw>,
    /// True when USB events are being received.
    pub usb: bool,
    /// Flows in the kernel's tables now.
    pub flows: u64,
    /// Transfers that go on now.
    pub transfers: u64,
    /// Frames that reached a hook.
    pub seen: u64,
    /// Frames counted in a flow.
    pub counted: u64,
    /// Frames that are not IP, passed by.
    pub not_ip: u64,
    /// Bytes of these frames.
    pub not_ip_bytes: u64,
    /// IP packets that are neither TCP nor UDP, passed by.
    pub other_protocol: u64,
    /// Bytes of these packets, from the IP header on.
    pub other_protocol_bytes: u64,
    /// Frames that could not be parsed.
    pub malformed: u64,
    /// Bytes of these frames.
    pub malformed_bytes: u64,
    /// Frames of flows that found no slot in the flow table, and no room in the ring to empty one.
    pub table_full: u64,
    /// "Flow opened" records that found the ring half full. Their flows are counted.
    pub ring_full: u64,
    /// Records that wait in the spool for the server.
    pub backlog: u64,
    /// Records that the spool had to give up.
    pub spool_lost: u64,
}

impl Coverage {
    /// Most interfaces that are listed.
    pub const MAX_INTERFACES: usize = 16;
}

/// An explicit record that something was not seen or not kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Why.
    pub reason: GapReason,
    /// Since when, wall clock.
    pub from_wall_ns: i64,
    /// Until when, wall clock.
    pub to_wall_ns: i64,
    /// How many, in the unit of the reason; `None`: unknown.
    pub count: Option<u64>,
}

/// Why something was not seen or not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GapReason {
    /// No agent ran. Count: unknown.
    AgentDown,
    /// The agent was held up; transfers in this time may be merged. Count: unknown.
    AgentStalled,
    /// Flows found no slot in the kernel's flow table, and no room in the ring to empty one. Count: frames.
    FlowTableFull,
    /// The ring buffer was full; the flows are counted, their start is late. Count: flows. Not recorded any more: the next
    /// sweep finds such a flow.
    RingFull,
    /// Too many transfers at once; the rest is in the ledger. Count: flows.
    TransferTableFull,
    /// The spool had reached a limit of its own, of size or age. Count: records.
    SpoolFull,
    /// The spool could not be written (disk full, I/O error). Count: records.
    SpoolUnwritable,
    /// The spool's end was damaged (power cut, crash). Count: bytes cut off.
    SpoolDamaged,
    /// USB messages were lost; the devices were listed anew. Count: unknown.
    UsbMessagesLost,
    /// USB events cannot be received. Count: unknown.
    UsbNotWatched,
    /// Found by the server: these records never came. Count: records.
    NeverReceived,
    /// The PC's own log could not be written. Count: lines.
    LogUnwritable,
    /// An interface that was to be watched was not. Count: unknown.
    InterfaceNotWatched,
    /// The kernel's tables could not be read; what moved meanwhile is reported late, as one. Count: unknown. Not
    /// recorded any more: reading the tables cannot fail.
    TablesUnreadable,
    /// A USB disk is there whose I/O counters cannot be read. Count: disks.
    UsbDiskNotMeasured,
    /// Found by the server: another history of this PC begins (its spool was lost, deleted, or could not be read).
    /// What the one before had not delivered is unknown. Count: unknown.
    HistoryRestarted,
}

/// The filter list (`ip.txt`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Filter {
    /// A list is in force.
    Loaded {
        /// Prefixes.
        prefixes: u32,
        /// Labels.
        labels: u32,
    },
    /// A new list was refused; the last good one stays in force.
    Refused {
        /// The error: file, line, what is wrong.
        error: Raw,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(event: Event) -> Record {
        Record { seq: u64::MAX, run: u32::MAX, boot_ns: u64::MAX, wall_ns: i64::MIN, event }
    }

    #[test]
    fn the_largest_event_fits_into_a_record() {
        let long = Raw::new([0xff; 255]);
        let device = UsbDevice {
            devpath: long.clone(),
            vendor: long.clone(),
            model: long.clone(),
            serial: long.clone(),
            interfaces: vec![
                UsbInterface { class: 255, subclass: 255, protocol: 255 };
                UsbDevice::MAX_INTERFACES
            ],
            ..UsbDevice::default()
        };
        let coverage =
            Coverage { interfaces: vec![long.clone(); Coverage::MAX_INTERFACES], ..Coverage::default() };
        let disk =
            Disk { name: long.clone(), vendor: long.clone(), model: long.clone(), serial: long.clone() };
        let function = UsbFunction {
            device: device.clone(),
            function: Function::Disk { name: long.clone(), bytes: u64::MAX },
        };
        let file = UsbFile {
            disk,
            directory: long.clone(),
            name: long.clone(),
            access: FileAccess::Written,
            bytes: Some(u64::MAX),
            program: long.clone(),
            pid: u32::MAX,
            uid: Some(u32::MAX),
            user: long.clone(),
        };
        let program = Program {
            name: long.clone(),
            path: long.clone(),
            command: long.clone(),
            pid: u32::MAX,
            started_ns: u64::MAX,
            uid: u32::MAX,
            user: long.clone(),
            session: Some(u32::MAX),
            cgroup: long.clone(),
        };
        let site = Site { name: long.clone(), source: NameSource::Quic, is_front: true, age_ms: u32::MAX };
        let most = Traffic {
            tx_bytes: u64::MAX,
            rx_bytes: u64::MAX,
            tx_payload: u64::MAX,
            rx_payload: u64::MAX,
            tx_packets: u64::MAX,
            rx_packets: u64::MAX,
        };
        let named = NamedTransfer {
            transfer: Transfer {
                id: u64::MAX,
                phase: Phase::Ended(EndReason::Silence),
                channel: Channel::Internet,
                counterpart: Counterpart::Host(IpAddr::from([0xff; 16])),
                services: vec![Service::Quic(u16::MAX); Transfer::MAX_SERVICES],
                opened: Opened::Here,
                interface: long.clone(),
                first_wall_ns: i64::MIN,
                last_wall_ns: i64::MIN,
                traffic: most,
            },
            over_usb: true,
            shares: vec![
                Share { site: Some(site), program: Some(program), traffic: most };
                NamedTransfer::MAX_SHARES
            ],
            rest: most,
            seated: vec![long.clone(); NamedTransfer::MAX_SEATED],
        };
        for event in [
            Event::NamedTransfer(Box::new(named)),
            Event::DeviceAdded(device),
            Event::Coverage(coverage),
            Event::UsbFunction(function),
            Event::UsbFile(file),
        ] {
            let bytes = record(event.clone()).to_bytes().unwrap();
            assert_eq!(Record::from_bytes(&bytes).unwrap().event, event);
        }
    }

    #[test]
    fn a_record_of_a_kind_that_only_newer_agents_know_is_told_from_garbage() {
        let transfer = Transfer {
            id: 1,
            phase: Phase::Started,
            channel: Channel::Lan,
            counterpart: Counterpart::Host(IpAddr::from([10, 0, 0, 1])),
            services: vec![],
            opened: Opened::Here,
            interface: "usb0".into(),
            first_wall_ns: 0,
            last_wall_ns: 0,
            traffic: Traffic::default(),
        };
        assert_eq!(RecordHead::of_newer(&record(Event::TransferOverUsb(transfer)).to_bytes().unwrap()), None);
        let neighbour = Neighbour {
            address: IpAddr::from([10, 0, 0, 1]),
            mac: None,
            name: "pc".into(),
            source: NeighbourSource::Mdns,
        };
        let known = record(Event::Neighbour(neighbour)).to_bytes().unwrap();
        assert_eq!(RecordHead::of_newer(&known), None);
        // The kind stands behind the four numbers.
        let kind = postcard::to_stdvec(&(u64::MAX, u32::MAX, u64::MAX, i64::MIN)).unwrap().len();
        let mut newer = known.clone();
        assert_eq!(u32::from(newer[kind]), Event::KINDS - 1, "the last kind of this version");
        newer[kind] += 1;
        assert!(Record::from_bytes(&newer).is_err());
        assert_eq!(RecordHead::of_newer(&newer).unwrap().seq, u64::MAX);
        let renumbered = RecordHead::renumbered(&newer, 5).unwrap();
        let head = RecordHead::of_newer(&newer).unwrap();
        assert_eq!(RecordHead::of_newer(&renumbered), Some(RecordHead { seq: 5, ..head }));
        assert_eq!(
            renumbered[1..],
            newer[newer.len() - renumbered.len() + 1..],
            "all behind the number is as it was"
        );
        assert_eq!(RecordHead::renumbered(&known, 5), None);
        assert_eq!(RecordHead::of_newer(&newer[..kind]), None);
        assert_eq!(RecordHead::of_newer(&known[..known.len() - 1]), None);
    }

    #[test]
    fn bytes_behind_a_record_are_refused() {
        let mut bytes = record(Event::AgentStopped).to_bytes().unwrap();
        bytes.push(0);
        assert_eq!(Record::from_bytes(&bytes), Err(RecordError::Malformed("bytes follow the record")));
        bytes.truncate(bytes.len() - 2);
        assert!(Record::from_bytes(&bytes).is_err());
    }
}
