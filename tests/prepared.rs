//! Protocol-level prepared statements in transaction mode: names are the client's own, whatever server connection answers.

use tenantry_testkit::{Client, Proxy, ProxyBuilder, Tenant, cluster, one_server, oracle, say};

async fn started(set: impl FnOnce(ProxyBuilder) -> ProxyBuilder) -> (Tenant, Proxy) {
    let tenant = cluster().tenant("prepared").await;
    let proxy = set(ProxyBuilder::new(cluster()).tenant(&tenant)).start().await;
    (tenant, proxy)
}

async fn pool(size: i64, statements: i64) -> (Tenant, Proxy) {
    started(|builder| builder.set("pool.pool_size", size).set("pool.max_prepared_statements", statements)).await
}

/// Each transaction meets the other one of two server connections.
fn in_turn(builder: ProxyBuilder) -> ProxyBuilder {
    builder.set("pool.pool_size", 2).set("pool.min_pool_size", 2).set("pool.server_round_robin", true)
}

async fn two_in_turn() -> (Tenant, Proxy) {
    started(in_turn).await
}

async fn prepare(client: &mut Client, name: &str, sql: &str) {
    client.ask(&[say::parse(name, sql), say::sync()].concat()).await.ok();
}

async fn run(client: &mut Client, name: &str, values: &[Option<&str>]) -> String {
    client.ask(&[say::bind("", name, values), say::execute("", 0), say::sync()].concat()).await.ok().value()
}

#[tokio::test]
async fn names_count_as_far_as_postgresql_knows_them() {
    let (tenant, proxy) = two_in_turn().await;
    let long = |end: &str| format!("{}{end}", "n".repeat(63));
    let bound = |name: &str| oracle::ask([say::bind("", name, &[]), say::execute("", 0), say::sync()].concat());
    let steps = [
        oracle::ask([say::parse(&long("one"), "SELECT 1"), say::sync()].concat()),
        // Taken.
        oracle::ask([say::parse(&long("two"), "SELECT 2"), say::sync()].concat()),
        bound(&long("three")),
        bound(&long("")),
        oracle::ask([say::describe_statement(&long("x")), say::sync()].concat()),
        oracle::ask([say::close_statement(&long("four")), say::sync()].concat()),
        bound(&long("one")),
        bound(&"n".repeat(62)),
    ]
    .concat();
    oracle::same(cluster(), &proxy, &tenant, &steps).await;
}

#[tokio::test]
async fn a_large_unnamed_statement_that_was_skipped_takes_nothing_along() {
    let (tenant, proxy) = two_in_turn().await;
    let large = format!("SELECT 2 -- {}", "x".repeat(200_000));
    let run = [say::bind("", "", &[]), say::execute("", 0), say::sync()].concat();
    let steps = [
        oracle::ask([say::parse("", "SELECT 1"), say::sync()].concat()),
        oracle::ask([say::bind("", "nothing", &[]), say::parse("", &large), say::sync()].concat()),
        oracle::ask(run),
    ]
    .concat();
    oracle::same(cluster(), &proxy, &tenant, &steps).await;
}

#[tokio::test]
async fn the_same_name_means_each_clients_own_statement() {
    let (tenant, proxy) = pool(1, 200).await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    prepare(&mut a, "s", "SELECT 'a'").await;
    prepare(&mut b, "s", "SELECT 'b'").await;
    for _ in 0..5 {
        assert_eq!(run(&mut a, "s", &[]).await, "a");
        assert_eq!(run(&mut b, "s", &[]).await, "b");
    }
}

#[tokio::test]
async fn the_unnamed_statement_is_each_clients_own() {
    let (tenant, proxy) = pool(1, 200).await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    prepare(&mut a, "", "SELECT 'a' || $1::text").await;
    prepare(&mut b, "", "SELECT 'b'").await;
    assert_eq!(run(&mut a, "", &[Some("!")]).await, "a!");
    assert_eq!(run(&mut b, "", &[]).await, "b");
}

