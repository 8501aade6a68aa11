//! fanotify: what happens to the files of a file system.
//!
//! One group for each file system, marked as a whole: the agent may be in a mount namespace of its own, where the users'
//! mounts are other ones than theirs. Events come with a descriptor of the file, not with a handle and a name: exFAT has no
//! handles before Linux 6.6. The queue is bounded (16,384 events); the kernel says when it was full.
//!
//! A queued event and its descriptor keep the file system from being unmounted. So they are taken at once, all that there
//! are, and closed before anything else is done with them.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::files::Place;
use super::metadata::{self, Happened, Metadata, MetadataError};

/// Where a file system is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// The kernel's number of the mount, of `/proc/self/mountinfo`.
    pub mount_id: u32,
    /// Its path.
    pub path: PathBuf,
}

/// Why a file system cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// No group.
    #[error("the kernel gives no group for file events; it takes CAP_SYS_ADMIN at the start")]
    Group(#[source] io::Error),
    /// No access to the mount point.
    #[error("cannot open the mount point")]
    Open(#[source] io::Error),
    /// What is mounted there is something else.
    #[error("the mount point is hidden by another mount")]
    Hidden,
    /// The process that marks file systems marks no others.
    #[error("what is mounted there is not on a USB disk")]
    NotUsb,
    /// No mark.
    #[error("the kernel does not mark the file system")]
    Mark(#[source] io::Error),
    /// The process that marks file systems does not answer.
    #[error(
        "the process that marks file systems for the agent does not answer; restart the agent if it stays so"
    )]
    Marker(#[source] io::Error),
    /// The kernel's events are not understood.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The group cannot be read any more.
    #[error("cannot read the kernel's file events")]
    Read(#[source] io::Error),
}

/// Marks a file system. Takes CAP_SYS_ADMIN, and CAP_DAC_READ_SEARCH where the mount point is in a user's own directory.
///
/// # Errors
/// [`WatchError`] when the kernel refuses, or something else than this mount is there.
pub fn mark(place: &MountPoint) -> Result<OwnedFd, WatchError> {
    // Without O_NONBLOCK a FIFO on a stick would hold up whoever reads the events.
    let descriptors = EventFFlags::O_RDONLY
        | EventFFlags::O_LARGEFILE
        | EventFFlags::O_CLOEXEC
        | EventFFlags::O_NOATIME
        | EventFFlags::O_NONBLOCK;
    let flags = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
    let group = Fanotify::init(flags, descriptors).map_err(|errno| WatchError::Group(errno.into()))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(&place.path, flags, Mode::empty())
        .map_err(|errno| WatchError::Open(errno.into()))?;
    // Linux 5.8.
    let found = rustix::fs::statx(&root, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map_err(|errno| WatchError::Open(errno.into()))?;
    if found.stx_mnt_id != u64::from(place.mount_id) {
        return Err(WatchError::Hidden);
    }
    let events = MaskFlags::FAN_OPEN
        | MaskFlags::FAN_ACCESS
        | MaskFlags::FAN_MODIFY
        | MaskFlags::FAN_CLOSE_WRITE
        | MaskFlags::FAN_CLOSE_NOWRITE;
    group
        .mark(MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM, events, &root, None::<&str>)
        .map_err(|errno| WatchError::Mark(errno.into()))?;
    Ok(group.into())
}

/// What happened to a regular file, with what could be known of it at once.
#[derive(Debug)]
pub struct Seen {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// By which process; 0: unknown.
    pub pid: u32,
    /// What.
    pub happened: Happened,
    /// Size in bytes.
    pub bytes: u64,
    /// What of it has room on the disk and will keep it, in bytes.
    pub allocated: u64,
    /// When contents or attributes were changed last, wall clock.
    pub changed_wall_ns: i64,
    /// Where it is, if it was asked for.
    pub place: Option<Place>,
}

/// What a turn of reading brought.
#[derive(Debug, Default)]
pub struct Turn {
    /// What happened, in this order.
    pub seen: Vec<Seen>,
    /// The kernel's queue was full in between.
    pub overflow: bool,
    /// Events whose file could not be opened, for want of descriptors as a rule, or looked at.
    pub unopened: u64,
    /// Nothing was left in the queue.
    pub emptied: bool,
}

/// A marked file system, to be read.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl Group {
    /// Events that are taken at a time: as many descriptors are open then.
    const AT_A_TIME: usize = 32;
    /// Most events in a turn.
    const TURN: usize = 4_096;

    /// Reads what [`mark`] gave.
    pub fn new(group: OwnedFd) -> Self {
        Self(group)
    }

    /// True while the file system is there. It takes its mark with it when it goes: with the last of its mounts and open files.
    pub fn is_marked(&self) -> bool {
        let path = format!("/proc/self/fdinfo/{}", self.0.as_raw_fd());
        // A line that begins with `fanotify sdev:` for each marked file system (proc_pid_fdinfo(5)). Where it cannot be read,
        // marking again does no harm.
        let text = std::fs::read(path).unwrap_or_default();
        text.split(|byte| *byte == b'\n').any(|line| line.starts_with(b"fanotify sdev:"))
    }

    /// Takes what is in the queue. `wants_place` says of a file (`st_dev`, `st_ino`) and a process whether to look up where it
    /// is.
    ///
    /// # Errors
    /// When nothing more can be read from it.
    pub fn take(&self, wants_place: impl Fn(u64, u64, u32) -> bool) -> Result<Turn, WatchError> {
        let own = std::process::id();
        let mut turn = Turn::default();
        let mut buffer = [0; Self::AT_A_TIME * metadata::LENGTH];
        for _ in 0..Self::TURN / Self::AT_A_TIME {
            let length = match rustix::io::read(&self.0, &mut buffer) {
                Ok(length) => length,
                Err(Errno::AGAIN) => {
                    turn.emptied = true;
                    break;
                }
                Err(Errno::INTR) => continue,
                Err(errno @ (Errno::BADF | Errno::FAULT | Errno::INVAL)) => {
                    return Err(WatchError::Read(errno.into()));
                }
                // The file could not be opened; its event is gone.
                Err(_) => {
                    turn.unopened += 1;
                    continue;
                }
            };
            for event in metadata::parse(&buffer[..length]) {
                match event? {
                    Metadata::Overflow => turn.overflow = true,
                    Metadata::NoFile => turn.unopened += 1,
                    Metadata::File { descriptor, pid, happened } => {
                        // SAFETY: the kernel has opened this descriptor for whoever reads the event, once for each event,
                        // and each event is taken once; nobody else owns it.
                        let file = unsafe { OwnedFd::from_raw_fd(descriptor) };
                        if pid == own {
                            continue;
                        }
                        match look(file, pid, happened, &wants_place) {
                            Ok(seen) => turn.seen.extend(seen),
                            // A file system in user space that does not answer.
                            Err(_) => turn.unopened += 1,
                        }
                    }
                }
            }
        }
        Ok(turn)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `None`: not a regular file.
fn look(
    file: OwnedFd,
    pid: u32,
    happened: Happened,
    wants_place: impl Fn(u64, u64, u32) -> bool,
) -> rustix::io::Result<Option<Seen>> {
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let changed = (stat.st_mtime, stat.st_mtime_nsec).max((stat.st_ctime, stat.st_ctime_nsec));
    let changed_wall_ns =
        changed.0.saturating_mul(1_000_000_000).saturating_add(i64::try_from(changed.1).unwrap_or(0));
    let (device, inode) = (stat.st_dev, stat.st_ino);
    let wanted = happened.closed() || wants_place(device, inode, pid);
    let place = wanted.then(|| place(&file, stat.st_nlink == 0)).flatten();
    let bytes = u64::try_from(stat.st_size).unwrap_or(0);
    /// The unit of `st_blocks`, whatever the file system's own blocks are.
    const BLOCK: u64 = 512;
    let blocks = if stat.st_nlink == 0 { 0 } else { u64::try_from(stat.st_blocks).unwrap_or(0) };
    let allocated = blocks.saturating_mul(BLOCK);
    Ok(Some(Seen { device, inode, pid, happened, bytes, allocated, changed_wall_ns, place }))
}

/// The path by which the file was opened, in the mount namespace of who opened it. `None`: longer than a page.
fn place(file: &OwnedFd, deleted: bool) -> Option<Place> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    Some(Place::new(link.as_os_str().as_bytes(), deleted))
}
