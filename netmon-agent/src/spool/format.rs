//! The spool's bytes on disk, version 2. Pure: no files, no clock.
//!
//! ```text
//! segment file `<number, 10 digits>.seg`:
//!   0  [u8; 8]  "nmspool\0"
//!   8  u16      version
//!  10  u16      0
//!  12  u32      run of the agent that began the segment
//!  16  u64      number of the segment: grows with each one, never repeats
//!  24  u64      epoch
//!  32  u64      first_seq
//!  40  u32      CRC-32C of bytes 0..40
//!  44  frames; the first one's number is first_seq:
//!      a record, which takes one number:
//!        u32    length of the record, 1 ..= MAX_RECORD
//!        u32    CRC-32C of the record's number (u64) and its bytes
//!        bytes  of `netmon_common::model::Record`
//!      or, from version 2 on, a hole, which takes the numbers of records that gave way:
//!        u32    0xffffffff
//!        u32    CRC-32C of its first number (u64), the four bytes 0xff and the count
//!        u64    count of the numbers, 1 or more
//! ```
//!
//! In every version to come, magic, version and checksum of the header stay where they are: a newer version is told from a
//! flipped bit.
//!
//! All numbers are little-endian. The checksum covers the frame's number, so that a frame in a wrong place is
//! as bad as a damaged one; a length of 0 is never valid, so that zeros at a file's end (a power cut) are none.

use netmon_common::model::MAX_RECORD;

/// Version of the format that this agent writes.
pub const VERSION: u16 = 2;
/// Highest number of a record: the server's store keeps them as signed 64-bit integers.
pub const MAX_SEQ: u64 = i64::MAX as u64;
/// Bytes in front of a segment's first frame.
pub const HEADER: usize = 44;
/// Bytes in front of each record.
pub const FRAME: usize = 8;
/// Bytes of a hole.
pub const HOLE_FRAME: usize = FRAME + 8;

/// Stands for a record's length where there is a hole.
const HOLE: u32 = u32::MAX;

const MAGIC: [u8; 8] = *b"nmspool\0";

/// What a segment says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The agent's run that began it.
    pub run: u32,
    /// Its place among the segments.
    pub number: u64,
    /// The epoch of its records.
    pub epoch: u64,
    /// Number of its first record.
    pub first_seq: u64,
}

/// Why bytes are not a segment's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Written by a newer agent.
    #[error("format version {0} is newer than {VERSION}")]
    Newer(u16),
    /// Too short, wrong magic, wrong checksum, numbers that cannot be.
    #[error("the header is damaged")]
    Damaged,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.run.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.number.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.first_seq.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..40]);
        bytes[40..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header from the beginning of a segment.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let version = u16_at(bytes, 8).ok_or(HeaderError::Damaged)?;
        if bytes[..8] != MAGIC {
            return Err(HeaderError::Damaged);
        }
        if u32_at(bytes, 40).is_none_or(|crc| crc != crc32c::crc32c(&bytes[..40])) {
            return Err(HeaderError::Damaged);
        }
        if version > VERSION {
            return Err(HeaderError::Newer(version));
        }
        let header = (|| {
            Some(Self {
                run: u32_at(bytes, 12)?,
                number: u64_at(bytes, 16)?,
                epoch: u64_at(bytes, 24)?,
                first_seq: u64_at(bytes, 32)?,
            })
        })();
        header
            .filter(|header| (1..=MAX_SEQ).contains(&header.first_seq) && version >= 1)
            .ok_or(HeaderError::Damaged)
    }
}

/// Appends a record's frame to `out`.
pub fn push_frame(out: &mut Vec<u8>, seq: u64, record: &[u8]) {
    out.extend_from_slice(&(record.len() as u32).to_le_bytes());
    out.extend_from_slice(&checksum(seq, record).to_le_bytes());
    out.extend_from_slice(record);
}

/// Appends the frame of a hole to `out`.
pub fn push_hole(out: &mut Vec<u8>, seq: u64, count: u64) {
    out.extend_from_slice(&HOLE.to_le_bytes());
    out.extend_from_slice(&hole_checksum(seq, count).to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A record's bytes.
    Record(&'a [u8]),
    /// So many records gave way.
    Hole(u64),
}

impl Frame<'_> {
    /// Numbers that it takes.
    pub fn span(&self) -> u64 {
        match self {
            Self::Record(_) => 1,
            Self::Hole(count) => *count,
        }
    }

    /// Bytes that it takes on disk.
    pub fn length(&self) -> usize {
        match self {
            Self::Record(record) => FRAME + record.len(),
            Self::Hole(_) => HOLE_FRAME,
        }
    }
}

/// What stands at the beginning of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// A whole frame.
    Frame(Frame<'a>),
    /// The beginning of a frame: more bytes are needed, or the rest was never written.
    Cut,
    /// No frame with this number.
    Damaged,
}

/// Reads the frame with the number `seq` from the beginning of `bytes`.
pub fn next_frame(bytes: &[u8], seq: u64) -> Next<'_> {
    let (Some(length), Some(crc)) = (u32_at(bytes, 0), u32_at(bytes, 4)) else { return Next::Cut };
    if length == HOLE {
        return match u64_at(bytes, FRAME) {
            None => Next::Cut,
            Some(count)
                if count > 0 && count <= MAX_SEQ - seq.min(MAX_SEQ) && hole_checksum(seq, count) == crc =>
            {
                Next::Frame(Frame::Hole(count))
            }
            Some(_) => Next::Damaged,
        };
    }
    let length = length as usize;
    if !(1..=MAX_RECORD).contains(&length) {
        return Next::Damaged;
    }
    match bytes.get(FRAME..FRAME + length) {
        None => Next::Cut,
        Some(record) if checksum(seq, record) == crc => Next::Frame(Frame::Record(record)),
        Some(_) => Next::Damaged,
    }
}

