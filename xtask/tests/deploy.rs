//! The systemd units: understood by systemd, and as closed as they are said to be. Needs systemd's tools, not systemd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Programs, and how exposed systemd may call them at most: 0 (nothing can go wrong) to 10.
const UNITS: [(&str, f64); 2] = [("netmon-agent", 2.5), ("netmon-server", 1.5)];

fn unit(program: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(format!("{program}.service"))
}

/// Without a pager and whatever else a terminal would get.
fn analyze(arguments: &[&str], unit: &Path) -> Output {
    let mut command = Command::new("systemd-analyze");
    command.env("SYSTEMD_PAGER", "cat").env("LC_ALL", "C").args(arguments).arg(unit);
    command.output().expect("systemd-analyze is missing: apt-get install systemd")
}

/// The number in `→ Overall exposure level for netmon-agent.service: 2.1 OK`.
fn exposure(said: &str) -> Option<f64> {
    let (_, level) = said.split_once("Overall exposure level for ")?.1.split_once(": ")?;
    level.split_whitespace().next()?.parse().ok()
}

#[test]
fn the_units_are_as_closed_as_they_are_said_to_be() {
    for (program, limit) in UNITS {
        let output = analyze(&["security", "--offline=true"], &unit(program));
        let said = String::from_utf8_lossy(&output.stdout);
        let level = exposure(&said).unwrap_or_else(|| panic!("no level in {said:?}"));
        println!("{program}: {level}");
        assert!(level <= limit, "{program}: {level}, more than {limit}\n{said}");
    }
}

#[test]
fn the_units_are_understood_without_a_word() {
    let directory = tempfile::tempdir().unwrap();
    for (program, _) in UNITS {
        let installed = format!("/usr/local/bin/{program}");
        let text = fs::read_to_string(unit(program)).unwrap();
        assert!(text.contains(&installed), "{program}");
        // What is checked is the unit, not whether netmon is installed here.
        let copy = directory.path().join(format!("{program}.service"));
        fs::write(&copy, text.replace(&installed, "/bin/true")).unwrap();
        let output = analyze(&["verify", "--man=no"], &copy);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{program}: {}\n{said}", output.status);
    }
}

#[test]
fn a_setting_that_systemd_does_not_know_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("odd.service");
    fs::write(&copy, "[Service]\nExecStart=/bin/true\nNoNewPrivilege=yes\n").unwrap();
    let said = String::from_utf8_lossy(&analyze(&["verify", "--man=no"], &copy).stderr).into_owned();
    assert!(said.contains("NoNewPrivilege"), "{said:?}");
    let level = exposure(&String::from_utf8_lossy(&analyze(&["security", "--offline=true"], &copy).stdout));
    assert!(level.unwrap() > 9.0, "{level:?}");
}
