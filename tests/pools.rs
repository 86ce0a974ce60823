//! Pools and budgets: who gets a server connection, when, and never more than allowed.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tenantry_testkit::{Client, Proxy, ProxyBuilder, Tenant, cluster, eventually, one_server, say};
use tokio::task::JoinSet;

async fn proxy_with(tenant: &Tenant, settings: &[(&str, toml::Value)]) -> Proxy {
    let start = ProxyBuilder::new(cluster()).tenant(tenant);
    settings.iter().fold(start, |builder, (key, value)| builder.set(key, value.clone())).start().await
}

/// Waits until so many sessions of the tenant hold a server connection that runs or waits in a transaction, by a metric-free sign:
/// what PostgreSQL shows.
async fn busy(tenant: &Tenant, count: usize) {
    eventually(format!("{count} busy sessions"), async || {
        let sessions = cluster().sessions(tenant).await;
        (sessions.iter().filter(|s| s.state != "idle").count() == count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn transaction_mode_lends_for_one_transaction() {
    let (tenant, proxy) = one_server("pools").await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await);
    let backend = a.backend().await;
    assert_eq!(b.backend().await, backend);
    a.run("BEGIN").await;
    b.send(&say::query("SELECT 'b'")).await;
    assert_eq!(a.value("SELECT 'a'").await, "a");
    assert!(b.next_within(Duration::from_millis(50)).await.is_none(), "b was served during a's transaction");
    a.run("COMMIT").await;
    assert_eq!(b.until_ready().await.value(), "b");
}

#[tokio::test]
async fn session_mode_lends_until_the_client_leaves_and_cleans_up() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_mode", "session".into()), ("pool.pool_size", 1.into())]).await;
    let mut a = proxy.connect(&tenant).login().await;
    a.run("SET work_mem = '5MB'").await;
    a.run("CREATE TEMP TABLE mine (n int)").await;
    let mut b = proxy.connect(&tenant).login().await;
    b.send(&say::query("SELECT current_setting('work_mem') || to_regclass('mine')::text IS NULL")).await;
    assert!(b.next_within(Duration::from_millis(50)).await.is_none(), "b was served during a's session");
    assert_eq!(a.value("SHOW work_mem").await, "5MB");
    a.leave().await;
    assert_eq!(b.until_ready().await.value(), "t");
    assert_ne!(b.value("SHOW work_mem").await, "5MB");
}

#[tokio::test]
async fn statement_mode_refuses_transactions_of_several_statements() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_mode", "statement".into()), ("pool.pool_size", 1.into())]).await;
    let mut client = proxy.connect(&tenant).login().await;
    assert_eq!(client.value("SELECT 1").await, "1");
    let answer = client.query("BEGIN").await;
    assert_eq!(answer.faults().len(), 1, "{:?}", answer.trace());
    let mut other = proxy.connect(&tenant).login().await;
    assert_eq!(other.value("SELECT 2").await, "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incident_c02_pool_size_and_cap_are_never_exceeded() {
    let tenants = [cluster().tenant("pools").await, cluster().tenant("pools").await];
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&tenants[0])
        .tenant(&tenants[1])
        .set("pool.pool_size", 4)
        .set("servers.main.cap", 6)
        .start()
        .await;
    let mut clients = JoinSet::new();
    for n in 0..40 {
        let connect = proxy.connect(&tenants[n % 2]);
        clients.spawn(async move {
            for _ in 0..10 {
                let mut client = connect.login().await;
                client.run("BEGIN").await;
                client.run("SELECT pg_sleep(0.005)").await;
                if n % 5 == 0 {
                    client.vanish();
                } else {
                    client.run("COMMIT").await;
                    client.leave().await;
                }
            }
        });
    }
    let admin = cluster().admin("postgres").await;
    let sql = "SELECT datname, count(*) FROM pg_stat_activity WHERE datname IN ($1, $2) GROUP BY datname";
    let mut most = 0;
    while !clients.is_empty() {
        let rows = admin.query(sql, &[&tenants[0].name, &tenants[1].name]).await.expect("sampled");
        let counts: Vec<i64> = rows.iter().map(|row| row.get(1)).collect();
        let sum: i64 = counts.iter().sum();
        most = most.max(sum);
        assert!(counts.iter().all(|n| *n <= 4) && sum <= 6, "{counts:?}");
        while let Some(ended) = clients.try_join_next() {
            ended.expect("a client");
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(most >= 4, "the pools were not used: {most}");
}

#[tokio::test]
async fn a_tenant_that_needs_a_connection_gets_an_idle_one_of_another_tenants_share() {
    let tenants = [cluster().tenant("pools").await, cluster().tenant("pools").await];
    let proxy =
        ProxyBuilder::new(cluster()).tenant(&tenants[0]).tenant(&tenants[1]).set("servers.main.cap", 1).start().await;
    for round in 0..6 {
        let tenant = &tenants[round % 2];
        let mut client = proxy.connect(tenant).login().await;
        assert_eq!(client.value("SELECT current_database()").await, tenant.name);
    }
}

#[tokio::test]
async fn waiters_are_served_in_order() {
    let (tenant, proxy) = one_server("pools").await;
    let mut holder = proxy.connect(&tenant).login().await;
    cluster().direct(&tenant).login().await.run("CREATE SEQUENCE turns").await;
    holder.run("BEGIN").await;
    let mut waiters = Vec::new();
    for _ in 0..10 {
        let mut waiter = proxy.connect(&tenant).login().await;
        waiter.send(&say::query("SELECT nextval('turns')")).await;
        // A round trip of another kind after it: its query has been read when an unknown cancel is closed.
        assert!(waiter.next_within(Duration::from_millis(20)).await.is_none());
        waiters.push(waiter);
    }
    holder.run("COMMIT").await;
    for (n, waiter) in waiters.iter_mut().enumerate() {
        assert_eq!(waiter.until_ready().await.value(), (n + 1).to_string());
    }
}

#[tokio::test]
async fn query_wait_timeout_gives_53300_and_the_client_stays() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_size", 1.into()), ("pool.query_wait_timeout", "200ms".into())]).await;
    let mut holder = proxy.connect(&tenant).login().await;
    holder.run("BEGIN").await;
    let mut waiter = proxy.connect(&tenant).login().await;
    let fault = waiter.query("SELECT 1").await.error("53300");
    let waited = fault.detail.split(' ').find_map(|word| word.strip_prefix("waited_ms=")?.parse::<u64>().ok());
    assert!(waited.is_some_and(|waited| waited >= 200), "{fault:?}");
    assert!(!format!("{fault:?}").contains("127.0.0.1"), "an address in {fault:?}");
    assert!(!fault.hint.is_empty() || !fault.detail.is_empty(), "{fault:?}");
    // Extended, with the rest of the batch skipped.
    waiter
        .ask(&[say::unnamed("SELECT 1", &[]), say::unnamed("SELECT 2", &[]), say::sync()].concat())
        .await
        .error("53300");
    holder.run("COMMIT").await;
    assert_eq!(waiter.value("SELECT 'served'").await, "served");
}

#[tokio::test]
async fn incident_a10_what_was_asked_before_the_timeout_is_not_answered_later() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_size", 1.into()), ("pool.query_wait_timeout", "1s".into())]).await;
    cluster().direct(&tenant).login().await.run("CREATE TABLE t (n int)").await;
    let mut holder = proxy.connect(&tenant).login().await;
    holder.run("BEGIN").await;
    let mut waiter = proxy.connect(&tenant).login().await;
    // The parts of one batch, with the timeout between them.
    waiter
        .send(&[say::parse("s", "INSERT INTO t VALUES (1)"), say::describe_statement("s"), say::flush()].concat())
        .await;
    let first = waiter.until(b'E').await;
    assert_eq!(first.faults()[0].code, "53300");
    waiter.send(&[say::bind("", "s", &[]), say::execute("", 0), say::flush()].concat()).await;
    holder.run("COMMIT").await;
    let rest = waiter.ask(&say::sync()).await;
    assert_eq!(rest.tags(), "Z", "the failed batch went on");
    assert_eq!(waiter.value("SELECT count(*) FROM t").await, "0");
    let answer = waiter.ask(&[say::bind("", "s", &[]), say::execute("", 0), say::sync()].concat()).await;
    answer.error("26000");
}

#[tokio::test]
async fn max_waiters_refuses_the_next_one_with_53300() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_size", 1.into()), ("pool.max_waiters", 2.into())]).await;
    let mut holder = proxy.connect(&tenant).login().await;
    holder.run("BEGIN").await;
    let mut waiters = Vec::new();
    for n in 0..2 {
        let mut waiter = proxy.connect(&tenant).login().await;
        waiter.send(&say::query(&format!("SELECT {n}"))).await;
        assert!(waiter.next_within(Duration::from_millis(50)).await.is_none());
        waiters.push(waiter);
    }
    let mut third = proxy.connect(&tenant).login().await;
    third.query("SELECT 3").await.error("53300");
    holder.run("COMMIT").await;
    for (n, waiter) in waiters.iter_mut().enumerate() {
        assert_eq!(waiter.until_ready().await.value(), n.to_string());
    }
    assert_eq!(third.value("SELECT 3").await, "3");
}

