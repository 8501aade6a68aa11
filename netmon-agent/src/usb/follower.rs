//! The thread behind [`super::UsbWatch`]: one loop that moves messages and samples to where they are decided on.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use netmon_common::model::{
    Disk, Event, FilesUnseen, Gap, GapReason, Traffic, UsbFilesUnseen, UsbVolume, VolumeChange,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::devices::Devices;
use super::disks::{DiskActivity, SAMPLE_PERIOD, Usage};
use super::fanotify::MountPoint;
use super::functions::Functions;
use super::message::{Action, Kind, Message, disk_bytes, last_of};
use super::monitor::{Monitor, Received, Source, disk_size, list};
use super::mounted::{Counters as _, Mounted};
use super::recording::{Recording, ToRecord};
use super::sampler::{CountFrom, Sampled, Sampler};
use super::sysfs::{MountList, SysBlocks};
use super::volumes;
use super::{Options, UsbOutput};
use crate::clock::Now;

/// Between two looks at whether udevd has come or gone, and between two attempts to watch.
const CHECK_PERIOD: Duration = Duration::from_secs(2);

/// Most messages that are taken before disks get their turn.
const BATCH: usize = 256;

/// The other end of the queue was dropped: the watch is over.
struct Dropped;

pub(super) struct Follower {
    options: Options,
    outputs: mpsc::Sender<UsbOutput>,
    stop: Arc<OwnedFd>,
    devices: Devices,
    functions: Functions,
    sampler: Sampler,
    mounted: Mounted,
    /// How disks are used, as it was said last; those that are not in it are fresh.
    usages: BTreeMap<Vec<u8>, Usage>,
    /// `None` where there can be no thread for it.
    recording: Option<Recording>,
    mount_list: Option<MountList>,
    /// What is mounted may have changed, or a disk came, since it was looked at.
    mounts_changed: bool,
    /// Not all of what is mounted is known, and that was said.
    mounts_refused: bool,
    monitor: Option<Monitor>,
    /// Messages were lost and the devices were not listed since.
    lost: bool,
    /// False until the devices were listed for the first time.
    started: bool,
    /// What the listener was told last.
    watching: Option<bool>,
    /// The last time at which nothing was missed: a gap found now began then.
    complete_until: Now,
    checked: Now,
    sampled: Now,
}

impl Follower {
    pub(super) fn new(options: Options, outputs: mpsc::Sender<UsbOutput>, stop: Arc<OwnedFd>) -> Self {
        let now = Now::read();
        let recording = Recording::start(options.files.clone(), outputs.clone())
            .inspect_err(|error| tracing::error!(%error, "files on USB disks cannot be recorded"))
            .ok();
        Self {
            options,
            outputs,
            stop,
            devices: Devices::default(),
            functions: Functions::default(),
            sampler: Sampler::default(),
            mounted: Mounted::default(),
            usages: BTreeMap::new(),
            recording,
            mount_list: None,
            mounts_changed: false,
            mounts_refused: false,
            monitor: None,
            lost: false,
            started: false,
            watching: None,
            complete_until: now,
            checked: now,
            sampled: now,
        }
    }

    /// Runs until the watch is dropped.
    pub(super) fn run(mut self) {
        if let Err(Dropped) = self.follow() {
            tracing::debug!("the USB watch was dropped");
        }
    }

    fn follow(&mut self) -> Result<(), Dropped> {
        self.connect(Source::available())?;
        while !self.wait() {
            self.drain()?;
            self.check_source()?;
            self.check_mounts(VolumeChange::Mounted)?;
            self.sample()?;
        }
        Ok(())
    }

