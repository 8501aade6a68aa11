//! Is a history complete and unedited? Pure: told the items and checkpoints in order, says where the first thing is wrong.

use std::collections::VecDeque;

use jiff::tz::TimeZone;
use netmon_common::logline;
use netmon_common::raw::Escaped;
use netmon_common::wire::Checkpoint;

use crate::chain::{self, Entry, Export, Head};
use crate::notice::Notice;

/// An item that was signed longer than this after it was received is mentioned. A server that runs signs once a minute.
const LATE_NS: i64 = 600_000_000_000;

/// What is wrong with a history. `n` is an item's place, from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// An item is not there.
    #[error("item {n} is missing")]
    Missing {
        /// Its place.
        n: u64,
    },
    /// An item is not what it was when it was stored.
    #[error("item {n} ({what}) is the first that was changed")]
    Changed {
        /// Its place.
        n: u64,
        /// What it is now.
        what: String,
    },
    /// Somebody recomputed the chain over other items.
    #[error(
        "one of the items {from} to {to} was changed, removed or added: their chain does not lead to what this server signed"
    )]
    Forged {
        /// First item that may be the one.
        from: u64,
        /// Last one.
        to: u64,
    },
    /// A checkpoint was not signed by the server's key.
    #[error("the checkpoint over {size} items is not signed by this server")]
    Signature {
        /// Its size.
        size: u64,
    },
    /// The server signed for more items than there are.
    #[error("the end was cut off: this server signed for {signed} items, {there} are there")]
    CutOff {
        /// Items by the newest checkpoint.
        signed: u64,
        /// Items there are.
        there: u64,
    },
    /// The chain's end is not the one that was noted beside the items.
    #[error(
        "the end does not fit: {noted} items were noted, {there} are there, or the last of them was changed"
    )]
    End {
        /// Items by the note.
        noted: u64,
        /// Items there are.
        there: u64,
    },
    /// The server did not sign that this is the whole export.
    #[error(
        "this export is not signed at its end: it was shortened, or edited, or made by an older netmon; export it again at the server"
    )]
    Unsigned,
    /// An export's first line is not what was signed at its end.
    #[error(
        "the first line was edited: it says {what} \"{}\", the server signed \"{}\"; export it again at the server",
        Escaped(.says.as_bytes()), Escaped(.signed.as_bytes())
    )]
    FirstLine {
        /// Which part.
        what: &'static str,
        /// What it says.
        says: String,
        /// What it said.
        signed: String,
    },
    /// All is as it was stored, and the server itself noticed that this is not what was there before.
    #[error("item {n} is the server's own notice that speaks against this history")]
    Against {
        /// Its place.
        n: u64,
        /// When it was noticed, the server's clock.
        noticed_ns: i64,
        /// What.
        notice: Notice,
    },
}

/// A history that is complete and unedited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Good {
    /// Items.
    pub items: u64,
    /// Items that a signed checkpoint covers.
    pub signed: u64,
    /// When the newest checkpoint was signed, the server's clock.
    pub signed_ns: Option<i64>,
    /// Of an export: when it was made, the server's clock. Its end is signed.
    pub exported_ns: Option<i64>,
    /// Where a signature came latest, if that was too late for a server that runs.
    pub late: Option<Late>,
    /// Notices that two machines used this identity.
    pub clones: u64,
    /// Notices that the agent showed a signature that is not this server's.
    pub strange: u64,
    /// Notices of a newer server, which cannot be read.
    pub unread: u64,
}

/// From this item on, what was received was signed late: the server did not run, or the history was signed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Late {
    /// Its place.
    pub n: u64,
    /// From its receipt to the first signature over it, the server's clock.
    pub delay_ns: i64,
}

/// What an export's first line says that is for people.
#[derive(Clone, Copy, Debug)]
pub struct FirstLine<'a> {
    /// Label of the seat.
    pub seat: &'a str,
    /// When it was made; UTC, as lines show it.
    pub exported: &'a str,
}

/// What the server signed at the end of an export.
#[derive(Clone, Copy, Debug)]
pub struct SignedEnd<'a> {
    /// [`Export::seat`].
    pub seat: &'a str,
    /// [`Export::exported_ns`].
    pub exported_ns: i64,
    /// Over the [`Export`].
    pub signature: [u8; 64],
}

