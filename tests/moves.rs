//! A tenant moves to another server while its application runs, comes back, or stays: what its clients see, what is at which
//! place, and that there are never two places that can be written.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Client, Cluster, Connect, Endpoint, Proxy, ProxyBuilder, Tenant,
    control::{control_builder, control_role_with, with_server},
    eventually, say,
};
use tokio::task::JoinSet;

/// So that a server can be replicated from and to.
const LOGICAL: &str =
    "wal_level = logical\nmax_wal_senders = 10\nmax_replication_slots = 10\nwal_retrieve_retry_interval = 100ms";

/// A copy begins when PostgreSQL has started its workers, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two servers, `main` and `other`, and Tenantry in front of them.
struct House {
    main: &'static Cluster,
    other: &'static Cluster,
    proxy: Proxy,
    api: Api,
}

impl House {
    async fn new() -> Self {
        Self::of(Cluster::start_with(LOGICAL).leaked(), Cluster::start_with(LOGICAL).leaked(), &["online_moves=1"])
            .await
    }

    async fn of(main: &'static Cluster, other: &'static Cluster, variables: &[&str]) -> Self {
        Self::with(main, other, variables, &[]).await
    }

    /// With further settings.
    async fn with(
        main: &'static Cluster,
        other: &'static Cluster,
        variables: &[&str],
        settings: &[(&str, toml::Value)],
    ) -> Self {
        for server in [main, other] {
            control_role_with(server, variables).await;
        }
        let builder = control_builder(ProxyBuilder::new(main)).set("admin.archive_stall_timeout", "60s");
        let mut builder = with_server(builder, "other", other.address()).set("servers.other.cap", 30);
        for (key, value) in settings {
            builder = builder.set(key, value.clone());
        }
        let proxy = builder.start().await;
        let api = Api::new(&proxy, "admin").await;
        Self { main, other, proxy, api }
    }

    async fn create(&self, name: &str) -> Tenant {
        self.create_as(json!({ "name": name, "server": "main" })).await
    }

    async fn create_as(&self, spec: Value) -> Tenant {
        let made = self.api.post("/v1/tenants", spec).await;
        assert_eq!(made.status, 201, "{}", made.body);
        tenantry_testkit::control::tenant_of(&made.body)
    }

    /// Begins a move; its job.
    async fn begin(&self, path: &str, body: Value) -> i64 {
        let begun = self.api.send("POST", path, Some(&body), &[("Prefer", "respond-async")]).await;
        assert_eq!(begun.status, 202, "{path}: {}", begun.body);
        begun.body["job"]["id"].as_i64().expect("a number")
    }

