//! Waiting for a condition of another process.

use std::thread;
use std::time::Duration;

use crate::clock;

/// How often a condition is looked at.
const PAUSE: Duration = Duration::from_millis(5);

/// The condition did not come about in time.
#[derive(Debug, thiserror::Error)]
#[error("waited {waited:?} in vain for {what}")]
pub struct Timeout {
    /// What was awaited.
    pub what: String,
    /// For how long.
    pub waited: Duration,
}

/// Looks at `condition` until it yields something, at most for `limit`.
///
/// # Errors
/// [`Timeout`] names `what` did not happen.
pub fn until<T>(
    limit: Duration,
    what: impl Into<String>,
    mut condition: impl FnMut() -> Option<T>,
) -> Result<T, Timeout> {
    let end = clock::now() + limit;
    loop {
        // The condition is looked at once more behind the limit: a slow machine must not turn yes into no.
        let late = clock::now() >= end;
        if let Some(value) = condition() {
            return Ok(value);
        }
        if late {
            return Err(Timeout { what: what.into(), waited: limit });
        }
        thread::sleep(PAUSE);
    }
}

/// Waits until `value` yields the same thing for `quiet` without a change, at most for `limit`.
///
/// # Errors
/// [`Timeout`] when it kept changing.
pub fn unchanged<T: PartialEq>(
    quiet: Duration,
    limit: Duration,
    what: impl Into<String>,
    mut value: impl FnMut() -> T,
) -> Result<T, Timeout> {
    let mut known = value();
    let mut since = clock::now();
    until(limit, what, || {
        let seen = value();
        if seen != known {
            known = seen;
            since = clock::now();
            return None;
        }
        (since.elapsed() >= quiet).then_some(())
    })?;
    Ok(known)
}
