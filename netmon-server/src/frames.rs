//! Frames of [`netmon_common::wire`] over QUIC streams.

use std::time::Duration;

use netmon_common::wire::{self, FRAME_HEADER, FrameHeader, WireError};
use quinn::{ReadExactError, RecvStream, SendStream, WriteError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

/// Longest time between the header of a frame and its end: the largest frame at some 10 kB/s.
const FRAME_TIME: Duration = Duration::from_secs(30);

/// Why no frame came or went.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream or its connection is gone.
    #[error("the stream ended")]
    Read(#[from] ReadExactError),
    /// The stream or its connection is gone.
    #[error("the stream ended")]
    Write(#[from] WriteError),
    /// The peer breaks the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer announces a frame and does not send it.
    #[error("a frame was not complete after {} s", FRAME_TIME.as_secs())]
    Slow,
}

/// The next frame; `None` when the peer finished the stream between two frames.
pub async fn read<T: DeserializeOwned>(recv: &mut RecvStream, limit: usize) -> Result<Option<T>, FrameError> {
    let mut header = [0; FRAME_HEADER];
    match recv.read_exact(&mut header).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let header = FrameHeader::parse(header)?;
    if header.length > limit {
        return Err(WireError::FrameLength(header.length).into());
    }
    let mut payload = vec![0; header.length];
    timeout(FRAME_TIME, recv.read_exact(&mut payload)).await.map_err(|_| FrameError::Slow)??;
    Ok(Some(header.decode(&payload)?))
}

/// Sends one frame.
pub async fn write(send: &mut SendStream, message: &impl Serialize) -> Result<(), FrameError> {
    Ok(send.write_all(&wire::encode_frame(message)?).await?)
}
