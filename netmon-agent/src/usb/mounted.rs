//! From mount to unmount: what is worth an event, and what the disk did meanwhile.
//!
//! Pure: told what is mounted ([`find`](super::volumes::find)), what the disks counted, and what time it is.
//!
//! A file system leaves the kernel's list of mounts before it is unmounted: what the page cache holds is written
//! afterwards. So it counts as unmounted once its own block device has been quiet for [`SETTLED_NS`]. That holds for one
//! that was unmounted lazily, too.

use std::collections::{BTreeMap, BTreeSet};

use netmon_common::model::{Disk, UsbVolume, VolumeChange};
use netmon_common::raw::Raw;

use super::disks::{Stat, Usage};
use super::mounts::DeviceNumber;
use super::volumes::Volume;

/// Quiet that shows that nothing more is written by unmounting: its requests follow each other without a pause. Two
/// samples see it.
pub const SETTLED_NS: u64 = 450_000_000;

/// Quiet after which a disk that is gone is believed to have been complete: one sample without anything.
const QUIET_NS: u64 = 200_000_000;

/// Most files of one volume whose sizes are remembered for [`VolumeChange::PulledOut`]; of more, less is known to be lost.
const MAX_FILES: usize = 4096;

/// File systems that compress what is written, or let files share it: a file may grow by more bytes than are written, and
/// nothing follows from its size.
const SHARING: [&[u8]; 4] = [b"btrfs", b"bcachefs", b"f2fs", b"xfs"];

/// What the kernel counts.
pub trait Counters {
    /// A USB disk by its kernel device path, and what it has completed by the latest sample; `None`: it is not measured.
    fn disk(&self, devpath: &[u8]) -> Option<(&Disk, Stat)>;

    /// What a block device has completed until now; `None`: it is gone.
    fn device(&self, number: DeviceNumber) -> Option<Stat>;
}

/// The file systems on USB disks that are mounted, each once for every disk that it lies on.
#[derive(Debug, Default)]
pub struct Mounted {
    volumes: Vec<Volume>,
    sessions: BTreeMap<Key, Session>,
    /// Disks of which a file system was mounted since they came.
    used: BTreeSet<Vec<u8>>,
}

/// Kernel device path of the disk, number of the volume.
type Key = (Vec<u8>, DeviceNumber);

#[derive(Debug)]
struct Session {
    disk: Disk,
    device: Raw,
    file_system: Raw,
    mount_point: Raw,
    read_only: bool,
    /// The disk's counters when it was mounted.
    at_mount: Stat,
    /// Sizes of the files that were closed after writing, by inode.
    closed: BTreeMap<u64, u64>,
    leaving: Option<Leaving>,
}

/// A file system that left the list of mounts.
#[derive(Debug)]
struct Leaving {
    /// Its own device's counters at the latest look.
    seen: Option<Stat>,
    /// When they were first seen to be as they are.
    since_ns: u64,
    /// When they were last seen to be as they are.
    until_ns: u64,
}

impl Mounted {
    /// What is mounted now, for whoever watches files.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// True while something is about to be unmounted, so that [`Mounted::settle`] has something to look at.
    pub fn is_settling(&self) -> bool {
        self.sessions.values().any(|session| session.leaving.is_some())
    }

    /// How a disk is used.
    pub fn usage(&self, devpath: &[u8]) -> Usage {
        let mut sessions = self.sessions.iter().filter(|((disk, _), _)| disk == devpath);
        if sessions.any(|(_, session)| !session.read_only) {
            return Usage::Writable;
        }
        if self.used.contains(devpath) { Usage::Unwritable } else { Usage::Fresh }
    }

    /// Takes in what is mounted as of now. The disks were sampled just before, so that what follows counts as done
    /// while it was mounted. `change` of what is new: [`VolumeChange::Present`] at the start, then
    /// [`VolumeChange::Mounted`].
    pub fn update(
        &mut self,
        found: Vec<Volume>,
        change: VolumeChange,
        counters: &impl Counters,
        now_ns: u64,
    ) -> Vec<UsbVolume> {
        let present: BTreeSet<Key> = found.iter().flat_map(keys).collect();
        let mut events = Vec::new();
        self.sessions.retain(|key, session| {
            if present.contains(key) {
                // It came back before it was settled.
                let back = session.leaving.is_some();
                events.extend(back.then(|| session.unmounted(counters.disk(&key.0))));
                return !back;
            }
            if session.read_only {
                events.push(session.unmounted(counters.disk(&key.0)));
                return false;
            }
            let seen = counters.device(key.1);
            session.leaving.get_or_insert(Leaving { seen, since_ns: now_ns, until_ns: now_ns });
            true
        });
        for volume in &found {
            for key in keys(volume) {
                if let Some(session) = self.sessions.get_mut(&key) {
                    session.read_only = volume.read_only;
                    continue;
                }
                let Some((disk, at_mount)) = counters.disk(&key.0) else { continue };
                let session = Session {
                    disk: disk.clone(),
                    device: volume.device.clone(),
                    file_system: volume.file_system.clone(),
                    mount_point: volume.places.first().map(|place| Raw::new(&place.path)).unwrap_or_default(),
                    read_only: volume.read_only,
                    at_mount,
                    closed: BTreeMap::new(),
                    leaving: None,
                };
                events.push(session.event(change));
                self.used.insert(key.0.clone());
                self.sessions.insert(key, session);
            }
        }
        self.volumes = found;
        events
    }

