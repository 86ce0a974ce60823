//! kill -9 of Tenantry at every effect of a move, and of one of the servers with it: the job goes on or turns back, nothing is
//! left, and at no time are there two places that can be written.
//!
//! A writer at each server tries all the time, around Tenantry, as the tenant's own role. What it was told is committed must be
//! where the tenant is in the end; and once the other place has taken a row, this one takes none.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Cluster, Proxy, ProxyBuilder, Tenant,
    control::{control_builder, control_role_with, tenant_of, with_server},
    eventually,
};
use tokio::task::JoinHandle;
use tokio_postgres::NoTls;

const LOGICAL: &str =
    "wal_level = logical\nmax_wal_senders = 10\nmax_replication_slots = 10\nwal_retrieve_retry_interval = 100ms";
/// A job on a machine that is busy, with a server that is started again meanwhile.
const PATIENCE: Duration = Duration::from_secs(120);
/// No job has so many.
const MOST_EFFECTS: u32 = 300;
/// An online move has more than so many, and its way back.
const ONLINE: u32 = 60;
const BACK: u32 = 20;
/// Each of so many tests has every so-manieth effect: they run side by side.
const PARTS: u32 = 3;
/// Without TENANTRY_EVERY_EFFECT (`make move-crash`) only one of so many effects has its turn, which ones is left to chance: all
/// of them take a quarter of an hour.
const SPARSE: u32 = 12;

/// The first effect, and from one to the next, of a test that has every `stride`th. The first is among the `fewest` that the job
/// has for certain, so that it is killed at one at least: who asserts at the end that `fewest` were passed proves that.
fn effects(first: u32, stride: u32, fewest: u32) -> (u32, u32) {
    if std::env::var_os("TENANTRY_EVERY_EFFECT").is_some() {
        return (first, stride);
    }
    let first = first + stride * (rand::random::<u32>() % SPARSE.min(fewest / stride).max(1));
    println!("from effect {first}, each {}th", stride * SPARSE);
    (first, stride * SPARSE)
}

/// Between two tries of a writer.
const BETWEEN: Duration = Duration::from_millis(15);

/// A row that a writer was told is committed: where, which, when.
type Written = (usize, i64, Instant);

struct Court {
    servers: [&'static Cluster; 2],
    proxy: Proxy,
    api: Api,
    tenant: Tenant,
    written: Arc<Mutex<Vec<Written>>>,
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
    /// Where the tenant is.
    at: usize,
}

const NAMES: [&str; 2] = ["first", "second"];

impl Court {
    /// The catalog is at a third server, which lives.
    async fn new() -> Self {
        let catalog = Cluster::start().leaked();
        let servers = [Cluster::start_with(LOGICAL).leaked(), Cluster::start_with(LOGICAL).leaked()];
        for cluster in [catalog, servers[0], servers[1]] {
            control_role_with(cluster, &["online_moves=1"]).await;
        }
        let mut builder = control_builder(ProxyBuilder::new(catalog));
        for (name, cluster) in NAMES.iter().zip(servers) {
            builder = with_server(builder, name, cluster.address()).set(&format!("servers.{name}.cap"), 20);
        }
        let proxy = builder.start().await;
        let api = Api::new(&proxy, "admin").await;
        let made = api.post("/v1/tenants", json!({ "name": "shop", "server": NAMES[0] })).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let tenant = tenant_of(&made.body);
        let mut client = proxy.connect(&tenant).login().await;
        client.run("CREATE TABLE direct (place int, n bigint, PRIMARY KEY (place, n))").await;
        client.run("CREATE TABLE t (id bigserial PRIMARY KEY, x text)").await;
        client.run("INSERT INTO t (x) SELECT md5(g::text) FROM generate_series(1, 500) g").await;
        let mut court = Self {
            servers,
            proxy,
            api,
            tenant,
            written: Arc::default(),
            stop: Arc::default(),
            writers: Vec::new(),
            at: 0,
        };
        for place in 0..2 {
            let (server, tenant) = (court.servers[place], court.tenant.clone());
            let (written, stop) = (Arc::clone(&court.written), Arc::clone(&court.stop));
            court.writers.push(tokio::spawn(write(server, place, tenant, written, stop)));
        }
        court.more_at(0).await;
        court
    }

    /// Waits until the writer at that place has got in once more.
    async fn more_at(&self, place: usize) {
        let count = || self.written.lock().expect("not poisoned").iter().filter(|(at, ..)| *at == place).count();
        let before = count();
        eventually(format!("writes at {}", NAMES[place]), async || (count() > before).then_some(())).await;
    }

