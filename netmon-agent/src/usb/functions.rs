//! What the kernel makes of a USB device, each thing told once: disks, network interfaces, serial ports.
//!
//! A device that the kernel sets up anew (a port reset, another driver) keeps its number on the bus, and the same things
//! come of it: that is no news. Plugged in again, it has another number.

use std::collections::BTreeMap;

use netmon_common::model::{Event, Function, UsbDevice, UsbFunction, UsbInterface, UsbNetwork};
use netmon_common::raw::Raw;

use super::message::{Action, Kind, Message};

/// What has been told of the devices that are plugged in.
#[derive(Debug, Default)]
pub struct Functions {
    told: BTreeMap<Part, Function>,
    /// Disks that have no size, though that was not told: since when, boot clock, nanoseconds.
    empty: BTreeMap<Part, u64>,
}

/// A disk that has had no size for so long has no medium. A disk that is going away has none for a moment, too (the kernel's
/// `del_gendisk`), and it is its removal that is told then.
const EMPTY_NS: u64 = 1_000_000_000;

/// One thing that the kernel made of one device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Part {
    bus: u16,
    number: u16,
    kind: u8,
    name: Raw,
}

impl Functions {
    /// Most that is remembered; there cannot be more disks, interfaces and ports than minor numbers and memory for them.
    /// What does not fit is told all the same, and perhaps again.
    pub const MAX: usize = 4096;

    /// One message, or one listed device, about a part of `device`. What it is to this PC, unless that was told; that a
    /// disk has no medium is left to [`Functions::sized`].
    pub fn handle(&mut self, message: &Message, device: &UsbDevice, now_ns: u64) -> Option<Event> {
        let name = message.name_of_part();
        let part = part(device, message.kind, name.clone());
        if let Some(old) = message.old_name_of_part().filter(|old| *old != name) {
            let old = Part { name: old, ..part.clone() };
            self.told.remove(&old);
            self.empty.remove(&old);
        }
        if message.action == Action::Remove {
            self.empty.remove(&part);
            return None;
        }
        match message.kind {
            Kind::Disk => self.disk(part, message.disk_bytes()?, device, now_ns),
            Kind::Network => {
                let kind = network(message.attributes.driver.as_deref()?, message.is_wwan(), device);
                self.tell(part, Function::Network { interface: name, kind }, device)
            }
            Kind::Serial => self.tell(part, Function::Serial { tty: name }, device),
            Kind::UsbDevice | Kind::Other => None,
        }
    }

    /// The disk `name` of `device` is there and has this size now; to be said several times a second. Another size than was
    /// told means another medium, or none.
    pub fn sized(&mut self, name: Raw, bytes: u64, device: &UsbDevice, now_ns: u64) -> Option<Event> {
        let part = part(device, Kind::Disk, name);
        let has_room = self.told.len() < Self::MAX || self.told.contains_key(&part);
        // Else it would be told each time.
        has_room.then(|| self.disk(part, bytes, device, now_ns))?
    }

    /// The device is gone: whatever comes of it when it is plugged in again is told again.
    pub fn forget(&mut self, device: &UsbDevice) {
        let is_another = |part: &Part| (part.bus, part.number) != (device.bus, device.number);
        self.told.retain(|part, _| is_another(part));
        self.empty.retain(|part, _| is_another(part));
    }

    fn disk(&mut self, part: Part, bytes: u64, device: &UsbDevice, now_ns: u64) -> Option<Event> {
        if bytes > 0 {
            self.empty.remove(&part);
        } else if !self.empty.contains_key(&part) && self.empty.len() >= Self::MAX {
            return None;
        } else {
            let since_ns = *self.empty.entry(part.clone()).or_insert(now_ns);
            if now_ns.saturating_sub(since_ns) < EMPTY_NS {
                return None;
            }
        }
        let name = part.name.clone();
        self.tell(part, Function::Disk { name, bytes }, device)
    }

    fn tell(&mut self, part: Part, function: Function, device: &UsbDevice) -> Option<Event> {
        if self.told.get(&part) == Some(&function) {
            return None;
        }
        if self.told.len() < Self::MAX || self.told.contains_key(&part) {
            self.told.insert(part, function.clone());
        }
        Some(Event::UsbFunction(UsbFunction { device: device.clone(), function }))
    }
}

