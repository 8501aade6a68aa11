//! One udev message, or one listed device, as plain data, and what it says about a USB device.
//!
//! Properties are what udevd's rules found out (`udevadm info -q property`), attributes are files of the
//! device's sysfs directory. Both hold what the device chose to say: bounded, never trusted.

use std::collections::BTreeMap;

use netmon_common::model::{UsbDevice, UsbInterface};
use netmon_common::raw::Raw;

/// What happened to a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// It was plugged in.
    Add,
    /// It is gone.
    Remove,
    /// It has another name, and so another path.
    Move,
    /// `bind`, `unbind`, `change` and the like, which neither plug nor unplug; also a listed device.
    #[default]
    Other,
}

impl Action {
    /// From the property `ACTION`.
    pub fn parse(action: &[u8]) -> Self {
        match action {
            b"add" => Self::Add,
            b"remove" => Self::Remove,
            b"move" => Self::Move,
            _ => Self::Other,
        }
    }
}

/// What kind of device a message is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A whole USB device (not one of its interfaces).
    UsbDevice,
    /// A whole disk (not a partition), on any bus.
    Disk,
    /// A network interface, on any bus or on none.
    Network,
    /// A terminal: a serial port, or one of the many that are none.
    Serial,
    /// Nothing that is watched.
    #[default]
    Other,
}

impl Kind {
    /// From the properties `SUBSYSTEM` and `DEVTYPE`.
    pub fn parse(subsystem: &[u8], devtype: &[u8]) -> Self {
        match (subsystem, devtype) {
            (b"usb", b"usb_device") => Self::UsbDevice,
            (b"block", b"disk") => Self::Disk,
            (b"net", _) => Self::Network,
            (b"tty", _) => Self::Serial,
            _ => Self::Other,
        }
    }
}

/// One udev message, or one listed device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// What happened.
    pub action: Action,
    /// To what kind of device.
    pub kind: Kind,
    /// Kernel device path, without `/sys`.
    pub devpath: Vec<u8>,
    /// What udevd (or the kernel) says about it.
    pub properties: BTreeMap<Vec<u8>, Vec<u8>>,
    /// What its sysfs directory says: of a USB device where [`Message::wants_attributes`] asked for it.
    pub attributes: Attributes,
}

/// Files of a device's sysfs directory; empty: not there, or not asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `manufacturer`
    pub manufacturer: Vec<u8>,
    /// `product`
    pub product: Vec<u8>,
    /// `serial`
    pub serial: Vec<u8>,
    /// `descriptors`: the device's descriptor and those of its configurations, as they came over the bus.
    pub descriptors: Vec<u8>,
    /// A disk's `size`, in sectors of 512 bytes whatever the disk's own are.
    pub size: Vec<u8>,
    /// The driver of the device that a network interface stands on, empty where that has none; `None`: the interface is gone.
    pub driver: Option<Vec<u8>>,
}

/// bInterfaceClass and bDeviceClass of a hub (usb.org, "Defined Class Codes").
const HUB: u8 = 0x09;

impl Message {
    /// True when udevd has not described the device, so that its sysfs attributes are worth reading (which may
    /// have to wait for the device: the kernel locks it).
    pub fn wants_attributes(&self) -> bool {
        self.kind == Kind::UsbDevice
            && self.action != Action::Remove
            && (self.property("ID_MODEL").is_none() || self.property("ID_USB_INTERFACES").is_none())
    }

    /// What to ask the hardware database for, where the device or udevd leaves a name open.
    pub fn wants_names(&self) -> Option<String> {
        if self.kind != Kind::UsbDevice || self.action == Action::Remove {
            return None;
        }
        let (vendor_id, product_id) = self.ids();
        let vendor = self.name("ID_VENDOR", vendor_id, &self.attributes.manufacturer);
        let model = self.name("ID_MODEL", product_id, &self.attributes.product);
        // As udevd's builtin `hwdb` asks (systemd: src/udev/udev-builtin-hwdb.c).
        (vendor.is_empty() || model.is_empty()).then(|| format!("usb:v{vendor_id:04X}p{product_id:04X}"))
    }

