//! A database that is there already becomes a tenant.
//!
//! What always holds: a tenant can be archived and deleted, so nothing becomes one that others live on: no database of
//! Tenantry's own, of PostgreSQL's, of another tenant; and none that Tenantry could not rename or drop.

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::json;
use tenantry_config::{RoleSecret, Secret, Server, Settings, TenantState};
use tokio_postgres::Client;

use super::{
    Plane, Who,
    begin::{audited, deed, served, taken},
    body::{At, Body},
    check,
    problem::{Answer, Errors, Problem},
    tagged,
    types::{Adopt, Adopted},
    view,
};
use crate::{
    catalog::{
        model::{Known, RoleRow, Spec, Verifier},
        store::NewTenant,
    },
    control,
    lifecycle::StepError,
    sql,
};

/// PostgreSQL's names are no longer.
const MAX_NAME: usize = 63;
const MAX_VERIFIER: usize = 500;
/// PostgreSQL's and Amazon's own.
const RESERVED: [&str; 4] = ["postgres", "template0", "template1", "rdsadmin"];

/// An existing database and role become a tenant; clients notice nothing. Refused are databases that others live on: the
/// control database of any server, PostgreSQL's own, templates, those that let nobody in, those of a tenant of the settings
/// file or the catalog; and those that Tenantry's role could not change, since it is no member of their owner.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/adopt", operation_id = "adopt_tenant", request_body = Adopt,
    params(("tenant" = String, Path)), responses((status = 201, body = Adopted, headers(("etag" = String))), Errors))]
pub async fn adopt(State(plane): Plane, who: Who, At(name): At, Body(wish): Body<Adopt>) -> Answer<Response> {
    let (file, known) = (plane.file(), plane.known());
    said(&wish)?;
    check::new_name(&name, &file, &known, None)?;
    let server = check::server(wish.server.as_deref(), &file)?;
    check::spec(&wish.spec, &server, &file, &known, None, plane.data.slots(&server))?;
    let database = wish.database.clone().unwrap_or_else(|| name.clone());
    nobody_elses(&database, &server, &file, &known)?;
    let (at, control) = plane.server_of(&file, &server)?;
    let client = control::connect(at, control).await.map_err(StepError::from)?;
    let Found { owner, public_may_connect } = look(&client, &database).await?;
    let role = wish.role.clone().unwrap_or_else(|| owner.clone());
    if file.servers.values().filter_map(|server| server.control.as_ref()).any(|control| control.role == role) {
        return Err(Problem::invalid("role: is Tenantry's own"));
    }
    may_log_in(&client, &role).await?;
    let given = wish.verifier.clone().or_else(|| of_others(&known, &server, &role));
    let verifier = verifier(&client, &role, given, &file).await?;
    let shown = json!({ "server": server, "database": database, "role": role, "spec": wish.spec });
    let new = NewTenant {
        name: name.clone(),
        state: TenantState::Active,
        server,
        database,
        owner_role: owner,
        spec: wish.spec,
        roles: vec![RoleRow::new(role, verifier, false)],
    };
    let deed = deed(&who, "adopt", Some(&name));
    let entry = audited(&plane, &deed, None, shown, async {
        let still = |known: &Known| {
            check::new_name(&new.name, &file, known, None)?;
            nobody_elses(&new.database, &new.server, &file, known)?;
            check::spec(&new.spec, &new.server, &file, known, None, plane.data.slots(&new.server))
        };
        let (entry, _) = plane.catalog.insert_tenant(&deed, &new, None, None, still).await.map_err(taken)??;
        Ok(entry)
    })
    .await?;
    served(&plane).await;
    let adopted = Adopted { tenant: view(&plane, &entry), public_may_connect };
    Ok((StatusCode::CREATED, tagged(entry.version, Json(adopted))).into_response())
}

/// What can be said of the request alone.
fn said(wish: &Adopt) -> Answer<()> {
    let texts = [
        ("database", &wish.database, MAX_NAME),
        ("role", &wish.role, MAX_NAME),
        ("verifier", &wish.verifier, MAX_VERIFIER),
    ];
    for (key, text, most) in texts {
        if text.as_ref().is_some_and(|text| text.is_empty() || text.len() > most || text.contains(char::is_control)) {
            return Err(Problem::invalid(format!("{key}: must be 1 to {most} bytes, without control characters")));
        }
    }
    let Spec { extensions, settings, .. } = &wish.spec;
    if extensions.is_empty() && settings.is_empty() {
        return Ok(());
    }
    Err(Problem::invalid(
        "spec: an adopted database keeps its own extensions and settings; leave them out, and change them there",
    ))
}

/// Whether nobody that the settings or the catalog know of lives on it.
fn nobody_elses(database: &str, server: &str, file: &Settings, known: &Known) -> Answer<()> {
    if RESERVED.contains(&database) {
        return Err(Problem::invalid("database: is PostgreSQL's own; a tenant can be dropped"));
    }
    if file.servers.values().filter_map(|server| server.control.as_ref()).any(|control| control.database == database) {
        return Err(Problem::invalid("database: is the control database of a server; a tenant can be dropped"));
    }
    // Two names of one PostgreSQL are one.
    let is_there =
        |name: &str| name == server || file.servers.get(name).map(place) == file.servers.get(server).map(place);
    let in_file = file
        .tenants
        .iter()
        .find(|(id, tenant)| is_there(&tenant.server) && tenant.database.as_deref().unwrap_or(id.as_str()) == database);
    if let Some((id, _)) = in_file {
        return Err(Problem::invalid(format!("database: {id}, a tenant of the settings file, is served from it")));
    }
    match known.tenants.iter().find(|entry| is_there(&entry.server) && entry.database == database) {
        Some(entry) => Err(Problem::exists(format!("it is the database of {}", entry.name))),
        None => Ok(()),
    }
}

