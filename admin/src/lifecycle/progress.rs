//! What a long step tells of itself: once a second at most.

use std::time::Duration;

use tokio::time::Instant;

use super::Site;

const EVERY: Duration = Duration::from_secs(1);

/// Of one part of a step.
pub struct Progress {
    job: i64,
    last: Option<Instant>,
}

impl Progress {
    pub fn of(job: i64) -> Self {
        Self { job, last: None }
    }

    /// Unless it is too early. A catalog that is away is told nothing.
    pub async fn tell(&mut self, site: &Site, text: impl FnOnce() -> String + Send) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < EVERY) {
            return;
        }
        self.last = Some(now);
        let text = text();
        if let Err(error) = site.plane.catalog.progress(self.job, &text).await {
            tracing::debug!(%error, "progress is not written down");
        }
    }
}

/// In MiB, with one decimal.
pub fn mib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_mib_with_one_decimal() {
        assert_eq!((mib(0), mib(12_897_484), mib(1 << 30)), ("0.0".into(), "12.2".into(), "1024.0".into()));
    }
}
