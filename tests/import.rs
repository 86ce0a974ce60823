//! SQLite files into tenants: what is in the file is there afterwards, whatever its types; what does not fit is named, all of it,
//! and nothing is changed; a crash at any instant leaves all or nothing, once.

use std::{
    collections::BTreeSet,
    fs,
    ops::Deref,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use rusqlite::Connection;
use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Proxy, ProxyBuilder, Reply, Tenant, cluster, control::control_role, control_builder, control_proxy,
    eventually, proxy::binary, supervisor::Scratch,
};

const SQLITE: (&str, &str) = ("Content-Type", "application/vnd.sqlite3");
/// No job has so many effects; a job that never lives to see its end is a fault of the test.
const MOST_EFFECTS: u32 = 100;

/// A file in a directory of its own, which is gone with it.
struct Own {
    path: PathBuf,
    _dir: Scratch,
}

impl Own {
    fn new(name: &str) -> Self {
        let dir = Scratch::new("sqlite");
        Self { path: dir.join(name), _dir: dir }
    }
}

impl Deref for Own {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl AsRef<Path> for Own {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

/// A file made of these statements.
fn file(sql: &str) -> Own {
    let own = Own::new("db.sqlite3");
    Connection::open(&own).and_then(|file| file.execute_batch(sql)).expect(sql);
    own
}

async fn proxy_with(key: &str, value: impl Into<toml::Value>) -> (Proxy, Api) {
    control_role(cluster()).await;
    let proxy = control_builder(ProxyBuilder::new(cluster())).set(key, value).start().await;
    let api = Api::new(&proxy, "admin").await;
    (proxy, api)
}

/// A tenant with these tables, which its owner made.
async fn tenant(proxy: &Proxy, api: &Api, name: &str, tables: &[&str]) -> Tenant {
    let tenant = api.create(name).await;
    let mut client = proxy.connect(&tenant).login().await;
    for sql in tables {
        client.run(sql).await;
    }
    client.leave().await;
    tenant
}

async fn upload(api: &Api, name: &str, query: &str, path: &Path) -> Reply {
    let body = fs::read(path).expect("the file");
    let path = format!("/v1/tenants/{name}/import{query}");
    api.try_upload(&path, body, &[SQLITE]).await.expect("an answer")
}

/// The job that was begun, at its end.
async fn job_of(api: &Api, reply: &Reply) -> Value {
    let id = match &reply.body["job"] {
        Value::Number(id) => id.to_string(),
        job => job["id"].to_string(),
    };
    eventually("the job is over", async || {
        let job = api.get(&format!("/v1/jobs/{id}")).await.body;
        matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled")).then_some(job)
    })
    .await
}

async fn imported(api: &Api, name: &str, query: &str, path: &Path) -> Value {
    job_of(api, &upload(api, name, query, path).await).await
}

/// Every problem in one line: table, column, what, how often, and the rows.
fn problems(job: &Value) -> Vec<String> {
    assert_eq!(job["state"], "failed", "{job}");
    let groups = job["result"]["problems"]["groups"].as_array().unwrap_or_else(|| panic!("{job}"));
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let line = |group: &Value| {
        let rows = group["rows"].as_array().into_iter().flatten();
        let rows: Vec<_> = rows.map(|row| format!("{} {}", word(&row["row"]), word(&row["value"]))).collect();
        let place = [word(&group["table"]), word(&group["column"])].join(".");
        format!("{place}: {} x{}: {}", word(&group["problem"]), group["count"], rows.join(" | "))
    };
    groups.iter().map(line).collect()
}

fn spooled(proxy: &Proxy) -> usize {
    fs::read_dir(proxy.dir().join("imports")).map_or(0, |entries| entries.flatten().count())
}

/// What no import may leave.
async fn nothing_is_left(proxy: &Proxy) {
    eventually("no uploaded file", async || (spooled(proxy) == 0).then_some(())).await;
    let hands = cluster().sql("SELECT count(*) FROM pg_roles WHERE rolname ~ '-'").await;
    assert_eq!(hands.as_deref(), Some("0"), "hands");
}

fn command(proxy: &Proxy, api: &Api, words: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(["tenant", "import"]).args(words).args(["--url", &format!("http://{}", proxy.admin())]);
    command.env("TENANTRY_TOKEN", &api.token).output().expect("tenantry tenant import")
}

const ALL_TYPES: [&str; 4] = [
    "CREATE TYPE mood AS ENUM ('sad', 'happy')",
    "CREATE DOMAIN code AS varchar(8) CHECK (value <> '')",
    "CREATE TABLE parents (id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY, name varchar(40) NOT NULL UNIQUE)",
    "CREATE TABLE everything (id bigserial PRIMARY KEY, parent integer REFERENCES parents DEFERRABLE INITIALLY DEFERRED, \
       yes boolean, small smallint, plain integer, large bigint, single real, double double precision, money numeric(12,2), \
       exact numeric, words text, short varchar(5), fixed char(4), bytes bytea, day date, hour time, local timestamp, \
       at timestamptz, took interval, uid uuid, doc json, docb jsonb, host inet, net cidr, how mood, sku code, tags text[], \
       sums numeric(6,2)[], half integer GENERATED ALWAYS AS (plain / 2) STORED, made timestamptz NOT NULL DEFAULT now())",
];

const ROWS: &str = r#"
    CREATE TABLE parents (id integer PRIMARY KEY AUTOINCREMENT, name varchar(20) NOT NULL);
    INSERT INTO parents VALUES (1, 'one'), (7, 'tab	newline
and \ and ünïcödé 😀'), (41, 'last'); DELETE FROM parents WHERE id = 41;
    CREATE TABLE everything (id integer PRIMARY KEY, parent integer, yes bool, small, plain, large, single, double, money decimal, exact text,
      words text, short text, fixed text, bytes blob, day date, hour time, local datetime, at datetime, took bigint, uid char(32), doc text,
      docb text, host text, net text, how text, sku text, tags text, sums text, half integer);
    INSERT INTO everything VALUES (1, 7, 1, -32768, 2147483647, 9223372036854775807, 0.1, 0.1, '1234567890.12', '0.1000', 'a	b\',
      'äöüßé', 'ab', x'00ff5c', '2024-02-29', '23:59:59.5', '2026-11-27 08:09:10', '2026-11-27 08:09:10.123456', 90061000001,
      'a0eebc999c0b4ef8bb6d6bb9bd380a11', '{"b": 1, "a": [1.50]}', '{"bb": "\u00e4\n", "a": 1e2, "b": null, "a": 0.10}',
      '192.0.2.7', '10.0.0.0/8', 'happy', 'x', '["a", "", "b c", "NULL", null, "q\"\\"]', '[1.5, 2]', 99);
    INSERT INTO everything VALUES (2, NULL, 0, 0, 0, -9223372036854775808, 1e30, 5e-324, 19.99, '-12345678901234567890.5', '', '',
      '', x'', '0001-01-01', '00:00', '0001-01-01', '9999-12-31 23:59:59.999999', -1, 'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11', 'null',
      '[]', '::1', '2001:db8::/32', 'sad', 'yz', '[]', '[]', NULL);
    INSERT INTO everything (id, double, single, money, at) VALUES (30, -0.0, 9e999, 0.30000000000000004, '2026-11-27T08:09:10+05:30');
    INSERT INTO everything (id) WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 5099) SELECT i FROM n;
"#;

#[tokio::test]
async fn every_type_arrives_as_it_was_and_sequences_go_on() {
    let (proxy, api) = control_proxy().await;
    let tenant = tenant(&proxy, &api, "types", &ALL_TYPES).await;
    let path = file(ROWS);
    let job = imported(&api, "types", "", &path).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!(
        (&job["result"]["rows"], &job["result"]["foreign_keys"], &job["result"]["sequences"]),
        (&json!(5_005), &json!(1), &json!(2))
    );
    assert_eq!(job["result"]["tables"]["public.everything"]["rows"], 5_003);
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SET timezone = 'UTC'").await;
    client.run("SET intervalstyle = 'postgres'").await;
    for (column, one, two) in [
        ("parent", "7", ""),
        ("yes", "t", "f"),
        ("small", "-32768", "0"),
        ("plain", "2147483647", "0"),
        ("large", "9223372036854775807", "-9223372036854775808"),
        ("single", "0.1", "1e+30"),
        ("double", "0.1", "5e-324"),
        ("money", "1234567890.12", "19.99"),
        ("exact", "0.1000", "-12345678901234567890.5"),
        ("words", "a\tb\\", ""),
        ("short", "äöüßé", ""),
        ("fixed", "ab  ", "    "),
        ("bytes", "\\x00ff5c", "\\x"),
        ("day", "2024-02-29", "0001-01-01"),
        ("hour", "23:59:59.5", "00:00:00"),
        ("local", "2026-11-27 08:09:10", "0001-01-01 00:00:00"),
        ("at", "2026-11-27 08:09:10.123456+00", "9999-12-31 23:59:59.999999+00"),
        ("took", "1 day 01:01:01.000001", "-1 days +23:59:59.999999"),
        ("uid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("doc", "{\"b\": 1, \"a\": [1.50]}", "null"),
        ("docb", "{\"a\": 0.10, \"b\": null, \"bb\": \"ä\\n\"}", "[]"),
        ("host", "192.0.2.7", "::1"),
        ("net", "10.0.0.0/8", "2001:db8::/32"),
        ("how", "happy", "sad"),
        ("sku", "x", "yz"),
        ("tags", "{a,\"\",\"b c\",\"NULL\",NULL,\"q\\\"\\\\\"}", "{}"),
        ("sums", "{1.50,2.00}", "{}"),
        ("half", "1073741823", "0"),
    ] {
        let printed = |id| format!("SELECT format('%s', {column}) FROM everything WHERE id = {id}");
        assert_eq!(client.value(&printed(1)).await, one, "{column}");
        assert_eq!(client.value(&printed(2)).await, two, "{column}");
    }
    assert_eq!(
        client.value("SELECT double::text || single || money || at FROM everything WHERE id = 30").await,
        "-0Infinity0.302026-11-27 02:39:10+00"
    );
    assert_eq!(client.value("SELECT count(*) || ' ' || count(words) FROM everything").await, "5003 2");
    assert_eq!(client.value("SELECT name FROM parents WHERE id = 7").await, "tab\tnewline\nand \\ and ünïcödé 😀");
    // Behind the largest that is there, and behind the largest that ever was.
    assert_eq!(client.value("INSERT INTO everything DEFAULT VALUES RETURNING id").await, "5100");
    assert_eq!(client.value("INSERT INTO parents (name) VALUES ('new') RETURNING id").await, "42");
    assert_eq!(
        client
            .value("SELECT (last_analyze IS NOT NULL)::text FROM pg_stat_user_tables WHERE relname = 'everything'")
            .await,
        "true"
    );
    nothing_is_left(&proxy).await;
    let told = api.send("GET", &format!("/v1/jobs/{}/events", job["id"]), None, &[]).await.body.to_string();
    assert!(told.contains("fill done") && told.contains("analyze done"), "{told}");
}

const ORDERS: [&str; 3] = [
    "CREATE TABLE customers (id serial PRIMARY KEY, email varchar(20) NOT NULL UNIQUE, born date)",
    "CREATE TABLE orders (id serial PRIMARY KEY, customer integer NOT NULL REFERENCES customers DEFERRABLE INITIALLY DEFERRED, \
       total numeric(6,2) NOT NULL CHECK (total >= 0), is_paid boolean, doc jsonb, count smallint, open boolean NOT NULL DEFAULT true)",
    "CREATE UNIQUE INDEX one_open ON orders (customer) WHERE open",
];

/// Everything that can be wrong with it.
const DIRTY: &str = r#"
    CREATE TABLE customers (id integer PRIMARY KEY, email, born, shoe_size integer, unused);
    INSERT INTO customers VALUES (1, 'a@example.org', '2000-01-01', 43, NULL), (2, 'b@example.org', 'yesterday', NULL, NULL),
      (3, 'a@example.org', NULL, NULL, NULL), (4, NULL, NULL, NULL, NULL), (5, 'way.too.long@example.org', NULL, NULL, NULL),
      (6, CAST(x'636166e9' AS text), 20000101, NULL, NULL), (7, 'nul' || char(0), NULL, NULL, NULL);
    CREATE TABLE orders (id integer PRIMARY KEY, customer, total, is_paid, doc, count, open);
    INSERT INTO orders VALUES (1, 1, '12.50', 1, '{}', 1, 1), (2, 99, 1, 1, '{}', 1, 0), (3, 1, '12345.6', 'maybe', '{', 40000, 0),
      (4, 1, -5, 1, '"\u0000"', 1, 0), (5, 1, -1, 0, NULL, NULL, 0), (6, 1, 2, 0, NULL, NULL, 1), (7, 1, -2, 0, NULL, NULL, 0);
    CREATE TABLE extras (id integer PRIMARY KEY, x); INSERT INTO extras VALUES (1, 1);
    CREATE TABLE empty_extras (id integer PRIMARY KEY, x);
"#;

const NAMED: [&str; 16] = [
    "customers.born: is a number where a date or a time is wanted: store it as text, YYYY-MM-DD HH:MM:SS in UTC x1: id=6 20000101",
    "customers.born: is no date (YYYY-MM-DD) x1: id=2 \"yesterday\"",
    "customers.email: has a NUL character, which PostgreSQL's text cannot hold x1: id=7 \"nul\\0\"",
    "customers.email: is NULL, and the column is NOT NULL x1: id=4 NULL",
    "customers.email: is longer than 20 characters x1: id=5 \"way.too.long@example.org\"",
    "customers.email: is not unique, and must be x2: id=1 \"a@example.org\" | id=3 \"a@example.org\"",
    "customers.email: is not valid UTF-8 x1: id=6 \"caf\u{fffd}\"",
    "customers.shoe_size: has no column of that name to go to x1: ",
    "extras.: has no table of that name to go to x1: ",
    "orders.count: is out of range of smallint x1: id=3 40000",
    "orders.customer: leads nowhere: no row of customers has it x1: id=2 99",
    "orders.doc: has a NUL (\\u0000), which jsonb cannot hold x1: id=4 \"\"\\u0000\"\"",
    "orders.doc: is not JSON x1: id=3 \"{\"",
    "orders.is_paid: is no boolean (0, 1, true or false) x1: id=3 \"maybe\"",
    "orders.total: does not fit numeric(6,2) x1: id=3 \"12345.6\"",
    "customers.: duplicate key value violates unique constraint \"customers_email_key\" x1: id=3 Key (email)=(a@example.org) already exists.",
];

/// The whole of a tenant, as a dump would have it: rows of all tables, sequences.
async fn whole(name: &str) -> String {
    let sql = "SELECT (SELECT string_agg(t::text, ',') FROM customers t) || (SELECT count(*) FROM orders) || \
               (SELECT string_agg(sequencename || coalesce(last_value, -1), ',' ORDER BY sequencename) FROM pg_sequences)";
    cluster().sql_in(name, &format!("SELECT coalesce(({sql}), (SELECT 'empty' || string_agg(sequencename || coalesce(last_value, -1), ',' ORDER BY sequencename) FROM pg_sequences))")).await.expect("a text")
}

#[tokio::test]
async fn a_file_with_dirty_rows_is_refused_and_every_problem_is_named_and_nothing_is_changed() {
    let (proxy, api) = control_proxy().await;
    tenant(&proxy, &api, "dirty", &ORDERS).await;
    let (path, before) = (file(DIRTY), whole("dirty").await);
    for query in ["", "?dry_run=true"] {
        let job = imported(&api, "dirty", query, &path).await;
        let told = problems(&job);
        for named in NAMED {
            assert!(told.iter().any(|line| line == named), "no {named:?} in {told:#?}");
        }
        // What only PostgreSQL's own rules know: a CHECK, and an index over some of the rows.
        for (what, rows) in
            [("check constraint \"orders_total_check\"", "id=5 "), ("unique constraint \"one_open\"", "id=6 ")]
        {
            assert!(told.iter().any(|line| line.contains(what) && line.contains(rows)), "no {what} in {told:#?}");
        }
        assert!(
            told.iter().any(|line| line.contains("orders_total_check") && line.contains("x2")),
            "both of them: {told:#?}"
        );
        assert_eq!(told.len(), NAMED.len() + 2, "{told:#?}");
        assert!(!told.iter().any(|line| line.contains("Failing row")), "no whole rows: {told:#?}");
        let error = job["error"].as_str().expect("an error");
        assert!(error.contains("problems in 3 tables; nothing was changed"), "{error}");
        assert_eq!(whole("dirty").await, before);
        // A list of jobs is no list of rows.
        let listed = api.get("/v1/jobs?limit=1").await.body["items"][0]["result"]["problems"].clone();
        assert!(listed["count"].as_u64() > Some(15) && listed["groups"].is_null(), "{listed}");
    }
    assert!(!proxy.log().contains("example.org"), "values of rows are in no log");
    nothing_is_left(&proxy).await;
}

#[tokio::test]
async fn a_dry_run_tells_what_an_import_would_and_leaves_everything_as_it_was() {
    let (proxy, api) = control_proxy().await;
    let tenant = tenant(&proxy, &api, "dry", &ORDERS).await;
    let before = whole("dry").await;
    let path = file(
        "CREATE TABLE customers (id integer PRIMARY KEY, email, born); INSERT INTO customers VALUES (3, 'a@example.org', '2000-01-01'); \
         CREATE TABLE orders (id integer PRIMARY KEY, customer, total decimal); INSERT INTO orders VALUES (5, 3, 1.005)",
    );
    let job = imported(&api, "dry", "?dry_run=true", &path).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!(
        (&job["result"]["rows"], &job["result"]["rounded"]),
        (&json!(2), &json!({ "orders.total": 1 })),
        "{job}"
    );
    let lost = json!([{ "column": "orders.total", "row": "id=5", "value": "1.005", "held": "1.00" }]);
    assert_eq!(job["result"]["rounded_rows"], lost);
    let listed = api.get("/v1/jobs?limit=1").await.body["items"][0]["result"].clone();
    assert!(listed["rounded"].is_object() && listed["rounded_rows"].is_null(), "{listed}");
    // Beside problems, in rows with a problem, and in a row that PostgreSQL refuses, too.
    let dirty = self::file(
        "CREATE TABLE customers (id integer PRIMARY KEY, email, born); INSERT INTO customers VALUES (3, 'a@example.org', 'yesterday'); \
         CREATE TABLE orders (id integer PRIMARY KEY, customer, total decimal, is_paid); \
         INSERT INTO orders VALUES (5, 3, 1.005, 1), (6, 3, 2.345, 'maybe'), (7, 3, -3.001, 1), (8, 3, 4.5, 1)",
    );
    let job = imported(&api, "dry", "?dry_run=true", &dirty).await;
    assert!(problems(&job).len() >= 3, "{job}");
    assert_eq!(job["result"]["rounded"], json!({ "orders.total": 3 }), "{job}");
    let done = command(&proxy, &api, &["dry", &dirty.display().to_string(), "--dry-run"]);
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(told.contains("orders.total: 3 numbers") && told.contains("  id=6  2.345 becomes 2.34\n"), "{told}");
    assert_eq!(whole("dry").await, before);
    let job = imported(&api, "dry", "", &path).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    let mut client = proxy.connect(&tenant).login().await;
    assert_eq!(client.value("SELECT total::text FROM orders").await, "1.00", "as Django reads it");
    // Not a second time.
    let told = problems(&imported(&api, "dry", "", &path).await);
    assert!(told.iter().all(|line| line.contains("has rows in the tenant already")) && told.len() == 2, "{told:?}");
    let job = imported(&api, "dry", "?replace=orders,customers", &path).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!(client.value("SELECT count(*) FROM orders").await, "1");
    assert_eq!(client.value("INSERT INTO customers (email) VALUES ('x') RETURNING id").await, "4");
    nothing_is_left(&proxy).await;
}

#[tokio::test]
async fn files_that_are_too_large_or_no_sqlite_files_or_damaged_are_refused_and_leave_nothing() {
    let (proxy, api) = proxy_with("admin.max_import_size", "64KiB").await;
    tenant(&proxy, &api, "small", &ORDERS).await;
    let large = file(
        "CREATE TABLE customers (id integer PRIMARY KEY, email); INSERT INTO customers VALUES (1, zeroblob(200000))",
    );
    let refused = upload(&api, "small", "", &large).await;
    assert_eq!(
        (refused.status, refused.body["type"].as_str()),
        (413, Some("urn:tenantry:problem:too-large")),
        "{}",
        refused.body
    );
    assert!(
        refused.body["detail"].as_str().is_some_and(|text| text.contains("admin.max_import_size")),
        "{}",
        refused.body
    );
    let path = Own::new("other");
    for body in [&b""[..], b"SQLite", b"PK\x03\x04 something else that is longer", b"SQLite format 2\0........"] {
        fs::write(&path, body).expect("a file");
        let refused = upload(&api, "small", "", &path).await;
        assert_eq!(
            (refused.status, refused.body["type"].as_str()),
            (422, Some("urn:tenantry:problem:invalid")),
            "{}",
            refused.body
        );
    }
    let refused =
        api.try_upload("/v1/tenants/small/import", vec![1; 10], &[("Content-Type", "application/json")]).await;
    assert_eq!(refused.expect("an answer").status, 415);
    // A good beginning, and then the pages of a table that are none.
    let damaged = file(
        "CREATE TABLE customers (id integer PRIMARY KEY, email); INSERT INTO customers VALUES (1, zeroblob(20000))",
    );
    let mut bytes = fs::read(&damaged).expect("a file");
    bytes.iter_mut().skip(4096).take(4096).for_each(|byte| *byte = 0xaa);
    fs::write(&damaged, bytes).expect("a file");
    let job = imported(&api, "small", "", &damaged).await;
    assert_eq!(job["state"], "failed", "{job}");
    assert!(job["error"].as_str().is_some_and(|why| why.contains("damaged") || why.contains("malformed")), "{job}");
    let viewer = Api::new(&proxy, "viewer").await;
    assert_eq!(upload(&viewer, "small", "", &path).await.status, 403);
    nothing_is_left(&proxy).await;
}

#[tokio::test]
async fn the_command_takes_what_is_in_the_write_ahead_log_of_a_file_in_use() {
    let (proxy, api) = control_proxy().await;
    let tenant = tenant(&proxy, &api, "wal", &ORDERS).await;
    let path = Own::new("it's 100% used?.sqlite3");
    let file = Connection::open(&path).expect("a file");
    file.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(())).expect("a log");
    file.execute_batch(
        "CREATE TABLE customers (id integer PRIMARY KEY, email, born); INSERT INTO customers VALUES (1, 'in@the.log', NULL); \
         BEGIN; INSERT INTO customers VALUES (2, 'not@committed', NULL)",
    )
    .expect("rows");
    assert!(fs::metadata(path.with_extension("sqlite3-wal")).expect("a log").len() > 0);
    let shown = path.display().to_string();
    let done = command(&proxy, &api, &["wal", &shown, "--dry-run"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let done = command(&proxy, &api, &["wal", &shown]);
    let told = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        done.status.success() && told.contains("1 rows in 1 tables"),
        "{told}{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let mut client = proxy.connect(&tenant).login().await;
    assert_eq!(client.value("SELECT string_agg(email, ',') FROM customers").await, "in@the.log");
    drop(file);
    // And one whose log came to rest, but whose header still asks for one.
    let bytes = fs::read(&path).expect("the file");
    assert_eq!(bytes[18..20], [2, 2], "still in WAL mode");
    let job = imported(&api, "wal", "?replace=customers", &path).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    let dirty = self::file(DIRTY);
    let done = command(&proxy, &api, &["wal", &dirty.display().to_string(), "--replace", "customers"]);
    assert_eq!(done.status.code(), Some(65));
    let told = String::from_utf8_lossy(&done.stdout);
    assert!(told.contains("customers.born: is no date (YYYY-MM-DD): 1 row\n  id=2  \"yesterday\"\n"), "{told}");
    let done = command(&proxy, &api, &["nobody", &shown]);
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(65) && told.contains("no tenant of that name"), "{told}");
    let done = command(&proxy, &api, &["wal", "/etc/passwd"]);
    assert_eq!(done.status.code(), Some(64), "{}", String::from_utf8_lossy(&done.stderr));
}

#[tokio::test]
async fn clients_see_nothing_until_it_is_committed_and_nobody_writes_in_between() {
    let (proxy, api) = control_proxy().await;
    let tenant = tenant(&proxy, &api, "open", &ORDERS).await;
    let path = file(
        "CREATE TABLE customers (id integer PRIMARY KEY, email, born); INSERT INTO customers VALUES (1, 'a', NULL)",
    );
    // Somebody is at work in the table, and does not come to an end.
    let mut writer = proxy.connect(&tenant).login().await;
    writer.run("BEGIN").await;
    writer.run("INSERT INTO customers (email) VALUES ('mine')").await;
    let job = imported(&api, "open", "", &path).await;
    assert!(job["error"].as_str().is_some_and(|why| why.contains("somebody is at work in customers")), "{job}");
    writer.run("ROLLBACK").await;
    // A slow import: a trigger of the tenant's waits for a lock that we hold.
    writer.run("CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END $f$").await;
    writer
        .run("CREATE TRIGGER slow BEFORE INSERT ON customers FOR EACH ROW WHEN (NEW.id = 1) EXECUTE FUNCTION slow()")
        .await;
    writer.run("SELECT pg_advisory_lock(7)").await;
    let begun = api
        .try_upload("/v1/tenants/open/import", fs::read(&path).expect("a file"), &[SQLITE, ("Prefer", "respond-async")])
        .await;
    let begun = begun.expect("an answer");
    assert_eq!(begun.status, 202, "{}", begun.body);
    let waits = "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    eventually("the import waits", async || {
        (cluster().sql_in("open", waits).await.as_deref() == Some("1")).then_some(())
    })
    .await;
    let mut reader = proxy.connect(&tenant).login().await;
    assert_eq!(reader.value("SELECT count(*) FROM customers").await, "0");
    reader.run("SET lock_timeout = '50ms'").await;
    let refused = reader.query("INSERT INTO customers (email) VALUES ('x')").await;
    refused.error("55P03");
    writer.run("SELECT pg_advisory_unlock(7)").await;
    assert_eq!(job_of(&api, &begun).await["state"], "succeeded");
    assert_eq!(reader.value("SELECT count(*) FROM customers").await, "1");
    // A trigger that changes a row is found out.
    reader.run("CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN NEW.email := 'b'; RETURN NEW; END $f$").await;
    let job = imported(&api, "open", "?replace=customers", &path).await;
    let why = job["error"].as_str().unwrap_or_default();
    assert_eq!(
        why, "customers differs from the file in email; it has triggers, which may change rows; nothing was changed",
        "{job}"
    );
    assert_eq!(reader.value("SELECT string_agg(email, ',') FROM customers").await, "a");
    nothing_is_left(&proxy).await;
}

#[tokio::test]
async fn tables_that_refer_to_each_other_in_a_circle_are_filled_and_their_keys_are_as_before() {
    let (proxy, api) = control_proxy().await;
    let tables = [
        "CREATE TABLE a (id int PRIMARY KEY, b int NOT NULL, up int REFERENCES a)",
        "CREATE TABLE b (id int PRIMARY KEY, a int NOT NULL REFERENCES a)",
        "ALTER TABLE a ADD CONSTRAINT a_b FOREIGN KEY (b) REFERENCES b",
    ];
    tenant(&proxy, &api, "circle", &tables).await;
    let keys =
        "SELECT string_agg(pg_get_constraintdef(oid), ';' ORDER BY conname) FROM pg_constraint WHERE contype = 'f'";
    let before = cluster().sql_in("circle", keys).await;
    let path = file(
        "CREATE TABLE a (id, b, up); CREATE TABLE b (id, a); INSERT INTO a VALUES (1, 1, 2), (2, 1, NULL); INSERT INTO b VALUES (1, 2)",
    );
    let job = imported(&api, "circle", "", &path).await;
    assert_eq!((&job["state"], &job["result"]["foreign_keys"]), (&json!("succeeded"), &json!(3)), "{job}");
    assert_eq!(cluster().sql_in("circle", keys).await, before);
    // The same with a reference that leads nowhere: PostgreSQL finds it, and it is named as the file has it.
    let path = file(
        "CREATE TABLE a (id, b, up); CREATE TABLE b (id, a); INSERT INTO a VALUES (1, 9, NULL); INSERT INTO b VALUES (1, 1)",
    );
    let told = problems(&imported(&api, "circle", "?replace=a,b", &path).await);
    assert!(
        told.iter().any(|line| line.starts_with("a.b: leads nowhere: no row of b has it x1: rowid=1 9")),
        "{told:?}"
    );
}

#[tokio::test]
async fn a_file_that_is_not_read_in_time_is_given_up() {
    let (proxy, api) = proxy_with("admin.import_timeout", "1ms").await;
    tenant(&proxy, &api, "late", &["CREATE TABLE t (n int)"]).await;
    let path = file("CREATE TABLE t (n integer); INSERT INTO t VALUES (1)");
    let job = imported(&api, "late", "", &path).await;
    let why = job["error"].as_str().unwrap_or_default();
    assert_eq!(
        (&job["state"], why),
        (&json!("failed"), "the file is not read to its end after 1ms (admin.import_timeout)"),
        "{job}"
    );
    nothing_is_left(&proxy).await;
}

#[tokio::test]
async fn an_import_that_costs_its_session_is_tried_a_few_times_and_then_told_as_failed() {
    let (proxy, api) = control_proxy().await;
    tenant(&proxy, &api, "shop", &["CREATE TABLE t (n int)"]).await;
    // As if PostgreSQL had gone down in its middle.
    let deadly = "CREATE FUNCTION deadly() RETURNS boolean LANGUAGE sql SECURITY DEFINER AS 'SELECT pg_terminate_backend(pg_backend_pid())'";
    cluster().sql_in("shop", deadly).await;
    cluster().sql_in("shop", "ALTER TABLE t ADD CHECK (deadly())").await;
    let path = file("CREATE TABLE t (n integer); INSERT INTO t VALUES (1)");
    let job = imported(&api, "shop", "", &path).await;
    assert!(job["state"] == "failed" && job["error"].as_str().unwrap_or_default().contains("5 times"), "{job}");
    nothing_is_left(&proxy).await;
}

/// Every effect of a job, one after the other, is its last.
#[tokio::test]
async fn import_survives_kill_9_at_every_effect_and_nothing_is_there_twice() {
    let (proxy, api) = control_proxy().await;
    tenant(&proxy, &api, "mortal", &ORDERS).await;
    let path = file(
        "CREATE TABLE customers (id integer PRIMARY KEY, email, born); \
         INSERT INTO customers (id, email) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500) SELECT i, i || '@x' FROM n; \
         CREATE TABLE orders (id integer PRIMARY KEY, customer, total); INSERT INTO orders VALUES (1, 7, 1)",
    );
    let body = fs::read(&path).expect("the file");
    for n in 1..MOST_EFFECTS {
        proxy.restart(&["--die-at", &n.to_string(), "--die-in", "import"]).await;
        cluster().sql_in("mortal", "TRUNCATE customers, orders").await;
        let reply = eventually("it answers again", async || {
            api.try_send("GET", "/v1/jobs?limit=1", None, &[]).await.filter(|reply| reply.status == 200)?;
            Some(api.try_upload("/v1/tenants/mortal/import", body.clone(), &[SQLITE]).await)
        })
        .await;
        let lived = reply.is_some_and(|reply| reply.status == 200) && proxy.runs();
        if !lived {
            proxy.restart(&[]).await;
        }
        let job = eventually("the job is over", async || {
            let jobs = api.try_send("GET", "/v1/jobs?limit=1", None, &[]).await?;
            let job = jobs.body["items"].get(0)?.clone();
            matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled")).then_some(job)
        })
        .await;
        assert_eq!(job["state"], "succeeded", "at effect {n}: {job}");
        let rows = cluster()
            .sql_in(
                "mortal",
                "SELECT count(*) || ' ' || sum(id) || ' ' || (SELECT count(*) FROM orders) FROM customers",
            )
            .await;
        assert_eq!(rows.as_deref(), Some("500 125250 1"), "at effect {n}");
        nothing_is_left(&proxy).await;
        if lived {
            assert!(n > 12, "only {n} effects: what was killed?");
            return;
        }
    }
    panic!("it never lived to see its end");
}

#[tokio::test]
async fn an_import_that_is_cancelled_after_kill_9_at_any_effect_is_done_or_undone_and_says_which() {
    let (proxy, api) = control_proxy().await;
    tenant(&proxy, &api, "undone", &ORDERS).await;
    let path =
        file("CREATE TABLE customers (id integer PRIMARY KEY, email); INSERT INTO customers VALUES (1, 'a'), (2, 'b')");
    let body = fs::read(&path).expect("the file");
    let mut ends = BTreeSet::new();
    for n in 1..MOST_EFFECTS {
        proxy.restart(&["--die-at", &n.to_string(), "--die-in", "import"]).await;
        cluster().sql_in("undone", "TRUNCATE customers, orders").await;
        let reply = eventually("it answers again", async || {
            api.try_send("GET", "/v1/jobs?limit=1", None, &[]).await.filter(|reply| reply.status == 200)?;
            Some(api.try_upload("/v1/tenants/undone/import", body.clone(), &[SQLITE]).await)
        })
        .await;
        let lived = reply.is_some_and(|reply| reply.status == 200) && proxy.runs();
        cluster()
            .sql_in("tenantry_control", "UPDATE tenantry.jobs SET cancel = true WHERE state IN ('queued', 'running')")
            .await;
        if !lived {
            proxy.restart(&[]).await;
        }
        let job = eventually("the job is over", async || {
            let jobs = api.try_send("GET", "/v1/jobs?limit=1", None, &[]).await?;
            let job = jobs.body["items"].get(0)?.clone();
            matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled")).then_some(job)
        })
        .await;
        let rows = cluster().sql_in("undone", "SELECT count(*)::text FROM customers").await;
        let wanted = if job["state"] == "succeeded" { "2" } else { "0" };
        assert_eq!(rows.as_deref(), Some(wanted), "at effect {n}: {job}");
        nothing_is_left(&proxy).await;
        ends.insert(job["state"].as_str().unwrap_or_default().to_owned());
        if lived {
            assert_eq!(ends.into_iter().collect::<Vec<_>>(), ["cancelled", "succeeded"]);
            return;
        }
    }
    panic!("it never lived to see its end");
}

#[tokio::test]
async fn an_upload_that_a_crash_cut_short_is_swept_by_the_next_start() {
    let (proxy, api) = control_proxy().await;
    tenant(&proxy, &api, "swept", &ORDERS).await;
    let dir = proxy.dir().join("imports");
    fs::create_dir_all(&dir).expect("a directory");
    fs::write(dir.join("0123456789ab0123456789ab.sqlite3"), "SQLite format 3\0 half of it").expect("a file");
    proxy.restart(&[]).await;
    eventually("swept", async || (spooled(&proxy) == 0).then_some(())).await;
}

#[tokio::test]
async fn the_same_request_with_the_same_key_is_one_import() {
    let (proxy, api) = control_proxy().await;
    tenant(&proxy, &api, "once", &ORDERS).await;
    let path = file("CREATE TABLE customers (id integer PRIMARY KEY, email); INSERT INTO customers VALUES (1, 'a')");
    let body = fs::read(&path).expect("a file");
    let headers = [SQLITE, ("Idempotency-Key", "k")];
    let first = api.try_upload("/v1/tenants/once/import", body.clone(), &headers).await.expect("an answer");
    let second = api.try_upload("/v1/tenants/once/import", body.clone(), &headers).await.expect("an answer");
    assert_eq!((first.status, second.status), (200, 200), "{} {}", first.body, second.body);
    assert_eq!(first.body["job"]["id"], second.body["job"]["id"]);
    let other = file("CREATE TABLE customers (id integer PRIMARY KEY, email); INSERT INTO customers VALUES (1, 'b')");
    let other = fs::read(&other).expect("a file");
    let third = api.try_upload("/v1/tenants/once/import", other, &headers).await.expect("an answer");
    assert_eq!(third.status, 422, "{}", third.body);
    nothing_is_left(&proxy).await;
}
