//! Building the kernel programs: `core` has to be built for the BPF target, so a compiler with its sources is
//! needed, and a linker that makes BPF out of LLVM bitcode.

use std::{
    env::consts::ARCH,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{ebpf_sources, sh};

/// The one version that is used, and the LLVM that `--install` builds it with. The linker's LLVM must not be older
/// than the compiler's.
const LINKER_VERSION: &str = "0.13.0";
const LLVM: &str = "22";
/// The oldest compiler that takes netmon's sources: `rust-version` of the workspace.
const OLDEST: &str = env!("CARGO_PKG_RUST_VERSION");
const TARGET: &str = "bpfel-unknown-none";
/// Where the benchmark looks for the programs that netmon is compared with, from the workspace's root.
const REFERENCE: &str = "target/bpf/netmon-reference";

/// Debian's compiler and the sources of the very same version.
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// Options of `build-ebpf`.
#[derive(clap::Args)]
pub struct Options {
    /// Install what is missing: Debian packages (as root) and bpf-linker (into target/tools).
    #[arg(long)]
    install: bool,
}

impl Options {
    /// What is missing is installed.
    pub fn installing() -> Self {
        Self { install: true }
    }
}

/// Builds the object, writes the fingerprint of its sources next to it, and builds what it is compared with.
///
/// # Errors
/// A tool is missing (the message says what to install), or the build fails.
pub fn build(options: &Options) -> Result<()> {
    let workspace = sh::workspace();
    let compiler = match Compiler::find() {
        Some(compiler) => compiler,
        None if options.install => {
            sh::ensure_packages(&DEBIAN_PACKAGES)?;
            Compiler::find()
                .with_context(|| format!("no usable compiler even with {}", DEBIAN_PACKAGES.join(" ")))?
        }
        None => bail!(
            "no compiler that can build for BPF: Rust {OLDEST} or later, with `core`'s sources and LLVM {LLVM} or \
             older. Install either\n  \
             rustup toolchain install nightly --component rust-src\nor, on Debian as root,\n  \
             apt-get install {}\nor let `cargo xtask build-ebpf --install` do the latter",
            DEBIAN_PACKAGES.join(" ")
        ),
    };
    let linker = match sh::find_version("bpf-linker", LINKER_VERSION) {
        Some(linker) => linker,
        None if options.install => install_linker()?,
        None => bail!(
            "bpf-linker {LINKER_VERSION} is neither in target/tools/bin nor on PATH. Run `cargo xtask build-ebpf --install`, or\n  {}",
            linker_recipe()
        ),
    };
    eprintln!("building the kernel programs with {compiler}, {}", linker.display());

    // The fingerprint first: when a source changes during the build, the object counts as stale, never as fresh.
    let fingerprint =
        ebpf_sources::fingerprint(&workspace).context("cannot read the sources of netmon-ebpf")?;
    let build_directory = workspace.join("target/bpf-build");
    let mut command = compiler.cargo();
    command
        .current_dir(workspace.join("netmon-ebpf"))
        .args(["build", "--release", "--locked", "-Z", "build-std=core", "--target", TARGET, "--target-dir"])
        .arg(&build_directory)
        .env("CARGO_ENCODED_RUSTFLAGS", rust_flags(&linker))
        // Set by the cargo that runs us; they would choose a wrong compiler or wrong flags for the other one.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    sh::run(&mut command)?;

    install(&build_directory, "netmon-ebpf", ebpf_sources::OBJECT)?;
    sh::write_whole(&workspace.join(ebpf_sources::FINGERPRINT), fingerprint.as_bytes())?;
    install(&build_directory, "netmon-reference", REFERENCE)
}

/// Takes a built object to where it is used.
fn install(build_directory: &Path, built: &str, object: &str) -> Result<()> {
    let built = build_directory.join(TARGET).join("release").join(built);
    let object = sh::workspace().join(object);
    let directory = object.parent().context("the object has no directory")?;
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let content = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    sh::write_whole(&object, &content)?;
    eprintln!("{} ({} bytes)", object.display(), content.len());
    Ok(())
}

/// A compiler whose `core` sources are installed.
#[derive(Debug, PartialEq, Eq)]
enum Compiler {
    /// rustup's nightly with the component rust-src.
    Nightly,
    /// A stable compiler from Debian with the matching sources.
    Debian(PathBuf),
}

impl std::fmt::Display for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nightly => f.write_str("rustup's nightly"),
            Self::Debian(rustc) => write!(f, "Debian's {}", rustc.display()),
        }
    }
}

impl Compiler {
    /// The first one that can be used; those that cannot are passed by, saying why.
    fn find() -> Option<Self> {
        let toolchains = sh::output(Command::new("rustup").args(["toolchain", "list"])).unwrap_or_default();
        let nightly = toolchains.lines().any(|line| line.starts_with("nightly-")).then_some(Self::Nightly);
        let debian = PathBuf::from("/usr/bin/rustc");
        let debian = debian.is_file().then_some(Self::Debian(debian));
        nightly.into_iter().chain(debian).find(|compiler| match compiler.unusable() {
            Some(reason) => {
                eprintln!("passing by {compiler}: {reason}");
                false
            }
            None => true,
        })
    }

