//! From a file system down to the disks that it lies on: through partitions, device mapper, md and loop devices.
//!
//! Pure over [`Blocks`], which tells what one block device is.

use std::collections::BTreeSet;

use super::mounts::{DeviceNumber, Mount, Mounts};

/// What the kernel knows of block devices.
pub trait Blocks {
    /// What a block device is; `None`: there is none of that number.
    fn block(&self, number: DeviceNumber) -> Option<Block>;

    /// The number of the block device that this path leads to, for example `/dev/mapper/secret`.
    fn number_of(&self, path: &[u8]) -> Option<DeviceNumber>;
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Kernel device path, without `/sys`.
    pub devpath: Vec<u8>,
    /// What it lies on.
    pub lies_on: LiesOn,
}

impl Block {
    /// Kernel name, for example `sdb1`.
    pub fn name(&self) -> &[u8] {
        self.devpath.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
    }
}

/// What a block device lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LiesOn {
    /// On nothing else: it is a disk.
    Nothing,
    /// On other block devices: a partition on its disk, dm and md on what is below.
    Devices(Vec<DeviceNumber>),
    /// On a file (loop), by the path that the kernel shows.
    File(Vec<u8>),
}

/// File systems that lie on block devices and give their files an anonymous `st_dev`, one for each subvolume.
const ANONYMOUS: [&[u8]; 2] = [b"btrfs", b"bcachefs"];

/// Most devices that are looked at for one file system: a volume group on a hundred disks is below that, and a circle
/// (which the kernel does not make) ends here.
const MAX_DEVICES: usize = 256;

/// The block devices that a mounted file system was mounted from; empty where there is none, as for tmpfs or NFS. Of a
/// btrfs on several disks, only the one that was named.
pub fn mounted_from(mount: &Mount, blocks: &impl Blocks) -> Vec<DeviceNumber> {
    match mount.device.major {
        0 if ANONYMOUS.contains(&mount.file_system.as_slice()) => {
            let source = mount.source.as_slice();
            match blocks.number_of(source) {
                Some(number) => vec![number],
                // bcachefs names all of its devices: `/dev/sdb:/dev/sdc`.
                None => {
                    source.split(|&byte| byte == b':').filter_map(|path| blocks.number_of(path)).collect()
                }
            }
        }
        0 => Vec::new(),
        _ => vec![mount.device],
    }
}

