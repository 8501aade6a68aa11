//! `ip.txt`: which prefixes are muted, and under which label.
//!
//! ```text
//! # a comment, also behind an entry
//! [amazon]            a label; the prefixes below belong to it
//! 198.51.100.0/24
//! 2001:db8:a::/48
//! ```
//!
//! A prefix without a label above it, a prefix with host bits, one that is listed twice and anything else that
//! cannot be meant is refused with its line number. The list is taken whole or not at all.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::abi::MAX_MUTED_PREFIXES;

/// Longest label, in bytes.
pub const MAX_LABEL: usize = 64;
/// Most labels in a list.
pub const MAX_LABELS: usize = 1_000;
/// Longest list, in bytes. The default list has some 60 KiB.
pub const MAX_FILE: usize = 8 * 1024 * 1024;

/// A list that was read without an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixList {
    labels: Vec<String>,
    prefixes: BTreeMap<IpNet, u16>,
}

/// What is wrong, and in which line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: {problem}")]
pub struct PrefixError {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong with it and what to write instead.
    pub problem: String,
}

impl PrefixList {
    /// Reads a list.
    ///
    /// # Errors
    /// [`PrefixError`] for the first bad line.
    pub fn parse(text: &str) -> Result<Self, PrefixError> {
        let mut list = Self::default();
        let mut lines_of = BTreeMap::new();
        let mut families = [0_usize; 2];
        if text.len() > MAX_FILE {
            return Err(PrefixError { line: 1, problem: format!("the file is longer than {MAX_FILE} bytes") });
        }
        let mut label = None;
        for (line, text) in (1..).zip(text.lines()) {
            let bad = |problem: String| PrefixError { line, problem };
            let text = text.split('#').next().unwrap_or_default().trim();
            if text.is_empty() {
                continue;
            }
            if let Some(name) = text.strip_prefix('[') {
                let name = name.strip_suffix(']').ok_or_else(|| bad(format!("`{}` has no closing `]`", show(text))))?;
                label = Some(list.label(name.trim()).map_err(bad)?);
                continue;
            }
            let prefix = parse_prefix(text).map_err(bad)?;
            let label = label.ok_or_else(|| bad("a prefix before the first `[label]`".into()))?;
            if let Some(first) = lines_of.insert(prefix, line) {
                return Err(bad(format!("{prefix} is listed twice, first in line {first}")));
            }
            let family = &mut families[usize::from(matches!(prefix, IpNet::V6(_)))];
            *family += 1;
            if *family > MAX_MUTED_PREFIXES {
                return Err(bad(format!("more than {MAX_MUTED_PREFIXES} prefixes of one family")));
            }
            list.prefixes.insert(prefix, label);
        }
        Ok(list)
    }

    /// The labels; a prefix names its label by index into this.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The prefixes with their labels' indices, in order.
    pub fn prefixes(&self) -> impl Iterator<Item = (IpNet, u16)> + '_ {
        self.prefixes.iter().map(|(prefix, label)| (*prefix, *label))
    }

    /// Number of prefixes.
    pub fn len(&self) -> usize {
        self.prefixes.len()
    }

    /// True when nothing is muted by prefix.
    pub fn is_empty(&self) -> bool {
        self.prefixes.is_empty()
    }

    fn label(&mut self, name: &str) -> Result<u16, String> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > MAX_LABEL || !name.chars().all(good) {
            return Err(format!(
                "`{}` is not a label: write 1 to {MAX_LABEL} of the characters a-z A-Z 0-9 - _ .",
                show(name)
            ));
        }
        if let Some(index) = self.labels.iter().position(|known| known == name) {
            return Ok(index as u16);
        }
        if self.labels.len() == MAX_LABELS {
            return Err(format!("more than {MAX_LABELS} labels"));
        }
        self.labels.push(name.to_owned());
        Ok((self.labels.len() - 1) as u16)
    }
}

fn parse_prefix(text: &str) -> Result<IpNet, String> {
    let prefix: IpNet = text.parse().map_err(|_| {
        format!("`{}` is not a prefix: write for example 198.51.100.0/24 or 2001:db8::/32", show(text))
    })?;
    if prefix.trunc() != prefix {
        return Err(format!("{prefix} has bits set behind its length: write {}", prefix.trunc()));
    }
    if prefix.prefix_len() == 0 {
        return Err(format!("{prefix} would mute everything"));
    }
    Ok(prefix)
}

fn show(text: &str) -> String {
    let short: String = text.chars().take(60).collect();
    crate::raw::Escaped(short.as_bytes()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_label_their_prefixes() {
        let list = PrefixList::parse(
            "# head\n[a]\n198.51.100.0/24 # behind\n\n[b]\n2001:db8::/32\n[a]\n192.0.2.0/24\n",
        )
        .unwrap();
        assert_eq!(list.labels(), ["a", "b"]);
        let prefixes: Vec<_> = list.prefixes().map(|(p, l)| (p.to_string(), l)).collect();
        let expected = [("192.0.2.0/24", 0), ("198.51.100.0/24", 0), ("2001:db8::/32", 1)];
        assert_eq!(prefixes, expected.map(|(p, l)| (p.to_owned(), l)));
    }

    #[test]
    fn a_bad_line_is_named_with_its_number_and_what_to_write() {
        let cases = [
            ("[a]\n10.0.0.1/8", "line 2: 10.0.0.1/8 has bits set behind its length: write 10.0.0.0/8"),
            ("10.0.0.0/8", "line 1: a prefix before the first `[label]`"),
            ("[a]\n\n10.0.0.0/33", "line 3: `10.0.0.0/33` is not a prefix: write for example 198.51.100.0/24 or 2001:db8::/32"),
            ("[a]\n192.0.2.0/24\n[b]\n192.0.2.0/24", "line 4: 192.0.2.0/24 is listed twice, first in line 2"),
            ("[a", "line 1: `[a` has no closing `]`"),
            ("[a b]", "line 1: `a b` is not a label: write 1 to 64 of the characters a-z A-Z 0-9 - _ ."),
            ("[a]\n0.0.0.0/0", "line 2: 0.0.0.0/0 would mute everything"),
            ("[a]\n\u{1b}[2J", "line 2: `\\u{1b}[2J` is not a prefix: write for example 198.51.100.0/24 or 2001:db8::/32"),
        ];
        for (text, message) in cases {
            assert_eq!(PrefixList::parse(text).unwrap_err().to_string(), message);
        }
    }
}
