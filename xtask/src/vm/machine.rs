//! QEMU: boots, answers the guest's requests to plug and unplug, waits for the command's status.
//!
//! Three serial lines: the kernel's console (into a file), the command's output (to our standard output), and the
//! control line, on which the guest says `ready`, `exit STATUS` and, in between, asks for
//!
//! ```text
//! plug ID DRIVER [NAME=VALUE]...    any USB device of QEMU; usb-storage takes size=MIB for its disk, usb-uas and
//!                                   usb-bot luns=NUMBER as well; a usb-net hangs on a hub of its own, a usb-serial's
//!                                   line leads nowhere, a usb-mtp holds one photo
//! unplug ID
//! ```
//!
//! and is answered `ok` or `error ...`.
//!
//! The machine has two network cards of each of two kinds ([`CARDS`]); a hub joins the cards of a kind, and nothing
//! leads out.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::clock;

/// An emulated boot takes some 10 s on an idle PC.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Network cards. The guest tells a hub's two by their addresses, 52:54:00:00:HUB:01 and ...:02.
const CARDS: [&str; 2] = ["e1000e", "virtio-net-pci"];

/// QEMU answers at once; this is for a machine that is busy with other things.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// File of QEMU's own messages.
const QEMU_SAYS: &str = "qemu.err";

/// How a run ended.
pub enum Outcome {
    /// The command ended with this status.
    Ended(i32),
    /// The guest never reached its command.
    NeverBooted,
    /// The guest died of a fault of the emulator's.
    Misled,
}

/// A kernel that changes its own code (static keys) puts a breakpoint there first and takes it away in the end. With several
/// emulated CPUs one of them may still run the breakpoint then, which no real CPU does, and the kernel dies of it
/// (https://github.com/multipath-tcp/mptcp_net-next/issues/471). No program of a guest can bring that about.
const STALE_BREAKPOINT: &str = "int3: 0000";

/// Boots and runs the command that the initramfs holds.
///
/// # Errors
/// When QEMU does not start, the guest dies, or the command takes more than `time_limit` seconds.
pub fn run(image: &Path, initrd: &Path, directory: &Path, time_limit: u64) -> anyhow::Result<Outcome> {
    let console = directory.join("console.log");
    let outcome = Machine::start(image, initrd, &console, directory)
        .and_then(|mut machine| machine.serve(Duration::from_secs(time_limit)));
    if !matches!(outcome, Ok(Outcome::Ended(_))) {
        let log = fs::read(&console).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let lines: Vec<_> = text.lines().collect();
        eprintln!(
            "vm: the end of the guest's console:\n{}",
            lines[lines.len().saturating_sub(30)..].join("\n")
        );
        let said = fs::read_to_string(directory.join(QEMU_SAYS)).unwrap_or_default();
        eprintln!("vm: QEMU itself says: {}", said.trim());
        if outcome.is_err() && was_misled(&text) {
            return Ok(Outcome::Misled);
        }
    }
    outcome
}

fn was_misled(console: &str) -> bool {
    console.lines().any(|line| line.contains(STALE_BREAKPOINT))
}

/// Two network cards of each kind.
fn cards() -> Vec<String> {
    let mut arguments = Vec::new();
    for (hub, driver) in CARDS.iter().enumerate() {
        for card in 1..=2 {
            let id = format!("{driver}-{card}");
            let device = format!("{driver},netdev={id},mac=52:54:00:00:{hub:02x}:{card:02x},romfile=");
            let netdev = format!("hubport,id={id},hubid={hub}");
            arguments.extend(["-netdev".into(), netdev, "-device".into(), device]);
        }
    }
    arguments
}

