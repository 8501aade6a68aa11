//! The process that marks file systems for the agent.
//!
//! Marking a whole file system takes CAP_SYS_ADMIN at that very moment (since Linux 5.13, whoever made the group), and the
//! agent has given that up when a stick comes. So the agent starts a second process before it does. That one keeps
//! CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH and does one thing: it is told a mount point by the agent, marks the file system and
//! hands back the group, from which the agent reads. It never sees a packet, a device's name or a file. It ends when the
//! agent does.

use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::thread::CapabilitySet;

use super::fanotify::{MountPoint, WatchError, mark};
use super::stack::{disks_below, mounted_from};
use super::sysfs::{MountList, SysBlocks};

/// What the process keeps of root's rights.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::DAC_READ_SEARCH);
/// The agent's hidden subcommand that is this process.
pub const SUBCOMMAND: &str = "usb-marks";
/// A file system in user space may let it wait for its root directory; a stick that is written to, for some seconds.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// A question: number of the question, number of the mount, path.
const QUESTION: usize = 8 + 4 + libc::PATH_MAX as usize;
/// An answer: number of the question, which step failed (0: none), errno. The group comes along.
const ANSWER: usize = 8 + 1 + 4;

/// The agent's end.
#[derive(Debug)]
pub struct Marker {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    socket: OwnedFd,
    asked: u64,
    child: Child,
}

impl Marker {
    /// Starts the process, with the rights of the caller. `agent` is the agent's program.
    ///
    /// # Errors
    /// The system has no process or no socket to spare.
    pub fn start(agent: &Path) -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // A group of its own: Ctrl-C is for the agent, which ends it.
        let child = Command::new(agent)
            .arg(SUBCOMMAND)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self { state: Mutex::new(State { socket: ours, asked: 0, child }) })
    }

    /// Marks a file system: as [`mark`], with the rights of the other process.
    ///
    /// # Errors
    /// As [`mark`], and when there is no answer within five seconds.
    pub fn mark(&self, place: &MountPoint) -> Result<OwnedFd, WatchError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.asked += 1;
        state.ask(place).and_then(|()| state.answer()).map_err(WatchError::Marker)?
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It would end by itself, were it not held up. Fails only when it has ended.
        let _ = state.child.kill();
        let _ = state.child.wait();
    }
}

impl State {
    fn ask(&self, place: &MountPoint) -> io::Result<()> {
        let path = place.path.as_os_str().as_bytes();
        let question = [&self.asked.to_ne_bytes()[..], &place.mount_id.to_ne_bytes(), path].concat();
        if question.len() > QUESTION {
            return Err(Errno::NAMETOOLONG.into());
        }
        rustix::net::send(&self.socket, &question, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// The answer to the last question. Those that came too late are passed over.
    fn answer(&self) -> io::Result<Result<OwnedFd, WatchError>> {
        loop {
            let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&PATIENCE)) {
                Ok(0) => return Err(Errno::TIMEDOUT.into()),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let mut bytes = [0; ANSWER];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let received = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
            if received.bytes == 0 {
                return Err(Errno::PIPE.into());
            }
            let group = control
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                    _ => None,
                })
                .next();
            let cut = received.bytes != ANSWER || received.flags.contains(ReturnFlags::TRUNC);
            let Some((asked, rest)) = bytes.split_first_chunk().filter(|_| !cut) else {
                return Err(Errno::BADMSG.into());
            };
            if u64::from_ne_bytes(*asked) == self.asked {
                return understood(rest, group);
            }
        }
    }
}

fn understood(answer: &[u8], group: Option<OwnedFd>) -> io::Result<Result<OwnedFd, WatchError>> {
    let [step, errno @ ..] = answer else { return Err(Errno::BADMSG.into()) };
    let errno = errno.try_into().map(i32::from_ne_bytes).unwrap_or(0);
    let error = || io::Error::from_raw_os_error(errno);
    match (step, group) {
        (0, Some(group)) => Ok(Ok(group)),
        (1, _) => Ok(Err(WatchError::Group(error()))),
        (2, _) => Ok(Err(WatchError::Open(error()))),
        (3, _) => Ok(Err(WatchError::Hidden)),
        (5, _) => Ok(Err(WatchError::NotUsb)),
        (4, _) => Ok(Err(WatchError::Mark(error()))),
        _ => Err(Errno::BADMSG.into()),
    }
}

fn put(result: &Result<OwnedFd, WatchError>) -> (u8, i32) {
    let errno = |error: &io::Error| error.raw_os_error().unwrap_or(0);
    match result {
        Ok(_) => (0, 0),
        Err(WatchError::Group(error)) => (1, errno(error)),
        Err(WatchError::Open(error)) => (2, errno(error)),
        Err(WatchError::Hidden) => (3, 0),
        Err(WatchError::Mark(error)) => (4, errno(error)),
        Err(WatchError::NotUsb) => (5, 0),
        // None of them comes from `mark`.
        Err(WatchError::Marker(_) | WatchError::Metadata(_) | WatchError::Read(_)) => (6, 0),
    }
}

