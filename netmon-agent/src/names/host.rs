//! What may be called the name of a host.

use std::net::{Ipv4Addr, Ipv6Addr};

use netmon_common::raw::Raw;

/// A host name in lower case, without the dot at its end.
///
/// Labels of at most 63 letters, digits, hyphens and underscores, 253 bytes in all (RFC 1123, section 2.1; underscores are no
/// part of host names but in use). Everything else is `None`, an address in figures too: it names nobody.
pub fn host(bytes: &[u8]) -> Option<Raw> {
    let bytes = bytes.strip_suffix(b".").unwrap_or(bytes);
    let is_label = |label: &[u8]| {
        matches!(label.len(), 1..=63)
            && label.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    if bytes.len() > 253 || !bytes.split(|&byte| byte == b'.').all(is_label) {
        return None;
    }
    // As the URL standard has it: what ends in a number is an IPv4 address or nothing.
    let last = bytes.rsplit(|&byte| byte == b'.').next()?;
    let is_number = last.iter().all(u8::is_ascii_digit)
        || last.strip_prefix(b"0x").is_some_and(|rest| rest.iter().all(u8::is_ascii_hexdigit));
    (!is_number).then(|| Raw::new(bytes.to_ascii_lowercase()))
}

/// The host of `host`, `host:port`, `user@host:port` (RFC 3986, section 3.2).
pub fn authority(bytes: &[u8]) -> Option<Raw> {
    let bytes = bytes.rsplit(|&byte| byte == b'@').next()?;
    let name = match bytes.iter().rposition(|&byte| byte == b':') {
        Some(colon) if bytes[colon + 1..].iter().all(u8::is_ascii_digit) => &bytes[..colon],
        Some(_) => return None,
        None => bytes,
    };
    host(name)
}

/// True for `192.0.2.1`, `192.0.2.1:80`, `[2001:db8::1]:80`: who has no name.
pub fn is_address(bytes: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(bytes) else { return false };
    let text =
        text.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(text, |(host, _)| host);
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    text.parse::<Ipv4Addr>().is_ok() || bracketed.is_some_and(|text| text.parse::<Ipv6Addr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(bytes: &[u8]) -> Option<String> {
        host(bytes).map(|name| name.escaped().to_string())
    }

    #[test]
    fn names_are_in_lower_case_and_without_the_last_dot() {
        assert_eq!(named(b"WWW.Example.ORG.").as_deref(), Some("www.example.org"));
        assert_eq!(named(b"xn--bcher-kva.example").as_deref(), Some("xn--bcher-kva.example"));
        assert_eq!(named(b"a_b.example").as_deref(), Some("a_b.example"));
        assert_eq!(named(b"localhost").as_deref(), Some("localhost"));
        assert_eq!(named(b"1.2.3.4.example").as_deref(), Some("1.2.3.4.example"));
    }

    #[test]
    fn addresses_and_everything_else_are_no_names() {
        let long = [b"a".repeat(63).as_slice(); 4].join(&b'.');
        for other in [
            b"".as_slice(),
            b".",
            b"a..b",
            b".a",
            b"a b",
            b"a\nb",
            b"a\0b",
            "bücher.example".as_bytes(),
            b"192.0.2.1",
            b"1",
            b"0x7f.0x1",
            b"2001:db8::1",
            b"[2001:db8::1]",
            b"*.example.org",
            &b"a".repeat(64),
            &long,
        ] {
            assert_eq!(named(other), None, "{}", other.escape_ascii());
        }
    }

    #[test]
    fn an_authority_has_a_port_and_a_user_or_not() {
        let authority = |bytes: &[u8]| authority(bytes).map(|name| name.escaped().to_string());
        for of_host in [b"example.org".as_slice(), b"example.org:8080", b"example.org:", b"u:p@example.org:1"]
        {
            assert_eq!(authority(of_host).as_deref(), Some("example.org"));
        }
        for other in [b"example.org:x".as_slice(), b"192.0.2.1:80", b"[2001:db8::1]:80", b":80", b""] {
            assert_eq!(authority(other), None);
        }
        assert!(
            is_address(b"192.0.2.1:80")
                && is_address(b"192.0.2.1")
                && is_address(b"[::1]:80")
                && is_address(b"[::1]")
        );
        assert!(!is_address(b"example.org:80") && !is_address(b"") && !is_address(b"\xff"));
    }
}
