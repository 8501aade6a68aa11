//! What the kernel says of files on USB disks: its events, paths, and what processes are.

use netmon_agent::clock::Now;
use netmon_agent::usb::files::{BURST, FileEvent, FileId, Files, Place, RATE};
use netmon_agent::usb::metadata::{LENGTH, Metadata, parse};
use netmon_agent::usb::mounts::DeviceNumber;
use netmon_agent::usb::processes;
use netmon_common::model::{Disk, Event};

use crate::input::Input;
use crate::usb::is_recorded;

/// A buffer of events, a path and the text of `/proc/PID/status`, again and again, each with its length in front of it; each
/// event of a buffer is one of that path by that process, some time after the one before.
///
/// No descriptor comes out twice of the same bytes; every event is a record that fits and a line; there are no more of them than
/// the rate allows, and at the end nothing waits.
pub fn usb_files(data: &[u8]) {
    let mut input = Input(data);
    let mut files = Files::default();
    let volume = DeviceNumber { major: 8, minor: 17 };
    files.watch(volume, disk());
    let (mut now, mut told) = (Now { boot_ns: 1, wall_ns: 1_700_000_000_000_000_000 }, 0);
    let began_ns = now.boot_ns;
    while !input.is_empty() {
        let (buffer, path, status) = (input.block(), input.block(), input.block());
        let events: Vec<_> = parse(buffer).collect();
        assert!(events.len() <= buffer.len().div_ceil(LENGTH));
        let who = processes::parse(status);
        for event in events {
            let passed = u64::from(input.u16()) * 100_000;
            now = Now { boot_ns: now.boot_ns + passed, wall_ns: now.wall_ns + passed as i64 };
            match event {
                Ok(Metadata::File { descriptor, pid, happened }) => {
                    assert!(descriptor >= 0);
                    let file = FileId { volume, device: 0, inode: u64::from(input.byte()) };
                    let bytes = u64::from(input.u32());
                    let place = Some(Place::new(path, input.byte() == 1));
                    let changed_wall_ns = now.wall_ns - i64::from(input.u32());
                    let event = FileEvent {
                        file,
                        pid,
                        happened,
                        bytes,
                        allocated: bytes,
                        changed_wall_ns,
                        place,
                        who: who.clone(),
                    };
                    let grown = files.take(event, &now);
                    assert!(grown.is_none_or(|grown| grown <= bytes));
                }
                Ok(Metadata::NoFile) => files.unopened(1, &now),
                Ok(Metadata::Overflow) => files.lost(volume, now.wall_ns, &now),
                Err(_) => {}
            }
            files.handle_timeout(&now);
            assert!(files.due_ns().is_none_or(|due_ns| due_ns > now.boot_ns));
            told += tell(&mut files);
        }
    }
    files.end(&now);
    told += tell(&mut files);
    assert_eq!(files.due_ns(), None);
    let seconds = (now.boot_ns - began_ns) / 1_000_000_000;
    assert!(told <= BURST + (seconds + 1) * RATE, "{told} in {seconds} s");
}

/// How many files were named.
fn tell(files: &mut Files) -> u64 {
    let mut named = 0;
    while let Some(event) = files.poll() {
        named += u64::from(matches!(event, Event::UsbFile(_)));
        is_recorded(event);
    }
    named
}

fn disk() -> Disk {
    Disk { name: "sdb".into(), vendor: "SanDisk".into(), model: "Ultra".into(), serial: "4C53".into() }
}
