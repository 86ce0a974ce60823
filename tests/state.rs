//! Session state in transaction mode (C25): the client that made it finds it again, and nobody else ever sees it.
//!
//! Two server connections and several clients that take turns, so that a client's next transaction lands anywhere.

use tenantry_testkit::{Client, Proxy, ProxyBuilder, Tenant, cluster, eventually, one_server, oracle, say};

async fn two_servers() -> (Tenant, Proxy) {
    let tenant = cluster().tenant("state").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 2).start().await;
    (tenant, proxy)
}

/// Both server connections are used by others for one transaction each, and nobody of them sees `leak` differ from `clean`.
async fn others_see(proxy: &Proxy, tenant: &Tenant, leak: &str, clean: &str) {
    let (mut a, mut b) = (proxy.connect(tenant).login().await, proxy.connect(tenant).login().await);
    a.run("BEGIN").await;
    assert_eq!(a.value(leak).await, clean, "{leak}");
    // The owner of the state may hold the second connection; then a is done before b begins.
    a.run("COMMIT").await;
    assert_eq!(b.value(leak).await, clean, "{leak}");
    (a.leave().await, b.leave().await);
}

/// One kind of state: how it is made, how it is seen, and what a clean session sees.
struct Kind {
    make: &'static [&'static str],
    look: &'static str,
    mine: &'static str,
    clean: &'static str,
}

macro_rules! kinds {
    ($($name:ident: $make:expr, $look:expr, $mine:expr, $clean:expr;)*) => {$(
        mod $name {
            use super::*;
            const KIND: Kind = Kind { make: &$make, look: $look, mine: $mine, clean: $clean };

            #[tokio::test]
            async fn stays_with_its_client_outside_a_transaction() { stays(&KIND, false).await; }
            #[tokio::test]
            async fn stays_with_its_client_after_commit() { stays(&KIND, true).await; }
            #[tokio::test]
            async fn is_undone_or_not_by_rollback_as_in_postgresql() { as_directly(&KIND, &["BEGIN"], &["ROLLBACK"]).await; }
            #[tokio::test]
            async fn is_undone_or_not_by_rollback_to_savepoint_as_in_postgresql() {
                as_directly(&KIND, &["BEGIN", "SAVEPOINT s"], &["ROLLBACK TO s", "COMMIT"]).await;
            }
            #[tokio::test]
            async fn is_undone_or_not_by_an_error_as_in_postgresql() { as_directly(&KIND, &["BEGIN"], &["SELECT 1/0", "COMMIT"]).await; }
            #[tokio::test]
            async fn is_gone_after_its_client_left() { gone(&KIND, false).await; }
            #[tokio::test]
            async fn is_gone_after_its_client_vanished() { gone(&KIND, true).await; }
            #[tokio::test]
            async fn made_by_the_extended_protocol_stays() { extended(&KIND).await; }
        }
    )*};
}

