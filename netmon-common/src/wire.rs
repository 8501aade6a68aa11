//! Agent ↔ server on the event connection.
//!
//! One QUIC connection (mutual TLS), one bidirectional stream that the agent opens. Which version of the conversation is
//! spoken is agreed upon in the handshake (ALPN, RFC 7301): each side speaks this one and the one before. Both
//! directions carry frames:
//!
//! ```text
//! u32 length of the payload, little-endian   (1 ..= MAX_FRAME)
//! u32 CRC-32C of the payload, little-endian
//! payload: postcard of ToServer / ToAgent
//! ```
//!
//! Version 1: the agent says [`ToServer::Hello`], the server answers [`ToAgent::Welcome`] with the number that it expects
//! next, and from there on the agent sends [`ToServer::Batch`]es in order. [`ToAgent::Ack`] is cumulative and
//! sent after the store's commit. [`ToAgent::Resume`] asks to go on from another number (after a gap). Answers come in
//! the order of what they answer.
//!
//! Version 2: the agent's first frame is [`ToServer::About`]. In place of a hello it says [`ToServer::Open`], which is answered
//! by [`ToAgent::Expect`]: that also tells what the newest record that both may have looks like. Batches may hold holes ([`Item::Hole`]). [`ToServer::Heartbeat`]
//! says "still watching" and is answered by [`ToAgent::Heard`]; [`ToServer::Renew`] asks for a new certificate, answered by
//! [`ToAgent::Renewed`].

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::model::{Coverage, MAX_RECORD};
use crate::raw::Raw;

/// ALPN of the event connection in the version before this one.
pub const ALPN_1: &[u8] = b"netmon/1";
/// ALPN of the event connection in this version.
pub const ALPN: &[u8] = b"netmon/2";
/// TLS server name that the server's certificate carries and every agent asks for. Addresses are not names.
pub const SERVER_NAME: &str = "netmon-server";
/// Version of this conversation.
pub const VERSION: u16 = 2;
/// What the handshake offers or takes, best first.
pub const ALPNS: [&[u8]; 2] = [ALPN, ALPN_1];
/// Default UDP port of the event listener.
pub const DEFAULT_PORT: u16 = 7443;
/// Longest payload of a frame, in bytes.
pub const MAX_FRAME: usize = 256 * 1024;
/// Most records in a batch.
pub const MAX_BATCH_RECORDS: u32 = 500;
/// Most bytes of a batch's records before compression.
pub const MAX_BATCH_BYTES: usize = 256 * 1024;
/// Bytes in front of each frame's payload.
pub const FRAME_HEADER: usize = 8;
/// Batches that may wait for their acks on a connection.
pub const WINDOW: usize = 4;
/// An agent says "still watching" this often, in nanoseconds of its boot clock.
pub const HEARTBEAT_NS: u64 = 4_000_000_000;

/// The version that the handshake agreed upon; `None`: no protocol of netmon's events.
pub fn version(alpn: &[u8]) -> Option<u16> {
    match alpn {
        ALPN => Some(2),
        ALPN_1 => Some(1),
        _ => None,
    }
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToServer {
    /// First frame of version 1.
    Hello(Hello),
    /// Records from `first_seq` on.
    Batch(Batch),
    /// From version 2 on the first frame.
    About(About),
    /// Still watching. From version 2 on.
    Heartbeat(Heartbeat),
    /// Asks for a certificate for a new key of this agent. From version 2 on.
    Renew {
        /// PKCS #10 request, DER (RFC 2986), at most [`crate::enroll::MAX_DER`] bytes: its public key counts and nothing else.
        csr_der: Vec<u8>,
    },
    /// Records of this epoch follow. From version 2 on.
    Open(Open),
}

/// What the spool has of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Random number of the agent's spool; records are unique by `(agent, epoch, seq)`.
    pub epoch: u64,
    /// The oldest record that the spool still has (the next one to be written, if it has none).
    pub oldest_seq: u64,
    /// The number behind the newest one.
    pub next_seq: u64,
}

/// What a record looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newest {
    /// The record.
    pub seq: u64,
    /// Its [`fingerprint`].
    pub fingerprint: [u8; 16],
}