    /// Looks at what is about to be unmounted, after the disks were sampled.
    pub fn settle(&mut self, counters: &impl Counters, now_ns: u64) -> Vec<UsbVolume> {
        let mut events = Vec::new();
        self.sessions.retain(|(disk, number), session| {
            let Some(leaving) = &mut session.leaving else { return true };
            let seen = counters.device(*number);
            if seen != leaving.seen || seen.is_some_and(|stat| stat.in_flight > 0) {
                (leaving.seen, leaving.since_ns) = (seen, now_ns);
            }
            leaving.until_ns = now_ns;
            let settled = leaving.quiet_ns() >= SETTLED_NS;
            events.extend(settled.then(|| session.unmounted(counters.disk(disk))));
            !settled
        });
        events
    }

    /// A disk is gone; `counted` is what it had completed by its last sample.
    pub fn gone(&mut self, devpath: &[u8], counted: Stat) -> Vec<UsbVolume> {
        let mut events = Vec::new();
        self.sessions.retain(|(disk, _), session| {
            let is_it = disk == devpath;
            events.extend(is_it.then(|| session.ended_by_removal(counted)));
            !is_it
        });
        self.used.remove(devpath);
        for volume in &mut self.volumes {
            volume.disks.retain(|disk| disk != devpath);
        }
        self.volumes.retain(|volume| !volume.disks.is_empty());
        events
    }

    /// A file on a volume was closed after it had been written to; `bytes`: of what it holds, what must have been
    /// written since the volume was mounted, and not more. The last word on an inode counts.
    pub fn closed_after_writing(&mut self, number: DeviceNumber, inode: u64, bytes: u64) {
        for ((_, of), session) in &mut self.sessions {
            if *of == number && (session.closed.len() < MAX_FILES || session.closed.contains_key(&inode)) {
                session.closed.insert(inode, bytes);
            }
        }
    }
}

fn keys(volume: &Volume) -> impl Iterator<Item = Key> {
    volume.disks.iter().map(|disk| (disk.clone(), volume.number))
}

impl Session {
    fn event(&self, change: VolumeChange) -> UsbVolume {
        UsbVolume {
            disk: self.disk.clone(),
            device: self.device.clone(),
            file_system: self.file_system.clone(),
            mount_point: self.mount_point.clone(),
            read_only: self.read_only,
            change,
        }
    }

    fn unmounted(&self, disk: Option<(&Disk, Stat)>) -> UsbVolume {
        let counted = disk.map_or(self.at_mount, |(_, counted)| counted);
        self.event(VolumeChange::Unmounted { moved: counted.since(&self.at_mount) })
    }

    fn ended_by_removal(&self, counted: Stat) -> UsbVolume {
        let moved = counted.since(&self.at_mount);
        if self.leaving.as_ref().is_some_and(|leaving| leaving.quiet_ns() >= QUIET_NS) {
            return self.event(VolumeChange::Unmounted { moved });
        }
        let closed = self.closed.values().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
        let as_large = !SHARING.contains(&self.file_system.as_bytes());
        let unwritten = if as_large { closed.saturating_sub(moved.tx_bytes) } else { 0 };
        self.event(VolumeChange::PulledOut { moved, unwritten })
    }
}

