//! What agent and server say to each other, and the token.

use std::fmt::Debug;

use netmon_common::enroll::{Reply, Request, Token};
use netmon_common::model::{MAX_RECORD, Record, RecordHead};
use netmon_common::wire::{
    Batch, BatchBuilder, FRAME_HEADER, FrameHeader, Item, MAX_BATCH_BYTES, MAX_BATCH_RECORDS, MAX_FRAME,
    ToAgent, ToServer, encode_frame,
};
use netmon_server::{ingest, tokens};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::input::Input;

/// Frames of the event connection: as they come, and with the right header in front of the input. What is read is
/// written as what it was; nobody reads one message out of two encodings of the same length.
pub fn frame(data: &[u8]) {
    if let Some(ToServer::Batch(batch)) = conversation::<ToServer>(data) {
        unpack(&batch);
    }
    conversation::<ToAgent>(data);
}

/// Frames of the enrolment connection; see [`frame`].
pub fn enrolment(data: &[u8]) {
    conversation::<Request>(data);
    conversation::<Reply>(data);
}

/// Returns the message of a frame that has the input as its payload.
fn conversation<T: DeserializeOwned + Serialize + PartialEq + Debug>(data: &[u8]) -> Option<T> {
    if let Some((header, payload)) = data.split_first_chunk()
        && let Ok(header) = FrameHeader::parse(*header)
    {
        assert!((1..=MAX_FRAME).contains(&header.length));
        if let Ok(message) = header.decode::<T>(payload) {
            assert_eq!(payload.len(), header.length);
            stays(&message, payload);
        }
    }
    let message = with_right_header(data)?;
    stays(&message, data);
    Some(message)
}

fn with_right_header<T: DeserializeOwned>(payload: &[u8]) -> Option<T> {
    let mut header = [0; FRAME_HEADER];
    header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[4..].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    FrameHeader::parse(header).ok()?.decode(payload).ok()
}

fn stays<T: DeserializeOwned + Serialize + PartialEq + Debug>(message: &T, payload: &[u8]) {
    let frame = encode_frame(message).expect("what fits into a frame fits again");
    let (header, again) = frame.split_first_chunk().expect("a frame has a header");
    let header = FrameHeader::parse(*header).expect("our own header");
    assert_eq!(header.decode::<T>(again).as_ref(), Ok(message));
    assert!(again.len() < payload.len() || again == payload, "two encodings of {message:?}");
    let longer = [payload, &[0]].concat();
    assert!(with_right_header::<T>(&longer).is_none(), "something behind {message:?}");
}

/// The content of a batch: two bytes for the number of items, the first record's number, and the items as they are
/// before compression. Once with that number of items, once with as many as there are.
pub fn batch(data: &[u8]) {
    let mut input = Input(data);
    let (count, first_seq) = (input.u16(), input.u64());
    let records = zstd::bulk::compress(input.0, 1).expect("zstd takes anything");
    for count in [count.into(), items_in(input.0)] {
        unpack(&Batch { epoch: 7, first_seq, count, records: records.clone() });
    }
}

fn unpack(batch: &Batch) {
    let Ok(items) = batch.unpack() else { return };
    assert!(items.len() == batch.count as usize && items.len() <= MAX_BATCH_RECORDS as usize);
    let size = |item: &Item| match item {
        Item::Record(bytes) => bytes.len(),
        Item::Hole(_) => 8,
    };
    assert!(items.iter().map(size).sum::<usize>() <= MAX_BATCH_BYTES);
    assert!(items.iter().all(|item| item.span() > 0 && size(item) <= MAX_RECORD));
    items.iter().try_fold(batch.first_seq, |seq, item| seq.checked_add(item.span())).expect("numbers fit");

    let mut builder = BatchBuilder::default();
    // An agent's batches are smaller than what a server takes.
    if items.iter().all(|item| builder.push(item)) {
        let again = builder.finish(batch.epoch, batch.first_seq).expect("it has items");
        assert_eq!(again.unpack().as_ref(), Ok(&items));
    }

    let Ok(checked) = ingest::check(batch.first_seq, items) else { return };
    let mut next = batch.first_seq;
    for item in &checked {
        assert!(item.seq == next && item.next_seq > next);
        next = item.next_seq;
        if let Some(received) = &item.record {
            // Of a kind that this version knows, or of a newer one.
            let known = Record::from_bytes(&received.bytes).map(|record| (record.seq, record.wall_ns)).ok();
            let newer = RecordHead::of_newer(&received.bytes).map(|head| (head.seq, head.wall_ns));
            assert_eq!(known.or(newer), Some((item.seq, received.wall_ns)));
        }
    }
}

/// As many whole items as a batch's content begins with.
fn items_in(plain: &[u8]) -> u32 {
    let mut input = Input(plain);
    let mut count = 0;
    while !input.is_empty() {
        let length = match input.u16() {
            u16::MAX => 8,
            length => length.into(),
        };
        input.bytes(length);
        count += 1;
    }
    count
}

/// The one-line token, and the address that the administrator wants in it.
pub fn token(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    if let Ok(token) = text.parse::<Token>() {
        assert!(token.address.chars().all(|c| c.is_ascii_graphic()), "{token:?}");
        let shown = token.to_string();
        assert_eq!(shown.parse::<Token>().as_ref(), Ok(&token));
        assert!(shown.eq_ignore_ascii_case(text.trim()));
    }
    if let Ok(address) = tokens::address(text) {
        let token = Token { address, ca_spki_sha256: [1; 32], id: [2; 8], secret: [3; 32] };
        assert_eq!(token.to_string().parse::<Token>().as_ref(), Ok(&token));
    }
    if let Ok(ttl) = tokens::ttl(text) {
        assert!(ttl >= 0);
    }
}
