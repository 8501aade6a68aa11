//! The agent's spool as a start finds it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use netmon_agent::spool::format::{FRAME, HEADER, Header, push_frame};
use netmon_agent::spool::{Files, Limits, Recovered, Spool};
use netmon_common::model::{Event, MAX_RECORD};
use netmon_common::wire::Item;

use crate::input::Input;

/// Epochs that the spool begins are far from those of the input.
const EPOCHS: u64 = 1 << 60;

/// A record as the spool hands it out.
type Handed = BTreeMap<(u64, u64), Vec<u8>>;

/// Builds a directory out of the input, piece by piece, and starts the agent's spool in it three times, as after a crash.
///
/// Only records whose checksum is right are handed out, each number once; a new record never gets a number that another
/// one has; what the first start found and repaired, the next ones find in order, and the same records in it.
pub fn spool(data: &[u8]) {
    let files = directory(data);
    let right = files.records_with_right_checksums();

    let (mut first, _) = open(&files);
    let found = handed_out(&mut first);
    for ((epoch, seq), record) in &found {
        assert!(
            right.contains(&(*epoch, *seq, record.clone())),
            "record {seq} of epoch {epoch:x} is not on disk"
        );
    }
    let seq = first.append(1, 1, Event::AgentStopped).expect("there is room in memory");
    first.sync().expect("this disk never fails");
    let epoch = first.stats().epoch;
    assert!(!found.contains_key(&(epoch, seq)), "record {seq} of epoch {epoch:x} was there already");
    let mut expected = found;
    let appended = first.read(epoch, seq, 1, 1).expect("this disk never fails").expect("it was synced");
    assert_eq!(appended.first_seq, seq);
    let Some(Item::Record(record)) = appended.items.into_iter().next() else { panic!("a hole was appended") };
    expected.insert((epoch, seq), record);
    assert_eq!(handed_out(&mut first), expected);
    drop(first);

    for _ in 0..2 {
        let (mut again, recovered) = open(&files);
        assert_eq!(recovered.damaged_bytes, 0);
        assert!(recovered.previous_run_died);
        // Beside a newer agent's segments nobody knows where an epoch ended.
        assert_eq!(recovered.new_epoch, recovered.newer_segments > 0);
        assert_eq!(handed_out(&mut again), expected);
    }
}

fn open(files: &Memory) -> (Spool<Memory>, Recovered) {
    let mut epoch = EPOCHS;
    let random = move || {
        epoch += 1;
        Ok(epoch)
    };
    Spool::open_in(files.clone(), Path::new("spool"), Limits::default(), random)
        .expect("this disk never fails")
}

fn handed_out(spool: &mut Spool<Memory>) -> Handed {
    let mut handed = Handed::new();
    for range in spool.epochs() {
        let mut seq = range.oldest;
        while let Some(chunk) = spool.read(range.epoch, seq, 7, MAX_RECORD).expect("this disk never fails") {
            assert!(chunk.first_seq >= seq && !chunk.items.is_empty());
            seq = chunk.first_seq;
            for item in chunk.items {
                let span = item.span();
                if let Item::Record(record) = item {
                    handed.insert((range.epoch, seq), record);
                }
                seq += span;
            }
        }
    }
    handed
}

/// A directory in memory that never fails. Clones are the same one.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<BTreeMap<String, Content>>>);

type Content = Arc<Mutex<Vec<u8>>>;

impl Memory {
    fn with<T>(&self, f: impl FnOnce(&mut BTreeMap<String, Content>) -> T) -> T {
        f(&mut self.0.lock().expect("nobody panics while holding it"))
    }

    fn put(&self, name: String, bytes: Vec<u8>) {
        self.with(|names| names.insert(name, Arc::new(Mutex::new(bytes))));
    }

    /// By a reader that knows the format alone.
    fn records_with_right_checksums(&self) -> BTreeSet<(u64, u64, Vec<u8>)> {
        let mut right = BTreeSet::new();
        for content in self.with(|names| names.values().cloned().collect::<Vec<_>>()) {
            let bytes = content.lock().expect("nobody panics while holding it");
            let Ok(header) = Header::decode(&bytes) else { continue };
            let (mut input, mut seq) = (Input(&bytes[HEADER..]), header.first_seq);
            while input.0.len() >= FRAME {
                let (length, crc) = (input.u32(), input.u32());
                if length == u32::MAX {
                    // A hole. Its checksum is not looked at: what a damaged one hides is not expected, only allowed.
                    seq = seq.wrapping_add(input.u64());
                    continue;
                }
                let length = length as usize;
                let record = input.bytes(length);
                let numbered = [&seq.to_le_bytes()[..], record].concat();
                if record.len() != length || crc32c::crc32c(&numbered) != crc {
                    break;
                }
                right.insert((header.epoch, seq, record.to_vec()));
                seq += 1;
            }
        }
        right
    }
}

