//! The hard fence: PostgreSQL's own CONNECTION LIMIT of each tenant's database, kept equal to the tenant's ceiling; while it
//! moves, and what is written is sent to a copy, with room for what does that.
//!
//! What always holds: only servers whose `control.connection_limits` says so are touched; a limit that is right is not
//! written; each server has a task of its own, so one that hangs or refuses holds up no other, and new settings of a
//! server are not kept waiting by what hangs there; nothing here is waited for by a client.
//!
//! The data plane goes first. A lowered ceiling is obeyed before PostgreSQL is told, so nobody of ours runs into the limit.
//! A raised one is used at once: until the limit is raised, which takes one login, PostgreSQL may refuse a dial; the pool
//! then goes on with what it has, its clients wait on without an error, and the dial is tried again every fifth of a second.
//! It is not the other way round because a tenant's clients would then wait for a control login that may be broken.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tenantry_config::{Server, Settings};
use tokio::{sync::watch, task::JoinHandle};
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

    /// Of one server: those that have come not to stand.
    fn broken(&self, server: &str) -> BTreeSet<String> {
        let all = self.0.lock();
        let here = all.iter().filter(|((of, _), stands)| of == server && !**stands);
        here.map(|((_, tenant), _)| tenant.clone()).collect()
    }

    /// What is known of one server, by tenant.
    fn put(&self, server: &str, found: BTreeMap<String, bool>) {
        let mut all = self.0.lock();
        all.retain(|(of, _), _| of != server);
        all.extend(found.into_iter().map(|(tenant, stands)| ((server.to_owned(), tenant), stands)));
    }

    #[cfg(test)]
    pub(crate) fn one(server: &str, tenant: &str) -> Self {
        Self(Mutex::new([((server.to_owned(), tenant.to_owned()), true)].into()))
    }
}

/// By database of one server.
type Wanted = BTreeMap<String, Limit>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Limit {
    /// `None`: none.
    ceiling: Option<u32>,
    /// Who is in the database.
    tenants: Vec<String>,
}

/// What is to be done at one server.
#[derive(Debug, Clone, PartialEq)]
struct Job {
    server: Server,
    wanted: Wanted,
}

impl Job {
    /// `None`: nothing is to be touched there.
    fn of(settings: &Settings, name: &str) -> Option<Self> {
        let server = settings.servers.get(name)?;
        server.control.as_ref().filter(|control| control.connection_limits)?;
        Some(Self { server: server.clone(), wanted: wanted(settings, name) })
    }
}

