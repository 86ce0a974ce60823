//! Monotonic time in whole milliseconds since the process started.
//!
//! Deadlines never read the wall clock: it jumps. Pure files get a `Millis` as an argument and read no clock at all.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

/// A moment: milliseconds since the process started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Millis(pub u64);

impl Millis {
    /// This moment. Costs one clock read: call it once per wake-up, not per message.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
    pub fn now() -> Self {
        // The first call fixes the origin.
        static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
        Self(u64::try_from(ORIGIN.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    #[must_use]
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// Tells time in which the process ran from time in which it did not (SIGSTOP, a suspended machine).
///
/// Nobody is late by such a pause alone: what arrived meanwhile is looked at first, deadlines at the next tick.
#[derive(Debug)]
pub struct Pulse {
    last: Millis,
    passed_over: bool,
}

impl Pulse {
    /// Ticks come ten times a second; one this late means that nothing ran.
    const PAUSE: u64 = 1000;

    #[must_use]
    pub fn new(now: Millis) -> Self {
        Self { last: now, passed_over: false }
    }

    /// At every tick; false for the first one after a pause, and never twice in a row.
    #[must_use]
    pub fn beat(&mut self, now: Millis) -> bool {
        let elapsed = now.0.saturating_sub(self.last.0);
        self.last = now;
        // Where every tick is late there is no pause to speak of, only too little CPU.
        self.passed_over = elapsed >= Self::PAUSE && !self.passed_over;
        !self.passed_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_tick_after_a_pause_is_passed_over() {
        let mut pulse = Pulse::new(Millis(100));
        assert!(pulse.beat(Millis(200)) && pulse.beat(Millis(900)));
        assert!(!pulse.beat(Millis(60_900)));
        assert!(pulse.beat(Millis(61_000)));
        assert!(!pulse.beat(Millis(63_000)) && pulse.beat(Millis(65_000)), "where every tick is late");
    }
}
