//! What to say to the server next. Pure: told what the spool has and what the server said.

use std::collections::VecDeque;

use netmon_common::raw::Raw;
use netmon_common::wire::{Item, Newest, ToAgent, WINDOW};

use crate::spool::{Chunk, EpochRange};

/// Calls of [`ToAgent::Resume`] without an ack in between, after which the connection is given up: the two
/// sides will not agree.
const MAX_RESUMES: u32 = 32;
/// Epochs that are left on one connection: more than a spool that was set back has. Each costs writing anew what waits.
const MAX_LEFT: u32 = 8;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Say hello for this epoch.
    Hello {
        /// The epoch.
        epoch: u64,
        /// Its oldest record.
        oldest_seq: u64,
        /// Behind its newest one.
        next_seq: u64,
    },
    /// Send records of the epoch from this one on, as [`Session::fit`] has them, then tell [`Session::sent`].
    Send {
        /// The epoch.
        epoch: u64,
        /// The first record.
        seq: u64,
    },
    /// Wait for the server, or for new records.
    Wait,
}

/// What a message of the server means for the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The server has everything up to and including this record.
    Acked {
        /// The epoch.
        epoch: u64,
        /// The record.
        seq: u64,
    },
    /// The server cannot take records under this epoch's numbers: it has others there that this spool never wrote, or has
    /// given them up. Give what waits of it numbers of another one.
    LeaveEpoch {
        /// The epoch.
        epoch: u64,
        /// The server has everything up to and including this record; 0: nothing.
        acked: u64,
    },
    /// Look up this record's fingerprint in the spool, then tell [`Session::compared`], and do what that says.
    Compare {
        /// The epoch.
        epoch: u64,
        /// The record.
        seq: u64,
    },
    /// The server will not talk to this agent.
    Refused(Raw),
}

/// The server broke the protocol; the connection is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// It speaks another version than the handshake agreed on.
    #[error("the server speaks version {0} of the protocol, which the handshake did not agree on")]
    Version(u16),
    /// A welcome to no hello.
    #[error("the server welcomes without having been greeted")]
    Welcome,
    /// An answer to nothing that was asked.
    #[error("the server answers what was not asked")]
    Unasked,
    /// An ack for what was not sent.
    #[error("the server acknowledges record {0}, which was not sent")]
    Ack(u64),
    /// It wants to go on behind what was sent.
    #[error("the server wants to go on from record {0}, and nothing was sent so far")]
    Resume(u64),
    /// Its newest record is one that it does not expect any more.
    #[error("the server has record {0}, and expects one before it")]
    Newest(u64),
    /// It cannot take one epoch after the other.
    #[error("the server cannot go on in any epoch")]
    Epochs,
    /// It asks to resume again and again.
    #[error("the server asks to resume again and again")]
    Resumes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Greeted,
    /// The server expects record `next_seq`; one that it has looks like this.
    Comparing {
        next_seq: u64,
        last: Newest,
    },
    /// The server expects record `next_seq`, and has given up what is missing behind record `last`.
    GivenUp {
        next_seq: u64,
        last: u64,
    },
    Streaming,
}

/// One connection's conversation.
#[derive(Debug)]
pub struct Session {
    version: u16,
    state: State,
    epoch: u64,
    /// Behind the newest record that the spool had when this epoch was greeted: what came since, no server can know.
    greeted: u64,
    /// The record to be sent next.
    next: u64,
    /// Behind the newest record that was ever sent in this epoch on this connection.
    sent: u64,
    /// The last record of each batch on its way.
    in_flight: VecDeque<u64>,
    resumes: u32,
    /// Epochs that were left on this connection.
    left: u32,
}

impl Session {
    /// A conversation in this version of the protocol.
    pub fn new(version: u16) -> Self {
        let in_flight = VecDeque::new();
        Self {
            version,
            state: State::New,
            epoch: 0,
            greeted: 1,
            next: 1,
            sent: 0,
            in_flight,
            resumes: 0,
            left: 0,
        }
    }

