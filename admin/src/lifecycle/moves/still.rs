//! For how long a copy has not come nearer: kept in the job, so that a step that is tried again, also by another process, counts
//! on from where it was.
//!
//! What always holds: while a slot keeps the log of the server that clients use, no step waits for ever for the other server.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{Site, StepError};
use crate::{catalog::store::JobRow, jobs::work::Step};

/// Under this name in the job's notes.
const NOTE: &str = "still";
/// What comes nearer is written down this often.
const WRITE: Duration = Duration::from_secs(5);
/// And so long it may come nearer in all: what is written meanwhile is kept by a server.
const MOST: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    step: String,
    /// How far it had come.
    mark: (u64, u64),
    #[serde(with = "time::serde::rfc3339")]
    since: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    begun: OffsetDateTime,
}

/// Of one step.
pub struct Still {
    noted: Noted,
    written: Instant,
}

impl Still {
    /// From where an earlier try was, if there was one.
    pub async fn of(site: &Site, job: &JobRow, step: Step, result: &mut Value) -> Result<Self, StepError> {
        let found =
            serde_json::from_value::<Noted>(result[NOTE].clone()).ok().filter(|noted| noted.step == step.word());
        let is_first = found.is_none();
        let now = OffsetDateTime::now_utc();
        let fresh = || Noted { step: step.word(), mark: (0, 0), since: now, begun: now };
        let still = Self { noted: found.unwrap_or_else(fresh), written: Instant::now() };
        if is_first {
            still.write(site, job, result).await?;
        }
        Ok(still)
    }

    async fn write(&self, site: &Site, job: &JobRow, result: &mut Value) -> Result<(), StepError> {
        result[NOTE] = json!(self.noted);
        site.note(job, result).await
    }

    /// How far it has come now.
    pub async fn at(
        &mut self,
        site: &Site,
        job: &JobRow,
        mark: (u64, u64),
        result: &mut Value,
    ) -> Result<(), StepError> {
        if self.noted.mark == mark {
            return Ok(());
        }
        (self.noted.mark, self.noted.since) = (mark, OffsetDateTime::now_utc());
        if self.written.elapsed() >= WRITE {
            self.written = Instant::now();
            self.write(site, job, result).await?;
        }
        Ok(())
    }

    pub fn mark(&self) -> (u64, u64) {
        self.noted.mark
    }

    /// Whether it has stood still for that long, or has gone on for longer than anything may.
    pub fn is_over(&self, limit: Duration) -> bool {
        let now = OffsetDateTime::now_utc();
        now - self.noted.since >= limit || now - self.noted.begun >= MOST
    }
}

/// A step that could not reach a server: tried again, but not past the limit.
pub async fn verdict(site: &Site, job: &JobRow, step: Step, result: &mut Value, error: StepError) -> StepError {
    let StepError::Away(why) = error else { return error };
    let limit = site.plane.file().admin.archive_stall_timeout;
    match Still::of(site, job, step, result).await {
        Ok(still) if still.is_over(limit) => StepError::Refused(format!(
            "{why}; that has been so for {}, and a server keeps its log meanwhile: try again when both can be reached",
            humantime::format_duration(limit)
        )),
        Ok(_) => StepError::Away(why),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_counts_on_from_where_it_was_noted() {
        let ago = |seconds| OffsetDateTime::now_utc() - Duration::from_secs(seconds);
        let noted = Noted { step: "catch_up".to_owned(), mark: (7, 0), since: ago(100), begun: ago(200) };
        let back: Noted = serde_json::from_value(json!(noted)).unwrap();
        assert_eq!(back, noted);
        let still = |noted| Still { noted, written: Instant::now() };
        assert!(still(noted.clone()).is_over(Duration::from_secs(99)));
        assert!(!still(noted.clone()).is_over(Duration::from_secs(101)));
        assert!(still(Noted { since: ago(1), begun: ago(25 * 3600), ..noted }).is_over(Duration::from_secs(99)));
    }
}
