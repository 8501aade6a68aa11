//! Which USB devices are plugged in, and what changes are worth an event.

use std::collections::{BTreeMap, BTreeSet};

use netmon_common::model::{Event, UsbDevice};

use super::message::{Action, Kind, Message};

/// The table of plugged-in USB devices, by kernel device path.
///
/// It exists because the message of an unplugged device names nothing but its path: udevd has forgotten the rest.
/// Hubs are kept in the table and make no events.
#[derive(Debug, Default)]
pub struct Devices {
    plugged: BTreeMap<Vec<u8>, Plugged>,
    /// Paths whose removal was reported and that were not plugged in since: found gone by [`Devices::resync`],
    /// the message may still come.
    gone: BTreeSet<Vec<u8>>,
}

#[derive(Debug)]
struct Plugged {
    device: UsbDevice,
    is_hub: bool,
}

impl Devices {
    /// Most devices that are remembered: a USB bus has at most 127, a PC about ten buses. Further ones are reported
    /// all the same, only their removal then lacks the names.
    pub const MAX: usize = 4096;

    /// The devices that were there at the start.
    pub fn start(&mut self, listed: &[Message]) -> Vec<Event> {
        usb_devices(listed).filter_map(|message| self.plug(message)).map(Event::DevicePresent).collect()
    }

