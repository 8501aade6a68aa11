//! USB devices without USB: messages as systemd-udevd broadcasts them.
//!
//! udevd sends every message to group 2 of the netlink family `NETLINK_KOBJECT_UEVENT`, within its network namespace.
//! Whoever may administrate a network namespace can do the same there, so a test or a lab PC in a namespace of its own
//! sees what it would see of a real device, and the host sees nothing. [`pretend_udevd`] makes libudev listen at all.

use std::fs;
use std::io;

use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sendto, socket_with};

/// The multicast group of udevd's messages.
pub const UDEVD: u32 = 2;

/// The multicast group of the kernel's messages. Receivers believe them only from the kernel.
pub const KERNEL: u32 = 1;

/// Starts a message (systemd: src/libsystemd/sd-device/device-monitor.c, `monitor_netlink_header`).
const MAGIC: u32 = 0xfeed_cafe;

/// A message as systemd-udevd sends it, out of its properties (`ACTION`, `DEVPATH`, `SUBSYSTEM`, ...).
///
/// Without `ACTION`, `DEVPATH`, `SUBSYSTEM` and `SEQNUM` receivers refuse it.
pub fn encode<K: AsRef<[u8]>, V: AsRef<[u8]>>(properties: &[(K, V)]) -> Vec<u8> {
    const HEADER: u32 = 40;
    let mut body = Vec::new();
    for (name, value) in properties {
        body.extend_from_slice(name.as_ref());
        body.push(b'=');
        body.extend_from_slice(value.as_ref());
        body.push(0);
    }
    // Receivers' socket filters compare these words.
    let hash = |wanted: &str| {
        let value = properties.iter().find(|(name, _)| name.as_ref() == wanted.as_bytes());
        value.map_or(0, |(_, value)| murmur_hash2(value.as_ref()))
    };
    let mut message = b"libudev\0".to_vec();
    message.extend_from_slice(&MAGIC.to_be_bytes());
    for word in [HEADER, HEADER, body.len() as u32] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.extend_from_slice(&hash("SUBSYSTEM").to_be_bytes());
    message.extend_from_slice(&hash("DEVTYPE").to_be_bytes());
    // No tags.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&body);
    message
}

/// Sends a message to everybody in this network namespace who listens to udevd. That may be nobody: no error.
///
/// # Errors
/// `EPERM` without the right to administrate the network namespace.
pub fn broadcast(message: &[u8]) -> io::Result<()> {
    broadcast_to(UDEVD, message)
}

/// Like [`broadcast`], to any group.
///
/// # Errors
/// As [`broadcast`].
pub fn broadcast_to(group: u32, message: &[u8]) -> io::Result<()> {
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(KOBJECT_UEVENT))?;
    sendto(&socket, message, SendFlags::empty(), &SocketAddrNetlink::new(0, group))?;
    Ok(())
}

/// Makes libudev believe that udevd runs: its monitor listens to nothing where `/run/udev/control` is missing.
/// For a mount namespace with a `/run` of its own.
///
/// # Errors
/// When the files cannot be made.
pub fn pretend_udevd() -> io::Result<()> {
    fs::create_dir_all("/run/udev/data")?;
    fs::write("/run/udev/control", "")
}

/// What happens to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is plugged in.
    Add,
    /// It is unplugged.
    Remove,
}

/// A USB stick. [`Stick::default`] is a Kingston DataTraveler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stick {
    /// Kernel device path of the USB device.
    pub devpath: String,
    /// Bus number.
    pub bus: u16,
    /// Device number on the bus; the kernel gives a new one each time a device is plugged in.
    pub number: u16,
    /// idVendor.
    pub vendor_id: u16,
    /// idProduct.
    pub product_id: u16,
    /// Manufacturer string, any bytes.
    pub vendor: Vec<u8>,
    /// Product string, any bytes.
    pub model: Vec<u8>,
    /// Serial number; empty: it has none.
    pub serial: Vec<u8>,
    /// Class codes of its interfaces as udevd writes them.
    pub interfaces: String,
    /// Name of its disk, for example `sdb`; `None`: no disk appears.
    pub disk: Option<String>,
}

