//! The file systems on USB disks that are mounted.

use std::collections::BTreeMap;

use netmon_common::raw::Raw;

use super::mounts::{DeviceNumber, Mounts};
use super::stack::{Blocks, disks_below, mounted_from};

/// A mounted file system that lies on USB disks, however many places it is mounted at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// `st_dev` of its files. Of btrfs and bcachefs the number of the block device, which their files do not show.
    pub number: DeviceNumber,
    /// Kernel name of the block device, for example `sdb1` or `dm-0`.
    pub device: Raw,
    /// Type of the file system.
    pub file_system: Raw,
    /// True when nothing can be written to it, whichever way.
    pub read_only: bool,
    /// Where it is mounted, in the kernel's order; one at least.
    pub places: Vec<Place>,
    /// The USB disks that it lies on, by kernel device path without `/sys`; one at least, several with LVM or md.
    pub disks: Vec<Vec<u8>>,
}

/// One place at which a file system is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The kernel's number of the mount. It is given again after the mount is gone.
    pub mount_id: u32,
    /// The mount point: a path below the agent's own root directory, up to 4 KiB.
    pub path: Vec<u8>,
}

/// The volumes among the mounts: those that lie on a disk of which `is_usb` is true.
///
/// `known` are those that were found before. What can no longer be followed down to its disks lies where it lay: a loop
/// device stays mounted when the file system with its file was unmounted lazily.
pub fn find(
    mounts: &Mounts,
    blocks: &impl Blocks,
    known: &[Volume],
    is_usb: impl Fn(&[u8]) -> bool,
) -> Vec<Volume> {
    let mut found: BTreeMap<DeviceNumber, Option<Volume>> = BTreeMap::new();
    for mount in &mounts.list {
        let from = mounted_from(mount, blocks);
        let Some(&number) = from.first() else { continue };
        let volume = found.entry(number).or_insert_with(|| {
            let known = known.iter().find(|volume| volume.number == number);
            let below = disks_below(&from, blocks, mounts);
            let mut disks: Vec<_> = below.into_iter().filter(|disk| is_usb(disk)).collect();
            if let Some(known) = known.filter(|_| disks.is_empty()) {
                disks = known.disks.iter().filter(|disk| is_usb(disk)).cloned().collect();
            }
            let device = match blocks.block(number) {
                Some(block) => Raw::new(block.name()),
                None => known.map(|volume| volume.device.clone()).unwrap_or_default(),
            };
            let file_system = Raw::new(&mount.file_system);
            (!disks.is_empty()).then(|| Volume {
                number,
                device,
                file_system,
                read_only: true,
                places: vec![],
                disks,
            })
        });
        if let Some(volume) = volume {
            volume.read_only &= mount.read_only || mount.file_system_read_only;
            volume.places.push(Place { mount_id: mount.id, path: mount.point.clone() });
        }
    }
    found.into_values().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::super::stack::LiesOn;
    use super::super::stack::tests::Table;
    use super::*;

    fn pc() -> Table {
        Table::default()
            .disk("8:0", "/devices/pci/ata1/block/sda")
            .on("8:1", "/devices/pci/ata1/block/sda/sda1", &["8:0"])
            .disk("8:16", "/devices/usb1/1-1/block/sdb")
            .on("8:17", "/devices/usb1/1-1/block/sdb/sdb1", &["8:16"])
            .with("7:0", "/devices/virtual/block/loop0", LiesOn::File(b"/media/A/image".into()))
    }

    fn is_usb(devpath: &[u8]) -> bool {
        devpath.starts_with(b"/devices/usb")
    }

    fn shown(volumes: &[Volume]) -> Vec<String> {
        let show = |volume: &Volume| {
            let paths = volume.places.iter().map(|place| String::from_utf8(place.path.clone()).unwrap());
            let paths: Vec<_> = paths.collect();
            let mode = if volume.read_only { "ro" } else { "rw" };
            format!("{} {} {mode} at {}", volume.device.escaped(), volume.disks.len(), paths.join(" "))
        };
        volumes.iter().map(show).collect()
    }

    const ROOT: &str = "1 1 8:1 / / rw - ext4 /dev/sda1 rw\n";
    const STICK: &str = "2 1 8:17 / /media/A ro - vfat /dev/sdb1 rw\n";
    const LOOP: &str = "3 1 7:0 / /image rw - ext4 /dev/loop0 ro\n";
    const BIND: &str = "4 1 8:17 /dir /home/bind rw - vfat /dev/sdb1 rw\n";

    fn found(text: &[&str], known: &[Volume]) -> Vec<Volume> {
        find(&Mounts::parse(text.concat().as_bytes()), &pc(), known, is_usb)
    }

    #[test]
    fn only_what_lies_on_usb_disks_is_found_once_for_all_its_mounts() {
        assert_eq!(
            shown(&found(&[ROOT, STICK, LOOP, BIND], &[])),
            ["loop0 1 ro at /image", "sdb1 1 rw at /media/A /home/bind"]
        );
        assert_eq!(shown(&found(&[ROOT, STICK], &[])), ["sdb1 1 ro at /media/A"]);
    }

    #[test]
    fn what_cannot_be_followed_any_more_lies_where_it_lay() {
        let before = found(&[ROOT, STICK, LOOP], &[]);
        assert_eq!(shown(&found(&[ROOT, LOOP], &before)), ["loop0 1 ro at /image"]);
        assert!(found(&[ROOT, LOOP], &[]).is_empty());
        let gone = Mounts::parse([ROOT, LOOP].concat().as_bytes());
        assert!(find(&gone, &pc(), &before, |_| false).is_empty(), "its disk is gone");
    }
}
