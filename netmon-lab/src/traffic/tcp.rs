//! Copies over TCP, in both directions at once.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use super::plan::{Plan, Step};
use super::{Connect, MAX_BYTES, Report, Serve};
use crate::clock;

const CHUNK: usize = 64 * 1024;

pub(super) fn serve(serve: &Serve, reply: u64) -> io::Result<()> {
    serve.begin();
    let listener = TcpListener::bind(serve.listen)?;
    serve.ready()?;
    let reply = Plan(vec![Step::Send(reply.min(MAX_BYTES))]);
    // Connections are served side by side: overlapping copies overlap.
    thread::scope(|scope| {
        let mut served = Vec::new();
        for _ in 0..serve.connections {
            let (stream, _) = listener.accept()?;
            let reply = &reply;
            served.push(scope.spawn(move || both_ways(&stream, reply, None)?.print()));
        }
        served.into_iter().try_for_each(|served| {
            served.join().map_err(|_| io::Error::other("a connection's thread died"))?
        })
    })
}

pub(super) fn copy(connect: &Connect, plan: &Plan, rate: Option<u64>) -> io::Result<Report> {
    connect.begin();
    both_ways(&TcpStream::connect(connect.to)?, plan, rate)
}

/// Sends the plan and says that this is all, while reading all that comes.
fn both_ways(stream: &TcpStream, plan: &Plan, rate: Option<u64>) -> io::Result<Report> {
    stream.set_nodelay(true)?;
    thread::scope(|scope| {
        let reader = scope.spawn(|| drain(stream));
        let sent = send(stream, plan, rate)?;
        stream.shutdown(Shutdown::Write)?;
        let received = reader.join().map_err(|_| io::Error::other("the reader's thread died"))??;
        Ok(Report { sent, received })
    })
}

fn send(mut stream: &TcpStream, plan: &Plan, rate: Option<u64>) -> io::Result<u64> {
    let chunk: Vec<u8> = (0..CHUNK).map(|i| i as u8).collect();
    let mut sent = 0;
    for step in &plan.0 {
        match *step {
            Step::Pause(pause) => thread::sleep(pause),
            Step::Send(bytes) => {
                let (began, before) = (clock::now(), sent);
                while sent - before < bytes {
                    if let Some(rate) = rate {
                        let due = Duration::from_secs_f64((sent - before) as f64 / rate.max(1) as f64);
                        thread::sleep(due.saturating_sub(began.elapsed()));
                    }
                    let left = usize::try_from(bytes - (sent - before)).unwrap_or(CHUNK).min(CHUNK);
                    stream.write_all(&chunk[..left])?;
                    sent += left as u64;
                }
            }
        }
    }
    Ok(sent)
}

fn drain(stream: &TcpStream) -> io::Result<u64> {
    io::copy(&mut stream.take(MAX_BYTES), &mut io::sink())
}
