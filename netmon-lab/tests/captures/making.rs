//! Making captures.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use netmon_lab::{host::Host, wait};
use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(20);
/// A recorder that wrote nothing for this long has written all: tcpdump looks at its buffer every second at least.
const QUIET: Duration = Duration::from_millis(1_500);

/// A directory for captures. Those of a test that failed are worth a look: they stay.
pub struct Directory(Option<tempfile::TempDir>);

impl Directory {
    pub fn new() -> Self {
        Self(Some(tempfile::tempdir().unwrap()))
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.as_ref().unwrap().path().join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let kept = self.0.take().map(tempfile::TempDir::keep);
            eprintln!("the captures are kept in {}", kept.unwrap_or_default().display());
        }
    }
}

/// A pcap file with these frames, written by text2pcap; `format` is one of its `-F`.
pub fn text2pcap(path: &Path, format: &str, link: u32, frames: &[Vec<u8>]) {
    let mut dump = String::new();
    for frame in frames {
        for (row, bytes) in frame.chunks(16).enumerate() {
            dump += &format!("{:06x}", row * 16);
            bytes.iter().for_each(|byte| dump += &format!(" {byte:02x}"));
            dump += "\n";
        }
    }
    let mut child = Command::new("text2pcap")
        .args(["-q", "-F", format, "-l", &link.to_string(), "-"])
        .arg(path)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(dump.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A pcap file with these frames, byte for byte.
pub fn pcap(path: &Path, link: u32, frames: &[Vec<u8>]) {
    const LONGEST: u32 = 262_144;
    let mut file = Vec::new();
    for number in [0xa1b2_c3d4, 4 << 16 | 2, 0, 0, LONGEST, link] {
        file.extend(u32::to_le_bytes(number));
    }
    for frame in frames {
        let length = u32::try_from(frame.len()).unwrap();
        for number in [0, 0, length, length] {
            file.extend(number.to_le_bytes());
        }
        file.extend(frame);
    }
    fs::write(path, file).unwrap();
}

/// A program that records what passes an interface of a host.
pub struct Recorder {
    child: Child,
    file: PathBuf,
}

impl Recorder {
    /// Starts it in the host, and returns when it records. It writes to `file`, behind its option `-w`.
    pub fn start(host: &Host, command: &[&str], file: PathBuf) -> Self {
        let mut child = host
            .command(command[0])
            .args(&command[1..])
            .arg("-w")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        // tcpdump, then dumpcap.
        while !said.contains("listening on") && !said.contains("File:") {
            let length = stderr.read_line(&mut said).unwrap();
            assert_ne!(length, 0, "{command:?} does not record: {said}");
        }
        // It may go on to talk.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        Self { child, file }
    }

    /// Ends it when it has written all that it has seen.
    pub fn stop(mut self) -> PathBuf {
        let length = || fs::metadata(&self.file).map_or(0, |file| file.len());
        wait::unchanged(QUIET, PATIENCE, "the recorder to write all", length).unwrap();
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{}: {status}", self.file.display());
        self.file.clone()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
