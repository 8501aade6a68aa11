//! The one thread that writes the store while the server runs: it commits what came within a few milliseconds in
//! one transaction, and answers only after that commit.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, Transaction};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::clock;
use crate::seatlogs::SeatLogs;
use crate::store::{self, AgentId, Store, StoreError};

/// How long a group waits for company: a tenth of what a person notices, and enough to share one sync of the
/// disk among all PCs of a room.
const GROUP_TIME: Duration = Duration::from_millis(10);
/// Most jobs in a group: with batches of the largest size some 64 MiB.
const GROUP_JOBS: usize = 64;
/// Jobs that wait for their group; whoever brings more waits.
const QUEUE: usize = 128;
/// How often the place of the readable logs is saved: a crash costs rendering this much again.
const SAVE_EVERY_NS: i64 = 30_000_000_000;

/// The store cannot take anything now (disk full, I/O error). Nothing was stored; the agent keeps its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server cannot store records now; its own log says why")]
pub struct Unavailable;

/// Brings work to the writing thread. The thread ends when the last clone is gone.
#[derive(Clone, Debug)]
pub struct Writer {
    jobs: mpsc::Sender<Job>,
}

/// Called after the commit; dropped without being called when there was none.
type Answer = Box<dyn FnOnce()>;

/// A step inside the group's transaction.
type Work = Box<dyn FnOnce(&Connection) -> rusqlite::Result<Answer> + Send>;

struct Job {
    /// Whose history it may lengthen.
    agent: Option<AgentId>,
    work: Work,
}

impl Writer {
    /// Starts the thread. It opens the store at `path` itself, and again after every failure.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn spawn(
        path: PathBuf,
        store: Store,
        logs: SeatLogs,
        runtime: Handle,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let reopened = path.clone();
        let committer = Committer::new(store, move || Store::open_to_write(&reopened));
        let thread = Thread { path, committer, logs, queue, runtime, state: State::default() };
        let handle = std::thread::Builder::new().name("writer".into()).spawn(move || thread.run())?;
        Ok((Self { jobs }, handle))
    }

    /// Does `work` in the next group's transaction and returns its result after the commit. When `work` fails,
    /// what it changed is undone, and the rest of the group goes on.
    ///
    /// # Errors
    /// [`Unavailable`]: nothing of it is in the store.
    pub async fn run<T: Send + 'static>(
        &self,
        agent: Option<AgentId>,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Unavailable> {
        self.begin(agent, work).await?.await.map_err(|_| Unavailable)
    }

    /// [`Writer::run`] that returns as soon as the work has its place in the queue. The result comes after the commit;
    /// where its sender is dropped, nothing is in the store.
    ///
    /// # Errors
    /// [`Unavailable`]: the thread has ended.
    pub async fn begin<T: Send + 'static>(
        &self,
        agent: Option<AgentId>,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<oneshot::Receiver<T>, Unavailable> {
        let (reply, answer) = oneshot::channel();
        let work = Box::new(move |conn: &Connection| {
            let result = work(conn)?;
            // Whoever asked may be gone; the work is done all the same.
            Ok(Box::new(move || drop(reply.send(result))) as Answer)
        });
        self.jobs.send(Job { agent, work }).await.map_err(|_| Unavailable)?;
        Ok(answer)
    }

    /// Returns when the thread has ended, though this asks for more: it panicked, and nothing is stored any more.
    pub async fn ended(&self) {
        self.jobs.closed().await;
    }
}