    async fn job(&self, id: i64) -> Option<Value> {
        Some(self.api.try_send("GET", &format!("/v1/jobs/{id}"), None, &[]).await?.body)
    }

    async fn newest(&self) -> Option<Value> {
        let jobs = self.api.try_send("GET", "/v1/jobs?limit=1", None, &[]).await?;
        (jobs.status == 200).then(|| jobs.body["items"][0].clone())
    }

    /// Sends one request, of which the process dies at its n-th effect or not: true if it did not.
    async fn send(&self, path: &str, body: &Value) -> bool {
        let reply = self.api.try_send("POST", path, Some(body), &[("Prefer", "respond-async")]).await;
        if let Some(reply) = &reply {
            assert!(matches!(reply.status, 200 | 202), "{path}: {} {}", reply.status, reply.body);
        }
        let start = Instant::now();
        while self.proxy.runs() {
            let over = self.newest().await.filter(is_over);
            if over.is_some_and(|job| kind_fits(&job, path)) && self.proxy.runs() {
                return true;
            }
            assert!(start.elapsed() < PATIENCE, "{path} does not end");
            tokio::time::sleep(BETWEEN).await;
        }
        false
    }

    /// The last job, once it is over.
    async fn last(&self) -> Value {
        let (start, mut last) = (Instant::now(), Value::Null);
        while start.elapsed() < PATIENCE {
            if let Some(job) = self.newest().await {
                last = job;
                if is_over(&last) {
                    return self.job(last["id"].as_i64().unwrap_or(0)).await.unwrap_or(last);
                }
            }
            tokio::time::sleep(BETWEEN).await;
        }
        panic!("it does not end: {last}\n{}", self.proxy.log());
    }

    async fn restart(&self, n: Option<(u32, &str)>) {
        match n {
            Some((n, kind)) => self.proxy.restart(&["--die-at", &n.to_string(), "--die-in", kind]).await,
            None => self.proxy.restart(&[]).await,
        }
        eventually("it answers again", async || self.newest().await).await;
    }

    /// Does it, without a death.
    async fn calmly(&self, path: &str) {
        self.send(path, &json!({})).await;
        let last = self.last().await;
        assert_eq!(last["state"], "succeeded", "{path}: {last}");
    }

    /// Whether the last move was done, which is confirmed then; else it must have ended so.
    async fn has_moved(&mut self, otherwise: &str, n: u32) -> bool {
        let last = self.last().await;
        let is_moved = last["state"] == "succeeded";
        assert!(is_moved || last["state"] == otherwise, "at effect {n}: {last}");
        self.settled(n).await;
        if is_moved {
            self.calmly("/v1/tenants/shop/move/confirm").await;
            self.settled(n).await;
        }
        is_moved
    }

    /// Where the tenant is, and that nothing is left that should not be: one place, open; nothing at the other but a copy that
    /// is kept, closed.
    async fn settled(&mut self, n: u32) {
        let view = eventually("the tenant", async || {
            let shown = self.api.try_send("GET", "/v1/tenants/shop", None, &[]).await?;
            (shown.status == 200).then_some(shown.body)
        })
        .await;
        assert_eq!((&view["state"], &view["held"]), (&json!("active"), &json!(false)), "at effect {n}");
        self.at = usize::from(view["server"] == NAMES[1]);
        let is_kept = !view["moved"].is_null();
        self.more_at(self.at).await;
        let other = self.servers[1 - self.at];
        let there = other.sql("SELECT count(*) FROM pg_database WHERE datname ~ '^(shop|tenantry-)'").await;
        assert_eq!(there.as_deref(), Some(if is_kept { "1" } else { "0" }), "at effect {n}");
        if !is_kept {
            for (server, name) in self.servers.iter().zip(NAMES) {
                let left = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_subscription) \
                            + (SELECT count(*) FROM pg_roles WHERE rolname LIKE 'tenantry-%')";
                assert_eq!(server.sql(left).await.as_deref(), Some("0"), "at effect {n}, left at {name}");
            }
            assert_eq!(other.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'shop'").await.as_deref(), Some("0"));
        }
        self.nothing_is_lost(n).await;
    }

