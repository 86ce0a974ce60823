//! The server fails (S1–S21): what clients see is one honest error, or nothing at all.

use std::time::{Duration, Instant};

use tenantry_testkit::{
    Cluster, FakeConn, FakeServer, Mode, Proxy, ProxyBuilder, Relay, Tenant, cluster, eventually,
    fake_server::{authentication, columns, complete, error, greeting, notice, parameter, ready, row},
    one_server, say,
};

async fn running(cluster: &Cluster, tenant: &Tenant, text: &str) -> i32 {
    eventually(format!("{text} runs"), async || {
        let sessions = cluster.sessions(tenant).await;
        sessions.iter().find(|s| s.state == "active" && s.query.contains(text)).map(|s| s.pid)
    })
    .await
}

/// A cluster to break, and a pool of one server connection on it.
async fn own_cluster() -> (&'static Cluster, Tenant, Proxy) {
    let own = Cluster::start().leaked();
    let tenant = own.tenant("faults").await;
    let proxy = ProxyBuilder::new(own).tenant(&tenant).set("pool.pool_size", 2).start().await;
    (own, tenant, proxy)
}

/// An idle server connection is looked at before it is lent if it was idle for 1 ms or more; this is no check of anything.
async fn rest_a_moment() {
    tokio::time::sleep(Duration::from_millis(80)).await;
}

// ---- S1 to S4: one server connection ends

#[tokio::test]
async fn incident_b10_an_idle_server_connection_that_was_terminated_is_not_noticed() {
    let (tenant, proxy) = one_server("faults").await;
    let mut client = proxy.connect(&tenant).login().await;
    for n in 0..5 {
        let backend = client.backend().await;
        cluster().terminate(backend).await;
        assert_eq!(client.value(&format!("SELECT {n}")).await, n.to_string());
    }
}

