//! The thread that reads what happens to files, for [`super::files`] to decide on.
//!
//! A thread of its own: a file system in user space may hold up whoever opens its files, and the devices are to be followed
//! nevertheless.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc as commands;
use std::thread::{self, JoinHandle};

use netmon_common::model::{Disk, Event, FilesUnseen, UsbFilesUnseen};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tokio::sync::mpsc;

use super::UsbOutput;
use super::fanotify::{Group, MountPoint, Seen, WatchError, mark};
use super::files::{FileEvent, FileId, Files};
use super::marker::Marker;
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
    fn mark(&self, place: &MountPoint) -> Result<OwnedFd, WatchError> {
        match self {
            Self::SwitchedOff | Self::Own => mark(place),
            Self::Marker(marker) => marker.mark(place),
        }
    }
}

/// A running thread. Dropping it lets it tell what waits, and waits for its end.
#[derive(Debug)]
pub struct Recording {
    commands: Option<commands::Sender<Command>>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Command {
    Watch { volume: u64, places: Vec<MountPoint>, disk: Disk },
    Unwatch { volume: u64 },
}

impl Recording {
    /// Starts to record what goes to `outputs`.
    ///
    /// # Errors
    /// No eventfd or no thread.
    pub fn start(names: FileNames, outputs: mpsc::Sender<UsbOutput>) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (commands, received) = commands::channel();
        let woken = Arc::clone(&wake);
        let thread = thread::Builder::new().name("usb-files".into()).spawn(move || {
            let thread = Thread {
                names,
                outputs,
                commands: received,
                wake: woken,
                watched: BTreeMap::new(),
                files: Files::default(),
                processes: Processes::default(),
                users: Users::start(),
            };
            thread.run();
        })?;
        Ok(Self { commands: Some(commands), wake, thread: Some(thread) })
    }

    /// Records from now on what happens to the files of a file system. `volume` is the caller's number for it; `places` are all
    /// places at which it is mounted: the first one that can be used is used.
    pub fn watch(&self, volume: u64, places: Vec<MountPoint>, disk: Disk) {
        self.command(Command::Watch { volume, places, disk });
    }

    /// The file system is not mounted any more.
    pub fn unwatch(&self, volume: u64) {
        self.command(Command::Unwatch { volume });
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
    group: Group,
    /// The last time at which the queue was empty.
    complete_until_wall_ns: i64,
}

struct Thread {
    names: FileNames,
    outputs: mpsc::Sender<UsbOutput>,
    commands: commands::Receiver<Command>,
    wake: Arc<OwnedFd>,
    watched: BTreeMap<u64, Watched>,
    files: Files,
    processes: Processes,
    users: Users,
}

impl Thread {
    fn run(mut self) {
        while let Ok(true) = self.turn() {}
    }

    /// False when it is time to end.
    fn turn(&mut self) -> Result<bool, Dropped> {
        let readable = self.wait();
        for volume in readable {
            self.take(volume)?;
        }
        let goes_on = self.obey()?;
        let now = Now::read();
        if goes_on {
            self.files.handle_timeout(&now);
        } else {
            self.files.end(&now);
        }
        self.tell(&now)?;
        Ok(goes_on)
    }

    /// Waits for something to do; the file systems of which something is known.
    fn wait(&self) -> Vec<u64> {
        let now = Now::read();
        let left = self.files.due_ns().map(|due_ns| due_ns.saturating_sub(now.boot_ns));
        let timeout = left.map(|left| Timespec {
            tv_sec: (left / 1_000_000_000) as i64,
            tv_nsec: (left % 1_000_000_000) as i64,
        });
        let mut fds = vec![PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
        fds.extend(
            self.watched
                .values()
                .map(|watched| PollFd::from_borrowed_fd(watched.group.as_fd(), PollFlags::IN)),
        );
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {
                let ready = fds[1..].iter().map(|fd| !fd.revents().is_empty());
                self.watched
                    .keys()
                    .zip(ready)
                    .filter(|(_, ready)| *ready)
                    .map(|(volume, _)| *volume)
                    .collect()
            }
            // ENOMEM, EINTR: all of them are looked at.
            Err(_) => self.watched.keys().copied().collect(),
        }
    }

