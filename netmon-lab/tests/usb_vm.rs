//! The USB watch against real kernels, a real udevd and sticks that QEMU plugs in: `cargo xtask vm`.
//!
//! The tests ask the machine around them to plug and unplug, by a line on the second serial port, and change what is
//! mounted: they run in a virtual machine of their own, one after the other.
#![expect(clippy::unwrap_used, reason = "a test that cannot prepare its machine has failed")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_agent::usb::disks::Stat;
use netmon_agent::usb::{Options, UsbOutput, UsbWatch, watch};
use netmon_common::model::{Disk, Event, GapReason, Traffic, UsbDevice, UsbInterface};
use netmon_common::raw::Raw;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// The machine is emulated, on a PC that may be busy; what takes so long does not come.
const PATIENCE: Duration = Duration::from_secs(60);

const STORAGE: UsbInterface = UsbInterface { class: 8, subclass: 6, protocol: 0x50 };

/// Asks the machine around this one.
fn ask(request: &str) {
    let mut line = OpenOptions::new().read(true).write(true).open("/dev/ttyS2").unwrap();
    writeln!(line, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(line).read_line(&mut answer).unwrap();
    assert_eq!(answer.trim(), "ok", "{request}");
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

struct Watched {
    watch: UsbWatch,
    runtime: tokio::runtime::Runtime,
    /// What the disks did so far, all together.
    moved: Traffic,
}

impl Watched {
    /// Starts to watch; returns the devices that were there.
    fn start() -> (Self, Vec<UsbDevice>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let watch = watch(Options::default()).unwrap();
        let mut watched = Self { watch, runtime, moved: Traffic::default() };
        let mut present = Vec::new();
        loop {
            match watched.next() {
                UsbOutput::Event { event: Event::DevicePresent(device), .. } => present.push(device),
                UsbOutput::Disk(_) => {}
                UsbOutput::Watching(true) => return (watched, present),
                other => panic!("{other:?}"),
            }
        }
    }

    fn next(&mut self) -> UsbOutput {
        let next = async { tokio::time::timeout(PATIENCE, self.watch.next()).await };
        let output = self.runtime.block_on(next).expect("the watch said nothing").expect("the watch is over");
        if let UsbOutput::Disk(activity) = &output {
            self.moved += activity.traffic;
        }
        output
    }

    /// The next event of a device; what disks do is only summed up.
    fn next_event(&mut self) -> Event {
        loop {
            match self.next() {
                // What is mounted is what usb_storage_vm.rs looks at.
                UsbOutput::Event { event: Event::UsbVolume(_), .. } => {}
                UsbOutput::Event { event, .. } => return event,
                UsbOutput::Disk(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn plugged(&mut self) -> UsbDevice {
        match self.next_event() {
            Event::DeviceAdded(device) => device,
            other => panic!("not plugged in: {other:?}"),
        }
    }

    /// The disk of a stick, as soon as it does something.
    fn active_disk(&mut self, serial: &str) -> Disk {
        loop {
            match self.next() {
                UsbOutput::Disk(activity) if activity.disk.serial == serial.into() => return activity.disk,
                UsbOutput::Disk(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Both lines of an unplugged stick, in either order: the kernel's counters may end before its message comes.
    fn unplugged(&mut self) -> (Disk, UsbDevice) {
        let (mut gone, mut removed) = (None, None);
        while gone.is_none() || removed.is_none() {
            match self.next() {
                UsbOutput::DiskGone { disk, .. } => assert!(gone.replace(disk).is_none()),
                UsbOutput::Event { event: Event::DeviceRemoved(device), .. } => {
                    assert!(removed.replace(device).is_none());
                }
                UsbOutput::Disk(_) | UsbOutput::Event { event: Event::UsbVolume(_), .. } => {}
                other => panic!("{other:?}"),
            }
        }
        (gone.unwrap(), removed.unwrap())
    }
}

fn is_stick(device: &UsbDevice, serial: &str) {
    assert_eq!((device.vendor_id, device.product_id), (0x46f4, 0x0001), "QEMU's IDs");
    assert_eq!([&device.vendor, &device.model], [&Raw::from("QEMU"), &Raw::from("QEMU USB HARDDRIVE")]);
    assert_eq!(device.serial, serial.into());
    assert_eq!(device.interfaces, [STORAGE]);
    assert!(device.bus > 0 && device.number > 0);
}

fn is_disk_of(disk: &Disk, device: &UsbDevice) {
    assert_eq!(
        [&disk.vendor, &disk.model, &disk.serial],
        [&device.vendor, &device.model, &device.serial],
        "the disk is known by the stick's names"
    );
}

fn name(disk: &Disk) -> String {
    String::from_utf8(disk.name.as_bytes().to_vec()).unwrap()
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_stick_that_is_there_at_the_start_is_listed_and_its_removal_is_seen() {
    let (mut before, _) = Watched::start();
    ask("plug p1 usb-storage serial=PRESENT1");
    before.plugged();
    before.active_disk("PRESENT1");
    drop(before);

    let (mut watched, present) = Watched::start();
    assert_eq!(present.len(), 1, "hubs are not listed: {present:?}");
    is_stick(&present[0], "PRESENT1");
    ask("unplug p1");
    let (gone, removed) = watched.unplugged();
    assert_eq!(removed, present[0]);
    is_disk_of(&gone, &removed);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_copy_to_a_stick_and_back_is_counted_as_the_kernel_counts_it() {
    const SIZE: usize = 20_000_000;
    let (mut watched, present) = Watched::start();
    assert!(present.is_empty(), "{present:?}");
    ask("plug a1 usb-storage serial=A1 size=64");
    let device = watched.plugged();
    is_stick(&device, "A1");
    let disk = watched.active_disk("A1");
    is_disk_of(&disk, &device);
    let node = format!("/dev/{}", name(&disk));

    run("mkdosfs", &[&node]);
    mount(&node, "/mnt", "vfat", MountFlags::empty(), None).unwrap();
    let mut content = vec![0; SIZE];
    File::open("/dev/urandom").unwrap().read_exact(&mut content).unwrap();
    let mut file = File::create("/mnt/copy").unwrap();
    file.write_all(&content).unwrap();
    file.sync_all().unwrap();
    drop(file);
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert!(fs::read("/mnt/copy").unwrap() == content, "the stick holds something else");
    unmount("/mnt", UnmountFlags::empty()).unwrap();
    rustix::fs::sync();

    // All that the kernel counted has to arrive, and no more than that.
    let counted = |stat: Stat| (stat.read_sectors * 512, stat.written_sectors * 512, stat.reads, stat.writes);
    let moved =
        |traffic: &Traffic| (traffic.rx_bytes, traffic.tx_bytes, traffic.rx_packets, traffic.tx_packets);
    let counters = format!("/sys/block/{}/stat", name(&disk));
    let kernel = loop {
        let kernel = counted(Stat::parse(&fs::read(&counters).unwrap()).unwrap());
        if moved(&watched.moved) == kernel {
            break kernel;
        }
        assert!(
            watched.moved.rx_bytes <= kernel.0 && watched.moved.tx_bytes <= kernel.1,
            "more than the kernel counted"
        );
        watched.next();
    };
    println!("the kernel counted {kernel:?} (bytes read, written, requests read, written)");
    assert!(kernel.0 >= SIZE as u64 && kernel.1 >= SIZE as u64);
    assert_eq!((watched.moved.rx_payload, watched.moved.tx_payload), (kernel.0, kernel.1));

    ask("unplug a1");
    let (gone, removed) = watched.unplugged();
    assert_eq!((gone, removed), (disk, device));
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_stick_that_is_pulled_out_while_it_is_written_to_is_seen_to_be_gone() {
    let (mut watched, _) = Watched::start();
    ask("plug pulled usb-storage serial=PULLED size=256");
    let device = watched.plugged();
    let disk = watched.active_disk("PULLED");
    let before = watched.moved.tx_bytes;
    let node = format!("/dev/{}", name(&disk));
    let writer = thread::spawn(move || {
        let mut file = OpenOptions::new().write(true).open(node).unwrap();
        let block = vec![0x5a; 1 << 20];
        // Past the page cache's patience, until the stick is gone or full.
        while file.write_all(&block).and_then(|()| file.sync_data()).is_ok() {}
    });
    while watched.moved.tx_bytes - before < 4 << 20 {
        watched.next();
    }
    ask("unplug pulled");
    assert_eq!(watched.unplugged(), (disk, device));
    writer.join().unwrap();
    assert!(watched.moved.tx_bytes < 256 << 20, "the stick was full before it was pulled out");
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn the_same_stick_plugged_in_again_is_another_device_with_the_same_serial() {
    let (mut watched, _) = Watched::start();
    let mut numbers = Vec::new();
    for _ in 0..3 {
        let asked = Now::read().boot_ns;
        ask("plug again usb-storage serial=AGAIN");
        let device = watched.plugged();
        println!("seen {} ms after the request to plug it in", (Now::read().boot_ns - asked) / 1_000_000);
        is_stick(&device, "AGAIN");
        numbers.push(device.number);
        watched.active_disk("AGAIN");
        ask("unplug again");
        assert_eq!(watched.unplugged().1, device);
    }
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_keyboard_is_seen_and_moves_no_bytes() {
    let (mut watched, _) = Watched::start();
    ask("plug k1 usb-kbd");
    let keyboard = watched.plugged();
    assert_eq!(keyboard.interfaces, [UsbInterface { class: 3, subclass: 1, protocol: 1 }]);
    assert_eq!(keyboard.model, "QEMU USB Keyboard".into());
    ask("unplug k1");
    assert_eq!(watched.next_event(), Event::DeviceRemoved(keyboard));
    assert_eq!(watched.moved, Traffic::default());
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn without_udevd_the_kernel_tells_and_sysfs_names() {
    let control = Path::new("/run/udev/control");
    let aside = Path::new("/run/udev/control.aside");
    fs::rename(control, aside).unwrap();
    let (mut watched, _) = Watched::start();
    ask("plug n1 usb-storage serial=NOUDEV1");
    let device = watched.plugged();
    is_stick(&device, "NOUDEV1");
    let disk = watched.active_disk("NOUDEV1");
    is_disk_of(&disk, &device);

    // udevd comes; nothing is lost and nothing reported twice, and the next stick is its to tell.
    fs::rename(aside, control).unwrap();
    ask("plug n2 usb-storage serial=NOUDEV2");
    is_stick(&watched.plugged(), "NOUDEV2");
    watched.active_disk("NOUDEV2");
    ask("unplug n1");
    assert_eq!(watched.unplugged(), (disk, device));
    ask("unplug n2");
    watched.unplugged();

    // udevd goes, and the watch says that it may have missed something.
    fs::rename(control, aside).unwrap();
    let Event::Gap(gap) = watched.next_event() else { panic!("no gap") };
    assert_eq!(gap.reason, GapReason::UsbMessagesLost);
    fs::rename(aside, control).unwrap();
}
