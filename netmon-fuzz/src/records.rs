//! Records, and the lines of text that are made of them.

use std::sync::LazyLock;

use jiff::tz::{self, TimeZone};
use netmon_common::logline;
use netmon_common::model::{MAX_RECORD, Record};
use netmon_server::render;
use netmon_server::store::{Item, What};

use crate::input::Input;

/// A record's bytes. What is read is written as what it was.
pub fn record(data: &[u8]) {
    let Ok(record) = Record::from_bytes(data) else { return };
    let again = record.to_bytes().expect("it fitted");
    assert_eq!(Record::from_bytes(&again).as_ref(), Ok(&record));
    assert!(again.len() < data.len() || again == data, "two encodings of {record:?}");
    assert!(Record::from_bytes(&[data, &[0]].concat()).is_err(), "something behind {record:?}");
}

static ZONES: LazyLock<[TimeZone; 4]> = LazyLock::new(|| {
    let berlin = TimeZone::get("Europe/Berlin").expect("zones are built in");
    let west = TimeZone::fixed(tz::Offset::MIN);
    [TimeZone::UTC, berlin, west, TimeZone::fixed(tz::Offset::MAX)]
});

/// A byte for the time zone, eight for the time at which the server received it, and a record: one line each, that no
/// string from outside can end, steer a terminal with, or turn around.
pub fn logline(data: &[u8]) {
    let mut input = Input(data);
    let zone = &ZONES[usize::from(input.byte()) % ZONES.len()];
    let received_ns = i64::from_le_bytes(input.array());
    let bytes = input.0;
    if let Ok(record) = Record::from_bytes(bytes) {
        is_one_line(&logline::line(&record, zone), bytes.len());
    }
    let what = What::Record { received_ns, bytes: bytes.to_vec() };
    is_one_line(&render::line(&Item { n: 1, what }, zone).text, bytes.len());
    let count = Some(received_ns.cast_unsigned()).filter(|count| count % 2 == 0);
    let what = What::Gap { count, since_ns: received_ns, noticed_ns: received_ns.wrapping_neg() };
    is_one_line(&render::line(&Item { n: 1, what }, zone).text, 0);
}

/// `from` bytes were put into words: at most nine for each, `\u{feff}` being the longest, and a sentence.
pub(crate) fn is_one_line(line: &str, from: usize) {
    assert!(from > MAX_RECORD || line.len() <= from * 9 + 1_000, "{} bytes: {line}", line.len());
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{61c}' | '\u{202a}'..='\u{202e}'
                | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    assert!(!line.is_empty() && !line.contains(steers), "{line:?}");
}