    /// Once this step is under way.
    async fn at(&self, job: i64, step: &str) {
        let start = Instant::now();
        loop {
            let job = self.api.get(&format!("/v1/jobs/{job}")).await.body;
            let at = usize::try_from(job["step"].as_u64().unwrap_or(0)).unwrap_or(0);
            if job["state"] == "running" && job["steps"][at] == step {
                return;
            }
            let is_over = matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled"));
            assert!(!is_over && start.elapsed() < PATIENCE, "{step} does not come: {job}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Does it, which must fail; why.
    async fn fails(&self, path: &str, body: Value) -> String {
        let job = self.begin(path, body).await;
        let ended = self.end_of(job).await;
        assert_eq!(ended["state"], "failed", "{path}: {ended}");
        ended["error"].as_str().unwrap_or_default().to_owned()
    }

    /// How a job ended.
    async fn end_of(&self, job: i64) -> Value {
        loop {
            self.api.try_send("GET", &format!("/v1/jobs/{job}/events"), None, &[]).await;
            let Some(reply) = self.api.try_send("GET", &format!("/v1/jobs/{job}"), None, &[]).await else { continue };
            if matches!(reply.body["state"].as_str(), Some("succeeded" | "failed" | "cancelled")) {
                return reply.body;
            }
        }
    }

    /// Does it, to a good end.
    async fn job(&self, path: &str, body: Value) -> Value {
        let job = self.begin(path, body).await;
        let ended = self.end_of(job).await;
        assert_eq!(ended["state"], "succeeded", "{path}: {ended}");
        ended
    }

    async fn view(&self, name: &str) -> Value {
        self.api.get(&format!("/v1/tenants/{name}")).await.body
    }

    fn direct(&self, server: &'static Cluster, tenant: &Tenant) -> Connect {
        let _ = self;
        Connect::new(Endpoint::Tcp(server.address()), tenant, &tenant.name)
    }

    /// What a tenant's own role is told that logs in around Tenantry; nothing if it gets in.
    async fn refusal(&self, server: &'static Cluster, tenant: &Tenant) -> Option<String> {
        match self.direct(server, tenant).try_login().await {
            Ok(_) => None,
            Err(answer) => Some(answer.faults().first().map(|fault| fault.code.clone()).unwrap_or_default()),
        }
    }

    /// What replication left behind at a server: slots, subscriptions, roles of ours.
    async fn left_over(&self, server: &'static Cluster) -> String {
        let sql = "SELECT coalesce(string_agg(name, ' ' ORDER BY name), '') FROM ( \
                     SELECT 'slot:' || slot_name AS name FROM pg_replication_slots \
                     UNION ALL SELECT 'subscription:' || subname FROM pg_subscription \
                     UNION ALL SELECT 'role:' || rolname FROM pg_roles WHERE rolname LIKE 'tenantry-%' \
                     UNION ALL SELECT 'database:' || datname FROM pg_database WHERE datname LIKE 'tenantry-%') AS it";
        server.sql(sql).await.unwrap_or_default()
    }

    async fn databases(&self, server: &'static Cluster, name: &str) -> String {
        server.sql(&format!("SELECT count(*) FROM pg_database WHERE datname = '{name}'")).await.unwrap_or_default()
    }
}

/// Transfers between accounts by many clients, each of whom writes down what was acknowledged.
struct Bank {
    stop: Arc<AtomicBool>,
    clients: JoinSet<(u32, Duration)>,
    done: Arc<AtomicU32>,
}

const ACCOUNTS: u32 = 200;
const OPENING: u32 = 1_000;

impl Bank {
    async fn tables(client: &mut Client, rows: u32) {
        client.run("CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL)").await;
        client.run(&format!("INSERT INTO accounts SELECT g, {OPENING} FROM generate_series(1, {ACCOUNTS}) g")).await;
        client.run("CREATE TABLE transfers (id bigserial PRIMARY KEY, client int NOT NULL, n int NOT NULL)").await;
        client.run("CREATE TABLE big (id int PRIMARY KEY, text text NOT NULL)").await;
        client
            .run(&format!("INSERT INTO big SELECT g, repeat(md5(g::text), 4) FROM generate_series(1, {rows}) g"))
            .await;
        client.run("CREATE MATERIALIZED VIEW totals AS SELECT count(*) AS n FROM big").await;
    }

    async fn open(house: &House, tenant: &Tenant, clients: u32) -> Self {
        let mut bank = Self { stop: Arc::default(), clients: JoinSet::new(), done: Arc::default() };
        for id in 0..clients {
            let client = house.proxy.connect(tenant).login().await;
            let (stop, done) = (Arc::clone(&bank.stop), Arc::clone(&bank.done));
            bank.clients.spawn(transfer(client, id, stop, done));
        }
        bank.more().await;
        bank
    }

    /// Waits until the clients have come further.
    async fn more(&self) {
        let before = self.done.load(Relaxed);
        eventually("the clients get on", async || (self.done.load(Relaxed) > before + 50).then_some(())).await;
    }

    /// What each client was told is committed, and the longest that one had to wait.
    async fn close(self) -> (BTreeMap<u32, u32>, Duration) {
        self.stop.store(true, Relaxed);
        let told = self.clients.join_all().await;
        let longest = told.iter().map(|(_, pause)| *pause).max().unwrap_or_default();
        ((0..).zip(told.iter().map(|(n, _)| *n)).collect(), longest)
    }
}

/// Every error is a panic: there must be none.
async fn transfer(mut client: Client, id: u32, stop: Arc<AtomicBool>, done: Arc<AtomicU32>) -> (u32, Duration) {
    let (mut n, mut longest) = (0, Duration::ZERO);
    while !stop.load(Relaxed) {
        let (one, two) = (1 + rand::random::<u32>() % ACCOUNTS, 1 + rand::random::<u32>() % ACCOUNTS);
        let (low, high) = (one.min(two), one.max(two));
        let (begun, sum) = (Instant::now(), if one < two { 7 } else { -7 });
        n += 1;
        client.run("BEGIN").await;
        client.run(&format!("UPDATE accounts SET balance = balance - {sum} WHERE id = {low}")).await;
        client.run(&format!("UPDATE accounts SET balance = balance + {sum} WHERE id = {high}")).await;
        client.run(&format!("INSERT INTO transfers (client, n) VALUES ({id}, {n})")).await;
        client.run("COMMIT").await;
        longest = longest.max(begun.elapsed());
        done.fetch_add(1, Relaxed);
    }
    (n, longest)
}

/// Money is conserved, and what was acknowledged is there once.
async fn balanced(client: &mut Client, told: &BTreeMap<u32, u32>, rows: u32) {
    let sum = (ACCOUNTS * OPENING).to_string();
    assert_eq!(client.value("SELECT sum(balance) FROM accounts").await, sum, "money is conserved");
    let acknowledged: u32 = told.values().sum();
    let counted = client.value("SELECT count(*) || ' ' || count(DISTINCT (client, n)) FROM transfers").await;
    assert_eq!(counted, format!("{acknowledged} {acknowledged}"), "each acknowledged transfer once, and no other");
    assert_eq!(client.value("SELECT count(*) FROM big").await, rows.to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_online_move_under_load_and_its_rollback_lose_nothing_and_answer_nobody_with_an_error() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut first = house.proxy.connect(&tenant).login().await;
    Bank::tables(&mut first, 20_000).await;
    let bank = Bank::open(&house, &tenant, 32).await;

    let moved = house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    let view = house.view("shop").await;
    assert_eq!(
        (&view["server"], &view["moved"]["from"], &view["moved"]["follows"]),
        (&json!("other"), &json!("main"), &json!(true)),
        "{moved}"
    );
    bank.more().await;
    assert_eq!(first.value("SELECT current_setting('port')").await, house.other.port().to_string());
    assert_eq!(house.refusal(house.main, &tenant).await.as_deref(), Some("42501"), "the old copy is closed");
    let stranger = Tenant { role: "stranger".to_owned(), password: "secret".to_owned(), ..tenant.clone() };
    for server in [house.main, house.other] {
        server.sql("CREATE ROLE stranger LOGIN PASSWORD 'secret'").await;
        assert_eq!(house.refusal(server, &stranger).await.as_deref(), Some("42501"), "nobody else gets in, at either");
    }
    assert_eq!(first.value("SELECT n FROM totals").await, "20000");

    let back = house.job("/v1/tenants/shop/move/rollback", json!({})).await;
    bank.more().await;
    assert_eq!(first.value("SELECT current_setting('port')").await, house.main.port().to_string(), "{back}");
    let (told, longest) = bank.close().await;
    balanced(&mut first, &told, 20_000).await;
    println!("{} transfers, the longest took {longest:?}", told.values().sum::<u32>());
    assert_eq!(house.view("shop").await["moved"], Value::Null);
    assert_eq!((house.left_over(house.main).await, house.left_over(house.other).await), (String::new(), String::new()));
    assert_eq!(house.databases(house.other, "shop").await, "0");
    assert_eq!(house.other.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'shop'").await.as_deref(), Some("0"));
}

/// A named statement, prepared before the move, is what it was after it; so is a session's setting.
#[tokio::test]
async fn prepared_statements_and_settings_of_a_session_go_along() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int PRIMARY KEY, x text)").await;
    client.run("INSERT INTO t VALUES (1, 'one')").await;
    client.run("SET application_name = 'mine'").await;
    let prepare =
        [say::parse("named", "SELECT x, current_setting('application_name') FROM t WHERE n = $1"), say::sync()];
    client.ask(&prepare.concat()).await.ok();
    let run = [say::bind("", "named", &[Some("1")]), say::execute("", 0), say::sync()].concat();
    let asked = async |client: &mut Client| {
        client.send(&run).await;
        client.until_ready().await.ok().rows()
    };
    let before = asked(&mut client).await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    assert_eq!(client.value("SELECT current_setting('port')").await, house.other.port().to_string());
    assert_eq!(asked(&mut client).await, before);
    // A session that was idle all the time, and one that logs in now, with the password that they have.
    assert_eq!(house.proxy.connect(&tenant).login().await.value("SELECT x FROM t").await, "one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_move_keeps_clients_waiting_and_loses_nothing_and_confirm_drops_the_old_copy() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut first = house.proxy.connect(&tenant).login().await;
    Bank::tables(&mut first, 5_000).await;
    // What replication could not carry.
    first.run("CREATE UNLOGGED TABLE scratch AS SELECT 1 AS n").await;
    first.run("SELECT lo_from_bytea(4711, 'hello')").await;
    let bank = Bank::open(&house, &tenant, 8).await;
    let moved = house.job("/v1/tenants/shop/move", json!({ "server": "other", "method": "dump", "streams": 2 })).await;
    bank.more().await;
    let (told, _) = bank.close().await;
    balanced(&mut first, &told, 5_000).await;
    assert_eq!(first.value("SELECT convert_from(lo_get(4711), 'UTF8') || (SELECT n FROM scratch)").await, "hello1");
    assert_eq!(first.value("SELECT current_setting('port')").await, house.other.port().to_string(), "{moved}");
    assert_eq!(house.refusal(house.main, &tenant).await.as_deref(), Some("55000"), "sealed");
    let view = house.view("shop").await;
    assert_eq!((&view["moved"]["method"], &view["moved"]["follows"]), (&json!("dump"), &json!(false)));

    // What would break the copy is refused, and so is a rollback that would lose what was written since.
    for (path, body) in [
        ("/v1/tenants/shop/rename", json!({ "to": "store" })),
        ("/v1/tenants/shop/archive", json!({})),
        ("/v1/tenants/shop/move", json!({ "server": "main" })),
        ("/v1/tenants/shop/move/rollback", json!({})),
    ] {
        let refused = house.api.post(path, body).await;
        assert_eq!(
            (refused.status, &refused.body["type"]),
            (409, &json!("urn:tenantry:problem:wrong-state")),
            "{path}"
        );
    }
    let delete = json!({ "confirm": "shop", "without_archive": true });
    let refused = house.api.send("DELETE", "/v1/tenants/shop", Some(&delete), &[("If-Match", "*")]).await;
    assert_eq!(refused.status, 409, "{}", refused.body);
    let other = house.api.post("/v1/tenants/shop/adopt", json!({ "server": "main" })).await;
    assert_eq!(other.status, 409, "the copy's name is taken at its server: {}", other.body);

    house.job("/v1/tenants/shop/move/confirm", json!({})).await;
    assert_eq!(house.view("shop").await["moved"], Value::Null);
    assert_eq!(house.databases(house.main, "shop").await, "0");
    assert_eq!(house.main.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'shop'").await.as_deref(), Some("0"));
    assert_eq!((house.left_over(house.main).await, house.left_over(house.other).await), (String::new(), String::new()));
    assert!(!house.proxy.dir().join("moves").join("1").exists());
    assert_eq!(house.api.post("/v1/tenants/shop/move/confirm", json!({})).await.status, 409, "nothing to confirm");
    balanced(&mut first, &told, 5_000).await;
}

#[tokio::test]
async fn a_forced_rollback_of_a_dump_keeps_what_it_leaves_and_can_be_taken_back_itself() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int)").await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other", "method": "dump" })).await;
    client.run("INSERT INTO t VALUES (1)").await;
    house.job("/v1/tenants/shop/move/rollback", json!({ "force": true })).await;
    assert_eq!(client.value("SELECT count(*) FROM t").await, "0", "as it was when it was moved");
    assert_eq!(house.view("shop").await["moved"]["from"], "other", "what was left is kept");
    assert_eq!(house.refusal(house.other, &tenant).await.as_deref(), Some("55000"));
    house.job("/v1/tenants/shop/move/rollback", json!({ "force": true })).await;
    assert_eq!(client.value("SELECT count(*) FROM t").await, "1");
    house.job("/v1/tenants/shop/move/confirm", json!({})).await;
    assert_eq!(house.databases(house.main, "shop").await, "0");
}