/// Follows one history.
#[derive(Debug)]
pub struct Verifier {
    uuid: [u8; 16],
    public_key: Vec<u8>,
    head: Head,
    items: u64,
    /// How many checkpoints there are in all.
    count: u64,
    /// Those that are ahead.
    checkpoints: VecDeque<Checkpoint>,
    /// What the history says of itself so far.
    good: Good,
    /// Place and time of receipt of the earliest item that no checkpoint has covered yet.
    waiting: Option<(u64, i64)>,
    /// The first notice that speaks against the history.
    against: Option<Bad>,
}

impl Verifier {
    /// For the history of agent `uuid`, whose checkpoints (by size) must be signed by `public_key` (Ed25519, 32 bytes).
    ///
    /// # Errors
    /// [`Bad::Signature`].
    pub fn new(uuid: &[u8; 16], public_key: &[u8], checkpoints: Vec<Checkpoint>) -> Result<Self, Bad> {
        if let Some(bad) =
            checkpoints.iter().find(|checkpoint| !chain::is_signed(checkpoint, uuid, public_key))
        {
            return Err(Bad::Signature { size: bad.size });
        }
        Ok(Self {
            uuid: *uuid,
            public_key: public_key.to_vec(),
            head: chain::start(uuid),
            items: 0,
            count: checkpoints.len() as u64,
            checkpoints: checkpoints.into(),
            good: Good::default(),
            waiting: None,
            against: None,
        })
    }

    /// Takes the next item; `link` is what was noted beside it ([`chain::short`]).
    ///
    /// # Errors
    /// [`Bad::Missing`], [`Bad::Changed`], [`Bad::Forged`].
    pub fn take(&mut self, n: u64, entry: &Entry<'_>, link: i64) -> Result<(), Bad> {
        if n != self.items + 1 {
            return Err(Bad::Missing { n: self.items + 1 });
        }
        self.head = chain::link(&self.head, n, entry);
        self.items = n;
        if chain::short(&self.head) != link {
            return Err(Bad::Changed { n, what: describe(entry) });
        }
        self.listen(n, entry);
        while let Some(checkpoint) = self.checkpoints.pop_front_if(|checkpoint| checkpoint.size <= n) {
            if checkpoint.size != n || checkpoint.head != self.head {
                return Err(Bad::Forged { from: self.good.signed + 1, to: n });
            }
            self.good.signed = n;
            self.good.signed_ns = Some(checkpoint.signed_ns);
            self.cover(checkpoint.signed_ns);
        }
        Ok(())
    }

    /// There are no more items; `end` is what was noted of the whole.
    ///
    /// # Errors
    /// [`Bad::CutOff`], [`Bad::End`], [`Bad::Against`].
    pub fn finish(self, end: (u64, Head)) -> Result<Good, Bad> {
        self.check_end(end)?;
        self.verdict()
    }

    /// [`Verifier::finish`] for an export: the server must have signed that nothing follows.
    ///
    /// # Errors
    /// [`Bad::CutOff`], [`Bad::End`], [`Bad::Unsigned`], [`Bad::FirstLine`], [`Bad::Against`].
    pub fn finish_export(
        mut self,
        end: (u64, Head),
        first: FirstLine<'_>,
        signed: Option<SignedEnd<'_>>,
    ) -> Result<Good, Bad> {
        self.check_end(end)?;
        let SignedEnd { seat, exported_ns, signature } = signed.ok_or(Bad::Unsigned)?;
        let (uuid, checkpoints) = (&self.uuid, self.count);
        let export = Export { uuid, seat, size: self.items, head: self.head, checkpoints, exported_ns };
        if !export.is_signed(&signature, &self.public_key) {
            return Err(Bad::Unsigned);
        }
        let exported = logline::time(exported_ns, &TimeZone::UTC).to_string();
        for (what, says, signed) in
            [("seat", first.seat, seat), ("time of the export", first.exported, exported.as_str())]
        {
            if says != signed {
                return Err(Bad::FirstLine { what, says: says.to_owned(), signed: signed.to_owned() });
            }
        }
        self.cover(exported_ns);
        self.good.exported_ns = Some(exported_ns);
        self.verdict()
    }

