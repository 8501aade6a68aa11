//! Domains: which one a host belongs to, and lists of them.

use std::collections::HashMap;

use idna::AsciiDenyList;

use super::host::host;

/// The registrable domain of a host in lower case (`example.co.uk` of `www.example.co.uk`), by the public suffix list that this
/// netmon was built with. A name without one (`localhost`, `com`) stands for itself.
pub fn registrable(name: &str) -> &str {
    psl::domain_str(name).unwrap_or(name)
}

/// Domains, one a line. `example.org` means itself and all below, `=example.org` itself alone; `#` begins a comment. Names
/// may be written as people write them (`bücher.example`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DomainList {
    /// A-labels in lower case. True: with all below.
    domains: HashMap<String, [bool; 2]>,
}

/// A domain of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed<'a> {
    /// As A-labels, in lower case.
    pub domain: &'a str,
    /// It was listed without what is below.
    pub is_exact: bool,
}

impl Listed<'_> {
    /// The larger, the more it says of a name: of two lists, the one that says more is right.
    pub fn weight(&self) -> usize {
        2 * self.domain.len() + usize::from(self.is_exact)
    }
}

/// What is wrong in a list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DomainError {
    /// The line is no domain.
    #[error(
        "line {line}: `{}` is no domain: write one a line, as `example.org` (with all below it) or `=example.org` (without)",
        .text.escape_debug()
    )]
    NotADomain {
        /// Counted from 1.
        line: usize,
        /// What stands there, cut.
        text: String,
    },
    /// The line has an asterisk or a dot in front.
    #[error("line {line}: write `{domain}` instead of `{}`: a domain always means all below it, too", .text.escape_debug())]
    Wildcard {
        /// Counted from 1.
        line: usize,
        /// What stands there.
        text: String,
        /// What to write.
        domain: String,
    },
    /// The line is an address or a prefix.
    #[error("line {line}: `{}` is an address: these belong into ip.txt", .text.escape_debug())]
    Address {
        /// Counted from 1.
        line: usize,
        /// What stands there.
        text: String,
    },
}

impl DomainList {
    /// Reads a list.
    ///
    /// # Errors
    ///
    /// The first line that is wrong, and what to write instead.
    pub fn parse(text: &str) -> Result<Self, DomainError> {
        let mut list = Self::default();
        // Some editors put a byte order mark in front.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let (written, is_exact) = match line.strip_prefix('=') {
                Some(rest) => (rest.trim_start(), true),
                None => (line, false),
            };
            let domain = a_labels(written).ok_or_else(|| problem(number + 1, line))?;
            list.domains.entry(domain).or_default()[usize::from(is_exact)] = true;
        }
        Ok(list)
    }

    /// The domain of the list that says most of a host; the host's name in lower case, as A-labels.
    pub fn find(&self, name: &str) -> Option<Listed<'_>> {
        let mut rest = Some(name);
        while let Some(domain) = rest {
            if let Some((key, [with_all_below, alone])) = self.domains.get_key_value(domain) {
                let is_exact = *alone && domain.len() == name.len();
                if is_exact || *with_all_below {
                    return Some(Listed { domain: key, is_exact });
                }
            }
            rest = domain.split_once('.').map(|(_, parent)| parent);
        }
        None
    }

    /// How many domains it has.
    pub fn len(&self) -> usize {
        self.domains.len()
    }

    /// It has none.
    pub fn is_empty(&self) -> bool {
        self.domains.is_empty()
    }
}

fn a_labels(written: &str) -> Option<String> {
    let ascii = idna::domain_to_ascii_cow(written.as_bytes(), AsciiDenyList::EMPTY).ok()?;
    let name = host(ascii.as_bytes())?;
    str::from_utf8(name.as_bytes()).map(str::to_owned).ok()
}

fn problem(line: usize, text: &str) -> DomainError {
    /// Of a line, in an error.
    const MOST_SHOWN: usize = 80;
    let shown = text.chars().take(MOST_SHOWN).collect();
    let bare = text.trim_start_matches('=').trim_start_matches("*").trim_start_matches('.');
    let address = text.split('/').next().unwrap_or_default().trim_matches(['[', ']', '=']);
    if address.parse::<std::net::IpAddr>().is_ok() {
        return DomainError::Address { line, text: shown };
    }
    match a_labels(bare) {
        Some(domain) if bare.len() < text.len() => DomainError::Wildcard { line, text: shown, domain },
        _ => DomainError::NotADomain { line, text: shown },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(list: &DomainList, name: &str) -> Option<(String, bool)> {
        list.find(name).map(|listed| (listed.domain.to_owned(), listed.is_exact))
    }

    #[test]
    fn a_domain_means_itself_and_all_below_but_not_what_ends_like_it() {
        let list = DomainList::parse(
            "\u{feff}# rules\r\nExample.ORG\r\n=alone.example # no more\nbücher.example.\n\n",
        )
        .unwrap();
        assert_eq!(list.len(), 3);
        for below in ["example.org", "a.example.org", "a.b.example.org"] {
            assert_eq!(found(&list, below), Some(("example.org".into(), false)));
        }
        assert_eq!(found(&list, "notexample.org"), None);
        assert_eq!(found(&list, "org"), None);
        assert_eq!(found(&list, "alone.example"), Some(("alone.example".into(), true)));
        assert_eq!(found(&list, "a.alone.example"), None);
        assert_eq!(found(&list, "www.xn--bcher-kva.example"), Some(("xn--bcher-kva.example".into(), false)));
    }

    #[test]
    fn what_says_more_of_a_name_weighs_more() {
        let list = DomainList::parse("example.org\nb.example.org\n=b.example.org\n").unwrap();
        let weight = |name| list.find(name).unwrap().weight();
        assert!(weight("b.example.org") > weight("a.b.example.org"));
        assert!(weight("a.b.example.org") > weight("c.example.org"));
    }

    #[test]
    fn an_error_names_the_line_and_what_to_write() {
        let error = |text: &str| DomainList::parse(text).unwrap_err().to_string();
        assert_eq!(
            error("a.example\n*.example.org"),
            "line 2: write `example.org` instead of `*.example.org`: a domain always means all below it, too"
        );
        assert!(error(".example.org").starts_with("line 1: write `example.org`"));
        assert_eq!(error("10.0.0.0/8"), "line 1: `10.0.0.0/8` is an address: these belong into ip.txt");
        assert!(error("2001:db8::1").contains("is an address"));
        for other in ["https://example.org/", "example.org 443", "a..b", "=", "=*", "a\u{1b}[2J"] {
            assert!(error(other).contains("is no domain: write one a line, as `example.org`"), "{other}");
        }
        assert!(!error("a\u{1b}[2J").contains('\u{1b}'));
    }

    #[test]
    fn a_host_belongs_to_what_can_be_registered() {
        for (name, domain) in [
            ("www.example.co.uk", "example.co.uk"),
            ("example.com", "example.com"),
            ("a.b.student.github.io", "student.github.io"),
            ("co.uk", "co.uk"),
            ("localhost", "localhost"),
            ("www.xn--bcher-kva.de", "xn--bcher-kva.de"),
        ] {
            assert_eq!(registrable(name), domain);
        }
    }
}
