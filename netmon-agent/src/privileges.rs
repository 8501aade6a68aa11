//! Least privilege: what the agent keeps of root's rights while it watches, and how it gives up the rest.
//!
//! Capabilities belong to threads, and a thread has those of the one that started it. So `main` gives them up before it
//! starts the first thread; what takes more (mounting the BPF file system, the limit of locked memory) is
//! [`kernel::prepare`], which comes before. What each capability is for: docs/security.md.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    no_new_privs, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use serde::{Deserialize, Serialize};

use crate::kernel;

/// Rights that could not be read or given up.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}; is a seccomp filter in the way?")]
pub struct PrivilegeError {
    action: &'static str,
    source: io::Error,
}

/// A directory that the agent could use only with a right that it gives up.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} belongs to user {owner}, and the agent does not take the right to write other users' files. Run: chown -R {user}: {}",
    directory.display(), directory.display()
)]
pub struct NotOurs {
    directory: PathBuf,
    owner: u32,
    user: u32,
}

/// What a thread may do, by the names of capabilities(7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Privileges {
    /// What it can use.
    pub permitted: Vec<String>,
    /// What a program that it executes could get at most, were it not for `no_new_privs`.
    pub bounding: Vec<String>,
    /// No program that it executes gets more than it has itself.
    pub no_new_privs: bool,
}

impl Privileges {
    /// Those of the calling thread.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn read() -> Result<Self, PrivilegeError> {
        let permitted = capabilities(None).map_err(failed("read the capabilities"))?.permitted;
        let bounding = bounding().map_err(failed("read the capability bounding set"))?;
        let no_new_privs = no_new_privs().map_err(failed("read no_new_privs"))?;
        Ok(Self { permitted: names(permitted), bounding: names(bounding), no_new_privs })
    }
}

impl fmt::Display for Privileges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |names: &[String]| match names {
            [] => "no capability".to_owned(),
            names => names.join(", "),
        };
        f.write_str(&list(&self.permitted))?;
        let (all, more) =
            (self.bounding.len(), self.bounding.iter().any(|name| !self.permitted.contains(name)));
        match (self.no_new_privs, more) {
            (true, false) => f.write_str("; no way to more"),
            (true, true) => write!(f, "; no_new_privs keeps it from the {all} of its bounding set"),
            (false, _) => write!(f, "; no_new_privs is NOT set, {all} in the bounding set"),
        }
    }
}

/// What watching takes; for [`restrict`].
pub const WATCHING: CapabilitySet = kernel::CAPABILITIES;
/// What it takes to enrol: nothing. For [`restrict`].
pub const NONE: CapabilitySet = CapabilitySet::empty();

/// Gives up every capability but those in `wanted` that are there, in all sets, and the way to get others by executing
/// a program. For the calling thread and those that it starts: call it while there is no other.
///
/// # Errors
/// The kernel refuses, as a seccomp filter may have it do. Too few capabilities are no error here:
/// [`kernel::preflight`] names those that are missing.
pub fn restrict(wanted: CapabilitySet) -> Result<Privileges, PrivilegeError> {
    let before = capabilities(None).map_err(failed("read the capabilities"))?;
    let kept = kept(wanted, before.permitted);
    set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    clear_ambient_capability_set().map_err(failed("clear the ambient capabilities"))?;
    // While CAP_SETPCAP is there. Who starts without it keeps the bounding set as it is; with no_new_privs nothing can
    // be got from it.
    if before.effective.contains(CapabilitySet::SETPCAP) {
        let bounding = bounding().map_err(failed("read the capability bounding set"))?;
        for capability in bounding.difference(kept).iter().flat_map(bits) {
            remove_capability_from_bounding_set(capability)
                .map_err(failed("reduce the capability bounding set"))?;
        }
    }
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("give up capabilities"))?;
    Privileges::read()
}

/// What of `permitted` is kept.
fn kept(wanted: CapabilitySet, permitted: CapabilitySet) -> CapabilitySet {
    // What CAP_SYS_ADMIN includes (capabilities(7)): all that who starts containers may have had to give.
    let included = wanted & (CapabilitySet::BPF | CapabilitySet::PERFMON);
    if !permitted.contains(included) && permitted.contains(CapabilitySet::SYS_ADMIN) {
        return permitted & (wanted | CapabilitySet::SYS_ADMIN);
    }
    permitted & wanted
}

