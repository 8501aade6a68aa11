//! Which files of USB disks were read and written, out of what the kernel says of them.
//!
//! Pure. A file counts when it is closed, and tells who moved something: whoever wrote (or cut) it has `Written` it, perhaps
//! read it as well; whoever only read has `Read` it; where nobody is known to have done either, who had it open has `Opened`
//! it, and perhaps read it (`mmap` tells nobody, nor did `splice`, by which file managers copy, before Linux 6.4). A program
//! that could write and is not known to have written has written when the file's times say that it was changed since.
//!
//! What a process does with a file within [`WINDOW_NS`] of the first closing is one event. No more than [`RATE`] events a
//! second come out of here, after a burst of [`BURST`]; the files beyond are counted.

use std::collections::{BTreeMap, VecDeque};

use netmon_common::model::{Disk, Event, FileAccess, FilesUnseen, UsbFile, UsbFilesUnseen};
use netmon_common::raw::{MAX_RAW, Raw};

use super::metadata::Happened;
use super::mounts::DeviceNumber;
use crate::clock::Now;

const SECOND_NS: u64 = 1_000_000_000;

/// How long an event waits for more of the same: a program that opens a file a hundred times in a second is one line.
pub const WINDOW_NS: u64 = SECOND_NS;
/// Files a second. Few, for lines that somebody makes on purpose push older ones out of the logs and the spool: at this rate the
/// 64 MiB of a log last for four hours.
pub const RATE: u64 = 20;
/// Files at once: a directory of photographs.
pub const BURST: u64 = 1_000;
/// Most open files that are remembered, over all disks. The oldest one gives way, and is counted if it was moved.
pub const MAX_OPEN: usize = 4_096;
/// Most events that wait for whoever takes them. Further files are counted.
pub const MAX_READY: usize = 4_096;
/// FAT knows the time of a change to two seconds.
const COARSE_NS: i64 = 2 * SECOND_NS as i64;

/// A file for as long as it is open: inode numbers of FAT are given anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    /// Which file system.
    pub volume: DeviceNumber,
    /// `st_dev`: btrfs has one for each subvolume.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// Who did something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// The program's name.
    pub program: Raw,
    /// Real user ID.
    pub uid: u32,
}

/// Where a file is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its directory.
    pub directory: Raw,
    /// Its name.
    pub name: Raw,
}

impl Place {
    /// From the link of a descriptor in `/proc/self/fd` (proc_pid_fd(5)). `deleted`: the file has no name any more, and the
    /// kernel says so behind the name that it had.
    pub fn new(link: &[u8], deleted: bool) -> Self {
        let path = if deleted { link.strip_suffix(b" (deleted)").unwrap_or(link) } else { link };
        let at = path.iter().rposition(|&byte| byte == b'/');
        let (directory, name) = match at {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&path[..0], path),
        };
        Self { directory: end(directory), name: end(name) }
    }
}

/// The end of what is too long says more than its beginning: the file's extension, the last directories. It is to be seen that
/// it was cut: else whoever chooses the lengths makes the end look like another whole path.
fn end(bytes: &[u8]) -> Raw {
    const CUT: &[u8] = b"...";
    match bytes.len() {
        ..=MAX_RAW => Raw::new(bytes),
        length => Raw::new([CUT, &bytes[length - (MAX_RAW - CUT.len())..]].concat()),
    }
}

/// What is known of a file when something happened to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEvent {
    /// Which file.
    pub file: FileId,
    /// Which process; 0: not known.
    pub pid: u32,
    /// What happened.
    pub happened: Happened,
    /// Its size in bytes.
    pub bytes: u64,
    /// What of it has room on the disk and will keep it, in bytes: less where there are holes, 0 where its name is gone.
    pub allocated: u64,
    /// When it was changed last, contents or attributes, wall clock.
    pub changed_wall_ns: i64,
    /// Where it is; `None`: not looked up, see [`Files::wants_place`], or not known.
    pub place: Option<Place>,
    /// Who did it; `None`: the process was gone.
    pub who: Option<Who>,
}

