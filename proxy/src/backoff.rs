//! Pauses after failures that grow while it goes on failing. Pure.

use crate::clock::Millis;

/// No pause at first; then `first`, doubled with each further failure up to `longest`. Failures inside a pause are one
/// and the same: attempts that were under way together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backoff {
    pause: u64,
    until: Millis,
}

impl Backoff {
    /// It failed; times in milliseconds.
    pub fn fail(&mut self, first: u64, longest: u64, now: Millis) {
        self.pause = match self.pause {
            0 => first,
            pause if self.is_pausing(now) => pause,
            pause => pause.saturating_mul(2).min(longest),
        };
        self.until = Millis(now.0.saturating_add(self.pause));
    }

    /// Nothing is tried now.
    #[must_use]
    pub fn is_pausing(&self, now: Millis) -> bool {
        self.pause > 0 && now < self.until
    }

    /// It failed and has not succeeded since.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.pause > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut backoff = Backoff::default();
        assert!(!backoff.is_failing() && !backoff.is_pausing(Millis(0)));
        let mut now = Millis(0);
        let mut pauses = Vec::new();
        for _ in 0..5 {
            backoff.fail(50, 200, now);
            let until = (now.0..).find(|t| !backoff.is_pausing(Millis(*t))).expect("it ends");
            pauses.push(until - now.0);
            now = Millis(until);
        }
        assert_eq!(pauses, [50, 100, 200, 200, 200]);
        assert!(backoff.is_failing(), "a pause that is over is no success");
    }

    #[test]
    fn attempts_that_fail_together_are_one_failure() {
        let mut backoff = Backoff::default();
        backoff.fail(50, 200, Millis(0));
        backoff.fail(50, 200, Millis(10));
        assert!(backoff.is_pausing(Millis(59)) && !backoff.is_pausing(Millis(60)));
    }
}