    /// What does the item say of the history that it is in?
    fn listen(&mut self, n: u64, entry: &Entry<'_>) {
        match entry {
            Entry::Record { received_ns: at_ns, .. } | Entry::Gap { noticed_ns: at_ns, .. } => {
                if self.waiting.is_none_or(|(_, earliest_ns)| *at_ns < earliest_ns) {
                    self.waiting = Some((n, *at_ns));
                }
            }
            // It may have waited for a store that took nothing: its time says nothing about when it was stored.
            Entry::Notice { noticed_ns, bytes } => match Notice::from_bytes(bytes) {
                Some(Notice::Cloned { .. }) => self.good.clones += 1,
                Some(Notice::StrangeWitness { .. }) => self.good.strange += 1,
                Some(notice) if notice.is_against_the_history() => {
                    let noticed_ns = *noticed_ns;
                    self.against.get_or_insert(Bad::Against { n, noticed_ns, notice });
                }
                Some(_) => {}
                None => self.good.unread += 1,
            },
        }
    }

    /// Everything up to here is covered by a signature of this time.
    fn cover(&mut self, signed_ns: i64) {
        let Some((n, received_ns)) = self.waiting.take() else { return };
        let delay_ns = signed_ns.saturating_sub(received_ns);
        if delay_ns > self.good.late.map_or(LATE_NS, |late| late.delay_ns) {
            self.good.late = Some(Late { n, delay_ns });
        }
    }

    fn check_end(&self, end: (u64, Head)) -> Result<(), Bad> {
        if let Some(newest) = self.checkpoints.back() {
            return Err(Bad::CutOff { signed: newest.size, there: self.items });
        }
        if end != (self.items, self.head) {
            return Err(Bad::End { noted: end.0, there: self.items });
        }
        Ok(())
    }

    /// Nothing was changed. What is there may still say that it is not all that was.
    fn verdict(self) -> Result<Good, Bad> {
        match self.against {
            Some(against) => Err(against),
            None => Ok(Good { items: self.items, ..self.good }),
        }
    }
}

