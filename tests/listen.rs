//! LISTEN and NOTIFY in transaction mode: all listeners of a tenant share one server connection, and each hears what it
//! would hear on a connection of its own.

use std::collections::BTreeMap;

use serde_json::json;
use tenantry_testkit::{
    Client, Message, Proxy, ProxyBuilder, Tenant, cluster, control::control_proxy, eventually, oracle, say,
};
use tokio::task::JoinSet;

async fn served_by(pool_size: u32) -> (Tenant, Proxy) {
    let tenant = cluster().tenant("listen").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", pool_size).start().await;
    (tenant, proxy)
}

/// Channel and payload of the next message, which must be a notification.
async fn heard(client: &mut Client) -> (String, String) {
    let message = client.next().await.expect("a notification");
    pair(&message)
}

fn pair(message: &Message) -> (String, String) {
    assert_eq!(message.tag, b'A', "{}", message.line());
    let words = message.words(4);
    (words[0].clone(), words.get(1).cloned().unwrap_or_default())
}

/// Payloads on a channel up to and including `last`.
async fn until(client: &mut Client, last: &str) -> Vec<String> {
    let mut payloads = Vec::new();
    loop {
        let (_, payload) = heard(client).await;
        let done = payload == last;
        payloads.push(payload);
        if done {
            return payloads;
        }
    }
}

