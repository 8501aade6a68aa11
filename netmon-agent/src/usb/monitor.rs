//! libudev: the monitor's socket and the list of devices, turned into [`Message`]s.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};

use super::message::{Action, Attributes, Kind, Message};

/// udevd's presence: without this file libudev's udev monitor listens to nothing, silently.
const UDEVD: &str = "/run/udev/control";

/// Longest sysfs attribute that is read: descriptors of the largest devices have a few kB.
const MAX_ATTRIBUTE: u64 = 16 * 1024;

/// Who tells about devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// udevd, which knows names and classes.
    Udevd,
    /// The kernel itself, where no udevd runs; names come from sysfs.
    Kernel,
}

impl Source {
    /// The best one there is now.
    pub fn available() -> Self {
        if Path::new(UDEVD).exists() { Self::Udevd } else { Self::Kernel }
    }
}

/// What [`Monitor::receive`] found.
#[derive(Debug)]
pub enum Received {
    /// A message.
    Message(Message),
    /// Nothing more for now.
    Empty,
    /// Messages were lost, or one came that cannot be read.
    Lost(io::Error),
}

/// A socket on which udevd (or the kernel) announces devices.
pub struct Monitor {
    source: Source,
    socket: udev::MonitorSocket,
}

impl Monitor {
    /// Listens from now on. `receive_buffer` in bytes: about 2 kB of it are used by a message that waits.
    ///
    /// # Errors
    /// When the kernel refuses the netlink socket.
    pub fn open(source: Source, receive_buffer: usize) -> io::Result<Self> {
        let builder = match source {
            Source::Udevd => udev::MonitorBuilder::new()?,
            Source::Kernel => udev::MonitorBuilder::new_kernel()?,
        };
        let builder = builder
            .match_subsystem_devtype("usb", "usb_device")?
            .match_subsystem_devtype("block", "disk")?
            .match_subsystem("net")?
            .match_subsystem("tty")?;
        // Beyond net.core.rmem_max only with CAP_NET_ADMIN, which the agent has and a test may lack.
        set_socket_recv_buffer_size_force(&builder, receive_buffer)
            .or_else(|_| set_socket_recv_buffer_size(&builder, receive_buffer))?;
        Ok(Self { source, socket: builder.listen()? })
    }

    /// Whom it listens to.
    pub fn source(&self) -> Source {
        self.source
    }

    /// The next message that waits. libudev itself drops what neither root nor the kernel sent.
    pub fn receive(&self) -> Received {
        if let Some(event) = self.socket.iter().next() {
            return Received::Message(message(&event));
        }
        let error = io::Error::last_os_error();
        match Errno::from_io_error(&error) {
            // Also when libudev dropped a message; then poll(2) says at once whether more wait.
            Some(Errno::AGAIN | Errno::INTR) => Received::Empty,
            _ => Received::Lost(error),
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The USB devices that are there now, parents before children, then disks, network interfaces and serial ports.
///
/// # Errors
/// When sysfs cannot be listed.
pub fn list() -> io::Result<Vec<Message>> {
    // libudev finds nothing and says nothing where sysfs is not mounted.
    fs::read_dir("/sys/bus")?;
    let mut found = Vec::new();
    for (subsystem, devtype) in
        [("usb", Some("usb_device")), ("block", Some("disk")), ("net", None), ("tty", None)]
    {
        let mut enumerator = udev::Enumerator::new()?;
        enumerator.match_subsystem(subsystem)?;
        if let Some(devtype) = devtype {
            enumerator.match_property("DEVTYPE", devtype)?;
        }
        // Consoles, bridges, containers' cables: many, and none of them on a bus.
        let devices = enumerator.scan_devices()?.filter(|device| !is_virtual(device));
        found.extend(devices.map(|device| message(&device)));
    }
    Ok(found)
}

fn message(device: &udev::Device) -> Message {
    let bytes = |value: Option<&OsStr>| value.map(|value| value.as_bytes().to_vec()).unwrap_or_default();
    let mut message = Message {
        action: Action::parse(&bytes(device.property_value("ACTION"))),
        kind: Kind::parse(&bytes(device.subsystem()), &bytes(device.devtype())),
        devpath: device.devpath().as_bytes().to_vec(),
        properties: device
            .properties()
            .map(|entry| (entry.name().as_bytes().to_vec(), entry.value().as_bytes().to_vec()))
            .collect(),
        attributes: Attributes::default(),
    };
    let directory = device.syspath();
    match message.kind {
        Kind::UsbDevice if message.wants_attributes() => {
            message.attributes = Attributes {
                manufacturer: line(&directory.join("manufacturer")),
                product: line(&directory.join("product")),
                serial: line(&directory.join("serial")),
                descriptors: attribute(&directory.join("descriptors")),
                ..Attributes::default()
            };
        }
        Kind::Disk if message.action != Action::Remove => {
            message.attributes.size = attribute(&directory.join("size"));
        }
        Kind::Network if message.action != Action::Remove && !is_virtual(device) => {
            message.attributes.driver = driver_below(directory);
        }
        _ => {}
    }
    if let Some(modalias) = message.wants_names() {
        add_names(&mut message, &modalias);
    }
    message
}

fn is_virtual(device: &udev::Device) -> bool {
    device.devpath().as_bytes().starts_with(b"/devices/virtual/")
}

/// The driver of the device below an interface. `None`: the interface is gone, or has another name, of which a message is
/// on the way.
fn driver_below(interface: &Path) -> Option<Vec<u8>> {
    let driver = fs::read_link(interface.join("device/driver")).unwrap_or_default();
    // Only now: what was found is the driver's as long as its interface is there.
    interface.exists().then(|| driver.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default())
}

/// Where udevd does not run or its rules do not look names up. A PC without a hardware database knows none.
fn add_names(message: &mut Message, modalias: &str) {
    let Ok(database) = udev::Hwdb::new() else { return };
    for found in database.query(modalias) {
        let name = found.name().as_bytes();
        if [&b"ID_VENDOR_FROM_DATABASE"[..], b"ID_MODEL_FROM_DATABASE"].contains(&name) {
            message.properties.entry(name.to_vec()).or_insert_with(|| found.value().as_bytes().to_vec());
        }
    }
}

/// A disk's `size` file as it reads now; empty: the disk is gone.
pub fn disk_size(devpath: &[u8]) -> Vec<u8> {
    attribute(Path::new(OsStr::from_bytes(&[b"/sys", devpath, b"/size"].concat())))
}

/// A text attribute without its line end.
fn line(file: &Path) -> Vec<u8> {
    let mut text = attribute(file);
    text.pop_if(|last| *last == b'\n');
    text
}

/// Empty when the device has no such attribute, or is gone.
fn attribute(file: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    match File::open(file).and_then(|file| file.take(MAX_ATTRIBUTE).read_to_end(&mut bytes)) {
        Ok(_) => bytes,
        Err(_) => Vec::new(),
    }
}