fn describe(entry: &Entry<'_>) -> String {
    match entry {
        Entry::Record { epoch, seq, .. } => format!("record {seq} of epoch {epoch:016x}"),
        Entry::Gap { epoch, from, to, .. } if from <= to => {
            format!("gap {from} to {to} of epoch {epoch:016x}")
        }
        Entry::Gap { epoch, .. } => format!("beginning of epoch {epoch:016x}"),
        Entry::Notice { .. } => "notice".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signing::LogKey;
    use crate::signing::tests::key;

    const PC: [u8; 16] = [7; 16];

    /// Items as they are stored: bytes of a record and the link beside them.
    #[derive(Clone)]
    struct History {
        items: Vec<(u64, Vec<u8>, i64)>,
        checkpoints: Vec<Checkpoint>,
        end: (u64, Head),
        key: Vec<u8>,
    }

    fn entry(n: u64, bytes: &[u8]) -> Entry<'_> {
        Entry::Record { epoch: 1, seq: n, received_ns: 5, bytes }
    }

    /// A hundred items with checkpoints over 40 and 90.
    fn history() -> History {
        with_key().0
    }

    /// A history and the key that signed it.
    fn with_key() -> (History, LogKey) {
        let (key, mut head) = (key(), chain::start(&PC));
        let (mut items, mut checkpoints) = (Vec::new(), Vec::new());
        for n in 1..=100 {
            let bytes = vec![n as u8; 3];
            head = chain::link(&head, n, &entry(n, &bytes));
            items.push((n, bytes, chain::short(&head)));
            if n == 40 || n == 90 {
                checkpoints.push(key.sign(&PC, n, head, n as i64).unwrap());
            }
        }
        (History { items, checkpoints, end: (100, head), key: key.public_key().to_vec() }, key)
    }

    fn verify(history: &History) -> Result<Good, Bad> {
        let mut verifier = Verifier::new(&PC, &history.key, history.checkpoints.clone())?;
        for (n, bytes, link) in &history.items {
            verifier.take(*n, &entry(*n, bytes), *link)?;
        }
        verifier.finish(history.end)
    }

    /// What somebody does who has everything but the key: all links and the end are made anew.
    fn relink(history: &mut History) {
        let mut head = chain::start(&PC);
        for (at, (n, bytes, link)) in history.items.iter_mut().enumerate() {
            *n = at as u64 + 1;
            head = chain::link(&head, *n, &entry(*n, bytes));
            *link = chain::short(&head);
        }
        history.end = (history.items.len() as u64, head);
    }

    #[test]
    fn an_untouched_history_is_good_and_says_how_much_is_signed() {
        let good = Good { items: 100, signed: 90, signed_ns: Some(90), ..Good::default() };
        assert_eq!(verify(&history()), Ok(good));
    }

    #[test]
    fn every_flipped_bit_is_named_with_its_item() {
        for at in [0, 39, 40, 99] {
            for bit in 0..24 {
                let mut bad = history();
                bad.items[at].1[bit / 8] ^= 1 << (bit % 8);
                let Err(Bad::Changed { n, .. }) = verify(&bad) else { panic!("{at} {bit}") };
                assert_eq!(n, at as u64 + 1);
            }
        }
    }

    #[test]
    fn an_item_that_was_taken_out_is_named() {
        let mut bad = history();
        bad.items.remove(50);
        assert_eq!(verify(&bad), Err(Bad::Missing { n: 51 }));
    }

    #[test]
    fn a_chain_that_was_made_anew_does_not_lead_to_what_was_signed() {
        for change in [
            |h: &mut History| h.items[50].1[0] ^= 1,
            |h: &mut History| drop(h.items.remove(50)),
            |h: &mut History| h.items.insert(50, (0, vec![9], 0)),
            |h: &mut History| h.items.swap(50, 51),
        ] {
            let mut bad = history();
            change(&mut bad);
            relink(&mut bad);
            assert_eq!(verify(&bad), Err(Bad::Forged { from: 41, to: 90 }));
        }
    }

    #[test]
    fn an_end_that_was_cut_off_is_noticed_with_the_checkpoints_and_without_them_by_the_end() {
        let mut bad = history();
        bad.items.truncate(60);
        assert_eq!(verify(&bad), Err(Bad::CutOff { signed: 90, there: 60 }));
        relink(&mut bad);
        assert_eq!(verify(&bad), Err(Bad::CutOff { signed: 90, there: 60 }));
        let mut bad = history();
        bad.items.truncate(95);
        assert_eq!(verify(&bad), Err(Bad::End { noted: 100, there: 95 }));
    }

    #[test]
    fn a_checkpoint_of_another_key_or_another_pc_is_none() {
        let mut bad = history();
        bad.checkpoints[1] = key().sign(&PC, 90, bad.checkpoints[1].head, 90).unwrap();
        assert_eq!(verify(&bad), Err(Bad::Signature { size: 90 }));
        let good = history();
        let other = Verifier::new(&[8; 16], &good.key, good.checkpoints);
        assert_eq!(other.unwrap_err(), Bad::Signature { size: 40 });
    }

    const EXPORTED: FirstLine<'_> = FirstLine { seat: "pc", exported: "1970-01-01T00:00:00.100+00:00" };
    const EXPORTED_NS: i64 = 100_000_000;

    /// What the server signs at the end of the export of a history.
    fn sign_export(history: &History, key: &LogKey) -> SignedEnd<'static> {
        let ((size, head), checkpoints) = (history.end, history.checkpoints.len() as u64);
        let (seat, exported_ns) = (EXPORTED.seat, EXPORTED_NS);
        let export = Export { uuid: &PC, seat, size, head, checkpoints, exported_ns };
        SignedEnd { seat, exported_ns, signature: key.sign_export(&export).unwrap() }
    }

    fn verify_export(
        history: &History,
        first: FirstLine<'_>,
        signed: Option<SignedEnd<'_>>,
    ) -> Result<Good, Bad> {
        let mut verifier = Verifier::new(&PC, &history.key, history.checkpoints.clone())?;
        for (n, bytes, link) in &history.items {
            verifier.take(*n, &entry(*n, bytes), *link)?;
        }
        verifier.finish_export(history.end, first, signed)
    }

    #[test]
    fn an_export_is_good_as_of_the_time_that_was_signed_at_its_end() {
        let (history, key) = with_key();
        let good = verify_export(&history, EXPORTED, Some(sign_export(&history, &key))).unwrap();
        let Good { items, signed, exported_ns, .. } = good;
        assert_eq!((items, signed, exported_ns), (100, 90, Some(EXPORTED_NS)));
    }

    /// Whoever has the file and no key: every link and the end made anew, and no checkpoint left that knows better.
    #[test]
    fn an_export_that_was_forged_behind_the_checkpoints_that_were_left_is_not_signed_at_its_end() {
        let (good, key) = with_key();
        let signed = sign_export(&good, &key);
        assert_eq!(verify_export(&good, EXPORTED, None), Err(Bad::Unsigned));
        for checkpoints in 0..=1 {
            let mut bad = good.clone();
            bad.checkpoints.truncate(checkpoints);
            assert_eq!(
                verify_export(&bad, EXPORTED, Some(signed)),
                Err(Bad::Unsigned),
                "checkpoints taken out"
            );
            for change in [
                |h: &mut History| h.items[80].1[0] ^= 1,
                |h: &mut History| drop(h.items.remove(80)),
                |h: &mut History| h.items.insert(80, (0, vec![9], 0)),
                |h: &mut History| h.items.truncate(80),
                |h: &mut History| h.items.truncate(40),
                |h: &mut History| h.items.extend_from_within(99..),
            ] {
                let mut bad = bad.clone();
                change(&mut bad);
                relink(&mut bad);
                assert!(verify(&bad).is_ok(), "nothing else would tell");
                assert_eq!(verify_export(&bad, EXPORTED, None), Err(Bad::Unsigned));
                assert_eq!(verify_export(&bad, EXPORTED, Some(signed)), Err(Bad::Unsigned));
            }
        }
    }

    #[test]
    fn an_end_that_another_key_signed_or_for_another_pc_is_not_signed() {
        let (history, own) = with_key();
        let signed = sign_export(&history, &key());
        assert_eq!(verify_export(&history, EXPORTED, Some(signed)), Err(Bad::Unsigned));
        let (size, head) = history.end;
        let (seat, exported_ns) = (EXPORTED.seat, EXPORTED_NS);
        let export = Export { uuid: &[8; 16], seat, size, head, checkpoints: 2, exported_ns };
        let signed = SignedEnd { seat, exported_ns, signature: own.sign_export(&export).unwrap() };
        assert_eq!(verify_export(&history, EXPORTED, Some(signed)), Err(Bad::Unsigned));
    }

    #[test]
    fn a_label_or_time_that_was_not_signed_is_named() {
        let (history, key) = with_key();
        let signed = sign_export(&history, &key);
        let first = FirstLine { seat: "other\n", ..EXPORTED };
        let bad = verify_export(&history, first, Some(signed)).unwrap_err();
        assert!(matches!(bad, Bad::FirstLine { what: "seat", .. }), "{bad:?}");
        assert!(!bad.to_string().contains('\n') && bad.to_string().contains("signed \"pc\""), "{bad}");
        let first = FirstLine { exported: "1970-01-01T00:00:00.101+00:00", ..EXPORTED };
        let bad = verify_export(&history, first, Some(signed)).unwrap_err();
        assert!(matches!(bad, Bad::FirstLine { what: "time of the export", .. }), "{bad:?}");
        // In both places.
        let (first, end) = (FirstLine { seat: "other", ..EXPORTED }, SignedEnd { seat: "other", ..signed });
        assert_eq!(verify_export(&history, first, Some(end)), Err(Bad::Unsigned));
    }

    /// Takes entries, with checkpoints behind some of them (place, time).
    fn told(entries: &[Entry<'_>], signed: &[(u64, i64)]) -> Result<Good, Bad> {
        let (key, mut head) = (key(), chain::start(&PC));
        let heads: Vec<Head> = (1..)
            .zip(entries)
            .map(|(n, entry)| {
                head = chain::link(&head, n, entry);
                head
            })
            .collect();
        let checkpoints =
            signed.iter().map(|(n, at)| key.sign(&PC, *n, heads[*n as usize - 1], *at).unwrap());
        let mut verifier = Verifier::new(&PC, key.public_key(), checkpoints.collect())?;
        for ((n, entry), head) in (1..).zip(entries).zip(&heads) {
            verifier.take(n, entry, chain::short(head))?;
        }
        verifier.finish((entries.len() as u64, head))
    }

    #[test]
    fn what_the_server_noticed_against_a_history_makes_it_bad_and_the_first_such_notice_is_named() {
        let set_back = Notice::StoreSetBack { size: 7, signed_ns: 1 };
        let longer = Notice::StoreSetBack { size: 8, signed_ns: 2 };
        for notices in [[&set_back, &longer], [&longer, &set_back]] {
            let bytes = notices.map(Notice::to_bytes);
            let notice = |at: usize| Entry::Notice { noticed_ns: 50 + at as i64, bytes: &bytes[at] };
            let entries = [entry(1, b"x"), notice(0), entry(3, b"y"), notice(1)];
            let bad = Bad::Against { n: 2, noticed_ns: 50, notice: notices[0].clone() };
            assert_eq!(told(&entries, &[(4, 60)]), Err(bad));
        }
    }

    #[test]
    fn notices_of_clones_strange_signatures_and_newer_servers_are_counted_and_others_are_not() {
        let strange = Notice::StrangeWitness { signed_ns: 2 }.to_bytes();
        let clone = Notice::Cloned { older: "a".into(), newer: "b".into() }.to_bytes();
        let missing = Notice::Missing { since_ns: 1 }.to_bytes();
        let notice = |bytes| Entry::Notice { noticed_ns: 1, bytes };
        let notices = [&clone[..], &missing, &clone, &[200], &strange].map(notice);
        let good = told(&notices, &[]).unwrap();
        assert_eq!((good.items, good.clones, good.strange, good.unread), (5, 2, 1, 1));
    }

    #[test]
    fn the_latest_of_the_signatures_that_came_too_late_is_named_with_its_first_item() {
        const MINUTE: i64 = 60_000_000_000;
        let record = |minute| Entry::Record { epoch: 1, seq: 1, received_ns: minute * MINUTE, bytes: b"x" };
        let late = |entries: &[Entry<'_>], signed: &[(u64, i64)]| {
            let signed: Vec<_> = signed.iter().map(|(n, minute)| (*n, minute * MINUTE)).collect();
            told(entries, &signed).unwrap().late.map(|late| (late.n, late.delay_ns / MINUTE))
        };
        assert_eq!(late(&[record(0), record(1), record(2)], &[(1, 1), (3, 11)]), None, "ten minutes are not");
        let entries = [record(0), record(1), record(2), record(100), record(200)];
        assert_eq!(late(&entries, &[(1, 20), (3, 181), (4, 130), (5, 201)]), Some((2, 180)));
        // Nobody signed yet what is at the end.
        assert_eq!(late(&entries, &[]), None);
        // A notice may have waited itself.
        let notice = Entry::Notice { noticed_ns: 0, bytes: &[] };
        assert_eq!(late(&[notice, record(60)], &[(2, 61)]), None);
    }

    #[test]
    fn an_exports_end_is_the_first_signature_over_what_no_checkpoint_covers() {
        let (mut history, key) = with_key();
        history.checkpoints.truncate(1);
        let mut signed = sign_export(&history, &key);
        let ((size, head), hour) = (history.end, 3_600_000_000_000);
        let (seat, exported_ns) = (EXPORTED.seat, hour + 5);
        let export = Export { uuid: &PC, seat, size, head, checkpoints: 1, exported_ns };
        (signed.exported_ns, signed.signature) = (exported_ns, key.sign_export(&export).unwrap());
        let first = FirstLine { exported: "1970-01-01T01:00:00.000+00:00", ..EXPORTED };
        let good = verify_export(&history, first, Some(signed)).unwrap();
        assert_eq!(good.late, Some(Late { n: 41, delay_ns: hour }));
    }
}