/// A process that has a file open, as far as is known.
#[derive(Debug)]
struct Touch {
    /// In the order in which they began.
    serial: u64,
    /// The open was seen: what the process did with the file is known from its beginning.
    opened: bool,
    since_wall_ns: i64,
    /// Size and room when it was opened, or soon after.
    bytes: u64,
    allocated: u64,
    read: bool,
    written: bool,
    place: Option<Place>,
    who: Option<Who>,
}

/// An event that waits for more of the same.
#[derive(Debug)]
struct Waiting {
    bytes: Option<u64>,
    place: Place,
    who: Option<Who>,
}

type Key = (FileId, u32, FileAccess);

/// See the module.
#[derive(Debug, Default)]
pub struct Files {
    disks: BTreeMap<DeviceNumber, Disk>,
    touches: BTreeMap<(FileId, u32), Touch>,
    /// By their serial numbers.
    order: BTreeMap<u64, (FileId, u32)>,
    serial: u64,
    waiting: BTreeMap<Key, Waiting>,
    /// In the order in which they are due. Times are boot clock.
    due: VecDeque<(u64, Key)>,
    allowance: Allowance,
    too_many: Option<Loss>,
    queue_full: Option<Loss>,
    /// Boot time at which the losses since the first one are reported.
    losses_due_ns: u64,
    ready: VecDeque<Event>,
}

#[derive(Clone, Copy, Debug)]
struct Loss {
    since_wall_ns: i64,
    count: Option<u64>,
}

impl Files {
    /// Files of this file system come from now on; they are on this disk.
    pub fn watch(&mut self, volume: DeviceNumber, disk: Disk) {
        self.disks.insert(volume, disk);
    }

    /// Nothing more comes of this file system. What waits is told at once; so is what was moved of files that are still
    /// open: their size is not known.
    pub fn unwatch(&mut self, volume: DeviceNumber, now: &Now) {
        self.end_touches(volume, now);
        self.hasten(volume);
        self.disks.remove(&volume);
    }

    /// What waits of this file system is told at once.
    pub fn hasten(&mut self, volume: DeviceNumber) {
        let due: Vec<_> = self.due.iter().map(|(_, key)| *key).filter(|key| key.0.volume == volume).collect();
        self.due.retain(|(_, key)| key.0.volume != volume);
        due.into_iter().for_each(|key| self.tell(key));
    }

    /// True when it would be nothing new that this process does this to this file, which it has open.
    pub fn knows(&self, file: FileId, pid: u32, happened: Happened) -> bool {
        let touch = self.touches.get(&(file, pid));
        !happened.closed()
            && !happened.opened
            && touch.is_some_and(|touch| touch.read >= happened.read && touch.written >= happened.written)
    }

    /// True when nothing is known of where the file is that this process uses.
    pub fn wants_place(&self, file: FileId, pid: u32) -> bool {
        self.touches.get(&(file, pid)).is_none_or(|touch| touch.place.is_none())
    }

    /// Takes in what happened to a file of a file system that is watched. When it was closed after writing: by how many bytes
    /// it has grown at least while the process had it open.
    pub fn take(&mut self, event: FileEvent, now: &Now) -> Option<u64> {
        let FileEvent { file, pid, happened, bytes, allocated, changed_wall_ns, place, who } = event;
        let known = self.touches.contains_key(&(file, pid));
        if !known {
            self.begin(file, pid, (happened.opened, bytes, allocated), now);
        }
        let by_others = self.of_file(file).any(|(other, touch)| other != pid && touch.written);
        let touch = self.touches.get_mut(&(file, pid))?;
        touch.read |= happened.read;
        touch.written |= happened.written;
        touch.place = place.or(touch.place.take());
        touch.who = who.or(touch.who.take());
        if !happened.closed() {
            return None;
        }
        if happened.closed_after_writing && !by_others {
            // Who had it open before anybody looked may have written then.
            let unknown = !known && !happened.opened;
            let changed = changed_wall_ns >= touch.since_wall_ns.saturating_sub(COARSE_NS);
            touch.written |= unknown || changed;
        }
        // A descriptor may be closed by another process than the one that opened it: parents and children share them. Then
        // nobody else will tell of those who had it, nor of those who used one that they had got.
        let shared = !touch.opened;
        let grown = bytes.saturating_sub(touch.bytes).min(allocated.saturating_sub(touch.allocated));
        let grown = (touch.opened && touch.written).then_some(grown);
        let of_file = self.of_file(file);
        let ended: Vec<_> = of_file
            .filter(|(other, touch)| *other == pid || shared || !touch.opened)
            .map(|(pid, _)| (file, pid))
            .collect();
        // A shell that opened a file for those who read it has moved nothing.
        let nobody_moved =
            ended.iter().all(|key| self.touches.get(key).is_none_or(|touch| touch.moved().is_none()));
        let otherwise = nobody_moved.then_some(FileAccess::Opened);
        for key in ended {
            self.end_touch(key, Some(bytes), otherwise, now);
        }
        grown
    }

