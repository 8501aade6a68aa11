//! The server's directory: what lies where, how it comes into being, who may use it.
//!
//! ```text
//! ca.pem ca-key.pem            the CA; written last, so its presence means "initialised"
//! server.pem server-key.pem    the server's own certificate
//! log.pem log-key.pem          signs how long each history is
//! store.sqlite                 every event, the agents, the tokens
//! logs/<seat>/log.txt usb.log  readable logs, derived from the store: delete them and they are written anew
//! control/allow-list           touched when an agent is revoked, so that a running server looks at once
//! lock                         says which server runs; the directory itself is what it locks
//! ```

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::io::Errno;
use rustix::process::{Flock, FlockOffsetType, FlockType, Pid, fcntl_getlk};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::ca::{Ca, CaError};
use crate::signing::{LogKey, SigningError};
use crate::store::{Store, StoreError};

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// `init` has nothing to do here.
    #[error("already initialised at {0}, nothing changed")]
    AlreadyInitialised(PathBuf),
    /// Everything but `init` needs what `init` makes.
    #[error(
        "not initialised: there is no netmon server in {0}; make one with `netmon-server --data {0} init`"
    )]
    NotInitialised(PathBuf),
    /// Another server uses it.
    #[error("another netmon-server (process {pid}) is running on {path}; stop it first")]
    Running {
        /// The directory.
        path: PathBuf,
        /// Its process number.
        pid: String,
    },
    /// A file or directory could not be made.
    #[error("cannot write {path}; {hint}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {path}; {hint}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// A certificate or key file is damaged.
    #[error("{path} is damaged; bring it back from a backup")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: rustls::pki_types::pem::Error,
    },
    /// The CA.
    #[error("the certificate authority in {path}")]
    Ca {
        /// The directory.
        path: PathBuf,
        /// Cause.
        source: CaError,
    },
    /// The key that signs checkpoints.
    #[error("{path} cannot be used; bring it back from a backup")]
    LogKey {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: SigningError,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The server's directory.
#[derive(Clone, Debug)]
pub struct DataDir(PathBuf);

/// Held while a server runs; the lock ends with the process, however that ends.
#[derive(Debug)]
pub struct RunLock(#[expect(dead_code, reason = "the open files hold the locks")] [File; 2]);

impl DataDir {
    /// The directory at `path`, whether it exists or not.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.0.join("store.sqlite")
    }

    /// The seats' logs.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// What other processes touch to be noticed.
    pub fn control(&self) -> PathBuf {
        self.0.join("control")
    }

    /// Makes a new server: CA, certificate, store. A run that was cut off before its end can be repeated.
    ///
    /// # Errors
    /// [`DataDirError::AlreadyInitialised`] leaves everything as it was.
    pub fn init(&self, now: Duration) -> Result<(), DataDirError> {
        if self.is_initialised()? {
            return Err(DataDirError::AlreadyInitialised(self.0.clone()));
        }
        make_dir(&self.0)?;
        let _lock = self.lock()?;
        let ca_error = |source| DataDirError::Ca { path: self.0.clone(), source };
        let pair = Ca::generate(now).map_err(ca_error)?;
        let certificate_path = self.0.join("ca.pem");
        let certificate = parse_pem(&certificate_path, &pair.certificate_pem)?;
        let ca = Ca::load(&pair.key_pem, certificate).map_err(ca_error)?;
        let server = ca.issue_server(now).map_err(ca_error)?;
        // Of a run that was cut off: its CA is not this one.
        for path in <[PathBuf; 2]>::from(self.log_key_paths()) {
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(DataDirError::Write { path, hint: hint(&source), source });
                }
                _ => {}
            }
        }
        self.make_log_key(&ca, now)?;
        Store::create(&self.store())?.close();
        make_dir(&self.logs())?;
        make_dir(&self.control())?;
        write_file(&self.0.join("server-key.pem"), server.key_pem.as_bytes(), 0o600)?;
        write_file(&self.0.join("server.pem"), server.certificate_pem.as_bytes(), 0o644)?;
        write_file(&self.0.join("ca-key.pem"), pair.key_pem.as_bytes(), 0o600)?;
        write_file(&certificate_path, pair.certificate_pem.as_bytes(), 0o644)
    }

    /// Fails unless [`DataDir::init`] came to its end here.
    ///
    /// # Errors
    /// [`DataDirError::NotInitialised`], or the directory cannot be looked at.
    pub fn check_initialised(&self) -> Result<(), DataDirError> {
        if self.is_initialised()? { Ok(()) } else { Err(DataDirError::NotInitialised(self.0.clone())) }
    }

    fn is_initialised(&self) -> Result<bool, DataDirError> {
        let path = self.0.join("ca.pem");
        path.try_exists().map_err(|source| DataDirError::Read { path, hint: hint(&source), source })
    }

    /// The CA with its key.
    ///
    /// # Errors
    /// A file is missing or damaged.
    pub fn ca(&self) -> Result<Ca, DataDirError> {
        let certificate_path = self.0.join("ca.pem");
        let certificate = parse_pem(&certificate_path, &read_text(&certificate_path)?)?;
        let key = read_text(&self.0.join("ca-key.pem"))?;
        Ca::load(&key, certificate).map_err(|source| DataDirError::Ca { path: self.0.clone(), source })
    }

    /// The server's own certificate and key.
    ///
    /// # Errors
    /// A file is missing or damaged.
    pub fn server_identity(&self) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), DataDirError> {
        let certificate_path = self.0.join("server.pem");
        let key_path = self.0.join("server-key.pem");
        let certificate = parse_pem(&certificate_path, &read_text(&certificate_path)?)?;
        let key = PrivateKeyDer::from_pem_slice(read_text(&key_path)?.as_bytes())
            .map_err(|source| DataDirError::Pem { path: key_path, source })?;
        Ok((certificate, key))
    }

    /// The key that signs the histories' checkpoints.
    ///
    /// # Errors
    /// A file is missing or damaged, or the two do not belong together.
    pub fn log_key(&self) -> Result<LogKey, DataDirError> {
        let (certificate_path, key_path) = self.log_key_paths();
        let certificate = parse_pem(&certificate_path, &read_text(&certificate_path)?)?;
        LogKey::load(&read_text(&key_path)?, certificate)
            .map_err(|source| DataDirError::LogKey { path: key_path, source })
    }

    /// [`DataDir::log_key`], made when there is none: for `init`, and for a server that holds the lock, which an older
    /// version may have made without one. Where one of the two files is missing, nothing is made in its place.
    ///
    /// # Errors
    /// As there, or a file cannot be made.
    pub fn make_log_key(&self, ca: &Ca, now: Duration) -> Result<LogKey, DataDirError> {
        let (certificate_path, key_path) = self.log_key_paths();
        let is_there = |path: &Path| {
            path.try_exists().map_err(|source| DataDirError::Read {
                path: path.to_owned(),
                hint: hint(&source),
                source,
            })
        };
        if !is_there(&certificate_path)? && !is_there(&key_path)? {
            let pair =
                ca.issue_log(now).map_err(|source| DataDirError::Ca { path: self.0.clone(), source })?;
            write_file(&certificate_path, pair.certificate_pem.as_bytes(), 0o644)?;
            write_file(&key_path, pair.key_pem.as_bytes(), 0o600)?;
        }
        self.log_key()
    }

    fn log_key_paths(&self) -> (PathBuf, PathBuf) {
        (self.0.join("log.pem"), self.0.join("log-key.pem"))
    }

    /// Takes the directory for this process: the directory itself, which no cleaning up takes away. To be called once
    /// in a process: the lock on the file `lock` beside it, which names the process to others, is a record lock.
    ///
    /// # Errors
    /// [`DataDirError::Running`] when another one has it.
    pub fn lock(&self) -> Result<RunLock, DataDirError> {
        let directory = File::open(&self.0).map_err(|source| DataDirError::Read {
            path: self.0.clone(),
            hint: hint(&source),
            source,
        })?;
        let path = self.lock_path();
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let pid = File::open(&path).ok().and_then(|file| holder(&file));
                let pid = pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                return Err(DataDirError::Running { path: self.0.clone(), pid });
            }
            Err(error) => {
                let source = io::Error::from(error);
                return Err(DataDirError::Write { path: self.0.clone(), hint: hint(&source), source });
            }
        }
        let write_error = |source| DataDirError::Write { path: path.clone(), hint: hint(&source), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(write_error)?;
        match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(RunLock([directory, file])),
            Err(Errno::AGAIN | Errno::ACCESS) => {
                let pid = holder(&file).map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                Err(DataDirError::Running { path: self.0.clone(), pid })
            }
            Err(error) => Err(write_error(error.into())),
        }
    }

    /// Does a server run here? Asks without taking the lock, so it is in nobody's way.
    pub fn is_running(&self) -> bool {
        match File::open(self.lock_path()) {
            Ok(file) => holder(&file).is_some(),
            // Somebody deleted it. Whoever holds the directory does not let it be shared, even for this moment.
            Err(_) => File::open(&self.0).is_ok_and(|file| {
                flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
            }),
        }
    }

    fn lock_path(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// Tells a running server that the allow-list changed.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn announce_revocation(&self, now_ns: i64) -> Result<(), DataDirError> {
        make_dir(&self.control())?;
        write_file(&self.control().join("allow-list"), format!("{now_ns}\n").as_bytes(), 0o600)
    }
}