    /// All that a writer was told is where the tenant is; and nobody wrote at the place that it left once the other was open.
    async fn nothing_is_lost(&self, n: u32) {
        let written = std::mem::take(&mut *self.written.lock().expect("not poisoned"));
        let mut client = self.proxy.connect(&self.tenant).login().await;
        let mut turns: Vec<usize> = Vec::new();
        let mut by_time = written.clone();
        by_time.sort_by_key(|(.., at)| *at);
        for (place, ..) in by_time {
            if turns.last() != Some(&place) {
                turns.push(place);
            }
        }
        assert!(turns.len() <= 2, "at effect {n}: written by turns at {turns:?}");
        let rows: Vec<String> = written.iter().map(|(place, n, _)| format!("({place},{n})")).collect();
        for some in rows.chunks(200) {
            let sql = format!(
                "SELECT count(*) FROM (VALUES {}) AS w (place, n) JOIN direct d ON d.place = w.place AND d.n = w.n",
                some.join(",")
            );
            assert_eq!(client.value(&sql).await, some.len().to_string(), "at effect {n}: acknowledged, and lost");
        }
        assert_eq!(client.value("SELECT count(*) || ' ' || max(id) FROM t").await, "500 500", "at effect {n}");
        client.leave().await;
    }
}

impl Drop for Court {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.writers.iter().for_each(JoinHandle::abort);
    }
}

fn is_over(job: &Value) -> bool {
    matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled"))
}

fn kind_fits(job: &Value, path: &str) -> bool {
    let kind = match path.rsplit('/').next() {
        Some("rollback") => "rollback_move",
        Some("confirm") => "confirm_move",
        _ => "move",
    };
    job["kind"] == kind
}

/// Logs in and inserts, again and again; what fails is nobody's business, what is acknowledged counts.
async fn write(
    server: &'static Cluster,
    place: usize,
    tenant: Tenant,
    written: Arc<Mutex<Vec<Written>>>,
    stop: Arc<AtomicBool>,
) {
    let how = format!(
        "host=127.0.0.1 port={} user={} password={} dbname={} connect_timeout=5",
        server.port(),
        tenant.role,
        tenant.password,
        tenant.name
    );
    let mut n = 0i64;
    while !stop.load(Relaxed) {
        if let Ok((client, connection)) = tokio_postgres::connect(&how, NoTls).await {
            let link = tokio::spawn(connection);
            loop {
                n += 1;
                let row = format!("INSERT INTO direct VALUES ({place}, {n})");
                if client.batch_execute(&row).await.is_err() {
                    break;
                }
                written.lock().expect("not poisoned").push((place, n, Instant::now()));
                tokio::time::sleep(BETWEEN).await;
            }
            link.abort();
        }
        tokio::time::sleep(BETWEEN).await;
    }
}

