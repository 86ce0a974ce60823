//! Clients that go without a word (C2–C6): nothing partial stays on a server, and the one server connection serves the next client.

use tenantry_testkit::{Client, Proxy, Tenant, cluster, eventually, one_server, say};

/// After a client vanished: the next one is served, and nothing is left running or open on the server.
async fn recovered(proxy: &Proxy, tenant: &Tenant, what: &str) {
    let mut next = proxy.connect(tenant).login().await;
    assert_eq!(next.value("SELECT 'next'").await, "next", "{what}");
    next.leave().await;
    let sessions = cluster().at_rest(tenant).await;
    assert!(sessions.len() <= 1, "{what}: {sessions:?}");
}

#[tokio::test]
async fn incident_b02_vanishing_at_every_byte_of_a_batch() {
    let (tenant, proxy) = one_server("vanish").await;
    let batch =
        [say::parse("", "SELECT $1::int"), say::bind("", "", &[Some("1")]), say::execute("", 0), say::sync()].concat();
    for cut in 0..=batch.len() {
        let mut client = proxy.connect(&tenant).login().await;
        client.send(&batch[..cut]).await;
        client.vanish();
        if cut % 7 == 0 || cut == batch.len() {
            recovered(&proxy, &tenant, &format!("cut at {cut}")).await;
        }
    }
    recovered(&proxy, &tenant, "all cuts").await;
}

#[tokio::test]
async fn vanishing_at_every_byte_of_a_named_batch_inside_a_transaction() {
    let (tenant, proxy) = one_server("vanish").await;
    cluster().direct(&tenant).login().await.run("CREATE TABLE t (n int)").await;
    let batch = [
        say::parse("s", "INSERT INTO t VALUES ($1)"),
        say::bind("", "s", &[Some("1")]),
        say::execute("", 0),
        say::sync(),
    ]
    .concat();
    for cut in (0..=batch.len()).step_by(3) {
        let mut client = proxy.connect(&tenant).login().await;
        client.run("BEGIN").await;
        client.send(&batch[..cut]).await;
        client.vanish();
    }
    recovered(&proxy, &tenant, "all cuts").await;
    assert_eq!(
        cluster().sql_in(&tenant.name, "SELECT count(*) FROM t").await.as_deref(),
        Some("0"),
        "a transaction was committed"
    );
}

#[tokio::test]
async fn vanishing_inside_a_large_message() {
    let (tenant, proxy) = one_server("vanish").await;
    let large = say::query(&format!("SELECT '{}'", "x".repeat(1 << 20)));
    for cut in [5, 6, 4096, 65_536, 65_541, 500_000, large.len() - 1] {
        let mut client = proxy.connect(&tenant).login().await;
        client.send(&large[..cut]).await;
        client.vanish();
        recovered(&proxy, &tenant, &format!("cut at {cut}")).await;
    }
}

#[tokio::test]
async fn vanishing_inside_a_copy_in_commits_nothing() {
    let (tenant, proxy) = one_server("vanish").await;
    cluster().direct(&tenant).login().await.run("CREATE TABLE t (n int)").await;
    let data = say::copy_data("1\n2\n3\n");
    for sent in [0, 3, data.len(), data.len() * 5, data.len() * 5 + 4] {
        let mut client = proxy.connect(&tenant).login().await;
        client.send(&say::query("COPY t FROM STDIN")).await;
        client.until(b'G').await.ok();
        client.send(&data.repeat(6)[..sent]).await;
        client.vanish();
        recovered(&proxy, &tenant, &format!("after {sent} bytes")).await;
    }
    assert_eq!(cluster().sql_in(&tenant.name, "SELECT count(*) FROM t").await.as_deref(), Some("0"));
}

#[tokio::test]
async fn incident_b05_vanishing_inside_a_large_result() {
    let (tenant, proxy) = one_server("vanish").await;
    for sql in [
        "SELECT repeat('x', 50 * 1024 * 1024)",
        "SELECT n, repeat('y', 500) FROM generate_series(1, 200000) n",
        "COPY (SELECT repeat('z', 1000) FROM generate_series(1, 100000)) TO STDOUT",
    ] {
        for messages in [0, 1, 2] {
            let mut client = proxy.connect(&tenant).login().await;
            client.send(&say::query(sql)).await;
            for _ in 0..messages {
                client.next().await;
            }
            client.vanish();
            recovered(&proxy, &tenant, sql).await;
        }
    }
}

