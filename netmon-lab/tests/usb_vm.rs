//! The USB watch against real kernels, a real udevd and sticks that QEMU plugs in: `cargo xtask vm`.
//!
//! The tests ask the machine around them to plug and unplug, by a line on the second serial port, and change what is
//! mounted: they run in a virtual machine of their own, one after the other.
#![expect(clippy::unwrap_used, reason = "a test that cannot prepare its machine has failed")]

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_agent::usb::disks::Stat;
use netmon_agent::usb::{Options, UsbOutput, UsbWatch, watch};
use netmon_common::model::{
    Disk, Event, Function, GapReason, Traffic, UsbDevice, UsbFunction, UsbInterface, UsbNetwork,
};
use netmon_common::raw::Raw;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

#[path = "usb_vm/phone.rs"]
mod phone;

use phone::Phone;

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
    /// What the kernel made of devices, and nobody asked for yet.
    functions: VecDeque<UsbFunction>,
}

impl Watched {
    /// Starts to watch; returns the devices that were there.
    fn start() -> (Self, Vec<UsbDevice>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let watch = watch(Options::default()).unwrap();
        let mut watched = Self { watch, runtime, moved: Traffic::default(), functions: VecDeque::new() };
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
        loop {
            match self.take() {
                UsbOutput::Event { event: Event::UsbFunction(function), .. } => {
                    self.functions.push_back(function);
                }
                output => return output,
            }
        }
    }

    fn take(&mut self) -> UsbOutput {
        let next = async { tokio::time::timeout(PATIENCE, self.watch.next()).await };
        let output = self.runtime.block_on(next).unwrap_or_else(|_| {
            panic!("the watch said nothing more; it had said {:?}", self.functions);
        });
        let output = output.expect("the watch is over");
        if let UsbOutput::Disk(activity) = &output {
            self.moved += activity.traffic;
        }
        output
    }

