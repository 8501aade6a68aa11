//! What a server said of itself and this agent keeps: its time, by which its certificate is judged whatever the PC's clock
//! says, and checkpoints that it signed of this PC's history, as witnesses.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use netmon_common::enroll::Hex;
use netmon_common::wire::Checkpoint;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use serde::{Deserialize, Serialize};

/// Of the checkpoints of one age, in minutes and powers of two, the oldest is kept; what is older than half a year counts as
/// one age. So at most 20 are kept.
const OLDEST_AGE: u32 = 18;
const MINUTE_NS: i64 = 60_000_000_000;

/// The server's time is kept this often.
const KEEP_EVERY_NS: u64 = 3_600_000_000_000;

/// What is kept, beside the identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// The server's clock when it was heard last, nanoseconds since 1970-01-01T00:00:00Z.
    pub server_ns: Option<i64>,
    /// Checkpoints, by the time of their signing: the newest, and older ones that get sparser. A server that was set back,
    /// or whose history was written anew, signs again; what it had signed before stays here.
    #[serde(default)]
    checkpoints: Vec<Checkpoint>,
    /// [`Trust::server_ns`] as it is on disk.
    #[serde(skip)]
    kept_ns: Option<i64>,
}

impl Trust {
    /// What was kept of the server of this agent number. What cannot be read is as good as missing: the file is written
    /// anew.
    pub fn load(directory: &Path, agent: &[u8; 16]) -> Self {
        let bytes = std::fs::read(file(directory, agent)).unwrap_or_default();
        let trust: Self = serde_json::from_slice(&bytes).unwrap_or_default();
        Self { kept_ns: trust.server_ns, ..trust }
    }

    /// Takes in what the server said; true when that is worth to be kept.
    pub fn hear(&mut self, server_ns: i64, checkpoint: Option<Checkpoint>) -> bool {
        self.server_ns = Some(server_ns);
        // An older one is what a store that was set back would give.
        let newest = self.checkpoints.last().map(|newest| newest.signed_ns);
        let newer = checkpoint.filter(|new| newest.is_none_or(|newest| new.signed_ns > newest));
        let is_new = newer.is_some();
        if let Some(new) = newer {
            self.thin(new.signed_ns);
            self.checkpoints.push(new);
        }
        is_new || self.kept_ns.is_none_or(|kept| kept.abs_diff(server_ns) >= KEEP_EVERY_NS)
    }

    fn thin(&mut self, now_ns: i64) {
        let mut last = None;
        self.checkpoints.retain(|checkpoint| {
            let minutes = now_ns.saturating_sub(checkpoint.signed_ns) / MINUTE_NS;
            let age = minutes.checked_ilog2().map_or(0, |age| age + 1).min(OLDEST_AGE);
            last.replace(age) != Some(age)
        });
    }

    /// One of the checkpoints, to be shown to the server; which one, `random` says.
    pub fn witness(&self, random: u64) -> Option<&Checkpoint> {
        let count = self.checkpoints.len() as u64;
        let at = random.checked_rem(count)?;
        self.checkpoints.get(at as usize)
    }

    /// Keeps it, so that a crash leaves the old or the new.
    ///
    /// # Errors
    /// What the system says.
    pub fn store(&mut self, directory: &Path, agent: &[u8; 16]) -> io::Result<()> {
        let path = file(directory, agent);
        let new = path.with_added_extension("new");
        let mut options = File::options();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        self.kept_ns = self.server_ns;
        Ok(())
    }
}

fn file(directory: &Path, agent: &[u8; 16]) -> PathBuf {
    directory.join(format!("trust-{}.json", Hex(agent)))
}

/// Accepts a server that `inner` accepts by at least one of several clocks: the PC's, which may have been reset, the
/// server's own as it was heard last, the time at which the agent's certificate was made.
#[derive(Debug)]
pub(crate) struct AnyClock {
    pub inner: Arc<dyn ServerCertVerifier>,
    /// Seconds since 1970-01-01T00:00:00Z.
    pub others: Vec<u64>,
}

impl ServerCertVerifier for AnyClock {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verify =
            |time| self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, time);
        let others = self.others.iter().map(|time| UnixTime::since_unix_epoch(Duration::from_secs(*time)));
        others.fold(verify(now), |verdict, time| verdict.or_else(|_| verify(time)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(size: u64) -> Checkpoint {
        Checkpoint { size, head: [7; 32], signed_ns: 5, signature: [[1; 32], [2; 32]] }
    }

    #[test]
    fn what_a_server_said_is_kept_for_its_agent_alone() {
        let directory = tempfile::tempdir().unwrap();
        let mut trust = Trust::load(directory.path(), &[1; 16]);
        assert_eq!(trust, Trust::default());
        assert!(trust.hear(1_000, Some(checkpoint(3))));
        trust.store(directory.path(), &[1; 16]).unwrap();
        assert_eq!(Trust::load(directory.path(), &[1; 16]), trust);
        assert_eq!(Trust::load(directory.path(), &[2; 16]), Trust::default());
        std::fs::write(file(directory.path(), &[1; 16]), "{").unwrap();
        assert_eq!(Trust::load(directory.path(), &[1; 16]), Trust::default());
    }

    #[test]
    fn time_alone_is_kept_once_an_hour_and_a_checkpoint_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let mut trust = Trust::default();
        assert!(trust.hear(0, None));
        trust.store(directory.path(), &[1; 16]).unwrap();
        assert!(!trust.hear(KEEP_EVERY_NS as i64 - 1, None));
        assert!(trust.hear(1, Some(checkpoint(3))));
        assert!(trust.hear(KEEP_EVERY_NS as i64, None));
        assert_eq!(trust.checkpoints, [checkpoint(3)]);
    }

    #[test]
    fn what_was_signed_before_stays_when_a_shorter_history_is_signed() {
        let mut trust = Trust::default();
        let signed = |minute, size| Checkpoint { signed_ns: minute * MINUTE_NS, ..checkpoint(size) };
        trust.hear(0, Some(signed(5, 300)));
        assert!(trust.hear(0, Some(signed(6, 200))));
        trust.hear(0, Some(signed(4, 900)));
        assert_eq!(trust.checkpoints, [signed(5, 300), signed(6, 200)], "an older one is no news");
        let shown: Vec<_> = (0..4).filter_map(|random| trust.witness(random)).map(|one| one.size).collect();
        assert_eq!(shown, [300, 200, 300, 200]);
        assert_eq!(Trust::default().witness(7), None);
    }

    #[test]
    fn a_year_of_checkpoints_leaves_a_few_of_every_age() {
        let mut trust = Trust::default();
        for minute in 0..365 * 24 * 60 {
            trust.hear(0, Some(Checkpoint { signed_ns: minute * MINUTE_NS, ..checkpoint(minute as u64) }));
            assert!(trust.checkpoints.len() <= 21, "{}", trust.checkpoints.len());
        }
        let now = 365 * 24 * 60 - 1;
        for ago in [0, 2, 60, 24 * 60, 30 * 24 * 60, 180 * 24 * 60] {
            let near = trust
                .checkpoints
                .iter()
                .map(|one| now - one.size)
                .any(|age| (ago / 3..=ago * 3).contains(&age));
            assert!(near, "none from {ago} minutes ago");
        }
        assert_eq!(trust.checkpoints.first().unwrap().size, 0, "the first one of all");
    }
}