#[tokio::test]
async fn a_statement_follows_its_client_to_other_server_connections() {
    let (tenant, proxy) = pool(3, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    prepare(&mut client, "s", "SELECT pg_backend_pid()").await;
    let mut seen = std::collections::BTreeSet::new();
    let mut holders = Vec::new();
    for _ in 0..3 {
        let backend = run(&mut client, "s", &[]).await;
        assert!(seen.insert(backend), "a connection that is held");
        // Hold the one just used, so that the next transaction goes elsewhere.
        let mut holder = proxy.connect(&tenant).login().await;
        holder.run("BEGIN").await;
        holders.push(holder);
    }
}

#[tokio::test]
async fn more_statements_than_fit_are_evicted_and_come_back() {
    for statements in [1, 2] {
        let (tenant, proxy) = pool(1, statements).await;
        let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
        a.make_on_server().await;
        for n in 0..5 {
            prepare(&mut a, &format!("s{n}"), &format!("SELECT 'a{n}'")).await;
            prepare(&mut b, &format!("s{n}"), &format!("SELECT 'b{n}'")).await;
        }
        for round in 0..3 {
            for n in 0..5 {
                assert_eq!(run(&mut a, &format!("s{n}"), &[]).await, format!("a{n}"), "round {round}");
                assert_eq!(run(&mut b, &format!("s{n}"), &[]).await, format!("b{n}"), "round {round}");
            }
        }
        let count: u32 = a.value("SELECT count(*) FROM on_server").await.parse().expect("a number");
        assert!((1..=statements).contains(&i64::from(count)), "{count} on the server");
    }
}

#[tokio::test]
async fn more_statements_in_one_batch_than_fit() {
    for statements in [1, 2] {
        let (tenant, proxy) = pool(1, statements).await;
        let mut client = proxy.connect(&tenant).login().await;
        let mut batch = Vec::new();
        for n in 0..5 {
            batch.extend(say::parse(&format!("s{n}"), &format!("SELECT {n}")));
        }
        for n in [0, 4, 2, 0, 1, 3, 3, 0] {
            batch.extend([say::bind("", &format!("s{n}"), &[]), say::execute("", 0)].concat());
        }
        batch.extend(say::sync());
        let rows = client.ask(&batch).await.ok().rows();
        let values: Vec<String> = rows.into_iter().map(|row| row[0].clone().expect("a value")).collect();
        assert_eq!(values, ["0", "4", "2", "0", "1", "3", "3", "0"]);
    }
}

#[tokio::test]
async fn an_open_portal_survives_the_eviction_of_its_statement() {
    let (tenant, proxy) = pool(1, 1).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    client
        .ask(
            &[
                say::parse("a", "SELECT generate_series(1, 4)"),
                say::bind("p", "a", &[]),
                say::execute("p", 2),
                say::sync(),
            ]
            .concat(),
        )
        .await
        .ok();
    prepare(&mut client, "b", "SELECT 'b'").await;
    assert_eq!(run(&mut client, "b", &[]).await, "b");
    let rest = client.ask(&[say::execute("p", 0), say::sync()].concat()).await.ok();
    assert_eq!(rest.rows().len(), 2);
    client.run("COMMIT").await;
}

#[tokio::test]
async fn deallocate_all_and_discard_all_forget_the_clients_statements_only() {
    for text in ["DEALLOCATE ALL", "DISCARD ALL"] {
        let (tenant, proxy) = pool(1, 200).await;
        let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
        prepare(&mut a, "s", "SELECT 'a'").await;
        prepare(&mut b, "s", "SELECT 'b'").await;
        a.run(text).await;
        a.ask(&[say::bind("", "s", &[]), say::execute("", 0), say::sync()].concat()).await.error("26000");
        assert_eq!(run(&mut b, "s", &[]).await, "b");
        prepare(&mut a, "s", "SELECT 'again'").await;
        assert_eq!(run(&mut a, "s", &[]).await, "again");
    }
}

#[tokio::test]
async fn vanishing_between_parse_and_sync_leaves_nothing_wrong() {
    let (tenant, proxy) = pool(1, 2).await;
    for n in 0..20 {
        let mut client = proxy.connect(&tenant).login().await;
        let text = if n % 3 == 0 { "SELEC" } else { "SELECT 'vanished'" };
        client.send(&[say::parse("s", text), say::flush()].concat()).await;
        if n % 2 == 0 {
            client.next().await;
        }
        client.vanish();
        let mut next = proxy.connect(&tenant).login().await;
        prepare(&mut next, "s", "SELECT 'next'").await;
        assert_eq!(run(&mut next, "s", &[]).await, "next");
    }
}

#[tokio::test]
async fn a_failed_parse_is_tried_again_and_shared_by_nobody() {
    let (tenant, proxy) = pool(1, 200).await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    let parse = [say::parse("s", "SELECT n FROM later"), say::sync()].concat();
    a.ask(&parse).await.error("42P01");
    b.ask(&parse).await.error("42P01");
    a.run("CREATE TABLE later (n int); INSERT INTO later VALUES (7)").await;
    a.ask(&parse).await.ok();
    assert_eq!(run(&mut a, "s", &[]).await, "7");
    b.ask(&parse).await.ok();
    assert_eq!(run(&mut b, "s", &[]).await, "7");
}

#[tokio::test]
async fn a_parse_inside_a_failed_batch_is_not_remembered() {
    let (tenant, proxy) = pool(1, 200).await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.ask(&[say::parse("bad", "SELEC"), say::parse("s", "SELECT 'skipped'"), say::sync()].concat())
        .await
        .error("42601");
    a.ask(&[say::bind("", "s", &[]), say::execute("", 0), say::sync()].concat()).await.error("26000");
    prepare(&mut b, "s", "SELECT 'skipped'").await;
    assert_eq!(run(&mut b, "s", &[]).await, "skipped");
}

#[tokio::test]
async fn the_same_text_with_two_search_paths_is_two_statements() {
    let (tenant, proxy) = pool(1, 200).await;
    let setup = "CREATE SCHEMA one; CREATE SCHEMA two; CREATE TABLE one.t AS SELECT 'one' AS v; CREATE TABLE two.t AS SELECT 'two' AS v";
    cluster().direct(&tenant).login().await.run(setup).await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.run("SET search_path = one").await;
    b.run("SET search_path = two").await;
    prepare(&mut a, "s", "SELECT v FROM t").await;
    prepare(&mut b, "s", "SELECT v FROM t").await;
    for _ in 0..4 {
        assert_eq!(run(&mut a, "s", &[]).await, "one");
        assert_eq!(run(&mut b, "s", &[]).await, "two");
    }
}

#[tokio::test]
async fn the_same_text_with_other_parameter_types_is_another_statement() {
    let (tenant, proxy) = pool(1, 200).await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    a.ask(&[say::parse_typed("s", "SELECT pg_typeof($1)::text", &[23]), say::sync()].concat()).await.ok();
    b.ask(&[say::parse_typed("s", "SELECT pg_typeof($1)::text", &[25]), say::sync()].concat()).await.ok();
    assert_eq!(run(&mut a, "s", &[Some("1")]).await, "integer");
    assert_eq!(run(&mut b, "s", &[Some("1")]).await, "text");
}

#[tokio::test]
async fn a_changed_result_type_is_told_to_who_does_not_ask_for_the_columns() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t AS SELECT 1 AS a").await;
    prepare(&mut client, "s", "SELECT * FROM t").await;
    client.ask(&[say::describe_statement("s"), say::sync()].concat()).await.ok();
    assert_eq!(run(&mut client, "s", &[]).await, "1");
    let mut other = proxy.connect(&tenant).login().await;
    other.run("ALTER TABLE t ADD b int DEFAULT 2").await;
    let execute = [say::bind("", "s", &[]), say::execute("", 0), say::sync()].concat();
    // As on a direct connection, until it prepares the statement anew: it would read two columns as one.
    for _ in 0..3 {
        client.ask(&execute).await.error("0A000");
    }
    client.ask(&[say::close_statement("s"), say::sync()].concat()).await.ok();
    prepare(&mut client, "s", "SELECT * FROM t").await;
    assert_eq!(client.ask(&execute).await.ok().rows()[0].len(), 2);
}

