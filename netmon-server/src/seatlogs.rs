//! The readable logs, `logs/<seat>/log.txt` and `usb.log`: derived from the store, each item exactly once.
//!
//! The store remembers, now and then, how many bytes of the files were safely on disk and which item comes next.
//! Whatever is behind that after a crash is cut off and rendered again. A file that is shorter than it should be
//! (deleted, cut by somebody) makes both files of the seat be written anew; one that is longer is cut.

use std::collections::{BTreeSet, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;
use rusqlite::Connection;

use crate::datadir::{DataDirError, hint, make_dir};
use crate::render;
use crate::store::{self, AgentId, SeatLog};

/// Everything that is recorded of a seat.
pub const LOG: &str = "log.txt";
/// What concerns USB.
pub const USB_LOG: &str = "usb.log";
/// Items that are rendered at once: a few milliseconds.
const PAGE: usize = 250;

/// Why a seat's logs are behind. The next attempt makes up for it.
#[derive(Debug, thiserror::Error)]
pub enum SeatLogError {
    /// The store could not be read or written.
    #[error("the store cannot be read for the log of a seat")]
    Store(#[from] rusqlite::Error),
    /// The directory could not be made.
    #[error(transparent)]
    Directory(#[from] DataDirError),
    /// A file could not be written.
    #[error("cannot write {path}; {hint}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
        /// Cause.
        source: io::Error,
    },
}

/// The logs of all seats.
#[derive(Debug)]
pub struct SeatLogs {
    directory: PathBuf,
    zone: TimeZone,
    states: HashMap<AgentId, State>,
    /// Written, and not [`SeatLogs::saved`] since.
    unsaved: BTreeSet<AgentId>,
}

#[derive(Clone, Debug)]
struct State {
    directory: PathBuf,
    log: SeatLog,
}

impl State {
    /// Brings the files to the disk; how far they go.
    fn sync(&self) -> Result<SeatLog, SeatLogError> {
        for name in [LOG, USB_LOG] {
            let path = self.directory.join(name);
            File::open(&path).and_then(|file| file.sync_data()).map_err(write_error(&path))?;
        }
        Ok(self.log)
    }
}

impl SeatLogs {
    /// Logs below `directory`, with times in `zone`.
    pub fn new(directory: PathBuf, zone: TimeZone) -> Self {
        Self { directory, zone, states: HashMap::new(), unsaved: BTreeSet::new() }
    }

    /// Brings the files of one seat nearer to the store, by some hundred items; true: there are more.
    ///
    /// # Errors
    /// [`SeatLogError`]; what was written before it stays, and counts.
    pub fn update(&mut self, conn: &Connection, agent: AgentId) -> Result<bool, SeatLogError> {
        let Some(mut state) = self.state(conn, agent)? else { return Ok(false) };
        let before = state.log;
        let result = write_new_items(conn, agent, &mut state, &self.zone);
        if state.log != before || !self.states.contains_key(&agent) {
            self.unsaved.insert(agent);
        }
        self.states.insert(agent, state);
        result
    }

    /// Syncs what was written of these seats; how far that is, for [`store::save_seat_log`] and then [`SeatLogs::saved`]. A file
    /// that is missing is written anew; a seat that fails does not keep the others from being saved, and is written again from
    /// its last save on (see [`SeatLogs::distrust`]): the last [`SeatLogError`], for which a later call makes up. Seats of which
    /// there is more to write go into `behind`.
    pub fn synced(
        &mut self,
        conn: &Connection,
        agents: impl IntoIterator<Item = AgentId>,
        behind: &mut BTreeSet<AgentId>,
    ) -> (Vec<(AgentId, SeatLog)>, Result<(), SeatLogError>) {
        let mut result = Ok(());
        let mut synced = Vec::new();
        for agent in agents {
            match self.sync(conn, agent, behind) {
                Ok(Some(log)) => synced.push((agent, log)),
                // Without a state there is nothing to save.
                Ok(None) => {
                    self.unsaved.remove(&agent);
                }
                Err(error) => {
                    self.states.remove(&agent);
                    behind.insert(agent);
                    result = Err(error);
                }
            }
        }
        (synced, result)
    }

    /// These are in the store.
    pub fn saved(&mut self, saved: &[(AgentId, SeatLog)]) {
        self.unsaved.retain(|agent| saved.iter().all(|(done, _)| done != agent));
    }

    fn sync(
        &mut self,
        conn: &Connection,
        agent: AgentId,
        behind: &mut BTreeSet<AgentId>,
    ) -> Result<Option<SeatLog>, SeatLogError> {
        let mut write = |logs: &mut Self| {
            if logs.update(conn, agent)? {
                behind.insert(agent);
            }
            Ok::<_, SeatLogError>(())
        };
        if !self.states.contains_key(&agent) {
            // Its last sync failed.
            write(self)?;
        }
        match self.states.get(&agent).map(State::sync) {
            Some(Err(SeatLogError::Write { source, .. })) if source.kind() == io::ErrorKind::NotFound => {
                write(self)?;
                self.states.get(&agent).map(State::sync).transpose()
            }
            result => result.transpose(),
        }
    }

    /// After the disk failed: whatever was written since the last save is written again by the next update of these seats.
    /// The system may have dropped what it could not bring to the disk, and says "done" the next time.
    pub fn distrust(&mut self) -> impl Iterator<Item = AgentId> {
        for agent in &self.unsaved {
            self.states.remove(agent);
        }
        self.unsaved.iter().copied()
    }

    /// Those for which [`SeatLogs::synced`] has something to do.
    pub fn unsaved(&self) -> &BTreeSet<AgentId> {
        &self.unsaved
    }

    fn state(&mut self, conn: &Connection, agent: AgentId) -> Result<Option<State>, SeatLogError> {
        let Some(known) = store::agent_by_id(conn, agent)? else { return Ok(None) };
        let directory = self.directory.join(known.seat);
        let Some(mut state) = self.states.get(&agent).cloned() else {
            // A label that a revoked agent had: its log makes room first.
            let before = self.states.iter().find(|(_, state)| state.directory == directory);
            if let Some(before) = before.map(|(before, _)| *before) {
                self.update(conn, before)?;
            }
            return Ok(Some(State { directory, log: store::seat_log(conn, agent)? }));
        };
        if state.directory != directory {
            match std::fs::rename(&state.directory, &directory) {
                Ok(()) => {}
                // Written anew in its new place.
                Err(error) => {
                    tracing::warn!(%error, directory = %directory.display(), "a seat's log cannot be moved here");
                    state.log = SeatLog::default();
                }
            }
            state.directory = directory;
        }
        Ok(Some(state))
    }
}

fn write_new_items(
    conn: &Connection,
    agent: AgentId,
    state: &mut State,
    zone: &TimeZone,
) -> Result<bool, SeatLogError> {
    make_dir(&state.directory)?;
    let (log_path, usb_path) = (state.directory.join(LOG), state.directory.join(USB_LOG));
    let (mut log, log_length) = open(&log_path).map_err(write_error(&log_path))?;
    let (mut usb, usb_length) = open(&usb_path).map_err(write_error(&usb_path))?;
    if log_length < state.log.log_bytes || usb_length < state.log.usb_bytes {
        tracing::warn!(directory = %state.directory.display(), "a seat's log is cut or gone: it is written anew");
        state.log = SeatLog::default();
    }
    for (file, path, length, bytes) in [
        (&mut log, &log_path, log_length, state.log.log_bytes),
        (&mut usb, &usb_path, usb_length, state.log.usb_bytes),
    ] {
        // Setting a length is a change of the file, even to the length that it has.
        if length != bytes {
            file.set_len(bytes).map_err(write_error(path))?;
        }
        file.seek(SeekFrom::Start(bytes)).map_err(write_error(path))?;
    }
    let items = store::items_from(conn, agent, state.log.next_n, PAGE)?;
    let Some(last) = items.last() else { return Ok(false) };
    let (mut log_text, mut usb_text) = (String::new(), String::new());
    for item in &items {
        let line = render::line(item, zone);
        for text in [Some(&mut log_text), line.usb.then_some(&mut usb_text)].into_iter().flatten() {
            text.push_str(&line.text);
            text.push('\n');
        }
    }
    // `usb.log` first: whoever waits for `log.txt` to grow finds both.
    usb.write_all(usb_text.as_bytes()).map_err(write_error(&usb_path))?;
    log.write_all(log_text.as_bytes()).map_err(write_error(&log_path))?;
    state.log = SeatLog {
        next_n: last.n + 1,
        log_bytes: state.log.log_bytes + log_text.len() as u64,
        usb_bytes: state.log.usb_bytes + usb_text.len() as u64,
    };
    Ok(items.len() == PAGE)
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

fn write_error(path: &Path) -> impl Fn(io::Error) -> SeatLogError + use<> {
    let path = path.to_owned();
    move |source| SeatLogError::Write { path: path.clone(), hint: hint(&source), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::Fixture;

    struct Room {
        store: Fixture,
        logs: PathBuf,
        agent: AgentId,
    }

    impl Room {
        fn new() -> Self {
            let store = Fixture::new();
            let logs = store.path().join("logs");
            let agent = store.agent("pc-1");
            Self { store, logs, agent }
        }

        fn fresh(&self) -> SeatLogs {
            SeatLogs::new(self.logs.clone(), TimeZone::UTC)
        }

        fn read(&self, name: &str) -> Vec<String> {
            let text = std::fs::read_to_string(self.logs.join("pc-1").join(name)).unwrap();
            text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
        }
    }

    fn save(logs: &mut SeatLogs, conn: &Connection) -> Result<(), SeatLogError> {
        let (synced, result) = logs.synced(conn, logs.unsaved().clone(), &mut BTreeSet::new());
        for (agent, log) in &synced {
            store::save_seat_log(conn, *agent, *log)?;
        }
        logs.saved(&synced);
        result
    }

    #[test]
    fn a_log_that_the_saving_finds_gone_is_written_to_its_end() {
        let room = Room::new();
        let mut logs = room.fresh();
        let most = 3 * PAGE as u64;
        room.store.append(room.agent, 1, 1..=most);
        update_all(&mut logs, &room);
        std::fs::remove_dir_all(room.logs.join("pc-1")).unwrap();
        let mut behind = BTreeSet::new();
        let (synced, result) = logs.synced(room.store.conn(), [room.agent], &mut behind);
        result.unwrap();
        assert_eq!((synced.len(), behind), (1, BTreeSet::from([room.agent])));
        update_all(&mut logs, &room);
        assert_eq!(room.read(LOG), watching(1..=most as u32));
    }

    fn watching(numbers: std::ops::RangeInclusive<u32>) -> Vec<String> {
        numbers.map(|i| format!("no longer watching interface \"eth{i}\" (index {i})")).collect()
    }

    #[test]
    fn each_item_is_written_once() {
        let room = Room::new();
        let mut logs = room.fresh();
        room.store.append(room.agent, 1, 1..=3);
        logs.update(room.store.conn(), room.agent).unwrap();
        logs.update(room.store.conn(), room.agent).unwrap();
        room.store.append(room.agent, 1, 4..=5);
        logs.update(room.store.conn(), room.agent).unwrap();
        assert_eq!(room.read(LOG), watching(1..=5));
        assert!(room.read(USB_LOG).is_empty());
    }

    #[test]
    fn a_crash_between_commit_and_log_or_between_log_and_its_place_repeats_nothing() {
        let room = Room::new();
        let mut logs = room.fresh();
        room.store.append(room.agent, 1, 1..=2);
        logs.update(room.store.conn(), room.agent).unwrap();
        save(&mut logs, room.store.conn()).unwrap();
        // Written, but its place was not saved; then committed, but not written: then the process dies.
        room.store.append(room.agent, 1, 3..=4);
        logs.update(room.store.conn(), room.agent).unwrap();
        room.store.append(room.agent, 1, 5..=6);
        drop(logs);
        room.fresh().update(room.store.conn(), room.agent).unwrap();
        assert_eq!(room.read(LOG), watching(1..=6));
    }

    #[test]
    fn half_a_line_at_the_end_is_cut() {
        let room = Room::new();
        let mut logs = room.fresh();
        room.store.append(room.agent, 1, 1..=2);
        logs.update(room.store.conn(), room.agent).unwrap();
        let path = room.logs.join("pc-1").join(LOG);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"half a li").unwrap();
        room.store.append(room.agent, 1, 3..=3);
        logs.update(room.store.conn(), room.agent).unwrap();
        assert_eq!(room.read(LOG), watching(1..=3));
    }

    /// As often as there is more.
    fn update_all(logs: &mut SeatLogs, room: &Room) {
        while logs.update(room.store.conn(), room.agent).unwrap() {}
    }

    #[test]
    fn a_deleted_log_is_written_anew() {
        let room = Room::new();
        let mut logs = room.fresh();
        room.store.append(room.agent, 1, 1..=1500);
        assert!(logs.update(room.store.conn(), room.agent).unwrap());
        assert_eq!(room.read(LOG), watching(1..=PAGE as u32));
        update_all(&mut logs, &room);
        save(&mut logs, room.store.conn()).unwrap();
        std::fs::remove_dir_all(room.logs.join("pc-1")).unwrap();
        update_all(&mut logs, &room);
        assert_eq!(room.read(LOG), watching(1..=1500));
        std::fs::remove_dir_all(room.logs.join("pc-1")).unwrap();
        update_all(&mut room.fresh(), &room);
        assert_eq!(room.read(LOG), watching(1..=1500));
    }

    #[test]
    fn a_seat_whose_log_is_missing_or_stuck_does_not_keep_the_others_from_being_saved() {
        let room = Room::new();
        let (mut logs, conn) = (room.fresh(), room.store.conn());
        let add = |n: u8| {
            conn.execute(
                "INSERT INTO agents (uuid, seat, spki_sha256, hostname, enrolled_ns, head)
                 VALUES (?1, ?2, ?1, x'', 0, zeroblob(32))",
                rusqlite::params![[n + 50; 16], format!("other-{n}")],
            )
            .unwrap();
            AgentId(conn.last_insert_rowid())
        };
        let others = [1, 2].map(add);
        for agent in [room.agent, others[0], others[1]] {
            room.store.append(agent, 1, 1..=2);
            logs.update(conn, agent).unwrap();
        }
        std::fs::remove_dir_all(room.logs.join("pc-1")).unwrap();
        std::fs::remove_dir_all(room.logs.join("other-1")).unwrap();
        std::fs::write(room.logs.join("other-1"), "a file in the way").unwrap();
        assert!(save(&mut logs, conn).is_err());
        let saved =
            [room.agent, others[0], others[1]].map(|agent| store::seat_log(conn, agent).unwrap().next_n);
        assert_eq!(saved, [3, 1, 3]);
        assert_eq!(room.read(LOG), watching(1..=2));
        assert!(!logs.unsaved().is_empty());
        std::fs::remove_file(room.logs.join("other-1")).unwrap();
        save(&mut logs, conn).unwrap();
        assert!(logs.unsaved().is_empty());
        assert_eq!(store::seat_log(conn, others[0]).unwrap().next_n, 3);
    }

    #[test]
    fn what_a_failed_sync_may_have_dropped_is_written_again() {
        let room = Room::new();
        let mut logs = room.fresh();
        let seat = room.logs.join("pc-1");
        room.store.append(room.agent, 1, 1..=2);
        logs.update(room.store.conn(), room.agent).unwrap();
        save(&mut logs, room.store.conn()).unwrap();
        room.store.append(room.agent, 1, 3..=4);
        logs.update(room.store.conn(), room.agent).unwrap();
        // A device that cannot be synced; what was written since the last sync did not come to the disk.
        std::fs::remove_file(seat.join(USB_LOG)).unwrap();
        std::os::unix::fs::symlink("/dev/null", seat.join(USB_LOG)).unwrap();
        assert!(save(&mut logs, room.store.conn()).is_err());
        std::fs::remove_file(seat.join(USB_LOG)).unwrap();
        let drop_unsaved = || {
            let mut text = std::fs::read(seat.join(LOG)).unwrap();
            let saved = store::seat_log(room.store.conn(), room.agent).unwrap().log_bytes as usize;
            text[saved..].fill(0);
            std::fs::write(seat.join(LOG), text).unwrap();
        };
        drop_unsaved();
        save(&mut logs, room.store.conn()).unwrap();
        assert_eq!(room.read(LOG), watching(1..=4));
        assert!(logs.unsaved().is_empty());
        // The store's own sync failed.
        room.store.append(room.agent, 1, 5..=6);
        logs.update(room.store.conn(), room.agent).unwrap();
        drop_unsaved();
        assert_eq!(logs.distrust().collect::<Vec<_>>(), [room.agent]);
        logs.update(room.store.conn(), room.agent).unwrap();
        assert_eq!(room.read(LOG), watching(1..=6));
    }

    #[test]
    fn the_log_of_a_renamed_seat_moves_and_its_old_place_is_free() {
        let room = Room::new();
        let mut logs = room.fresh();
        room.store.append(room.agent, 1, 1..=3);
        logs.update(room.store.conn(), room.agent).unwrap();
        room.store.conn().execute("UPDATE agents SET seat = 'pc-1-old'", []).unwrap();
        room.store.append(room.agent, 1, 4..=4);
        logs.update(room.store.conn(), room.agent).unwrap();
        assert!(!room.logs.join("pc-1").exists());
        let moved = std::fs::read_to_string(room.logs.join("pc-1-old").join(LOG)).unwrap();
        assert_eq!(moved.lines().count(), 4);
    }

    #[test]
    fn a_gap_appears_at_its_place_in_both_logs() {
        let room = Room::new();
        let mut logs = room.fresh();
        room.store.append(room.agent, 1, 1..=1);
        store::open_epoch(room.store.conn(), room.agent, 1, 5, 9_000_000_000).unwrap().unwrap();
        room.store.append(room.agent, 1, 5..=5);
        logs.update(room.store.conn(), room.agent).unwrap();
        let lines = room.read(LOG);
        assert_eq!([&lines[0], &lines[2]], [&watching(1..=1)[0], &watching(5..=5)[0]]);
        assert!(
            lines[1].starts_with("GAP ") && lines[1].ends_with("records never came from this PC, 3 records")
        );
        assert_eq!(room.read(USB_LOG), lines[1..2]);
    }
}