/// Which connections a series of single queries uses, when three are idle.
async fn used(round_robin: bool) -> usize {
    let tenant = cluster().tenant("pools").await;
    let proxy =
        proxy_with(&tenant, &[("pool.pool_size", 3.into()), ("pool.server_round_robin", round_robin.into())]).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = proxy.connect(&tenant).login().await;
        client.run("BEGIN").await;
        clients.push(client);
    }
    for client in &mut clients {
        client.run("COMMIT").await;
    }
    cluster().settled(&tenant, 3).await;
    let mut backends = BTreeSet::new();
    for _ in 0..6 {
        backends.insert(clients[0].backend().await);
    }
    backends.len()
}

#[tokio::test]
async fn server_round_robin_uses_all_and_the_default_uses_the_warm_one() {
    assert_eq!(used(false).await, 1);
    assert_eq!(used(true).await, 3);
}

#[tokio::test]
async fn server_idle_timeout_closes_down_to_min_pool_size() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(
        &tenant,
        &[("pool.pool_size", 4.into()), ("pool.min_pool_size", 1.into()), ("pool.server_idle_timeout", "300ms".into())],
    )
    .await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = proxy.connect(&tenant).login().await;
        client.run("BEGIN").await;
        clients.push(client);
    }
    for client in &mut clients {
        client.run("COMMIT").await;
    }
    cluster().settled(&tenant, 1).await;
    assert_eq!(clients[0].value("SELECT 1").await, "1");
}

