//! What udev says of devices, and the kernel of disks and mounts.

use std::collections::BTreeMap;

use netmon_agent::usb::devices::Devices;
use netmon_agent::usb::disks::{Meter, Stat};
use netmon_agent::usb::functions::Functions;
use netmon_agent::usb::message::{Action, Attributes, Kind, Message};
use netmon_common::logline;
use netmon_common::model::{Disk, Event, Record, UsbDevice};

use crate::input::Input;
use crate::records::is_one_line;

/// Messages, separated by two zeros, each of them `NAME=value` separated by zeros as udevd sends it; what sysfs says of a
/// device comes as `@manufacturer=…`, of a disk as `@size=…`. A disk's counters come as `@stat=…`, the list of mounts as
/// `@mounts=…`.
///
/// Every event is a record that fits and a line; who lists the devices twice hears nothing the second time.
pub fn usb(data: &[u8]) {
    let mut devices = Devices::default();
    let mut functions = Functions::default();
    let mut meter = Meter::new(disk(), Stat::default(), 0);
    let mut listed = BTreeMap::new();
    for (at, bytes) in (1..).zip(messages(data)) {
        let properties: BTreeMap<Vec<u8>, Vec<u8>> = properties(bytes).collect();
        if let Some(stat) = properties.get(&b"@stat"[..]).and_then(|text| Stat::parse(text)) {
            meter.sample(stat, at);
        }
        if let Some(text) = properties.get(&b"@mounts"[..]) {
            crate::mounts::mounts(text, meter.disk());
        }
        let message = message(properties);
        assert!(message.usb_device().interfaces.len() <= UsbDevice::MAX_INTERFACES);
        for event in devices.handle(&message) {
            is_recorded(event);
        }
        message.wants_names();
        if let Some(above) = devices.above(&message.devpath) {
            assert!(message.devpath.len() > above.devpath.as_bytes().len());
            functions.handle(&message, above, at).into_iter().for_each(is_recorded);
            assert_eq!(functions.handle(&message, above, at), None);
        }
        listed.insert(message.devpath.clone(), message);
    }
    // A path is there once.
    let listed: Vec<Message> = listed.into_values().collect();
    devices.resync(&listed).into_iter().for_each(is_recorded);
    assert_eq!(devices.resync(&listed), []);
    let gone = devices.resync(&[]);
    assert!(gone.iter().all(|event| matches!(event, Event::DeviceRemoved(_))));
}

pub(crate) fn is_recorded(event: Event) {
    let record = Record { seq: 1, run: 1, boot_ns: 0, wall_ns: 0, event };
    let bytes = record.to_bytes().expect("an event of ours fits into a record");
    assert_eq!(Record::from_bytes(&bytes).as_ref(), Ok(&record));
    is_one_line(&logline::line(&record, &jiff::tz::TimeZone::UTC), bytes.len());
}

fn messages(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut input = Input(data);
    std::iter::from_fn(move || {
        let rest = input.0;
        let end = rest.windows(2).position(|two| two == [0, 0]).unwrap_or(rest.len());
        let message = input.bytes(end);
        input.bytes(2);
        (!rest.is_empty()).then_some(message)
    })
}

fn properties(message: &[u8]) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
    message.split(|byte| *byte == 0).filter_map(|property| {
        let at = property.iter().position(|byte| *byte == b'=')?;
        Some((property[..at].to_vec(), property[at + 1..].to_vec()))
    })
}

/// As `usb::monitor` makes it of libudev's device.
fn message(mut properties: BTreeMap<Vec<u8>, Vec<u8>>) -> Message {
    let mut attribute = |name: &[u8]| properties.remove(name).unwrap_or_default();
    let attributes = Attributes {
        manufacturer: attribute(b"@manufacturer"),
        product: attribute(b"@product"),
        serial: attribute(b"@serial"),
        descriptors: attribute(b"@descriptors"),
        size: attribute(b"@size"),
        driver: Some(attribute(b"@driver")).filter(|driver| !driver.is_empty()),
    };
    let property = |name: &[u8]| properties.get(name).cloned().unwrap_or_default();
    let mut message = Message {
        action: Action::parse(&property(b"ACTION")),
        kind: Kind::parse(&property(b"SUBSYSTEM"), &property(b"DEVTYPE")),
        devpath: property(b"DEVPATH"),
        properties,
        attributes: Attributes::default(),
    };
    if message.kind != Kind::UsbDevice || message.wants_attributes() {
        message.attributes = attributes;
    }
    message
}

fn disk() -> Disk {
    Disk { name: "sdb".into(), vendor: "Kingston".into(), model: "DataTraveler".into(), serial: "A1".into() }
}
