//! The states of a tenant, as a table: the data plane acts by them, the control plane keeps them.

/// Where a tenant is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum TenantState {
    /// Its database is being made.
    Creating,
    #[default]
    Active,
    /// New transactions are held.
    Paused,
    /// New transactions are refused, running ones end.
    Draining,
    /// Nothing runs.
    Drained,
    /// No server connection until the next query.
    Suspended,
    /// Its database is dumped, verified and dropped.
    Archived,
    /// Gone; the name is kept as a tombstone.
    Dropped,
}

/// What happens to a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TenantEvent {
    /// Its database is there.
    Created,
    /// Hold new transactions.
    Pause,
    /// Let them run again.
    Resume,
    /// Refuse new transactions.
    Drain,
    /// Nothing runs any more.
    Emptied,
    /// Give up its server connections.
    Suspend,
    /// Somebody asks for one.
    Wake,
    /// Dumped, verified, dropped.
    Archive,
    /// Its database is back.
    Restore,
    /// Gone for good.
    Drop,
}

/// A transition that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IllegalTransition {
    /// Where it is.
    pub state: TenantState,
    /// What was asked of it.
    pub event: TenantEvent,
}

impl std::fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a tenant that is {} cannot {}", self.state, self.event)
    }
}

impl std::error::Error for IllegalTransition {}

impl TenantState {
    /// Every state.
    pub const ALL: [Self; 8] = [
        Self::Creating,
        Self::Active,
        Self::Paused,
        Self::Draining,
        Self::Drained,
        Self::Suspended,
        Self::Archived,
        Self::Dropped,
    ];

    /// The table.
    ///
    /// # Errors
    /// The table has no such transition.
    pub fn next(self, event: TenantEvent) -> Result<Self, IllegalTransition> {
        use TenantEvent as E;
        use TenantState as S;
        Ok(match (self, event) {
            (S::Creating, E::Created)
            | (S::Paused | S::Drained | S::Draining, E::Resume)
            | (S::Suspended, E::Wake)
            | (S::Archived, E::Restore) => S::Active,
            // A suspended tenant wakes by a query: whether it sleeps now only the data plane knows.
            (S::Active | S::Suspended, E::Pause) => S::Paused,
            (S::Active | S::Paused | S::Suspended, E::Drain) => S::Draining,
            (S::Draining, E::Emptied) => S::Drained,
            (S::Active, E::Suspend) => S::Suspended,
            (S::Drained, E::Archive) => S::Archived,
            (S::Drained | S::Archived, E::Drop) => S::Dropped,
            (state, event) => return Err(IllegalTransition { state, event }),
        })
    }

    /// Whether its database is there, under its name.
    #[must_use]
    pub const fn has_database(self) -> bool {
        match self {
            Self::Active | Self::Paused | Self::Draining | Self::Drained | Self::Suspended => true,
            Self::Creating | Self::Archived | Self::Dropped => false,
        }
    }

    /// The word in the API, the catalog and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Suspended => "suspended",
            Self::Archived => "archived",
            Self::Dropped => "dropped",
        }
    }

    /// The state of that word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

impl std::fmt::Display for TenantState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::fmt::Display for TenantEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "become ready",
            Self::Pause => "be paused",
            Self::Resume => "be resumed",
            Self::Drain => "be drained",
            Self::Emptied => "be empty",
            Self::Suspend => "be suspended",
            Self::Wake => "be woken",
            Self::Archive => "be archived",
            Self::Restore => "be restored",
            Self::Drop => "be deleted",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table() {
        use TenantEvent as E;
        let events = [
            E::Created,
            E::Pause,
            E::Resume,
            E::Drain,
            E::Emptied,
            E::Suspend,
            E::Wake,
            E::Archive,
            E::Restore,
            E::Drop,
        ];
        let mut table = String::new();
        for state in TenantState::ALL {
            let row: Vec<_> = events.iter().map(|e| state.next(*e).map_or("-".into(), |s| s.to_string())).collect();
            table.push_str(&format!("{state}: {}\n", row.join(" ")));
            assert_eq!(TenantState::parse(state.as_str()), Some(state));
        }
        assert_eq!(
            table,
            "creating: active - - - - - - - - -\n\
             active: - paused - draining - suspended - - - -\n\
             paused: - - active draining - - - - - -\n\
             draining: - - active - drained - - - - -\n\
             drained: - - active - - - - archived - dropped\n\
             suspended: - paused - draining - - active - - -\n\
             archived: - - - - - - - - active dropped\n\
             dropped: - - - - - - - - - -\n"
        );
    }
}
