//! The hash chain over a seat's history, and what the server signs of it. Pure.
//!
//! Every item of a history (a record as it came, a gap, a notice) is hashed together with the chain's end before it:
//! SHA-256 (FIPS 180-4) of that end (32 bytes), the item's place `n` (u64), its kind (u8) and its fields, integers in
//! little-endian. An item that is changed, removed, added or moved changes every end behind it. Now and then the server
//! signs how long the history is and where its chain ends: a [`Checkpoint`]. The agents keep the newest one they were
//! given, so that a store that was set back as a whole is noticed, too. An export is signed at its end, with statements of
//! another kind ([`Export`]): neither stands for the other.

use netmon_common::wire::Checkpoint;
use sha2::{Digest as _, Sha256};

/// Where a chain ends.
pub type Head = [u8; 32];

/// One item as the chain sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A record, as it came.
    Record {
        /// Epoch of the agent's spool.
        epoch: u64,
        /// Number within the epoch.
        seq: u64,
        /// When it came, the server's clock.
        received_ns: i64,
        /// Its bytes.
        bytes: &'a [u8],
    },
    /// Records that never came; `from > to`: another history begins.
    Gap {
        /// Epoch of the agent's spool.
        epoch: u64,
        /// First missing record.
        from: u64,
        /// Last missing record.
        to: u64,
        /// The newest record before, the PC's clock.
        since_ns: i64,
        /// When it was noticed, the server's clock.
        noticed_ns: i64,
    },
    /// Something that the server noticed.
    Notice {
        /// When, the server's clock.
        noticed_ns: i64,
        /// Postcard of [`Notice`](crate::notice::Notice).
        bytes: &'a [u8],
    },
}

/// Where the chain of an agent's history begins.
pub fn start(uuid: &[u8; 16]) -> Head {
    Sha256::new().chain_update(b"netmon history 1\0").chain_update(uuid).finalize().into()
}

/// Where the chain ends with the item at place `n`.
pub fn link(head: &Head, n: u64, entry: &Entry<'_>) -> Head {
    let hash = Sha256::new().chain_update(head).chain_update(n.to_le_bytes());
    let hash = match entry {
        Entry::Record { epoch, seq, received_ns, bytes } => hash
            .chain_update([1])
            .chain_update(epoch.to_le_bytes())
            .chain_update(seq.to_le_bytes())
            .chain_update(received_ns.to_le_bytes())
            .chain_update(bytes),
        Entry::Gap { epoch, from, to, since_ns, noticed_ns } => hash
            .chain_update([2])
            .chain_update(epoch.to_le_bytes())
            .chain_update(from.to_le_bytes())
            .chain_update(to.to_le_bytes())
            .chain_update(since_ns.to_le_bytes())
            .chain_update(noticed_ns.to_le_bytes()),
        Entry::Notice { noticed_ns, bytes } => {
            hash.chain_update([3]).chain_update(noticed_ns.to_le_bytes()).chain_update(bytes)
        }
    };
    hash.finalize().into()
}

/// What is kept of a chain's end beside each item, so that the first bad one can be named: its first eight bytes.
pub fn short(head: &Head) -> i64 {
    let mut first = [0; 8];
    first.copy_from_slice(&head[..8]);
    i64::from_le_bytes(first)
}

/// What a checkpoint's signature is over.
pub fn statement(uuid: &[u8; 16], size: u64, head: &Head, signed_ns: i64) -> Vec<u8> {
    let mut statement = b"netmon checkpoint 1\0".to_vec();
    statement.extend(uuid);
    statement.extend(size.to_le_bytes());
    statement.extend(head);
    statement.extend(signed_ns.to_le_bytes());
    statement
}

/// Is this checkpoint signed by the key (Ed25519, RFC 8032; 32 bytes)?
pub fn is_signed(checkpoint: &Checkpoint, uuid: &[u8; 16], public_key: &[u8]) -> bool {
    let statement = statement(uuid, checkpoint.size, &checkpoint.head, checkpoint.signed_ns);
    holds(&statement, checkpoint.signature.as_flattened(), public_key)
}

