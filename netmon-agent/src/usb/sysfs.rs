//! Reads what block devices are, and what is mounted.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use super::mounts::{DeviceNumber, Mounts};
use super::stack::{Block, Blocks, LiesOn};

/// Longest attribute that is read: a path.
const MAX_ATTRIBUTE: u64 = 4096;

/// Most devices directly below another one that are read.
const MAX_SLAVES: usize = 256;

/// Longest list of mounts that is read: [`Mounts::MAX`] of 1 KiB.
const MAX_LIST: u64 = 16 << 20;

/// Block devices as `/sys` shows them.
#[derive(Clone, Copy, Debug, Default)]
pub struct SysBlocks;

impl Blocks for SysBlocks {
    fn block(&self, number: DeviceNumber) -> Option<Block> {
        // `../../devices/pci0000:00/.../block/sdb/sdb1`
        let link = fs::read_link(format!("/sys/dev/block/{number}")).ok()?;
        let below: PathBuf = link.components().filter(|part| *part != Component::ParentDir).collect();
        let directory = Path::new("/sys").join(&below);
        let devpath = Path::new("/").join(&below).into_os_string().into_encoded_bytes();
        Some(Block { devpath, lies_on: lies_on(&directory) })
    }

    fn number_of(&self, path: &[u8]) -> Option<DeviceNumber> {
        let path = Path::new(OsStr::from_bytes(path));
        // Nowhere else: a look at another file system might have to wait for a server that is gone.
        let below = path.strip_prefix("/dev").ok()?;
        if below.components().any(|part| !matches!(part, Component::Normal(_))) {
            return None;
        }
        // The agent's own /dev may be a private one without disks.
        named(below).or_else(|| {
            let metadata = fs::metadata(path).ok()?;
            metadata.file_type().is_block_device().then(|| DeviceNumber {
                major: rustix::fs::major(metadata.rdev()),
                minor: rustix::fs::minor(metadata.rdev()),
            })
        })
    }
}

/// `sdb1`, or `mapper/secret`, which is the name that device mapper gives.
fn named(below_dev: &Path) -> Option<DeviceNumber> {
    let class = Path::new("/sys/class/block");
    let Ok(name) = below_dev.strip_prefix("mapper") else {
        return number(&class.join(below_dev).join("dev"));
    };
    let devices = fs::read_dir(class).into_iter().flatten().flatten();
    let directories = devices.map(|device| device.path());
    let is_it = |directory: &PathBuf| {
        attribute(&directory.join("dm/name")).is_some_and(|found| found == name.as_os_str().as_bytes())
    };
    number(&directories.into_iter().find(is_it)?.join("dev"))
}

fn lies_on(directory: &Path) -> LiesOn {
    if directory.join("partition").exists() {
        let disk = directory.parent().and_then(|disk| number(&disk.join("dev")));
        return LiesOn::Devices(disk.into_iter().collect());
    }
    if let Some(path) = attribute(&directory.join("loop/backing_file")) {
        return LiesOn::File(path);
    }
    let slaves = fs::read_dir(directory.join("slaves")).into_iter().flatten().flatten().take(MAX_SLAVES);
    let below: Vec<_> = slaves.filter_map(|slave| number(&slave.path().join("dev"))).collect();
    if below.is_empty() { LiesOn::Nothing } else { LiesOn::Devices(below) }
}

fn number(file: &Path) -> Option<DeviceNumber> {
    DeviceNumber::parse(&attribute(file)?)
}

/// Without its line end; `None` when there is none such.
fn attribute(file: &Path) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    File::open(file).and_then(|file| file.take(MAX_ATTRIBUTE).read_to_end(&mut text)).ok()?;
    text.pop_if(|last| *last == b'\n');
    Some(text)
}

/// The kernel's list of mounts. Its descriptor becomes ready for `POLLPRI` whenever a mount comes, goes or changes
/// (proc_pid_mounts(5), since 2.6.30).
#[derive(Debug)]
pub struct MountList {
    file: File,
}

impl MountList {
    /// Opens the list of the agent's own mount namespace.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn open() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/mountinfo")? })
    }

    /// Reads it from its beginning.
    ///
    /// # Errors
    /// When the kernel has no memory for it.
    pub fn read(&mut self) -> io::Result<Mounts> {
        let mut text = Vec::new();
        self.file.rewind()?;
        (&self.file).take(MAX_LIST).read_to_end(&mut text)?;
        if text.len() as u64 == MAX_LIST {
            // By chance it may end with a line.
            text.push(b'?');
        }
        Ok(Mounts::parse(&text))
    }
}

impl AsFd for MountList {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machines_own_mounts_and_block_devices_are_understood() {
        let mounts = MountList::open().unwrap().read().unwrap();
        assert_eq!(mounts.refused, 0);
        assert!(mounts.holding(b"/proc/self/mountinfo").is_some_and(|mount| mount.file_system == b"proc"));
        for entry in fs::read_dir("/sys/dev/block").into_iter().flatten().flatten() {
            let number = DeviceNumber::parse(entry.file_name().as_bytes()).unwrap();
            let block = SysBlocks.block(number).unwrap();
            assert!(Path::new("/sys").join(OsStr::from_bytes(&block.devpath[1..])).join("dev").exists());
            assert_eq!(block.devpath[..9], *b"/devices/");
        }
        assert_eq!(SysBlocks.number_of(b"/dev/null"), None);
        assert_eq!(SysBlocks.number_of(b"/dev/../dev/loop0"), None);
    }
}
