//! What is different with USB disks: they are sampled, the page cache is above them, and everybody looks at a new one.

use netmon_common::model::{EndReason, Opened, Service, Traffic};

use super::{Burst, Key, Output, Path, SILENCE_NS, Through, Transfers};
use crate::usb::disks::{DiskActivity, Usage};

/// That a disk is silent is known by its samples alone, which may come late. When this much later than usual none has
/// come, none will: nobody watches USB any more.
pub const DISK_LATE_NS: u64 = 10_000_000_000;

/// Silence that ends a disk's transfer while the page cache may hold something for it. The kernel writes back in rounds
/// of five seconds (`vm.dirty_writeback_centisecs`, 500 unless somebody changed it; kernel:
/// Documentation/admin-guide/sysctl/vm.rst): what one round leaves comes with the next one, and a copy must not fall
/// apart there. One more second for the disk to begin.
pub const WRITEBACK_SILENCE_NS: u64 = 6_000_000_000;

/// Most bytes read from a disk before its first mount that are no transfer, in all until it is unplugged. The kernel
/// looks for partitions, udev and the desktop for file systems (1.5 MB were measured before a mount), and mounting reads
/// the file system's tables (1.1 MB; more of a large FAT).
pub const MAX_PROBE: u64 = 4 << 20;

/// Most bytes written just before a disk's first mount that are mounting itself: FAT marks itself as in use (one
/// sector), ext4 writes its superblock and the journal's.
pub const MAX_MOUNT_WRITES: u64 = 16 << 10;

/// How the disk of a burst is used.
#[derive(Debug)]
pub(super) struct Use {
    usage: Usage,
    /// The latest sample that found requests in flight: not silence, and not yet anything done.
    busy_ns: u64,
}

impl Use {
    pub(super) fn silent_ns(&self, last_ns: u64) -> u64 {
        let silence = match self.usage {
            Usage::Writable => WRITEBACK_SILENCE_NS,
            Usage::Fresh | Usage::Unwritable => SILENCE_NS,
        };
        last_ns.max(self.busy_ns).saturating_add(silence)
    }
}

impl Transfers {
    /// Takes in what a USB disk did.
    ///
    /// What is read before anything of it is mounted is held back, up to [`MAX_PROBE`], and so are writes up to
    /// [`MAX_MOUNT_WRITES`]. A mount or the end of the burst tells that it was no transfer ([`Output::Probed`]), unless
    /// there were writes and no mount. What is more than that is a transfer, all that was held back included.
    pub fn disk(&mut self, activity: DiskActivity) {
        let DiskActivity { disk, first_boot_ns, last_boot_ns, traffic, in_flight, usage } = activity;
        let path = Path::from(Key::Disk(disk));
        let moved = traffic != Traffic::default();
        let quiet_until_ns = if moved || in_flight { first_boot_ns } else { last_boot_ns };
        if self.bursts.get(&path).is_some_and(|burst| quiet_until_ns >= burst.silent_ns()) {
            self.end_burst(&path, EndReason::Silence);
        }
        // However many hosts somebody talks to: there are few disks (`Sampler::MAX`).
        if (moved || in_flight) && !self.bursts.contains_key(&path) {
            self.bursts.insert(
                path.clone(),
                Burst {
                    announced: None,
                    services: [Service::Storage].into(),
                    opened: Opened::Here,
                    interface: Through::default(),
                    first_ns: first_boot_ns,
                    last_ns: last_boot_ns,
                    traffic: Traffic::default(),
                    disk: Some(Use { usage, busy_ns: 0 }),
                },
            );
        }
        let Some(burst) = self.bursts.get_mut(&path) else { return };
        let Some(on) = &mut burst.disk else { return };
        if in_flight {
            on.busy_ns = on.busy_ns.max(last_boot_ns);
        }
        if moved {
            burst.last_ns = burst.last_ns.max(last_boot_ns);
            burst.traffic += traffic;
        }
        let was = std::mem::replace(&mut on.usage, usage);
        let held = burst.announced.is_none() && was == Usage::Fresh;
        let traffic = burst.traffic;
        if held && usage != Usage::Fresh {
            // Mounted: now it is known what this was.
            self.bursts.remove(&path);
            self.probed(path.key, traffic);
            return;
        }
        let is_probing = held && self.may_be_probing(&path.key, &traffic);
        if !is_probing && !traffic.is_without_payload() {
            self.announce(&path);
        }
    }