    /// The kernel's queue for this file system was full: files are missing since `complete_until_wall_ns`, the last time at
    /// which none was. Who had files open may have closed them, and another process may have its number: what is known of
    /// them is told, and nothing more is taken for theirs.
    pub fn lost(&mut self, volume: DeviceNumber, complete_until_wall_ns: i64, now: &Now) {
        self.end_touches(volume, now);
        self.report_losses_later(now);
        self.queue_full.get_or_insert(Loss { since_wall_ns: complete_until_wall_ns, count: None });
    }

    /// Files that the kernel could not open for the agent: what happened to them is not known.
    pub fn unopened(&mut self, events: u64, now: &Now) {
        (0..events).for_each(|_| self.refuse(now));
    }

    /// Boot time at which [`Files::handle_timeout`] wants to be called; `None`: nothing waits.
    pub fn due_ns(&self) -> Option<u64> {
        let losses = (self.too_many.is_some() || self.queue_full.is_some()).then_some(self.losses_due_ns);
        let event = self.due.front().map(|(due_ns, _)| *due_ns);
        [losses, event].into_iter().flatten().min()
    }

    /// Ends the waits that are over.
    pub fn handle_timeout(&mut self, now: &Now) {
        while let Some((_, key)) = self.due.pop_front_if(|(due_ns, _)| *due_ns <= now.boot_ns) {
            self.tell(key);
        }
        if now.boot_ns >= self.losses_due_ns {
            self.tell_losses(now);
        }
    }

    /// Ends all waits: the watch is over.
    pub fn end(&mut self, now: &Now) {
        for volume in self.disks.keys().copied().collect::<Vec<_>>() {
            self.unwatch(volume, now);
        }
        self.tell_losses(now);
    }

    /// The next event. [`UsbFile::user`] is for the caller to fill in.
    pub fn poll(&mut self) -> Option<Event> {
        self.ready.pop_front()
    }

