//! A rollout as it goes on, as server-sent events: what became of each tenant's turn, the counts, the end.
//!
//! What always holds: nothing is numbered. A stream begins with all turns that have come so far, so whoever was cut off is told
//! everything again and has missed nothing; while nothing happens, a look is one query that reads no result.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use axum::{
    Extension,
    extract::State,
    response::{Response, sse::Event},
};
use serde_json::{Value, json};

use super::{
    Plane, Shared,
    body::At,
    follow::{self, Followed, event},
    problem::{Answer, Errors},
    rollouts::{RolloutView, TurnView, id, none, whole},
    types::RolloutEvent,
};
use crate::{catalog::rollouts::RolloutState, migrate::waves::Turn, plane::ControlPlane};

/// Where a rollout's tenants are and what becomes of them from now on, as server-sent events; the stream ends with the rollout, or
/// when its connection has lived for ten minutes: another one begins with where they are then. At most 16 jobs and rollouts are
/// followed at once.
#[utoipa::path(get, path = "/v1/rollouts/{rollout}/events", operation_id = "follow_rollout",
    params(("rollout" = String, Path)),
    responses((status = 200, content_type = "text/event-stream", body = RolloutEvent), Errors))]
pub async fn events(State(plane): Plane, Extension(shared): Extension<Shared>, At(rollout): At) -> Answer<Response> {
    let id = id(&rollout)?;
    let place = follow::place(shared, "/v1/rollouts/{rollout}")?;
    plane.catalog.rollout(id).await?.ok_or_else(none)?;
    let rollout = FollowedRollout {
        plane: Arc::clone(&plane),
        id,
        seen: String::new(),
        turns: BTreeMap::new(),
        progress: Value::Null,
    };
    Ok(follow::tell(plane, place, rollout))
}

/// A rollout that somebody follows.
struct FollowedRollout {
    plane: Arc<ControlPlane>,
    id: i64,
    /// What stood for all of it when it was last read.
    seen: String,
    /// What was told of each tenant.
    turns: BTreeMap<String, Value>,
    /// What was told of the whole.
    progress: Value,
}

impl Followed for FollowedRollout {
    const EVERY: Duration = Duration::from_millis(500);

    async fn look(&mut self, news: &mut VecDeque<Event>) -> Answer<bool> {
        // First the mark: what changes behind it is seen by the next look.
        let Some(mark) = self.plane.catalog.rollout_mark(self.id).await? else { return Ok(true) };
        if mark == self.seen {
            return Ok(false);
        }
        let rollout = whole(&self.plane, self.id).await?;
        self.seen = mark;
        news.extend(rollout.tenants.iter().filter_map(|turn| self.news_of(turn)));
        let progress = json!({ "state": rollout.state, "counts": rollout.counts });
        if progress != self.progress {
            news.push_back(event("progress", &progress));
            self.progress = progress;
        }
        let is_over = is_over(&rollout);
        if is_over {
            news.push_back(event("end", &json!(rollout)));
        }
        Ok(is_over)
    }
}

impl FollowedRollout {
    /// Where it is another one than was told. Who has nothing to tell yet is passed over.
    fn news_of(&mut self, turn: &TurnView) -> Option<Event> {
        let told = json!(turn);
        let is_news = match self.turns.get(&turn.name) {
            Some(before) => *before != told,
            None => turn.state != Turn::Waiting || turn.error.is_some(),
        };
        is_news.then(|| {
            let news = event("turn", &told);
            self.turns.insert(turn.name.clone(), told);
            news
        })
    }
}

/// Nothing of it is under way or to come.
fn is_over(rollout: &RolloutView) -> bool {
    rollout.state != RolloutState::Running && rollout.tenants.iter().all(|turn| turn.state != Turn::Running)
}
