//! Clients that mean harm or are broken (C8–C14, C17, C19): told what PostgreSQL tells them, and no server connection lost.

use std::time::Duration;

use tenantry_testkit::{
    Client, Connect, Proxy, ProxyBuilder, Step, Tenant,
    client::{Protection, send_cancel},
    cluster, eventually, one_server,
    oracle::{self, ask},
    say, within,
};

/// What comes in answer to raw bytes on a fresh connection, up to its end.
async fn raw(what: &str, connect: &Connect, bytes: &[u8]) -> Vec<String> {
    let mut client = connect.open().await.expect("connected");
    client.send(bytes).await;
    within(what, Duration::from_secs(10), client.until_end()).await.trace()
}

/// A session that has used the one server connection, and that connection's process.
async fn with_server(proxy: &Proxy, tenant: &Tenant) -> (Client, i32) {
    let mut client = proxy.connect(tenant).login().await;
    let backend = client.backend().await;
    (client, backend)
}

#[tokio::test]
async fn incident_c09_frames_of_impossible_length_cost_no_server_connection() {
    let (tenant, proxy) = one_server("hostile").await;
    let (_first, backend) = with_server(&proxy, &tenant).await;
    let frames = [
        say::header(b'Q', 0),
        say::header(b'Q', 3),
        say::header(b'Q', -1),
        say::header(b'Q', i32::MIN),
        say::header(b'Q', 0x4000_0000),
        say::header(b'P', i32::MAX),
        say::header(b'B', 0x3FFF_FFFF),
        say::header(b'd', -5),
        say::header(b'S', 10_001),
        say::header(b'E', 10_001),
        say::header(b'D', 20_000),
        say::header(b'C', 1 << 20),
        say::header(b'H', 1 << 20),
        say::header(b'c', 1 << 20),
        say::header(b'X', 1 << 20),
    ];
    for frame in &frames {
        let mut client = proxy.connect(&tenant).login().await;
        client.send(frame).await;
        let fault = client.until_end().await.fatal("08P01");
        assert!(!fault.message.is_empty(), "{frame:?}");
    }
    for frame in &frames[..5] {
        let mut client = proxy.connect(&tenant).login().await;
        client.run("BEGIN").await;
        client.send(frame).await;
        client.until_end().await.fatal("08P01");
    }
    let mut after = proxy.connect(&tenant).login().await;
    assert_eq!(after.backend().await, backend, "the server connection was lost");
    assert_eq!(cluster().settled(&tenant, 1).await.len(), 1);
}