    /// Whether [`Files::poll`] has something.
    pub fn has_events(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The processes that use a file.
    fn of_file(&self, file: FileId) -> impl Iterator<Item = (u32, &Touch)> {
        self.touches.range((file, 0)..=(file, u32::MAX)).map(|((_, pid), touch)| (*pid, touch))
    }

    fn begin(&mut self, file: FileId, pid: u32, found: (bool, u64, u64), now: &Now) {
        if self.touches.len() >= MAX_OPEN
            && let Some((_, oldest)) = self.order.pop_first()
            && self.touches.remove(&oldest).is_some_and(|touch| touch.moved().is_some())
        {
            self.refuse(now);
        }
        let serial = self.serial;
        self.serial += 1;
        self.order.insert(serial, (file, pid));
        let (opened, bytes, allocated) = found;
        let touch = Touch {
            serial,
            opened,
            since_wall_ns: now.wall_ns,
            bytes,
            allocated,
            read: false,
            written: false,
            place: None,
            who: None,
        };
        self.touches.insert((file, pid), touch);
    }

    fn end_touches(&mut self, volume: DeviceNumber, now: &Now) {
        let of_volume = |key: &(FileId, u32)| key.0.volume == volume;
        let open: Vec<_> = self.touches.keys().copied().filter(of_volume).collect();
        for key in open {
            self.end_touch(key, None, None, now);
        }
    }

    /// `otherwise`: what was done with it, where it is not known that something was moved.
    fn end_touch(
        &mut self,
        key: (FileId, u32),
        bytes: Option<u64>,
        otherwise: Option<FileAccess>,
        now: &Now,
    ) {
        let Some(touch) = self.touches.remove(&key) else { return };
        self.order.remove(&touch.serial);
        if let Some(access) = touch.moved().or(otherwise) {
            self.hold((key.0, key.1, access), bytes, touch, now);
        }
    }

    /// Lets an event wait for more of the same, or adds to the one that waits.
    fn hold(&mut self, key: Key, bytes: Option<u64>, touch: Touch, now: &Now) {
        let Touch { place, who, .. } = touch;
        let (file, pid, access) = key;
        let moved = [(file, pid, FileAccess::Read), (file, pid, FileAccess::Written)];
        if access == FileAccess::Opened && moved.iter().any(|key| self.waiting.contains_key(key)) {
            return;
        }
        if access != FileAccess::Opened {
            // More is known now.
            self.waiting.remove(&(file, pid, FileAccess::Opened));
        }
        if let Some(waiting) = self.waiting.get_mut(&key) {
            waiting.bytes = bytes.or(waiting.bytes);
            waiting.place = place.unwrap_or_else(|| std::mem::take(&mut waiting.place));
            waiting.who = who.or(waiting.who.take());
        } else if self.waiting.len() + self.ready.len() < MAX_READY && self.allowance.take(now.boot_ns) {
            self.due.push_back((now.boot_ns + WINDOW_NS, key));
            self.waiting.insert(key, Waiting { bytes, place: place.unwrap_or_default(), who });
        } else {
            self.refuse(now);
        }
    }

    fn refuse(&mut self, now: &Now) {
        self.report_losses_later(now);
        let loss = self.too_many.get_or_insert(Loss { since_wall_ns: now.wall_ns, count: Some(0) });
        loss.count = loss.count.map(|count| count + 1);
    }

    fn report_losses_later(&mut self, now: &Now) {
        if self.too_many.is_none() && self.queue_full.is_none() {
            self.losses_due_ns = now.boot_ns + SECOND_NS;
        }
    }

    fn tell(&mut self, key: Key) {
        let (file, pid, access) = key;
        let Some(Waiting { bytes, place, who }) = self.waiting.remove(&key) else { return };
        let Some(disk) = self.disks.get(&file.volume).cloned() else { return };
        let Place { directory, name } = place;
        let (program, uid) = who.map_or_else(Default::default, |who| (who.program, Some(who.uid)));
        let user = Raw::default();
        let file = UsbFile { disk, directory, name, access, bytes, program, pid, uid, user };
        self.ready.push_back(Event::UsbFile(file));
    }

    fn tell_losses(&mut self, now: &Now) {
        let losses =
            [(FilesUnseen::TooMany, self.too_many.take()), (FilesUnseen::QueueFull, self.queue_full.take())];
        for (reason, loss) in losses {
            let Some(Loss { since_wall_ns, count }) = loss else { continue };
            let unseen =
                UsbFilesUnseen { reason, from_wall_ns: since_wall_ns, to_wall_ns: now.wall_ns, count };
            self.ready.push_back(Event::UsbFilesUnseen(unseen));
        }
    }
}

impl Touch {
    fn moved(&self) -> Option<FileAccess> {
        match (self.written, self.read) {
            (true, _) => Some(FileAccess::Written),
            (false, true) => Some(FileAccess::Read),
            (false, false) => None,
        }
    }
}

/// A token bucket: [`RATE`], [`BURST`].
#[derive(Debug)]
struct Allowance {
    left: u64,
    /// Boot time up to which it was filled.
    filled_ns: u64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { left: BURST, filled_ns: 0 }
    }
}

impl Allowance {
    /// Between two tokens.
    const EACH_NS: u64 = SECOND_NS / RATE;

    fn take(&mut self, boot_ns: u64) -> bool {
        let come = boot_ns.saturating_sub(self.filled_ns) / Self::EACH_NS;
        self.filled_ns += come * Self::EACH_NS;
        self.left = self.left.saturating_add(come).min(BURST);
        let one = self.left > 0;
        self.left -= u64::from(one);
        one
    }
}

#[cfg(test)]
mod tests;
