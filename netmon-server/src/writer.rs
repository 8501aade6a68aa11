//! The one thread that writes the store while the server runs: it commits what came within a few milliseconds in
//! one transaction, and answers only after that commit. Whose work is next is decided in [`crate::lanes`].

use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, Transaction};
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::clock::{self, Now};
use crate::lanes::{COMPANY_NS, GROUP_STEPS, Lanes, PART_NS, Turn};
use crate::seatlogs::SeatLogs;
use crate::store::{self, AgentId, Store, StoreError};

/// Jobs on their way to the thread, and as many again that wait there; whoever brings more waits.
const QUEUE: usize = 128;
/// Longest part of the heavy work that is made so long because the sync of the disk takes longer, nanoseconds.
const LONGEST_PART_NS: u64 = 50_000_000;
/// Seats whose readable logs are saved at once: each is two syncs.
const SAVED_AT_ONCE: usize = 2;
/// How often the place of the readable logs is saved: a crash costs rendering this much again.
const SAVE_EVERY_NS: u64 = 30_000_000_000;

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
    /// Whose history it may lengthen. Work of one agent is done in its order.
    agent: Option<AgentId>,
    /// In records of the usual size.
    cost: u64,
    /// Boot clock.
    came_ns: u64,
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
        let thread = Thread {
            path,
            committer,
            logs,
            queue,
            runtime,
            lanes: Lanes::default(),
            is_closed: false,
            sync_ns: 0,
            chore: Chore::Steps,
            state: State::default(),
        };
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
        self.begin(agent, 1, work).await?.await.map_err(|_| Unavailable)
    }

    /// [`Writer::run`] that returns as soon as the work has its place in the queue. The result comes after the commit;
    /// where its sender is dropped, nothing is in the store. `cost`: in records of the usual size.
    ///
    /// # Errors
    /// [`Unavailable`]: the thread has ended.
    pub async fn begin<T: Send + 'static>(
        &self,
        agent: Option<AgentId>,
        cost: u64,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<oneshot::Receiver<T>, Unavailable> {
        let (reply, answer) = oneshot::channel();
        let work = Box::new(move |conn: &Connection| {
            let result = work(conn)?;
            // Whoever asked may be gone; the work is done all the same.
            Ok(Box::new(move || drop(reply.send(result))) as Answer)
        });
        let came_ns = Now::read().boot_ns;
        self.jobs.send(Job { agent, cost, came_ns, work }).await.map_err(|_| Unavailable)?;
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
    lanes: Lanes<Option<AgentId>, Job>,
    /// Nobody can bring more.
    is_closed: bool,
    /// How long the syncs of the last commits took: an average in which the newest counts a quarter. One in many brings the
    /// log into the store and takes longer.
    sync_ns: u64,
    /// The heavy work that was done last.
    chore: Chore,
    state: State,
}

#[derive(Default)]
struct State {
    store_fails: bool,
    logs_fail: bool,
    saved_ns: i64,
    /// Seats whose logs are behind.
    behind: BTreeSet<AgentId>,
    /// Seats whose logs are further behind than is written at once: news of the others come first.
    far_behind: VecDeque<AgentId>,
    /// Seats whose logs are behind because of an error: they are tried again after the next commit.
    stuck: BTreeSet<AgentId>,
    /// Seats whose logs are about to be saved.
    to_save: BTreeSet<AgentId>,
}

/// What a commit is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    /// Light steps, and behind them heavy ones where the disk is slow.
    Light,
    /// Heavy steps, for as long as a part of the heavy work.
    Heavy,
}

/// What is done in parts while light steps wait for company.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chore {
    /// Heavy steps.
    Steps,
    /// The readable logs follow the store.
    Logs,
    /// Their place is saved.
    Save,
}

impl Chore {
    fn next(self) -> Self {
        match self {
            Self::Steps => Self::Logs,
            Self::Logs => Self::Save,
            Self::Save => Self::Steps,
        }
    }
}

fn now_ns() -> u64 {
    Now::read().boot_ns
}

impl Thread {
    fn run(mut self) {
        self.catch_up();
        while self.take_in() {
            // Nobody waits for company that cannot come.
            match self.lanes.turn(if self.is_closed { u64::MAX } else { now_ns() }) {
                Turn::Light => self.commit(Group::Light),
                Turn::Heavy(until_ns) => {
                    if !self.heavy_part(until_ns.is_some()) {
                        self.wait(until_ns);
                    }
                }
                Turn::Wait(until_ns) => self.wait(Some(until_ns)),
            }
        }
        while self.write_logs() {}
        self.save_logs(self.logs.unsaved().clone());
        self.committer.close();
    }

    /// A sync takes so long that light steps would notice one more of them.
    fn is_slow(&self) -> bool {
        self.sync_ns + PART_NS > COMPANY_NS
    }

    /// How long a part of the heavy work takes: half of the time for the disk, at most.
    fn part_ns(&self) -> u64 {
        self.sync_ns.clamp(PART_NS, LONGEST_PART_NS)
    }

    /// Takes what has come. False: nothing waits, and nothing can come.
    fn take_in(&mut self) -> bool {
        while self.lanes.len() < QUEUE {
            match self.queue.try_recv() {
                Ok(job) => self.push(job),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => {
                    self.is_closed = true;
                    break;
                }
            }
        }
        !(self.is_closed && self.lanes.is_empty())
    }