    /// Before a burst ends: when it was held back, this decides what it was.
    pub(super) fn end_probing(&mut self, path: &Path, reason: EndReason) {
        if let Some(burst) = self.bursts.get(path)
            && burst.announced.is_none()
            && burst.disk.as_ref().is_some_and(|on| on.usage == Usage::Fresh)
        {
            let traffic = burst.traffic;
            if traffic.tx_bytes > 0 {
                self.announce(path);
            } else {
                self.bursts.remove(path);
                self.probed(path.key.clone(), traffic);
            }
        }
        if reason == EndReason::DeviceRemoved {
            self.probed.remove(&path.key);
        }
    }

    fn may_be_probing(&self, key: &Key, traffic: &Traffic) -> bool {
        let before = self.probed.get(key).copied().unwrap_or_default();
        traffic.tx_bytes <= MAX_MOUNT_WRITES && before.saturating_add(traffic.rx_bytes) <= MAX_PROBE
    }

    fn probed(&mut self, key: Key, traffic: Traffic) {
        if traffic != Traffic::default() {
            let sum = self.probed.entry(key).or_default();
            *sum = sum.saturating_add(traffic.rx_bytes);
            self.outputs.push_back(Output::Probed(traffic));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use netmon_common::model::Disk;
    use netmon_common::raw::Raw;

    use super::super::{Activity, MAX_BURSTS};
    use super::*;

    const MS: u64 = 1_000_000;
    const T0: u64 = 100_000 * MS;
    const MIB: u64 = 1 << 20;

    fn disk() -> Disk {
        let [vendor, model, serial] = std::array::from_fn(|_| Raw::default());
        Disk { name: "sdb".into(), vendor, model, serial }
    }

    /// One disk, told in milliseconds.
    #[derive(Default)]
    struct Told {
        transfers: Transfers,
        usage: Usage,
    }

    impl Told {
        /// A sample 250 ms after the one before.
        fn sample(&mut self, at: u64, read: u64, written: u64, in_flight: bool) {
            let traffic = Traffic {
                tx_bytes: written,
                rx_bytes: read,
                tx_payload: written,
                rx_payload: read,
                tx_packets: written.div_ceil(MIB),
                rx_packets: read.div_ceil(MIB),
            };
            self.transfers.disk(DiskActivity {
                disk: disk(),
                first_boot_ns: T0 + at * MS - 250 * MS,
                last_boot_ns: T0 + at * MS,
                traffic,
                in_flight,
                usage: self.usage,
            });
        }

        fn read(&mut self, at: u64, bytes: u64) {
            self.sample(at, bytes, 0, false);
        }

        fn write(&mut self, at: u64, bytes: u64) {
            self.sample(at, 0, bytes, false);
        }

        fn used(&mut self, at: u64, usage: Usage) {
            self.usage = usage;
            self.sample(at, 0, 0, false);
        }

        fn quiet(&mut self, at: u64) {
            self.sample(at, 0, 0, false);
        }

        fn gone(&mut self) {
            self.transfers.end(&Key::Disk(disk()), EndReason::DeviceRemoved);
            self.usage = Usage::Fresh;
        }

        /// All that was said since, progress left out: what, from, to, bytes read, bytes written.
        fn said(&mut self) -> Vec<String> {
            let ms = |ns: u64| (ns as i64 - T0 as i64) / MS as i64;
            let say = |output| match output {
                Output::Report(r) => {
                    let (from, to, t) = (ms(r.first_ns), ms(r.last_ns), r.traffic);
                    format!("#{} {:?} {from}..{to} {} {}", r.id, r.phase, t.rx_bytes, t.tx_bytes)
                }
                Output::Probed(t) => format!("probed {} {}", t.rx_bytes, t.tx_bytes),
                other => format!("{other:?}"),
            };
            std::iter::from_fn(|| self.transfers.poll())
                .map(say)
                .filter(|said| !said.contains("Progress"))
                .collect()
        }
    }

    #[test]
    fn two_seconds_end_a_transfer_when_nothing_can_be_in_the_page_cache() {
        let mut told = Told { usage: Usage::Unwritable, ..Told::default() };
        told.read(250, MIB);
        told.quiet(250 + 1_999);
        assert_eq!(told.said(), ["#1 Started 0..250 1048576 0"]);
        told.quiet(250 + 2_000);
        assert_eq!(told.said(), ["#1 Ended(Silence) 0..250 1048576 0"]);
    }

    #[test]
    fn while_a_file_system_is_mounted_writable_rounds_of_writeback_belong_together() {
        for (pause, transfers) in [(2_500, 1), (5_250, 1), (5_999, 1), (6_000, 2)] {
            let mut told = Told { usage: Usage::Writable, ..Told::default() };
            told.write(250, MIB);
            told.quiet(250 + pause);
            told.write(250 + pause + 250, MIB);
            told.gone();
            let ended = told.said().iter().filter(|said| said.contains("Ended")).count();
            assert_eq!(ended, transfers, "{pause} ms without I/O");
        }
    }

    #[test]
    fn what_unmounting_writes_belongs_to_the_transfer_which_ends_two_seconds_after_it() {
        let mut told = Told { usage: Usage::Writable, ..Told::default() };
        told.write(250, MIB);
        told.quiet(5_000);
        told.write(5_250, 3 * MIB);
        told.used(5_750, Usage::Unwritable);
        told.quiet(5_250 + 1_999);
        assert_eq!(told.said(), ["#1 Started 0..250 0 1048576"]);
        told.quiet(5_250 + 2_000);
        assert_eq!(told.said(), ["#1 Ended(Silence) 0..5250 0 4194304"]);
    }

    #[test]
    fn requests_in_flight_are_no_silence_and_the_transfer_ends_at_what_was_done() {
        let mut told = Told { usage: Usage::Unwritable, ..Told::default() };
        told.write(250, MIB);
        for at in (500..=10_000).step_by(250) {
            told.sample(at, 0, 0, true);
            told.quiet(at);
        }
        assert_eq!(told.said(), ["#1 Started 0..250 0 1048576"]);
        told.quiet(10_000 + 2_000);
        assert_eq!(told.said(), ["#1 Ended(Silence) 0..250 0 1048576"]);
    }

    #[test]
    fn a_disk_that_is_pulled_out_ends_its_transfer_with_that_reason() {
        let mut told = Told { usage: Usage::Writable, ..Told::default() };
        told.write(250, MIB);
        told.gone();
        assert_eq!(told.said(), ["#1 Started 0..250 0 1048576", "#1 Ended(DeviceRemoved) 0..250 0 1048576"]);
    }

    #[test]
    fn probing_and_mounting_are_no_transfer_and_what_follows_is_without_them() {
        let mut told = Told::default();
        told.read(250, 1_500_000);
        told.quiet(2_250);
        assert_eq!(told.said(), ["probed 1500000 0"]);
        told.sample(8_000, 1_100_000, 512, false);
        told.used(8_000, Usage::Writable);
        assert_eq!(told.said(), ["probed 1100000 512"]);
        told.write(8_250, MIB);
        assert_eq!(told.said(), ["#1 Started 8000..8250 0 1048576"]);
    }

    #[test]
    fn raw_reads_are_a_transfer_with_all_that_was_held_back() {
        let mut told = Told::default();
        told.read(250, MAX_PROBE);
        assert!(told.said().is_empty());
        told.read(500, 512);
        assert_eq!(told.said(), ["#1 Started 0..500 4194816 0"]);
    }

    #[test]
    fn raw_reads_in_small_portions_are_held_back_only_until_the_bound_is_reached_once() {
        let mut told = Told::default();
        for portion in 0..10 {
            told.read(portion * 10_000 + 250, MIB);
            told.quiet(portion * 10_000 + 5_000);
        }
        let said = told.said();
        assert_eq!(said.iter().filter(|said| said.starts_with("probed")).count(), 4);
        assert_eq!(said.iter().filter(|said| said.contains("Ended")).count(), 6);
        // Plugged in again, it is new.
        told.gone();
        told.read(200_000, MIB);
        told.quiet(205_000);
        assert_eq!(told.said(), ["probed 1048576 0"]);
    }

    #[test]
    fn whatever_is_written_without_a_mount_is_a_transfer() {
        let mut told = Told::default();
        told.sample(250, 4096, 512, false);
        told.quiet(2_250);
        let transfer = ["#1 Started 0..250 4096 512", "#1 Ended(Silence) 0..250 4096 512"];
        assert_eq!(told.said(), transfer);
        told.write(10_000, MAX_MOUNT_WRITES + 512);
        assert_eq!(told.said(), ["#2 Started 9750..10000 0 16896"]);
    }

    #[test]
    fn a_transfer_before_the_mount_goes_on_over_it() {
        let mut told = Told::default();
        told.write(250, MIB);
        told.used(500, Usage::Writable);
        told.write(5_000, MIB);
        told.gone();
        let transfer = ["#1 Started 0..250 0 1048576", "#1 Ended(DeviceRemoved) 0..5000 0 2097152"];
        assert_eq!(told.said(), transfer);
    }

    #[test]
    fn what_is_held_back_when_the_agent_stops_or_the_disk_goes_is_not_forgotten() {
        let mut told = Told::default();
        told.read(250, MIB);
        told.transfers.end_all(EndReason::AgentStopped);
        assert_eq!(told.said(), ["probed 1048576 0"]);
        told.write(250, 512);
        told.gone();
        assert_eq!(told.said(), ["#1 Started 0..250 0 512", "#1 Ended(DeviceRemoved) 0..250 0 512"]);
    }

    #[test]
    fn only_samples_tell_that_a_disk_is_silent_until_none_come_any_more() {
        let mut told = Told { usage: Usage::Unwritable, ..Told::default() };
        told.write(250, MIB);
        told.transfers.handle_timeout(T0 + 250 * MS + SILENCE_NS + DISK_LATE_NS - 1);
        told.sample(2_000, 0, MIB, false);
        assert_eq!(told.said(), ["#1 Started 0..250 0 1048576"]);
        told.transfers.handle_timeout(T0 + 2_000 * MS + SILENCE_NS + DISK_LATE_NS);
        assert_eq!(told.said(), ["#1 Ended(Silence) 0..2000 0 2097152"]);
    }

    #[test]
    fn whoever_talks_to_very_many_hosts_hides_no_disk_by_it() {
        let mut told = Told { usage: Usage::Unwritable, ..Told::default() };
        for host in 0..=MAX_BURSTS as u128 {
            told.transfers.activity(Activity {
                key: Key::Lan(IpAddr::V6(Ipv6Addr::from(host))),
                service: Service::Udp(9),
                opened: Opened::Here,
                interface: "eth0".into(),
                first_ns: T0,
                last_ns: T0,
                traffic: Traffic { tx_bytes: 41, tx_payload: 1, tx_packets: 1, ..Traffic::default() },
            });
        }
        assert!(told.said().iter().any(|said| said.starts_with("Overflow")));
        told.write(250, MIB);
        assert_eq!(told.said(), [format!("#{} Started 0..250 0 1048576", MAX_BURSTS + 1)]);
    }

    #[test]
    fn a_change_of_use_alone_is_no_activity() {
        let mut told = Told::default();
        told.used(250, Usage::Writable);
        told.quiet(10_000);
        assert!(told.said().is_empty() && told.transfers.bursts.is_empty());
    }
}
