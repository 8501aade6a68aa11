//! What lines say of USB.

use std::fmt::{self, Display, Formatter};

use jiff::tz::TimeZone;

use super::class::{self, Way};
use super::{Quoted, Size, time};
use crate::model::*;
use crate::raw::Raw;

/// What a program that uses the device can move and netmon cannot count.
const NOT_MEASURED: &str = "; a way for data, bytes not measurable";

/// Likewise of an optical drive.
const BURNING: &str = "; discs may be burnt, bytes not measurable";

pub(super) fn function_sentence(f: &UsbFunction) -> String {
    let device = Named(&f.device.vendor, &f.device.model, &f.device.serial);
    match &f.function {
        Function::Disk { name, bytes } => {
            let size = match bytes {
                0 => "no medium".to_owned(),
                bytes => format!("{} ({bytes} B)", Size(*bytes)),
            };
            // Discs are burnt by SCSI commands of a program's own (SG_IO), which the kernel counts for no disk.
            let burning = if name.as_bytes().starts_with(b"sr") { BURNING } else { "" };
            format!("USB disk: {device} disk {}, {size}{burning}", name.escaped())
        }
        Function::Network { interface, kind } => {
            let kind = match kind {
                UsbNetwork::Adapter => "USB network adapter",
                UsbNetwork::Phone => "PHONE TETHERING on this PC",
                UsbNetwork::Modem => "USB MODEM on this PC",
            };
            format!("{kind}: {device} interface {}", Quoted(interface))
        }
        Function::Serial { tty } => {
            format!("USB serial port: {device} {}{NOT_MEASURED}", tty.escaped())
        }
    }
}

pub(super) fn volume_sentence(v: &UsbVolume) -> String {
    let what = match v.change {
        VolumeChange::Present => "is mounted",
        VolumeChange::Mounted => "mounted",
        VolumeChange::Unmounted { .. } => "unmounted",
        VolumeChange::PulledOut { .. } => "PULLED OUT while mounted",
    };
    let mut line = format!(
        "USB file system {what}: {} ({}, {}) at {}",
        OnDisk(&v.disk),
        v.device.escaped(),
        v.file_system.escaped(),
        Quoted(&v.mount_point)
    );
    if v.read_only {
        line += ", read-only";
    }
    match v.change {
        VolumeChange::Present | VolumeChange::Mounted => {}
        VolumeChange::Unmounted { moved } => line += &format!(", meanwhile {}", Completed(&moved)),
        VolumeChange::PulledOut { moved, unwritten } => {
            line += &format!(", until then {}", Completed(&moved));
            line += &match unwritten {
                0 if v.read_only => String::new(),
                0 => "; what was not written yet is lost".to_owned(),
                bytes => {
                    format!("; at least {} ({bytes} B) of files written are not on it", Size(bytes))
                }
            };
        }
    }
    line
}

pub(super) fn file_sentence(f: &UsbFile) -> String {
    let what = match f.access {
        FileAccess::Read => "read",
        FileAccess::Written => "written",
        FileAccess::Opened => "opened, perhaps read",
    };
    let mut line = match f.name.is_empty() {
        true => format!("USB file {what}: (name not known)"),
        false => format!("USB file {what}: \"{}/{}\"", f.directory.escaped(), f.name.escaped()),
    };
    if let Some(bytes) = f.bytes {
        line += &format!(" {} ({bytes} B)", Size(bytes));
    }
    line += &match f.program.is_empty() {
        true => " by an unknown program".to_owned(),
        false => format!(" by {}", Quoted(&f.program)),
    };
    if f.pid > 0 {
        line += &format!(" (pid {})", f.pid);
    }
    line += &match f.uid {
        Some(uid) if f.user.is_empty() => format!(" of uid {uid}"),
        Some(uid) => format!(" of {} (uid {uid})", Quoted(&f.user)),
        None => " of an unknown user".to_owned(),
    };
    line + &format!(", {}", OnDisk(&f.disk))
}

