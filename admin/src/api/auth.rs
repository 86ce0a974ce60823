//! Who may do what: one table of all operations, and the one place that asks it.
//!
//! What always holds: an operation that is not in the table is refused; a token's secret is compared in constant time and
//! kept only as a hash; requests are limited per token and over all tokens, and per network before a token was shown; a
//! change that was refused here is in the audit log, as long as there are not too many; one that was let in goes on to its
//! end, whether or not the caller waits for it.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota};
use serde_json::json;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use time::OffsetDateTime;

use super::{
    body::{HungUp, Inputs},
    problem::{Answer, Problem},
};
use crate::{
    catalog::{
        audit::Deed,
        disk::hex,
        model::{Access, Known, Token},
        store::Asker,
    },
    plane::ControlPlane,
};

/// Every operation, by method and path, and the least that a token must allow.
pub const OPERATIONS: &[(&str, &str, Access)] = &[
    ("GET", "/v1/servers", Access::Viewer),
    ("GET", "/v1/tenants", Access::Viewer),
    ("POST", "/v1/tenants", Access::Operator),
    ("GET", "/v1/tenants/{tenant}", Access::Viewer),
    ("PATCH", "/v1/tenants/{tenant}", Access::Operator),
    ("DELETE", "/v1/tenants/{tenant}", Access::Admin),
    ("GET", "/v1/tenants/{tenant}/clients", Access::Viewer),
    ("POST", "/v1/tenants/{tenant}/adopt", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/rename", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/pause", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/resume", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/drain", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/suspend", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/wake", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/archive", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/restore", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/rotate", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/separate", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/move", Access::Operator),
    ("POST", "/v1/tenants/{tenant}/move/rollback", Access::Operator),
    // The old copy is gone then.
    ("POST", "/v1/tenants/{tenant}/move/confirm", Access::Admin),
    ("POST", "/v1/tenants/{tenant}/import", Access::Operator),
    ("GET", "/v1/jobs", Access::Viewer),
    ("GET", "/v1/jobs/{job}", Access::Viewer),
    ("GET", "/v1/jobs/{job}/events", Access::Viewer),
    ("POST", "/v1/jobs/{job}/cancel", Access::Operator),
    ("GET", "/v1/rollouts", Access::Viewer),
    // Any statement, and any command, as the owner of each tenant: what they do has no way back.
    ("POST", "/v1/rollouts", Access::Admin),
    ("GET", "/v1/rollouts/{rollout}", Access::Viewer),
    ("GET", "/v1/rollouts/{rollout}/events", Access::Viewer),
    ("POST", "/v1/rollouts/{rollout}/resume", Access::Admin),
    ("POST", "/v1/rollouts/{rollout}/cancel", Access::Operator),
    ("POST", "/v1/rollouts/{rollout}/outcomes", Access::Admin),
    ("GET", "/v1/archives", Access::Viewer),
    ("GET", "/v1/audit", Access::Admin),
    ("GET", "/v1/audit/verify", Access::Admin),
    ("GET", "/v1/tokens", Access::Admin),
    ("POST", "/v1/tokens", Access::Admin),
    ("DELETE", "/v1/tokens/{token}", Access::Admin),
    ("GET", "/v1/explain/{tenant}", Access::Viewer),
    ("GET", "/v1/registry.md", Access::Viewer),
];

/// Requests of one token, or of one address without a token: a burst of so many, then so many a second.
const BURST: NonZeroU32 = NonZeroU32::MIN.saturating_add(199);
const PER_SECOND: NonZeroU32 = NonZeroU32::MIN.saturating_add(99);
/// The same, of all tokens together.
const ALL_BURST: NonZeroU32 = NonZeroU32::MIN.saturating_add(799);
const ALL_PER_SECOND: NonZeroU32 = NonZeroU32::MIN.saturating_add(399);
/// Refused changes that are written into the audit log; those beyond are counted in the next one's row.
const REFUSED_BURST: NonZeroU32 = NonZeroU32::MIN.saturating_add(49);
const REFUSED_PER_MINUTE: NonZeroU32 = NonZeroU32::MIN.saturating_add(29);
const STRANGERS_BURST: NonZeroU32 = NonZeroU32::MIN.saturating_add(19);
const STRANGERS_PER_SECOND: NonZeroU32 = NonZeroU32::MIN.saturating_add(4);
/// Before forgetting those who have not asked for a while.
const MANY_KEYS: usize = 10_000;

const PREFIX: &str = "tny_";
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 32;

/// Whoever asks, as far as it was proved.
#[derive(Debug, Clone)]
pub struct Caller {
    pub access: Access,
    pub asker: Asker,
}

/// The address that a connection comes from.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub Option<IpAddr>);

/// Who asks how often.
pub struct Limits {
    tokens: DefaultKeyedRateLimiter<String>,
    all: DefaultDirectRateLimiter,
    strangers: DefaultKeyedRateLimiter<Option<IpAddr>>,
    refused: DefaultDirectRateLimiter,
}

impl Default for Limits {
    fn default() -> Self {
        let quota = |rate, burst| Quota::per_second(rate).allow_burst(burst);
        Self {
            tokens: DefaultKeyedRateLimiter::keyed(quota(PER_SECOND, BURST)),
            all: DefaultDirectRateLimiter::direct(quota(ALL_PER_SECOND, ALL_BURST)),
            strangers: DefaultKeyedRateLimiter::keyed(quota(STRANGERS_PER_SECOND, STRANGERS_BURST)),
            refused: DefaultDirectRateLimiter::direct(Quota::per_minute(REFUSED_PER_MINUTE).allow_burst(REFUSED_BURST)),
        }
    }
}

/// What the way into `/v1` knows.
pub struct Door {
    pub plane: Arc<ControlPlane>,
    pub inputs: Inputs,
    limits: Limits,
    /// Refused changes that are in no row.
    unwritten: AtomicU64,
}

impl Door {
    #[must_use]
    pub fn new(plane: Arc<ControlPlane>, inputs: Inputs) -> Arc<Self> {
        Arc::new(Self { plane, inputs, limits: Limits::default(), unwritten: AtomicU64::new(0) })
    }
}

/// A new token: its id, its text (told once), and what is kept.
#[must_use]
pub fn new_token() -> (String, String, Vec<u8>) {
    let id = hex(&rand::random::<[u8; ID_BYTES]>());
    let secret = URL_SAFE_NO_PAD.encode(rand::random::<[u8; SECRET_BYTES]>());
    let hash = Sha256::digest(secret.as_bytes()).to_vec();
    (id.clone(), format!("{PREFIX}{id}_{secret}"), hash)
}

/// The token that was shown, if it is one of ours and still good.
#[must_use]
pub fn prove<'a>(known: &'a Known, shown: &str, now: OffsetDateTime) -> Option<&'a Token> {
    let (id, secret) = shown.strip_prefix(PREFIX)?.split_once('_')?;
    let token = known.tokens.iter().find(|token| token.id == id)?;
    let hash = hex(&Sha256::digest(secret.as_bytes()));
    let fits: bool = hash.as_bytes().ct_eq(token.hash.as_bytes()).into();
    (fits && token.expires_at > now).then_some(token)
}

