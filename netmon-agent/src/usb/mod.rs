//! USB: devices that come and go, and what USB disks read and write.
//!
//! [`message`], [`devices`], [`functions`], [`disks`], [`mounts`], [`stack`], [`volumes`] and [`mounted`] decide and do no I/O;
//! [`monitor`] (libudev), [`sampler`] and [`sysfs`] fetch;
//! `follower` moves data between them on a thread of its own, because libudev's types stay on their thread.
//! [`watch`] starts it.

pub mod devices;
pub mod disks;
pub mod fanotify;
pub mod files;
mod follower;
pub mod functions;
pub mod marker;
pub mod message;
pub mod metadata;
pub mod monitor;
pub mod mounted;
pub mod mounts;
pub mod processes;
pub mod recording;
pub mod sampler;
pub mod stack;
pub mod sysfs;
pub mod users;
pub mod volumes;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use netmon_common::model::{Disk, Event};
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::mpsc;

use disks::DiskActivity;
use recording::FileNames;

/// How much may wait.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of messages that may wait in the kernel. More than that while the agent is held up: messages are lost, the
    /// devices are listed anew, and the gap is reported.
    pub receive_buffer: usize,
    /// Outputs that may wait for [`UsbWatch::next`]. When they do, messages wait in the kernel.
    pub queue: usize,
    /// Whether it is recorded which files of USB disks are read and written.
    pub files: FileNames,
}

impl Default for Options {
    /// 16 MiB hold 8,000 messages and more: beyond a room full of hubs plugged in at once. The kernel takes the memory
    /// only while messages wait.
    fn default() -> Self {
        Self { receive_buffer: 16 << 20, queue: 1024, files: FileNames::default() }
    }
}

/// What the watch has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsbOutput {
    /// A device or a file system is present, came or went; what the kernel made of a device; or a gap.
    Event {
        /// When it was seen, boot clock.
        boot_ns: u64,
        /// What.
        event: Event,
    },
    /// A USB disk did something, or is quiet after that.
    Disk(DiskActivity),
    /// A USB disk is gone; nothing more will come of it.
    DiskGone {
        /// When it was seen, boot clock.
        boot_ns: u64,
        /// Which disk.
        disk: Disk,
    },
    /// Whether devices are being followed from now on. `true` comes after the events of the devices that are present.
    Watching(bool),
}

/// Why USB cannot be watched at all.
#[derive(Debug, thiserror::Error)]
pub enum UsbError {
    /// No eventfd.
    #[error("cannot create the signal that stops the USB watch")]
    Signal(#[source] io::Error),
    /// No thread.
    #[error("cannot start the thread of the USB watch")]
    Thread(#[source] io::Error),
}

/// A running watch. Dropping it stops the thread and waits for its end, which takes some milliseconds.
#[derive(Debug)]
pub struct UsbWatch {
    outputs: mpsc::Receiver<UsbOutput>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// Starts to watch.
///
/// When the kernel refuses what watching takes, the watch says `Watching(false)` and a gap, and tries again until it
/// succeeds.
///
/// # Errors
/// [`UsbError`] when the thread cannot be started.
pub fn watch(options: Options) -> Result<UsbWatch, UsbError> {
    let (sender, outputs) = mpsc::channel(options.queue.max(1));
    let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| UsbError::Signal(errno.into()))?;
    let stop = Arc::new(stop);
    let stopped = Arc::clone(&stop);
    let thread = thread::Builder::new()
        .name("usb".into())
        .spawn(move || follower::Follower::new(options, sender, stopped).run())
        .map_err(UsbError::Thread)?;
    Ok(UsbWatch { outputs, stop, thread: Some(thread) })
}

impl UsbWatch {
    /// The next output. Cancel safe. `None` when the thread has died, which it does not do on its own: USB is then
    /// no longer watched.
    pub async fn next(&mut self) -> Option<UsbOutput> {
        self.outputs.recv().await
    }

    /// Asks the watch to end: what waits comes out of [`UsbWatch::next`] first, then `None`.
    pub fn end(&self) {
        // Fails only when the counter is full, and then it is signalled already.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
    }
}

impl Drop for UsbWatch {
    fn drop(&mut self) {
        // Frees the thread where it waits for room in the queue ...
        self.outputs.close();
        // ... and where it waits for messages.
        self.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the USB watch panicked");
        }
    }
}
