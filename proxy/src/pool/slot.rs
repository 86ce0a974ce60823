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
    /// Lent to a session. Exits: idle, active (to the next waiter), resetting, cancel pending, closing.
    Active,
    /// Being cleaned before it may be lent again. Exits: idle, active, closing.
    Resetting,
    /// Being asked whether it still answers. Exits: idle, active, closing.
    Checking,
    /// Given back while a cancel request for it is under way. Exits: resetting, closing.
    CancelPending,
    /// Terminate sent; PostgreSQL has not closed its end yet, so it still counts. Exit: gone.
    Closing,
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
}

/// A transition that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a server connection that is {state:?} cannot {event:?}")]
pub struct IllegalTransition {
    pub state: SlotState,
    pub event: SlotEvent,
}

impl SlotState {
    pub const ALL: [Self; 7] = [
        Self::Connecting,
        Self::Idle,
        Self::Active,
        Self::Resetting,
        Self::Checking,
        Self::CancelPending,
        Self::Closing,
    ];

    /// The table.
    pub fn next(self, event: SlotEvent) -> Result<Self, IllegalTransition> {
        use SlotEvent as E;
        use SlotState as S;
        Ok(match (self, event) {
            (S::Connecting | S::Active | S::Resetting | S::Checking, E::Rest) => S::Idle,
            (S::Connecting | S::Idle | S::Active | S::Resetting | S::Checking, E::Lend) => S::Active,
            (S::Active | S::CancelPending, E::Reset) => S::Resetting,
            (S::Idle, E::Check) => S::Checking,
            (S::Active, E::AwaitCancel) => S::CancelPending,
            (S::Connecting | S::Idle | S::Active | S::Resetting | S::Checking | S::CancelPending, E::Close) => {
                S::Closing
            }
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
        let events = [E::Rest, E::Lend, E::Reset, E::Check, E::AwaitCancel, E::Close];
        let mut table = String::new();
        for state in SlotState::ALL {
            let row: Vec<_> = events.iter().map(|e| state.next(*e).map_or("-", SlotState::as_str)).collect();
            table.push_str(&format!("{}: {}\n", state.as_str(), row.join(" ")));
        }
        assert_eq!(
            table,
            "connecting: idle active - - - closing\n\
             idle: - active - checking - closing\n\
             active: idle active resetting - cancel_pending closing\n\
             resetting: idle active - - - closing\n\
             checking: idle active - - - closing\n\
             cancel_pending: - - resetting - - closing\n\
             closing: - - - - - -\n"
        );
    }

    #[test]
    fn indexes_follow_all() {
        for (i, state) in SlotState::ALL.into_iter().enumerate() {
            assert_eq!(state.index(), i);
        }
    }
}