/// Which of an agent's lives calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The agent's version, for people.
    pub agent_version: Raw,
    /// The PC's host name: a label, not an identity.
    pub hostname: Raw,
    /// `/proc/sys/kernel/random/boot_id`: another one after each boot.
    pub boot_id: [u8; 16],
    /// How often the agent had been started with its spool.
    pub run: u32,
    /// The run before this one did not end in good order.
    pub previous_died: bool,
    /// A random number of this process.
    pub instance: u64,
    /// Connections that this process made so far, this one included: grows with each.
    pub connect: u32,
    /// The newest checkpoint that a server gave this agent: a witness against a store that was set back.
    pub witness: Option<Checkpoint>,
}

/// "Still watching", from the loop that watches: it stops when that does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// When it was made, boot clock.
    pub boot_ns: u64,
    /// When it was made, the PC's wall clock.
    pub wall_ns: i64,
    /// What is covered, and every loss counter.
    pub coverage: Coverage,
    /// Bytes in the spool.
    pub spool_bytes: u64,
    /// Wall clock of the oldest record that waits for the server; `None`: none waits.
    pub oldest_wall_ns: Option<i64>,
}

/// What a server says of an agent's history: it had `size` items, and the chain over them ended in `head`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Items: records, gaps and notices.
    pub size: u64,
    /// The chain's newest link.
    pub head: [u8; 32],
    /// When it was signed, the server's clock.
    pub signed_ns: i64,
    /// Ed25519 (RFC 8032) over the server's statement; in two halves.
    pub signature: [[u8; 32]; 2],
}

/// Who calls, and with which history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// 1: later versions open epochs with [`Open`].
    pub version: u16,
    /// The agent's version, for people.
    pub agent_version: Raw,
    /// The PC's host name: a label, not an identity.
    pub hostname: Raw,
    /// Random number of the agent's spool; records are unique by `(agent, epoch, seq)`.
    pub epoch: u64,
    /// Oldest record that the spool still has (the next one to be written, if it is empty).
    pub oldest_seq: u64,
}

/// A run of records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// The spool's epoch.
    pub epoch: u64,
    /// Number of the first record.
    pub first_seq: u64,
    /// Number of items, at most [`MAX_BATCH_RECORDS`].
    pub count: u32,
    /// zstd of the items: for each record, its length as u16 little-endian, then its bytes; for each hole, 0xffff as
    /// u16, then its records as u64 little-endian (from version 2 on).
    pub records: Vec<u8>,
}

/// One item of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A record's bytes, as the agent's spool has them.
    Record(Vec<u8>),
    /// So many records gave way in the agent's spool and can never come.
    Hole(u64),
}

impl Item {
    /// Numbers that it takes: one for a record.
    pub fn span(&self) -> u64 {
        match self {
            Self::Record(_) => 1,
            Self::Hole(count) => *count,
        }
    }

    /// Is it a hole?
    pub fn is_hole(&self) -> bool {
        matches!(self, Self::Hole(_))
    }
}

/// What the server says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// Answer to the hello: go on from this record.
    Welcome {
        /// 1: what the handshake agreed upon.
        version: u16,
        /// The record that the server expects next in this epoch.
        next_seq: u64,
    },
    /// Every record up to and including this one is committed.
    Ack {
        /// The epoch.
        epoch: u64,
        /// The record.
        seq: u64,
    },
    /// A batch did not start where the server is; go on from here.
    Resume {
        /// The record that the server expects next.
        next_seq: u64,
    },
    /// The server will not talk to this agent; it closes after this frame.
    Refused {
        /// Why, for people.
        reason: Raw,
    },
    /// Answer to [`ToServer::Open`]: go on from this record.
    Expect {
        /// The record that the server expects next in this epoch.
        next_seq: u64,
        /// The server's newest record of those that the spool may have, too: one that has another record under this number
        /// was set back to an older state, and needs a new epoch. Behind it, up to `next_seq`, the server has gaps: what a
        /// spool has there nevertheless needs a new epoch, too.
        last: Option<Newest>,
    },
    /// Answer to a heartbeat.
    Heard {
        /// The server's clock.
        server_ns: i64,
        /// The newest checkpoint of this agent's history.
        checkpoint: Option<Checkpoint>,
    },
    /// Answer to [`ToServer::Renew`].
    Renewed {
        /// The certificate for the new key, DER; empty: not now, ask again another day.
        certificate_der: Vec<u8>,
    },
}

