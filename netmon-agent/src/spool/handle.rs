//! One spool, two users.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netmon_common::model::{Event, Gap};
use tokio::sync::watch;

use super::log::{Spool, SpoolError, Stats};
use super::read::{Chunk, EpochRange};

/// The spool, shared between the thread that records and the uplink. Clones are the same spool.
///
/// How to use it: record with [`SpoolHandle::append`] from any thread (a write into the page cache, no fsync).
/// One thread of its own calls [`SpoolHandle::sync`] every 100 ms or so, at once after an event that somebody
/// waits for, or an async task awaits [`SpoolHandle::sync_in_background`]. The fsync holds no lock, nor does reading:
/// recording goes on meanwhile. The uplink awaits [`SpoolHandle::changes`]. At the end: [`SpoolHandle::close`].
#[derive(Clone)]
pub struct SpoolHandle(Arc<Shared>);

struct Shared {
    spool: Mutex<Spool>,
    /// Held from a ticket to its end.
    syncing: Mutex<()>,
    /// Counts the syncs that brought something.
    synced: watch::Sender<u64>,
}

impl SpoolHandle {
    /// Shares a spool.
    pub fn new(spool: Spool) -> Self {
        let synced = watch::Sender::new(0);
        Self(Arc::new(Shared { spool: Mutex::new(spool), syncing: Mutex::new(()), synced }))
    }

    /// See [`Spool::append`].
    ///
    /// # Errors
    /// As there.
    pub fn append(&self, boot_ns: u64, wall_ns: i64, event: Event) -> Result<u64, SpoolError> {
        self.spool().append(boot_ns, wall_ns, event)
    }

    /// See [`Spool::take_gaps`].
    pub fn take_gaps(&self) -> Vec<Gap> {
        self.spool().take_gaps()
    }

    /// Makes what was recorded so far outlast a power cut, wakes the uplink, and brings the spool back within its limit.
    /// Blocks for an fsync, or for some megabytes; not for async threads.
    ///
    /// # Errors
    /// [`SpoolError`]: what could not be written waits in memory; call again.
    pub fn sync(&self) -> Result<(), SpoolError> {
        let _one_at_a_time = self.syncing();
        self.sync_records()?;
        loop {
            // No guard may live on into what takes long, here and below.
            let ticket = self.spool().begin_rewrite();
            let Some(ticket) = ticket else { return Ok(()) };
            let result = ticket.run();
            self.spool().finish_rewrite(result)?;
            self.say_changed();
        }
    }

    fn sync_records(&self) -> Result<(), SpoolError> {
        let ticket = self.spool().begin_recovery();
        if let Some(ticket) = ticket {
            let result = ticket.run();
            self.spool().finish_recovery(result)?;
            self.say_changed();
        }
        let ticket = self.spool().begin_sync()?;
        if let Some(ticket) = ticket {
            let result = ticket.run();
            self.spool().finish_sync(ticket, result)?;
            self.say_changed();
        }
        Ok(())
    }

    /// [`SpoolHandle::sync`] on a thread for blocking work.
    ///
    /// # Errors
    /// As there.
    pub async fn sync_in_background(&self) -> Result<(), SpoolError> {
        self.in_background(Self::sync).await
    }

    /// Changes whenever there may be something new to send.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.synced.subscribe()
    }

    /// See [`Spool::epochs`].
    pub fn epochs(&self) -> Vec<EpochRange> {
        self.spool().epochs()
    }

    /// See [`Spool::read`]; on a thread for blocking work, and recording goes on meanwhile.
    ///
    /// # Errors
    /// As there.
    pub async fn read(
        &self,
        epoch: u64,
        seq: u64,
        max_items: usize,
        max_bytes: usize,
    ) -> Result<Option<Chunk>, SpoolError> {
        self.in_background(move |handle| {
            loop {
                // The guards must not live on into the reading.
                let ticket = handle.spool().begin_read(epoch, seq, max_items, max_bytes);
                let Some(ticket) = ticket else { return Ok(None) };
                let result = ticket.run()?;
                if let Some(chunk) = handle.spool().finish_read(result) {
                    return Ok(Some(chunk));
                }
            }
        })
        .await
    }

    /// See [`Spool::record`]; on a thread for blocking work, and recording goes on meanwhile.
    ///
    /// # Errors
    /// As there.
    pub async fn record(&self, epoch: u64, seq: u64) -> Result<Option<Vec<u8>>, SpoolError> {
        Ok(self.read(epoch, seq, 1, 0).await?.and_then(|chunk| chunk.into_record(seq)))
    }

    /// See [`Spool::expire`]: gives up all that is too old, on a thread for blocking work (it may remove files).
    pub async fn expire(&self, boot_ns: u64, wall_ns: i64) {
        self.in_background(move |handle| while handle.spool().expire(boot_ns, wall_ns) {}).await;
    }

    /// See [`Spool::acked`]; on a thread for blocking work (it may remove files).
    pub async fn acked(&self, epoch: u64, seq: u64) {
        self.in_background(move |handle| handle.spool().acked(epoch, seq)).await;
    }

    /// See [`Spool::begin_epoch`]; on a thread for blocking work, and recording goes on meanwhile.
    ///
    /// # Errors
    /// As there.
    pub async fn begin_epoch(&self, old: u64) -> Result<(), SpoolError> {
        self.in_background(move |handle| {
            let _one_at_a_time = handle.syncing();
            handle.spool().begin_renewal(old)?;
            // Enough for all segments, and for what comes meanwhile in moments without a record. Where there is none,
            // recording has to wait for the rest.
            let steps = 16 + 2 * handle.spool().segments.len();
            for _ in 0..steps {
                handle.sync_records()?;
                let ticket = handle.spool().begin_renumbering();
                match ticket {
                    Some(ticket) => {
                        let result = ticket.run();
                        handle.spool().finish_rewrite(result)?;
                    }
                    None if handle.spool().is_renewing() => {}
                    None => return Ok(()),
                }
            }
            handle.spool().begin_epoch(old)
        })
        .await
    }

    /// See [`Spool::close`]. Blocks.
    ///
    /// # Errors
    /// As there.
    pub fn close(&self) -> Result<(), SpoolError> {
        let _one_at_a_time = self.syncing();
        let result = self.spool().close();
        self.say_changed();
        result
    }

    /// See [`Spool::stats`].
    pub fn stats(&self) -> Stats {
        self.spool().stats()
    }

    fn say_changed(&self) {
        self.0.synced.send_modify(|count| *count += 1);
    }

    fn syncing(&self) -> MutexGuard<'_, ()> {
        self.0.syncing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spool(&self) -> MutexGuard<'_, Spool> {
        // A panic elsewhere must not end the recording: every method leaves the spool whole.
        self.0.spool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn in_background<T: Send + 'static>(&self, work: impl FnOnce(&Self) -> T + Send + 'static) -> T {
        let handle = self.clone();
        match tokio::task::spawn_blocking(move || work(&handle)).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // Only a runtime that is being shut down cancels; this task ends with it.
                Err(_) => std::future::pending().await,
            },
        }
    }
}
