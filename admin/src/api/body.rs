//! Paths, queries, headers and bodies of requests, read with a limit of size and of time; what cannot be read is a problem
//! document, too.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use axum::{
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, Uri, header, request::Parts},
};
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::problem::{Answer, Problem};

/// Bytes of a body.
const MAX_BODY: usize = 64 << 10;
/// The same, of one with files in it; and how many of them are read at once.
const MAX_LARGE_BODY: usize = 8 << 20;
static LARGE: Semaphore = Semaphore::const_new(2);
/// From the head of a request to the end of its body.
const BODY_LIMIT: Duration = Duration::from_secs(10);
const MAX_KEY: usize = 200;

/// A part of the path.
pub struct At(pub String);

impl<S: Send + Sync> FromRequestParts<S> for At {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(part)| Self(part)).map_err(|_| Problem::malformed("the path is not UTF-8"))
    }
}

/// What follows the question mark.
pub struct Asked<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query.map(|Query(asked)| Self(asked)).map_err(|error| Problem::invalid(error.body_text()))
    }
}

/// The caller has hung up: nobody waits for the answer.
#[derive(Debug, Clone, Default)]
pub struct HungUp(pub CancellationToken);

/// Whoever sends it relies on it: that a second request is no second change.
const KEY: &str = "idempotency-key";

/// Which parameters each operation knows, by method and path, out of the document itself: one that is not known is refused,
/// not passed over, since `?dry_run=true` that is passed over is a change.
#[derive(Debug, Default)]
pub struct Inputs(BTreeMap<(String, String), BTreeSet<(String, String)>>);

impl Inputs {
    #[must_use]
    pub fn of(document: &Value) -> Self {
        let mut known = BTreeMap::new();
        for (path, methods) in document["paths"].as_object().into_iter().flatten() {
            for (method, operation) in methods.as_object().into_iter().flatten() {
                let parameters = operation["parameters"].as_array().into_iter().flatten();
                let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let names = parameters.map(|known| match word(&known["in"]) {
                    place if place == "header" => (place, word(&known["name"]).to_ascii_lowercase()),
                    place => (place, word(&known["name"])),
                });
                known.insert((method.to_ascii_uppercase(), path.clone()), names.collect());
            }
        }
        Self(known)
    }

    /// # Errors
    /// There is something that the operation does not know, and what it does.
    pub fn check(&self, method: &str, path: &str, uri: &Uri, headers: &HeaderMap) -> Answer<()> {
        let Some(known) = self.0.get(&(method.to_owned(), path.to_owned())) else { return Ok(()) };
        let knows = |place: &str, name: &str| known.contains(&(place.to_owned(), name.to_owned()));
        let pairs = Query::<Vec<(String, String)>>::try_from_uri(uri);
        let pairs = pairs.map_err(|_| Problem::malformed("what follows the ? cannot be read"))?.0;
        if pairs.iter().any(|(name, _)| !knows("query", name)) {
            let names: Vec<_> = known.iter().filter(|(place, _)| place == "query").map(|(_, name)| &**name).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(Problem::invalid(format!("a parameter after the ? is not known here; known: {names}")));
        }
        if method != "GET" && headers.contains_key(KEY) && !knows("header", KEY) {
            return Err(Problem::invalid("Idempotency-Key: has no meaning here; see /openapi.json"));
        }
        Ok(())
    }
}

/// A JSON body.
pub struct Body<T>(pub T);

/// A JSON body with files in it.
pub struct LargeBody<T>(pub T);

/// A JSON body that may be left out.
pub struct MaybeBody<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for MaybeBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Answer<Self> {
        read(request, Some("{}"), MAX_BODY).await.map(Self)
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Answer<Self> {
        read(request, None, MAX_BODY).await.map(Self)
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for LargeBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Answer<Self> {
        let _one_of_few = LARGE.acquire().await;
        read(request, None, MAX_LARGE_BODY).await.map(Self)
    }
}

/// `without`: what an empty body stands for.
async fn read<T: DeserializeOwned>(request: Request, without: Option<&'static str>, most: usize) -> Answer<T> {
    let is_json = request.headers().get(header::CONTENT_TYPE).is_none_or(|value| {
        let value = value.to_str().unwrap_or_default();
        value.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
    });
    if !is_json {
        return Err(Problem::media_type("send Content-Type: application/json"));
    }
    let read = tokio::time::timeout(BODY_LIMIT, Limited::new(request.into_body(), most).collect()).await;
    let read = read.map_err(|_| Problem::slow(format!("the body took longer than {BODY_LIMIT:?}")))?;
    let bytes = match read {
        Ok(read) => read.to_bytes(),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            return Err(Problem::too_large(format!("the body is longer than {most} bytes")));
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
    /// Then nothing is waited for.
    pub hung_up: HungUp,
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
        let hung_up = parts.extensions.get::<HungUp>().cloned().unwrap_or_default();
        Ok(Self { version, key, wait, hung_up })
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Answer<Option<&'a str>> {
    let value = headers.get(name).map(|value| value.to_str());
    value.transpose().map_err(|_| Problem::malformed(format!("{name} is not plain text")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_an_operation_does_not_know_is_refused_and_what_it_knows_is_not() {
        let inputs = Inputs::of(&json!({ "paths": { "/v1/x": {
            "get": { "parameters": [{ "in": "query", "name": "limit" }] },
            "patch": {},
            "post": { "parameters": [{ "in": "header", "name": "Idempotency-Key" }] },
        } } }));
        let check = |method: &str, uri: &'static str, header: Option<&'static str>| {
            let headers = header.map(|name| (name.parse().unwrap(), "x".parse().unwrap())).into_iter().collect();
            inputs.check(method, "/v1/x", &Uri::from_static(uri), &headers).map_err(|problem| problem.status.as_u16())
        };
        assert_eq!(check("GET", "/v1/x?limit=1", None), Ok(()));
        assert_eq!(check("GET", "/v1/x?limit=1&dry_run=true", None), Err(422));
        assert_eq!(check("POST", "/v1/x?dry%5Frun=true", None), Err(422));
        assert_eq!(check("POST", "/v1/x", Some("idempotency-key")), Ok(()));
        assert_eq!(check("PATCH", "/v1/x", Some("idempotency-key")), Err(422));
        assert_eq!(check("GET", "/v1/x", Some("idempotency-key")), Ok(()), "nothing is changed");
    }
}
