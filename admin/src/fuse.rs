//! For the tests of crashes: in a debug build, the process can be made to end at its n-th effect on the world, as by
//! `kill -9`. A release build has no such thing.

#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::catalog::store::JobRow;
#[cfg(debug_assertions)]
use crate::jobs::work::JobState;

/// Counts down what is left.
#[derive(Debug, Default)]
pub struct Fuse {
    #[cfg(debug_assertions)]
    left: Option<AtomicU64>,
    /// Only effects of jobs of this kind count, or (`back`) of the way back of any; and only of jobs that began after we did.
    #[cfg(debug_assertions)]
    word: Option<(String, time::OffsetDateTime)>,
}

#[cfg(debug_assertions)]
tokio::task_local! {
    /// Whether the effects of this task do not count.
    static SPARED: bool;
}

impl Fuse {
    /// Burns down at the n-th effect, counted from 1.
    #[cfg(debug_assertions)]
    #[must_use]
    pub fn of(effects: Option<u64>, word: Option<String>) -> Self {
        Self { left: effects.map(AtomicU64::new), word: word.map(|word| (word, time::OffsetDateTime::now_utc())) }
    }

    /// Does the work of a job; whether its effects count depends on the job.
    #[cfg(debug_assertions)]
    pub async fn watch<T>(&self, job: &JobRow, work: impl Future<Output = T>) -> T {
        let counts = self.word.as_ref().is_none_or(|(word, since)| {
            let fits = if word == "back" { job.state == JobState::Undoing } else { word == job.work.kind() };
            fits && job.created_at > *since
        });
        SPARED.scope(!counts, work).await
    }

    #[cfg(not(debug_assertions))]
    pub async fn watch<T>(&self, job: &JobRow, work: impl Future<Output = T>) -> T {
        let _ = (self, job);
        work.await
    }

    /// Before every effect of a job.
    #[cfg(debug_assertions)]
    pub fn burn(&self) {
        let Some(left) = &self.left else { return };
        if SPARED.try_with(|spared| *spared).unwrap_or(false) {
            return;
        }
        if left.fetch_sub(1, Relaxed) <= 1 {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
            // The signal is on its way; nothing more may happen.
            loop {
                std::thread::park();
            }
        }
    }

    /// Before an effect on a rollout of this kind, which is no job's.
    #[cfg(debug_assertions)]
    pub fn burn_of(&self, kind: &str, created_at: time::OffsetDateTime) {
        if self.word.as_ref().is_none_or(|(word, since)| word == kind && created_at > *since) {
            self.burn();
        }
    }

    #[cfg(not(debug_assertions))]
    pub fn burn_of(&self, kind: &str, created_at: time::OffsetDateTime) {
        let _ = (self, kind, created_at);
    }

    #[cfg(not(debug_assertions))]
    pub fn burn(&self) {
        let _ = self;
    }
}