fn place(server: &Server) -> (&str, u16) {
    (&server.host, server.port)
}

struct Found {
    owner: String,
    public_may_connect: bool,
}

/// What PostgreSQL says of the database.
async fn look(client: &Client, database: &str) -> Answer<Found> {
    let row = client.query_opt(sql::ADOPTABLE, &[&database]).await.map_err(StepError::from)?;
    let row = row.ok_or_else(|| Problem::invalid("database: there is none of that name on the server"))?;
    let (is_template, lets_in, limit): (bool, bool, i32) = (row.get(1), row.get(2), row.get(3));
    let owner: String = row.get(0);
    let problem = if is_template {
        "it is a template".to_owned()
    } else if !lets_in || limit == -2 {
        "it lets nobody in (ALLOW_CONNECTIONS false, or a DROP that failed halfway)".to_owned()
    } else if !row.get::<_, bool>(4) {
        format!("Tenantry's role could not rename or drop it; GRANT {owner} TO it first")
    } else {
        return Ok(Found { owner, public_may_connect: row.get(5) });
    };
    Err(Problem::invalid(format!("database: {problem}")))
}

async fn may_log_in(client: &Client, role: &str) -> Answer<()> {
    let row = client.query_opt(sql::ROLE, &[&role]).await.map_err(StepError::from)?;
    let (may_log_in, is_superuser) = row.map_or((false, false), |row| (row.get(1), row.get(2)));
    match (may_log_in, is_superuser) {
        (_, true) => Err(Problem::invalid("role: is a superuser; a tenant's role is not")),
        (true, false) => Ok(()),
        (false, false) => Err(Problem::invalid("role: there is none of that name that may log in")),
    }
}

/// The verifier that another tenant of the server has for the role.
fn of_others(known: &Known, server: &str, role: &str) -> Option<String> {
    let rows = known.tenants.iter().filter(|entry| entry.server == server).flat_map(|entry| &entry.roles);
    rows.into_iter().find(|row| row.name == role)?.verifier.as_ref().map(|verifier| verifier.0.clone())
}

/// `None`: one of `[[roles]]` in the settings has it.
async fn verifier(client: &Client, role: &str, given: Option<String>, file: &Settings) -> Answer<Option<Verifier>> {
    let stored = match given {
        Some(given) => Some(given),
        // Only a superuser may look.
        None => client.query_opt(sql::STORED_VERIFIER, &[&role]).await.ok().flatten().and_then(|row| row.get(0)),
    };
    match stored.map(|text| RoleSecret::classify(Secret::new(text))) {
        Some(Ok(RoleSecret::Scram(secret))) => Ok(Some(Verifier(secret.expose().to_owned()))),
        None if file.roles.iter().any(|shared| shared.name == role) => Ok(None),
        _ => Err(Problem::invalid(
            "verifier: give the role's SCRAM verifier (pg_authid.rolpassword); the control role may not read it",
        )),
    }
}

#[cfg(test)]
mod tests {
    use tenantry_config::{Control, Tenant, TenantId};

    use super::*;

    fn settings() -> Settings {
        let mut file = Settings::default();
        let control = Control {
            role: "control".into(),
            database: "control_of_far".into(),
            secret: RoleSecret::None,
            connection_limits: false,
        };
        let near = Server { host: "h".into(), port: 1, ..Server::default() };
        file.servers.insert("near".into(), near.clone());
        file.servers.insert("near_too".into(), near);
        file.servers.insert("far".into(), Server { host: "f".into(), control: Some(control), ..Server::default() });
        let tenant = Tenant { server: "near".into(), database: Some("shop_db".into()), ..Tenant::default() };
        file.tenants.insert(TenantId::parse("shop").unwrap(), tenant);
        file
    }

    #[test]
    fn what_others_live_on_is_not_adopted() {
        let (file, known) = (settings(), Known::default());
        let status = |database: &str, server: &str| {
            nobody_elses(database, server, &file, &known).map_err(|problem| problem.status.as_u16())
        };
        for database in ["postgres", "template0", "template1", "rdsadmin", "control_of_far", "shop_db"] {
            assert_eq!(status(database, "near"), Err(422), "{database}");
        }
        assert_eq!(status("shop_db", "near_too"), Err(422), "the same PostgreSQL by another name");
        assert_eq!(status("shop_db", "far"), Ok(()));
        assert_eq!(status("shop", "near"), Ok(()), "the tenant's name is not its database");
    }

    #[test]
    fn what_cannot_be_a_name_or_would_not_be_done_is_refused() {
        let adopt = |wish: serde_json::Value| said(&serde_json::from_value(wish).unwrap());
        assert!(adopt(json!({})).is_ok() && adopt(json!({ "role": "r", "spec": { "floor": 1 } })).is_ok());
        for wish in [
            json!({ "role": "a\0" }),
            json!({ "database": "" }),
            json!({ "database": "d".repeat(64) }),
            json!({ "verifier": "v".repeat(501) }),
            json!({ "spec": { "extensions": ["citext"] } }),
            json!({ "spec": { "settings": { "jit": "off" } } }),
        ] {
            assert_eq!(adopt(wish.clone()).unwrap_err().status.as_u16(), 422, "{wish}");
        }
    }
}