fn part(device: &UsbDevice, kind: Kind, name: Raw) -> Part {
    Part { bus: device.bus, number: device.number, kind: kind as u8, name }
}

/// Drivers of mobile broadband modems (drivers/net/usb, and vendors' own).
const MODEM: [&str; 9] = [
    "cdc_mbim",
    "qmi_wwan",
    "qmi_wwan_q",
    "huawei_cdc_ncm",
    "sierra_net",
    "hso",
    "kalmia",
    "lg-vl600",
    "cdc_phonet",
];
/// Drivers of USB's own protocols for networks, which phones speak, and adapters as well.
const GENERIC: [&str; 5] = ["cdc_ether", "cdc_ncm", "cdc_eem", "cdc_subset", "rndis_host"];
/// Still image (PTP, MTP), Android's debugger, and the multiplexer of Apple's phones: what adapters do not have.
const OF_PHONES: [UsbInterface; 3] = [
    UsbInterface::STILL_IMAGE,
    UsbInterface { class: 0xff, subclass: 0x42, protocol: 0x01 },
    UsbInterface { class: 0xff, subclass: 0xfe, protocol: 0x02 },
];

/// What stands at the other end, by the interface's driver and what else the device is.
///
/// An adapter or a modem that speaks RNDIS and says no more is taken for a phone: that is what RNDIS is spoken by today, and
/// a phone's connection must not pass for an adapter's.
fn network(driver: &[u8], is_wwan: bool, device: &UsbDevice) -> UsbNetwork {
    let among = |drivers: &[&str]| drivers.iter().any(|name| name.as_bytes() == driver);
    // Developers' boards with a modem have a debugger, too.
    if among(&MODEM) {
        UsbNetwork::Modem
    } else if driver == b"ipheth"
        || among(&GENERIC) && device.interfaces.iter().any(|one| OF_PHONES.contains(one))
    {
        UsbNetwork::Phone
    } else if is_wwan {
        UsbNetwork::Modem
    } else if driver == b"rndis_host" {
        UsbNetwork::Phone
    } else {
        UsbNetwork::Adapter
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::Attributes;
    use super::*;

    const PORT: &str = "/devices/pci0000:00/0000:00:14.0/usb2/2-1";

    fn device(number: u16, interfaces: &[UsbInterface]) -> UsbDevice {
        UsbDevice { bus: 2, number, interfaces: interfaces.to_vec(), ..UsbDevice::default() }
    }

    fn message(action: Action, kind: Kind, behind: &str) -> Message {
        Message { action, kind, devpath: format!("{PORT}/{behind}").into(), ..Message::default() }
    }

    fn disk(action: Action, sectors: u64) -> Message {
        let message = message(action, Kind::Disk, "2-1:1.0/host6/target6:0:0/6:0:0:0/block/sdb");
        let attributes = Attributes { size: format!("{sectors}\n").into(), ..Attributes::default() };
        Message { attributes, ..message }
    }

    fn interface(action: Action, name: &str, driver: &str) -> Message {
        let message = message(action, Kind::Network, &format!("2-1:1.0/net/{name}"));
        Message { attributes: Attributes { driver: Some(driver.into()), ..Attributes::default() }, ..message }
    }

    fn renamed(old: &str, new: &str, driver: &str) -> Message {
        let mut message = interface(Action::Move, new, driver);
        message.properties.insert("DEVPATH_OLD".into(), format!("{PORT}/2-1:1.0/net/{old}").into());
        message
    }

    /// `sdb 64`, `usb0 Phone`, `ttyUSB0`; empty: nothing was told.
    fn shown(event: Option<Event>) -> String {
        match event {
            Some(Event::UsbFunction(function)) => match function.function {
                Function::Disk { name, bytes } => format!("{} {bytes}", name.escaped()),
                Function::Network { interface, kind } => format!("{} {kind:?}", interface.escaped()),
                Function::Serial { tty } => tty.escaped().to_string(),
            },
            None => String::new(),
            Some(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_disk_is_told_once_whatever_is_said_of_it_afterwards() {
        let (mut functions, stick) = (Functions::default(), device(3, &[]));
        assert_eq!(shown(functions.handle(&disk(Action::Add, 2), &stick, 0)), "sdb 1024");
        for action in [Action::Add, Action::Other, Action::Remove, Action::Add] {
            assert_eq!(shown(functions.handle(&disk(action, 2), &stick, 0)), "", "{action:?}");
        }
        assert_eq!(shown(functions.sized("sdb".into(), 1024, &stick, 0)), "");
    }

    #[test]
    fn a_reset_or_another_driver_is_no_news_and_a_new_number_is() {
        let (mut functions, adapter) = (Functions::default(), device(3, &[]));
        let come = interface(Action::Add, "usb0", "cdc_ether");
        assert_eq!(shown(functions.handle(&come, &adapter, 0)), "usb0 Adapter");
        functions.handle(&interface(Action::Remove, "usb0", ""), &adapter, 0);
        assert_eq!(shown(functions.handle(&come, &adapter, 0)), "");
        functions.forget(&adapter);
        assert_eq!(shown(functions.handle(&come, &device(4, &[]), 0)), "usb0 Adapter");
        // Even when nobody said that the first one is gone.
        assert_eq!(shown(functions.handle(&come, &device(5, &[]), 0)), "usb0 Adapter");
    }

    #[test]
    fn each_slot_of_a_card_reader_is_a_disk_and_each_medium_is_told() {
        let (mut functions, reader) = (Functions::default(), device(3, &[]));
        let slot = |lun: u8, sectors: u64| {
            let behind = format!("2-1:1.0/host6/target6:0:0/6:0:0:{lun}/block/sd{}", char::from(b'b' + lun));
            Message { devpath: format!("{PORT}/{behind}").into(), ..disk(Action::Other, sectors) }
        };
        assert_eq!(shown(functions.handle(&slot(0, 0), &reader, 0)), "");
        assert_eq!(shown(functions.handle(&slot(1, 4), &reader, 0)), "sdc 2048");
        assert_eq!(shown(functions.sized("sdb".into(), 0, &reader, EMPTY_NS)), "sdb 0");
        assert_eq!(shown(functions.sized("sdb".into(), 0, &reader, 2 * EMPTY_NS)), "");
        assert_eq!(shown(functions.handle(&slot(0, 2), &reader, 0)), "sdb 1024");
        assert_eq!(shown(functions.handle(&slot(1, 4), &reader, 0)), "");
        assert_eq!(shown(functions.sized("sdc".into(), 0, &reader, 0)), "");
        assert_eq!(shown(functions.sized("sdc".into(), 0, &reader, EMPTY_NS)), "sdc 0");
        assert_eq!(shown(functions.handle(&slot(1, 0), &reader, EMPTY_NS)), "");
        assert_eq!(shown(functions.sized("sdc".into(), 8, &reader, EMPTY_NS)), "sdc 8");
    }

    #[test]
    fn a_disk_that_loses_its_size_because_it_goes_is_not_empty() {
        let (mut functions, stick) = (Functions::default(), device(3, &[]));
        assert_eq!(shown(functions.handle(&disk(Action::Add, 2), &stick, 0)), "sdb 1024");
        assert_eq!(shown(functions.sized("sdb".into(), 0, &stick, 1)), "");
        assert_eq!(shown(functions.handle(&disk(Action::Other, 0), &stick, EMPTY_NS)), "");
        functions.handle(&disk(Action::Remove, 0), &stick, EMPTY_NS);
        // Another driver takes it: what was seen of it before does not count.
        assert_eq!(shown(functions.handle(&disk(Action::Add, 0), &stick, 2 * EMPTY_NS)), "");
        assert_eq!(shown(functions.sized("sdb".into(), 1024, &stick, 3 * EMPTY_NS)), "");
    }

    #[test]
    fn a_renamed_interface_is_told_with_its_final_name_or_with_both() {
        let adapter = device(3, &[]);
        // udevd has renamed it already when it speaks for the first time; its word of the renaming follows.
        let mut functions = Functions::default();
        let come = interface(Action::Add, "enx0250", "cdc_ether");
        assert_eq!(shown(functions.handle(&come, &adapter, 0)), "enx0250 Adapter");
        assert_eq!(shown(functions.handle(&renamed("usb0", "enx0250", "cdc_ether"), &adapter, 0)), "");
        // The kernel speaks first, or somebody renames it later, and back.
        let mut functions = Functions::default();
        let come = interface(Action::Add, "usb0", "cdc_ether");
        assert_eq!(shown(functions.handle(&come, &adapter, 0)), "usb0 Adapter");
        let mut rename = |old, new| shown(functions.handle(&renamed(old, new, "cdc_ether"), &adapter, 0));
        assert_eq!(rename("usb0", "lan7"), "lan7 Adapter");
        assert_eq!(rename("usb0", "lan7"), "");
        assert_eq!(rename("lan7", "usb0"), "usb0 Adapter");
    }

    #[test]
    fn what_stands_at_the_other_end_is_told_by_driver_and_company() {
        let adb = OF_PHONES[1];
        let kind = |driver: &str, interfaces: &[UsbInterface]| {
            let come = interface(Action::Add, "usb0", driver);
            shown(Functions::default().handle(&come, &device(3, interfaces), 0))
        };
        for (driver, interfaces, expected) in [
            ("rndis_host", &[][..], "Phone"),
            ("ipheth", &[], "Phone"),
            ("cdc_ncm", &[UsbInterface::STILL_IMAGE], "Phone"),
            ("cdc_ether", &[adb], "Phone"),
            ("cdc_ncm", &[OF_PHONES[2]], "Phone"),
            ("cdc_ether", &[], "Adapter"),
            ("cdc_ncm", &[], "Adapter"),
            ("r8152", &[], "Adapter"),
            ("", &[], "Adapter"),
            ("cdc_mbim", &[], "Modem"),
            ("qmi_wwan", &[adb], "Modem"),
            // A camera with Wi-Fi of its own would not be its network's driver.
            ("rtl8xxxu", &[UsbInterface::STILL_IMAGE], "Adapter"),
        ] {
            assert_eq!(kind(driver, interfaces), format!("usb0 {expected}"), "{driver} {interfaces:?}");
        }
        let mut wwan = interface(Action::Add, "wwan0", "cdc_ether");
        wwan.properties.insert("DEVTYPE".into(), "wwan".into());
        assert_eq!(shown(Functions::default().handle(&wwan, &device(3, &[]), 0)), "wwan0 Modem");
    }

    #[test]
    fn a_device_with_several_functions_is_told_with_each_of_them() {
        let (mut functions, phone) = (Functions::default(), device(3, &[UsbInterface::STILL_IMAGE]));
        let tty = message(Action::Add, Kind::Serial, "2-1:1.2/tty/ttyACM0");
        assert_eq!(shown(functions.handle(&disk(Action::Add, 2), &phone, 0)), "sdb 1024");
        assert_eq!(
            shown(functions.handle(&interface(Action::Add, "usb0", "rndis_host"), &phone, 0)),
            "usb0 Phone"
        );
        assert_eq!(shown(functions.handle(&tty, &phone, 0)), "ttyACM0");
        assert_eq!(shown(functions.handle(&tty, &phone, 0)), "");
    }

    #[test]
    fn what_is_gone_already_is_not_told_by_halves() {
        let (mut functions, stick) = (Functions::default(), device(3, &[]));
        let nobody = message(Action::Add, Kind::Network, "2-1:1.0/net/usb0");
        assert_eq!(shown(functions.handle(&nobody, &stick, 0)), "");
        let gone = Message { attributes: Attributes::default(), ..disk(Action::Add, 0) };
        assert_eq!(shown(functions.handle(&gone, &stick, 0)), "");
        assert_eq!(shown(functions.handle(&disk(Action::Other, 2), &stick, 0)), "sdb 1024");
    }

    #[test]
    fn the_table_is_bounded_and_what_does_not_fit_is_still_told() {
        let (mut functions, hostile) = (Functions::default(), device(3, &[]));
        for number in 0..Functions::MAX + 10 {
            let tty = message(Action::Add, Kind::Serial, &format!("2-1:1.0/tty/ttyUSB{number}"));
            assert_eq!(shown(functions.handle(&tty, &hostile, 0)), format!("ttyUSB{number}"));
        }
        assert_eq!(functions.told.len(), Functions::MAX);
        functions.forget(&hostile);
        assert!(functions.told.is_empty());
        for number in 0..Functions::MAX + 10 {
            functions.sized(Raw::new(format!("sd{number}")), 0, &hostile, 0);
        }
        assert_eq!(functions.empty.len(), Functions::MAX);
        functions.forget(&hostile);
        assert!(functions.empty.is_empty());
    }
}