    /// One message. Several events when a device took the place of another that was never reported as gone.
    pub fn handle(&mut self, message: &Message) -> Vec<Event> {
        match (message.kind, message.action) {
            (Kind::UsbDevice, Action::Add) => self.add(message),
            (Kind::UsbDevice, Action::Remove) => self.remove(message).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// The devices that are there now, after messages were lost: what went and came meanwhile.
    pub fn resync(&mut self, listed: &[Message]) -> Vec<Event> {
        let present: BTreeSet<&[u8]> =
            usb_devices(listed).map(|message| message.devpath.as_slice()).collect();
        let missing: Vec<_> =
            self.plugged.keys().filter(|path| !present.contains(path.as_slice())).cloned().collect();
        let mut events = Vec::new();
        for devpath in missing {
            events.extend(self.unplug(&devpath).map(Event::DeviceRemoved));
        }
        for message in usb_devices(listed) {
            events.extend(self.add(message));
        }
        events
    }

    /// The nearest USB device above `devpath`, hubs included.
    pub fn above(&self, devpath: &[u8]) -> Option<&UsbDevice> {
        let mut path = devpath;
        while let Some(end) = path.iter().rposition(|&byte| byte == b'/') {
            path = &path[..end];
            if let Some(plugged) = self.plugged.get(path) {
                return Some(&plugged.device);
            }
        }
        None
    }

    fn add(&mut self, message: &Message) -> Vec<Event> {
        let mut events = Vec::new();
        if let Some(known) = self.plugged.get_mut(&message.devpath) {
            let device = message.usb_device();
            if may_be_one(&known.device, &device) {
                learn(&mut known.device, device);
                return events;
            }
            events.extend(self.unplug(&message.devpath).map(Event::DeviceRemoved));
        }
        events.extend(self.plug(message).map(Event::DeviceAdded));
        events
    }

    fn remove(&mut self, message: &Message) -> Option<Event> {
        let device = if self.plugged.contains_key(&message.devpath) {
            self.unplug(&message.devpath)
        } else {
            let is_new = self.remember_gone(&message.devpath);
            (is_new && !message.is_hub()).then(|| message.usb_device())
        };
        device.map(Event::DeviceRemoved)
    }

    /// Returns the device when it is worth an event.
    fn plug(&mut self, message: &Message) -> Option<UsbDevice> {
        let (device, is_hub) = (message.usb_device(), message.is_hub());
        self.gone.remove(&message.devpath);
        if self.plugged.len() < Self::MAX {
            self.plugged.insert(message.devpath.clone(), Plugged { device: device.clone(), is_hub });
        }
        (!is_hub).then_some(device)
    }

    /// Returns the device when it is worth an event.
    fn unplug(&mut self, devpath: &[u8]) -> Option<UsbDevice> {
        let plugged = self.plugged.remove(devpath)?;
        self.remember_gone(devpath);
        (!plugged.is_hub).then_some(plugged.device)
    }

    /// False when it was remembered already.
    fn remember_gone(&mut self, devpath: &[u8]) -> bool {
        if self.gone.len() >= Self::MAX {
            self.gone.clear();
        }
        self.gone.insert(devpath.to_vec())
    }
}

fn usb_devices(listed: &[Message]) -> impl Iterator<Item = &Message> {
    listed.iter().filter(|message| message.kind == Kind::UsbDevice)
}

/// False when the two, seen at the same path, must be different devices. What one of them does not say cannot tell
/// them apart: the kernel's own messages say less than udevd's. Vendor's and product's names do not tell them apart
/// either: where the device cannot be asked, they are the hardware database's.
fn may_be_one(a: &UsbDevice, b: &UsbDevice) -> bool {
    let numbers = |a: u16, b: u16| a == b || a == 0 || b == 0;
    numbers(a.bus, b.bus)
        && numbers(a.number, b.number)
        && a.vendor_id == b.vendor_id
        && a.product_id == b.product_id
        && (a.serial == b.serial || a.serial.is_empty() || b.serial.is_empty())
}

/// Fills what was not known yet, for the event of the removal.
fn learn(known: &mut UsbDevice, device: UsbDevice) {
    for (name, learnt) in [
        (&mut known.vendor, device.vendor),
        (&mut known.model, device.model),
        (&mut known.serial, device.serial),
    ] {
        if name.is_empty() {
            *name = learnt;
        }
    }
    if known.interfaces.is_empty() {
        known.interfaces = device.interfaces;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: &str = "/devices/pci0000:00/0000:00:14.0/usb2/2-1";

    fn message(action: Action, devpath: &str, properties: &[(&str, &str)]) -> Message {
        Message {
            action,
            kind: Kind::UsbDevice,
            devpath: devpath.into(),
            properties: properties
                .iter()
                .map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec()))
                .collect(),
            ..Message::default()
        }
    }

    fn stick(action: Action, devpath: &str, serial: &str) -> Message {
        message(
            action,
            devpath,
            &[
                ("PRODUCT", "951/1666/110"),
                ("ID_VENDOR", "Kingston"),
                ("ID_MODEL", "DataTraveler"),
                ("ID_SERIAL_SHORT", serial),
                ("ID_USB_INTERFACES", ":080650:"),
            ],
        )
    }

    /// As the kernel sends it: without what udevd knew.
    fn unplugged(devpath: &str) -> Message {
        message(Action::Remove, devpath, &[("PRODUCT", "951/1666/110"), ("TYPE", "0/0/0")])
    }

    fn hub(action: Action, devpath: &str) -> Message {
        message(
            action,
            devpath,
            &[("PRODUCT", "1d6b/2/601"), ("TYPE", "9/0/1"), ("ID_USB_INTERFACES", ":090000:")],
        )
    }

    /// `+serial`, `-serial`, `=serial` for added, removed, present.
    fn shown(events: &[Event]) -> Vec<String> {
        let show = |sign: &str, device: &UsbDevice| format!("{sign}{}", device.serial.escaped());
        events
            .iter()
            .map(|event| match event {
                Event::DeviceAdded(device) => show("+", device),
                Event::DeviceRemoved(device) => show("-", device),
                Event::DevicePresent(device) => show("=", device),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn a_removal_carries_the_names_that_its_message_lacks() {
        let mut devices = Devices::default();
        let added = devices.handle(&stick(Action::Add, PORT, "A1"));
        let removed = devices.handle(&unplugged(PORT));
        let [Event::DeviceAdded(added)] = &added[..] else { panic!("{added:?}") };
        let [Event::DeviceRemoved(removed)] = &removed[..] else { panic!("{removed:?}") };
        assert_eq!(added, removed);
        assert_eq!(removed.model, "DataTraveler".into());
    }

    #[test]
    fn a_device_announced_twice_is_reported_once() {
        let mut devices = Devices::default();
        assert_eq!(shown(&devices.start(&[stick(Action::Other, PORT, "A1")])), ["=A1"]);
        assert!(devices.handle(&stick(Action::Add, PORT, "A1")).is_empty());
        assert!(devices.handle(&stick(Action::Other, PORT, "A1")).is_empty());
        assert_eq!(shown(&devices.handle(&unplugged(PORT))), ["-A1"]);
        assert!(devices.handle(&unplugged(PORT)).is_empty());
        assert_eq!(shown(&devices.handle(&stick(Action::Add, PORT, "A1"))), ["+A1"]);
    }

    #[test]
    fn another_device_at_the_same_place_means_that_the_first_is_gone() {
        let mut devices = Devices::default();
        devices.handle(&stick(Action::Add, PORT, "A1"));
        assert_eq!(shown(&devices.handle(&stick(Action::Add, PORT, "B2"))), ["-A1", "+B2"]);
    }

    #[test]
    fn what_udevd_adds_later_is_learnt_and_not_reported_again() {
        let mut devices = Devices::default();
        let bare = message(Action::Add, PORT, &[("PRODUCT", "951/1666/110")]);
        assert_eq!(shown(&devices.handle(&bare)), ["+"]);
        assert!(devices.handle(&stick(Action::Add, PORT, "A1")).is_empty());
        assert_eq!(shown(&devices.handle(&unplugged(PORT))), ["-A1"]);
    }

    #[test]
    fn a_name_out_of_the_hardware_database_is_no_other_device() {
        let mut devices = Devices::default();
        devices.handle(&stick(Action::Add, PORT, "A1"));
        let bare = [("PRODUCT", "951/1666/110"), ("ID_VENDOR_FROM_DATABASE", "Kingston Technology")];
        assert!(devices.handle(&message(Action::Add, PORT, &bare)).is_empty());
    }

    #[test]
    fn a_port_reset_that_gives_another_number_is_a_removal_and_an_addition() {
        let numbered = |number: &str| {
            let mut message = stick(Action::Add, PORT, "A1");
            message.properties.insert("DEVNUM".into(), number.into());
            message
        };
        let mut devices = Devices::default();
        devices.handle(&numbered("007"));
        for action in [Action::Other, Action::Move, Action::Add] {
            assert!(devices.handle(&Message { action, ..numbered("007") }).is_empty(), "{action:?}");
        }
        assert_eq!(shown(&devices.handle(&numbered("008"))), ["-A1", "+A1"]);
    }

    #[test]
    fn the_removal_of_an_unknown_device_is_reported_with_what_is_known() {
        let removed = Devices::default().handle(&unplugged(PORT));
        let [Event::DeviceRemoved(device)] = &removed[..] else { panic!("{removed:?}") };
        assert_eq!((device.vendor_id, device.product_id), (0x0951, 0x1666));
        assert_eq!(device.devpath, PORT.into());
    }

    #[test]
    fn hubs_make_no_events_but_carry_devices() {
        let mut devices = Devices::default();
        let root = "/devices/pci0000:00/0000:00:14.0/usb2";
        assert!(devices.start(&[hub(Action::Other, root)]).is_empty());
        assert!(devices.handle(&hub(Action::Add, PORT)).is_empty());
        let behind = format!("{PORT}/2-1.4");
        assert_eq!(shown(&devices.handle(&stick(Action::Add, &behind, "A1"))), ["+A1"]);
        let disk = format!("{behind}/2-1.4:1.0/host6/target6:0:0/6:0:0:0/block/sdb");
        assert_eq!(devices.above(disk.as_bytes()).unwrap().serial, "A1".into());
        assert!(devices.above(b"/devices/virtual/block/loop0").is_none());
        assert!(devices.handle(&hub(Action::Remove, PORT)).is_empty());
    }

    #[test]
    fn after_lost_messages_the_difference_is_reported() {
        let mut devices = Devices::default();
        let at = |port: u8| format!("/devices/usb1/1-{port}");
        devices.start(&[stick(Action::Other, &at(1), "A1"), stick(Action::Other, &at(2), "B2")]);
        devices.handle(&stick(Action::Add, &at(3), "C3"));
        let now = [
            stick(Action::Other, &at(2), "B2"),
            stick(Action::Other, &at(3), "D4"),
            stick(Action::Other, &at(4), "E5"),
        ];
        assert_eq!(shown(&devices.resync(&now)), ["-A1", "-C3", "+D4", "+E5"]);
        assert!(devices.resync(&now).is_empty());
        // The message of a removal that the list has shown already comes late.
        assert!(devices.handle(&unplugged(&at(1))).is_empty());
    }

    #[test]
    fn disks_and_interfaces_are_not_devices() {
        let mut disk = stick(Action::Add, PORT, "A1");
        disk.kind = Kind::parse(b"block", b"disk");
        assert!(Devices::default().handle(&disk).is_empty());
        assert_eq!(Kind::parse(b"usb", b"usb_interface"), Kind::Other);
        assert_eq!(Kind::parse(b"block", b"partition"), Kind::Other);
    }

    #[test]
    fn the_tables_are_bounded_and_what_does_not_fit_is_still_reported() {
        let mut devices = Devices::default();
        for port in 0..Devices::MAX + 10 {
            assert_eq!(devices.handle(&stick(Action::Add, &format!("/devices/{port}"), "A1")).len(), 1);
        }
        assert_eq!(devices.plugged.len(), Devices::MAX);
        for port in 0..2 * Devices::MAX + 10 {
            assert_eq!(devices.handle(&unplugged(&format!("/devices/{port}"))).len(), 1);
        }
        assert!(devices.plugged.is_empty() && devices.gone.len() <= Devices::MAX);
    }
}
