//! What the clients of a tenant see while it is created, renamed, paused, drained, archived, restored, deleted.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
};

use serde_json::json;
use tenantry_testkit::{
    Answer, Api, Client, Connect, Mode, Proxy, ProxyBuilder, Relay, Tenant, cluster,
    control::{control_builder, control_proxy, control_role, tenant_of, with_server},
    eventually, say,
};
use tokio::task::JoinSet;

/// Clients that insert and count without end; every error is a panic.
struct Load {
    stop: Arc<AtomicBool>,
    clients: JoinSet<u32>,
    done: Arc<AtomicU32>,
}

impl Load {
    async fn on(proxy: &Proxy, tenant: &Tenant, clients: u32) -> Self {
        let mut first = proxy.connect(tenant).login().await;
        first.run("CREATE TABLE IF NOT EXISTS load (client int, n int)").await;
        let mut load = Self { stop: Arc::default(), clients: JoinSet::new(), done: Arc::default() };
        for id in 0..clients {
            let (mut client, stop, done) =
                (proxy.connect(tenant).login().await, Arc::clone(&load.stop), Arc::clone(&load.done));
            load.clients.spawn(async move {
                let mut n = 0;
                while !stop.load(Relaxed) {
                    n += 1;
                    client.run("BEGIN").await;
                    client.run(&format!("INSERT INTO load VALUES ({id}, {n})")).await;
                    client.run("COMMIT").await;
                    done.fetch_add(1, Relaxed);
                }
                n
            });
        }
        load.more().await;
        load
    }

    /// Waits until the clients have come further.
    async fn more(&self) {
        let before = self.done.load(Relaxed);
        eventually("the clients get on", async || (self.done.load(Relaxed) > before + 20).then_some(())).await;
    }

    /// Transactions that the clients know to be committed.
    async fn end(self) -> u32 {
        self.stop.store(true, Relaxed);
        self.clients.join_all().await.iter().sum()
    }
}

/// What a login that must not succeed is told.
async fn refused(connect: Connect) -> Answer {
    match connect.try_login().await {
        Ok(_) => panic!("let in"),
        Err(answer) => answer,
    }
}

fn code(answer: &Answer) -> String {
    answer.faults().first().map(|fault| fault.code.clone()).unwrap_or_default()
}

