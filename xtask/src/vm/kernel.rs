//! Stock kernels out of Debian packages, with the few modules that are of use here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::{output_of, run_tool};

/// The kernels, oldest first, and the suite in which each lives. Debian has no others that it keeps.
const SUITES: [(&str, &str); 5] = [
    ("5.10", "bullseye-security"),
    ("6.1", "bookworm"),
    ("6.12", "bookworm-security"),
    ("6.18", "trixie-backports"),
    ("7.3", "trixie-backports"),
];

/// Debian 12's.
pub const DEFAULT: &str = "6.1";

/// All versions that [`fetch`] knows, oldest first.
pub fn versions() -> impl Iterator<Item = &'static str> {
    SUITES.iter().map(|(version, _)| *version)
}

/// What the guest may load, where the kernel has it as a module; what these need comes along.
const MODULES: &[&str] = &[
    // USB: host controller, storage, input, serial, network. Not cdc_subset: it takes QEMU's adapter, too, and which of
    // the two drivers comes first differs from boot to boot.
    "xhci_pci",
    "usb_storage",
    "uas",
    "usbhid",
    "hid_generic",
    "cdc_ether",
    "cdc_acm",
    "rndis_host",
    "usbserial",
    "ftdi_sio",
    // The other end of USB, as in a phone, and a bus of its own that joins both ends.
    "dummy_hcd",
    "libcomposite",
    "usb_f_acm",
    "usb_f_mass_storage",
    "usb_f_rndis",
    // Disks and what is on them.
    "sd_mod",
    "sr_mod",
    "vfat",
    "exfat",
    "ext4",
    "ntfs3",
    "nls_cp437",
    "nls_ascii",
    "nls_iso8859_1",
    "nls_utf8",
    "loop",
    "dm_mod",
    "dm_flakey",
    "dm_crypt",
    // Network cards, and where programs attach.
    "virtio_pci",
    "virtio_net",
    "e1000e",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    // What stands on a network card.
    "8021q",
    "bonding",
    "bridge",
    "dummy",
    "macsec",
    "macvlan",
    "ppp_async",
    "pppoe",
    "slip",
    "team",
    "team_mode_roundrobin",
    "tun",
    "veth",
    "wireguard",
];

/// A kernel that is ready to boot.
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// Compressed image.
    pub image: PathBuf,
    /// Directory that holds `lib/modules/RELEASE`.
    pub modules: PathBuf,
}

/// Fetches the newest kernel of a version such as `6.1`, unless the cache has one.
///
/// # Errors
/// When the version is not known, or a package cannot be had.
pub fn fetch(version: &str, cache: &Path) -> anyhow::Result<Kernel> {
    let directory = cache.join("kernels").join(version);
    let kernel =
        |release: String| Kernel { release, image: directory.join("vmlinuz"), modules: directory.clone() };
    // The release, and the modules that were taken along.
    let modules = MODULES.join(" ");
    let stamp = fs::read_to_string(directory.join("release")).unwrap_or_default();
    if let Some((release, had)) = stamp.split_once('\n')
        && had == modules
    {
        return Ok(kernel(release.to_owned()));
    }
    let Some((_, suite)) = SUITES.iter().find(|(known, _)| *known == version) else {
        let known: Vec<_> = versions().collect();
        bail!("kernel {version} is not known; there are {}", known.join(", "));
    };
    println!("vm: fetching kernel {version} from {suite}");
    let apt = Apt::new(suite, cache)?;
    let package = apt.newest_kernel(version)?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    let work = tempfile::tempdir_in(cache)?;
    let unpacked = apt.unpack(&package, &release, work.path())?;
    let image = [format!("boot/vmlinuz-{release}"), format!("lib/modules/{release}/vmlinuz")]
        .map(|path| unpacked.join(path))
        .into_iter()
        .find(|path| path.exists())
        .with_context(|| format!("package {package} holds no kernel image"))?;

    // What is there was made for another list of modules.
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory)?;
    fs::copy(image, directory.join("vmlinuz")).context("cannot copy the kernel's image")?;
    prune(&unpacked, &release, &directory)?;
    // Last: its presence says that the rest is complete.
    fs::write(directory.join("release"), format!("{release}\n{modules}"))?;
    Ok(kernel(release))
}

/// apt with a state of its own for one suite, so that nothing of the host's changes.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(suite: &str, cache: &Path) -> anyhow::Result<Self> {
        let root = cache.join("apt").join(suite);
        fs::create_dir_all(root.join("lists/partial"))?;
        fs::create_dir_all(root.join("archives/partial"))?;
        fs::write(root.join("status"), "")?;
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let mirror = mirror(suite)?;
        fs::write(root.join("sources.list"), format!("deb [signed-by={keys}] {mirror} {suite} main\n"))?;
        let path = |name: &str| root.join(name).display().to_string();
        let options = [
            format!("Dir::Etc::sourcelist={}", path("sources.list")),
            "Dir::Etc::sourceparts=-".into(),
            format!("Dir::State::lists={}", path("lists")),
            format!("Dir::State::status={}", path("status")),
            format!("Dir::Cache={}", root.display()),
            "APT::Sandbox::User=root".into(),
        ];
        let apt = Self { options: options.into_iter().flat_map(|option| ["-o".into(), option]).collect() };
        run_tool(apt.tool("apt-get").args(["update", "-qq"]))?;
        Ok(apt)
    }

    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.args(&self.options);
        command
    }

    fn newest_kernel(&self, version: &str) -> anyhow::Result<String> {
        let pattern = format!("^linux-image-{}\\..*-amd64$", version.replace('.', "\\."));
        let found = output_of(self.tool("apt-cache").args(["search", "--names-only", &pattern]))?;
        found
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| !name.contains("-cloud-") && !name.contains("-rt-"))
            .max_by_key(|name| numbers(name))
            .map(str::to_owned)
            .with_context(|| format!("no package of kernel {version} is to be found"))
    }

    /// The directory with what the package holds, and those of its release that it is split into from 7.0 on.
    fn unpack(&self, package: &str, release: &str, work: &Path) -> anyhow::Result<PathBuf> {
        let described = output_of(self.tool("apt-cache").args(["show", package]))?;
        // One of 6.18 names a part that the suite does not have.
        let is_there = |part: &String| {
            output_of(self.tool("apt-cache").args(["show", part])).is_ok_and(|shown| !shown.trim().is_empty())
        };
        let parts = parts(&described, release).into_iter().filter(is_there);
        run_tool(self.tool("apt-get").args(["download", "-qq", package]).args(parts).current_dir(work))?;
        let unpacked = work.join("unpacked");
        for entry in fs::read_dir(work)? {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "deb") {
                run_tool(Command::new("dpkg-deb").arg("-x").args([&file, &unpacked]))?;
            }
        }
        // Where modules are since Debian 13; kmod looks in `lib`.
        if unpacked.join("usr/lib/modules").exists() && !unpacked.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", unpacked.join("lib"))?;
        }
        Ok(unpacked)
    }
}

