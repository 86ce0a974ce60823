//! Who may do what: one table of all operations, and the one place that asks it.
//!
//! What always holds: an operation that is not in the table is refused; a token's secret is compared in constant time and
//! kept only as a hash; requests are limited per token, and per address before a token was shown.

use std::{net::IpAddr, num::NonZeroU32, sync::Arc};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use governor::{DefaultKeyedRateLimiter, Quota};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use time::OffsetDateTime;

use super::problem::{Answer, Problem};
use crate::{
    catalog::{
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
    ("GET", "/v1/jobs", Access::Viewer),
    ("GET", "/v1/jobs/{job}", Access::Viewer),
    ("GET", "/v1/jobs/{job}/events", Access::Viewer),
    ("POST", "/v1/jobs/{job}/cancel", Access::Operator),
    ("GET", "/v1/archives", Access::Viewer),
    ("GET", "/v1/audit", Access::Admin),
    ("GET", "/v1/tokens", Access::Admin),
    ("POST", "/v1/tokens", Access::Admin),
    ("DELETE", "/v1/tokens/{token}", Access::Admin),
    ("GET", "/v1/explain/{tenant}", Access::Viewer),
    ("GET", "/v1/registry.md", Access::Viewer),
];

/// Requests of one token, or of one address without a token: a burst of so many, then so many a second.
const BURST: NonZeroU32 = NonZeroU32::MIN.saturating_add(199);
const PER_SECOND: NonZeroU32 = NonZeroU32::MIN.saturating_add(99);
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
    strangers: DefaultKeyedRateLimiter<Option<IpAddr>>,
}

impl Default for Limits {
    fn default() -> Self {
        let quota = |rate, burst| Quota::per_second(rate).allow_burst(burst);
        Self {
            tokens: DefaultKeyedRateLimiter::keyed(quota(PER_SECOND, BURST)),
            strangers: DefaultKeyedRateLimiter::keyed(quota(STRANGERS_PER_SECOND, STRANGERS_BURST)),
        }
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

/// The one way into `/v1`.
pub async fn guard(
    State((plane, limits)): State<(Arc<ControlPlane>, Arc<Limits>)>,
    mut request: Request,
    next: Next,
) -> Response {
    match admit(&plane, &limits, &request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(problem) => problem.into_response(),
    }
}

fn admit(plane: &ControlPlane, limits: &Limits, request: &Request) -> Answer<Caller> {
    let peer = request.extensions().get::<Peer>().and_then(|peer| peer.0);
    let known = plane.known();
    let token = shown(request.headers()).and_then(|shown| prove(&known, shown, OffsetDateTime::now_utc()));
    let Some(token) = token else {
        limits.strangers.check_key(&peer).map_err(|_| slower())?;
        if limits.strangers.len() > MANY_KEYS {
            limits.strangers.retain_recent();
        }
        return Err(Problem::no_token(
            "send Authorization: Bearer TOKEN, with a token that exists and has not expired; `tenantry token create` makes one",
        ));
    };
    limits.tokens.check_key(&token.id).map_err(|_| slower())?;
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let needed = needed(request.method(), path)?;
    if token.access < needed {
        return Err(Problem::forbidden(format!(
            "this needs a token of {}, and yours is of {}",
            needed.as_str(),
            token.access.as_str()
        )));
    }
    let asker = Asker {
        actor: format!("{} {}", token.id, token.label),
        peer: peer.map_or_else(String::new, |peer| peer.to_string()),
        request: hex(&rand::random::<[u8; 8]>()),
    };
    Ok(Caller { access: token.access, asker })
}

fn slower() -> Problem {
    Problem {
        retry_after: Some(1),
        ..Problem::too_many(format!("at most {PER_SECOND} requests a second of one token; slow down"))
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
    fn what_is_not_in_the_table_is_refused() {
        assert!(needed(&Method::GET, "/v1/nothing").is_err());
        assert!(needed(&Method::DELETE, "/v1/servers").is_err());
        assert_eq!(needed(&Method::HEAD, "/v1/servers").unwrap(), Access::Viewer);
    }
}
