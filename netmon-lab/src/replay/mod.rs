//! Plays captures over a cable past netmon's programs, and compares what they count, flow by flow, with what tshark
//! says of the same captures.
//!
//! * [`capture`]: the frames of a file
//! * [`link`]: any link layer made into Ethernet
//! * [`wire`]: the cable, with netmon at three hooks
//! * [`tshark`]: what tshark says of each frame
//! * [`judge`]: what netmon should count by that, and where both rightly differ
//! * [`tally`]: counts, and their differences
//!
//! Frames are played as they were captured, one behind the other as fast as they go: truncated ones (snaplen) are
//! played truncated, super-packets (GSO, GRO) as one long frame. A frame that cannot be played or compared is named, not
//! passed over in silence.

pub mod capture;
pub mod judge;
pub mod link;
pub mod tally;
pub mod tshark;
pub mod wire;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use self::{
    capture::{Capture, CaptureError},
    judge::Judge,
    link::NoEthernet,
    tally::{Difference, Tally},
    tshark::{Tshark, TsharkError},
    wire::{Hook, Wire, WireError},
};

/// Differences of a hook that are shown; the others are counted.
const SHOWN: usize = 40;

/// Why a capture could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// tshark.
    #[error(transparent)]
    Tshark(#[from] TsharkError),
    /// The cable.
    #[error("{}: cannot play it", path.display())]
    Wire {
        /// The capture.
        path: PathBuf,
        /// Why.
        source: WireError,
    },
    /// A link type that cannot be made into Ethernet.
    #[error(
        "{}: frame {frame} has link type {link}; only Ethernet, raw IP, Linux cooked and BSD loopback can be played",
        path.display()
    )]
    LinkType {
        /// The capture.
        path: PathBuf,
        /// The frame, from 1.
        frame: u64,
        /// `LINKTYPE_` number.
        link: u32,
    },
    /// tshark counts frames otherwise than we do: the file holds records that are none.
    #[error("{}: tshark and the lab do not see the same frames, from frame {frame} on", path.display())]
    OutOfStep {
        /// The capture.
        path: PathBuf,
        /// The first one, from 1.
        frame: u64,
    },
}

/// Why a frame was not played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NotPlayed {
    /// Shorter than its link-layer header.
    TooShort,
    /// Longer than a veth device carries: a captured super-packet.
    TooLong,
    /// The kernel drops it ahead of TC ingress.
    EndsInTag,
    /// tshark does not read far enough.
    NotComparable,
}

impl fmt::Display for NotPlayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooShort => "shorter than its link-layer header",
            Self::TooLong => "longer than a veth device carries",
            Self::EndsInTag => "ends in its VLAN tag, so the kernel drops it ahead of TC ingress",
            Self::NotComparable => "tshark does not read on behind one of its IPv6 extension headers",
        })
    }
}

/// A capture that was played and compared.
#[derive(Debug)]
pub struct Replay {
    /// The capture.
    pub path: PathBuf,
    /// Frames in it.
    pub frames: u64,
    /// Frames that were not played, by number.
    pub not_played: Vec<(u64, NotPlayed)>,
    /// The file ends in the middle of a frame, which was left out.
    pub cut_short: bool,
    /// What each hook saw.
    pub hooks: Vec<Compared>,
}

/// One hook's count against tshark's.
#[derive(Debug)]
pub struct Compared {
    /// Where.
    pub hook: Hook,
    /// What should be counted by what tshark says.
    pub tshark: Tally,
    /// What netmon counted.
    pub netmon: Tally,
    /// What differs.
    pub differences: Vec<Difference>,
}

impl Replay {
    /// True when netmon and tshark agree in everything that was played.
    pub fn agrees(&self) -> bool {
        self.hooks.iter().all(|compared| compared.differences.is_empty())
    }
}

/// Plays a capture and compares. Needs root.
///
/// # Errors
/// [`ReplayError`]; a difference is none.
pub fn replay(path: &Path) -> Result<Replay, ReplayError> {
    let wire_error = |source| ReplayError::Wire { path: path.to_owned(), source };
    let capture = Capture::open(path)?;
    let tshark = Tshark::start(path)?;
    wire::with_wire(|wire| play(path, capture, tshark, wire)).map_err(wire_error)?
}

