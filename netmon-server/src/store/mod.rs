//! The embedded store: one SQLite file (WAL, every commit synced).
//!
//! Functions here are steps inside somebody's transaction; the only thread that writes events is
//! [`crate::writer`]. Commands (`token`, `revoke`, `log`) open the same file beside a running server.

mod agents;
mod events;
pub mod history;
mod passports;
mod presence;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

pub use agents::{
    Agent, AgentId, AgentSummary, Enrolled, Newcomer, add_set_back, add_token, agent_by_ended_key,
    agent_by_id, agent_by_key, connected, disconnected, enrol, find_seat, forget_connections, introduced,
    is_allowed, quarantine, renew, revoke, revoked_agents, revoked_connections, summaries, tokens, used_key,
    was_introduced, withdraw_token,
};
pub use events::{
    BatchOutcome, Item, SeatLog, What, append, first_of_last, is_open, items_from, newest_before, open_epoch,
    save_seat_log, seat_log,
};
pub use passports::{Stayed, stays};
pub use presence::{Known, alive, known, save_alive, save_presence};

/// Marks the file as netmon's (`PRAGMA application_id`): "nmon".
const APPLICATION_ID: i32 = 0x6e6d_6f6e;
/// Version of the schema (`PRAGMA user_version`).
const SCHEMA_VERSION: i32 = 3;
/// How long a writer waits for another process's transaction.
const BUSY: Duration = Duration::from_secs(10);

/// What a connection keeps of the file in memory, at most: the pages of the largest group of batches, so that none of
/// them is written before its commit, and read back.
const PAGE_CACHE_KIB: i64 = 16 * 1024;
/// Pages that the log beside the file (WAL) has before they go into the file: 2 MiB. Whoever waits for a commit waits for
/// that, too: as many as take some milliseconds. A page that changed often meanwhile goes there once.
const CHECKPOINT_PAGES: i64 = 512;
/// Bytes that the log keeps, at most, when it begins anew: who reads one moment of the store for long makes it grow, and who
/// opens the store to write writes all of it again.
const LOG_BYTES: i64 = 32 << 20;
/// Bytes of the log that are in memory when it is written again.
const REWRITE_PART: usize = 1 << 20;

/// Why the store cannot be opened. The path and what to do are in the message.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite cannot open, make or set up the file.
    #[error("cannot open the store {path}; {hint}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
        /// Cause.
        source: rusqlite::Error,
    },
    /// The file cannot be made.
    #[error("cannot make the store {path}")]
    Create {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// What a failed fsync may have lost cannot be written again.
    #[error("cannot write the log of the store {path} again; check the disk (`dmesg`, `df`)")]
    Settle {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The file belongs to something else.
    #[error("{0} is not a netmon store")]
    NotAStore(PathBuf),
    /// The file was written by another version.
    #[error(
        "the store {path} has format {found}; this netmon-server reads format {SCHEMA_VERSION}: an older one becomes that when the server (`run`) is started anew; for a newer one use the version that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i32,
    },
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    conn: Connection,
    /// Its log is on disk as it is seen: it may go into the file.
    is_settled: bool,
}