fn described(name: &str) -> Vec<u8> {
    [say::bind("", name, &[]), say::describe_portal(""), say::execute("", 0), say::sync()].concat()
}

#[tokio::test]
async fn a_changed_result_type_heals_outside_a_transaction_for_who_asks_for_the_columns() {
    let (tenant, proxy) = pool(2, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t AS SELECT 1 AS a").await;
    prepare(&mut client, "s", "SELECT * FROM t").await;
    assert_eq!(client.ask(&described("s")).await.ok().rows()[0].len(), 1);
    for (by, columns) in [("through Tenantry", 2), ("around it", 3)] {
        let alter = format!("ALTER TABLE t ADD column_{columns} int");
        if columns == 2 {
            proxy.connect(&tenant).login().await.run(&alter).await;
        } else {
            cluster().direct(&tenant).login().await.run(&alter).await;
        }
        // Each on one of two connections, held meanwhile by nobody or by another.
        for held in [false, true] {
            let mut holder = proxy.connect(&tenant).login().await;
            if held {
                holder.run("BEGIN").await;
            }
            let answer = client.ask(&described("s")).await.ok();
            assert_eq!(answer.tags(), "2TDCZ", "{by}");
            assert_eq!(answer.rows()[0].len(), columns, "{by}");
            if held {
                holder.run("COMMIT").await;
            }
        }
    }
    // Inside a transaction it is told, as directly, and the transaction has failed.
    client.run("BEGIN").await;
    proxy.connect(&tenant).login().await.run("ALTER TABLE t DROP column_2").await;
    client.ask(&described("s")).await.error("0A000");
    client.query("SELECT 1").await.error("25P02");
    client.run("ROLLBACK").await;
    assert_eq!(client.ask(&described("s")).await.ok().rows()[0].len(), 2);
}

#[tokio::test]
async fn who_prepares_a_statement_after_a_table_changed_never_meets_the_old_plan() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut old = proxy.connect(&tenant).login().await;
    old.run("CREATE TABLE t AS SELECT 1 AS a").await;
    prepare(&mut old, "s", "SELECT * FROM t").await;
    assert_eq!(run(&mut old, "s", &[]).await, "1");
    let mut new = proxy.connect(&tenant).login().await;
    new.run("BEGIN; ALTER TABLE t ADD b int").await;
    // On the very connection that has the old one, in one batch, inside a transaction.
    let batch = [say::parse("mine", "SELECT * FROM t"), say::bind("", "mine", &[]), say::execute("", 0), say::sync()];
    assert_eq!(new.ask(&batch.concat()).await.ok().rows()[0].len(), 2);
    new.run("COMMIT").await;
    assert_eq!(
        new.ask(&[say::bind("", "mine", &[]), say::execute("", 0), say::sync()].concat()).await.ok().rows()[0].len(),
        2
    );
}

