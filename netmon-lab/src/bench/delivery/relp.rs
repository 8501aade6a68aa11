//! A client of RELP, rsyslog's protocol with acknowledgements: as little of it as a load takes.
//!
//! A frame is `TXNR SP COMMAND SP LENGTH [SP DATA] LF`. The server answers each with a `rsp` frame of the same number.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// Messages on their way at once, as rsyslog's own client (`windowSize`).
const WINDOW: usize = 128;
/// Messages per write.
const CHUNK: usize = 64;

/// An open connection.
pub struct Client {
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
    number: u64,
    /// Bytes that were sent and received.
    pub wire_bytes: u64,
}

impl Client {
    /// Connects and opens the conversation.
    ///
    /// # Errors
    /// The server is not there, or does not speak RELP.
    pub async fn open(address: SocketAddr) -> Result<Self> {
        let (read, write) = TcpStream::connect(address).await?.into_split();
        let mut client = Self { read: BufReader::new(read), write, number: 0, wire_bytes: 0 };
        let offers = "relp_version=0\nrelp_software=netmon-lab\ncommands=syslog";
        let frame = client.frame("open", offers);
        client.write(frame.as_bytes()).await?;
        client.response().await?;
        Ok(client)
    }

    /// Sends a message for each line as host `host`, and returns when the last one is acknowledged.
    ///
    /// # Errors
    /// The server refuses one, or is gone.
    pub async fn deliver(&mut self, host: &str, lines: &[String]) -> Result<()> {
        let mut waiting = 0;
        for chunk in lines.chunks(CHUNK) {
            let mut text = String::new();
            for line in chunk {
                let time = line.split(' ').next().unwrap_or_default();
                text += &self.frame("syslog", &format!("<134>1 {time} {host} netmon - - - {line}"));
            }
            self.write(text.as_bytes()).await?;
            waiting += chunk.len();
            while waiting > WINDOW - CHUNK {
                self.response().await?;
                waiting -= 1;
            }
        }
        for _ in 0..waiting {
            self.response().await?;
        }
        Ok(())
    }

    fn frame(&mut self, command: &str, data: &str) -> String {
        self.number += 1;
        format!("{} {command} {} {data}\n", self.number, data.len())
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.wire_bytes += bytes.len() as u64;
        Ok(self.write.write_all(bytes).await?)
    }

    async fn response(&mut self) -> Result<()> {
        let mut head = Vec::new();
        self.read.read_until(b' ', &mut head).await?;
        self.read.read_until(b' ', &mut head).await?;
        let mut length = Vec::new();
        // Without data, the line ends behind the length: no blank comes before the next frame's.
        loop {
            let byte = self.read.read_u8().await?;
            if byte == b' ' || byte == b'\n' {
                self.wire_bytes += (head.len() + length.len() + 1) as u64;
                if byte == b'\n' {
                    return Ok(());
                }
                break;
            }
            length.push(byte);
        }
        ensure!(head.ends_with(b" rsp "), "no RELP response: {:?}", String::from_utf8_lossy(&head));
        let length: usize = std::str::from_utf8(&length)?.parse().context("length of a RELP response")?;
        // The data and the line end.
        let mut data = vec![0; length.min(64 * 1024) + 1];
        self.read.read_exact(&mut data).await?;
        self.wire_bytes += data.len() as u64;
        ensure!(data.starts_with(b"200"), "RELP refused: {:?}", String::from_utf8_lossy(&data));
        Ok(())
    }
}
