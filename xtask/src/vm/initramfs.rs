//! The guest's root file system: busybox, kmod, udevd, a kernel's modules, and the files to run.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::kernel::Kernel;
use super::{output_of, run_tool};

/// Users and groups that udev's rules name.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUPS: &str = "root:x:0:\ndisk:x:6:\nlp:x:7:\ntty:x:5:\nkmem:x:15:\ndialout:x:20:\ncdrom:x:24:\ntape:x:26:\n\
                      audio:x:29:\nvideo:x:44:\nplugdev:x:46:\ninput:x:101:\nsgx:x:102:\nkvm:x:103:\nrender:x:104:\n";

/// Writes the archive to `to`. Not compressed: unpacking it in the guest would take longer than reading it.
///
/// # Errors
/// When a file is missing.
pub fn build(kernel: &Kernel, files: &[(PathBuf, PathBuf)], command: &str, to: &Path) -> anyhow::Result<()> {
    let staging = tempfile::tempdir_in(to.parent().unwrap_or(Path::new(".")))?;
    let root = Root { path: staging.path() };
    for directory in ["proc", "sys", "dev", "run", "tmp", "mnt", "root", "sbin"] {
        fs::create_dir_all(root.path.join(directory))?;
    }
    root.write("init", include_str!("guest/init.sh"))?;
    root.write("usr/local/bin/hostctl", include_str!("guest/hostctl.sh"))?;
    root.write("vm/command", command)?;
    root.write("etc/passwd", PASSWD)?;
    root.write("etc/group", GROUPS)?;
    root.write("etc/nsswitch.conf", "passwd: files\ngroup: files\n")?;
    root.add(Path::new("/bin/busybox"), Path::new("/bin/busybox"))?;
    root.add(Path::new("/bin/kmod"), Path::new("/bin/kmod"))?;
    for name in ["modprobe", "insmod", "lsmod", "rmmod"] {
        symlink("/bin/kmod", root.path.join("sbin").join(name))?;
    }
    // udevadm is udevd, too, by the name it is called by.
    root.add(Path::new("/usr/bin/udevadm"), Path::new("/usr/bin/udevadm"))?;
    fs::create_dir_all(root.path.join("lib/systemd"))?;
    symlink("/usr/bin/udevadm", root.path.join("lib/systemd/systemd-udevd"))?;
    root.write("etc/udev/udev.conf", "")?;
    root.add_tree(Path::new("/lib/udev/rules.d"), Path::new("/lib/udev/rules.d"))?;
    for helper in ["/lib/udev/ata_id", "/lib/udev/cdrom_id", "/lib/udev/scsi_id"] {
        root.add(Path::new(helper), Path::new(helper))?;
    }
    root.add_tree(&kernel.modules.join("lib/modules"), Path::new("/lib/modules"))?;
    for (host, guest) in files {
        root.add(host, guest)?;
    }
    root.archive(to)
}

struct Root<'a> {
    path: &'a Path,
}

impl Root<'_> {
    /// The place in the staging directory for a path in the guest; its directory is made.
    fn place(&self, guest: &Path) -> anyhow::Result<PathBuf> {
        let place = self.path.join(guest.strip_prefix("/").unwrap_or(guest));
        if let Some(directory) = place.parent() {
            fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        }
        Ok(place)
    }

    fn write(&self, guest: &str, text: &str) -> anyhow::Result<()> {
        let place = self.place(Path::new(guest))?;
        fs::write(&place, text)?;
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// A file; a program without its debug information, and with the libraries that it needs.
    fn add(&self, host: &Path, guest: &Path) -> anyhow::Result<()> {
        let place = self.place(guest)?;
        fs::copy(host, &place).with_context(|| format!("cannot copy {} for the guest", host.display()))?;
        if !is_elf(host)? {
            return Ok(());
        }
        run_tool(Command::new("strip").arg("--strip-debug").arg(&place))?;
        for library in libraries(host)? {
            let place = self.place(&library)?;
            if !place.exists() {
                fs::copy(&library, &place).with_context(|| format!("cannot copy {}", library.display()))?;
            }
        }
        Ok(())
    }

    fn add_tree(&self, host: &Path, guest: &Path) -> anyhow::Result<()> {
        let place = self.place(guest)?;
        run_tool(Command::new("cp").arg("-rL").args([host, &place]))
    }

    fn archive(&self, to: &Path) -> anyhow::Result<()> {
        let list = output_of(Command::new("find").args([".", "-mindepth", "1"]).current_dir(self.path))?;
        let mut cpio = Command::new("cpio")
            .args(["-o", "-H", "newc", "-R", "0:0", "--quiet"])
            .current_dir(self.path)
            .stdin(Stdio::piped())
            .stdout(File::create(to)?)
            .spawn()
            .context("cannot start cpio")?;
        let mut names = cpio.stdin.take().context("cpio takes no names")?;
        std::io::Write::write_all(&mut names, list.as_bytes())?;
        drop(names);
        ensure!(cpio.wait()?.success(), "cpio failed");
        Ok(())
    }
}

fn is_elf(file: &Path) -> anyhow::Result<bool> {
    let mut magic = Vec::new();
    File::open(file)?.take(4).read_to_end(&mut magic)?;
    Ok(magic == b"\x7fELF")
}

/// What `ldd` names: `libudev.so.1 => /lib/x86_64-linux-gnu/libudev.so.1 (0x...)`, `/lib64/ld-linux-x86-64.so.2 (0x...)`.
fn libraries(program: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
    // It fails for programs without libraries.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter(|line| line.contains(" (0x")).filter_map(path).collect())
}
