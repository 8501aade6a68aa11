//! rsyslog: RELP in, a file per host out.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use super::relp::Client;
use super::server::{bytes_below, interrupt};
use super::throughput::Measured;
use crate::bench::process::cpu_of_group;
use crate::clock;
use crate::netmon::Daemon;
use crate::wait;

/// For the files to be complete behind the last acknowledgement.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// What is in memory: rsyslog's default.
    Memory,
    /// What is in a queue on disk and synced.
    Synced,
}

/// A running rsyslog.
struct Rsyslog {
    directory: PathBuf,
    address: SocketAddr,
    daemon: Daemon,
}

/// Delivers `lines` for each of `hosts`, and waits until they are in the files.
///
/// # Errors
/// rsyslog does not start, refuses, or loses lines.
pub fn measure(directory: &Path, queue: Queue, hosts: usize, lines: &[String]) -> Result<Measured> {
    let mut rsyslog = Rsyslog::start(directory, queue)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let address = rsyslog.address;
    let mut clients: Vec<Client> = Vec::new();
    for _ in 0..hosts {
        clients.push(runtime.block_on(Client::open(address))?);
    }
    let (began, before) = (clock::now(), rsyslog.cpu()?);
    let lines: std::sync::Arc<[String]> = lines.into();
    let wire = runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for (number, mut client) in clients.into_iter().enumerate() {
            let lines = lines.clone();
            tasks.spawn(async move {
                let opened = client.wire_bytes;
                client.deliver(&format!("pc-{}", number + 1), &lines).await?;
                Ok::<_, anyhow::Error>((client.wire_bytes - opened, client))
            });
        }
        tasks.join_all().await.into_iter().collect::<Result<Vec<_>>>()
    })?;
    // The message begins behind a blank, which is kept.
    let expected: u64 = lines.iter().map(|line| line.len() as u64 + 1).sum::<u64>() * hosts as u64;
    let files = directory.join("logs");
    let complete =
        wait::until(PATIENCE, "the files to be complete", || (bytes_below(&files) >= expected).then_some(()));
    let took = began.elapsed();
    let cpu = rsyslog.cpu()? - before;
    let disk = bytes_below(&files);
    ensure!(complete.is_ok(), "rsyslog wrote {disk} of {expected} bytes:\n{}", rsyslog.daemon.said());
    let events = (hosts * lines.len()) as u64;
    let wire = wire.iter().map(|(bytes, _)| bytes).sum();
    rsyslog.stop()?;
    Ok(Measured { events, took, cpu, wire: Some(wire), store: None, logs: Some(disk) })
}

impl Rsyslog {
    fn start(directory: &Path, queue: Queue) -> Result<Self> {
        fs::create_dir_all(directory.join("queue"))?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let configuration = directory.join("rsyslog.conf");
        fs::write(&configuration, rules(directory, queue, address.port()))?;
        let mut command = Command::new("rsyslogd");
        command.arg("-n").arg("-f").arg(&configuration).arg("-i").arg(directory.join("pid")).process_group(0);
        let mut daemon =
            Daemon::start(format!("rsyslogd, {queue:?}"), command, &directory.join("output.txt"))?;
        daemon.wait_until("it to listen", || TcpStream::connect(address).is_ok())?;
        Ok(Self { directory: directory.to_owned(), address, daemon })
    }

    fn cpu(&self) -> Result<Duration> {
        Ok(cpu_of_group(self.daemon.pid())?)
    }

    fn stop(&mut self) -> Result<()> {
        interrupt(&self.daemon)?;
        self.daemon.wait_end()?;
        Ok(fs::remove_dir_all(&self.directory)?)
    }
}

/// rsyslog.conf(5). 512 files stay open: there are fewer hosts.
fn rules(directory: &Path, queue: Queue, port: u16) -> String {
    let directory = directory.display();
    let queue = match queue {
        Queue::Memory => String::new(),
        Queue::Synced => format!(
            "queue.type=\"Disk\" queue.filename=\"queue\" queue.spoolDirectory=\"{directory}/queue\" \
             queue.checkpointInterval=\"1\" queue.syncQueueFiles=\"on\" queue.maxDiskSpace=\"8g\""
        ),
    };
    format!(
        "global(workDirectory=\"{directory}/queue\")\n\
         module(load=\"imrelp\")\n\
         template(name=\"file\" type=\"string\" string=\"{directory}/logs/%HOSTNAME%/log.txt\")\n\
         template(name=\"line\" type=\"string\" string=\"%msg%\\n\")\n\
         ruleset(name=\"hosts\" {queue}) {{\n\
           action(type=\"omfile\" dynaFile=\"file\" template=\"line\" dynaFileCacheSize=\"512\")\n\
         }}\n\
         input(type=\"imrelp\" address=\"127.0.0.1\" port=\"{port}\" ruleset=\"hosts\")\n"
    )
}
