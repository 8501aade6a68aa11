//! One connection: what [`Session`] says is said, what the server says is taken in.

use std::time::Duration;

use netmon_common::wire::{
    self, About, BatchBuilder, FRAME_HEADER, FrameHeader, HEARTBEAT_NS, Hello, MAX_BATCH_RECORDS, MAX_FRAME,
    Open, ToAgent, ToServer,
};
use quinn::{RecvStream, SendStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::session::{Effect, Session, Step, Violation};
use super::{ANSWER, Enrolled, Sources, UplinkError, UplinkStatus, broken};
use crate::clock::Now;
use crate::renewal::Renewal;
use crate::trust::Trust;

/// Bytes of items for one batch: what [`BatchBuilder`] takes, with the lengths in front of them.
const BATCH_BYTES: usize = MAX_FRAME / 2 - 2 * MAX_BATCH_RECORDS as usize;

/// What a connection's conversation needs.
pub(super) struct Conversation<'a> {
    pub connection: &'a quinn::Connection,
    pub identity: &'a Enrolled<'a>,
    pub sources: &'a Sources,
    pub status: &'a watch::Sender<UplinkStatus>,
}

/// The part of a conversation beside the records.
struct Beside {
    trust: Trust,
    /// Heartbeats that wait for their answer.
    beats: u32,
    /// A key that waits for its certificate.
    renewal: Option<Renewal>,
    /// A certificate was asked for on this connection.
    asked: bool,
}