#[tokio::test]
async fn sql_knows_the_names_of_the_protocol() {
    let (tenant, proxy) = pool(2, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    let mut other = proxy.connect(&tenant).login().await;
    for name in ["s", "A \"b"] {
        let quoted = format!("\"{}\"", name.replace('"', "\"\""));
        for _ in 0..2 {
            client.ask(&[say::parse_typed(name, "SELECT $1::int + 1", &[]), say::sync()].concat()).await.ok();
            for n in 1..4 {
                assert_eq!(client.value(&format!("EXECUTE {quoted}({n})")).await, (n + 1).to_string());
                other.run("BEGIN; SELECT 1; COMMIT").await;
            }
            other.query(&format!("EXECUTE {quoted}(1)")).await.error("26000");
            client.query(&format!("PREPARE {quoted} AS SELECT 1")).await.error("42P05");
            client.run(&format!("DEALLOCATE {quoted}")).await;
            client.query(&format!("DEALLOCATE {quoted}")).await.error("26000");
            client.query(&format!("EXECUTE {quoted}(1)")).await.error("26000");
        }
    }
    // In a failed transaction nothing is taken away; and pipelined, in the extended protocol.
    prepare(&mut client, "s", "SELECT 7").await;
    client.run("BEGIN").await;
    client.query("SELECT 1/0").await.error("22012");
    client.query("EXECUTE s").await.error("25P02");
    client.query("DEALLOCATE s").await.error("25P02");
    client.run("ROLLBACK").await;
    let batch = [say::unnamed("EXECUTE s", &[]), say::unnamed("DEALLOCATE s", &[]), say::sync()].concat();
    assert_eq!(client.ask(&batch).await.ok().value(), "7");
    client.ask(&[say::bind("", "s", &[]), say::sync()].concat()).await.error("26000");
    assert_eq!(other.value("SELECT count(*) FROM pg_prepared_statements WHERE name = 's'").await, "0");
    assert_eq!(client.value("SELECT count(*) FROM pg_prepared_statements WHERE name = 's'").await, "0");
}

const NAMES: &str = "SELECT coalesce(string_agg(format('%s: %s %s', name, statement, parameter_types), ', ' \
    ORDER BY prepare_time), 'none') FROM pg_prepared_statements WHERE NOT from_sql";

/// Asks by each kind of message, a prepared statement of its own (which is one more, as on a direct connection) last.
async fn is_shown(client: &mut Client, names: &str) {
    assert_eq!(client.value(NAMES).await, names);
    let use_it = [say::bind("", "", &[]), say::execute("", 0)].concat();
    for _ in 0..2 {
        let batch = [say::parse("", NAMES), use_it.clone(), use_it.clone(), say::sync()].concat();
        let rows = client.ask(&batch).await.ok().rows();
        assert_eq!(rows, [[Some(names.to_owned())], [Some(names.to_owned())]]);
    }
    let sql = "SELECT string_agg(name, ' ' ORDER BY prepare_time) FROM pg_prepared_statements WHERE name = 'asks'";
    prepare(client, "asks", sql).await;
    assert_eq!(run(client, "asks", &[]).await, "asks");
    client.ask(&[say::close_statement("asks"), say::sync()].concat()).await.ok();
    assert_eq!(client.value(NAMES).await, names);
}

#[tokio::test]
async fn pg_prepared_statements_shows_the_clients_own_and_no_others() {
    for reuse in [false, true] {
        let (tenant, proxy) = started(|b| in_turn(b).set("pool.reuse_unnamed_statements", reuse)).await;
        let mut other = proxy.connect(&tenant).login().await;
        for n in [2, 1, 3] {
            prepare(&mut other, &format!("other{n}"), &format!("SELECT {n}")).await;
        }
        let mut client = proxy.connect(&tenant).login().await;
        is_shown(&mut client, "none").await;
        // The text of "a" was prepared by the other one before that of "b".
        prepare(&mut client, "b", "SELECT $1::text").await;
        prepare(&mut client, "a", "SELECT 1").await;
        let both = "b: SELECT $1::text {text}, a: SELECT 1 {}";
        is_shown(&mut client, both).await;
        assert_eq!(run(&mut client, "b", &[Some("x")]).await, "x");
        client.run("BEGIN").await;
        for _ in 0..2 {
            is_shown(&mut client, both).await;
            assert_eq!(run(&mut client, "a", &[]).await, "1");
        }
        client.ask(&[say::close_statement("a"), say::sync()].concat()).await.ok();
        is_shown(&mut client, "b: SELECT $1::text {text}").await;
        client.query("SELECT 1/0").await.error("22012");
        client.query(NAMES).await.error("25P02");
        let batch = [say::parse("", NAMES), say::bind("", "", &[]), say::execute("", 0), say::sync()].concat();
        client.ask(&batch).await.error("25P02");
        client.run("ROLLBACK").await;
        assert_eq!(run(&mut client, "b", &[Some("y")]).await, "y");
        // A statement that failed in the same batch is not there.
        client
            .ask(&[say::parse("c", "SELECT"), say::parse("d", "nonsense"), say::sync()].concat())
            .await
            .error("42601");
        is_shown(&mut client, "b: SELECT $1::text {text}, c: SELECT {}").await;
        client.run("DEALLOCATE b; DEALLOCATE c").await;
        is_shown(&mut client, "none").await;
        client.run("PREPARE a AS SELECT 2").await;
        assert_eq!(client.value("SELECT string_agg(name, ' ') FROM pg_prepared_statements").await, "a");
        client.run("DEALLOCATE a").await;
        for n in 1..4 {
            assert_eq!(run(&mut other, &format!("other{n}"), &[]).await, n.to_string());
        }
        assert_eq!(
            other.value("SELECT string_agg(name, ' ' ORDER BY prepare_time) FROM pg_prepared_statements").await,
            "other2 other1 other3"
        );
    }
}

fn use_once(name: &str) -> Vec<u8> {
    [say::bind("", name, &[]), say::execute("", 0)].concat()
}

/// Names that the server connection has and that are not ours.
const FOREIGN: &str = "SELECT count(*) FROM on_server WHERE name NOT LIKE 'tenantry%'";

#[tokio::test]
async fn a_name_stays_on_no_connection_because_its_close_was_skipped() {
    let asks = "SELECT count(*)::text FROM pg_prepared_statements";
    let (bad, sync) = (say::parse("", "selec"), say::sync());
    let (tenant, proxy) = pool(1, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.make_on_server().await;
    let mut other = proxy.connect(&tenant).login().await;
    // Names of the protocol, shown to the client.
    prepare(&mut client, "a", "SELECT 1").await;
    prepare(&mut client, "q", asks).await;
    let batch = [use_once("q"), say::close_statement("a"), bad.clone(), use_once("q"), sync.clone()].concat();
    client.ask(&batch).await.error("42601");
    assert_eq!(other.value(FOREIGN).await, "0");
    client.ask(&[use_once("a"), sync.clone()].concat()).await.error("26000");
    prepare(&mut client, "a", "SELECT 1").await;
    // One whose place was only kept.
    client.run("BEGIN; SAVEPOINT s").await;
    client.ask(&[say::unnamed("PREPARE a AS SELECT 2", &[]), sync.clone()].concat()).await.error("42P05");
    client.run("ROLLBACK TO s").await;
    client.ask(&[bad.clone(), use_once("q"), sync.clone()].concat()).await.error("42601");
    client.run("ROLLBACK").await;
    assert_eq!(other.value(FOREIGN).await, "0");
    // One that SQL took away, and did not.
    client.run("BEGIN; EXECUTE a; SAVEPOINT s").await;
    client.ask(&[bad.clone(), say::unnamed("DEALLOCATE a", &[]), sync.clone()].concat()).await.error("42601");
    client.run("ROLLBACK TO s").await;
    assert_eq!(client.value("EXECUTE a").await, "1");
    client.run("DEALLOCATE a; ROLLBACK").await;
    assert_eq!(other.value(FOREIGN).await, "0");
    // One that was to make room for another.
    prepare(&mut client, "a", "SELECT 3").await;
    client.run("BEGIN; EXECUTE a; SAVEPOINT s").await;
    client.ask(&[say::close_statement("a"), say::parse("a", "SELECT 4"), sync.clone()].concat()).await.ok();
    client.ask(&[bad, use_once("q"), sync].concat()).await.error("42601");
    client.run("ROLLBACK TO s").await;
    assert_eq!(client.value("EXECUTE a").await, "4");
    client.run("COMMIT").await;
    assert_eq!(other.value(FOREIGN).await, "0");
}

#[tokio::test]
async fn a_query_that_a_statement_of_ours_keeps_from_running_is_answered_behind_an_open_batch_too() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int)").await;
    prepare(&mut client, "s", "SELECT n FROM t").await;
    client.run("DROP TABLE t").await;
    for sql in [NAMES, "EXECUTE s"] {
        client.send(&[say::parse("", "SELECT 1"), say::flush()].concat()).await;
        client.query(sql).await.error("42P01");
        assert_eq!(client.value("SELECT 1").await, "1");
    }
}