struct Machine {
    qemu: Child,
    control: Lines,
    qmp: Qmp,
    directory: PathBuf,
    plugged: u32,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    fn start(image: &Path, initrd: &Path, console: &Path, directory: &Path) -> anyhow::Result<Self> {
        let listen = |name: &str| -> anyhow::Result<(UnixListener, String)> {
            let path = directory.join(name);
            // Left over from an attempt before.
            let _ = fs::remove_file(&path);
            let listener =
                UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
            Ok((listener, path.display().to_string()))
        };
        let (control, control_path) = listen("control")?;
        let (qmp, qmp_path) = listen("qmp")?;
        let error_path = directory.join(QEMU_SAYS);
        let mut qemu = Command::new("qemu-system-x86_64")
            // Emulated, not KVM: where /dev/kvm is a nested one, stock kernels hang on it.
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1G"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"])
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(initrd)
            .args(["-device", "qemu-xhci,id=xhci,p2=8,p3=8"])
            .args(cards())
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output"])
            .args([
                "-chardev",
                &format!("socket,id=control,path={control_path}"),
                "-serial",
                "chardev:control",
            ])
            .args(["-qmp", &format!("unix:{qmp_path}")])
            .stdin(Stdio::null())
            .stderr(File::create(&error_path)?)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let connected = accept(&control).and_then(|control| Ok((control, accept(&qmp)?)));
        match connected {
            Ok((control, qmp)) => Ok(Self {
                qemu,
                control: Lines::new(control)?,
                qmp: Qmp { lines: Lines::new(qmp)?, unplugged: BTreeSet::new() },
                directory: directory.to_owned(),
                plugged: 0,
            }),
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                Err(error
                    .context(format!("QEMU says: {}", fs::read_to_string(error_path).unwrap_or_default())))
            }
        }
    }

    fn serve(&mut self, time_limit: Duration) -> anyhow::Result<Outcome> {
        self.qmp.begin()?;
        let boot_end = clock::now() + BOOT_LIMIT;
        loop {
            match self.control.next(boot_end)? {
                Some(line) if line == "ready" => break,
                Some(_) => {}
                None => return Ok(Outcome::NeverBooted),
            }
        }
        let end = clock::now() + time_limit;
        loop {
            let request = self
                .control
                .next(end)
                .context("the guest died before its command ended")?
                .with_context(|| format!("the command took more than {} s", time_limit.as_secs()))?;
            if let Some(status) = request.strip_prefix("exit ") {
                let status = status.parse().with_context(|| format!("not a status: {request}"))?;
                self.qmp.await_end();
                return Ok(Outcome::Ended(status));
            }
            let answer = match self.answer(&request) {
                Ok(()) => "ok".to_owned(),
                Err(error) => format!("error {error:#}").replace('\n', " "),
            };
            self.control.send(&answer)?;
        }
    }

    fn answer(&mut self, request: &str) -> anyhow::Result<()> {
        let mut words = request.split_whitespace();
        match (words.next(), words.next()) {
            (Some("plug"), Some(id)) => {
                let driver = words.next().context("plug which driver?")?;
                self.plug(id, driver, words)
            }
            (Some("unplug"), Some(id)) => self.qmp.unplug(id),
            _ => bail!("not understood: {request}"),
        }
    }

    fn plug<'a>(
        &mut self,
        id: &str,
        driver: &str,
        options: impl Iterator<Item = &'a str>,
    ) -> anyhow::Result<()> {
        let mut device = json!({ "driver": driver, "id": id, "bus": "xhci.0" });
        let (mut size, mut luns) = (64, 1);
        for option in options {
            let (name, value) =
                option.split_once('=').with_context(|| format!("not NAME=VALUE: {option}"))?;
            match name {
                "size" => size = value.parse().with_context(|| format!("not a number of MiB: {value}"))?,
                "luns" => luns = value.parse().with_context(|| format!("not a number of disks: {value}"))?,
                name => device[name] = value.into(),
            }
        }
        self.plugged += 1;
        let backend = format!("{driver}-{}", self.plugged);
        match driver {
            "usb-storage" => {
                self.qmp.ask("blockdev-add", disk(&backend, &self.image(id, size)?))?;
                device["drive"] = backend.into();
                device["removable"] = true.into();
            }
            "usb-net" => {
                let hub = CARDS.len();
                self.qmp.ask("netdev_add", json!({ "type": "hubport", "id": backend, "hubid": hub }))?;
                device["netdev"] = backend.into();
            }
            "usb-serial" => {
                let nowhere = json!({ "type": "null", "data": {} });
                self.qmp.ask("chardev-add", json!({ "id": backend, "backend": nowhere }))?;
                device["chardev"] = backend.into();
                // Nobody opens the other end.
                device["always-plugged"] = true.into();
            }
            "usb-mtp" => {
                let photos = self.directory.join(&backend);
                fs::create_dir(&photos)?;
                fs::write(photos.join("photo.jpg"), [0xff; 4096])?;
                device["rootdir"] = photos.display().to_string().into();
            }
            "usb-uas" | "usb-bot" => return self.plug_disks(id, device, &backend, luns, size),
            _ => {}
        }
        self.qmp.ask("device_add", device)
    }

    /// A device with several disks: they are put into it before it is plugged in.
    fn plug_disks(
        &mut self,
        id: &str,
        device: Value,
        backend: &str,
        luns: u8,
        size: u64,
    ) -> anyhow::Result<()> {
        self.qmp.ask("device_add", device)?;
        for lun in 0..luns {
            let node = format!("{backend}-{lun}");
            self.qmp.ask("blockdev-add", disk(&node, &self.image(&format!("{id}lun{lun}"), size)?))?;
            let bus = format!("{id}.0");
            let part = json!({ "driver": "scsi-hd", "bus": bus, "drive": node, "scsi-id": 0, "lun": lun });
            self.qmp.ask("device_add", part)?;
        }
        let path = format!("/machine/peripheral/{id}");
        self.qmp.ask("qom-set", json!({ "path": path, "property": "attached", "value": true }))
    }

    /// The disk's file. The same ID is the same stick, with what is on it.
    fn image(&self, id: &str, mib: u64) -> anyhow::Result<PathBuf> {
        ensure!(id.bytes().all(|byte| byte.is_ascii_alphanumeric()), "not an ID: {id}");
        let path = self.directory.join(format!("{id}.img"));
        if !path.exists() {
            File::create(&path)?.set_len(mib << 20)?;
        }
        Ok(path)
    }
}

