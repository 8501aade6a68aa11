//! What tshark says of every frame of a capture. Nothing is judged here.
//!
//! One run, in the order of the file: reassembly of fragments and streams is off, so each frame speaks for itself.
//! Fields that occur more than once (tunnels, quoted headers) come with all their values, outermost first.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Read as _},
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    str::FromStr,
    thread,
};

/// Preferences that differ from tshark's own.
const PREFERENCES: [&str; 5] = [
    "ip.defragment:FALSE",
    "ipv6.defragment:FALSE",
    "tcp.desegment_tcp_streams:FALSE",
    // A payload length of 0 stands for a packet that is too long for the field, as in IPv4.
    "ipv6.tso_support:TRUE",
    // The dissector of 802.1ad does not tell its EtherType, that of VLAN tags does.
    "vlan.qinq_ethertype:88a8",
];

/// IPv6 extension headers: number, and fields with the next header and with the length.
const EXTENSIONS: [(u8, &str, &str); 7] = [
    (0, "ipv6.hopopts.nxt", "ipv6.hopopts.len"),
    (43, "ipv6.routing.nxt", "ipv6.routing.len"),
    (60, "ipv6.dstopts.nxt", "ipv6.dstopts.len"),
    (AUTHENTICATION, "ah.next_header", "ah.length"),
    // Mobility (RFC 6275), host identity protocol (RFC 7401), shim6 (RFC 5533).
    (135, "mip6.proto", "mip6.hlen"),
    (139, "hip.proto", "hip.hdr_len"),
    (140, "shim6.nxt", "shim6.len"),
];
/// Number of the fragment header (RFC 8200, 4.5).
pub const FRAGMENT: u8 = 44;
/// Number of the authentication header (RFC 4302).
pub const AUTHENTICATION: u8 = 51;

/// A frame, as tshark dissected it. `None` and empty lists: tshark did not find that field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dissected {
    /// From 1.
    pub number: u64,
    /// Wireshark's number of the link type (`WTAP_ENCAP_`).
    pub encapsulation: u16,
    /// Bytes that were captured.
    pub captured: u32,
    /// Names of the dissectors, from the outside in, with colons between them.
    pub layers: String,
    /// The outermost EtherType in an Ethernet header.
    pub ethertype: Option<u16>,
    /// The outermost EtherType in a Linux cooked header.
    pub cooked_ethertype: Option<u16>,
    /// EtherTypes in VLAN tags.
    pub tag_ethertypes: Vec<u16>,
    /// A VLAN tag holds a length (IEEE 802.3) in the place of an EtherType.
    pub tag_length: bool,
    /// The outermost IPv4 header.
    pub ipv4: Ipv4,
    /// The outermost IPv6 header.
    pub ipv6: Ipv6,
    /// Source and destination port of the outermost TCP header.
    pub tcp_ports: (Option<u16>, Option<u16>),
    /// Length of the outermost TCP header, in bytes.
    pub tcp_header: Option<u32>,
    /// Source and destination port of the outermost UDP header.
    pub udp_ports: (Option<u16>, Option<u16>),
}

/// Fields of an IPv4 header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ipv4 {
    /// Version.
    pub version: Option<u8>,
    /// Length of the header, in bytes.
    pub header: Option<u32>,
    /// Total length.
    pub length: Option<u32>,
    /// Identification.
    pub id: Option<u32>,
    /// Fragment offset; 0 in a first or only fragment.
    pub offset: Option<u32>,
    /// More fragments follow.
    pub more: Option<bool>,
    /// Protocol.
    pub protocol: Option<u8>,
    /// Source.
    pub source: Option<Ipv4Addr>,
    /// Destination.
    pub destination: Option<Ipv4Addr>,
}

/// Fields of an IPv6 header and of the extension headers behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ipv6 {
    /// Version.
    pub version: Option<u8>,
    /// Payload length.
    pub length: Option<u32>,
    /// What follows the header.
    pub next: Option<u8>,
    /// Source.
    pub source: Option<Ipv6Addr>,
    /// Destination.
    pub destination: Option<Ipv6Addr>,
    /// Extension headers, but fragment headers, by their number; of each kind in the order of the packet.
    pub extensions: BTreeMap<u8, Vec<Extension>>,
    /// Fragment headers.
    pub fragments: Vec<Fragment>,
}