#[tokio::test]
async fn what_cannot_be_moved_online_is_named_by_a_dry_run_and_refused_before_anything_is_made() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE bare (n int)").await;
    client.run("CREATE TABLE fine (n int PRIMARY KEY)").await;
    client.run("CREATE TABLE indexed (n int NOT NULL UNIQUE)").await;
    client.run("ALTER TABLE indexed REPLICA IDENTITY USING INDEX indexed_n_key").await;
    client.run("CREATE UNLOGGED TABLE scratch (n int PRIMARY KEY)").await;
    client.run("SELECT lo_create(4711)").await;
    client.run("CREATE SEQUENCE numbers").await;
    house.other.sql("CREATE ROLE stranger").await;
    house.main.sql("CREATE ROLE reader").await;
    client.run("GRANT SELECT ON fine TO reader").await;
    let path = "/v1/tenants/shop/move?dry_run=true";
    let looked = house.api.post(path, json!({ "server": "other" })).await;
    assert_eq!(looked.status, 200, "{}", looked.body);
    let result = &looked.body["job"]["result"];
    let steps = result["steps"].as_array().expect("steps");
    assert!(steps.contains(&json!("replicate")) && steps.contains(&json!("switch_server")), "{result}");
    let findings = result["findings"].as_array().expect("findings");
    let of = |word: &str| {
        let found = findings.iter().find(|finding| finding["what"].as_str().is_some_and(|what| what.contains(word)));
        found.unwrap_or_else(|| panic!("nothing of {word} in {result}"))
    };
    assert_eq!(of("replica identity")["names"], json!(["public.bare"]));
    assert!(of("replica identity")["advice"].as_str().is_some_and(|advice| advice.contains("ALTER TABLE")));
    assert_eq!(of("unlogged")["names"], json!(["public.scratch"]));
    assert_eq!(of("large objects")["refuses"], true);
    assert_eq!(of("sequences")["refuses"], false);
    assert!(of("reader")["what"].as_str().is_some_and(|what| what.contains("not at other")));

    let refused = house.api.post("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    assert_eq!((refused.status, &refused.body["type"]), (409, &json!("urn:tenantry:problem:job-failed")));
    let why = refused.body["detail"].as_str().unwrap_or_default();
    assert!(["public.bare", "unlogged", "large objects", "reader"].iter().all(|word| why.contains(word)), "{why}");
    assert_eq!((house.left_over(house.main).await, house.left_over(house.other).await), (String::new(), String::new()));
    assert_eq!(house.databases(house.other, "shop").await, "0");
    client.run("UPDATE bare SET n = 1").await;
    for (body, word) in [
        (json!({ "server": "main" }), "there already"),
        (json!({ "server": "nowhere" }), "server"),
        (json!({ "server": "other", "streams": 0 }), "streams"),
        (json!({ "server": "other", "wait_ms": 600_000 }), "wait_ms"),
    ] {
        let invalid = house.api.post("/v1/tenants/shop/move", body).await;
        assert_eq!(invalid.status, 422, "{}", invalid.body);
        assert!(invalid.body["detail"].as_str().is_some_and(|why| why.contains(word)), "{}", invalid.body);
    }
}

