//! A fingerprint of everything that the eBPF object is made of. `cargo xtask build-ebpf` writes it next to the
//! object; the agent's build script includes this file, compares, and refuses an object of other sources.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// Where the object is, from the workspace's root. Independent of `CARGO_TARGET_DIR`: two builds must agree on it.
pub const OBJECT: &str = "target/bpf/netmon-ebpf";
/// Where the fingerprint of its sources is.
pub const FINGERPRINT: &str = "target/bpf/netmon-ebpf.sources";

/// The files and directories that the object is made of, from the workspace's root.
pub const SOURCES: [&str; 6] = [
    "netmon-ebpf/Cargo.toml",
    "netmon-ebpf/Cargo.lock",
    "netmon-ebpf/src",
    "netmon-common/Cargo.toml",
    "netmon-common/src/lib.rs",
    "netmon-common/src/abi.rs",
];

/// SHA-256 over names and contents of [`SOURCES`], in hex.
///
/// # Errors
/// A source cannot be read.
pub fn fingerprint(workspace: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&workspace.join(source), &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let content = fs::read(&file)?;
        hash.update(file.strip_prefix(workspace).unwrap_or(&file).as_os_str().as_encoded_bytes());
        hash.update([0]);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}