kinds! {
    set: ["SET work_mem = '7MB'"], "SHOW work_mem", "7MB", "4MB";
    set_reported: ["SET application_name = 'leak'"], "SHOW application_name", "leak", "";
    set_quoted: ["SET search_path = \"$user\", 'o''x\\', public"], "SHOW search_path", "\"$user\", \"o'x\\\", public", "\"$user\", public";
    set_config: ["SELECT set_config('work_mem', '7MB', false)"], "SHOW work_mem", "7MB", "4MB";
    set_custom: ["SET app.tenant_id = '42'"], "SELECT coalesce(nullif(current_setting('app.tenant_id', true), ''), 'none')", "42", "none";
    set_config_custom: ["SELECT set_config('app.user', 'me', false)"], "SELECT coalesce(nullif(current_setting('app.user', true), ''), 'none')", "me", "none";
    set_in_do: ["DO $$ BEGIN PERFORM set_config('work_mem', '7MB', false); END $$"], "SHOW work_mem", "7MB", "4MB";
    set_transaction_default: ["SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"], "SHOW default_transaction_read_only", "on", "off";
    set_time_zone: ["SET TIME ZONE 'Asia/Tokyo'"], "SHOW TimeZone", "Asia/Tokyo", "UTC";
    set_statement_timeout: ["SET statement_timeout = '12345ms'"], "SHOW statement_timeout", "12345ms", "0";
    set_role: ["SET ROLE pg_monitor"], "SELECT (current_user = 'pg_monitor')::text", "true", "false";
    temp_table: ["CREATE TEMP TABLE leak AS SELECT 1 AS n"], "SELECT (to_regclass('leak') IS NOT NULL)::text", "true", "false";
    advisory_lock: ["SELECT pg_advisory_lock(4711)"],
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()", "1", "0";
    listen: ["LISTEN leak"], "SELECT count(*) FROM pg_listening_channels()", "1", "0";
    sql_prepare: ["PREPARE leak AS SELECT 1"], "SELECT count(*) FROM pg_prepared_statements WHERE from_sql", "1", "0";
    temp_function: ["CREATE FUNCTION pg_temp.leak() RETURNS int LANGUAGE sql AS 'SELECT 1'"],
        "SELECT count(*) FROM pg_proc WHERE proname = 'leak' AND pronamespace = pg_my_temp_schema()", "1", "0";
    set_in_a_function: ["SELECT plan()"], "SHOW work_mem", "7MB", "4MB";
    set_in_a_trigger: ["INSERT INTO rows VALUES (1)"], "SHOW work_mem", "7MB", "4MB";
    set_custom_in_a_function: ["SELECT name_it()"], "SELECT coalesce(nullif(current_setting('app.name', true), ''), 'none')", "me", "none";
    advisory_lock_in_a_function: ["SELECT reserve()"],
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()", "1", "0";
    temp_table_in_a_function: ["SELECT scratch()"], "SELECT (to_regclass('scratch') IS NOT NULL)::text", "true", "false";
    with_hold_cursor: ["DECLARE leak CURSOR WITH HOLD FOR SELECT 1"], "SELECT count(*) FROM pg_cursors WHERE name = 'leak'", "1", "0";
}

/// Functions of the tenant whose names do not tell what they leave.
async fn functions(tenant: &Tenant) {
    let mut owner = cluster().direct(tenant).login().await;
    for sql in [
        "CREATE FUNCTION plan() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN set_config('work_mem', '7MB', false); END $$",
        "CREATE FUNCTION name_it() RETURNS void LANGUAGE plpgsql AS $$ BEGIN SET app.name TO 'me'; END $$",
        "CREATE FUNCTION reserve() RETURNS void LANGUAGE sql AS 'SELECT pg_advisory_lock(4712)'",
        "CREATE FUNCTION scratch() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'CREATE TEMP TABLE scratch AS SELECT 1'; END $$",
        "CREATE FUNCTION on_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM plan(); RETURN NEW; END $$",
        "CREATE TABLE rows (n int)",
        "CREATE TRIGGER t BEFORE INSERT ON rows FOR EACH ROW EXECUTE FUNCTION on_row()",
    ] {
        owner.run(sql).await;
    }
    owner.leave().await;
}

/// As the owner of the tenant's database may not become pg_monitor by itself.
async fn grant(tenant: &Tenant) {
    cluster().sql(&format!("GRANT pg_monitor TO {}", tenant.role)).await;
    functions(tenant).await;
}

async fn make(client: &mut Client, kind: &Kind) {
    for sql in kind.make {
        client.run(sql).await;
    }
}

async fn stays(kind: &Kind, in_transaction: bool) {
    let (tenant, proxy) = two_servers().await;
    grant(&tenant).await;
    let mut owner = proxy.connect(&tenant).login().await;
    if in_transaction {
        owner.run("BEGIN").await;
    }
    make(&mut owner, kind).await;
    if in_transaction {
        owner.run("COMMIT").await;
    }
    for _ in 0..3 {
        assert_eq!(owner.value(kind.look).await, kind.mine, "the owner's next transaction");
        others_see(&proxy, &tenant, kind.look, kind.clean).await;
    }
}