#[tokio::test]
async fn one_call_makes_a_database_that_works_and_that_others_cannot_enter() {
    let (proxy, api) = control_proxy().await;
    let shop = api.create("shop").await;
    let blog = api.create("blog").await;
    let mut client = proxy.connect(&shop).login().await;
    assert_eq!(client.value("SELECT current_user || '@' || current_database()").await, "shop@shop");
    assert_eq!(client.value("SHOW statement_timeout").await, "1min");
    client.run("CREATE TABLE t (n int)").await;
    // Not even around Tenantry.
    let intruder = Connect::new(cluster().direct(&shop).endpoint, &blog, "shop");
    assert_eq!(code(&refused(intruder).await), "42501");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rename_and_rename_back_under_load_answer_nobody_with_an_error() {
    let (proxy, api) = control_proxy().await;
    let mut tenant = api.create("before").await;
    let load = Load::on(&proxy, &tenant, 8).await;
    for (from, to) in [("before", "after"), ("after", "before"), ("before", "at_last")] {
        let renamed = api.post(&format!("/v1/tenants/{from}/rename"), json!({ "to": to })).await;
        assert_eq!(renamed.status, 200, "{}", renamed.body);
        load.more().await;
    }
    let committed = load.end().await;
    for name in ["before", "after", "at_last"] {
        tenant.name = name.to_owned();
        let mut client = proxy.connect(&tenant).login().await;
        assert_eq!(client.value("SELECT current_database()").await, "at_last");
        assert_eq!(client.value("SELECT count(*) FROM load").await, committed.to_string());
    }
    let metrics = proxy.metrics().await;
    assert!(metrics.contains("tenant=\"at_last\"") && !metrics.contains("tenant=\"before\""), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pause_and_resume_under_load_answer_nobody_with_an_error() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("held").await;
    let load = Load::on(&proxy, &tenant, 8).await;
    for _ in 0..5 {
        let paused = api.post("/v1/tenants/held/pause", json!({})).await;
        assert_eq!((paused.status, paused.body["live"]["connections"].as_u64()), (200, Some(0)), "{}", paused.body);
        eventually("all wait", async || {
            let explained = api.get("/v1/explain/held").await.body;
            let why = &explained["roles"][0];
            (why["waiting"] == 8 && why["blocked"] == "paused").then_some(())
        })
        .await;
        assert_eq!(api.post("/v1/tenants/held/resume", json!({})).await.status, 200);
        load.more().await;
    }
    let committed = load.end().await;
    let mut client = proxy.connect(&tenant).login().await;
    assert_eq!(client.value("SELECT count(*) FROM load").await, committed.to_string());
}

#[tokio::test]
async fn what_is_done_to_a_tenant_never_hits_one_of_the_file_that_has_its_name_by_now() {
    let (proxy, api) = control_proxy().await;
    api.create("twin").await;
    // From here on the file's counts, and the catalog's is not served.
    let other = cluster().tenant("twin").await;
    let file =
        proxy.settings().role("twin", &other.role, Some(&other.password)).set("tenants.twin.database", &*other.name);
    proxy.reload(&file.text());
    let theirs = Tenant { name: "twin".into(), ..other.clone() };
    let mut client = eventually("the file's tenant is served", async || {
        let mut client = proxy.connect(&theirs).try_login().await.ok()?;
        (client.value("SELECT current_database()").await == other.name).then_some(client)
    })
    .await;
    client.run("BEGIN").await;
    let drained = api.post("/v1/tenants/twin/drain", json!({ "deadline_ms": 0 })).await;
    assert!(drained.status < 300, "{}", drained.body);
    api.no_open_job().await;
    client.run("COMMIT").await;
    assert_eq!(client.value("SELECT 1").await, "1", "its session lives on");
}

#[tokio::test]
async fn who_waits_too_long_in_a_pause_is_told_so_and_stays() {
    tenantry_testkit::control::control_role(cluster()).await;
    let builder = tenantry_testkit::ProxyBuilder::new(cluster()).set("pool.query_wait_timeout", "200ms");
    let proxy = tenantry_testkit::control::control_builder(builder).start().await;
    let api = tenantry_testkit::Api::new(&proxy, "operator").await;
    let tenant = api.create("held").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT 1").await;
    api.post("/v1/tenants/held/pause", json!({})).await;
    let answer = client.query("SELECT 1").await;
    assert_eq!(code(&answer), "57P03");
    assert!(answer.faults()[0].detail.contains("proxy_code=PAUSED"), "{:?}", answer.faults());
    api.post("/v1/tenants/held/resume", json!({})).await;
    assert_eq!(client.value("SELECT 2").await, "2");
}

#[tokio::test]
async fn drain_lets_transactions_finish_refuses_new_ones_and_ends_the_rest() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("drained").await;
    let (mut busy, mut idle) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    busy.run("CREATE TABLE t (n int)").await;
    busy.run("BEGIN").await;
    busy.run("INSERT INTO t VALUES (1)").await;
    let draining = tokio::spawn({
        let api = api.clone();
        async move { api.post("/v1/tenants/drained/drain", json!({ "deadline_ms": 60_000 })).await }
    });
    eventually("the drain has seen what is under way", async || {
        let jobs = api.get("/v1/jobs?tenant=drained").await.body;
        (jobs["items"][0]["result"]["drain"]["under_way"] == 1).then_some(())
    })
    .await;
    assert_eq!(code(&idle.query("SELECT 1").await), "57P03");
    assert_eq!(code(&refused(proxy.connect(&tenant)).await), "57P03");
    busy.run("INSERT INTO t VALUES (2)").await;
    busy.run("COMMIT").await;
    let drained = draining.await.expect("no panic");
    assert_eq!(drained.body["tenant"]["state"], "drained", "{}", drained.body);
    assert_eq!(drained.body["job"]["result"]["drain"], json!({ "under_way": 1, "cancelled": 0, "cut": 0 }));
    for mut client in [busy, idle] {
        assert_eq!(code(&client.until_end().await), "57P01");
    }
    assert_eq!(code(&refused(proxy.connect(&tenant)).await), "57P03");
    api.post("/v1/tenants/drained/resume", json!({})).await;
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT count(*) FROM t").await, "2");
}

#[tokio::test]
async fn drain_cancels_and_cuts_what_does_not_end_and_says_how_much() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("drained").await;
    let mut sleeper = proxy.connect(&tenant).login().await;
    let mut dawdler = proxy.connect(&tenant).login().await;
    let mut idle = Vec::new();
    for _ in 0..5 {
        idle.push(proxy.connect(&tenant).login().await);
    }
    dawdler.run("CREATE TABLE t (n int)").await;
    dawdler.run("BEGIN").await;
    dawdler.run("INSERT INTO t VALUES (1)").await;
    sleeper.send(&say::query("SELECT pg_sleep(100)")).await;
    eventually("both are at work", async || {
        let live = api.get("/v1/tenants/drained").await.body["live"]["active"].as_u64();
        (live == Some(2)).then_some(())
    })
    .await;
    let drained = api.post("/v1/tenants/drained/drain", json!({ "deadline_ms": 1 })).await;
    assert_eq!(drained.body["job"]["result"]["drain"]["cancelled"], 1, "{}", drained.body);
    assert_eq!(drained.body["job"]["result"]["drain"]["cut"], 1, "idle clients are not cut: {}", drained.body);
    assert_eq!(code(&sleeper.until_ready().await), "57014");
    assert_eq!(code(&dawdler.until_end().await), "57P01");
    assert_eq!(cluster().sql_in("drained", "SELECT count(*) FROM t").await.as_deref(), Some("0"), "rolled back");
}

