//! The queue of one pool: first come, first served.
//!
//! Waiters are numbered in the order they came, so the queue is an ordered map: the head is the first, and one that
//! leaves from the middle (cancelled, vanished) costs no scan. Pure.

use std::collections::BTreeMap;

use crate::clock::Millis;

/// A session's place in a queue; numbers are never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaiterId(pub u64);

#[derive(Debug, Default)]
pub struct Queue {
    waiting: BTreeMap<WaiterId, Millis>,
}

impl Queue {
    pub fn join(&mut self, waiter: WaiterId, now: Millis) {
        self.waiting.insert(waiter, now);
    }

    /// Takes the first.
    pub fn take_first(&mut self) -> Option<WaiterId> {
        self.waiting.pop_first().map(|(waiter, _)| waiter)
    }

    /// False if it is not here any more.
    pub fn leave(&mut self, waiter: WaiterId) -> bool {
        self.waiting.remove(&waiter).is_some()
    }

    /// The first and since when it waits.
    #[must_use]
    pub fn oldest(&self) -> Option<(WaiterId, Millis)> {
        self.waiting.first_key_value().map(|(w, since)| (*w, *since))
    }

    /// Since when it waits.
    #[must_use]
    pub fn since(&self, waiter: WaiterId) -> Option<Millis> {
        self.waiting.get(&waiter).copied()
    }

    /// How many came before it.
    #[must_use]
    pub fn before(&self, waiter: WaiterId) -> usize {
        self.waiting.range(..waiter).count()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Everybody, in order; the queue is empty afterwards.
    pub fn drain(&mut self) -> impl Iterator<Item = WaiterId> {
        std::mem::take(&mut self.waiting).into_keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_come_first_served_also_when_one_leaves() {
        let mut queue = Queue::default();
        for n in 0..4 {
            queue.join(WaiterId(n), Millis(n));
        }
        assert!(queue.leave(WaiterId(1)) && !queue.leave(WaiterId(1)));
        let order: Vec<_> = std::iter::from_fn(|| queue.take_first()).collect();
        assert_eq!(order, [WaiterId(0), WaiterId(2), WaiterId(3)]);
    }
}
