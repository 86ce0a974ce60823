//! Operations on tokens.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use super::{
    Plane, Who, auth,
    body::Body,
    problem::{Answer, Errors, Problem},
    tenants::audited,
    types::{NewToken, Page, TokenMade, TokenView},
};

/// Tokens, without their secrets.
#[utoipa::path(get, path = "/v1/tokens", operation_id = "list_tokens", responses((status = 200, body = Page<TokenView>), Errors))]
pub async fn list(State(plane): Plane) -> Json<Page<TokenView>> {
    let known = plane.known();
    let items = known.tokens.iter().map(|token| TokenView {
        id: token.id.clone(),
        label: token.label.clone(),
        access: token.access,
        expires_at: token.expires_at,
        created_at: token.created_at,
    });
    Json(Page { items: items.collect(), next: None })
}

/// A new token; its text is in this answer and nowhere else.
#[utoipa::path(post, path = "/v1/tokens", operation_id = "create_token", request_body = NewToken,
    responses((status = 201, body = TokenMade), Errors))]
pub async fn create(State(plane): Plane, who: Who, Body(wish): Body<NewToken>) -> Answer<Response> {
    check(&wish)?;
    let (id, token, hash) = auth::new_token();
    let expires_at = expiry(&wish);
    let shown = json!({ "id": id, "label": wish.label, "access": wish.access, "days": wish.days });
    audited(&plane, &who, "create_token", None, shown, async {
        plane.catalog.insert_token(&id, &wish.label, wish.access, &hash, expires_at).await?;
        Ok(plane.refresh().await?)
    })
    .await?;
    Ok((StatusCode::CREATED, Json(TokenMade { token, id, expires_at })).into_response())
}

/// # Errors
/// The label or the time cannot be.
pub fn check(wish: &NewToken) -> Answer<()> {
    if !(1..=100).contains(&wish.label.len()) || wish.label.contains(char::is_control) {
        return Err(Problem::invalid("label: must be 1 to 100 bytes without control characters"));
    }
    if !(1..=3650).contains(&wish.days) {
        return Err(Problem::invalid("days: must be 1 to 3650"));
    }
    Ok(())
}

#[must_use]
pub fn expiry(wish: &NewToken) -> OffsetDateTime {
    OffsetDateTime::now_utc().saturating_add(Duration::days(i64::from(wish.days)))
}

/// A token is good no more.
#[utoipa::path(delete, path = "/v1/tokens/{token}", operation_id = "delete_token", params(("token" = String, Path)),
    responses((status = 204), Errors))]
pub async fn delete(State(plane): Plane, who: Who, Path(id): Path<String>) -> Answer<StatusCode> {
    if !plane.known().tokens.iter().any(|token| token.id == id) {
        return Err(Problem::not_found("no token of that id"));
    }
    audited(&plane, &who, "delete_token", None, json!({ "id": id }), async {
        plane.catalog.delete_token(&id).await?;
        Ok(plane.refresh().await?)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
