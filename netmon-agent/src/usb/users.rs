//! Names of users, by the PC's name service (nsswitch.conf(5)).
//!
//! A name service may ask the network and take long. So a thread of its own asks it: a name that it has not found yet is not
//! known, and nobody waits for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use netmon_common::raw::Raw;
use nix::unistd::{Uid, User};

/// User IDs that may wait for their names.
const WAITING: usize = 64;
/// Names that are remembered.
const MAX: usize = 1_024;
/// After so long a name is asked for again, boot clock; until there is an answer the old one holds.
const FRESH_NS: u64 = 60_000_000_000;

/// Names of users. Dropping it ends the thread, after the answer that it waits for.
#[derive(Debug)]
pub struct Users {
    questions: Option<mpsc::SyncSender<u32>>,
    names: Arc<Mutex<BTreeMap<u32, Raw>>>,
    asked: BTreeMap<u32, u64>,
}

impl Users {
    /// Asks on a thread of its own. Where there can be none, no name is known.
    pub fn start() -> Self {
        Self::asking(|uid| {
            // An error of the name service is no answer either.
            let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
            user.map(|user| Raw::new(user.name)).unwrap_or_default()
        })
    }

    fn asking(ask: impl Fn(u32) -> Raw + Send + 'static) -> Self {
        let (questions, asked) = mpsc::sync_channel(WAITING);
        let names: Arc<Mutex<BTreeMap<u32, Raw>>> = Arc::default();
        let answers = Arc::clone(&names);
        let answer = move || {
            for uid in asked {
                let name = ask(uid);
                let mut names = answers.lock().unwrap_or_else(PoisonError::into_inner);
                if names.len() >= MAX && !names.contains_key(&uid) {
                    names.clear();
                }
                // A name service that fails now had an answer before.
                if !name.is_empty() || !names.contains_key(&uid) {
                    names.insert(uid, name);
                }
            }
        };
        let questions = match thread::Builder::new().name("users".into()).spawn(answer) {
            Ok(_) => Some(questions),
            Err(error) => {
                tracing::error!(%error, "no thread for the names of users: they are recorded by number");
                None
            }
        };
        Self { questions, names, asked: BTreeMap::new() }
    }

    /// Sees to it that the name is known soon.
    pub fn ask(&mut self, uid: u32, boot_ns: u64) {
        let Some(questions) = &self.questions else { return };
        if self.asked.get(&uid).is_some_and(|asked| boot_ns.saturating_sub(*asked) < FRESH_NS) {
            return;
        }
        // Where many wait, it is asked for the next time.
        if questions.try_send(uid).is_ok() {
            if self.asked.len() >= MAX {
                self.asked.clear();
            }
            self.asked.insert(uid, boot_ns);
        }
    }

    /// The name, empty when it is not known.
    pub fn name(&self, uid: u32) -> Raw {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).get(&uid).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn await_name(users: &Users, uid: u32) -> Raw {
        loop {
            match users.name(uid) {
                name if name.is_empty() => thread::yield_now(),
                name => return name,
            }
        }
    }

    #[test]
    fn root_is_called_root() {
        let mut users = Users::start();
        users.ask(0, 0);
        assert_eq!(await_name(&users, 0), "root".into());
    }

    #[test]
    fn a_name_service_that_hangs_holds_nobody_up_and_a_name_is_asked_for_once_a_minute() {
        let (answer, answers) = mpsc::channel::<&str>();
        let mut users = Users::asking(move |_| answers.recv().map(Raw::from).unwrap_or_default());
        users.ask(7, 0);
        users.ask(7, FRESH_NS - 1);
        for uid in 1_000..2_000 {
            users.ask(uid, 0);
        }
        assert_eq!(users.name(7), Raw::default());
        answer.send("student7").unwrap();
        assert_eq!(await_name(&users, 7), "student7".into());
        users.ask(7, FRESH_NS);
        drop(answer);
        assert_eq!(users.name(7), "student7".into());
    }
}
