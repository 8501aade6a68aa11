//! The PC's own logs: `log.txt` has everything, `usb.log` what concerns USB. One line per event.
//!
//! They are for people and for the day on which the server cannot be asked; the record that counts is the spool's.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;
use netmon_common::logline;
use netmon_common::model::Record;

/// Both logs.
#[derive(Debug)]
pub struct Journal {
    log: LogFile,
    usb: LogFile,
    zone: TimeZone,
}

impl Journal {
    /// Opens both logs in `directory`, which is made if need be. A file begins anew at `max_bytes`; the one
    /// before is kept with `.1` behind its name.
    ///
    /// # Errors
    /// What the file system said.
    pub fn open(directory: &Path, max_bytes: u64, zone: TimeZone) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self {
            log: LogFile::open(directory.join("log.txt"), max_bytes)?,
            usb: LogFile::open(directory.join("usb.log"), max_bytes)?,
            zone,
        })
    }

    /// Writes the record's line where it belongs.
    ///
    /// # Errors
    /// What the file system said, once per call; a line that could not be written is not written later. A file that
    /// cannot begin anew goes on beyond its limit: the line is in it then.
    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        let line = logline::line(record, &self.zone) + "\n";
        let log = self.log.write(line.as_bytes());
        let usb = if logline::is_usb(&record.event) { self.usb.write(line.as_bytes()) } else { Ok(()) };
        log.and(usb)
    }
}

#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    file: File,
    length: u64,
    max_bytes: u64,
    /// True while the file cannot begin anew: said once.
    stuck: bool,
}

impl LogFile {
    fn open(path: PathBuf, max_bytes: u64) -> io::Result<Self> {
        let (file, length) = open_append(&path)?;
        let mut this = Self { path, file, length, max_bytes, stuck: false };
        this.mend_last_line()?;
        Ok(this)
    }

    /// A write that was cut off (disk full, crash) leaves half a line; the next line must not be glued to it.
    fn mend_last_line(&mut self) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let mut last = [0];
        if self.length > 0 {
            File::open(&self.path)?.read_exact_at(&mut last, self.length - 1)?;
            if last != *b"\n" {
                self.append(b"\n")?;
            }
        }
        Ok(())
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        self.follow_path()?;
        if self.length > 0 && self.length + line.len() as u64 > self.max_bytes {
            // The line is not lost for that: the file that is open takes it, and the next line tries again.
            let begun = self.begin_anew();
            if let Err(error) = &begun
                && !self.stuck
            {
                tracing::error!(%error, file = %self.path.display(), "a log cannot begin anew and goes on beyond its limit");
            }
            self.stuck = begun.is_err();
        }
        self.append(line)
    }

    /// Makes the open file the one that the path names: somebody may have moved or removed it.
    fn follow_path(&mut self) -> io::Result<()> {
        if self.is_open_file()? {
            return Ok(());
        }
        if let Some(directory) = self.path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        (self.file, self.length) = open_append(&self.path)?;
        self.mend_last_line()
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, self.path.with_added_extension("1"))?;
        (self.file, self.length) = open_append(&self.path)?;
        Ok(())
    }

    fn is_open_file(&self) -> io::Result<bool> {
        let open = self.file.metadata()?;
        match std::fs::metadata(&self.path) {
            Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let written = self.file.write_all(line);
        match written {
            Ok(()) => self.length += line.len() as u64,
            // Take back half a line; if even that fails, the next line mends it.
            Err(_) => {
                if self.file.set_len(self.length).is_err() {
                    self.length = self.file.metadata().map_or(self.length, |metadata| metadata.len());
                }
            }
        }
        written
    }
}

fn open_append(path: &Path) -> io::Result<(File, u64)> {
    // Other users of the PC need not read who talked to whom.
    let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use netmon_common::model::{Event, UsbDevice};

    fn record(event: Event) -> Record {
        Record { seq: 1, run: 1, boot_ns: 0, wall_ns: 0, event }
    }

    #[test]
    fn usb_events_go_into_both_logs_and_others_only_into_log_txt() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path(), 1 << 20, TimeZone::UTC).unwrap();
        journal.write(&record(Event::AgentStopped)).unwrap();
        journal.write(&record(Event::DeviceAdded(UsbDevice::default()))).unwrap();
        let lines = |name| std::fs::read_to_string(directory.path().join(name)).unwrap().lines().count();
        assert_eq!((lines("log.txt"), lines("usb.log")), (2, 1));
    }

    #[test]
    fn a_log_that_reaches_its_limit_begins_anew_and_keeps_the_one_before() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path(), 100, TimeZone::UTC).unwrap();
        for _ in 0..3 {
            journal.write(&record(Event::AgentStopped)).unwrap();
        }
        let lines = |name| std::fs::read_to_string(directory.path().join(name)).unwrap().lines().count();
        assert_eq!((lines("log.txt.1"), lines("log.txt")), (2, 1));
    }

    #[test]
    fn a_torn_last_line_is_closed_before_the_next() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("log.txt"), "torn").unwrap();
        let mut journal = Journal::open(directory.path(), 1 << 20, TimeZone::UTC).unwrap();
        journal.write(&record(Event::AgentStopped)).unwrap();
        let text = std::fs::read_to_string(directory.path().join("log.txt")).unwrap();
        assert_eq!(text, "torn\n1970-01-01T00:00:00.000+00:00 agent stopped\n");
    }

    fn stops(journal: &mut Journal, count: usize) -> usize {
        (0..count).filter(|_| journal.write(&record(Event::AgentStopped)).is_ok()).count()
    }

    fn lines(path: PathBuf) -> usize {
        std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
    }

    #[test]
    fn a_log_that_somebody_removed_is_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let logs = directory.path().join("logs");
        let mut journal = Journal::open(&logs, 1 << 20, TimeZone::UTC).unwrap();
        stops(&mut journal, 1);
        std::fs::remove_file(logs.join("log.txt")).unwrap();
        assert_eq!((stops(&mut journal, 6), lines(logs.join("log.txt"))), (6, 6));
        std::fs::remove_dir_all(&logs).unwrap();
        assert_eq!((stops(&mut journal, 2), lines(logs.join("log.txt"))), (2, 2));
    }

    #[test]
    fn a_log_that_somebody_moved_begins_anew_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path(), 1 << 20, TimeZone::UTC).unwrap();
        stops(&mut journal, 1);
        std::fs::rename(directory.path().join("log.txt"), directory.path().join("moved")).unwrap();
        assert_eq!(stops(&mut journal, 2), 2);
        let counts = ["moved", "log.txt"].map(|name| lines(directory.path().join(name)));
        assert_eq!(counts, [1, 2]);
    }

    #[test]
    fn a_log_that_cannot_begin_anew_loses_no_line_and_does_so_later() {
        let directory = tempfile::tempdir().unwrap();
        let in_the_way = directory.path().join("log.txt.1");
        std::fs::create_dir(&in_the_way).unwrap();
        let mut journal = Journal::open(directory.path(), 100, TimeZone::UTC).unwrap();
        assert_eq!((stops(&mut journal, 4), lines(directory.path().join("log.txt"))), (4, 4));
        std::fs::remove_dir(&in_the_way).unwrap();
        assert_eq!((stops(&mut journal, 1), lines(directory.path().join("log.txt"))), (1, 1));
        assert_eq!(lines(in_the_way), 4);
    }
}
