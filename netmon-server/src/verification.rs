//! Is a history complete and unedited? Pure: told the items and checkpoints in order, says where the first thing is wrong.

use std::collections::VecDeque;

use netmon_common::wire::Checkpoint;

use crate::chain::{self, Entry, Head};

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
}

/// A history that is complete and unedited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Good {
    /// Items.
    pub items: u64,
    /// Items that a signed checkpoint covers.
    pub signed: u64,
    /// When the newest checkpoint was signed, the server's clock.
    pub signed_ns: Option<i64>,
}

/// Follows one history.
#[derive(Debug)]
pub struct Verifier {
    head: Head,
    items: u64,
    checkpoints: VecDeque<Checkpoint>,
    signed: u64,
    signed_ns: Option<i64>,
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
        let checkpoints = checkpoints.into();
        Ok(Self { head: chain::start(uuid), items: 0, checkpoints, signed: 0, signed_ns: None })
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
        while let Some(checkpoint) = self.checkpoints.pop_front_if(|checkpoint| checkpoint.size <= n) {
            if checkpoint.size != n || checkpoint.head != self.head {
                return Err(Bad::Forged { from: self.signed + 1, to: n });
            }
            self.signed = n;
            self.signed_ns = Some(checkpoint.signed_ns);
        }
        Ok(())
    }

    /// There are no more items; `end` is what was noted of the whole.
    ///
    /// # Errors
    /// [`Bad::CutOff`], [`Bad::End`].
    pub fn finish(self, end: (u64, Head)) -> Result<Good, Bad> {
        if let Some(newest) = self.checkpoints.back() {
            return Err(Bad::CutOff { signed: newest.size, there: self.items });
        }
        if end != (self.items, self.head) {
            return Err(Bad::End { noted: end.0, there: self.items });
        }
        Ok(Good { items: self.items, signed: self.signed, signed_ns: self.signed_ns })
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
        History { items, checkpoints, end: (100, head), key: key.public_key().to_vec() }
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
        assert_eq!(verify(&history()), Ok(Good { items: 100, signed: 90, signed_ns: Some(90) }));
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
}
