//! Errors of the API: RFC 9457 problem documents, each with a stable `type`.

use std::collections::BTreeMap;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::{
    IntoResponses, PartialSchema, ToSchema,
    openapi::{ContentBuilder, RefOr, ResponseBuilder, response::Response as Described},
};

use crate::{catalog::CatalogError, lifecycle::StepError};

/// What went wrong (RFC 9457), as `application/problem+json`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// Stable: `urn:tenantry:problem:` and the kind.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind in words.
    pub title: &'static str,
    /// The HTTP status.
    #[schema(value_type = u16)]
    #[serde(serialize_with = "number")]
    pub status: StatusCode,
    /// What happened, and what to do.
    pub detail: String,
    /// The job that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<i64>,
    #[serde(skip)]
    pub retry_after: Option<u32>,
}

fn number<S: serde::Serializer>(status: &StatusCode, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u16(status.as_u16())
}

pub type Answer<T> = Result<T, Problem>;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $status:ident, $kind:literal, $title:literal;)*) => {
        impl Problem {
            $($(#[$doc])* pub fn $name(detail: impl Into<String>) -> Self {
                Self {
                    kind: concat!("urn:tenantry:problem:", $kind).to_owned(),
                    title: $title,
                    status: StatusCode::$status,
                    detail: detail.into(),
                    job: None,
                    retry_after: None,
                }
            })*
        }

        const STATUSES: &[StatusCode] = &[$(StatusCode::$status),*];
    };
}

kinds! {
    malformed = BAD_REQUEST, "malformed", "the request cannot be read";
    no_token = UNAUTHORIZED, "no-token", "a token is needed";
    forbidden = FORBIDDEN, "forbidden", "the token does not allow this";
    not_found = NOT_FOUND, "not-found", "there is no such thing";
    method = METHOD_NOT_ALLOWED, "method", "this cannot be done here";
    slow = REQUEST_TIMEOUT, "slow", "the request came too slowly";
    exists = CONFLICT, "exists", "the name is taken";
    busy = CONFLICT, "busy", "a job is under way";
    wrong_state = CONFLICT, "wrong-state", "not in this state";
    job_failed = CONFLICT, "job-failed", "the job gave up, and undid what it had done";
    changed = PRECONDITION_FAILED, "changed", "somebody else changed it";
    too_large = PAYLOAD_TOO_LARGE, "too-large", "the request is too large";
    media_type = UNSUPPORTED_MEDIA_TYPE, "media-type", "not this Content-Type";
    invalid = UNPROCESSABLE_ENTITY, "invalid", "not a valid value";
    no_version = PRECONDITION_REQUIRED, "no-version", "If-Match is needed";
    too_many = TOO_MANY_REQUESTS, "too-many", "too many requests";
    internal = INTERNAL_SERVER_ERROR, "internal", "a fault of Tenantry";
    away = SERVICE_UNAVAILABLE, "away", "the control database is away";
}

impl Problem {
    #[must_use]
    pub fn of_job(self, job: i64) -> Self {
        Self { job: Some(job), ..self }
    }

    /// The last word of `type`, for the audit log.
    #[must_use]
    pub fn word(&self) -> &str {
        self.kind.rsplit(':').next().unwrap_or_default()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"tenantry\""));
        }
        response
    }
}

impl From<CatalogError> for Problem {
    fn from(error: CatalogError) -> Self {
        match error {
            CatalogError::Away(_) => {
                // What it is and where is for the log, not for whoever asks.
                tracing::warn!(%error, "an API request could not reach the catalog");
                Self { retry_after: Some(5), ..Self::away("the control database does not answer; try again") }
            }
            error => {
                tracing::error!(%error, "the catalog refused a request of the API");
                Self::internal("the catalog refused it; the log says why")
            }
        }
    }
}

impl From<StepError> for Problem {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Away(why) | StepError::Lost(why) | StepError::InUse(why) => {
                tracing::warn!(error = why, "an API request could not reach a server");
                Self { retry_after: Some(5), ..Self::away("the server does not answer; try again") }
            }
            StepError::Refused(why) => Self::wrong_state(why),
        }
    }
}

/// Every status that any operation may end with, for the document.
pub struct Errors;

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Described>> {
        let document = |status: &StatusCode| {
            let content = ContentBuilder::new().schema(Some(Problem::schema())).build();
            let words = status.canonical_reason().unwrap_or_default();
            let response = ResponseBuilder::new().description(words).content("application/problem+json", content);
            (status.as_str().to_owned(), RefOr::T(response.build()))
        };
        STATUSES.iter().filter(|status| !status.is_server_error() || status.as_u16() == 503).map(document).collect()
    }
}