    /// What the kernel calls a disk, an interface, a terminal.
    pub fn name_of_part(&self) -> Raw {
        last_of(&self.devpath)
    }

    /// What it called it before [`Action::Move`].
    pub fn old_name_of_part(&self) -> Option<Raw> {
        self.property("DEVPATH_OLD").filter(|_| self.action == Action::Move).map(last_of)
    }

    /// A disk's size in bytes; `None`: it is gone.
    pub fn disk_bytes(&self) -> Option<u64> {
        disk_bytes(&self.devpath, &self.attributes.size)
    }

    /// True for an interface that its driver takes for mobile broadband.
    pub fn is_wwan(&self) -> bool {
        self.property("DEVTYPE") == Some(b"wwan")
    }

    /// The USB device that the message describes.
    pub fn usb_device(&self) -> UsbDevice {
        let (vendor_id, product_id) = self.ids();
        let mut interfaces = self.interfaces();
        // Phones speak MTP by an interface of class "vendor-specific" as well; the line must not leave that open.
        if self.speaks_mtp() && !interfaces.contains(&UsbInterface::STILL_IMAGE) {
            interfaces.insert(0, UsbInterface::STILL_IMAGE);
        }
        interfaces.truncate(UsbDevice::MAX_INTERFACES);
        UsbDevice {
            devpath: Raw::new(&self.devpath),
            bus: self.decimal("BUSNUM"),
            number: self.decimal("DEVNUM"),
            vendor_id,
            product_id,
            vendor: self.name("ID_VENDOR", vendor_id, &self.attributes.manufacturer),
            model: self.name("ID_MODEL", product_id, &self.attributes.product),
            serial: Raw::new(self.property("ID_SERIAL_SHORT").unwrap_or(&self.attributes.serial)),
            interfaces,
        }
    }

    /// True for a device that is a hub and nothing else.
    ///
    /// The interfaces decide where they are known: a stick that claims the device class of hubs still gets a
    /// storage driver for its storage interface, and must not hide behind that claim.
    pub fn is_hub(&self) -> bool {
        match self.interfaces().as_slice() {
            [] => self.property("TYPE").is_some_and(|class| class.starts_with(b"9/")),
            interfaces => interfaces.iter().all(|interface| interface.class == HUB),
        }
    }

    /// True where udevd's rules (libmtp's) know the device as one that speaks MTP, by whatever interface.
    fn speaks_mtp(&self) -> bool {
        self.property("ID_MTP_DEVICE") == Some(b"1")
    }

    fn property(&self, name: &str) -> Option<&[u8]> {
        self.properties.get(name.as_bytes()).map(Vec::as_slice).filter(|value| !value.is_empty())
    }

    fn decimal(&self, name: &str) -> u16 {
        self.property(name).and_then(decimal).unwrap_or_default()
    }

    /// idVendor and idProduct: from the kernel (`PRODUCT=951/1666/110`, no leading zeros) or from udevd.
    fn ids(&self) -> (u16, u16) {
        let kernel = self.property("PRODUCT").and_then(|product| {
            let mut parts = product.split(|&byte| byte == b'/').map(hex);
            Some((parts.next()??, parts.next()??))
        });
        let udevd = |name| self.property(name).and_then(hex).unwrap_or_default();
        kernel.unwrap_or_else(|| (udevd("ID_VENDOR_ID"), udevd("ID_MODEL_ID")))
    }

    /// A name, by preference: the device's own bytes as udevd encodes them (`*_ENC`), udevd's tidied copy, the
    /// device's own bytes by sysfs, the hardware database's name for `id`.
    fn name(&self, property: &str, id: u16, attribute: &[u8]) -> Raw {
        let encoded = self.property(&format!("{property}_ENC")).map(decode);
        let tidied = self.property(property).map(<[u8]>::to_vec);
        // Where a device gives no name, udevd's usb_id puts the four hex digits of its ID there instead.
        let is_name = |name: &Vec<u8>| *name != format!("{id:04x}").into_bytes();
        let own = encoded.or(tidied).filter(is_name).or((!attribute.is_empty()).then(|| attribute.to_vec()));
        match own {
            Some(name) => Raw::new(name),
            None => Raw::new(self.property(&format!("{property}_FROM_DATABASE")).unwrap_or_default()),
        }
    }

