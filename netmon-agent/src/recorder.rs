//! Where every event goes: into the spool, which numbers it, and into the PC's own logs.
//!
//! Neither may stop the watch. What the spool could not take it counts and hands out as gaps; lines that `log.txt`
//! could not take are counted here and become a gap as soon as writing works again.

use std::sync::Arc;
use std::time::Duration;

use netmon_common::model::{Event, Gap, GapReason, Record};
use tokio::sync::Notify;

use crate::clock::Now;
use crate::journal::Journal;
use crate::spool::SpoolHandle;

/// Records that come this close to each other are synced together.
const GROUP: Duration = Duration::from_millis(20);
/// A disk that failed is tried again this often.
const RETRY: Duration = Duration::from_secs(1);
/// Records that are too old are looked for this often, boot clock.
const EXPIRE_NS: u64 = 60_000_000_000;

/// Records events.
pub struct Recorder {
    spool: SpoolHandle,
    journal: Journal,
    run: u32,
    /// Lines that the journal did not take, and since when.
    lost_lines: u64,
    lost_since_wall_ns: i64,
    /// True while the spool refuses records: said once.
    refused: bool,
    recorded: Arc<Notify>,
}

impl Recorder {
    /// Records as run number `run`, and keeps the spool synced on a task of its own.
    pub fn new(spool: SpoolHandle, journal: Journal, run: u32) -> Self {
        let recorded = Arc::new(Notify::new());
        tokio::spawn(keep_synced(spool.clone(), Arc::clone(&recorded)));
        Self { spool, journal, run, lost_lines: 0, lost_since_wall_ns: 0, refused: false, recorded }
    }

    /// Records one event that was noticed at `now`.
    pub fn record(&mut self, now: &Now, event: Event) {
        if self.lost_lines > 0 {
            let lines = Event::Gap(Gap {
                reason: GapReason::LogUnwritable,
                from_wall_ns: self.lost_since_wall_ns,
                to_wall_ns: now.wall_ns,
                count: Some(self.lost_lines),
            });
            // Only if the journal takes the gap's own line is it worth a record.
            if self.journal.write(&self.unnumbered(now, lines.clone())).is_ok() {
                self.lost_lines = 0;
                self.spool(now, lines);
            }
        }
        let seq = self.spool(now, event.clone());
        let record = Record { seq, ..self.unnumbered(now, event) };
        if let Err(error) = self.journal.write(&record) {
            if self.lost_lines == 0 {
                self.lost_since_wall_ns = now.wall_ns;
                tracing::error!(%error, "cannot write log.txt or usb.log; recording goes on in the spool");
            }
            self.lost_lines += 1;
        }
    }

    /// Records what the spool lost since the last call.
    pub fn record_spool_losses(&mut self, now: &Now) {
        for gap in self.spool.take_gaps() {
            self.record(now, Event::Gap(gap));
        }
    }

    fn unnumbered(&self, now: &Now, event: Event) -> Record {
        Record { seq: 0, run: self.run, boot_ns: now.boot_ns, wall_ns: now.wall_ns, event }
    }

    /// The record's number; 0 when the spool could not take it.
    fn spool(&mut self, now: &Now, event: Event) -> u64 {
        match self.spool.append(now.boot_ns, now.wall_ns, event) {
            Ok(seq) => {
                self.refused = false;
                self.recorded.notify_one();
                seq
            }
            Err(error) => {
                if !std::mem::replace(&mut self.refused, true) {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, "the spool takes no records; recording goes on in log.txt");
                }
                0
            }
        }
    }
}

/// Syncs what was recorded, until the recorder is gone. What is recorded during a sync waits for the next one.
async fn keep_synced(spool: SpoolHandle, recorded: Arc<Notify>) {
    let mut failed = false;
    let mut next_expiry_ns = 0;
    while Arc::strong_count(&recorded) > 1 {
        if !failed {
            recorded.notified().await;
            tokio::time::sleep(GROUP).await;
        }
        let now = Now::read();
        if now.boot_ns >= next_expiry_ns {
            next_expiry_ns = now.boot_ns + EXPIRE_NS;
            spool.expire(now.boot_ns, now.wall_ns).await;
        }
        match spool.sync_in_background().await {
            Ok(()) if failed => {
                tracing::info!("the spool can be written again");
                failed = false;
            }
            Ok(()) => {}
            Err(error) => {
                if !std::mem::replace(&mut failed, true) {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the spool cannot be written, trying again"
                    );
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.recorded.notify_one();
    }
}
