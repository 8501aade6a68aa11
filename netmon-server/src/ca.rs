//! The server's own certificate authority: what it signs, for whom, for how long.

use std::time::Duration;

use netmon_common::enroll::MAX_DER;
use netmon_common::wire::SERVER_NAME;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SubjectPublicKeyInfo, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate, X509CertificationRequest};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The CA and the server's certificate: as long as such an installation may live.
const SERVER_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// An agent's certificate; the agent asks for the next one when two thirds of it are over. Revocation does not wait for
/// its end: see the allow-list in the store.
pub const AGENT_LIFETIME: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// For how long behind its end an agent's certificate still lets in an agent that is on the allow-list, so that a PC that
/// was off for the summer comes back without anybody's help. It gets a new certificate at once.
pub const AGENT_GRACE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// 2026-01-01T00:00:00Z: no clock that is right says less. A machine without a battery begins in 1970, and what was signed
/// then for some time would have been over before the clock was set.
const AT_LEAST: Duration = Duration::from_secs(1_767_225_600);

/// Name in the certificate of the key that signs checkpoints.
const LOG_NAME: &str = "netmon://log";

/// Why the CA cannot be used or a request is not signed.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A key pair could not be made.
    #[error("cannot make a key")]
    MakeKey(#[source] rcgen::Error),
    /// The key file's content is not a key.
    #[error("the CA's key is damaged")]
    ReadKey(#[source] rcgen::Error),
    /// The certificate file's content is not a certificate.
    #[error("the CA's certificate is damaged")]
    ReadCertificate(#[source] rcgen::Error),
    /// Signing failed.
    #[error("cannot sign the certificate of {subject}")]
    Sign {
        /// Whose certificate.
        subject: String,
        /// Cause.
        source: rcgen::Error,
    },
    /// Not a PKCS #10 request, or longer than one is.
    #[error("the signing request does not parse")]
    ParseRequest,
    /// Whoever asks does not have the key.
    #[error("the signing request is not signed by the key that it carries")]
    RequestSignature,
    /// A kind of key that is not signed here.
    #[error("the signing request carries a key that is neither ECDSA P-256 nor Ed25519")]
    KeyKind,
    /// A certificate that does not parse.
    #[error("a certificate does not parse")]
    ParseCertificate,
    /// A certificate for checkpoints that this CA did not make.
    #[error("the certificate of the log's key was not made by this CA")]
    NotOurs,
}

/// A certificate with its key, PEM, as they go into files.
pub struct Pair {
    /// The certificate.
    pub certificate_pem: String,
    /// The key, PKCS #8.
    pub key_pem: String,
}

/// The certificate authority.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
    spki_sha256: [u8; 32],
}

impl Ca {
    /// Makes the CA of a new server. `now` is the time since 1970-01-01T00:00:00Z.
    ///
    /// # Errors
    /// [`CaError::MakeKey`], [`CaError::Sign`].
    pub fn generate(now: Duration) -> Result<Pair, CaError> {
        let key = KeyPair::generate().map_err(CaError::MakeKey)?;
        let mut params = params("netmon CA", now);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params
            .self_signed(&key)
            .map_err(|source| CaError::Sign { subject: "the CA itself".into(), source })?;
        Ok(Pair { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// Takes up an existing CA.
    ///
    /// # Errors
    /// [`CaError::ReadKey`], [`CaError::ReadCertificate`].
    pub fn load(key_pem: &str, der: CertificateDer<'static>) -> Result<Self, CaError> {
        let key = KeyPair::from_pem(key_pem).map_err(CaError::ReadKey)?;
        let spki_sha256 = Sha256::digest(key.subject_public_key_info()).into();
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(CaError::ReadCertificate)?;
        Ok(Self { issuer, der, spki_sha256 })
    }

    /// The CA's certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// SHA-256 of the CA's SubjectPublicKeyInfo: what a token pins (RFC 7469, section 2.4).
    pub fn spki_sha256(&self) -> [u8; 32] {
        self.spki_sha256
    }

    /// Makes the server's own certificate, under the name that every agent asks for.
    ///
    /// # Errors
    /// [`CaError::MakeKey`], [`CaError::Sign`].
    pub fn issue_server(&self, now: Duration) -> Result<Pair, CaError> {
        let key = KeyPair::generate().map_err(CaError::MakeKey)?;
        let sign_error = |source| CaError::Sign { subject: SERVER_NAME.into(), source };
        let mut params = params(SERVER_NAME, now);
        params.subject_alt_names = vec![SanType::DnsName(SERVER_NAME.try_into().map_err(sign_error)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(sign_error)?;
        Ok(Pair { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// Makes the key that signs the histories' checkpoints (Ed25519), with a certificate.
    ///
    /// # Errors
    /// [`CaError::MakeKey`], [`CaError::Sign`].
    pub fn issue_log(&self, now: Duration) -> Result<Pair, CaError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(CaError::MakeKey)?;
        let sign_error = |source| CaError::Sign { subject: LOG_NAME.into(), source };
        let mut params = params("netmon log", now);
        params.subject_alt_names = vec![SanType::URI(LOG_NAME.try_into().map_err(sign_error)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(sign_error)?;
        Ok(Pair { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// Signs an agent's key: everything in the certificate but the key is the server's choice.
    ///
    /// # Errors
    /// [`CaError::Sign`].
    pub fn issue_agent(&self, key: &AgentKey, uuid: &[u8; 16], now: Duration) -> Result<Vec<u8>, CaError> {
        let name = format!("netmon://agent/{}", uuid_text(uuid));
        let sign_error = |source| CaError::Sign { subject: name.clone(), source };
        let now = now.max(AT_LEAST);
        let mut params = params("netmon agent", now);
        // Checked by the server's clock only; a day of room for that clock being set back.
        params.not_before = date_time_ymd(1970, 1, 1) + now.saturating_sub(DAY);
        params.not_after = date_time_ymd(1970, 1, 1) + now + AGENT_LIFETIME;
        params.subject_alt_names = vec![SanType::URI(name.as_str().try_into().map_err(sign_error)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key.0, &self.issuer).map_err(sign_error)?;
        Ok(certificate.der().to_vec())
    }
}

/// The public key out of an agent's signing request: the only thing that is taken from it.
#[derive(Debug)]
pub struct AgentKey(SubjectPublicKeyInfo);

impl AgentKey {
    /// Reads a PKCS #10 request (RFC 2986) and verifies that it is signed by the key that it carries.
    ///
    /// # Errors
    /// [`CaError::ParseRequest`], [`CaError::RequestSignature`], [`CaError::KeyKind`].
    pub fn from_request(csr_der: &[u8]) -> Result<Self, CaError> {
        if csr_der.len() > MAX_DER {
            return Err(CaError::ParseRequest);
        }
        let Ok(([], request)) = X509CertificationRequest::from_der(csr_der) else {
            return Err(CaError::ParseRequest);
        };
        let key = SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
            .map_err(|_| CaError::KeyKind)?;
        if ![&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519].contains(&key.algorithm()) {
            return Err(CaError::KeyKind);
        }
        request.verify_signature().map_err(|_| CaError::RequestSignature)?;
        Ok(Self(key))
    }

    /// SHA-256 of the SubjectPublicKeyInfo: how the allow-list knows the agent.
    pub fn spki_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.0.subject_public_key_info()).into()
    }
}

/// SHA-256 of the SubjectPublicKeyInfo of a certificate.
///
/// # Errors
/// [`CaError::ParseCertificate`].
pub fn spki_sha256_of(certificate: &CertificateDer<'_>) -> Result<[u8; 32], CaError> {
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| CaError::ParseCertificate)?;
    Ok(Sha256::digest(certificate.public_key().raw).into())
}

/// The end of a certificate's validity, seconds since 1970-01-01T00:00:00Z.
///
/// # Errors
/// [`CaError::ParseCertificate`].
pub fn not_after(certificate: &CertificateDer<'_>) -> Result<i64, CaError> {
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| CaError::ParseCertificate)?;
    Ok(certificate.validity().not_after.timestamp())
}

/// The public key in the certificate of a [`LogKey`](crate::signing::LogKey), if the CA with this certificate made it.
///
/// # Errors
/// [`CaError::ParseCertificate`], [`CaError::NotOurs`].
pub fn log_public_key(log: &CertificateDer<'_>, ca: &CertificateDer<'_>) -> Result<Vec<u8>, CaError> {
    let parse = |_| CaError::ParseCertificate;
    let (_, ca) = X509Certificate::from_der(ca).map_err(parse)?;
    let (_, log) = X509Certificate::from_der(log).map_err(parse)?;
    log.verify_signature(Some(ca.public_key())).map_err(|_| CaError::NotOurs)?;
    let names = log.subject_alternative_name().map_err(|_| CaError::ParseCertificate)?;
    let is_log = names.is_some_and(|names| names.value.general_names[..] == [GeneralName::URI(LOG_NAME)]);
    if !is_log {
        return Err(CaError::NotOurs);
    }
    Ok(log.public_key().subject_public_key.data.to_vec())
}

/// A UUID as RFC 9562 writes it.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex = netmon_common::enroll::Hex(uuid).to_string();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// A random UUID (RFC 9562, section 5.4) out of 16 random bytes.
pub fn uuid_from(mut random: [u8; 16]) -> [u8; 16] {
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    random
}

fn params(common_name: &str, now: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    // Early on purpose: a PC whose clock was set back must still be able to deliver.
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(1970, 1, 1) + now.max(AT_LEAST) + SERVER_LIFETIME;
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::pem::PemObject as _;

    /// 2026-11-23T00:00:00Z.
    const NOW: Duration = Duration::from_secs(1_795_392_000);

    fn ca() -> Ca {
        let pair = Ca::generate(NOW).unwrap();
        let der = CertificateDer::from_pem_slice(pair.certificate_pem.as_bytes()).unwrap();
        Ca::load(&pair.key_pem, der).unwrap()
    }

    fn request(change: impl FnOnce(&mut CertificateParams)) -> (KeyPair, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        change(&mut params);
        let csr = params.serialize_request(&key).unwrap().der().to_vec();
        (key, csr)
    }

    #[test]
    fn nothing_but_the_key_is_taken_from_a_request() {
        let (key, csr) = request(|params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.subject_alt_names = vec![SanType::DnsName(SERVER_NAME.try_into().unwrap())];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.distinguished_name.push(DnType::CommonName, "somebody else");
        });
        let agent_key = AgentKey::from_request(&csr).unwrap();
        let uuid = uuid_from([0xff; 16]);
        let der = CertificateDer::from(ca().issue_agent(&agent_key, &uuid, NOW).unwrap());
        let (_, certificate) = X509Certificate::from_der(&der).unwrap();
        assert!(!certificate.is_ca());
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names[..], [GeneralName::URI("netmon://agent/ffffffff-ffff-4fff-bfff-ffffffffffff")]);
        let usage = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !usage.any);
        assert_eq!(certificate.subject().to_string(), "CN=netmon agent");
        let lifetime = certificate.validity().not_after.timestamp() as u64 - NOW.as_secs();
        assert_eq!(lifetime, AGENT_LIFETIME.as_secs());
        let expected: [u8; 32] = Sha256::digest(key.subject_public_key_info()).into();
        assert_eq!(spki_sha256_of(&der).unwrap(), expected);
        assert_eq!(agent_key.spki_sha256(), expected);
    }

    #[test]
    fn a_server_that_was_made_while_its_clock_said_1970_works_when_that_is_set() {
        let clock = Duration::from_secs(60);
        let pem = |text: &str| CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
        let pair = Ca::generate(clock).unwrap();
        let ca = Ca::load(&pair.key_pem, pem(&pair.certificate_pem)).unwrap();
        let server = pem(&ca.issue_server(clock).unwrap().certificate_pem);
        let (_, csr) = request(|_| {});
        let agent = AgentKey::from_request(&csr).unwrap();
        let agent = CertificateDer::from(ca.issue_agent(&agent, &[1; 16], clock).unwrap());
        assert!(not_after(ca.der()).unwrap() as u64 > NOW.as_secs() + 8 * 365 * DAY.as_secs());
        assert!(not_after(&server).unwrap() as u64 > NOW.as_secs() + 8 * 365 * DAY.as_secs());
        assert!(Duration::from_secs(not_after(&agent).unwrap() as u64) + AGENT_GRACE > NOW);
    }

    #[test]
    fn a_request_that_its_key_did_not_sign_is_refused() {
        let (_, mut csr) = request(|_| {});
        let last = csr.len() - 1;
        csr[last] ^= 1;
        let error = AgentKey::from_request(&csr).unwrap_err();
        assert!(matches!(error, CaError::RequestSignature | CaError::ParseRequest), "{error}");
        let (_, mut csr) =
            request(|params| params.distinguished_name.push(DnType::OrganizationName, "honest"));
        let at = csr.windows(6).position(|w| w == b"honest").unwrap();
        csr[at] = b'H';
        assert!(matches!(AgentKey::from_request(&csr), Err(CaError::RequestSignature)));
    }

    #[test]
    fn garbage_and_trailing_bytes_are_no_request() {
        let (_, mut csr) = request(|_| {});
        csr.push(0);
        assert!(matches!(AgentKey::from_request(&csr), Err(CaError::ParseRequest)));
        assert!(matches!(AgentKey::from_request(b""), Err(CaError::ParseRequest)));
        assert!(matches!(AgentKey::from_request(&vec![0x30; MAX_DER + 1]), Err(CaError::ParseRequest)));
    }

    #[test]
    fn the_token_pins_the_key_of_the_certificate_that_is_shown() {
        let ca = ca();
        assert_eq!(spki_sha256_of(ca.der()).unwrap(), ca.spki_sha256());
    }
}
