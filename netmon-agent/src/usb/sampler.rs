//! Reads the counters of the USB disks that are plugged in.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use netmon_common::model::Disk;

use super::disks::{DiskActivity, Meter, Stat};
use super::mounted::Counters;
use super::mounts::DeviceNumber;

/// From where a disk's counters count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountFrom {
    /// From what they show now: the disk was there before.
    Now,
    /// From zero: the disk came just now.
    Zero,
}

/// What a round of samples found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sampled {
    /// A disk did something.
    Activity {
        /// Kernel device path.
        devpath: Vec<u8>,
        /// What it did.
        activity: DiskActivity,
    },
    /// A disk is gone.
    Gone {
        /// Kernel device path.
        devpath: Vec<u8>,
        /// Which one it was.
        disk: Disk,
        /// What it had completed by its last sample.
        counted: Stat,
    },
}

/// Why a disk cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// More than [`Sampler::MAX`] USB disks.
    #[error("disk {disk} is not measured: {} USB disks are being measured already", Sampler::MAX)]
    TooMany {
        /// Kernel device path.
        disk: PathBuf,
    },
    /// The counters cannot be opened.
    #[error("cannot open the counters {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The counters cannot be read.
    #[error("cannot read the counters {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The counters are not what kernels write there.
    #[error("{} does not hold a disk's counters", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

impl SampleError {
    /// True when the disk went away before its counters could be opened.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Open { source, .. } | Self::Read { source, .. } => is_gone(source),
            Self::TooMany { .. } | Self::Malformed { .. } => false,
        }
    }
}

/// The USB disks, by kernel device path. Each one's counters are held open: the descriptor belongs to this very disk, so
/// that a later disk of the same name is never taken for it.
#[derive(Debug, Default)]
pub struct Sampler {
    disks: BTreeMap<Vec<u8>, Held>,
}

#[derive(Debug)]
struct Held {
    counters: File,
    meter: Meter,
}

impl Sampler {
    /// Most disks that are measured at once; each holds a file descriptor.
    pub const MAX: usize = 256;

    /// True when there is nothing to sample.
    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// True when the disk is being measured.
    pub fn holds(&self, devpath: &[u8]) -> bool {
        self.disks.contains_key(devpath)
    }

    /// The disks that are being measured.
    pub fn devpaths(&self) -> impl Iterator<Item = &[u8]> {
        self.disks.keys().map(Vec::as_slice)
    }

    /// Measures one more disk.
    ///
    /// # Errors
    /// [`SampleError`] says why it is not measured; nothing, where [`SampleError::is_gone`].
    pub fn hold(
        &mut self,
        devpath: &[u8],
        disk: Disk,
        from: CountFrom,
        boot_ns: u64,
    ) -> Result<(), SampleError> {
        if self.disks.len() >= Self::MAX {
            return Err(SampleError::TooMany { disk: OsStr::from_bytes(devpath).into() });
        }
        let path = PathBuf::from(OsStr::from_bytes(&[b"/sys", devpath, b"/stat"].concat()));
        let counters = match File::open(&path) {
            Ok(counters) => counters,
            Err(source) => return Err(SampleError::Open { path, source }),
        };
        let stat = match read(&counters) {
            Ok(Some(stat)) => stat,
            Ok(None) => return Err(SampleError::Malformed { path }),
            Err(source) => return Err(SampleError::Read { path, source }),
        };
        let counted = match from {
            CountFrom::Now => stat,
            CountFrom::Zero => Stat::default(),
        };
        self.disks.insert(devpath.to_vec(), Held { counters, meter: Meter::new(disk, counted, boot_ns) });
        Ok(())
    }

    /// Reads every disk's counters once.
    pub fn sample(&mut self, boot_ns: u64) -> Vec<Sampled> {
        let mut found = Vec::new();
        self.disks.retain(|devpath, held| match read(&held.counters) {
            Ok(stat) => {
                found.extend(stat.and_then(|stat| held.sample(devpath, stat, boot_ns)));
                true
            }
            Err(_) => {
                found.push(held.gone(devpath));
                false
            }
        });
        found
    }

    /// Lets go of a disk that was unplugged, with a last sample where the kernel still answers.
    pub fn release(&mut self, devpath: &[u8], boot_ns: u64) -> Vec<Sampled> {
        let Some(mut held) = self.disks.remove(devpath) else { return Vec::new() };
        let last = read(&held.counters).ok().flatten();
        let last = last.and_then(|stat| held.sample(devpath, stat, boot_ns));
        last.into_iter().chain([held.gone(devpath)]).collect()
    }
}

impl Held {
    fn sample(&mut self, devpath: &[u8], stat: Stat, boot_ns: u64) -> Option<Sampled> {
        let activity = self.meter.sample(stat, boot_ns)?;
        Some(Sampled::Activity { devpath: devpath.to_vec(), activity })
    }

    fn gone(&self, devpath: &[u8]) -> Sampled {
        let (disk, counted) = (self.meter.disk().clone(), self.meter.counted());
        Sampled::Gone { devpath: devpath.to_vec(), disk, counted }
    }
}

impl Counters for Sampler {
    fn disk(&self, devpath: &[u8]) -> Option<(&Disk, Stat)> {
        self.disks.get(devpath).map(|held| (held.meter.disk(), held.meter.counted()))
    }

    fn device(&self, number: DeviceNumber) -> Option<Stat> {
        read(&File::open(format!("/sys/dev/block/{number}/stat")).ok()?).ok()?
    }
}

/// `None`: not what kernels write. The kernel answers ENODEV for a disk that is gone.
fn read(counters: &File) -> io::Result<Option<Stat>> {
    // 17 columns of at most 20 digits.
    let mut text = [0; 512];
    let length = counters.read_at(&mut text, 0)?;
    Ok(Stat::parse(&text[..length]))
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}
