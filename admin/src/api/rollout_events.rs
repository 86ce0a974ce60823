//! A rollout as it goes on, as server-sent events: what became of each tenant's turn, the counts, the end.
//!
//! What always holds: nothing is numbered. A stream begins with all turns that have come so far, so whoever was cut off is told
//! everything again and has missed nothing; while nothing happens, a look is one query that reads no result.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use axum::{
    Extension,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Plane, Shared,
    body::At,
    problem::{Answer, Errors, Problem},
    rollouts::{RolloutView, TurnView, id, none, whole},
    types::RolloutEvent,
};
use crate::{catalog::rollouts::RolloutState, migrate::waves::Turn, plane::ControlPlane};

/// Between two looks at a rollout that somebody follows.
const LOOK: Duration = Duration::from_millis(500);
/// The same, while the catalog does not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Where a rollout's tenants are and what becomes of them from now on, as server-sent events; the stream ends with the rollout, or
/// when its connection has lived for ten minutes: another one begins with where they are then. At most 16 jobs and rollouts are
/// followed at once.
#[utoipa::path(get, path = "/v1/rollouts/{rollout}/events", operation_id = "follow_rollout",
    params(("rollout" = String, Path)),
    responses((status = 200, content_type = "text/event-stream", body = RolloutEvent), Errors))]
pub async fn events(State(plane): Plane, Extension(shared): Extension<Shared>, At(rollout): At) -> Answer<Response> {
    let id = id(&rollout)?;
    let place = shared.streams.try_acquire_owned();
    let place = place.map_err(|_| {
        let problem =
            Problem::too_many("too many follow jobs and rollouts now; look at GET /v1/rollouts/{rollout} now and then");
        Problem { retry_after: Some(5), ..problem }
    })?;
    plane.catalog.rollout(id).await?.ok_or_else(none)?;
    let follower = Follower {
        plane,
        id,
        seen: String::new(),
        turns: BTreeMap::new(),
        progress: Value::Null,
        ready: VecDeque::new(),
        is_over: false,
        _place: place,
    };
    let follow = stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((Ok::<_, Infallible>(event), follower))
    });
    Ok(Sse::new(follow).keep_alive(KeepAlive::default()).into_response())
}

/// Somebody who follows a rollout.
struct Follower {
    plane: Arc<ControlPlane>,
    id: i64,
    /// What stood for all of it when it was last read.
    seen: String,
    /// What was told of each tenant.
    turns: BTreeMap<String, Value>,
    /// What was told of the whole.
    progress: Value,
    ready: VecDeque<Event>,
    is_over: bool,
    _place: OwnedSemaphorePermit,
}

impl Follower {
    /// The next event; `None` after the last.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            let pause = match self.look().await {
                Ok(()) if !self.ready.is_empty() || self.is_over => continue,
                Ok(()) => LOOK,
                Err(problem) => {
                    tracing::debug!(
                        why = problem.detail,
                        rollout = self.id,
                        "a follower of a rollout waits for the catalog"
                    );
                    LOOK_AGAIN
                }
            };
            let plane = Arc::clone(&self.plane);
            tokio::select! {
                () = plane.job_over.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn look(&mut self) -> Answer<()> {
        // First the mark: what changes behind it is seen by the next look.
        let Some(mark) = self.plane.catalog.rollout_mark(self.id).await? else {
            self.is_over = true;
            return Ok(());
        };
        if mark == self.seen {
            return Ok(());
        }
        let rollout = whole(&self.plane, self.id).await?;
        self.seen = mark;
        rollout.tenants.iter().for_each(|turn| self.tell_turn(turn));
        let progress = json!({ "state": rollout.state, "counts": rollout.counts });
        if progress != self.progress {
            self.ready.push_back(event("progress", &progress));
            self.progress = progress;
        }
        if is_over(&rollout) {
            self.is_over = true;
            self.ready.push_back(event("end", &json!(rollout)));
        }
        Ok(())
    }

    /// Where it is another one than was told. Who has nothing to tell yet is passed over.
    fn tell_turn(&mut self, turn: &TurnView) {
        let told = json!(turn);
        let is_news = match self.turns.get(&turn.name) {
            Some(before) => *before != told,
            None => turn.state != Turn::Waiting || turn.error.is_some(),
        };
        if is_news {
            self.ready.push_back(event("turn", &told));
            self.turns.insert(turn.name.clone(), told);
        }
    }
}

/// Nothing of it is under way or to come.
fn is_over(rollout: &RolloutView) -> bool {
    rollout.state != RolloutState::Running && rollout.tenants.iter().all(|turn| turn.state != Turn::Running)
}

fn event(name: &str, data: &Value) -> Event {
    Event::default().event(name).data(data.to_string())
}