/// Makes a directory, and those above it, for the server's user only.
///
/// # Errors
/// [`DataDirError::Write`].
pub fn make_dir(path: &Path) -> Result<(), DataDirError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| DataDirError::Write {
        path: path.into(),
        hint: hint(&source),
        source,
    })
}

/// The process that holds the lock, if it is another one.
fn holder(file: &File) -> Option<i32> {
    let wanted =
        Flock { start: 0, length: 0, pid: None, typ: FlockType::ReadLock, offset_type: FlockOffsetType::Set };
    let held = fcntl_getlk(file, &wanted).ok().flatten()?;
    held.pid.map(Pid::as_raw_pid)
}

/// What to do about an error on a file.
pub fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "run it as root, or as the user who owns the directory",
        io::ErrorKind::ReadOnlyFilesystem => "the file system is mounted read-only; choose another --data",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "the disk is full; make room there",
        io::ErrorKind::NotFound => "it is missing: choose another --data, or bring it back from a backup",
        io::ErrorKind::NotADirectory => "a part of the path is not a directory; choose another --data",
        _ => "check the path and the disk",
    }
}

fn parse_pem(path: &Path, text: &str) -> Result<CertificateDer<'static>, DataDirError> {
    CertificateDer::from_pem_slice(text.as_bytes())
        .map_err(|source| DataDirError::Pem { path: path.into(), source })
}