/// An IPv6 extension header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What follows it.
    pub next: u8,
    /// As in the packet; what it counts depends on the kind.
    pub length: u32,
}

/// An IPv6 fragment header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// What follows it, in the first fragment.
    pub next: u8,
    /// 0 in a first or only fragment.
    pub offset: u32,
    /// More fragments follow.
    pub more: bool,
    /// Identification.
    pub id: u32,
}

/// Why there is no word from tshark.
#[derive(Debug, thiserror::Error)]
pub enum TsharkError {
    /// It cannot be started.
    #[error("cannot start tshark: install it (Debian package tshark)")]
    Start {
        /// Why.
        source: io::Error,
    },
    /// Its answer cannot be read.
    #[error("cannot read what tshark says of {}", path.display())]
    Read {
        /// The capture.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended with an error.
    #[error("tshark cannot read {}: {message}", path.display())]
    Failed {
        /// The capture.
        path: PathBuf,
        /// Its status and what it said.
        message: String,
    },
    /// It printed something else than was asked for.
    #[error("{}: tshark's field {field} cannot be {value:?}", path.display())]
    Field {
        /// The capture.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What it printed.
        value: String,
    },
}

/// tshark, reading a capture.
pub struct Tshark {
    path: PathBuf,
    child: Child,
    lines: BufReader<ChildStdout>,
    errors: Option<thread::JoinHandle<String>>,
    /// Instead of the user's own settings: nothing.
    _settings: tempfile::TempDir,
}

impl Tshark {
    /// Starts it.
    ///
    /// # Errors
    /// [`TsharkError::Start`].
    pub fn start(capture: &Path) -> Result<Self, TsharkError> {
        let failed = |source| TsharkError::Start { source };
        let settings = tempfile::tempdir().map_err(failed)?;
        let mut command = Command::new("tshark");
        command.env("WIRESHARK_CONFIG_DIR", settings.path()).arg("-n").arg("-r").arg(capture);
        for preference in PREFERENCES {
            command.args(["-o", preference]);
        }
        command.args(["-T", "fields", "-E", "separator=|", "-E", "occurrence=a", "-E", "aggregator=,"]);
        for field in fields() {
            command.args(["-e", field]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let missing = || failed(io::Error::other("no pipe"));
        let lines = BufReader::new(child.stdout.take().ok_or_else(missing)?);
        let mut errors = child.stderr.take().ok_or_else(missing)?;
        let errors = thread::spawn(move || {
            let mut said = Vec::new();
            // What was read before an error is better than nothing.
            let _ = errors.read_to_end(&mut said);
            String::from_utf8_lossy(&said).into_owned()
        });
        Ok(Self { path: capture.to_owned(), child, lines, errors: Some(errors), _settings: settings })
    }

    /// What it says of the next frame; `None` when it has read all.
    ///
    /// # Errors
    /// [`TsharkError::Read`], [`TsharkError::Field`].
    pub fn next_frame(&mut self) -> Result<Option<Dissected>, TsharkError> {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        let length = read.map_err(|source| TsharkError::Read { path: self.path.clone(), source })?;
        if length == 0 {
            return Ok(None);
        }
        let dissected = dissected(line.trim_end_matches('\n'));
        dissected.map(Some).map_err(|Unreadable { field, value }| TsharkError::Field {
            path: self.path.clone(),
            field,
            value,
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`TsharkError::Failed`]; it also fails when the file ends in the middle of a frame.
    pub fn finish(mut self) -> Result<(), TsharkError> {
        let failed = |message| TsharkError::Failed { path: self.path.clone(), message };
        let said = self.errors.take().and_then(|errors| errors.join().ok()).unwrap_or_default();
        let status = self.child.wait().map_err(|error| failed(error.to_string()))?;
        if status.success() { Ok(()) } else { Err(failed(format!("{status}: {}", said.trim()))) }
    }
}

impl Drop for Tshark {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A field that tshark cannot have printed.
#[derive(Debug, PartialEq, Eq)]
struct Unreadable {
    field: &'static str,
    value: String,
}

/// The fields, in the order of the columns.
fn fields() -> impl Iterator<Item = &'static str> {
    let extensions = EXTENSIONS.iter().flat_map(|(_, next, length)| [*next, *length]);
    NETWORK.into_iter().chain(extensions).chain(TRANSPORT)
}

const NETWORK: [&str; 26] = [
    "frame.number",
    "frame.encap_type",
    "frame.cap_len",
    "frame.protocols",
    "eth.type",
    "sll.etype",
    "vlan.etype",
    "vlan.len",
    "ip.version",
    "ip.hdr_len",
    "ip.len",
    "ip.id",
    "ip.frag_offset",
    "ip.flags.mf",
    "ip.proto",
    "ip.src",
    "ip.dst",
    "ipv6.version",
    "ipv6.plen",
    "ipv6.nxt",
    "ipv6.src",
    "ipv6.dst",
    "ipv6.fraghdr.nxt",
    "ipv6.fraghdr.offset",
    "ipv6.fraghdr.more",
    "ipv6.fraghdr.ident",
];

const TRANSPORT: [&str; 5] = ["tcp.srcport", "tcp.dstport", "tcp.hdr_len", "udp.srcport", "udp.dstport"];

fn dissected(line: &str) -> Result<Dissected, Unreadable> {
    let mut row = Row { fields: Box::new(fields()), columns: line.split('|') };
    // In the order of the columns.
    let number = row.first("frame.number")?;
    Ok(Dissected {
        number: number.ok_or(Unreadable { field: "frame.number", value: line.to_owned() })?,
        encapsulation: row.first("frame.encap_type")?.unwrap_or_default(),
        captured: row.first("frame.cap_len")?.unwrap_or_default(),
        layers: row.column("frame.protocols")?.to_owned(),
        ethertype: row.first("eth.type")?,
        cooked_ethertype: row.first("sll.etype")?,
        tag_ethertypes: row.all("vlan.etype")?,
        tag_length: row.first::<u32>("vlan.len")?.is_some(),
        ipv4: Ipv4 {
            version: row.first("ip.version")?,
            header: row.first("ip.hdr_len")?,
            length: row.first("ip.len")?,
            id: row.first("ip.id")?,
            offset: row.first("ip.frag_offset")?,
            more: row.first("ip.flags.mf")?,
            protocol: row.first("ip.proto")?,
            source: row.first("ip.src")?,
            destination: row.first("ip.dst")?,
        },
        ipv6: Ipv6 {
            version: row.first("ipv6.version")?,
            length: row.first("ipv6.plen")?,
            next: row.first("ipv6.nxt")?,
            source: row.first("ipv6.src")?,
            destination: row.first("ipv6.dst")?,
            fragments: row.fragments()?,
            extensions: row.extensions()?,
        },
        tcp_ports: (row.first("tcp.srcport")?, row.first("tcp.dstport")?),
        tcp_header: row.first("tcp.hdr_len")?,
        udp_ports: (row.first("udp.srcport")?, row.first("udp.dstport")?),
    })
}

/// One line of tshark's.
struct Row<'a> {
    fields: Box<dyn Iterator<Item = &'static str>>,
    columns: std::str::Split<'a, char>,
}

impl<'a> Row<'a> {
    /// The next column, which must be this one.
    fn column(&mut self, field: &'static str) -> Result<&'a str, Unreadable> {
        let column = self.columns.next().filter(|_| self.fields.next() == Some(field));
        column.ok_or_else(|| Unreadable { field, value: "missing".to_owned() })
    }

    fn all<T: Value>(&mut self, field: &'static str) -> Result<Vec<T>, Unreadable> {
        let column = self.column(field)?;
        let values = column.split(',').filter(|value| !value.is_empty());
        values.map(|value| read(field, value)).collect()
    }

    fn first<T: Value>(&mut self, field: &'static str) -> Result<Option<T>, Unreadable> {
        let value = self.column(field)?.split(',').next().filter(|value| !value.is_empty());
        value.map(|value| read(field, value)).transpose()
    }

    fn fragments(&mut self) -> Result<Vec<Fragment>, Unreadable> {
        let nexts = self.all("ipv6.fraghdr.nxt")?.into_iter();
        let offsets = self.all("ipv6.fraghdr.offset")?.into_iter();
        let mores = self.all("ipv6.fraghdr.more")?.into_iter();
        let ids = self.all("ipv6.fraghdr.ident")?.into_iter();
        let fragments = nexts.zip(offsets).zip(mores).zip(ids);
        Ok(fragments.map(|(((next, offset), more), id)| Fragment { next, offset, more, id }).collect())
    }

    fn extensions(&mut self) -> Result<BTreeMap<u8, Vec<Extension>>, Unreadable> {
        let mut found = BTreeMap::new();
        for (number, next, length) in EXTENSIONS {
            let headers = self.all(next)?.into_iter().zip(self.all(length)?);
            found.insert(number, headers.map(|(next, length)| Extension { next, length }).collect());
        }
        Ok(found)
    }
}

fn read<T: Value>(field: &'static str, value: &str) -> Result<T, Unreadable> {
    T::of(value).ok_or_else(|| Unreadable { field, value: value.to_owned() })
}

/// What a field can hold.
trait Value: Sized {
    fn of(text: &str) -> Option<Self>;
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Value for $number {
            /// Decimal or, with `0x` in front, hexadecimal.
            fn of(text: &str) -> Option<Self> {
                match text.strip_prefix("0x") {
                    Some(digits) => Self::from_str_radix(digits, 16).ok(),
                    None => text.parse().ok(),
                }
            }
        }
    )*};
}
numbers!(u8, u16, u32, u64);

impl Value for bool {
    /// 4.0 prints numbers, later versions words.
    fn of(text: &str) -> Option<Self> {
        match text {
            "1" | "True" => Some(true),
            "0" | "False" => Some(false),
            _ => None,
        }
    }
}

impl Value for Ipv4Addr {
    fn of(text: &str) -> Option<Self> {
        Self::from_str(text).ok()
    }
}

impl Value for Ipv6Addr {
    fn of(text: &str) -> Option<Self> {
        Self::from_str(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line of tshark 4.0 for VXLAN over IPv4, in it IPv6 with a hop-by-hop header and UDP.
    fn vxlan() -> String {
        let mut columns =
            vec!["45", "1", "127", "eth:ethertype:ip:udp:vxlan:eth:ethertype:ipv6:ipv6.hopopts:udp:data"];
        columns.extend(["0x0800,0x86dd", "", "", ""]);
        columns.extend(["4", "20", "113", "0x0007", "0", "0", "17", "10.0.0.1", "192.0.2.9"]);
        columns.extend(["6", "23", "0", "2001:db8::1", "2001:db8::2", "", "", "", ""]);
        columns.extend(["17", "0", "", "", "", "", "", "", "", "", "", "", "", ""]);
        columns.extend(["", "", "", "1000,7", "4789,8"]);
        columns.join("|")
    }

    #[test]
    fn a_line_becomes_a_frame_and_the_outermost_of_each_field_is_taken() {
        let frame = dissected(&vxlan()).unwrap();
        assert_eq!((frame.number, frame.encapsulation, frame.captured), (45, 1, 127));
        assert_eq!((frame.ethertype, frame.udp_ports), (Some(0x800), (Some(1000), Some(4789))));
        assert_eq!((frame.ipv4.length, frame.ipv4.id, frame.ipv4.more), (Some(113), Some(7), Some(false)));
        assert_eq!(frame.ipv4.destination, Some([192, 0, 2, 9].into()));
        assert_eq!(frame.ipv6.extensions[&0], [Extension { next: 17, length: 0 }]);
        assert_eq!((frame.tcp_header, frame.ipv6.fragments), (None, vec![]));
    }

    #[test]
    fn what_tshark_cannot_have_said_is_an_error_that_names_the_field() {
        let wrong = vxlan().replace("|113|", "|1e2|");
        assert_eq!(dissected(&wrong), Err(Unreadable { field: "ip.len", value: "1e2".to_owned() }));
        let short = vxlan().replace("|4789,8", "");
        assert_eq!(dissected(&short).unwrap_err().field, "udp.dstport");
        assert_eq!(dissected("").unwrap_err().field, "frame.number");
    }

    #[test]
    fn numbers_are_read_in_both_bases_and_booleans_of_all_versions() {
        assert_eq!((u16::of("0x8100"), u16::of("33024"), u8::of("256")), (Some(0x8100), Some(0x8100), None));
        assert_eq!((bool::of("1"), bool::of("False"), bool::of("maybe")), (Some(true), Some(false), None));
    }
}