    /// Takes what the kernel has to say of a file system.
    fn take(&mut self, volume: u64) -> Result<(), Dropped> {
        let Some(watched) = self.watched.get_mut(&volume) else { return Ok(()) };
        let files = &self.files;
        let file = |device, inode| FileId { volume, device, inode };
        let turn = watched.group.take(|device, inode, pid| files.wants_place(file(device, inode), pid));
        let now = Now::read();
        let turn = match turn {
            Ok(turn) => turn,
            Err(error) => {
                self.watched.remove(&volume);
                self.files.unwatch(volume, &now);
                return self.not_watched(&error, &now);
            }
        };
        if turn.overflow {
            self.files.lost(watched.complete_until_wall_ns, &now);
        }
        if turn.emptied {
            watched.complete_until_wall_ns = now.wall_ns;
        }
        self.files.unopened(turn.unopened, &now);
        for Seen { device, inode, pid, happened, bytes, changed_wall_ns, place } in turn.seen {
            let who = self.processes.who(pid, happened, now.boot_ns, processes::read);
            if let Some(who) = &who {
                self.users.ask(who.uid, now.boot_ns);
            }
            let file = file(device, inode);
            self.files.take(FileEvent { file, pid, happened, bytes, changed_wall_ns, place, who }, &now);
        }
        Ok(())
    }

    /// False when nobody gives commands any more.
    fn obey(&mut self) -> Result<bool, Dropped> {
        // EAGAIN: nobody has signalled.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        loop {
            match self.commands.try_recv() {
                Ok(Command::Watch { volume, places, disk }) => self.watch(volume, &places, disk)?,
                Ok(Command::Unwatch { volume }) => self.unwatch(volume)?,
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

    fn watch(&mut self, volume: u64, places: &[MountPoint], disk: Disk) -> Result<(), Dropped> {
        let mut result = Err(WatchError::Hidden);
        if !matches!(self.names, FileNames::SwitchedOff) {
            for place in places {
                result = self.names.mark(place);
                if result.is_ok() {
                    break;
                }
            }
        }
        let now = Now::read();
        match result {
            Ok(group) => {
                let group = Group::new(group);
                self.watched.insert(volume, Watched { group, complete_until_wall_ns: now.wall_ns });
                self.files.watch(volume, disk);
                Ok(())
            }
            Err(_) if matches!(self.names, FileNames::SwitchedOff) => {
                self.unseen(FilesUnseen::SwitchedOff, &now)
            }
            Err(error) => self.not_watched(&error, &now),
        }
    }

    fn unwatch(&mut self, volume: u64) -> Result<(), Dropped> {
        self.take(volume)?;
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

    fn unseen(&self, reason: FilesUnseen, now: &Now) -> Result<(), Dropped> {
        let wall_ns = now.wall_ns;
        let unseen = UsbFilesUnseen { reason, from_wall_ns: wall_ns, to_wall_ns: wall_ns, count: Some(1) };
        self.send(Event::UsbFilesUnseen(unseen), now)
    }

    fn tell(&mut self, now: &Now) -> Result<(), Dropped> {
        while let Some(mut event) = self.files.poll() {
            if let Event::UsbFile(file) = &mut event
                && let Some(uid) = file.uid
            {
                file.user = self.users.name(uid);
            }
            self.send(event, now)?;
        }
        Ok(())
    }

    fn send(&self, event: Event, now: &Now) -> Result<(), Dropped> {
        self.outputs.blocking_send(UsbOutput::Event { boot_ns: now.boot_ns, event }).map_err(|_| Dropped)
    }
}