fn shown(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The one way into `/v1`, and out of it.
pub async fn guard(State(door): State<Arc<Door>>, request: Request, next: Next) -> Response {
    let mut response = pass(&door, request, next).await;
    // Passwords and tokens are in some of them.
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn pass(door: &Arc<Door>, mut request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), path(&request).to_owned());
    let is_look = matches!(method, Method::GET | Method::HEAD);
    let caller = match known(door, &request) {
        Ok(known) => known,
        Err(problem) => return refuse(door, &method, &path, nobody(&request), problem),
    };
    if let Err(problem) = admit(&caller, &method, &path) {
        return refuse(door, &method, &path, caller.asker, problem);
    }
    let word = if is_look { "GET" } else { method.as_str() };
    if let Err(problem) = door.inputs.check(word, &path, request.uri(), request.headers()) {
        return problem.into_response();
    }
    request.extensions_mut().insert(caller);
    if is_look { next.run(request).await } else { to_its_end(request, next).await }
}

/// A change that was let in, as a task of its own: dropped with the connection it would have no outcome in the audit log.
async fn to_its_end(mut request: Request, next: Next) -> Response {
    let hung_up = HungUp::default();
    request.extensions_mut().insert(hung_up.clone());
    let _told_when_dropped = hung_up.0.drop_guard();
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(error) => {
            tracing::error!(%error, "a request of the API panicked");
            Problem::internal("the request failed; the log says why").into_response()
        }
    }
}

/// A change that was refused at the door is in the log and in the audit log.
fn refuse(door: &Arc<Door>, method: &Method, path: &str, asker: Asker, problem: Problem) -> Response {
    let is_told = matches!(problem.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    if is_told && !matches!(*method, Method::GET | Method::HEAD) {
        if door.limits.refused.check().is_ok() {
            let (door, word) = (Arc::clone(door), problem.word().to_owned());
            tokio::spawn(write_refused(door, format!("{method} {path}"), asker, word));
        } else {
            door.unwritten.fetch_add(1, Relaxed);
        }
    }
    problem.into_response()
}

async fn write_refused(door: Arc<Door>, action: String, asker: Asker, word: String) {
    let before = door.unwritten.swap(0, Relaxed);
    tracing::warn!(action, actor = asker.actor, peer = asker.peer, before, "the API refused a change: {word}");
    let more = (before > 0).then(|| json!({ "refused_before_and_not_written": before }));
    let deed = Deed { asker: &asker, action: &action, tenant: None };
    if let Err(error) = door.plane.catalog.audit(&deed, &word, None, more).await {
        tracing::debug!(%error, "a refused change is not in the audit log");
    }
}

fn path(request: &Request) -> &str {
    request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str)
}