impl Store {
    /// Makes a new store, or empties nothing: a store that is there already stays as it is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        // SQLite takes over an empty file, and gives the files beside it the same mode: nobody else reads them.
        let mut options = std::fs::OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|source| StoreError::Create { path: path.into(), source })?;
        Self::make(path, None)
    }

    /// [`Store::create`] on a file system that the caller registered with SQLite (a "VFS") under this name: in
    /// simulations.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn create_with(path: &Path, vfs: &str) -> Result<Self, StoreError> {
        Self::make(path, Some(vfs))
    }

    fn make(path: &Path, vfs: Option<&str>) -> Result<Self, StoreError> {
        let mut conn = connect(path, vfs)?;
        let open_error = |source| open_error(path, source);
        let version: i32 = conn.pragma_query_value(None, "user_version", |r| r.get(0)).map_err(open_error)?;
        if version == 0 {
            let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(open_error)?;
            tx.execute_batch(include_str!("schema.sql")).map_err(open_error)?;
            tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(open_error)?;
            tx.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(open_error)?;
            tx.commit().map_err(open_error)?;
            // There is nothing in its log but this.
            set_checkpoints(&conn, CHECKPOINT_PAGES).map_err(open_error)?;
            return Ok(Self { conn, is_settled: true });
        }
        Self::checked(conn, path)
    }

    /// Opens an existing store, to read: this connection does not bring its log into the file, also not at its end.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::checked(connect(path, None)?, path)
    }

    /// [`Store::open`] on a file system that the caller registered with SQLite under this name: in simulations.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open_with(path: &Path, vfs: &str) -> Result<Self, StoreError> {
        Self::checked(connect(path, Some(vfs))?, path)
    }

    /// [`Store::open`] for the process that adds to the histories, first of all and after each failure: what it finds is
    /// on disk when this returns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open_to_write(path: &Path) -> Result<Self, StoreError> {
        Self::open(path)?.settled(path, || rewrite(&log_of(path)))
    }

    /// Has the write-ahead log written again as it is seen, and synced, by `rewrite`; [`Store::open_to_write`] does. Only
    /// then may this connection bring it into the file.
    ///
    /// After a failed fsync the system shows what it did not bring to disk, and takes it for brought there: the next
    /// fsync says "done" (also to the next process). SQLite, too, takes such a log for what it seems. What is then added
    /// and synced would be lost with a power cut, for behind a hole in the log everything is void; and a checkpoint would
    /// mix old and new pages.
    ///
    /// # Errors
    /// [`StoreError`]: nothing must be added.
    pub fn settled(
        mut self,
        path: &Path,
        rewrite: impl FnOnce() -> io::Result<()>,
    ) -> Result<Self, StoreError> {
        // While it is ours to write, nobody else adds to the log or begins it anew.
        let turn = self.begin().map_err(|source| open_error(path, source))?;
        rewrite().map_err(|source| StoreError::Settle { path: path.into(), source })?;
        turn.rollback().map_err(|source| open_error(path, source))?;
        set_checkpoints(&self.conn, CHECKPOINT_PAGES).map_err(|source| open_error(path, source))?;
        self.is_settled = true;
        Ok(self)
    }

    /// Ends it in good order, when nothing failed since it was settled: the last connection brings the log into the file.
    /// A store that is merely dropped leaves its log for [`Store::settled`].
    pub fn close(self) {
        if self.is_settled {
            // Where it cannot be set, the log stays.
            let _ = self.conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false);
        }
    }

    /// Opens a store of this format, or of one before, which is brought to this one. Only for the server itself, and
    /// while it holds its directory: a server of the version before would go on writing the old format into the new one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open_or_migrate(path: &Path) -> Result<Self, StoreError> {
        let conn = connect(path, None)?;
        let pragma = |conn: &Connection, name| {
            conn.pragma_query_value::<i32, _>(None, name, |row| row.get(0)).map_err(|e| open_error(path, e))
        };
        if pragma(&conn, "application_id")? == APPLICATION_ID
            && (1..SCHEMA_VERSION).contains(&pragma(&conn, "user_version")?)
        {
            let mut store = Self { conn, is_settled: false }.settled(path, || rewrite(&log_of(path)))?;
            migrate(&mut store.conn).map_err(|source| open_error(path, source))?;
        }
        Self::open_to_write(path)
    }

    fn checked(conn: Connection, path: &Path) -> Result<Self, StoreError> {
        let pragma = |conn: &Connection, name| {
            conn.pragma_query_value(None, name, |row| row.get(0)).map_err(|e| open_error(path, e))
        };
        if pragma(&conn, "application_id")? != APPLICATION_ID {
            return Err(StoreError::NotAStore(path.into()));
        }
        match pragma(&conn, "user_version")? {
            SCHEMA_VERSION => Ok(Self { conn, is_settled: false }),
            found => Err(StoreError::Version { path: path.into(), found }),
        }
    }

    /// For reading.
    pub fn conn(&self) -> &Connection {
        &self.conn
    }

    /// Starts a transaction that writes: it waits for its turn now, so it cannot fail for it later.
    ///
    /// # Errors
    /// SQLite's.
    pub fn begin(&mut self) -> rusqlite::Result<Transaction<'_>> {
        self.conn.transaction_with_behavior(TransactionBehavior::Immediate)
    }

    /// Does `work` in one write transaction.
    ///
    /// # Errors
    /// SQLite's; then nothing is changed.
    pub fn write<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let tx = self.begin()?;
        let result = work(&tx)?;
        tx.commit()?;
        Ok(result)
    }
}

