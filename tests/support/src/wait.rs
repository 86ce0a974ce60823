//! Waiting for a condition, with a deadline; never for a duration.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

/// How long anything may take before a test gives up. Far more than it takes: machines are shared.
pub const DEADLINE: Duration = Duration::from_secs(20);

const POLL: Duration = Duration::from_millis(10);

/// The future's output, or a panic that says what did not come.
pub async fn within<T>(what: impl Debug, limit: Duration, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what:?}: not within {limit:?}"),
    }
}

/// Asks until the answer is `Some`.
pub async fn eventually<T, F>(what: impl Debug, mut ask: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let start = Instant::now();
    loop {
        if let Some(found) = ask().await {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "{what:?}: not within {DEADLINE:?}");
        tokio::time::sleep(POLL).await;
    }
}
