//! What a server said of itself and this agent keeps: its time, by which its certificate is judged whatever the PC's clock
//! says, and the newest checkpoint that it signed of this PC's history, as a witness.

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

/// The server's time is kept this often.
const KEEP_EVERY_NS: u64 = 3_600_000_000_000;

/// What is kept, beside the identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// The server's clock when it was heard last, nanoseconds since 1970-01-01T00:00:00Z.
    pub server_ns: Option<i64>,
    /// The newest checkpoint.
    pub checkpoint: Option<Checkpoint>,
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
        let is_new = checkpoint.is_some();
        self.checkpoint = checkpoint.or(self.checkpoint.take());
        is_new || self.kept_ns.is_none_or(|kept| kept.abs_diff(server_ns) >= KEEP_EVERY_NS)
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
        assert_eq!(trust.checkpoint, Some(checkpoint(3)));
    }
}
