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
        let builder =
            builder.match_subsystem_devtype("usb", "usb_device")?.match_subsystem_devtype("block", "disk")?;
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

/// The USB devices and disks that are there now, parents before children.
///
/// # Errors
/// When sysfs cannot be listed.
pub fn list() -> io::Result<Vec<Message>> {
    // libudev finds nothing and says nothing where sysfs is not mounted.
    fs::read_dir("/sys/bus")?;
    let mut found = Vec::new();
    for (subsystem, devtype) in [("usb", "usb_device"), ("block", "disk")] {
        let mut enumerator = udev::Enumerator::new()?;
        enumerator.match_subsystem(subsystem)?;
        enumerator.match_property("DEVTYPE", devtype)?;
        found.extend(enumerator.scan_devices()?.map(|device| message(&device)));
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
    if message.wants_attributes() {
        let directory = device.syspath();
        message.attributes = Attributes {
            manufacturer: line(&directory.join("manufacturer")),
            product: line(&directory.join("product")),
            serial: line(&directory.join("serial")),
            descriptors: attribute(&directory.join("descriptors")),
        };
    }
    message
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
