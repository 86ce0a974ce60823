//! Bodies and headers of requests, read with a limit of size and of time.

use std::time::Duration;

use axum::{
    extract::{FromRequest, FromRequestParts, Request},
    http::{HeaderMap, header, request::Parts},
};
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;

use super::problem::{Answer, Problem};

/// Bytes of a body.
const MAX_BODY: usize = 64 << 10;
/// From the head of a request to the end of its body.
const BODY_LIMIT: Duration = Duration::from_secs(10);
const MAX_KEY: usize = 200;

/// A JSON body.
pub struct Body<T>(pub T);

/// A JSON body that may be left out.
pub struct MaybeBody<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for MaybeBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Answer<Self> {
        read(request, Some("{}")).await.map(Self)
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Answer<Self> {
        read(request, None).await.map(Self)
    }
}

/// `without`: what an empty body stands for.
async fn read<T: DeserializeOwned>(request: Request, without: Option<&'static str>) -> Answer<T> {
    let is_json = request.headers().get(header::CONTENT_TYPE).is_none_or(|value| {
        let value = value.to_str().unwrap_or_default();
        value.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
    });
    if !is_json {
        return Err(Problem::media_type("send Content-Type: application/json"));
    }
    let read = tokio::time::timeout(BODY_LIMIT, Limited::new(request.into_body(), MAX_BODY).collect()).await;
    let read = read.map_err(|_| Problem::slow(format!("the body took longer than {BODY_LIMIT:?}")))?;
    let bytes = match read {
        Ok(read) => read.to_bytes(),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            return Err(Problem::too_large(format!("the body is longer than {MAX_BODY} bytes")));
        }
        Err(_) => return Err(Problem::malformed("the body ended early")),
    };
    let bytes = match without {
        Some(text) if bytes.is_empty() => bytes::Bytes::from_static(text.as_bytes()),
        _ => bytes,
    };
    let mut value: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| Problem::malformed(format!("the body is not JSON: {error}")))?;
    if value.is_null() && without.is_some() {
        value = serde_json::json!({});
    }
    // serde would take a list for a struct.
    if !value.is_object() {
        return Err(Problem::invalid("the body must be a JSON object"));
    }
    serde_json::from_value(value).map_err(|error| Problem::invalid(error.to_string()))
}

/// What of the headers changes how a change is made.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// `If-Match`: the version that is meant.
    pub version: Option<Version>,
    /// `Idempotency-Key`.
    pub key: Option<String>,
    /// `Prefer: wait=SECONDS` or `respond-async`: how long the answer may wait for the job.
    pub wait: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    Any,
    Is(i64),
}

const DEFAULT_WAIT: Duration = Duration::from_secs(30);
const LONGEST_WAIT: u64 = 300;

impl<S: Send + Sync> FromRequestParts<S> for Conditions {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Answer<Self> {
        let version = match text(&parts.headers, "if-match")? {
            None => None,
            Some("*") => Some(Version::Any),
            Some(tag) => {
                let number =
                    tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).and_then(|tag| tag.parse().ok());
                Some(Version::Is(number.ok_or_else(|| Problem::malformed("If-Match must be an ETag of ours, or *"))?))
            }
        };
        let key = text(&parts.headers, "idempotency-key")?.map(str::to_owned);
        if key.as_ref().is_some_and(|key| key.is_empty() || key.len() > MAX_KEY) {
            return Err(Problem::malformed(format!("Idempotency-Key must be 1 to {MAX_KEY} bytes")));
        }
        let mut wait = DEFAULT_WAIT;
        for wish in text(&parts.headers, "prefer")?.unwrap_or_default().split(',') {
            match wish.trim().split_once('=') {
                None if wish.trim() == "respond-async" => wait = Duration::ZERO,
                Some(("wait", seconds)) => {
                    let seconds: u64 = seconds.trim().parse().unwrap_or(DEFAULT_WAIT.as_secs());
                    wait = Duration::from_secs(seconds.min(LONGEST_WAIT));
                }
                // A wish that is not known is no error (RFC 7240).
                _ => {}
            }
        }
        Ok(Self { version, key, wait })
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Answer<Option<&'a str>> {
    let value = headers.get(name).map(|value| value.to_str());
    value.transpose().map_err(|_| Problem::malformed(format!("{name} is not plain text")))
}