#[tokio::test]
async fn a_name_that_is_given_again_in_its_transaction_means_the_new_statement() {
    for reuse in [false, true] {
        let one = |b: ProxyBuilder| b.set("pool.pool_size", 1).set("pool.reuse_unnamed_statements", reuse);
        let (tenant, proxy) = started(one).await;
        let mut client = proxy.connect(&tenant).login().await;
        let asks = |n: u32| format!("SELECT '{n}' FROM pg_prepared_statements WHERE name = 'there'");
        prepare(&mut client, "there", "SELECT 1").await;
        client.run("BEGIN").await;
        for n in 0..3 {
            prepare(&mut client, "q", &asks(n)).await;
            assert_eq!(run(&mut client, "q", &[]).await, n.to_string());
            client.ask(&[say::close_statement("q"), say::sync()].concat()).await.ok();
            prepare(&mut client, "s", &format!("SELECT 's{n}'")).await;
            assert_eq!(client.value("EXECUTE s").await, format!("s{n}"));
            client.ask(&[say::close_statement("s"), say::sync()].concat()).await.ok();
            let unnamed = [say::parse("", &asks(n)), use_once(""), say::sync()].concat();
            assert_eq!(client.ask(&unnamed).await.ok().value(), n.to_string());
            client.run("SELECT 1").await;
        }
        for n in 0..2 {
            client.run("DEALLOCATE ALL").await;
            prepare(&mut client, "there", "SELECT 1").await;
            prepare(&mut client, "q", &asks(n)).await;
            assert_eq!(run(&mut client, "q", &[]).await, n.to_string());
        }
        client.run("COMMIT").await;
    }
}

#[tokio::test]
async fn what_is_taken_away_behind_deallocate_all_is_not_believed_to_be_there() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    let mut other = proxy.connect(&tenant).login().await;
    prepare(&mut other, "s", "SELECT 7").await;
    prepare(&mut client, "q", "SELECT count(*) FROM pg_prepared_statements").await;
    let batch = [say::unnamed("DEALLOCATE ALL", &[]), say::parse("", "selec"), use_once("q"), say::sync()].concat();
    client.ask(&batch).await.error("42601");
    other.run("BEGIN").await;
    assert_eq!(run(&mut other, "s", &[]).await, "7");
}

#[tokio::test]
async fn many_names_of_one_large_text_are_shown_and_run_within_the_memory_of_all_clients() {
    let little = |b: ProxyBuilder| b.set("pool.pool_size", 1).set("listen.max_message_memory", "4MB");
    let (tenant, proxy) = started(little).await;
    let mut client = proxy.connect(&tenant).login().await;
    let large = format!("SELECT '{}'", "x".repeat(60_000));
    for n in 0..100 {
        prepare(&mut client, &format!("s{n}"), &large).await;
    }
    client.query(NAMES).await.error("53200");
    let each: String = (0..100).map(|n| format!("EXECUTE s{n};")).collect();
    client.query(&each).await.error("53200");
    client.run(&"EXECUTE s0;".repeat(100)).await;
    let batch = [say::parse("", NAMES), use_once(""), say::sync()].concat();
    client.ask(&batch).await.error("53200");
    client.run("DEALLOCATE ALL").await;
    assert_eq!(client.value(NAMES).await, "none");
}

/// A new type each time, and a statement that has a parameter of it.
async fn use_new_type(client: &mut Client) {
    client.run("CREATE TYPE mood AS ENUM ('fine')").await;
    prepare(client, "s", "SELECT $1::mood::text").await;
    assert_eq!(run(client, "s", &[Some("fine")]).await, "fine");
    client.ask(&[say::close_statement("s"), say::sync()].concat()).await.ok();
}

#[tokio::test]
async fn a_statement_on_what_was_rolled_back_is_prepared_anew() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    for _ in 0..2 {
        client.run("BEGIN").await;
        use_new_type(&mut client).await;
        client.run("ROLLBACK").await;
    }
    client.run("BEGIN").await;
    for _ in 0..2 {
        client.run("SAVEPOINT a").await;
        use_new_type(&mut client).await;
        client.run("ROLLBACK TO a").await;
    }
    client.run("ROLLBACK").await;
    // A batch that fails, and a client that vanishes.
    let (create, sql) = ("CREATE TYPE mood AS ENUM ('fine')", "SELECT $1::mood::text");
    let batch =
        [say::unnamed(create, &[]), say::parse("t", sql), say::unnamed("SELECT 1/0", &[]), say::sync()].concat();
    client.ask(&batch).await.error("22012");
    client.run("BEGIN").await;
    use_new_type(&mut client).await;
    client.vanish();
    let mut other = proxy.connect(&tenant).login().await;
    other.run("BEGIN").await;
    use_new_type(&mut other).await;
}

#[tokio::test]
async fn closing_and_preparing_again_under_the_same_name() {
    let (tenant, proxy) = pool(1, 2).await;
    let mut client = proxy.connect(&tenant).login().await;
    for n in 0..10 {
        let batch = [
            say::close_statement("s"),
            say::parse("s", &format!("SELECT {n}")),
            say::bind("", "s", &[]),
            say::execute("", 0),
            say::sync(),
        ];
        assert_eq!(client.ask(&batch.concat()).await.ok().value(), n.to_string());
    }
}

#[tokio::test]
async fn names_that_are_taken_or_lent_wait_for_what_the_connection_is_made_fit_with_and_not_for_ever() {
    let tenant = cluster().tenant("prepared").await;
    // Each use of a connection begins with a wipe.
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.isolation", "strict").start().await;
    let mut client = proxy.connect(&tenant).login().await;
    prepare(&mut client, "s", "SELECT 1").await;
    for _ in 0..3 {
        client.ask(&[say::parse("s", "SELECT 2"), say::sync()].concat()).await.error("42P05");
        // One in a batch that has failed is skipped, and waits for nothing.
        let batch = [say::bind("", "none", &[]), say::parse("s", "SELECT 3"), say::sync()];
        client.ask(&batch.concat()).await.error("26000");
        assert_eq!(client.value("EXECUTE s").await, "1");
        assert_eq!(client.value("SELECT 4").await, "4");
    }
    client.run("DEALLOCATE s").await;
    assert_eq!(client.value("SELECT 5").await, "5");
}