#[tokio::test]
async fn servers_that_cannot_replicate_are_named_with_what_they_lack_and_a_dump_works() {
    let (main, other) = (Cluster::start().leaked(), Cluster::start().leaked());
    let house = House::of(main, other, &[]).await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t AS SELECT 7 AS n").await;
    let refused = house.api.post("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    let why = refused.body["detail"].as_str().unwrap_or_default();
    let words = ["wal_level is minimal", "pg_create_subscription", "use method dump"];
    assert!(words.iter().all(|word| why.contains(word)), "{why}");
    house.job("/v1/tenants/shop/move", json!({ "server": "other", "method": "dump" })).await;
    assert_eq!(client.value("SELECT n || ' ' || current_setting('port') FROM t").await, format!("7 {}", other.port()));
}

#[tokio::test]
async fn a_role_of_the_same_name_that_somebody_else_made_stands_in_the_way_and_is_left_alone() {
    let house = House::new().await;
    house.create("shop").await;
    house.other.sql("CREATE ROLE shop LOGIN PASSWORD 'another'").await;
    let refused = house.api.post("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    assert_eq!(refused.status, 409, "{}", refused.body);
    assert!(
        refused.body["detail"].as_str().is_some_and(|why| why.contains("there is a role shop already")),
        "{}",
        refused.body
    );
    let is_there = "SELECT count(*) FROM pg_roles WHERE rolname = 'shop' AND rolcanlogin";
    assert_eq!(house.other.sql(is_there).await.as_deref(), Some("1"));
}

#[tokio::test]
async fn a_role_that_was_dropped_at_the_old_server_does_not_stand_in_the_way_back() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int PRIMARY KEY)").await;
    for server in [house.main, house.other] {
        server.sql("CREATE ROLE analyst LOGIN").await;
    }
    house.main.sql("GRANT CONNECT ON DATABASE shop TO analyst").await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    house.main.sql("DROP ROLE analyst").await;
    house.job("/v1/tenants/shop/move/rollback", json!({})).await;
    assert_eq!(client.value("SELECT current_setting('port')").await, house.main.port().to_string());
}

#[tokio::test]
async fn a_transaction_that_does_not_end_keeps_the_tenant_where_it_is_unless_it_may_be_cancelled() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int PRIMARY KEY)").await;
    let mut slow = house.proxy.connect(&tenant).login().await;
    slow.send(&say::query("SELECT pg_sleep(3600)")).await;
    let body = json!({ "server": "other", "method": "dump", "wait_ms": 100 });
    let job = house.begin("/v1/tenants/shop/move", body).await;
    let ended = house.end_of(job).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    assert!(ended["error"].as_str().is_some_and(|why| why.contains("still in use")), "{ended}");
    assert_eq!(client.value("SELECT current_setting('port')").await, house.main.port().to_string());
    assert_eq!(house.databases(house.other, "shop").await, "0");
    house
        .job("/v1/tenants/shop/move", json!({ "server": "other", "method": "dump", "wait_ms": 100, "cancel": true }))
        .await;
    assert_eq!(slow.until_ready().await.error("57014").code, "57014");
    assert_eq!(slow.value("SELECT current_setting('port')").await, house.other.port().to_string());

    // One that does nothing in its transaction has nothing to cancel: it is ended, and the others are not.
    house.job("/v1/tenants/shop/move/confirm", json!({})).await;
    client.run("BEGIN").await;
    client.run("INSERT INTO t VALUES (1)").await;
    let body = json!({ "server": "main", "method": "dump", "wait_ms": 100, "cancel": true });
    house.job("/v1/tenants/shop/move", body).await;
    let ended = client.until_end().await;
    assert_eq!(ended.faults().first().map(|fault| fault.code.as_str()), Some("57P01"));
    let found = slow.value("SELECT count(*) || ' ' || current_setting('port') FROM t").await;
    assert_eq!(found, format!("0 {}", house.main.port()));
}

