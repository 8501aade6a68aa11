//! What the agent recorded and the server has not acknowledged, on disk.
//!
//! * [`format`]: the bytes of a segment, pure
//! * [`Files`]: the directory, on disk ([`Disk`]) or, in simulations, in memory with faults (`sim`, with the feature
//!   `simulation`)
//! * [`Spool`]: numbering, writing, syncing, reading, giving way
//! * tickets ([`SyncTicket`], [`ReadTicket`], [`RewriteTicket`], [`RecoveryTicket`]): what takes long, done without a lock
//! * [`SpoolHandle`]: the same, shared between the thread that records and the uplink
//!
//! The promises, and what they rest on:
//!
//! * **No number ever stands for two records.** A record's bytes stay in memory until they are synced and are
//!   written again, the same bytes under the same number, when a write or an fsync fails. Only synced records
//!   are handed to the uplink. When anything had to be cut off at the start, a new epoch begins.
//! * **A failed fsync is not repeated** (the kernel may have dropped the pages and say "done" the next time):
//!   the segment is left behind and what was not synced goes into a new one.
//! * **What gives way is chosen.** Over its limit, the spool first gives up what later records tell again or sum up: the
//!   progress of transfers, muted totals, "still watching". Their numbers become holes, which the server is told of.
//! * **Nothing has to be repaired by hand.** A directory that is missing is made, one that cannot be read or written is
//!   waited for, with the records in memory, at the start as well.
//! * **Every loss is counted** and handed out as [`Gap`](netmon_common::model::Gap)s to be recorded.

mod files;
pub mod format;
mod handle;
mod log;
mod read;
mod recover;
mod rewrite;
mod segment;
#[cfg(any(test, feature = "simulation"))]
pub mod sim;
#[cfg(test)]
mod tests;

pub use files::{Disk, Files};
pub use handle::SpoolHandle;
pub use log::{Limits, Random, Spool, SpoolError, Stats, SyncTicket};
pub use read::{Chunk, EpochRange, ReadResult, ReadTicket};
pub use recover::{OpenError, Recovered, RecoveryTicket, Survey};
pub use rewrite::{RewriteTicket, Rewritten};
