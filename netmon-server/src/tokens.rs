//! Enrolment tokens: what the server keeps of them, and who may use one.

use std::net::IpAddr;

use jiff::tz::TimeZone;
use jiff::{SpanRelativeTo, Unit};
use netmon_common::enroll::{self, Hex, Token, unhex};
use netmon_common::logline;
use sha2::{Digest as _, Sha256};

/// What the store keeps of a token: never its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredToken {
    /// Names the token.
    pub id: [u8; 8],
    /// SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// When it was made, wall clock, nanoseconds.
    pub created_ns: i64,
    /// From when on it is void, wall clock, nanoseconds.
    pub expires_ns: i64,
    /// How many PCs it may enrol in all.
    pub uses: u32,
    /// How many it may still enrol.
    pub uses_left: u32,
}

/// Why a token does not enrol a PC. Shown to whoever tried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such token, or the secret is another one: the two are not told apart for whoever guesses.
    #[error("token {0} is not known to this server; make one there with `netmon-server token`")]
    Unknown(String),
    /// Its time is over.
    #[error("token {id} expired at {at}; make a new one with `netmon-server token`")]
    Expired {
        /// The token.
        id: String,
        /// Since when.
        at: String,
    },
    /// It has enrolled as many PCs as it was made for.
    #[error("token {id} was already used {uses} of {uses} times; make a new one with `netmon-server token`")]
    Used {
        /// The token.
        id: String,
        /// How often it could be used.
        uses: u32,
    },
}

/// May whoever shows `secret` enrol with the token that the store has under `id`?
///
/// Hashes are compared, so the time that the comparison takes says nothing about the secret.
///
/// # Errors
/// [`Refusal`] says why not.
pub fn check(
    stored: Option<&StoredToken>,
    id: &[u8; 8],
    secret: &[u8; 32],
    now_ns: i64,
    zone: &TimeZone,
) -> Result<(), Refusal> {
    let name = Hex(id).to_string();
    let Some(token) = stored.filter(|token| token.secret_sha256 == hash(secret)) else {
        return Err(Refusal::Unknown(name));
    };
    if now_ns >= token.expires_ns {
        return Err(Refusal::Expired { id: name, at: logline::time(token.expires_ns, zone).to_string() });
    }
    if token.uses_left == 0 {
        return Err(Refusal::Used { id: name, uses: token.uses });
    }
    Ok(())
}

/// What is kept of a secret. The secret is 256 random bits, so a plain hash cannot be guessed back.
pub fn hash(secret: &[u8; 32]) -> [u8; 32] {
    Sha256::digest(secret).into()
}

/// A new token and what the store keeps of it. `random` are 40 random bytes.
pub fn make(
    address: String,
    ca_spki_sha256: [u8; 32],
    random: &[u8; 40],
    uses: u32,
    ttl_ns: i64,
    now_ns: i64,
) -> (Token, StoredToken) {
    let (mut id, mut secret) = ([0; 8], [0; 32]);
    id.copy_from_slice(&random[..8]);
    secret.copy_from_slice(&random[8..]);
    let stored = StoredToken {
        id,
        secret_sha256: hash(&secret),
        created_ns: now_ns,
        expires_ns: now_ns.saturating_add(ttl_ns),
        uses,
        uses_left: uses,
    };
    (Token { address, ca_spki_sha256, id, secret }, stored)
}

/// `HOST[:PORT]` as a token carries it: `host:port`, IPv6 addresses in brackets, the default port where none
/// is given.
///
/// # Errors
/// Says what is wrong with the text.
pub fn address(text: &str) -> Result<String, String> {
    let port = enroll::DEFAULT_PORT;
    if let Ok(ip) = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        return Ok(std::net::SocketAddr::new(ip, port).to_string());
    }
    if let Ok(address) = text.parse::<std::net::SocketAddr>() {
        return if address.port() == 0 { Err("port 0 cannot be called".into()) } else { Ok(text.to_owned()) };
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| format!("`{port}` is not a port"))?),
        None => (text, port),
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    if host.is_empty() || host.len() > 253 || !host.chars().all(is_name) || port == 0 {
        return Err("expected HOST or HOST:PORT, for example 192.0.2.7 or server.lab.example:7444".into());
    }
    Ok(format!("{host}:{port}"))
}

