//! The enrolment listener: one request, one reply, and a PC is an agent.

use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use netmon_common::enroll::{Granted, Reply, Request};
use netmon_common::raw::{Escaped, Raw};
use quinn::{Connection, Endpoint, Incoming, SendStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::admission::{Gate, Place, Places};
use crate::ca::{AgentKey, Ca, uuid_from};
use crate::clock::{self, Now};
use crate::collector::{REFUSALS_TIME, stopping};
use crate::frames::{self, FrameError};
use crate::limits::ENROLMENT_CALLS;
use crate::store::{self, Enrolled, Newcomer};
use crate::tls::{escaped, shown};
use crate::writer::Writer;

/// Longest request, in bytes: a signing request, two names, and room.
pub const MAX_REQUEST: usize = 8 * 1024;
/// PCs that enrol at once; others try again.
const MAX_CONNECTIONS: usize = 256;
/// PCs that enrol at once from one IP address: usually there is one behind it.
const MAX_CONNECTIONS_PER_ADDRESS: usize = 8;
/// From the first packet to the end of the request.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// From the first packet to the end.
const TOTAL_TIME: Duration = Duration::from_secs(15);

/// What enrolment needs.
pub struct Enrollment {
    /// Signs.
    pub ca: Arc<Ca>,
    /// Stores.
    pub writer: Writer,
    /// Where the agents are to deliver.
    pub event_port: u16,
    /// For times in messages.
    pub zone: TimeZone,
}

impl Enrollment {
    /// Enrols PCs until `stop` becomes true.
    pub async fn run(self: Arc<Self>, endpoint: Endpoint, mut stop: watch::Receiver<bool>) {
        let gate = Gate::new(
            "enrolment",
            Places { per_address: MAX_CONNECTIONS_PER_ADDRESS, total: MAX_CONNECTIONS, reserved: 0 },
            ENROLMENT_CALLS,
        );
        let mut tasks = JoinSet::new();
        loop {
            let incoming = tokio::select! {
                () = stopping(&mut stop) => break,
                Some(_) = tasks.join_next() => continue,
                () = sleep(REFUSALS_TIME), if gate.has_unsaid() => { gate.say_refusals(clock::wall_ns()); continue }
                incoming = endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            if let Some((incoming, place)) = gate.admit(incoming, true, Now::read()) {
                let this = self.clone();
                tasks.spawn(async move {
                    let address = shown(incoming.remote_address());
                    match timeout(TOTAL_TIME, this.serve(incoming, &place)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => {
                            tracing::info!(%address, reason = %escaped(error), "enrolment failed");
                        }
                        Err(_) => tracing::info!(%address, "enrolment took too long"),
                    }
                });
            }
        }
        // Nobody is left half enrolled: what was committed is enrolled, the rest tries again.
        tasks.shutdown().await;
    }

    async fn serve(
        &self,
        incoming: Incoming,
        place: &Place,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let address = shown(incoming.remote_address());
        // Dropped when it takes too long, and so closed.
        let received =
            timeout(REQUEST_TIME, receive(incoming)).await.map_err(|_| "no request came in time")??;
        let Some((connection, mut send, request)) = received else { return Ok(()) };
        let hostname = request.hostname.clone();
        let reply = self.decide(request).await;
        match &reply {
            Reply::Granted(granted) => {
                place.vouch(granted.agent);
                tracing::info!(
                    %address, seat = %granted.seat.escaped(), hostname = %hostname.escaped(), "agent enrolled"
                );
            }
            Reply::Refused { reason } => tracing::warn!(
                %address, reason = %Escaped(reason.as_bytes()), hostname = %hostname.escaped(), "enrolment refused"
            ),
        }
        frames::write(&mut send, &reply).await?;
        send.finish()?;
        // Returns when the PC has it all, or is gone.
        let _ = send.stopped().await;
        connection.close(0_u8.into(), b"done");
        Ok(())
    }

    async fn decide(&self, request: Request) -> Reply {
        match self.enrol(request).await {
            Ok(granted) => Reply::Granted(granted),
            Err(reason) => Reply::Refused { reason: Raw::new(reason) },
        }
    }

    async fn enrol(&self, request: Request) -> Result<Granted, String> {
        let key = AgentKey::from_request(&request.csr_der).map_err(|error| error.to_string())?;
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|_| "the server has no random numbers".to_owned())?;
        // A key that asks again (the reply was lost) keeps the number that it has.
        let spki_sha256 = key.spki_sha256();
        let known = self.writer.run(None, move |conn| store::agent_by_key(conn, &spki_sha256)).await;
        let known = known.map_err(|error| error.to_string())?;
        let agent = known.map_or_else(|| uuid_from(random), |known| known.uuid);
        let now_ns = clock::wall_ns();
        let now = Duration::from_nanos(u64::try_from(now_ns).unwrap_or_default());
        // Signed before the token is used up: a failure here costs the token nothing.
        let certificate_der = self.ca.issue_agent(&key, &agent, now).map_err(|error| {
            tracing::error!(%error, "cannot sign");
            "the server cannot sign certificates; its own log says why".to_owned()
        })?;
        let newcomer = Newcomer {
            token_id: request.token_id,
            secret: request.secret,
            uuid: agent,
            spki_sha256,
            hostname: request.hostname.as_bytes().to_vec(),
            wanted_seat: request.seat.as_bytes().to_vec(),
        };
        let zone = self.zone.clone();
        let work = move |conn: &rusqlite::Connection| store::enrol(conn, &newcomer, now_ns, &zone);
        match self.writer.run(None, work).await.map_err(|error| error.to_string())? {
            Enrolled::Refused(reason) => Err(reason),
            Enrolled::As { seat, renamed } => {
                if renamed.is_some() {
                    tracing::info!(seat, "a revoked agent's label goes to a newcomer");
                    // Its log moves before the newcomer can connect and write one there.
                    self.writer.run(renamed, |_| Ok(())).await.map_err(|error| error.to_string())?;
                }
                Ok(Granted {
                    agent,
                    certificate_der,
                    ca_der: self.ca.der().to_vec(),
                    event_port: self.event_port,
                    seat: Raw::new(seat),
                })
            }
        }
    }
}

/// A connection and its one request; `None` when the peer had none.
async fn receive(
    incoming: Incoming,
) -> Result<Option<(Connection, SendStream, Request)>, Box<dyn std::error::Error + Send + Sync>> {
    let connection = incoming.accept()?.await?;
    let (send, mut recv) = connection.accept_bi().await?;
    match frames::read::<Request>(&mut recv, MAX_REQUEST).await {
        Ok(request) => Ok(request.map(|request| (connection, send, request))),
        Err(error) => {
            if matches!(error, FrameError::Wire(_) | FrameError::Slow) {
                connection.close(2_u8.into(), error.to_string().as_bytes());
            }
            Err(error.into())
        }
    }
}