async fn extended(kind: &Kind) {
    let (tenant, proxy) = two_servers().await;
    grant(&tenant).await;
    let mut owner = proxy.connect(&tenant).login().await;
    for sql in kind.make {
        // WITH HOLD and the rest do not need a transaction block.
        owner.ask(&[say::unnamed(sql, &[]), say::sync()].concat()).await.ok();
    }
    for _ in 0..2 {
        let answer = owner.ask(&[say::unnamed(kind.look, &[]), say::sync()].concat()).await.ok();
        assert_eq!(answer.value(), kind.mine);
        others_see(&proxy, &tenant, kind.look, kind.clean).await;
    }
}

/// What the owner sees afterwards is what it would see directly; others see nothing.
async fn as_directly(kind: &Kind, before: &[&str], after: &[&str]) {
    let (tenant, proxy) = two_servers().await;
    grant(&tenant).await;
    let texts = before.iter().chain(kind.make).chain(after).chain([&kind.look, &kind.look]);
    let steps: Vec<_> = texts.flat_map(|sql| oracle::ask(say::query(sql))).collect();
    let direct = oracle::trace(&cluster().direct(&tenant), &steps).await;
    let mut owner = proxy.connect(&tenant).login().await;
    assert_eq!(oracle::run(&mut owner, &steps).await, direct);
    others_see(&proxy, &tenant, kind.look, kind.clean).await;
    let again = oracle::ask(say::query(kind.look));
    assert_eq!(oracle::run(&mut owner, &again).await, direct[direct.len() - 4..], "after others had their turn");
}

async fn gone(kind: &Kind, vanish: bool) {
    let tenant = cluster().tenant("state").await;
    grant(&tenant).await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    let mut owner = proxy.connect(&tenant).login().await;
    make(&mut owner, kind).await;
    assert_eq!(owner.value(kind.look).await, kind.mine);
    if vanish {
        owner.vanish()
    } else {
        owner.leave().await
    }
    others_see(&proxy, &tenant, kind.look, kind.clean).await;
}

#[tokio::test]
async fn startup_parameters_and_options_are_the_clients_own() {
    let (tenant, proxy) = two_servers().await;
    let connect = proxy.connect(&tenant).parameter("application_name", "mine").parameter("TimeZone", "Asia/Tokyo");
    let connect = connect.parameter("options", "-c work_mem=7MB --statement-timeout=54321 -c DateStyle=ISO,\\ DMY");
    let mut mine = connect.login().await;
    assert_eq!(mine.parameters["application_name"], "mine");
    assert_eq!(mine.parameters["TimeZone"], "Asia/Tokyo");
    let look = "SELECT current_setting('DateStyle') || '|' || current_setting('work_mem') || '|' || current_setting('TimeZone') || '|' || current_setting('statement_timeout') \
                || '|' || current_setting('application_name')";
    for _ in 0..3 {
        assert_eq!(mine.value(look).await, "ISO, DMY|7MB|Asia/Tokyo|54321ms|mine");
        others_see(&proxy, &tenant, look, "ISO, MDY|4MB|UTC|0|").await;
    }
    // RESET goes back to what the client started with.
    mine.run("SET work_mem = '9MB'").await;
    mine.run("RESET work_mem").await;
    assert_eq!(mine.value("SHOW work_mem").await, "7MB");
    mine.run("SET TimeZone = 'UTC'").await;
    mine.run("RESET ALL").await;
    assert_eq!(mine.value(look).await, "ISO, DMY|7MB|Asia/Tokyo|54321ms|mine");
    mine.run("DISCARD ALL").await;
    assert_eq!(mine.value(look).await, "ISO, DMY|7MB|Asia/Tokyo|54321ms|mine");
}