#[tokio::test]
async fn tables_that_change_during_a_move_or_after_it_turn_it_back() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int PRIMARY KEY)").await;
    // It waits for this transaction, at the end.
    let mut open = house.proxy.connect(&tenant).login().await;
    open.run("BEGIN").await;
    open.run("SELECT 1").await;
    let job = house.begin("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    house.at(job, "await_quiet").await;
    open.run("ALTER TABLE t ADD x int").await;
    open.run("COMMIT").await;
    let ended = house.end_of(job).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    assert!(ended["error"].as_str().is_some_and(|why| why.contains("changed meanwhile")), "{ended}");
    assert_eq!(client.value("SELECT current_setting('port')").await, house.main.port().to_string());
    assert_eq!((house.left_over(house.main).await, house.left_over(house.other).await), (String::new(), String::new()));
    assert_eq!(house.databases(house.other, "shop").await, "0");

    house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    client.run("CREATE TABLE late (n int PRIMARY KEY)").await;
    let job = house.begin("/v1/tenants/shop/move/rollback", json!({})).await;
    let ended = house.end_of(job).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    assert_eq!(client.value("SELECT current_setting('port')").await, house.other.port().to_string());
    client.run("DROP TABLE late").await;
    client.run("INSERT INTO t VALUES (1)").await;
    house.job("/v1/tenants/shop/move/rollback", json!({})).await;
    assert_eq!(
        client.value("SELECT count(*) || ' ' || current_setting('port') FROM t").await,
        format!("1 {}", house.main.port())
    );
}

#[tokio::test]
async fn a_cancel_at_any_time_before_the_route_changes_leaves_everything_as_it_was() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t AS SELECT g AS n FROM generate_series(1, 100) g").await;
    client.run("ALTER TABLE t ADD PRIMARY KEY (n)").await;
    let grants = "SELECT datacl::text FROM pg_database WHERE datname = 'shop'";
    let before = house.main.sql(grants).await;
    let mut open = house.proxy.connect(&tenant).login().await;
    open.run("BEGIN").await;
    open.run("SELECT 1").await;
    for method in ["online", "dump"] {
        let job = house.begin("/v1/tenants/shop/move", json!({ "server": "other", "method": method })).await;
        house.at(job, "await_quiet").await;
        assert_eq!(house.refusal(house.other, &tenant).await.as_deref(), Some("42501"), "the copy is closed");
        assert_eq!(house.api.post(&format!("/v1/jobs/{job}/cancel"), json!({})).await.status, 202);
        assert_eq!(house.end_of(job).await["state"], "cancelled", "{method}");
        assert_eq!(
            client.value("SELECT count(*) || ' ' || current_setting('port') FROM t").await,
            format!("100 {}", house.main.port())
        );
        assert_eq!(house.main.sql(grants).await, before, "{method}");
        assert_eq!(
            (house.left_over(house.main).await, house.left_over(house.other).await),
            (String::new(), String::new())
        );
        assert_eq!(house.databases(house.other, "shop").await, "0", "{method}");
        assert_eq!(house.other.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'shop'").await.as_deref(), Some("0"));
        let view = house.view("shop").await;
        assert_eq!((&view["server"], &view["moved"], &view["held"]), (&json!("main"), &Value::Null, &json!(false)));
    }
    open.run("COMMIT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_online_move_from_postgresql_15_to_16_loses_nothing_and_says_that_its_rollback_would() {
    // Where no role can be made to send, the control role does: its password is in no statement that a log may have.
    let logged = format!("{LOGICAL}\nlog_statement = ddl");
    let (main, other) = (Cluster::start_as("15", LOGICAL).leaked(), Cluster::start_as("16", &logged).leaked());
    let house = House::of(main, other, &["online_moves=1"]).await;
    let tenant = house.create("shop").await;
    let mut first = house.proxy.connect(&tenant).login().await;
    Bank::tables(&mut first, 5_000).await;
    let looked = house.api.post("/v1/tenants/shop/move?dry_run=true", json!({ "server": "other" })).await;
    let findings = looked.body["job"]["result"]["findings"].to_string();
    assert!(findings.contains("before PostgreSQL 16 only a superuser may subscribe"), "{findings}");
    let bank = Bank::open(&house, &tenant, 16).await;
    let moved = house.job("/v1/tenants/shop/move", json!({ "server": "other", "verify": "full" })).await;
    bank.more().await;
    let (told, longest) = bank.close().await;
    balanced(&mut first, &told, 5_000).await;
    println!("{} transfers, the longest took {longest:?}", told.values().sum::<u32>());
    assert_eq!(first.value("SELECT current_setting('server_version_num')::int / 10000").await, "16", "{moved}");
    assert_eq!(house.view("shop").await["moved"]["follows"], false);
    assert_eq!(house.refusal(main, &tenant).await.as_deref(), Some("55000"), "sealed");
    let refused = house.api.post("/v1/tenants/shop/move/rollback", json!({})).await;
    assert_eq!(refused.status, 409, "{}", refused.body);
    let log = other.log();
    let has_password =
        |line: &&str| line.contains("secret-of-the-control-role") && line.to_lowercase().contains("subscri");
    assert_eq!((log.contains("tenantry_subscribe"), log.lines().find(has_password)), (true, None));
    house.job("/v1/tenants/shop/move/confirm", json!({})).await;
    assert_eq!((house.left_over(main).await, house.left_over(other).await), (String::new(), String::new()));
    assert_eq!(house.databases(main, "shop").await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_every_process_follow_and_a_password_that_was_changed_meanwhile_is_good_after_a_rollback() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let second = house.proxy.settings().start().await;
    let there = house.api.at(&second);
    eventually("it knows the tenant", async || {
        (there.try_send("GET", "/v1/tenants/shop", None, &[]).await?.status == 200).then_some(())
    })
    .await;
    let mut client = second.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int PRIMARY KEY)").await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    assert_eq!(client.value("SELECT current_setting('port')").await, house.other.port().to_string());
    client.run("INSERT INTO t VALUES (1)").await;
    let rotated = house.api.post("/v1/tenants/shop/rotate", json!({ "grace_ms": 0 })).await;
    assert_eq!(rotated.status, 200, "{}", rotated.body);
    let renewed = tenantry_testkit::control::tenant_of(&rotated.body);
    house.job("/v1/tenants/shop/move/rollback", json!({})).await;
    for proxy in [&house.proxy, &second] {
        let mut client =
            eventually("the new password is good", async || proxy.connect(&renewed).try_login().await.ok()).await;
        let found = client.value("SELECT n || ' ' || current_setting('port') FROM t").await;
        assert_eq!(found, format!("1 {}", house.main.port()));
    }
    assert_eq!(house.refusal(house.main, &renewed).await, None, "PostgreSQL there has it, too");
}

#[tokio::test]
async fn a_client_that_listens_hears_on_at_the_new_server() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let (mut listener, mut speaker) =
        (house.proxy.connect(&tenant).login().await, house.proxy.connect(&tenant).login().await);
    listener.run("LISTEN news").await;
    speaker.run("NOTIFY news, 'before'").await;
    let heard = async |listener: &mut Client, limit| {
        let message = listener.next_within(limit).await?;
        Some(message.words(4).get(1).cloned().unwrap_or_default())
    };
    assert_eq!(heard(&mut listener, PATIENCE).await.as_deref(), Some("before"));
    for (path, server) in [("/v1/tenants/shop/move", house.other), ("/v1/tenants/shop/move/rollback", house.main)] {
        let body = if path.ends_with("move") { json!({ "server": "other" }) } else { json!({}) };
        house.job(path, body).await;
        assert_eq!(speaker.value("SELECT current_setting('port')").await, server.port().to_string());
        // The tenant's one listening connection is there a moment after the gate opens.
        let start = Instant::now();
        let said = loop {
            speaker.run("NOTIFY news, 'after'").await;
            match heard(&mut listener, Duration::from_millis(200)).await {
                Some(said) => break said,
                None => assert!(start.elapsed() < PATIENCE, "it hears nothing any more"),
            }
        };
        assert_eq!(said, "after");
        while heard(&mut listener, Duration::from_millis(200)).await.is_some() {}
    }
}

