//! What the kernel's list of mounts says, most of which whoever mounts has chosen.

use netmon_agent::usb::disks::Stat;
use netmon_agent::usb::mounted::{Counters, Mounted};
use netmon_agent::usb::mounts::{DeviceNumber, Mounts};
use netmon_agent::usb::stack::{Block, Blocks, LiesOn};
use netmon_agent::usb::volumes::find;
use netmon_common::model::{Disk, Event, VolumeChange};

use crate::usb::is_recorded;

/// Every event is a record that fits and a line; the same list again tells nothing new; nothing stays when nothing is
/// mounted.
pub fn mounts(text: &[u8], disk: &Disk) {
    let pc = Pc(disk);
    let mounts = Mounts::parse(text);
    assert!(mounts.list.len() <= Mounts::MAX);
    let mut mounted = Mounted::default();
    let found = find(&mounts, &pc, mounted.volumes(), |_| true);
    let new = mounted.update(found.clone(), VolumeChange::Mounted, &pc, 0);
    assert_eq!(new.len(), found.iter().map(|volume| volume.disks.len()).sum::<usize>());
    new.into_iter().for_each(|volume| is_recorded(Event::UsbVolume(volume)));
    assert_eq!(find(&mounts, &pc, mounted.volumes(), |_| true), found);
    assert_eq!(mounted.update(found.clone(), VolumeChange::Mounted, &pc, 1), []);
    mounted.update(Vec::new(), VolumeChange::Mounted, &pc, 2);
    mounted.settle(&pc, u64::MAX);
    assert!(mounted.volumes().is_empty() && !mounted.is_settling());
}

/// Disks and partitions (major 8), and what stands on them: dm (253), which may go round in circles, and loop (7).
struct Pc<'a>(&'a Disk);

impl Blocks for Pc<'_> {
    fn block(&self, number: DeviceNumber) -> Option<Block> {
        let DeviceNumber { major, minor } = number;
        let lies_on = match (major, minor % 16) {
            (8, 0) => LiesOn::Nothing,
            (8, part) => LiesOn::Devices(vec![DeviceNumber { major, minor: minor - part }]),
            (253, part) => LiesOn::Devices(vec![
                DeviceNumber { major: 8, minor: part },
                DeviceNumber { major, minor: minor / 2 },
            ]),
            (7, part) => LiesOn::File(format!("/media/{part}/image").into_bytes()),
            _ => return None,
        };
        Some(Block { devpath: format!("/devices/block/{number}").into_bytes(), lies_on })
    }

    fn number_of(&self, path: &[u8]) -> Option<DeviceNumber> {
        DeviceNumber::parse(path.strip_prefix(b"/dev/")?)
    }
}

impl Counters for Pc<'_> {
    fn disk(&self, _: &[u8]) -> Option<(&Disk, Stat)> {
        Some((self.0, Stat::default()))
    }

    fn device(&self, _: DeviceNumber) -> Option<Stat> {
        None
    }
}
