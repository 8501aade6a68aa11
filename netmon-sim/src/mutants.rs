//! Mistakes made on purpose: the oracle must find each of them, or it would find none of the real ones.

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mutant {
    /// The agent's fsync of a segment does nothing.
    SpoolSkipsSync,
    /// The agent's fsync of the spool's directory does nothing.
    SpoolSkipsDirectorySync,
    /// The agent takes a batch that it has sent for acknowledged.
    AgentTakesSentForAcked,
    /// The server's fsync does nothing.
    StoreSkipsSync,
    /// The server answers before it commits.
    ServerAcksBeforeCommit,
    /// The server's watermark is one record too far after a hello.
    ServerSkipsARecord,
    /// The server forgets its watermark and that records are unique.
    ServerForgetsTheWatermark,
    /// The server does not keep the gaps that it notices.
    ServerForgetsGaps,
    /// The server stores a record with a flipped bit.
    ServerFlipsABit,
}