/// SQLite's write-ahead log of the store.
fn log_of(path: &Path) -> PathBuf {
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    log.into()
}

/// Writes a file's bytes over themselves and syncs it, in parts: while somebody reads one moment of the store for long
/// (`export | less`), the log grows without bound. SQLite holds no lock on its log that closing this would drop.
fn rewrite(path: &Path) -> io::Result<()> {
    let file = match File::options().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let (mut part, mut offset) = (vec![0; REWRITE_PART], 0);
    loop {
        match file.read_at(&mut part, offset) {
            Ok(0) => return file.sync_all(),
            Ok(n) => {
                file.write_all_at(&part[..n], offset)?;
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Brings a store of an older format to this one, in one transaction.
fn migrate(conn: &mut Connection) -> rusqlite::Result<()> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have been faster.
    let version: i32 = tx.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version < SCHEMA_VERSION {
        tracing::info!("bringing the store to its new format");
        if version == 1 {
            tx.execute_batch(include_str!("migrate_1.sql"))?;
            history::chain_all(&tx)?;
        }
        tx.execute_batch(include_str!("migrate_2.sql"))?;
        tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    }
    tx.commit()
}

fn connect(path: &Path, vfs: Option<&str>) -> Result<Connection, StoreError> {
    let connect = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = match vfs {
            None => Connection::open_with_flags(path, flags)?,
            // Nobody but SQLite makes a file there.
            Some(vfs) => {
                Connection::open_with_flags_and_vfs(path, flags | OpenFlags::SQLITE_OPEN_CREATE, vfs)?
            }
        };
        // First of all: what follows may fail, and then this ends the connection.
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        set_checkpoints(&conn, 0)?;
        conn.busy_timeout(BUSY)?;
        conn.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        conn.pragma_update(None, "synchronous", "FULL")?;
        conn.pragma_update(None, "foreign_keys", true)?;
        conn.pragma_update(None, "cache_size", -PAGE_CACHE_KIB)?;
        conn.pragma_update_and_check(None, "journal_size_limit", LOG_BYTES, |_| Ok(()))?;
        conn.set_prepared_statement_cache_capacity(64);
        Ok(conn)
    };
    connect().map_err(|source| open_error(path, source))
}

/// This connection brings the log into the file when it has so many pages; 0: never. Never, too, when it ends, but by
/// [`Store::close`].
///
/// From a log that a failed fsync left, SQLite would overwrite the file's pages; after a power cut the log has a hole, and
/// the file old and new pages.
fn set_checkpoints(conn: &Connection, pages: i64) -> rusqlite::Result<()> {
    conn.pragma_update_and_check(None, "wal_autocheckpoint", pages, |_| Ok(()))
}

fn open_error(path: &Path, source: rusqlite::Error) -> StoreError {
    StoreError::Open { path: path.into(), hint: hint(&source), source }
}

/// What to do about an error of SQLite's.
pub fn hint(error: &rusqlite::Error) -> &'static str {
    use rusqlite::ErrorCode::*;
    match error.sqlite_error_code() {
        Some(DiskFull) => "the disk is full; make room there",
        Some(ReadOnly | PermissionDenied) => "it is not writable; run netmon-server as the user who owns it",
        Some(CannotOpen) => "it is missing or not accessible; check the path and its permissions",
        Some(SystemIoFailure) => "the disk reports errors or is full; check it (`dmesg`, `df`)",
        Some(DatabaseBusy | DatabaseLocked) => "another process holds it; try again",
        Some(DatabaseCorrupt | NotADatabase) => "it is damaged; bring it back from a backup",
        _ => "check the path and the disk",
    }
}

#[cfg(test)]
pub(crate) mod tests;