#[tokio::test]
async fn a_suspended_tenant_has_no_connection_until_the_next_query() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("asleep").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT 1").await;
    let suspended = api.post("/v1/tenants/asleep/suspend", json!({})).await;
    assert_eq!(
        (suspended.status, suspended.body["live"]["connections"].as_u64()),
        (200, Some(0)),
        "{}",
        suspended.body
    );
    assert!(cluster().sessions(&tenant).await.is_empty());
    assert_eq!(client.value("SELECT 2").await, "2");
    assert_eq!(api.get("/v1/tenants/asleep").await.body["state"], "active");
}

#[tokio::test]
async fn an_archived_tenant_comes_back_as_it_was_and_a_damaged_archive_changes_nothing() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("kept").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n bigserial PRIMARY KEY, x text DEFAULT 'ä' || random()::text, at timestamptz DEFAULT now())").await;
    client.run("INSERT INTO t (x) SELECT md5(g::text) FROM generate_series(1, 20000) g").await;
    client.run("CREATE VIEW v AS SELECT count(*) FROM t").await;
    let sum = "SELECT count(*) || ':' || sum(hashtextextended(t::text, 0)::numeric) || ':' || max(n) FROM t";
    let before = client.value(sum).await;
    let archived = api.post("/v1/tenants/kept/archive", json!({})).await;
    assert_eq!(archived.body["tenant"]["state"], "archived", "{}", archived.body);
    assert_eq!(code(&client.until_end().await), "57P01");
    let refused = refused(proxy.connect(&tenant)).await;
    assert_eq!(code(&refused), "3D000");
    assert!(refused.faults()[0].hint.contains("archived"));
    assert_eq!(cluster().sql("SELECT count(*) FROM pg_database WHERE datname ~ 'kept|-'").await.as_deref(), Some("0"));

    let archive = &archived.body["job"]["result"];
    let file = proxy.dir().join("archives").join(archive["path"].as_str().expect("a path"));
    let whole = std::fs::read(&file).expect("the archive");
    for damage in [whole[..whole.len() - 1].to_vec(), whole[..100].to_vec(), {
        let mut flipped = whole.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        flipped
    }] {
        std::fs::write(&file, damage).expect("write");
        let damaged = api.post("/v1/tenants/kept/restore", json!({})).await;
        assert_eq!((damaged.status, damaged.body["type"].as_str()), (409, Some("urn:tenantry:problem:job-failed")));
        assert!(damaged.body["detail"].as_str().unwrap_or_default().contains("damaged"), "{}", damaged.body);
        assert_eq!(api.get("/v1/tenants/kept").await.body["state"], "archived");
        let left = "SELECT count(*) FROM pg_database WHERE datname ~ 'kept|-'";
        assert_eq!(cluster().sql(left).await.as_deref(), Some("0"));
    }
    std::fs::write(&file, whole).expect("write");
    let back = api.post("/v1/tenants/kept/restore", json!({})).await;
    assert_eq!(back.body["tenant"]["state"], "active", "{}", back.body);
    let mut client = proxy.connect(&tenant).login().await;
    assert_eq!(client.value(sum).await, before);
    assert_eq!(client.value("INSERT INTO t DEFAULT VALUES RETURNING n").await, "20001");
    assert_eq!(client.value("SELECT tableowner FROM pg_tables WHERE tablename = 't'").await, "kept");
}

#[tokio::test]
async fn a_deleted_tenant_is_gone_and_a_new_one_can_be_filled_from_its_archive() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("gone").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t AS SELECT generate_series(1, 100) n").await;
    let archived = api.post("/v1/tenants/gone/archive", json!({})).await;
    let number = archived.body["job"]["result"]["archive"].clone();
    let delete = async |body| api.send("DELETE", "/v1/tenants/gone", Some(&body), &[("If-Match", "*")]).await;
    assert_eq!(delete(json!({ "confirm": "other" })).await.status, 422);
    assert_eq!(api.send("DELETE", "/v1/tenants/gone", Some(&json!({ "confirm": "gone" })), &[]).await.status, 428);
    assert_eq!(delete(json!({ "confirm": "gone" })).await.status, 200);
    assert_eq!(code(&refused(proxy.connect(&tenant)).await), "28P01");
    assert_eq!(cluster().sql("SELECT count(*) FROM pg_roles WHERE rolname = 'gone'").await.as_deref(), Some("0"));
    let again = api.post("/v1/tenants", json!({ "name": "gone", "archive": number })).await;
    assert_eq!(again.status, 201, "{}", again.body);
    let mut client = proxy.connect(&tenant_of(&again.body)).login().await;
    assert_eq!(client.value("SELECT count(*) FROM t").await, "100");
}