#[tokio::test]
async fn an_unnamed_statement_of_before_is_on_no_server_connection_any_more() {
    let (tenant, proxy) = two_in_turn().await;
    let mut client = proxy.connect(&tenant).login().await;
    let unnamed = |sql: &str| [say::parse("", sql), say::sync()].concat();
    let use_it = [say::bind("", "", &[]), say::execute("", 0), say::sync()].concat();
    for _ in 0..2 {
        // On one connection, then on the other; used on the first.
        client.ask(&unnamed("SELECT 'old'")).await.ok();
        client.ask(&unnamed("SELECT 'new'")).await.ok();
        assert_eq!(client.ask(&use_it).await.ok().value(), "new");
        client.ask(&unnamed("SELECT 'old'")).await.ok();
        client.run("SELECT 1").await;
        client.ask(&use_it).await.error("26000");
        client.run("SELECT 1").await;
    }
}

#[tokio::test]
async fn a_portals_columns_are_those_of_the_statement_that_was_bound_to_it_last() {
    let (tenant, proxy) = two_in_turn().await;
    let mut client = proxy.connect(&tenant).login().await;
    prepare(&mut client, "s", "VALUES (1)").await;
    let batch = [
        say::bind("", "s", &[]),
        say::execute("", 0),
        say::parse("", "RESET work_mem"),
        say::bind("", "", &[]),
        say::describe_portal(""),
        say::execute("", 0),
        say::sync(),
    ];
    client.ask(&batch.concat()).await.ok();
    client.run("CREATE TABLE columns_may_change (); ALTER TABLE columns_may_change ADD n int").await;
    for _ in 0..3 {
        assert_eq!(run(&mut client, "s", &[]).await, "1");
    }
}

#[tokio::test]
async fn an_error_inside_a_statements_first_use_elsewhere_reaches_only_its_client() {
    let (tenant, proxy) = pool(2, 200).await;
    let mut a = proxy.connect(&tenant).login().await;
    a.run("CREATE TABLE t AS SELECT 1 AS n").await;
    prepare(&mut a, "s", "SELECT n FROM t").await;
    let mut holder = proxy.connect(&tenant).login().await;
    holder.run("BEGIN; SELECT 1").await;
    a.run("DROP TABLE t").await;
    let answer = a.ask(&[say::bind("", "s", &[]), say::execute("", 0), say::sync()].concat()).await;
    assert_eq!(answer.faults().len(), 1, "{:?}", answer.trace());
    holder.run("COMMIT").await;
    for _ in 0..3 {
        assert_eq!(holder.value("SELECT 'fine'").await, "fine");
        assert_eq!(a.value("SELECT 'fine'").await, "fine");
    }
}

#[tokio::test]
async fn incident_a07_the_answers_of_a_failed_batch_are_not_given_to_the_next_client() {
    let (tenant, proxy) = pool(1, 2).await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    for n in 0..20 {
        let failing = match n % 4 {
            0 => say::query("PREPARE x AS SELECT nothing; EXECUTE x"),
            1 => {
                [say::unnamed("SET work_mem = 'nonsense'", &[]), say::unnamed("SELECT 'a'", &[]), say::sync()].concat()
            }
            2 => [
                say::parse("p", "SELECT 1/0"),
                say::bind("", "p", &[]),
                say::execute("", 0),
                say::bind("", "p", &[]),
                say::sync(),
            ]
            .concat(),
            _ => [say::bind("", "never", &[]), say::execute("", 0), say::sync(), say::query("SELECT 'a'")].concat(),
        };
        let answer = a.ask(&failing).await;
        assert_eq!(answer.faults().len(), 1, "{n}: {:?}", answer.trace());
        b.send(&say::query(&format!("SELECT 'b{n}'"))).await;
        if n % 4 == 3 {
            assert_eq!(a.until_ready().await.value(), "a");
        }
        if n % 4 == 2 {
            a.ask(&[say::close_statement("p"), say::sync()].concat()).await.ok();
        }
        assert_eq!(b.until_ready().await.value(), format!("b{n}"));
    }
}

#[tokio::test]
async fn statements_prepared_right_behind_deallocate_all_stand_for_everybody() {
    let (tenant, proxy) = one_server("prepared").await;
    let mut first = proxy.connect(&tenant).login().await;
    let batch = [
        say::unnamed("DEALLOCATE ALL", &[]),
        say::parse("s2", "SELECT 2"),
        say::bind("", "s2", &[]),
        say::execute("", 0),
        say::sync(),
    ];
    first.ask(&batch.concat()).await.ok();
    let again = [say::bind("", "s2", &[]), say::execute("", 0), say::sync()].concat();
    assert_eq!(first.ask(&again).await.ok().value(), "2");
    for _ in 0..2 {
        let mut other = proxy.connect(&tenant).login().await;
        other.ask(&[say::parse("mine", "SELECT 2"), say::sync()].concat()).await.ok();
        let run = [say::bind("", "mine", &[]), say::execute("", 0), say::sync()].concat();
        assert_eq!(other.ask(&run).await.ok().value(), "2");
    }
}

