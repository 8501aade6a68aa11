//! The PC's own log against the server's, line by line. Pure.

use std::collections::BTreeMap;

/// What the server adds to a line that came late.
const LATE: &str = " (received late, ";
/// Reasons of gaps that the server itself finds: the PC's log has no such lines.
const OF_SERVER: [&str; 2] = [
    "records never came from this PC",
    "another history of this PC begins, what it had not delivered before is unknown",
];
/// Reasons of gaps that a kill explains. A write into the spool that was cut off by a kill is a damaged end: what it
/// would have said is in neither log.
const EXPLAINED: [&str; 3] = [
    "no agent ran",
    "the agent was held up, transfers may be merged",
    "the spool's end was damaged and cut off",
];

/// How a line begins that tells what the server noticed.
const NOTICED: &str = "SERVER ";
/// What it may notice when everything is killed.
const EXPECTED: [&str; 2] = ["SERVER MISSING: ", "SERVER back after "];

/// What the comparison shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Lines that both have.
    pub same: u64,
    /// Last lines of a run that the agent was killed before it wrote them: the spool had them first.
    pub only_spooled: u64,
    /// Last lines of a run that the agent was killed while it wrote them.
    pub torn: u64,
    /// Lines of the PC that the server does not have.
    pub lost: u64,
    /// Lines that the server has more often than the PC.
    pub doubled: u64,
    /// Lines of what the server itself noticed.
    pub noticed: u64,
    /// Gaps in the server's log by reason.
    pub gaps: BTreeMap<String, u64>,
    /// What is wrong, in words.
    pub findings: Vec<String>,
}

/// Compares them. Both are in the order in which the PC recorded; only at the end of a run may the server have one line
/// more.
pub fn compare(own: &str, server: &str) -> Account {
    let mut account = Account::default();
    for (name, log) in [("the PC's log", own), ("the server's log", server)] {
        if !log.is_empty() && !log.ends_with('\n') {
            account.findings.push(format!("{name} ends within a line"));
        }
    }
    let own: Vec<&str> = own.lines().collect();
    let server: Vec<&str> = server.lines().map(recorded).collect();
    account.gaps = gaps(&server);
    let (noticed, server): (Vec<&str>, Vec<&str>) =
        server.into_iter().partition(|line| sentence(line).starts_with(NOTICED));
    account.noticed = noticed.len() as u64;
    for line in noticed {
        if !EXPECTED.iter().any(|expected| sentence(line).starts_with(expected)) {
            account.findings.push(format!("the server noticed what no kill explains: {line}"));
        }
    }
    let server: Vec<&str> = server
        .into_iter()
        .filter(|line| reason(line).is_none_or(|reason| !OF_SERVER.contains(&reason)))
        .collect();

    let (mut mine, mut theirs) = (0, 0);
    loop {
        let (a, b) = (own.get(mine), server.get(theirs));
        let at_end = |lines: &[&str], next: usize| lines.get(next).is_none_or(|line| is_start(line));
        match (a, b) {
            (None, None) => break,
            (Some(a), Some(b)) if a == b => {
                account.same += 1;
                mine += 1;
            }
            (_, Some(_)) if at_end(&server, theirs + 1) && at_end(&own, mine) => account.only_spooled += 1,
            (Some(a), Some(b))
                if at_end(&server, theirs + 1) && at_end(&own, mine + 1) && b.starts_with(a) =>
            {
                account.torn += 1;
                mine += 1;
            }
            _ => {
                differ(&mut account, (&own, mine), (&server, theirs));
                break;
            }
        }
        theirs += 1;
    }
    let restarts = account.gaps.get(OF_SERVER[1]).copied().unwrap_or(0);
    let damaged = account.gaps.get(EXPLAINED[2]).copied().unwrap_or(0);
    for (reason, times) in &account.gaps {
        // A spool with a damaged end goes on in a new epoch, which the server takes for another history.
        let is_explained =
            EXPLAINED.contains(&reason.as_str()) || (reason == OF_SERVER[1] && restarts <= damaged);
        if !is_explained {
            account.findings.push(format!("{times} gaps that nothing here explains: {reason}"));
        }
    }
    account
}

/// The logs part here: counts what is lost and doubled in all that follows, whatever its order.
fn differ(account: &mut Account, (own, mine): (&[&str], usize), (server, theirs): (&[&str], usize)) {
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    own[mine..].iter().for_each(|line| *counts.entry(line).or_default() += 1);
    server[theirs..].iter().for_each(|line| *counts.entry(line).or_default() -= 1);
    account.lost = counts.values().filter(|count| **count > 0).sum::<i64>().unsigned_abs();
    account.doubled = counts.values().filter(|count| **count < 0).sum::<i64>().unsigned_abs();
    let shown = |lines: &[&str], at: usize| match lines.get(at) {
        Some(line) => format!("line {}: {line}", at + 1),
        None => "its end".to_owned(),
    };
    account.findings.push(format!(
        "the logs part: the PC's has {}; the server's has, without gaps of its own, {}",
        shown(own, mine),
        shown(server, theirs)
    ));
    let first = |lines: &[&str], sign: i64| {
        lines
            .iter()
            .find(|line| counts.get(*line).is_some_and(|count| count.signum() == sign))
            .map(|line| line.to_string())
    };
    if let Some(line) = first(&own[mine..], 1) {
        account.findings.push(format!("first line that the server does not have: {line}"));
    }
    if let Some(line) = first(&server[theirs..], -1) {
        account.findings.push(format!("first line that the server has too often: {line}"));
    }
}

/// The line as the PC recorded it.
fn recorded(line: &str) -> &str {
    match line.rsplit_once(LATE) {
        Some((line, time)) if time.ends_with(')') => line,
        _ => line,
    }
}