#[tokio::test]
async fn a_server_terminated_in_an_idle_transaction_is_told_at_once() {
    let (tenant, proxy) = one_server("faults").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let backend = client.backend().await;
    cluster().terminate(backend).await;
    client.until_end().await.fatal("57P01");
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_server_terminated_in_a_query_gives_its_rows_then_one_fatal() {
    let (tenant, proxy) = one_server("faults").await;
    let mut client = proxy.connect(&tenant).login().await;
    client
        .send(&say::query(
            "SELECT n, pg_sleep(CASE WHEN n > 20000 THEN 600 ELSE 0 END) FROM generate_series(1, 30000) n",
        ))
        .await;
    let backend = running(cluster(), &tenant, "pg_sleep").await;
    for _ in 0..15_000 {
        client.next().await.expect("rows come");
    }
    cluster().terminate(backend).await;
    let answer = client.until_end().await;
    answer.fatal("57P01");
    assert_eq!(answer.of(b'C').count() + answer.of(b'Z').count(), 0, "it looks complete");
}

#[tokio::test]
async fn a_server_link_that_is_reset_is_08006() {
    let tenant = cluster().tenant("faults").await;
    let relay = Relay::start(cluster().address()).await;
    let proxy = ProxyBuilder::to(relay.address()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    let mut client = proxy.connect(&tenant).login().await;
    client.send(&say::query("SELECT 1; SELECT pg_sleep(600)")).await;
    let asleep = running(cluster(), &tenant, "pg_sleep").await;
    relay.reset();
    // Every statement outside a transaction may have been committed by itself.
    client.until_end().await.fatal("08006|08007");
    cluster().terminate(asleep).await;
    let mut idle = proxy.connect(&tenant).login().await;
    idle.run("BEGIN").await;
    relay.close();
    idle.until_end().await.fatal("08006");
    let mut next = proxy.connect(&tenant).login().await;
    assert_eq!(next.value("SELECT 1").await, "1");
    relay.reset();
    cluster().settled(&tenant, 0).await;
    rest_a_moment().await;
    assert_eq!(next.value("SELECT 2").await, "2", "an idle link that broke is not noticed");
}

#[tokio::test]
async fn a_commit_without_an_answer_is_08007_and_not_sent_again() {
    let tenant = cluster().tenant("faults").await;
    let relay = Relay::start(cluster().address()).await;
    let proxy = ProxyBuilder::to(relay.address()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    cluster().direct(&tenant).login().await.run("CREATE TABLE t (n int)").await;
    for statements in [&["BEGIN", "INSERT INTO t VALUES (1)"][..], &[]] {
        let mut client = proxy.connect(&tenant).login().await;
        client.run("SELECT 1").await;
        for sql in statements {
            client.run(sql).await;
        }
        // Nothing passes: the COMMIT, or the statement that commits by itself, is on its way for ever.
        relay.mode(Mode::Blackhole);
        client.send(&say::query(if statements.is_empty() { "INSERT INTO t VALUES (2)" } else { "COMMIT" })).await;
        assert!(client.next_within(Duration::from_millis(200)).await.is_none());
        relay.reset();
        relay.mode(Mode::Pass);
        client.until_end().await.fatal("08007");
    }
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT count(*) FROM t").await, "0");
}

// ---- S4 to S9: the whole server

#[tokio::test]
async fn a_crash_tells_victim_and_siblings_once_and_the_others_wait() {
    let (own, tenant, proxy) = own_cluster().await;
    let mut victim = proxy.connect(&tenant).login().await;
    let mut sibling = proxy.connect(&tenant).login().await;
    let mut idle = proxy.connect(&tenant).login().await;
    victim.run("BEGIN").await;
    let backend = victim.backend().await;
    victim.send(&say::query("SELECT pg_sleep(600)")).await;
    running(own, &tenant, "pg_sleep").await;
    sibling.run("BEGIN").await;
    own.kill_backend(backend);
    victim.until_end().await.fatal("08006|57P02");
    let notice_and_end = sibling.until_end().await;
    notice_and_end.fatal("57P02");
    assert_eq!(idle.value("SELECT 'recovered'").await, "recovered");
}

#[tokio::test]
async fn a_fast_restart_is_a_pause_for_idle_clients() {
    let (own, tenant, proxy) = own_cluster().await;
    let mut idle = proxy.connect(&tenant).login().await;
    let mut busy = proxy.connect(&tenant).login().await;
    idle.run("SELECT 1").await;
    busy.run("BEGIN").await;
    own.shutdown("INT");
    busy.until_end().await.fatal("57P01");
    // Asked while the server is down; answered when it is up.
    idle.send(&say::query("SELECT 'after'")).await;
    own.start_again().await;
    let up = Instant::now();
    assert_eq!(idle.until_ready().await.value(), "after");
    assert!(up.elapsed() < Duration::from_secs(3), "{:?} after it was up", up.elapsed());
}

#[tokio::test]
async fn an_immediate_shutdown_is_told_once() {
    let (own, tenant, proxy) = own_cluster().await;
    let mut busy = proxy.connect(&tenant).login().await;
    let mut idle = proxy.connect(&tenant).login().await;
    idle.run("SELECT 1").await;
    busy.run("BEGIN").await;
    own.shutdown("QUIT");
    busy.until_end().await.fatal("57P01|57P02");
    own.start_again().await;
    assert_eq!(idle.value("SELECT 'after'").await, "after");
}

#[tokio::test]
async fn a_smart_shutdown_lets_transactions_end() {
    let (own, tenant, proxy) = own_cluster().await;
    let mut busy = proxy.connect(&tenant).login().await;
    busy.run("BEGIN").await;
    own.shutdown("TERM");
    for n in 0..5 {
        assert_eq!(busy.value(&format!("SELECT {n}")).await, n.to_string());
    }
    busy.run("COMMIT").await;
}

#[tokio::test]
async fn a_server_that_stays_away_is_57p03_after_the_wait_and_the_client_stays() {
    let tenant = cluster().tenant("faults").await;
    let relay = Relay::start(cluster().address()).await;
    let proxy = ProxyBuilder::to(relay.address()).tenant(&tenant).set("pool.query_wait_timeout", "500ms").start().await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT 1").await;
    relay.mode(Mode::Refuse);
    relay.reset();
    cluster().settled(&tenant, 0).await;
    rest_a_moment().await;
    let before = relay.accepted();
    let fault = client.query("SELECT 2").await.error("57P03|53300");
    assert!(!format!("{fault:?}").contains("127.0.0.1"), "an address in {fault:?}");
    let dials = relay.accepted() - before;
    assert!(dials <= 30, "{dials} dials in half a second");
    relay.mode(Mode::Pass);
    assert_eq!(client.value("SELECT 3").await, "3");
}

#[tokio::test]
async fn a_full_server_is_waited_for_and_then_53300() {
    let tenant = cluster().tenant("faults").await;
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&tenant)
        .set("pool.pool_size", 3)
        .set("pool.query_wait_timeout", "500ms")
        .start()
        .await;
    let mut first = proxy.connect(&tenant).login().await;
    assert_eq!(first.value("SELECT 1").await, "1");
    cluster().sql(&format!("ALTER ROLE {} CONNECTION LIMIT 1", tenant.role)).await;
    first.run("BEGIN").await;
    let mut second = proxy.connect(&tenant).login().await;
    second.query("SELECT 2").await.error("53300");
    second.send(&say::query("SELECT 3")).await;
    first.run("COMMIT").await;
    assert_eq!(second.until_ready().await.value(), "3");
    assert_eq!(first.value("SELECT 4").await, "4");
}

// ---- S14 to S16: silence

#[tokio::test]
async fn incident_b11_silence_at_every_step_of_the_server_login_ends_at_server_connect_timeout() {
    let tenant = cluster().tenant("faults").await;
    // Bytes of the server after which nothing passes any more: before, inside and between its login messages.
    for bytes in [1, 24, 25, 100, 180, 220, 400, 500, 600] {
        let relay = Relay::start(cluster().address()).await;
        relay.reset_after(bytes);
        let proxy =
            ProxyBuilder::to(relay.address()).tenant(&tenant).set("pool.query_wait_timeout", "1s").start().await;
        let refused = match proxy.connect(&tenant).try_login().await {
            Err(answer) => answer,
            Ok(mut client) => client.query("SELECT 1").await,
        };
        assert_eq!(refused.faults().len(), 1, "{bytes}: {:?}", refused.trace());
    }
    let relay = Relay::start(cluster().address()).await;
    relay.mode(Mode::Blackhole);
    let proxy = ProxyBuilder::to(relay.address())
        .tenant(&tenant)
        .set("pool.server_connect_timeout", "200ms")
        .set("pool.query_wait_timeout", "700ms")
        .start()
        .await;
    let start = Instant::now();
    let refused = match proxy.connect(&tenant).try_login().await {
        Err(answer) => answer,
        Ok(mut client) => client.query("SELECT 1").await,
    };
    assert_eq!(refused.faults().len(), 1, "{:?}", refused.trace());
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(relay.accepted() >= 2, "one attempt ate the whole wait");
    relay.mode(Mode::Pass);
    eventually("it works again", async || {
        proxy.connect(&tenant).try_login().await.ok()?.query("SELECT 1").await.faults().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn one_tenants_frozen_server_connection_does_not_hold_up_another() {
    let tenants = [cluster().tenant("faults").await, cluster().tenant("faults").await];
    let proxy =
        ProxyBuilder::new(cluster()).tenant(&tenants[0]).tenant(&tenants[1]).set("pool.pool_size", 1).start().await;
    let mut frozen = proxy.connect(&tenants[0]).login().await;
    let backend = frozen.backend().await;
    cluster().signal_backend(backend, "STOP");
    frozen.send(&say::query("SELECT 'thawed'")).await;
    let mut free = proxy.connect(&tenants[1]).login().await;
    for n in 0..100 {
        assert_eq!(free.value(&format!("SELECT {n}")).await, n.to_string());
    }
    cluster().signal_backend(backend, "CONT");
    assert_eq!(frozen.until_ready().await.value(), "thawed");
}

// ---- S17: a server that breaks the protocol

/// A fake server that logs in well and then answers the client's query with `answer`; the next connection behaves.
async fn lying(answer: Vec<u8>) -> (FakeServer, Proxy, Tenant) {
    let server = FakeServer::start(move |mut conn: FakeConn| {
        let answer = answer.clone();
        async move {
            conn.login().await;
            if conn.number == 0 && conn.query().await.is_some() {
                conn.send(&answer).await;
            }
            conn.behave().await;
        }
    })
    .await;
    let tenant = FakeServer::tenant();
    let proxy = ProxyBuilder::to(server.address()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    (server, proxy, tenant)
}

#[tokio::test]
async fn a_malformed_answer_ends_that_connection_and_reaches_nobody() {
    let good = [columns(&["a"]), row(&["1"])].concat();
    let lies: [(&str, Vec<u8>); 9] = [
        ("length 0", say::header(b'D', 0)),
        ("length 3", say::header(b'C', 3)),
        ("negative length", say::header(b'D', -1)),
        ("unknown type", say::message(b'!', b"boo")),
        ("a frontend message", say::message(b'Q', b"SELECT 1\0")),
        ("authentication again", authentication(0, b"")),
        ("a status that is none", ready(b'X')),
        ("ReadyForQuery without a status", say::message(b'Z', b"")),
        ("ReadyForQuery that goes on", say::message(b'Z', b"II")),
    ];
    for (what, lie) in lies {
        let (server, proxy, tenant) = lying([good.clone(), lie].concat()).await;
        let mut client = proxy.connect(&tenant).login().await;
        client.send(&say::query("SELECT 'lie'")).await;
        let answer = client.until_end().await;
        assert_eq!(answer.faults().len(), 1, "{what}: {:?}", answer.trace());
        answer.fatal("08006|08P01");
        let mut next = proxy.connect(&tenant).login().await;
        assert_eq!(next.value("fine").await, "fine", "{what}");
        assert_eq!(server.accepted(), 2, "{what}: the connection was used again");
    }
}

#[tokio::test]
async fn what_comes_unasked_after_an_answer_reaches_nobody() {
    let good = [columns(&["a"]), row(&["mine"]), complete("SELECT 1"), ready(b'I')].concat();
    let extras: [(&str, Vec<u8>); 4] = [
        ("another ReadyForQuery", ready(b'I')),
        ("a row of nobody's", row(&["foreign"])),
        ("a whole answer", good.clone()),
        ("an error without SQLSTATE", say::message(b'E', b"MSomething\0\0")),
    ];
    for (what, extra) in extras {
        let (_server, proxy, tenant) = lying([good.clone(), extra].concat()).await;
        let mut client = proxy.connect(&tenant).login().await;
        let answer = client.query("SELECT 'lie'").await;
        assert_eq!(answer.rows(), [[Some("mine".to_owned())]], "{what}");
        let mut next = proxy.connect(&tenant).login().await;
        assert_eq!(next.value("SELECT 'next'").await, "SELECT 'next'", "{what}");
        let again = client.query("SELECT 'again'").await;
        assert_eq!(again.of(b'D').count(), usize::from(!again.closed), "{what}: {:?}", again.trace());
    }
}

#[tokio::test]
async fn incident_a05_the_second_sync_of_a_pipeline_is_awaited_before_the_next_client() {
    let server = FakeServer::start(async |mut conn: FakeConn| {
        conn.login().await;
        while let Some(text) = conn.query().await {
            // Late answers, so that a pooler that does not count lends the connection in between.
            tokio::time::sleep(Duration::from_millis(30)).await;
            conn.send(&[columns(&["a"]), row(&[&text]), complete("SELECT 1")].concat()).await;
            tokio::time::sleep(Duration::from_millis(30)).await;
            conn.send(&ready(b'I')).await;
        }
    })
    .await;
    let tenant = FakeServer::tenant();
    let proxy = ProxyBuilder::to(server.address()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    let mut first = proxy.connect(&tenant).login().await;
    let mut second = proxy.connect(&tenant).login().await;
    first.send(&[say::query("one"), say::query("two"), say::query("three")].concat()).await;
    assert_eq!(first.until_ready().await.value(), "one");
    second.send(&say::query("other")).await;
    assert_eq!(first.until_ready().await.value(), "two");
    assert_eq!(first.until_ready().await.value(), "three");
    assert_eq!(second.until_ready().await.value(), "other");
}

// ---- S18, S20: a server that wants too much at login

/// What a client is told when the server's login goes `script`'s way; it must be one error.
async fn refused_login<F, Fut>(what: &str, script: F) -> String
where
    F: Fn(FakeConn) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let server = FakeServer::start(script).await;
    let tenant = FakeServer::tenant();
    let proxy = ProxyBuilder::to(server.address())
        .tenant(&tenant)
        .set("pool.query_wait_timeout", "1s")
        .set("pool.server_connect_timeout", "500ms")
        .start()
        .await;
    let start = Instant::now();
    let answer = match proxy.connect(&tenant).try_login().await {
        Err(answer) => answer,
        Ok(mut client) => client.query("SELECT 1").await,
    };
    assert_eq!(answer.faults().len(), 1, "{what}: {:?}", answer.trace());
    assert!(start.elapsed() < Duration::from_secs(5), "{what} took {:?}", start.elapsed());
    answer.faults()[0].code.clone()
}

#[tokio::test]
async fn a_cleartext_password_is_never_sent_over_plain_tcp() {
    let (asked, seen) = std::sync::mpsc::sync_channel(16);
    refused_login("cleartext", move |mut conn| {
        let asked = asked.clone();
        async move {
            conn.send(&authentication(3, b"")).await;
            if let Some(message) = conn.next().await {
                let _ = asked.try_send(message);
            }
        }
    })
    .await;
    assert!(seen.try_iter().all(|message| message.tag != b'p'), "the password was sent");
}

#[tokio::test]
async fn scram_with_absurd_iterations_or_nonces_is_refused_without_work() {
    for (what, challenge) in [
        ("2^31 iterations", "r={nonce}server,s=c2FsdHNhbHRzYWx0c2FsdA==,i=2147483647"),
        ("0 iterations", "r={nonce}server,s=c2FsdHNhbHRzYWx0c2FsdA==,i=0"),
        ("a nonce that is not ours", "r=server,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096"),
        ("a nonce of 100 kB", "r={nonce}{huge},s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096"),
        ("no salt", "r={nonce}server,s=,i=4096"),
        ("nonsense", "hello"),
    ] {
        refused_login(what, move |mut conn| async move {
            conn.send(&authentication(10, b"SCRAM-SHA-256\0\0")).await;
            let Some(first) = conn.next().await else { return };
            let text = String::from_utf8_lossy(&first.body).into_owned();
            let nonce = text.rsplit("r=").next().unwrap_or_default().to_owned();
            let challenge = challenge.replace("{nonce}", &nonce).replace("{huge}", &"x".repeat(100_000));
            conn.send(&authentication(11, challenge.as_bytes())).await;
            assert!(conn.next().await.is_none_or(|m| m.tag != b'p'), "{what}: a proof was sent");
        })
        .await;
    }
}

#[tokio::test]
async fn a_server_that_does_not_know_the_verifier_is_not_believed() {
    for (what, last) in [
        (
            "a wrong signature",
            [authentication(12, b"v=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), greeting()].concat(),
        ),
        ("no signature", greeting()),
        ("e=", [authentication(12, b"e=other-error"), greeting()].concat()),
    ] {
        refused_login(what, move |mut conn| {
            let last = last.clone();
            async move {
                conn.send(&authentication(10, b"SCRAM-SHA-256\0\0")).await;
                let Some(first) = conn.next().await else { return };
                let text = String::from_utf8_lossy(&first.body).into_owned();
                let nonce = text.rsplit("r=").next().unwrap_or_default().to_owned();
                conn.send(&authentication(11, format!("r={nonce}server,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096").as_bytes()))
                    .await;
                conn.next().await;
                conn.send(&last).await;
                assert!(conn.next().await.is_none(), "{what}: it went on as if logged in");
            }
        })
        .await;
    }
}

#[tokio::test]
async fn nonsense_in_place_of_a_login_is_refused() {
    let nonsense: [(&str, Vec<u8>); 6] = [
        ("closed at once", vec![]),
        ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("ReadyForQuery first", ready(b'I')),
        ("GSSAPI", authentication(7, b"")),
        ("a huge message", say::header(b'R', i32::MAX)),
        ("an error without SQLSTATE", say::message(b'E', b"Mno\0\0")),
    ];
    for (what, bytes) in nonsense {
        refused_login(what, move |mut conn| {
            let bytes = bytes.clone();
            async move { conn.send(&bytes).await }
        })
        .await;
    }
}

#[tokio::test]
async fn incident_a12_a_server_that_is_another_database_is_refused() {
    refused_login("another database", async |mut conn: FakeConn| {
        conn.database = "somebody_elses".to_owned();
        conn.login().await;
        conn.behave().await;
    })
    .await;
}

// ---- S21: floods

#[tokio::test]
async fn notices_and_parameters_while_idle_are_nobodys_answer() {
    let flood = [
        notice("NOTICE", "00000", "flood"),
        parameter("application_name", "flood"),
        say::message(b'A', b"\0\0\0\x01chan\0\0"),
    ]
    .concat();
    let flood = flood.repeat(20_000);
    let good = [columns(&["a"]), row(&["mine"]), complete("SELECT 1"), ready(b'I')].concat();
    let (_server, proxy, tenant) = lying([good, flood].concat()).await;
    let mut client = proxy.connect(&tenant).login().await;
    let before = proxy.resident_kib();
    assert_eq!(client.query("SELECT 'x'").await.rows(), [[Some("mine".to_owned())]]);
    let mut next = proxy.connect(&tenant).login().await;
    let answer = next.query("SELECT 'next'").await;
    assert_eq!(answer.rows(), [[Some("SELECT 'next'".to_owned())]]);
    assert_eq!(answer.of(b'A').count(), 0, "a notification of somebody else's");
    assert!(answer.of(b'N').count() <= 20_000);
    assert!(proxy.resident_kib().saturating_sub(before) < 16 * 1024);
}

#[tokio::test]
async fn fatal_from_the_server_is_relayed_once_and_nothing_follows() {
    let (_server, proxy, tenant) =
        lying(error("FATAL", "57P05", "terminating connection due to idle-session timeout")).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.send(&say::query("SELECT 1")).await;
    let answer = client.until_end().await;
    answer.fatal("57P05");
}
