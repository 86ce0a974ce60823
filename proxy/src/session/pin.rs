//! Why a lease outlives its transaction. Reasons, not a flag: each is counted, shown, and cleared by evidence. Pure.

/// State on a server connection that cannot be replayed on another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum PinReason {
    AdvisoryLock = 1,
    Cursor = 2,
    TempObject = 4,
    Prepare = 8,
    Listen = 16,
    /// SET SESSION AUTHORIZATION.
    Authorization = 32,
    /// LOAD, `dblink_connect`, or a setting that PostgreSQL does not show.
    Opaque = 64,
    /// The probe failed; it is asked again later.
    Unknown = 128,
    /// `setseed`: nothing shows the seed, and nothing resets it.
    Seed = 256,
}

impl PinReason {
    pub const ALL: [Self; 9] = [
        Self::AdvisoryLock,
        Self::Cursor,
        Self::TempObject,
        Self::Prepare,
        Self::Listen,
        Self::Authorization,
        Self::Opaque,
        Self::Unknown,
        Self::Seed,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AdvisoryLock => "advisory_lock",
            Self::Cursor => "cursor",
            Self::TempObject => "temp_object",
            Self::Prepare => "prepare",
            Self::Listen => "listen",
            Self::Authorization => "session_authorization",
            Self::Opaque => "opaque",
            Self::Unknown => "unknown",
            Self::Seed => "seed",
        }
    }
}

/// A set of reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pins(u16);

impl Pins {
    pub fn add(&mut self, reason: PinReason) {
        self.0 |= reason as u16;
    }

    #[must_use]
    pub fn has(self, reason: PinReason) -> bool {
        self.0 & reason as u16 != 0
    }

    pub(super) fn bits(self) -> u16 {
        self.0
    }

    pub(super) fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Of these, those that no evidence ever clears: the connection ends with the session.
    #[must_use]
    pub fn forever(self) -> Self {
        Self(self.0 & (PinReason::Opaque as u16 | PinReason::Seed as u16))
    }

    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn iter(self) -> impl Iterator<Item = PinReason> {
        PinReason::ALL.into_iter().filter(move |r| self.has(*r))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_each_reason_once() {
        let mut pins = Pins::default();
        assert!(pins.is_empty());
        pins.add(PinReason::Cursor);
        pins.add(PinReason::Listen);
        pins.add(PinReason::Cursor);
        assert_eq!(pins.iter().collect::<Vec<_>>(), [PinReason::Cursor, PinReason::Listen]);
    }
}
