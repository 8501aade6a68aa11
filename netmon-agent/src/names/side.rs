//! One side of a flow: what it has said so far, and if it will ever say a name.

use netmon_common::model::NameSource;
use netmon_common::raw::Raw;

use super::quic::{self, Quic};
use super::stream::{MOST_BYTES, Stream};
use super::tls::{self, Dtls, Hello};
use super::{Read, Sample, http};

/// Packets of one direction that may be of an unknown kind: TLS may begin behind the words of another protocol (STARTTLS,
/// SOCKS), and a kernel that saw a flow begin samples no more.
const MOST_UNKNOWN: u16 = 8;
/// Packets of one direction in all.
const MOST_SAMPLES: u16 = 256;

/// What a sample leads to.
pub(super) enum Step {
    /// Nothing: everything was said before.
    Known,
    More,
    /// A name that stays.
    Name {
        name: Raw,
        source: NameSource,
        has_ech: bool,
        is_whole: bool,
    },
    /// This side will never say a name.
    Never,
    /// Nobody will.
    Nameless,
}

impl Step {
    fn of_hello(read: Read<Hello>, source: NameSource) -> Self {
        let is_whole = matches!(read, Read::Done(_));
        match read {
            Read::Done(Hello { name: Some(name), has_ech, .. })
            | Read::More(Some(Hello { name: Some(name), has_ech, .. })) => {
                Self::Name { name, source, has_ech, is_whole }
            }
            Read::Done(_) => Self::Nameless,
            Read::More(_) => Self::More,
            Read::Not => Self::Never,
        }
    }
}

/// One side of a TCP flow.
#[derive(Default)]
pub(super) struct Tcp {
    /// Sequence number of the stream's first byte.
    first: Option<u32>,
    /// Nothing in front of that is looked at any more.
    is_pinned: bool,
    stream: Stream,
    samples: u16,
    unknown: u16,
    pub is_hopeless: bool,
}

impl Tcp {
    /// Memory that it holds.
    pub fn held(&self) -> usize {
        self.stream.held()
    }

    /// Puts a sample into the stream. Its offset; `None`: it is too old, or too far off.
    fn place(&mut self, sample: &Sample<'_>) -> Option<usize> {
        let first = *self.first.get_or_insert(sample.seq);
        let ahead = sample.seq.wrapping_sub(first) as usize;
        let back = first.wrapping_sub(sample.seq) as usize;
        let at = if ahead < MOST_BYTES {
            ahead
        } else if self.is_pinned || back >= MOST_BYTES {
            return None;
        } else {
            self.stream.make_room(back);
            self.first = Some(sample.seq);
            0
        };
        self.stream.insert(at, sample.bytes);
        Some(at)
    }

    pub fn take(&mut self, sample: &Sample<'_>) -> Step {
        if self.is_hopeless || sample.bytes.is_empty() {
            return if self.is_hopeless { Step::Never } else { Step::More };
        }
        self.samples += 1;
        let step = match self.place(sample) {
            Some(at) => self.read(sample, at),
            None => self.unknown(),
        };
        let step = match step {
            Step::More if self.samples >= MOST_SAMPLES => Step::Never,
            step => step,
        };
        if matches!(step, Step::Never) {
            *self = Self { is_hopeless: true, ..Self::default() };
        }
        step
    }

    fn read(&mut self, sample: &Sample<'_>, at: usize) -> Step {
        let beginning = self.stream.beginning();
        if beginning.is_empty() {
            return Step::More;
        }
        if tls::is_hello(beginning) || tls::may_be_hello(beginning) {
            return Step::of_hello(tls::in_records(beginning), NameSource::Tls);
        }
        if http::is_request(beginning) || http::may_be_request(beginning) {
            return match http::in_request(beginning) {
                // What follows a Host can only make the request a bad one.
                Read::Done(http::Request { name: Some(name), .. })
                | Read::More(Some(http::Request { name: Some(name), .. })) => {
                    Step::Name { name, source: NameSource::Http, has_ech: false, is_whole: true }
                }
                // A tunnel to an address: what it is for follows.
                Read::Done(http::Request { is_tunnel: true, .. }) => self.start_anew(),
                Read::Done(_) => Step::Nameless,
                Read::More(_) => Step::More,
                Read::Not => Step::Never,
            };
        }
        if is_server(beginning) {
            return Step::Never;
        }
        // TLS behind the words of another protocol begins with a packet of its own.
        if at > 0 && tls::is_hello(sample.bytes) {
            self.stream.cut(at);
            (self.first, self.is_pinned) = (Some(sample.seq), true);
            return Step::of_hello(tls::in_records(self.stream.beginning()), NameSource::Tls);
        }
        self.unknown()
    }

    fn unknown(&mut self) -> Step {
        /// Packets that may come before the first one.
        const REORDERED: u16 = 3;
        self.unknown += 1;
        if self.unknown >= MOST_UNKNOWN {
            return Step::Never;
        }
        if self.unknown >= REORDERED { self.start_anew() } else { Step::More }
    }

    fn start_anew(&mut self) -> Step {
        (self.first, self.is_pinned, self.stream) = (None, false, Stream::default());
        Step::More
    }

    /// Messages with their lengths in front (RFC 1035, section 4.2.2).
    pub fn messages(&mut self, sample: &Sample<'_>) -> Vec<Vec<u8>> {
        if self.place(sample).is_none() {
            // Something is missing, and the beginning of a message may be anywhere; mostly it is here.
            self.start_anew();
            self.place(sample);
        }
        let mut messages = Vec::new();
        while let [high, low, rest @ ..] = self.stream.beginning() {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            let Some(message) = rest.get(..length) else { break };
            messages.push(message.to_vec());
            self.stream.cut(2 + length);
            self.first = self.first.map(|first| first.wrapping_add(2 + length as u32));
            self.is_pinned = true;
        }
        messages
    }
}

/// An answer of a server to what a client said: nothing that names it will follow.
fn is_server(beginning: &[u8]) -> bool {
    beginning.starts_with(b"HTTP/1.") || matches!(beginning, [22, 3, 0..=4, _, _, 2, ..])
}

/// One side of a UDP flow.
#[derive(Default)]
pub(super) struct Udp {
    quic: Quic,
    dtls: Dtls,
    samples: u16,
    unknown: u16,
    pub is_hopeless: bool,
}

impl Udp {
    /// Memory that it holds.
    pub fn held(&self) -> usize {
        self.quic.held() + self.dtls.held()
    }

    pub fn take(&mut self, sample: &Sample<'_>) -> Step {
        if self.is_hopeless {
            return Step::Never;
        }
        self.samples += 1;
        let step = if quic::is_quic(sample.bytes) {
            Step::of_hello(self.quic.datagram(sample.bytes), NameSource::Quic)
        } else if tls::is_dtls(sample.bytes) {
            Step::of_hello(tls::in_dtls(sample.bytes, &mut self.dtls), NameSource::Tls)
        } else {
            Step::Never
        };
        // A datagram that says nothing: the next one may.
        self.unknown += u16::from(matches!(step, Step::Never));
        let is_enough = self.unknown >= MOST_UNKNOWN || self.samples >= MOST_SAMPLES;
        match step {
            Step::Never | Step::More if is_enough => {
                *self = Self { is_hopeless: true, ..Self::default() };
                Step::Never
            }
            Step::Never => Step::More,
            step => step,
        }
    }
}
