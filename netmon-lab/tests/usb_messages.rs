//! The USB watch against udev messages as systemd-udevd broadcasts them.
//!
//! Each test runs on a thread with its own network and mount namespace, in which nothing of the host's USB is to be
//! seen. That takes root: run as root, or as anybody under `unshare -Urnm` (where the test of senders without root's
//! uid cannot run: there is no other uid).
#![expect(clippy::unwrap_used, reason = "a test that cannot prepare its room has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::thread;
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_agent::usb::disks::DiskActivity;
use netmon_agent::usb::{Options, UsbOutput, UsbWatch, watch};
use netmon_common::model::{Disk, Event, Gap, GapReason, Traffic, UsbDevice, UsbInterface};
use netmon_common::raw::Raw;
use netmon_lab::udev_inject::{Action, KERNEL, Stick, UDEVD, broadcast, broadcast_to, encode, pretend_udevd};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, set_thread_res_uid, unshare_unsafe};

/// Far beyond what anything here takes; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test in namespaces of its own, with empty `/run` and `/sys`.
fn in_namespaces(test: impl FnOnce() + Send + 'static) {
    let enter = || -> std::io::Result<()> {
        // SAFETY: no file descriptor table is unshared, so no descriptor of another thread changes its meaning.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS)? };
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        for directory in ["/run", "/sys"] {
            mount("tmpfs", directory, "tmpfs", MountFlags::empty(), None)?;
        }
        Ok(())
    };
    let outcome = thread::spawn(move || {
        enter().expect("this test needs root: run it as root or under `unshare -Urnm`");
        test();
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

fn make_sysfs() {
    for directory in ["/sys/bus", "/sys/class", "/sys/devices"] {
        fs::create_dir(directory).unwrap();
    }
}

/// A watch and what it says, one after the other.
struct Watched {
    watch: UsbWatch,
    runtime: tokio::runtime::Runtime,
}

impl Watched {
    fn start(options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        Self { watch: watch(options).unwrap(), runtime }
    }

    /// udevd seems to run, no device is present, and the watch has begun.
    fn begun() -> Self {
        make_sysfs();
        pretend_udevd().unwrap();
        let mut watched = Self::start(Options::default());
        assert_eq!(watched.next(), UsbOutput::Watching(true));
        watched
    }

    fn next(&mut self) -> UsbOutput {
        self.next_within(PATIENCE).expect("the watch said nothing")
    }

    fn next_within(&mut self, limit: Duration) -> Option<UsbOutput> {
        let next = async { tokio::time::timeout(limit, self.watch.next()).await };
        self.runtime.block_on(next).ok().map(|output| output.expect("the watch is over"))
    }

    fn next_event(&mut self) -> (u64, Event) {
        match self.next() {
            UsbOutput::Event { boot_ns, event } => (boot_ns, event),
            other => panic!("not an event: {other:?}"),
        }
    }
}

fn stick(port: usize) -> Stick {
    Stick {
        devpath: format!("/devices/pci0000:00/0000:00:14.0/usb2/2-{port}"),
        serial: format!("S{port}").into(),
        ..Stick::default()
    }
}

fn expected(stick: &Stick) -> UsbDevice {
    UsbDevice {
        devpath: Raw::new(&stick.devpath),
        bus: stick.bus,
        number: stick.number,
        vendor_id: stick.vendor_id,
        product_id: stick.product_id,
        vendor: Raw::new(&stick.vendor),
        model: Raw::new(&stick.model),
        serial: Raw::new(&stick.serial),
        interfaces: vec![UsbInterface { class: 8, subclass: 6, protocol: 0x50 }],
    }
}

#[test]
fn plugging_and_unplugging_are_seen_within_a_second_with_names_and_serial() {
    in_namespaces(|| {
        let mut watched = Watched::begun();
        let stick = Stick { model: b"Data Traveler\n\x1b[2J\\\xff".into(), ..Stick::default() };
        for (action, event) in [
            (Action::Add, Event::DeviceAdded(expected(&stick))),
            (Action::Remove, Event::DeviceRemoved(expected(&stick))),
        ] {
            let injected = Now::read().boot_ns;
            stick.inject(action).unwrap();
            let (seen, found) = watched.next_event();
            assert_eq!(found, event);
            assert!(seen >= injected && Now::read().boot_ns - injected < 1_000_000_000);
        }
    });
}

#[test]
fn a_thousand_devices_at_once_are_all_seen_once() {
    in_namespaces(|| {
        let mut watched = Watched::begun();
        let sticks: Vec<_> = (0..1_000).map(stick).collect();
        for action in [Action::Add, Action::Remove] {
            for stick in &sticks {
                stick.inject(action).unwrap();
            }
            for stick in &sticks {
                let device = expected(stick);
                let event = match action {
                    Action::Add => Event::DeviceAdded(device),
                    Action::Remove => Event::DeviceRemoved(device),
                };
                assert_eq!(watched.next_event().1, event);
            }
        }
        let last = stick(1_000);
        last.inject(Action::Add).unwrap();
        assert_eq!(watched.next_event().1, Event::DeviceAdded(expected(&last)));
    });
}

#[test]
fn eight_thousand_messages_wait_while_nobody_takes_them() {
    in_namespaces(|| {
        make_sysfs();
        pretend_udevd().unwrap();
        let mut watched = Watched::start(Options { queue: 1, ..Options::default() });
        assert_eq!(watched.next(), UsbOutput::Watching(true));
        let stick = stick(1);
        for _ in 0..4_000 {
            stick.inject(Action::Add).unwrap();
            stick.inject(Action::Remove).unwrap();
        }
        for _ in 0..4_000 {
            assert_eq!(watched.next_event().1, Event::DeviceAdded(expected(&stick)));
            assert_eq!(watched.next_event().1, Event::DeviceRemoved(expected(&stick)));
        }
    });
}

/// As the kernel itself would announce a stick.
fn kernel_message(devpath: &str) -> Vec<u8> {
    let properties = format!(
        "ACTION=add\0DEVPATH={devpath}\0SUBSYSTEM=usb\0DEVTYPE=usb_device\0PRODUCT=951/1666/110\0SEQNUM=1\0"
    );
    format!("add@{devpath}\0{properties}").into_bytes()
}

#[test]
fn what_neither_udevd_nor_the_kernel_sent_is_ignored() {
    in_namespaces(|| {
        let mut watched = Watched::begun();
        let [forged, genuine] = [stick(1), stick(2)];
        let message = forged.messages(Action::Add).remove(0);
        // A sender that is not root. (The effective user stays root, else the kernel would not let the message pass.)
        let kept = rustix::process::Uid::ROOT;
        let nobody = rustix::process::Uid::from_raw(65_534);
        set_thread_res_uid(nobody, kept, kept)
            .expect("another uid: this test needs root outside user namespaces");
        broadcast_to(UDEVD, &message).unwrap();
        set_thread_res_uid(kept, kept, kept).unwrap();
        // The kernel's group is not the one that is listened to.
        broadcast_to(KERNEL, &message).unwrap();
        broadcast_to(KERNEL, &kernel_message(&forged.devpath)).unwrap();
        genuine.inject(Action::Add).unwrap();
        assert_eq!(watched.next_event().1, Event::DeviceAdded(expected(&genuine)));
    });
}

#[test]
fn other_devices_make_no_events() {
    in_namespaces(|| {
        let mut watched = Watched::begun();
        for (subsystem, devtype) in
            [("usb", "usb_interface"), ("block", "partition"), ("block", "disk"), ("net", "")]
        {
            let properties = [
                ("ACTION", "add"),
                ("DEVPATH", "/devices/pci0000:00/0000:00:17.0/ata1/x"),
                ("SUBSYSTEM", subsystem),
                ("DEVTYPE", devtype),
                ("SEQNUM", "1"),
            ];
            broadcast(&encode(&properties)).unwrap();
        }
        let hub = Stick { interfaces: ":090000:".into(), ..stick(1) };
        hub.inject(Action::Add).unwrap();
        hub.inject(Action::Remove).unwrap();
        stick(2).inject(Action::Add).unwrap();
        assert_eq!(watched.next_event().1, Event::DeviceAdded(expected(&stick(2))));
    });
}

#[test]
fn lost_messages_are_reported_and_the_devices_listed_anew() {
    in_namespaces(|| {
        make_sysfs();
        pretend_udevd().unwrap();
        // Nobody takes the outputs while messages come, and there is little room for them.
        let mut watched =
            Watched::start(Options { receive_buffer: 64 << 10, queue: 1, ..Options::default() });
        assert_eq!(watched.next(), UsbOutput::Watching(true));
        let before = Now::read();
        for port in 0..2_000 {
            stick(port).inject(Action::Add).unwrap();
        }
        let mut plugged = BTreeSet::new();
        let gap = loop {
            match watched.next_event().1 {
                Event::DeviceAdded(device) => assert!(plugged.insert(device.devpath), "reported twice"),
                Event::Gap(gap) => break gap,
                other => panic!("{other:?}"),
            }
        };
        let Gap { reason, from_wall_ns, to_wall_ns, count } = gap;
        assert_eq!((reason, count), (GapReason::UsbMessagesLost, None));
        assert!(from_wall_ns <= to_wall_ns && to_wall_ns >= before.wall_ns);
        assert!(!plugged.is_empty() && plugged.len() < 2_000);
        // The list says that none of them is there.
        while !plugged.is_empty() {
            match watched.next_event().1 {
                Event::DeviceRemoved(device) => assert!(plugged.remove(&device.devpath)),
                other => panic!("{other:?}"),
            }
        }
        let after = stick(5_000);
        after.inject(Action::Add).unwrap();
        assert_eq!(watched.next_event().1, Event::DeviceAdded(expected(&after)));
    });
}

#[test]
fn a_watch_that_is_dropped_ends_although_nobody_took_its_outputs() {
    in_namespaces(|| {
        make_sysfs();
        pretend_udevd().unwrap();
        let mut watched = Watched::start(Options { queue: 1, ..Options::default() });
        assert_eq!(watched.next(), UsbOutput::Watching(true));
        for port in 0..10 {
            stick(port).inject(Action::Add).unwrap();
        }
        drop(watched);
    });
}

#[test]
fn without_udevd_the_kernel_is_listened_to_until_udevd_comes() {
    in_namespaces(|| {
        make_sysfs();
        let mut watched = Watched::start(Options::default());
        assert_eq!(watched.next(), UsbOutput::Watching(true));
        // Not from the kernel, although in its group.
        broadcast_to(KERNEL, &kernel_message(&stick(1).devpath)).unwrap();
        pretend_udevd().unwrap();
        // A stick that is announced again and again is reported once.
        let end = Now::read().boot_ns + PATIENCE.as_nanos() as u64;
        let first = loop {
            stick(2).inject(Action::Add).unwrap();
            if let Some(output) = watched.next_within(Duration::from_millis(50)) {
                break output;
            }
            assert!(Now::read().boot_ns < end, "udevd was not noticed");
        };
        let UsbOutput::Event { event, .. } = first else { panic!("{first:?}") };
        assert_eq!(event, Event::DeviceAdded(expected(&stick(2))));
        // udevd goes: what was plugged in meanwhile is unknown, and said to be so.
        fs::remove_file("/run/udev/control").unwrap();
        let (_, Event::Gap(gap)) = watched.next_event() else { panic!("no gap") };
        assert_eq!(gap.reason, GapReason::UsbMessagesLost);
    });
}

#[test]
fn a_watch_that_cannot_list_says_so_and_begins_when_it_can() {
    in_namespaces(|| {
        pretend_udevd().unwrap();
        let mut watched = Watched::start(Options::default());
        let (_, Event::Gap(gap)) = watched.next_event() else { panic!("no gap") };
        assert_eq!(gap.reason, GapReason::UsbNotWatched);
        assert_eq!(watched.next(), UsbOutput::Watching(false));
        make_sysfs();
        let (_, Event::Gap(whole)) = watched.next_event() else { panic!("no gap") };
        assert_eq!(whole.reason, GapReason::UsbNotWatched);
        assert!(whole.to_wall_ns > gap.to_wall_ns);
        assert_eq!(watched.next(), UsbOutput::Watching(true));
    });
}

#[test]
fn a_usb_disk_is_measured_from_its_first_sector_until_it_is_gone() {
    in_namespaces(|| {
        let mut watched = Watched::begun();
        let stick = Stick { disk: Some("sdb".into()), ..stick(1) };
        let directory = format!("/sys{}", stick.disk_devpath().unwrap());
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&directory).unwrap();
        let counters = format!("{directory}/stat");
        fs::write(&counters, "3 0 24 9 0 0 0 0 0 1 1\n").unwrap();
        let disk = Disk {
            name: "sdb".into(),
            vendor: Raw::new(&stick.vendor),
            model: Raw::new(&stick.model),
            serial: Raw::new(&stick.serial),
        };

        stick.inject(Action::Add).unwrap();
        assert_eq!(watched.next_event().1, Event::DeviceAdded(expected(&stick)));
        let probed = activity(&mut watched);
        let bytes = 24 * 512;
        assert_eq!(probed.disk, disk);
        assert_eq!(
            probed.traffic,
            Traffic { rx_bytes: bytes, rx_payload: bytes, rx_packets: 3, ..Traffic::default() }
        );

        fs::write(&counters, "3 0 24 9 7 1 4096 5 1 2 2\n").unwrap();
        let written = activity(&mut watched);
        let bytes = 4096 * 512;
        assert_eq!(
            written.traffic,
            Traffic { tx_bytes: bytes, tx_payload: bytes, tx_packets: 7, ..Traffic::default() }
        );
        assert!(written.first_boot_ns >= probed.last_boot_ns && written.last_boot_ns > written.first_boot_ns);
        // One request still waits for the disk: it is busy, although nothing was completed.
        assert_eq!(activity(&mut watched).traffic, Traffic::default());

        stick.inject(Action::Remove).unwrap();
        let gone = loop {
            match watched.next() {
                UsbOutput::Disk(_) => {}
                other => break other,
            }
        };
        let UsbOutput::DiskGone { disk: gone, .. } = gone else { panic!("{gone:?}") };
        assert_eq!(gone, disk);
        assert_eq!(watched.next_event().1, Event::DeviceRemoved(expected(&stick)));
    });
}

#[test]
fn a_usb_disk_that_cannot_be_measured_is_said_to_be_so() {
    in_namespaces(|| {
        let mut watched = Watched::begun();
        let stick = Stick { disk: Some("sdb".into()), ..stick(1) };
        let directory = format!("/sys{}", stick.disk_devpath().unwrap());
        fs::create_dir_all(&directory).unwrap();
        fs::write(format!("{directory}/stat"), "no counters").unwrap();
        stick.inject(Action::Add).unwrap();
        assert_eq!(watched.next_event().1, Event::DeviceAdded(expected(&stick)));
        let (_, Event::Gap(gap)) = watched.next_event() else { panic!("no gap") };
        assert_eq!((gap.reason, gap.count), (GapReason::UsbDiskNotMeasured, Some(1)));
    });
}

/// What the disk does next; that it is quiet, which is said at every sample, is passed over.
fn activity(watched: &mut Watched) -> DiskActivity {
    loop {
        match watched.next() {
            UsbOutput::Disk(quiet) if quiet.traffic == Traffic::default() && !quiet.in_flight => {}
            UsbOutput::Disk(activity) => return activity,
            other => panic!("not a disk's activity: {other:?}"),
        }
    }
}