/// A disk that is not locked: QEMU holds it for a moment after the stick was unplugged.
fn disk(node: &str, image: &Path) -> Value {
    let file = json!({ "driver": "file", "filename": image, "locking": "off" });
    json!({ "driver": "raw", "node-name": node, "file": file })
}

/// QEMU's machine protocol.
struct Qmp {
    lines: Lines,
    unplugged: BTreeSet<String>,
}

impl Qmp {
    fn begin(&mut self) -> anyhow::Result<()> {
        // The greeting comes first.
        self.message(clock::now() + ANSWER_LIMIT)?;
        self.ask("qmp_capabilities", json!({}))
    }

    fn ask(&mut self, command: &str, arguments: Value) -> anyhow::Result<()> {
        self.lines.send(&json!({ "execute": command, "arguments": arguments }).to_string())?;
        let end = clock::now() + ANSWER_LIMIT;
        loop {
            let message = self.message(end)?;
            if let Some(error) = message.get("error") {
                return Err(anyhow!("{command}: {}", error["desc"]));
            }
            if message.get("return").is_some() {
                return Ok(());
            }
        }
    }

    /// Unplugs, and waits until the guest has let go.
    fn unplug(&mut self, id: &str) -> anyhow::Result<()> {
        self.ask("device_del", json!({ "id": id }))?;
        let end = clock::now() + ANSWER_LIMIT;
        while !self.unplugged.remove(id) {
            self.message(end)?;
        }
        Ok(())
    }

    fn message(&mut self, end: Instant) -> anyhow::Result<Value> {
        let line = self.lines.next(end)?.context("QEMU does not answer")?;
        let message: Value = serde_json::from_str(&line).context("QEMU does not speak QMP")?;
        if message["event"] == "DEVICE_DELETED"
            && let Some(id) = message["data"]["device"].as_str()
        {
            self.unplugged.insert(id.to_owned());
        }
        Ok(message)
    }

    /// Waits until QEMU has ended, which the guest brings about by powering off.
    fn await_end(&mut self) {
        let end = clock::now() + ANSWER_LIMIT;
        while self.message(end).is_ok() {}
    }
}

/// Lines in both directions.
struct Lines {
    reader: BufReader<UnixStream>,
}

impl Lines {
    fn new(stream: UnixStream) -> anyhow::Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    fn send(&mut self, line: &str) -> anyhow::Result<()> {
        let stream = self.reader.get_mut();
        stream.write_all(format!("{line}\n").as_bytes()).context("QEMU is gone")
    }

    /// The next line; `None`: it did not come in time.
    fn next(&mut self, end: Instant) -> anyhow::Result<Option<String>> {
        let mut line = Vec::new();
        loop {
            let left = end.saturating_duration_since(clock::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            match self.reader.read_until(b'\n', &mut line) {
                Ok(0) => bail!("QEMU is gone"),
                Ok(_) if line.ends_with(b"\n") => {
                    return Ok(Some(String::from_utf8_lossy(&line).trim().to_owned()));
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error).context("QEMU is gone"),
            }
        }
    }
}

/// QEMU connects at its start, or has failed.
fn accept(listener: &UnixListener) -> anyhow::Result<UnixStream> {
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    ensure!(poll(&mut fds, Some(&limit))? == 1, "QEMU did not start");
    Ok(listener.accept()?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_stale_breakpoint_is_the_emulators_fault() {
        assert!(was_misled("[   46.316504] int3: 0000 [#1] PREEMPT SMP NOPTI\n"));
        assert!(was_misled("booting\n[   25.451] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\nend"));
        assert!(!was_misled(
            "[   25.451] BUG: kernel NULL pointer dereference, address: 0000\nKernel panic - not syncing"
        ));
    }
}