/// What a record is recognised by: the first half of the SHA-256 of its bytes.
pub fn fingerprint(record: &[u8]) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&Sha256::digest(record)[..16]);
    half
}

/// Why bytes are not a frame or not a batch. The peer is at fault; the connection is closed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// Announced or built frame is out of bounds.
    #[error("a frame of {0} bytes is outside 1..={MAX_FRAME}")]
    FrameLength(usize),
    /// Checksum differs.
    #[error("a frame's checksum is wrong")]
    Checksum,
    /// Not what the protocol has here.
    #[error("a frame does not decode: {0}")]
    Malformed(&'static str),
    /// Out of the batch's bounds.
    #[error("a batch is out of bounds: {0}")]
    Batch(&'static str),
}

/// One frame's bytes.
///
/// # Errors
/// [`WireError::FrameLength`] when the message does not fit into a frame.
pub fn encode_frame(message: &impl Serialize) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; FRAME_HEADER];
    frame = postcard::to_extend(message, frame).map_err(|_| WireError::Malformed("does not encode"))?;
    let payload = frame.len() - FRAME_HEADER;
    if !(1..=MAX_FRAME).contains(&payload) {
        return Err(WireError::FrameLength(payload));
    }
    let crc = crc32c::crc32c(&frame[FRAME_HEADER..]);
    frame[..4].copy_from_slice(&(payload as u32).to_le_bytes());
    frame[4..8].copy_from_slice(&crc.to_le_bytes());
    Ok(frame)
}

/// What a frame's first eight bytes announce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of payload that follow: within `1..=MAX_FRAME`.
    pub length: usize,
    crc: u32,
}

impl FrameHeader {
    /// Reads and bounds the header.
    ///
    /// # Errors
    /// [`WireError::FrameLength`].
    pub fn parse(bytes: [u8; FRAME_HEADER]) -> Result<Self, WireError> {
        let [l0, l1, l2, l3, c0, c1, c2, c3] = bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if !(1..=MAX_FRAME).contains(&length) {
            return Err(WireError::FrameLength(length));
        }
        Ok(Self { length, crc: u32::from_le_bytes([c0, c1, c2, c3]) })
    }

    /// Checks and decodes the payload that followed this header.
    ///
    /// # Errors
    /// [`WireError`]: wrong length, wrong checksum, does not decode, bytes left over.
    pub fn decode<T: DeserializeOwned>(&self, payload: &[u8]) -> Result<T, WireError> {
        if payload.len() != self.length {
            return Err(WireError::FrameLength(payload.len()));
        }
        if crc32c::crc32c(payload) != self.crc {
            return Err(WireError::Checksum);
        }
        match postcard::take_from_bytes(payload) {
            Ok((message, [])) => Ok(message),
            Ok(_) => Err(WireError::Malformed("bytes follow the message")),
            Err(_) => Err(WireError::Malformed("not a message of this version")),
        }
    }
}

/// Collects records' bytes into a [`Batch`].
#[derive(Debug, Default)]
pub struct BatchBuilder {
    count: u32,
    plain: Vec<u8>,
}

/// Stands for a record's length where there is a hole instead: no record is that long.
const HOLE: u16 = u16::MAX;

impl BatchBuilder {
    /// Adds an item; false, and nothing added, when the batch is full.
    ///
    /// A record over [`MAX_RECORD`] bytes is refused the same way: none such is ever spooled.
    pub fn push(&mut self, item: &Item) -> bool {
        let length = match item {
            Item::Record(record) if record.len() > MAX_RECORD => return false,
            Item::Record(record) => record.len(),
            Item::Hole(_) => size_of::<u64>(),
        };
        if self.count >= MAX_BATCH_RECORDS
            || self.plain.len() + 2 + length > MAX_BATCH_BYTES.min(MAX_FRAME / 2)
        {
            return false;
        }
        match item {
            Item::Record(record) => {
                self.plain.extend_from_slice(&(length as u16).to_le_bytes());
                self.plain.extend_from_slice(record);
            }
            Item::Hole(count) => {
                self.plain.extend_from_slice(&HOLE.to_le_bytes());
                self.plain.extend_from_slice(&count.to_le_bytes());
            }
        }
        self.count += 1;
        true
    }

