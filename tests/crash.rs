//! kill -9 at every effect of every job: whatever was half done is finished or undone by the next start, and nothing is left.
//!
//! An effect is a statement that changes something, a file, or a line of the journal; the process kills itself before its
//! n-th (`--die-at`, debug builds only), for n = 1, 2, 3, ... until the job lives to see its end.

use std::{collections::BTreeSet, path::Path};

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Proxy, Tenant, cluster,
    control::{control_proxy, tenant_of},
};

/// No job has so many; a job that never lives to see its end is a fault of the test.
const MOST_EFFECTS: u32 = 200;

/// Databases and roles besides those that were there before, and files in the store.
async fn what_is_there(proxy: &Proxy) -> BTreeSet<String> {
    let sql = "SELECT coalesce(string_agg(name, ' '), '') FROM ( \
                 SELECT 'database:' || datname AS name FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1', 'tenantry_control') \
                 UNION ALL SELECT 'invalid:' || datname FROM pg_database WHERE datconnlimit = -2 OR NOT datallowconn AND datname <> 'template0' \
                 UNION ALL SELECT 'role:' || rolname FROM pg_roles WHERE rolname !~ '^(pg_|kit_|postgres$|tenantry_control$)') AS it";
    let text = cluster().sql(sql).await.unwrap_or_default();
    let mut there: BTreeSet<String> = text.split_whitespace().map(str::to_owned).collect();
    files(&proxy.dir().join("archives"), &mut there);
    there
}

fn files(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            files(&entry.path(), found);
        } else {
            found.insert(format!("file:{}", entry.file_name().to_string_lossy()));
        }
    }
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Sends one request to a process that dies at its n-th effect, and starts it again; true if it did not die.
async fn die_at(n: u32, proxy: &Proxy, api: &Api, method: &str, path: &str, body: &Value) -> bool {
    proxy.restart(&["--die-at", &n.to_string()]).await;
    let headers = [("If-Match", "*")];
    let reply = api.try_send(method, path, Some(body), &headers).await;
    // A reply means that the job was over, or that it was taken on and the process died without our waiting.
    let lived = reply.as_ref().is_some_and(|reply| matches!(reply.status, 200 | 201)) && proxy.runs();
    if let Some(reply) = &reply {
        assert!(matches!(reply.status, 200..=202), "{method} {path}: {} {}", reply.status, reply.body);
    }
    proxy.restart(&[]).await;
    api.no_open_job().await;
    let jobs = api.get("/v1/jobs?limit=1").await;
    let last = &jobs.body["items"][0];
    assert_eq!(last["state"], "succeeded", "at effect {n}: {last}");
    lived
}

async fn jobs_of(api: &Api, kind: &str) -> Vec<Value> {
    let jobs = api.get("/v1/jobs?limit=500").await.body["items"].as_array().cloned().unwrap_or_default();
    jobs.into_iter().filter(|job| job["kind"] == kind).collect()
}

async fn state(api: &Api, name: &str) -> String {
    api.get(&format!("/v1/tenants/{name}")).await.body["state"].as_str().unwrap_or("gone").to_owned()
}

async fn rows(proxy: &Proxy, tenant: &Tenant) -> String {
    proxy.connect(tenant).login().await.value("SELECT count(*) FROM t").await
}

async fn with_rows(proxy: &Proxy, api: &Api, name: &str) -> Tenant {
    let tenant = api.create(name).await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("CREATE TABLE t (n serial PRIMARY KEY, x text)").await;
    client.run("INSERT INTO t (x) SELECT repeat('x', g) FROM generate_series(1, 50) g").await;
    tenant
}

#[tokio::test]
async fn create_survives_kill_9_at_every_effect() {
    let (proxy, api) = control_proxy().await;
    for n in 1..MOST_EFFECTS {
        let name = format!("made_{n}");
        let lived = die_at(n, &proxy, &api, "POST", "/v1/tenants", &json!({ "name": name })).await;
        assert_eq!(state(&api, &name).await, "active", "at effect {n}");
        let there = what_is_there(&proxy).await;
        assert_eq!(there, names(&[&format!("database:{name}"), &format!("role:{name}")]), "at effect {n}");
        // The password was lost with the answer, if it was: a new one works.
        let rotated = api.post(&format!("/v1/tenants/{name}/rotate"), json!({})).await;
        let mut client = proxy.connect(&tenant_of(&rotated.body)).login().await;
        assert_eq!(client.value("SELECT current_database()").await, name);
        client.leave().await;
        let body = json!({ "confirm": name, "without_archive": true });
        let gone = api.send("DELETE", &format!("/v1/tenants/{name}"), Some(&body), &[("If-Match", "*")]).await;
        assert_eq!(gone.status, 200, "{}", gone.body);
        if lived {
            assert!(n > 15, "only {n} effects: what was killed?");
            assert_eq!(jobs_of(&api, "create").await.len(), usize::try_from(n).expect("small"));
            return;
        }
    }
    panic!("create never lived to see its end");
}

