//! Where a USB device was seen before: the same stick at another PC. No I/O, no clock.
//!
//! A device is known by idVendor, idProduct and its serial number. One without a serial number has no passport, and a
//! serial number may be a lie, or the same in thousands of cheap devices. The latter shows when one is seen at two
//! PCs at the same time, and from then on nothing is said of it any more.

use netmon_common::model::{Event, UsbDevice};
use netmon_common::raw::Raw;

use crate::notice::Notice;

/// A record that took longer than this to arrive says nothing of where a device is now.
const FRESH_NS: i64 = 5_000_000_000;

/// What a record says of where devices are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// This device is at the PC.
    Came(Known),
    /// This device is not there any more.
    Left(Known),
    /// The agent was started: what is there will be named.
    Anew,
}

/// A device that says which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// idVendor.
    pub vendor_id: u16,
    /// idProduct.
    pub product_id: u16,
    /// Serial number; not empty.
    pub serial: Raw,
    /// Vendor's name.
    pub vendor: Raw,
    /// Product's name.
    pub model: Raw,
}

/// A device was, or is, at another PC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stay {
    /// That PC's seat.
    pub seat: Raw,
    /// When it was last said to have come or gone there, the server's clock.
    pub last_ns: i64,
    /// True when it came and nobody said that it left, and that PC's agent is connected.
    pub is_there: bool,
}

impl Sighting {
    /// What an event says, if anything.
    pub fn of(event: &Event) -> Option<Self> {
        match event {
            Event::AgentStarted(_) => Some(Self::Anew),
            Event::DevicePresent(device) | Event::DeviceAdded(device) => Known::of(device).map(Self::Came),
            Event::DeviceRemoved(device) => Known::of(device).map(Self::Left),
            _ => None,
        }
    }
}

impl Known {
    fn of(device: &UsbDevice) -> Option<Self> {
        let UsbDevice { vendor_id, product_id, serial, vendor, model, .. } = device;
        // "0000000000" is how some say that they have none.
        let says_something = serial.as_bytes().iter().any(|byte| !matches!(byte, b'0' | b' '));
        says_something.then(|| Self {
            vendor_id: *vendor_id,
            product_id: *product_id,
            serial: serial.clone(),
            vendor: vendor.clone(),
            model: model.clone(),
        })
    }
}

/// True when a record arrived as soon as it was made. Both times by the server's clock.
pub fn is_fresh(recorded_ns: i64, received_ns: i64) -> bool {
    received_ns.saturating_sub(recorded_ns) <= FRESH_NS
}

/// What there is to say when a device comes to a PC. `elsewhere`: its newest stay, where that was at another PC.
pub fn judge(device: &Known, elsewhere: Option<Stay>, recorded_ns: i64, received_ns: i64) -> Option<Notice> {
    let Stay { seat, last_ns, is_there } = elsewhere?;
    let Known { vendor, model, serial, .. } = device.clone();
    Some(if is_there && is_fresh(recorded_ns, received_ns) {
        Notice::SerialShared { vendor, model, serial, seat }
    } else {
        Notice::DeviceMoved { vendor, model, serial, seat, last_ns }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn device(serial: &str) -> UsbDevice {
        UsbDevice { vendor: "SanDisk".into(), serial: serial.into(), ..UsbDevice::default() }
    }

    #[test]
    fn only_a_device_that_says_which_one_it_is_has_a_passport() {
        for none in ["", "0", "000000000000", "  "] {
            assert_eq!(Sighting::of(&Event::DeviceAdded(device(none))), None, "{none:?}");
        }
        let Some(Sighting::Came(known)) = Sighting::of(&Event::DevicePresent(device("4C53"))) else {
            panic!()
        };
        assert_eq!(Sighting::of(&Event::DeviceRemoved(device("4C53"))), Some(Sighting::Left(known)));
        assert_eq!(Sighting::of(&Event::AgentStopped), None);
    }

    #[test]
    fn at_two_pcs_at_once_are_two_devices_and_one_after_the_other_is_one_that_was_carried() {
        let Some(known) = Known::of(&device("4C53")) else { panic!() };
        let stay = |is_there| Some(Stay { seat: "pc-12".into(), last_ns: SECOND, is_there });
        let judged = |stay, received_ns| judge(&known, stay, 10 * SECOND, received_ns);
        assert!(matches!(
            judged(stay(false), 10 * SECOND),
            Some(Notice::DeviceMoved { last_ns: SECOND, .. })
        ));
        assert!(matches!(judged(stay(true), 10 * SECOND), Some(Notice::SerialShared { .. })));
        let late = judged(stay(true), 16 * SECOND);
        assert!(matches!(late, Some(Notice::DeviceMoved { .. })), "it may have been carried since");
        assert_eq!(judged(None, 10 * SECOND), None);
    }
}
