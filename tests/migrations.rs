//! Schema migrations over many tenants: waves, checksums, locks, crashes, and what clients have prepared.

use std::{collections::BTreeSet, process::Command};

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Client, Proxy, ProxyBuilder, Tenant, cluster,
    control::{control_builder, control_proxy},
    eventually,
    proxy::binary,
    say,
};

fn file(version: i64, sql: &str) -> Value {
    json!({ "version": version, "name": format!("{version:04}_x.sql"), "sql": sql })
}

/// Begins a rollout; its number.
async fn begin(api: &Api, wish: Value) -> i64 {
    let begun = api.post("/v1/rollouts", wish).await;
    assert_eq!(begun.status, 202, "{}", begun.body);
    begun.body["id"].as_i64().expect("a number")
}

async fn over(api: &Api, id: i64) -> Value {
    eventually("the rollout is over", async || {
        let rollout = api.try_send("GET", &format!("/v1/rollouts/{id}"), None, &[]).await?.body;
        (rollout["state"] != "running" && rollout["counts"]["running"] == 0).then_some(rollout)
    })
    .await
}

async fn roll_out(api: &Api, wish: Value) -> Value {
    over(api, begin(api, wish).await).await
}

/// `name:state` of its tenants, in order.
fn states(rollout: &Value) -> String {
    let of =
        |turn: &Value| format!("{}:{}", turn["name"].as_str().unwrap_or("?"), turn["state"].as_str().unwrap_or("?"));
    rollout["tenants"].as_array().expect("tenants").iter().map(of).collect::<Vec<_>>().join(" ")
}

fn error<'a>(rollout: &'a Value, name: &str) -> &'a str {
    let turn = rollout["tenants"].as_array().expect("tenants").iter().find(|turn| turn["name"] == name);
    turn.and_then(|turn| turn["error"].as_str()).unwrap_or_else(|| panic!("no error of {name} in {rollout}"))
}

async fn in_database(name: &str, sql: &str) -> String {
    cluster().sql_in(name, sql).await.unwrap_or_default()
}

const VERSIONS: &str = "SELECT string_agg(version || CASE WHEN applied_at IS NULL THEN '?' ELSE '' END, ' ' ORDER BY version) FROM tenantry.migrations";

async fn create_all(api: &Api, names: &[&str]) -> Vec<Tenant> {
    let mut made = Vec::new();
    for name in names {
        made.push(api.create(name).await);
    }
    made
}