/// Serves the agent at the other end of the socket until that one is gone. What is not `allowed` is refused: whoever took the
/// agent over is not to read what users open elsewhere. Rights are the caller's to give up.
///
/// # Errors
/// When it is not a socket of the agent's.
pub fn serve(socket: BorrowedFd<'_>, allowed: impl Fn(&MountPoint) -> bool) -> io::Result<()> {
    // One more byte: what is longer is no question.
    let mut question = [0; QUESTION + 1];
    loop {
        let length = match rustix::net::recv(socket, &mut question, RecvFlags::empty()) {
            Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(()),
            Ok((length, _)) => length,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let question = question.get(..length).filter(|question| question.len() <= QUESTION);
        let Some((asked, place)) = question.and_then(read) else { return Err(Errno::BADMSG.into()) };
        let result = if allowed(&place) { mark(&place) } else { Err(WatchError::NotUsb) };
        let (step, errno) = put(&result);
        let answer = [&asked[..], &[step], &errno.to_ne_bytes()].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let group = result.as_ref().ok().map(|group| [group.as_fd()]);
        if let Some(group) = &group {
            control.push(SendAncillaryMessage::ScmRights(group));
        }
        match sendmsg(socket, &[IoSlice::new(&answer)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
            sent => sent?,
        };
    }
}

/// True when what is mounted there is on a USB disk, whatever stands between.
pub fn is_on_usb(place: &MountPoint) -> bool {
    let Ok(mounts) = MountList::open().and_then(|mut list| list.read()) else { return false };
    let Some(mount) = mounts.list.iter().find(|mount| mount.id == place.mount_id) else { return false };
    let below = disks_below(&mounted_from(mount, &SysBlocks), &SysBlocks, &mounts);
    below.iter().any(|devpath| below_usb(devpath))
}

/// A USB bus is `usb` and its number, wherever the controller is.
fn below_usb(devpath: &[u8]) -> bool {
    let is_bus = |name: &[u8]| {
        name.strip_prefix(b"usb")
            .is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
    };
    devpath.split(|byte| *byte == b'/').any(is_bus)
}

fn read(question: &[u8]) -> Option<([u8; 8], MountPoint)> {
    let (asked, rest) = question.split_first_chunk()?;
    let (mount_id, path) = rest.split_first_chunk()?;
    let path = PathBuf::from(OsStr::from_bytes(path));
    let absolute = path.is_absolute();
    absolute.then(|| (*asked, MountPoint { mount_id: u32::from_ne_bytes(*mount_id), path }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the process at the other end answers to questions about `/`, which it may not mark.
    #[test]
    fn what_is_not_on_usb_is_refused_and_nothing_but_a_question_is_taken() {
        let pair =
            || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (ours, theirs) = pair();
        let server = std::thread::spawn(move || serve(theirs.as_fd(), is_on_usb));
        let child = Command::new("true").spawn().unwrap();
        let marker = Marker { state: Mutex::new(State { socket: ours, asked: 0, child }) };
        for mount_id in [0, u32::MAX] {
            let refused = marker.mark(&MountPoint { mount_id, path: "/".into() });
            assert!(matches!(refused, Err(WatchError::NotUsb)), "{refused:?}");
        }
        drop(marker);
        server.join().unwrap().unwrap();

        for wrong in [&b"short"[..], b"\0\0\0\0\0\0\0\0\x01\0\0\0relative", &[b'/'; QUESTION + 1]] {
            let (ours, theirs) = pair();
            rustix::net::send(&ours, wrong, SendFlags::NOSIGNAL).unwrap();
            assert_eq!(
                Errno::from_io_error(&serve(theirs.as_fd(), |_| true).unwrap_err()),
                Some(Errno::BADMSG)
            );
        }
    }

    #[test]
    fn an_answer_without_a_group_or_of_an_unknown_kind_is_none() {
        for answer in [&[0, 0, 0, 0, 0][..], &[9, 0, 0, 0, 0], &[]] {
            assert!(understood(answer, None).is_err());
        }
        let refused = understood(&[4, 1, 0, 0, 0], None).unwrap().unwrap_err();
        assert!(matches!(refused, WatchError::Mark(error) if error.raw_os_error() == Some(1)));
    }

    #[test]
    fn usb_is_told_by_its_bus() {
        assert!(below_usb(
            b"/devices/pci0000:00/0000:00:14.0/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0/block/sdb"
        ));
        assert!(below_usb(b"/devices/platform/dummy_hcd.0/usb5/5-1/block/sdb"));
        for other in [
            &b"/devices/pci0000:00/0000:00:17.0/ata1/host0/block/sda"[..],
            b"/devices/usb/x",
            b"/devices/virtual/block/usbx1",
        ] {
            assert!(!below_usb(other));
        }
    }
}