    /// The interfaces' class codes: from udevd (`:080650:030101:`), else from the descriptors.
    fn interfaces(&self) -> Vec<UsbInterface> {
        match self.property("ID_USB_INTERFACES") {
            Some(list) => list.split(|&byte| byte == b':').filter_map(interface).collect(),
            None => interfaces_of(&self.attributes.descriptors),
        }
    }
}

/// A disk's size in bytes by its `size` file; `None`: it has none, or not what kernels write.
pub fn disk_bytes(devpath: &[u8], size: &[u8]) -> Option<u64> {
    /// Sectors of a CD drive that has no disc (drivers/scsi/sr.c); no disc has an odd number of them.
    const NO_DISC: u64 = 0x1f_ffff;
    let is_cd = last_of(devpath).as_bytes().starts_with(b"sr");
    let sectors: u64 = decimal(size)?;
    Some(if is_cd && sectors == NO_DISC { 0 } else { sectors.saturating_mul(512) })
}

/// The kernel's name for the device at a path.
pub fn last_of(devpath: &[u8]) -> Raw {
    Raw::new(devpath.rsplit(|&byte| byte == b'/').next().unwrap_or_default())
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

fn decimal<N: std::str::FromStr>(digits: &[u8]) -> Option<N> {
    text(digits.trim_ascii()).and_then(|text| text.parse().ok())
}

fn hex(digits: &[u8]) -> Option<u16> {
    // from_str_radix would take a sign, too.
    let digits = text(digits).filter(|digits| !digits.starts_with('+'))?;
    u16::from_str_radix(digits, 16).ok()
}

fn interface(digits: &[u8]) -> Option<UsbInterface> {
    let (class, rest) = digits.split_at_checked(2)?;
    let [subclass, protocol] = hex(rest).filter(|_| rest.len() == 4)?.to_be_bytes();
    Some(UsbInterface { class: u8::try_from(hex(class)?).ok()?, subclass, protocol })
}

/// Interface descriptors (USB 2.0, 9.6.5: length, type 4, ..., class, subclass, protocol at 5, 6, 7) out of a chain of
/// descriptors, each of which starts with its length. A triple is listed once, as udevd does it.
fn interfaces_of(mut descriptors: &[u8]) -> Vec<UsbInterface> {
    const INTERFACE: u8 = 4;
    let mut interfaces = Vec::new();
    while let Some((&length, _)) = descriptors.split_first() {
        let Some((descriptor, rest)) = descriptors.split_at_checked(usize::from(length)) else { break };
        if let [_, INTERFACE, _, _, _, class, subclass, protocol, ..] = *descriptor {
            let found = UsbInterface { class, subclass, protocol };
            if !interfaces.contains(&found) {
                interfaces.push(found);
            }
        }
        if descriptor.is_empty() {
            break;
        }
        descriptors = rest;
    }
    interfaces
}

/// Undoes udevd's `\x20` for bytes that are not safe in file names. It writes a backslash as `\x5c`, so there is one
/// way to read it; what does not fit the pattern stands for itself.
fn decode(encoded: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(encoded.len());
    let mut rest = encoded;
    while let Some((&byte, behind)) = rest.split_first() {
        let escape = rest.strip_prefix(b"\\x").and_then(|digits| digits.split_at_checked(2));
        match escape.and_then(|(digits, behind)| Some((u8::try_from(hex(digits)?).ok()?, behind))) {
            Some((original, behind)) => {
                decoded.push(original);
                rest = behind;
            }
            None => {
                decoded.push(byte);
                rest = behind;
            }
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(properties: &[(&str, &str)]) -> Message {
        Message {
            kind: Kind::UsbDevice,
            devpath: b"/devices/usb1/1-2".to_vec(),
            properties: properties
                .iter()
                .map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec()))
                .collect(),
            ..Message::default()
        }
    }

    #[test]
    fn a_stick_is_described_by_udevd() {
        let stick = device(&[
            ("PRODUCT", "951/1666/110"),
            ("BUSNUM", "002"),
            ("DEVNUM", "011"),
            ("ID_VENDOR", "Kingston"),
            ("ID_VENDOR_ENC", "Kingston"),
            ("ID_MODEL", "DataTraveler_3.0"),
            ("ID_MODEL_ENC", r"DataTraveler\x203.0"),
            ("ID_SERIAL_SHORT", "60A44C413FAE"),
            ("ID_USB_INTERFACES", ":080650:030101:"),
        ])
        .usb_device();
        assert_eq!(
            stick,
            UsbDevice {
                devpath: "/devices/usb1/1-2".into(),
                bus: 2,
                number: 11,
                vendor_id: 0x0951,
                product_id: 0x1666,
                vendor: "Kingston".into(),
                model: "DataTraveler 3.0".into(),
                serial: "60A44C413FAE".into(),
                interfaces: vec![
                    UsbInterface { class: 8, subclass: 6, protocol: 0x50 },
                    UsbInterface { class: 3, subclass: 1, protocol: 1 },
                ],
            }
        );
    }

    #[test]
    fn an_id_that_stands_in_for_a_name_gives_way_to_the_database() {
        let nameless = [
            ("ID_VENDOR_ID", "0951"),
            ("ID_MODEL_ID", "1666"),
            ("ID_VENDOR", "0951"),
            ("ID_VENDOR_ENC", "0951"),
            ("ID_VENDOR_FROM_DATABASE", "Kingston Technology"),
            ("ID_MODEL", "1666"),
        ];
        let found = device(&nameless).usb_device();
        assert_eq!((found.vendor_id, found.product_id), (0x0951, 0x1666));
        assert_eq!(found.vendor, "Kingston Technology".into());
        assert_eq!(found.model, Raw::default());
    }

    #[test]
    fn without_udevd_the_device_speaks_for_itself() {
        let mut stick = device(&[("PRODUCT", "951/1666/110"), ("TYPE", "0/0/0")]);
        assert!(stick.wants_attributes());
        let device_descriptor = [18, 1, 0, 2, 0, 0, 0, 64, 0x51, 9, 0x66, 0x16, 0x10, 1, 1, 2, 3, 1];
        let configuration = [9, 2, 32, 0, 1, 1, 0, 0x80, 250];
        let storage = [9, 4, 0, 0, 2, 8, 6, 0x50, 0];
        let endpoint = [7, 5, 0x81, 2, 0, 2, 0];
        stick.attributes = Attributes {
            manufacturer: b"Kingston".to_vec(),
            product: b"Data Traveler".to_vec(),
            serial: b"60A4".to_vec(),
            descriptors: [&device_descriptor[..], &configuration, &storage, &endpoint, &storage].concat(),
            ..Attributes::default()
        };
        let found = stick.usb_device();
        assert_eq!(
            [found.vendor, found.model, found.serial],
            ["Kingston", "Data Traveler", "60A4"].map(Raw::from)
        );
        assert_eq!(found.interfaces, [UsbInterface { class: 8, subclass: 6, protocol: 0x50 }]);
    }

    #[test]
    fn hostile_properties_are_cut_and_never_panic() {
        let long = "n".repeat(5_000);
        let many = ":080650".repeat(1_000);
        let bytes: Vec<u8> = (0..=255).collect();
        let mut hostile = device(&[
            ("PRODUCT", "fffff//"),
            ("BUSNUM", "-1"),
            ("DEVNUM", "99999999999"),
            ("ID_VENDOR_ENC", r"\x1b[2J\x0a\x\xzz\x5cx20\x2"),
            ("ID_MODEL", &long),
            ("ID_USB_INTERFACES", &many),
        ]);
        hostile.properties.insert(b"ID_SERIAL_SHORT".to_vec(), bytes.clone());
        let found = hostile.usb_device();
        assert_eq!((found.bus, found.number, found.vendor_id, found.product_id), (0, 0, 0, 0));
        assert_eq!(found.vendor, Raw::new(b"\x1b[2J\n\\x\\xzz\\x20\\x2"));
        assert_eq!(found.model, Raw::new("n".repeat(255)));
        assert_eq!(found.serial, Raw::new(&bytes[..255]));
        assert_eq!(found.interfaces.len(), UsbDevice::MAX_INTERFACES);
    }

    #[test]
    fn only_what_has_no_name_is_looked_up_and_under_its_ids() {
        let named = [("PRODUCT", "951/1666/110"), ("ID_VENDOR", "Kingston"), ("ID_MODEL", "DataTraveler")];
        assert_eq!(device(&named).wants_names(), None);
        assert_eq!(device(&named[..2]).wants_names(), Some("usb:v0951p1666".into()));
        let known = [("PRODUCT", "5ac/1/1"), ("ID_VENDOR", "05ac"), ("ID_MODEL_FROM_DATABASE", "iPhone")];
        assert_eq!(device(&known).wants_names(), Some("usb:v05ACp0001".into()));
        let gone = Message { action: Action::Remove, ..device(&named[..1]) };
        assert_eq!(gone.wants_names(), None);
        let disk = Message { kind: Kind::Disk, ..device(&named[..1]) };
        assert_eq!(disk.wants_names(), None);
    }

    #[test]
    fn a_phone_whose_mtp_hides_behind_a_vendors_class_is_known_as_one() {
        let vendors = UsbInterface { class: 0xff, subclass: 0xff, protocol: 0 };
        let phone = device(&[("ID_USB_INTERFACES", ":ffff00:"), ("ID_MTP_DEVICE", "1")]);
        assert_eq!(phone.usb_device().interfaces, [UsbInterface::STILL_IMAGE, vendors]);
        let camera = device(&[("ID_USB_INTERFACES", ":060101:"), ("ID_MTP_DEVICE", "1")]);
        assert_eq!(camera.usb_device().interfaces, [UsbInterface::STILL_IMAGE]);
        assert_eq!(device(&[("ID_USB_INTERFACES", ":ffff00:")]).usb_device().interfaces, [vendors]);
    }

    #[test]
    fn a_disks_size_is_read_in_sectors_of_512_bytes() {
        let sdb = b"/devices/usb1/1-2/1-2:1.0/host6/target6:0:0/6:0:0:0/block/sdb";
        let sr0 = b"/devices/usb1/1-2/1-2:1.0/host6/target6:0:0/6:0:0:0/block/sr0";
        assert_eq!(disk_bytes(sdb, b"131072\n"), Some(64 << 20));
        assert_eq!(disk_bytes(sdb, b"0\n"), Some(0));
        assert_eq!(disk_bytes(sr0, b"2097151\n"), Some(0), "an empty drive");
        assert_eq!(disk_bytes(sdb, b"2097151\n"), Some(2_097_151 * 512));
        assert_eq!(disk_bytes(sdb, b"18446744073709551615\n"), Some(u64::MAX));
        for hostile in [&b""[..], b"-1", b"1e9", b"\xff", b"18446744073709551616"] {
            assert_eq!(disk_bytes(sdb, hostile), None, "{hostile:?}");
        }
    }

    #[test]
    fn broken_descriptors_end_the_list() {
        let storage = [9, 4, 0, 0, 2, 8, 6, 0x50, 0];
        for broken in [&[0][..], &[255, 4], &[4, 4, 0, 0], &[1]] {
            assert_eq!(interfaces_of(&[&storage, broken].concat()).len(), 1, "{broken:?}");
        }
        let zero_length_first = [&[0][..], &storage].concat();
        assert!(interfaces_of(&zero_length_first).is_empty());
    }

    #[test]
    fn a_stick_cannot_hide_behind_the_device_class_of_hubs() {
        assert!(device(&[("TYPE", "9/0/1")]).is_hub());
        assert!(device(&[("TYPE", "0/0/0"), ("ID_USB_INTERFACES", ":090000:090001:")]).is_hub());
        assert!(!device(&[("TYPE", "9/0/1"), ("ID_USB_INTERFACES", ":090000:080650:")]).is_hub());
        assert!(!device(&[("TYPE", "0/0/0")]).is_hub());
    }
}
