//! Archives: what is kept is what was there, what cannot be kept is refused, and nothing a tenant wrote runs as anybody else.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Proxy, ProxyBuilder, Reply, Tenant, cluster,
    control::{control_role, tenant_of},
    control_builder, control_proxy, eventually,
    postgres::bin_dir,
    supervisor::Scratch,
};

/// What is in a table, whatever the order of its rows.
const SUM: &str = "SELECT count(*) || ':' || coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) FROM t";
/// What a job may have left behind in PostgreSQL.
const LEFT: &str = "SELECT coalesce(string_agg(name, ' '), '') FROM (SELECT datname AS name FROM pg_database \
     UNION ALL SELECT rolname FROM pg_roles) AS it WHERE name ~ '-'";

/// A proxy with a control plane and further settings.
async fn proxy_with(settings: &[(&str, toml::Value)]) -> (Proxy, Api) {
    control_role(cluster()).await;
    let builder = settings
        .iter()
        .fold(control_builder(ProxyBuilder::new(cluster())), |builder, (key, value)| builder.set(key, value.clone()));
    let proxy = builder.start().await;
    let api = Api::new(&proxy, "admin").await;
    (proxy, api)
}

async fn archive(api: &Api, name: &str) -> Reply {
    api.post(&format!("/v1/tenants/{name}/archive"), json!({ "deadline_ms": 1_000 })).await
}

/// The reason of a job that turned back.
fn why(reply: &Reply) -> String {
    assert_eq!(
        (reply.status, reply.body["type"].as_str()),
        (409, Some("urn:tenantry:problem:job-failed")),
        "{}",
        reply.body
    );
    reply.body["detail"].as_str().unwrap_or_default().to_owned()
}

