//! Operations on tokens.

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use super::{
    Plane, Who, auth,
    begin::{audited, deed, served},
    body::{Asked, At, Body},
    page,
    problem::{Answer, Errors, Problem},
    types::{NewToken, Page, PageQuery, TokenMade, TokenView},
};
use crate::catalog::{Catalog, CatalogError, audit::Deed, store::Asker};

/// Tokens, without their secrets, by id.
#[utoipa::path(get, path = "/v1/tokens", operation_id = "list_tokens", params(PageQuery),
    responses((status = 200, body = Page<TokenView>), Errors))]
pub async fn list(
    State(plane): Plane,
    Asked(PageQuery { after, limit }): Asked<PageQuery>,
) -> Answer<Json<Page<TokenView>>> {
    let (limit, after, known) = (page::size(limit)?, page::word(after)?, plane.known());
    let mut tokens: Vec<_> =
        known.tokens.iter().filter(|token| after.as_ref().is_none_or(|after| token.id > *after)).collect();
    tokens.sort_by(|a, b| a.id.cmp(&b.id));
    let (tokens, next) = page::cut(tokens, limit, |token| token.id.clone());
    let items = tokens.into_iter().map(|token| TokenView {
        id: token.id.clone(),
        label: token.label.clone(),
        access: token.access,
        expires_at: token.expires_at,
        created_at: token.created_at,
    });
    Ok(Json(Page { items: items.collect(), next }))
}

/// A new token; its text is in this answer and nowhere else.
#[utoipa::path(post, path = "/v1/tokens", operation_id = "create_token", request_body = NewToken,
    responses((status = 201, body = TokenMade), Errors))]
pub async fn create(State(plane): Plane, who: Who, Body(wish): Body<NewToken>) -> Answer<Response> {
    check(&wish)?;
    let deed = deed(&who, "create_token", None);
    let shown = json!({ "label": wish.label, "access": wish.access, "days": wish.days });
    let made = audited(&plane, &deed, None, shown, async { Ok(insert(&plane.catalog, &deed, &wish).await?) }).await?;
    served(&plane).await;
    Ok((StatusCode::CREATED, Json(made)).into_response())
}

/// A token that the program itself makes, not over the API; `actor`: what for the audit log.
pub async fn make(catalog: &Catalog, actor: &str, wish: &NewToken) -> Result<TokenMade, CatalogError> {
    let asker = Asker { actor: actor.to_owned(), peer: String::new(), request: auth::new_request() };
    insert(catalog, &Deed { asker: &asker, action: "create_token", tenant: None }, wish).await
}

async fn insert(catalog: &Catalog, deed: &Deed<'_>, wish: &NewToken) -> Result<TokenMade, CatalogError> {
    let (id, token, hash) = auth::new_token();
    let expires_at = OffsetDateTime::now_utc().saturating_add(Duration::days(i64::from(wish.days)));
    catalog.insert_token(deed, &id, &wish.label, wish.access, &hash, expires_at).await?;
    Ok(TokenMade { token, id, expires_at })
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

/// A token is good no more.
#[utoipa::path(delete, path = "/v1/tokens/{token}", operation_id = "delete_token", params(("token" = String, Path)),
    responses((status = 204), Errors))]
pub async fn delete(State(plane): Plane, who: Who, At(id): At) -> Answer<StatusCode> {
    let none = || Problem::not_found("no token of that id");
    if !plane.known().tokens.iter().any(|token| token.id == id) {
        return Err(none());
    }
    let deed = deed(&who, "delete_token", None);
    audited(&plane, &deed, None, json!({ "id": id }), async {
        if plane.catalog.delete_token(&deed, &id).await? { Ok(()) } else { Err(none()) }
    })
    .await?;
    // Here it must be gone before the answer: what cannot be read again is told.
    plane.refresh().await?;
    Ok(StatusCode::NO_CONTENT)
}
