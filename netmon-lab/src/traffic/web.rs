//! HTTP/1.1 (RFC 9112): one request a connection, a body of a given length. Over TCP, and over TLS.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection, StreamOwned};

use super::{Connect, Identity, MAX_BYTES, Report, Serve, tls};

/// Longest head of a request or answer, in bytes.
const MAX_HEAD: u64 = 8 * 1024;

pub(super) fn serve(serve: &Serve, size: u64) -> anyhow::Result<()> {
    serve.begin();
    let listener = TcpListener::bind(serve.listen)?;
    serve.ready()?;
    for _ in 0..serve.connections {
        answer(listener.accept()?.0, size)?.print()?;
    }
    Ok(())
}

pub(super) fn serve_tls(serve: &Serve, identity: &Identity, size: u64) -> anyhow::Result<()> {
    serve.begin();
    let config = Arc::new(tls::server(identity)?);
    let listener = TcpListener::bind(serve.listen)?;
    serve.ready()?;
    for _ in 0..serve.connections {
        let connection = ServerConnection::new(Arc::clone(&config))?;
        let mut stream = StreamOwned::new(connection, listener.accept()?.0);
        let report = answer(&mut stream, size)?;
        stream.conn.send_close_notify();
        stream.flush()?;
        report.print()?;
    }
    Ok(())
}

pub(super) fn get(connect: &Connect) -> anyhow::Result<Report> {
    connect.begin();
    fetch(TcpStream::connect(connect.to)?, &connect.to.to_string())
}

pub(super) fn get_tls(connect: &Connect, identity: &Identity) -> anyhow::Result<Report> {
    connect.begin();
    let name = ServerName::try_from(identity.name.clone())?;
    let connection = ClientConnection::new(Arc::new(tls::client(identity)?), name)?;
    fetch(StreamOwned::new(connection, TcpStream::connect(connect.to)?), &identity.name)
}

/// Reads one request and answers it.
fn answer<S: Read + Write>(stream: S, size: u64) -> anyhow::Result<Report> {
    let mut stream = BufReader::new(stream);
    let received = head(&mut stream)?.len() as u64;
    let size = size.min(MAX_BYTES);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n");
    let mut out = stream.into_inner();
    out.write_all(head.as_bytes())?;
    io::copy(&mut io::repeat(b'x').take(size), &mut out)?;
    out.flush()?;
    Ok(Report { sent: head.len() as u64 + size, received })
}

/// Sends one request and reads its answer.
fn fetch<S: Read + Write>(mut stream: S, host: &str) -> anyhow::Result<Report> {
    let request = format!("GET /file HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    let mut stream = BufReader::new(stream);
    let head = head(&mut stream)?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "the server answered {head:?}");
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let length: u64 = length.context("the answer has no Content-Length")?.parse()?;
    let body = io::copy(&mut stream.take(length.min(MAX_BYTES)), &mut io::sink())?;
    ensure!(body == length, "the body ended after {body} of {length} bytes");
    Ok(Report { sent: request.len() as u64, received: head.len() as u64 + body })
}

/// The head of a message, with the empty line that ends it.
fn head(stream: &mut impl BufRead) -> anyhow::Result<String> {
    let mut head = String::new();
    let mut stream = stream.take(MAX_HEAD);
    while !head.ends_with("\r\n\r\n") {
        ensure!(
            stream.read_line(&mut head)? > 0,
            "the head of the message is cut off or longer than {MAX_HEAD} bytes"
        );
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_without_an_end_is_refused() {
        assert!(head(&mut &b"GET / HTTP/1.1\r\nHost: x\r\n"[..]).is_err());
        let endless = "a".repeat(1 << 20) + "\r\n\r\n";
        assert!(head(&mut endless.as_bytes()).is_err());
        assert_eq!(head(&mut &b"GET / HTTP/1.1\r\n\r\nbody"[..]).unwrap(), "GET / HTTP/1.1\r\n\r\n");
    }
}