#[tokio::test]
async fn vanishing_while_a_query_runs_cancels_it() {
    let (tenant, proxy) = one_server("vanish").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.send(&say::query("SELECT pg_sleep(600)")).await;
    running(&tenant, "pg_sleep").await;
    client.vanish();
    recovered(&proxy, &tenant, "pg_sleep").await;
}

#[tokio::test]
async fn vanishing_idle_in_a_transaction_rolls_it_back() {
    let (tenant, proxy) = one_server("vanish").await;
    cluster().direct(&tenant).login().await.run("CREATE TABLE t (n int)").await;
    let mut client: Client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    client.run("INSERT INTO t VALUES (1)").await;
    client.vanish();
    recovered(&proxy, &tenant, "in a transaction").await;
    assert_eq!(cluster().sql_in(&tenant.name, "SELECT count(*) FROM t").await.as_deref(), Some("0"));
}

#[tokio::test]
async fn leaving_with_terminate_inside_a_transaction_rolls_it_back_and_keeps_the_connection() {
    let (tenant, proxy) = one_server("vanish").await;
    let mut client = proxy.connect(&tenant).login().await;
    let backend = client.backend().await;
    client.run("BEGIN; CREATE TABLE t (n int)").await;
    client.leave().await;
    let mut next = proxy.connect(&tenant).login().await;
    assert_eq!(next.value("SELECT to_regclass('t') IS NULL").await, "t");
    assert_eq!(next.backend().await, backend, "a ROLLBACK was enough");
}

#[tokio::test]
async fn vanishing_while_waiting_leaves_the_queue() {
    let (tenant, proxy) = one_server("vanish").await;
    let mut holder = proxy.connect(&tenant).login().await;
    holder.run("BEGIN").await;
    for _ in 0..20 {
        let mut waiter = proxy.connect(&tenant).login().await;
        waiter.send(&say::query("SELECT pg_sleep(600)")).await;
        waiter.vanish();
    }
    let mut patient = proxy.connect(&tenant).login().await;
    patient.send(&say::query("SELECT 'patient'")).await;
    holder.run("COMMIT").await;
    assert_eq!(patient.until_ready().await.value(), "patient");
}

#[tokio::test]
async fn half_close_inside_a_transaction_rolls_it_back() {
    let (tenant, proxy) = one_server("vanish").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.send(&[say::query("BEGIN"), say::query("CREATE TABLE t (n int)")].concat()).await;
    client.half_close().await;
    let answer = client.until_end().await;
    assert_eq!(answer.tags(), "CZCZ");
    recovered(&proxy, &tenant, "half-close").await;
    assert_eq!(cluster().sql_in(&tenant.name, "SELECT to_regclass('t') IS NULL").await.as_deref(), Some("t"));
}

#[tokio::test]
async fn many_clients_vanishing_at_once_leave_nothing_behind() {
    let (tenant, proxy) = one_server("vanish").await;
    let texts = [
        "BEGIN",
        "SELECT pg_sleep(60)",
        "CREATE TEMP TABLE x (n int)",
        "SELECT generate_series(1, 100000)",
        "SELECT pg_advisory_lock(1)",
    ];
    for round in 0..40 {
        let mut client = proxy.connect(&tenant).login().await;
        client.send(&say::query(texts[round % texts.len()])).await;
        client.vanish();
    }
    recovered(&proxy, &tenant, "forty").await;
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    assert_eq!(cluster().sql_in(&tenant.name, locks).await.as_deref(), Some("0"));
}

async fn running(tenant: &Tenant, text: &str) {
    eventually(format!("{text} runs"), async || {
        let sessions = cluster().sessions(tenant).await;
        sessions.iter().any(|s| s.state == "active" && s.query.contains(text)).then_some(())
    })
    .await;
}
