//! The API against hostile names, bodies, tokens and timing, and with its control database away.

use std::{collections::BTreeSet, process::Command, time::Duration};

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Mode, ProxyBuilder, Relay, cluster,
    control::{control_builder, control_proxy, control_role},
    eventually,
    proxy::binary,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const ACCESS: [&str; 4] = ["nobody", "viewer", "operator", "admin"];

/// What each may do, as told in the README: written here once more, so that a slip in the table is seen.
fn least(method: &str, path: &str) -> &'static str {
    match (method, path) {
        ("get", "/v1/audit" | "/v1/tokens") | ("post" | "delete", "/v1/tokens" | "/v1/tokens/{token}") => "admin",
        ("delete", _) => "admin",
        ("get", _) => "viewer",
        _ => "operator",
    }
}

#[tokio::test]
async fn every_operation_of_the_document_asks_for_its_access_and_no_less() {
    let (proxy, admin) = control_proxy().await;
    let (viewer, operator) = (Api::new(&proxy, "viewer").await, Api::new(&proxy, "operator").await);
    let nobody = admin.with_token("");
    let document = nobody.get("/openapi.json").await.body;
    assert_eq!(document["openapi"], "3.1.0");
    let mut seen = 0;
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for method in methods.as_object().expect("methods").keys() {
            // Nothing of that name is there: who may come in is told 404 or 422.
            let real = path.replace("{tenant}", "nothing").replace("{job}", "999999").replace("{token}", "nothing");
            let body = matches!(method.as_str(), "post" | "patch" | "delete").then(|| json!({}));
            for (rank, api) in [&nobody, &viewer, &operator, &admin].into_iter().enumerate() {
                // Whoever has no token is soon told to slow down.
                let reply = eventually("an answer", async || {
                    let prefer = [("Prefer", "respond-async")];
                    let reply = api.send(&method.to_uppercase(), &real, body.as_ref(), &prefer).await;
                    (reply.status != 429).then_some(reply)
                })
                .await;
                let needed = ACCESS.iter().position(|access| *access == least(method, path)).expect("known");
                let expected: &[u16] = match rank {
                    0 => &[401],
                    rank if rank < needed => &[403],
                    _ => &[200, 404, 409, 422],
                };
                assert!(
                    expected.contains(&reply.status),
                    "{method} {path} as {}: {} {}",
                    ACCESS[rank],
                    reply.status,
                    reply.body
                );
                seen += 1;
            }
        }
    }
    assert!(seen >= 4 * 25, "only {seen}: is the document whole?");
    // What is no operation is nobody's.
    for (method, path) in [("PUT", "/v1/tenants"), ("TRACE", "/v1/tenants/x"), ("DELETE", "/v1/servers")] {
        assert_eq!(admin.send(method, path, None, &[]).await.status, 405, "{method} {path}");
    }
    assert_eq!(admin.get("/v1/nothing").await.status, 404);
}

#[tokio::test]
async fn hostile_names_are_refused_everywhere_and_reach_nothing() {
    let (_proxy, api) = control_proxy().await;
    api.create("honest").await;
    let long = "a".repeat(49);
    let names = [
        "",
        "A",
        "a b",
        "a-b",
        "a\"b",
        "a';drop table x;--",
        "a\0b",
        "..",
        "../../etc/passwd",
        "a/b",
        "a\\b",
        "_a",
        "1a",
        &long,
        "\u{430}cme",
        "acme\u{200b}",
        "\u{202e}emca",
        "postgres",
        "template0",
        "template1",
        "rdsadmin",
        "pg_x",
        "pgbouncer",
        "tenantry",
        "*",
        "null",
        "true ",
    ];
    for name in names.into_iter().filter(|name| *name != "null") {
        let made = api.post("/v1/tenants", json!({ "name": name })).await;
        assert_eq!(made.status, 422, "{name:?}: {}", made.body);
        let renamed = api.post("/v1/tenants/honest/rename", json!({ "to": name })).await;
        assert_eq!(renamed.status, 422, "{name:?}: {}", renamed.body);
        let escaped: String = name.bytes().map(|byte| format!("%{byte:02X}")).collect();
        for path in [format!("/v1/tenants/{escaped}"), format!("/v1/explain/{escaped}")] {
            let shown = api.get(&path).await;
            assert!(
                matches!(shown.status, 200 | 404) && (name.is_empty() || shown.status == 404),
                "{name:?}: {}",
                shown.body
            );
        }
    }
    let sql = "SELECT count(*) FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1', 'tenantry_control')";
    assert_eq!(cluster().sql(sql).await.as_deref(), Some("1"));
}