#[tokio::test]
async fn min_pool_size_is_filled_before_anybody_asks() {
    let tenant = cluster().tenant("pools").await;
    let _proxy = proxy_with(&tenant, &[("pool.min_pool_size", 3.into())]).await;
    cluster().settled(&tenant, 3).await;
}

#[tokio::test]
async fn server_lifetime_replaces_connections_at_rest() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_size", 1.into()), ("pool.server_lifetime", "500ms".into())]).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let first = client.backend().await;
    client.run("SELECT pg_sleep(0.8)").await;
    assert_eq!(client.backend().await, first, "not during a transaction");
    client.run("COMMIT").await;
    eventually("another server connection", async || {
        let mut other = proxy.connect(&tenant).login().await;
        (other.backend().await != first).then_some(())
    })
    .await;
}

#[tokio::test]
async fn incident_b13_a_cold_pool_fills_without_a_tick() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_size", 10.into()), ("servers.main.max_connecting", 10.into())]).await;
    let mut tasks = JoinSet::new();
    let go = Arc::new(tokio::sync::Semaphore::new(0));
    for _ in 0..10 {
        let (connect, go) = (proxy.connect(&tenant), Arc::clone(&go));
        tasks.spawn(async move {
            let mut client = connect.login().await;
            client.run("BEGIN").await;
            // A permit waits for who comes late; a notification would not.
            go.acquire().await.expect("never closed").forget();
            client.run("COMMIT").await;
        });
    }
    busy(&tenant, 10).await;
    go.add_permits(10);
    tasks.join_all().await;
}

