//! What systemd is told (sd_notify(3)): when the server listens, that it goes on, and when it ends. A server that hangs
//! is restarted (`WatchdogSec=`).

use sd_notify::NotifyState;

/// Says that the server listens and, as often as systemd wants it, that its tasks run. The writing thread is not asked:
/// when it dies the server ends, and where it waits for a disk a restart would do no better.
pub async fn report() {
    tell(NotifyState::Ready).await;
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else { return };
    loop {
        tell(NotifyState::Watchdog).await;
        tokio::time::sleep(limit / 3).await;
    }
}

/// Says that the server ends, because it was told to.
pub async fn stopping() {
    tell(NotifyState::Stopping).await;
}

/// Does nothing where nobody wants to know (no `NOTIFY_SOCKET`).
async fn tell(word: NotifyState<'static>) {
    // Blocks where systemd does not listen.
    let told = tokio::task::spawn_blocking(move || sd_notify::notify(&[word])).await;
    if let Ok(Err(error)) = told {
        tracing::warn!(%error, "cannot tell systemd how the server is");
    }
}