/// Begins something and follows its job to the end: what it told on the way, and how it ended.
async fn follow(api: &Api, method: &str, path: &str, body: Value) -> (BTreeSet<String>, Value, Value) {
    let begun = api.send(method, path, Some(&body), &[("Prefer", "respond-async"), ("If-Match", "*")]).await;
    assert!(matches!(begun.status, 200..=202), "{}", begun.body);
    let place = format!("/v1/jobs/{}", begun.body["job"]["id"]);
    let mut told = BTreeSet::new();
    loop {
        // A job as long as this one tells something, or goes a step on.
        let before = told.len();
        let end = eventually("the job goes on", async || {
            let job = api.get(&place).await.body;
            let word = format!("{} {}", job["step"], job["progress"].as_str().unwrap_or_default());
            let is_over = matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled"));
            (is_over || !told.contains(&word)).then_some((word, is_over.then_some(job)))
        })
        .await;
        told.insert(end.0);
        if let Some(job) = end.1 {
            return (told, job, begun.body);
        }
        assert!(told.len() > before);
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// It serves, and of the attempt nothing is left.
async fn is_as_before(proxy: &Proxy, api: &Api, tenant: &Tenant, store: &Path, sum: &str) {
    assert_eq!(api.get(&format!("/v1/tenants/{}", tenant.name)).await.body["state"], "active");
    let mut client = proxy.connect(tenant).login().await;
    assert_eq!(client.value(SUM).await, sum);
    client.leave().await;
    assert_eq!(cluster().sql(LEFT).await.as_deref(), Some(""));
    eventually("an empty store", async || files(store).is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_million_rows_come_back_with_the_same_count_and_checksum_and_progress_is_told() {
    let (proxy, api) = control_proxy().await;
    api.create("big").await;
    let fill = "SET ROLE big; CREATE TABLE t (n bigserial PRIMARY KEY, x text, at timestamptz); \
                INSERT INTO t (x, at) SELECT md5(g::text), now() - g * interval '1 s' FROM generate_series(1, 1000000) g; \
                CREATE INDEX ON t (at)";
    cluster().sql_in("big", fill).await;
    let before = cluster().sql_in("big", SUM).await.expect("a sum");
    assert!(before.starts_with("1000000:"), "{before}");
    let (told, job, _) = follow(&api, "POST", "/v1/tenants/big/archive", json!({})).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    for word in ["dump: ", "verify: ", "restore: ", "compare: "] {
        assert!(told.iter().any(|line| line.contains(word)), "no {word:?} in {told:?}");
    }
    assert_eq!(job["result"]["tables"]["public.t"]["rows"], 1_000_000, "{job}");
    let number = job["result"]["archive"].clone();
    let (_, job, _) = follow(&api, "DELETE", "/v1/tenants/big", json!({ "confirm": "big" })).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!(cluster().sql("SELECT count(*) FROM pg_database WHERE datname ~ 'big|-'").await.as_deref(), Some("0"));
    let (_, job, begun) = follow(&api, "POST", "/v1/tenants", json!({ "name": "big", "archive": number })).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!(cluster().sql_in("big", SUM).await.expect("a sum"), before);
    let mut client = proxy.connect(&tenant_of(&begun)).login().await;
    assert_eq!(client.value("INSERT INTO t DEFAULT VALUES RETURNING n").await, "1000001");
    assert_eq!(cluster().sql(LEFT).await.as_deref(), Some(""));
}

#[tokio::test]
async fn what_a_tenant_wrote_never_runs_as_the_control_role() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("evil").await;
    let mut client = proxy.connect(&tenant).login().await;
    // Each tries to become whoever logged in, and to use the rights of that one; and must not fail otherwise.
    let body = "BEGIN \
                  BEGIN PERFORM set_config('role', 'none', false); EXECUTE 'CREATE ROLE owned'; \
                  EXCEPTION WHEN OTHERS THEN NULL; END; \
                  BEGIN EXECUTE 'CREATE ROLE owned'; EXCEPTION WHEN OTHERS THEN NULL; END;";
    for sql in [
        format!("CREATE FUNCTION checks(n int) RETURNS boolean LANGUAGE plpgsql AS $f$ {body} RETURN true; END $f$"),
        format!("CREATE FUNCTION words(n int) RETURNS text LANGUAGE plpgsql AS $f$ {body} RETURN 'x'; END $f$"),
        "CREATE TABLE t (n int CHECK (checks(n)), t int)".to_owned(),
        "INSERT INTO t SELECT g, g % 3 FROM generate_series(1, 10) g".to_owned(),
        format!("CREATE FUNCTION as_text(one t) RETURNS text LANGUAGE plpgsql AS $f$ {body} RETURN 'same'; END $f$"),
        "CREATE CAST (t AS text) WITH FUNCTION as_text(t) AS IMPLICIT".to_owned(),
        format!("CREATE FUNCTION as_json(one t) RETURNS json LANGUAGE plpgsql AS $f$ {body} RETURN '1'; END $f$"),
        "CREATE CAST (t AS json) WITH FUNCTION as_json(t) AS IMPLICIT".to_owned(),
        "CREATE MATERIALIZED VIEW filled AS SELECT words(n) FROM t".to_owned(),
        "ALTER DATABASE evil SET search_path = public, pg_catalog".to_owned(),
    ] {
        client.run(&sql).await;
    }
    client.leave().await;
    let archived = archive(&api, "evil").await;
    assert_eq!(archived.body["tenant"]["state"], "archived", "{}", archived.body);
    assert_eq!(archived.body["job"]["result"]["tables"]["public.t"]["rows"], 10);
    let back = api.post("/v1/tenants/evil/restore", json!({})).await;
    assert_eq!(back.body["tenant"]["state"], "active", "{}", back.body);
    assert_eq!(cluster().sql("SELECT count(*) FROM pg_roles WHERE rolname = 'owned'").await.as_deref(), Some("0"));
    assert_eq!(cluster().sql(LEFT).await.as_deref(), Some(""));
    let owners = "SELECT string_agg(DISTINCT pg_get_userbyid(relowner)::text, ' ') FROM pg_class WHERE oid >= 16384";
    assert_eq!(cluster().sql_in("evil", owners).await.as_deref(), Some("evil"));
}

/// A directory of client programs that do what the file `mode` says to do, and the real ones behind them.
fn programs() -> Scratch {
    let dir = Scratch::new("programs");
    for name in ["pg_dump", "pg_restore"] {
        let real = bin_dir().join(name);
        let script = format!(
            "#!/bin/sh\nPATH=/usr/bin:/bin\n[ \"$1\" = --version ] && exec {real} \"$@\"\necho {name} >> {dir}/calls\n\
             mode=$(cat {dir}/mode)\ncase $mode in {name}*) ;; *) exec {real} \"$@\";; esac\ncase $mode in\n\
             'pg_dump hangs') echo PGDMP; exec sleep 1000;;\n\
             'pg_dump fails at 99 %') {real} \"$@\" > {dir}/whole; head -c $(($(wc -c < {dir}/whole) * 99 / 100)) {dir}/whole\n\
               echo 'pg_dump: error: the disk fell off' >&2; echo 'DETAIL: (secret)' >&2; exit 1;;\n\
             'pg_dump exits badly') {real} \"$@\"; exit 3;;\n\
             'pg_dump is killed') kill -9 $$;;\n\
             'pg_dump stops early') {real} \"$@\" > {dir}/whole; head -c $(($(wc -c < {dir}/whole) / 2)) {dir}/whole;;\n\
             'pg_dump leaves out rows') exec {real} \"$@\" '--exclude-table-data=*';;\n\
             'pg_dump leaves out a view') exec {real} \"$@\" --exclude-table=v;;\n\
             'pg_restore hangs') cat > /dev/null; exec sleep 1000;;\n\
             'pg_restore does nothing') cat > /dev/null;;\n\
             'pg_restore exits badly') {real} \"$@\"; exit 1;;\n\
             *) exec {real} \"$@\";;\nesac\n",
            real = real.display(),
            dir = dir.display(),
        );
        fs::write(dir.join(name), script).expect("a script");
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).expect("a mode");
    }
    dir
}

#[tokio::test]
async fn programs_that_hang_fail_or_lie_archive_nothing_and_leave_nothing() {
    let dir = programs();
    let settings = [
        ("admin.postgres_bin", toml::Value::from(dir.display().to_string())),
        ("admin.archive_stall_timeout", toml::Value::from("1s")),
    ];
    let (proxy, api) = proxy_with(&settings).await;
    let tenant = api.create("kept").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t AS SELECT g AS n, md5(g::text) AS x FROM generate_series(1, 1000) g").await;
    client.run("CREATE VIEW v AS SELECT n FROM t").await;
    let sum = client.value(SUM).await;
    client.leave().await;
    for (mode, words) in [
        ("pg_dump hangs", "pg_dump hangs"),
        ("pg_dump fails at 99 %", "the disk fell off"),
        ("pg_dump exits badly", "exit status: 3"),
        ("pg_dump is killed", "signal: 9"),
        ("pg_dump stops early", "pg_restore failed"),
        ("pg_dump leaves out rows", "differs from the database in public.t"),
        ("pg_dump leaves out a view", "views"),
        ("pg_restore hangs", "pg_restore hangs"),
        ("pg_restore does nothing", "differs from the database in"),
        ("pg_restore exits badly", "pg_restore failed"),
    ] {
        fs::write(dir.join("mode"), mode).expect("a mode");
        let reason = why(&archive(&api, "kept").await);
        assert!(reason.contains(words) && !reason.contains("secret"), "{mode}: {reason}");
        is_as_before(&proxy, &api, &tenant, &proxy.dir().join("archives"), &sum).await;
    }
    fs::write(dir.join("mode"), "well").expect("a mode");
    assert_eq!(archive(&api, "kept").await.body["tenant"]["state"], "archived");
}

#[tokio::test]
async fn nothing_of_an_archive_that_was_changed_in_the_store_is_run() {
    let dir = programs();
    fs::write(dir.join("mode"), "well").expect("a mode");
    let (proxy, api) = proxy_with(&[("admin.postgres_bin", toml::Value::from(dir.display().to_string()))]).await;
    let tenant = api.create("kept").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t AS SELECT 1 AS n").await;
    client.leave().await;
    let archived = archive(&api, "kept").await;
    let file = proxy.dir().join("archives").join(archived.body["job"]["result"]["path"].as_str().expect("a path"));
    assert_eq!(fs::metadata(&file).expect("the archive").permissions().mode() & 0o777, 0o600);
    let mut bytes = fs::read(&file).expect("the archive");
    *bytes.last_mut().expect("a byte") ^= 1;
    fs::write(&file, bytes).expect("write");
    fs::remove_file(dir.join("calls")).expect("calls");
    let reason = why(&api.post("/v1/tenants/kept/restore", json!({})).await);
    assert!(reason.contains("damaged"), "{reason}");
    assert!(!dir.join("calls").exists(), "pg_restore was started");
    assert_eq!(api.get("/v1/tenants/kept").await.body["state"], "archived");
    assert_eq!(cluster().sql(LEFT).await.as_deref(), Some(""));
}

#[tokio::test]
async fn a_job_works_as_a_role_that_is_the_tenant_and_nobody_else_and_is_gone_afterwards() {
    let dir = programs();
    fs::write(dir.join("mode"), "pg_dump hangs").expect("a mode");
    let settings = [
        ("admin.postgres_bin", toml::Value::from(dir.display().to_string())),
        ("admin.archive_stall_timeout", toml::Value::from("2s")),
    ];
    let (_proxy, api) = proxy_with(&settings).await;
    api.create("kept").await;
    let look = "SELECT concat_ws(' ', rolcanlogin, rolinherit, rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls, \
                  rolvaliduntil BETWEEN now() AND now() + interval '11 min', \
                  (SELECT string_agg(roleid::regrole::text, ' ') FROM pg_auth_members WHERE member = r.oid)) \
                FROM pg_roles r WHERE rolname ~ '-hand$'";
    let follows = follow(&api, "POST", "/v1/tenants/kept/archive", json!({ "deadline_ms": 1_000 }));
    let seen = eventually("the role of the job", async || {
        let is_dumping = dir.join("calls").exists();
        cluster().sql(look).await.filter(|_| is_dumping)
    });
    let (seen, (_, job, _)) = tokio::join!(seen, follows);
    assert_eq!(seen, "t f f t kept");
    assert_eq!(job["state"], "failed", "{job}");
    assert_eq!(cluster().sql(LEFT).await.as_deref(), Some(""));
}

#[tokio::test]
async fn an_index_that_takes_longer_than_a_stall_is_waited_for() {
    let (proxy, api) = proxy_with(&[("admin.archive_stall_timeout", toml::Value::from("1s"))]).await;
    let tenant = api.create("slow").await;
    let mut client = proxy.connect(&tenant).login().await;
    for sql in [
        "CREATE FUNCTION slow(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $f$ BEGIN PERFORM pg_sleep(3); RETURN n; END $f$",
        "CREATE TABLE t AS SELECT 1 AS n",
        "CREATE INDEX ON t (slow(n))",
    ] {
        client.run(sql).await;
    }
    client.leave().await;
    let archived = archive(&api, "slow").await;
    assert_eq!(archived.body["tenant"]["state"], "archived", "{}", archived.body);
}

/// A file system of its own, gone with the test; `None` for whoever may not mount.
struct Small(Scratch);

impl Small {
    fn mount(size: &str) -> Option<Self> {
        let dir = Scratch::new("store");
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tenantry-test"]).arg(&*dir);
        mount.output().is_ok_and(|done| done.status.success()).then_some(Self(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&*self.0).output();
    }
}

#[tokio::test]
async fn a_store_that_is_full_archives_nothing_and_the_tenant_serves_again() {
    let Some(small) = Small::mount("2m") else { return };
    let store = small.0.display().to_string();
    let (proxy, api) = proxy_with(&[("admin.archives", toml::Value::from(store))]).await;
    let tenant = api.create("kept").await;
    // More than one part of an upload, and more than the store.
    let fill = "SET ROLE kept; CREATE TABLE t AS SELECT md5(g::text) || md5((-g)::text) AS x FROM generate_series(1, 400000) g";
    cluster().sql_in("kept", fill).await;
    let sum = cluster().sql_in("kept", SUM).await.expect("a sum");
    let reason = why(&archive(&api, "kept").await);
    assert!(reason.contains("cannot be stored"), "{reason}");
    is_as_before(&proxy, &api, &tenant, &small.0, &sum).await;
}

#[tokio::test]
async fn a_store_that_does_not_work_is_found_before_anybody_waits() {
    let dir = Scratch::new("file");
    fs::write(dir.join("file"), "").expect("a file");
    let store = dir.join("file/archives").display().to_string();
    let (proxy, api) = proxy_with(&[("admin.archives", toml::Value::from(store))]).await;
    let tenant = api.create("kept").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let reason = why(&archive(&api, "kept").await);
    assert!(reason.contains("admin.archives"), "{reason}");
    assert_eq!(client.value("SELECT 1").await, "1");
    client.run("COMMIT").await;
    assert_eq!(cluster().sql(LEFT).await.as_deref(), Some(""));
}

/// An adopted database with all that pg_dump does not hold; its tenant.
async fn adopted(api: &Api, locale: &str) -> Tenant {
    let role = "old_owner";
    cluster().sql(&format!("CREATE ROLE {role} LOGIN PASSWORD 'old'")).await;
    cluster().sql("CREATE ROLE reader").await;
    cluster().sql(&format!("CREATE DATABASE old OWNER {role} TEMPLATE template0 {locale}")).await;
    cluster().sql(&format!("GRANT {role} TO tenantry_control WITH ADMIN OPTION")).await;
    let verifier = cluster().sql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{role}'")).await;
    let made = api.post("/v1/tenants/old/adopt", json!({ "verifier": verifier })).await;
    assert_eq!(made.status, 201, "{}", made.body);
    Tenant { name: "old".to_owned(), role: role.to_owned(), password: "old".to_owned() }
}

/// Everything about the database that is not in it.
const ABOUT: &str = "SELECT concat_ws(' | ', pg_encoding_to_char(encoding), datcollate, datctype, datlocprovider, \
       coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'), \
       shobj_description(d.oid, 'pg_database'), \
       (SELECT string_agg(concat(setrole::regrole, ' ', setconfig), ', ' ORDER BY setrole) FROM pg_db_role_setting WHERE setdatabase = d.oid), \
       (SELECT string_agg(concat(grantee::regrole, ' ', privilege_type, ' ', is_grantable), ', ' ORDER BY 1) FROM ( \
          SELECT * FROM aclexplode(datacl) a WHERE grantee NOT IN (datdba, 'tenantry_control'::regrole) ORDER BY 2, 3) a)) \
     FROM pg_database d WHERE datname = 'old'";

#[tokio::test]
async fn encoding_locale_settings_rights_comment_and_large_objects_come_back() {
    let (proxy, api) = control_proxy().await;
    let icu = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'";
    let tenant = adopted(&api, icu).await;
    for sql in [
        "ALTER DATABASE old SET search_path = app, \"$user\", \"Odd, name\", public",
        "ALTER DATABASE old SET timezone = 'Europe/Berlin'",
        "ALTER ROLE old_owner IN DATABASE old SET work_mem = '8MB'",
        "COMMENT ON DATABASE old IS 'what it''s for'",
        "REVOKE TEMPORARY ON DATABASE old FROM PUBLIC",
        "GRANT CONNECT, CREATE ON DATABASE old TO reader",
    ] {
        cluster().sql(sql).await;
    }
    // As whoever set up the server does; its types belong to nobody else's tenant.
    cluster().sql_in("old", "CREATE EXTENSION citext SCHEMA public").await;
    let fill = "SET ROLE old_owner; CREATE TABLE c (x public.citext); CREATE SCHEMA app; CREATE TABLE app.t AS SELECT chr(228) AS x; \
                SELECT lo_from_bytea(4711, 'large'); CREATE UNLOGGED TABLE u AS SELECT 1 AS n";
    cluster().sql_in("old", fill).await;
    let about = cluster().sql(ABOUT).await.expect("facts");
    let archived = archive(&api, "old").await;
    assert_eq!(archived.body["tenant"]["state"], "archived", "{}", archived.body);
    assert_eq!(cluster().sql(ABOUT).await, None);
    let back = api.post("/v1/tenants/old/restore", json!({})).await;
    assert_eq!(back.body["tenant"]["state"], "active", "{}", back.body);
    let now = cluster().sql(ABOUT).await.expect("facts");
    // The tenant's own role has a right of its own now, which it had as the owner.
    assert_eq!(now, about);
    let mut client = proxy.connect(&tenant).login().await;
    assert_eq!(client.value("SELECT encode(convert_to(x, 'UTF8'), 'hex') FROM app.t").await, "c3a4");
    assert_eq!(client.value("SELECT encode(lo_get(4711), 'escape')").await, "large");
    assert_eq!(client.value("SELECT current_setting('search_path')").await, "app, \"$user\", \"Odd, name\", public");
}

#[tokio::test]
async fn what_cannot_be_kept_is_refused_before_anybody_waits() {
    let (proxy, api) = control_proxy().await;
    let tenant = adopted(&api, "").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t AS SELECT 1 AS n").await;
    // Before PostgreSQL 16, CREATEROLE may grant every role: there is nothing to be missing.
    let since_16 = cluster().sql("SELECT (current_setting('server_version_num')::int >= 160000)::text").await;
    let asks_for_admin = since_16.as_deref() == Some("true");
    for (make, unmake, words) in [
        ("CREATE TABLE foreign_one ()", "DROP TABLE foreign_one", "public.foreign_one is owned by postgres"),
        ("SELECT lo_create(4711)", "SELECT lo_unlink(4711)", "large object 4711 is owned by postgres"),
        (
            "REVOKE ADMIN OPTION FOR old_owner FROM tenantry_control",
            "GRANT old_owner TO tenantry_control WITH ADMIN OPTION",
            "WITH ADMIN OPTION",
        ),
    ]
    .into_iter()
    .filter(|(.., words)| asks_for_admin || *words != "WITH ADMIN OPTION")
    {
        cluster().sql_in("old", make).await;
        client.run("BEGIN").await;
        let reason = why(&archive(&api, "old").await);
        assert!(reason.contains(words), "{reason}");
        assert_eq!(client.value("SELECT n FROM t").await, "1");
        client.run("COMMIT").await;
        cluster().sql_in("old", unmake).await;
    }
    if !asks_for_admin {
        return;
    }
    // Only the proof shows that the control role may not set this again.
    cluster().sql("ALTER ROLE reader IN DATABASE old SET work_mem = '8MB'").await;
    client.leave().await;
    let about = cluster().sql(ABOUT).await;
    let reason = why(&archive(&api, "old").await);
    assert!(reason.contains("cannot be kept"), "{reason}");
    let mut client = proxy.connect(&tenant).login().await;
    assert_eq!(client.value("SELECT n FROM t").await, "1");
    assert_eq!(cluster().sql(LEFT).await.as_deref(), Some(""));
    assert!(about.is_some());
}
