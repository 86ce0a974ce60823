//! The states of a server connection, as a table.
//!
//! One function moves a slot from state to state; counts are derived in `core` from what it returns and nowhere else.
//! Every pair that is not in the table is an error that leaves the state as it was.

/// Where a server connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SlotState {
    /// Dialling or logging in. Exits: idle, active (straight to a waiter), closing.
    Connecting,
    /// In the pool. Exits: active, checking, closing.
    Idle,
    /// Lent to a session. Exits: idle, active (to the next waiter), resetting, checking, cancel pending, closing.
    Active,
    /// Being cleaned before it may be lent again. Exits: idle, active, checking, closing.
    Resetting,
    /// Being asked whether it still answers, and what room the server has. Exits: idle, active, closing.
    Checking,
    /// Given back while a cancel request for it is under way. Exits: resetting, closing.
    CancelPending,
    /// Terminate sent, or the login failed; PostgreSQL has not closed its end yet, so it still counts. Exits: gone, lingering.
    Closing,
    /// It still has not, after a while: it counts, and nobody counts on it. Exit: gone.
    Lingering,
}

/// What happens to a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotEvent {
    /// It became free: from login, from a session, from a reset or a check.
    Rest,
    /// Lent to a session.
    Lend,
    /// Needs cleaning first.
    Reset,
    /// Needs a sign of life first.
    Check,
    /// Given back with a cancel request under way.
    AwaitCancel,
    /// To be closed.
    Close,
    /// PostgreSQL takes long to close its end.
    Linger,
}

/// A transition that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a server connection that is {state:?} cannot {event:?}")]
pub struct IllegalTransition {
    pub state: SlotState,
    pub event: SlotEvent,
}

impl SlotState {
    pub const ALL: [Self; 8] = [
        Self::Connecting,
        Self::Idle,
        Self::Active,
        Self::Resetting,
        Self::Checking,
        Self::CancelPending,
        Self::Closing,
        Self::Lingering,
    ];

    /// The table.
    pub fn next(self, event: SlotEvent) -> Result<Self, IllegalTransition> {
        use SlotEvent as E;
        use SlotState as S;
        Ok(match (self, event) {
            (S::Connecting | S::Active | S::Resetting | S::Checking, E::Rest) => S::Idle,
            (S::Connecting | S::Idle | S::Active | S::Resetting | S::Checking, E::Lend) => S::Active,
            (S::Active | S::CancelPending, E::Reset) => S::Resetting,
            (S::Idle | S::Active | S::Resetting, E::Check) => S::Checking,
            (S::Active, E::AwaitCancel) => S::CancelPending,
            (S::Connecting | S::Idle | S::Active | S::Resetting | S::Checking | S::CancelPending, E::Close) => {
                S::Closing
            }
            (S::Closing, E::Linger) => S::Lingering,
            (state, event) => return Err(IllegalTransition { state, event }),
        })
    }

    /// The word in metrics and the console.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Idle => "idle",
            Self::Active => "active",
            Self::Resetting => "resetting",
            Self::Checking => "checking",
            Self::CancelPending => "cancel_pending",
            Self::Closing => "closing",
            Self::Lingering => "lingering",
        }
    }

    /// Its place in `ALL` and in every array of counts.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Connecting => 0,
            Self::Idle => 1,
            Self::Active => 2,
            Self::Resetting => 3,
            Self::Checking => 4,
            Self::CancelPending => 5,
            Self::Closing => 6,
            Self::Lingering => 7,
        }
    }
}

/// How many server connections are in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts([u32; SlotState::ALL.len()]);

impl Counts {
    #[must_use]
    pub fn of(&self, state: SlotState) -> u32 {
        self.0.get(state.index()).copied().unwrap_or(0)
    }

    #[must_use]
    pub fn sum(&self) -> u32 {
        self.0.iter().sum()
    }

    /// One comes (from `None`), goes (to `None`) or changes state.
    pub(super) fn shift(&mut self, from: Option<SlotState>, to: Option<SlotState>) {
        if let Some(count) = from.and_then(|state| self.0.get_mut(state.index())) {
            *count -= 1;
        }
        if let Some(count) = to.and_then(|state| self.0.get_mut(state.index())) {
            *count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every state with every event; `-` is refused.
    #[test]
    fn the_whole_table() {
        use SlotEvent as E;
        let events = [E::Rest, E::Lend, E::Reset, E::Check, E::AwaitCancel, E::Close, E::Linger];
        let mut table = String::new();
        for state in SlotState::ALL {
            let row: Vec<_> = events.iter().map(|e| state.next(*e).map_or("-", SlotState::as_str)).collect();
            table.push_str(&format!("{}: {}\n", state.as_str(), row.join(" ")));
        }
        assert_eq!(
            table,
            "connecting: idle active - - - closing -\n\
             idle: - active - checking - closing -\n\
             active: idle active resetting checking cancel_pending closing -\n\
             resetting: idle active - checking - closing -\n\
             checking: idle active - - - closing -\n\
             cancel_pending: - - resetting - - closing -\n\
             closing: - - - - - - lingering\n\
             lingering: - - - - - - -\n"
        );
    }

    #[test]
    fn indexes_follow_all() {
        for (i, state) in SlotState::ALL.into_iter().enumerate() {
            assert_eq!(state.index(), i);
        }
    }
}
