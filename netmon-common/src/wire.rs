//! Agent ↔ server on the event connection.
//!
//! One QUIC connection (ALPN [`ALPN`], mutual TLS), one bidirectional stream that the agent opens. Both
//! directions carry frames:
//!
//! ```text
//! u32 length of the payload, little-endian   (1 ..= MAX_FRAME)
//! u32 CRC-32C of the payload, little-endian
//! payload: postcard of ToServer / ToAgent
//! ```
//!
//! The agent says [`ToServer::Hello`], the server answers [`ToAgent::Welcome`] with the number that it expects
//! next, and from there on the agent sends [`ToServer::Batch`]es in order. [`ToAgent::Ack`] is cumulative and
//! sent after the store's commit. [`ToAgent::Resume`] asks to go on from another number (after a gap).

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::model::MAX_RECORD;
use crate::raw::Raw;

/// ALPN of the event connection.
pub const ALPN: &[u8] = b"netmon/1";
/// TLS server name that the server's certificate carries and every agent asks for. Addresses are not names.
pub const SERVER_NAME: &str = "netmon-server";
/// Version of this conversation. The server refuses what it does not speak, and says so.
pub const VERSION: u16 = 1;
/// Default UDP port of the event listener.
pub const DEFAULT_PORT: u16 = 7443;
/// Longest payload of a frame, in bytes.
pub const MAX_FRAME: usize = 256 * 1024;
/// Most records in a batch.
pub const MAX_BATCH_RECORDS: u32 = 500;
/// Most bytes of a batch's records before compression.
pub const MAX_BATCH_BYTES: usize = 1024 * 1024;
/// Bytes in front of each frame's payload.
pub const FRAME_HEADER: usize = 8;

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToServer {
    /// First frame.
    Hello(Hello),
    /// Records `first_seq .. first_seq + count`.
    Batch(Batch),
}

/// Who calls, and with which history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of the agent.
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
    /// Number of records, at most [`MAX_BATCH_RECORDS`].
    pub count: u32,
    /// zstd of: for each record, its length as u16 little-endian, then its bytes.
    pub records: Vec<u8>,
}

/// What the server says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// Answer to the hello: go on from this record.
    Welcome {
        /// [`VERSION`] of the server.
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

impl BatchBuilder {
    /// Adds a record's bytes; false, and nothing added, when the batch is full.
    ///
    /// A record over [`MAX_RECORD`] bytes is refused the same way: none such is ever spooled.
    pub fn push(&mut self, record: &[u8]) -> bool {
        if self.count >= MAX_BATCH_RECORDS
            || record.len() > MAX_RECORD
            || self.plain.len() + 2 + record.len() > MAX_BATCH_BYTES.min(MAX_FRAME / 2)
        {
            return false;
        }
        self.plain.extend_from_slice(&(record.len() as u16).to_le_bytes());
        self.plain.extend_from_slice(record);
        self.count += 1;
        true
    }

    /// Records so far.
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

const _: () = assert!(MAX_RECORD <= u16::MAX as usize);

impl Batch {
    /// The records' bytes, in order, as the agent's spool has them.
    ///
    /// # Errors
    /// [`WireError::Batch`]: too many, too large, count and content differ, sequence numbers overflow.
    pub fn unpack(&self) -> Result<Vec<Vec<u8>>, WireError> {
        if self.count == 0 || self.count > MAX_BATCH_RECORDS {
            return Err(WireError::Batch("number of records"));
        }
        if self.first_seq == 0 || self.first_seq.checked_add(u64::from(self.count)).is_none() {
            return Err(WireError::Batch("sequence numbers"));
        }
        let plain = zstd::bulk::decompress(&self.records, MAX_BATCH_BYTES)
            .map_err(|_| WireError::Batch("does not decompress within its limit"))?;
        let mut rest = plain.as_slice();
        let mut records = Vec::with_capacity(self.count as usize);
        while let Some((length, behind)) = rest.split_first_chunk::<2>() {
            let length = usize::from(u16::from_le_bytes(*length));
            if length > MAX_RECORD || records.len() == self.count as usize {
                return Err(WireError::Batch("a record's length or the number of records"));
            }
            let record = behind.get(..length).ok_or(WireError::Batch("a record is cut off"))?;
            records.push(record.to_vec());
            rest = &behind[length..];
        }
        if !rest.is_empty() || records.len() != self.count as usize {
            return Err(WireError::Batch("count and content differ"));
        }
        Ok(records)
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
        assert!(builder.push(b"one"));
        assert!(builder.push(b""));
        assert!(builder.push(b"three"));
        builder.finish(7, 41).unwrap()
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
    fn a_batch_unpacks_to_its_records() {
        assert_eq!(batch().unpack().unwrap(), [b"one".to_vec(), b"".to_vec(), b"three".to_vec()]);
    }

    #[test]
    fn a_batch_that_lies_about_itself_is_refused() {
        let lies: [fn(&mut Batch); 5] = [
            |b| b.count = 2,
            |b| b.count = 4,
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
    fn a_decompression_bomb_stops_at_the_limit() {
        let bomb = zstd::bulk::compress(&vec![0; 64 * 1024 * 1024], 1).unwrap();
        let batch = Batch { epoch: 1, first_seq: 1, count: 1, records: bomb };
        assert_eq!(batch.unpack(), Err(WireError::Batch("does not decompress within its limit")));
    }
}
