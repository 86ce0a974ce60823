//! The API against hostile names, bodies, tokens and timing, and with its control database away.

use std::{collections::BTreeSet, process::Command, time::Duration};

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Client, Mode, Proxy, ProxyBuilder, Relay, Tenant, cluster,
    control::{control_behind, control_builder, control_proxy, control_role, tenant_of},
    eventually,
    proxy::binary,
    say,
    tls::write_certificates,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const ACCESS: [&str; 4] = ["nobody", "viewer", "operator", "admin"];

/// What each may do, as told in the README: written here once more, so that a slip in the table is seen.
fn least(method: &str, path: &str) -> &'static str {
    match (method, path) {
        ("get", "/v1/audit" | "/v1/audit/verify" | "/v1/tokens")
        | ("post" | "delete", "/v1/tokens" | "/v1/tokens/{token}") => "admin",
        ("delete", _) => "admin",
        // The old copy is gone then.
        ("post", path) if path.ends_with("/move/confirm") => "admin",
        ("post", path) if path.starts_with("/v1/rollouts") && !path.ends_with("/cancel") => "admin",
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
        for path in ["/v1/tenants/@", "/v1/tenants/@/clients", "/v1/explain/@"].map(|path| path.replace('@', &escaped))
        {
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
        json!({ "isolation": "free" }),
        json!({ "reuse_unnamed_statements": "yes" }),
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
    // Behind the id; it may hold an underscore itself.
    let secret = api.token.splitn(3, '_').nth(2).expect("a secret");
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
    assert_eq!(first.headers["cache-control"], "no-store");
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
    let change = json!({ "owner": "ada" });
    api.send("PATCH", "/v1/tenants/watched", Some(&change), &[("If-Match", "*")]).await;
    // Its role is there already, and is not ours: the job gives up.
    cluster().sql("CREATE ROLE unlucky").await;
    let failed = api.post("/v1/tenants", json!({ "name": "unlucky" })).await;
    assert_eq!(failed.status, 409, "{}", failed.body);
    let rows = audit(&api).await;
    let of = |action: &str, tenant: &str| -> Vec<&Value> {
        rows.iter().rev().filter(|row| row["action"] == action && row["tenant"] == tenant).collect()
    };
    let outcomes = |action: &str, tenant: &str| -> Vec<&str> {
        of(action, tenant).iter().map(|row| row["outcome"].as_str().expect("text")).collect()
    };
    assert_eq!(outcomes("create", "watched"), ["intent", "begun", "succeeded"]);
    assert_eq!(outcomes("create", "unlucky"), ["intent", "begun", "failed"]);
    assert_eq!(outcomes("resume", "watched"), ["intent", "done"]);
    let [_, done] = of("update", "watched")[..] else { panic!("{rows:?}") };
    assert_eq!((&done["before"]["spec"]["owner"], &done["after"]["spec"]["owner"]), (&Value::Null, &json!("ada")));
    let requests: BTreeSet<_> = of("create", "watched").iter().map(|row| row["request"].as_str()).collect();
    assert_eq!(requests.len(), 1, "one request, from its intent to the end of its job");
    assert!(rows.iter().any(|row| row["action"] == "create_token" && row["actor"] == "tenantry token create"));
    assert!(!json!(rows).to_string().contains("SCRAM-SHA-256$"), "a verifier is in the audit log");
}

async fn audit(api: &Api) -> Vec<Value> {
    api.get("/v1/audit?limit=500").await.body["items"].as_array().cloned().expect("rows")
}

#[tokio::test]
async fn changes_that_are_refused_at_the_door_are_in_the_audit_log_and_not_without_end() {
    let (proxy, api) = control_proxy().await;
    let viewer = Api::new(&proxy, "viewer").await;
    assert_eq!(viewer.post("/v1/tenants", json!({ "name": "mine" })).await.status, 403);
    // Whoever has no token is soon told to slow down.
    eventually("refused", async || {
        (api.with_token("").post("/v1/tokens", json!({})).await.status == 401).then_some(())
    })
    .await;
    let rows = eventually("both rows", async || {
        let rows = audit(&api).await;
        let refused = |row: &&Value| matches!(row["outcome"].as_str(), Some("forbidden" | "no-token"));
        let refused: Vec<Value> = rows.iter().filter(refused).cloned().collect();
        (refused.len() == 2).then_some(refused)
    })
    .await;
    assert!(
        rows.iter()
            .any(|row| row["action"] == "POST /v1/tenants" && row["actor"].as_str().expect("text").ends_with(" test"))
    );
    assert!(rows.iter().any(|row| row["action"] == "POST /v1/tokens" && row["actor"] == "-"));
    for _ in 0..150 {
        viewer.post("/v1/tenants", json!({ "name": "mine" })).await;
    }
    assert!(audit(&api).await.len() < 100, "a bounded rate");
}

#[tokio::test]
async fn a_row_of_the_audit_log_that_was_changed_or_taken_out_is_found() {
    let (proxy, api) = control_proxy().await;
    api.create("honest").await;
    let whole = api.get("/v1/audit/verify").await.body;
    let rows = audit(&api).await;
    assert_eq!((&whole["broken"], &whole["rows"]), (&Value::Null, &json!(rows.len())), "{whole}");
    assert_eq!((&whole["last"], &whole["chain"]), (&rows[0]["id"], &rows[0]["chain"]));
    let verify = || cli(&proxy, &api, &["audit", "verify"]);
    let (code, said) = verify();
    assert!(code == 0 && said.contains("whole"), "{said}");
    let sql = "UPDATE tenantry.audit SET actor = 'nobody' WHERE id = 2";
    cluster().sql_in("tenantry_control", sql).await;
    assert_eq!(api.get("/v1/audit/verify").await.body["broken"], 2);
    assert_eq!(verify().0, 65);
    cluster().sql_in("tenantry_control", "DELETE FROM tenantry.audit WHERE id = 2").await;
    assert_eq!(api.get("/v1/audit/verify").await.body["broken"], 3);
}

/// The command line, on the API.
fn cli_at(url: &str, token: &str, words: &[&str]) -> (i32, String) {
    let output = Command::new(binary())
        .args(words)
        .env("TENANTRY_URL", url)
        .env("TENANTRY_TOKEN", token)
        .output()
        .expect("tenantry");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

fn cli(proxy: &Proxy, api: &Api, words: &[&str]) -> (i32, String) {
    cli_at(&format!("http://{}", proxy.admin()), &api.token, words)
}

#[tokio::test]
async fn a_change_whose_caller_hangs_up_still_has_its_outcome_in_the_audit_log() {
    let (proxy, api) = control_proxy().await;
    api.create("left").await;
    // Whoever changes something now waits for us.
    let hold = cluster().admin("tenantry_control").await;
    hold.batch_execute("BEGIN; SELECT FROM tenantry.meta FOR UPDATE").await.expect("locked");
    let body = r#"{"owner":"ada"}"#;
    let request = format!(
        "PATCH /v1/tenants/left HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nIf-Match: *\r\nContent-Length: {}\r\n\r\n{body}",
        api.token,
        body.len()
    );
    let mut caller = TcpStream::connect(proxy.admin()).await.expect("connect");
    caller.write_all(request.as_bytes()).await.expect("write");
    eventually("it waits for the lock", async || {
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE tenantry.meta%'";
        (cluster().sql(waits).await.as_deref() == Some("1")).then_some(())
    })
    .await;
    drop(caller);
    hold.batch_execute("COMMIT").await.expect("unlocked");
    eventually("its outcome", async || {
        let rows = audit(&api).await;
        rows.iter().any(|row| row["action"] == "update" && row["outcome"] == "done").then_some(())
    })
    .await;
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
    let twice = api.post("/v1/tenants/busy/drain", json!({})).await;
    assert_eq!((twice.status, twice.body["job"].as_i64()), (409, Some(id)), "{}", twice.body);
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

/// A proxy whose catalog is behind a link that can break, and whose tenants are behind another, on server `data`.
async fn two_links() -> (Proxy, Api, Relay, Relay) {
    let cluster = cluster();
    control_role(cluster).await;
    let (catalog, data) = (Relay::start(cluster.address()).await, Relay::start(cluster.address()).await);
    let control =
        [("role", "tenantry_control"), ("database", "tenantry_control"), ("password", "secret-of-the-control-role")];
    let control = toml::Table::from_iter(control.map(|(key, value)| (key.to_owned(), toml::Value::from(value))));
    let proxy = control_builder(ProxyBuilder::to(catalog.address()))
        .set("servers.data.host", data.address().ip().to_string())
        .set("servers.data.port", i64::from(data.address().port()))
        .set("servers.data.control", control)
        .start()
        .await;
    let api = Api::new(&proxy, "admin").await;
    (proxy, api, catalog, data)
}

fn break_off(link: &Relay) {
    link.mode(Mode::Refuse);
    link.reset();
}

/// Until whoever runs jobs has one, and whoever asked for it could know.
async fn begun() {
    let sql = "SELECT count(*) FROM tenantry.jobs WHERE state <> 'queued'";
    let count = async || cluster().sql_in("tenantry_control", sql).await;
    eventually("a job is begun", async || (count().await.as_deref() == Some("1")).then_some(())).await;
}

/// Until somebody follows its events.
async fn followed() {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT id, at, text FROM tenantry.job_events%'";
    eventually("a job is followed", async || (cluster().sql(sql).await.as_deref() != Some("0")).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_was_written_down_is_answered_with_its_password_also_when_the_catalog_fails_then() {
    let (proxy, api, catalog, data) = two_links().await;
    break_off(&data);
    let body = json!({ "name": "kept", "server": "data" });
    let (made, ()) = tokio::join!(api.post("/v1/tenants", body), async {
        begun().await;
        break_off(&catalog);
    });
    assert_eq!(made.status, 202, "{}", made.body);
    assert!(made.body["job"]["id"].is_i64() && made.headers.contains_key("location"), "{}", made.body);
    let tenant = tenant_of(&made.body);
    catalog.mode(Mode::Pass);
    data.mode(Mode::Pass);
    eventually("it is made", async || proxy.connect(&tenant).try_login().await.ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_prints_a_password_also_when_it_cannot_follow_the_job() {
    let (proxy, api, _catalog, data) = two_links().await;
    break_off(&data);
    let way = Relay::start(proxy.admin()).await;
    let (url, token) = (format!("http://{}", way.address()), api.token.clone());
    let words = ["tenant", "create", "printed", "--server", "data", "--env"];
    let command = tokio::task::spawn_blocking(move || cli_at(&url, &token, &words));
    followed().await;
    break_off(&way);
    let (code, said) = command.await.expect("the command");
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("job watch"), "{said}");
    let value = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
        line.unwrap_or_else(|| panic!("no {name} in {said}")).to_owned()
    };
    let tenant =
        Tenant { name: value("DATABASE_NAME"), role: value("DATABASE_USER"), password: value("DATABASE_PASSWORD") };
    data.mode(Mode::Pass);
    eventually("it is made", async || proxy.connect(&tenant).try_login().await.ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_follows_a_job_goes_on_where_its_connection_broke() {
    let (proxy, api, _catalog, data) = two_links().await;
    break_off(&data);
    let way = Relay::start(proxy.admin()).await;
    let (url, token) = (format!("http://{}", way.address()), api.token.clone());
    let command =
        tokio::task::spawn_blocking(move || cli_at(&url, &token, &["tenant", "create", "patient", "--server", "data"]));
    followed().await;
    let before = way.accepted();
    way.reset();
    eventually("it is followed again", async || (way.accepted() > before).then_some(())).await;
    data.mode(Mode::Pass);
    let (code, said) = command.await.expect("the command");
    assert!(code == 0 && said.contains("DATABASE_PASSWORD="), "{code}: {said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_lost_on_its_way_makes_no_second_job_and_the_way_to_a_password_is_told() {
    let (proxy, api) = control_proxy().await;
    let way = Relay::start(proxy.admin()).await;
    way.reset_after(1);
    let (url, token) = (format!("http://{}", way.address()), api.token.clone());
    let command = tokio::task::spawn_blocking(move || cli_at(&url, &token, &["tenant", "create", "twice"]));
    begun().await;
    way.reset_after(u64::MAX);
    let (code, said) = command.await.expect("the command");
    assert!(code == 0 && said.contains("tenant rotate twice"), "{code}: {said}");
    assert_eq!(api.get("/v1/jobs").await.body["items"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_parameter_that_an_operation_does_not_know_is_refused_and_nothing_is_done() {
    let (_proxy, api) = control_proxy().await;
    api.create("steady").await;
    for (method, path) in [
        ("POST", "/v1/tenants/steady/pause?dry_run=true"),
        ("PATCH", "/v1/tenants/steady?dry_run=true"),
        ("POST", "/v1/tenants/other/adopt?dry_run=true"),
        ("POST", "/v1/tokens?dry_run=true"),
        ("POST", "/v1/jobs/1/cancel?dry_run=true"),
        ("POST", "/v1/tenants?dryrun=true"),
        ("GET", "/v1/tenants?limits=1"),
        ("GET", "/v1/servers?limit=1"),
    ] {
        let body = (method != "GET").then(|| json!({}));
        let reply = api.send(method, path, body.as_ref(), &[("If-Match", "*")]).await;
        assert_eq!(reply.status, 422, "{method} {path}: {}", reply.body);
    }
    for path in ["/v1/tenants/steady/pause", "/v1/tokens", "/v1/tenants/other/adopt"] {
        let reply = api.send("POST", path, Some(&json!({})), &[("Idempotency-Key", "k")]).await;
        assert_eq!(reply.status, 422, "{path}: {}", reply.body);
    }
    assert_eq!(api.get("/v1/tenants/steady").await.body["state"], "active");
    for path in ["/v1/tenants/%FF", "/v1/tenants/%FF/clients", "/v1/jobs/%FF/events", "/v1/explain/%C3"] {
        let reply = api.get(path).await;
        assert_eq!(
            (reply.status, reply.headers["content-type"].to_str().ok()),
            (400, Some("application/problem+json")),
            "{path}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_is_the_same_job_also_after_a_rename_and_also_at_the_same_time() {
    let (_proxy, api) = control_proxy().await;
    let keyed = async |path: &str, body: Value, key: &str| {
        api.send("POST", path, Some(&body), &[("Idempotency-Key", key)]).await
    };
    let (a, b) = tokio::join!(
        keyed("/v1/tenants", json!({ "name": "first" }), "make"),
        keyed("/v1/tenants", json!({ "name": "first" }), "make")
    );
    assert_eq!((a.status, b.status, &a.body["job"]["id"]), (201, 201, &b.body["job"]["id"]), "{} {}", a.body, b.body);
    assert!(a.body["credentials"].is_null() != b.body["credentials"].is_null(), "told to one of them");
    let one = keyed("/v1/tenants/first/rename", json!({ "to": "second" }), "name").await;
    let two = keyed("/v1/tenants/first/rename", json!({ "to": "second" }), "name").await;
    assert_eq!((one.status, two.status, &one.body["job"]["id"]), (200, 200, &two.body["job"]["id"]), "{}", two.body);
    let dry = keyed("/v1/tenants/second/rename?dry_run=true", json!({ "to": "third" }), "name").await;
    assert_eq!((dry.status, &dry.body["job"]), (200, &Value::Null), "{}", dry.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_changes_at_once_that_do_not_go_together_one_is_refused() {
    let (_proxy, api) = control_proxy().await;
    api.create("left").await;
    api.create("right").await;
    for round in 0..5 {
        let tag = api.get("/v1/tenants/left").await.headers["etag"].to_str().expect("text").to_owned();
        let patch = async |owner: String| {
            api.send("PATCH", "/v1/tenants/left", Some(&json!({ "owner": owner })), &[("If-Match", &tag)]).await.status
        };
        let both = tokio::join!(patch(format!("ada{round}")), patch(format!("bob{round}")));
        assert_eq!(BTreeSet::from([both.0, both.1]), BTreeSet::from([200, 412]), "of one version");
        // The server's cap is 30.
        let floor = async |tenant: &str, floor: u32| {
            let path = format!("/v1/tenants/{tenant}");
            api.send("PATCH", &path, Some(&json!({ "floor": floor })), &[("If-Match", "*")]).await.status
        };
        let both = tokio::join!(floor("left", 20), floor("right", 20));
        assert_eq!(
            BTreeSet::from([both.0, both.1]),
            BTreeSet::from([200, 422]),
            "the floors of both are more than the cap"
        );
        assert_eq!((floor("left", 0).await, floor("right", 0).await), (200, 200));
    }
    assert_eq!(
        api.get("/v1/audit/verify").await.body["broken"],
        Value::Null,
        "those who write at once write one chain"
    );
}

#[tokio::test]
async fn what_others_live_on_is_not_adopted_and_whether_everybody_may_connect_is_told() {
    let old = cluster().tenant("legacy").await;
    let fixed = cluster().tenant("fixed").await;
    control_role(cluster()).await;
    let proxy = control_builder(ProxyBuilder::new(cluster())).tenant(&fixed).start().await;
    let api = Api::new(&proxy, "admin").await;
    let sql = |sql: String| async move { cluster().sql(&sql).await };
    let verifier = sql(format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", old.role)).await;
    let adopt = async |database: &str, role: &str| {
        let body = json!({ "database": database, "role": role, "verifier": verifier });
        api.post("/v1/tenants/taken_over/adopt", body).await
    };
    let refused = async |database: &str, role: &str, why: &str| {
        let reply = adopt(database, role).await;
        let detail = reply.body["detail"].as_str().unwrap_or_default();
        assert!(reply.status == 422 && detail.contains(why), "{database} {role}: {} {}", reply.status, reply.body);
    };
    refused(&old.name, &old.role, "GRANT").await;
    for role in [&old.role, &fixed.role] {
        sql(format!("GRANT {role} TO tenantry_control")).await;
    }
    refused("tenantry_control", &old.role, "control database").await;
    refused("postgres", &old.role, "PostgreSQL's own").await;
    refused("template1", &old.role, "PostgreSQL's own").await;
    refused(&fixed.name, &old.role, "settings file").await;
    refused("none_such", &old.role, "none of that name").await;
    refused("a\u{0}b", &old.role, "control characters").await;
    refused(&old.name, "a\u{0}b", "control characters").await;
    refused(&old.name, "none_such", "may log in").await;
    refused(&old.name, "pg_signal_backend", "may log in").await;
    refused(&old.name, "tenantry_control", "Tenantry's own").await;
    let superuser = sql("SELECT rolname FROM pg_roles WHERE rolsuper LIMIT 1".to_owned()).await.expect("one");
    refused(&old.name, &superuser, "superuser").await;
    for (setting, off, why) in [("IS_TEMPLATE", "true", "template"), ("ALLOW_CONNECTIONS", "false", "lets nobody in")] {
        sql(format!("ALTER DATABASE {} {setting} {off}", old.name)).await;
        refused(&old.name, &old.role, why).await;
        sql(format!("ALTER DATABASE {} {setting} {}", old.name, if off == "true" { "false" } else { "true" })).await;
    }
    let spec = json!({ "database": old.name, "verifier": verifier, "spec": { "settings": { "jit": "off" } } });
    assert_eq!(api.post("/v1/tenants/taken_over/adopt", spec).await.status, 422);
    sql(format!("GRANT CONNECT ON DATABASE {} TO PUBLIC", old.name)).await;
    let adopted = adopt(&old.name, &old.role).await;
    assert_eq!((adopted.status, &adopted.body["public_may_connect"]), (201, &json!(true)), "{}", adopted.body);
    assert_eq!(adopted.body["name"], "taken_over");
    // What it logs in as is told, whoever owns it.
    let (code, said) = cli(&proxy, &api, &["tenant", "env", "taken_over"]);
    assert!(code == 0 && said.contains(&format!("DATABASE_USER={}", old.role)), "{said}");
}

#[tokio::test]
async fn health_is_answered_while_others_keep_every_place_and_streams_have_a_limit() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("followed").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    let wait = [("Prefer", "respond-async")];
    let begun = api.send("POST", "/v1/tenants/followed/rename", Some(&json!({ "to": "on" })), &wait).await;
    let path = format!("/v1/jobs/{}/events", begun.body["job"]["id"]);
    let mut streams = Vec::new();
    let mut statuses = Vec::new();
    for _ in 0..17 {
        let mut stream = TcpStream::connect(proxy.admin()).await.expect("connect");
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n", api.token);
        stream.write_all(head.as_bytes()).await.expect("write");
        let mut status = [0; 12];
        stream.read_exact(&mut status).await.expect("an answer");
        statuses.push(String::from_utf8_lossy(&status[9..]).into_owned());
        streams.push(stream);
    }
    assert_eq!(statuses.iter().filter(|status| *status == "200").count(), 16);
    assert_eq!(statuses.last().map(String::as_str), Some("429"));
    drop(streams);
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(proxy.admin()).await.expect("connect"));
    }
    eventually("health", async || {
        let mut stream = TcpStream::connect(proxy.admin()).await.ok()?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        answer.starts_with("HTTP/1.1 200").then_some(())
    })
    .await;
    client.run("COMMIT").await;
}

#[tokio::test]
async fn a_suspended_tenant_that_woke_by_itself_can_be_suspended_again_and_paused() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("sleeper").await;
    let mut client = proxy.connect(&tenant).login().await;
    for _ in 0..2 {
        assert_eq!(client.value("SELECT 1").await, "1");
        let suspended = api.post("/v1/tenants/sleeper/suspend", json!({})).await;
        assert_eq!((suspended.status, &suspended.body["live"]["connections"]), (200, &json!(0)), "{}", suspended.body);
        assert_eq!(suspended.body["state"], "suspended");
    }
    assert_eq!(client.value("SELECT 1").await, "1");
    assert_eq!(api.get("/v1/tenants/sleeper").await.body["state"], "active");
    let paused = api.post("/v1/tenants/sleeper/pause", json!({})).await;
    assert_eq!((paused.status, &paused.body["state"]), (200, &json!("paused")), "{}", paused.body);
    assert_eq!(api.post("/v1/tenants/sleeper/resume", json!({})).await.status, 200);
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_rename_does_not_hold_clients_for_longer_than_they_wait() {
    control_role(cluster()).await;
    let proxy = control_builder(ProxyBuilder::new(cluster())).set("pool.query_wait_timeout", "20s").start().await;
    let api = Api::new(&proxy, "admin").await;
    api.create("brief").await;
    let rename = async |body: Value| api.post("/v1/tenants/brief/rename?dry_run=true", body).await.status;
    assert_eq!(rename(json!({ "to": "x", "wait_ms": 10_001 })).await, 422);
    assert_eq!(rename(json!({ "to": "x", "wait_ms": 10_000 })).await, 200);
    assert_eq!(rename(json!({ "to": "x" })).await, 200);
    let (code, said) = cli(&proxy, &api, &["tenant", "rename", "brief", "briefer"]);
    assert_eq!(code, 0, "{said}");
}

#[tokio::test]
async fn every_list_that_can_be_long_comes_in_pages() {
    let (proxy, api) = control_proxy().await;
    for name in ["a", "b", "c"] {
        api.create(name).await;
        Api::new(&proxy, "viewer").await;
    }
    let sql = "INSERT INTO tenantry.archives (tenant, path, bytes, sha256, tables) SELECT 1, 'p' || n, 1, '', '{}' FROM generate_series(1, 3) n";
    cluster().sql_in("tenantry_control", sql).await;
    for list in ["tenants", "jobs", "audit", "archives", "tokens"] {
        let whole = api.get(&format!("/v1/{list}?limit=500")).await.body;
        let whole = whole["items"].as_array().expect("items");
        let (mut parts, mut after) = (Vec::new(), String::new());
        loop {
            let page = api.get(&format!("/v1/{list}?limit=1{after}")).await.body;
            parts.extend(page["items"].as_array().expect("items").clone());
            match page["next"].as_str() {
                Some(next) => after = format!("&after={next}"),
                None => break,
            }
        }
        assert!(whole.len() >= 3 && parts.len() == whole.len(), "{list}");
        assert!(parts.iter().zip(whole).all(|(a, b)| a["id"] == b["id"] && a["name"] == b["name"]), "{list}");
    }
}

#[tokio::test]
async fn the_api_over_tls_asks_for_a_certificate_of_the_client_where_it_is_told_to() {
    let dir = tempfile::tempdir().expect("a directory");
    write_certificates(dir.path());
    let at = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    control_role(cluster()).await;
    let proxy = control_builder(ProxyBuilder::new(cluster())).start().await;
    let api = Api::new(&proxy, "admin").await;
    let fresh = proxy.settings().set("admin.cert_file", at("server.crt")).set("admin.key_file", at("server.key"));
    let restart = async |text: String| {
        std::fs::write(proxy.file(), text).expect("settings");
        proxy.restart(&[]).await;
    };
    let url = format!("https://{}", proxy.admin());
    let ca = at("ca.crt");
    let list = |more: &[&str]| cli_at(&url, &api.token, &[&["tenant", "list", "--ca-file", &ca], more].concat());
    restart(fresh.text()).await;
    assert_eq!(list(&[]).0, 0, "{}", list(&[]).1);
    assert_eq!(cli(&proxy, &api, &["tenant", "list"]).0, 69, "not in plain text");
    // One authority signs both here.
    restart(fresh.set("admin.client_ca_file", at("ca.crt")).text()).await;
    assert_eq!(list(&[]).0, 69, "without a certificate");
    let (cert, key) = (at("server.crt"), at("server.key"));
    let (code, said) = list(&["--cert-file", &cert, "--key-file", &key]);
    assert_eq!(code, 0, "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_control_database_it_serves_says_503_and_starts_from_disk() {
    let relay = Relay::start(cluster().address()).await;
    let (proxy, api) = control_behind(&relay).await;
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

#[tokio::test]
async fn a_change_that_cannot_be_written_down_is_not_made() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("kept").await;
    let before = api.get("/v1/tenants/kept").await.body["version"].clone();
    // As when the disk of the control database is full.
    let full = "CREATE FUNCTION tenantry.no_room() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '53100'; END $$; \
                CREATE TRIGGER no_room BEFORE INSERT ON tenantry.audit EXECUTE FUNCTION tenantry.no_room()";
    cluster().sql_in("tenantry_control", full).await;
    for (method, path, body) in [
        ("POST", "/v1/tenants", json!({ "name": "late" })),
        ("POST", "/v1/tenants/kept/pause", json!({})),
        ("POST", "/v1/tenants/kept/rename", json!({ "to": "other" })),
        ("PATCH", "/v1/tenants/kept", json!({ "owner": "somebody" })),
    ] {
        let reply = api.send(method, path, Some(&body), &[("If-Match", "*")]).await;
        assert_eq!(reply.status, 503, "{method} {path}: {}", reply.body);
        assert!(reply.headers.contains_key("retry-after"));
    }
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1", "the data plane goes on");
    cluster().sql_in("tenantry_control", "DROP TRIGGER no_room ON tenantry.audit").await;
    let kept = api.get("/v1/tenants/kept").await.body;
    assert_eq!((&kept["version"], kept["state"].as_str()), (&before, Some("active")), "{kept}");
    assert_eq!(api.get("/v1/tenants/late").await.status, 404);
}

/// What is told of a client, found by the process number that it was told.
fn row_of<'a>(listed: &'a Value, client: &Client) -> &'a Value {
    let process = client.key.as_ref().expect("BackendKeyData came").0;
    let rows = listed["items"].as_array().expect("items");
    rows.iter().find(|row| row["process"] == process).unwrap_or_else(|| panic!("no {process} in {listed}"))
}

/// Waits until a client is in that state, for these reasons.
async fn is_told(api: &Api, tenant: &str, client: &Client, state: &str, pins: Value) {
    let path = format!("/v1/tenants/{tenant}/clients");
    eventually(format!("{state}, {pins}"), async || {
        let listed = api.get(&path).await.body;
        let row = row_of(&listed, client);
        (row["state"] == state && row["pins"] == pins).then_some(())
    })
    .await;
}

#[tokio::test]
async fn clients_are_listed_with_the_reasons_for_which_they_keep_a_connection() {
    let (proxy, api) = control_proxy().await;
    let (shop, blog) = (api.create("shop").await, api.create("blog").await);
    let viewer = Api::new(&proxy, "viewer").await;
    let clients = async |query: &str| viewer.get(&format!("/v1/tenants/shop/clients{query}")).await;
    assert_eq!(clients("").await.body, json!({ "items": [], "next": null }));
    let mut temp = proxy.connect(&shop).login().await;
    let mut lock = proxy.connect(&shop).login().await;
    let mut idle = proxy.connect(&shop).login().await;
    let mut other = proxy.connect(&blog).login().await;
    temp.run("CREATE TEMP TABLE t (n int)").await;
    lock.run("SELECT pg_advisory_lock(4711)").await;
    idle.run("SELECT 1").await;
    other.run("CREATE TEMP TABLE t (n int)").await;
    is_told(&viewer, "shop", &temp, "pinned", json!(["temp_object"])).await;
    is_told(&viewer, "shop", &lock, "pinned", json!(["advisory_lock"])).await;
    is_told(&viewer, "shop", &idle, "idle", json!([])).await;
    let listed = clients("").await.body;
    let ids: Vec<_> = listed["items"].as_array().expect("items").iter().map(|row| row["id"].as_u64()).collect();
    assert!(ids.len() == 3 && ids.is_sorted(), "{listed}");
    let row = row_of(&listed, &temp);
    assert_eq!((row["role"].as_str(), row["server"].as_str()), (Some("shop"), Some("main")), "{row}");
    assert_eq!(row["pool"], row_of(&listed, &idle)["pool"]);
    assert!(row["seconds"].as_f64().is_some_and(|seconds| (0.0..60.0).contains(&seconds)), "{row}");

    let pinned = clients("?pinned=true").await.body;
    assert_eq!((&pinned["items"][0]["id"], &pinned["items"][1]["id"]), (&json!(ids[0]), &json!(ids[1])), "{pinned}");
    assert_eq!((&pinned["items"][2], &pinned["next"]), (&Value::Null, &Value::Null), "{pinned}");
    let first = clients("?pinned=true&limit=1").await.body;
    let next = first["next"].as_str().expect("there are more").to_owned();
    let second = clients(&format!("?pinned=true&limit=1&after={next}")).await.body;
    assert_eq!((&second["items"][0]["id"], &second["next"]), (&json!(ids[1]), &Value::Null), "{second}");
    for wrong in ["?limit=0", "?limit=1001", "?after=x", "?after=-1", "?pinned=maybe", "?state=idle"] {
        assert_eq!(clients(wrong).await.status, 422, "{wrong}");
    }

    let (code, said) = cli(&proxy, &viewer, &["tenant", "clients", "shop", "--pinned"]);
    assert!(code == 0 && said.contains("temp_object") && said.contains("advisory_lock"), "{said}");
    assert_eq!(said.lines().count(), 3, "a header and two clients: {said}");
    let (code, said) = cli(&proxy, &viewer, &["tenant", "clients", "shop", "--json"]);
    let told: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((code, told.as_array().map(Vec::len)), (0, Some(3)), "{said}");
    assert_eq!(cli(&proxy, &viewer, &["tenant", "clients", "nobody"]).0, 65);

    temp.run("DROP TABLE t").await;
    is_told(&viewer, "shop", &temp, "idle", json!([])).await;
    lock.run("SELECT pg_advisory_unlock(4711)").await;
    is_told(&viewer, "shop", &lock, "idle", json!([])).await;
    assert_eq!(clients("?pinned=true").await.body["items"], json!([]));
    idle.run("BEGIN").await;
    is_told(&viewer, "shop", &idle, "idle_in_transaction", json!([])).await;
    idle.run("COMMIT").await;
    temp.leave().await;
    eventually("who left is not listed", async || {
        (clients("").await.body["items"].as_array().map(Vec::len) == Some(2)).then_some(())
    })
    .await;

    // They stay its clients under another name.
    let renamed = api.post("/v1/tenants/shop/rename", json!({ "to": "store" })).await;
    assert_eq!(renamed.status, 200, "{}", renamed.body);
    is_told(&viewer, "store", &lock, "idle", json!([])).await;
    let former = clients("").await;
    assert!(former.status == 404 && former.body["detail"].as_str().expect("text").contains("store"), "{}", former.body);
}

#[tokio::test]
async fn clients_of_tenants_that_the_file_has_are_listed_too() {
    control_role(cluster()).await;
    let (tenant, any) = (cluster().tenant("written").await, cluster().tenant("any").await);
    let builder = ProxyBuilder::new(cluster()).tenant(&tenant).role("*", &any.role, Some(&any.password));
    let proxy = control_builder(builder.set(&format!("tenants.{}.isolation", tenant.name), "strict")).start().await;
    let api = Api::new(&proxy, "viewer").await;
    let of = |tenant: &Tenant| format!("/v1/tenants/{}/clients", tenant.name);
    assert_eq!(api.get(&of(&tenant)).await.body["items"], json!([]));
    assert_eq!(api.get(&of(&any)).await.status, 404, "nobody was there yet");
    for tenant in [&tenant, &any] {
        let mut client = proxy.connect(tenant).login().await;
        client.run("CREATE TEMP TABLE t (n int)").await;
        is_told(&api, &tenant.name, &client, "pinned", json!(["temp_object"])).await;
        let listed = api.get(&of(tenant)).await.body;
        assert_eq!(listed["items"].as_array().map(Vec::len), Some(1), "{listed}");
    }
    let shown = api.get(&format!("/v1/tenants/{}", tenant.name)).await.body;
    assert_eq!((&shown["spec"]["isolation"], &shown["spec"]["pool_mode"]), (&json!("strict"), &json!("transaction")));
}

/// How often a statement is prepared on the server connection in the transaction after the one that used it.
async fn left_prepared(proxy: &Proxy, tenant: &Tenant, name: &str, sql: &str) -> String {
    let mut client = proxy.connect(tenant).login().await;
    client.make_on_server().await;
    let run = [say::parse(name, sql), say::bind("", name, &[]), say::execute("", 0), say::sync()].concat();
    client.ask(&run).await.ok();
    client.value(&format!("SELECT count(*) FROM on_server WHERE statement = '{sql}'")).await
}

#[tokio::test]
async fn isolation_and_the_reuse_of_unnamed_statements_are_said_per_tenant() {
    let (proxy, api) = control_proxy().await;
    let wish = json!({ "name": "apart", "spec": { "pool_size": 1, "isolation": "strict" } });
    let made = api.post("/v1/tenants", wish).await;
    assert_eq!(made.status, 201, "{}", made.body);
    assert_eq!(made.body["tenant"]["spec"]["isolation"], "strict", "{}", made.body);
    let apart = tenant_of(&made.body);
    assert_eq!(left_prepared(&proxy, &apart, "s", "SELECT 1").await, "0", "wiped before each use");

    let change = async |body: Value| {
        let changed = api.send("PATCH", "/v1/tenants/apart", Some(&body), &[("If-Match", "*")]).await;
        assert_eq!(changed.status, 200, "{body}: {}", changed.body);
        changed.body["spec"].clone()
    };
    assert_eq!(change(json!({ "isolation": null })).await["isolation"], Value::Null);
    assert_eq!(left_prepared(&proxy, &apart, "s", "SELECT 2").await, "1", "as [pool] says");
    assert_eq!(left_prepared(&proxy, &apart, "", "SELECT 3").await, "0");
    assert_eq!(change(json!({ "reuse_unnamed_statements": true })).await["reuse_unnamed_statements"], true);
    assert_eq!(left_prepared(&proxy, &apart, "", "SELECT 4").await, "1", "kept like a named one");

    let words = ["tenant", "update", "apart", "--isolation", "strict", "--reuse-unnamed-statements", "false"];
    let (code, said) = cli(&proxy, &api, &words);
    assert!(code == 0 && said.contains("strict"), "{said}");
    assert_eq!(left_prepared(&proxy, &apart, "s", "SELECT 5").await, "0");
    assert_eq!(cli(&proxy, &api, &["tenant", "update", "apart", "--isolation", "free"]).0, 65);

    // Written by a version that did not know them.
    let sql = "UPDATE tenantry.tenants SET spec = spec - 'isolation' - 'reuse_unnamed_statements'";
    cluster().sql_in("tenantry_control", sql).await;
    proxy.restart(&[]).await;
    let spec = api.get("/v1/tenants/apart").await.body["spec"].clone();
    assert_eq!((&spec["isolation"], &spec["pool_size"]), (&Value::Null, &json!(1)), "{spec}");
    assert_eq!(left_prepared(&proxy, &apart, "s", "SELECT 6").await, "1");
}