#[tokio::test]
async fn delete_needs_an_archive_or_the_word_and_ends_sessions_with_57p01() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("gone").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT 1").await;
    let delete = async |body| api.send("DELETE", "/v1/tenants/gone", Some(&body), &[("If-Match", "*")]).await;
    assert_eq!(delete(json!({ "confirm": "gone" })).await.status, 409);
    assert_eq!(client.value("SELECT 2").await, "2");
    assert_eq!(delete(json!({ "confirm": "gone", "without_archive": true })).await.status, 200);
    assert_eq!(code(&client.until_end().await), "57P01");
}

#[tokio::test]
async fn what_was_there_before_is_adopted_and_its_clients_notice_nothing() {
    let old = cluster().tenant("legacy").await;
    let (proxy, api) = control_proxy().await;
    cluster().sql("GRANT pg_signal_backend TO tenantry_control").await;
    cluster().sql(&format!("GRANT {} TO tenantry_control", old.role)).await;
    let verifier = cluster().sql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", old.role)).await;
    let path = format!("/v1/tenants/{}/adopt", old.name);
    let without = api.post(&path, json!({})).await;
    assert_eq!(without.status, 422, "the control role cannot read pg_authid: {}", without.body);
    let adopted = api.post(&path, json!({ "verifier": verifier })).await;
    assert_eq!(adopted.status, 201, "{}", adopted.body);
    let mut client = proxy.connect(&old).login().await;
    assert_eq!(client.value("SELECT current_database()").await, old.name);
    let renamed = api.post(&format!("/v1/tenants/{}/rename", old.name), json!({ "to": "modern" })).await;
    assert_eq!(renamed.status, 200, "{}", renamed.body);
    assert_eq!(client.value("SELECT current_database()").await, "modern");
}