/// Keeps the fences of all servers until `stop`; new settings count at once.
pub async fn keep(mut settings: watch::Receiver<Arc<Settings>>, fences: Arc<Fences>, stop: CancellationToken) {
    let mut tasks: BTreeMap<String, JoinHandle<()>> = BTreeMap::new();
    loop {
        let now = Arc::clone(&settings.borrow_and_update());
        for name in now.servers.keys().filter(|name| Job::of(&now, name).is_some()) {
            if tasks.get(name).is_none_or(JoinHandle::is_finished) {
                let keeper = Keeper { name: name.clone(), settings: settings.clone(), fences: Arc::clone(&fences) };
                let stop = stop.clone();
                let work = async move { stop.run_until_cancelled(keeper.run()).await.unwrap_or(()) };
                tasks.insert(name.clone(), tokio::spawn(work));
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = settings.changed() => if changed.is_err() { return },
        }
    }
}

/// Keeps the fences of one server.
struct Keeper {
    name: String,
    settings: watch::Receiver<Arc<Settings>>,
    fences: Arc<Fences>,
}

impl Keeper {
    /// As long as the settings stand. Where there is nothing to keep, it waits until there is.
    async fn run(mut self) {
        loop {
            let job = Job::of(&self.settings.borrow_and_update().clone(), &self.name);
            let work = async {
                let Some(job) = &job else {
                    self.fences.put(&self.name, BTreeMap::new());
                    return std::future::pending().await;
                };
                loop {
                    let pause = if self.look(job).await { RETRY } else { EVERY };
                    tokio::time::sleep(pause).await;
                }
            };
            tokio::select! {
                () = work => {}
                is_over = another(self.settings.clone(), &self.name, &job) => if is_over { return },
            }
        }
    }

    /// Looks at the server once; true if a fence has come not to stand.
    async fn look(&self, job: &Job) -> bool {
        // What was told is not told again at every look.
        let broken = self.fences.broken(&self.name);
        let is_told = |limit: &Limit| limit.tenants.iter().all(|tenant| broken.contains(tenant));
        let stand = tokio::time::timeout(PASS_LIMIT, set(&self.name, job, is_told)).await;
        let stand = stand.unwrap_or_else(|_| Err(ControlError::Timeout)).unwrap_or_else(|error| {
            if !job.wanted.values().all(is_told) {
                tracing::warn!(server = %self.name, %error, "connection limits cannot be looked at; tried on and on");
            }
            BTreeMap::new()
        });
        let stands = |database: &String| stand.get(database).copied().unwrap_or(false);
        let of_tenants = |(database, limit): (&String, &Limit)| {
            let stands = stands(database);
            limit.tenants.iter().map(move |tenant| (tenant.clone(), stands)).collect::<Vec<_>>()
        };
        let found: BTreeMap<_, _> = job.wanted.iter().flat_map(of_tenants).collect();
        let is_news = found.iter().any(|(tenant, stands)| !stands && !broken.contains(tenant));
        self.fences.put(&self.name, found);
        is_news
    }
}

/// Waits until something else is to be done at the server; true: there will be no settings any more.
async fn another(mut settings: watch::Receiver<Arc<Settings>>, name: &str, job: &Option<Job>) -> bool {
    loop {
        if settings.changed().await.is_err() {
            return true;
        }
        let now = Arc::clone(&settings.borrow_and_update());
        if Job::of(&now, name) != *job {
            return false;
        }
    }
}

/// Tenants that share a database share its limit: the sum of their ceilings. Those without a database have none.
fn wanted(settings: &Settings, server: &str) -> Wanted {
    let mut wanted = Wanted::new();
    let here = settings.tenants.iter().filter(|(_, tenant)| tenant.server == server);
    for (name, tenant) in here.filter(|(_, tenant)| tenant.standing.state.has_database()) {
        let database = tenant.database.clone().unwrap_or_else(|| name.to_string());
        let limit = wanted.entry(database).or_insert(Limit { ceiling: Some(0), tenants: Vec::new() });
        let own = tenant.ceiling.map(|ceiling| ceiling.saturating_add(tenant.standing.room));
        limit.ceiling = limit.ceiling.zip(own).map(|(sum, own)| sum.saturating_add(own));
        limit.tenants.push(name.to_string());
    }
    for limit in wanted.values_mut() {
        // More than PostgreSQL can count is no limit.
        limit.ceiling = limit.ceiling.filter(|ceiling| i32::try_from(*ceiling).is_ok());
    }
    wanted
}

/// Makes the limits of one server what they should be; which of them are.
async fn set(
    name: &str,
    Job { server, wanted }: &Job,
    is_told: impl Fn(&Limit) -> bool,
) -> Result<BTreeMap<String, bool>, ControlError> {
    let Some(control) = &server.control else { return Ok(BTreeMap::new()) };
    let client = control::connect(server, control).await?;
    let databases: Vec<&str> = wanted.keys().map(String::as_str).collect();
    let rows = client.query(sql::CONNECTION_LIMITS, &[&databases]).await?;
    let mut stand = BTreeMap::new();
    for row in rows {
        let (database, limit): (String, i32) = (row.get(0), row.get(1));
        let Some(wanted) = wanted.get(&database) else { continue };
        let ceiling = &wanted.ceiling;
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
                    if !is_told(wanted) {
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
    use tenantry_config::{Control, RoleSecret, ServerTls, ServerTlsMode, Standing, Tenant, TenantId, TenantState};
    use tokio::net::TcpListener;

    use super::*;

    fn put(settings: &mut Settings, name: &str, tenant: Tenant) {
        settings.tenants.insert(TenantId::parse(name).unwrap(), Tenant { server: "main".into(), ..tenant });
    }

    #[test]
    fn a_shared_database_has_the_sum_and_none_if_one_has_none() {
        let mut settings = Settings::default();
        for (name, database, ceiling) in
            [("a", "one", Some(2)), ("b", "one", Some(3)), ("c", "two", Some(1)), ("d", "two", None)]
        {
            put(&mut settings, name, Tenant { database: Some(database.into()), ceiling, ..Tenant::default() });
        }
        let wanted = wanted(&settings, "main");
        assert_eq!((wanted["one"].ceiling, wanted["one"].tenants.len()), (Some(5), 2));
        assert_eq!(wanted["two"].ceiling, None);
    }

    #[test]
    fn a_move_has_room_beside_its_clients() {
        let mut settings = Settings::default();
        let standing = Standing { number: Some(1), state: TenantState::Active, plans: 0, room: 4 };
        put(&mut settings, "a", Tenant { ceiling: Some(2), standing: standing.clone(), ..Tenant::default() });
        put(&mut settings, "b", Tenant { standing, ..Tenant::default() });
        let wanted = wanted(&settings, "main");
        assert_eq!((wanted["a"].ceiling, wanted["b"].ceiling), (Some(6), None));
    }

    #[test]
    fn a_tenant_without_a_database_has_no_fence() {
        let mut settings = Settings::default();
        for state in TenantState::ALL {
            let standing = Standing { number: Some(1), state, plans: 0, room: 0 };
            put(&mut settings, state.as_str(), Tenant { ceiling: Some(2), standing, ..Tenant::default() });
        }
        let fenced: Vec<_> = wanted(&settings, "main").into_keys().collect();
        assert_eq!(fenced, ["active", "drained", "draining", "paused", "suspended"]);
    }

    #[test]
    fn a_ceiling_that_postgresql_cannot_count_to_is_no_limit() {
        let mut settings = Settings::default();
        put(&mut settings, "a", Tenant { ceiling: Some(1 << 31), ..Tenant::default() });
        put(&mut settings, "b", Tenant { ceiling: Some((1 << 31) - 1), ..Tenant::default() });
        let wanted = wanted(&settings, "main");
        assert_eq!((wanted["a"].ceiling, wanted["b"].ceiling), (None, Some((1 << 31) - 1)));
    }

    fn server_at(port: u16) -> Server {
        Server {
            host: "127.0.0.1".into(),
            port,
            tls: ServerTls { mode: ServerTlsMode::Disable, ..ServerTls::default() },
            control: Some(Control {
                role: "tenantry".into(),
                database: "postgres".into(),
                secret: RoleSecret::None,
                connection_limits: true,
            }),
            ..Server::default()
        }
    }

    /// A server that takes connections and never says a word, and the settings that lead there.
    async fn silent(settings: &mut Settings, name: &str) -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        settings.servers.insert(name.into(), server_at(listener.local_addr().unwrap().port()));
        let tenant = Tenant { server: name.into(), ceiling: Some(2), ..Tenant::default() };
        settings.tenants.insert(TenantId::parse(&format!("of_{name}")).unwrap(), tenant);
        listener
    }

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_server_that_hangs_holds_up_neither_another_nor_its_own_new_settings() {
        let mut settings = Settings::default();
        let first = silent(&mut settings, "first").await;
        let (change, latest) = watch::channel(Arc::new(settings.clone()));
        let (fences, stop) = (Arc::new(Fences::default()), CancellationToken::new());
        let keeper = tokio::spawn(keep(latest, Arc::clone(&fences), stop.clone()));
        let hangs = tokio::time::timeout(SOON, first.accept()).await.expect("asked").unwrap();
        // Another one comes while the first hangs.
        let second = silent(&mut settings, "second").await;
        change.send_replace(Arc::new(settings.clone()));
        let also_hangs = tokio::time::timeout(SOON, second.accept()).await.expect("asked although the first hangs");
        // New settings of the first are begun with at once.
        settings.tenants.get_mut("of_first").unwrap().ceiling = Some(3);
        change.send_replace(Arc::new(settings));
        let again = tokio::time::timeout(SOON, first.accept()).await.expect("asked anew").unwrap();
        stop.cancel();
        tokio::time::timeout(SOON, keeper).await.expect("it ends").unwrap();
        drop((hangs, also_hangs, again));
    }

    #[test]
    fn what_is_known_of_one_server_does_not_touch_another() {
        let fences = Fences::one("main", "a");
        fences.put("other", [("b".to_owned(), false), ("c".to_owned(), true)].into());
        assert_eq!(fences.broken("other"), ["b".to_owned()].into());
        fences.put("other", BTreeMap::new());
        assert_eq!(fences.all().into_keys().collect::<Vec<_>>(), [("main".to_owned(), "a".to_owned())]);
    }
}
