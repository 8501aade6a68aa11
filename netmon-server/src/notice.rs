//! What the server itself notices about a seat: silence and its end, clones, faults. Items of the seat's history.

use jiff::tz::TimeZone;
use netmon_common::logline::time;
use netmon_common::raw::Raw;
use serde::{Deserialize, Serialize};

/// Something that the server noticed. New kinds are added at the end: the order is the encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// Nothing came from this PC for a while, though it was to be heard every few seconds.
    Missing {
        /// When it was heard last, the server's clock.
        since_ns: i64,
    },
    /// It is heard again.
    Back {
        /// When it had been heard last, the server's clock.
        since_ns: i64,
        /// Why it was not heard, most likely.
        reason: Reason,
    },
    /// Two machines use this agent's identity.
    Cloned {
        /// Address of the one that was there.
        older: Raw,
        /// Address of the other one.
        newer: Raw,
    },
    /// The agent broke the protocol again and again and is not let in for a while.
    Quarantined {
        /// Until when, the server's clock.
        until_ns: i64,
        /// What it did last.
        reason: Raw,
    },
    /// The PC's clock and the server's differ from now on by so much.
    ClockOffset {
        /// The PC's clock minus the server's.
        offset_ns: i64,
    },
    /// The agent holds a checkpoint that this server signed and its store does not have: the store was set back.
    StoreSetBack {
        /// Items of this seat's history, as the checkpoint says.
        size: u64,
        /// When the checkpoint was signed, the server's clock.
        signed_ns: i64,
    },
    /// The agent has a certificate for a new key.
    Renewed {
        /// Until when it is valid, the server's clock.
        not_after_ns: i64,
    },
    /// The agent may not deliver any more.
    Revoked,
    /// The agent holds a checkpoint that the key of this server's log did not sign.
    StrangeWitness {
        /// When it was signed, as it says.
        signed_ns: i64,
    },
    /// A USB device that has come to this PC was at another one before.
    DeviceMoved {
        /// Vendor's name.
        vendor: Raw,
        /// Product's name.
        model: Raw,
        /// Serial number.
        serial: Raw,
        /// The other PC's seat.
        seat: Raw,
        /// When it was last said to have come or gone there, the server's clock.
        last_ns: i64,
    },
    /// A USB device that has come to this PC is at another one as well: several have this serial number.
    SerialShared {
        /// Vendor's name.
        vendor: Raw,
        /// Product's name.
        model: Raw,
        /// Serial number.
        serial: Raw,
        /// The other PC's seat.
        seat: Raw,
    },
}

/// Why a PC was not heard, most likely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// The PC was started anew; the agent had ended in good order before.
    Reboot,
    /// The PC was started anew without the agent having ended: power cut, reset, crash.
    PowerLost,
    /// The agent was stopped in good order and started again.
    AgentStopped,
    /// The agent was killed and started again.
    AgentKilled,
    /// The agent went on watching; the connection was gone.
    NetworkGone,
    /// The agent's process was there, but its watch stood still (stopped, suspended, overloaded).
    HeldUp,
    /// This server did not run.
    ServerDown,
    /// An agent of an older version does not tell.
    Unknown,
}

impl Reason {
    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Reboot => "the PC was shut down and started again",
            Self::PowerLost => {
                "the PC went down without shutting down (power, reset, crash) and was started again"
            }
            Self::AgentStopped => "the agent was stopped and started again",
            Self::AgentKilled => "the agent was killed and started again",
            Self::NetworkGone => "the network was gone; the agent went on watching",
            Self::HeldUp => "the agent was held up (stopped, suspended or overloaded)",
            Self::ServerDown => "this server did not run",
            Self::Unknown => "the reason is not known",
        }
    }
}

