//! Strings from outside: device names, host names, interface names, labels.
//!
//! They are kept as the bytes that came, cut to [`MAX_RAW`], and escaped by whoever shows them.

use std::fmt::{self, Write as _};

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest string from outside that netmon keeps, in bytes.
pub const MAX_RAW: usize = 255;

/// At most [`MAX_RAW`] bytes that somebody else chose.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Raw(Box<[u8]>);

impl Raw {
    /// Keeps the first [`MAX_RAW`] bytes.
    pub fn new(bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        Self(bytes[..bytes.len().min(MAX_RAW)].into())
    }

    /// The bytes as they came.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// True when nothing came.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// For a line of text or a terminal: see [`Escaped`].
    pub fn escaped(&self) -> Escaped<'_> {
        Escaped(&self.0)
    }
}

impl From<&str> for Raw {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.escaped())
    }
}

/// As bytes; in formats for people (JSON) as escaped text, which is for reading only.
impl Serialize for Raw {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return serializer.collect_str(&self.escaped());
        }
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bounded;
        impl<'de> Visitor<'de> for Bounded {
            type Value = Raw;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_RAW} bytes")
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Raw, E> {
                if bytes.len() > MAX_RAW {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                Ok(Raw(bytes.into()))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Raw, E> {
                self.visit_bytes(text.as_bytes())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Raw, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = seq.next_element()? {
                    if bytes.len() == MAX_RAW {
                        return Err(A::Error::invalid_length(MAX_RAW + 1, &self));
                    }
                    bytes.push(byte);
                }
                Ok(Raw(bytes.into()))
            }
        }
        if deserializer.is_human_readable() {
            return deserializer.deserialize_str(Bounded);
        }
        deserializer.deserialize_bytes(Bounded)
    }
}

/// Shows bytes so that they stay on one line and cannot steer a terminal or turn text around.
///
/// Printable characters stand for themselves. Backslash, double quote, C0 and C1 controls, line and
/// paragraph separators, bidirectional controls and other invisible format characters become `\u{…}`;
/// bytes that are not UTF-8 become `\x…`.
#[derive(Clone, Copy)]
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    '"' => f.write_str("\\\"")?,
                    c if is_unsafe_in_a_line(c) => write!(f, "\\u{{{:x}}}", u32::from(c))?,
                    c => f.write_char(c)?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

fn is_unsafe_in_a_line(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_stays_on_its_line_and_cannot_steer_a_terminal() {
        let name = Raw::new(b"Stick\n\x1b[2J\xc2\x9b\xe2\x80\xae\"\\\xff");
        assert_eq!(name.escaped().to_string(), r#"Stick\u{a}\u{1b}[2J\u{9b}\u{202e}\"\\\xff"#);
    }

    #[test]
    fn what_is_readable_stays_readable() {
        assert_eq!(Raw::from("Größe 32 GB ☂").escaped().to_string(), "Größe 32 GB ☂");
    }

    #[test]
    fn a_long_name_is_cut_when_made_and_refused_when_received() {
        assert_eq!(Raw::new([b'a'; 300]).as_bytes().len(), MAX_RAW);
        let too_long = postcard::to_stdvec(&vec![b'a'; 256]).unwrap();
        assert!(postcard::from_bytes::<Raw>(&too_long).is_err());
        let fits = postcard::to_stdvec(&Raw::new([b'a'; 255])).unwrap();
        assert_eq!(postcard::from_bytes::<Raw>(&fits).unwrap().as_bytes().len(), 255);
    }
}
