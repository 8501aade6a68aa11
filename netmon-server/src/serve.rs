//! `netmon-server run`: puts the parts together, and takes them apart in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use jiff::tz::TimeZone;
use netmon_common::{enroll, wire};
use notify::{RecursiveMode, Watcher as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::clock::Now;
use crate::collector::Collector;
use crate::datadir::{DataDir, make_dir};
use crate::enrollment::Enrollment;
use crate::presence::Presence;
use crate::seatlogs::SeatLogs;
use crate::store::{self, Store};
use crate::tls::{self, Listener};
use crate::writer::Writer;

/// For close frames to leave after everything is committed.
const GOODBYE_TIME: Duration = Duration::from_secs(1);

/// Runs the server until SIGTERM or SIGINT. Everything that can be wrong with directory, store and ports is
/// found before the first agent is let in.
///
/// # Errors
/// What is wrong, with what to do about it.
pub fn run(
    data: &DataDir,
    listen: Option<SocketAddr>,
    enroll_listen: Option<SocketAddr>,
) -> anyhow::Result<()> {
    data.check_initialised()?;
    if let Some(address) = listen.filter(|address| address.port() != 0 && enroll_listen == Some(*address)) {
        bail!("--listen and --enroll-listen are both {address}; give them different ports");
    }
    let _lock = data.lock()?;
    let ca = Arc::new(data.ca()?);
    let now = Now::read();
    let log_key = data.log_key(&ca, Duration::from_nanos(u64::try_from(now.wall_ns).unwrap_or_default()))?;
    let (certificate, key) = data.server_identity()?;
    let mut store = Store::open_to_write(&data.store())?;
    store.write(|tx| store::forget_connections(tx)).map_err(|error| {
        let hint = store::hint(&error);
        anyhow::Error::new(error)
            .context(format!("cannot write the store {}; {hint}", data.store().display()))
    })?;
    let known = store::known(store.conn())
        .with_context(|| format!("cannot read the store {}", data.store().display()))?;
    let presence = Presence::new(now, known);
    make_dir(&data.logs())?;
    make_dir(&data.control())?;
    let events = Listener { what: "events", option: "--listen", address: listen, port: wire::DEFAULT_PORT };
    let enrolment = Listener {
        what: "enrolment",
        option: "--enroll-listen",
        address: enroll_listen,
        port: enroll::DEFAULT_PORT,
    };
    let (event_socket, enrolment_socket) = (events.bind()?, enrolment.bind()?);

    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    runtime.block_on(async {
        let event_endpoint =
            tls::event_endpoint(event_socket, ca.der(), certificate.clone(), key.clone_key())?;
        let enrolment_endpoint = tls::enrolment_endpoint(enrolment_socket, ca.der(), certificate, key)?;
        let (event_address, enrolment_address) =
            (event_endpoint.local_addr()?, enrolment_endpoint.local_addr()?);

        // Before anybody can call: a signal from now on ends the server in good order.
        let mut terminate = signal(SignalKind::terminate()).context("cannot receive SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot receive SIGINT")?;
        let allow_list_changed = Arc::new(Notify::new());
        let _watcher = watch_allow_list(data, allow_list_changed.clone());
        let logs = SeatLogs::new(data.logs(), TimeZone::system());
        let (writer, writing) = Writer::spawn(data.store(), store, logs, tokio::runtime::Handle::current())
            .context("cannot start the writing thread")?;
        let (stop, stopped) = watch::channel(false);
        let collector = Arc::new(Collector::new(writer.clone(), ca.clone(), log_key, presence));
        let collecting =
            tokio::spawn(collector.run(event_endpoint.clone(), stopped.clone(), allow_list_changed));
        let enrollment = Enrollment {
            ca,
            writer: writer.clone(),
            event_port: event_address.port(),
            zone: TimeZone::system(),
        };
        let enrolling = tokio::spawn(Arc::new(enrollment).run(enrolment_endpoint.clone(), stopped));
        tracing::info!(
            "netmon-server listening: events udp {event_address}, enrolment udp {enrolment_address}"
        );

        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            // Who stores nothing must not look alive: the reason is below, at the thread's end.
            () = writer.ended() => tracing::error!("the writing thread ended: nothing can be stored"),
        }
        drop(writer);
        tracing::info!("stopping");
        // Conversations end after the batch at hand; with the last of them the writer has no more work.
        stop.send_replace(true);
        collecting.await.context("the event listener failed")?;
        enrolling.await.context("the enrolment listener failed")?;
        for endpoint in [&event_endpoint, &enrolment_endpoint] {
            endpoint.close(0_u8.into(), b"the server is stopping");
        }
        tokio::task::spawn_blocking(move || writing.join())
            .await?
            .map_err(|_| anyhow::anyhow!("the writing thread failed"))?;
        let goodbye = async { tokio::join!(event_endpoint.wait_idle(), enrolment_endpoint.wait_idle()) };
        // Who does not answer now finds out by its own idle timeout.
        let _ = timeout(GOODBYE_TIME, goodbye).await;
        tracing::info!("stopped; everything acknowledged is in the store");
        Ok(())
    })
}

/// Notifies when `revoke` has touched the control directory. Where inotify has nothing left to give, a revoked
/// agent is cut off at its next batch instead.
fn watch_allow_list(data: &DataDir, changed: Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let on_event = move |event: notify::Result<notify::Event>| {
        // An error may hide a change: looking once too often costs nothing.
        if event.map_or(true, |event| !event.kind.is_access()) {
            changed.notify_one();
        }
    };
    let watch = || {
        let mut watcher = notify::recommended_watcher(on_event)?;
        watcher.watch(&data.control(), RecursiveMode::NonRecursive)?;
        Ok::<_, notify::Error>(watcher)
    };
    let result = watch();
    if let Err(error) = &result {
        let path = data.control();
        tracing::warn!(%error, path = %path.display(), "cannot watch: revoked agents go at their next batch");
    }
    result.ok()
}
