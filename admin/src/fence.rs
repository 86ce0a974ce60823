//! The hard fence: PostgreSQL's own CONNECTION LIMIT of each tenant's database, kept equal to the tenant's ceiling.
//!
//! What always holds: only servers whose `control.connection_limits` says so are touched; a limit that is right is not
//! written; a server that cannot be reached or refuses holds up no other; nothing here is waited for by a client.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tenantry_config::{Server, Settings};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    control::{self, ControlError},
    sql,
};

/// Somebody else may change a limit: it is looked at this often.
const EVERY: Duration = Duration::from_secs(60);
/// Sooner after one has come not to stand.
const RETRY: Duration = Duration::from_secs(5);
/// For all databases of a server.
const PASS_LIMIT: Duration = Duration::from_secs(60);

/// Whether the limit in PostgreSQL is the ceiling, by (server, tenant); only of servers where it is to be.
#[derive(Debug, Default)]
pub struct Fences(Mutex<BTreeMap<(String, String), bool>>);

impl Fences {
    pub(crate) fn all(&self) -> BTreeMap<(String, String), bool> {
        self.0.lock().clone()
    }

    #[cfg(test)]
    pub(crate) fn one(server: &str, tenant: &str) -> Self {
        Self(Mutex::new([((server.to_owned(), tenant.to_owned()), true)].into()))
    }
}

/// By database of one server.
type Wanted = BTreeMap<String, Limit>;

#[derive(Debug, PartialEq, Eq)]
struct Limit {
    /// `None`: none.
    ceiling: Option<u32>,
    /// Who is in the database.
    tenants: Vec<String>,
    /// The log has it already that this fence does not stand.
    is_told: bool,
}

/// Keeps the fences of all servers until `stop`; new settings count at once.
pub async fn keep(mut settings: watch::Receiver<Arc<Settings>>, fences: Arc<Fences>, stop: CancellationToken) {
    loop {
        let now = Arc::clone(&settings.borrow_and_update());
        let pause = tokio::select! {
            () = stop.cancelled() => return,
            is_broken = pass(&now, &fences) => if is_broken { RETRY } else { EVERY },
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
            changed = settings.changed() => if changed.is_err() { return },
        }
    }
}

/// Looks at every server once; true if a fence has come not to stand.
async fn pass(settings: &Arc<Settings>, fences: &Fences) -> bool {
    let mut servers = JoinSet::new();
    // What was told is not told again at every look.
    let broken: BTreeMap<_, _> = fences.all().into_iter().filter(|(_, stands)| !stands).collect();
    for (name, server) in &settings.servers {
        if server.control.as_ref().is_some_and(|control| control.connection_limits) {
            let (name, server, mut wanted) = (name.clone(), server.clone(), wanted(settings, name));
            for limit in wanted.values_mut() {
                limit.is_told = limit.tenants.iter().all(|t| broken.contains_key(&(name.clone(), t.clone())));
            }
            servers.spawn(async move {
                let stand = tokio::time::timeout(PASS_LIMIT, set(&name, &server, &wanted)).await;
                let stand = stand.unwrap_or_else(|_| Err(ControlError::Timeout)).unwrap_or_else(|error| {
                    if wanted.values().any(|limit| !limit.is_told) {
                        tracing::warn!(server = %name, %error, "connection limits cannot be looked at; tried on and on");
                    }
                    BTreeMap::new()
                });
                let stands = |database: &String| stand.get(database).copied().unwrap_or(false);
                let of_tenants = wanted.into_iter().flat_map(|(database, limit)| {
                    let stands = stands(&database);
                    limit.tenants.into_iter().map(move |tenant| (tenant, stands))
                });
                of_tenants.map(|(tenant, stands)| ((name.clone(), tenant), stands)).collect::<Vec<_>>()
            });
        }
    }
    let found: BTreeMap<_, _> = servers.join_all().await.into_iter().flatten().collect();
    let is_news = found.iter().any(|(whose, stands)| !stands && !broken.contains_key(whose));
    *fences.0.lock() = found;
    is_news
}

/// Tenants that share a database share its limit: the sum of their ceilings.
fn wanted(settings: &Settings, server: &str) -> Wanted {
    let mut wanted = Wanted::new();
    for (name, tenant) in settings.tenants.iter().filter(|(_, tenant)| tenant.server == server) {
        let database = tenant.database.clone().unwrap_or_else(|| name.to_string());
        let limit = wanted.entry(database).or_insert(Limit { ceiling: Some(0), tenants: Vec::new(), is_told: false });
        limit.ceiling = limit.ceiling.zip(tenant.ceiling).map(|(sum, ceiling)| sum.saturating_add(ceiling));
        limit.tenants.push(name.to_string());
    }
    wanted
}

/// Makes the limits of one server what they should be; which of them are.
async fn set(name: &str, server: &Server, wanted: &Wanted) -> Result<BTreeMap<String, bool>, ControlError> {
    let Some(control) = &server.control else { return Ok(BTreeMap::new()) };
    let client = control::connect(server, control).await?;
    let databases: Vec<&str> = wanted.keys().map(String::as_str).collect();
    let rows = client.query(sql::CONNECTION_LIMITS, &[&databases]).await?;
    let mut stand = BTreeMap::new();
    for row in rows {
        let (database, limit): (String, i32) = (row.get(0), row.get(1));
        let Some(Limit { ceiling, is_told, .. }) = wanted.get(&database) else { continue };
        // What was dropped halfway takes no limit.
        let is_whole = limit >= -1;
        let mut stands = u32::try_from(limit).ok() == *ceiling && is_whole;
        if !stands && is_whole {
            stands = match client.batch_execute(&sql::set_connection_limit(&database, *ceiling)).await {
                Ok(()) => {
                    tracing::info!(server = %name, %database, ?ceiling, "connection limit set");
                    true
                }
                Err(error) => {
                    let error = ControlError::from(error);
                    if !is_told {
                        tracing::warn!(server = %name, %database, %error, role = %control.role,
                            "connection limit not set: the control role must own the database, or be a member of its owner");
                    }
                    false
                }
            };
        }
        stand.insert(database, stands);
    }
    Ok(stand)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_database_has_the_sum_and_none_if_one_has_none() {
        let mut settings = Settings::default();
        for (name, database, ceiling) in
            [("a", "one", Some(2)), ("b", "one", Some(3)), ("c", "two", Some(1)), ("d", "two", None)]
        {
            let tenant = tenantry_config::Tenant {
                server: "main".into(),
                database: Some(database.into()),
                ceiling,
                ..tenantry_config::Tenant::default()
            };
            settings.tenants.insert(tenantry_config::TenantId::parse(name).unwrap(), tenant);
        }
        let wanted = wanted(&settings, "main");
        assert_eq!((wanted["one"].ceiling, wanted["one"].tenants.len()), (Some(5), 2));
        assert_eq!(wanted["two"].ceiling, None);
    }
}
