//! What the server decides on.

use std::convert::Infallible;
use std::sync::LazyLock;
use std::time::Duration;

use netmon_common::enroll::MAX_DER;
use netmon_common::model::{Event, Record};
use netmon_common::wire::Item;
use netmon_server::ca::{AgentKey, Ca, spki_sha256_of};
use netmon_server::ingest::{self, Known, Place};
use netmon_server::seat;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::input::Input;

/// 2026-11-23T00:00:00Z.
const NOW: Duration = Duration::from_secs(1_795_392_000);

static CA: LazyLock<Ca> = LazyLock::new(|| {
    let pair = Ca::generate(NOW).expect("a key can be made");
    let der = CertificateDer::from_pem_slice(pair.certificate_pem.as_bytes()).expect("our own certificate");
    Ca::load(&pair.key_pem, der).expect("our own key")
});

/// A signing request, and the same bytes as a certificate: whose key is signed, is the key that is known from then on.
pub fn csr(data: &[u8]) {
    // Nothing but that it comes to an end.
    let _ = spki_sha256_of(&CertificateDer::from(data));
    let Ok(key) = AgentKey::from_request(data) else { return };
    assert!(data.len() <= MAX_DER);
    let certificate = CA.issue_agent(&key, &[7; 16], NOW).expect("what was taken can be signed");
    let known = spki_sha256_of(&CertificateDer::from(certificate)).expect("our own certificate");
    assert_eq!(known, key.spki_sha256());
}

/// A wish and a host name, separated by a zero: a label is a file name that harms nobody, whatever others there are.
pub fn seat(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let mut part = || parts.next().unwrap_or_default();
    let (wanted, hostname) = (part(), part());
    let mut taken: Vec<String> = Vec::new();
    let mut take = |label: &str| {
        let unique =
            seat::unique(label, |label| Ok::<_, Infallible>(taken.iter().any(|other| other == label)));
        taken.push(unique.unwrap_or_else(|never| match never {}));
    };
    let label = seat::label(wanted, hostname);
    for _ in 0..12 {
        take(&label);
        take(&seat::old(&label));
    }
    for label in &taken {
        assert!((1..=seat::MAX_LABEL).contains(&label.len()), "{label:?}");
        assert!(!label.starts_with(['.', '-']), "{label:?}");
        let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        assert!(label.bytes().all(safe), "{label:?}");
        assert_eq!(taken.iter().filter(|other| *other == label).count(), 1, "{label:?}");
    }
}

/// Hellos and batches in any order, of records that are right and records that are not: every number below the expected
/// one is stored once, or named in a gap.
pub fn ingest(data: &[u8]) {
    let mut input = Input(data);
    let mut history = History::default();
    while !input.is_empty() {
        match input.byte() % 4 {
            0 => history.hello(input.u16().into()),
            1 => history.hello(input.u64()),
            2 => {
                let first_seq = input.u16().into();
                history.batch(first_seq, items(&mut input, first_seq));
            }
            _ => {
                let first_seq = input.u64();
                history.batch(first_seq, items(&mut input, first_seq));
            }
        }
    }
}

fn items(input: &mut Input<'_>, first_seq: u64) -> Vec<Item> {
    let mut seq = first_seq;
    let mut items = Vec::new();
    for _ in 0..input.byte() % 16 {
        let item = match input.byte() % 8 {
            0 => Item::Hole(input.u64().max(1)),
            1 => Item::Hole(u64::from(input.byte()).max(1)),
            2 => Item::Record(input.block().to_vec()),
            _ => {
                let record = Record { seq, run: 1, boot_ns: 0, wall_ns: 0, event: Event::AgentStopped };
                Item::Record(record.to_bytes().expect("a small record"))
            }
        };
        seq = seq.saturating_add(item.span());
        items.push(item);
    }
    items
}

/// What the server has of an epoch.
#[derive(Default)]
struct History {
    /// `None`: it has never heard of it.
    expected: Option<u64>,
    stored: u64,
    missing: u64,
}

impl History {
    fn hello(&mut self, oldest: u64) {
        let known = self.expected.map_or(Known::First, Known::Expecting);
        let Ok(opening) = ingest::open(known, oldest) else { return };
        if let Some((first, last)) = opening.gap {
            assert_eq!((first, last + 1), (self.next(), opening.next_seq));
            self.missing += last - first + 1;
        }
        assert!(opening.next_seq >= self.next() && !opening.restarts);
        self.goes_on_at(opening.next_seq);
    }

    fn batch(&mut self, first_seq: u64, items: Vec<Item>) {
        // The server asks for what is missing in front of it.
        if self.expected.is_none_or(|expected| first_seq > expected) {
            return;
        }
        let Ok(checked) = ingest::check(first_seq, items) else { return };
        for item in &checked {
            match ingest::place(self.next(), item) {
                Place::Known(_) => assert!(item.next_seq <= self.next()),
                Place::Next(_) => {
                    assert!(item.record.is_some() && item.seq == self.next());
                    self.stored += 1;
                    self.goes_on_at(item.next_seq);
                }
                Place::Gap(first, last) => {
                    assert!(item.record.is_none() && first == self.next() && last + 1 == item.next_seq);
                    self.missing += last - first + 1;
                    self.goes_on_at(item.next_seq);
                }
            }
        }
    }

    fn next(&self) -> u64 {
        self.expected.unwrap_or(ingest::FIRST_SEQ)
    }

    fn goes_on_at(&mut self, seq: u64) {
        self.expected = Some(seq);
        assert_eq!(self.stored + self.missing, seq - ingest::FIRST_SEQ);
        assert!(i64::try_from(seq).is_ok(), "the store cannot keep {seq}");
    }
}
