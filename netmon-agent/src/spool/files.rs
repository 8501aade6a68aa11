//! The few things the spool asks of a directory: on disk, and in tests in memory with faults.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// One directory of files. Names are plain file names.
pub trait Files {
    /// An open file.
    type File: Clone;

    /// Names of all files.
    ///
    /// # Errors
    /// As the system has it; so for all the others.
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

/// Puts a whole file in place of another, so that a crash leaves the one or the other.
pub(super) fn replace<F: Files>(files: &F, name: &str, bytes: &[u8]) -> io::Result<()> {
    let tmp = format!("{name}.tmp");
    match files.remove(&tmp) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = files.create(&tmp)?;
    write_all_at(files, &file, bytes, 0)?;
    files.sync(&file)?;
    files.rename(&tmp, name)?;
    files.sync_directory()
}

/// A directory on disk, held by one process at a time.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    /// Open on the directory: for its lock and its fsync.
    directory: File,
}

impl Disk {
    /// Opens the directory, making it (0700) when it is missing, and locks it for this process.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::WouldBlock`] when another process holds it.
    pub fn open(path: &Path) -> io::Result<Self> {
        if !path.is_dir() {
            std::fs::create_dir_all(path)?;
            std::fs::set_permissions(path, Permissions::from_mode(0o700))?;
            if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                File::open(parent)?.sync_all()?;
            }
        }
        let directory = File::open(path)?;
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { path: path.to_owned(), directory })
    }
}

impl Files for Disk {
    type File = std::sync::Arc<File>;

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
        self.directory.sync_all()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }
}
