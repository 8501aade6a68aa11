//! Which files are recorded, by real file systems, real programs and the kernel's own events. Needs root.
//!
//! The file systems are on no USB disk here: what is mounted is told by hand. `usb_files_vm` has sticks.
#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_agent::usb::UsbOutput;
use netmon_agent::usb::fanotify::{Group, MountPoint, mark};
use netmon_agent::usb::files::{BURST, RATE};
use netmon_agent::usb::marker::{Marker, serve};
use netmon_agent::usb::mounts::DeviceNumber;
use netmon_agent::usb::recording::{FileNames, Recording, ToRecord};
use netmon_agent::usb::sysfs::MountList;
use netmon_common::model::{Disk, Event, FileAccess, FilesUnseen, UsbFile};
use netmon_lab::{netmon, wait};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(20);
/// Nobody on this machine.
const STUDENT: u32 = 54_321;

/// A file system of this type that everybody may write to, unmounted when it is dropped.
struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    fn new(kind: &str) -> Self {
        let mounted = Self { directory: tempfile::tempdir().unwrap() };
        mounted.mount(kind);
        mounted
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("stick")
    }

    fn mount(&self, kind: &str) {
        let (image, path) = (self.directory.path().join("image"), self.path());
        fs::create_dir_all(&path).unwrap();
        // Students must get to it.
        fs::set_permissions(self.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        match kind {
            "tmpfs" => mount("stick", &path, "tmpfs", MountFlags::empty(), None).unwrap(),
            _ => {
                if !image.exists() {
                    File::create(&image).unwrap().set_len(64 << 20).unwrap();
                    run("mkfs.ext4", &["-q".as_ref(), image.as_os_str()]);
                }
                run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_os_str(), path.as_os_str()]);
            }
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    }

    fn to_record(&self) -> ToRecord {
        to_record(&self.path())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

/// What is mounted at a place, as this thread's mount namespace has it.
fn to_record(path: &Path) -> ToRecord {
    let mounts = fs::read("/proc/thread-self/mountinfo").unwrap();
    let mounts = netmon_agent::usb::mounts::Mounts::parse(&mounts);
    let mount = mounts.list.iter().rfind(|mount| mount.point == path.as_os_str().as_bytes()).unwrap();
    ToRecord {
        volume: mount.device,
        places: vec![MountPoint { mount_id: mount.id, path: path.to_owned() }],
        disk: disk(),
    }
}

fn disk() -> Disk {
    Disk { name: "sdb".into(), vendor: "Lab".into(), model: "Stick".into(), serial: "1".into() }
}

fn run(program: &str, arguments: &[&OsStr]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// By another process: what this one does is the agent's own and ignored.
fn put(file: &Path) {
    run("sh", &["-c".as_ref(), "printf x > \"$0\"".as_ref(), file.as_os_str()]);
}

fn as_student(script: &str, directory: &Path) {
    let uid = format!("--reuid={STUDENT}");
    let status = Command::new("setpriv")
        .args([&uid, "--regid=54321", "--clear-groups", "sh", "-c", script])
        .current_dir(directory)
        .status()
        .unwrap();
    assert!(status.success(), "{script}: {status}");
}

struct Recorded {
    // Dropped first: the recording's thread may wait for room.
    outputs: mpsc::Receiver<UsbOutput>,
    recording: Option<Recording>,
    runtime: tokio::runtime::Runtime,
}

impl Recorded {
    fn start(names: FileNames, queue: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (sender, outputs) = mpsc::channel(queue);
        Self { recording: Some(Recording::start(names, sender).unwrap()), outputs, runtime }
    }

    /// The next file, of `program`. It lives for some milliseconds: on a PC with much else to do it may be gone before anybody
    /// could look, and then nobody is told; so it is run again.
    fn file_of(&mut self, program: &str, run: impl Fn()) -> UsbFile {
        for _ in 0..20 {
            run();
            let file = self.file();
            if file.program == program.into() {
                return file;
            }
            let known = (file.program.is_empty(), file.uid);
            assert!(known == (true, None) || file.program == "sh".into(), "never guessed: {file:?}");
        }
        panic!("{program} was never seen");
    }

    /// Watches this and nothing else, from the next statement on.
    fn of(to_record: ToRecord) -> Self {
        Self::with(FileNames::Own, to_record)
    }

    fn with(names: FileNames, to_record: ToRecord) -> Self {
        let mut recorded = Self::start(names, 64);
        let path = to_record.places[0].path.clone();
        recorded.update(vec![to_record]);
        // It works on it once the first file is seen.
        wait::until(PATIENCE, "the watch to begin", || {
            put(&path.join("first"));
            recorded.try_next(Duration::from_millis(1_500))
        })
        .unwrap();
        fs::remove_file(path.join("first")).unwrap();
        recorded
    }

    fn update(&mut self, mounted: Vec<ToRecord>) {
        self.recording.as_mut().unwrap().update(mounted);
    }

    fn try_next(&mut self, limit: Duration) -> Option<Event> {
        let next = async { tokio::time::timeout(limit, self.outputs.recv()).await };
        match self.runtime.block_on(next).ok()?.expect("the recording is over") {
            UsbOutput::Event { event, .. } => Some(event),
            other => panic!("{other:?}"),
        }
    }

    fn next(&mut self) -> Event {
        self.try_next(PATIENCE).expect("nothing was recorded")
    }

    /// The next file; nothing else comes.
    fn file(&mut self) -> UsbFile {
        match self.next() {
            Event::UsbFile(file) => file,
            other => panic!("{other:?}"),
        }
    }

    /// By how much the file that was closed last has grown at least.
    fn grown(&self) -> u64 {
        self.recording.as_ref().unwrap().closed().last().unwrap().2
    }

    /// Ends it; what it had still to say.
    fn end(mut self) -> Vec<Event> {
        let recording = self.recording.take();
        let end = std::thread::spawn(move || drop(recording));
        let mut events = Vec::new();
        while let Some(output) = self.outputs.blocking_recv() {
            let UsbOutput::Event { event, .. } = output else { panic!("{output:?}") };
            events.push(event);
        }
        end.join().unwrap();
        events
    }
}

fn names(events: &[Event]) -> Vec<String> {
    let name = |event: &Event| match event {
        Event::UsbFile(file) => Some(file.name.escaped().to_string()),
        _ => None,
    };
    events.iter().filter_map(name).collect()
}

/// Does what no shell does, in a process of its own: runs [`child`].
fn as_child(what: &str, directory: &Path) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env("NETMON_TEST_CHILD", what)
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// See [`as_child`]; does nothing where the tests themselves run.
#[test]
fn child() {
    match std::env::var("NETMON_TEST_CHILD").as_deref() {
        Ok("deep") => {
            let directory = "d".repeat(200);
            for _ in 0..30 {
                fs::create_dir(&directory).unwrap();
                std::env::set_current_dir(&directory).unwrap();
            }
            fs::write("deep", "x\n").unwrap();
        }
        Ok("mapped") => {
            let file = File::options().read(true).write(true).open("mapped").unwrap();
            let (read_write, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
            // SAFETY: a new mapping of 4,096 bytes of a file of that size, used before it is unmapped, by nobody else.
            unsafe {
                let mapped = mmap(std::ptr::null_mut(), 4096, read_write, shared, &file, 0).unwrap();
                mapped.cast::<u8>().write(b'x');
                munmap(mapped, 4096).unwrap();
            }
        }
        Ok("reads by mmap") => {
            let file = File::open("mapped").unwrap();
            let (read, shared) = (ProtFlags::READ, MapFlags::SHARED);
            // SAFETY: a new mapping of 4,096 bytes of a file of that size, used before it is unmapped, by nobody else.
            unsafe {
                let mapped = mmap(std::ptr::null_mut(), 4096, read, shared, &file, 0).unwrap();
                assert_eq!(mapped.cast::<u8>().read(), b'x');
                munmap(mapped, 4096).unwrap();
            }
        }
        Ok("reads by splice") => {
            let (_out, into) = std::io::pipe().unwrap();
            let file = File::open("spliced").unwrap();
            let (file, into, null) = (file.as_raw_fd(), into.as_raw_fd(), std::ptr::null_mut());
            // SAFETY: two descriptors that are open, and null pointers, which splice(2) takes.
            assert_eq!(unsafe { libc::splice(file, null, into, null, 4096, 0) }, 4096);
        }
        // Marks what it is told to, and stands still where it is told of a place called "held", until "released" is there.
        Ok("marks") => serve(std::io::stdin().as_fd(), |place| {
            if place.path.ends_with("held") {
                fs::create_dir_all(&place.path).unwrap();
                let released = place.path.with_file_name("released");
                wait::until(6 * PATIENCE, "the release", || released.exists().then_some(())).unwrap();
            }
            true
        })
        .unwrap(),
        _ => {}
    }
}

/// What happens on both kinds of file systems.
fn on_each(test: impl Fn(&Mounted)) {
    for kind in ["tmpfs", "ext4"] {
        println!("{kind}");
        test(&Mounted::new(kind));
    }
}

#[test]
fn a_copy_to_it_and_one_from_it_are_told_with_size_program_and_user() {
    on_each(|mounted| {
        let mut recorded = Recorded::of(mounted.to_record());
        let source = tempfile::tempdir().unwrap();
        fs::set_permissions(source.path(), fs::Permissions::from_mode(0o777)).unwrap();
        fs::write(source.path().join("exam.pdf"), vec![b'x'; 5_000_000]).unwrap();
        let stick = mounted.path();
        let copy = format!("cp exam.pdf {}/copy.pdf", stick.display());
        let written = recorded.file_of("cp", || as_student(&copy, source.path()));
        let expected = UsbFile {
            disk: disk(),
            directory: stick.to_str().unwrap().into(),
            name: "copy.pdf".into(),
            access: FileAccess::Written,
            bytes: Some(5_000_000),
            program: "cp".into(),
            pid: written.pid,
            uid: Some(STUDENT),
            user: "".into(),
        };
        assert_eq!(written, expected);
        assert!(written.pid > 0);
        // At least: what was written before the opening was looked at is not in it.
        let grown = recorded.grown();
        assert!(grown <= 5_000_000, "{grown}");

        let back = format!("cp {}/copy.pdf back.pdf", stick.display());
        let read = recorded.file_of("cp", || as_student(&back, source.path()));
        assert_eq!(read, UsbFile { access: FileAccess::Read, pid: read.pid, ..expected });

        // As root, who has a name; one that is touched.
        let read = recorded.file_of("cat", || {
            let output = Command::new("cat").arg(stick.join("copy.pdf")).output().unwrap();
            assert_eq!(output.stdout.len(), 5_000_000);
        });
        assert_eq!([&read.program, &read.user], [&"cat".into(), &"root".into()]);
        as_student("touch empty", &stick);
        let touched = recorded.file();
        assert_eq!(
            (touched.name, touched.access, touched.bytes),
            ("empty".into(), FileAccess::Written, Some(0))
        );
        assert_eq!(recorded.end(), []);
    });
}

#[test]
fn what_a_file_grew_by_is_known_when_its_opening_was_seen_before_it_was_written() {
    on_each(|mounted| {
        let mut recorded = Recorded::of(mounted.to_record());
        let mut writes = Command::new("sh")
            .args(["-c", "exec 3> slow; echo x > behind; read go; printf %05000000d 0 >&3"])
            .current_dir(mounted.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(recorded.file().name, "behind".into());
        writes.stdin.take().unwrap().write_all(b"go\n").unwrap();
        assert!(writes.wait().unwrap().success());
        let told = recorded.file();
        assert_eq!((told.name, told.bytes), ("slow".into(), Some(5_000_000)));
        assert_eq!(recorded.grown(), 5_000_000);
    });
}

#[test]
fn names_are_bytes_and_stay_what_they_are() {
    on_each(|mounted| {
        let mut recorded = Recorded::of(mounted.to_record());
        let long = [vec![b'n'; 251], b".txt".to_vec()].concat();
        for name in [
            &b"a\nb"[..],
            b"\x1b[2J\x1b]0;x\x07",
            b"\xff\xfe",
            b"x (deleted)",
            "\u{202e}fdp.exe".as_bytes(),
            &long,
        ] {
            put(&mounted.path().join(OsStr::from_bytes(name)));
            assert_eq!(recorded.file().name.as_bytes(), name);
        }
        // Deeper than a path can be long.
        as_child("deep", &mounted.path());
        let deep = recorded.file();
        assert_eq!((deep.access, deep.bytes, deep.name), (FileAccess::Written, Some(2), "".into()));
        // Gone before it was closed.
        as_student("exec 3> gone; rm gone; echo secret >&3", &mounted.path());
        let gone = recorded.file();
        assert_eq!((gone.name, gone.bytes, gone.access), ("gone".into(), Some(7), FileAccess::Written));
    });
}

#[test]
fn five_thousand_files_at_once_are_named_up_to_the_limit_and_all_of_them_counted() {
    let mounted = Mounted::new("tmpfs");
    let mut recorded = Recorded::of(mounted.to_record());
    let began = Now::read().boot_ns;
    as_student("for i in $(seq 5000); do echo $i > $i; done", &mounted.path());
    let seconds = (Now::read().boot_ns - began) as f64 / 1e9;
    let (mut named, mut counted) = (0, 0);
    while named + counted < 5_000 {
        match recorded.next() {
            Event::UsbFile(file) => {
                assert_eq!((file.program, file.uid), ("sh".into(), Some(STUDENT)));
                named += 1;
            }
            Event::UsbFilesUnseen(unseen) => {
                assert_eq!(unseen.reason, FilesUnseen::TooMany);
                counted += unseen.count.unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
    println!("in {seconds:.2} s: {named} named, {counted} counted");
    assert_eq!((named + counted, recorded.end()), (5_000, vec![]));
    assert!((BURST - 1..=BURST + RATE * (seconds as u64 + 2)).contains(&named), "{named} in {seconds} s");
}

#[test]
fn a_queue_that_was_full_says_so_and_goes_on() {
    let mounted = Mounted::new("tmpfs");
    let place = mounted.to_record().places.remove(0);
    let group = Group::new(mark(&place).unwrap());
    // Nobody takes them: more than the 16,384 that the kernel keeps.
    as_student("for i in $(seq 20000); do echo $i > $i; done", &mounted.path());
    let mut taken = 0;
    let overflow = loop {
        let turn = group.take(|_, _, _| false).unwrap();
        taken += turn.seen.len();
        if turn.overflow || turn.emptied {
            break turn.overflow;
        }
    };
    println!("{taken} events");
    assert!(overflow && taken < 20_000);
    put(&mounted.path().join("after"));
    assert!(!group.take(|_, _, _| false).unwrap().seen.is_empty());
}

#[test]
fn a_reader_that_is_held_up_keeps_no_file_system_busy_and_loses_nothing_uncounted() {
    let mounted = Mounted::new("tmpfs");
    let mut recorded = Recorded::of(mounted.to_record());
    as_student("for i in $(seq 1000); do echo $i > $i; done", &mounted.path());
    wait::until(PATIENCE, "outputs to be full", || (recorded.outputs.capacity() == 0).then_some(())).unwrap();
    as_student("for i in $(seq 500); do echo $i > $i; done", &mounted.path());
    wait::until(PATIENCE, "the file system to be free", || {
        unmount(mounted.path(), UnmountFlags::empty()).is_ok().then_some(())
    })
    .unwrap();
    let (mut named, mut counted) = (0, 0);
    while named + counted < 1_500 {
        match recorded.next() {
            Event::UsbFile(_) => named += 1,
            Event::UsbFilesUnseen(unseen) => counted += unseen.count.unwrap(),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((named + counted, recorded.end()), (1_500, vec![]));
}

#[test]
fn a_queue_that_was_full_is_a_gap_while_the_thread_waits() {
    let mounted = Mounted::new("tmpfs");
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("marks");
    let this = std::env::current_exe().unwrap();
    let script = format!("#!/bin/sh\nNETMON_TEST_CHILD=marks exec '{}' --exact child\n", this.display());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let names = FileNames::Marker(Arc::new(Marker::start(&program).unwrap()));
    let mut recorded = Recorded::with(names, mounted.to_record());
    // The thread waits for the process that marks, five seconds for each place, and the kernel's queue of 16,384 events fills
    // up meanwhile.
    let held = directory.path().join("held");
    let place = MountPoint { mount_id: 1, path: held.clone() };
    let stuck =
        ToRecord { volume: DeviceNumber { major: 0, minor: 1 }, places: vec![place; 24], disk: disk() };
    recorded.update(vec![stuck, mounted.to_record()]);
    wait::until(PATIENCE, "the thread to wait", || held.exists().then_some(())).unwrap();
    as_student("for i in $(seq 20000); do echo $i > $i; done", &mounted.path());
    fs::write(directory.path().join("released"), "").unwrap();
    wait::until(2 * PATIENCE, "the gap", || match recorded.next() {
        Event::UsbFilesUnseen(unseen) if unseen.reason == FilesUnseen::QueueFull => {
            assert!(unseen.count.is_none() && unseen.from_wall_ns < unseen.to_wall_ns, "{unseen:?}");
            Some(())
        }
        _ => None,
    })
    .unwrap();
    // Afterwards it goes on.
    wait::until(PATIENCE, "files to be told again", || {
        put(&mounted.path().join("after"));
        (self::names(&[recorded.next()]) == ["after"]).then_some(())
    })
    .unwrap();
}

#[test]
fn neither_a_fifo_nor_a_huge_file_holds_it_up() {
    on_each(|mounted| {
        let mut recorded = Recorded::of(mounted.to_record());
        as_student("mkfifo pipe; (cat pipe > /dev/null & echo x > pipe; wait)", &mounted.path());
        as_student("printf x | dd of=huge bs=1 seek=4294967303 status=none", &mounted.path());
        let told = recorded.file();
        assert_eq!((told.name, told.bytes), ("huge".into(), Some((1 << 32) + 8)));
        let grown = recorded.grown();
        assert!(grown <= 64 << 10, "holes are not written: {grown}");
    });
}

#[test]
fn who_wrote_by_an_inherited_descriptor_or_by_mmap_is_told() {
    on_each(|mounted| {
        let mut recorded = Recorded::of(mounted.to_record());
        as_student("(head -c 10 /dev/zero; head -c 30 /dev/zero; true) > shared", &mounted.path());
        let told = [recorded.file(), recorded.file()];
        // Never the shell, which only opened it: who has ended already is unknown.
        let is_head = |file: &UsbFile| file.program == "head".into() || file.program.is_empty();
        assert!(told.iter().all(|file| is_head(file) && file.bytes == Some(40)), "{told:?}");
        assert_ne!(told[0].pid, told[1].pid);

        let path = mounted.path().join("mapped");
        // Our own hand is not seen.
        fs::write(&path, [0; 4096]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        as_child("mapped", &mounted.path());
        let told = recorded.file();
        assert_eq!((told.name, told.access), ("mapped".into(), FileAccess::Written));
    });
}

/// The kernel tells nobody of the first, and of the second only since Linux 6.4. File managers copy by it.
#[test]
fn a_file_that_was_opened_and_perhaps_read_is_told() {
    on_each(|mounted| {
        let mut recorded = Recorded::of(mounted.to_record());
        for (name, how) in [("mapped", "reads by mmap"), ("spliced", "reads by splice")] {
            // Our own hand is not seen.
            fs::write(mounted.path().join(name), [b'x'; 4096]).unwrap();
            as_child(how, &mounted.path());
            let told = recorded.file();
            println!("{how}: {:?}", told.access);
            assert_eq!((told.name, told.bytes), (name.into(), Some(4096)));
            assert_ne!(told.access, FileAccess::Written);
        }
    });
}

/// As the agent is under systemd: it sees the users' mounts in a namespace of its own, as mounts of its own.
#[test]
fn files_are_seen_from_another_mount_namespace() {
    let outer = Mounted::new("tmpfs");
    mount_change(outer.path(), MountPropagationFlags::SHARED).unwrap();
    let stick = outer.path().join("stick");
    fs::create_dir(&stick).unwrap();
    std::thread::scope(|scope| {
        let (mounted, is_mounted) = std::sync::mpsc::channel();
        let path = stick.clone();
        let agent = scope.spawn(move || {
            let stick = path;
            // SAFETY: this thread alone gets another mount namespace and a working directory of its own; no file descriptor
            // becomes another one.
            unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
            let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
            mount_change("/", slave).unwrap();
            mounted.send(()).unwrap();
            wait::until(PATIENCE, "the mount", || {
                let mounts = fs::read("/proc/thread-self/mountinfo").unwrap();
                let path = stick.to_str().unwrap();
                String::from_utf8(mounts)
                    .unwrap()
                    .lines()
                    .any(|line| line.split(' ').nth(4) == Some(path))
                    .then_some(())
            })
            .unwrap();
            Recorded::of(to_record(&stick))
        });
        is_mounted.recv().unwrap();
        mount("stick", &stick, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::set_permissions(&stick, fs::Permissions::from_mode(0o777)).unwrap();
        let mut recorded = agent.join().unwrap();
        as_student("echo x > outside", &stick);
        let told = recorded.file();
        assert_eq!((told.name, told.directory), ("outside".into(), stick.to_str().unwrap().into()));
        unmount(&stick, UnmountFlags::empty()).unwrap();
    });
}

/// Nobody takes what is told here: what waits for that keeps no file system busy.
#[test]
fn a_file_system_can_be_unmounted_right_after_a_copy() {
    const ROUNDS: u32 = 100;
    let mounted = Mounted::new("ext4");
    let mut recorded = Recorded::of(mounted.to_record());
    let mut busy = 0;
    for round in 0..ROUNDS {
        as_student(&format!("for i in 1 2 3 4 5; do cp /bin/true {round}.$i; done"), &mounted.path());
        // By the call itself: umount(8) would take its time.
        if unmount(mounted.path(), UnmountFlags::empty()).is_err() {
            busy += 1;
            wait::until(Duration::from_secs(2), "the file system to be free", || {
                unmount(mounted.path(), UnmountFlags::empty()).is_ok().then_some(())
            })
            .unwrap();
        }
        recorded.update(vec![]);
        mounted.mount("ext4");
        recorded.update(vec![mounted.to_record()]);
    }
    println!("busy {busy} times of {ROUNDS}");
    // How often depends on what else the machine does: 2 to 41 times were seen. That it is free soon does not.
    let named = names(&recorded.end());
    println!("{} names", named.len());
}

#[test]
fn a_file_that_is_open_when_its_file_system_is_unmounted_lazily_is_told_when_it_is_closed() {
    let mounted = Mounted::new("ext4");
    let mut recorded = Recorded::of(mounted.to_record());
    let mut other = Command::new("sh")
        .args(["-c", "exec 3> other; echo before >&3; echo; read go; echo after >&3"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .current_dir(mounted.path())
        .spawn()
        .unwrap();
    let mut line = [0; 1];
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut line).unwrap();
    unmount(mounted.path(), UnmountFlags::DETACH).unwrap();
    recorded.update(vec![]);
    other.stdin.take().unwrap().write_all(b"\n").unwrap();
    other.wait().unwrap();
    let told = recorded.file();
    assert_eq!((told.name, told.access, told.bytes), ("other".into(), FileAccess::Written, Some(13)));
}

#[test]
fn a_file_system_that_is_mounted_anew_between_two_looks_is_watched_again() {
    let mounted = Mounted::new("ext4");
    let mut recorded = Recorded::of(mounted.to_record());
    let number: DeviceNumber = mounted.to_record().volume;
    unmount(mounted.path(), UnmountFlags::empty()).unwrap();
    mounted.mount("ext4");
    assert_eq!(mounted.to_record().volume, number, "the same loop device");
    recorded.update(vec![mounted.to_record()]);
    wait::until(PATIENCE, "the watch to begin again", || {
        as_student("echo x > anew", &mounted.path());
        let event = recorded.try_next(Duration::from_millis(1_500))?;
        names(&[event]).contains(&"anew".to_owned()).then_some(())
    })
    .unwrap();
}

#[test]
fn what_cannot_be_watched_and_what_is_not_to_be_is_said_once() {
    let mounted = Mounted::new("tmpfs");
    let reason = |recorded: &mut Recorded| match recorded.next() {
        Event::UsbFilesUnseen(unseen) => (unseen.reason, unseen.count),
        other => panic!("{other:?}"),
    };
    let mut off = Recorded::start(FileNames::SwitchedOff, 64);
    for _ in 0..3 {
        off.update(vec![mounted.to_record()]);
    }
    assert_eq!(reason(&mut off), (FilesUnseen::SwitchedOff, Some(1)));
    as_student("echo x > unseen", &mounted.path());
    assert_eq!(off.end(), []);

    // The real process, which marks nothing that is not on USB; and one that has ended.
    let marker = Marker::start(&netmon::program("netmon-agent").unwrap()).unwrap();
    let mut refused = Recorded::start(FileNames::Marker(marker.into()), 64);
    for _ in 0..3 {
        refused.update(vec![mounted.to_record()]);
    }
    assert_eq!(reason(&mut refused), (FilesUnseen::NotWatched, Some(1)));
    assert_eq!(refused.end(), []);
    let marker = Marker::start(Path::new("/bin/true")).unwrap();
    let mut dead = Recorded::start(FileNames::Marker(marker.into()), 64);
    dead.update(vec![mounted.to_record()]);
    assert_eq!(reason(&mut dead), (FilesUnseen::NotWatched, Some(1)));

    // The list of mounts is the one that the agent reads.
    assert!(MountList::open().unwrap().read().unwrap().list.len() > 1);
}

#[test]
#[ignore = "measures: run it alone, in a release build"]
fn what_a_copy_costs_with_and_without() {
    let mounted = Mounted::new("tmpfs");
    let copy = |block: &str| {
        let began = Now::read().boot_ns;
        let script =
            format!("dd if=/dev/zero of=copy bs={block} count=$((20000000 / {block})) status=none; rm copy");
        as_student(&script, &mounted.path());
        (Now::read().boot_ns - began) as f64 / 1e6
    };
    let median = |block: &str| {
        let mut found: Vec<_> = (0..21).map(|_| copy(block)).collect();
        found.sort_by(f64::total_cmp);
        found[10]
    };
    for block in ["131072", "4096", "512"] {
        let without = median(block);
        let recorded = Recorded::of(mounted.to_record());
        let (before, with) = (cpu_ms(), median(block));
        let cpu = (cpu_ms() - before) / 21.0;
        drop(recorded.end());
        println!(
            "20 MB in blocks of {block}: {without:.1} ms without, {with:.1} ms with, {cpu:.1} ms CPU of the agent"
        );
    }
}

/// Of this process, without its children.
fn cpu_ms() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) * 10.0
}