#[tokio::test]
async fn idle_transaction_timeout_is_25p03() {
    let tenant = cluster().tenant("pools").await;
    let proxy =
        proxy_with(&tenant, &[("pool.pool_size", 1.into()), ("pool.idle_transaction_timeout", "200ms".into())]).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    client.until_end().await.fatal("25P03");
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_process_that_stood_still_ends_nobody_who_was_not_late() {
    let tenant = cluster().tenant("pools").await;
    let limits = [("pool.idle_transaction_timeout", "2s"), ("pool.client_idle_timeout", "2s")];
    let proxy = proxy_with(&tenant, &limits.map(|(key, value)| (key, value.into()))).await;
    let mut open = proxy.connect(&tenant).login().await;
    open.run("BEGIN").await;
    let mut idle: Vec<Client> = Vec::new();
    for _ in 0..10 {
        idle.push(proxy.connect(&tenant).login().await);
    }
    proxy.signal("STOP");
    for client in idle.iter_mut().chain([&mut open]) {
        client.send(&say::query("SELECT 1")).await;
    }
    // The pause itself is what is tested: longer than the limits.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    proxy.signal("CONT");
    for client in idle.iter_mut().chain([&mut open]) {
        assert_eq!(client.until_ready().await.ok().value(), "1");
    }
}

#[tokio::test]
async fn transaction_timeout_is_25p04() {
    let tenant = cluster().tenant("pools").await;
    let proxy =
        proxy_with(&tenant, &[("pool.pool_size", 1.into()), ("pool.transaction_timeout", "300ms".into())]).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    client.send(&say::query("SELECT pg_sleep(600)")).await;
    let answer = client.until_end().await;
    assert_eq!(answer.faults().last().map(|f| f.code.clone()).as_deref(), Some("25P04"), "{:?}", answer.trace());
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn client_idle_timeout_is_57p05() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.client_idle_timeout", "200ms".into())]).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.until_end().await.fatal("57P05");
}

#[tokio::test]
async fn query_timeout_cancels_with_57014_and_the_client_stays() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_size", 1.into()), ("pool.query_timeout", "200ms".into())]).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.query("SELECT pg_sleep(600)").await.error("57014");
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_roles_pool_is_its_own() {
    let tenant = cluster().tenant("pools").await;
    let reader = cluster().role(&tenant, "reader").await;
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&tenant)
        .role(&tenant.name, &reader.role, Some(&reader.password))
        .start()
        .await;
    let (mut a, mut b) = (proxy.connect(&tenant).login().await, proxy.connect(&reader).login().await);
    for _ in 0..5 {
        assert_eq!(a.value("SELECT current_user").await, tenant.role);
        assert_eq!(b.value("SELECT current_user").await, reader.role);
    }
}

#[tokio::test]
async fn tenants_that_share_a_database_each_work_in_their_own_schema() {
    let one = cluster().tenant("pools").await;
    let two = Tenant { name: format!("{}_two", one.name), ..cluster().role(&one, "two").await };
    for role in [&one.role, &two.role] {
        cluster().sql_in(&one.name, &format!("CREATE SCHEMA {role} AUTHORIZATION {role}")).await;
        cluster().sql(&format!("ALTER ROLE {role} SET search_path = {role}")).await;
    }
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&one)
        .tenant(&two)
        .set(&format!("tenants.{}.database", two.name), one.name.as_str())
        .set("servers.main.cap", 1)
        .start()
        .await;
    let (mut first, mut second) = (proxy.connect(&one).login().await, proxy.connect(&two).login().await);
    first.run("CREATE TABLE t AS SELECT 'first' AS whose").await;
    second.run("CREATE TABLE t AS SELECT 'second' AS whose").await;
    for _ in 0..5 {
        assert_eq!(first.value("SELECT whose FROM t").await, "first");
        assert_eq!(second.value("SELECT whose FROM t").await, "second");
    }
}

