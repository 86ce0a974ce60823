//! Server-sent events of something that goes on.
//!
//! What always holds: whoever follows something has one of the few places for that until the stream ends, and is told everything
//! that a look found before the next look; a catalog that does not answer is waited for, and ends no stream.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures_util::stream;
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Shared,
    problem::{Answer, Problem},
};
use crate::plane::ControlPlane;

/// Between two looks while the catalog does not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Something that can be followed.
pub trait Followed: Send + 'static {
    /// Between two looks.
    const EVERY: Duration;

    /// Adds what is new since the last look; true if nothing more will come.
    fn look(&mut self, news: &mut VecDeque<Event>) -> impl Future<Output = Answer<bool>> + Send;
}

/// A place among those who follow something; `instead`: where the rest may look now and then.
pub fn place(shared: Shared, instead: &str) -> Answer<OwnedSemaphorePermit> {
    shared.streams.try_acquire_owned().map_err(|_| {
        let told = format!("too many follow jobs and rollouts now; look at GET {instead} now and then");
        Problem { retry_after: Some(5), ..Problem::too_many(told) }
    })
}

/// Tells it until it is over.
pub fn tell<F: Followed>(plane: Arc<ControlPlane>, place: OwnedSemaphorePermit, followed: F) -> Response {
    let follower = Follower { plane, followed, news: VecDeque::new(), is_over: false, _place: place };
    let events = stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((Ok::<_, Infallible>(event), follower))
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

pub fn event(name: &str, data: &Value) -> Event {
    Event::default().event(name).data(data.to_string())
}

struct Follower<F> {
    plane: Arc<ControlPlane>,
    followed: F,
    news: VecDeque<Event>,
    is_over: bool,
    _place: OwnedSemaphorePermit,
}

impl<F: Followed> Follower<F> {
    /// The next event; `None` after the last.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.news.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            let pause = match self.followed.look(&mut self.news).await {
                Ok(is_over) => {
                    self.is_over = is_over;
                    if is_over || !self.news.is_empty() {
                        continue;
                    }
                    F::EVERY
                }
                Err(problem) => {
                    tracing::debug!(why = problem.detail, "whoever follows something waits for the catalog");
                    LOOK_AGAIN
                }
            };
            tokio::select! {
                () = self.plane.job_over.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}