#[tokio::test]
async fn unnamed_statements_are_shared_where_that_is_wanted() {
    let tenant = cluster().tenant("prepared").await;
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&tenant)
        .set("pool.pool_size", 1)
        .set("pool.reuse_unnamed_statements", true)
        .start()
        .await;
    let ask = |n: &str| [say::unnamed("SELECT $1::int + 1", &[Some(n)]), say::sync()].concat();
    for n in 1..4 {
        let mut client = proxy.connect(&tenant).login().await;
        let answer = client.ask(&ask(&n.to_string())).await.ok();
        assert_eq!((answer.tags().as_str(), answer.value()), ("12DCZ", (n + 1).to_string()));
        // Bound once more without another Parse, until a simple query drops it.
        let again = [say::bind("", "", &[Some("7")]), say::execute("", 0), say::sync()].concat();
        assert_eq!(client.ask(&again).await.ok().value(), "8");
        client.ask(&[say::parse("", "SELECT nonsense from nowhere"), say::sync()].concat()).await.error("42P01");
        client.ask(&again).await.error("26000");
        client.ask(&ask("1")).await.ok();
        client.run("SELECT 1").await;
        client.ask(&again).await.error("26000");
    }
    let saved = proxy.metric("tenantry_prepared_parses_saved_total").await;
    assert!(saved >= 2.0, "{saved}");
}

#[tokio::test]
async fn a_statement_that_cannot_be_looked_at_again_is_one_error_and_the_session_goes_on() {
    let tenant = cluster().tenant("prepared").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 2).start().await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE wide (a int)").await;
    let described = |name, sql| [say::parse(name, sql), say::describe_statement(name), say::sync()].concat();
    client.ask(&described("begin", "BEGIN")).await.ok();
    client.ask(&described("wide", "SELECT * FROM wide")).await.ok();
    // From here on the columns of both are to be asked for once more, where they are put on a connection anew.
    client.run("ALTER TABLE wide RENAME TO gone").await;
    let batch = |name| [say::bind("", name, &[]), say::describe_portal(""), say::execute("", 0), say::sync()].concat();
    client.ask(&batch("wide")).await.error("42P01");
    client.ask(&batch("wide")).await.error("42P01");
    client.run("BEGIN").await;
    client.query("SELECT 1/0").await.error("22012");
    client.ask(&batch("begin")).await.error("25P02");
    client.ask(&described("wide", "SELECT 1")).await.error("25P02");
    client.run("ROLLBACK").await;
    client.run("ALTER TABLE gone RENAME TO wide").await;
    client.ask(&batch("wide")).await.ok();
}

#[tokio::test]
async fn a_name_that_sql_took_away_and_gave_again_is_sqls() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut other = proxy.connect(&tenant).login().await;
    other.make_on_server().await;
    let mut client = proxy.connect(&tenant).login().await;
    prepare(&mut client, "a", "SELECT 1").await;
    client.run("BEGIN; DEALLOCATE a; PREPARE a AS SELECT 2; COMMIT").await;
    assert_eq!(client.value("EXECUTE a").await, "2");
    assert_eq!(client.value("EXECUTE a").await, "2");
    client.ask(&[say::parse("a", "SELECT 3"), say::sync()].concat()).await.error("42P05");
    assert_eq!(client.value("EXECUTE a").await, "2");
    client.run("DEALLOCATE a").await;
    client.query("EXECUTE a").await.error("26000");
    assert_eq!(other.value(FOREIGN).await, "0");
}

#[tokio::test]
async fn a_deallocate_that_was_never_run_takes_nothing_and_leaves_no_name() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut other = proxy.connect(&tenant).login().await;
    other.make_on_server().await;
    let mut client = proxy.connect(&tenant).login().await;
    prepare(&mut client, "a", "SELECT 1").await;
    prepare(&mut client, "d", "DEALLOCATE a").await;
    client.run("BEGIN").await;
    client.ask(&[say::bind("", "d", &[]), say::sync()].concat()).await.ok();
    assert_eq!(client.value("EXECUTE a").await, "1");
    client.ask(&[say::close_statement("a"), say::parse("a", "SELECT 2"), say::sync()].concat()).await.ok();
    assert_eq!(client.value("EXECUTE a").await, "2");
    client.run("ROLLBACK").await;
    assert_eq!(client.value("EXECUTE a").await, "2");
    assert_eq!(other.value(FOREIGN).await, "0");
    client.run("DEALLOCATE a").await;
    client.query("EXECUTE a").await.error("26000");
}

/// A Parse that fails, and behind its Sync what was sent before anybody could know.
fn after_an_error(rest: &[Vec<u8>]) -> Vec<u8> {
    [&[say::parse("", "selec"), rest[0].clone(), say::sync()], &rest[1..]].concat().concat()
}

#[tokio::test]
async fn what_an_error_skips_is_known_before_the_next_batch_is_sent() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut other = proxy.connect(&tenant).login().await;
    other.make_on_server().await;
    prepare(&mut other, "x", "SELECT 11").await;
    let mut client = proxy.connect(&tenant).login().await;
    prepare(&mut client, "c", "SELECT 'mine'").await;
    prepare(&mut client, "a", "SELECT 11").await;
    prepare(&mut client, "q", "SELECT count(*) FROM pg_prepared_statements").await;
    // Names that are put on the connection.
    let again = say::unnamed("EXECUTE c", &[]);
    client.send(&after_an_error(&[say::unnamed("EXECUTE c", &[]), again, say::sync()])).await;
    client.until_ready().await.error("42601");
    client.until_ready().await.ok();
    other.query("EXECUTE c").await.error("26000");
    assert_eq!(other.value(FOREIGN).await, "0");
    // Shared statements that are taken off it.
    client.send(&after_an_error(&[use_once("q"), use_once("a"), say::sync()])).await;
    client.until_ready().await.error("42601");
    client.until_ready().await.ok();
    assert_eq!(run(&mut other, "x", &[]).await, "11");
}

#[tokio::test]
async fn an_eviction_that_an_error_skips_breaks_no_statement() {
    let (tenant, proxy) = pool(1, 3).await;
    let mut client = proxy.connect(&tenant).login().await;
    for n in 0..4 {
        prepare(&mut client, &format!("s{n}"), &format!("SELECT {n}")).await;
    }
    client.send(&after_an_error(&[use_once("s0"), use_once("s1"), say::sync()])).await;
    client.until_ready().await.error("42601");
    client.until_ready().await.ok();
    for n in 0..4 {
        assert_eq!(run(&mut client, &format!("s{n}"), &[]).await, n.to_string());
    }
}