    /// What the kernel made of a device next.
    fn function(&mut self) -> UsbFunction {
        loop {
            if let Some(function) = self.functions.pop_front() {
                return function;
            }
            match self.take() {
                UsbOutput::Event { event: Event::UsbFunction(function), .. } => return function,
                UsbOutput::Disk(_) => {}
                other => panic!("{other:?}"),
            }
        }
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

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_phone_that_shows_its_photos_is_a_device_without_bytes() {
    let (mut watched, _) = Watched::start();
    ask("plug m1 usb-mtp serial=PHOTOS");
    let phone = watched.plugged();
    assert_eq!(phone.interfaces, [UsbInterface::STILL_IMAGE]);
    assert_eq!(phone.serial, "PHOTOS".into());
    ask("unplug m1");
    assert_eq!(watched.next_event(), Event::DeviceRemoved(phone));
    assert_eq!((watched.moved, watched.functions.len()), (Traffic::default(), 0));
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_serial_adapter_is_a_port_with_a_name() {
    let (mut watched, _) = Watched::start();
    ask("plug t1 usb-serial serial=LINE");
    let device = watched.plugged();
    assert_eq!(
        watched.function(),
        UsbFunction { device: device.clone(), function: Function::Serial { tty: "ttyUSB0".into() } }
    );
    drop(watched);

    // It is told again to whoever comes later.
    let (mut watched, present) = Watched::start();
    assert_eq!(present, std::slice::from_ref(&device));
    assert_eq!(watched.function().function, Function::Serial { tty: "ttyUSB0".into() });
    ask("unplug t1");
    assert_eq!(watched.next_event(), Event::DeviceRemoved(device));
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_hub_is_not_told_and_what_is_behind_it_is() {
    let (mut watched, _) = Watched::start();
    ask("plug h1 usb-hub port=1");
    ask("plug s1 usb-storage port=1.2 serial=BEHIND");
    let stick = watched.plugged();
    is_stick(&stick, "BEHIND");
    assert!(stick.devpath.escaped().to_string().ends_with("/1-1/1-1.2"), "{stick:?}");
    watched.active_disk("BEHIND");
    ask("unplug s1");
    assert_eq!(watched.unplugged().1, stick);
    ask("unplug h1");
    ask("plug k1 usb-kbd");
    assert_eq!(watched.plugged().model, "QEMU USB Keyboard".into());
    ask("unplug k1");
    watched.next_event();
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn each_disk_of_a_device_is_told_with_its_size() {
    for (driver, serial) in [("usb-uas", "UAS"), ("usb-bot", "BOT")] {
        let (mut watched, _) = Watched::start();
        ask(&format!("plug many {driver} serial={serial} luns=2 size=32"));
        let device = watched.plugged();
        let mut told = [watched.function(), watched.function()];
        told.sort_by_key(|told| format!("{:?}", told.function));
        for (told, name) in told.into_iter().zip(["sda", "sdb"]) {
            let disk = Function::Disk { name: name.into(), bytes: 32 << 20 };
            assert_eq!(told, UsbFunction { device: device.clone(), function: disk }, "{driver}");
        }
        ask("unplug many");
        let mut gone = Vec::new();
        let removed = loop {
            match watched.next() {
                UsbOutput::DiskGone { disk, .. } => gone.push(name(&disk)),
                UsbOutput::Event { event: Event::DeviceRemoved(device), .. } => break device,
                UsbOutput::Disk(_) => {}
                other => panic!("{other:?}"),
            }
        };
        gone.sort();
        assert_eq!((removed, gone), (device, vec!["sda".to_owned(), "sdb".to_owned()]), "{driver}");
        assert_eq!(watched.functions, []);
    }
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_phone_is_one_device_with_several_functions_each_told_once() {
    let phone = Phone::new();
    let (mut watched, _) = Watched::start();
    phone.plug();
    let device = watched.plugged();
    assert_eq!([&device.vendor, &device.model], [&Raw::from("Google"), &Raw::from("Pixel 7")]);
    assert_eq!((device.serial.clone(), device.vendor_id), ("28091FDH2000AB".into(), 0x18d1));
    let mut told: Vec<_> = (0..4).map(|_| watched.function()).collect();
    assert!(told.iter().all(|told| told.device == device), "{told:?}");
    let mut take = |is_it: fn(&Function) -> bool| {
        told.remove(told.iter().position(|told| is_it(&told.function)).unwrap()).function
    };
    let network = take(|function| matches!(function, Function::Network { .. }));
    let Function::Network { interface, kind: UsbNetwork::Phone } = network else { panic!("{network:?}") };
    assert_eq!(
        take(|function| matches!(function, Function::Serial { .. })),
        Function::Serial { tty: "ttyACM0".into() }
    );
    let disk = |name: &str, bytes| Function::Disk { name: name.into(), bytes };
    let full = take(|function| matches!(function, Function::Disk { bytes: 1.., .. }));
    let Function::Disk { name: slot, bytes: 8_388_608 } = full else { panic!("{full:?}") };
    let Function::Disk { name: other, bytes: 0 } = told.remove(0).function else { panic!("no empty slot") };

    // Renamed, as udev's rules do it, or somebody by hand.
    run("ip", &["link", "set", &interface.escaped().to_string(), "down"]);
    run("ip", &["link", "set", &interface.escaped().to_string(), "name", "phone0"]);
    let renamed = Function::Network { interface: "phone0".into(), kind: UsbNetwork::Phone };
    assert_eq!(watched.function().function, renamed);

    // A card is taken out, and another one is put in.
    let node = format!("/dev/{}", slot.escaped());
    phone.put_in(0, None);
    let look = || {
        // The kernel learns of a medium when somebody opens the disk.
        let _ = File::open(&node);
    };
    look();
    assert_eq!(watched.function().function, disk(&slot.escaped().to_string(), 0));
    phone.put_in(0, Some(16 << 20));
    look();
    assert_eq!(watched.function().function, disk(&slot.escaped().to_string(), 16 << 20));
    assert_ne!(slot, other);

    // A port reset, and other drivers for a moment: the same device, and nothing of it is news but the interface, which has
    // its first name again.
    phone.reset(&device);
    phone.rebind(&device);
    phone.unplug();
    loop {
        match watched.next() {
            UsbOutput::Event { event: Event::DeviceRemoved(removed), .. } => {
                assert_eq!(removed, device);
                break;
            }
            UsbOutput::Disk(_) | UsbOutput::DiskGone { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    // Its first name, or the next one, where that was not free yet; and where it was about to go again when it was looked at, it
    // had no driver any more to know a phone by.
    let is_network = |told: &UsbFunction| matches!(&told.function, Function::Network { interface, .. } if interface.as_bytes().starts_with(b"usb"));
    assert!(
        watched.functions.iter().all(is_network) && watched.functions.len() <= 2,
        "{:?}",
        watched.functions
    );
    assert!(interface.as_bytes().starts_with(b"usb"));
}