#[tokio::test]
async fn a_rename_that_cannot_come_to_rest_changes_nothing() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("restless").await;
    let mut client: Client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let renamed = api.post("/v1/tenants/restless/rename", json!({ "to": "calm", "wait_ms": 100 })).await;
    assert_eq!((renamed.status, renamed.body["type"].as_str()), (409, Some("urn:tenantry:problem:job-failed")));
    assert_eq!(client.value("SELECT current_database()").await, "restless");
    client.run("COMMIT").await;
    assert_eq!(client.value("SELECT current_database()").await, "restless");
    assert_eq!(api.get("/v1/tenants/calm").await.status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_password_is_good_beside_the_old_one_and_clients_notice_nothing() {
    let (proxy, api) = control_proxy().await;
    let old = api.create("turned").await;
    let load = Load::on(&proxy, &old, 4).await;
    let rotated = api.post("/v1/tenants/turned/rotate", json!({ "grace_ms": 3_600_000 })).await;
    assert_eq!(rotated.status, 200, "{}", rotated.body);
    assert!(rotated.body["job"]["result"]["old_password_until"].is_string(), "{}", rotated.body);
    let new = tenant_of(&rotated.body);
    assert_ne!(new.password, old.password);
    for _ in 0..2 {
        // Every connection is dialled anew, with what PostgreSQL has now. (Under load there is always one: not waited for.)
        let suspended = api.send("POST", "/v1/tenants/turned/suspend", None, &[("Prefer", "respond-async")]).await;
        assert_eq!(suspended.status, 200, "{}", suspended.body);
        load.more().await;
        for tenant in [&new, &old] {
            let mut client = proxy.connect(tenant).login().await;
            assert_eq!(client.value("SELECT current_user").await, "turned");
        }
    }
    proxy.restart(&[]).await;
    // Who comes first has the old one: its key leads to the new one's.
    assert_eq!(proxy.connect(&old).login().await.value("SELECT 1").await, "1");
    assert_eq!(proxy.connect(&new).login().await.value("SELECT 1").await, "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_without_grace_ends_at_once_and_who_is_connected_stays() {
    let (proxy, api) = control_proxy().await;
    let old = api.create("turned").await;
    let mut client = proxy.connect(&old).login().await;
    client.run("SELECT 1").await;
    let rotated = api.post("/v1/tenants/turned/rotate", json!({ "grace_ms": 0 })).await;
    assert_eq!(rotated.status, 200, "{}", rotated.body);
    assert_eq!(code(&refused(proxy.connect(&old)).await), "28P01");
    assert_eq!(api.post("/v1/tenants/turned/suspend", json!({})).await.status, 200);
    assert_eq!(client.value("SELECT 2").await, "2", "on a new server connection");
    assert_eq!(proxy.connect(&tenant_of(&rotated.body)).login().await.value("SELECT 3").await, "3");
}

#[tokio::test]
async fn a_grace_that_cannot_be_kept_is_refused_and_one_that_is_over_is_over() {
    let (proxy, api) = control_proxy().await;
    let first = api.create("turned").await;
    let unknown = api.post("/v1/tenants/turned/rotate", json!({ "grace_ms": 60_000 })).await;
    assert_eq!(unknown.status, 409, "nobody has logged in yet: {}", unknown.body);
    proxy.connect(&first).login().await.run("SELECT 1").await;
    let rotated = api.post("/v1/tenants/turned/rotate", json!({ "grace_ms": 60_000 })).await;
    assert_eq!(rotated.status, 200, "{}", rotated.body);
    assert_eq!(proxy.connect(&first).login().await.value("SELECT 1").await, "1");
    let over = "UPDATE tenantry.tenants SET roles = jsonb_set(roles, '{0,former,until}', '\"2001-01-01T00:00:00Z\"'); \
                UPDATE tenantry.meta SET revision = revision + 1";
    cluster().sql_in("tenantry_control", over).await;
    eventually("the old password is forgotten", async || {
        let row = "SELECT (roles->0 ? 'former')::text FROM tenantry.tenants WHERE name = 'turned'";
        (cluster().sql_in("tenantry_control", row).await.as_deref() == Some("false")).then_some(())
    })
    .await;
    eventually("and let in no more", async || proxy.connect(&first).try_login().await.is_err().then_some(())).await;
    let secrets =
        "SELECT count(*) FROM tenantry.jobs WHERE work::text ~ 'SCRAM-SHA-256' OR work->>'bridge' IS NOT NULL";
    assert_eq!(cluster().sql_in("tenantry_control", secrets).await.as_deref(), Some("0"), "nor do jobs keep them");
}

#[tokio::test]
async fn a_new_password_of_a_role_that_tenants_share_is_good_for_all_of_them() {
    let (proxy, api) = control_proxy().await;
    let first = api.create("first").await;
    let made = api.post("/v1/tenants", json!({ "name": "second", "shared_role": "first" })).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let rotated = api.post("/v1/tenants/first/rotate", json!({ "grace_ms": 0 })).await;
    assert_eq!(rotated.status, 200, "{}", rotated.body);
    let new = tenant_of(&rotated.body);
    for name in ["first", "second"] {
        let tenant = Tenant { name: name.to_owned(), ..new.clone() };
        assert_eq!(proxy.connect(&tenant).login().await.value("SELECT current_database()").await, name);
        let old = Tenant { name: name.to_owned(), ..first.clone() };
        assert_eq!(code(&refused(proxy.connect(&old)).await), "28P01");
    }
}

/// A database and role that were there before, adopted.
async fn adopted(api: &Api, hint: &str) -> Tenant {
    let old = cluster().tenant(hint).await;
    cluster().sql(&format!("GRANT {} TO tenantry_control WITH ADMIN OPTION", old.role)).await;
    let verifier = cluster().sql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", old.role)).await;
    let adopted = api.post(&format!("/v1/tenants/{}/adopt", old.name), json!({ "verifier": verifier })).await;
    assert_eq!(adopted.status, 201, "{}", adopted.body);
    old
}

/// Begins a job without waiting for it; its number.
async fn begin(api: &Api, path: &str, body: serde_json::Value) -> i64 {
    let begun = api.send("POST", path, Some(&body), &[("Prefer", "respond-async")]).await;
    assert_eq!(begun.status, 202, "{}", begun.body);
    begun.body["job"]["id"].as_i64().expect("a number")
}

/// A job, once its step of that number is under way.
async fn at_step(api: &Api, job: i64, step: u64) {
    eventually("the step is under way", async || {
        let job = api.get(&format!("/v1/jobs/{job}")).await.body;
        (job["state"] == "running" && job["step"].as_u64() >= Some(step)).then_some(())
    })
    .await;
}

/// How a job ended.
async fn end_of(api: &Api, job: i64) -> serde_json::Value {
    // The stream ends with the job.
    api.get(&format!("/v1/jobs/{job}/events")).await;
    eventually("the job is over", async || {
        let job = api.get(&format!("/v1/jobs/{job}")).await.body;
        matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled")).then_some(job)
    })
    .await
}

#[tokio::test]
async fn what_the_control_role_may_not_change_is_refused_before_anybody_waits() {
    let (proxy, api) = control_proxy().await;
    let old = adopted(&api, "legacy").await;
    cluster().sql(&format!("REVOKE {} FROM tenantry_control", old.role)).await;
    let mut client = proxy.connect(&old).login().await;
    for (verb, body) in [("rename", json!({ "to": "modern" })), ("archive", json!({})), ("separate", json!({}))] {
        let refused = api.post(&format!("/v1/tenants/{}/{verb}", old.name), body).await;
        assert_eq!(refused.status, 409, "{verb}: {}", refused.body);
        assert!(refused.body["detail"].as_str().is_some_and(|why| why.contains("not a member")), "{}", refused.body);
        assert_eq!(client.value("SELECT 1").await, "1", "{verb}");
    }
    assert_eq!(api.get(&format!("/v1/tenants/{}", old.name)).await.body["state"], "active");
}

#[tokio::test]
async fn an_archive_that_could_not_be_stored_is_refused_before_anybody_waits() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("kept").await;
    std::fs::write(proxy.dir().join("file"), "no directory").expect("write");
    let archives = proxy.dir().join("file").join("archives");
    proxy.reload(&proxy.settings().set("admin.archives", archives.display().to_string()).text());
    proxy.restart(&[]).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT 1").await;
    let refused = api.post("/v1/tenants/kept/archive", json!({})).await;
    assert_eq!((refused.status, refused.body["type"].as_str()), (409, Some("urn:tenantry:problem:job-failed")));
    assert_eq!(client.value("SELECT 1").await, "1", "{}", refused.body);
    assert_eq!(api.get("/v1/tenants/kept").await.body["state"], "active");
}

#[tokio::test]
async fn a_name_that_a_rename_is_to_give_is_taken_from_its_first_moment() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("before").await;
    let other = cluster().tenant("other").await;
    cluster().sql(&format!("GRANT {} TO tenantry_control WITH ADMIN OPTION", other.role)).await;
    let verifier = cluster().sql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", other.role)).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let job = begin(&api, "/v1/tenants/before/rename", json!({ "to": "after", "wait_ms": 60_000 })).await;
    at_step(&api, job, 2).await;
    let adopt = json!({ "database": other.name, "verifier": verifier });
    assert_eq!(api.post("/v1/tenants/after/adopt", adopt.clone()).await.status, 409, "as a name");
    assert_eq!(api.post("/v1/tenants", json!({ "name": "after" })).await.status, 409, "as a new tenant");
    api.create("third").await;
    assert_eq!(api.post("/v1/tenants/third/rename", json!({ "to": "after" })).await.status, 409, "by another rename");
    client.run("COMMIT").await;
    assert_eq!(end_of(&api, job).await["state"], "succeeded");
    assert_eq!(client.value("SELECT current_database()").await, "after");
    assert_eq!(api.post("/v1/tenants/before/adopt", adopt).await.status, 409, "the old name leads to it still");
}