fn sentence(line: &str) -> &str {
    line.split_once(' ').map_or("", |(_, sentence)| sentence)
}

fn is_start(line: &str) -> bool {
    sentence(line).starts_with("agent started: run ")
}

/// Why there is a gap, if the line tells of one.
fn reason(line: &str) -> Option<&str> {
    let (_, told) = sentence(line).strip_prefix("GAP from ")?.split_once(": ")?;
    told.rsplit_once(", ").map(|(reason, _count)| reason)
}

fn gaps(lines: &[&str]) -> BTreeMap<String, u64> {
    let mut gaps = BTreeMap::new();
    for reason in lines.iter().filter_map(|line| reason(line)) {
        *gaps.entry(reason.to_owned()).or_default() += 1;
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(sentences: &[&str]) -> String {
        sentences.iter().map(|sentence| format!("2026-11-23T13:42:05.000+01:00 {sentence}\n")).collect()
    }

    const RUN_1: &str = "agent started: run 1, netmon";
    const RUN_2: &str = "agent started: run 2, netmon";
    const DOWN: &str = "GAP from 2026-11-23T13:42:05.000+01:00 to 2026-11-23T13:42:06.000+01:00: no agent ran, count unknown";
    const NEVER: &str = "GAP from 2026-11-23T13:42:05.000+01:00 to 2026-11-23T13:42:06.000+01:00: records never came from this PC, 7 records";

    #[test]
    fn what_the_server_noticed_is_not_the_pcs_and_a_clone_is_wrong() {
        let missing = "2026-11-23T13:42:05.000+01:00 SERVER MISSING: nothing heard since then\n";
        let account = compare("", missing);
        assert_eq!((account.noticed, account.findings.len()), (1, 0));
        let clone = missing.replace("MISSING: nothing", "CLONE: two");
        assert_eq!(compare("", &clone).findings.len(), 1);
    }

    #[test]
    fn the_same_lines_are_in_order_also_where_they_came_late() {
        let own = log(&[RUN_1, "k", DOWN]);
        let server = own.replace(" k\n", " k (received late, 2026-11-23T13:42:11.000+01:00)\n");
        let gaps = BTreeMap::from([("no agent ran".to_owned(), 1)]);
        assert_eq!(compare(&own, &server), Account { same: 3, gaps, ..Account::default() });
    }

    #[test]
    fn a_kill_may_leave_one_line_of_each_run_in_the_spool_alone_or_torn() {
        let own = log(&[RUN_1, "k", RUN_2, "b", "cou"]);
        let server = log(&[RUN_1, "k", "only spooled", RUN_2, "b", "counted"]);
        let account = compare(&own, &server);
        assert_eq!((account.same, account.only_spooled, account.torn), (4, 1, 1));
        assert_eq!(account.findings, Vec::<String>::new());
        // Not in the middle of a run, and not two.
        assert_eq!(compare(&log(&[RUN_1, "k"]), &log(&[RUN_1, "x", "k"])).doubled, 1);
        assert_eq!(compare(&log(&[RUN_1, "k"]), &log(&[RUN_1, "k", "x", "y"])).doubled, 2);
    }

    #[test]
    fn a_run_that_recorded_its_start_in_the_spool_alone_is_no_loss() {
        let account = compare(&log(&[RUN_1, "k"]), &log(&[RUN_1, "k", RUN_2]));
        assert_eq!((account.same, account.only_spooled, account.findings.len()), (2, 1, 0));
    }

    #[test]
    fn a_lost_line_is_found_and_named() {
        let account = compare(&log(&[RUN_1, "k", "b", "c"]), &log(&[RUN_1, "k", "c"]));
        assert_eq!((account.lost, account.doubled), (1, 0));
        assert!(account.findings[1].ends_with(" b"), "{account:?}");
        // Also at the end of a run, and at the end of all.
        assert_eq!(compare(&log(&[RUN_1, "k", RUN_2]), &log(&[RUN_1, RUN_2])).lost, 1);
        assert_eq!(compare(&log(&[RUN_1, "k"]), &log(&[RUN_1])).lost, 1);
    }

    #[test]
    fn a_doubled_line_is_found_and_named() {
        let account = compare(&log(&[RUN_1, "k", "b", "c"]), &log(&[RUN_1, "k", "b", "k", "b", "c"]));
        assert_eq!((account.lost, account.doubled), (0, 2));
        assert!(account.findings[1].ends_with(" k"), "{account:?}");
    }

    #[test]
    fn lines_in_another_order_are_a_finding() {
        let account = compare(&log(&[RUN_1, "k", "b", "c"]), &log(&[RUN_1, "b", "k", "c"]));
        assert_eq!((account.lost, account.doubled, account.findings.len()), (0, 0, 1));
    }

    #[test]
    fn a_gap_that_no_kill_explains_is_a_finding() {
        let account = compare(&log(&[RUN_1, "k"]), &log(&[RUN_1, NEVER, "k"]));
        assert_eq!((account.same, account.findings.len()), (2, 1), "{account:?}");
        let begins_anew = NEVER.replace("records never came from this PC", OF_SERVER[1]);
        let damaged = NEVER.replace("records never came from this PC", EXPLAINED[2]);
        assert_eq!(compare(&log(&[RUN_1]), &log(&[&begins_anew, RUN_1])).findings.len(), 1);
        let own = log(&[RUN_1, &damaged]);
        assert_eq!(compare(&own, &log(&[&begins_anew, RUN_1, &damaged])).findings, Vec::<String>::new());
    }

    #[test]
    fn a_log_that_ends_within_a_line_is_a_finding() {
        let own = log(&[RUN_1, "k"]);
        assert_eq!(compare(&own, own.trim_end()).findings, ["the server's log ends within a line"]);
    }
}
