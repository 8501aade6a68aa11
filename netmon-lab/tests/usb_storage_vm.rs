//! What is copied to and from sticks that QEMU plugs in, through whatever stands between a file system and its disk:
//! `cargo xtask vm`.
//!
//! As in `usb_vm.rs`, the tests ask the machine around them to plug and unplug, and run one after the other.
#![expect(clippy::unwrap_used, reason = "a test that cannot prepare its machine has failed")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_agent::transfers::{Key, MAX_PROBE, Output, Report, Transfers};
use netmon_agent::usb::disks::Stat;
use netmon_agent::usb::{Options, UsbOutput, UsbWatch, watch};
use netmon_common::model::{EndReason, Event, Phase, Traffic, UsbVolume, VolumeChange};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

/// The machine is emulated, on a PC that may be busy; what takes so long does not come.
const PATIENCE_NS: u64 = 90_000_000_000;

const MB: usize = 1_000_000;
const TO_STICK: usize = 20 * MB;
const FROM_STICK: usize = 5 * MB;

/// Asks the machine around this one.
fn ask(request: &str) {
    let mut line = OpenOptions::new().read(true).write(true).open("/dev/ttyS2").unwrap();
    writeln!(line, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(line).read_line(&mut answer).unwrap();
    assert_eq!(answer.trim(), "ok", "{request}");
}

fn run(program: &str, arguments: &[&str]) {
    feed(program, arguments, "");
}

/// Runs a program with some input. No udevd takes part in what device mapper does.
fn feed(program: &str, arguments: &[&str], input: &str) {
    let mut command = Command::new(program);
    command.args(arguments).env("DM_DISABLE_UDEV", "1").stdin(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

fn settle() {
    run("udevadm", &["settle", "-t", "60"]);
}

fn mount_at(device: &str, point: &str, file_system: &str) {
    fs::create_dir_all(point).unwrap();
    mount(device, point, file_system, MountFlags::empty(), None).unwrap();
}

fn umount(point: &str) {
    unmount(point, UnmountFlags::empty()).unwrap();
}

fn random(bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    File::open("/dev/urandom").unwrap().read_exact(&mut content).unwrap();
    content
}

/// One line of what would be in the log.
#[derive(Clone, Debug)]
enum Line {
    Device(Event),
    Volume(UsbVolume),
    Transfer(Report),
    Probed(Traffic),
}

/// The watch and the transfers that come of it, as the agent puts them together.
struct Agent {
    watch: UsbWatch,
    runtime: tokio::runtime::Runtime,
    transfers: Transfers,
    lines: Vec<Line>,
    /// Lines that were waited for.
    seen: usize,
    /// What sticks that are plugged in did so far, by serial number.
    moved: BTreeMap<String, Traffic>,
}

impl Agent {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let watch = watch(Options::default()).unwrap();
        Self {
            watch,
            runtime,
            transfers: Transfers::default(),
            lines: Vec::new(),
            seen: 0,
            moved: BTreeMap::new(),
        }
    }

    fn pump(&mut self) {
        let next = async { tokio::time::timeout(Duration::from_millis(100), self.watch.next()).await };
        if let Ok(output) = self.runtime.block_on(next) {
            match output.expect("the watch is over") {
                UsbOutput::Event { event: Event::UsbVolume(volume), .. } => {
                    self.lines.push(Line::Volume(volume))
                }
                UsbOutput::Event { event, .. } => self.lines.push(Line::Device(event)),
                UsbOutput::Disk(activity) => {
                    let serial = activity.disk.serial.escaped().to_string();
                    if let Some(moved) = self.moved.get_mut(&serial) {
                        *moved += activity.traffic;
                    }
                    self.transfers.disk(activity);
                }
                UsbOutput::DiskGone { disk, .. } => {
                    self.moved.remove(&disk.serial.escaped().to_string());
                    self.transfers.end(&Key::Disk(disk), EndReason::DeviceRemoved);
                }
                UsbOutput::Watching(watching) => assert!(watching),
            }
        }
        self.take();
        self.transfers.handle_timeout(Now::read().boot_ns);
        self.take();
    }

    fn take(&mut self) {
        while let Some(output) = self.transfers.poll() {
            match output {
                Output::Report(report) if report.phase == Phase::Progress => {}
                Output::Report(report) => self.lines.push(Line::Transfer(report)),
                Output::Probed(traffic) => self.lines.push(Line::Probed(traffic)),
                Output::Discarded(traffic) => assert_eq!(traffic, Traffic::default()),
                Output::Overflow(_) => panic!("overflow"),
            }
        }
    }

    /// The next line that is of interest.
    fn find<T>(&mut self, what: &str, wanted: impl Fn(&Line) -> Option<T>) -> T {
        let end_ns = Now::read().boot_ns + PATIENCE_NS;
        loop {
            while let Some(line) = self.lines.get(self.seen) {
                self.seen += 1;
                if let Some(found) = wanted(line) {
                    return found;
                }
            }
            assert!(Now::read().boot_ns < end_ns, "{what} did not come: {:#?}", self.lines);
            self.pump();
        }
    }

    fn volume(&mut self, device: &str, wanted: impl Fn(&VolumeChange) -> bool) -> UsbVolume {
        self.find(device, |line| match line {
            Line::Volume(volume) if volume.device == device.into() && wanted(&volume.change) => {
                Some(volume.clone())
            }
            _ => None,
        })
    }

    fn mounted(&mut self, device: &str) -> UsbVolume {
        self.volume(device, |change| *change == VolumeChange::Mounted)
    }

    fn unmounted(&mut self, device: &str) -> Traffic {
        let volume = self.volume(device, |change| matches!(change, VolumeChange::Unmounted { .. }));
        let VolumeChange::Unmounted { moved } = volume.change else { unreachable!() };
        moved
    }

    fn ended(&mut self) -> Report {
        self.find("the end of a transfer", |line| match line {
            Line::Transfer(report) if matches!(report.phase, Phase::Ended(_)) => Some(report.clone()),
            _ => None,
        })
    }

    /// Until all that the kernel counted has come, and nothing goes on any more.
    fn idle(&mut self) {
        rustix::fs::sync();
        let end_ns = Now::read().boot_ns + PATIENCE_NS;
        while self.transfers.going_on() > 0
            || self.moved.iter().any(|(id, moved)| counted(&disk_of(id)) != *moved)
        {
            assert!(Now::read().boot_ns < end_ns, "{:#?}", self.lines);
            self.pump();
        }
        self.seen = self.lines.len();
    }

    /// Plugs a stick in and returns its disk's name.
    fn plug(&mut self, id: &str, mib: u32) -> String {
        self.moved.insert(id.to_owned(), Traffic::default());
        let before = self.lines.len();
        ask(&format!("plug {id} usb-storage serial={id} size={mib}"));
        self.find("the stick", |line| match line {
            Line::Device(Event::DeviceAdded(device)) if device.serial == id.into() => Some(()),
            _ => None,
        });
        settle();
        // Everybody looks at a new stick, and that is no transfer.
        self.find("probing", |line| match line {
            Line::Probed(traffic) => Some(*traffic),
            _ => None,
        });
        let transfers = self.lines[before..].iter().filter(|line| matches!(line, Line::Transfer(_)));
        assert_eq!(transfers.count(), 0, "{:#?}", self.lines);
        disk_of(id)
    }

    fn unplug(&mut self, id: &str) {
        ask(&format!("unplug {id}"));
        self.find("the removal", |line| match line {
            Line::Device(Event::DeviceRemoved(device)) if device.serial == id.into() => Some(()),
            _ => None,
        });
    }

    /// Every byte that the kernel counted for a disk is in a transfer or in the ledger, and no other byte. Only for
    /// tests with one stick, while nothing goes on.
    fn is_complete(&self, disk: &str) {
        let mut sum = Traffic::default();
        for line in &self.lines {
            match line {
                Line::Transfer(Report { phase: Phase::Ended(_), traffic, .. }) | Line::Probed(traffic) => {
                    sum += *traffic;
                }
                _ => {}
            }
        }
        assert_eq!(sum, counted(disk), "{:#?}", self.lines);
    }
}

/// The disk of the stick with this serial number.
fn disk_of(id: &str) -> String {
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let link = fs::read_link(entry.path()).unwrap();
        let serial = |above| fs::read(Path::new("/sys/block").join(above).join("serial")).ok();
        if link.ancestors().find_map(serial).is_some_and(|serial| serial.trim_ascii() == id.as_bytes()) {
            return entry.file_name().into_string().unwrap();
        }
    }
    panic!("{id} has no disk");
}

fn counted(disk: &str) -> Traffic {
    let stat = Stat::parse(&fs::read(format!("/sys/block/{disk}/stat")).unwrap()).unwrap();
    stat.since(&Stat::default())
}

fn is_about(bytes: u64, expected: usize) {
    let difference = bytes.abs_diff(expected as u64);
    assert!(difference * 20 <= expected as u64, "{bytes} bytes are not within 5 % of {expected}");
}

/// Copies to a fresh file system and back: one transfer for each way, within 5 % of the files and as the kernel counted.
fn copies(agent: &mut Agent, disk: &str, device: &str, point: &str) {
    agent.idle();
    let node = if device.starts_with("dm-") { dm_node(device) } else { format!("/dev/{device}") };
    let mount = |agent: &mut Agent| {
        mount_at(&node, point, "vfat");
        let volume = agent.mounted(device);
        assert_eq!((volume.disk.name, volume.mount_point), (disk.into(), point.into()));
        assert_eq!((volume.file_system, volume.read_only), ("vfat".into(), false));
    };
    mount(agent);
    fs::write(format!("{point}/from"), random(FROM_STICK)).unwrap();
    umount(point);
    agent.unmounted(device);
    agent.idle();

    mount(agent);
    let at_mount = counted(disk);
    fs::write(format!("{point}/to"), random(TO_STICK)).unwrap();
    umount(point);
    let at_unmount = counted(disk);
    let since = |traffic: &Traffic| at_mount.tx_bytes + traffic.tx_bytes;
    assert_eq!(since(&agent.unmounted(device)), at_unmount.tx_bytes, "all of it, and what unmounting wrote");
    let transfer = agent.ended();
    assert_eq!(transfer.phase, Phase::Ended(EndReason::Silence));
    println!("{device}: written {TO_STICK} bytes, transfer {:?}", transfer.traffic);
    is_about(transfer.traffic.tx_bytes, TO_STICK);

    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    mount(agent);
    assert_eq!(fs::read(format!("{point}/from")).unwrap().len(), FROM_STICK);
    umount(point);
    agent.unmounted(device);
    let transfer = agent.ended();
    println!("{device}: read {FROM_STICK} bytes, transfer {:?}", transfer.traffic);
    // The file system below a loop device reads ahead in the image, behind the file in it: 1.9 MB on kernel 6.12.
    let ahead = if device.starts_with("loop") { 2 << 20 } else { 0 };
    let read = transfer.traffic.rx_bytes;
    is_about(read.saturating_sub(ahead).max(read.min(FROM_STICK as u64)), FROM_STICK);
}

fn dm_node(device: &str) -> String {
    let name = fs::read_to_string(format!("/sys/block/{device}/dm/name")).unwrap();
    format!("/dev/mapper/{}", name.trim())
}

fn no_volume_was_pulled_out(agent: &Agent) {
    let pulled =
        |line: &&Line| matches!(line, Line::Volume(UsbVolume { change: VolumeChange::PulledOut { .. }, .. }));
    assert!(agent.lines.iter().find(pulled).is_none(), "{:#?}", agent.lines);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn two_partitions_are_two_volumes_of_one_disk_however_often_they_are_mounted() {
    let mut agent = Agent::start();
    let disk = agent.plug("PARTS", 96);
    let (first, second) = (format!("{disk}1"), format!("{disk}2"));
    feed("sfdisk", &["-q", &format!("/dev/{disk}")], "label: dos\nsize=48MiB,type=c\ntype=c\n");
    settle();
    run("mkfs.fat", &[&format!("/dev/{first}")]);
    run("mkfs.fat", &[&format!("/dev/{second}")]);
    agent.idle();
    mount_at(&format!("/dev/{second}"), "/mnt/b", "vfat");
    agent.mounted(&second);
    copies(&mut agent, &disk, &first, "/mnt/a");

    // Other places are not other volumes, and it is unmounted with the last one.
    mount_at(&format!("/dev/{first}"), "/mnt/a", "vfat");
    agent.mounted(&first);
    let before = agent.lines.len();
    fs::create_dir_all("/mnt/c").unwrap();
    mount_bind("/mnt/a", "/mnt/c").unwrap();
    umount("/mnt/a");
    // What comes of a later mount comes after what would come of the others.
    umount("/mnt/b");
    agent.unmounted(&second);
    umount("/mnt/c");
    agent.unmounted(&first);
    let volumes = agent.lines[before..].iter().filter(|line| matches!(line, Line::Volume(_)));
    assert_eq!(volumes.count(), 2, "{:#?}", agent.lines);
    agent.idle();
    agent.is_complete(&disk);
    agent.unplug("PARTS");
    no_volume_was_pulled_out(&agent);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn an_encrypted_stick_is_one_disk_and_counted_once() {
    let mut agent = Agent::start();
    let disk = agent.plug("LUKS", 96);
    let node = format!("/dev/{disk}");
    let cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-"];
    feed("cryptsetup", &[&["luksFormat", "-q", "--type", "luks2"], &cheap[..], &[&node]].concat(), "secret");
    feed("cryptsetup", &["open", "--key-file", "-", &node, "secret"], "secret");
    run("mkfs.fat", &["/dev/mapper/secret"]);
    copies(&mut agent, &disk, "dm-0", "/mnt/secret");
    run("cryptsetup", &["close", "secret"]);
    agent.idle();
    agent.is_complete(&disk);
    agent.unplug("LUKS");
    no_volume_was_pulled_out(&agent);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_file_on_a_stick_that_is_mounted_lies_on_the_stick() {
    let mut agent = Agent::start();
    let disk = agent.plug("LOOP", 64);
    let node = format!("/dev/{disk}");
    run("mkfs.fat", &[&node]);
    mount_at(&node, "/mnt/outer", "vfat");
    agent.mounted(&disk);
    fs::write("/mnt/outer/image", vec![0; 28 << 20]).unwrap();
    run("modprobe", &["loop"]);
    run("losetup", &["/dev/loop0", "/mnt/outer/image"]);
    run("mkfs.fat", &["/dev/loop0"]);
    copies(&mut agent, &disk, "loop0", "/mnt/inner");
    run("losetup", &["-d", "/dev/loop0"]);
    umount("/mnt/outer");
    agent.unmounted(&disk);
    agent.idle();
    agent.is_complete(&disk);
    agent.unplug("LOOP");
    no_volume_was_pulled_out(&agent);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_volume_group_on_two_sticks_lies_on_both() {
    let mut agent = Agent::start();
    let disks = [agent.plug("VGA", 32), agent.plug("VGB", 32)];
    let nodes = disks.each_ref().map(|disk| format!("/dev/{disk}"));
    let lvm = |arguments: &[&str]| {
        let config = "activation{udev_sync=0 udev_rules=0} devices{obtain_device_list_from_udev=0} \
                      backup{backup=0 archive=0}";
        run("lvm", &[arguments, &["--config", config]].concat());
    };
    lvm(&["pvcreate", &nodes[0], &nodes[1]]);
    lvm(&["vgcreate", "room", &nodes[0], &nodes[1]]);
    lvm(&["lvcreate", "-l", "100%FREE", "-Zn", "-Wn", "-n", "all", "room"]);
    run("mkfs.fat", &["/dev/mapper/room-all"]);
    mount_at("/dev/mapper/room-all", "/mnt/all", "vfat");
    let mut found = [agent.mounted("dm-0").disk.name, agent.mounted("dm-0").disk.name];
    found.sort();
    assert_eq!(found, disks.each_ref().map(|disk| disk.as_str().into()));
    // More than one of them holds.
    fs::write("/mnt/all/file", random(40 * MB)).unwrap();
    umount("/mnt/all");
    let moved = [agent.unmounted("dm-0").tx_bytes, agent.unmounted("dm-0").tx_bytes];
    is_about(moved[0] + moved[1], 40 * MB);
    assert!(moved.iter().all(|bytes| *bytes > 8 << 20), "{moved:?}");
    lvm(&["vgchange", "-an", "room"]);
    agent.idle();
    agent.unplug("VGA");
    agent.unplug("VGB");
    no_volume_was_pulled_out(&agent);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_stick_that_is_pulled_out_during_a_copy_is_said_to_be_and_cuts_its_transfer_off() {
    let mut agent = Agent::start();
    let disk = agent.plug("PULLED", 256);
    let node = format!("/dev/{disk}");
    run("mkfs.fat", &[&node]);
    agent.idle();
    mount_at(&node, "/mnt/pulled", "vfat");
    agent.mounted(&disk);
    let writer = thread::spawn(|| {
        let mut file = File::create("/mnt/pulled/film").unwrap();
        let block = vec![0x5a; 1 << 20];
        // Past the page cache's patience, until the stick is gone or full.
        while file.write_all(&block).and_then(|()| file.sync_data()).is_ok() {}
    });
    agent.find("the transfer", |line| match line {
        Line::Transfer(report) if report.phase == Phase::Started => Some(()),
        _ => None,
    });
    while counted(&disk).tx_bytes < 8 << 20 {
        agent.pump();
    }
    ask("unplug PULLED");
    let pulled = agent.volume(&disk, |change| matches!(change, VolumeChange::PulledOut { .. }));
    let VolumeChange::PulledOut { moved, .. } = pulled.change else { unreachable!() };
    let transfer = agent.ended();
    assert_eq!(transfer.phase, Phase::Ended(EndReason::DeviceRemoved));
    println!("moved while mounted {moved:?}, in the transfer {:?}", transfer.traffic);
    assert!(moved.tx_bytes >= 4 << 20 && transfer.traffic.tx_bytes >= 4 << 20);
    assert!(moved.tx_bytes < 256 << 20, "the stick was full before it was pulled out");
    agent.find("the removal", |line| match line {
        Line::Device(Event::DeviceRemoved(device)) if device.serial == "PULLED".into() => Some(()),
        _ => None,
    });
    writer.join().unwrap();
    // That its mount is still there, and goes now, is nothing new.
    let lines = agent.lines.len();
    unmount("/mnt/pulled", UnmountFlags::DETACH).unwrap();
    agent.idle();
    assert!(agent.lines[lines..].is_empty(), "{:#?}", agent.lines);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn looking_at_a_stick_and_mounting_it_is_no_transfer_and_reading_it_raw_is() {
    let mut agent = Agent::start();
    for (file_system, make) in [("vfat", "mkfs.fat"), ("ext4", "mke2fs")] {
        let id = file_system.to_uppercase();
        let disk = agent.plug(&id, 64);
        let node = format!("/dev/{disk}");
        let arguments: &[&str] = if make == "mke2fs" { &["-q", "-t", "ext4", &node] } else { &[&node] };
        run(make, arguments);
        agent.idle();
        agent.unplug(&id);

        // The same stick again, with a file system on it.
        let begin = agent.lines.len();
        let disk = agent.plug(&id, 64);
        let node = format!("/dev/{disk}");
        mount_at(&node, "/mnt/known", file_system);
        agent.mounted(&disk);
        let mounting = agent.find("what mounting read", |line| match line {
            Line::Probed(traffic) => Some(*traffic),
            _ => None,
        });
        println!("mounting {file_system}: {mounting:?}");
        assert!(mounting.rx_bytes > 0);
        let transfers = agent.lines[begin..].iter().filter(|line| matches!(line, Line::Transfer(_)));
        assert_eq!(transfers.count(), 0, "{:#?}", agent.lines);
        umount("/mnt/known");
        agent.unmounted(&disk);
        agent.idle();
        agent.unplug(&id);
    }

    let disk = agent.plug("RAW", 64);
    let probed = counted(&disk).rx_bytes;
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let mut content = vec![0; 2 * MAX_PROBE as usize];
    File::open(format!("/dev/{disk}")).unwrap().read_exact(&mut content).unwrap();
    let transfer = agent.ended();
    println!("{probed} bytes probed, then {} read raw: {:?}", content.len(), transfer.traffic);
    assert!(transfer.traffic.rx_bytes >= content.len() as u64);
    assert_eq!(probed + transfer.traffic.rx_bytes, counted(&disk).rx_bytes);
    agent.unplug("RAW");
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn what_is_mounted_at_the_start_is_present() {
    let mut before = Agent::start();
    let disk = before.plug("PRESENT", 64);
    let node = format!("/dev/{disk}");
    run("mkfs.fat", &[&node]);
    mount_at(&node, "/mnt/present", "vfat");
    before.mounted(&disk);
    drop(before);

    let mut agent = Agent::start();
    let volume = agent.volume(&disk, |change| *change == VolumeChange::Present);
    assert_eq!(volume.mount_point, "/mnt/present".into());
    fs::write("/mnt/present/file", random(MB)).unwrap();
    // Unmounted although somebody still has a file open.
    let open = File::open("/mnt/present/file").unwrap();
    unmount("/mnt/present", UnmountFlags::DETACH).unwrap();
    rustix::fs::sync();
    let moved = agent.unmounted(&disk);
    assert!(moved.tx_bytes >= MB as u64, "{moved:?}");
    drop(open);
    agent.idle();
    agent.unplug("PRESENT");
    no_volume_was_pulled_out(&agent);
}
