//! Cancel requests (C14, C15): they reach the statement they were meant for, and no other.

use std::time::Duration;

use tenantry_testkit::{
    Client, Cluster, Mode, ProxyBuilder, Relay, Tenant,
    client::{Protection, send_cancel},
    cluster, eventually, one_server, say,
};

async fn running(cluster: &Cluster, tenant: &Tenant, text: &str) {
    eventually(format!("{text} runs"), async || {
        let sessions = cluster.sessions(tenant).await;
        sessions.iter().any(|s| s.state == "active" && s.query.contains(text)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_running_query_is_canceled_and_the_session_goes_on() {
    let (tenant, proxy) = one_server("cancel").await;
    for protection in [Protection::Plain, Protection::Tls] {
        let mut client = proxy.connect(&tenant).protection(protection).login().await;
        client.send(&say::query("SELECT pg_sleep(600)")).await;
        running(cluster(), &tenant, "pg_sleep").await;
        send_cancel(&proxy.endpoint(), &client.cancel_request()).await;
        client.until_ready().await.error("57014");
        assert_eq!(client.value("SELECT 1").await, "1");
    }
}

#[tokio::test]
async fn a_cancel_works_with_the_long_key_of_protocol_3_2() {
    let (tenant, proxy) = one_server("cancel").await;
    let mut client = proxy.connect(&tenant).minor(2).login().await;
    client.send(&say::query("SELECT pg_sleep(600)")).await;
    running(cluster(), &tenant, "pg_sleep").await;
    send_cancel(&proxy.endpoint(), &client.cancel_request()).await;
    client.until_ready().await.error("57014");
}

#[tokio::test]
async fn a_cancel_inside_a_transaction_fails_it_and_no_more() {
    let (tenant, proxy) = one_server("cancel").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    client.send(&say::query("SELECT pg_sleep(600)")).await;
    running(cluster(), &tenant, "pg_sleep").await;
    send_cancel(&proxy.endpoint(), &client.cancel_request()).await;
    let answer = client.until_ready().await;
    answer.error("57014");
    assert_eq!(answer.status(), Some('E'));
    client.run("ROLLBACK").await;
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_canceled_batch_skips_to_its_sync() {
    let (tenant, proxy) = one_server("cancel").await;
    let mut client = proxy.connect(&tenant).login().await;
    let batch = [
        say::unnamed("SELECT 1", &[]),
        say::unnamed("SELECT pg_sleep(600)", &[]),
        say::unnamed("SELECT 2", &[]),
        say::sync(),
    ];
    client.send(&batch.concat()).await;
    running(cluster(), &tenant, "pg_sleep").await;
    send_cancel(&proxy.endpoint(), &client.cancel_request()).await;
    let answer = client.until_ready().await;
    answer.error("57014");
    assert_eq!(answer.rows().len(), 1);
    assert_eq!(client.value("SELECT 3").await, "3");
}

#[tokio::test]
async fn a_cancel_while_queued_gives_57014_at_once_and_touches_nobody() {
    let (tenant, proxy) = one_server("cancel").await;
    let mut holder = proxy.connect(&tenant).login().await;
    holder.run("BEGIN").await;
    let mut waiter = proxy.connect(&tenant).login().await;
    waiter.send(&say::query("SELECT 'mine'")).await;
    // The cancel may overtake the query; until it arrives, ask again.
    let answer = loop {
        send_cancel(&proxy.endpoint(), &waiter.cancel_request()).await;
        if let Some(first) = waiter.next_within(Duration::from_millis(200)).await {
            let mut rest = waiter.until_ready().await;
            rest.messages.insert(0, first);
            break rest;
        }
    };
    answer.error("57014");
    assert_eq!(holder.value("SELECT 'still here'").await, "still here");
    holder.run("COMMIT").await;
    assert_eq!(waiter.value("SELECT 'again'").await, "again");
}

#[tokio::test]
async fn a_cancel_of_an_idle_session_changes_nothing() {
    let (tenant, proxy) = one_server("cancel").await;
    let mut client = proxy.connect(&tenant).login().await;
    for n in 0..20 {
        send_cancel(&proxy.endpoint(), &client.cancel_request()).await;
        assert_eq!(client.value(&format!("SELECT {n}")).await, n.to_string());
    }
}

#[tokio::test]
async fn a_wrong_key_cancels_nothing() {
    let (tenant, proxy) = one_server("cancel").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.send(&say::query("SELECT pg_sleep(0.5), 'done'")).await;
    running(cluster(), &tenant, "pg_sleep").await;
    let (process, mut secret) = client.key.clone().expect("a key");
    secret[0] ^= 1;
    send_cancel(&proxy.endpoint(), &say::cancel(process, &secret)).await;
    send_cancel(&proxy.endpoint(), &say::cancel(process ^ 1, &client.key.clone().expect("a key").1)).await;
    assert_eq!(client.until_ready().await.ok().rows()[0][1].as_deref(), Some("done"));
}

#[tokio::test]
async fn no_two_clients_have_the_same_key_and_none_has_the_servers() {
    let (tenant, proxy) = one_server("cancel").await;
    let mut keys = Vec::new();
    for _ in 0..50 {
        let mut client = proxy.connect(&tenant).login().await;
        let key = client.key.clone().expect("a key");
        assert_ne!(i64::from(key.0), i64::from(client.backend().await));
        assert!(!keys.contains(&key));
        keys.push(key);
    }
}

#[tokio::test]
async fn a_cancel_after_the_client_left_is_dropped() {
    let (tenant, proxy) = one_server("cancel").await;
    let mut gone = proxy.connect(&tenant).login().await;
    gone.run("SELECT 1").await;
    let request = gone.cancel_request();
    gone.leave().await;
    let mut next = proxy.connect(&tenant).login().await;
    next.send(&say::query("SELECT pg_sleep(0.3), 'done'")).await;
    running(cluster(), &tenant, "pg_sleep").await;
    send_cancel(&proxy.endpoint(), &request).await;
    assert_eq!(next.until_ready().await.ok().rows()[0][1].as_deref(), Some("done"));
}

/// A cancel storm against one client while another shares the only server connection, whose cancels are slow to arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incident_a03_a_cancel_never_hits_another_client() {
    let tenant = cluster().tenant("cancel").await;
    let relay = Relay::start(cluster().address()).await;
    relay.mode(Mode::Delay(Duration::from_micros(500)));
    let proxy = ProxyBuilder::to(relay.address()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    let mut hunted = proxy.connect(&tenant).login().await;
    let mut innocent = proxy.connect(&tenant).login().await;
    let request = hunted.cancel_request();
    let storm: Vec<_> = (0..8)
        .map(|_| {
            let (endpoint, request) = (proxy.endpoint(), request.clone());
            tokio::spawn(async move {
                loop {
                    send_cancel(&endpoint, &request).await;
                }
            })
        })
        .collect();
    let hunted = tokio::spawn(async move {
        let mut canceled = 0;
        for n in 0..150 {
            let answer = hunted.query(&format!("SELECT 'hunted {n}', pg_sleep(0.005)")).await;
            match answer.faults().is_empty() {
                true => assert_eq!(answer.rows()[0][0], Some(format!("hunted {n}"))),
                false => {
                    answer.error("57014");
                    canceled += 1;
                }
            }
        }
        canceled
    });
    for n in 0..150 {
        let answer = innocent.query(&format!("SELECT 'innocent {n}', pg_sleep(0.003)")).await.ok();
        assert_eq!(answer.rows()[0][0], Some(format!("innocent {n}")));
    }
    let canceled = hunted.await.expect("the hunted one ends");
    assert!(canceled > 0, "no cancel arrived at all");
    storm.iter().for_each(tokio::task::JoinHandle::abort);
    assert_eq!(innocent.value("SELECT 'end'").await, "end");
}

#[tokio::test]
async fn incident_g01_cancels_do_not_starve_queries() {
    let tenant = cluster().tenant("cancel").await;
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&tenant)
        .set("pool.pool_size", 2)
        .set("servers.main.max_cancels", 2)
        .start()
        .await;
    let mut sleeper: Client = proxy.connect(&tenant).login().await;
    sleeper.send(&say::query("DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$")).await;
    running(cluster(), &tenant, "LOOP").await;
    let (endpoint, request) = (proxy.endpoint(), sleeper.cancel_request());
    let storm: Vec<_> = (0..10)
        .map(|_| (endpoint.clone(), request.clone()))
        .map(|(endpoint, request)| {
            tokio::spawn(async move {
                for _ in 0..30 {
                    send_cancel(&endpoint, &request).await;
                }
            })
        })
        .collect();
    let mut other = proxy.connect(&tenant).login().await;
    for n in 0..100 {
        assert_eq!(other.value(&format!("SELECT {n}")).await, n.to_string());
    }
    for task in storm {
        task.await.expect("the storm ends");
    }
    // It may have been hit between two rounds, outside of what catches the cancel: then it was told so, once.
    let sessions = cluster().sessions(&tenant).await;
    match sessions.iter().find(|s| s.query.contains("LOOP") && s.state == "active") {
        Some(looping) => {
            cluster().terminate(looping.pid).await;
            sleeper.until_end().await.fatal("57P01");
        }
        None => drop(sleeper.until_ready().await.error("57014")),
    }
}

/// PostgreSQL keeps the answers of a batch back until its Sync: that it is ours which comes first must not keep a cancel back.
#[tokio::test]
async fn a_cancel_reaches_a_batch_that_a_replay_or_a_parse_of_ours_goes_ahead_of() {
    let tenant = cluster().tenant("cancel").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    let mut other = proxy.connect(&tenant).login().await;
    let mut client = proxy.connect(&tenant).login().await;
    other.run("SET app.other = '1'").await;
    client.ask(&[say::parse("sleep", "SELECT pg_sleep(60)"), say::sync()].concat()).await.ok();
    for round in 0..2 {
        // The other's settings are on the connection; and no statement of the client's.
        other.run("DISCARD ALL").await;
        other.run("SET app.other = '1'").await;
        client.send(&[say::bind("", "sleep", &[]), say::execute("", 0), say::sync()].concat()).await;
        running(cluster(), &tenant, "pg_sleep").await;
        send_cancel(&proxy.endpoint(), &client.cancel_request()).await;
        client.until_ready().await.error("57014");
        assert_eq!(client.value(&format!("SELECT {round}")).await, round.to_string());
    }
}