async fn metric(proxy: &Proxy, name: &str, tenant: &Tenant) -> f64 {
    let metrics = proxy.metrics().await;
    let of_tenant = format!("tenant=\"{}\"", tenant.name);
    let lines = metrics.lines().filter(|l| l.starts_with(&format!("{name}{{")) && l.contains(&of_tenant));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// No client keeps a server connection for what it listens to, and the hub listens to so many channels.
async fn handed_over(proxy: &Proxy, tenant: &Tenant, channels: u32) {
    eventually(format!("{channels} channels at the hub"), async || {
        let listened = metric(proxy, "tenantry_listened_channels", tenant).await;
        let active = metric(proxy, "tenantry_client_connections", tenant).await;
        let idle = {
            let metrics = proxy.metrics().await;
            let of = format!("tenant=\"{}\"", tenant.name);
            let lines = metrics.lines().filter(|l| l.starts_with("tenantry_client_connections{") && l.contains(&of));
            lines
                .filter(|l| l.contains("state=\"idle\""))
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum::<f64>()
        };
        (listened == f64::from(channels) && active == idle).then_some(())
    })
    .await;
}

#[tokio::test]
async fn fifty_listeners_use_one_connection_and_a_pool_of_two_serves_others() {
    let (tenant, proxy) = served_by(2).await;
    let mut joining = JoinSet::new();
    for n in 0..50 {
        let mut listener = proxy.connect(&tenant).login().await;
        joining.spawn(async move {
            listener.run(&format!("LISTEN c{}; LISTEN everybody", n % 10)).await;
            (n, listener)
        });
    }
    let mut listeners = joining.join_all().await;
    handed_over(&proxy, &tenant, 11).await;
    assert_eq!(metric(&proxy, "tenantry_listening_clients", &tenant).await, 50.0);
    assert_eq!(metric(&proxy, "tenantry_pinned_leases", &tenant).await, 0.0);
    let mut speaker = proxy.connect(&tenant).login().await;
    for n in 0..10 {
        speaker.run(&format!("BEGIN; NOTIFY c{n}, 'to {n}'; NOTIFY everybody, 'to all'; COMMIT")).await;
    }
    let own = |n: i32| vec![(format!("c{}", n % 10), format!("to {}", n % 10)), ("everybody".into(), "to all".into())];
    for (n, listener) in &mut listeners {
        let mut all = Vec::new();
        while all.len() < 11 {
            all.push(heard(listener).await);
        }
        assert_eq!(all.iter().filter(|(channel, _)| channel == "everybody").count(), 10);
        let at = all.iter().position(|(channel, _)| channel != "everybody").expect("its own");
        assert_eq!(all[at..at + 2], own(*n)[..], "in order");
    }
    let sessions = cluster().sessions(&tenant).await;
    assert!(sessions.len() <= 2, "{sessions:?}");
    assert_eq!(metric(&proxy, "tenantry_notifications_total", &tenant).await, 550.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_while_listeners_come_move_and_go() {
    const AT_LEAST: u32 = 1000;
    const ROUNDS: usize = 6;
    let (tenant, proxy) = served_by(3).await;
    let number = |message: &Message| pair(message).1.parse::<u32>().expect("a number");
    let mut tasks = JoinSet::new();
    for n in 0..6 {
        let mut client = proxy.connect(&tenant).login().await;
        tasks.spawn(async move {
            for round in 0..ROUNDS {
                let begin = if n % 2 == 0 { "LISTEN numbers" } else { "BEGIN; LISTEN numbers; COMMIT" };
                let mut numbers: Vec<u32> = client.run(begin).await.of(b'A').map(number).collect();
                // Most by listening only, some between statements of its own.
                while numbers.len() < 20 + n {
                    numbers.push(number(&client.next().await.expect("a notification")));
                    if numbers.len().is_multiple_of(7) {
                        let texts =
                            ["SELECT 1", "BEGIN; SELECT 1; COMMIT", "LISTEN numbers", "UNLISTEN other", "LISTEN other"];
                        let answer = client.run(texts[numbers.len() / 7 % texts.len()]).await;
                        numbers.extend(answer.of(b'A').map(number));
                    }
                }
                numbers.extend(client.run("UNLISTEN *").await.of(b'A').map(number));
                let expected: Vec<u32> = (numbers[0]..).take(numbers.len()).collect();
                assert_eq!(numbers, expected, "client {n}, round {round}");
                assert_eq!(client.query("SELECT 1").await.ok().tags(), "TDCZ", "nothing after UNLISTEN");
            }
        });
    }
    // One that keeps the hub going, and hears it all.
    let mut steady = proxy.connect(&tenant).login().await;
    steady.run("LISTEN numbers").await;
    let reading = tokio::spawn(async move { (until(&mut steady, "end").await, steady) });
    let mut speaker = proxy.connect(&tenant).login().await;
    let mut last = 0;
    while last < AT_LEAST || !tasks.is_empty() {
        last += 1;
        speaker.run(&format!("NOTIFY numbers, '{last}'")).await;
        while let Some(done) = tasks.try_join_next() {
            done.expect("no panic");
        }
    }
    speaker.run("NOTIFY numbers, 'end'").await;
    let (heard, _steady) = reading.await.expect("no panic");
    let all: Vec<String> = (1..=last).map(|n| n.to_string()).chain(["end".to_owned()]).collect();
    assert_eq!(heard, all);
    handed_over(&proxy, &tenant, 1).await;
}

#[tokio::test]
async fn names_and_payloads_of_every_kind() {
    let (tenant, proxy) = served_by(2).await;
    let mut listener = proxy.connect(&tenant).login().await;
    let names = ["Capital", "quote\"d", "semi; DROP TABLE x; --", "späße", "a.b", &"x".repeat(63), "apo's"];
    for name in names {
        listener.run(&format!("LISTEN \"{}\"", name.replace('"', "\"\""))).await;
    }
    handed_over(&proxy, &tenant, 7).await;
    let mut speaker = proxy.connect(&tenant).login().await;
    let large = "p".repeat(7999);
    for name in names {
        let channel = name.replace('\'', "''");
        speaker.run(&format!("SELECT pg_notify('{channel}', '{large}')")).await;
        assert_eq!(heard(&mut listener).await, (name.to_owned(), large.clone()));
    }
    speaker.run("NOTIFY \"a.b\"").await;
    assert_eq!(heard(&mut listener).await, ("a.b".to_owned(), String::new()));
    speaker.run("NOTIFY \"a.b\", 'é'").await;
    assert_eq!(heard(&mut listener).await.1, "é");
    let backend = speaker.backend().await;
    speaker.send(&say::query("NOTIFY \"a.b\"; SELECT pg_backend_pid()")).await;
    let notified = listener.next().await.expect("a notification");
    let told = speaker.until_ready().await.value();
    assert_eq!(
        i32::from_be_bytes(notified.body[..4].try_into().expect("four bytes")).to_string(),
        told,
        "was {backend}"
    );
}

#[tokio::test]
async fn what_ends_a_subscription_ends_it() {
    let (tenant, proxy) = served_by(2).await;
    let mut speaker = proxy.connect(&tenant).login().await;
    let mut steady = proxy.connect(&tenant).login().await;
    steady.run("LISTEN steady").await;
    for (before, end, left) in [
        ("LISTEN a; LISTEN b", "UNLISTEN a", "b"),
        ("LISTEN a; LISTEN b", "UNLISTEN *", ""),
        ("LISTEN a; LISTEN b", "DISCARD ALL", ""),
        ("LISTEN a; LISTEN b", "BEGIN; UNLISTEN b; COMMIT", "a"),
        ("LISTEN a; LISTEN b", "BEGIN; UNLISTEN *; ROLLBACK", "a,b"),
        ("LISTEN a; LISTEN b", "BEGIN; SAVEPOINT s; UNLISTEN a; ROLLBACK TO s; COMMIT", "a,b"),
        ("LISTEN a", "BEGIN; LISTEN b; ROLLBACK", "a"),
        ("LISTEN a", "BEGIN; UNLISTEN a; LISTEN b; COMMIT", "b"),
        ("LISTEN a", "DO $$ BEGIN EXECUTE 'UNLISTEN a'; EXECUTE 'LISTEN b'; END $$", "b"),
    ] {
        for split in [false, true] {
            let mut client = proxy.connect(&tenant).login().await;
            client.run(before).await;
            handed_over(&proxy, &tenant, 1 + u32::try_from(before.split(';').count()).expect("few")).await;
            if split && end.starts_with("BEGIN") {
                for sql in end.split("; ") {
                    client.run(sql).await;
                }
            } else if split {
                client.ask(&[say::unnamed(end, &[]), say::sync()].concat()).await.ok();
            } else {
                client.run(end).await;
            }
            let look = "SELECT coalesce(string_agg(c, ',' ORDER BY c), '') FROM pg_listening_channels() c";
            assert_eq!(client.value(look).await, left, "{before} / {end}");
            speaker.run("NOTIFY a, 'a'").await;
            speaker.run("NOTIFY b, 'b'").await;
            for channel in left.split(',').filter(|channel| !channel.is_empty()) {
                assert_eq!(heard(&mut client).await.0, channel, "{before} / {end}");
            }
            // Its own is heard before the answer is over, and nothing else came before it.
            client.run("LISTEN mine").await;
            let answer = client.run("NOTIFY mine").await;
            assert_eq!(answer.tags(), "CAZ", "{before} / {end}: {:?}", answer.trace());
            client.leave().await;
            handed_over(&proxy, &tenant, 1).await;
        }
    }
}

#[tokio::test]
async fn all_of_it_as_directly() {
    let (tenant, proxy) = served_by(2).await;
    let texts = [
        "LISTEN a",
        "NOTIFY a, '1'",
        "BEGIN",
        "NOTIFY a, '2'",
        "SELECT 1",
        "COMMIT",
        "BEGIN",
        "LISTEN b",
        "NOTIFY b, '3'",
        "COMMIT",
        "NOTIFY b, '4'",
        "BEGIN",
        "UNLISTEN a",
        "SELECT 1/0",
        "ROLLBACK",
        "SELECT pg_notify('a', '5')",
        "NOTIFY a; NOTIFY a; NOTIFY b; NOTIFY a, 'x'",
        "UNLISTEN a",
        "NOTIFY a",
        "SELECT pg_listening_channels()",
        "DISCARD ALL",
        "NOTIFY b",
        "SELECT pg_listening_channels()",
        "LISTEN a",
        "CREATE TEMP TABLE t (n int)",
        "NOTIFY a, '6'",
        "DROP TABLE t",
        "NOTIFY a, '7'",
        "UNLISTEN *",
        "NOTIFY a",
    ];
    let mut steps: Vec<_> = texts.iter().flat_map(|sql| oracle::ask(say::query(sql))).collect();
    for sql in ["LISTEN a", "NOTIFY a, '8'", "SELECT pg_listening_channels()", "UNLISTEN a", "NOTIFY a"] {
        steps.extend(oracle::ask([say::unnamed(sql, &[]), say::sync()].concat()));
    }
    steps.extend(oracle::ask([say::parse("l", "LISTEN p"), say::parse("n", "NOTIFY p"), say::sync()].concat()));
    for name in ["l", "n", "n"] {
        steps.extend(oracle::ask([say::bind("", name, &[]), say::execute("", 0), say::sync()].concat()));
    }
    oracle::same(cluster(), &proxy, &tenant, &steps).await;
}

#[tokio::test]
async fn a_pipeline_that_listens_and_leaves_is_answered_in_full() {
    let (tenant, proxy) = served_by(2).await;
    let mut client = proxy.connect(&tenant).login().await;
    for _ in 0..3 {
        let batch = |sql: &str| [say::unnamed(sql, &[]), say::sync()].concat();
        client
            .send(
                &[
                    batch("LISTEN a"),
                    batch("SELECT 1"),
                    batch("LISTEN b"),
                    say::query("SELECT 2"),
                    batch("SELECT 3"),
                    batch("UNLISTEN a"),
                    say::query("SELECT pg_listening_channels()"),
                ]
                .concat(),
            )
            .await;
        for _ in 0..6 {
            client.until_ready().await.ok();
        }
        assert_eq!(client.until_ready().await.value(), "b");
        handed_over(&proxy, &tenant, 1).await;
    }
}

#[tokio::test]
async fn what_a_trigger_notifies_is_heard() {
    let (tenant, proxy) = served_by(2).await;
    let mut speaker = proxy.connect(&tenant).login().await;
    speaker.run("CREATE TABLE t (n int)").await;
    let body = "BEGIN PERFORM pg_notify('rows', NEW.n::text); RETURN NEW; END";
    speaker.run(&format!("CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $f$ {body} $f$")).await;
    speaker.run("CREATE TRIGGER tell AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION tell()").await;
    let mut listener = proxy.connect(&tenant).login().await;
    listener.run("LISTEN rows").await;
    handed_over(&proxy, &tenant, 1).await;
    speaker.run("INSERT INTO t VALUES (1), (2)").await;
    assert_eq!(until(&mut listener, "2").await, ["1", "2"]);
    // And its own, which nothing in the text announces.
    listener.send(&say::query("INSERT INTO t VALUES (3)")).await;
    let mut messages = Vec::new();
    while messages.len() < 3 {
        messages.push(listener.next().await.expect("a message").tag);
    }
    messages.sort_unstable();
    assert_eq!(messages, *b"ACZ");
}

#[tokio::test]
async fn one_tenants_channel_is_not_anothers() {
    let tenants = [cluster().tenant("listen").await, cluster().tenant("listen").await];
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenants[0]).tenant(&tenants[1]).start().await;
    let mut listeners = Vec::new();
    for tenant in &tenants {
        let mut listener = proxy.connect(tenant).login().await;
        listener.run("LISTEN news").await;
        handed_over(&proxy, tenant, 1).await;
        listeners.push(listener);
    }
    for (n, tenant) in tenants.iter().enumerate() {
        proxy.connect(tenant).login().await.run(&format!("NOTIFY news, 'for {n}'")).await;
    }
    for (n, listener) in listeners.iter_mut().enumerate() {
        assert_eq!(heard(listener).await.1, format!("for {n}"));
        assert_eq!(listener.query("SELECT 1").await.ok().tags(), "TDCZ", "one and no more");
    }
}

#[tokio::test]
async fn a_listener_with_an_encoding_of_its_own_hears_in_it() {
    let (tenant, proxy) = served_by(3).await;
    let mut utf8 = proxy.connect(&tenant).login().await;
    utf8.run("LISTEN words").await;
    handed_over(&proxy, &tenant, 1).await;
    let mut latin = proxy.connect(&tenant).login().await;
    latin.run("SET client_encoding = 'LATIN1'").await;
    latin.run("LISTEN words").await;
    proxy.connect(&tenant).login().await.run("NOTIFY words, 'é'").await;
    assert_eq!(heard(&mut utf8).await.1, "é");
    let message = latin.next().await.expect("a notification");
    assert_eq!(message.body[message.body.len() - 2..], [0xE9, 0]);
}

#[tokio::test]
async fn a_listener_that_does_not_read_is_ended_and_nobody_else_notices() {
    let (tenant, proxy) = served_by(2).await;
    let mut deaf = proxy.connect(&tenant).login().await;
    let mut good = proxy.connect(&tenant).login().await;
    deaf.run("LISTEN flood").await;
    good.run("LISTEN flood").await;
    handed_over(&proxy, &tenant, 1).await;
    let reading = tokio::spawn(async move { until(&mut good, "end").await.len() });
    let mut speaker = proxy.connect(&tenant).login().await;
    let payload = "f".repeat(7900);
    let mut sent = 0;
    while !proxy.log().contains("does not read its notifications") {
        for _ in 0..10 {
            let texts: Vec<_> = (0..20).map(|n| format!("NOTIFY flood, '{sent}{n}{payload}'")).collect();
            speaker.run(&texts.join(";")).await;
            sent += 20;
        }
        assert!(sent < 20_000, "never ended");
    }
    speaker.run("NOTIFY flood, 'end'").await;
    assert_eq!(reading.await.expect("no panic"), sent + 1, "the other one heard it all");
    let told = deaf.until_end().await;
    let fault = told.faults().pop().expect("told why");
    assert_eq!((fault.severity.as_str(), fault.code.as_str()), ("FATAL", "53200"));
    assert!(fault.detail.contains("proxy_code=NOTIFICATIONS"), "{}", fault.detail);
    assert_eq!(told.faults().len(), 1);
}

#[tokio::test]
async fn when_the_shared_connection_is_terminated_its_listeners_are_told_once() {
    let (tenant, proxy) = served_by(2).await;
    let mut listeners = Vec::new();
    for n in 0..3 {
        let mut listener = proxy.connect(&tenant).login().await;
        listener.run(&format!("LISTEN c{n}")).await;
        listeners.push(listener);
    }
    handed_over(&proxy, &tenant, 3).await;
    let mut other = proxy.connect(&tenant).login().await;
    let hub = eventually("the listening session", async || {
        let sessions = cluster().sessions(&tenant).await;
        sessions.iter().find(|s| s.query.starts_with("LISTEN \"")).map(|s| s.pid)
    })
    .await;
    cluster().terminate(hub).await;
    for listener in &mut listeners {
        let told = listener.until_end().await;
        let fault = told.fatal("57P01");
        assert!(fault.detail.contains("proxy_code=LISTENER_LOST"), "{}", fault.detail);
    }
    assert_eq!(other.value("SELECT 1").await, "1", "who does not listen notices nothing");
    let mut again = proxy.connect(&tenant).login().await;
    again.run("LISTEN c0").await;
    other.run("NOTIFY c0, 'again'").await;
    assert_eq!(heard(&mut again).await.1, "again");
}

#[tokio::test]
async fn who_leaves_frees_its_channel_and_the_last_one_the_connection() {
    let (tenant, proxy) = served_by(2).await;
    let mut clients = BTreeMap::new();
    for n in 0..3 {
        let mut client = proxy.connect(&tenant).login().await;
        client.run(&format!("LISTEN c{n}; LISTEN shared")).await;
        clients.insert(n, client);
    }
    handed_over(&proxy, &tenant, 4).await;
    clients.remove(&0).expect("there").leave().await;
    handed_over(&proxy, &tenant, 3).await;
    clients.remove(&1).expect("there").vanish();
    handed_over(&proxy, &tenant, 2).await;
    clients.remove(&2).expect("there").leave().await;
    handed_over(&proxy, &tenant, 0).await;
    eventually("nothing listens, and no connection is in use", async || {
        let metrics = proxy.metrics().await;
        let of = format!("tenant=\"{}\"", tenant.name);
        let mut lines = metrics.lines().filter(|l| l.starts_with("tenantry_server_connections{") && l.contains(&of));
        lines.any(|l| l.contains("state=\"active\"") && l.ends_with(" 0")).then_some(())
    })
    .await;
    let mut next = proxy.connect(&tenant).login().await;
    assert_eq!(next.value("SELECT count(*) FROM pg_listening_channels()").await, "0");
}

#[tokio::test]
async fn a_pause_and_a_rename_find_no_listener_in_their_way() {
    let (proxy, api) = control_proxy().await;
    let mut tenant = api.create("heard").await;
    let mut listener = proxy.connect(&tenant).login().await;
    listener.run("LISTEN news").await;
    handed_over(&proxy, &tenant, 1).await;
    let mut speaker = proxy.connect(&tenant).login().await;
    speaker.run("NOTIFY news, 'before'").await;
    assert_eq!(heard(&mut listener).await.1, "before");
    // What is notified as the last thing before a pause is heard.
    speaker.run("BEGIN; NOTIFY news, 'last'").await;
    let pausing = {
        let api = api.clone();
        tokio::spawn(async move { api.post("/v1/tenants/heard/pause", json!({})).await })
    };
    eventually("it is paused", async || (api.get("/v1/tenants/heard").await.body["state"] == "paused").then_some(()))
        .await;
    speaker.run("COMMIT").await;
    assert_eq!(heard(&mut listener).await.1, "last");
    assert_eq!(pausing.await.expect("no panic").status, 200);
    eventually("nothing of it is open", async || cluster().sessions(&tenant).await.is_empty().then_some(())).await;
    api.post("/v1/tenants/heard/resume", json!({})).await;
    listens(&tenant).await;
    speaker.run("NOTIFY news, 'resumed'").await;
    assert_eq!(heard(&mut listener).await.1, "resumed");
    for to in ["heard_better", "heard"] {
        let renamed = api.post(&format!("/v1/tenants/{}/rename", tenant.name), json!({ "to": to })).await;
        assert_eq!(renamed.status, 200, "{}", renamed.body);
        tenant.name = to.to_owned();
        listens(&tenant).await;
        speaker.run(&format!("NOTIFY news, 'to {to}'")).await;
        assert_eq!(heard(&mut listener).await.1, format!("to {to}"));
    }
    let drained = api.post("/v1/tenants/heard/drain", json!({ "deadline_ms": 60_000 })).await;
    assert_eq!(drained.body["tenant"]["state"], "drained", "{}", drained.body);
    listener.until_end().await.fatal("57P01");
}

/// Some session of the tenant's database listens.
async fn listens(tenant: &Tenant) {
    eventually("the hub is back", async || {
        let sessions = cluster().sessions(tenant).await;
        sessions.iter().any(|s| s.query.starts_with("LISTEN \"news\"") && s.state == "idle").then_some(())
    })
    .await;
}

#[tokio::test]
async fn shutdown_ends_with_listeners() {
    let (tenant, proxy) = served_by(2).await;
    let mut listener = proxy.connect(&tenant).login().await;
    listener.run("LISTEN news").await;
    handed_over(&proxy, &tenant, 1).await;
    proxy.signal("TERM");
    listener.until_end().await.fatal("57P01");
    assert_eq!(proxy.exit().await, 0);
}