pub(super) fn unseen_sentence(unseen: &UsbFilesUnseen, zone: &TimeZone) -> String {
    let (reason, unit) = match unseen.reason {
        FilesUnseen::QueueFull => ("the kernel's queue was full", "files"),
        FilesUnseen::TooMany => ("there were too many at once", "files"),
        FilesUnseen::NotWatched => ("a file system cannot be watched", "file systems"),
        FilesUnseen::SwitchedOff => ("they are not recorded (settings of this PC)", "file systems"),
    };
    let count = match unseen.count {
        Some(count) => format!(", {count} {unit}"),
        None => ", count unknown".to_owned(),
    };
    format!(
        "GAP from {} to {}: names of files on USB disks are missing: {reason}{count}",
        time(unseen.from_wall_ns, zone),
        time(unseen.to_wall_ns, zone)
    )
}

/// What a disk completed.
pub(super) struct Completed<'a>(pub &'a Traffic);

impl Display for Completed<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Traffic { tx_bytes: written, rx_bytes: read, .. } = *self.0;
        write!(f, "written {} ({written} B), read {} ({read} B)", Size(written), Size(read))
    }
}

/// A disk with its names.
pub(super) struct OnDisk<'a>(pub &'a Disk);

impl Display for OnDisk<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let d = self.0;
        write!(f, "{} disk {}", Named(&d.vendor, &d.model, &d.serial), d.name.escaped())
    }
}

struct Named<'a>(&'a Raw, &'a Raw, &'a Raw);

impl Display for Named<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "\"{} {}\" serial {}", self.0.escaped(), self.1.escaped(), Quoted(self.2))
    }
}

/// A device with everything that it says of itself.
pub(super) struct Device<'a>(pub &'a UsbDevice);