    /// Items so far.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Compresses what was collected.
    ///
    /// # Errors
    /// [`WireError::Batch`] when nothing was collected or zstd fails.
    pub fn finish(self, epoch: u64, first_seq: u64) -> Result<Batch, WireError> {
        if self.count == 0 {
            return Err(WireError::Batch("no records"));
        }
        let records =
            zstd::bulk::compress(&self.plain, 1).map_err(|_| WireError::Batch("zstd cannot compress it"))?;
        Ok(Batch { epoch, first_seq, count: self.count, records })
    }
}

const _: () = assert!(MAX_RECORD < HOLE as usize);

impl Batch {
    /// The items, in order.
    ///
    /// # Errors
    /// [`WireError::Batch`]: too many, too large, count and content differ, sequence numbers overflow.
    pub fn unpack(&self) -> Result<Vec<Item>, WireError> {
        if self.count == 0 || self.count > MAX_BATCH_RECORDS {
            return Err(WireError::Batch("number of records"));
        }
        if self.first_seq == 0 {
            return Err(WireError::Batch("sequence numbers"));
        }
        let plain = zstd::bulk::decompress(&self.records, MAX_BATCH_BYTES)
            .map_err(|_| WireError::Batch("does not decompress within its limit"))?;
        let mut rest = plain.as_slice();
        let mut items = Vec::with_capacity(self.count as usize);
        let mut next_seq = self.first_seq;
        while let Some((length, behind)) = rest.split_first_chunk::<2>() {
            if items.len() == self.count as usize {
                return Err(WireError::Batch("more items than it says"));
            }
            let item = match u16::from_le_bytes(*length) {
                HOLE => {
                    let (count, behind) =
                        behind.split_first_chunk().ok_or(WireError::Batch("a hole is cut off"))?;
                    rest = behind;
                    Item::Hole(u64::from_le_bytes(*count))
                }
                length => {
                    let length = usize::from(length);
                    if length > MAX_RECORD {
                        return Err(WireError::Batch("a record's length"));
                    }
                    let record = behind.get(..length).ok_or(WireError::Batch("a record is cut off"))?;
                    rest = &behind[length..];
                    Item::Record(record.to_vec())
                }
            };
            if item.span() == 0 {
                return Err(WireError::Batch("an empty hole"));
            }
            next_seq = next_seq.checked_add(item.span()).ok_or(WireError::Batch("sequence numbers"))?;
            items.push(item);
        }
        if !rest.is_empty() || items.len() != self.count as usize {
            return Err(WireError::Batch("count and content differ"));
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, WireError> {
        let (header, payload) = frame.split_first_chunk().unwrap();
        FrameHeader::parse(*header)?.decode(payload)
    }

    fn batch() -> Batch {
        let mut builder = BatchBuilder::default();
        for item in items() {
            assert!(builder.push(&item));
        }
        builder.finish(7, 41).unwrap()
    }

    fn items() -> [Item; 4] {
        [
            Item::Record(b"one".into()),
            Item::Record(Vec::new()),
            Item::Hole(1 << 40),
            Item::Record(b"three".into()),
        ]
    }

    #[test]
    fn a_frame_comes_back_as_it_went() {
        let message = ToServer::Batch(batch());
        assert_eq!(decode::<ToServer>(&encode_frame(&message).unwrap()).unwrap(), message);
    }

    #[test]
    fn every_flipped_bit_of_a_frame_is_noticed() {
        let frame = encode_frame(&ToAgent::Ack { epoch: 1, seq: 300 }).unwrap();
        for bit in 0..frame.len() * 8 {
            let mut bad = frame.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode::<ToAgent>(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_frame_longer_than_the_limit_is_refused_before_it_is_read() {
        let header = ((MAX_FRAME + 1) as u64).to_le_bytes();
        assert_eq!(FrameHeader::parse(header), Err(WireError::FrameLength(MAX_FRAME + 1)));
        assert_eq!(FrameHeader::parse([0; 8]), Err(WireError::FrameLength(0)));
    }

    #[test]
    fn a_batch_unpacks_to_its_items() {
        assert_eq!(batch().unpack().unwrap(), items());
    }

    #[test]
    fn a_batch_that_lies_about_itself_is_refused() {
        let lies: [fn(&mut Batch); 5] = [
            |b| b.count = 3,
            |b| b.count = 5,
            |b| b.count = MAX_BATCH_RECORDS + 1,
            |b| b.first_seq = u64::MAX,
            |b| b.records.truncate(5),
        ];
        for lie in lies {
            let mut batch = batch();
            lie(&mut batch);
            assert!(matches!(batch.unpack(), Err(WireError::Batch(_))), "{batch:?}");
        }
    }

    #[test]
    fn a_hole_is_neither_empty_nor_longer_than_the_numbers() {
        for hole in [0, u64::MAX - 40] {
            let mut builder = BatchBuilder::default();
            builder.push(&Item::Hole(hole));
            assert!(matches!(builder.finish(7, 41).unwrap().unpack(), Err(WireError::Batch(_))), "{hole}");
        }
    }

    /// What is on the wire must not change: agents and servers are updated one after the other.
    #[test]
    fn the_encoding_of_both_versions_stays() {
        let hex = |message: &ToServer| {
            crate::enroll::Hex(&encode_frame(message).unwrap()[FRAME_HEADER..]).to_string()
        };
        let hello =
            Hello { version: 1, agent_version: "1".into(), hostname: "pc".into(), epoch: 300, oldest_seq: 2 };
        assert_eq!(hex(&ToServer::Hello(hello)), "00010131027063ac0202");
        let batch = Batch { epoch: 1, first_seq: 2, count: 3, records: vec![0xff] };
        assert_eq!(hex(&ToServer::Batch(batch)), "0101020301ff");
        let about = About {
            agent_version: "2".into(),
            hostname: "pc".into(),
            boot_id: [1; 16],
            run: 3,
            previous_died: true,
            instance: 4,
            connect: 5,
            witness: None,
        };
        assert_eq!(
            hex(&ToServer::About(about)),
            "0201320270630101010101010101010101010101010103010405 00".replace(' ', "")
        );
        assert_eq!(hex(&ToServer::Renew { csr_der: vec![7] }), "040107");
        assert_eq!(hex(&ToServer::Open(Open { epoch: 300, oldest_seq: 2, next_seq: 5 })), "05ac020205");
        let last = Some(Newest { seq: 1, fingerprint: [3; 16] });
        let answers = [
            (ToAgent::Welcome { version: 1, next_seq: 2 }, "000102"),
            (ToAgent::Ack { epoch: 1, seq: 300 }, "0101ac02"),
            (ToAgent::Resume { next_seq: 2 }, "0202"),
            (ToAgent::Refused { reason: "no".into() }, "03026e6f"),
            (ToAgent::Expect { next_seq: 2, last: None }, "040200"),
            (ToAgent::Expect { next_seq: 2, last }, "04020101 03030303030303030303030303030303"),
            (ToAgent::Heard { server_ns: 1, checkpoint: None }, "050200"),
            (ToAgent::Renewed { certificate_der: vec![] }, "0600"),
        ];
        for (answer, expected) in answers {
            let bytes = encode_frame(&answer).unwrap();
            assert_eq!(crate::enroll::Hex(&bytes[FRAME_HEADER..]).to_string(), expected.replace(' ', ""));
        }
    }

    #[test]
    fn a_decompression_bomb_stops_at_the_limit() {
        let bomb = zstd::bulk::compress(&vec![0; 64 * 1024 * 1024], 1).unwrap();
        let batch = Batch { epoch: 1, first_seq: 1, count: 1, records: bomb };
        assert_eq!(batch.unpack(), Err(WireError::Batch("does not decompress within its limit")));
    }
}