#[tokio::test]
async fn a_cancel_ends_what_waits_at_once_and_everything_is_as_before() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("busy").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    for (verb, body, step) in [
        ("rename", json!({ "to": "calm", "wait_ms": 100_000 }), 2),
        ("drain", json!({ "deadline_ms": 3_600_000 }), 2),
        ("archive", json!({ "deadline_ms": 3_600_000 }), 3),
    ] {
        let job = begin(&api, &format!("/v1/tenants/busy/{verb}"), body).await;
        at_step(&api, job, step).await;
        assert_eq!(api.post(&format!("/v1/jobs/{job}/cancel"), json!({})).await.status, 202);
        // Far sooner than what it waits for.
        assert_eq!(end_of(&api, job).await["state"], "cancelled", "{verb}");
        assert_eq!(client.value("SELECT current_database()").await, "busy", "{verb}: the transaction goes on");
        assert_eq!(api.post(&format!("/v1/jobs/{job}/cancel"), json!({})).await.status, 409, "{verb}: it is over");
        assert_eq!(api.get("/v1/tenants/busy").await.body["state"], "active");
    }
    client.run("COMMIT").await;
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_paused_tenant_is_paused_after_a_drain_that_was_cancelled() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("paused").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let pause = api.send("POST", "/v1/tenants/paused/pause", None, &[("Prefer", "respond-async")]).await;
    assert_eq!(pause.status, 200, "{}", pause.body);
    let job = begin(&api, "/v1/tenants/paused/drain", json!({ "deadline_ms": 3_600_000 })).await;
    at_step(&api, job, 2).await;
    assert_eq!(api.post(&format!("/v1/jobs/{job}/cancel"), json!({})).await.status, 202);
    assert_eq!(end_of(&api, job).await["state"], "cancelled");
    assert_eq!(api.get("/v1/tenants/paused").await.body["state"], "paused");
}

