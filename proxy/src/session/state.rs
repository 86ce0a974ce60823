//! The states of a session, as a table.

/// Where a client's session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum SessionState {
    /// Connected; nothing of it is believed yet. Exits: login, closing.
    Hello,
    /// Proving who it is. Exits: idle, closing.
    Login,
    /// Logged in, without a server connection. Exits: waiting, active, closing.
    Idle,
    /// In a pool's queue. Exits: active, idle (refused or cancelled), closing.
    Waiting,
    /// A request of it is unanswered. Exits: idle, idle in transaction, pinned, closing.
    Active,
    /// Holds a server connection between the requests of one transaction. Exits: active, closing.
    IdleInTransaction,
    /// Holds a server connection outside a transaction, for a reason. Exits: active, idle, closing.
    Pinned,
    /// Ending. No exit.
    Closing,
}

/// What happens to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionEvent {
    Greet,
    Admit,
    Queue,
    Refuse,
    Work,
    Rest,
    RestInTransaction,
    RestPinned,
    End,
}

/// A transition that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a session that is {state:?} cannot {event:?}")]
pub struct IllegalTransition {
    pub state: SessionState,
    pub event: SessionEvent,
}

impl SessionState {
    pub const ALL: [Self; 8] = [
        Self::Hello,
        Self::Login,
        Self::Idle,
        Self::Waiting,
        Self::Active,
        Self::IdleInTransaction,
        Self::Pinned,
        Self::Closing,
    ];

    /// The table.
    pub fn next(self, event: SessionEvent) -> Result<Self, IllegalTransition> {
        use SessionEvent as E;
        use SessionState as S;
        Ok(match (self, event) {
            (S::Hello, E::Greet) => S::Login,
            (S::Login, E::Admit) => S::Idle,
            (S::Idle, E::Queue) => S::Waiting,
            (S::Waiting, E::Refuse) => S::Idle,
            (S::Idle | S::Waiting | S::Active | S::IdleInTransaction | S::Pinned, E::Work) => S::Active,
            (S::Active | S::Pinned, E::Rest) => S::Idle,
            (S::Active, E::RestInTransaction) => S::IdleInTransaction,
            (S::Active, E::RestPinned) => S::Pinned,
            (_, E::End) => S::Closing,
            (state, event) => return Err(IllegalTransition { state, event }),
        })
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Login => "login",
            Self::Idle => "idle",
            Self::Waiting => "waiting",
            Self::Active => "active",
            Self::IdleInTransaction => "idle_in_transaction",
            Self::Pinned => "pinned",
            Self::Closing => "closing",
        }
    }

    #[must_use]
    pub fn from_u8(n: u8) -> Self {
        Self::ALL.get(usize::from(n)).copied().unwrap_or(Self::Closing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table() {
        use SessionEvent as E;
        let events =
            [E::Greet, E::Admit, E::Queue, E::Refuse, E::Work, E::Rest, E::RestInTransaction, E::RestPinned, E::End];
        let mut table = String::new();
        for state in SessionState::ALL {
            let row: Vec<_> = events.iter().map(|e| state.next(*e).map_or("-", SessionState::as_str)).collect();
            table.push_str(&format!("{}: {}\n", state.as_str(), row.join(" ")));
        }
        assert_eq!(
            table,
            "hello: login - - - - - - - closing\n\
             login: - idle - - - - - - closing\n\
             idle: - - waiting - active - - - closing\n\
             waiting: - - - idle active - - - closing\n\
             active: - - - - active idle idle_in_transaction pinned closing\n\
             idle_in_transaction: - - - - active - - - closing\n\
             pinned: - - - - active idle - - closing\n\
             closing: - - - - - - - - closing\n"
        );
    }

    #[test]
    fn numbers_follow_all() {
        for (n, state) in SessionState::ALL.into_iter().enumerate() {
            assert_eq!(SessionState::from_u8(u8::try_from(n).unwrap()), state);
            assert_eq!(state as usize, n);
        }
    }
}
