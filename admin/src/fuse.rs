//! For the tests of crashes: in a debug build, the process can be made to end at its n-th effect on the world, as by
//! `kill -9`. A release build has no such thing.

#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts down what is left.
#[derive(Debug, Default)]
pub struct Fuse {
    #[cfg(debug_assertions)]
    left: Option<AtomicU64>,
}

impl Fuse {
    /// Burns down at the n-th effect, counted from 1.
    #[cfg(debug_assertions)]
    #[must_use]
    pub fn of(effects: Option<u64>) -> Self {
        Self { left: effects.map(AtomicU64::new) }
    }

    /// Before every effect of a job.
    #[cfg(debug_assertions)]
    pub fn burn(&self) {
        let Some(left) = &self.left else { return };
        if left.fetch_sub(1, Relaxed) <= 1 {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
            // The signal is on its way; nothing more may happen.
            loop {
                std::thread::park();
            }
        }
    }

    #[cfg(not(debug_assertions))]
    pub fn burn(&self) {
        let _ = self;
    }
}