/// Roles that a migration or a command works as.
async fn hands() -> String {
    cluster().sql("SELECT count(*)::text FROM pg_roles WHERE rolname ~ '-(hand|exec)$'").await.unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_applied_once_in_order_and_belong_to_the_tenants_owner() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["blog", "shop"]).await;
    let one = [file(2, "INSERT INTO t VALUES (1);"), file(1, "CREATE TABLE t (n int); CREATE TABLE u (n int)")];
    let first = roll_out(&api, json!({ "all": true, "migrations": one })).await;
    assert_eq!((states(&first).as_str(), &first["state"]), ("blog:done shop:done", &json!("succeeded")), "{first}");
    assert_eq!(first["tenants"][0]["files"], json!(["0001_x.sql", "0002_x.sql"]));
    for name in ["blog", "shop"] {
        assert_eq!(in_database(name, VERSIONS).await, "1 2");
        let owners =
            "SELECT string_agg(DISTINCT tableowner, ' ') FROM pg_tables WHERE schemaname IN ('public', 'tenantry')";
        assert_eq!(in_database(name, owners).await, name);
    }
    let more = json!([one[1], one[0], file(3, "INSERT INTO t VALUES (2)")]);
    let planned = api.post("/v1/rollouts?dry_run=true", json!({ "all": true, "migrations": more })).await;
    assert_eq!(
        (planned.status, &planned.body["tenants"][1]["files"]),
        (200, &json!(["0003_x.sql"])),
        "{}",
        planned.body
    );
    let second = roll_out(&api, json!({ "all": true, "migrations": more })).await;
    assert_eq!(second["tenants"][0]["files"], json!(["0003_x.sql"]), "{second}");
    assert_eq!(in_database("shop", "SELECT count(*)::text FROM t").await, "2");
    assert_eq!(hands().await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_changed_or_comes_too_late_is_refused_before_anything_runs() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    roll_out(&api, json!({ "all": true, "migrations": [file(2, "CREATE TABLE t (n int)")] })).await;
    let other =
        json!({ "all": true, "migrations": [file(2, "CREATE TABLE t (n bigint)"), file(3, "CREATE TABLE u ()")] });
    let refused = api.post("/v1/rollouts", other.clone()).await;
    let told = refused.body["detail"].as_str().unwrap_or_default();
    assert!(refused.status == 422 && told.contains("0002_x.sql") && told.contains("checksum"), "{}", refused.body);
    let late = json!({ "all": true, "migrations": [file(1, "CREATE TABLE v ()")] });
    let refused = api.post("/v1/rollouts", late.clone()).await;
    assert!(refused.status == 422 && refused.body["detail"].as_str().unwrap_or_default().contains("0001_x.sql"));
    // The catalog's copy is a copy: what the tenant's own table says counts.
    cluster().sql_in("tenantry_control", "DELETE FROM tenantry.migrations").await;
    let stopped = roll_out(&api, other).await;
    assert!(error(&stopped, "shop").contains("checksum"), "{stopped}");
    let there = "SELECT string_agg(tablename, ' ') FROM pg_tables WHERE schemaname = 'public'";
    assert_eq!(in_database("shop", there).await, "t");
    let mut allowed = late;
    allowed["allow_out_of_order"] = json!(true);
    assert_eq!(roll_out(&api, allowed).await["state"], "succeeded");
    assert_eq!(in_database("shop", VERSIONS).await, "1 2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_fails_leaves_nothing_of_itself_and_says_where() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    let files =
        json!([file(1, "CREATE TABLE t (n int)"), file(2, "CREATE TABLE u ();\nINSERT INTO nosuch VALUES (1)")]);
    let stopped = roll_out(&api, json!({ "all": true, "migrations": files })).await;
    let told = error(&stopped, "shop");
    assert!(told.contains("0002_x.sql, line 2") && told.contains("42P01"), "{told}");
    assert_eq!(in_database("shop", VERSIONS).await, "1");
    let there = "SELECT string_agg(tablename, ' ') FROM pg_tables WHERE schemaname = 'public'";
    assert_eq!(in_database("shop", there).await, "t", "the file before it stays");
    assert_eq!(hands().await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_that_postgresql_quotes_are_in_the_job_and_never_in_the_log() {
    let (proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    in_database("shop", "SET ROLE shop; CREATE TABLE t (n text); INSERT INTO t VALUES ('geheim'), ('geheim')").await;
    let stopped =
        roll_out(&api, json!({ "all": true, "migrations": [file(1, "ALTER TABLE t ALTER n TYPE int USING n::int")] }))
            .await;
    let told = error(&stopped, "shop");
    assert!(told.contains("0001_x.sql: invalid input syntax for type integer: \"geheim\" (22P02)"), "{told}");
    // What is behind the message holds rows.
    let stopped = roll_out(&api, json!({ "all": true, "migrations": [file(1, "ALTER TABLE t ADD UNIQUE (n)")] })).await;
    let told = error(&stopped, "shop");
    assert!(told.contains("23505") && !told.contains("geheim"), "{told}");
    let long = "DO $$ BEGIN RAISE '%', (SELECT repeat(n, 1000) FROM t LIMIT 1); END $$";
    let stopped = roll_out(&api, json!({ "all": true, "migrations": [file(1, long)] })).await;
    assert!(error(&stopped, "shop").len() < 1_000, "{stopped}");
    let told = eventually("the log tells of all three", async || {
        let log = proxy.log();
        ["22P02", "23505", "P0001"].iter().all(|code| log.contains(code)).then_some(log)
    });
    assert!(!told.await.contains("geheim"), "values of rows are in no log");
    assert!(!proxy.metrics().await.contains("geheim"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_costs_its_session_is_tried_a_few_times_and_then_told_as_failed() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    // As if PostgreSQL had gone down in its middle.
    let deadly = "CREATE FUNCTION deadly() RETURNS boolean LANGUAGE sql SECURITY DEFINER AS 'SELECT pg_terminate_backend(pg_backend_pid())'";
    in_database("shop", deadly).await;
    let files = json!([file(1, "CREATE TABLE t (n int)"), file(2, "SELECT deadly()")]);
    let stopped = roll_out(&api, json!({ "all": true, "migrations": files })).await;
    let told = error(&stopped, "shop");
    assert!(told.contains("5 times") && stopped["state"] == "failed", "{stopped}");
    assert_eq!((in_database("shop", VERSIONS).await.as_str(), hands().await.as_str()), ("1", "0"));
    let other = json!([file(1, "CREATE TABLE t (n int)"), file(2, "CREATE TABLE u ()")]);
    assert_eq!(roll_out(&api, json!({ "all": true, "migrations": other })).await["state"], "succeeded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restore_the_version_table_of_the_archive_counts() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    let at = |second: &str| json!({ "all": true, "migrations": [file(1, "CREATE TABLE t ()"), file(2, second)] });
    roll_out(&api, json!({ "all": true, "migrations": [file(1, "CREATE TABLE t ()")] })).await;
    let archived = api.post("/v1/tenants/shop/archive", json!({})).await;
    assert_eq!(archived.status, 200, "{}", archived.body);
    let first = archived.body["job"]["result"]["archive"].clone();
    let restore = async |archive: &Value| {
        let restored = api.post("/v1/tenants/shop/restore", json!({ "archive": archive })).await;
        assert_eq!(restored.status, 200, "{}", restored.body);
    };
    restore(&first).await;
    assert_eq!(roll_out(&api, at("CREATE TABLE one ()")).await["state"], "succeeded");
    api.post("/v1/tenants/shop/archive", json!({})).await;
    restore(&first).await;
    assert_eq!(in_database("shop", VERSIONS).await, "1");
    // That it was another file once is forgotten, as the tenant has.
    assert_eq!(roll_out(&api, at("CREATE TABLE other ()")).await["state"], "succeeded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_see_the_settings_that_the_owners_sessions_begin_with() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    in_database("shop", "SET ROLE shop; CREATE SCHEMA \"my, app\"").await;
    cluster().sql("ALTER ROLE shop SET search_path = \"my, app\", public").await;
    cluster().sql("ALTER ROLE shop SET timezone = 'Asia/Tokyo'; ALTER ROLE shop SET log_statement = 'all'").await;
    cluster().sql("ALTER ROLE shop IN DATABASE shop SET timezone = 'Asia/Kathmandu'").await;
    // Each begins with them, whatever the one before it has set.
    let files = json!([
        file(1, "SET timezone = 'UTC'; CREATE TABLE t ()"),
        file(2, "CREATE TABLE u AS SELECT current_setting('timezone') AS zone")
    ]);
    let done = roll_out(&api, json!({ "all": true, "migrations": files })).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    let zone = "SELECT zone || ' ' || (SELECT count(*) FROM \"my, app\".t) FROM \"my, app\".u";
    assert_eq!(in_database("shop", zone).await, "Asia/Kathmandu 0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_canary_stops_everything_and_resumed_the_rest_has_its_turn() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["blog", "club", "shop"]).await;
    cluster().sql_in("shop", "SET ROLE shop; CREATE TABLE t (n int)").await;
    let wish = json!({ "all": true, "canary_tenants": ["shop"], "stop_after": 9, "migrations": [file(1, "CREATE TABLE t ()")] });
    let id = begin(&api, wish).await;
    let stopped = over(&api, id).await;
    assert_eq!(states(&stopped), "shop:failed blog:waiting club:waiting");
    assert_eq!(stopped["state"], "stopped");
    assert!(stopped["error"].as_str().unwrap_or_default().contains("canary"), "{stopped}");
    in_database("shop", "DROP TABLE t").await;
    let resumed = api.post(&format!("/v1/rollouts/{id}/resume"), json!({})).await;
    assert_eq!(resumed.status, 202, "{}", resumed.body);
    let done = over(&api, id).await;
    assert_eq!(states(&done), "shop:done blog:done club:done");
    assert_eq!((&done["tenants"][0]["attempts"], &done["tenants"][1]["attempts"]), (&json!(2), &json!(1)));
    let again = api.post(&format!("/v1/rollouts/{id}/resume"), json!({})).await;
    assert_eq!(again.status, 409, "{}", again.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waves_follow_one_another_and_so_many_are_under_way_at_once() {
    let (_proxy, api) = control_proxy().await;
    let names = ["a1", "a2", "a3", "a4", "a5", "a6"];
    create_all(&api, &names).await;
    let sql = "CREATE TABLE t AS SELECT clock_timestamp() AS began; SELECT pg_sleep(0.3); ALTER TABLE t ADD ended timestamptz DEFAULT clock_timestamp()";
    let wish = json!({ "tenants": ["a*"], "canary": 2, "wave": "2", "parallel": 2, "migrations": [file(1, sql)] });
    let done = roll_out(&api, wish).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    let waves: Vec<_> = done["tenants"].as_array().unwrap().iter().map(|turn| turn["wave"].as_u64().unwrap()).collect();
    assert_eq!(waves, [0, 0, 1, 1, 2, 2]);
    let mut times = Vec::new();
    for name in names {
        let text =
            in_database(name, "SELECT extract(epoch FROM began) || ' ' || extract(epoch FROM ended) FROM t").await;
        let both: Vec<f64> = text.split(' ').map(|part| part.parse().unwrap()).collect();
        times.push((both[0], both[1]));
    }
    for (one, two) in [(0, 2), (2, 4)] {
        let ended = times[one].1.max(times[one + 1].1);
        let began = times[two].0.min(times[two + 1].0);
        assert!(ended <= began, "a wave began before the one before it was over: {times:?}");
    }
    let together =
        (0..3).any(|wave| times[2 * wave].0.max(times[2 * wave + 1].0) < times[2 * wave].1.min(times[2 * wave + 1].1));
    assert!(together, "never two at once: {times:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_that_another_job_has_holds_up_nobody_and_is_not_waited_for_without_limit() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["blog", "club", "shop"]).await;
    // A job that lasts.
    let other = begin(&api, json!({ "tenants": ["blog"], "migrations": [file(1, "SELECT pg_sleep(600)")] })).await;
    let job = eventually("it is under way", async || {
        api.get(&format!("/v1/rollouts/{other}")).await.body["tenants"][0]["job"].as_i64()
    })
    .await;
    let wish = |stop_after: u32, more: Value| {
        let mut wish = json!({ "all": true, "canary": 0, "wave": "2", "stop_after": stop_after, "migrations": [file(2, "CREATE TABLE t ()")] });
        wish.as_object_mut().expect("a wish").extend(more.as_object().expect("more").clone());
        wish
    };
    // Too long: a failure like another.
    let done = roll_out(&api, wish(2, json!({ "busy_timeout_ms": 300 }))).await;
    assert_eq!(
        (states(&done).as_str(), &done["state"]),
        ("blog:failed club:done shop:done", &json!("failed")),
        "{done}"
    );
    let told = error(&done, "blog");
    assert!(told.contains(&format!("busy: job {job}")) && told.contains("300ms"), "{told}");
    let stopped = roll_out(&api, wish(1, json!({ "busy_timeout_ms": 0 }))).await;
    assert_eq!(
        (states(&stopped).as_str(), &stopped["state"]),
        ("blog:failed club:waiting shop:waiting", &json!("stopped"))
    );
    // Waited for: others of its wave go on, the next wave waits with it.
    let patient = begin(&api, wish(1, json!({}))).await;
    let waits = eventually("the other one of its wave is done", async || {
        let rollout = api.get(&format!("/v1/rollouts/{patient}")).await.body;
        (rollout["counts"]["done"] == 1).then_some(rollout)
    })
    .await;
    assert_eq!(states(&waits), "blog:waiting club:done shop:waiting");
    assert_eq!(error(&waits, "blog"), format!("busy: waits for job {job}"));
    assert_eq!(api.post(&format!("/v1/rollouts/{other}/cancel"), json!({})).await.status, 202);
    let done = over(&api, patient).await;
    assert_eq!((states(&done).as_str(), &done["state"]), ("blog:done club:done shop:done", &json!("succeeded")));
    assert!(done["tenants"][0]["error"].is_null(), "{done}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_a_client_has_is_waited_for_in_tries_that_hold_up_nobody() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("shop").await;
    let mut holder = proxy.connect(&tenant).login().await;
    holder.run("CREATE TABLE t (n int)").await;
    holder.run("BEGIN").await;
    holder.run("SELECT * FROM t").await;
    let wish = json!({ "all": true, "lock_timeout_ms": 200, "lock_retries": 100, "migrations": [file(1, "ALTER TABLE t ADD m int")] });
    let id = begin(&api, wish).await;
    let job = eventually("it was tried twice", async || {
        let rollout = api.get(&format!("/v1/rollouts/{id}")).await.body;
        let job = rollout["tenants"][0]["job"].as_i64()?;
        let told = api.get(&format!("/v1/jobs/{job}")).await.body;
        told["progress"].as_str()?.contains("try 2 of 101").then_some(job)
    })
    .await;
    // Between the tries, and behind one of them, others get in.
    let mut other = proxy.connect(&tenant).login().await;
    assert_eq!(other.value("SELECT count(*) FROM t").await, "0");
    holder.run("COMMIT").await;
    assert_eq!(over(&api, id).await["state"], "succeeded");
    assert_eq!(api.get(&format!("/v1/jobs/{job}")).await.body["state"], "succeeded");

    // And not for ever.
    holder.run("BEGIN").await;
    holder.run("SELECT * FROM t").await;
    let wish = json!({ "all": true, "lock_timeout_ms": 50, "lock_retries": 1, "migrations": [file(2, "ALTER TABLE t ADD o int")] });
    let stopped = roll_out(&api, wish).await;
    assert!(error(&stopped, "shop").contains("50 ms, 2 times"), "{stopped}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_is_built_concurrently_and_one_that_is_left_invalid_is_named() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("shop").await;
    proxy.connect(&tenant).login().await.run("CREATE TABLE t AS SELECT g % 9 AS n FROM generate_series(1, 99) g").await;
    let concurrent = |version, sql: &str| {
        let mut file = file(version, sql);
        file["transactional"] = json!(false);
        file
    };
    let good = concurrent(1, "CREATE INDEX CONCURRENTLY t_n ON t (n); VACUUM t;");
    let done = roll_out(&api, json!({ "all": true, "migrations": [good.clone()] })).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    let counted = "SELECT statements::text || transactional::text FROM tenantry.migrations WHERE version = 1";
    assert_eq!(in_database("shop", counted).await, "2false");
    // A unique one over rows that are not.
    let bad = concurrent(2, "CREATE TABLE IF NOT EXISTS u (n int); CREATE UNIQUE INDEX CONCURRENTLY t_u ON t (n)");
    let id = begin(&api, json!({ "all": true, "migrations": [good, bad] })).await;
    let stopped = over(&api, id).await;
    let told = error(&stopped, "shop");
    assert!(
        told.contains("0002_x.sql") && told.contains("public.t_u") && told.contains("DROP INDEX CONCURRENTLY"),
        "{told}"
    );
    assert_eq!(in_database("shop", VERSIONS).await, "1 2?", "begun, not applied");
    let resume = format!("/v1/rollouts/{id}/resume");
    api.post(&resume, json!({})).await;
    assert!(error(&over(&api, id).await, "shop").contains("public.t_u"), "named again, before anything runs");
    in_database("shop", "DROP INDEX t_u; DELETE FROM t WHERE ctid NOT IN (SELECT min(ctid) FROM t GROUP BY n)").await;
    api.post(&resume, json!({})).await;
    let done = over(&api, id).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    assert_eq!(in_database("shop", VERSIONS).await, "1 2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_was_invalid_before_a_file_is_none_of_its_doing() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    in_database("shop", "SET ROLE shop; CREATE TABLE t AS SELECT g % 2 AS n FROM generate_series(1, 9) g").await;
    // Built by hand, and failed.
    let owner = cluster().admin("shop").await;
    owner.batch_execute("SET ROLE shop").await.expect("the owner");
    owner.batch_execute("CREATE UNIQUE INDEX CONCURRENTLY old ON t (n)").await.expect_err("not unique");
    let concurrent = |version, sql: &str| {
        let mut file = file(version, sql);
        file["transactional"] = json!(false);
        file
    };
    let one = concurrent(1, "CREATE INDEX CONCURRENTLY one ON t (n)");
    let done = roll_out(&api, json!({ "all": true, "migrations": [one] })).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    // One that fails for another reason is resumed, and the index is still none of its doing.
    let two = concurrent(2, "SELECT 1; CREATE INDEX CONCURRENTLY two ON u (n)");
    let id = begin(&api, json!({ "all": true, "migrations": [two] })).await;
    let told = error(&over(&api, id).await, "shop").to_owned();
    assert!(told.contains("42P01") && !told.contains("old"), "{told}");
    in_database("shop", "SET ROLE shop; CREATE TABLE u (n int)").await;
    api.post(&format!("/v1/rollouts/{id}/resume"), json!({})).await;
    let done = over(&api, id).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    // Dropped and made anew under its name, it is.
    let three = concurrent(3, "DROP INDEX CONCURRENTLY old; CREATE UNIQUE INDEX CONCURRENTLY old ON t (n)");
    let stopped = roll_out(&api, json!({ "all": true, "migrations": [three] })).await;
    assert!(error(&stopped, "shop").contains("left the index public.old invalid"), "{stopped}");
    assert_eq!(in_database("shop", VERSIONS).await, "1 2 3?");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_rollouts_never_meet_in_a_tenant() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    // It fails if another is at work in between.
    let alone = |name: &str| {
        format!(
            "DO $$ BEGIN CREATE TABLE IF NOT EXISTS {name} (); IF (SELECT count(*) FROM pg_stat_activity WHERE usename LIKE '%-hand') <> 1 \
                 THEN RAISE 'not alone'; END IF; PERFORM pg_sleep(0.3); END $$"
        )
    };
    let first = begin(&api, json!({ "all": true, "migrations": [file(1, &alone("a"))] })).await;
    let second = begin(&api, json!({ "all": true, "migrations": [file(2, &alone("b"))] })).await;
    let mut ended = BTreeSet::new();
    for id in [first, second] {
        let rollout = over(&api, id).await;
        assert_eq!(rollout["state"], "succeeded", "{rollout}");
        ended.insert(rollout["tenants"][0]["ended_at"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(ended.len(), 2);
    assert_eq!(in_database("shop", VERSIONS).await, "1 2");
    // Nor does one meet somebody else's run, by the lock in the database.
    let other = cluster().admin("shop").await;
    other.batch_execute("SELECT pg_advisory_lock(1952803425, 4)").await.expect("the lock");
    let stopped =
        roll_out(&api, json!({ "all": true, "lock_retries": 1, "migrations": [file(3, "CREATE TABLE c ()")] })).await;
    assert!(error(&stopped, "shop").contains("another run of migrations"), "{stopped}");
}

/// A named statement, prepared once and run again and again.
struct Prepared {
    client: Client,
    sql: &'static str,
}

impl Prepared {
    async fn new(proxy: &Proxy, tenant: &Tenant, sql: &'static str) -> Self {
        let mut client = proxy.connect(tenant).login().await;
        client.ask(&[say::parse("s", sql), say::describe_statement("s"), say::sync()].concat()).await.ok();
        let mut it = Self { client, sql };
        it.run().await;
        it
    }

    /// Binds and runs it, and asks what its columns are, as drivers do.
    async fn run(&mut self) -> String {
        let request = [say::bind("", "s", &[]), say::describe_portal(""), say::execute("", 0), say::sync()].concat();
        let answer = self.client.ask(&request).await;
        assert!(answer.faults().is_empty(), "{}: {:?}", self.sql, answer.faults());
        answer.value()
    }
}

/// What is on the server connection itself, by way of a view: asked for by name, a client is shown its own.
const PREPARED: &str = "CREATE VIEW on_server AS SELECT name || ' at ' || prepare_time AS one FROM pg_prepared_statements; \
                        GRANT SELECT ON on_server TO PUBLIC";
/// One series of a metric.
async fn series(proxy: &Proxy, name: &str, tenant: &str) -> f64 {
    let begin = format!("{name}{{tenant=\"{tenant}\",role=\"{tenant}\"}} ");
    let metrics = proxy.metrics().await;
    let found = metrics.lines().find_map(|line| line.strip_prefix(&begin)?.parse().ok());
    found.unwrap_or_else(|| panic!("no {begin}in {metrics}"))
}

const PREPARED_AT: &str = "SELECT coalesce(string_agg(one, ', '), '') FROM on_server";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_type_changes_under_prepared_statements_and_only_that_tenants_plans_are_dropped() {
    let (first, api) = control_proxy().await;
    let tenants = create_all(&api, &["blog", "shop"]).await;
    for tenant in &tenants {
        let mut client = first.connect(tenant).login().await;
        client.run("CREATE TABLE t (n int)").await;
        client.run("INSERT INTO t VALUES (7)").await;
    }
    cluster().sql_in("blog", PREPARED).await;
    // A second process serves the same tenants.
    let second = control_builder(ProxyBuilder::new(cluster())).start().await;
    eventually("it knows the tenants", async || {
        (api.at(&second).get("/v1/tenants/shop").await.status == 200).then_some(())
    })
    .await;
    let [blog, shop] = &tenants[..] else { panic!("two") };
    let mut clients = Vec::new();
    for proxy in [&first, &second] {
        clients.push(Prepared::new(proxy, shop, "SELECT n FROM t").await);
    }
    let mut other = Prepared::new(&first, blog, "SELECT n FROM t").await;
    let kept = other.client.value(PREPARED_AT).await;
    assert!(kept.contains("tenantry_"), "blog's statement is prepared: {kept:?}");
    const PARSES: &str = "tenantry_prepared_parses_total";
    let before = series(&first, PARSES, "blog").await;
    let dropped = async |proxy: &Proxy, name: &str| series(proxy, "tenantry_plans_dropped_total", name).await;
    let (blogs, shops) =
        (dropped(&first, "blog").await, [dropped(&first, "shop").await, dropped(&second, "shop").await]);

    // They run all the while.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let running: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut runs = 0u32;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    assert_eq!(client.run().await, "7");
                    runs += 1;
                }
                runs
            })
        })
        .collect();
    let files: Vec<_> = ["bigint", "text", "int USING n::int", "numeric"]
        .iter()
        .zip(1..)
        .map(|(kind, version)| file(version, &format!("ALTER TABLE t ALTER n TYPE {kind}")))
        .collect();
    for count in 1..=files.len() {
        let wish = json!({ "tenants": ["shop"], "migrations": files[..count] });
        let done = roll_out(&api, wish).await;
        assert_eq!(done["state"], "succeeded", "{done}");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in running {
        assert!(client.await.expect("nobody saw 0A000") > 10);
    }
    assert_eq!(other.run().await, "7");
    assert_eq!(other.client.value(PREPARED_AT).await, kept, "blog's statement is the one that it was");
    // The query for the statements is prepared nowhere; blog's was prepared once, before.
    assert_eq!(series(&first, PARSES, "blog").await, before);
    assert_eq!(dropped(&first, "blog").await, blogs);
    // Also where no client has met the change yet: once for each change, in each process.
    let at_rest = [dropped(&first, "shop").await, dropped(&second, "shop").await];
    assert!(at_rest[0] >= shops[0] + 4.0 && at_rest[1] >= shops[1] + 4.0, "{shops:?} {at_rest:?}");
    let last = json!({ "tenants": ["shop"], "migrations": [file(9, "ALTER TABLE t ALTER n TYPE text")] });
    assert_eq!(roll_out(&api, last).await["state"], "succeeded");
    assert_eq!(dropped(&first, "shop").await, at_rest[0] + 1.0);
    eventually("the other process has heard", async || {
        (dropped(&second, "shop").await == at_rest[1] + 1.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_survives_kill_9_at_every_effect() {
    let (proxy, api) = control_proxy().await;
    create_all(&api, &["blog", "shop"]).await;
    let mut effects = 0;
    for n in 1.. {
        assert!(n < 100, "it never lived to see its end");
        proxy.restart(&["--die-at", &n.to_string(), "--die-in", "migrate"]).await;
        eventually("it answers again", async || {
            (api.try_send("GET", "/v1/tenants", None, &[]).await?.status == 200).then_some(())
        })
        .await;
        let mut concurrent = file(2 * n, &format!("CREATE INDEX CONCURRENTLY i{n} ON t{n} (n)"));
        concurrent["transactional"] = json!(false);
        let files = json!([file(2 * n - 1, &format!("CREATE TABLE t{n} (n int)")), concurrent]);
        let wish = json!({ "all": true, "migrations": files });
        let id = begin(&api, wish).await;
        let lived = eventually("it is over, or dead", async || {
            if !proxy.runs() {
                return Some(false);
            }
            let rollout = api.try_send("GET", &format!("/v1/rollouts/{id}"), None, &[]).await?.body;
            (rollout["state"] == "succeeded").then_some(true)
        })
        .await;
        if !lived {
            effects += 1;
            proxy.restart(&[]).await;
        }
        let mut done = over(&api, id).await;
        if done["state"] != "succeeded" {
            // Only this: killed between an index and its count, the statement is done again, and the index is there.
            let told = done["error"].as_str().unwrap_or_default().to_owned();
            let of = if told.contains("shop") { "shop" } else { "blog" };
            let told = error(&done, of);
            let is_named =
                told.contains("already exists") && told.contains("may have been done") || told.contains("invalid");
            assert!(is_named, "at effect {n}: {told}");
            in_database(of, &format!("DROP INDEX i{n}")).await;
            assert_eq!(api.post(&format!("/v1/rollouts/{id}/resume"), json!({})).await.status, 202);
            done = over(&api, id).await;
        }
        assert_eq!(done["state"], "succeeded", "at effect {n}: {done}");
        let wanted = (1..=2 * n).map(|version| version.to_string()).collect::<Vec<_>>().join(" ");
        for name in ["blog", "shop"] {
            assert_eq!(in_database(name, VERSIONS).await, wanted, "at effect {n}");
        }
        assert_eq!(hands().await, "0", "at effect {n}");
        if lived {
            assert!(effects > 20, "only {effects} effects: what was killed?");
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_request_with_the_same_key_is_one_rollout_and_cancel_rolls_back() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("shop").await;
    api.create("blog").await;
    let wish = json!({ "all": true, "canary_tenants": ["shop"], "migrations": [file(1, "CREATE TABLE t (); SELECT pg_sleep(600)")] });
    let headers = [("Idempotency-Key", "once")];
    let first = api.send("POST", "/v1/rollouts", Some(&wish), &headers).await;
    let second = api.send("POST", "/v1/rollouts", Some(&wish), &headers).await;
    assert_eq!((first.status, &first.body["id"]), (202, &second.body["id"]));
    let mut other = wish.clone();
    other["parallel"] = json!(2);
    assert_eq!(api.send("POST", "/v1/rollouts", Some(&other), &headers).await.status, 422);
    let id = first.body["id"].as_i64().expect("a number");
    eventually("it sleeps", async || {
        let asleep =
            "SELECT count(*)::text FROM pg_stat_activity WHERE usename LIKE '%-hand' AND wait_event = 'PgSleep'";
        (cluster().sql(asleep).await? == "1").then_some(())
    })
    .await;
    // Nobody waits for it.
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1");
    assert_eq!(api.post(&format!("/v1/rollouts/{id}/cancel"), json!({})).await.status, 202);
    let cancelled = over(&api, id).await;
    assert_eq!((states(&cancelled).as_str(), &cancelled["state"]), ("shop:failed blog:waiting", &json!("cancelled")));
    assert_eq!(in_database("shop", "SELECT to_regclass('t')::text").await, "");
    assert_eq!(hands().await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_is_followed_turn_by_turn_to_its_end() {
    let (_proxy, api) = control_proxy().await;
    create_all(&api, &["blog", "club", "shop"]).await;
    cluster().sql_in("club", "SET ROLE club; CREATE TABLE t ()").await;
    let wish = json!({ "all": true, "canary_tenants": ["shop"], "migrations": [file(1, "CREATE TABLE t ()")], "stop_after": 9 });
    let id = begin(&api, wish).await;
    let path = format!("/v1/rollouts/{id}/events");
    // Once while it runs, once when it is over: the same end, and every tenant's turn before it.
    for _ in 0..2 {
        let stream = api.get(&path).await;
        let text = stream.body.as_str().unwrap_or_else(|| panic!("{}", stream.body)).to_owned();
        let mut told = Vec::new();
        for event in text.split("\n\n").filter(|event| event.starts_with("event: ")) {
            let (name, data) = event.split_once('\n').expect("two lines");
            let data = data.strip_prefix("data: ").unwrap_or_else(|| panic!("{event}"));
            told.push((name["event: ".len()..].to_owned(), serde_json::from_str::<Value>(data).expect("JSON")));
        }
        let last_of = |name: &str| told.iter().rposition(|(event, turn)| event == "turn" && turn["name"] == name);
        let places =
            ["shop", "blog", "club"].map(|name| last_of(name).unwrap_or_else(|| panic!("no {name} in {text}")));
        let ends = places.map(|place| told[place].1["state"].as_str().unwrap_or_default().to_owned());
        assert_eq!(ends, ["done", "done", "failed"], "{text}");
        let (name, end) = told.last().expect("an end");
        assert_eq!((name.as_str(), states(end).as_str()), ("end", "shop:done blog:done club:failed"), "{text}");
        let (name, progress) = &told[told.len() - 2];
        assert_eq!((name.as_str(), &progress["counts"]), ("progress", &end["counts"]), "{text}");
    }
    let (code, out, err) = tenantry(&api, &["rollout", "watch", &id.to_string()]).await;
    assert!(code == 1 && out.contains("already exists") && err.contains("2 done, 1 failed"), "{code} {out} {err}");
    assert_eq!(api.get("/v1/rollouts/99/events").await.status, 404);
    assert_eq!(
        api.get("/openapi.json").await.body["paths"]["/v1/rollouts/{rollout}/events"]["get"]["operationId"],
        "follow_rollout"
    );
}

/// `tenantry WORD ...` against the proxy's API; exit code, standard output, standard error.
async fn tenantry(api: &Api, words: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(binary());
    command.args(words).env("TENANTRY_URL", format!("http://{}", api.base)).env("TENANTRY_TOKEN", &api.token);
    let done = tokio::task::spawn_blocking(move || command.output().expect("tenantry")).await.expect("no panic");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (done.status.code().unwrap_or(-1), text(&done.stdout), text(&done.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_reads_a_directory_tells_the_plan_and_reports() {
    let (proxy, api) = control_proxy().await;
    create_all(&api, &["blog", "club", "shop"]).await;
    let dir = proxy.dir().join("sql");
    std::fs::create_dir(&dir).expect("a directory");
    let write = |name: &str, sql: &str| std::fs::write(dir.join(name), sql).expect("a file");
    write("0001_table.sql", "CREATE TABLE t (n int);");
    write("0002_index.sql", "-- tenantry: no-transaction\nCREATE INDEX CONCURRENTLY t_n ON t (n);");
    let dir = dir.display().to_string();
    let (code, out, err) = tenantry(&api, &["migrate", &dir, "--tenants", "*", "--canary", "shop", "--dry-run"]).await;
    assert!(
        code == 0 && out.contains("canary") && out.contains("0001_table.sql, 0002_index.sql"),
        "{code} {out} {err}"
    );
    cluster().sql_in("club", "SET ROLE club; CREATE TABLE t (n int)").await;
    let (code, out, err) = tenantry(&api, &["migrate", &dir, "--tenants", "*", "--canary", "blog"]).await;
    assert!(code == 1 && out.contains("not reached") && err.contains("--resume"), "{code} {out} {err}");
    in_database("club", "DROP TABLE t").await;
    let (code, out, _) = tenantry(&api, &["rollout", "list", "--json"]).await;
    let listed: Value = serde_json::from_str(&out).expect("JSON");
    let id = listed[0]["id"].to_string();
    assert_eq!((code, &listed[0]["state"]), (0, &json!("stopped")));
    let (code, out, err) = tenantry(&api, &["migrate", "--resume", &id]).await;
    assert!(code == 0 && out.contains("succeeded; 3 done"), "{code} {out} {err}");
    std::fs::write(format!("{dir}/0001_table.sql"), "CREATE TABLE t (n bigint);").expect("a file");
    let (code, _, err) = tenantry(&api, &["migrate", &dir, "--tenants", "blog"]).await;
    assert!(code == 65 && err.contains("0001_table.sql") && err.contains("checksum"), "{code} {err}");
}
