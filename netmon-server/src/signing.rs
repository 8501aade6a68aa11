//! The key with which the server signs how long each history is, and the ends of exports.

use netmon_common::wire::Checkpoint;
use rcgen::{KeyPair, PublicKeyData as _, SigningKey as _};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::chain::{Export, Head, statement};

/// Why the key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The file's content is not a key.
    #[error("the key for the log is damaged")]
    Key(#[source] rcgen::Error),
    /// Another kind of key.
    #[error("the key for the log is not Ed25519")]
    Kind,
    /// The certificate is for another key.
    #[error("the certificate of the key for the log is damaged, or for another key")]
    Certificate,
    /// Signing failed.
    #[error("the key for the log cannot sign")]
    Sign(#[source] rcgen::Error),
}

/// An Ed25519 key and the CA's certificate for it.
pub struct LogKey {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl LogKey {
    /// Takes up a key.
    ///
    /// # Errors
    /// [`SigningError::Key`], [`SigningError::Kind`].
    pub fn load(key_pem: &str, certificate: CertificateDer<'static>) -> Result<Self, SigningError> {
        let key = KeyPair::from_pem(key_pem).map_err(SigningError::Key)?;
        if key.algorithm() != &rcgen::PKCS_ED25519 {
            return Err(SigningError::Kind);
        }
        let is_for =
            |parsed: &X509Certificate<'_>| *parsed.public_key().subject_public_key.data == *key.der_bytes();
        match X509Certificate::from_der(&certificate) {
            Ok((_, parsed)) if is_for(&parsed) => Ok(Self { key, certificate }),
            _ => Err(SigningError::Certificate),
        }
    }

    /// The CA's certificate for the key.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The key's public part, 32 bytes.
    pub fn public_key(&self) -> &[u8] {
        self.key.der_bytes()
    }

    /// Signs that the history of agent `uuid` has `size` items and its chain ends in `head`.
    ///
    /// # Errors
    /// [`SigningError::Sign`].
    pub fn sign(
        &self,
        uuid: &[u8; 16],
        size: u64,
        head: Head,
        signed_ns: i64,
    ) -> Result<Checkpoint, SigningError> {
        let bytes = self.signature(&statement(uuid, size, &head, signed_ns))?;
        let mut signature = [[0; 32]; 2];
        signature.as_flattened_mut().copy_from_slice(&bytes);
        Ok(Checkpoint { size, head, signed_ns, signature })
    }

    /// Signs the end of an export.
    ///
    /// # Errors
    /// [`SigningError::Sign`].
    pub fn sign_export(&self, export: &Export<'_>) -> Result<[u8; 64], SigningError> {
        self.signature(&export.statement())
    }

    fn signature(&self, statement: &[u8]) -> Result<[u8; 64], SigningError> {
        let bytes = self.key.sign(statement).map_err(SigningError::Sign)?;
        // All signatures of the one kind of key that is loaded have this length.
        bytes.try_into().map_err(|_| SigningError::Kind)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::chain::is_signed;

    /// A key with a certificate of its own making.
    pub fn key() -> LogKey {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        LogKey::load(&key.serialize_pem(), certificate.der().clone()).unwrap()
    }

    #[test]
    fn a_certificate_for_another_key_is_refused() {
        let pem = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().serialize_pem();
        let other = key().certificate().clone();
        assert!(matches!(LogKey::load(&pem, other), Err(SigningError::Certificate)));
    }

    #[test]
    fn a_signature_holds_for_what_was_signed_and_for_nothing_else() {
        let key = key();
        let good = key.sign(&[1; 16], 2, [3; 32], 4).unwrap();
        assert!(is_signed(&good, &[1; 16], key.public_key()));
        assert!(!is_signed(&good, &[2; 16], key.public_key()));
        for change in [
            |c: &mut Checkpoint| c.size += 1,
            |c: &mut Checkpoint| c.head[31] ^= 1,
            |c: &mut Checkpoint| c.signed_ns += 1,
            |c: &mut Checkpoint| c.signature[1][0] ^= 1,
        ] {
            let mut bad = good.clone();
            change(&mut bad);
            assert!(!is_signed(&bad, &[1; 16], key.public_key()));
        }
    }

    #[test]
    fn a_signed_export_holds_for_what_was_signed_and_no_checkpoint_stands_for_one() {
        let (key, other) = (key(), key());
        let export =
            Export { uuid: &[1; 16], seat: "pc", size: 2, head: [3; 32], checkpoints: 1, exported_ns: 4 };
        let signature = key.sign_export(&export).unwrap();
        assert!(export.is_signed(&signature, key.public_key()));
        for change in [
            |e: &mut Export<'_>| e.uuid = &[2; 16],
            |e: &mut Export<'_>| e.seat = "pc2",
            |e: &mut Export<'_>| e.size += 1,
            |e: &mut Export<'_>| e.head[31] ^= 1,
            |e: &mut Export<'_>| e.checkpoints -= 1,
            |e: &mut Export<'_>| e.exported_ns += 1,
        ] {
            let mut bad = export.clone();
            change(&mut bad);
            assert!(!bad.is_signed(&signature, key.public_key()), "{bad:?}");
        }
        assert!(!export.is_signed(&signature, other.public_key()), "another key");
        let checkpoint = key.sign(&[1; 16], 2, [3; 32], 4).unwrap();
        let mut signature = [0; 64];
        signature.copy_from_slice(checkpoint.signature.as_flattened());
        assert!(!export.is_signed(&signature, key.public_key()));
    }

    #[test]
    fn another_kind_of_key_is_refused() {
        let pem = KeyPair::generate().unwrap().serialize_pem();
        assert!(matches!(LogKey::load(&pem, Vec::new().into()), Err(SigningError::Kind)));
        assert!(matches!(LogKey::load("nonsense", Vec::new().into()), Err(SigningError::Key(_))));
    }
}
