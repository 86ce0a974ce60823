//! `tenantry check`: what is wrong with the settings, then a real login for every (tenant, role), the way the proxy does it.
//!
//! It also says what each tenant's budget comes to in the worst case, when everybody wants all they can get. The tenants of
//! the catalog are in it where the control database can be asked. What it does not do: write anything, or hold more than
//! `MAX_AT_ONCE` connections to one machine's servers.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::Serialize;
use tenantry_admin::catalog::Catalog;
use tenantry_config::{Control, Floors, Problem, Problems, Role, RoleSecret, Settings, Tenant, TenantId, floors_fit};
use tenantry_proxy::{
    budget::{
        fair::Budget,
        share::{floors, worst_case},
    },
    clock::Millis,
    net::{stream::Stream, tls::Connector},
    pool::decision::SlotId,
    server::{
        conn::ServerConn,
        connect::{self, Endpoint, Login},
        credentials::Credentials,
        upkeep,
    },
};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{cli, failure::Failure, output, serve::catalog_login};

/// Logins under way at once: a check must not be the storm that the pooler guards against.
const MAX_AT_ONCE: usize = 4;
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
const CATALOG_LIMIT: Duration = Duration::from_secs(10);

pub async fn run(args: cli::Check) -> Result<(), Failure> {
    let settings = match args.source.load() {
        Ok(settings) => settings,
        Err(problems) => return Err(refuse(&problems, args.json)?),
    };
    let (settings, notes) = with_catalog(settings).await;
    let Checked { rows, slots } = check_all(&settings).await?;
    let (budgets, impossible) = (budgets(&settings, &slots), impossible(&settings, &slots));
    output::line(&if args.json {
        json(&Report::Checked { logins: &rows, budgets: &budgets, problems: &impossible, notes: &notes })?
    } else {
        let told = notes.iter().chain(&impossible).cloned();
        [show(&rows), show_budgets(&budgets)].into_iter().chain(told).collect::<Vec<_>>().join("\n\n")
    })?;
    let failed = rows.iter().filter(|row| row.status == Status::Failed).count();
    match failed {
        0 if impossible.is_empty() => Ok(()),
        0 => Err(Failure::Usage("floors do not fit".to_owned())),
        n => Err(Failure::Unavailable(format!("{n} of {} logins failed", rows.len()))),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Report<'a> {
    Checked { logins: &'a [Row], budgets: &'a [BudgetRow], problems: &'a [String], notes: &'a [String] },
    Problems(Vec<ProblemRow>),
}

#[derive(Serialize)]
struct ProblemRow {
    place: String,
    key: String,
    message: String,
}

/// What a tenant may count on. Numbers of server connections.
#[derive(Debug, Serialize)]
struct BudgetRow {
    tenant: String,
    server: String,
    floor: u32,
    /// None: as many as the cap allows.
    ceiling: Option<u32>,
    weight: u32,
    /// What it gets when every tenant of the server wants all it can get; none if the server's cap is not known.
    worst_case: Option<u32>,
    /// The server's, if it is known.
    cap: Option<u32>,
}

/// What the logins told.
struct Checked {
    rows: Vec<Row>,
    /// Connections that a server has for roles that are not privileged.
    slots: BTreeMap<String, u32>,
}

/// What one (tenant, role) gave.
#[derive(Debug, Serialize)]
struct Row {
    tenant: String,
    role: String,
    server: String,
    database: String,
    status: Status,
    /// `TLSv1_3`, or none.
    tls: Option<String>,
    server_version: Option<String>,
    login_milliseconds: Option<u64>,
    /// Why not.
    reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    /// Logged in, in the right database and as the right role.
    Ok,
    Failed,
    /// Only a client's own login can show it: Tenantry has a verifier and no password.
    Skipped,
}

fn refuse(problems: &Problems, as_json: bool) -> Result<Failure, Failure> {
    if as_json {
        let row = |p: &Problem| ProblemRow { place: p.place.clone(), key: p.key.clone(), message: p.message.clone() };
        let rows = problems.as_slice().iter().map(row).collect();
        output::line(&json(&Report::Problems(rows))?)?;
    }
    Ok(Failure::from(problems.clone()))
}

fn json(report: &Report<'_>) -> Result<String, Failure> {
    serde_json::to_string_pretty(report).map_err(Failure::internal("cannot write JSON"))
}

/// The settings as `serve` would have them, with the catalog's tenants in; and what could not be taken over.
async fn with_catalog(settings: Settings) -> (Settings, Vec<String>) {
    let Some((server, control)) = catalog_login(&settings) else { return (settings, Vec::new()) };
    let known = async {
        let catalog = Catalog::new(server, control).map_err(|error| error.to_string())?;
        let known = tokio::time::timeout(CATALOG_LIMIT, catalog.load()).await.map_err(|_| "no answer".to_owned())?;
        known.map_err(|error| error.to_string())
    };
    match known.await {
        Ok(known) => known.merge(&settings),
        // A first start makes it, so this alone is nothing wrong; a login that fails is told with the others.
        Err(error) => (settings, vec![format!("the catalog cannot be read, so its tenants are not in this: {error}")]),
    }
}

/// Every role of every tenant that has a database, and Tenantry itself where it has a login of its own.
fn who_logs_in(settings: &Settings) -> Vec<(String, Tenant, Role)> {
    let mut all = Vec::new();
    for (name, tenant) in settings.tenants.iter().filter(|(_, tenant)| tenant.standing.state.has_database()) {
        let roles = tenant.all_roles(&settings.roles);
        all.extend(roles.map(|role| (name.to_string(), tenant.clone(), role.clone())));
    }
    for (name, server) in &settings.servers {
        if let Some(Control { role, database, secret, .. }) = server.control.clone() {
            let tenant = Tenant { server: name.clone(), database: Some(database), ..Tenant::default() };
            let role = Role { name: role, secret, pool_mode: None, pool_size: None, former: None };
            all.push((CONTROL.to_owned(), tenant, role));
        }
    }
    all
}

async fn check_all(settings: &Settings) -> Result<Checked, Failure> {
    let places = Arc::new(Semaphore::new(MAX_AT_ONCE));
    let mut logins = JoinSet::new();
    for (name, tenant, role) in who_logs_in(settings) {
        let Some(server) = settings.servers.get(&tenant.server).cloned() else { continue };
        let row = blank(&name, &tenant, &role);
        let connector = Connector::load(&server.tls, &server.host);
        let (login, limit) = (login(&tenant, &role, &row.database), tenant.pool.server_connect_timeout);
        let (places, order) = (Arc::clone(&places), logins.len());
        logins.spawn(async move {
            let _place = places.acquire_owned().await;
            let endpoint = connector.map(|connector| endpoint(&server, connector));
            let row = match (endpoint, login) {
                (Err(error), _) => (Row { reason: Some(format!("TLS: {error}")), ..row }, None),
                (_, None) => (Row { status: Status::Skipped, reason: Some(NEEDS_CLIENT.to_owned()), ..row }, None),
                (Ok(endpoint), Some(login)) => attempt(row, &endpoint, &login, limit).await,
            };
            (order, row)
        });
    }
    let mut rows = Vec::with_capacity(logins.len());
    while let Some(done) = logins.join_next().await {
        rows.push(done.map_err(Failure::internal("a check was lost"))?);
    }
    rows.sort_by_key(|(order, _)| *order);
    let (rows, slots): (Vec<Row>, Vec<Option<u32>>) = rows.into_iter().map(|(_, told)| told).unzip();
    let known = rows.iter().zip(slots).filter_map(|(row, slots)| Some((row.server.clone(), slots?)));
    let slots = known.collect();
    Ok(Checked { rows, slots })
}

/// What each tenant gets when all of a server's tenants want all they can get. Where `[tenants."*"]` is served, any number
/// of databases may, and nobody can count on more than its floor.
fn shares(cap: u32, name: &str, settings: &Settings, here: &[(&TenantId, &Tenant)]) -> Vec<u32> {
    let allowances: Vec<Budget> = here.iter().map(|(_, tenant)| allowance(tenant, &settings.roles)).collect();
    let is_open = settings.any_tenant.as_ref().is_some_and(|any| any.server == name);
    if is_open { floors(cap, &allowances) } else { worst_case(cap, &allowances) }
}

/// The tenant's budget, as far as the pools of its roles can use it.
fn allowance(tenant: &Tenant, shared: &[Role]) -> Budget {
    let budget = Budget::of(tenant);
    Budget { ceiling: budget.ceiling.min(tenant.most_connections(shared)), ..budget }
}

/// In the order of the names, `"*"` last. The cap is the most that `serve` holds: less, while others leave less than that.
fn budgets(settings: &Settings, slots: &BTreeMap<String, u32>) -> Vec<BudgetRow> {
    let mut rows = Vec::new();
    for (name, server) in &settings.servers {
        let is_here = |tenant: &Tenant| &tenant.server == name && tenant.standing.state.has_database();
        let here: Vec<_> = settings.tenants.iter().filter(|(_, tenant)| is_here(tenant)).collect();
        let cap = server.cap_with(slots.get(name).copied());
        let shares = cap.map(|cap| shares(cap, name, settings, &here));
        let row = |tenant: String, of: &Tenant, worst_case| BudgetRow {
            tenant,
            server: name.clone(),
            floor: of.floor,
            ceiling: of.ceiling,
            weight: of.weight.get(),
            worst_case,
            cap,
        };
        for (n, (id, tenant)) in here.into_iter().enumerate() {
            rows.push(row(id.to_string(), tenant, shares.as_ref().and_then(|shares| shares.get(n).copied())));
        }
        let any = settings.any_tenant.as_ref().filter(|any| &any.server == name);
        rows.extend(any.map(|any| row("*".to_owned(), any, cap.map(|_| 0))));
    }
    rows
}

/// Floors that cannot all be kept, with their sums.
fn impossible(settings: &Settings, slots: &BTreeMap<String, u32>) -> Vec<String> {
    let over = floors_fit(settings, |name| slots.get(name).copied()).err();
    over.map_or_else(Vec::new, |over| over.0.iter().map(Floors::sums).collect())
}

fn show_budgets(rows: &[BudgetRow]) -> String {
    let or_dash = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    output::table(
        ["TENANT", "SERVER", "FLOOR", "CEILING", "WEIGHT", "WORST CASE", "CAP"],
        rows.iter().map(|row| {
            [
                row.tenant.clone(),
                row.server.clone(),
                row.floor.to_string(),
                row.ceiling.map_or_else(|| "off".to_owned(), |n| n.to_string()),
                row.weight.to_string(),
                or_dash(row.worst_case),
                or_dash(row.cap),
            ]
        }),
    )
}

/// In the place of a tenant's name, which has no bracket.
const CONTROL: &str = "(control)";
const NEEDS_CLIENT: &str = "only a SCRAM verifier is known; the first client that logs in proves it";

fn blank(name: &str, tenant: &Tenant, role: &Role) -> Row {
    Row {
        tenant: name.to_owned(),
        role: role.name.clone(),
        server: tenant.server.clone(),
        database: tenant.database.clone().unwrap_or_else(|| name.to_owned()),
        status: Status::Failed,
        tls: None,
        server_version: None,
        login_milliseconds: None,
        reason: None,
    }
}

/// How the proxy would log in with what the settings alone tell; `None` if that takes a client.
fn login(tenant: &Tenant, role: &Role, database: &str) -> Option<Login> {
    let credentials = match &role.secret {
        RoleSecret::None => Credentials::None,
        RoleSecret::Plain(secret) => Credentials::Password(secret.expose().to_owned().into()),
        RoleSecret::Md5(secret) => Credentials::Md5(secret.expose().to_owned().into()),
        RoleSecret::Scram(_) => return None,
    };
    Some(Login {
        database: database.to_owned(),
        role: role.name.clone(),
        credentials,
        max_prepared_statements: tenant.pool.max_prepared_statements,
    })
}

fn endpoint(server: &tenantry_config::Server, connector: Connector) -> Endpoint {
    Endpoint {
        host: server.host.clone(),
        port: server.port,
        tls_mode: server.tls.mode,
        direct_tls: server.tls.direct,
        connector,
        tcp_user_timeout: server.tcp_user_timeout,
        last_good: parking_lot::Mutex::new(None),
    }
}

async fn attempt(row: Row, endpoint: &Endpoint, login: &Login, limit: Duration) -> (Row, Option<u32>) {
    let started = Millis::now();
    let connected = connect::connect_within(limit, endpoint, login, SlotId(0)).await;
    let took = u64::try_from(Millis::now().since(started).as_millis()).unwrap_or(u64::MAX);
    match connected {
        Ok((conn, room)) => {
            let slots = room.map(|room| room.slots);
            let row = Row {
                status: Status::Ok,
                tls: tls_version(&conn),
                server_version: conn.baseline("server_version").map(str::to_owned),
                login_milliseconds: Some(took),
                ..row
            };
            // PostgreSQL takes Terminate within milliseconds; a server that does not is not waited for.
            let _ = tokio::time::timeout(CLOSE_LIMIT, upkeep::close(Box::new(conn), endpoint)).await;
            (row, slots)
        }
        Err(failed) => (Row { reason: Some(failed.error.to_string()), ..row }, None),
    }
}

fn tls_version(conn: &ServerConn) -> Option<String> {
    match &conn.stream {
        Stream::Tls(tls) => tls.get_ref().1.protocol_version().map(|version| format!("{version:?}")),
        Stream::Tcp(_) | Stream::Unix(_) => None,
    }
}

fn show(rows: &[Row]) -> String {
    let header = ["TENANT", "ROLE", "SERVER", "DATABASE", "TLS", "POSTGRESQL", "LOGIN", "RESULT"];
    output::table(
        header,
        rows.iter().map(|row| {
            let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
            let result = match (row.status, &row.reason) {
                (Status::Ok, _) => "ok".to_owned(),
                (Status::Failed, reason) => format!("failed: {}", text(reason)),
                (Status::Skipped, reason) => format!("skipped: {}", text(reason)),
            };
            let took = row.login_milliseconds.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"));
            [
                row.tenant.clone(),
                row.role.clone(),
                row.server.clone(),
                row.database.clone(),
                row.tls.clone().unwrap_or_else(|| "none".to_owned()),
                text(&row.server_version),
                took,
                result,
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(name: &str) -> Role {
        Role { name: name.into(), secret: RoleSecret::None, pool_mode: None, pool_size: None, former: None }
    }

    /// A server with a cap, known by what PostgreSQL has, and tenants on it.
    fn settings(tenants: Vec<(&str, Tenant)>) -> (Settings, BTreeMap<String, u32>) {
        let mut settings = Settings::default();
        settings.servers.insert("main".into(), tenantry_config::Server { reserve: 0, ..Default::default() });
        for (name, tenant) in tenants {
            let tenant = Tenant { server: "main".into(), roles: vec![role("app")], ..tenant };
            settings.tenants.insert(TenantId::parse(name).expect("a name"), tenant);
        }
        (settings, [("main".to_owned(), 12)].into())
    }

    fn worst_cases(settings: &Settings, slots: &BTreeMap<String, u32>) -> Vec<(String, Option<u32>)> {
        budgets(settings, slots).into_iter().map(|row| (row.tenant, row.worst_case)).collect()
    }

    #[test]
    fn a_role_of_its_own_hides_the_shared_one_of_the_same_name() {
        let (mut settings, slots) = settings(vec![("a", Tenant::default()), ("b", Tenant::default())]);
        settings.roles = vec![role("app"), role("more")];
        settings.tenants.values_mut().for_each(|tenant| tenant.pool.pool_size = 2);
        let names: Vec<_> = who_logs_in(&settings).into_iter().map(|(name, _, role)| (name, role.name)).collect();
        let of = |tenant: &str, role: &str| (tenant.to_owned(), role.to_owned());
        assert_eq!(names, [of("a", "app"), of("a", "more"), of("b", "app"), of("b", "more")]);
        // Two pools of two each.
        assert_eq!(worst_cases(&settings, &slots), [("a".into(), Some(4)), ("b".into(), Some(4))]);
    }

    #[test]
    fn where_any_database_is_served_only_the_floor_is_certain() {
        let (mut settings, slots) =
            settings(vec![("a", Tenant { floor: 3, ..Tenant::default() }), ("b", Tenant::default())]);
        assert_eq!(worst_cases(&settings, &slots), [("a".into(), Some(6)), ("b".into(), Some(6))]);
        settings.any_tenant = Some(Tenant { server: "main".into(), ..Tenant::default() });
        let all = [("a".into(), Some(3)), ("b".into(), Some(0)), ("*".into(), Some(0))];
        assert_eq!(worst_cases(&settings, &slots), all);
    }

    #[test]
    fn what_has_no_database_wants_nothing_but_its_promise_counts() {
        let archived = tenantry_config::Standing {
            number: Some(1),
            state: tenantry_config::TenantState::Archived,
            plans: 0,
            room: 0,
        };
        let (settings, slots) = settings(vec![
            ("a", Tenant { floor: 8, ..Tenant::default() }),
            ("b", Tenant { floor: 5, standing: archived, ..Tenant::default() }),
        ]);
        assert_eq!(worst_cases(&settings, &slots), [("a".into(), Some(12))]);
        assert_eq!(who_logs_in(&settings).len(), 1);
        assert!(impossible(&settings, &slots)[0].contains("cap of 12 is less than the 13 of all floors (a: 8, b: 5)"));
    }

    #[test]
    fn a_cap_that_nobody_knows_has_no_worst_case() {
        let (settings, _) = settings(vec![("a", Tenant { floor: u32::MAX, ..Tenant::default() })]);
        assert_eq!(worst_cases(&settings, &BTreeMap::new()), [("a".into(), None)]);
        assert!(impossible(&settings, &BTreeMap::new()).is_empty());
    }
}