#[tokio::test]
async fn what_execute_runs_sees_nothing_of_another_client_either() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut other = proxy.connect(&tenant).login().await;
    other.run("CREATE SEQUENCE s START 12345").await;
    prepare(&mut other, "o", "SELECT 'text of the other'").await;
    assert_eq!(run(&mut other, "o", &[]).await, "text of the other");
    let mut client = proxy.connect(&tenant).login().await;
    prepare(&mut client, "names", "SELECT string_agg(name, ' ') FROM pg_prepared_statements").await;
    prepare(&mut client, "last", "SELECT lastval()").await;
    other.run("SELECT nextval('s')").await;
    client.query("EXECUTE last").await.error("0A000");
    client.ask(&[say::unnamed("EXECUTE last", &[]), say::sync()].concat()).await.error("0A000");
    assert_eq!(client.value("EXECUTE names").await.split(' ').count(), 2);
    client.run("BEGIN; SAVEPOINT s").await;
    client.query("SELECT 1/0").await.error("22012");
    let names = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'tenantry%'";
    assert_eq!(client.value(&format!("ROLLBACK TO s; {names}")).await, "0");
    assert_eq!(client.value("EXECUTE names").await.split(' ').count(), 2);
}

#[tokio::test]
async fn a_long_text_and_the_data_of_a_copy_pass_behind_an_execute() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int)").await;
    prepare(&mut client, "s", "SELECT length($1::text)").await;
    assert_eq!(client.value(&format!("EXECUTE s('{}')", "x".repeat(3_000_000))).await, "3000000");
    client.send(&say::query("EXECUTE s('x'); COPY t FROM STDIN")).await;
    client.send(&[say::copy_data("31\n"), say::copy_done()].concat()).await;
    client.until_ready().await.ok();
    assert_eq!(client.value("SELECT n FROM t").await, "31");
}

#[tokio::test]
async fn many_statements_of_one_large_text_are_sent_within_the_memory_of_all_clients() {
    let (tenant, proxy) = pool(1, 10).await;
    let mut client = proxy.connect(&tenant).login().await;
    for n in 0..12 {
        let sql = format!("SELECT {n} WHERE '{}' = ''", "x".repeat(1_000_000));
        prepare(&mut client, &format!("s{n}"), &sql).await;
    }
    let batch: Vec<Vec<u8>> = (0..300).map(|n| use_once(&format!("s{}", n % 12))).collect();
    client.ask(&[batch.concat(), say::sync()].concat()).await.ok();
    let peak = proxy.peak_kib();
    assert!(peak < 150 * 1024, "{peak} KiB");
}

#[tokio::test]
async fn a_name_stays_on_no_connection_because_another_was_deallocated() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut other = proxy.connect(&tenant).login().await;
    other.make_on_server().await;
    let mut client = proxy.connect(&tenant).login().await;
    for texts in ["SELECT ';DEALLOCATE a'; DEALLOCATE b", "SELECT E'\\\\';DEALLOCATE a'; DEALLOCATE b"] {
        prepare(&mut client, "a", "SELECT 'mine'").await;
        prepare(&mut client, "b", "SELECT 2").await;
        client.run("BEGIN; SET LOCAL standard_conforming_strings = off").await;
        client.run("EXECUTE a").await;
        let _ = client.query(texts).await;
        client.run("ROLLBACK").await;
        assert_eq!(other.value(FOREIGN).await, "0");
        client.run("DEALLOCATE ALL").await;
    }
}

#[tokio::test]
async fn what_the_unnamed_statement_may_leave_is_that_of_the_one_that_is_run() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut other = proxy.connect(&tenant).login().await;
    let mut client = proxy.connect(&tenant).login().await;
    let none = [say::bind("", "none", &[]), say::execute("", 0)].concat();
    let first = [say::parse("", "SET work_mem = '7MB'"), say::sync()].concat();
    let skipped = [none, say::parse("", "SELECT 1"), say::sync()].concat();
    client.send(&[first, skipped, use_once(""), say::sync()].concat()).await;
    client.until_ready().await.ok();
    client.until_ready().await.error("26000");
    client.until_ready().await.ok();
    assert_eq!(other.value("SHOW work_mem").await, "4MB");
    assert_eq!(client.value("SHOW work_mem").await, "7MB");
}

#[tokio::test]
async fn a_long_execute_that_fails_before_all_of_it_was_sent_is_answered_once() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int)").await;
    prepare(&mut client, "s", "SELECT length($1::text) FROM t").await;
    client.run("DROP TABLE t").await;
    let query = say::query(&format!("EXECUTE s('{}')", "x".repeat(100_000)));
    let (first, rest) = query.split_at(70_000);
    client.send(first).await;
    let told = client.next().await.unwrap();
    assert!(format!("{told:?}").contains("42P01"), "{told:?}");
    client.send(rest).await;
    client.until_ready().await.ok();
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn what_was_lent_and_deallocated_takes_no_memory_any_more() {
    let (tenant, proxy) = started(|b| b.set("pool.pool_size", 1).set("listen.max_message_memory", "4MB")).await;
    let mut client = proxy.connect(&tenant).login().await;
    let large = format!("SELECT length('{}')", "x".repeat(900_000));
    for _ in 0..10 {
        prepare(&mut client, "a", &large).await;
        client.run("BEGIN; EXECUTE a").await;
        client.run("DEALLOCATE a").await;
        client.run("COMMIT").await;
    }
}

#[tokio::test]
async fn a_client_that_closes_its_side_behind_an_execute_is_answered() {
    let (tenant, proxy) = pool(1, 200).await;
    let mut other = proxy.connect(&tenant).login().await;
    let mut client = proxy.connect(&tenant).login().await;
    other.run("CREATE TABLE t (n int)").await;
    prepare(&mut client, "a", "INSERT INTO t VALUES (7)").await;
    other.run("SET work_mem = '7MB'").await;
    client.send(&say::query("EXECUTE a")).await;
    client.half_close().await;
    client.until_end().await;
    assert_eq!(other.value("SELECT n FROM t").await, "7");
}
