//! Seat labels: how the room calls a PC. A label is also the name of the directory of the seat's log.

/// Longest label, in bytes: the longest DNS label (RFC 1035, section 2.3.4), so host names fit.
pub const MAX_LABEL: usize = 63;

/// The label for a PC that asks for `wanted` (empty: no wish) and is called `hostname`, made safe as a file
/// name: letters, digits, `.`, `_`, `-`; the rest becomes `-`; never empty, never starting with a dot.
pub fn label(wanted: &[u8], hostname: &[u8]) -> String {
    let from = if wanted.is_empty() { hostname } else { wanted };
    let safe = |byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' => char::from(*byte),
        _ => '-',
    };
    let label: String = from.iter().take(MAX_LABEL).map(safe).collect();
    // Neither hidden files nor `..` nor something that reads like an option.
    let label = label.trim_start_matches(['.', '-']);
    if label.is_empty() { "pc".to_owned() } else { label.to_owned() }
}

/// The label of a revoked PC whose label goes to another one.
pub fn old(label: &str) -> String {
    const SUFFIX: &str = "-old";
    format!("{}{SUFFIX}", &label[..label.len().min(MAX_LABEL - SUFFIX.len())])
}

/// `label` itself, or the first of `label-2`, `label-3`, … that is not taken; cut so that it stays within
/// [`MAX_LABEL`].
///
/// # Errors
/// Whatever `is_taken` fails with.
pub fn unique<E>(label: &str, mut is_taken: impl FnMut(&str) -> Result<bool, E>) -> Result<String, E> {
    if !is_taken(label)? {
        return Ok(label.to_owned());
    }
    let mut number = 2_u64;
    loop {
        let suffix = format!("-{number}");
        let kept = label.len().min(MAX_LABEL - suffix.len());
        let candidate = format!("{}{suffix}", &label[..kept]);
        if !is_taken(&candidate)? {
            return Ok(candidate);
        }
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn unique_among(label: &str, taken: &[&str]) -> String {
        unique(label, |l| Ok::<_, Infallible>(taken.contains(&l))).unwrap()
    }

    #[test]
    fn a_wish_wins_over_the_host_name() {
        assert_eq!(label(b"PC-17", b"ubuntu"), "PC-17");
        assert_eq!(label(b"", b"ubuntu"), "ubuntu");
    }

    #[test]
    fn no_label_leaves_its_directory() {
        for hostile in [&b"../../etc"[..], b"..", b".", b"/", b"a/../b", b"\x00\n", b"-rf", b".hidden"] {
            let label = label(hostile, b"host");
            assert!(!label.is_empty() && !label.starts_with(['.', '-']), "{hostile:?} gives {label}");
            assert!(!label.contains('/') && label.is_ascii(), "{hostile:?} gives {label}");
        }
        assert_eq!(label("Größe 1".as_bytes(), b""), "Gr----e-1");
        assert_eq!(label(b"", b""), "pc");
    }

    #[test]
    fn a_taken_label_gets_a_number_and_stays_within_the_limit() {
        assert_eq!(unique_among("pc", &[]), "pc");
        assert_eq!(unique_among("pc", &["pc"]), "pc-2");
        assert_eq!(unique_among("pc", &["pc", "pc-2"]), "pc-3");
        assert_eq!(old("pc"), "pc-old");
        let long = label(&[b'x'; 300], b"");
        assert_eq!(old(&long).len(), MAX_LABEL);
        assert_eq!(long.len(), MAX_LABEL);
        let next = unique_among(&long, &[&long]);
        assert_eq!(next.len(), MAX_LABEL);
        assert!(next.ends_with("x-2"));
    }
}