/// The whole frames at the beginning of `bytes`, numbered from `seq` on.
pub fn frames(bytes: &[u8], seq: u64) -> Frames<'_> {
    Frames { rest: bytes, seq }
}

/// Iterates over whole frames and their numbers; see [`frames`].
#[derive(Clone, Debug)]
pub struct Frames<'a> {
    rest: &'a [u8],
    seq: u64,
}

impl Frames<'_> {
    /// Bytes behind the last frame that was handed out.
    pub fn rest(&self) -> usize {
        self.rest.len()
    }

    /// The number behind the last frame that was handed out.
    pub fn seq(&self) -> u64 {
        self.seq
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = (u64, Frame<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let Next::Frame(frame) = next_frame(self.rest, self.seq) else { return None };
        let seq = self.seq;
        self.rest = &self.rest[frame.length()..];
        self.seq += frame.span();
        Some((seq, frame))
    }
}

fn hole_checksum(seq: u64, count: u64) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&seq.to_le_bytes()), &HOLE.to_le_bytes());
    crc32c::crc32c_append(crc, &count.to_le_bytes())
}

fn checksum(seq: u64, record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&seq.to_le_bytes()), record)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER_1: Header = Header { run: 3, number: 17, epoch: 0x1122_3344_5566_7788, first_seq: 4001 };

    fn segment() -> Vec<u8> {
        let mut bytes = HEADER_1.encode().to_vec();
        push_frame(&mut bytes, 4001, b"one");
        push_hole(&mut bytes, 4002, 5);
        push_frame(&mut bytes, 4007, b"seven");
        bytes
    }

    fn all(bytes: &[u8], seq: u64) -> Vec<(u64, Frame<'_>)> {
        frames(bytes, seq).collect()
    }

    #[test]
    fn version_1_stays_readable() {
        let hex = "6e6d73706f6f6c00010000000300000011000000000000008877665544332211a10f000000000000\
                   5ff9ed3f0300000045488d166f6e65";
        let bytes = netmon_common::enroll::unhex::<55>(hex).unwrap();
        assert_eq!(Header::decode(&bytes), Ok(HEADER_1));
        assert_eq!(all(&bytes[HEADER..], 4001), [(4001, Frame::Record(b"one"))]);
    }

    #[test]
    fn version_2_stays_as_it_is() {
        let bytes = segment();
        assert_eq!(
            netmon_common::enroll::Hex(&bytes).to_string(),
            "6e6d73706f6f6c00020000000300000011000000000000008877665544332211a10f000000000000\
             028806790300000045488d166f6e65ffffffff8ae793be050000000000000005000000e1f9f08e736576656e"
        );
        assert_eq!(Header::decode(&bytes), Ok(HEADER_1));
        let expected =
            [(4001, Frame::Record(b"one")), (4002, Frame::Hole(5)), (4007, Frame::Record(b"seven"))];
        assert_eq!(all(&bytes[HEADER..], 4001), expected);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = segment();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let header = Header::decode(&bad) == Ok(HEADER_1);
            assert!(!header || all(&bad[HEADER..], 4001).len() < 3, "bit {bit}");
        }
    }

    #[test]
    fn every_cut_is_noticed() {
        let good = segment();
        for length in 0..HEADER {
            assert_eq!(Header::decode(&good[..length]), Err(HeaderError::Damaged), "{length}");
        }
        let ends = [HEADER, HEADER + 11, HEADER + 11 + HOLE_FRAME, good.len()];
        for length in HEADER..good.len() {
            let whole = all(&good[HEADER..length], 4001).len();
            assert_eq!(whole, ends.iter().filter(|end| **end <= length).count() - 1, "{length}");
        }
    }

    #[test]
    fn a_hole_of_nothing_or_of_more_than_there_are_numbers_is_damage() {
        for (seq, count) in [(7, 0), (7, u64::MAX), (u64::MAX, 1)] {
            let mut bytes = Vec::new();
            push_hole(&mut bytes, seq, count);
            assert_eq!(next_frame(&bytes, seq), Next::Damaged);
        }
    }

    #[test]
    fn a_record_in_another_records_place_is_damage() {
        let mut bytes = Vec::new();
        push_frame(&mut bytes, 5, b"five");
        assert_eq!(next_frame(&bytes, 6), Next::Damaged);
    }

    #[test]
    fn zeros_are_no_record() {
        assert_eq!(next_frame(&[0; 64], 1), Next::Damaged);
        assert_eq!(Header::decode(&[0; 64]), Err(HeaderError::Damaged));
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut bytes = HEADER_1.encode();
        bytes[8] = 3;
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Damaged));
        let crc = crc32c::crc32c(&bytes[..40]);
        bytes[40..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Newer(3)));
    }
}