#[tokio::test]
async fn jobs_that_wait_for_a_server_hold_up_no_other() {
    control_role(cluster()).await;
    let relay = Relay::start(cluster().address()).await;
    let builder = control_builder(ProxyBuilder::new(cluster()));
    let proxy = with_server(builder, "far", relay.address()).start().await;
    let api = Api::new(&proxy, "admin").await;
    relay.mode(Mode::Refuse);
    let mut far = Vec::new();
    for n in 0..6 {
        let name = format!("far_{n}");
        let job = begin(&api, "/v1/tenants", json!({ "name": name, "server": "far" })).await;
        far.push((name, job));
    }
    let near = api.post("/v1/tenants", json!({ "name": "near", "server": "main" })).await;
    assert_eq!(near.status, 201, "{}", near.body);
    relay.mode(Mode::Pass);
    for (name, job) in far {
        assert_eq!(end_of(&api, job).await["state"], "succeeded", "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_over_is_not_walked_again() {
    let (_proxy, api) = control_proxy().await;
    let names = ["one", "two", "three", "four"];
    for name in names {
        api.create(name).await;
    }
    let mut all = JoinSet::new();
    for name in names {
        let api = api.clone();
        all.spawn(async move {
            for _ in 0..15 {
                let drained = api.post(&format!("/v1/tenants/{name}/drain"), json!({})).await;
                assert_eq!(drained.body["tenant"]["state"], "drained", "{}", drained.body);
                let resumed = api.post(&format!("/v1/tenants/{name}/resume"), json!({})).await;
                assert_eq!(resumed.body["state"], "active", "{}", resumed.body);
            }
        });
    }
    all.join_all().await;
    let jobs = api.get("/v1/jobs?limit=500").await.body["items"].as_array().cloned().unwrap_or_default();
    assert!(jobs.iter().all(|job| job["state"] == "succeeded"), "{jobs:?}");
}

/// As if another process had the jobs meanwhile, and this one had not noticed.
#[tokio::test]
async fn who_runs_the_jobs_no_more_writes_nothing_and_a_job_goes_on_with_whoever_does() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("led").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let job = begin(&api, "/v1/tenants/led/drain", json!({ "deadline_ms": 3_600_000 })).await;
    at_step(&api, job, 2).await;
    cluster().sql_in("tenantry_control", "UPDATE tenantry.meta SET leader = leader + 1").await;
    client.run("COMMIT").await;
    let ended = end_of(&api, job).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(api.get("/v1/tenants/led").await.body["state"], "drained");
    let leaders = "SELECT leader >= 3 FROM tenantry.meta";
    assert_eq!(cluster().sql_in("tenantry_control", leaders).await.as_deref(), Some("t"), "it took them over anew");
}

#[tokio::test]
async fn a_job_of_a_newer_version_is_left_alone_and_holds_up_nobody() {
    let (_proxy, api) = control_proxy().await;
    api.create("first").await;
    let newer = "INSERT INTO tenantry.jobs (tenant, name, work, actor) SELECT number, name, '{\"kind\": \"teleport\"}', 'x' \
                 FROM tenantry.tenants";
    cluster().sql_in("tenantry_control", newer).await;
    api.create("second").await;
    assert_eq!(api.get("/v1/jobs").await.status, 200);
}

#[tokio::test]
async fn a_worker_of_autovacuum_is_in_nobodys_way() {
    let (proxy, api) = control_proxy().await;
    cluster().sql("ALTER SYSTEM SET autovacuum = on").await;
    cluster().sql("ALTER SYSTEM SET autovacuum_naptime = '1s'").await;
    cluster().sql("SELECT pg_reload_conf()").await;
    let tenant = api.create("vacuumed").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int) WITH (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1, autovacuum_vacuum_threshold = 1)").await;
    client.run("INSERT INTO t SELECT generate_series(1, 100000)").await;
    client.run("UPDATE t SET n = n + 1").await;
    eventually("autovacuum is at work", async || {
        let workers =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = 'vacuumed' AND backend_type = 'autovacuum worker'";
        (cluster().sql(workers).await.as_deref() == Some("1")).then_some(())
    })
    .await;
    let renamed = api.post("/v1/tenants/vacuumed/rename", json!({ "to": "clean" })).await;
    assert_eq!(renamed.status, 200, "{}", renamed.body);
    assert_eq!(client.value("SELECT count(*) FROM t").await, "100000");
}

#[tokio::test]
async fn a_rename_that_something_in_the_database_keeps_from_happening_turns_back() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("prepared").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int)").await;
    client.run("BEGIN").await;
    client.run("INSERT INTO t VALUES (1)").await;
    client.run("PREPARE TRANSACTION 'kept'").await;
    let job = begin(&api, "/v1/tenants/prepared/rename", json!({ "to": "renamed" })).await;
    let answer = client.query("SELECT current_database()").await;
    assert!(answer.faults().is_empty(), "it waits, and goes on: {:?}", answer.faults());
    assert_eq!(end_of(&api, job).await["state"], "failed");
    assert_eq!(client.value("SELECT current_database()").await, "prepared");
    client.run("COMMIT PREPARED 'kept'").await;
}

