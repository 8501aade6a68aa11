//! What the kernel writes into the buffer of whoever reads a fanotify group.
//!
//! Pure: `struct fanotify_event_metadata` of linux/fanotify.h, one after the other (fanotify(7)). The layout has not changed
//! since 2.6.37; a kernel that changes it raises the version.

/// `FANOTIFY_METADATA_VERSION`.
const VERSION: u8 = 3;
/// `FAN_EVENT_METADATA_LEN`.
pub const LENGTH: usize = 24;

const FAN_ACCESS: u64 = 0x01;
const FAN_MODIFY: u64 = 0x02;
const FAN_CLOSE_WRITE: u64 = 0x08;
const FAN_CLOSE_NOWRITE: u64 = 0x10;
const FAN_OPEN: u64 = 0x20;
const FAN_Q_OVERFLOW: u64 = 0x4000;

/// What happened to a file. The kernel puts together what the same process did with it while nobody read: several may be
/// true, in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Happened {
    /// It was opened.
    pub opened: bool,
    /// It was read from, by a system call.
    pub read: bool,
    /// It was written to or cut, by a system call.
    pub written: bool,
    /// It was closed by somebody who could not write.
    pub closed_after_reading: bool,
    /// It was closed by somebody who could write.
    pub closed_after_writing: bool,
}

impl Happened {
    fn new(mask: u64) -> Self {
        let is = |bit| mask & bit != 0;
        Self {
            opened: is(FAN_OPEN),
            read: is(FAN_ACCESS),
            written: is(FAN_MODIFY),
            closed_after_reading: is(FAN_CLOSE_NOWRITE),
            closed_after_writing: is(FAN_CLOSE_WRITE),
        }
    }

    /// True when it was closed, however it had been opened.
    pub fn closed(&self) -> bool {
        self.closed_after_reading || self.closed_after_writing
    }

    /// True when there is more to it than that it was opened.
    pub fn beyond_opening(&self) -> bool {
        self.read || self.written || self.closed()
    }
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metadata {
    /// Something happened to a file.
    File {
        /// The descriptor that the kernel has opened for the reader, who must close it.
        descriptor: i32,
        /// Who did it: the process, not the thread; 0 when it is not in the reader's PID namespace.
        pid: u32,
        /// What.
        happened: Happened,
    },
    /// Something happened, and the kernel could not open the file for the reader.
    NoFile,
    /// The queue was full; events were lost.
    Overflow,
}

/// The buffer does not hold what this program understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// Another version.
    #[error(
        "the kernel's file events have version {0}, this netmon knows version {VERSION}; it is too old for this kernel"
    )]
    Version(u8),
    /// Lengths that cannot be.
    #[error("a file event of the kernel has a length that cannot be")]
    Length,
}

/// The events in a buffer. After an error nothing more comes: where the next event begins is not known.
pub fn parse(mut buffer: &[u8]) -> impl Iterator<Item = Result<Metadata, MetadataError>> {
    std::iter::from_fn(move || {
        if buffer.is_empty() {
            return None;
        }
        match split(buffer) {
            Ok((event, rest)) => {
                buffer = rest;
                Some(Ok(event))
            }
            Err(error) => {
                buffer = &[];
                Some(Err(error))
            }
        }
    })
}

fn split(buffer: &[u8]) -> Result<(Metadata, &[u8]), MetadataError> {
    let Some(event) = buffer.first_chunk::<LENGTH>() else { return Err(MetadataError::Length) };
    let [l0, l1, l2, l3, version, _, m0, m1, rest @ ..] = *event;
    if version != VERSION {
        return Err(MetadataError::Version(version));
    }
    let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
    let own = usize::from(u16::from_ne_bytes([m0, m1]));
    // Behind the event's own fields may come records of kinds that nobody asked for.
    if own != LENGTH || length < own || length > buffer.len() {
        return Err(MetadataError::Length);
    }
    let [k0, k1, k2, k3, k4, k5, k6, k7, d0, d1, d2, d3, p0, p1, p2, p3] = rest;
    let mask = u64::from_ne_bytes([k0, k1, k2, k3, k4, k5, k6, k7]);
    let descriptor = i32::from_ne_bytes([d0, d1, d2, d3]);
    let pid = u32::try_from(i32::from_ne_bytes([p0, p1, p2, p3])).unwrap_or(0);
    let metadata = match (mask & FAN_Q_OVERFLOW != 0, descriptor) {
        (true, _) => Metadata::Overflow,
        (false, ..0) => Metadata::NoFile,
        (false, descriptor) => Metadata::File { descriptor, pid, happened: Happened::new(mask) },
    };
    Ok((metadata, &buffer[length..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(length: u32, version: u8, own: u16, mask: u64, descriptor: i32, pid: i32) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([version, 0]);
        bytes.extend(own.to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend(descriptor.to_ne_bytes());
        bytes.extend(pid.to_ne_bytes());
        bytes
    }

    fn all(buffer: &[u8]) -> Vec<Result<Metadata, MetadataError>> {
        parse(buffer).collect()
    }

    #[test]
    fn events_follow_each_other_each_as_long_as_it_says() {
        let mut buffer = event(32, 3, 24, FAN_OPEN | FAN_MODIFY | FAN_CLOSE_WRITE, 7, 4711);
        buffer.extend([0xff; 8]);
        buffer.extend(event(24, 3, 24, FAN_ACCESS | FAN_CLOSE_NOWRITE, 8, 0));
        let [Ok(written), Ok(read)] = all(&buffer)[..] else { panic!("{:?}", all(&buffer)) };
        let happened =
            Happened { opened: true, written: true, closed_after_writing: true, ..Happened::default() };
        assert_eq!(written, Metadata::File { descriptor: 7, pid: 4711, happened });
        let happened = Happened { read: true, closed_after_reading: true, ..Happened::default() };
        assert_eq!(read, Metadata::File { descriptor: 8, pid: 0, happened });
    }

    #[test]
    fn a_full_queue_and_a_file_that_cannot_be_opened_are_told_apart() {
        let buffer = [
            event(24, 3, 24, FAN_Q_OVERFLOW, -1, 0),
            event(24, 3, 24, FAN_ACCESS, -1, 5),
            // FAN_REPORT_FD_ERROR, which nobody asked for.
            event(24, 3, 24, FAN_ACCESS, -24, 5),
        ]
        .concat();
        assert_eq!(all(&buffer), [Ok(Metadata::Overflow), Ok(Metadata::NoFile), Ok(Metadata::NoFile)]);
    }

    #[test]
    fn nothing_is_taken_from_a_buffer_behind_what_is_not_understood() {
        let good = event(24, 3, 24, FAN_ACCESS, 7, 1);
        for (wrong, error) in [
            (event(24, 4, 24, FAN_ACCESS, 8, 1), MetadataError::Version(4)),
            (event(23, 3, 24, FAN_ACCESS, 8, 1), MetadataError::Length),
            (event(72, 3, 24, FAN_ACCESS, 8, 1), MetadataError::Length),
            (event(24, 3, 20, FAN_ACCESS, 8, 1), MetadataError::Length),
            (vec![0; 23], MetadataError::Length),
        ] {
            let found = all(&[&good[..], &wrong, &good].concat());
            assert!(found.len() == 2 && found[0].is_ok(), "{found:?}");
            if wrong.len() == LENGTH {
                assert_eq!(found[1], Err(error));
            }
        }
        assert_eq!(all(&[]), []);
    }
}