#[tokio::test]
async fn incident_a12_every_checkout_is_in_the_right_database() {
    let tenants = [cluster().tenant("pools").await, cluster().tenant("pools").await, cluster().tenant("pools").await];
    let proxy = tenants
        .iter()
        .fold(ProxyBuilder::new(cluster()), ProxyBuilder::tenant)
        .set("servers.main.cap", 2)
        .start()
        .await;
    for round in 0..30 {
        let tenant = &tenants[round % 3];
        let mut client = proxy.connect(tenant).login().await;
        let place = client.value("SELECT current_database() || '/' || current_user || '/' || session_user").await;
        assert_eq!(place, format!("{}/{}/{}", tenant.name, tenant.role, tenant.role));
    }
}

#[tokio::test]
async fn incident_a06_a_server_still_sending_is_not_lent() {
    let (tenant, proxy) = one_server("pools").await;
    let mut slow = proxy.connect(&tenant).login().await;
    slow.send(&say::query("SELECT repeat('s', 1000) FROM generate_series(1, 20000)")).await;
    let mut other = proxy.connect(&tenant).login().await;
    other.send(&say::query("SELECT 'other'")).await;
    let mut rows = 0;
    for message in slow.until_ready().await.ok().of(b'D') {
        assert!(message.row()[0].as_deref().is_some_and(|v| v.len() == 1000 && v.starts_with('s')));
        rows += 1;
    }
    assert_eq!(rows, 20_000);
    assert_eq!(other.until_ready().await.value(), "other");
}

#[tokio::test]
async fn a_slow_reader_of_a_large_result_takes_bounded_memory() {
    let (tenant, proxy) = one_server("pools").await;
    let mut slow = proxy.connect(&tenant).login().await;
    slow.run("SELECT 1").await;
    let before = proxy.resident_kib();
    slow.send(&say::query("SELECT repeat('s', 1000) FROM generate_series(1, 300000)")).await;
    slow.next().await;
    let mut most = 0;
    for _ in 0..50 {
        most = most.max(proxy.resident_kib().saturating_sub(before));
        slow.next().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(most < 16 * 1024, "{most} KiB more");
    slow.vanish();
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incident_a01_a_batch_in_parts_under_overload_gives_nobody_foreign_rows() {
    let tenant = cluster().tenant("pools").await;
    let proxy = proxy_with(&tenant, &[("pool.pool_size", 1.into()), ("pool.query_wait_timeout", "30ms".into())]).await;
    // The first login of a pool dials, which may take longer than this wait.
    eventually("the first login", async || proxy.connect(&tenant).try_login().await.ok()).await;
    let mut clients = JoinSet::new();
    for id in 0..12 {
        let mut client = proxy.connect(&tenant).login().await;
        clients.spawn(async move {
            let mut served = 0;
            for n in 0..40 {
                let text = format!("SELECT '{id}-{n}' FROM pg_sleep(0.002)");
                let name = format!("s{n}");
                // As Sequelize sends it: the parts in separate writes, each waited for.
                client.send(&[say::parse(&name, &text), say::describe_statement(&name), say::flush()].concat()).await;
                let mut failed = false;
                for _ in 0..3 {
                    let message = client.next().await.expect("the session goes on");
                    if message.tag == b'E' {
                        assert_eq!(message.fault().code, "53300");
                        failed = true;
                        break;
                    }
                }
                client.send(&[say::bind("", &name, &[]), say::execute("", 0), say::flush()].concat()).await;
                let rest = client.ask(&say::sync()).await;
                if failed {
                    assert_eq!(rest.tags(), "Z", "{:?}", rest.trace());
                } else {
                    assert_eq!(rest.ok().value(), format!("{id}-{n}"));
                    served += 1;
                }
            }
            served
        });
    }
    let served: i32 = clients.join_all().await.into_iter().sum();
    assert!(served > 0, "nobody was served");
}
