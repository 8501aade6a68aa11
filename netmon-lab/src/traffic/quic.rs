//! QUIC (RFC 9000): one connection, one stream, a body of a given length.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context as _;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, Incoming, ServerConfig, VarInt};

use super::{Connect, Identity, MAX_BYTES, Report, Serve, tls};

const REQUEST: &[u8] = b"GET /file";
/// Longest request, in bytes.
const MAX_REQUEST: usize = 1_024;
const CHUNK: usize = 64 * 1024;

pub(super) fn serve(serve: &Serve, identity: &Identity, size: u64) -> anyhow::Result<()> {
    serve.begin();
    runtime()?.block_on(async {
        let (certificate, key) = tls::make(identity)?;
        let config = ServerConfig::with_single_cert(vec![certificate], key)?;
        let endpoint = Endpoint::server(config, serve.listen)?;
        serve.ready()?;
        for _ in 0..serve.connections {
            let incoming = endpoint.accept().await.context("the endpoint is closed")?;
            answer(incoming, size.min(MAX_BYTES)).await?.print()?;
        }
        endpoint.wait_idle().await;
        Ok(())
    })
}

pub(super) fn get(connect: &Connect, identity: &Identity) -> anyhow::Result<Report> {
    connect.begin();
    runtime()?.block_on(async {
        let any: IpAddr =
            if connect.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let mut endpoint = Endpoint::client(SocketAddr::new(any, 0))?;
        let config = QuicClientConfig::try_from(tls::client(identity)?)?;
        endpoint.set_default_client_config(ClientConfig::new(Arc::new(config)));
        let connection = endpoint.connect(connect.to, &identity.name)?.await?;
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(REQUEST).await?;
        send.finish()?;
        let mut received = 0;
        while let Some(chunk) = receive.read_chunk(CHUNK, true).await? {
            received += chunk.bytes.len() as u64;
            anyhow::ensure!(received <= MAX_BYTES, "the server does not stop sending");
        }
        connection.close(VarInt::from_u32(0), b"done");
        endpoint.wait_idle().await;
        Ok(Report { sent: REQUEST.len() as u64, received })
    })
}

async fn answer(incoming: Incoming, size: u64) -> anyhow::Result<Report> {
    let connection = incoming.await?;
    let (mut send, mut receive) = connection.accept_bi().await?;
    let request = receive.read_to_end(MAX_REQUEST).await?;
    let chunk = vec![b'x'; CHUNK];
    let mut left = size;
    while left > 0 {
        let next = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        send.write_all(&chunk[..next]).await?;
        left -= next as u64;
    }
    send.finish()?;
    // The client closes the connection when it has everything.
    connection.closed().await;
    Ok(Report { sent: size, received: request.len() as u64 })
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