    /// The version of the protocol.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// What to do now. `epochs`: [`crate::spool::Spool::epochs`].
    pub fn step(&mut self, epochs: &[EpochRange]) -> Step {
        let Some(first) = epochs.first() else { return Step::Wait };
        match self.state {
            State::Greeted | State::Comparing { .. } | State::GivenUp { .. } => Step::Wait,
            State::New => self.greet(first.epoch, first.oldest, first.next),
            // The epoch before is with the server.
            State::Streaming if first.epoch != self.epoch => {
                self.greet(first.epoch, first.oldest, first.next)
            }
            State::Streaming if self.in_flight.len() < WINDOW && self.next < first.next => {
                Step::Send { epoch: self.epoch, seq: self.next }
            }
            State::Streaming => Step::Wait,
        }
    }

    /// A batch up to this record is on its way.
    pub fn sent(&mut self, last_seq: u64) {
        self.in_flight.push_back(last_seq);
        self.next = last_seq + 1;
        self.sent = self.sent.max(self.next);
    }

    /// What to send of what was read for [`Step::Send`] with this `seq`: items for a batch that begins there, holes among
    /// them where the spool does not have records any more.
    ///
    /// # Errors
    /// Version 1 has no word for holes, so the server is told by another hello: [`Step::Hello`].
    pub fn fit(&mut self, seq: u64, chunk: Chunk) -> Result<Vec<Item>, Step> {
        let next_seq = chunk.next_seq();
        let missing = chunk.first_seq.saturating_sub(seq);
        let mut items = chunk.items;
        if self.version > 1 {
            if missing > 0 {
                items.insert(0, Item::Hole(missing));
            }
            return Ok(items);
        }
        let hole = items.first().filter(|item| item.is_hole()).map_or(0, Item::span);
        if missing + hole > 0 {
            return Err(self.greet(self.epoch, seq + missing + hole, next_seq));
        }
        items.truncate(items.iter().position(Item::is_hole).unwrap_or(items.len()));
        Ok(items)
    }

    /// Is the server's turn to say something?
    pub fn expects_answer(&self) -> bool {
        self.state == State::Greeted || !self.in_flight.is_empty()
    }