#[tokio::test]
async fn bodies_that_are_too_large_too_deep_or_wrong_are_refused_by_their_status() {
    let (proxy, api) = control_proxy().await;
    let raw = |body: String, kind: &'static str| {
        let (address, token) = (proxy.admin(), api.token.clone());
        async move {
            let head = format!(
                "POST /v1/tenants HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: {kind}\r\n\
                 Content-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let mut stream = TcpStream::connect(address).await.expect("connect");
            let _ = stream.write_all(head.as_bytes()).await;
            // It may be answered, and closed, before all of it was read.
            let _ = stream.write_all(body.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            let text = String::from_utf8_lossy(&answer).into_owned();
            text.split(' ').nth(1).unwrap_or_default().to_owned()
        }
    };
    let json = "application/json";
    assert_eq!(raw(format!("{{\"name\":\"{}\"}}", "a".repeat(70_000)), json).await, "413");
    assert_eq!(raw("[".repeat(10_000), json).await, "400");
    assert_eq!(raw("{\"name\": \"a\"".to_owned(), json).await, "400");
    assert_eq!(raw("{\"name\":\"a\"}".to_owned(), "text/xml").await, "415");
    for body in
        [json!({ "name": "ok", "sudo": true }), json!({ "name": 1 }), json!({}), json!([]), json!(null), json!("x")]
    {
        let reply = api.post("/v1/tenants", body.clone()).await;
        assert_eq!(reply.status, 422, "{body}: {}", reply.body);
        assert_eq!(reply.headers["content-type"], "application/problem+json");
    }
    for body in [json!([]), json!(1), json!("x")] {
        assert_eq!(api.post("/v1/tenants/nobody/pause", body.clone()).await.status, 422, "{body}");
    }
    for spec in [
        json!({ "floor": 31 }),
        json!({ "floor": 5, "ceiling": 4 }),
        json!({ "ceiling": 0 }),
        json!({ "weight": 0 }),
        json!({ "weight": 1001 }),
        json!({ "extensions": ["plpython3u"] }),
        json!({ "settings": { "session_preload_libraries": "x" } }),
        json!({ "settings": { "work_mem": "a\nb" } }),
        json!({ "deployed": "2026-13-01" }),
        json!({ "owner": "x\u{0}" }),
        json!({ "pool_mode": "free" }),
        json!({ "floor": -1 }),
        json!({ "floor": 1.5 }),
        json!({ "floor": "1" }),
    ] {
        let reply = api.post("/v1/tenants", json!({ "name": "ok", "spec": spec })).await;
        assert_eq!(reply.status, 422, "{spec}: {}", reply.body);
    }
    assert_eq!(api.get("/v1/tenants/ok").await.status, 404);
}

#[tokio::test]
async fn a_body_that_comes_too_slowly_ends_in_408_and_holds_up_nobody() {
    let (proxy, api) = control_proxy().await;
    let mut slow = TcpStream::connect(proxy.admin()).await.expect("connect");
    let head = format!(
        "POST /v1/tenants HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{",
        api.token
    );
    slow.write_all(head.as_bytes()).await.expect("write");
    assert_eq!(api.get("/v1/tenants").await.status, 200);
    let mut answer = [0; 12];
    let read = tokio::time::timeout(Duration::from_secs(20), slow.read_exact(&mut answer)).await;
    read.expect("an answer within the limit").expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 408");
}

#[tokio::test]
async fn tokens_that_are_wrong_expired_or_deleted_open_nothing_and_guessing_is_slowed_down() {
    let (proxy, api) = control_proxy().await;
    let made = api.post("/v1/tokens", json!({ "label": "short", "access": "viewer", "days": 1 })).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let text = made.body["token"].as_str().expect("a token").to_owned();
    let guest = api.with_token(&text);
    assert_eq!(guest.get("/v1/tenants").await.status, 200);
    // It expires.
    let id = made.body["id"].as_str().expect("an id");
    let expire = format!(
        "UPDATE tenantry.tokens SET expires_at = now() WHERE id = '{id}'; UPDATE tenantry.meta SET revision = revision + 1"
    );
    cluster().sql_in("tenantry_control", &expire).await;
    eventually("it has expired", async || (guest.get("/v1/tenants").await.status == 401).then_some(())).await;
    assert_eq!(api.send("DELETE", &format!("/v1/tokens/{id}"), None, &[]).await.status, 204);
    // Only a hash of any token is stored, and none is in the log.
    let stored = cluster().sql_in("tenantry_control", "SELECT string_agg(t::text, '') FROM tenantry.tokens t").await;
    let secret = api.token.rsplit('_').next().expect("a secret");
    assert!(!stored.unwrap_or_default().contains(secret) && !proxy.log().contains(secret));
    // Whoever guesses is told to slow down, and whoever has a token is not.
    let mut slowed = false;
    for n in 0..200 {
        let reply = api.with_token(&format!("tny_0123456789ab_{n}")).get("/v1/tenants").await;
        slowed |= reply.status == 429 && reply.headers.contains_key("retry-after");
        assert!(matches!(reply.status, 401 | 429));
    }
    assert!(slowed, "200 guesses, and none was slowed down");
    assert_eq!(api.get("/v1/tenants").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_who_create_the_same_tenant_at_once_get_one() {
    let (_proxy, api) = control_proxy().await;
    for round in 0..5 {
        let name = format!("twin_{round}");
        let (a, b) = tokio::join!(
            api.post("/v1/tenants", json!({ "name": name })),
            api.post("/v1/tenants", json!({ "name": name }))
        );
        let statuses = BTreeSet::from([a.status, b.status]);
        assert_eq!(statuses, BTreeSet::from([201, 409]), "{} {}", a.body, b.body);
    }
}

#[tokio::test]
async fn a_request_with_the_same_key_is_done_once() {
    let (_proxy, api) = control_proxy().await;
    let key = [("Idempotency-Key", "one")];
    let body = json!({ "name": "once" });
    let first = api.send("POST", "/v1/tenants", Some(&body), &key).await;
    let again = api.send("POST", "/v1/tenants", Some(&body), &key).await;
    assert_eq!((first.status, again.status), (201, 201), "{}", again.body);
    assert_eq!(first.body["job"]["id"], again.body["job"]["id"]);
    assert!(again.body["credentials"].is_null(), "the password is told once");
    let other = api.send("POST", "/v1/tenants", Some(&json!({ "name": "other" })), &key).await;
    assert_eq!(other.status, 422, "{}", other.body);
    assert_eq!(api.post("/v1/tenants", body).await.status, 409);
}

#[tokio::test]
async fn what_somebody_else_changed_is_not_overwritten() {
    let (_proxy, api) = control_proxy().await;
    api.create("shared").await;
    let tag = api.get("/v1/tenants/shared").await.headers["etag"].to_str().expect("text").to_owned();
    let change = json!({ "owner": "ada", "floor": 2 });
    assert_eq!(api.send("PATCH", "/v1/tenants/shared", Some(&change), &[]).await.status, 428);
    let changed = api.send("PATCH", "/v1/tenants/shared", Some(&change), &[("If-Match", &tag)]).await;
    assert_eq!((changed.status, &changed.body["spec"]["owner"]), (200, &json!("ada")), "{}", changed.body);
    assert_eq!(api.send("PATCH", "/v1/tenants/shared", Some(&change), &[("If-Match", &tag)]).await.status, 412);
    let taken = api.send("PATCH", "/v1/tenants/shared", Some(&json!({ "owner": null })), &[("If-Match", "*")]).await;
    assert_eq!((&taken.body["spec"]["owner"], &taken.body["spec"]["floor"]), (&Value::Null, &json!(2)));
    let registry = api.get("/v1/registry.md").await;
    assert!(registry.body.as_str().expect("text").contains("| shared |"), "{}", registry.body);
}

#[tokio::test]
async fn the_audit_log_has_what_was_wanted_and_what_came_of_it() {
    let (_proxy, api) = control_proxy().await;
    api.create("watched").await;
    api.post("/v1/tenants/watched/resume", json!({})).await;
    let rows = api.get("/v1/audit").await.body["items"].as_array().cloned().unwrap_or_default();
    let row = |action: &str, outcome: &str| {
        rows.iter().any(|row| row["action"] == action && row["outcome"] == outcome && row["tenant"] == "watched")
    };
    assert!(row("create", "intent") && row("create", "done"), "{rows:?}");
    assert!(row("resume", "intent") && row("resume", "done"), "{rows:?}");
    assert!(!json!(rows).to_string().contains("SCRAM-SHA-256$"), "a verifier is in the audit log");
}

#[tokio::test]
async fn a_job_can_be_cancelled_and_undoes_what_it_did() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("busy").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let begun = api
        .send(
            "POST",
            "/v1/tenants/busy/rename",
            Some(&json!({ "to": "calm", "wait_ms": 1_500 })),
            &[("Prefer", "respond-async")],
        )
        .await;
    assert_eq!(begun.status, 202, "{}", begun.body);
    let id = begun.body["job"]["id"].as_i64().expect("a number");
    assert_eq!(api.post("/v1/tenants/busy/pause", json!({})).await.status, 409, "one thing at a time");
    assert_eq!(api.post(&format!("/v1/jobs/{id}/cancel"), json!({})).await.status, 202);
    let events = api.get(&format!("/v1/jobs/{id}/events")).await;
    let text = events.body.as_str().expect("a stream");
    assert!(text.contains("event: step") && text.contains("event: end"), "{text}");
    let job = api.get(&format!("/v1/jobs/{id}")).await.body;
    assert!(matches!(job["state"].as_str(), Some("cancelled" | "failed")), "{job}");
    assert_eq!(client.value("SELECT current_database()").await, "busy");
    client.run("COMMIT").await;
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_control_database_it_serves_says_503_and_starts_from_disk() {
    let cluster = cluster();
    control_role(cluster).await;
    let relay = Relay::start(cluster.address()).await;
    // The catalog behind a link that can break; the tenants' server is the same PostgreSQL, reached directly.
    let through = control_builder(ProxyBuilder::to(relay.address()));
    let control =
        [("role", "tenantry_control"), ("database", "tenantry_control"), ("password", "secret-of-the-control-role")];
    let control = toml::Table::from_iter(control.map(|(key, value)| (key.to_owned(), toml::Value::from(value))));
    let proxy = through
        .set("servers.data.host", cluster.address().ip().to_string())
        .set("servers.data.port", i64::from(cluster.port()))
        .set("servers.data.control", control)
        .start()
        .await;
    let api = Api::new(&proxy, "admin").await;
    let made = api.post("/v1/tenants", json!({ "name": "alive", "server": "data" })).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let tenant = tenantry_testkit::control::tenant_of(&made.body);
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n int)").await;

    relay.mode(Mode::Refuse);
    relay.reset();
    let refused = eventually("writes are refused", async || {
        let reply = api.post("/v1/tenants", json!({ "name": "late", "server": "data" })).await;
        (reply.status == 503).then_some(reply)
    })
    .await;
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(refused.body["type"], "urn:tenantry:problem:away");
    assert_eq!(client.value("SELECT count(*) FROM t").await, "0");
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1", "a new login");
    assert_eq!(api.get("/v1/tenants").await.body["items"][0]["name"], "alive", "from memory");

    proxy.restart(&[]).await;
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT count(*) FROM t").await, "0", "from disk");
    assert_eq!(api.get("/v1/tenants").await.body["items"][0]["name"], "alive", "tokens are known from disk, too");

    relay.mode(Mode::Pass);
    eventually("the API writes again", async || {
        let reply = api.post("/v1/tenants", json!({ "name": "late", "server": "data" })).await;
        (reply.status == 201).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_api_that_others_can_reach_does_not_start_without_credentials() {
    let (proxy, _api) = control_proxy().await;
    let start = |address: &str| {
        let output = Command::new(binary())
            .args([
                "serve",
                "--set",
                &format!("admin.address={address}"),
                "--set",
                &format!("listen.addresses={}", proxy.address()),
                "--config",
            ])
            .arg(proxy.file())
            .output()
            .expect("tenantry");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // It has tokens: what fails then is only the address for clients.
    assert_eq!(start("0.0.0.0:0").0, Some(69));
    cluster().sql_in("tenantry_control", "DELETE FROM tenantry.tokens").await;
    let (code, said) = start("0.0.0.0:0");
    assert_eq!(code, Some(64), "{said}");
    assert!(said.contains("token create"), "{said}");
}

#[tokio::test]
async fn a_steps_plan_can_be_seen_before_anything_is_done() {
    let (_proxy, api) = control_proxy().await;
    let planned = api.post("/v1/tenants?dry_run=true", json!({ "name": "maybe" })).await;
    assert_eq!((planned.status, &planned.body["steps"][0]), (200, &json!("make_role")), "{}", planned.body);
    assert_eq!(api.get("/v1/tenants/maybe").await.status, 404);
    assert_eq!(api.get("/v1/jobs").await.body["items"], json!([]));
}