    /// Waits for messages, the next sample or the next check. True when it is time to stop.
    fn wait(&mut self) -> bool {
        let now = Now::read();
        let at_once = self.lost || self.mounts_changed;
        let mut left = if at_once { Duration::ZERO } else { left_of(CHECK_PERIOD, self.checked, now) };
        if !self.sampler.is_empty() {
            left = left.min(left_of(SAMPLE_PERIOD, self.sampled, now));
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = vec![PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN)];
        if let Some(monitor) = &self.monitor {
            fds.push(PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN));
        }
        // Where there is no USB disk, mounts are of no interest.
        let mount_list = self.mount_list.as_ref().filter(|_| !self.sampler.is_empty());
        if let Some(list) = mount_list {
            fds.push(PollFd::from_borrowed_fd(list.as_fd(), PollFlags::PRI));
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => {
                let mounts = fds.last().filter(|_| mount_list.is_some());
                let changed = mounts.is_some_and(|fd| fd.revents().contains(PollFlags::PRI));
                let stop = !fds[0].revents().is_empty();
                self.mounts_changed |= changed;
                stop
            }
            Err(Errno::INTR) => false,
            Err(errno) => {
                // EINVAL and ENOMEM are all that is left. Nothing can be awaited then; stop rather than spin.
                tracing::error!(%errno, "cannot wait for USB messages");
                true
            }
        }
    }

    /// Looks from time to time whether udevd came or went, or whether watching has become possible.
    fn check_source(&mut self) -> Result<(), Dropped> {
        let now = Now::read();
        if !left_of(CHECK_PERIOD, self.checked, now).is_zero() {
            return Ok(());
        }
        self.checked = now;
        self.mounts_changed |= self.mount_list.is_none() && !self.sampler.is_empty();
        let available = Source::available();
        if self.monitor.as_ref().is_some_and(|monitor| monitor.source() == available) {
            return Ok(());
        }
        self.connect(available)
    }

    /// Listens, then lists, in this order, so that nothing falls in between.
    fn connect(&mut self, source: Source) -> Result<(), Dropped> {
        let previous = self.monitor.take();
        let connected =
            Monitor::open(source, self.options.receive_buffer).and_then(|monitor| Ok((monitor, list()?)));
        let now = Now::read();
        match connected {
            Ok((monitor, listed)) => {
                tracing::info!(?source, "watching USB");
                // udevd may have been silent for some time before it was seen to be gone.
                if previous.is_some_and(|monitor| monitor.source() == Source::Udevd) {
                    self.gap(GapReason::UsbMessagesLost, now)?;
                } else if self.watching == Some(false) {
                    self.gap(GapReason::UsbNotWatched, now)?;
                }
                self.monitor = Some(monitor);
                self.take_list(&listed, now)?;
                self.complete_until = now;
                self.tell_watching(true)
            }
            Err(error) => {
                if self.watching != Some(false) {
                    tracing::error!(%error, "USB cannot be watched, trying again");
                    self.gap(GapReason::UsbNotWatched, now)?;
                }
                self.tell_watching(false)
            }
        }
    }

    /// Takes the messages that wait.
    fn drain(&mut self) -> Result<(), Dropped> {
        for _ in 0..BATCH {
            let Some(monitor) = &self.monitor else { return Ok(()) };
            match monitor.receive() {
                Received::Message(message) => self.take_message(&message)?,
                Received::Lost(error) => {
                    tracing::warn!(%error, "USB messages were lost, listing the devices anew");
                    self.lost = true;
                }
                // Only now: what still waited is older than what was lost, and must not come after the list.
                Received::Empty if self.lost => return self.relist(),
                Received::Empty => {
                    self.complete_until = Now::read();
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Finds by a list what lost messages would have said.
    fn relist(&mut self) -> Result<(), Dropped> {
        let listed = list();
        let now = Now::read();
        self.lost = false;
        self.gap(GapReason::UsbMessagesLost, now)?;
        match listed {
            Ok(listed) => {
                self.take_list(&listed, now)?;
                self.complete_until = now;
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "USB devices cannot be listed, trying again");
                self.monitor = None;
                self.tell_watching(false)
            }
        }
    }

    fn take_message(&mut self, message: &Message) -> Result<(), Dropped> {
        let now = Now::read();
        let events = self.devices.handle(message);
        self.take_events(events, now)?;
        self.take_function(message, now)?;
        match (message.kind, message.action) {
            (Kind::Disk, Action::Add) => self.hold(message, CountFrom::Zero, now),
            (Kind::Disk, Action::Move | Action::Other) => self.hold(message, CountFrom::Now, now),
            (Kind::Disk, Action::Remove) => {
                let last = self.sampler.release(&message.devpath, now.boot_ns);
                self.send_samples(last, now)
            }
            _ => Ok(()),
        }
    }

    fn take_list(&mut self, listed: &[Message], now: Now) -> Result<(), Dropped> {
        let events = if self.started { self.devices.resync(listed) } else { self.devices.start(listed) };
        self.take_events(events, now)?;
        for message in listed {
            self.take_function(message, now)?;
        }
        let disks = || listed.iter().filter(|message| message.kind == Kind::Disk);
        let present: BTreeSet<&[u8]> = disks().map(|disk| disk.devpath.as_slice()).collect();
        let missing: Vec<_> =
            self.sampler.devpaths().filter(|path| !present.contains(path)).map(<[u8]>::to_vec).collect();
        for devpath in missing {
            let last = self.sampler.release(&devpath, now.boot_ns);
            self.send_samples(last, now)?;
        }
        let from = if self.started { CountFrom::Zero } else { CountFrom::Now };
        for disk in disks() {
            self.hold(disk, from, now)?;
        }
        let is_new = if self.started { VolumeChange::Mounted } else { VolumeChange::Present };
        self.started = true;
        self.check_mounts(is_new)
    }

    fn take_events(&mut self, events: Vec<Event>, now: Now) -> Result<(), Dropped> {
        for event in events {
            if let Event::DeviceRemoved(device) = &event {
                self.functions.forget(device);
            }
            self.send(UsbOutput::Event { boot_ns: now.boot_ns, event })?;
        }
        Ok(())
    }

    /// What the kernel made of a USB device, behind the device's own event.
    fn take_function(&mut self, message: &Message, now: Now) -> Result<(), Dropped> {
        if !matches!(message.kind, Kind::Disk | Kind::Network | Kind::Serial) {
            return Ok(());
        }
        let Some(device) = self.devices.above(&message.devpath) else { return Ok(()) };
        let told = self.functions.handle(message, device, now.boot_ns);
        told.map_or(Ok(()), |event| self.send(UsbOutput::Event { boot_ns: now.boot_ns, event }))
    }

    /// Looks at the sizes of the disks: a medium may change, or go, without a message that tells of it in time.
    fn look_at_sizes(&mut self, now: Now) -> Result<(), Dropped> {
        let mut events = Vec::new();
        for devpath in self.sampler.devpaths() {
            let sized = disk_bytes(devpath, &disk_size(devpath)).zip(self.devices.above(devpath));
            let event = sized.and_then(|(bytes, device)| {
                self.functions.sized(last_of(devpath), bytes, device, now.boot_ns)
            });
            events.extend(event);
        }
        self.take_events(events, now)
    }

    /// Measures a disk from now on, when it is a USB disk.
    fn hold(&mut self, message: &Message, from: CountFrom, now: Now) -> Result<(), Dropped> {
        if self.sampler.holds(&message.devpath) {
            // It may be another one at the same path, and the removal of the first was lost: the sample finds it gone.
            self.sample_now(now)?;
        }
        let Some(device) =
            self.devices.above(&message.devpath).filter(|_| !self.sampler.holds(&message.devpath))
        else {
            return Ok(());
        };
        let disk = Disk {
            name: message.name_of_part(),
            vendor: device.vendor.clone(),
            model: device.model.clone(),
            serial: device.serial.clone(),
        };
        match self.sampler.hold(&message.devpath, disk, from, now.boot_ns) {
            Ok(()) => {
                self.mounts_changed = true;
                self.sample_now(now)
            }
            // Its removal is on the way.
            Err(error) if error.is_gone() => Ok(()),
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "a USB disk is not measured");
                let wall_ns = now.wall_ns;
                let gap = Gap {
                    reason: GapReason::UsbDiskNotMeasured,
                    from_wall_ns: wall_ns,
                    to_wall_ns: wall_ns,
                    count: Some(1),
                };
                self.send(UsbOutput::Event { boot_ns: now.boot_ns, event: Event::Gap(gap) })
            }
        }
    }

    fn sample(&mut self) -> Result<(), Dropped> {
        let now = Now::read();
        if self.sampler.is_empty() || !left_of(SAMPLE_PERIOD, self.sampled, now).is_zero() {
            return Ok(());
        }
        self.look_at_sizes(now)?;
        self.sample_now(now)
    }

    fn sample_now(&mut self, now: Now) -> Result<(), Dropped> {
        self.sampled = now;
        self.take_closed();
        let found = self.sampler.sample(now.boot_ns);
        self.send_samples(found, now)?;
        if self.mounted.is_settling() {
            let events = self.mounted.settle(&self.sampler, now.boot_ns);
            self.send_volumes(events, now)?;
            self.tell_usages(now)?;
        }
        Ok(())
    }

    fn send_samples(&mut self, found: Vec<Sampled>, now: Now) -> Result<(), Dropped> {
        for sampled in found {
            match sampled {
                Sampled::Activity { devpath, activity } => {
                    let usage = self.usages.get(&devpath).copied().unwrap_or_default();
                    self.send(UsbOutput::Disk(DiskActivity { usage, ..activity }))?;
                }
                Sampled::Gone { devpath, disk, counted } => {
                    self.take_closed();
                    let events = self.mounted.gone(&devpath, counted);
                    self.usages.remove(&devpath);
                    self.send_volumes(events, now)?;
                    self.record_files();
                    self.send(UsbOutput::DiskGone { boot_ns: now.boot_ns, disk })?;
                }
            }
        }
        Ok(())
    }

    /// Looks at what is mounted, when that may have changed.
    fn check_mounts(&mut self, is_new: VolumeChange) -> Result<(), Dropped> {
        if !std::mem::take(&mut self.mounts_changed) || self.sampler.is_empty() {
            return Ok(());
        }
        let read = match &mut self.mount_list {
            Some(list) => list.read(),
            list => MountList::open().and_then(|opened| list.insert(opened).read()),
        };
        let mounts = match read {
            Ok(mounts) => mounts,
            Err(error) => {
                tracing::error!(%error, "cannot read what is mounted, trying again: file systems on USB disks are not followed");
                self.mount_list = None;
                if !std::mem::replace(&mut self.mounts_refused, true) {
                    self.files_unseen()?;
                }
                return Ok(());
            }
        };
        let refused = mounts.refused > 0;
        if refused && !std::mem::replace(&mut self.mounts_refused, refused) {
            tracing::error!(mounts.refused, "what these mounts are is not known");
            self.files_unseen()?;
        }
        self.mounts_refused = refused;
        // After the list was read: what the disks did until it changed is what they did before.
        let now = Now::read();
        self.sample_now(now)?;
        let is_usb = |devpath: &[u8]| self.sampler.holds(devpath);
        let found = volumes::find(&mounts, &SysBlocks, self.mounted.volumes(), is_usb);
        let events = self.mounted.update(found, is_new, &self.sampler, now.boot_ns);
        self.send_volumes(events, now)?;
        self.record_files();
        self.tell_usages(now)
    }

    /// Lets the files of what is mounted now be recorded.
    fn record_files(&mut self) {
        let Some(recording) = &mut self.recording else { return };
        let volumes = self.mounted.volumes().iter().filter_map(|volume| {
            let (disk, _) = volume.disks.iter().find_map(|devpath| self.sampler.disk(devpath))?;
            let places = volume.places.iter().map(|place| MountPoint {
                mount_id: place.mount_id,
                path: PathBuf::from(OsStr::from_bytes(&place.path)),
            });
            Some(ToRecord { volume: volume.number, places: places.collect(), disk: disk.clone() })
        });
        recording.update(volumes.collect());
    }

    /// Takes in which files were closed after writing.
    fn take_closed(&mut self) {
        let closed = self.recording.iter().flat_map(Recording::closed);
        for (volume, inode, bytes) in closed {
            self.mounted.closed_after_writing(volume, inode, bytes);
        }
    }

    /// Says how disks are used from now on, where that is not what was said last.
    fn tell_usages(&mut self, now: Now) -> Result<(), Dropped> {
        let mut changed = Vec::new();
        for devpath in self.sampler.devpaths() {
            let usage = self.mounted.usage(devpath);
            if self.usages.get(devpath).copied().unwrap_or_default() != usage
                && let Some((disk, _)) = self.sampler.disk(devpath)
            {
                changed.push((devpath.to_vec(), disk.clone(), usage));
            }
        }
        for (devpath, disk, usage) in changed {
            self.usages.insert(devpath, usage);
            self.send(UsbOutput::Disk(DiskActivity {
                disk,
                first_boot_ns: now.boot_ns,
                last_boot_ns: now.boot_ns,
                traffic: Traffic::default(),
                in_flight: false,
                usage,
            }))?;
        }
        Ok(())
    }

    fn send_volumes(&self, events: Vec<UsbVolume>, now: Now) -> Result<(), Dropped> {
        for event in events {
            self.send(UsbOutput::Event { boot_ns: now.boot_ns, event: Event::UsbVolume(event) })?;
        }
        Ok(())
    }

    /// File systems may be mounted on USB disks of which nobody knows here.
    fn files_unseen(&self) -> Result<(), Dropped> {
        let now = Now::read();
        let (reason, wall_ns) = (FilesUnseen::NotWatched, now.wall_ns);
        let unseen = UsbFilesUnseen { reason, from_wall_ns: wall_ns, to_wall_ns: wall_ns, count: None };
        self.send(UsbOutput::Event { boot_ns: now.boot_ns, event: Event::UsbFilesUnseen(unseen) })
    }

    /// Something may have been missed since the last time at which nothing was.
    fn gap(&self, reason: GapReason, now: Now) -> Result<(), Dropped> {
        let from_wall_ns = now.wall_at(self.complete_until.boot_ns);
        let gap = Gap { reason, from_wall_ns, to_wall_ns: now.wall_ns, count: None };
        self.send(UsbOutput::Event { boot_ns: now.boot_ns, event: Event::Gap(gap) })
    }

    fn tell_watching(&mut self, watching: bool) -> Result<(), Dropped> {
        if self.watching == Some(watching) {
            return Ok(());
        }
        self.watching = Some(watching);
        self.send(UsbOutput::Watching(watching))
    }

    fn send(&self, output: UsbOutput) -> Result<(), Dropped> {
        self.outputs.blocking_send(output).map_err(|_| Dropped)
    }
}

/// What is left of `period` since `from`.
fn left_of(period: Duration, from: Now, now: Now) -> Duration {
    period.saturating_sub(Duration::from_nanos(now.boot_ns.saturating_sub(from.boot_ns)))
}