    /// Takes what the server says.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn receive(&mut self, message: ToAgent, epochs: &[EpochRange]) -> Result<Effect, Violation> {
        let range = epochs.iter().find(|range| range.epoch == self.epoch);
        let end = range.map_or(self.next, |range| range.next);
        let is_current = epochs.last().is_some_and(|last| last.epoch == self.epoch);
        match message {
            ToAgent::Welcome { version, .. } if version != self.version || version > 1 => {
                Err(Violation::Version(version))
            }
            ToAgent::Expect { .. } if self.version < 2 => Err(Violation::Unasked),
            ToAgent::Welcome { .. } | ToAgent::Expect { .. } if self.state != State::Greeted => {
                Err(Violation::Welcome)
            }
            ToAgent::Welcome { next_seq, .. } | ToAgent::Expect { next_seq, .. }
                if next_seq > self.greeted && is_current =>
            {
                self.begin_anew(0)
            }
            ToAgent::Expect { next_seq, last: Some(last) } if last.seq >= next_seq => {
                Err(Violation::Newest(last.seq))
            }
            // Of an older epoch the spool may have lost the end that the server still got.
            ToAgent::Expect { next_seq, last: Some(last) } => {
                self.state = State::Comparing { next_seq: next_seq.min(self.greeted), last };
                Ok(Effect::Compare { epoch: self.epoch, seq: last.seq })
            }
            ToAgent::Expect { next_seq, last: None } => Ok(self.go_on(next_seq.min(self.greeted), 0)),
            ToAgent::Welcome { next_seq, .. } => Ok(self.stream(next_seq.min(self.greeted))),
            // The end of an epoch that was left behind.
            ToAgent::Ack { epoch, .. } if epoch != self.epoch => Ok(Effect::None),
            ToAgent::Ack { seq, .. } if seq >= self.sent => Err(Violation::Ack(seq)),
            ToAgent::Ack { epoch, seq } => {
                self.resumes = 0;
                while self.in_flight.pop_front_if(|last| *last <= seq).is_some() {}
                Ok(Effect::Acked { epoch, seq })
            }
            // It was said before the hello that is on its way; the welcome will tell.
            ToAgent::Resume { .. } if self.state != State::Streaming => Ok(Effect::None),
            // Forward it would skip what was never sent.
            ToAgent::Resume { next_seq } if next_seq > self.sent.max(1) || next_seq > end => {
                Err(Violation::Resume(next_seq))
            }
            ToAgent::Resume { next_seq } => {
                self.resumes += 1;
                if self.resumes > MAX_RESUMES {
                    return Err(Violation::Resumes);
                }
                self.in_flight.clear();
                self.next = next_seq.max(1);
                Ok(Effect::None)
            }
            ToAgent::Refused { reason } => Ok(Effect::Refused(reason)),
            ToAgent::Heard { .. } | ToAgent::Renewed { .. } => Err(Violation::Unasked),
        }
    }

    /// The spool has this fingerprint of the record of [`Effect::Compare`]; `None`: it does not have the record any more,
    /// as usual when that was acknowledged.
    ///
    /// # Errors
    /// [`Violation::Epochs`].
    pub fn compared(&mut self, found: Option<[u8; 16]>) -> Result<Effect, Violation> {
        let effect = match self.state {
            State::Comparing { last, .. } if found.is_some_and(|found| found != last.fingerprint) => {
                self.begin_anew(0)?
            }
            State::Comparing { next_seq, last } => self.go_on(next_seq, last.seq),
            State::GivenUp { last, .. } if found.is_some() => self.begin_anew(last)?,
            State::GivenUp { next_seq, .. } => self.stream(next_seq),
            _ => Effect::None,
        };
        Ok(effect)
    }

    /// The server's newest record is `last`, and it expects `next_seq`. It was told that what is between them cannot come,
    /// but a power cut may have brought a file back, or the server was set back to a state before it had it.
    fn go_on(&mut self, next_seq: u64, last: u64) -> Effect {
        let newest = next_seq.saturating_sub(1);
        // What was greeted begins at the oldest record that the spool has.
        if newest <= last || newest < self.next {
            return self.stream(next_seq);
        }
        self.state = State::GivenUp { next_seq, last };
        Effect::Compare { epoch: self.epoch, seq: newest }
    }

    fn begin_anew(&mut self, acked: u64) -> Result<Effect, Violation> {
        let (epoch, left) = (self.epoch, self.left + 1);
        if left > MAX_LEFT {
            return Err(Violation::Epochs);
        }
        *self = Self { left, ..Self::new(self.version) };
        Ok(Effect::LeaveEpoch { epoch, acked })
    }

    fn stream(&mut self, next_seq: u64) -> Effect {
        self.state = State::Streaming;
        self.in_flight.clear();
        self.next = self.next.max(next_seq);
        self.sent = self.sent.max(self.next);
        match next_seq {
            0 | 1 => Effect::None,
            _ => Effect::Acked { epoch: self.epoch, seq: next_seq - 1 },
        }
    }

    fn greet(&mut self, epoch: u64, oldest_seq: u64, next_seq: u64) -> Step {
        if epoch != self.epoch {
            self.sent = 0;
            self.in_flight.clear();
        }
        self.state = State::Greeted;
        self.epoch = epoch;
        (self.next, self.greeted) = (oldest_seq, next_seq);
        Step::Hello { epoch, oldest_seq, next_seq }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(epoch: u64, oldest: u64, next: u64) -> EpochRange {
        EpochRange { epoch, oldest, next }
    }

    fn known(seq: u64) -> Option<Newest> {
        Some(Newest { seq, fingerprint: [1; 16] })
    }

    fn welcome(next_seq: u64) -> ToAgent {
        ToAgent::Expect { next_seq, last: None }
    }

    fn streaming(epochs: &[EpochRange], next_seq: u64) -> Session {
        let mut session = Session::new(2);
        assert!(matches!(session.step(epochs), Step::Hello { .. }));
        welcomed(&mut session, epochs, next_seq);
        session
    }

    /// The server has everything before this record, and it looks as it does here.
    fn welcomed(session: &mut Session, epochs: &[EpochRange], next_seq: u64) -> Effect {
        let last = known(next_seq - 1).filter(|last| last.seq > 0);
        match session.receive(ToAgent::Expect { next_seq, last }, epochs).unwrap() {
            Effect::Compare { .. } => session.compared(Some([1; 16])).unwrap(),
            effect => effect,
        }
    }

    #[test]
    fn it_greets_waits_and_sends_from_where_the_server_is() {
        let epochs = [range(7, 1, 11)];
        let mut session = Session::new(2);
        assert_eq!(session.step(&epochs), Step::Hello { epoch: 7, oldest_seq: 1, next_seq: 11 });
        assert_eq!(session.step(&epochs), Step::Wait);
        assert_eq!(welcomed(&mut session, &epochs, 5), Effect::Acked { epoch: 7, seq: 4 });
        assert_eq!(session.step(&epochs), Step::Send { epoch: 7, seq: 5 });
        session.sent(10);
        assert_eq!(session.step(&epochs), Step::Wait);
        assert_eq!(
            session.receive(ToAgent::Ack { epoch: 7, seq: 10 }, &epochs),
            Ok(Effect::Acked { epoch: 7, seq: 10 })
        );
        assert!(!session.expects_answer());
    }

    #[test]
    fn it_sends_no_more_than_the_window_ahead_of_the_acks() {
        let epochs = [range(7, 1, 1000)];
        let mut session = streaming(&epochs, 1);
        for n in 1..=WINDOW as u64 {
            assert_eq!(session.step(&epochs), Step::Send { epoch: 7, seq: n });
            session.sent(n);
        }
        assert_eq!(session.step(&epochs), Step::Wait);
        session.receive(ToAgent::Ack { epoch: 7, seq: 1 }, &epochs).unwrap();
        assert_eq!(session.step(&epochs), Step::Send { epoch: 7, seq: WINDOW as u64 + 1 });
    }

    #[test]
    fn an_older_epoch_is_drained_before_the_next_one_is_greeted() {
        let both = [range(3, 1, 5), range(7, 1, 2)];
        let mut session = streaming(&both, 1);
        assert_eq!(session.step(&both), Step::Send { epoch: 3, seq: 1 });
        session.sent(4);
        assert_eq!(session.step(&both), Step::Wait);
        session.receive(ToAgent::Ack { epoch: 3, seq: 4 }, &both).unwrap();
        assert_eq!(session.step(&both[1..]), Step::Hello { epoch: 7, oldest_seq: 1, next_seq: 2 });
        session.receive(welcome(1), &both[1..]).unwrap();
        assert_eq!(session.step(&both[1..]), Step::Send { epoch: 7, seq: 1 });
    }

    #[test]
    fn a_server_that_knows_more_of_the_current_epoch_makes_a_new_one() {
        let epochs = [range(7, 1, 11)];
        let mut session = Session::new(2);
        session.step(&epochs);
        assert_eq!(session.receive(welcome(12), &epochs), Ok(Effect::LeaveEpoch { epoch: 7, acked: 0 }));
        let renewed = [range(8, 1, 11)];
        assert_eq!(session.step(&renewed), Step::Hello { epoch: 8, oldest_seq: 1, next_seq: 11 });
    }

    #[test]
    fn what_was_recorded_since_the_hello_is_not_what_the_server_knows() {
        let mut session = Session::new(2);
        session.step(&[range(7, 1, 11)]);
        let message = ToAgent::Expect { next_seq: 14, last: known(10) };
        assert_eq!(
            session.receive(message, &[range(7, 1, 20)]),
            Ok(Effect::LeaveEpoch { epoch: 7, acked: 0 })
        );
    }

    #[test]
    fn a_server_that_knows_more_of_an_older_epoch_has_it_all() {
        let both = [range(3, 1, 5), range(7, 1, 2)];
        let mut session = Session::new(2);
        session.step(&both);
        assert_eq!(welcomed(&mut session, &both, 9), Effect::Acked { epoch: 3, seq: 4 });
    }

    #[test]
    fn a_hole_is_sent_where_there_is_a_word_for_it() {
        let record = || Item::Record(vec![1]);
        let chunk = || Chunk { first_seq: 30, items: vec![record(), Item::Hole(2), record()] };
        let mut session = streaming(&[range(7, 1, 100)], 1);
        let expected = vec![Item::Hole(10), record(), Item::Hole(2), record()];
        assert_eq!(session.fit(20, chunk()), Ok(expected));
        let mut old = Session::new(1);
        old.step(&[range(7, 1, 100)]);
        assert_eq!(old.fit(20, chunk()), Err(Step::Hello { epoch: 7, oldest_seq: 30, next_seq: 34 }));
        assert_eq!(old.fit(30, chunk()), Ok(vec![record()]));
        let holes = Chunk { first_seq: 31, items: vec![Item::Hole(2), record()] };
        assert_eq!(old.fit(31, holes), Err(Step::Hello { epoch: 7, oldest_seq: 33, next_seq: 34 }));
    }

    #[test]
    fn a_resume_goes_back_and_not_beyond_a_hello() {
        let epochs = [range(7, 1, 100)];
        let mut session = Session::new(1);
        session.step(&epochs);
        session.receive(ToAgent::Welcome { version: 1, next_seq: 1 }, &epochs).unwrap();
        session.sent(50);
        assert_eq!(session.receive(ToAgent::Resume { next_seq: 20 }, &epochs), Ok(Effect::None));
        assert_eq!(session.step(&epochs), Step::Send { epoch: 7, seq: 20 });
        let chunk = Chunk { first_seq: 30, items: vec![Item::Record(vec![1])] };
        assert_eq!(session.fit(20, chunk), Err(Step::Hello { epoch: 7, oldest_seq: 30, next_seq: 31 }));
        assert_eq!(session.receive(ToAgent::Resume { next_seq: 20 }, &epochs), Ok(Effect::None));
        session.receive(ToAgent::Welcome { version: 1, next_seq: 30 }, &epochs).unwrap();
        assert_eq!(session.step(&epochs), Step::Send { epoch: 7, seq: 30 });
    }

    #[test]
    fn a_server_that_breaks_the_protocol_is_left() {
        let epochs = [range(7, 1, 100)];
        let mut session = streaming(&epochs, 1);
        session.sent(50);
        assert_eq!(session.receive(ToAgent::Ack { epoch: 7, seq: 51 }, &epochs), Err(Violation::Ack(51)));
        assert_eq!(session.receive(welcome(1), &epochs), Err(Violation::Welcome));
        assert_eq!(session.receive(ToAgent::Resume { next_seq: 101 }, &epochs), Err(Violation::Resume(101)));
        let behind = ToAgent::Resume { next_seq: 52 };
        assert_eq!(session.receive(behind, &epochs), Err(Violation::Resume(52)), "it was not sent yet");
        for _ in 0..MAX_RESUMES {
            session.receive(ToAgent::Resume { next_seq: 2 }, &epochs).unwrap();
        }
        assert_eq!(session.receive(ToAgent::Resume { next_seq: 2 }, &epochs), Err(Violation::Resumes));
        let mut greeted = Session::new(2);
        greeted.step(&epochs);
        let other = ToAgent::Welcome { version: 1, next_seq: 1 };
        assert_eq!(greeted.receive(other, &epochs), Err(Violation::Version(1)));
        assert_eq!(Session::new(1).receive(welcome(1), &epochs), Err(Violation::Unasked));
        let mut greeted = Session::new(2);
        greeted.step(&epochs);
        let newer = ToAgent::Expect { next_seq: 5, last: known(5) };
        assert_eq!(greeted.receive(newer, &epochs), Err(Violation::Newest(5)));
    }

    #[test]
    fn a_server_that_takes_no_epoch_does_not_make_the_spool_write_for_ever() {
        let epochs = [range(7, 1, 100)];
        let mut session = Session::new(2);
        for _ in 0..MAX_LEFT {
            session.step(&epochs);
            let left = Effect::LeaveEpoch { epoch: 7, acked: 0 };
            assert_eq!(session.receive(welcome(101), &epochs), Ok(left));
        }
        session.step(&epochs);
        assert_eq!(session.receive(welcome(101), &epochs), Err(Violation::Epochs));
    }

    #[test]
    fn a_server_of_the_version_before_is_understood() {
        let epochs = [range(7, 1, 11)];
        let mut session = Session::new(1);
        session.step(&epochs);
        let old = ToAgent::Welcome { version: 1, next_seq: 5 };
        assert_eq!(session.receive(old, &epochs), Ok(Effect::Acked { epoch: 7, seq: 4 }));
        assert_eq!(session.step(&epochs), Step::Send { epoch: 7, seq: 5 });
    }

    #[test]
    fn a_spool_that_was_set_back_and_has_grown_since_begins_a_new_epoch() {
        let epochs = [range(7, 1, 100)];
        let expect = |found| {
            let mut session = Session::new(2);
            session.step(&epochs);
            let message = ToAgent::Expect { next_seq: 51, last: known(48) };
            assert_eq!(session.receive(message, &epochs), Ok(Effect::Compare { epoch: 7, seq: 48 }));
            assert_eq!(session.step(&epochs), Step::Wait);
            let effect = session.compared(found).unwrap();
            (session, effect)
        };
        let gap = |found, behind| {
            let (mut session, effect) = expect(found);
            assert_eq!(effect, Effect::Compare { epoch: 7, seq: 50 }, "the server has given it up");
            assert_eq!(session.step(&epochs), Step::Wait);
            session.compared(behind).unwrap()
        };
        let goes_on = Effect::Acked { epoch: 7, seq: 50 };
        assert_eq!(gap(Some([1; 16]), None), goes_on);
        assert_eq!(gap(None, None), goes_on, "it was acknowledged and is gone");
        assert_eq!(
            gap(Some([1; 16]), Some([3; 16])),
            Effect::LeaveEpoch { epoch: 7, acked: 48 },
            "it is back"
        );
        assert_eq!(expect(Some([2; 16])).1, Effect::LeaveEpoch { epoch: 7, acked: 0 });
    }

    #[test]
    fn what_the_server_has_given_up_is_not_looked_for_where_the_spool_does_not_have_it_either() {
        let epochs = [range(7, 51, 100)];
        let mut session = Session::new(2);
        session.step(&epochs);
        let message = ToAgent::Expect { next_seq: 51, last: None };
        assert_eq!(session.receive(message, &epochs), Ok(Effect::Acked { epoch: 7, seq: 50 }));
    }

    #[test]
    fn an_older_epoch_is_compared_at_its_end() {
        let both = [range(3, 1, 5), range(7, 1, 2)];
        for (found, effect) in
            [(1, Effect::Acked { epoch: 3, seq: 4 }), (2, Effect::LeaveEpoch { epoch: 3, acked: 0 })]
        {
            let mut session = Session::new(2);
            session.step(&both);
            let message = ToAgent::Expect { next_seq: 9, last: known(4) };
            assert_eq!(session.receive(message, &both), Ok(Effect::Compare { epoch: 3, seq: 4 }));
            assert_eq!(session.compared(Some([found; 16])), Ok(effect));
        }
    }
}
