//! The metrics: one table of what there is, and one scrape from a snapshot to the recorder.
//!
//! What always holds: whatever is published stands in `METRICS`; counters come from totals that only grow; what is no
//! longer there (a tenant that was removed) is not in the next answer.

use std::{collections::BTreeMap, sync::atomic::Ordering::Relaxed, time::Duration};

use metrics::{Label, SetRecorderError, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use metrics_util::MetricKindMask;
use tenantry_proxy::{
    directory::{PoolView, Snapshot},
    pool::{explain::Blocked, slot::SlotState, stats::Stats},
    session::state::SessionState,
};

use crate::{
    fence::Fences,
    view::{Status, View},
};

/// A series that a scrape did not renew is of something that is gone, and its last value would be a lie. Each scrape
/// renews all others before it renders, so this need only be shorter than the time between two scrapes.
const FORGET_AFTER: Duration = Duration::from_millis(50);

/// How a metric moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// Names, separated by a comma and a space.
    pub labels: &'static str,
    pub help: &'static str,
}

const fn count(name: &'static str, labels: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, labels, help }
}

const fn level(name: &'static str, labels: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, labels, help }
}

const POOL: &str = "tenant, role";

/// All that `/metrics` shows.
pub const METRICS: [Metric; 50] = [
    level("tenantry_build_info", "version", "1; the version is in the label"),
    level("tenantry_settings_stale", "", "1 after a reload that failed: the settings in force are older than the file"),
    level("tenantry_draining", "", "1 after the process was asked to stop"),
    level(
        "tenantry_catalog_reachable",
        "",
        "1 while the catalog can be read; 0: what was last known of it is served; only with admin.catalog",
    ),
    count(
        "tenantry_log_lines_dropped_total",
        "",
        "Lines of the log that were dropped, because nobody reads it fast enough",
    ),
    level("tenantry_clients", "", "Client connections, those still logging in included"),
    count(
        "tenantry_throttled_logins_total",
        "",
        "Logins turned away unheard, because too many had failed (max_failed_logins)",
    ),
    level("tenantry_message_memory_bytes", "", "Memory held for large messages that must be looked at whole"),
    level("tenantry_message_memory_limit_bytes", "", "max_message_memory"),
    count("tenantry_refusals_total", "sqlstate", "Errors that clients saw before they had a tenant, by SQLSTATE"),
    count(
        "tenantry_limit_refusals_total",
        "tenant, role, limit",
        "Clients that a limit of Tenantry turned away, by that limit; without tenant and role before there is a session",
    ),
    level("tenantry_client_connections", "tenant, role, state", "Client connections by the state of their session"),
    level("tenantry_server_connections", "tenant, role, server, state", "Server connections by state"),
    level(
        "tenantry_server_permits",
        "server",
        "Connections that count against the server's cap, closing ones included",
    ),
    level("tenantry_server_cap", "server", "Most connections that may be held on the server"),
    count(
        "tenantry_contended_seconds_total",
        "server",
        "Time in which the cap kept somebody waiting, in whole seconds",
    ),
    count(
        "tenantry_idle_contended_seconds_total",
        "server",
        "Connection time that stood idle while the cap kept somebody waiting, in whole seconds",
    ),
    level("tenantry_waiting_clients", POOL, "Clients in the queue for a server connection"),
    level("tenantry_oldest_wait_seconds", POOL, "How long the first client of the queue has waited; 0 without a queue"),
    level(
        "tenantry_blocked_clients",
        "tenant, role, limit",
        "Clients in the queue, by the limit that holds its first one up",
    ),
    level(
        "tenantry_tenant_permits",
        "tenant, server",
        "Connections that count against the tenant's ceiling, closing ones included",
    ),
    level("tenantry_tenant_floor", "tenant, server", "Server connections that are always available to the tenant"),
    level(
        "tenantry_tenant_ceiling",
        "tenant, server",
        "Most server connections of the tenant: its ceiling or the server's cap, whichever is less",
    ),
    level(
        "tenantry_tenant_weight",
        "tenant, server",
        "The tenant's part of what is above the floors while several wait",
    ),
    level(
        "tenantry_tenant_fenced",
        "tenant, server",
        "1 if PostgreSQL's CONNECTION LIMIT of the database is the tenant's ceiling, 0 if it could not be made so; only with connection_limits",
    ),
    level(
        "tenantry_followed_wal_bytes",
        "tenant, server",
        "Log that the tenant's server keeps for the copy of a move that follows it; told by the process that runs the jobs",
    ),
    level("tenantry_pinned_leases", POOL, "Server connections kept beyond their transaction now"),
    count(
        "tenantry_pins_total",
        "tenant, role, reason",
        "Times a server connection was kept beyond its transaction, by reason",
    ),
    level("tenantry_listening_clients", POOL, "Clients that listen to a channel"),
    level(
        "tenantry_listened_channels",
        "tenant, server",
        "Channels that the tenant's one listening server connection listens to for its clients",
    ),
    count("tenantry_notifications_total", POOL, "Notifications passed on to clients that listen"),
    count("tenantry_transactions_total", POOL, "Transactions that ended"),
    count("tenantry_queries_total", POOL, "Queries: simple ones, and executions of the extended protocol"),
    count("tenantry_received_bytes_total", POOL, "Bytes from clients"),
    count("tenantry_sent_bytes_total", POOL, "Bytes to clients"),
    count("tenantry_waits_total", POOL, "Times a client had to queue for a server connection"),
    count("tenantry_wait_seconds_total", POOL, "Time that clients queued, summed up, in whole seconds"),
    count("tenantry_wait_timeouts_total", POOL, "Waits that query_wait_timeout ended"),
    count(
        "tenantry_errors_total",
        "tenant, role, sqlstate",
        "Errors that clients saw and Tenantry counted, by SQLSTATE",
    ),
    count("tenantry_logins_total", POOL, "Clients that logged in"),
    count("tenantry_cancels_total", POOL, "Cancel requests passed on to the server"),
    count("tenantry_server_connects_total", POOL, "Server connections opened"),
    count("tenantry_server_connect_failures_total", POOL, "Server connections that could not be opened"),
    count("tenantry_server_closes_total", POOL, "Server connections closed while lent"),
    count("tenantry_prepared_parses_total", POOL, "Prepared statements sent to the server"),
    count("tenantry_prepared_parses_saved_total", POOL, "Prepared statements that the server connection already had"),
    count(
        "tenantry_plans_dropped_total",
        POOL,
        "Times that tables were changed, by a client or by a rollout: what is prepared on each server connection is dropped",
    ),
    count("tenantry_settings_replays_total", POOL, "Times a client's settings were replayed on a server connection"),
    level("tenantry_pool_size", POOL, "Most server connections of the pool"),
    level("tenantry_max_pinned", POOL, "Most pinned leases of the pool"),
];