/// Why a group was not committed.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The store cannot be opened again after a failure.
    #[error(transparent)]
    Open(#[from] StoreError),
    /// Nothing of the group is in the store.
    #[error("cannot commit")]
    Commit(#[from] rusqlite::Error),
}

/// Commits groups of steps. After a failure it opens the store anew.
pub struct Committer {
    open: Box<dyn Fn() -> Result<Store, StoreError> + Send>,
    /// `None` after a failure: what SQLite holds in memory is not trusted after one.
    store: Option<Store>,
}

impl Committer {
    /// Commits to `store`; `open` opens the same one.
    pub fn new(store: Store, open: impl Fn() -> Result<Store, StoreError> + Send + 'static) -> Self {
        Self { open: Box::new(open), store: Some(store) }
    }

    /// Ends it in good order: see [`Store::close`].
    pub fn close(self) {
        if let Some(store) = self.store {
            store.close();
        }
    }

    /// The store, unless it failed and was not opened anew yet.
    pub fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// Does steps in one transaction and commits it; their results, in order. What a step that fails has changed is
    /// undone, it has no result, and the others go on.
    ///
    /// # Errors
    /// [`GroupError`]: nothing of the group is in the store.
    pub fn commit<W, T>(&mut self, steps: impl IntoIterator<Item = W>) -> Result<Vec<T>, GroupError>
    where
        W: FnOnce(&Connection) -> rusqlite::Result<T>,
    {
        let result = self.try_commit(steps);
        if result.is_err() {
            // After a failed sync the kernel may have dropped what it did not write: see `Store::settled`.
            self.store = None;
        }
        result
    }

    fn try_commit<W, T>(&mut self, steps: impl IntoIterator<Item = W>) -> Result<Vec<T>, GroupError>
    where
        W: FnOnce(&Connection) -> rusqlite::Result<T>,
    {
        let store = match &mut self.store {
            Some(store) => store,
            none => none.insert((self.open)()?),
        };
        let mut tx = store.begin()?;
        let mut results = Vec::new();
        for step in steps {
            match in_savepoint(&mut tx, step) {
                Ok(result) => results.push(result),
                // SQLite gave up the whole transaction (disk full, I/O error).
                Err(error) if tx.is_autocommit() => return Err(error.into()),
                Err(error) => {
                    tracing::error!(error = %error, hint = store::hint(&error), "one step could not be stored");
                }
            }
        }
        tx.commit()?;
        Ok(results)
    }
}

fn in_savepoint<T>(
    tx: &mut Transaction<'_>,
    step: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let savepoint = tx.savepoint()?;
    let result = step(&savepoint)?;
    savepoint.commit()?;
    Ok(result)
}

struct Thread {
    path: PathBuf,
    committer: Committer,
    logs: SeatLogs,
    queue: mpsc::Receiver<Job>,
    runtime: Handle,
    state: State,
}

#[derive(Default)]
struct State {
    store_fails: bool,
    logs_fail: bool,
    saved_ns: i64,
    /// Seats whose logs are behind because of an error.
    behind: std::collections::BTreeSet<AgentId>,
}

impl Thread {
    fn run(mut self) {
        self.catch_up();
        while let Some(group) = self.next_group() {
            let agents = group.iter().filter_map(|job| job.agent).collect::<Vec<_>>();
            match self.committer.commit(group.into_iter().map(|job| job.work)) {
                Ok(answers) => {
                    if std::mem::take(&mut self.state.store_fails) {
                        tracing::info!("the store takes records again");
                        // They are on the same disk.
                        self.state.behind.extend(self.logs.distrust());
                    }
                    answers.into_iter().for_each(|answer| answer());
                    self.state.behind.extend(agents);
                    self.write_logs();
                }
                Err(error) => self.failed(&error),
            }
        }
        self.save_logs();
        self.committer.close();
    }

    /// Waits for a job and gathers what follows within [`GROUP_TIME`].
    fn next_group(&mut self) -> Option<Vec<Job>> {
        let queue = &mut self.queue;
        self.runtime.block_on(async {
            let mut group = vec![queue.recv().await?];
            let gather = async {
                while group.len() < GROUP_JOBS {
                    let Some(job) = queue.recv().await else { break };
                    group.push(job);
                }
            };
            // The time being over is the usual end.
            let _ = timeout(GROUP_TIME, gather).await;
            Some(group)
        })
    }

    fn failed(&mut self, error: &GroupError) {
        if !std::mem::replace(&mut self.state.store_fails, true) {
            let hint = match error {
                GroupError::Open(_) => None,
                GroupError::Commit(error) => Some(store::hint(error)),
            };
            tracing::error!(
                path = %self.path.display(), error = %error, cause = cause(error), hint,
                "cannot store records; nothing is acknowledged, the agents keep them and send them again"
            );
        }
    }

    /// The logs of all seats, after a start: a crash may have left them behind the store.
    fn catch_up(&mut self) {
        let Some(store) = self.committer.store() else { return };
        match store::summaries(store.conn()) {
            Ok(summaries) => self.state.behind.extend(summaries.iter().map(|summary| summary.agent.id)),
            Err(error) => tracing::warn!(error = %error, "cannot look for logs that are behind"),
        }
        self.write_logs();
        self.save_logs();
    }

    fn write_logs(&mut self) {
        let Some(store) = self.committer.store() else { return };
        let mut failure = None;
        for agent in std::mem::take(&mut self.state.behind) {
            if let Err(error) = self.logs.update(store.conn(), agent) {
                self.state.behind.insert(agent);
                failure = Some(error);
            }
        }
        self.note_logs(failure);
        let now = clock::wall_ns();
        if self.logs.is_unsaved() && now.abs_diff(self.state.saved_ns) >= SAVE_EVERY_NS as u64 {
            self.save_logs();
        }
    }

    fn save_logs(&mut self) {
        self.state.saved_ns = clock::wall_ns();
        let Some(store) = self.committer.store() else { return };
        let (synced, result) = self.logs.synced(store.conn());
        let places = synced.as_slice();
        let save = |conn: &Connection| {
            places.iter().try_for_each(|(agent, log)| store::save_seat_log(conn, *agent, *log))
        };
        match self.committer.commit([save]) {
            Ok(done) if done.is_empty() => {}
            Ok(_) => self.logs.saved(places),
            Err(error) => self.failed(&error),
        }
        if let Err(error) = result {
            self.note_logs(Some(error));
        }
    }

    fn note_logs(&mut self, failure: Option<crate::seatlogs::SeatLogError>) {
        match failure {
            Some(error) if !std::mem::replace(&mut self.state.logs_fail, true) => {
                tracing::error!(error = %error, cause = cause(&error), "readable logs are behind; the store has everything");
            }
            Some(_) => {}
            None => {
                if std::mem::take(&mut self.state.logs_fail) {
                    tracing::info!("readable logs are complete again");
                }
            }
        }
    }
}

fn cause(error: &dyn std::error::Error) -> Option<String> {
    error.source().map(ToString::to_string)
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;
    use crate::store::tests::Fixture;

    fn count(conn: &Connection) -> i64 {
        conn.query_row("SELECT count(*) FROM tokens", [], |row| row.get(0)).unwrap()
    }

    fn insert(id: u8) -> impl FnOnce(&Connection) -> rusqlite::Result<u8> + Send + 'static {
        move |conn| {
            conn.execute("INSERT INTO tokens VALUES (?1, x'', 0, 0, 1, 1)", [[id].as_slice()])?;
            Ok(id)
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn an_answer_comes_after_the_commit_and_a_failing_step_does_not_hurt_its_group() {
        let room = Fixture::new();
        let path = room.path().join("store.sqlite");
        let logs = SeatLogs::new(room.path().join("logs"), TimeZone::UTC);
        let (writer, thread) =
            Writer::spawn(path.clone(), Store::open(&path).unwrap(), logs, Handle::current()).unwrap();
        let half_done = |conn: &Connection| {
            insert(9)(conn)?;
            insert(9)(conn)
        };
        let (one, broken, two) = tokio::join!(
            writer.run(None, insert(1)),
            writer.run(None, half_done),
            writer.run(None, insert(2))
        );
        assert_eq!((one, broken, two), (Ok(1), Err(Unavailable), Ok(2)));
        assert_eq!(count(room.conn()), 2);
        drop(writer);
        thread.join().unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_panic_of_the_thread_is_noticed() {
        let room = Fixture::new();
        let path = room.path().join("store.sqlite");
        let logs = SeatLogs::new(room.path().join("logs"), TimeZone::UTC);
        let (writer, thread) =
            Writer::spawn(path.clone(), Store::open(&path).unwrap(), logs, Handle::current()).unwrap();
        let result = writer.run(None, |_| -> rusqlite::Result<()> { panic!("on purpose") }).await;
        assert_eq!(result, Err(Unavailable));
        timeout(Duration::from_secs(30), writer.ended()).await.unwrap();
        assert!(thread.join().is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_full_disk_acknowledges_nothing_and_the_next_group_goes_on() {
        let room = Fixture::new();
        let path = room.path().join("store.sqlite");
        let store = Store::open(&path).unwrap();
        // SQLite's own limit gives the same error as a full disk; it ends when the file is opened anew.
        let pages: i64 = store.conn().pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
        store.conn().pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).unwrap();
        let logs = SeatLogs::new(room.path().join("logs"), TimeZone::UTC);
        let (writer, thread) = Writer::spawn(path, store, logs, Handle::current()).unwrap();
        let large = |conn: &Connection| {
            conn.execute("INSERT INTO tokens VALUES (x'07', zeroblob(100000), 0, 0, 1, 1)", [])
        };
        let (small, full) = tokio::join!(writer.run(None, insert(1)), writer.run(None, large));
        assert_eq!(full, Err(Unavailable));
        assert_eq!(count(room.conn()), i64::from(small.is_ok()), "acknowledged is what is there");
        assert_eq!(writer.run(None, large).await, Ok(1));
        assert_eq!(writer.run(None, insert(2)).await, Ok(2));
        drop(writer);
        thread.join().unwrap();
    }
}
