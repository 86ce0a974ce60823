//! The hard cap of one server: how many permits there are and how many are out.
//!
//! A permit exists exactly as long as PostgreSQL counts the connection: taken before the dial, given back when PostgreSQL
//! closed its end. What always holds: `held <= cap`, except right after the cap was lowered, and then nothing is granted.

/// Permits of one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    cap: u32,
    held: u32,
}

impl Ledger {
    #[must_use]
    pub fn new(cap: u32) -> Self {
        Self { cap, held: 0 }
    }

    /// Takes a permit; false if the cap is reached.
    #[must_use]
    pub fn take(&mut self) -> bool {
        let free = self.held < self.cap;
        if free {
            self.held += 1;
        }
        free
    }

    /// Gives a permit back: PostgreSQL has closed its end.
    pub fn give_back(&mut self) {
        debug_assert!(self.held > 0, "a permit given back twice");
        self.held = self.held.saturating_sub(1);
    }

    pub fn set_cap(&mut self, cap: u32) {
        self.cap = cap;
    }

    #[must_use]
    pub fn cap(&self) -> u32 {
        self.cap
    }

    #[must_use]
    pub fn held(&self) -> u32 {
        self.held
    }

    #[must_use]
    pub fn is_full(&self) -> bool {
        self.held >= self.cap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_more_than_the_cap_also_after_it_shrank() {
        let mut ledger = Ledger::new(2);
        assert!(ledger.take() && ledger.take() && !ledger.take());
        ledger.set_cap(1);
        ledger.give_back();
        assert!(!ledger.take(), "one is still held and one is the cap");
        ledger.give_back();
        assert!(ledger.take());
    }
}