#[tokio::test]
async fn rename_survives_kill_9_at_every_effect() {
    let (proxy, api) = control_proxy().await;
    let mut tenant = with_rows(&proxy, &api, "name_0").await;
    for n in 1..MOST_EFFECTS {
        let (old, new) = (tenant.name.clone(), format!("name_{n}"));
        let lived = die_at(n, &proxy, &api, "POST", &format!("/v1/tenants/{old}/rename"), &json!({ "to": new })).await;
        assert_eq!(state(&api, &new).await, "active", "at effect {n}");
        let there = what_is_there(&proxy).await;
        assert_eq!(there, names(&[&format!("database:{new}"), "role:name_0"]), "at effect {n}");
        assert_eq!(rows(&proxy, &tenant).await, "50", "by its old name");
        tenant.name = new;
        assert_eq!(rows(&proxy, &tenant).await, "50", "by its new name");
        if lived {
            assert!(n > 12, "only {n} effects: what was killed?");
            return;
        }
    }
    panic!("rename never lived to see its end");
}

#[tokio::test]
async fn archive_survives_kill_9_at_every_effect() {
    let (proxy, api) = control_proxy().await;
    let tenant = with_rows(&proxy, &api, "kept").await;
    for n in 1..MOST_EFFECTS {
        let lived = die_at(n, &proxy, &api, "POST", "/v1/tenants/kept/archive", &json!({ "deadline_ms": 1_000 })).await;
        assert_eq!(state(&api, "kept").await, "archived", "at effect {n}");
        let mut there = what_is_there(&proxy).await;
        let stored = there.iter().filter(|name| name.starts_with("file:")).count();
        there.retain(|name| !name.starts_with("file:"));
        assert_eq!(there, names(&["role:kept"]), "at effect {n}");
        let archives = api.get("/v1/archives").await.body["items"].as_array().map_or(0, Vec::len);
        assert_eq!((stored, archives), (usize::try_from(n).expect("small"), stored), "at effect {n}");
        let back = api.post("/v1/tenants/kept/restore", json!({})).await;
        assert_eq!(back.status, 200, "{}", back.body);
        assert_eq!(rows(&proxy, &tenant).await, "50", "at effect {n}");
        if lived {
            assert!(n > 25, "only {n} effects: what was killed?");
            return;
        }
    }
    panic!("archive never lived to see its end");
}

#[tokio::test]
async fn restore_survives_kill_9_at_every_effect() {
    let (proxy, api) = control_proxy().await;
    let tenant = with_rows(&proxy, &api, "kept").await;
    for n in 1..MOST_EFFECTS {
        let kept = api.post("/v1/tenants/kept/archive", json!({ "deadline_ms": 1_000 })).await;
        assert_eq!(kept.status, 200, "{}", kept.body);
        let lived = die_at(n, &proxy, &api, "POST", "/v1/tenants/kept/restore", &json!({})).await;
        assert_eq!(state(&api, "kept").await, "active", "at effect {n}");
        let mut there = what_is_there(&proxy).await;
        there.retain(|name| !name.starts_with("file:"));
        assert_eq!(there, names(&["database:kept", "role:kept"]), "at effect {n}");
        assert_eq!(rows(&proxy, &tenant).await, "50", "at effect {n}");
        if lived {
            assert!(n > 15, "only {n} effects: what was killed?");
            return;
        }
    }
    panic!("restore never lived to see its end");
}

#[tokio::test]
async fn delete_survives_kill_9_at_every_effect() {
    let (proxy, api) = control_proxy().await;
    for n in 1..MOST_EFFECTS {
        let tenant = with_rows(&proxy, &api, "gone").await;
        let body = json!({ "confirm": "gone", "without_archive": true, "deadline_ms": 1_000 });
        let lived = die_at(n, &proxy, &api, "DELETE", "/v1/tenants/gone", &body).await;
        assert_eq!(api.get("/v1/tenants/gone").await.status, 404, "at effect {n}");
        assert_eq!(what_is_there(&proxy).await, names(&[]), "at effect {n}");
        let refused = proxy.connect(&tenant).try_login().await;
        assert!(refused.is_err(), "a route is left, at effect {n}");
        if lived {
            assert!(n > 12, "only {n} effects: what was killed?");
            return;
        }
    }
    panic!("delete never lived to see its end");
}
