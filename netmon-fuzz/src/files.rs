//! Files that people write.

use std::path::Path;

use netmon_agent::config::Config;
use netmon_agent::kernel::Sizes;
use netmon_agent::links::Choice;
use netmon_common::prefixes::{MAX_LABEL, PrefixList};

use crate::records::is_one_line;

/// `ip.txt`: what is read can be written down and is read as the same; an error is one line that names one of the file's.
pub fn prefixes(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let list = match PrefixList::parse(text) {
        Ok(list) => list,
        Err(error) => {
            assert!((1..=text.lines().count()).contains(&error.line), "{error}");
            return is_one_line(&error.to_string(), data.len());
        }
    };
    let labels = list.labels();
    assert!(labels.iter().all(|label| (1..=MAX_LABEL).contains(&label.len())));
    // All labels in their order, then each prefix under its own.
    let mut written: String = labels.iter().map(|label| format!("[{label}]\n")).collect();
    for (prefix, label) in list.prefixes() {
        assert!(prefix.trunc() == prefix && prefix.prefix_len() > 0);
        written += &format!("[{}]\n{prefix}\n", labels[usize::from(label)]);
    }
    assert_eq!(PrefixList::parse(&written).as_ref(), Ok(&list));
}

/// `agent.toml`: what is taken is within its bounds; an error names the file.
pub fn config(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let config = match Config::parse(text, Path::new("agent.toml")) {
        Ok(config) => config,
        Err(error) => return assert!(error.to_string().contains("agent.toml"), "{error}"),
    };
    assert!(Sizes::FLOWS.contains(&config.capture.flows));
    for seconds in [config.report.coverage_s, config.report.muted_s] {
        assert!((1..=3_600).contains(&seconds));
    }
    for mib in [config.spool.max_mib, config.log.max_mib] {
        assert!(mib.checked_mul(1 << 20).is_some_and(|bytes| bytes > 0));
    }
    assert!(config.filter.services.keys().all(|label| is_word(label)));
    Choice::new(&config.capture.interfaces).expect("the patterns were looked at");
}

fn is_word(label: &str) -> bool {
    !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric())
}
