//! The filter list in force, and the file that it comes from.
//!
//! A file that changes is read again once it rests: somebody may be writing it in place, and half a list could be
//! a good one that means something else. A bad one is refused, and the last good list stays in force: while the
//! agent runs, and, from a copy in the state directory, also when it starts.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use netmon_common::prefixes::{MAX_FILE, PrefixError, PrefixList};

/// The list that came with this netmon.
const BUILT_IN: &str = include_str!("../../ip.txt");

/// Why a list cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The file cannot be read.
    #[error("cannot read the filter list {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line is wrong.
    #[error("the filter list {}, {problem}", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// Which line, and what to write.
        problem: PrefixError,
    },
    /// The last line may be half a line: `192.0.0.0/1` of `192.0.0.0/16`.
    #[error(
        "the filter list {}, the last line has no line end: is the file still being written?",
        file.display()
    )]
    Torn {
        /// The file.
        file: PathBuf,
    },
}

/// Follows one filter list.
#[derive(Debug)]
pub struct FilterFile {
    file: Option<PathBuf>,
    last_good: PathBuf,
    /// The version that was read last; `None`: there was no file.
    read: Option<Identity>,
    /// The version that the last poll saw.
    polled: Option<Identity>,
}

/// Tells one version of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

impl From<Metadata> for Identity {
    fn from(metadata: Metadata) -> Self {
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Self { inode: metadata.ino(), length: metadata.len(), changed }
    }
}

/// A list at the agent's start.
#[derive(Debug)]
pub struct AtStart {
    /// The list in force.
    pub list: PrefixList,
    /// Set when the file was refused and the last good list is in force instead.
    pub refused: Option<FilterError>,
}

impl FilterFile {
    /// Follows `file`, or uses the list that came with this netmon. `state` keeps the last good list.
    pub fn new(file: Option<PathBuf>, state: &Path) -> Self {
        Self { file, last_good: state.join("ip.txt.last-good"), read: None, polled: None }
    }

    /// The list to start with.
    ///
    /// # Errors
    /// [`FilterError`] when the file is bad and there is no last good list either.
    pub fn start(&mut self) -> Result<AtStart, FilterError> {
        let error = match self.read() {
            Ok(list) => return Ok(AtStart { list, refused: None }),
            Err(error) => error,
        };
        match std::fs::read_to_string(&self.last_good).ok().map(|text| PrefixList::parse(&text)) {
            Some(Ok(list)) => Ok(AtStart { list, refused: Some(error) }),
            _ => Err(error),
        }
    }

    /// A new list, or why it was refused, if the file changed since it was read and the poll before this one saw
    /// the same change: call it once a second, so that a file which is being written is left alone meanwhile. Costs
    /// one `stat`.
    pub fn poll(&mut self) -> Option<Result<PrefixList, FilterError>> {
        let now = std::fs::metadata(self.file.as_ref()?).ok().map(Identity::from);
        let before = std::mem::replace(&mut self.polled, now);
        (now != self.read && now == before).then(|| self.read())
    }

    /// The list as it stands in the file, without keeping anything.
    ///
    /// # Errors
    /// [`FilterError`].
    pub fn check(&self) -> Result<PrefixList, FilterError> {
        self.parse().map(|(list, _)| list)
    }

    /// Where the list comes from, for people.
    pub fn source(&self) -> String {
        match &self.file {
            Some(file) => file.display().to_string(),
            None => "the list that came with this netmon".to_owned(),
        }
    }

    fn read(&mut self) -> Result<PrefixList, FilterError> {
        // Before reading, so that a change while reading is seen next time.
        self.read = self.file.as_ref().and_then(|file| std::fs::metadata(file).ok()).map(Identity::from);
        self.polled = self.read;
        let (list, text) = self.parse()?;
        if self.file.is_some()
            && let Err(error) = keep(&self.last_good, &text)
        {
            tracing::warn!(%error, file = %self.last_good.display(), "cannot keep a copy of the filter list");
        }
        Ok(list)
    }

