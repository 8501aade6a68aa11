//! The few things the spool asks of a directory: on disk, and in tests in memory with faults.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FlockOperation;

/// One directory of files. Names are plain file names.
pub trait Files {
    /// An open file.
    type File: Clone;

    /// Makes the directory if it is not there (any more), and holds it for this process.
    ///
    /// # Errors
    /// As the system has it, so for all the others; [`io::ErrorKind::WouldBlock`] when another process holds it.
    fn make_directory(&self) -> io::Result<()>;
    /// Names of all files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes a file that is not there yet, readable and writable by its owner alone.
    fn create(&self, name: &str) -> io::Result<Self::File>;
    /// Opens a file for reading.
    fn open(&self, name: &str) -> io::Result<Self::File>;
    /// Writes some of the bytes; says how many.
    fn write_at(&self, file: &Self::File, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Reads some bytes; says how many; 0 at the end.
    fn read_at(&self, file: &Self::File, bytes: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Makes the file's content outlast a power cut.
    fn sync(&self, file: &Self::File) -> io::Result<()>;
    /// Makes created, renamed and removed names outlast a power cut.
    fn sync_directory(&self) -> io::Result<()>;
    /// True while this name leads to this file.
    fn is_there(&self, file: &Self::File, name: &str) -> io::Result<bool>;
    /// Gives a file another name, in place of what has that name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a name.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// Writes all bytes at `offset`; a failed write may leave some of them.
pub(super) fn write_all_at<F: Files>(
    files: &F,
    file: &F::File,
    mut bytes: &[u8],
    mut offset: u64,
) -> io::Result<()> {
    while !bytes.is_empty() {
        match files.write_at(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads from `offset` until `limit` bytes or the end.
pub(super) fn read_at_most<F: Files>(
    files: &F,
    file: &F::File,
    offset: u64,
    limit: usize,
) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; limit];
    let mut filled = 0;
    while filled < limit {
        match files.read_at(file, &mut bytes[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Removes a file that may not be there.
pub(super) fn remove_if_there<F: Files>(files: &F, name: &str) -> io::Result<()> {
    match files.remove(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Puts a whole file in place of another, so that a crash leaves the one or the other; which one, says the directory's
/// next sync.
pub(super) fn replace<F: Files>(files: &F, name: &str, bytes: &[u8]) -> io::Result<()> {
    let tmp = format!("{name}.tmp");
    remove_if_there(files, &tmp)?;
    let file = files.create(&tmp)?;
    let written = write_all_at(files, &file, bytes, 0).and_then(|()| files.sync(&file));
    if written.is_err() {
        // On a full disk it would take the room from what can still be written.
        let _ = files.remove(&tmp);
    }
    written?;
    files.rename(&tmp, name)
}

/// A directory on disk, held by one process at a time.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    /// Open on the directory, for its lock.
    held: Mutex<Option<File>>,
}

impl Disk {
    /// The directory of this path; see [`Files::make_directory`].
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), held: Mutex::new(None) }
    }
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

impl Files for Disk {
    type File = Arc<File>;

    fn make_directory(&self) -> io::Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = &*held
            && std::fs::metadata(&self.path)
                .is_ok_and(|there| held.metadata().is_ok_and(|held| is_same(&held, &there)))
        {
            return Ok(());
        }
        if !self.path.is_dir() {
            std::fs::create_dir_all(&self.path)?;
            std::fs::set_permissions(&self.path, Permissions::from_mode(0o700))?;
            if let Some(parent) = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                File::open(parent)?.sync_all()?;
            }
        }
        let directory = File::open(&self.path)?;
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
        *held = Some(directory);
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            // A name that is not UTF-8 is none of ours.
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<Self::File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(self.path.join(name)).map(Into::into)
    }

    fn open(&self, name: &str) -> io::Result<Self::File> {
        File::open(self.path.join(name)).map(Into::into)
    }

    fn write_at(&self, file: &Self::File, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(&**file, bytes, offset)
    }

    fn read_at(&self, file: &Self::File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(&**file, bytes, offset)
    }

    fn sync(&self, file: &Self::File) -> io::Result<()> {
        file.sync_data()
    }

    fn sync_directory(&self) -> io::Result<()> {
        // By its path: what is held may have been removed and made again by somebody.
        File::open(&self.path)?.sync_all()
    }

    fn is_there(&self, file: &Self::File, name: &str) -> io::Result<bool> {
        match std::fs::metadata(self.path.join(name)) {
            Ok(there) => Ok(is_same(&file.metadata()?, &there)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }
}
