//! Session state in transaction mode (C25): the client that made it finds it again, and nobody else ever sees it.
//!
//! Two server connections and several clients that take turns, so that a client's next transaction lands anywhere.

use tenantry_testkit::{Client, Proxy, ProxyBuilder, Relay, Tenant, cluster, eventually, one_server, oracle, say};

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

/// What was sent to PostgreSQL since the last call, one text for each time that somebody wrote.
fn turns(relay: &Relay) -> Vec<String> {
    relay.take_turns().iter().map(|turn| String::from_utf8_lossy(turn).into_owned()).collect()
}

/// The probe, or the look at what functions have left: sent between two uses of a connection.
fn is_a_question_of_ours(turn: &str) -> bool {
    turn.contains("pg_listening_channels") || turn.contains("tenantry_look")
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
async fn a_setting_made_the_servers_default_stays_so_whatever_the_client_began_with() {
    for mode in ["transaction", "session"] {
        let tenant = cluster().tenant("state").await;
        let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 3).set("pool.pool_mode", mode);
        let proxy = proxy.set("pool.server_round_robin", true).start().await;
        let mut client = proxy.connect(&tenant).parameter("options", "-c intervalstyle=postgres_verbose").login().await;
        assert_eq!(client.value("SHOW intervalstyle").await, "postgres_verbose");
        client.run("SET intervalstyle TO postgres").await;
        for n in 0..4 {
            client.run(&format!("CREATE TEMP TABLE t{n} (n int)")).await;
            assert_eq!(client.value("SHOW intervalstyle").await, "postgres");
            client.run(&format!("DROP TABLE t{n}")).await;
            assert_eq!(client.value("SHOW intervalstyle").await, "postgres");
            let mut other = proxy.connect(&tenant).login().await;
            other.run("BEGIN; SELECT 1; COMMIT").await;
            other.leave().await;
        }
        for sql in ["RESET intervalstyle", "RESET ALL", "DISCARD ALL"] {
            client.run("SET intervalstyle TO postgres").await;
            client.run(sql).await;
            assert_eq!(client.value("SHOW intervalstyle").await, "postgres_verbose", "{sql}, {mode}");
        }
    }
}

