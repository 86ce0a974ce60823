//! `tenantry check`: what is wrong with the settings, then a real login for every (tenant, role), the way the proxy does it.
//!
//! It also says what each tenant's budget comes to in the worst case, when everybody wants all they can get. What it does not do: write anything, or hold more than `MAX_AT_ONCE` connections to one machine's servers.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::Serialize;
use tenantry_config::{Control, OrAuto, Problem, Problems, Role, RoleSecret, Settings, Tenant};
use tenantry_proxy::{
    budget::{fair::Budget, share::worst_case},
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

use crate::{cli, failure::Failure, output};

/// Logins under way at once: a check must not be the storm that the pooler guards against.
const MAX_AT_ONCE: usize = 4;
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

pub async fn run(args: cli::Check) -> Result<(), Failure> {
    let settings = match args.source.load() {
        Ok(settings) => settings,
        Err(problems) => return Err(refuse(&problems, args.json)?),
    };
    let checked = check_all(&settings).await?;
    let (rows, budgets) = (&checked.rows, budgets(&settings, &checked));
    let impossible: Vec<_> =
        settings.servers.iter().filter_map(|(name, server)| over(name, server, &settings, &checked)).collect();
    output::line(&if args.json {
        json(&Report::Checked { logins: rows, budgets: &budgets, problems: &impossible })?
    } else {
        [show(rows), show_budgets(&budgets)].into_iter().chain(impossible.clone()).collect::<Vec<_>>().join("\n\n")
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
    Checked { logins: &'a [Row], budgets: &'a [BudgetRow], problems: &'a [String] },
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

/// Every role of every tenant, and Tenantry itself where it has a login of its own.
fn who_logs_in(settings: &Settings) -> Vec<(String, Tenant, Role)> {
    let mut all = Vec::new();
    for (name, tenant) in &settings.tenants {
        let roles = tenant.roles.iter().chain(&settings.roles);
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

/// The cap that `serve` will work with.
fn cap(name: &str, server: &tenantry_config::Server, checked: &Checked) -> Option<u32> {
    match server.cap {
        OrAuto::Is(cap) => Some(cap.get()),
        OrAuto::Auto => checked.slots.get(name).map(|slots| slots.saturating_sub(server.reserve).max(1)),
    }
}

/// The tenant's budget, as far as the pools of its roles can use it.
fn allowance(tenant: &Tenant, shared: &[Role]) -> Budget {
    let sizes = tenant.roles.iter().chain(shared).map(|role| role.pool_size.unwrap_or(tenant.pool.pool_size));
    let most = sizes.fold(0, u32::saturating_add);
    let budget = Budget::of(tenant);
    Budget { ceiling: budget.ceiling.min(most), ..budget }
}

fn budgets(settings: &Settings, checked: &Checked) -> Vec<BudgetRow> {
    let mut rows = Vec::new();
    for (name, server) in &settings.servers {
        let here: Vec<_> = settings.tenants.iter().filter(|(_, tenant)| &tenant.server == name).collect();
        let allowances: Vec<Budget> = here.iter().map(|(_, tenant)| allowance(tenant, &settings.roles)).collect();
        let cap = cap(name, server, checked);
        let shares = cap.map(|cap| worst_case(cap, &allowances));
        for (n, (id, tenant)) in here.into_iter().enumerate() {
            rows.push(BudgetRow {
                tenant: id.to_string(),
                server: name.clone(),
                floor: tenant.floor,
                ceiling: tenant.ceiling,
                weight: tenant.weight.get(),
                worst_case: shares.as_ref().and_then(|shares| shares.get(n).copied()),
                cap,
            });
        }
    }
    rows
}

/// Floors that an auto cap cannot keep; a written cap was checked with the settings.
fn over(name: &str, server: &tenantry_config::Server, settings: &Settings, checked: &Checked) -> Option<String> {
    let cap = cap(name, server, checked)?;
    let sum: u32 = settings.tenants.values().filter(|tenant| tenant.server == name).map(|tenant| tenant.floor).sum();
    (sum > cap).then(|| {
        format!(
            "server {name}: the cap is {cap}, less than the {sum} of all floors; lower them, or raise max_connections"
        )
    })
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
