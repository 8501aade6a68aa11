//! The kernel matrix: the agent's kernel tests and USB tests on one kernel after the other, and a table of what passed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// Tests that prove a hook, by what their names begin with.
const HOOKS: [(&str, &str); 3] = [
    ("TCX", "network::tcx_counts_exactly"),
    ("clsact", "network::clsact_counts_exactly"),
    ("XDP", "network::xdp_counts_what_arrives"),
];

/// TCX hooks are there from this kernel on.
const TCX: (u32, u32) = (6, 6);
/// Under emulation the verifier takes 5 s to half a minute for one load of the programs. So these are the tests that show the
/// most with few loads: exact counts against the interface on each hook that there is, what an agent leaves that died,
/// and programs that speak. All of them run in the lab, on the machine's own kernel.
const KERNEL_TESTS: &str =
    "clsact_counts_exactly xdp_counts_what_arrives filters_of_an_agent_that_died each_oddity_has_its_line";
const TCX_TEST: &str = " tcx_counts_exactly";

/// Test programs of the lab that run in the guest.
pub const TESTS: [&str; 2] = ["kernel", "usb_vm"];
/// Tools of the host that these call.
pub const TOOLS: [&str; 2] = ["ip", "tc"];

/// What to run on this version.
pub fn command(version: &str) -> String {
    let tcx = if numbers(version) >= TCX { TCX_TEST } else { "" };
    format!(
        "kernel --test-threads=1 {KERNEL_TESTS}{tcx}; kernel=$?\nusb_vm --ignored --test-threads=1 && exit $kernel"
    )
}

fn numbers(version: &str) -> (u32, u32) {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// One kernel's row.
pub struct Row {
    /// `uname -r`.
    pub release: String,
    /// How long it took from the boot on.
    pub took: Duration,
    /// `true`: passed; by the test's name.
    tests: BTreeMap<String, bool>,
}

impl Row {
    /// Reads what the test programs printed.
    pub fn read(release: &str, took: Duration, output: &str) -> Self {
        Self { release: release.to_owned(), took, tests: output.lines().filter_map(verdict).collect() }
    }

    fn count(&self, is_of: impl Fn(&str) -> bool) -> String {
        let of: Vec<_> = self.tests.iter().filter(|(name, _)| is_of(name)).collect();
        format!("{} of {}", of.iter().filter(|(_, passed)| **passed).count(), of.len())
    }
}

/// `test network::some_name ... ok`.
fn verdict(line: &str) -> Option<(String, bool)> {
    let (name, verdict) = line.trim().strip_prefix("test ")?.split_once(" ... ")?;
    let passed = match verdict {
        "ok" => true,
        "ignored" => return None,
        verdict if verdict.starts_with("ignored, ") => return None,
        _ => false,
    };
    Some((name.to_owned(), passed))
}

/// The kernel tests are in modules, the USB tests are not.
fn is_of_kernel(name: &str) -> bool {
    name.contains("::")
}

/// The table, in Markdown, and what did not pass.
pub fn table(rows: &[Row]) -> String {
    let mut text =
        String::from("| kernel | hooks | kernel tests | USB tests | took |\n|---|---|---|---|--:|\n");
    for row in rows {
        let has = |begin: &str| row.tests.iter().any(|(name, passed)| *passed && name.starts_with(begin));
        let hooks: Vec<_> = HOOKS.iter().filter(|(_, test)| has(test)).map(|(hook, _)| *hook).collect();
        let (kernel, usb) = (row.count(is_of_kernel), row.count(|name| !is_of_kernel(name)));
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {kernel} | {usb} | {} s |",
            row.release,
            hooks.join(", "),
            row.took.as_secs()
        );
    }
    for row in rows {
        for (name, _) in row.tests.iter().filter(|(_, passed)| !**passed) {
            let _ = writeln!(text, "FAILED on {}: {name}", row.release);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_hooks_that_tests_proved_and_names_what_failed() {
        let output = "\nrunning 3 tests\r\ntest network::clsact_counts_exactly_what_the_interface_counts ... ok\r\n\
             test network::xdp_counts_what_arrives_and_tc_what_leaves_without_counting_twice ... FAILED\n\
             test limits::a_long_one ... ignored, takes minutes\ntest a_keyboard_is_seen ... ok\n\
             test result: FAILED. 1 passed; 1 failed\n";
        let row = Row::read("6.1.0-50-amd64", Duration::from_secs(61), output);
        assert_eq!(
            table(&[row]).lines().skip(2).collect::<Vec<_>>(),
            [
                "| 6.1.0-50-amd64 | clsact | 1 of 2 | 1 of 1 | 61 s |",
                "FAILED on 6.1.0-50-amd64: network::xdp_counts_what_arrives_and_tc_what_leaves_without_counting_twice",
            ]
        );
    }

    #[test]
    fn the_test_of_tcx_runs_where_there_is_tcx() {
        for version in ["5.10", "6.1"] {
            assert!(!command(version).contains(TCX_TEST), "{version}");
        }
        for version in ["6.12", "6.18", "7.3"] {
            assert!(command(version).contains(TCX_TEST), "{version}");
        }
    }
}