#[tokio::test]
async fn temporary_objects_of_every_kind_stay_with_their_client() {
    let (tenant, proxy) = two_servers().await;
    let mut owner = proxy.connect(&tenant).login().await;
    owner.run("CREATE TABLE ab (a int, b int)").await;
    for (make, drop) in [
        ("CREATE STATISTICS pg_temp.x ON a, b FROM ab", "DROP STATISTICS pg_temp.x"),
        ("CREATE COLLATION pg_temp.x FROM \"C\"", "DROP COLLATION pg_temp.x"),
        ("CREATE TEXT SEARCH CONFIGURATION pg_temp.x (copy = simple)", "DROP TEXT SEARCH CONFIGURATION pg_temp.x"),
        ("CREATE DOMAIN pg_temp.x AS int", "DROP DOMAIN pg_temp.x"),
        ("CREATE TEMP SEQUENCE x", "DROP SEQUENCE x"),
        ("CREATE TEMP VIEW x AS SELECT 1", "DROP VIEW x"),
    ] {
        owner.run(make).await;
        let temporary = "SELECT count(*) FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass AND refobjid = pg_my_temp_schema()";
        others_see(&proxy, &tenant, temporary, "0").await;
        owner.run(drop).await;
    }
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
async fn a_text_that_is_sent_again_is_suspected_again() {
    const GROW: &str =
        "SELECT set_config('work_mem', pg_size_bytes(current_setting('work_mem')) / 1024 + 1024 || 'kB', false)";
    let (tenant, proxy) = two_servers().await;
    let mut owner = proxy.connect(&tenant).login().await;
    for size in ["5MB", "6MB", "7MB"] {
        let answer = owner.ask(&[say::unnamed(GROW, &[]), say::sync()].concat()).await.ok();
        assert_eq!(answer.value(), size);
        others_see(&proxy, &tenant, "SHOW work_mem", "4MB").await;
    }
    // Not if what stood there meanwhile was another one, that failed.
    owner.ask(&[say::unnamed("SELECT nothing", &[]), say::sync()].concat()).await;
    assert_eq!(owner.ask(&[say::unnamed(GROW, &[]), say::sync()].concat()).await.ok().value(), "8MB");
    others_see(&proxy, &tenant, "SHOW work_mem", "4MB").await;
}

#[tokio::test]
async fn a_word_in_a_string_pins_nobody_and_what_it_may_have_left_is_gone() {
    let (tenant, proxy) = two_servers().await;
    proxy.connect(&tenant).login().await.run("CREATE TABLE posts (body text)").await;
    // Nobody is pinned: there are only two connections.
    let mut writers = Vec::new();
    for n in 0..5 {
        let mut writer = proxy.connect(&tenant).login().await;
        writer.run(&format!("INSERT INTO posts VALUES ('{n}: how does setseed(0.5) work?')")).await;
        let text = "SELECT 'dblink_connect' WHERE $1 <> 'set_config'";
        writer.ask(&[say::unnamed(text, &[Some("x")]), say::sync()].concat()).await.ok();
        writers.push(writer);
    }
    for writer in &mut writers {
        assert_eq!(writer.value("SELECT count(*) FROM posts").await, "5");
    }
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

/// Two clients take turns on one server connection; each of their requests is one round trip, with the settings in it.
#[tokio::test]
async fn settings_go_ahead_of_a_request_in_the_same_write() {
    let tenant = cluster().tenant("state").await;
    grant(&tenant).await;
    let relay = Relay::start(cluster().address()).await;
    let proxy = ProxyBuilder::to(relay.address()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    for set in [
        &["SET search_path = a"][..],
        &["SET search_path = b, c", "SET statement_timeout = '40s'"],
        &["SET statement_timeout = '50s'", "SET lock_timeout = '5s'", "SET app.tenant_id = '42'"],
        &["SET ROLE pg_monitor"],
        &["SET default_tablespace = pg_default"],
    ] {
        let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
        for sql in set {
            a.run(sql).await;
        }
        // Whatever was to be found out about functions is known by now.
        b.run("SELECT 1").await;
        for extended in [false, true] {
            for client in [&mut a, &mut b] {
                relay.take_turns();
                let ask = if extended {
                    [say::unnamed("SELECT 'asked'", &[]), say::sync()].concat()
                } else {
                    say::query("SELECT 'asked'")
                };
                assert_eq!(client.ask(&ask).await.ok().value(), "asked");
                let turns = turns(&relay);
                let asked: Vec<_> = turns.iter().filter(|t| !is_a_question_of_ours(t)).collect();
                assert_eq!(asked.len(), 1, "{set:?}: {turns:?}");
                assert!(asked[0].contains("SELECT 'asked'"), "{set:?}: {turns:?}");
                assert!(asked[0].contains("set_config") || asked[0].contains("RESET"), "{set:?}: {turns:?}");
            }
        }
        (a.leave().await, b.leave().await);
    }
}

/// A replay that PostgreSQL refuses: what was asked behind it does not run, in any protocol.
#[tokio::test]
async fn a_request_does_not_run_under_settings_that_were_refused() {
    let tenant = cluster().tenant("state").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    cluster().direct(&tenant).login().await.run("CREATE TABLE ran (n int)").await;
    let insert = "INSERT INTO ran VALUES (1)";
    let batch = [say::unnamed(insert, &[]), say::sync()].concat();
    for ask in [
        say::query(insert),
        [say::query(insert), say::query(insert)].concat(),
        batch.clone(),
        [batch.clone(), batch.clone(), say::query(insert)].concat(),
    ] {
        let role = format!("passing_{}", tenant.role);
        cluster().sql(&format!("CREATE ROLE {role}; GRANT {role} TO {}", tenant.role)).await;
        let mut client = proxy.connect(&tenant).login().await;
        client.run(&format!("SET ROLE {role}")).await;
        proxy.connect(&tenant).login().await.run("SELECT 1").await;
        cluster().sql(&format!("DROP ROLE {role}")).await;
        let answer = client.ask(&ask).await;
        let codes: Vec<_> = answer.faults().into_iter().map(|f| f.code).collect();
        assert_eq!(codes, ["08006"], "told once: {:?}", answer.trace());
        assert_eq!(proxy.connect(&tenant).login().await.value("SELECT count(*) FROM ran").await, "0");
    }
}

#[tokio::test]
async fn functions_made_by_others_are_known_before_they_leave_anything() {
    let (tenant, proxy) = two_servers().await;
    let mut maker = proxy.connect(&tenant).login().await;
    let mut caller = proxy.connect(&tenant).login().await;
    assert_eq!(caller.value("SELECT 1").await, "1");
    // The name of the setting stands nowhere: then connections are wiped.
    let body = "BEGIN PERFORM set_config(name, 'x', false); END";
    maker
        .run(&format!(
            "CREATE FUNCTION leave(name text) RETURNS void LANGUAGE plpgsql AS '{}'",
            body.replace('\'', "''")
        ))
        .await;
    caller.run("SELECT leave('app.nobody_knows')").await;
    let look = "SELECT coalesce(nullif(current_setting('app.nobody_knows', true), ''), 'none')";
    for _ in 0..3 {
        others_see(&proxy, &tenant, look, "none").await;
    }
}

#[tokio::test]
async fn a_setting_whose_name_a_function_puts_together_stays_with_its_caller() {
    for body in ["set_config('work' || '_mem', '7MB', false)", "set_config/**/('work_mem', '7MB', false)"] {
        let (tenant, proxy) = two_servers().await;
        let mut owner = cluster().direct(&tenant).login().await;
        owner.run(&format!("CREATE FUNCTION plan() RETURNS text LANGUAGE sql AS $$ SELECT {body} $$")).await;
        owner.leave().await;
        let mut caller = proxy.connect(&tenant).login().await;
        others_see(&proxy, &tenant, "SHOW work_mem", "4MB").await;
        caller.run("SELECT plan()").await;
        others_see(&proxy, &tenant, "SHOW work_mem", "4MB").await;
        assert_eq!(caller.value("SHOW work_mem").await, "7MB", "{body}");
    }
}

#[tokio::test]
async fn functions_made_around_tenantry_are_known_soon() {
    let (tenant, proxy) = two_servers().await;
    proxy.connect(&tenant).login().await.run("SELECT 1").await;
    functions(&tenant).await;
    eventually("the function's state stays with its caller", async || {
        let mut caller = proxy.connect(&tenant).login().await;
        caller.run("SELECT plan()").await;
        let mut other = proxy.connect(&tenant).login().await;
        other.run("SELECT 1").await;
        let kept = caller.value("SHOW work_mem").await == "7MB" && other.value("SHOW work_mem").await == "4MB";
        kept.then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_functions_may_leave_is_looked_at_and_all_settings_are_gone_over_only_where_one_did() {
    let tenant = cluster().tenant("state").await;
    functions(&tenant).await;
    let relay = Relay::start(cluster().address()).await;
    let proxy = ProxyBuilder::to(relay.address()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.run("SET work_mem = '6MB'").await;
    let went_over = async |a: &mut Client, b: &mut Client| {
        relay.take_turns();
        for client in [a, b] {
            client.run("BEGIN; SELECT 1; COMMIT").await;
            client.run("SELECT 1").await;
        }
        let turns = turns(&relay);
        assert!(turns.iter().any(|t| t.contains("tenantry_look")), "{turns:?}");
        turns.iter().any(|t| t.contains("pg_settings"))
    };
    // Once on each connection, to know what it has where no client sets it.
    went_over(&mut a, &mut b).await;
    assert!(!went_over(&mut a, &mut b).await, "nothing was left, and a look shows it");
    assert_eq!(b.value("SELECT plan()").await, "7MB");
    assert_eq!(b.value("SHOW work_mem").await, "7MB");
    assert_eq!(a.value("SHOW work_mem").await, "6MB");
    assert_eq!(proxy.connect(&tenant).login().await.value("SHOW work_mem").await, "4MB");
    assert!(!went_over(&mut a, &mut b).await);
    for (client, mine) in [(&mut a, "6MB"), (&mut b, "7MB")] {
        client.run("SELECT reserve()").await;
        client.run("DEALLOCATE ALL").await;
        let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
        assert_eq!(client.value(locks).await, "1");
        client.run("SELECT pg_advisory_unlock_all()").await;
        assert_eq!(client.value("SHOW work_mem").await, mine);
    }
}

#[tokio::test]
async fn strict_isolation_wipes_a_connection_before_each_use() {
    let tenant = cluster().tenant("state").await;
    let relay = Relay::start(cluster().address()).await;
    let proxy = ProxyBuilder::to(relay.address())
        .tenant(&tenant)
        .set("pool.pool_size", 1)
        .set("pool.isolation", "strict")
        .start()
        .await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.make_on_server().await;
    a.run("SET statement_timeout = '30s'").await;
    a.ask(&[say::parse("s", "SELECT $1::int"), say::sync()].concat()).await.ok();
    for n in ["1", "2", "3"] {
        relay.take_turns();
        let batch = [say::bind("", "s", &[Some(n)]), say::execute("", 0), say::sync()].concat();
        assert_eq!(a.ask(&batch).await.ok().value(), n);
        assert_eq!(a.value("SHOW statement_timeout").await, "30s");
        assert_eq!(b.value("SELECT count(*) FROM on_server").await, "0", "nothing of a's is left");
        assert_eq!(b.value("SHOW statement_timeout").await, "0");
        let turns = turns(&relay);
        let uses: Vec<_> = turns.iter().filter(|t| !is_a_question_of_ours(t)).collect();
        assert_eq!(uses.len(), 4, "one round trip each: {turns:?}");
        assert!(uses.iter().all(|t| t.contains("DISCARD ALL")), "{turns:?}");
    }
}

#[tokio::test]
async fn what_a_sequence_gave_is_told_in_its_transaction_and_refused_outside() {
    let (tenant, proxy) = two_servers().await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.run("CREATE TABLE t (id serial, n int)").await;
    for _ in 0..3 {
        a.run("BEGIN").await;
        a.run("INSERT INTO t (n) VALUES (1)").await;
        let id = a.value("SELECT lastval()").await;
        assert_eq!(a.value("SELECT currval('t_id_seq')").await, id);
        a.run("COMMIT").await;
        assert_eq!(
            a.value("INSERT INTO t (n) VALUES (1) RETURNING id").await,
            (id.parse::<i64>().unwrap() + 1).to_string()
        );
        for sql in ["SELECT lastval()", "SELECT currval('t_id_seq')"] {
            for client in [&mut a, &mut b] {
                let fault = client.query(sql).await.error("0A000");
                assert!(fault.hint.contains("RETURNING"), "{fault:?}");
                client.ask(&[say::unnamed(sql, &[]), say::sync()].concat()).await.error("0A000");
                client.ask(&[say::parse("", sql), say::describe_statement(""), say::sync()].concat()).await.ok();
            }
        }
        b.run("BEGIN").await;
        // Nothing of a's, whichever connection it is.
        b.query("SELECT lastval()").await.error("55000");
        b.run("ROLLBACK").await;
        assert_eq!(b.value("SELECT nextval('t_id_seq') = currval('t_id_seq')").await, "t");
    }
}

#[tokio::test]
async fn a_column_default_that_asks_a_sequence_never_finds_an_earlier_transactions_number() {
    let tenant = cluster().tenant("state").await;
    let mut direct = cluster().direct(&tenant).login().await;
    direct.run("CREATE SEQUENCE s").await;
    direct.run("CREATE TABLE t (n bigint DEFAULT currval('s'))").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    for client in [&mut a, &mut b] {
        client.run("SELECT nextval('s')").await;
        client.query("INSERT INTO t DEFAULT VALUES").await.error("55000");
    }
    a.query("INSERT INTO t DEFAULT VALUES").await.error("55000");
    a.run("BEGIN").await;
    let own = a.value("SELECT nextval('s')").await;
    a.run("INSERT INTO t DEFAULT VALUES").await;
    a.run("COMMIT").await;
    assert_eq!(a.value("SELECT string_agg(n::text, ' ') FROM t").await, own);
}

#[tokio::test]
async fn a_column_default_that_a_client_makes_finds_no_earlier_transactions_number_from_the_start() {
    for made in ["CREATE TABLE t (n bigint DEFAULT currval('s'))", "ALTER TABLE u ALTER n SET DEFAULT currval('s')"] {
        let tenant = cluster().tenant("state").await;
        let mut direct = cluster().direct(&tenant).login().await;
        direct.run("CREATE SEQUENCE s; CREATE TABLE u (n bigint)").await;
        let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 1).start().await;
        let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
        b.run("SELECT nextval('s')").await;
        a.run(made).await;
        let table = if made.starts_with("CREATE") { "t" } else { "u" };
        for client in [&mut a, &mut b] {
            client.query(&format!("INSERT INTO {table} DEFAULT VALUES")).await.error("55000");
        }
    }
}

#[tokio::test]
async fn a_seed_stays_with_its_client_and_ends_with_it() {
    let tenant = cluster().tenant("state").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 2).start().await;
    let mut direct = cluster().direct(&tenant).login().await;
    direct.run("SELECT setseed(0.5)").await;
    let sequence = [
        direct.value("SELECT random()").await,
        direct.value("SELECT random()").await,
        direct.value("SELECT random()").await,
    ];
    for seed in ["SELECT setseed(0.5)", "SET seed = 0.5"] {
        let mut seeded = proxy.connect(&tenant).login().await;
        seeded.run(seed).await;
        for wanted in &sequence {
            let mut other = proxy.connect(&tenant).login().await;
            assert!(!sequence.contains(&other.value("SELECT random()").await));
            assert_eq!(&seeded.value("SELECT random()").await, wanted);
            other.leave().await;
        }
        seeded.run(seed).await;
        seeded.leave().await;
        let mut others = Vec::new();
        for _ in 0..2 {
            let mut other = proxy.connect(&tenant).login().await;
            other.run("BEGIN").await;
            assert!(!sequence.contains(&other.value("SELECT random()").await), "on its connection");
            others.push(other);
        }
    }
}

/// What leaves something behind, and what it leaves: made directly, used by one client, looked for by another.
struct Leaves {
    made: &'static [&'static str],
    used: &'static str,
    look: &'static str,
    left: &'static str,
    clean: &'static str,
}

const WORK_MEM: (&str, &str, &str) = ("SHOW work_mem", "7MB", "4MB");
const CUSTOM: (&str, &str, &str) =
    ("SELECT coalesce(nullif(current_setting('app.usr', true), ''), 'none')", "alice", "none");
const LOCKS: (&str, &str, &str) =
    ("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()", "1", "0");
const SCRATCH: (&str, &str, &str) = ("SELECT (to_regclass('scratch') IS NOT NULL)::text", "true", "false");

const fn leaves(
    made: &'static [&'static str],
    used: &'static str,
    what: (&'static str, &'static str, &'static str),
) -> Leaves {
    Leaves { made, used, look: what.0, left: what.1, clean: what.2 }
}

/// As a body of PL/pgSQL that is called.
macro_rules! body {
    ($body:literal) => {
        &[concat!(
            "CREATE FUNCTION f(a text DEFAULT '', b text DEFAULT '') RETURNS void LANGUAGE plpgsql AS $f$ BEGIN ",
            $body,
            " END $f$"
        )]
    };
}

static READ_IN_THE_CATALOG: [Leaves; 26] = [
    leaves(&["CREATE VIEW v AS SELECT set_config('work_mem', '7MB', false) AS n"], "SELECT * FROM v", WORK_MEM),
    leaves(
        &[
            "CREATE TABLE j (id int)",
            "INSERT INTO j VALUES (1)",
            "CREATE VIEW v AS SELECT id FROM j WHERE pg_try_advisory_lock(id)",
        ],
        "SELECT * FROM v",
        LOCKS,
    ),
    leaves(
        &["CREATE TABLE d (n int, a text DEFAULT set_config('work_mem', '7MB', false))"],
        "INSERT INTO d (n) VALUES (1)",
        WORK_MEM,
    ),
    leaves(
        &[
            "CREATE TABLE p (id int)",
            "INSERT INTO p VALUES (1)",
            "ALTER TABLE p ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            "CREATE POLICY p ON p USING (pg_try_advisory_lock(id))",
        ],
        "SELECT * FROM p",
        LOCKS,
    ),
    leaves(&["CREATE DOMAIN dom AS int CHECK (pg_try_advisory_lock(value))"], "SELECT 1::dom", LOCKS),
    leaves(
        &[
            "CREATE TABLE r (n int)",
            "CREATE RULE r AS ON INSERT TO r DO ALSO SELECT set_config('work_mem', '7MB', false)",
        ],
        "INSERT INTO r VALUES (1)",
        WORK_MEM,
    ),
    leaves(
        &["CREATE OPERATOR ### (LEFTARG = int, RIGHTARG = int, FUNCTION = pg_try_advisory_lock)"],
        "SELECT 1 ### 2",
        LOCKS,
    ),
    leaves(
        &[
            "CREATE FUNCTION f() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT set_config('work_mem', '7MB', false); END",
        ],
        "SELECT f()",
        WORK_MEM,
    ),
    leaves(body!("SET/**/work_mem = '7MB';"), "SELECT f()", WORK_MEM),
    leaves(body!("PERFORM set_config('work_mem', '7MB' /* , true) */, false);"), "SELECT f()", WORK_MEM),
    leaves(
        body!("PERFORM set_config('work_mem', '7MB', false); PERFORM set_config('a.b', ', true)', true);"),
        "SELECT f()",
        WORK_MEM,
    ),
    leaves(body!("UPDATE pg_settings SET setting = '7168' WHERE name = 'work_mem';"), "SELECT f()", WORK_MEM),
    leaves(body!("EXECUTE(a);"), "SELECT f('SET work_mem = ''7MB''')", WORK_MEM),
    leaves(body!("EXECUTE format('%s', a);"), "SELECT f('SET work_mem = ''7MB''')", WORK_MEM),
    leaves(body!("EXECUTE '' || a;"), "SELECT f('SET work_mem = ''7MB''')", WORK_MEM),
    leaves(body!("EXECUTE E'\\n\\tSET work_mem = ''7MB''';"), "SELECT f()", WORK_MEM),
    leaves(body!("EXECUTE 'SET' || ' ' || a;"), "SELECT f('work_mem = ''7MB''')", WORK_MEM),
    leaves(body!("EXECUTE format('CREATE %s TABLE scratch (n int)', a);"), "SELECT f('TEMP')", SCRATCH),
    leaves(body!("CREATE/**/TEMP/**/TABLE scratch (n int);"), "SELECT f()", SCRATCH),
    leaves(
        &[
            "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql SET search_path = pg_temp AS $$ BEGIN CREATE TABLE scratch (n int); END $$",
        ],
        "SELECT f()",
        SCRATCH,
    ),
    leaves(body!("PERFORM set_config('app.' || a, b, false);"), "SELECT f('usr', 'alice')", CUSTOM),
    leaves(body!("EXECUTE format('SET app.%I = %L', a, b);"), "SELECT f('usr', 'alice')", CUSTOM),
    leaves(body!("EXECUTE 'SET app.' || a || ' = ' || b;"), "SELECT f('usr', 'alice')", CUSTOM),
    leaves(body!("SET \"app\".\"usr\" = 'alice';"), "SELECT f()", CUSTOM),
    leaves(
        body!("PERFORM query_to_xml(a, true, true, '');"),
        "SELECT f('SELECT set_config(''work_mem'', ''7MB'', false)')",
        WORK_MEM,
    ),
    leaves(
        &[
            "CREATE FUNCTION mk(b text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'CREATE OR REPLACE FUNCTION g() RETURNS text LANGUAGE sql AS ' || quote_literal(b); END $$",
        ],
        "SELECT mk('SELECT set_config(''work_mem'', ''7MB'', false)'); SELECT g()",
        WORK_MEM,
    ),
];

#[tokio::test]
async fn what_the_catalog_holds_leaves_nothing_to_others_however_it_is_written() {
    let mut all = tokio::task::JoinSet::new();
    for kind in &READ_IN_THE_CATALOG {
        all.spawn(leaves_nothing_to_others(kind));
    }
    let failed: Vec<_> = all.join_all().await.into_iter().flatten().collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// What went wrong, if anything did.
async fn leaves_nothing_to_others(kind: &'static Leaves) -> Option<String> {
    let (tenant, proxy) = two_servers().await;
    let mut owner = cluster().direct(&tenant).login().await;
    for sql in kind.made {
        owner.run(sql).await;
    }
    let before = owner.value(kind.look).await;
    owner.run(kind.used).await;
    let after = owner.value(kind.look).await;
    owner.leave().await;
    if (before.as_str(), after.as_str()) != (kind.clean, kind.left) {
        return Some(format!("directly {before} and {after}: {:?}", kind.made));
    }
    let mut client = proxy.connect(&tenant).login().await;
    let mut other = proxy.connect(&tenant).login().await;
    for _ in 0..3 {
        client.run(kind.used).await;
        let seen = other.value(kind.look).await;
        if seen != kind.clean {
            return Some(format!("another client sees {seen}: {:?}", kind.made));
        }
        let _ = client.query("DROP TABLE IF EXISTS pg_temp.scratch").await;
    }
    None
}

/// What applications' triggers and functions are mostly like.
const HARMLESS: [&str; 9] = [
    r#"BEGIN UPDATE "t" SET "updated_at" = now(), "n" = 1 WHERE id = NEW.id; RETURN NEW; END"#,
    "BEGIN /* it is set here */ NEW.updated_at = now(); -- and execute nothing\n RETURN NEW; END",
    "BEGIN EXECUTE format('INSERT INTO %I (a) VALUES ($1)', TG_TABLE_NAME || '_log') USING OLD.id; RETURN OLD; END",
    "BEGIN EXECUTE 'UPDATE ' || quote_ident(TG_TABLE_NAME) || ' SET n = n + 1'; RETURN NEW; END",
    "DECLARE v text; BEGIN EXECUTE 'SELECT ($1).' || quote_ident('id') || '::text' INTO v USING NEW; RETURN NEW; END",
    "BEGIN RAISE EXCEPTION 'cannot execute this, set it first'; END",
    "DECLARE r record; BEGIN FOR r IN EXECUTE format('SELECT count(*) AS n FROM %I', TG_TABLE_NAME) LOOP NULL; END LOOP; RETURN NEW; END",
    "BEGIN PERFORM set_config('app.user', '1', true); SET LOCAL work_mem = '1MB'; RETURN NEW; END",
    "BEGIN INSERT INTO t (n) VALUES (1) ON CONFLICT (id) DO UPDATE SET n = 2; RETURN NEW; END",
];

#[tokio::test]
async fn ordinary_functions_cost_nothing() {
    let tenant = cluster().tenant("state").await;
    let mut owner = cluster().direct(&tenant).login().await;
    for (n, body) in HARMLESS.iter().enumerate() {
        owner
            .run(&format!(
                "CREATE FUNCTION f{n}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER \
                 SET search_path = pg_catalog, pg_temp AS $f$ {body} $f$"
            ))
            .await;
    }
    owner.run("CREATE VIEW v AS SELECT count(*) FROM pg_class; CREATE TABLE t (id serial CHECK (id > 0), n int DEFAULT 1)").await;
    owner.leave().await;
    let relay = Relay::start(cluster().address()).await;
    let proxy = ProxyBuilder::to(relay.address()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT 1").await;
    relay.take_turns();
    client.run("SELECT * FROM v").await;
    client.run("INSERT INTO t DEFAULT VALUES").await;
    let turns = turns(&relay);
    assert!(!turns.iter().any(|turn| is_a_question_of_ours(turn)), "{turns:?}");
}

#[tokio::test]
async fn a_statement_that_hides_what_it_sets_leaves_nothing_to_others() {
    for (sql, what) in [
        ("UPDATE pg_settings SET setting = '7168' WHERE name = 'work_mem'", WORK_MEM),
        ("SELECT set_config('app.' || 'usr', 'alice', false)", CUSTOM),
        ("SELECT U&\"set\\005fconfig\"('app.usr', 'alice', false)", CUSTOM),
        ("SET search_path = pg_temp, public; CREATE TABLE scratch (n int)", SCRATCH),
        (
            "DO $$ DECLARE q text; BEGIN FOR q IN SELECT 'S' || 'ET app.usr = ''alice''' LOOP EXECUTE q; END LOOP; END $$",
            CUSTOM,
        ),
    ] {
        let (tenant, proxy) = two_servers().await;
        let mut client = proxy.connect(&tenant).login().await;
        client.run(sql).await;
        let mut other = proxy.connect(&tenant).login().await;
        for _ in 0..3 {
            assert_eq!(other.value(what.0).await, what.2, "leaked: {sql}");
            assert_eq!(client.value(what.0).await, what.1, "lost: {sql}");
        }
    }
    let (tenant, proxy) = two_servers().await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SET search_path = pg_temp, public").await;
    client.run("CREATE TABLE scratch (n int)").await;
    others_see(&proxy, &tenant, SCRATCH.0, "false").await;
    assert_eq!(client.value(SCRATCH.0).await, "true");
}

#[tokio::test]
async fn what_another_role_makes_is_known_before_it_leaves_anything() {
    let tenant = cluster().tenant("state").await;
    let migrations = cluster().role(&tenant, "migrations").await;
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&tenant)
        .role(&tenant.name, &migrations.role, Some(&migrations.password))
        .set("pool.pool_size", 2)
        .start()
        .await;
    let mut client = proxy.connect(&tenant).login().await;
    let mut maker = proxy.connect(&migrations).login().await;
    for n in 0..3 {
        client.run("SELECT 1").await;
        let body = "SELECT set_config('work_mem', '7MB', false)";
        maker.run(&format!("CREATE FUNCTION public.f{n}() RETURNS text LANGUAGE sql AS $$ {body} $$")).await;
        client.run(&format!("SELECT f{n}()")).await;
        others_see(&proxy, &tenant, "SHOW work_mem", "4MB").await;
        maker.run(&format!("DROP FUNCTION public.f{n}()")).await;
    }
}

#[tokio::test]
async fn functions_are_read_whatever_a_backslash_means_to_the_role() {
    let (tenant, proxy) = two_servers().await;
    functions(&tenant).await;
    cluster().sql(&format!("ALTER ROLE {} SET standard_conforming_strings = off", tenant.role)).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT plan()").await;
    others_see(&proxy, &tenant, "SHOW work_mem", "4MB").await;
    assert_eq!(client.value("SHOW work_mem").await, "7MB");
}

#[tokio::test]
async fn a_reading_that_postgresql_refuses_is_not_believed() {
    let (tenant, proxy) = two_servers().await;
    functions(&tenant).await;
    cluster().sql_in(&tenant.name, "REVOKE SELECT ON pg_catalog.pg_proc FROM PUBLIC").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT plan()").await;
    assert_eq!(proxy.connect(&tenant).login().await.value("SHOW work_mem").await, "4MB");
    assert_eq!(client.value("SHOW work_mem").await, "7MB");
}

#[tokio::test]
async fn a_seed_set_in_a_function_tells_nobody_else_what_random_gives() {
    let (tenant, proxy) = two_servers().await;
    let mut owner = cluster().direct(&tenant).login().await;
    owner.run("CREATE FUNCTION f() RETURNS float8 LANGUAGE plpgsql AS $$ BEGIN PERFORM setseed(0.5); RETURN random(); END $$").await;
    let first = owner.value("SELECT f()").await;
    let second = owner.value("SELECT random()").await;
    owner.leave().await;
    let mut client = proxy.connect(&tenant).login().await;
    for _ in 0..2 {
        assert_eq!(client.value("SELECT f()").await, first);
    }
    let mut other = proxy.connect(&tenant).login().await;
    for _ in 0..2 {
        assert_ne!(other.value("SELECT random()").await, second);
    }
}

#[tokio::test]
async fn who_drops_the_shared_statements_costs_nobody_else_an_error_for_long() {
    for sql in ["SELECT drop_them()", "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"] {
        let tenant = cluster().tenant("state").await;
        let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 1).start().await;
        let mut owner = cluster().direct(&tenant).login().await;
        owner.run("CREATE FUNCTION drop_them() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$").await;
        owner.leave().await;
        let mut client = proxy.connect(&tenant).login().await;
        client.ask(&[say::parse("s", "SELECT 1"), say::sync()].concat()).await.ok();
        let described = [say::bind("", "s", &[]), say::describe_portal(""), say::execute("", 0), say::sync()].concat();
        assert_eq!(client.ask(&described).await.ok().value(), "1");
        let mut other = proxy.connect(&tenant).login().await;
        other.run(sql).await;
        other.leave().await;
        assert_eq!(client.ask(&described).await.ok().value(), "1", "{sql}");
    }
}
