//! Takes the eBPF object that `cargo xtask build-ebpf` has built into the agent, or fails with what to do.
//! An agent without its kernel programs would watch nothing, so there is no way to build one.

use std::{env, error::Error, fs, path::Path};

#[path = "../xtask/src/ebpf_sources.rs"]
mod ebpf_sources;

fn main() -> Result<(), Box<dyn Error>> {
    let workspace =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("the crate is not in the workspace")?;
    let (object, fingerprint) =
        (workspace.join(ebpf_sources::OBJECT), workspace.join(ebpf_sources::FINGERPRINT));
    for path in [&object, &fingerprint] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    for source in ebpf_sources::SOURCES {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    if !object.is_file() {
        let object = object.display();
        println!("cargo::error=the eBPF object is missing at {object}: run `cargo xtask build-ebpf`");
        return Ok(());
    }
    if fs::read_to_string(&fingerprint).unwrap_or_default() != ebpf_sources::fingerprint(workspace)? {
        println!(
            "cargo::error=the eBPF object was built from other sources than these: run `cargo xtask build-ebpf`"
        );
        return Ok(());
    }
    // Into the build directory: `include_bytes!` then sees what was checked here.
    let copy = Path::new(&env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("netmon-ebpf");
    fs::copy(&object, &copy)?;
    Ok(())
}