/// A counter's name and where its total is.
type Total = (&'static str, fn(&Stats) -> u64);

/// The pool's totals that are published as they are.
const POOL_COUNTERS: [Total; 16] = [
    ("tenantry_transactions_total", |s| s.transactions.load(Relaxed)),
    ("tenantry_queries_total", |s| s.queries.load(Relaxed)),
    ("tenantry_received_bytes_total", |s| s.received_bytes.load(Relaxed)),
    ("tenantry_sent_bytes_total", |s| s.sent_bytes.load(Relaxed)),
    ("tenantry_waits_total", |s| s.waits.load(Relaxed)),
    ("tenantry_wait_seconds_total", |s| s.wait_micros.load(Relaxed) / 1_000_000),
    ("tenantry_wait_timeouts_total", |s| s.wait_timeouts.load(Relaxed)),
    ("tenantry_logins_total", |s| s.logins.load(Relaxed)),
    ("tenantry_cancels_total", |s| s.cancels.load(Relaxed)),
    ("tenantry_server_connects_total", |s| s.server_connects.load(Relaxed)),
    ("tenantry_server_connect_failures_total", |s| s.server_connect_failures.load(Relaxed)),
    ("tenantry_server_closes_total", |s| s.server_closes.load(Relaxed)),
    ("tenantry_prepared_parses_total", |s| s.parses.load(Relaxed)),
    ("tenantry_prepared_parses_saved_total", |s| s.parses_saved.load(Relaxed)),
    ("tenantry_notifications_total", |s| s.notifications.load(Relaxed)),
    ("tenantry_settings_replays_total", |s| s.replays.load(Relaxed)),
];

/// Log that a server keeps for the copy of a move.
#[derive(Debug)]
pub(crate) struct Followed {
    pub tenant: String,
    pub server: String,
    pub bytes: u64,
}

/// Installs the process's recorder; called once, by `main`.
///
/// # Errors
/// There is a recorder already.
pub fn recorder() -> Result<PrometheusHandle, SetRecorderError<PrometheusRecorder>> {
    let recorder = build();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    Ok(handle)
}

fn build() -> PrometheusRecorder {
    let recorder = PrometheusBuilder::new().idle_timeout(MetricKindMask::ALL, Some(FORGET_AFTER)).build_recorder();
    metrics::with_local_recorder(&recorder, || {
        for metric in METRICS {
            match metric.kind {
                Kind::Counter => describe_counter!(metric.name, metric.help),
                Kind::Gauge => describe_gauge!(metric.name, metric.help),
            }
        }
    });
    recorder
}

/// One scrape's worth: everything that is there is set anew.
pub(crate) fn publish(view: &dyn View, status: &Status, fences: &Fences, followed: &[Followed]) {
    let snapshot = view.snapshot();
    for Followed { tenant, server, bytes } in followed {
        let labels = vec![Label::new("tenant", tenant.clone()), Label::new("server", server.clone())];
        gauge!("tenantry_followed_wal_bytes", labels).set(bytes_of_disk(*bytes));
    }
    for ((server, tenant), stands) in fences.all() {
        let labels = vec![Label::new("tenant", tenant), Label::new("server", server)];
        gauge!("tenantry_tenant_fenced", labels).set(f64::from(u8::from(stands)));
    }
    gauge!("tenantry_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!("tenantry_settings_stale").set(f64::from(u8::from(status.settings_stale())));
    gauge!("tenantry_draining").set(f64::from(u8::from(status.draining())));
    counter!("tenantry_log_lines_dropped_total").absolute(status.dropped_lines());
    if let Some(is_within_reach) = status.catalog() {
        gauge!("tenantry_catalog_reachable").set(f64::from(u8::from(is_within_reach)));
    }
    for server in &snapshot.servers {
        gauge!("tenantry_server_permits", "server" => server.name.clone()).set(f64::from(server.held));
        gauge!("tenantry_server_cap", "server" => server.name.clone()).set(f64::from(server.cap));
        counter!("tenantry_contended_seconds_total", "server" => server.name.clone())
            .absolute(server.waste.contended / 1000);
        counter!("tenantry_idle_contended_seconds_total", "server" => server.name.clone())
            .absolute(server.waste.idle / 1000);
    }
    gauge!("tenantry_clients").set(f64::from(snapshot.clients));
    counter!("tenantry_throttled_logins_total").absolute(snapshot.throttled_logins);
    let (held, limit) = snapshot.message_memory;
    gauge!("tenantry_message_memory_bytes").set(bytes(held));
    gauge!("tenantry_message_memory_limit_bytes").set(bytes(limit));
    for (sqlstate, n) in view.refusals() {
        counter!("tenantry_refusals_total", "sqlstate" => sqlstate).absolute(n);
    }
    publish_limits(&pool_labels("", ""), view.limit_refusals());
    for ((tenant, role), counts) in sessions(&snapshot) {
        let labels = pool_labels(tenant, role);
        for (state, n) in SessionState::ALL.iter().zip(counts) {
            gauge!("tenantry_client_connections", with(&labels, "state", state.as_str())).set(number(n));
        }
    }
    for pool in &snapshot.pools {
        publish_pool(pool);
        publish_budget(pool);
    }
}

fn publish_limits(labels: &[Label], refusals: BTreeMap<&'static str, u64>) {
    for (limit, n) in refusals {
        counter!("tenantry_limit_refusals_total", with(labels, "limit", limit)).absolute(n);
    }
}

/// Sessions by (tenant, role) and state; a pool whose last client left counts zero rather than vanishing.
fn sessions(snapshot: &Snapshot) -> BTreeMap<(&str, &str), [u64; SessionState::ALL.len()]> {
    let pools = snapshot.pools.iter().map(|view| (view.snapshot.tenant.as_str(), view.snapshot.role.as_str()));
    let mut counts: BTreeMap<_, _> = pools.map(|key| (key, [0; SessionState::ALL.len()])).collect();
    counts.extend(snapshot.sessions.iter().map(|((tenant, role), n)| ((tenant.as_str(), role.as_str()), *n)));
    counts
}

fn publish_pool(view: &PoolView) {
    let (snapshot, pool) = (&view.snapshot, &view.pool);
    let labels = pool_labels(snapshot.tenant.as_str(), &snapshot.role);
    let on_server = with(&labels, "server", &snapshot.server);
    for state in SlotState::ALL {
        let n = snapshot.counts.of(state);
        gauge!("tenantry_server_connections", with(&on_server, "state", state.as_str())).set(f64::from(n));
    }
    let why = snapshot.explanation;
    gauge!("tenantry_waiting_clients", labels.clone()).set(number(why.waiting));
    for limit in Blocked::ALL {
        let held_up = if limit == why.blocked { why.waiting } else { 0 };
        gauge!("tenantry_blocked_clients", with(&labels, "limit", limit.as_str())).set(number(held_up));
    }
    gauge!("tenantry_oldest_wait_seconds", labels.clone()).set(Duration::from_millis(why.waited).as_secs_f64());
    gauge!("tenantry_listening_clients", labels.clone()).set(f64::from(pool.listening()));
    gauge!("tenantry_pinned_leases", labels.clone()).set(f64::from(pool.pinned()));
    let settings = pool.settings();
    gauge!("tenantry_pool_size", labels.clone()).set(f64::from(settings.pool.pool_size));
    gauge!("tenantry_max_pinned", labels.clone()).set(f64::from(settings.pool.max_pinned));
    for (name, total) in POOL_COUNTERS {
        counter!(name, labels.clone()).absolute(total(&pool.stats));
    }
    counter!("tenantry_plans_dropped_total", labels.clone()).absolute(pool.plans().into());
    for (sqlstate, n) in pool.stats.errors() {
        counter!("tenantry_errors_total", with(&labels, "sqlstate", &sqlstate)).absolute(n);
    }
    publish_limits(&labels, pool.stats.limits());
    let pins = pool.stats.pins.lock().clone();
    for (reason, n) in pins {
        counter!("tenantry_pins_total", with(&labels, "reason", reason)).absolute(n);
    }
}

/// The tenant's, told by each of its pools alike.
fn publish_budget(view: &PoolView) {
    let (snapshot, why) = (&view.snapshot, &view.snapshot.explanation);
    let Some(budget) = snapshot.budget else { return };
    let labels = vec![Label::new("tenant", snapshot.tenant.to_string()), Label::new("server", snapshot.server.clone())];
    gauge!("tenantry_tenant_permits", labels.clone()).set(f64::from(why.held));
    gauge!("tenantry_tenant_floor", labels.clone()).set(f64::from(budget.floor));
    gauge!("tenantry_tenant_ceiling", labels.clone()).set(f64::from(budget.ceiling.min(why.cap)));
    gauge!("tenantry_listened_channels", labels.clone()).set(number(view.pool.hub.channels()));
    gauge!("tenantry_tenant_weight", labels).set(f64::from(budget.weight));
}

fn pool_labels(tenant: &str, role: &str) -> Vec<Label> {
    vec![Label::new("tenant", tenant.to_owned()), Label::new("role", role.to_owned())]
}

fn with(labels: &[Label], key: &'static str, value: &str) -> Vec<Label> {
    labels.iter().cloned().chain([Label::new(key, value.to_owned())]).collect()
}

/// Gauges are floating point; nothing counted here comes near the limit.
fn number(n: impl TryInto<u32>) -> f64 {
    f64::from(n.try_into().unwrap_or(u32::MAX))
}

/// To the KiB.
fn bytes_of_disk(n: u64) -> f64 {
    number(n / 1024) * 1024.0
}

/// Exact up to 4 GiB, and to the KiB above it.
fn bytes(n: usize) -> f64 {
    u32::try_from(n).map_or_else(|_| number(n / 1024) * 1024.0, f64::from)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tenantry_config::TenantId;
    use tenantry_proxy::{
        budget::fair::Budget,
        directory::ServerSnapshot,
        pool::{
            Place, PoolSettings,
            decision::{Gate, Waste},
            server::Server,
        },
        server::credentials::Credentials,
    };

    use super::*;

    fn row(metric: &Metric) -> String {
        let kind = if metric.kind == Kind::Counter { "counter" } else { "gauge" };
        format!("| `{}` | {kind} | {} | {} |", metric.name, metric.labels, metric.help)
    }

    #[test]
    fn the_readme_has_exactly_these_metrics() {
        let rows: Vec<String> = METRICS.iter().map(row).collect();
        let told: Vec<&str> =
            include_str!("../README.md").lines().filter(|line| line.starts_with("| `tenantry_")).collect();
        assert_eq!(told, rows, "write these rows into README.md:\n{}\n", rows.join("\n"));
    }

    #[test]
    fn names_end_as_prometheus_wants() {
        for metric in METRICS {
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
        }
    }

    /// A data plane that stands still.
    struct Still(Snapshot, BTreeMap<String, u64>);

    impl View for Still {
        fn is_ready(&self) -> bool {
            true
        }

        fn snapshot(&self) -> Snapshot {
            self.0.clone()
        }

        fn refusals(&self) -> BTreeMap<String, u64> {
            self.1.clone()
        }

        fn limit_refusals(&self) -> BTreeMap<&'static str, u64> {
            [("max_client_conn", 2)].into()
        }
    }

    fn snapshot() -> Snapshot {
        let settings = tenantry_config::Server {
            host: "127.0.0.1".to_owned(),
            tls: tenantry_config::ServerTls {
                mode: tenantry_config::ServerTlsMode::Disable,
                ..tenantry_config::ServerTls::default()
            },
            ..tenantry_config::Server::default()
        };
        let server = Server::start("main", &settings).unwrap();
        let tenant = TenantId::parse("acme").unwrap();
        let defaults = tenantry_config::Pool::default();
        let pool = PoolSettings { mode: defaults.pool_mode, pool: defaults };
        let pool = server.add_pool(
            Place { tenant: tenant.clone(), number: None, database: "acme".to_owned() },
            Gate::Open,
            Budget { floor: 2, ceiling: 9, weight: 3 },
            std::sync::Arc::default(),
            "app",
            pool,
            Credentials::None,
            None,
        );
        pool.stats.transactions.store(7, Relaxed);
        pool.stats.error("53300");
        pool.stats.pins.lock().insert("listen", 2);
        let view = PoolView { snapshot: server.snapshot(&pool), pool };
        Snapshot {
            servers: vec![ServerSnapshot { name: "main".to_owned(), held: 3, cap: 80, waste: Waste::default() }],
            pools: vec![view],
            sessions: [((tenant, "app".to_owned()), [0, 0, 5, 0, 0, 0, 0, 0])].into(),
            clients: 6,
            message_memory: (0, 1 << 20),
            throttled_logins: 0,
        }
    }

    #[tokio::test]
    async fn a_scrape_shows_every_metric_with_its_help_and_labels() {
        let recorder = build();
        let text = metrics::with_local_recorder(&recorder, || {
            let view = Still(snapshot(), [("28P01".to_owned(), 4)].into());
            let status = Status::default();
            status.set_catalog(Some(true));
            let followed = Followed { tenant: "acme".to_owned(), server: "main".to_owned(), bytes: 1 << 20 };
            publish(&view, &status, &Fences::one("main", "acme"), &[followed]);
            recorder.handle().render()
        });
        for metric in METRICS {
            assert!(text.contains(&format!("# HELP {} {}\n", metric.name, metric.help)), "{}:\n{text}", metric.name);
            let line = text.lines().find(|l| l.split(['{', ' ']).next() == Some(metric.name)).expect(metric.name);
            let labels: BTreeSet<&str> = line
                .split_once('{')
                .map(|(_, rest)| rest.split(',').filter_map(|l| l.split_once('=')).map(|(k, _)| k).collect())
                .unwrap_or_default();
            let told: BTreeSet<&str> = metric.labels.split(", ").filter(|l| !l.is_empty()).collect();
            assert_eq!(labels, told, "{line}");
        }
        for line in [
            "tenantry_transactions_total{tenant=\"acme\",role=\"app\"} 7",
            "tenantry_errors_total{tenant=\"acme\",role=\"app\",sqlstate=\"53300\"} 1",
            "tenantry_client_connections{tenant=\"acme\",role=\"app\",state=\"idle\"} 5",
            "tenantry_server_permits{server=\"main\"} 3",
            "tenantry_limit_refusals_total{tenant=\"\",role=\"\",limit=\"max_client_conn\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        let known: BTreeSet<&str> = METRICS.iter().map(|m| m.name).collect();
        let shown: BTreeSet<&str> = text
            .lines()
            .filter(|l| !l.starts_with('#') && !l.is_empty())
            .filter_map(|l| l.split(['{', ' ']).next())
            .collect();
        assert_eq!(shown, known);
    }

    #[tokio::test]
    async fn what_is_gone_is_not_shown() {
        let recorder = build();
        let scrape = |snapshot: &Snapshot| {
            metrics::with_local_recorder(&recorder, || {
                publish(&Still(snapshot.clone(), BTreeMap::new()), &Status::default(), &Fences::default(), &[])
            });
            recorder.handle().render()
        };
        let mut now = snapshot();
        assert!(scrape(&now).contains("state=\"idle\"} 5"));
        now.sessions.clear();
        assert!(scrape(&now).contains("tenantry_client_connections{tenant=\"acme\",role=\"app\",state=\"idle\"} 0"));
        now.pools.clear();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while scrape(&now).contains("acme") {
            assert!(tokio::time::Instant::now() < deadline, "still there:\n{}", scrape(&now));
            tokio::time::sleep(FORGET_AFTER).await;
        }
    }
}