/// Dies at each effect that is this test's, on the way from wherever the tenant is to the other server.
async fn moves(method: &str, part: u32, parts: u32, fewest: u32) {
    let mut court = Court::new().await;
    let (mut n, stride) = effects(part + 1, parts, fewest);
    loop {
        assert!(n < MOST_EFFECTS, "it never lived to see its end");
        court.restart(Some((n, "move"))).await;
        let (from, body) = (court.at, json!({ "server": NAMES[1 - court.at], "method": method, "wait_ms": 5_000 }));
        let lived = court.send("/v1/tenants/shop/move", &body).await;
        if !lived {
            court.restart(None).await;
        }
        let last = court.last().await;
        assert_eq!(last["state"], "succeeded", "at effect {n}: {last}");
        court.settled(n).await;
        assert_ne!(court.at, from, "at effect {n}");
        court.calmly("/v1/tenants/shop/move/confirm").await;
        court.settled(n).await;
        if lived {
            assert!(n > fewest, "only {n} effects: what was killed?");
            return;
        }
        n += stride;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_online_move_survives_kill_9_at_every_third_effect() {
    moves("online", 0, PARTS, ONLINE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_online_move_survives_kill_9_at_those_after() {
    moves("online", 1, PARTS, ONLINE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_online_move_survives_kill_9_at_the_others() {
    moves("online", 2, PARTS, ONLINE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_move_survives_kill_9_at_every_effect() {
    moves("dump", 0, 1, 30).await;
}

/// While Tenantry is dead a server dies, too, and comes back when the next Tenantry is at work already.
async fn with_a_server(which: usize, part: u32, stride: u32) {
    let mut court = Court::new().await;
    let ((mut n, stride), mut turned, mut done) = (effects(part + 1, stride, ONLINE), 0, 0);
    loop {
        assert!(n < MOST_EFFECTS, "it never lived to see its end");
        court.restart(Some((n, "move"))).await;
        let body = json!({ "server": NAMES[1 - court.at], "wait_ms": 5_000 });
        let dying = court.servers[(court.at + which) % 2];
        let lived = court.send("/v1/tenants/shop/move", &body).await;
        if !lived {
            dying.shutdown("QUIT");
            court.restart(None).await;
            dying.start_again().await;
        }
        if court.has_moved("failed", n).await {
            done += 1;
        } else {
            turned += 1;
        }
        if lived {
            println!("{done} moved, {turned} turned back");
            assert!(done + turned > 1 && n > ONLINE, "only {n} effects: what was killed?");
            return;
        }
        n += stride;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_ends_done_or_undone_when_the_server_that_it_leaves_dies_too() {
    with_a_server(0, 1, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_ends_done_or_undone_when_the_server_where_it_goes_dies_too() {
    with_a_server(1, 3, 5).await;
}

/// Somebody cancels while Tenantry is dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_is_cancelled_after_kill_9_is_done_or_undone() {
    let mut court = Court::new().await;
    let ((mut n, stride), mut done, mut undone) = (effects(2, 3, ONLINE), 0, 0);
    loop {
        assert!(n < MOST_EFFECTS, "it never lived to see its end");
        court.restart(Some((n, "move"))).await;
        let body = json!({ "server": NAMES[1 - court.at], "wait_ms": 5_000 });
        let lived = court.send("/v1/tenants/shop/move", &body).await;
        if !lived {
            court.restart(Some((MOST_EFFECTS, "none"))).await;
            let job = court.newest().await.expect("it answers");
            let path = format!("/v1/jobs/{}/cancel", job["id"]);
            court.api.try_send("POST", &path, Some(&json!({})), &[]).await;
        }
        if court.has_moved("cancelled", n).await {
            done += 1;
        } else {
            undone += 1;
        }
        if lived {
            assert!(done > 0 && undone > 0, "{done} done, {undone} undone");
            return;
        }
        n += stride;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_and_a_confirmation_survive_kill_9_at_every_second_effect() {
    let mut court = Court::new().await;
    for (verb, kind, fewest) in [("rollback", "rollback_move", BACK), ("confirm", "confirm_move", 6)] {
        let (mut n, stride) = effects(1, 2, fewest);
        loop {
            assert!(n < MOST_EFFECTS, "it never lived to see its end");
            let from = court.at;
            court.send("/v1/tenants/shop/move", &json!({ "server": NAMES[1 - from], "wait_ms": 5_000 })).await;
            assert_eq!(court.last().await["state"], "succeeded", "before effect {n}");
            court.settled(n).await;
            court.restart(Some((n, kind))).await;
            let lived = court.send(&format!("/v1/tenants/shop/move/{verb}"), &json!({})).await;
            if !lived {
                court.restart(None).await;
            }
            let last = court.last().await;
            assert_eq!(last["state"], "succeeded", "{verb} at effect {n}: {last}");
            court.settled(n).await;
            assert_eq!(court.at == from, verb == "rollback", "at effect {n}");
            if lived {
                assert!(n > fewest, "only {n} effects: what was killed?");
                break;
            }
            n += stride;
        }
    }
}

/// The copy follows, and force is said all the same: nothing is left behind, and what was left is dropped in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_by_force_survives_kill_9_at_every_second_effect() {
    let mut court = Court::new().await;
    let (mut n, stride) = effects(1, 2, BACK);
    loop {
        assert!(n < MOST_EFFECTS, "it never lived to see its end");
        let from = court.at;
        court.send("/v1/tenants/shop/move", &json!({ "server": NAMES[1 - from], "wait_ms": 5_000 })).await;
        assert_eq!(court.last().await["state"], "succeeded", "before effect {n}");
        court.settled(n).await;
        court.restart(Some((n, "rollback_move"))).await;
        let lived = court.send("/v1/tenants/shop/move/rollback", &json!({ "force": true })).await;
        if !lived {
            court.restart(None).await;
        }
        let last = court.last().await;
        assert_eq!(last["state"], "succeeded", "at effect {n}: {last}");
        court.settled(n).await;
        assert_eq!(court.at, from, "at effect {n}");
        court.calmly("/v1/tenants/shop/move/confirm").await;
        court.settled(n).await;
        if lived {
            assert!(n > BACK, "only {n} effects: what was killed?");
            return;
        }
        n += stride;
    }
}