#[tokio::test]
async fn a_startup_parameter_that_postgresql_refuses_is_refused() {
    let (tenant, proxy) = two_servers().await;
    for (name, value) in [
        ("work_mem", "nonsense"),
        ("no_such_setting", "1"),
        ("options", "-c work_mem=nonsense"),
        ("client_encoding", "NOPE"),
    ] {
        let direct =
            cluster().direct(&tenant).parameter(name, value).try_login().await.err().expect("refused directly");
        let pooled = match proxy.connect(&tenant).parameter(name, value).try_login().await {
            Err(answer) => answer,
            // Later is allowed too, as long as it is said.
            Ok(mut client) => client.query("SELECT 1").await,
        };
        assert_eq!(pooled.faults()[0].code, direct.faults()[0].code, "{name}={value}: {:?}", pooled.trace());
    }
}

#[tokio::test]
async fn set_local_ends_with_its_transaction() {
    let (tenant, proxy) = two_servers().await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN; SET LOCAL work_mem = '7MB'").await;
    assert_eq!(client.value("SHOW work_mem").await, "7MB");
    client.run("COMMIT").await;
    assert_eq!(client.value("SHOW work_mem").await, "4MB");
    others_see(&proxy, &tenant, "SHOW work_mem", "4MB").await;
}

#[tokio::test]
async fn incident_a09_settings_follow_rollbacks() {
    let (tenant, proxy) = two_servers().await;
    let texts = [
        "SET work_mem = '5MB'",
        "BEGIN",
        "SET work_mem = '6MB'",
        "ROLLBACK",
        "SHOW work_mem",
        "BEGIN",
        "SET work_mem = '6MB'",
        "SAVEPOINT a",
        "SET work_mem = '7MB'",
        "ROLLBACK TO a",
        "SHOW work_mem",
        "COMMIT",
        "SHOW work_mem",
        "BEGIN",
        "SELECT set_config('work_mem', '8MB', false)",
        "SELECT 1/0",
        "ROLLBACK",
        "SHOW work_mem",
        "BEGIN; SET work_mem = '9MB'; ROLLBACK",
        "SHOW work_mem",
        "SET work_mem = '10MB'; SELECT 1/0",
        "SHOW work_mem",
        "RESET work_mem",
        "SHOW work_mem",
    ];
    let steps: Vec<_> = texts.iter().flat_map(|sql| oracle::ask(say::query(sql))).collect();
    oracle::same(cluster(), &proxy, &tenant, &steps).await;
    others_see(&proxy, &tenant, "SHOW work_mem", "4MB").await;
}

#[tokio::test]
async fn many_clients_with_different_settings_on_two_servers() {
    let (tenant, proxy) = two_servers().await;
    let mut clients = Vec::new();
    for n in 0..8 {
        let mut client = proxy.connect(&tenant).login().await;
        client.run(&format!("SET work_mem = '{}kB'", 1000 + n)).await;
        clients.push(client);
    }
    for _ in 0..10 {
        for (n, client) in clients.iter_mut().enumerate() {
            assert_eq!(client.value("SHOW work_mem").await, format!("{}kB", 1000 + n));
            assert_eq!(client.value("SHOW TimeZone").await, "UTC");
        }
    }
}

