//! What the agent says on a kernel that is too old. `setarch --uname-2.6` (UNAME26, personality(2)) makes the kernel give a
//! release that begins with 2.6; all else stays as it is.
#![expect(clippy::unwrap_used, reason = "a test may end by a panic, in its helpers too")]

use std::path::Path;
use std::process::{Command, Output};

const TOO_OLD: &str = "is too old: netmon needs Linux 5.10 or newer. The agent does not start here, so nothing is recorded \
                       on this PC, neither transfers nor USB devices; enrolment, `doctor` and what was recorded before work";

fn on_an_old_kernel(directory: &Path, command: &str) -> Output {
    let place = |name: &str| directory.join(name).display().to_string();
    Command::new("setarch")
        .args(["--uname-2.6", env!("CARGO_BIN_EXE_netmon-agent")])
        .args(["--state-dir", &place("state"), "--log-dir", &place("log"), "--runtime-dir", &place("run")])
        .arg(command)
        .output()
        .unwrap()
}

#[test]
fn doctor_names_the_old_kernel_and_goes_on_with_its_other_checks() {
    let directory = tempfile::tempdir().unwrap();
    let output = on_an_old_kernel(directory.path(), "doctor");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(!output.status.success(), "{said}");
    let kernel = said.lines().find(|line| line.starts_with("FAIL kernel")).expect(&said);
    assert!(kernel.contains("kernel 2.6.") && kernel.contains(TOO_OLD), "{kernel}");
    for other in ["configuration", "interfaces", "udev", "enrolment"] {
        assert!(said.contains(other), "{other} in {said}");
    }
}

#[test]
fn an_agent_on_an_old_kernel_does_not_start_and_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let output = on_an_old_kernel(directory.path(), "run");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(said.contains("kernel 2.6.") && said.contains(TOO_OLD), "{said}");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}