impl Notice {
    /// The bytes that are kept.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Integers and bounded strings into a vector: cannot fail.
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// `None`: of a newer server.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        postcard::take_from_bytes(bytes).ok().filter(|(_, rest)| rest.is_empty()).map(|(notice, _)| notice)
    }

    /// Does it say something about what may not have been seen?
    pub fn is_about_coverage(&self) -> bool {
        !matches!(self, Self::ClockOffset { .. } | Self::Renewed { .. })
    }

    /// Does it say that what this server stored of the seat before, or signed, cannot be relied on? Nothing that an agent
    /// can make up.
    pub fn is_against_the_history(&self) -> bool {
        matches!(self, Self::StoreSetBack { .. })
    }

    /// For a line behind its time.
    pub fn text(&self, noticed_ns: i64, zone: &TimeZone) -> String {
        match self {
            Self::Missing { since_ns } => format!("MISSING: nothing heard since {}", time(*since_ns, zone)),
            Self::Back { since_ns, reason } => {
                let seconds = noticed_ns.saturating_sub(*since_ns).max(0) / 1_000_000_000;
                format!("back after {seconds} s: {}", reason.text())
            }
            Self::Cloned { older, newer } => format!(
                "CLONE: two machines use this agent's identity, \"{}\" and \"{}\"; revoke it and enrol both anew",
                older.escaped(),
                newer.escaped()
            ),
            Self::Quarantined { until_ns, reason } => {
                format!("QUARANTINED until {}: {}", time(*until_ns, zone), reason.escaped())
            }
            Self::ClockOffset { offset_ns } => {
                let (seconds, way) = (
                    offset_ns.unsigned_abs() as f64 / 1e9,
                    if *offset_ns < 0 { "behind" } else { "ahead of" },
                );
                format!("the PC's clock is {seconds:.1} s {way} the server's")
            }
            Self::StoreSetBack { size, signed_ns } => format!(
                "TAMPERED: this server's store was set back: at {} it had {size} items of this PC and signed that",
                time(*signed_ns, zone)
            ),
            Self::Renewed { not_after_ns } => {
                format!("certificate renewed, valid until {}", time(*not_after_ns, zone))
            }
            Self::StrangeWitness { signed_ns } => format!(
                "the agent holds a signature of {} that is not this server's: the log's key was replaced, or the agent's file is damaged",
                time(*signed_ns, zone)
            ),
            Self::DeviceMoved { vendor, model, serial, seat, last_ns } => format!(
                "SAME DEVICE: \"{} {}\" serial \"{}\" was seen at {} too, last at {}",
                vendor.escaped(),
                model.escaped(),
                serial.escaped(),
                seat.escaped(),
                time(*last_ns, zone)
            ),
            Self::SerialShared { vendor, model, serial, seat } => format!(
                "\"{} {}\" serial \"{}\" is at {} as well: several devices have this serial number, it tells nothing",
                vendor.escaped(),
                model.escaped(),
                serial.escaped(),
                seat.escaped()
            ),
            Self::Revoked => "REVOKED: this PC may not deliver any more".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_and_strangers_are_none() {
        let notices = [
            Notice::Missing { since_ns: -1 },
            Notice::Back { since_ns: 0, reason: Reason::Unknown },
            Notice::Cloned { older: Raw::new([0xff; 255]), newer: Raw::default() },
            Notice::DeviceMoved {
                vendor: "SanDisk".into(),
                model: Raw::new([0xff; 255]),
                serial: "4C53".into(),
                seat: "pc-12".into(),
                last_ns: 1,
            },
            Notice::Revoked,
        ];
        for notice in notices {
            assert_eq!(Notice::from_bytes(&notice.to_bytes()), Some(notice));
        }
        for bad in [&b""[..], &[200], &[7, 0]] {
            assert_eq!(Notice::from_bytes(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_line_stays_one_line() {
        let hostile = Raw::new(b"a\nb\x1b[2J\xe2\x80\xae");
        let text = Notice::Quarantined { until_ns: 0, reason: hostile }.text(0, &TimeZone::UTC);
        assert!(!text.contains(['\n', '\x1b', '\u{202e}']), "{text:?}");
    }

    #[test]
    fn a_clock_behind_and_one_ahead_are_told_apart() {
        let text = |offset_ns| Notice::ClockOffset { offset_ns }.text(0, &TimeZone::UTC);
        assert_eq!(text(-2_500_000_000), "the PC's clock is 2.5 s behind the server's");
        assert_eq!(text(3_000_000_000), "the PC's clock is 3.0 s ahead of the server's");
    }
}