impl Default for Stick {
    fn default() -> Self {
        Self {
            devpath: "/devices/pci0000:00/0000:00:14.0/usb2/2-1".into(),
            bus: 2,
            number: 2,
            vendor_id: 0x0951,
            product_id: 0x1666,
            vendor: b"Kingston".into(),
            model: b"DataTraveler 3.0".into(),
            serial: b"60A44C413FAE".into(),
            interfaces: ":080650:".into(),
            disk: None,
        }
    }
}

impl Stick {
    /// Kernel device path of the stick's disk.
    pub fn disk_devpath(&self) -> Option<String> {
        let port = self.devpath.rsplit('/').next().unwrap_or_default();
        self.disk
            .as_ref()
            .map(|disk| format!("{}/{port}:1.0/host6/target6:0:0/6:0:0:0/block/{disk}", self.devpath))
    }

    /// The messages about the stick and its disk in the order in which udevd sends them. A removal says nothing that
    /// the kernel does not know: udevd has forgotten names and classes by then.
    pub fn messages(&self, action: Action) -> Vec<Vec<u8>> {
        let device = || encode(&self.device(action));
        let disk = || self.disk_devpath().map(|devpath| encode(&self.disk(&devpath, action)));
        match action {
            Action::Add => [Some(device()), disk()].into_iter().flatten().collect(),
            Action::Remove => [disk(), Some(device())].into_iter().flatten().collect(),
        }
    }

    /// Sends the messages.
    ///
    /// # Errors
    /// As [`broadcast`].
    pub fn inject(&self, action: Action) -> io::Result<()> {
        self.messages(action).iter().try_for_each(|message| broadcast(message))
    }

    fn device(&self, action: Action) -> Vec<(&'static str, Vec<u8>)> {
        let minor = u32::from(self.bus.saturating_sub(1)) * 128 + u32::from(self.number.saturating_sub(1));
        let (vendor_id, product_id) = (self.vendor_id, self.product_id);
        let mut properties = common(action, &self.devpath, "usb", "usb_device");
        properties.extend([
            ("DEVNAME", format!("/dev/bus/usb/{:03}/{:03}", self.bus, self.number).into()),
            ("MAJOR", "189".into()),
            ("MINOR", minor.to_string().into()),
            ("BUSNUM", format!("{:03}", self.bus).into()),
            ("DEVNUM", format!("{:03}", self.number).into()),
            ("PRODUCT", format!("{vendor_id:x}/{product_id:x}/110").into()),
            ("TYPE", "0/0/0".into()),
        ]);
        if action == Action::Remove {
            return properties;
        }
        properties.extend([
            ("ID_BUS", "usb".into()),
            ("ID_VENDOR_ID", format!("{vendor_id:04x}").into()),
            ("ID_MODEL_ID", format!("{product_id:04x}").into()),
            ("ID_VENDOR", tidied(&self.vendor)),
            ("ID_VENDOR_ENC", encoded(&self.vendor)),
            ("ID_MODEL", tidied(&self.model)),
            ("ID_MODEL_ENC", encoded(&self.model)),
            ("ID_SERIAL", [tidied(&self.vendor), tidied(&self.model), tidied(&self.serial)].join(&b'_')),
            ("ID_USB_INTERFACES", self.interfaces.clone().into()),
        ]);
        if !self.serial.is_empty() {
            properties.push(("ID_SERIAL_SHORT", tidied(&self.serial)));
        }
        properties
    }

