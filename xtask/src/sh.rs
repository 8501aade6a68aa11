//! Running other programs.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// The workspace's root.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// Where tools are kept that `cargo install` builds for this workspace alone.
pub fn tools() -> PathBuf {
    workspace().join("target/tools")
}

/// Says what is about to run, runs it, and fails when it fails.
///
/// # Errors
/// The program cannot be started or does not end with status 0.
pub fn run(command: &mut Command) -> Result<()> {
    eprintln!("+ {}", shown(command));
    let status = command.status().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// What a program prints, without the line end; `None` when it cannot be started or fails.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command.stderr(Stdio::null()).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Looks for a program in `target/tools/bin`, then on `PATH`.
pub fn find(program: &str) -> Option<PathBuf> {
    candidates(program).next()
}

/// As [`find`], but takes only a program whose `--version` says this version; others are passed by, saying so.
pub fn find_version(program: &str, version: &str) -> Option<PathBuf> {
    candidates(program).find(|candidate| {
        let said = output(Command::new(candidate).arg("--version")).unwrap_or_default();
        let fits = says_version(&said, version);
        if !fits {
            eprintln!("passing by {}: its version is {said:?}, not {version}", candidate.display());
        }
        fits
    })
}

fn candidates(program: &str) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories = vec![tools().join("bin")];
    directories.extend(env::split_paths(&path));
    directories
        .into_iter()
        .map(move |directory| directory.join(program))
        .filter(|candidate| candidate.is_file())
}

/// `said` is what `--version` prints: the program's name, the version, and perhaps more.
fn says_version(said: &str, version: &str) -> bool {
    said.split_whitespace().nth(1) == Some(version)
}

/// Installs those of the Debian packages that are missing, saying so.
///
/// # Errors
/// Some are missing and this is no Debian, we are not root, or apt fails.
pub fn ensure_packages(packages: &[&str]) -> Result<()> {
    let missing: Vec<_> = packages.iter().copied().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("missing: {list} (names of Debian packages). Install them by your system's own means");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("missing Debian packages. Run: sudo apt-get update && sudo apt-get install {list}");
    }
    eprintln!("installing the Debian packages {list}");
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    run(&mut apt(&["update", "-q"]))?;
    run(apt(&["install", "-q", "-y", "--no-install-recommends"]).args(&missing))
}

fn is_installed(package: &str) -> bool {
    output(Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status}", package]))
        .is_some_and(|status| status == "installed")
}

/// Writes a file in one step: a reader sees the old or the new content. A file that has this content already is left alone:
/// what was built from it need not be built anew.
///
/// # Errors
/// The directory is not writable or the disk is full.
pub fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == content) {
        return Ok(());
    }
    let draft = path.with_extension("new");
    fs::write(&draft, content).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, path).with_context(|| format!("cannot write {}", path.display()))
}

fn shown(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_version_counts() {
        assert!(says_version("bpf-linker 0.13.0", "0.13.0"));
        assert!(says_version("cargo-deny 0.20.2 (0123abc 2026-01-01)", "0.20.2"));
        for other in ["bpf-linker 0.13.1", "bpf-linker 0.13.0-rc1", "bpf-linker 10.13.0", "0.13.0", ""] {
            assert!(!says_version(other, "0.13.0"), "{other}");
        }
    }
}
