//! Memory that clients may make us hold, over all of them: what PostgreSQL calls "out of memory" is an answer, not an end.
//!
//! What always holds: what is held was taken first, and is given back when its `Held` is dropped; nobody waits for it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// A limit in bytes, and how much of it is taken.
#[derive(Debug, Default)]
pub struct Memory {
    limit: AtomicUsize,
    held: AtomicUsize,
}

/// Bytes that were taken; given back when dropped.
#[derive(Debug)]
pub struct Held {
    memory: Arc<Memory>,
    bytes: usize,
}

impl Memory {
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit: AtomicUsize::new(limit), held: AtomicUsize::new(0) }
    }

    /// For what is taken from now on.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Relaxed);
    }

    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Relaxed)
    }

    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.load(Relaxed)
    }

    /// `None` if that much is not left.
    #[must_use]
    pub fn take(self: &Arc<Self>, bytes: usize) -> Option<Held> {
        let fits = |held: usize| held.checked_add(bytes).filter(|sum| *sum <= self.limit());
        self.held.fetch_update(Relaxed, Relaxed, fits).ok()?;
        Some(Held { memory: Arc::clone(self), bytes })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.memory.held.fetch_sub(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_stays_within_the_limit_and_comes_back() {
        let memory = Arc::new(Memory::new(100));
        let sixty = memory.take(60).expect("60 of 100");
        assert!(memory.take(41).is_none() && memory.take(usize::MAX).is_none());
        let forty = memory.take(40).expect("40 of the 40 left");
        drop(sixty);
        assert_eq!(memory.held(), 40);
        memory.set_limit(30);
        assert!(memory.take(1).is_none(), "the new limit is exceeded already");
        drop(forty);
        assert_eq!(memory.held(), 0);
    }
}