fn peer(request: &Request) -> Option<IpAddr> {
    request.extensions().get::<Peer>().and_then(|peer| peer.0)
}

/// Whoever has an IPv6 address has 2^64 of them.
fn network(peer: Option<IpAddr>) -> Option<IpAddr> {
    peer.map(|peer| match peer.to_canonical() {
        IpAddr::V6(at) => IpAddr::V6(Ipv6Addr::from_bits(at.to_bits() & !u128::from(u64::MAX))),
        at => at,
    })
}

fn nobody(request: &Request) -> Asker {
    asker("-".to_owned(), peer(request))
}

fn asker(actor: String, peer: Option<IpAddr>) -> Asker {
    let peer = peer.map_or_else(String::new, |peer| peer.to_string());
    Asker { actor, peer, request: new_request() }
}

/// The number that ties the rows of one request together.
#[must_use]
pub fn new_request() -> String {
    hex(&rand::random::<[u8; 8]>())
}

/// Whose token it is, and that it does not ask too often.
fn known(door: &Door, request: &Request) -> Answer<Caller> {
    let (peer, limits) = (peer(request), &door.limits);
    let known = door.plane.known();
    let token = shown(request.headers()).and_then(|shown| prove(&known, shown, OffsetDateTime::now_utc()));
    let Some(token) = token else {
        limits.strangers.check_key(&network(peer)).map_err(|_| slower())?;
        if limits.strangers.len() > MANY_KEYS {
            limits.strangers.retain_recent();
        }
        return Err(Problem::no_token(
            "send Authorization: Bearer TOKEN, with a token that exists and has not expired; `tenantry token create` makes one",
        ));
    };
    limits.tokens.check_key(&token.id).map_err(|_| slower())?;
    limits.all.check().map_err(|_| slower())?;
    Ok(Caller { access: token.access, asker: asker(format!("{} {}", token.id, token.label), peer) })
}

fn admit(caller: &Caller, method: &Method, path: &str) -> Answer<()> {
    let needed = needed(method, path)?;
    if caller.access >= needed {
        return Ok(());
    }
    let (needed, yours) = (needed.as_str(), caller.access.as_str());
    Err(Problem::forbidden(format!("this needs a token of {needed}, and yours is of {yours}")))
}

fn slower() -> Problem {
    Problem {
        retry_after: Some(1),
        ..Problem::too_many(format!(
            "at most {PER_SECOND} requests a second of one token, and {ALL_PER_SECOND} of all of them; slow down"
        ))
    }
}

/// What an operation asks for; HEAD is GET.
fn needed(method: &Method, path: &str) -> Answer<Access> {
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    let of_path = || OPERATIONS.iter().filter(|(_, at, _)| *at == path);
    match of_path().find(|(with, ..)| *with == method) {
        Some((_, _, access)) => Ok(*access),
        None if of_path().next().is_some() => {
            Err(Problem::method(format!("{method} does nothing here; see /openapi.json")))
        }
        None => Err(Problem::not_found("no such page; see /openapi.json")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_its_secret_and_its_time() {
        let (id, text, hash) = new_token();
        let now = OffsetDateTime::UNIX_EPOCH + time::Duration::days(1);
        let token = Token {
            id,
            label: "t".into(),
            access: Access::Viewer,
            hash: hex(&hash),
            expires_at: now + time::Duration::seconds(1),
            created_at: now,
        };
        let known = Known { tokens: vec![token], ..Known::default() };
        assert!(prove(&known, &text, now).is_some());
        assert!(prove(&known, &text, now + time::Duration::seconds(1)).is_none(), "expired");
        for wrong in [&text[..text.len() - 1], "", "tny_", "tny__", &text[4..], &text.replace("tny_", "tny_0")] {
            assert!(prove(&known, wrong, now).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_stranger_is_his_network() {
        let at = |text: &str| network(Some(text.parse().unwrap())).unwrap().to_string();
        assert_eq!(at("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(at("::ffff:192.0.2.7"), "192.0.2.7");
    }

    #[test]
    fn what_is_not_in_the_table_is_refused() {
        assert!(needed(&Method::GET, "/v1/nothing").is_err());
        assert!(needed(&Method::DELETE, "/v1/servers").is_err());
        assert_eq!(needed(&Method::HEAD, "/v1/servers").unwrap(), Access::Viewer);
    }
}