    fn parse(&self) -> Result<(PrefixList, String), FilterError> {
        let (file, text) = match &self.file {
            Some(file) => {
                let text =
                    read_bounded(file).map_err(|source| FilterError::Read { file: file.clone(), source })?;
                (file.clone(), text)
            }
            None => (PathBuf::from("ip.txt (built in)"), BUILT_IN.to_owned()),
        };
        match PrefixList::parse(&text) {
            Err(problem) => Err(FilterError::Line { file, problem }),
            Ok(_) if !text.is_empty() && !text.ends_with('\n') => Err(FilterError::Torn { file }),
            Ok(list) => Ok((list, text)),
        }
    }
}

fn read_bounded(file: &Path) -> io::Result<String> {
    use io::Read;
    let mut text = String::new();
    std::fs::File::open(file)?.take(MAX_FILE as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

fn keep(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_added_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[a]\n192.0.2.0/24\n";

    fn setup(text: &str) -> (tempfile::TempDir, PathBuf, FilterFile) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ip.txt");
        std::fs::write(&file, text).unwrap();
        let filter = FilterFile::new(Some(file.clone()), directory.path());
        (directory, file, filter)
    }

    /// As an editor does it: a new file in the old one's place.
    fn replace(file: &Path, text: &str) {
        let new = file.with_extension("tmp");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, file).unwrap();
    }

    #[test]
    fn a_changed_file_is_read_again_and_an_unchanged_one_is_not() {
        let (_directory, file, mut filter) = setup(GOOD);
        assert_eq!(filter.start().unwrap().list.len(), 1);
        assert!(filter.poll().is_none());
        replace(&file, "[a]\n192.0.2.0/24\n198.51.100.0/24\n");
        assert!(filter.poll().is_none());
        assert_eq!(filter.poll().unwrap().unwrap().len(), 2);
        assert!(filter.poll().is_none());
    }

    #[test]
    fn a_bad_file_is_refused_once_with_its_name_and_line() {
        let (_directory, file, mut filter) = setup(GOOD);
        filter.start().unwrap();
        replace(&file, "[a]\nnonsense\n");
        assert!(filter.poll().is_none());
        let error = filter.poll().unwrap().unwrap_err().to_string();
        assert!(error.contains("ip.txt, line 2: `nonsense` is not a prefix"), "{error}");
        assert!(filter.poll().is_none());
        std::fs::remove_file(&file).unwrap();
        assert!(filter.poll().is_none());
        assert!(matches!(filter.poll(), Some(Err(FilterError::Read { .. }))));
    }

    #[test]
    fn a_file_that_is_being_written_in_place_is_left_alone_until_it_rests() {
        let (_directory, file, mut filter) = setup(GOOD);
        filter.start().unwrap();
        for part in ["", "[a]\n", "[a]\n128.0.0.0/1", "[a]\n128.0.0.0/16\n"] {
            std::fs::write(&file, part).unwrap();
            assert!(filter.poll().is_none(), "{part:?}");
        }
        assert_eq!(filter.poll().unwrap().unwrap().len(), 1);
    }

    #[test]
    fn a_last_line_without_its_end_is_refused_whenever_it_is_read() {
        let (directory, file, mut filter) = setup("[a]\n128.0.0.0/1");
        let said = |error: FilterError| error.to_string();
        let expected = format!(
            "the filter list {}, the last line has no line end: is the file still being written?",
            file.display()
        );
        assert_eq!(said(filter.check().unwrap_err()), expected);
        assert_eq!(said(filter.start().unwrap_err()), expected);
        replace(&file, GOOD);
        let mut filter = FilterFile::new(Some(file.clone()), directory.path());
        filter.start().unwrap();
        replace(&file, "[a]\n128.0.0.0/1");
        assert!(filter.poll().is_none());
        assert_eq!(said(filter.poll().unwrap().unwrap_err()), expected);
    }

    #[test]
    fn after_a_restart_the_last_good_list_is_in_force() {
        let (directory, file, mut filter) = setup(GOOD);
        filter.start().unwrap();
        replace(&file, "[a]\nnonsense\n");
        let start = FilterFile::new(Some(file.clone()), directory.path()).start().unwrap();
        assert_eq!(start.list.len(), 1);
        assert!(start.refused.is_some());
    }

    #[test]
    fn without_a_good_list_there_is_an_error_and_the_built_in_list_is_good() {
        let (directory, _file, mut filter) = setup("nonsense");
        assert!(filter.start().is_err());
        assert!(FilterFile::new(None, directory.path()).start().unwrap().list.len() > 4_000);
    }
}
