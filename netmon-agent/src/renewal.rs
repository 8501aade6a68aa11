//! A new key and certificate before the old ones end.

use std::path::Path;

use netmon_common::enroll::MAX_DER;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::CertificateDer;

use crate::identity::{Identity, IdentityError, fits};

/// Why there is no new certificate; the old one goes on.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// The key cannot be made.
    #[error("cannot make a key and its signing request")]
    Key(#[source] rcgen::Error),
    /// What the server sent is no certificate for the new key.
    #[error("the server sent a certificate that is not for the new key")]
    Certificate,
    /// The identity cannot be stored.
    #[error("the new identity cannot be stored")]
    Store(#[source] IdentityError),
}

/// A key that waits for its certificate.
pub struct Renewal {
    key: KeyPair,
    csr_der: Vec<u8>,
}

impl Renewal {
    /// Makes a key.
    ///
    /// # Errors
    /// [`RenewalError::Key`].
    pub fn new() -> Result<Self, RenewalError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(RenewalError::Key)?;
        let csr = CertificateParams::default().serialize_request(&key).map_err(RenewalError::Key)?;
        Ok(Self { key, csr_der: csr.der().to_vec() })
    }

    /// PKCS #10 request (RFC 2986), DER.
    pub fn csr_der(&self) -> &[u8] {
        &self.csr_der
    }

    /// Stores the identity with the new key in place of the old one. Until that is done, and where it is not, the old one
    /// goes on: the server takes both until it has seen the new one.
    ///
    /// # Errors
    /// [`RenewalError`]; the old identity is in its place.
    pub fn finish(
        self,
        old: &Identity,
        certificate_der: Vec<u8>,
        directory: &Path,
    ) -> Result<(), RenewalError> {
        let certificate = CertificateDer::from(certificate_der);
        if certificate.len() > MAX_DER || !fits(&certificate, &self.key) {
            return Err(RenewalError::Certificate);
        }
        let new = Identity {
            agent: old.agent,
            seat: old.seat.clone(),
            address: old.address.clone(),
            certificate,
            ca: old.ca.clone(),
            key_pkcs8: self.key.serialize_der(),
        };
        new.store(&self.key.serialize_pem(), directory).map_err(RenewalError::Store)
    }
}

/// Is a certificate of this validity to be renewed at `now`, all in seconds since 1970-01-01T00:00:00Z? When a third of it
/// is left.
pub fn is_due(not_before: i64, not_after: i64, now: i64) -> bool {
    let left = not_after.saturating_sub(now);
    left < not_after.saturating_sub(not_before) / 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_renewed_in_the_last_third_of_its_life_and_after_it() {
        assert!(!is_due(0, 30, 0));
        assert!(!is_due(0, 30, 20));
        assert!(is_due(0, 30, 21));
        assert!(is_due(0, 30, 1000));
        assert!(!is_due(i64::MIN, i64::MAX, i64::MIN));
    }
}