    fn disk(&self, devpath: &str, action: Action) -> Vec<(&'static str, Vec<u8>)> {
        let mut properties = common(action, devpath, "block", "disk");
        let name = self.disk.as_deref().unwrap_or_default();
        properties.extend([
            ("DEVNAME", format!("/dev/{name}").into()),
            ("MAJOR", "8".into()),
            ("MINOR", "16".into()),
        ]);
        if action == Action::Add {
            properties.push(("ID_BUS", "usb".into()));
        }
        properties
    }
}

fn common(action: Action, devpath: &str, subsystem: &str, devtype: &str) -> Vec<(&'static str, Vec<u8>)> {
    let action = match action {
        Action::Add => "add",
        Action::Remove => "remove",
    };
    vec![
        ("ACTION", action.into()),
        ("DEVPATH", devpath.into()),
        ("SUBSYSTEM", subsystem.into()),
        ("DEVTYPE", devtype.into()),
        ("SEQNUM", "4711".into()),
    ]
}

/// True for what udevd leaves as it is in a string from a device.
fn is_safe(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&byte)
}

/// As udevd tidies a string: `_` for what is not safe.
fn tidied(raw: &[u8]) -> Vec<u8> {
    raw.iter().map(|&byte| if is_safe(byte) { byte } else { b'_' }).collect()
}

/// As udevd encodes a string without loss: `\x20` for what is not safe.
fn encoded(raw: &[u8]) -> Vec<u8> {
    let encode = |&byte: &u8| if is_safe(byte) { vec![byte] } else { format!("\\x{byte:02x}").into_bytes() };
    raw.iter().flat_map(encode).collect()
}

/// MurmurHash2 by Austin Appleby, 32 bits, seed 0: the hash in the filter words of udevd's messages.
fn murmur_hash2(bytes: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash = bytes.len() as u32;
    let mut words = bytes.chunks_exact(4);
    for word in &mut words {
        let mut mixed =
            word.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)).wrapping_mul(M);
        mixed ^= mixed >> 24;
        hash = hash.wrapping_mul(M) ^ mixed.wrapping_mul(M);
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        hash ^= rest.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_murmur_hash_2() {
        // By another implementation.
        let hashes = [&b""[..], b"usb", b"block", b"disk", b"usb_device"].map(murmur_hash2);
        assert_eq!(hashes, [0, 0x0577_c5e5, 0xf003_1db7, 0x7bcb_c5ee, 0x27f8_f50c]);
    }

    #[test]
    fn a_message_has_header_filter_words_and_properties() {
        let message = encode(&[("ACTION", "add"), ("SUBSYSTEM", "usb"), ("DEVTYPE", "usb_device")]);
        let (header, body) = message.split_at(40);
        assert!(header.starts_with(b"libudev\0\xfe\xed\xca\xfe"));
        assert_eq!(body, b"ACTION=add\0SUBSYSTEM=usb\0DEVTYPE=usb_device\0");
        assert_eq!(header[24..28], murmur_hash2(b"usb").to_be_bytes());
        assert_eq!(header[28..32], murmur_hash2(b"usb_device").to_be_bytes());
    }

    #[test]
    fn strings_keep_their_bytes_in_the_encoded_property() {
        assert_eq!(encoded(b"Data Traveler\n\\\xff"), br"Data\x20Traveler\x0a\x5c\xff");
        assert_eq!(tidied(b"Data Traveler\n"), b"Data_Traveler_");
    }

    #[test]
    fn a_removal_does_not_name_the_device() {
        let stick = Stick { disk: Some("sdb".into()), ..Stick::default() };
        let text = |messages: Vec<Vec<u8>>| {
            messages.iter().map(|m| String::from_utf8_lossy(m).into_owned()).collect()
        };
        let added: Vec<String> = text(stick.messages(Action::Add));
        let removed: Vec<String> = text(stick.messages(Action::Remove));
        assert!(added[0].contains("ID_SERIAL_SHORT=60A44C413FAE\0") && added[1].contains("DEVTYPE=disk\0"));
        assert!(removed[0].contains("DEVTYPE=disk\0") && !removed[1].contains("Kingston"));
    }
}