/// The ID of a token on the command line: 16 hexadecimal digits.
///
/// # Errors
/// Says what is expected.
pub fn id(text: &str) -> Result<[u8; 8], String> {
    unhex(text).ok_or_else(|| "expected the 16 digits of the column ID of `netmon-server tokens`".to_owned())
}

/// A time to live such as `24h`, `30m`, `7d`, in nanoseconds.
///
/// # Errors
/// Says what is wrong with the text.
pub fn ttl(text: &str) -> Result<i64, String> {
    let example = "expected a time such as 24h, 30m or 7d";
    let span: jiff::Span = text.parse().map_err(|_| example.to_owned())?;
    let total = span.total((Unit::Nanosecond, SpanRelativeTo::days_are_24_hours())).map_err(|_| example)?;
    // A token that lives longer than ten years is a typing error.
    if total <= 0.0 || total > 3650.0 * 86_400e9 {
        return Err(format!("{example}, more than nothing and at most 3650d"));
    }
    Ok(total as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3_600_000_000_000;

    fn made(uses: u32) -> (Token, StoredToken) {
        make("192.0.2.7:7444".into(), [7; 32], &[9; 40], uses, HOUR, 1_000)
    }

    fn verdict(stored: Option<&StoredToken>, secret: [u8; 32], now_ns: i64) -> Result<(), Refusal> {
        check(stored, &[9; 8], &secret, now_ns, &TimeZone::UTC)
    }

    #[test]
    fn a_fresh_token_enrols() {
        let (token, stored) = made(1);
        assert_eq!(verdict(Some(&stored), token.secret, 2_000), Ok(()));
    }

    #[test]
    fn the_store_never_sees_the_secret() {
        let (token, stored) = made(1);
        assert_ne!(stored.secret_sha256, token.secret);
        assert!(!format!("{stored:?}").contains(&format!("{:?}", token.secret)));
    }

    #[test]
    fn unknown_and_wrong_secret_look_the_same() {
        let (token, stored) = made(1);
        let unknown = verdict(None, token.secret, 2_000).unwrap_err();
        assert_eq!(verdict(Some(&stored), [1; 32], 2_000).unwrap_err(), unknown);
        assert!(unknown.to_string().contains("not known"), "{unknown}");
    }

    #[test]
    fn a_wrong_secret_does_not_learn_whether_the_token_expired_or_was_used() {
        let (_, mut stored) = made(1);
        stored.uses_left = 0;
        assert!(matches!(verdict(Some(&stored), [1; 32], 2 * HOUR), Err(Refusal::Unknown(_))));
    }

    #[test]
    fn a_token_ends_with_its_time_and_with_its_uses() {
        let (token, mut stored) = made(2);
        assert_eq!(verdict(Some(&stored), token.secret, HOUR + 999), Ok(()));
        let expired = verdict(Some(&stored), token.secret, HOUR + 1_000).unwrap_err();
        assert!(expired.to_string().contains("expired at 1970-01-01T01:00:00.000+00:00"), "{expired}");
        stored.uses_left = 0;
        let used = verdict(Some(&stored), token.secret, 2_000).unwrap_err();
        assert!(used.to_string().contains("already used 2 of 2 times"), "{used}");
    }

    #[test]
    fn addresses_get_the_default_port_and_ipv6_gets_brackets() {
        assert_eq!(address("192.0.2.7").unwrap(), "192.0.2.7:7444");
        assert_eq!(address("2001:db8::1").unwrap(), "[2001:db8::1]:7444");
        assert_eq!(address("[2001:db8::1]").unwrap(), "[2001:db8::1]:7444");
        assert_eq!(address("[2001:db8::1]:9").unwrap(), "[2001:db8::1]:9");
        assert_eq!(address("server.lab.example:9000").unwrap(), "server.lab.example:9000");
        for bad in ["", ":1", "a b", "host:", "host:x", "host:0", "host:70000", "192.0.2.7:0"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_to_live_are_read_as_people_write_them() {
        assert_eq!(ttl("24h").unwrap(), 24 * HOUR);
        assert_eq!(ttl("30m").unwrap(), HOUR / 2);
        assert_eq!(ttl("7d").unwrap(), 7 * 24 * HOUR);
        for bad in ["", "24", "0s", "-1h", "soon", "99999d"] {
            assert!(ttl(bad).is_err(), "{bad}");
        }
    }
}
