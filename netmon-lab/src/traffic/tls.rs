//! The certificate that a server makes for itself and leaves in a file for its clients.

use std::fs;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::Identity;

/// A new key and its certificate, which is also written to the identity's file.
pub(super) fn make(identity: &Identity) -> anyhow::Result<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
    let made = rcgen::generate_simple_self_signed([identity.name.clone()])?;
    let path = &identity.certificate;
    fs::write(path, made.cert.pem()).with_context(|| format!("cannot write {}", path.display()))?;
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    Ok((made.cert.der().clone(), key))
}

/// Trusts the certificate in the identity's file and nothing else.
pub(super) fn roots(identity: &Identity) -> anyhow::Result<RootCertStore> {
    let path = &identity.certificate;
    let certificate =
        CertificateDer::from_pem_file(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut roots = RootCertStore::empty();
    roots.add(certificate)?;
    Ok(roots)
}

pub(super) fn server(identity: &Identity) -> anyhow::Result<ServerConfig> {
    let (certificate, key) = make(identity)?;
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    Ok(builder
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?)
}

pub(super) fn client(identity: &Identity) -> anyhow::Result<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots(identity)?).with_no_client_auth())
}