    fn push(&mut self, job: Job) {
        self.lanes.push(job.agent, job.cost, job.came_ns, job);
    }

    /// Waits for a job, until this time at most.
    fn wait(&mut self, until_ns: Option<u64>) {
        if self.is_closed {
            return;
        }
        let queue = &mut self.queue;
        let job = self.runtime.block_on(async {
            match until_ns {
                None => Some(queue.recv().await),
                Some(until_ns) => {
                    let time = Duration::from_nanos(until_ns.saturating_sub(now_ns()));
                    // The time being over is the usual end.
                    timeout(time, queue.recv()).await.ok()
                }
            }
        });
        match job {
            Some(Some(job)) => self.push(job),
            Some(None) => self.is_closed = true,
            None => {}
        }
    }

    /// Commits a group of steps.
    fn commit(&mut self, group: Group) {
        let (part_ns, with_heavy) = (self.part_ns(), group == Group::Heavy || self.is_slow());
        let (mut first_ns, mut worked_ns) = (None, now_ns());
        let (mut agents, mut heavy) = (Vec::new(), 0);
        let lanes = &mut self.lanes;
        let steps = std::iter::from_fn(|| {
            worked_ns = now_ns();
            let began_ns = *first_ns.get_or_insert(worked_ns);
            if agents.len() >= GROUP_STEPS {
                return None;
            }
            let light = if group == Group::Light { lanes.pop_light() } else { None };
            let job = light.or_else(|| {
                // One at least, however long it took to begin.
                let has_time = heavy == 0 || worked_ns.saturating_sub(began_ns) < part_ns;
                let job = if with_heavy && has_time { lanes.pop_heavy() } else { None };
                heavy += usize::from(job.is_some());
                job
            })?;
            agents.push(job.agent);
            Some(job.work)
        });
        let result = self.committer.commit(steps);
        if let Err(error) = &result {
            self.failed(error);
            // Those who did not have their turn are told, too; they come again.
            while let Some(job) = self.lanes.pop_light().or_else(|| self.lanes.pop_heavy()) {
                agents.push(job.agent);
            }
        }
        // Where the store does not have it, there is nothing to write. But it may have what an earlier group brought.
        self.state.behind.append(&mut self.state.stuck);
        self.state.behind.extend(agents.into_iter().flatten());
        if let Ok(answers) = result {
            let sync_ns = now_ns().saturating_sub(worked_ns);
            self.sync_ns = self.sync_ns - self.sync_ns / 4 + sync_ns / 4;
            answers.into_iter().for_each(|answer| answer());
            if std::mem::take(&mut self.state.store_fails) {
                tracing::info!("the store takes records again");
                // They are on the same disk.
                self.state.behind.extend(self.logs.distrust());
            }
        }
    }

    /// Does some of the heavy work. False: there is none. `others_wait`: light steps, for their company.
    fn heavy_part(&mut self, others_wait: bool) -> bool {
        for _ in 0..3 {
            self.chore = self.chore.next();
            let is_done = match self.chore {
                // On a slow disk they are done with the light ones.
                Chore::Steps if others_wait && self.is_slow() => false,
                Chore::Steps if self.lanes.has_heavy() => {
                    self.commit(Group::Heavy);
                    true
                }
                Chore::Steps => false,
                Chore::Logs => self.write_logs(),
                Chore::Save => self.save_some_logs(),
            };
            if is_done {
                return true;
            }
        }
        false
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
        while self.write_logs() {}
        self.save_logs(self.logs.unsaved().clone());
    }

    /// Some of the logs that are behind. False: none is.
    fn write_logs(&mut self) -> bool {
        let time_ns = self.part_ns();
        let Some(store) = self.committer.store() else { return false };
        let began_ns = now_ns();
        let State { behind, far_behind, stuck, .. } = &mut self.state;
        let (mut failure, mut is_done) = (None, false);
        while now_ns().saturating_sub(began_ns) < time_ns {
            let Some(agent) = behind.pop_first().or_else(|| far_behind.pop_front()) else { break };
            is_done = true;
            match self.logs.update(store.conn(), agent) {
                Ok(true) if far_behind.contains(&agent) => {}
                Ok(true) => far_behind.push_back(agent),
                Ok(false) => {}
                Err(error) => {
                    stuck.insert(agent);
                    failure = Some(error);
                }
            }
        }
        let all_are_there = behind.is_empty() && far_behind.is_empty() && stuck.is_empty();
        if failure.is_some() || is_done && all_are_there {
            self.note_logs(failure);
        }
        is_done
    }

    /// When it is time, saves how far the logs are, of some seats at once. False: it is not time.
    fn save_some_logs(&mut self) -> bool {
        let now = clock::wall_ns();
        if self.state.to_save.is_empty() && now.abs_diff(self.state.saved_ns) >= SAVE_EVERY_NS {
            self.state.to_save = self.logs.unsaved().clone();
            self.state.saved_ns = now;
        }
        let mut some = BTreeSet::new();
        while some.len() < SAVED_AT_ONCE
            && let Some(agent) = self.state.to_save.pop_first()
        {
            some.insert(agent);
        }
        let is_time = !some.is_empty();
        if is_time {
            self.save_logs(some);
        }
        is_time
    }

    /// Saves how far the logs of these seats are.
    fn save_logs(&mut self, agents: BTreeSet<AgentId>) {
        let Some(store) = self.committer.store() else { return };
        let (synced, result) = self.logs.synced(store.conn(), agents, &mut self.state.behind);
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
