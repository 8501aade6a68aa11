//! Reading a capture file, frame by frame. The file is not held in memory.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use pcap_parser::{Block, PcapBlockOwned, PcapError, create_reader, traits::PcapReaderIterator};

/// First size of the buffer; it must hold a whole record.
const BUFFER: usize = 1 << 20;
/// Longest record that is believed. tshark itself gives up at 256 KiB for Ethernet and 128 MiB for anything.
const LONGEST_RECORD: usize = 128 << 20;

/// A capture file that is being read.
pub struct Capture {
    path: PathBuf,
    reader: Box<dyn PcapReaderIterator + Send>,
    buffer: usize,
    /// Of the current section, in the order of their blocks; a pcap file has one.
    interfaces: Vec<Interface>,
    frames: u64,
    cut_short: bool,
}

#[derive(Clone, Copy)]
struct Interface {
    link: u32,
    /// 0: no limit.
    snaplen: u32,
}

/// A frame as it was captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// From 1, as tshark counts.
    pub number: u64,
    /// Link type: a `LINKTYPE_` number (<https://www.tcpdump.org/linktypes.html>).
    pub link: u32,
    /// What was captured of it.
    pub bytes: Vec<u8>,
}

/// Why a capture cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The file cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another format, or a compressed file.
    #[error(
        "{} is neither pcap nor pcapng: `editcap -F pcapng {} plain.pcapng` makes one of whatever Wireshark reads",
        path.display(),
        path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// Something in it contradicts its format.
    #[error("{}: cannot read the record behind frame {frame}: {why}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The last frame that was read, from 1.
        frame: u64,
        /// What is wrong.
        why: String,
    },
}

impl Capture {
    /// Opens a pcap or pcapng file of either byte order and any resolution of its times.
    ///
    /// # Errors
    /// [`CaptureError::Open`], [`CaptureError::Format`].
    pub fn open(path: &Path) -> Result<Self, CaptureError> {
        let file = File::open(path).map_err(|source| CaptureError::Open { path: path.to_owned(), source })?;
        let reader =
            create_reader(BUFFER, file).map_err(|_| CaptureError::Format { path: path.to_owned() })?;
        Ok(Self {
            path: path.to_owned(),
            reader,
            buffer: BUFFER,
            interfaces: Vec::new(),
            frames: 0,
            cut_short: false,
        })
    }

    /// The file ended in the middle of a record, which was left out. Known when [`Self::next_frame`] said `None`.
    pub fn cut_short(&self) -> bool {
        self.cut_short
    }

    /// The next frame; `None` at the end.
    ///
    /// # Errors
    /// [`CaptureError::Record`].
    pub fn next_frame(&mut self) -> Result<Option<Captured>, CaptureError> {
        loop {
            let wrong =
                |why: String| CaptureError::Record { path: self.path.clone(), frame: self.frames, why };
            let (length, frame) = match self.reader.next() {
                Ok((length, block)) => (length, frame_of(&block, &mut self.interfaces).map_err(wrong)?),
                Err(PcapError::Eof) => return Ok(None),
                Err(PcapError::UnexpectedEof) => {
                    self.cut_short = true;
                    return Ok(None);
                }
                Err(PcapError::Incomplete(_)) => {
                    self.reader.refill().map_err(|error| wrong(error.to_string()))?;
                    continue;
                }
                Err(PcapError::BufferTooSmall) if self.buffer < LONGEST_RECORD => {
                    self.buffer *= 2;
                    self.reader.grow(self.buffer);
                    self.reader.refill().map_err(|error| wrong(error.to_string()))?;
                    continue;
                }
                Err(PcapError::BufferTooSmall) => {
                    return Err(wrong(format!("it is longer than {LONGEST_RECORD} bytes")));
                }
                // The bytes at which it happened are of no use to anyone.
                Err(PcapError::NomError(_, kind) | PcapError::OwnedNomError(_, kind)) => {
                    return Err(wrong(format!("{kind:?}")));
                }
                Err(error) => return Err(wrong(error.to_string())),
            };
            self.reader.consume(length);
            if let Some((link, bytes)) = frame {
                self.frames += 1;
                return Ok(Some(Captured { number: self.frames, link, bytes }));
            }
        }
    }
}

/// Link type and bytes, when the block is a frame; else takes notice of what it says about the frames to come.
fn frame_of(
    block: &PcapBlockOwned<'_>,
    interfaces: &mut Vec<Interface>,
) -> Result<Option<(u32, Vec<u8>)>, String> {
    let of = |interfaces: &[Interface], number: u32| {
        let interface = usize::try_from(number).ok().and_then(|number| interfaces.get(number));
        interface.copied().ok_or_else(|| format!("there is no interface {number}"))
    };
    match block {
        PcapBlockOwned::LegacyHeader(header) => {
            // The upper bits tell of a frame check sequence behind the frames.
            let link = header.network.0 as u32 & 0x03ff_ffff;
            *interfaces = vec![Interface { link, snaplen: header.snaplen }];
        }
        PcapBlockOwned::Legacy(frame) => {
            return Ok(Some((of(interfaces, 0)?.link, frame.data.to_vec())));
        }
        PcapBlockOwned::NG(Block::SectionHeader(_)) => interfaces.clear(),
        PcapBlockOwned::NG(Block::InterfaceDescription(interface)) => {
            interfaces.push(Interface { link: interface.linktype.0 as u32, snaplen: interface.snaplen });
        }
        PcapBlockOwned::NG(Block::EnhancedPacket(frame)) => {
            let length = usize::try_from(frame.caplen).unwrap_or(usize::MAX);
            let bytes = frame.data.get(..length).ok_or("it holds less than it says")?;
            return Ok(Some((of(interfaces, frame.if_id)?.link, bytes.to_vec())));
        }
        PcapBlockOwned::NG(Block::SimplePacket(frame)) => {
            // It is always of the first interface, and does not say how much of it was captured.
            let Interface { link, snaplen } = of(interfaces, 0)?;
            let captured = if snaplen == 0 { frame.origlen } else { frame.origlen.min(snaplen) };
            let length = usize::try_from(captured).unwrap_or(usize::MAX);
            return Ok(Some((link, frame.data.get(..length).unwrap_or(frame.data).to_vec())));
        }
        PcapBlockOwned::NG(_) => {}
    }
    Ok(None)
}