fn play(
    path: &Path,
    mut capture: Capture,
    mut tshark: Tshark,
    wire: &mut Wire,
) -> Result<Replay, ReplayError> {
    let wire_error = |source| ReplayError::Wire { path: path.to_owned(), source };
    let mut judges = Hook::ALL.map(|hook| (hook, Judge::new(hook == Hook::TcIngress)));
    let mut not_played = Vec::new();
    let mut frames = 0;
    loop {
        let (frame, dissected) = match (capture.next_frame()?, tshark.next_frame()?) {
            (None, None) => break,
            (Some(frame), Some(dissected))
                if dissected.number == frame.number
                    && usize::try_from(dissected.captured) == Ok(frame.bytes.len()) =>
            {
                (frame, dissected)
            }
            _ => return Err(ReplayError::OutOfStep { path: path.to_owned(), frame: frames + 1 }),
        };
        frames = frame.number;
        let ethernet = match link::ethernet(frame.link, &frame.bytes) {
            Ok(ethernet) => ethernet,
            Err(NoEthernet::TooShort) => {
                not_played.push((frame.number, NotPlayed::TooShort));
                continue;
            }
            Err(NoEthernet::Unknown(link)) => {
                return Err(ReplayError::LinkType { path: path.to_owned(), frame: frame.number, link });
            }
        };
        if judge::is_unknown(&dissected) {
            not_played.push((frame.number, NotPlayed::NotComparable));
        } else if link::ends_in_tag(&ethernet) {
            not_played.push((frame.number, NotPlayed::EndsInTag));
        } else if wire.send(&ethernet).map_err(wire_error)? {
            let length = u32::try_from(ethernet.len()).unwrap_or(u32::MAX);
            judges.iter_mut().for_each(|(_, judge)| judge.count(&dissected, length));
        } else {
            not_played.push((frame.number, NotPlayed::TooLong));
        }
    }
    let cut_short = capture.cut_short();
    match tshark.finish() {
        // It has read as many frames as we have, and says that there should be more.
        Err(TsharkError::Failed { .. }) if cut_short => {}
        result => result?,
    }
    let counted = wire.count().map_err(wire_error)?.into_iter();
    let hooks = counted.zip(judges).map(|((hook, netmon), (_, judge))| {
        let tshark = judge.tally().clone();
        let differences = tshark.differences(&netmon);
        Compared { hook, tshark, netmon, differences }
    });
    Ok(Replay { path: path.to_owned(), frames, not_played, cut_short, hooks: hooks.collect() })
}

impl fmt::Display for Replay {
    /// One line a hook; below it, one line a difference.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} frames", self.path.display(), self.frames)?;
        if self.cut_short {
            f.write_str(" and the begin of one more")?;
        }
        for why in [NotPlayed::TooShort, NotPlayed::TooLong, NotPlayed::EndsInTag, NotPlayed::NotComparable] {
            let frames: Vec<_> = self.not_played.iter().filter(|(_, reason)| *reason == why).collect();
            if !frames.is_empty() {
                let numbers: Vec<_> =
                    frames.iter().take(SHOWN).map(|(number, _)| number.to_string()).collect();
                let more = if frames.len() > SHOWN { ", …" } else { "" };
                write!(f, "\n  {} not played, {why}: {}{more}", frames.len(), numbers.join(", "))?;
            }
        }
        for Compared { hook, tshark, netmon, differences } in &self.hooks {
            if differences.is_empty() {
                write!(f, "\n  {hook}: equal ({netmon})")?;
                continue;
            }
            write!(f, "\n  {hook}: {} differences (tshark / netmon)", differences.len())?;
            write!(f, "\n    tshark: {tshark}\n    netmon: {netmon}")?;
            for difference in differences.iter().take(SHOWN) {
                write!(f, "\n    {difference}")?;
            }
            if differences.len() > SHOWN {
                write!(f, "\n    … and {} more", differences.len() - SHOWN)?;
            }
        }
        Ok(())
    }
}