/// What the server signs at the end of an exported history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export<'a> {
    /// Whose history.
    pub uuid: &'a [u8; 16],
    /// Label of the seat when it was exported.
    pub seat: &'a str,
    /// Items.
    pub size: u64,
    /// Where the chain ends.
    pub head: Head,
    /// Checkpoints that are exported with it: without them it would look as if the items had been signed late.
    pub checkpoints: u64,
    /// When it was exported, the server's clock.
    pub exported_ns: i64,
}

impl Export<'_> {
    /// What the signature is over. The label is last: everything before it has one length.
    pub fn statement(&self) -> Vec<u8> {
        let mut statement = b"netmon export 1\0".to_vec();
        statement.extend(self.uuid);
        statement.extend(self.size.to_le_bytes());
        statement.extend(self.head);
        statement.extend(self.checkpoints.to_le_bytes());
        statement.extend(self.exported_ns.to_le_bytes());
        statement.extend(self.seat.as_bytes());
        statement
    }

    /// Is it signed by the key (Ed25519, RFC 8032; 32 bytes)?
    pub fn is_signed(&self, signature: &[u8; 64], public_key: &[u8]) -> bool {
        holds(&self.statement(), signature, public_key)
    }
}

fn holds(statement: &[u8], signature: &[u8], public_key: &[u8]) -> bool {
    let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, public_key);
    key.verify(statement, signature).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seq: u64, received_ns: i64, bytes: &[u8]) -> Entry<'_> {
        Entry::Record { epoch: 7, seq, received_ns, bytes }
    }

    #[test]
    fn every_field_of_an_item_and_its_place_change_the_chain() {
        let gap =
            |epoch, from, to, since_ns, noticed_ns| Entry::Gap { epoch, from, to, since_ns, noticed_ns };
        let entries = [
            record(1, 2, b"x"),
            record(2, 2, b"x"),
            record(1, 3, b"x"),
            record(1, 2, b"y"),
            record(1, 2, b""),
            Entry::Record { epoch: 8, seq: 1, received_ns: 2, bytes: b"x" },
            gap(1, 2, 3, 4, 5),
            gap(0, 2, 3, 4, 5),
            gap(1, 0, 3, 4, 5),
            gap(1, 2, 0, 4, 5),
            gap(1, 2, 3, 0, 5),
            gap(1, 2, 3, 4, 0),
            Entry::Notice { noticed_ns: 1, bytes: b"x" },
            Entry::Notice { noticed_ns: 2, bytes: b"x" },
            Entry::Notice { noticed_ns: 1, bytes: b"y" },
        ];
        let begin = start(&[1; 16]);
        let mut heads: Vec<_> = entries.iter().map(|entry| link(&begin, 1, entry)).collect();
        heads.extend([link(&begin, 2, &entries[0]), link(&start(&[2; 16]), 1, &entries[0])]);
        let count = heads.len();
        heads.sort_unstable();
        heads.dedup();
        assert_eq!(heads.len(), count);
    }

    /// Histories that were signed must stay verifiable.
    #[test]
    fn the_chain_and_the_statement_stay_as_they_are() {
        let hex = |bytes: &[u8]| netmon_common::enroll::Hex(bytes).to_string();
        let begin = start(&[1; 16]);
        assert_eq!(hex(&begin[..8]), "9c1b292879691ad0");
        assert_eq!(hex(&link(&begin, 1, &record(1, 2, b"x"))[..8]), "e641198bdb88b965");
        assert_eq!(
            hex(&statement(&[1; 16], 2, &[3; 32], 4)),
            "6e65746d6f6e20636865636b706f696e74203100010101010101010101010101010101010200000000000000\
             03030303030303030303030303030303030303030303030303030303030303030400000000000000"
        );
        let export =
            Export { uuid: &[1; 16], seat: "pc", size: 2, head: [3; 32], checkpoints: 5, exported_ns: 4 };
        assert_eq!(
            hex(&export.statement()),
            "6e65746d6f6e206578706f7274203100010101010101010101010101010101010200000000000000\
             0303030303030303030303030303030303030303030303030303030303030303\
             050000000000000004000000000000007063"
        );
    }
}