impl Files for Memory {
    type File = Content;

    fn make_directory(&self) -> io::Result<()> {
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.with(|names| names.keys().cloned().collect()))
    }

    fn create(&self, name: &str) -> io::Result<Content> {
        self.with(|names| {
            assert!(!names.contains_key(name), "{name} is there already");
            Ok(names.entry(name.to_owned()).or_default().clone())
        })
    }

    fn open(&self, name: &str) -> io::Result<Content> {
        self.with(|names| names.get(name).cloned()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn write_at(&self, file: &Content, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let mut content = file.lock().expect("nobody panics while holding it");
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        if content.len() < end {
            content.resize(end, 0);
        }
        content[start..end].copy_from_slice(bytes);
        Ok(bytes.len())
    }

    fn read_at(&self, file: &Content, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = file.lock().expect("nobody panics while holding it");
        let rest = content.get(offset as usize..).unwrap_or_default();
        let length = rest.len().min(bytes.len());
        bytes[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn sync(&self, _: &Content) -> io::Result<()> {
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_there(&self, file: &Content, name: &str) -> io::Result<bool> {
        Ok(self.with(|names| names.get(name).is_some_and(|there| Arc::ptr_eq(there, file))))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.with(|names| {
            let content = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            names.insert(to.to_owned(), content);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.with(|names| names.remove(name)).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// The kinds of pieces that an input is made of; each is a byte, and what the functions below read.
pub(crate) const SEGMENT_AS_IT_IS: u8 = 0;
pub(crate) const RUN_FILE_AS_IT_IS: u8 = 2;

/// What the input describes: segments and run files as they are, and such with right checksums, which bytes alone would
/// hardly ever hit upon.
fn directory(data: &[u8]) -> Memory {
    let files = Memory::default();
    let mut input = Input(data);
    while !input.is_empty() {
        match input.byte() % 6 {
            SEGMENT_AS_IT_IS => {
                let number = input.byte();
                files.put(segment_name(number.into()), input.block().to_vec());
            }
            1 => {
                let (number, bytes) = built_segment(&mut input);
                files.put(segment_name(number), bytes);
            }
            RUN_FILE_AS_IT_IS => files.put("run.json".into(), input.block().to_vec()),
            3 => {
                let (run, epoch, next) = (input.u32(), input.byte(), near_the_edges(&mut input));
                let text = format!("{{\"run\":{run},\"stopped\":[{epoch},{next}]}}");
                files.put("run.json".into(), text.into_bytes());
            }
            4 => files.put(format!("{}.tmp", input.byte()), input.block().to_vec()),
            _ => files.put(segment_name(near_the_edges(&mut input)), input.block().to_vec()),
        }
    }
    files
}

fn segment_name(number: u64) -> String {
    format!("{number:010}.seg")
}

/// A header of few epochs and numbers, so that segments meet, and frames, each of them whole, damaged or cut.
fn built_segment(input: &mut Input<'_>) -> (u64, Vec<u8>) {
    let number = u64::from(input.byte());
    let header = Header {
        run: input.byte().into(),
        number,
        epoch: u64::from(input.byte() % 4),
        first_seq: near_the_edges(input),
    };
    let mut bytes = header.encode().to_vec();
    let mut seq = header.first_seq;
    for _ in 0..input.byte() % 16 {
        let (how, start) = (input.byte(), bytes.len());
        push_frame(&mut bytes, seq, input.block());
        seq = seq.wrapping_add(1);
        match how {
            0 => bytes.truncate(start + (bytes.len() - start) / 2),
            1 => bytes[start + 4] ^= 1,
            2 => bytes.extend([0; 9]),
            _ => {}
        }
    }
    (number, bytes)
}

/// A small number, or one that is nearly as large as numbers are.
fn near_the_edges(input: &mut Input<'_>) -> u64 {
    let number = u64::from(input.u16());
    match input.byte() {
        255 => u64::MAX - number,
        254 => i64::MAX as u64 - number,
        _ => number,
    }
}