impl Display for Device<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let d = self.0;
        write!(f, "{}", Named(&d.vendor, &d.model, &d.serial))?;
        write!(f, " [{:04x}:{:04x}]", d.vendor_id, d.product_id)?;
        let uses = class::uses(&d.interfaces);
        if !uses.is_empty() {
            write!(f, " {uses}")?;
        }
        write!(f, " at {}", d.devpath.escaped())?;
        match uses.way() {
            Way::Measured => Ok(()),
            Way::Perhaps => write!(f, "; perhaps a way for data, bytes not measurable"),
            Way::Unmeasured => write!(f, "{NOT_MEASURED}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stick() -> Disk {
        Disk { name: "sdb".into(), vendor: "SanDisk".into(), model: "Ultra".into(), serial: "4C53".into() }
    }

    fn device() -> UsbDevice {
        let Disk { vendor, model, serial, .. } = stick();
        UsbDevice { vendor, model, serial, ..UsbDevice::default() }
    }

    fn shown(function: Function) -> String {
        function_sentence(&UsbFunction { device: device(), function })
    }

    #[test]
    fn a_device_through_which_nobody_counts_is_said_to_be_a_way_for_data_once() {
        let line = |interfaces: &[(u8, u8, u8)]| {
            let interface = |&(class, subclass, protocol): &_| UsbInterface { class, subclass, protocol };
            let interfaces = interfaces.iter().map(interface).collect();
            let device = UsbDevice { devpath: "/devices/usb1/1-2".into(), interfaces, ..device() };
            Device(&device).to_string()
        };
        let named = r#""SanDisk Ultra" serial "4C53" [0000:0000]"#;
        assert_eq!(line(&[]), format!("{named} at /devices/usb1/1-2"));
        assert_eq!(line(&[(8, 6, 0x50)]), format!("{named} storage at /devices/usb1/1-2"));
        assert_eq!(
            line(&[(6, 1, 1), (0xff, 0x42, 1)]),
            format!(
                "{named} phone or camera (MTP, PTP), Android debugging (ADB) at /devices/usb1/1-2; \
                 a way for data, bytes not measurable"
            )
        );
        assert_eq!(
            line(&[(0xff, 0, 0)]),
            format!(
                "{named} vendor-specific at /devices/usb1/1-2; perhaps a way for data, bytes not measurable"
            )
        );
        // The longest there is stays a line that can be read.
        let all_unknown: Vec<_> = (0..UsbDevice::MAX_INTERFACES as u8).map(|n| (0xdc, n, 0)).collect();
        assert!(line(&all_unknown).len() < 700, "{}", line(&all_unknown));
    }

    #[test]
    fn what_a_device_is_to_the_pc_is_a_sentence() {
        let disk = |bytes| shown(Function::Disk { name: "sdb".into(), bytes });
        assert_eq!(
            disk(32_010_928_128),
            r#"USB disk: "SanDisk Ultra" serial "4C53" disk sdb, 32.0 GB (32010928128 B)"#
        );
        assert_eq!(disk(0), r#"USB disk: "SanDisk Ultra" serial "4C53" disk sdb, no medium"#);
        assert_eq!(
            shown(Function::Disk { name: "sr0".into(), bytes: 0 }),
            r#"USB disk: "SanDisk Ultra" serial "4C53" disk sr0, no medium; discs may be burnt, bytes not measurable"#
        );
        assert_eq!(
            shown(Function::Network { interface: "usb0".into(), kind: UsbNetwork::Phone }),
            r#"PHONE TETHERING on this PC: "SanDisk Ultra" serial "4C53" interface "usb0""#
        );
        assert_eq!(
            shown(Function::Serial { tty: "ttyUSB0".into() }),
            r#"USB serial port: "SanDisk Ultra" serial "4C53" ttyUSB0; a way for data, bytes not measurable"#
        );
    }

    #[test]
    fn a_mount_tells_what_moved_and_what_was_lost() {
        let moved = Traffic { tx_bytes: 20_000_256, rx_bytes: 512, ..Traffic::default() };
        let volume = |change| {
            volume_sentence(&UsbVolume {
                disk: stick(),
                device: "sdb1".into(),
                file_system: "vfat".into(),
                mount_point: "/media/USB\n".into(),
                read_only: false,
                change,
            })
        };
        let of = r#""SanDisk Ultra" serial "4C53" disk sdb (sdb1, vfat) at "/media/USB\u{a}""#;
        assert_eq!(volume(VolumeChange::Mounted), format!("USB file system mounted: {of}"));
        assert_eq!(
            volume(VolumeChange::Unmounted { moved }),
            format!(
                "USB file system unmounted: {of}, meanwhile written 20.0 MB (20000256 B), read 512 B (512 B)"
            )
        );
        let pulled_out = volume(VolumeChange::PulledOut { moved, unwritten: 5_000_000 });
        assert!(pulled_out.ends_with("; at least 5.0 MB (5000000 B) of files written are not on it"));
    }

    #[test]
    fn a_file_is_named_with_who_touched_it_as_far_as_that_is_known() {
        let file = UsbFile {
            disk: stick(),
            directory: "/media/USB".into(),
            name: Raw::new(b"exam\x1b[2J.pdf"),
            access: FileAccess::Written,
            bytes: Some(20_000_000),
            program: "cp".into(),
            pid: 4711,
            uid: Some(1005),
            user: "student5".into(),
        };
        assert_eq!(
            file_sentence(&file),
            r#"USB file written: "/media/USB/exam\u{1b}[2J.pdf" 20.0 MB (20000000 B) by "cp" (pid 4711) of "student5" (uid 1005), "SanDisk Ultra" serial "4C53" disk sdb"#
        );
        let unknown = UsbFile {
            bytes: None,
            program: Raw::default(),
            pid: 0,
            uid: None,
            user: Raw::default(),
            access: FileAccess::Read,
            ..file
        };
        assert!(file_sentence(&unknown).contains(r#".pdf" by an unknown program of an unknown user, "#));
        let nameless = UsbFile {
            directory: Raw::default(),
            name: Raw::default(),
            access: FileAccess::Opened,
            ..unknown
        };
        let line = file_sentence(&nameless);
        assert!(line.starts_with("USB file opened, perhaps read: (name not known) by an unknown"), "{line}");
    }
}