#[tokio::test]
async fn dropping_the_temp_table_ends_the_pin() {
    let (tenant, proxy) = two_servers().await;
    let mut owner = proxy.connect(&tenant).login().await;
    owner.run("CREATE TEMP TABLE t AS SELECT 1").await;
    owner.run("DROP TABLE t").await;
    // Both connections are free again: two others hold them at once.
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.run("BEGIN").await;
    b.run("BEGIN").await;
    (a.run("COMMIT").await, b.run("COMMIT").await);
    assert_eq!(owner.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn notifications_reach_a_listener_that_says_nothing() {
    let (tenant, proxy) = two_servers().await;
    let mut listener = proxy.connect(&tenant).login().await;
    listener.run("LISTEN news").await;
    let mut speaker = proxy.connect(&tenant).login().await;
    speaker.run("NOTIFY news, 'extra'").await;
    let message = listener.next().await.expect("a notification");
    assert_eq!((message.tag, message.words(4)), (b'A', vec!["news".to_owned(), "extra".to_owned()]));
}

#[tokio::test]
async fn incident_a08_a_channel_of_one_tenant_is_not_anothers() {
    let tenants = [cluster().tenant("state").await, cluster().tenant("state").await];
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenants[0]).tenant(&tenants[1]).start().await;
    let mut listeners = Vec::new();
    for tenant in &tenants {
        let mut listener = proxy.connect(tenant).login().await;
        listener.run("LISTEN news").await;
        listeners.push(listener);
    }
    for (n, tenant) in tenants.iter().enumerate() {
        proxy.connect(tenant).login().await.run(&format!("NOTIFY news, 'for {n}'")).await;
    }
    for (n, listener) in listeners.iter_mut().enumerate() {
        assert_eq!(listener.next().await.expect("a notification").words(4)[1], format!("for {n}"));
        assert_eq!(listener.query("SELECT 1").await.ok().tags(), "TDCZ", "one and no more");
    }
}

#[tokio::test]
async fn more_pins_than_max_pinned_are_refused_and_leave_nothing_behind() {
    let tenant = cluster().tenant("state").await;
    let proxy =
        ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 4).set("pool.max_pinned", 1).start().await;
    let mut first = proxy.connect(&tenant).login().await;
    first.run("CREATE TEMP TABLE t (n int)").await;
    let mut second = proxy.connect(&tenant).login().await;
    let answer = second.query("CREATE TEMP TABLE t (n int)").await;
    let next = second.query("SELECT 1").await;
    let faults = [answer.faults(), next.faults()].concat();
    assert_eq!(faults.len(), 1, "told once: {:?} {:?}", answer.trace(), next.trace());
    // Three connections that are nobody's, and a table on none of them.
    let mut others = Vec::new();
    for _ in 0..3 {
        let mut other = proxy.connect(&tenant).login().await;
        other.run("BEGIN").await;
        assert_eq!(other.value("SELECT count(*) FROM pg_class WHERE relname = 't' AND relpersistence = 't' AND relnamespace = pg_my_temp_schema()").await, "0");
        others.push(other);
    }
    drop(others);
    first.run("DROP TABLE t").await;
    eventually("a place for the next pin", async || {
        let mut third = proxy.connect(&tenant).login().await;
        third.query("CREATE TEMP TABLE u (n int)").await.faults().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_replay_that_fails_runs_nothing_under_somebody_elses_settings() {
    let (tenant, proxy) = one_server("state").await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.run("CREATE TABLE written (who text DEFAULT current_setting('app.who', true))").await;
    a.run("CREATE TEXT SEARCH CONFIGURATION mine (COPY = simple)").await;
    b.run("SET app.who = 'b'; SET default_text_search_config = 'mine'").await;
    a.run("SET app.who = 'a'").await;
    a.run("DROP TEXT SEARCH CONFIGURATION mine").await;
    b.send(&say::query("INSERT INTO written DEFAULT VALUES")).await;
    let told = b.until_end().await;
    assert_eq!(told.faults().len(), 1, "told once: {:?}", told.trace());
    assert_eq!(a.value("SELECT count(*) FROM written").await, "0");
    assert_eq!(a.value("SELECT current_setting('app.who')").await, "a");
}

#[tokio::test]
async fn a_write_in_a_read_only_transaction_costs_nobody_a_connection() {
    let (tenant, proxy) = one_server("state").await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.run("CREATE TABLE t (n int)").await;
    let backend = a.backend().await;
    b.run("BEGIN READ ONLY").await;
    b.query("INSERT INTO t VALUES (1)").await.error("25006");
    b.run("ROLLBACK").await;
    assert_eq!(a.backend().await, backend);
}
