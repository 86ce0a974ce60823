//! The states of a job, as a table.

/// Where a job is. A step is the index of an idempotent unit of its plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum JobState {
    /// Planned and written down; nothing has run. Exits: running.
    Queued,
    /// Doing this step. Exits: running the next, succeeded, failed.
    Running { step: u32 },
    /// Every step is done. No exit.
    Succeeded,
    /// This step gave up. Exit: queued again.
    Failed { step: u32 },
}

/// What happens to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobEvent {
    /// A worker takes it, at its first unfinished step.
    Start { step: u32 },
    /// The step that runs is done; there is another.
    StepDone,
    /// The step that runs was the last.
    Finish,
    /// The step that runs gave up.
    Fail,
    /// Somebody wants it tried again.
    Retry,
}

/// A transition that the table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IllegalTransition {
    pub state: JobState,
    pub event: JobEvent,
}

impl std::fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a job that is {:?} cannot {:?}", self.state, self.event)
    }
}

impl std::error::Error for IllegalTransition {}

impl JobState {
    /// The table.
    pub fn next(self, event: JobEvent) -> Result<Self, IllegalTransition> {
        use JobEvent as E;
        Ok(match (self, event) {
            (Self::Queued, E::Start { step }) => Self::Running { step },
            (Self::Running { step }, E::StepDone) => Self::Running { step: step.saturating_add(1) },
            (Self::Running { .. }, E::Finish) => Self::Succeeded,
            (Self::Running { step }, E::Fail) => Self::Failed { step },
            (Self::Failed { .. }, E::Retry) => Self::Queued,
            (state, event) => return Err(IllegalTransition { state, event }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table() {
        let states =
            [JobState::Queued, JobState::Running { step: 1 }, JobState::Succeeded, JobState::Failed { step: 1 }];
        let events =
            [JobEvent::Start { step: 1 }, JobEvent::StepDone, JobEvent::Finish, JobEvent::Fail, JobEvent::Retry];
        let mut table = String::new();
        for state in states {
            let row: Vec<_> = events.iter().map(|e| state.next(*e).map_or("-".into(), |s| format!("{s:?}"))).collect();
            table.push_str(&format!("{state:?}: {}\n", row.join(" | ")));
        }
        assert_eq!(
            table,
            "Queued: Running { step: 1 } | - | - | - | -\n\
             Running { step: 1 }: - | Running { step: 2 } | Succeeded | Failed { step: 1 } | -\n\
             Succeeded: - | - | - | - | -\n\
             Failed { step: 1 }: - | - | - | - | Queued\n"
        );
    }
}
