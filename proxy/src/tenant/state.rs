//! The states of a tenant, as a table.

/// Where a tenant is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TenantState {
    /// Its database is being made.
    Creating,
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
    Created,
    Pause,
    Resume,
    Drain,
    Emptied,
    Suspend,
    Wake,
    Archive,
    Drop,
}

/// A transition that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a tenant that is {state:?} cannot {event:?}")]
pub struct IllegalTransition {
    pub state: TenantState,
    pub event: TenantEvent,
}

impl TenantState {
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
    pub fn next(self, event: TenantEvent) -> Result<Self, IllegalTransition> {
        use TenantEvent as E;
        use TenantState as S;
        Ok(match (self, event) {
            (S::Creating, E::Created) | (S::Paused | S::Drained, E::Resume) | (S::Suspended, E::Wake) => S::Active,
            (S::Active, E::Pause) => S::Paused,
            (S::Active, E::Drain) => S::Draining,
            (S::Draining, E::Emptied) => S::Drained,
            (S::Active, E::Suspend) => S::Suspended,
            (S::Drained, E::Archive) => S::Archived,
            (S::Drained, E::Drop) => S::Dropped,
            (state, event) => return Err(IllegalTransition { state, event }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table() {
        use TenantEvent as E;
        let events = [E::Created, E::Pause, E::Resume, E::Drain, E::Emptied, E::Suspend, E::Wake, E::Archive, E::Drop];
        let mut table = String::new();
        for state in TenantState::ALL {
            let row: Vec<_> = events.iter().map(|e| state.next(*e).map_or("-".into(), |s| format!("{s:?}"))).collect();
            table.push_str(&format!("{state:?}: {}\n", row.join(" ")));
        }
        assert_eq!(
            table,
            "Creating: Active - - - - - - - -\n\
             Active: - Paused - Draining - Suspended - - -\n\
             Paused: - - Active - - - - - -\n\
             Draining: - - - - Drained - - - -\n\
             Drained: - - Active - - - - Archived Dropped\n\
             Suspended: - - - - - - Active - -\n\
             Archived: - - - - - - - - -\n\
             Dropped: - - - - - - - - -\n"
        );
    }
}
