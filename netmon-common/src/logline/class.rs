//! What USB's class codes mean to the people at the PC (usb.org, "Defined Class Codes", and the class definitions).

use std::fmt::{self, Display, Formatter};

use crate::model::UsbInterface;

/// Whether data can move through an interface without anybody counting it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// What moves is counted elsewhere (disks, network interfaces), or it is no way for data.
    Measured,
    /// Only the maker knows.
    Perhaps,
    /// It is one, and nobody counts.
    Unmeasured,
}

/// What a device is for: each use once, in the order of its interfaces.
pub(super) struct Uses(Vec<(String, Way)>);

/// What a device with these interfaces is for.
pub(super) fn uses(interfaces: &[UsbInterface]) -> Uses {
    let mut uses: Vec<(String, Way)> = Vec::new();
    for interface in interfaces {
        let (name, way) = use_of(*interface);
        match uses.iter_mut().find(|(known, _)| *known == name) {
            Some(known) => known.1 = known.1.max(way),
            None => uses.push((name, way)),
        }
    }
    // The second half of a serial port or a network adapter says nothing new.
    if uses.len() > 1 {
        uses.retain(|(name, _)| name != DATA);
    }
    Uses(uses)
}

impl Uses {
    /// True where the device says nothing of itself.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The worst of its uses.
    pub(super) fn way(&self) -> Way {
        self.0.iter().map(|(_, way)| *way).max().unwrap_or(Way::Measured)
    }
}

impl Display for Uses {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (name, _) in &self.0 {
            write!(f, "{separator}{name}")?;
            separator = ", ";
        }
        Ok(())
    }
}

/// CDC-Data: belongs to another interface of the same device.
const DATA: &str = "communication data";

fn use_of(interface: UsbInterface) -> (String, Way) {
    use Way::{Measured, Perhaps, Unmeasured};
    let UsbInterface { class, subclass, protocol } = interface;
    let (name, way) = match (class, subclass, protocol) {
        (0x01, ..) => ("audio", Measured),
        // Microsoft's first RNDIS (ActiveSync) goes by the codes of a modem.
        (0x02, 0x02, 0xff) => ("network adapter (RNDIS)", Measured),
        (0x02, 0x02, _) => ("serial adapter", Unmeasured),
        (0x02, 0x06 | 0x0c | 0x0d, _) => ("network adapter", Measured),
        (0x02, 0x0e, _) => ("mobile broadband modem", Measured),
        (0x02, 0x0b, _) => ("file exchange (OBEX)", Unmeasured),
        (0x02, ..) => ("communication", Perhaps),
        (0x03, _, 0x01) => ("keyboard", Measured),
        (0x03, _, 0x02) => ("mouse", Measured),
        (0x03, ..) => ("input device", Measured),
        (0x06, ..) => ("phone or camera (MTP, PTP)", Unmeasured),
        (0x07, ..) => ("printer", Unmeasured),
        (0x08, ..) => ("storage", Measured),
        (0x09, ..) => ("hub", Measured),
        (0x0a, ..) => (DATA, Measured),
        (0x0b, ..) => ("smart card reader", Measured),
        (0x0e, ..) => ("video", Measured),
        (0x10, ..) => ("audio and video", Measured),
        (0xe0, 0x01, 0x01) => ("Bluetooth", Unmeasured),
        (0xe0, 0x01, 0x03) | (0xef, 0x04, _) => ("network adapter (RNDIS)", Measured),
        (0xe0, ..) => ("wireless controller", Perhaps),
        (0xfe, 0x01, _) => ("firmware update (DFU)", Unmeasured),
        (0xfe, 0x03, _) => ("measuring instrument (USBTMC)", Unmeasured),
        (0xff, 0x42, 0x01) => ("Android debugging (ADB)", Unmeasured),
        (0xff, 0x42, 0x03) => ("Android boot loader (fastboot)", Unmeasured),
        (0xff, 0xfe, 0x02) => ("iPhone or iPad (usbmux)", Unmeasured),
        (0xff, ..) => ("vendor-specific", Perhaps),
        _ => return (format!("class {class:02x}{subclass:02x}{protocol:02x}"), Perhaps),
    };
    (name.to_owned(), way)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `080650 ffff00`, as udevd writes them but for the colons.
    fn shown(codes: &str) -> (String, Way) {
        let interface = |code: &str| {
            let [_, class, subclass, protocol] = u32::from_str_radix(code, 16).unwrap().to_be_bytes();
            UsbInterface { class, subclass, protocol }
        };
        let uses = uses(&codes.split_whitespace().map(interface).collect::<Vec<_>>());
        (uses.to_string(), uses.way())
    }

    #[test]
    fn a_device_is_named_by_its_uses_each_once() {
        for (codes, name, way) in [
            ("080650", "storage", Way::Measured),
            ("080650 080662", "storage", Way::Measured),
            ("030101 030102 030000", "keyboard, mouse, input device", Way::Measured),
            ("060101", "phone or camera (MTP, PTP)", Way::Unmeasured),
            (
                "060101 ff4201 e00103 0a0000",
                "phone or camera (MTP, PTP), Android debugging (ADB), network adapter (RNDIS)",
                Way::Unmeasured,
            ),
            ("020600 0a0000", "network adapter", Way::Measured),
            ("020d00 0a0001", "network adapter", Way::Measured),
            ("0202ff 0a0000 020600", "network adapter (RNDIS), network adapter", Way::Measured),
            ("020e00 0a0002", "mobile broadband modem", Way::Measured),
            ("020201 0a0000", "serial adapter", Way::Unmeasured),
            ("e00101", "Bluetooth", Way::Unmeasured),
            ("010100 010200 0e0100 0e0200", "audio, video", Way::Measured),
            ("070102", "printer", Way::Unmeasured),
            ("0b0000", "smart card reader", Way::Measured),
            ("fffe02 060101", "iPhone or iPad (usbmux), phone or camera (MTP, PTP)", Way::Unmeasured),
            ("ffffff", "vendor-specific", Way::Perhaps),
            ("080650 ff0000", "storage, vendor-specific", Way::Perhaps),
            ("0a0000", "communication data", Way::Measured),
            ("dc0101 dc0102", "class dc0101, class dc0102", Way::Perhaps),
            ("", "", Way::Measured),
        ] {
            assert_eq!(shown(codes), (name.to_owned(), way), "{codes}");
        }
    }
}
