//! A stored item → the line that shows it.

use jiff::tz::TimeZone;
use netmon_common::logline;
use netmon_common::model::{Event, Gap, GapReason, Record};

use crate::notice::Notice;
use crate::store::{Item, What};

/// A record that took longer than this to arrive is marked. Healthy agents deliver within a second; the rest
/// is room for clocks that differ.
const LATE_NS: i64 = 5_000_000_000;

/// A line without its line end, and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// One line of text; strings from outside are escaped.
    pub text: String,
    /// True when it belongs into `usb.log` too.
    pub usb: bool,
}

/// The item's line in the time zone of the reader.
pub fn line(item: &Item, zone: &TimeZone) -> Line {
    match &item.what {
        What::Record { received_ns, bytes } => match Record::from_bytes(bytes) {
            Ok(record) => {
                let mut text = logline::line(&record, zone);
                if received_ns.saturating_sub(record.wall_ns) > LATE_NS {
                    text += &format!(" (received late, {})", logline::time(*received_ns, zone));
                }
                Line { text, usb: logline::is_usb(&record.event) }
            }
            // A newer agent's, or the store was damaged, or an older server reads it.
            Err(error) => Line {
                text: format!(
                    "{} record {} cannot be shown: {error}",
                    logline::time(*received_ns, zone),
                    item.n
                ),
                usb: true,
            },
        },
        What::Notice { noticed_ns, notice } => {
            let text = notice.as_ref().map_or_else(
                || "something that a newer netmon-server noticed".to_owned(),
                |notice| notice.text(*noticed_ns, zone),
            );
            let usb = notice.as_ref().is_none_or(Notice::is_about_coverage);
            Line { text: format!("{} SERVER {text}", logline::time(*noticed_ns, zone)), usb }
        }
        What::Gap { count, since_ns, noticed_ns } => {
            let gap = Gap {
                reason: if count.is_some() { GapReason::NeverReceived } else { GapReason::HistoryRestarted },
                from_wall_ns: *since_ns,
                to_wall_ns: *noticed_ns,
                count: *count,
            };
            let record = Record { seq: 0, run: 0, boot_ns: 0, wall_ns: *noticed_ns, event: Event::Gap(gap) };
            // Nobody knows what was in it.
            Line { text: logline::line(&record, zone), usb: true }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDED: i64 = 1_795_437_725_000_000_000;

    fn shown(event: Event, received_ns: i64) -> Line {
        let bytes = Record { seq: 1, run: 1, boot_ns: 0, wall_ns: RECORDED, event }.to_bytes().unwrap();
        line(&Item { n: 1, what: What::Record { received_ns, bytes } }, &TimeZone::UTC)
    }

    #[test]
    fn a_record_that_arrives_in_time_is_its_log_line() {
        let line = shown(Event::AgentStopped, RECORDED + LATE_NS);
        assert_eq!(line.text, "2026-11-23T12:42:05.000+00:00 agent stopped");
        assert!(!line.usb);
    }

    #[test]
    fn a_late_record_says_when_it_was_received() {
        let line = shown(Event::AgentStopped, RECORDED + LATE_NS + 1_000_000_000);
        assert_eq!(
            line.text,
            "2026-11-23T12:42:05.000+00:00 agent stopped (received late, 2026-11-23T12:42:11.000+00:00)"
        );
    }

    #[test]
    fn a_gap_is_a_line_in_both_logs() {
        let what = What::Gap { count: Some(7), since_ns: RECORDED, noticed_ns: RECORDED + 1_000_000_000 };
        let line = line(&Item { n: 3, what }, &TimeZone::UTC);
        assert_eq!(
            line.text,
            "2026-11-23T12:42:06.000+00:00 GAP from 2026-11-23T12:42:05.000+00:00 to \
             2026-11-23T12:42:06.000+00:00: records never came from this PC, 7 records"
        );
        assert!(line.usb);
    }

    #[test]
    fn another_history_is_a_gap_of_unknown_size() {
        let what = What::Gap { count: None, since_ns: RECORDED, noticed_ns: RECORDED };
        let line = line(&Item { n: 3, what }, &TimeZone::UTC);
        assert!(line.text.contains("GAP from ") && line.text.contains("another history"), "{}", line.text);
        assert!(line.text.ends_with(", count unknown") && line.usb, "{}", line.text);
    }

    #[test]
    fn a_damaged_record_is_a_line_too() {
        let what = What::Record { received_ns: RECORDED, bytes: vec![0xff] };
        let line = line(&Item { n: 3, what }, &TimeZone::UTC);
        assert!(line.text.contains("record 3 cannot be shown"), "{}", line.text);
    }
}
