//! What an agent records of USB.

use serde::{Deserialize, Serialize};

use super::Traffic;
use crate::raw::Raw;

/// A USB device as its descriptors name it. Empty strings: neither the device nor the hardware database gives one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbDevice {
    /// Where it is plugged in: kernel device path without `/sys`, the identity while it is plugged in.
    pub devpath: Raw,
    /// Bus number.
    pub bus: u16,
    /// Device number on the bus.
    pub number: u16,
    /// idVendor.
    pub vendor_id: u16,
    /// idProduct.
    pub product_id: u16,
    /// Vendor's name.
    pub vendor: Raw,
    /// Product's name.
    pub model: Raw,
    /// Serial number.
    pub serial: Raw,
    /// Its interfaces, at most [`UsbDevice::MAX_INTERFACES`].
    pub interfaces: Vec<UsbInterface>,
}

impl UsbDevice {
    /// Most interfaces that are kept of one device.
    pub const MAX_INTERFACES: usize = 32;
}

/// USB class code triple of one interface (USB 2.0, table 9-12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UsbInterface {
    /// bInterfaceClass.
    pub class: u8,
    /// bInterfaceSubClass.
    pub subclass: u8,
    /// bInterfaceProtocol.
    pub protocol: u8,
}

impl UsbInterface {
    /// PTP and MTP: phones, cameras, players (USB Still Image Capture Device Definition 1.0). An agent lists it for a
    /// device that the PC's udev rules know as one that speaks MTP, whatever class the device itself gives.
    pub const STILL_IMAGE: Self = Self { class: 0x06, subclass: 0x01, protocol: 0x01 };
}

/// A USB disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Disk {
    /// Kernel name, for example `sdb`.
    pub name: Raw,
    /// Vendor's name of the USB device.
    pub vendor: Raw,
    /// Product's name of the USB device.
    pub model: Raw,
    /// Serial number of the USB device.
    pub serial: Raw,
}

/// What the kernel made of a USB device, or of a part of it: one device may be a disk and a network adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbFunction {
    /// The device.
    pub device: UsbDevice,
    /// What it is to this PC.
    pub function: Function,
}

/// What a USB device, or a part of it, is to this PC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Function {
    /// A disk, or one slot of a card reader. Recorded again whenever its medium changes.
    Disk {
        /// Kernel name, for example `sdb`.
        name: Raw,
        /// Size in bytes; 0: no medium (ejected, or an empty slot).
        bytes: u64,
    },
    /// A network interface.
    Network {
        /// Its name, for example `usb0`.
        interface: Raw,
        /// What stands at the other end of the cable.
        kind: UsbNetwork,
    },
    /// A serial port.
    Serial {
        /// Kernel name, for example `ttyUSB0`.
        tty: Raw,
    },
}

/// What stands at the other end of a USB network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UsbNetwork {
    /// A network adapter, as far as it lets know.
    Adapter,
    /// A phone that shares its connection.
    Phone,
    /// A mobile broadband modem.
    Modem,
}

/// A file system on a USB disk was mounted or unmounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbVolume {
    /// The disk below, whatever stands between (partitions, LVM, dm-crypt, loop).
    pub disk: Disk,
    /// What is mounted: kernel name of the block device, for example `sdb1` or `dm-0`.
    pub device: Raw,
    /// Type of the file system, for example `vfat`.
    pub file_system: Raw,
    /// Where it is mounted; the first place, where there are several.
    pub mount_point: Raw,
    /// True when nothing can be written to it.
    pub read_only: bool,
    /// What happened to it.
    pub change: VolumeChange,
}

/// What happened to a file system on a USB disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeChange {
    /// It was mounted when the agent started.
    Present,
    /// It was mounted.
    Mounted,
    /// It was unmounted; everything is on the disk.
    Unmounted {
        /// What the whole disk completed while it was mounted.
        moved: Traffic,
    },
    /// The disk was pulled out while it was mounted.
    PulledOut {
        /// What the whole disk completed while it was mounted.
        moved: Traffic,
        /// Bytes of files written and closed that can never have reached the disk, at least; 0: not known of any.
        unwritten: u64,
    },
}

/// A file on a USB disk was read or written, or opened at least.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbFile {
    /// The disk.
    pub disk: Disk,
    /// The directory, as the program's mount namespace names it; its end behind three dots, where it is longer than
    /// [`MAX_RAW`](crate::raw::MAX_RAW) bytes.
    pub directory: Raw,
    /// The file's name; its end behind three dots, where it is longer than [`MAX_RAW`](crate::raw::MAX_RAW) bytes. Empty:
    /// neither is known.
    pub name: Raw,
    /// What was done with it.
    pub access: FileAccess,
    /// Its size in bytes when it was closed; `None`: not known.
    pub bytes: Option<u64>,
    /// Who did it.
    pub program: Raw,
    /// Process ID; 0: not known.
    pub pid: u32,
    /// Real user ID; `None`: the process was gone already.
    pub uid: Option<u32>,
    /// That user's name, if the PC knows one.
    pub user: Raw,
}

/// What was done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FileAccess {
    /// It was read.
    Read,
    /// It was written, and perhaps read.
    Written,
    /// It was opened, not written, and nobody saw a read: the kernel tells of none by `mmap`, before Linux 6.4 of none by
    /// `splice`. Perhaps it was read.
    Opened,
}

/// File names of USB disks that are not known: an explicit gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbFilesUnseen {
    /// Why.
    pub reason: FilesUnseen,
    /// Since when, wall clock.
    pub from_wall_ns: i64,
    /// Until when, wall clock.
    pub to_wall_ns: i64,
    /// How many files; `None`: unknown.
    pub count: Option<u64>,
}

/// Why files of USB disks are not named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FilesUnseen {
    /// The kernel's queue was full. Count: unknown.
    QueueFull,
    /// More files than the limit, whose names are left out. Count: files.
    TooMany,
    /// A file system cannot be watched. Count: file systems.
    NotWatched,
    /// The PC's settings say that they are not to be recorded. Count: file systems.
    SwitchedOff,
}