#[tokio::test]
async fn deleting_an_archived_tenant_leaves_alone_what_has_its_databases_name_now() {
    let (_proxy, api) = control_proxy().await;
    api.create("shop").await;
    assert_eq!(api.post("/v1/tenants/shop/archive", json!({})).await.status, 200);
    cluster().sql("CREATE DATABASE shop OWNER shop").await;
    let body = json!({ "confirm": "shop" });
    let gone = api.send("DELETE", "/v1/tenants/shop", Some(&body), &[("If-Match", "*")]).await;
    assert_eq!(gone.status, 200, "{}", gone.body);
    let left = "SELECT count(*) FROM pg_database WHERE datname = 'shop'";
    assert_eq!(cluster().sql(left).await.as_deref(), Some("1"));
}

#[tokio::test]
async fn a_shared_role_is_dropped_by_the_last_tenant_that_has_it() {
    let (proxy, api) = control_proxy().await;
    let first = api.create("first").await;
    for name in ["second", "third"] {
        let made = api.post("/v1/tenants", json!({ "name": name, "shared_role": "first" })).await;
        assert_eq!(made.status, 201, "{}", made.body);
    }
    let second = Tenant { name: "second".to_owned(), ..first.clone() };
    proxy.connect(&second).login().await.run("CREATE TABLE t AS SELECT 1 AS n").await;
    assert_eq!(api.post("/v1/tenants/second/archive", json!({})).await.status, 200);
    let delete = async |name: &str| {
        let body = json!({ "confirm": name, "without_archive": true });
        let gone = api.send("DELETE", &format!("/v1/tenants/{name}"), Some(&body), &[("If-Match", "*")]).await;
        assert_eq!(gone.status, 200, "{}", gone.body);
    };
    let there = async || cluster().sql("SELECT count(*) FROM pg_roles WHERE rolname = 'first'").await;
    delete("first").await;
    delete("third").await;
    assert_eq!(there().await.as_deref(), Some("1"), "the archived one needs it");
    assert_eq!(api.post("/v1/tenants/second/restore", json!({})).await.status, 200);
    let rotated = api.post("/v1/tenants/second/rotate", json!({})).await;
    assert_eq!(rotated.status, 200, "the role is its own now: {}", rotated.body);
    delete("second").await;
    assert_eq!(there().await.as_deref(), Some("0"));
}

#[tokio::test]
async fn a_tenant_gets_a_role_of_its_own_and_the_shared_one_works_on_until_it_is_finished() {
    let (proxy, api) = control_proxy().await;
    let first = api.create("first").await;
    let made = api.post("/v1/tenants", json!({ "name": "apart", "shared_role": "first" })).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let shared = Tenant { name: "apart".to_owned(), ..first.clone() };
    let mut client = proxy.connect(&shared).login().await;
    client.run("CREATE SCHEMA s").await;
    client.run("CREATE TABLE s.t (n serial PRIMARY KEY)").await;
    let finish = api.post("/v1/tenants/apart/separate", json!({ "finish": true })).await;
    assert_eq!(finish.status, 409, "there is nothing to finish: {}", finish.body);

    let separated = api.post("/v1/tenants/apart/separate", json!({})).await;
    assert_eq!(separated.status, 200, "{}", separated.body);
    assert_eq!(separated.body["tenant"]["roles"], json!(["apart", "first"]));
    let own = tenant_of(&separated.body);
    assert_eq!((own.name.as_str(), own.role.as_str()), ("apart", "apart"));
    client.run("INSERT INTO s.t DEFAULT VALUES").await;
    client.run("CREATE TABLE s.late (n int)").await;
    let mut new = proxy.connect(&own).login().await;
    assert_eq!(new.value("SELECT count(*) FROM s.t").await, "1");
    new.run("ALTER TABLE s.t ADD x int").await;
    let databases = "SELECT string_agg(datname || '=' || pg_get_userbyid(datdba), ' ' ORDER BY datname) FROM pg_database \
                     WHERE datname IN ('first', 'apart')";
    assert_eq!(cluster().sql(databases).await.as_deref(), Some("apart=apart first=first"));
    assert_eq!(proxy.connect(&first).login().await.value("SELECT current_database()").await, "first");

    let finished = api.post("/v1/tenants/apart/separate", json!({ "finish": true })).await;
    assert_eq!(finished.status, 200, "{}", finished.body);
    assert_eq!(finished.body["tenant"]["roles"], json!(["apart"]));
    assert_eq!(code(&refused(proxy.connect(&shared)).await), "28P01");
    let around = Connect::new(cluster().direct(&first).endpoint, &first, "apart");
    assert_eq!(code(&refused(around).await), "42501", "not even around Tenantry");
    assert_eq!(new.value("SELECT count(*) FROM s.late").await, "0", "what the old role made meanwhile is its own");
    assert_eq!(proxy.connect(&first).login().await.value("SELECT current_database()").await, "first");
}