const WITH_NUMBERS: &str = "CREATE TABLE t (id serial PRIMARY KEY, x text)";

async fn followed(house: &House, count: &str) {
    eventually("the old copy has followed", async || {
        (house.main.sql_in("shop", "SELECT count(*) FROM t").await.as_deref() == Some(count)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_copy_that_cannot_be_followed_any_more_is_gone_back_to_by_force_with_what_it_has() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run(WITH_NUMBERS).await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    client.run("INSERT INTO t (x) VALUES ('followed')").await;
    followed(&house, "1").await;
    client.run("ALTER TABLE t ADD y int").await;
    client.run("INSERT INTO t (x, y) VALUES ('lost', 1)").await;
    let why = house.fails("/v1/tenants/shop/move/rollback", json!({})).await;
    assert!(why.contains("cannot be applied at main") && why.contains("--force"), "{why}");
    assert_eq!(client.value("SELECT current_setting('port')").await, house.other.port().to_string());

    let forced = house.job("/v1/tenants/shop/move/rollback", json!({ "force": true })).await;
    let left = &forced["result"]["left_behind"];
    assert!(left["what"].as_str().is_some_and(|what| what.contains("written at other since")), "{forced}");
    assert!(left["applied_until"].is_string() && left["position"].is_string(), "{left}");
    assert_eq!(client.value("SELECT current_setting('port')").await, house.main.port().to_string());
    // The number of the row that stayed behind is not given a second time.
    assert_eq!(client.value("INSERT INTO t (x) VALUES ('after') RETURNING id").await, "3");
    assert_eq!(client.value("SELECT string_agg(x, ' ' ORDER BY id) FROM t").await, "followed after");
    let view = house.view("shop").await;
    assert_eq!((&view["moved"]["from"], &view["moved"]["warning"]), (&json!("other"), &Value::Null));
    assert_eq!(
        house.refusal(house.other, &tenant).await.as_deref(),
        Some("55000"),
        "what was left is closed, and kept"
    );
    assert_eq!((house.left_over(house.main).await, house.left_over(house.other).await), (String::new(), String::new()));
    assert_eq!(house.main.sql_in("shop", "SELECT count(*) FROM pg_publication").await.as_deref(), Some("0"));

    // And there again: nothing of the first move is in its way.
    house.job("/v1/tenants/shop/move/rollback", json!({ "force": true })).await;
    assert_eq!(client.value("SELECT string_agg(x, ' ' ORDER BY id) FROM t").await, "followed lost");
    assert_eq!(house.other.sql_in("shop", "SELECT count(*) FROM pg_publication").await.as_deref(), Some("0"));
    house.job("/v1/tenants/shop/move/confirm", json!({})).await;
    assert_eq!(house.databases(house.main, "shop").await, "0");
}

#[tokio::test]
async fn a_server_that_is_lost_before_the_move_is_confirmed_is_left_by_force_and_closed_once_it_is_back() {
    let house = House::new().await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run(WITH_NUMBERS).await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    client.run("INSERT INTO t (x) SELECT 'row' FROM generate_series(1, 5)").await;
    followed(&house, "5").await;
    client.leave().await;
    house.other.shutdown("QUIT");
    let why = house.fails("/v1/tenants/shop/move/rollback", json!({})).await;
    assert!(why.contains("other cannot be reached") && why.contains("--force"), "{why}");

    let forced = house.job("/v1/tenants/shop/move/rollback", json!({ "force": true })).await;
    let what = forced["result"]["left_behind"]["what"].as_str().unwrap_or_default();
    assert!(what.contains("cannot be reached, and is closed once it is back"), "{forced}");
    let mut client = house.proxy.connect(&tenant).login().await;
    assert_eq!(client.value("INSERT INTO t (x) VALUES ('after') RETURNING id").await, "6", "no number twice");
    assert_eq!(
        client.value("SELECT count(*) || ' ' || current_setting('port') FROM t").await,
        format!("6 {}", house.main.port())
    );
    assert_eq!(house.left_over(house.main).await, "", "nothing is applied here any more");
    let warning = house.view("shop").await["moved"]["warning"].to_string();
    assert!(warning.contains("other is still to be closed"), "{warning}");
    for verb in ["rollback", "confirm"] {
        let body = if verb == "rollback" { json!({ "force": true }) } else { json!({}) };
        let why = house.fails(&format!("/v1/tenants/shop/move/{verb}"), body).await;
        assert!(why.contains("other") && why.contains("cannot be reached"), "{verb}: {why}");
    }

    house.other.start_again().await;
    eventually("the copy that was left is closed", async || {
        house.view("shop").await["moved"]["warning"].is_null().then_some(())
    })
    .await;
    assert_eq!(house.refusal(house.other, &tenant).await.as_deref(), Some("55000"));
    assert_eq!(house.left_over(house.other).await, "");
    house.job("/v1/tenants/shop/move/confirm", json!({})).await;
    assert_eq!(house.databases(house.other, "shop").await, "0");
    assert_eq!(client.value("SELECT count(*) FROM t").await, "6");
}

#[tokio::test]
async fn a_server_keeps_no_more_log_for_a_copy_that_follows_than_it_may_and_somebody_is_told_before() {
    let limit = [("admin.max_followed_wal", toml::Value::from("64MiB"))];
    let (main, other) = (Cluster::start_with(LOGICAL).leaked(), Cluster::start_with(LOGICAL).leaked());
    let house = House::with(main, other, &["online_moves=1"], &limit).await;
    let tenant = house.create("shop").await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int PRIMARY KEY)").await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    let kept = async || {
        let metrics = house.proxy.metrics().await;
        let line = metrics.lines().find(|line| line.starts_with("tenantry_followed_wal_bytes{"))?.to_owned();
        assert!(line.contains("tenant=\"shop\",server=\"other\""), "{line}");
        line.rsplit(' ').next()?.parse::<f64>().ok()
    };
    eventually("the metric", kept).await;
    // Nobody confirms anything: the other end is stopped.
    let stopped =
        house.main.sql_in("shop", "SELECT format('ALTER SUBSCRIPTION %I DISABLE', subname) FROM pg_subscription").await;
    house.main.sql_in("shop", &stopped.expect("a subscription")).await;
    let write = async |mib: u32| {
        let sql = format!(
            "SELECT count(pg_logical_emit_message(false, 'test', repeat('x', 1 << 20))) FROM generate_series(1, {mib})"
        );
        house.other.sql(&sql).await;
    };
    write(40).await;
    let warned =
        eventually("a warning", async || house.view("shop").await["moved"]["warning"].as_str().map(str::to_owned))
            .await;
    assert!(warned.contains("admin.max_followed_wal"), "{warned}");
    assert!(kept().await.is_some_and(|bytes| bytes > 32e6));
    write(40).await;
    let ended = eventually("an end of it", async || {
        let moved = house.view("shop").await["moved"].clone();
        (moved["follows"] == false).then_some(moved)
    })
    .await;
    assert!(
        ended["ended"]["why"].as_str().is_some_and(|why| why.contains("more than admin.max_followed_wal")),
        "{ended}"
    );
    assert_eq!(house.other.sql("SELECT count(*) FROM pg_replication_slots").await.as_deref(), Some("0"));
    eventually("the old copy lets nobody in", async || {
        (house.refusal(house.main, &tenant).await.as_deref() == Some("55000")).then_some(())
    })
    .await;
    eventually("nothing is left of what followed, and the warning is gone", async || {
        let left = [house.left_over(house.main).await, house.left_over(house.other).await];
        (left.iter().all(String::is_empty) && house.view("shop").await["moved"]["warning"].is_null()).then_some(())
    })
    .await;
    let refused = house.api.post("/v1/tenants/shop/move/rollback", json!({})).await;
    assert!(
        refused.status == 409 && refused.body["detail"].to_string().contains("max_followed_wal"),
        "{}",
        refused.body
    );
    house.job("/v1/tenants/shop/move/rollback", json!({ "force": true })).await;
    assert_eq!(client.value("SELECT current_setting('port')").await, house.main.port().to_string());
}

#[tokio::test]
async fn a_login_that_following_would_need_is_tried_before_anything_is_copied() {
    let house = House::new().await;
    house.create("shop").await;
    // What it was is read before COPY empties the file.
    let reject = "DO $do$ DECLARE file text := current_setting('hba_file'); was text := pg_read_file(file); BEGIN EXECUTE format( \
                    'COPY (SELECT ''host shop \"/^tenantry-.*-send$\" 127.0.0.1/32 reject'' UNION ALL \
                     SELECT regexp_split_to_table(%L, E''\\n'')) TO %L', was, file); END $do$";
    house.other.sql(reject).await;
    house.other.sql("SELECT pg_reload_conf()").await;
    let why = house.fails("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    assert!(why.contains("could not follow") && why.contains("pg_hba.conf"), "{why}");
    let job = house.api.get("/v1/jobs?limit=1").await.body["items"][0].clone();
    let at = job["result"]["turned_at"].as_u64().and_then(|at| usize::try_from(at).ok()).unwrap_or(0);
    let plan = house.api.post("/v1/tenants/shop/move?dry_run=true", json!({ "server": "other" })).await;
    assert_eq!(plan.body["job"]["result"]["steps"][at], "try_following", "{job}");
    assert_eq!((house.left_over(house.main).await, house.left_over(house.other).await), (String::new(), String::new()));
    assert_eq!(house.databases(house.other, "shop").await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_from_postgresql_16_to_18_and_back_and_there_by_a_dump_loses_nothing() {
    let (main, other) = (Cluster::start_as("16", LOGICAL).leaked(), Cluster::start_as("18", LOGICAL).leaked());
    let house = House::of(main, other, &["online_moves=1"]).await;
    let tenant = house.create("shop").await;
    main.sql("ALTER ROLE shop VALID UNTIL '2100-01-01 00:00:00+00'").await;
    let mut first = house.proxy.connect(&tenant).login().await;
    Bank::tables(&mut first, 5_000).await;
    let bank = Bank::open(&house, &tenant, 8).await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other", "verify": "full" })).await;
    bank.more().await;
    assert_eq!(first.value("SELECT current_setting('server_version_num')::int / 10000").await, "18");
    let until = "SELECT rolvaliduntil AT TIME ZONE 'UTC' FROM pg_roles WHERE rolname = 'shop'";
    assert_eq!(other.sql(until).await.as_deref(), Some("2100-01-01 00:00:00"));
    house.job("/v1/tenants/shop/move/rollback", json!({ "verify": "full" })).await;
    bank.more().await;
    assert_eq!(first.value("SELECT current_setting('server_version_num')::int / 10000").await, "16");
    house.job("/v1/tenants/shop/move", json!({ "server": "other", "method": "dump" })).await;
    bank.more().await;
    let (told, _) = bank.close().await;
    balanced(&mut first, &told, 5_000).await;
    house.job("/v1/tenants/shop/move/confirm", json!({})).await;
    assert_eq!(house.databases(main, "shop").await, "0");
    // What reads a server of 18 says something that one of 16 does not know.
    let why = house.fails("/v1/tenants/shop/move", json!({ "server": "main", "method": "dump" })).await;
    assert!(why.contains("pg_dump is of version 16, and the server of 18"), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_of_connections_in_postgresql_has_room_for_a_move_beside_the_clients() {
    let limits = ["main", "other"].map(|server| (format!("servers.{server}.control.connection_limits"), true.into()));
    let limits: Vec<(&str, toml::Value)> =
        limits.iter().map(|(key, on)| (key.as_str(), toml::Value::clone(on))).collect();
    let (main, other) = (Cluster::start_with(LOGICAL).leaked(), Cluster::start_with(LOGICAL).leaked());
    let house = House::with(main, other, &["online_moves=1"], &limits).await;
    let tenant = house.create_as(json!({ "name": "shop", "server": "main", "spec": { "ceiling": 2 } })).await;
    let mut first = house.proxy.connect(&tenant).login().await;
    Bank::tables(&mut first, 2_000).await;
    let limit = async |server: &'static Cluster, wanted: &str| {
        eventually(format!("a limit of {wanted}"), async || {
            let found = server.sql("SELECT datconnlimit FROM pg_database WHERE datname = 'shop'").await;
            (found.as_deref() == Some(wanted)).then_some(())
        })
        .await;
    };
    limit(main, "2").await;
    let bank = Bank::open(&house, &tenant, 8).await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    bank.more().await;
    house.job("/v1/tenants/shop/move/rollback", json!({})).await;
    bank.more().await;
    limit(main, "2").await;
    house.job("/v1/tenants/shop/move", json!({ "server": "other", "method": "dump" })).await;
    let (told, _) = bank.close().await;
    balanced(&mut first, &told, 2_000).await;
    house.job("/v1/tenants/shop/move/confirm", json!({})).await;
    limit(other, "2").await;
}

#[tokio::test]
async fn a_floor_that_was_promised_to_another_meanwhile_keeps_the_tenant_where_it_is() {
    let house = House::new().await;
    let tenant = house.create_as(json!({ "name": "shop", "server": "main", "spec": { "floor": 15 } })).await;
    let mut client = house.proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int PRIMARY KEY)").await;
    client.run("BEGIN").await;
    client.run("INSERT INTO t VALUES (1)").await;
    let job = house.begin("/v1/tenants/shop/move", json!({ "server": "other" })).await;
    house.at(job, "replicate").await;
    house.create_as(json!({ "name": "rival", "server": "other", "spec": { "floor": 18 } })).await;
    client.run("COMMIT").await;
    let ended = house.end_of(job).await;
    assert!(
        ended["error"].as_str().is_some_and(|why| why.contains("the floor of 15 does not fit at other")),
        "{ended}"
    );
    assert_eq!(
        client.value("SELECT count(*) || ' ' || current_setting('port') FROM t").await,
        format!("1 {}", house.main.port())
    );
}

#[tokio::test]
async fn files_of_a_dump_that_no_job_needs_are_gone_after_a_start() {
    let house = House::new().await;
    let left = house.proxy.dir().join("moves").join("4711");
    std::fs::create_dir_all(left.join("dump")).expect("a directory");
    std::fs::write(left.join("dump").join("toc.dat"), "rows").expect("a file");
    house.proxy.restart(&[]).await;
    eventually("they are gone", async || (!left.exists()).then_some(())).await;
}
