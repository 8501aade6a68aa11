//! The thread that reads what happens to files, for [`super::files`] to decide on.
//!
//! A thread of its own: a file system in user space may hold up whoever opens its files, and the devices are to be followed
//! nevertheless.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc as commands;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use netmon_common::model::{Disk, Event, FilesUnseen, UsbFilesUnseen};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tokio::sync::mpsc::{self, error::TrySendError};

use super::UsbOutput;
use super::fanotify::{Group, MountPoint, Seen, WatchError, mark};
use super::files::{FileEvent, FileId, Files};
use super::marker::Marker;
use super::mounts::DeviceNumber;
use super::processes::{self, Processes};
use super::users::Users;
use crate::clock::Now;

/// Whether files are recorded, and with whose rights file systems are marked.
#[derive(Clone, Debug, Default)]
pub enum FileNames {
    /// They are not. It is said of each file system that is mounted.
    #[default]
    SwitchedOff,
    /// They are, with the rights of this process.
    Own,
    /// They are, with those of a process that kept more.
    Marker(Arc<Marker>),
}

impl FileNames {
    /// Not to be asked where they are switched off.
    fn mark(&self, place: &MountPoint) -> Result<OwnedFd, WatchError> {
        match self {
            Self::SwitchedOff | Self::Own => mark(place),
            Self::Marker(marker) => marker.mark(place),
        }
    }
}

/// Files closed after writing that may wait for [`Recording::closed`].
const CLOSED: usize = 4_096;
/// Whoever waits for something short comes first, and the thread has little to do.
const NICE: i32 = -15;
/// A program that writes in small pieces is looked at only so often, while it goes on: what it does meanwhile the kernel puts
/// together. Not longer, for a closing must not wait.
const PAUSE: Duration = Duration::from_micros(300);
/// Between two attempts to hand over what nobody took.
const RETRY_NS: u64 = 50_000_000;
/// Between two looks at whether what is mounted no longer is gone for good.
const LEAVING_NS: u64 = 1_000_000_000;

/// A running thread. Dropping it lets it tell what waits, and waits for its end.
#[derive(Debug)]
pub struct Recording {
    commands: Option<commands::Sender<Command>>,
    closed: commands::Receiver<Closed>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    recorded: BTreeSet<DeviceNumber>,
}

#[derive(Debug)]
enum Command {
    Watch(ToRecord),
    Unwatch(DeviceNumber),
}

/// A mounted file system whose files are to be recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToRecord {
    /// Its number.
    pub volume: DeviceNumber,
    /// All places at which it is mounted: the first one that can be used is used.
    pub places: Vec<MountPoint>,
    /// The disk that it is on.
    pub disk: Disk,
}

/// A file that was closed after writing: file system, inode, bytes by which it has grown meanwhile at least.
pub type Closed = (DeviceNumber, u64, u64);

impl Recording {
    /// Starts to record what goes to `outputs`.
    ///
    /// # Errors
    /// No eventfd or no thread.
    pub fn start(names: FileNames, outputs: mpsc::Sender<UsbOutput>) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (commands, received) = commands::channel();
        let (closing, closed) = commands::sync_channel(CLOSED);
        let woken = Arc::clone(&wake);
        let thread = thread::Builder::new().name("usb-files".into()).spawn(move || {
            let thread = Thread {
                names,
                outputs,
                commands: received,
                closing,
                wake: woken,
                watched: BTreeMap::new(),
                files: Files::default(),
                ready: VecDeque::new(),
                processes: Processes::default(),
                users: Users::start(),
            };
            thread.run();
        })?;
        let recorded = BTreeSet::new();
        Ok(Self { commands: Some(commands), closed, wake, thread: Some(thread), recorded })
    }

    /// Records what happens to the files of these file systems, and of no others. To be called whenever something was mounted
    /// or unmounted, even if it is the same as before: it may have been mounted anew.
    pub fn update(&mut self, mounted: Vec<ToRecord>) {
        let volumes: BTreeSet<_> = mounted.iter().map(|to_record| to_record.volume).collect();
        for gone in std::mem::replace(&mut self.recorded, volumes).difference(&self.recorded) {
            self.command(Command::Unwatch(*gone));
        }
        mounted.into_iter().for_each(|to_record| self.command(Command::Watch(to_record)));
    }

    /// Files that were closed after writing since the last call. Where there are very many, not all of them.
    pub fn closed(&self) -> impl Iterator<Item = Closed> {
        self.closed.try_iter()
    }

    fn command(&self, command: Command) {
        // Fails only when the thread has died.
        if self.commands.as_ref().is_none_or(|commands| commands.send(command).is_err()) {
            tracing::error!("the thread that records files of USB disks has died");
        }
        // Fails only when the counter is full: it is signalled then.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.commands = None;
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that records files of USB disks panicked");
        }
    }
}

/// Nobody takes outputs any more.
struct Dropped;