/// Refuses a directory that belongs to somebody else and cannot be written to by the rights that are left. One that is
/// not there is fine.
///
/// # Errors
/// [`NotOurs`] says whose it is and what to do.
pub fn check_directory(directory: &Path) -> Result<(), NotOurs> {
    let refused =
        access(directory, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK) == Err(Errno::ACCESS);
    match std::fs::metadata(directory) {
        Ok(found) if refused => Err(NotOurs {
            directory: directory.to_owned(),
            owner: found.uid(),
            user: rustix::process::geteuid().as_raw(),
        }),
        _ => Ok(()),
    }
}

/// Capabilities have numbers from 0 on without a hole (include/uapi/linux/capability.h).
fn bounding() -> rustix::io::Result<CapabilitySet> {
    let mut found = CapabilitySet::empty();
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            Ok(true) => found |= capability,
            Ok(false) => {}
            // The first one that this kernel does not know.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// One by one, those that are too new for a name, too.
fn bits(set: CapabilitySet) -> impl Iterator<Item = CapabilitySet> {
    (0..u64::BITS)
        .map(|number| CapabilitySet::from_bits_retain(1 << number))
        .filter(move |bit| set.contains(*bit))
}

fn names(set: CapabilitySet) -> Vec<String> {
    let name = |bit: CapabilitySet| match bit.iter_names().next() {
        Some((name, _)) => format!("CAP_{name}"),
        None => format!("capability {}", bit.bits().trailing_zeros()),
    };
    bits(set).map(name).collect()
}

fn failed(action: &'static str) -> impl Fn(Errno) -> PrivilegeError {
    move |source| PrivilegeError { action, source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_watching_takes_is_kept_and_nothing_else() {
        assert_eq!(kept(WATCHING, CapabilitySet::from_bits_retain((1 << 41) - 1)), WATCHING);
        assert_eq!(kept(WATCHING, CapabilitySet::BPF | CapabilitySet::CHOWN), CapabilitySet::BPF);
        assert_eq!(kept(NONE, CapabilitySet::all()), NONE);
    }

    #[test]
    fn cap_sys_admin_is_kept_where_it_stands_for_what_it_includes() {
        let old = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
        assert_eq!(kept(WATCHING, old | CapabilitySet::CHOWN), old);
        assert_eq!(kept(NONE, old), NONE);
    }

    #[test]
    fn capabilities_go_by_their_names_and_new_ones_by_their_number() {
        let set = CapabilitySet::BPF | CapabilitySet::NET_ADMIN | CapabilitySet::from_bits_retain(1 << 60);
        assert_eq!(names(set), ["CAP_NET_ADMIN", "CAP_BPF", "capability 60"]);
    }

    #[test]
    fn the_description_says_whether_there_is_a_way_to_more() {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let mut privileges =
            Privileges { permitted: list(&["CAP_BPF"]), bounding: list(&["CAP_BPF"]), no_new_privs: true };
        assert_eq!(privileges.to_string(), "CAP_BPF; no way to more");
        privileges.bounding = list(&["CAP_BPF", "CAP_CHOWN"]);
        assert_eq!(privileges.to_string(), "CAP_BPF; no_new_privs keeps it from the 2 of its bounding set");
        privileges.no_new_privs = false;
        assert_eq!(privileges.to_string(), "CAP_BPF; no_new_privs is NOT set, 2 in the bounding set");
    }

    /// In a thread of its own: it has no way back.
    #[test]
    fn a_thread_that_gave_up_everything_has_nothing_and_its_children_neither() {
        let after = std::thread::spawn(|| {
            restrict(NONE).unwrap();
            std::thread::spawn(|| Privileges::read().unwrap()).join().unwrap()
        });
        let after = after.join().unwrap();
        assert!(after.permitted.is_empty() && after.no_new_privs, "{after:?}");
        let here = Privileges::read().unwrap();
        if here.permitted.iter().any(|name| name == "CAP_SETPCAP") {
            assert!(after.bounding.is_empty(), "{after:?}");
        }
    }

    #[test]
    fn a_directory_that_is_ours_or_is_not_there_is_fine() {
        let directory = tempfile::tempdir().unwrap();
        assert!(check_directory(directory.path()).is_ok());
        assert!(check_directory(&directory.path().join("none")).is_ok());
    }
}