    /// Why this one cannot be used.
    fn unusable(&self) -> Option<String> {
        let has_sources = sh::output(self.rustc().args(["--print", "sysroot"]))
            .is_some_and(|sysroot| Path::new(&sysroot).join("lib/rustlib/src/rust/library/core").is_dir());
        if !has_sources {
            return Some("it has no `core` sources (component rust-src)".to_owned());
        }
        unfit(&sh::output(self.rustc().arg("-vV")).unwrap_or_default())
    }

    fn rustc(&self) -> Command {
        match self {
            Self::Nightly => rustup_nightly("rustc"),
            Self::Debian(rustc) => Command::new(rustc),
        }
    }

    fn cargo(&self) -> Command {
        match self {
            Self::Nightly => {
                let mut cargo = rustup_nightly("cargo");
                cargo.env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN");
                cargo
            }
            Self::Debian(rustc) => {
                // Any cargo will do; `-Z build-std` and the target need leave to use unstable features.
                let mut cargo = Command::new("cargo");
                cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
                cargo
            }
        }
    }
}

fn rustup_nightly(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", program]);
    command
}

/// Why a compiler that says this on `rustc -vV` cannot be used: it is too old for the sources, or its bitcode too
/// new for the linker.
fn unfit(verbose_version: &str) -> Option<String> {
    let field = |name: &str| verbose_version.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let (Some(release), Some(llvm)) = (field("release:"), field("LLVM version:")) else {
        return Some(format!("`rustc -vV` does not say its versions: {verbose_version:?}"));
    };
    if numbers(release) < numbers(OLDEST) {
        return Some(format!("it is Rust {release}, and netmon needs {OLDEST}"));
    }
    if numbers(llvm).first() > numbers(LLVM).first() {
        return Some(format!(
            "its LLVM {llvm} is newer than the linker's (bpf-linker {LINKER_VERSION}: {LLVM})"
        ));
    }
    None
}

/// `1.97.0-nightly` as 1, 97, 0.
fn numbers(version: &str) -> Vec<u32> {
    let release = version.split('-').next().unwrap_or_default();
    release.split('.').map_while(|number| number.parse().ok()).collect()
}

/// Flags in cargo's own encoding (separated by U+001F), so that paths with blanks survive.
fn rust_flags(linker: &Path) -> OsString {
    let mut flags = OsString::from(format!(
        "--cfg=bpf_target_arch=\"{ARCH}\"\u{1f}-Cdebuginfo=2\u{1f}-Ctarget-cpu=v3\u{1f}-Clink-arg=--btf\u{1f}-Clinker="
    ));
    flags.push(linker);
    flags
}

fn install_linker() -> Result<PathBuf> {
    let llvm = format!("llvm-{LLVM}-dev");
    sh::ensure_packages(&[&llvm, "libzstd-dev", "zlib1g-dev"])?;
    eprintln!("installing bpf-linker {LINKER_VERSION} into target/tools (some minutes)");
    let prefix = format!("/usr/lib/llvm-{LLVM}");
    let mut cargo = Command::new("cargo");
    cargo
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--no-default-features"])
        .args(["--features", &format!("llvm-{LLVM}"), "--root"])
        .arg(sh::tools())
        .env("LLVM_PREFIX", &prefix)
        .env(format!("LLVM_SYS_{LLVM}1_PREFIX"), &prefix);
    sh::run(&mut cargo)?;
    sh::find_version("bpf-linker", LINKER_VERSION).context("bpf-linker is installed, but not found")
}

fn linker_recipe() -> String {
    format!(
        "apt-get install llvm-{LLVM}-dev libzstd-dev zlib1g-dev\n  \
         LLVM_PREFIX=/usr/lib/llvm-{LLVM} LLVM_SYS_{LLVM}1_PREFIX=/usr/lib/llvm-{LLVM} cargo install bpf-linker \
         --version {LINKER_VERSION} --locked --no-default-features --features llvm-{LLVM} --root target/tools"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verbose(release: &str, llvm: &str) -> String {
        format!(
            "rustc {release}\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\nrelease: {release}\nLLVM version: {llvm}"
        )
    }

    #[test]
    fn a_compiler_with_newer_bitcode_than_the_linker_reads_is_passed_by() {
        assert_eq!(unfit(&verbose("1.97.0-nightly", "22.1.8")), None);
        assert_eq!(unfit(&verbose("1.96.0", "21.1.0")), None);
        let reason = unfit(&verbose("1.99.0-nightly", "23.0.0")).unwrap();
        assert!(reason.contains("LLVM 23.0.0 is newer"), "{reason}");
    }

    #[test]
    fn a_compiler_that_is_too_old_is_passed_by() {
        assert_eq!(unfit(&verbose(OLDEST, "22.1.2")), None);
        let reason = unfit(&verbose("1.63.0", "14.0.6")).unwrap();
        assert!(reason.contains("it is Rust 1.63.0"), "{reason}");
        assert!(unfit("").is_some());
    }
}