fn read_text(path: &Path) -> Result<String, DataDirError> {
    std::fs::read_to_string(path).map_err(|source| DataDirError::Read {
        path: path.into(),
        hint: hint(&source),
        source,
    })
}

/// Writes a file as a whole: after a crash it is there with all its content, or not.
fn write_file(path: &Path, content: &[u8], mode: u32) -> Result<(), DataDirError> {
    let new = path.with_added_extension("new");
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().map_err(|source| DataDirError::Write { path: path.into(), hint: hint(&source), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_795_392_000);

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn init_makes_a_server_whose_keys_only_its_user_reads() {
        let temporary = tempfile::tempdir().unwrap();
        let data = DataDir::new(temporary.path().join("a/b"));
        assert!(matches!(data.check_initialised(), Err(DataDirError::NotInitialised(_))));
        data.init(NOW).unwrap();
        data.check_initialised().unwrap();
        assert_eq!(mode(data.path()), 0o700);
        assert_eq!(mode(&data.path().join("ca-key.pem")), 0o600);
        assert_eq!(mode(&data.path().join("server-key.pem")), 0o600);
        assert_eq!(mode(&data.store()), 0o600);
        assert_eq!(mode(&data.logs()), 0o700);
        data.ca().unwrap();
        data.server_identity().unwrap();
    }

    #[test]
    fn init_changes_nothing_where_a_server_is() {
        let temporary = tempfile::tempdir().unwrap();
        let data = DataDir::new(temporary.path());
        data.init(NOW).unwrap();
        let before = data.ca().unwrap().spki_sha256();
        assert!(matches!(data.init(NOW), Err(DataDirError::AlreadyInitialised(_))));
        assert_eq!(data.ca().unwrap().spki_sha256(), before);
    }

    #[test]
    fn init_that_was_cut_off_can_be_repeated() {
        let temporary = tempfile::tempdir().unwrap();
        let data = DataDir::new(temporary.path());
        data.init(NOW).unwrap();
        std::fs::remove_file(data.path().join("ca.pem")).unwrap();
        assert!(matches!(data.check_initialised(), Err(DataDirError::NotInitialised(_))));
        data.init(NOW).unwrap();
        data.ca().unwrap();
    }
}