struct Watched {
    /// `None`: it cannot be watched, or is not to be.
    group: Option<Group>,
    /// The last time at which the queue was empty.
    complete_until_wall_ns: i64,
    /// It is mounted no longer, as far as the agent sees: its files may still be open, or it is mounted in another namespace.
    leaving: bool,
}

struct Thread {
    names: FileNames,
    outputs: mpsc::Sender<UsbOutput>,
    commands: commands::Receiver<Command>,
    closing: commands::SyncSender<Closed>,
    wake: Arc<OwnedFd>,
    watched: BTreeMap<DeviceNumber, Watched>,
    files: Files,
    /// Events for `outputs`: while nobody takes them, what happens is taken all the same, for what is not taken keeps file systems
    /// from being unmounted. [`Files`] bounds it.
    ready: VecDeque<(u64, Event)>,
    processes: Processes,
    users: Users,
}

impl Thread {
    fn run(mut self) {
        // Of this thread. Without the right to do that it is slower where CPUs are busy: programs that end at once are unknown more
        // often, and whoever unmounts right after a copy finds the file system busy more often.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "files on USB disks are recorded with the priority of everything else");
        }
        while let Ok(true) = self.turn() {}
    }

    /// False when it is time to end.
    fn turn(&mut self) -> Result<bool, Dropped> {
        let ready = self.wait();
        let mut news = ready.is_empty();
        for volume in ready {
            news |= self.take(volume)?;
        }
        if !news {
            thread::sleep(PAUSE);
        }
        let goes_on = self.obey()?;
        let now = Now::read();
        if goes_on {
            self.files.handle_timeout(&now);
        } else {
            self.files.end(&now);
            self.tell_all(&now)?;
        }
        self.tell(&now)?;
        Ok(goes_on)
    }

    /// Waits for something to do; the file systems of which the kernel may have something to say.
    fn wait(&self) -> Vec<DeviceNumber> {
        let now = Now::read();
        let due = self.files.due_ns().map(|due_ns| due_ns.saturating_sub(now.boot_ns));
        let leaving = self.watched.values().any(|watched| watched.leaving).then_some(LEAVING_NS);
        // There was no room for it. There may be by now, and nobody else would wake this thread.
        let retry = (!self.ready.is_empty() || self.files.has_events()).then_some(RETRY_NS);
        let left = [due, leaving, retry].into_iter().flatten().min();
        let timeout = left.map(|left| Timespec {
            tv_sec: (left / 1_000_000_000) as i64,
            tv_nsec: (left % 1_000_000_000) as i64,
        });
        let groups = || {
            self.watched
                .iter()
                .filter_map(|(volume, watched)| Some((watched, *volume, watched.group.as_ref()?)))
        };
        let mut fds = vec![PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
        fds.extend(groups().map(|(_, _, group)| PollFd::from_borrowed_fd(group.as_fd(), PollFlags::IN)));
        // ENOMEM, EINTR: all of them are looked at.
        let failed = poll(&mut fds, timeout.as_ref()).is_err();
        let ready = fds[1..].iter().map(|fd| failed || !fd.revents().is_empty());
        let looked_at = groups().zip(ready).filter(|((watched, ..), ready)| *ready || watched.leaving);
        looked_at.map(|((_, volume, _), _)| volume).collect()
    }

    /// Takes what the kernel has to say of a file system. True when anything of it was news.
    fn take(&mut self, volume: DeviceNumber) -> Result<bool, Dropped> {
        let Some(watched) = self.watched.get_mut(&volume) else { return Ok(false) };
        let Some(group) = &watched.group else { return Ok(false) };
        // Asked before the events are taken: a file system that is gone has no more of them.
        let gone = watched.leaving && !group.is_marked();
        let files = &self.files;
        let file = |device, inode| FileId { volume, device, inode };
        let turn = group.take(|device, inode, pid| files.wants_place(file(device, inode), pid));
        let now = Now::read();
        let turn = match turn {
            Ok(turn) => turn,
            Err(error) => {
                watched.group = None;
                self.files.unwatch(volume, &now);
                self.not_watched(&error, &now)?;
                return Ok(true);
            }
        };
        let complete_until_wall_ns = watched.complete_until_wall_ns;
        if turn.emptied {
            watched.complete_until_wall_ns = now.wall_ns;
        }
        self.files.unopened(turn.unopened, &now);
        let mut news = false;
        for Seen { device, inode, pid, happened, bytes, allocated, changed_wall_ns, place } in turn.seen {
            if self.files.knows(file(device, inode), pid, happened) {
                continue;
            }
            news = true;
            let who = self.processes.who(pid, happened, now.boot_ns, processes::read);
            if let Some(who) = &who {
                self.users.ask(who.uid, now.boot_ns);
            }
            let file = file(device, inode);
            let event = FileEvent { file, pid, happened, bytes, allocated, changed_wall_ns, place, who };
            if let Some(grown) = self.files.take(event, &now) {
                // Where nobody takes them, or not fast enough, less is known.
                let _ = self.closing.try_send((volume, inode, grown));
            }
        }
        // Behind what was still in the queue.
        if turn.overflow {
            self.files.lost(volume, complete_until_wall_ns, &now);
        }
        if gone && turn.emptied {
            self.forget(volume)?;
        }
        Ok(news)
    }

    /// False when nobody gives commands any more.
    fn obey(&mut self) -> Result<bool, Dropped> {
        // EAGAIN: nobody has signalled.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        loop {
            match self.commands.try_recv() {
                Ok(Command::Watch(to_record)) => self.watch(to_record)?,
                Ok(Command::Unwatch(volume)) => self.leave(volume)?,
                Err(commands::TryRecvError::Empty) => return Ok(true),
                Err(commands::TryRecvError::Disconnected) => {
                    for volume in self.watched.keys().copied().collect::<Vec<_>>() {
                        self.take(volume)?;
                    }
                    return Ok(false);
                }
            }
        }
    }

    fn watch(&mut self, to_record: ToRecord) -> Result<(), Dropped> {
        let ToRecord { volume, places, disk } = to_record;
        let watched = self.watched.get(&volume);
        let is_new = watched.is_none_or(|watched| watched.leaving);
        if let Some(watched) = watched {
            // The same number does not mean the same file system: it may have been mounted anew.
            if !watched.leaving && watched.group.as_ref().is_some_and(Group::is_marked) {
                return Ok(());
            }
            self.take(volume)?;
            self.forget(volume)?;
        }
        let result = match self.names {
            FileNames::SwitchedOff => None,
            _ => Some(self.mark(&places)),
        };
        let now = Now::read();
        let mut watched = Watched { group: None, complete_until_wall_ns: now.wall_ns, leaving: false };
        let said = match result {
            Some(Ok(group)) => {
                watched.group = Some(Group::new(group));
                self.files.watch(volume, disk);
                Ok(())
            }
            // What is tried again is said once.
            Some(Err(error)) if is_new => self.not_watched(&error, &now),
            None if is_new => self.unseen(FilesUnseen::SwitchedOff, &now),
            Some(Err(_)) | None => Ok(()),
        };
        self.watched.insert(volume, watched);
        said
    }

    fn mark(&self, places: &[MountPoint]) -> Result<OwnedFd, WatchError> {
        let mut result = Err(WatchError::Hidden);
        for place in places {
            result = self.names.mark(place);
            if result.is_ok() {
                break;
            }
        }
        result
    }

    fn leave(&mut self, volume: DeviceNumber) -> Result<(), Dropped> {
        self.take(volume)?;
        let Some(watched) = self.watched.get_mut(&volume) else { return Ok(()) };
        watched.leaving = true;
        let marked = watched.group.as_ref().is_some_and(Group::is_marked);
        if !marked {
            self.forget(volume)?;
        }
        let now = Now::read();
        self.files.hasten(volume);
        self.tell(&now)
    }

    fn forget(&mut self, volume: DeviceNumber) -> Result<(), Dropped> {
        self.watched.remove(&volume);
        let now = Now::read();
        self.files.unwatch(volume, &now);
        self.tell(&now)
    }

    fn not_watched(&mut self, error: &WatchError, now: &Now) -> Result<(), Dropped> {
        let error = error as &dyn std::error::Error;
        tracing::error!(error, "the files of a file system on a USB disk are not recorded");
        self.unseen(FilesUnseen::NotWatched, now)
    }

    fn unseen(&mut self, reason: FilesUnseen, now: &Now) -> Result<(), Dropped> {
        let wall_ns = now.wall_ns;
        let unseen = UsbFilesUnseen { reason, from_wall_ns: wall_ns, to_wall_ns: wall_ns, count: Some(1) };
        self.ready.push_back((now.boot_ns, Event::UsbFilesUnseen(unseen)));
        self.tell(now)
    }

    /// Hands over what there is, as far as there is room.
    fn tell(&mut self, now: &Now) -> Result<(), Dropped> {
        loop {
            let permit = match self.outputs.try_reserve() {
                Ok(permit) => permit,
                Err(TrySendError::Full(())) => return Ok(()),
                Err(TrySendError::Closed(())) => return Err(Dropped),
            };
            let next = self.ready.pop_front().or_else(|| Some((now.boot_ns, self.files.poll()?)));
            let Some((boot_ns, event)) = next else { return Ok(()) };
            permit.send(UsbOutput::Event { boot_ns, event: named(event, &self.users) });
        }
    }

    /// Hands over everything, and waits for room.
    fn tell_all(&mut self, now: &Now) -> Result<(), Dropped> {
        while let Some((boot_ns, event)) =
            self.ready.pop_front().or_else(|| Some((now.boot_ns, self.files.poll()?)))
        {
            let event = named(event, &self.users);
            self.outputs.blocking_send(UsbOutput::Event { boot_ns, event }).map_err(|_| Dropped)?;
        }
        Ok(())
    }
}

fn named(mut event: Event, users: &Users) -> Event {
    if let Event::UsbFile(file) = &mut event
        && let Some(uid) = file.uid
    {
        file.user = users.name(uid);
    }
    event
}