impl Conversation<'_> {
    /// Talks until something breaks. `connect`: how many connections this process made.
    pub async fn run(
        &self,
        connect: u32,
        on_welcome: &mut (dyn FnMut() + Send),
    ) -> Result<std::convert::Infallible, UplinkError> {
        let version = super::version(self.connection).ok_or(UplinkError::NoVersion)?;
        let opened = timeout(ANSWER, self.connection.open_bi()).await.map_err(|_| UplinkError::Stuck)?;
        let (mut send, receive) = opened.map_err(|error| broken(&error))?;
        // Reading a frame must not be interrupted half-way: it has a task of its own, which ends with the connection
        // or with the queue.
        let (queue, mut messages) = mpsc::channel(16);
        tokio::spawn(read_frames(receive, queue));
        let Sources { spool, heartbeat, .. } = self.sources;
        let (mut changes, mut heartbeat) = (spool.changes(), heartbeat.clone());
        let trust = Trust::load(self.identity.directory, &self.identity.identity.agent);
        let mut beside = Beside { trust, beats: 0, renewal: None, asked: false };
        if version > 1 {
            write(&mut send, &ToServer::About(self.about(connect, &beside.trust))).await?;
            heartbeat.mark_changed();
        }
        let mut beats = interval(Duration::from_nanos(HEARTBEAT_NS));
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut session = Session::new(version);
        let mut heard_ns = Now::read().boot_ns;
        // The spool had nothing to read where it seemed to have: until something changes, there is nothing to be sent.
        let mut bare = None;
        loop {
            changes.borrow_and_update();
            let is_waiting = session.expects_answer() || beside.beats > 0 || beside.renewal.is_some();
            if !is_waiting {
                heard_ns = Now::read().boot_ns;
            }
            let epochs = spool.epochs();
            match session.step(&epochs) {
                Step::Hello { epoch, oldest_seq, next_seq } => {
                    self.say_hello(&mut send, version, Open { epoch, oldest_seq, next_seq }).await?;
                }
                Step::Send { epoch, seq } if bare.as_ref() != Some(&epochs) => {
                    let is_sent = self.send_batch(&mut send, &mut session, epoch, seq).await?;
                    bare = (!is_sent).then_some(epochs);
                }
                Step::Send { .. } | Step::Wait => {
                    let silent = Duration::from_nanos(Now::read().boot_ns.saturating_sub(heard_ns));
                    let message = tokio::select! {
                        message = messages.recv() => message,
                        changed = changes.changed() => match changed {
                            Ok(()) => {
                                bare = None;
                                continue;
                            }
                            // The handle that we hold keeps the sender alive.
                            Err(_) => return Err(UplinkError::Broken("the spool is closed".into())),
                        },
                        _ = beats.tick(), if version > 1 => {
                            // One that stands still is not said again: the server is to notice.
                            if heartbeat.has_changed().unwrap_or(false) {
                                let beat = heartbeat.borrow_and_update().clone();
                                if beat.boot_ns == 0 {
                                    // It does not watch yet.
                                    continue;
                                }
                                write(&mut send, &ToServer::Heartbeat(beat)).await?;
                                beside.beats += 1;
                            }
                            continue;
                        }
                        () = sleep(ANSWER.saturating_sub(silent)), if is_waiting => {
                            return Err(UplinkError::Stuck);
                        }
                    };
                    let message =
                        message.unwrap_or_else(|| Err(UplinkError::Broken("the stream ended".into())))?;
                    heard_ns = Now::read().boot_ns;
                    let Some(message) = self.take_beside(&mut send, message, &mut beside).await? else {
                        continue;
                    };
                    if matches!(message, ToAgent::Welcome { .. } | ToAgent::Expect { .. }) {
                        on_welcome();
                    }
                    let effect = session.receive(message, &spool.epochs())?;
                    self.apply(&mut session, effect).await?;
                }
            }
        }
    }

    /// False: the spool has nothing there.
    async fn send_batch(
        &self,
        send: &mut SendStream,
        session: &mut Session,
        epoch: u64,
        seq: u64,
    ) -> Result<bool, UplinkError> {
        let chunk = self.sources.spool.read(epoch, seq, MAX_BATCH_RECORDS as usize, BATCH_BYTES).await?;
        let Some(chunk) = chunk else {
            // It was cut or gave way.
            return Ok(false);
        };
        let items = match session.fit(seq, chunk) {
            Ok(items) => items,
            Err(Step::Hello { epoch, oldest_seq, next_seq }) => {
                self.say_hello(send, session.version(), Open { epoch, oldest_seq, next_seq }).await?;
                return Ok(true);
            }
            Err(Step::Send { .. } | Step::Wait) => return Ok(false),
        };
        let mut batch = BatchBuilder::default();
        let span: u64 = items.iter().take_while(|item| batch.push(item)).map(wire::Item::span).sum();
        write(send, &ToServer::Batch(batch.finish(epoch, seq)?)).await?;
        session.sent(seq + span - 1);
        Ok(true)
    }

    async fn apply(&self, session: &mut Session, mut effect: Effect) -> Result<(), UplinkError> {
        let spool = &self.sources.spool;
        while let Effect::Compare { epoch, seq } = effect {
            let record = spool.record(epoch, seq).await?;
            effect = session.compared(record.map(|record| wire::fingerprint(&record)))?;
        }
        match effect {
            Effect::None | Effect::Compare { .. } => {}
            Effect::Acked { epoch, seq } => {
                spool.acked(epoch, seq).await;
                self.status.send_modify(|status| status.acked = Some((epoch, seq)));
            }
            Effect::LeaveEpoch { epoch, acked } => {
                tracing::warn!(
                    epoch = format_args!("{epoch:x}"),
                    acked,
                    "the server has other records under this epoch's numbers than the spool, which was set back, or has \
                     given them up: they get others"
                );
                spool.acked(epoch, acked).await;
                spool.begin_epoch(epoch).await?;
            }
            Effect::Refused(reason) => return Err(UplinkError::Refused(reason)),
        }
        Ok(())
    }

    /// Takes in what is not about records; gives back what is.
    async fn take_beside(
        &self,
        send: &mut SendStream,
        message: ToAgent,
        beside: &mut Beside,
    ) -> Result<Option<ToAgent>, UplinkError> {
        match message {
            ToAgent::Heard { server_ns, checkpoint } => {
                beside.beats = beside.beats.checked_sub(1).ok_or(Violation::Unasked)?;
                let identity = &self.identity.identity;
                if beside.trust.hear(server_ns, checkpoint)
                    && let Err(error) = beside.trust.store(self.identity.directory, &identity.agent)
                {
                    tracing::warn!(%error, "cannot keep what the server said of its time and its log");
                }
                if !beside.asked && identity.is_to_be_renewed(server_ns) {
                    beside.asked = true;
                    match Renewal::new() {
                        Ok(renewal) => {
                            let csr_der = renewal.csr_der().to_vec();
                            beside.renewal = Some(renewal);
                            write(send, &ToServer::Renew { csr_der }).await?;
                        }
                        Err(error) => tracing::error!(%error, "cannot ask for a new certificate"),
                    }
                }
                Ok(None)
            }
            ToAgent::Renewed { certificate_der } => {
                let renewal = beside.renewal.take().ok_or(Violation::Unasked)?;
                if certificate_der.is_empty() {
                    tracing::warn!("the server gives no new certificate now");
                } else if let Err(error) =
                    renewal.finish(&self.identity.identity, certificate_der, self.identity.directory)
                {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "cannot keep the new certificate"
                    );
                }
                // Whoever started this delivery notices the new identity and connects as that.
                Ok(None)
            }
            about_records => Ok(Some(about_records)),
        }
    }

    fn about(&self, connect: u32, trust: &Trust) -> About {
        let introduction = self.sources.introduction.clone();
        About {
            agent_version: introduction.agent_version,
            hostname: introduction.hostname,
            boot_id: introduction.boot_id,
            run: introduction.run,
            previous_died: introduction.previous_died,
            instance: introduction.instance,
            connect,
            // Nobody who wrote the server's history anew can know which one it will be.
            witness: trust.witness(getrandom::u64().unwrap_or_default()).cloned(),
        }
    }

    async fn say_hello(&self, send: &mut SendStream, version: u16, open: Open) -> Result<(), UplinkError> {
        if version > 1 {
            return write(send, &ToServer::Open(open)).await;
        }
        let Open { epoch, oldest_seq, .. } = open;
        let introduction = self.sources.introduction.clone();
        let (agent_version, hostname) = (introduction.agent_version, introduction.hostname);
        write(send, &ToServer::Hello(Hello { version, agent_version, hostname, epoch, oldest_seq })).await
    }
}

async fn write(send: &mut SendStream, message: &ToServer) -> Result<(), UplinkError> {
    let frame = wire::encode_frame(message)?;
    let written = timeout(ANSWER, send.write_all(&frame)).await;
    written.map_err(|_| UplinkError::Stuck)?.map_err(|error| broken(&error))
}

async fn read_frames(mut receive: RecvStream, queue: mpsc::Sender<Result<ToAgent, UplinkError>>) {
    loop {
        let message = read_frame(&mut receive).await;
        let is_last = message.is_err();
        if queue.send(message).await.is_err() || is_last {
            return;
        }
    }
}

async fn read_frame(receive: &mut RecvStream) -> Result<ToAgent, UplinkError> {
    let mut header = [0; FRAME_HEADER];
    receive.read_exact(&mut header).await.map_err(|error| broken(&error))?;
    let header = FrameHeader::parse(header)?;
    let mut payload = vec![0; header.length];
    receive.read_exact(&mut payload).await.map_err(|error| broken(&error))?;
    Ok(header.decode(&payload)?)
}