impl Leaving {
    fn quiet_ns(&self) -> u64 {
        self.until_ns.saturating_sub(self.since_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::super::volumes::Place;
    use super::*;

    const MS: u64 = 1_000_000;
    const MIB: u64 = 1 << 20;

    /// Counters out of tables: disks by name, devices by minor number.
    #[derive(Default)]
    struct Table {
        disks: BTreeMap<Vec<u8>, (Disk, Stat)>,
        devices: BTreeMap<u32, Stat>,
    }

    impl Table {
        fn new(disks: &[&str]) -> Self {
            let mut table = Self::default();
            for name in disks {
                let [vendor, model, serial] = std::array::from_fn(|_| Raw::default());
                let disk = Disk { name: Raw::from(*name), vendor, model, serial };
                table.disks.insert(name.as_bytes().to_vec(), (disk, Stat::default()));
            }
            table
        }

        /// A device, and with it the disk, completes bytes.
        fn write(&mut self, disk: &str, minor: u32, bytes: u64) {
            let device = self.devices.entry(minor).or_default();
            for stat in [&mut self.disks.get_mut(disk.as_bytes()).unwrap().1, device] {
                stat.writes += 1;
                stat.written_sectors += bytes / 512;
            }
        }

        fn counted(&self, disk: &str) -> Stat {
            self.disks[disk.as_bytes()].1
        }
    }

    impl Counters for Table {
        fn disk(&self, devpath: &[u8]) -> Option<(&Disk, Stat)> {
            self.disks.get(devpath).map(|(disk, stat)| (disk, *stat))
        }

        fn device(&self, number: DeviceNumber) -> Option<Stat> {
            self.devices.get(&number.minor).copied()
        }
    }

    fn number(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 8, minor }
    }

    fn volume(minor: u32, disks: &[&str]) -> Volume {
        Volume {
            number: number(minor),
            device: Raw::new(format!("part{minor}")),
            file_system: "vfat".into(),
            read_only: false,
            places: vec![Place { mount_id: 1, path: b"/media/A".into() }],
            disks: disks.iter().map(|disk| disk.as_bytes().to_vec()).collect(),
        }
    }

    fn shown(events: Vec<UsbVolume>) -> Vec<String> {
        let show = |event: UsbVolume| {
            let change = match event.change {
                VolumeChange::Present => "present".to_owned(),
                VolumeChange::Mounted => "mounted".to_owned(),
                VolumeChange::Unmounted { moved } => format!("unmounted {}", moved.tx_bytes),
                VolumeChange::PulledOut { moved, unwritten } => {
                    format!("pulled out {} {unwritten}", moved.tx_bytes)
                }
            };
            format!("{} on {}: {change}", event.device.escaped(), event.disk.name.escaped())
        };
        events.into_iter().map(show).collect()
    }

    fn mount(mounted: &mut Mounted, table: &Table, found: &[Volume], now: u64) -> Vec<String> {
        shown(mounted.update(found.to_vec(), VolumeChange::Mounted, table, now * MS))
    }

    #[test]
    fn what_unmounting_writes_belongs_to_what_moved_while_it_was_mounted() {
        let mut table = Table::new(&["sdb"]);
        let mut mounted = Mounted::default();
        table.write("sdb", 1, 4096);
        assert_eq!(mount(&mut mounted, &table, &[volume(1, &["sdb"])], 0), ["part1 on sdb: mounted"]);
        assert!(mount(&mut mounted, &table, &[volume(1, &["sdb"])], 10).is_empty(), "once");
        table.write("sdb", 1, MIB);
        assert!(mount(&mut mounted, &table, &[], 1_000).is_empty());
        assert_eq!(mounted.usage(b"sdb"), Usage::Writable);
        table.write("sdb", 1, 2 * MIB);
        assert!(mounted.settle(&table, 1_250 * MS).is_empty());
        assert!(mounted.settle(&table, 1_500 * MS).is_empty());
        assert_eq!(
            shown(mounted.settle(&table, 1_750 * MS)),
            [format!("part1 on sdb: unmounted {}", 3 * MIB)]
        );
        assert_eq!((mounted.usage(b"sdb"), mounted.is_settling()), (Usage::Unwritable, false));
    }

    #[test]
    fn requests_in_flight_are_not_quiet() {
        let mut table = Table::new(&["sdb"]);
        let mut mounted = Mounted::default();
        mount(&mut mounted, &table, &[volume(1, &["sdb"])], 0);
        table.devices.insert(1, Stat { in_flight: 1, ..Stat::default() });
        mount(&mut mounted, &table, &[], 0);
        assert!(mounted.settle(&table, 5_000 * MS).is_empty());
        table.devices.insert(1, Stat::default());
        assert!(mounted.settle(&table, 5_250 * MS).is_empty());
        assert_eq!(shown(mounted.settle(&table, 5_750 * MS)), ["part1 on sdb: unmounted 0"]);
    }

    #[test]
    fn another_partition_that_is_busy_does_not_hold_an_unmount_up() {
        let mut table = Table::new(&["sdb"]);
        let mut mounted = Mounted::default();
        mount(&mut mounted, &table, &[volume(1, &["sdb"]), volume(2, &["sdb"])], 0);
        mount(&mut mounted, &table, &[volume(2, &["sdb"])], 0);
        table.write("sdb", 2, MIB);
        assert_eq!(
            shown(mounted.settle(&table, 500 * MS)),
            [format!("part1 on sdb: unmounted {MIB}")],
            "what moved is the whole disk's"
        );
        assert_eq!(mounted.usage(b"sdb"), Usage::Writable);
    }

    #[test]
    fn a_disk_pulled_out_tells_of_every_volume_and_what_cannot_be_on_it() {
        let mut table = Table::new(&["sdb", "sdc"]);
        let mut mounted = Mounted::default();
        let volumes = [volume(1, &["sdb"]), volume(2, &["sdb"]), volume(3, &["sdb", "sdc"])];
        assert_eq!(mount(&mut mounted, &table, &volumes, 0).len(), 4);
        mounted.closed_after_writing(number(1), 7, 10 * MIB);
        mounted.closed_after_writing(number(1), 7, 4 * MIB);
        mounted.closed_after_writing(number(1), 8, MIB);
        mounted.closed_after_writing(number(2), 7, 512);
        table.write("sdb", 1, 2 * MIB);
        let pulled = |device, unwritten: u64| format!("{device} on sdb: pulled out {} {unwritten}", 2 * MIB);
        assert_eq!(
            shown(mounted.gone(b"sdb", table.counted("sdb"))),
            [pulled("part1", 3 * MIB), pulled("part2", 0), pulled("part3", 0)]
        );
        assert_eq!(mounted.volumes().iter().map(|volume| volume.number.minor).collect::<Vec<_>>(), [3]);
        assert!(mounted.gone(b"sdb", table.counted("sdb")).is_empty());
        assert_eq!((mounted.usage(b"sdb"), mounted.usage(b"sdc")), (Usage::Fresh, Usage::Writable));
    }

    #[test]
    fn where_files_may_share_their_contents_nothing_follows_from_their_sizes() {
        for (file_system, lost) in [("vfat", MIB), ("ext4", MIB), ("btrfs", 0), ("xfs", 0)] {
            let table = Table::new(&["sdb"]);
            let mut mounted = Mounted::default();
            mount(
                &mut mounted,
                &table,
                &[Volume { file_system: file_system.into(), ..volume(1, &["sdb"]) }],
                0,
            );
            mounted.closed_after_writing(number(1), 7, MIB);
            let told = shown(mounted.gone(b"sdb", table.counted("sdb")));
            assert_eq!(told, [format!("part1 on sdb: pulled out 0 {lost}")], "{file_system}");
        }
    }

    #[test]
    fn a_disk_that_goes_while_it_is_being_unmounted_was_pulled_out_unless_it_was_quiet() {
        for (quiet, expected) in [(0, "pulled out"), (100, "pulled out"), (250, "unmounted")] {
            let table = Table::new(&["sdb"]);
            let mut mounted = Mounted::default();
            mount(&mut mounted, &table, &[volume(1, &["sdb"])], 0);
            mount(&mut mounted, &table, &[], 1_000);
            mounted.settle(&table, (1_000 + quiet) * MS);
            let events = shown(mounted.gone(b"sdb", table.counted("sdb")));
            assert!(events[0].contains(expected), "{quiet} ms: {events:?}");
        }
    }

    #[test]
    fn what_nothing_can_be_written_to_is_unmounted_at_once() {
        let table = Table::new(&["sdb"]);
        let mut mounted = Mounted::default();
        let volume = Volume { read_only: true, ..volume(1, &["sdb"]) };
        let present = mounted.update(vec![volume], VolumeChange::Present, &table, 0);
        assert_eq!(shown(present), ["part1 on sdb: present"]);
        assert_eq!(mounted.usage(b"sdb"), Usage::Unwritable);
        assert_eq!(mount(&mut mounted, &table, &[], 1), ["part1 on sdb: unmounted 0"]);
    }

    #[test]
    fn mounted_again_before_it_was_settled_is_unmounted_and_mounted() {
        let table = Table::new(&["sdb"]);
        let mut mounted = Mounted::default();
        mount(&mut mounted, &table, &[volume(1, &["sdb"])], 0);
        mount(&mut mounted, &table, &[], 100);
        assert_eq!(
            mount(&mut mounted, &table, &[volume(1, &["sdb"])], 200),
            ["part1 on sdb: unmounted 0", "part1 on sdb: mounted"]
        );
    }

    #[test]
    fn files_are_remembered_up_to_a_bound() {
        let table = Table::new(&["sdb"]);
        let mut mounted = Mounted::default();
        mount(&mut mounted, &table, &[volume(1, &["sdb"])], 0);
        for inode in 0..=MAX_FILES as u64 {
            mounted.closed_after_writing(number(1), inode, 1);
        }
        let expected = format!("part1 on sdb: pulled out 0 {MAX_FILES}");
        assert_eq!(shown(mounted.gone(b"sdb", Stat::default())), [expected]);
    }
}
