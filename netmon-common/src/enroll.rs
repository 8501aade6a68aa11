//! How a PC becomes one of the server's agents.
//!
//! The administrator gets a one-line [`Token`] from `netmon-server token`; the PC connects to the enrolment
//! listener (ALPN [`ALPN`]), accepts only a server whose CA has the fingerprint in the token, and sends one
//! [`Request`] frame on a bidirectional stream; the server answers with one [`Reply`] frame. Frames are
//! [`crate::wire`] frames.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::raw::Raw;

/// ALPN of the enrolment connection.
pub const ALPN: &[u8] = b"netmon-enroll/1";
/// Default UDP port of the enrolment listener.
pub const DEFAULT_PORT: u16 = 7444;
/// Longest certificate or signing request that is accepted, in bytes.
pub const MAX_DER: usize = 4096;

/// `nm1.<host:port>.<sha256 of the CA's SPKI>.<id>.<secret>`, hex in lower case.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Enrolment listener, `host:port` (IPv6 as `[::1]:7444`).
    pub address: String,
    /// SHA-256 of the CA's SubjectPublicKeyInfo (RFC 7469, section 2.4).
    pub ca_spki_sha256: [u8; 32],
    /// Names the token at the server.
    pub id: [u8; 8],
    /// Proves the right to enrol.
    pub secret: [u8; 32],
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}, id {}, secret hidden)", self.address, Hex(&self.id))
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ca, id, secret) = (Hex(&self.ca_spki_sha256), Hex(&self.id), Hex(&self.secret));
        write!(f, "nm1.{}.{ca}.{id}.{secret}", self.address)
    }
}

/// Why a text is not a token.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "not an enrolment token: {0} (expected nm1.<host:port>.<fingerprint>.<id>.<secret>, as `netmon-server token` prints it)"
)]
pub struct TokenError(&'static str);

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let rest = text.trim().strip_prefix("nm1.").ok_or(TokenError("it does not start with `nm1.`"))?;
        // From the right: the address itself may hold dots.
        let mut parts = rest.rsplitn(4, '.');
        let mut part = || parts.next().ok_or(TokenError("it has too few parts"));
        let secret = unhex(part()?).ok_or(TokenError("the secret is not 64 hex digits"))?;
        let id = unhex(part()?).ok_or(TokenError("the id is not 16 hex digits"))?;
        let ca_spki_sha256 = unhex(part()?).ok_or(TokenError("the fingerprint is not 64 hex digits"))?;
        let address = part()?;
        let port = address.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then_some(port));
        // It is shown to people, and names a host.
        let is_plain = address.bytes().all(|byte| byte.is_ascii_graphic());
        if port.and_then(|p| p.parse::<u16>().ok()).is_none() || address.len() > 261 || !is_plain {
            return Err(TokenError("the address is not host:port"));
        }
        Ok(Self { address: address.to_owned(), ca_spki_sha256, id, secret })
    }
}

/// Shows bytes as lower-case hex.
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Reads exactly `N` bytes of hex.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// What the PC asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`Token::id`].
    pub token_id: [u8; 8],
    /// [`Token::secret`].
    pub secret: [u8; 32],
    /// PKCS #10 request, DER (RFC 2986): the server takes its public key and nothing else.
    pub csr_der: Vec<u8>,
    /// The PC's host name: the server proposes it as the seat's label.
    pub hostname: Raw,
    /// Label that the user wants for the seat; empty: the host name.
    pub seat: Raw,
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The PC is an agent now.
    Granted(Granted),
    /// It is not; why, for people.
    Refused {
        /// For example "token expired at …".
        reason: Raw,
    },
}

/// An agent's identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// The agent's number (RFC 9562 UUID), also in its certificate as `netmon://agent/<uuid>`.
    pub agent: [u8; 16],
    /// Certificate for the PC's key, DER.
    pub certificate_der: Vec<u8>,
    /// The CA's certificate, DER.
    pub ca_der: Vec<u8>,
    /// UDP port of the event listener, on the host that the token names.
    pub event_port: u16,
    /// The seat's label at the server.
    pub seat: Raw,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(address: &str) -> Token {
        Token { address: address.into(), ca_spki_sha256: [0xab; 32], id: [1; 8], secret: [0xcd; 32] }
    }

    #[test]
    fn a_token_is_read_as_it_is_printed() {
        for address in ["192.0.2.7:7444", "[2001:db8::1]:7444", "server.lab.example:7444"] {
            let token = token(address);
            assert_eq!(token.to_string().parse::<Token>().unwrap(), token);
            assert_eq!(format!("  {token}\n").parse::<Token>().unwrap(), token);
        }
    }

    #[test]
    fn a_broken_token_says_which_part() {
        let good = token("192.0.2.7:7444").to_string();
        let error = |text: String| text.parse::<Token>().unwrap_err().0;
        assert_eq!(error(good[1..].into()), "it does not start with `nm1.`");
        assert_eq!(error(good[..good.len() - 1].into()), "the secret is not 64 hex digits");
        assert_eq!(error(good.replace(":7444", "")), "the address is not host:port");
        assert_eq!(error(good.replace("192", "1\u{1b}[2J")), "the address is not host:port");
        assert_eq!(error("nm1.a".into()), "the secret is not 64 hex digits");
    }

    #[test]
    fn a_token_in_a_debug_log_hides_its_secret() {
        assert!(!format!("{:?}", token("192.0.2.7:7444")).contains("cdcd"));
    }
}