#[tokio::test]
async fn a_declared_gigabyte_that_never_comes_takes_no_memory() {
    let (tenant, proxy) = one_server("hostile").await;
    let (_first, _) = with_server(&proxy, &tenant).await;
    let before = proxy.resident_kib();
    let mut open = Vec::new();
    for tag in [b'Q', b'P', b'B', b'd', b'F'] {
        for _ in 0..20 {
            let mut client = proxy.connect(&tenant).login().await;
            client.send(&say::header(tag, 0x3FFF_FFF0)).await;
            client.send(b"begin").await;
            open.push(client);
        }
    }
    let grown = proxy.resident_kib().saturating_sub(before);
    assert!(grown < 64 * 1024, "{grown} KiB more");
    open.into_iter().for_each(Client::vanish);
    let mut after = proxy.connect(&tenant).login().await;
    assert_eq!(after.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn unknown_message_types_are_answered_as_by_postgresql() {
    let (tenant, proxy) = one_server("hostile").await;
    let (_first, backend) = with_server(&proxy, &tenant).await;
    for tag in [b'y', b'R', b'Z', b'T', b'p', b'K', 0, 255] {
        let steps = [Step::Send(say::message(tag, b"")), Step::End];
        oracle::same(cluster(), &proxy, &tenant, &steps).await;
    }
    let mut after = proxy.connect(&tenant).login().await;
    assert_eq!(after.backend().await, backend, "the server connection was lost");
}

#[tokio::test]
async fn broken_first_packets_are_answered_as_by_postgresql() {
    let (tenant, proxy) = one_server("hostile").await;
    let mut too_long = say::startup(0, &[("user", &"u".repeat(10_050))]);
    too_long.truncate(10_010);
    let packets: [(&str, Vec<u8>); 8] = [
        ("length 0", vec![0, 0, 0, 0]),
        ("length 7", vec![0, 0, 0, 7, 0, 3, 0]),
        ("length 2^31", vec![0x80, 0, 0, 0]),
        ("too long", too_long),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("no terminator", say::packet(0x0003_0000, b"user\0x\0")),
        ("no user", say::startup(0, &[("database", &tenant.name)])),
        ("protocol 4.0", say::packet(0x0004_0000, b"user\0x\0\0")),
    ];
    for (what, packet) in packets {
        let codes = |trace: Vec<String>| {
            trace.iter().map(|l| l.split(' ').take(3).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
        };
        let direct = codes(raw(&format!("{what}, directly"), &cluster().direct(&tenant), &packet).await);
        let pooled = codes(raw(what, &proxy.connect(&tenant), &packet).await);
        assert_eq!(pooled, direct, "{what}");
    }
    // PostgreSQL answers protocol 2.0 in that protocol's own format; we in ours.
    let old = raw("protocol 2.0", &proxy.connect(&tenant), &say::packet(0x0002_0000, b"\0")).await;
    assert!(old.len() == 2 && old[0].starts_with("E FATAL 0A000"), "{old:?}");
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_first_packet_that_never_ends_is_closed_at_the_login_timeout() {
    let tenant = cluster().tenant("hostile").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("listen.client_login_timeout", "300ms").start().await;
    let start = say::startup(0, &[("user", &tenant.role), ("database", &tenant.name)]);
    for upto in [0, 1, 4, 8, start.len() - 1, start.len()] {
        let mut client = proxy.connect(&tenant).open().await.expect("connected");
        client.send(&start[..upto]).await;
        let answer = client.until_end().await;
        assert!(answer.faults().len() <= 1, "{upto}: {:?}", answer.trace());
    }
    let mut tls = proxy.connect(&tenant).open().await.expect("connected");
    tls.send(&say::packet(say::SSL_REQUEST, b"")).await;
    assert_eq!(tls.byte().await, Some(b'S'));
    tls.send(b"\x16\x03\x01").await;
    assert!(tls.byte().await.is_none_or(|byte| byte == 0x15), "closed, or a TLS alert");
    assert_eq!(cluster().sessions(&tenant).await.len(), 0, "nobody logged in");
}

#[tokio::test]
async fn incident_f06_plaintext_behind_an_sslrequest_is_refused() {
    let (tenant, proxy) = one_server("hostile").await;
    let login = say::startup(0, &[("user", &tenant.role), ("database", &tenant.name)]);
    let injected = [say::packet(say::SSL_REQUEST, b""), login].concat();
    let mut client = proxy.connect(&tenant).open().await.expect("connected");
    client.send(&injected).await;
    // PostgreSQL says so in the clear, before or after its S; what counts is that the session ends there.
    let mut bytes = Vec::new();
    while let Some(byte) = client.byte().await {
        bytes.push(byte);
    }
    let text = String::from_utf8_lossy(&bytes);
    assert!(!text.contains("SCRAM"), "the login went on: {text:?}");
    assert!(bytes.is_empty() || text.contains("08P01") || bytes == b"S", "{text:?}");
}

#[tokio::test]
async fn ssl_and_gss_requests_are_taken_once_each() {
    let (tenant, proxy) = one_server("hostile").await;
    let request = |code| say::packet(code, b"");
    let mut client = proxy.connect(&tenant).open().await.expect("connected");
    client.send(&request(say::GSSENC_REQUEST)).await;
    assert_eq!(client.byte().await, Some(b'N'));
    client.send(&request(say::GSSENC_REQUEST)).await;
    client.until_end().await.fatal("0A000");
    for code in [say::SSL_REQUEST, say::GSSENC_REQUEST] {
        let mut inside = proxy.connect(&tenant).protection(Protection::Tls).open().await.expect("connected");
        inside.send(&request(code)).await;
        inside.until_end().await.fatal("0A000");
    }
}

#[tokio::test]
async fn cancel_requests_of_any_shape_are_closed_without_an_answer() {
    let (tenant, proxy) = one_server("hostile").await;
    let (mut client, _) = with_server(&proxy, &tenant).await;
    let (process, _) = client.key.clone().expect("a key");
    for secret in [0, 1, 3, 4, 8, 32, 252, 256, 257, 1000] {
        send_cancel(&proxy.endpoint(), &say::cancel(process, &vec![7; secret])).await;
    }
    send_cancel(&proxy.endpoint(), &say::cancel(0xFFFF_FFFF, &[7; 4])).await;
    send_cancel(&proxy.endpoint(), &say::packet(say::CANCEL_REQUEST, b"")).await;
    assert_eq!(client.value("SELECT 1").await, "1");
    assert!(proxy.runs());
}

#[tokio::test]
async fn two_thousand_wrong_cancels_do_not_reach_the_server() {
    let (tenant, proxy) = one_server("hostile").await;
    let (mut client, _) = with_server(&proxy, &tenant).await;
    let endpoint = proxy.endpoint();
    let floods: Vec<_> = (0..20)
        .map(|n: u32| {
            let endpoint = endpoint.clone();
            tokio::spawn(async move {
                for m in 0..100 {
                    send_cancel(&endpoint, &say::cancel(n * 1000 + m, &m.to_be_bytes())).await;
                }
            })
        })
        .collect();
    for n in 0..50 {
        assert_eq!(client.value(&format!("SELECT {n}")).await, n.to_string());
    }
    for flood in floods {
        flood.await.expect("a flood ended");
    }
    assert_eq!(client.value("SELECT 1").await, "1");
    assert_eq!(proxy.metric("tenantry_cancels_total").await, 0.0);
}

#[tokio::test]
async fn malformed_binds_are_answered_as_by_postgresql() {
    let (tenant, proxy) = one_server("hostile").await;
    let (_first, backend) = with_server(&proxy, &tenant).await;
    let bodies: [(&str, &[u8]); 7] = [
        ("count -1", b"\0\0\0\0\xff\xff\0\0"),
        ("length -2", b"\0\0\0\0\0\x01\xff\xff\xff\xfe\0\0"),
        ("length 2^31-1", b"\0\0\0\0\0\x01\x7f\xff\xff\xff\0\0"),
        ("65535 parameters, none there", b"\0\0\0\0\xff\xff"),
        ("formats 65535", b"\0\0\xff\xff\0\x01\0\0\0\x011\0\0"),
        ("no end of the names", b"abc"),
        ("empty", b""),
    ];
    for (what, body) in bodies {
        let batch =
            [say::parse("", "SELECT $1::int"), say::message(b'B', body), say::execute("", 0), say::sync()].concat();
        let steps = [ask(batch), ask(say::query("SELECT 1"))].concat();
        let direct = oracle::trace(&cluster().direct(&tenant), &steps).await;
        let pooled = oracle::trace(&proxy.connect(&tenant), &steps).await;
        assert_eq!(pooled, direct, "{what}");
    }
    assert_eq!(proxy.connect(&tenant).login().await.backend().await, backend, "the server connection was lost");
}

#[tokio::test]
async fn malformed_parse_describe_close_and_execute_are_answered_as_by_postgresql() {
    let (tenant, proxy) = one_server("hostile").await;
    let messages = [
        say::message(b'P', b""),
        say::message(b'P', b"name"),
        say::message(b'P', b"n\0SELECT 1"),
        say::message(b'P', b"n\0SELECT 1\0"),
        say::message(b'P', b"n\0SELECT 1\0\0\x05"),
        say::message(b'P', b"n\0SELECT 1\0\0\0extra"),
        say::message(b'D', b""),
        say::message(b'D', b"S"),
        say::message(b'D', b"Sname"),
        say::message(b'C', b""),
        say::message(b'C', b"Sx\0y"),
        say::message(b'E', b""),
        say::message(b'E', b"p\0\0"),
        say::message(b'H', b"x"),
    ];
    for message in messages {
        let steps = [ask([message.clone(), say::sync()].concat()), ask(say::query("SELECT 1"))].concat();
        let direct = oracle::trace(&cluster().direct(&tenant), &steps).await;
        let pooled = oracle::trace(&proxy.connect(&tenant), &steps).await;
        assert_eq!(pooled, direct, "{:?}", String::from_utf8_lossy(&message));
    }
}

#[tokio::test]
async fn a_query_without_terminator_is_answered_as_by_postgresql() {
    let (tenant, proxy) = one_server("hostile").await;
    for body in [&b"SELECT 1"[..], b"", b"SELECT 1\0SELECT 2\0"] {
        let steps = [ask(say::message(b'Q', body)), ask(say::query("SELECT 1"))].concat();
        oracle::same(cluster(), &proxy, &tenant, &steps).await;
    }
}

#[tokio::test]
async fn a_pipeline_without_reading_is_held_back_in_bounded_memory() {
    let (tenant, proxy) = one_server("hostile").await;
    let (_first, _) = with_server(&proxy, &tenant).await;
    let before = proxy.resident_kib();
    let mut greedy = proxy.connect(&tenant).login().await;
    greedy.deadline = Duration::from_secs(2);
    let chunk = say::query("SELECT repeat('x', 10000)").repeat(1000);
    // 200 MB of answers if nobody stopped it; the write stalls when all buffers are full.
    let stalled = tokio::time::timeout(Duration::from_secs(2), async {
        for _ in 0..20 {
            greedy.send(&chunk).await;
        }
    });
    let _ = stalled.await;
    let grown = proxy.resident_kib().saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB more");
    greedy.vanish();
    let mut after = proxy.connect(&tenant).login().await;
    assert_eq!(after.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_message_above_the_limit_is_refused_and_the_session_goes_on() {
    let tenant = cluster().tenant("hostile").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("listen.max_message_size", "64KiB").start().await;
    let mut client = proxy.connect(&tenant).login().await;
    let large = format!("SELECT length('{}')", "x".repeat(200_000));
    let answer = client.ask(&[say::parse("large", &large), say::sync()].concat()).await;
    answer.error("54000");
    assert_eq!(client.value("SELECT 1").await, "1");
    // Only what must be held whole is limited.
    assert_eq!(client.value(&large).await, "200000");
}

#[tokio::test]
async fn large_messages_above_the_memory_of_all_clients_get_53200_and_the_session_goes_on() {
    let tenant = cluster().tenant("hostile").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("listen.max_message_memory", "300KiB").start().await;
    let large = say::parse("large", &format!("SELECT length('{}')", "x".repeat(200_000)));
    let mut slow = proxy.connect(&tenant).login().await;
    // All but its end: it is held until the rest comes.
    let (most, rest) = large.split_at(large.len() - 10);
    slow.send(most).await;
    let held = async || (proxy.metric("tenantry_message_memory_bytes").await > 200_000.0).then_some(());
    eventually("the message is held", held).await;
    let mut other = proxy.connect(&tenant).login().await;
    other.ask(&[large.clone(), say::sync()].concat()).await.error("53200");
    assert_eq!(other.value("SELECT 1").await, "1");
    slow.ask(&[rest.to_vec(), say::sync()].concat()).await.ok();
    // A text that PostgreSQL cannot read, and a name that is taken, which it sees only then: neither keeps memory.
    slow.ask(&[say::parse("large", &"x".repeat(70_000)), say::sync()].concat()).await.error("42601");
    slow.ask(&[say::parse("large", &format!("SELECT 1 -- {}", "x".repeat(70_000))), say::sync()].concat())
        .await
        .error("42P05");
    assert!(proxy.metric("tenantry_message_memory_bytes").await > 200_000.0, "the statement itself is held");
    slow.ask(&[say::close_statement("large"), say::sync()].concat()).await.ok();
    let free = async || (proxy.metric("tenantry_message_memory_bytes").await == 0.0).then_some(());
    eventually("the memory is free again", free).await;
    other.ask(&[large, say::sync()].concat()).await.ok();
}

#[tokio::test]
async fn clients_above_max_client_conn_get_53300_and_the_others_go_on() {
    let tenant = cluster().tenant("hostile").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("listen.max_client_conn", 3).start().await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(proxy.connect(&tenant).login().await);
    }
    proxy.connect(&tenant).try_login().await.err().expect("refused").fatal("53300");
    assert_eq!(clients[0].value("SELECT 1").await, "1");
    clients.pop().expect("three").leave().await;
    eventually("a place is free again", async || proxy.connect(&tenant).try_login().await.ok()).await;
}

#[tokio::test]
async fn sockets_that_say_nothing_take_no_clients_place() {
    let tenant = cluster().tenant("hostile").await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("listen.max_client_conn", 3).start().await;
    let mut silent = Vec::new();
    // More than may be on their way, too: the ones that have been silent longest go.
    for _ in 0..100 {
        silent.push(proxy.connect(&tenant).open().await.expect("connected"));
    }
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(proxy.connect(&tenant).login().await);
    }
    for client in &mut clients {
        assert_eq!(client.value("SELECT 1").await, "1");
    }
    let first = within("the first of them is closed", Duration::from_secs(10), silent[0].until_end()).await;
    assert!(first.messages.is_empty() && first.closed);
    proxy.connect(&tenant).try_login().await.err().expect("refused").fatal("53300");
}

#[tokio::test]
async fn clients_above_the_tenants_max_client_conn_get_53300_and_other_tenants_go_on() {
    let (tenant, other) = (cluster().tenant("hostile").await, cluster().tenant("hostile").await);
    let limit = format!("tenants.{}.max_client_conn", tenant.name);
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).tenant(&other).set(&limit, 2).start().await;
    let mut clients = vec![proxy.connect(&tenant).login().await, proxy.connect(&tenant).login().await];
    proxy.connect(&tenant).try_login().await.err().expect("refused").fatal("53300");
    assert_eq!(proxy.connect(&other).login().await.value("SELECT 1").await, "1");
    assert_eq!(clients[0].value("SELECT 1").await, "1");
    clients.pop().expect("two").leave().await;
    eventually("a place is free again", async || proxy.connect(&tenant).try_login().await.ok()).await;
}