/// The disks below some block devices, by kernel device path.
pub fn disks_below(from: &[DeviceNumber], blocks: &impl Blocks, mounts: &Mounts) -> BTreeSet<Vec<u8>> {
    let mut disks = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut to_see = from.to_vec();
    while let Some(number) = to_see.pop() {
        if seen.len() >= MAX_DEVICES || !seen.insert(number) {
            continue;
        }
        let Some(block) = blocks.block(number) else { continue };
        match block.lies_on {
            LiesOn::Nothing => drop(disks.insert(block.devpath)),
            LiesOn::Devices(below) => to_see.extend(below),
            LiesOn::File(path) => {
                to_see.extend(
                    mounts.holding(&path).map(|mount| mounted_from(mount, blocks)).unwrap_or_default(),
                );
            }
        }
    }
    disks
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Block devices out of a table.
    #[derive(Default)]
    pub(crate) struct Table {
        pub(crate) blocks: BTreeMap<DeviceNumber, Block>,
    }

    pub(crate) fn number(text: &str) -> DeviceNumber {
        DeviceNumber::parse(text.as_bytes()).unwrap()
    }

    impl Table {
        pub(crate) fn with(mut self, text: &str, devpath: &str, lies_on: LiesOn) -> Self {
            self.blocks.insert(number(text), Block { devpath: devpath.into(), lies_on });
            self
        }

        pub(crate) fn disk(self, text: &str, devpath: &str) -> Self {
            self.with(text, devpath, LiesOn::Nothing)
        }

        pub(crate) fn on(self, text: &str, devpath: &str, below: &[&str]) -> Self {
            self.with(text, devpath, LiesOn::Devices(below.iter().map(|text| number(text)).collect()))
        }
    }

    impl Blocks for Table {
        fn block(&self, number: DeviceNumber) -> Option<Block> {
            self.blocks.get(&number).cloned()
        }

        fn number_of(&self, path: &[u8]) -> Option<DeviceNumber> {
            let name = path.strip_prefix(b"/dev/")?;
            self.blocks.iter().find(|(_, block)| block.name() == name).map(|(number, _)| *number)
        }
    }

    /// A PC with a disk `sda`, sticks `sdb` (two partitions) and `sdc`, and much on top of them.
    fn pc() -> Table {
        Table::default()
            .disk("8:0", "/devices/pci/ata1/block/sda")
            .on("8:1", "/devices/pci/ata1/block/sda/sda1", &["8:0"])
            .disk("8:16", "/devices/usb1/1-1/block/sdb")
            .on("8:17", "/devices/usb1/1-1/block/sdb/sdb1", &["8:16"])
            .on("8:18", "/devices/usb1/1-1/block/sdb/sdb2", &["8:16"])
            .disk("8:32", "/devices/usb1/1-2/block/sdc")
            .on("253:0", "/devices/virtual/block/dm-0", &["8:17"])
            .on("253:1", "/devices/virtual/block/dm-1", &["253:0", "8:32", "8:1"])
            .with("7:0", "/devices/virtual/block/loop0", LiesOn::File(b"/media/A/image".into()))
            .on("7:1", "/devices/virtual/block/loop0/loop0p1", &["7:0"])
            .with("7:2", "/devices/virtual/block/loop2", LiesOn::File(b"/inner/image".into()))
    }

    fn mounts() -> Mounts {
        Mounts::parse(
            b"1 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
              2 1 253:1 / /media/A rw - ext4 /dev/dm-1 rw\n\
              3 1 7:1 / /inner rw - ext4 /dev/loop0p1 rw\n\
              4 1 0:40 /sub /b rw - btrfs /dev/sdb2 rw\n\
              5 1 0:41 / /c rw - bcachefs /dev/sdb1:/dev/sdc rw\n\
              6 1 0:42 / /d rw - fuse.evil /dev/sdb1 rw\n\
              7 1 0:43 / /e rw - btrfs /dev/not-there rw\n",
        )
    }

    fn below(from: &[&str]) -> Vec<String> {
        let from: Vec<_> = from.iter().map(|text| number(text)).collect();
        let disks = disks_below(&from, &pc(), &mounts());
        let name = |path: Vec<u8>| String::from_utf8(path).unwrap().rsplit('/').next().unwrap().to_owned();
        disks.into_iter().map(name).collect()
    }

    #[test]
    fn a_partition_lies_on_its_disk_and_a_disk_on_itself() {
        assert_eq!(below(&["8:17"]), ["sdb"]);
        assert_eq!(below(&["8:32"]), ["sdc"]);
        assert_eq!(below(&["9:9"]), [""; 0]);
    }

    #[test]
    fn what_device_mapper_stacks_lies_on_every_disk_below_it() {
        assert_eq!(below(&["253:0"]), ["sdb"]);
        assert_eq!(below(&["253:1"]), ["sda", "sdb", "sdc"]);
    }

    #[test]
    fn a_file_that_serves_as_a_disk_lies_where_its_file_system_lies() {
        assert_eq!(below(&["7:1"]), ["sda", "sdb", "sdc"]);
        // A file in a file system in a file.
        assert_eq!(below(&["7:2"]), ["sda", "sdb", "sdc"]);
    }

    #[test]
    fn a_file_system_without_a_number_is_found_by_its_source_where_the_kernel_checked_that() {
        let from = |id: usize| mounted_from(&mounts().list[id - 1], &pc());
        assert_eq!(from(2), [number("253:1")]);
        assert_eq!(from(4), [number("8:18")]);
        assert_eq!(from(5), [number("8:17"), number("8:32")]);
        assert_eq!(from(6), []);
        assert_eq!(from(7), []);
    }

    #[test]
    fn a_circle_and_a_crowd_come_to_an_end() {
        let circle = Table::default().on("253:0", "/dm-0", &["253:1"]).on("253:1", "/dm-1", &["253:0"]);
        assert!(disks_below(&[number("253:0")], &circle, &Mounts::default()).is_empty());
        let crowd: Vec<_> = (0..2_000).map(|minor| DeviceNumber { major: 8, minor }).collect();
        let mut table = Table::default();
        for number in &crowd {
            let devpath = format!("/sd{}", number.minor).into_bytes();
            table.blocks.insert(*number, Block { devpath, lies_on: LiesOn::Nothing });
        }
        assert_eq!(disks_below(&crowd, &table, &Mounts::default()).len(), MAX_DEVICES);
    }
}