/// `linux-base-RELEASE` (lists of modules), `linux-binary-RELEASE` and `linux-modules-RELEASE`, where the package is split.
fn parts(described: &str, release: &str) -> BTreeSet<String> {
    let known = ["base", "binary", "modules"].map(|part| format!("linux-{part}-{release}"));
    let named: BTreeSet<_> = described.split([' ', ',', '\n']).collect();
    known.into_iter().filter(|part| named.contains(part.as_str())).collect()
}

/// Where the host fetches packages from, or else Debian's own servers.
fn mirror(suite: &str) -> anyhow::Result<String> {
    let site = if suite.ends_with("-security") { "debian-security" } else { "debian" };
    let targets = output_of(Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)"]))?;
    let own =
        targets.lines().map(|uri| uri.trim_end_matches('/')).find(|uri| uri.ends_with(&format!("/{site}")));
    Ok(own.map_or_else(|| format!("http://deb.debian.org/{site}"), str::to_owned))
}

fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Copies [`MODULES`] and what they need, and makes the index anew.
fn prune(unpacked: &Path, release: &str, to: &Path) -> anyhow::Result<()> {
    let tree = Path::new("lib/modules").join(release);
    let (from, into) = (unpacked.join(&tree), to.join(&tree));
    depmod(unpacked, release)?;
    let index = fs::read_to_string(from.join("modules.dep"))?;
    // `kernel/fs/fat/vfat.ko.xz: kernel/fs/fat/fat.ko.xz`: all that is needed, however indirectly.
    let needs: BTreeMap<String, (&str, Vec<&str>)> = index
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needed)| (module_name(file), (file, needed.split_whitespace().collect())))
        .collect();
    let mut files = BTreeSet::new();
    // Asked for by name at run time, not by symbol: checksums of file systems, ciphers of MACsec, WireGuard and dm-crypt.
    let by_name = [
        "crc32c_generic",
        "libcrc32c",
        "gcm",
        "ghash_generic",
        "ctr",
        "aesni_intel",
        "aes_generic",
        "xts",
        "ecb",
    ];
    for (file, needed) in MODULES.iter().chain(&by_name).filter_map(|module| needs.get(*module)) {
        files.insert(*file);
        files.extend(needed);
    }
    let lists = ["modules.builtin", "modules.builtin.modinfo", "modules.order"];
    for file in files.into_iter().chain(lists) {
        let target = into.join(file);
        fs::create_dir_all(target.parent().unwrap_or(&into))?;
        fs::copy(from.join(file), &target).with_context(|| format!("cannot copy {file}"))?;
    }
    depmod(to, release)
}

fn depmod(root: &Path, release: &str) -> anyhow::Result<()> {
    // kmod acts by the name it is called by; /sbin is not on everybody's path.
    run_tool(Command::new("/sbin/depmod").arg("-b").arg(root).arg(release))
}

fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_found_by_its_numbers() {
        let names = [
            "linux-image-6.12.9+deb12-amd64",
            "linux-image-6.12.100+deb12-amd64",
            "linux-image-6.12.38-amd64",
        ];
        assert_eq!(names.iter().max_by_key(|name| numbers(name)), Some(&"linux-image-6.12.100+deb12-amd64"));
    }

    #[test]
    fn a_package_that_is_split_is_fetched_with_its_parts() {
        let release = "7.3.4+deb13-amd64";
        let described = format!(
            "Package: linux-image-{release}\nDepends: dracut | initramfs-tools, linux-base-{release} (= 7.3.4-1), \
             linux-binary-{release} (= 7.3.4-1), linux-modules-{release} (= 7.3.4-1)\nSize: 1900\n"
        );
        let expected = ["base", "binary", "modules"].map(|part| format!("linux-{part}-{release}"));
        assert_eq!(parts(&described, release), BTreeSet::from(expected));
        assert!(parts("Depends: kmod, linux-base (>= 4.3~)\n", "6.1.0-50-amd64").is_empty());
    }

    #[test]
    fn a_module_is_known_by_its_name_however_its_file_is_packed() {
        for file in
            ["kernel/drivers/usb/storage/usb-storage.ko", "kernel/usb_storage.ko.xz", "usb-storage.ko.zst"]
        {
            assert_eq!(module_name(file), "usb_storage");
        }
    }
}
