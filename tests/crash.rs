//! kill -9 at every effect of every job, and of every way back: whatever was half done is finished or undone by the next start,
//! and nothing is left.
//!
//! An effect is a statement that changes something, a file, or a line of the journal. The process kills itself before the n-th
//! effect of the kind of job that is meant (`--die-at`, `--die-in`, debug builds only), for n = 1, 2, 3, ... until the job lives
//! to see its end. What was begun before a start does not count after it: the process that finishes a job after a crash is armed
//! for the next one already.

use std::{collections::BTreeSet, os::unix::fs::PermissionsExt as _, path::Path};

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Proxy, ProxyBuilder, Tenant, cluster,
    control::{control_builder, control_proxy, control_role, tenant_of},
    eventually,
    postgres::bin_dir,
};

/// No job has so many; a job that never lives to see its end is a fault of the test.
const MOST_EFFECTS: u32 = 200;
/// An answer takes a minute at most; a job on a machine that is busy may take longer.
const WAITS: usize = 4;

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

/// A process that dies at an effect of one kind of job.
struct Mortal {
    proxy: Proxy,
    api: Api,
    kind: &'static str,
    n: u32,
}

impl Mortal {
    async fn new((proxy, api): (Proxy, Api), kind: &'static str) -> Self {
        let mortal = Self { proxy, api, kind, n: 0 };
        mortal.rise(1).await;
        mortal
    }

    /// Starts it again, to die at the n-th effect of the next job.
    async fn rise(&self, n: u32) {
        self.proxy.restart(&["--die-at", &n.to_string(), "--die-in", self.kind]).await;
    }

    /// Sends one request, of which it dies or not: true if it did not.
    async fn send(&mut self, method: &str, path: &str, body: &Value) -> bool {
        self.n += 1;
        assert!(self.n < MOST_EFFECTS, "{} never lived to see its end", self.kind);
        let reply = self.api.try_send(method, path, Some(body), &[("If-Match", "*")]).await;
        // A reply means that the job was over, or that it was taken on and the process died without our waiting.
        if let Some(reply) = &reply {
            assert!(matches!(reply.status, 200..=202 | 409), "{method} {path}: {} {}", reply.status, reply.body);
        }
        reply.is_some_and(|reply| reply.status != 202) && self.proxy.runs()
    }

    /// Starts it again; the last job, once it is over.
    async fn last_job(&self) -> Value {
        self.rise(self.n + 1).await;
        let last = self.newest_job().await;
        for _ in 0..WAITS {
            // The stream ends with the job.
            let path = format!("/v1/jobs/{}/events", last["id"]);
            self.api.try_send("GET", &path, None, &[]).await;
            let job = self.api.get(&format!("/v1/jobs/{}", last["id"])).await.body;
            if matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled")) {
                return job;
            }
        }
        panic!("at effect {}: {last} does not end", self.n);
    }

    /// Sends one request, of which it dies or not, and lets the next one finish the job.
    async fn succeed(&mut self, method: &str, path: &str, body: &Value) -> bool {
        let lived = self.send(method, path, body).await;
        let last = self.last_job().await;
        assert_eq!(last["state"], "succeeded", "at effect {}: {last}", self.n);
        lived
    }

    /// Sends one request whose job turns back; it dies on the way back or not.
    async fn fail(&mut self, method: &str, path: &str, body: &Value) -> bool {
        let lived = self.send(method, path, body).await;
        let last = self.last_job().await;
        assert_eq!(last["state"], "failed", "at effect {}: {last}", self.n);
        lived
    }

    /// Sends one request, of which it dies or not; while it is dead somebody has cancelled. True if the job was undone; `None`
    /// if it lived to see its end.
    async fn cancel(&mut self, method: &str, path: &str, body: &Value) -> Option<bool> {
        let lived = self.send(method, path, body).await;
        let cancel = "UPDATE tenantry.jobs SET cancel = true WHERE state IN ('queued', 'running')";
        cluster().sql_in("tenantry_control", cancel).await;
        let last = self.last_job().await;
        let is_undone = match last["state"].as_str() {
            Some("succeeded") => false,
            Some("cancelled") => true,
            _ => panic!("at effect {}: {last}", self.n),
        };
        (!lived).then_some(is_undone)
    }

    async fn state(&self, name: &str) -> String {
        self.api.get(&format!("/v1/tenants/{name}")).await.body["state"].as_str().unwrap_or("gone").to_owned()
    }

    /// The first request after a start may meet the connection of the process that died.
    async fn newest_job(&self) -> Value {
        eventually("it answers again", async || {
            let jobs = self.api.try_send("GET", "/v1/jobs?limit=1", None, &[]).await?;
            (jobs.status == 200).then(|| jobs.body["items"][0].clone())
        })
        .await
    }

    /// Of the tenant `kept`, once no job is under way; `None` if the process died instead.
    async fn state_if_over(&self) -> Option<String> {
        eventually("the job is over, or the process", async || {
            if !self.proxy.runs() {
                return Some(None);
            }
            let jobs = self.api.try_send("GET", "/v1/jobs?limit=1", None, &[]).await?;
            let last = &jobs.body["items"][0];
            assert!(!matches!(last["state"].as_str(), Some("failed" | "cancelled")), "{last}");
            if last["state"] != "succeeded" {
                return None;
            }
            let tenant = self.api.try_send("GET", "/v1/tenants/kept", None, &[]).await?;
            Some(tenant.body["state"].as_str().map(str::to_owned))
        })
        .await
    }

    async fn rows(&self, tenant: &Tenant) -> String {
        self.proxy.connect(tenant).login().await.value("SELECT count(*) FROM t").await
    }

    async fn with_rows(&self, name: &str) -> Tenant {
        let tenant = self.api.create(name).await;
        let mut client = self.proxy.connect(&tenant).login().await;
        client.run("CREATE TABLE t (n serial PRIMARY KEY, x text)").await;
        client.run("INSERT INTO t (x) SELECT repeat('x', g) FROM generate_series(1, 50) g").await;
        tenant
    }

    async fn delete(&self, name: &str) {
        let body = json!({ "confirm": name, "without_archive": true });
        let gone = self.api.send("DELETE", &format!("/v1/tenants/{name}"), Some(&body), &[("If-Match", "*")]).await;
        assert_eq!(gone.status, 200, "{}", gone.body);
    }
}

#[tokio::test]
async fn create_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "create").await;
    loop {
        let name = format!("made_{}", it.n + 1);
        let lived = it.succeed("POST", "/v1/tenants", &json!({ "name": name })).await;
        assert_eq!(it.state(&name).await, "active", "at effect {}", it.n);
        let there = what_is_there(&it.proxy).await;
        assert_eq!(there, names(&[&format!("database:{name}"), &format!("role:{name}")]), "at effect {}", it.n);
        // The password was lost with the answer, if it was: a new one works.
        let rotated = it.api.post(&format!("/v1/tenants/{name}/rotate"), json!({})).await;
        let mut client = it.proxy.connect(&tenant_of(&rotated.body)).login().await;
        assert_eq!(client.value("SELECT current_database()").await, name);
        client.leave().await;
        it.delete(&name).await;
        if lived {
            assert!(it.n > 15, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

#[tokio::test]
async fn the_way_back_of_create_survives_kill_9_at_every_effect() {
    control_role(cluster()).await;
    let builder = ProxyBuilder::new(cluster()).set("admin.extensions", "nowhere");
    let proxy = control_builder(builder).start().await;
    let api = Api::new(&proxy, "admin").await;
    let mut it = Mortal::new((proxy, api), "back").await;
    let body = json!({ "name": "never", "spec": { "extensions": ["nowhere"] } });
    while !it.fail("POST", "/v1/tenants", &body).await {
        assert_eq!(it.state("never").await, "gone", "at effect {}", it.n);
        assert_eq!(what_is_there(&it.proxy).await, names(&[]), "at effect {}", it.n);
    }
    assert_eq!(what_is_there(&it.proxy).await, names(&[]));
    assert!(it.n > 6, "only {} effects: what was killed?", it.n);
}

#[tokio::test]
async fn rename_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "rename").await;
    let mut tenant = it.with_rows("name_0").await;
    loop {
        let (old, new) = (tenant.name.clone(), format!("name_{}", it.n + 1));
        let lived = it.succeed("POST", &format!("/v1/tenants/{old}/rename"), &json!({ "to": new })).await;
        assert_eq!(it.state(&new).await, "active", "at effect {}", it.n);
        let there = what_is_there(&it.proxy).await;
        assert_eq!(there, names(&[&format!("database:{new}"), "role:name_0"]), "at effect {}", it.n);
        assert_eq!(it.rows(&tenant).await, "50", "by its old name");
        tenant.name = new;
        assert_eq!(it.rows(&tenant).await, "50", "by its new name");
        if lived {
            assert!(it.n > 12, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

/// Also where the database has its new name already, and only the journal does not know.
#[tokio::test]
async fn rename_that_is_cancelled_after_kill_9_at_any_effect_is_done_or_undone() {
    let mut it = Mortal::new(control_proxy().await, "rename").await;
    let mut tenant = it.with_rows("name_0").await;
    let (mut done, mut undone) = (0, 0);
    loop {
        let (old, new) = (tenant.name.clone(), format!("name_{}", it.n + 1));
        let ended = it.cancel("POST", &format!("/v1/tenants/{old}/rename"), &json!({ "to": new })).await;
        let name = if ended == Some(true) { old } else { new.clone() };
        *(if ended == Some(true) { &mut undone } else { &mut done }) += 1;
        let there = what_is_there(&it.proxy).await;
        assert_eq!(there, names(&[&format!("database:{name}"), "role:name_0"]), "at effect {}", it.n);
        tenant.name = name;
        assert_eq!(it.rows(&tenant).await, "50", "at effect {}", it.n);
        if ended == Some(true) {
            // The name that it did not get is free.
            let free = it.api.post("/v1/tenants?dry_run=true", json!({ "name": new })).await;
            assert_eq!(free.status, 200, "{}", free.body);
        }
        if ended.is_none() {
            assert!(undone > 8 && done > 4, "{undone} undone, {done} done");
            return;
        }
    }
}

#[tokio::test]
async fn the_way_back_of_rename_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "back").await;
    let tenant = it.with_rows("stays").await;
    // The fence goes up, and then there is somebody whom the control role cannot end.
    let superuser = cluster().admin("stays").await;
    while !it.fail("POST", "/v1/tenants/stays/rename", &json!({ "to": "goes" })).await {
        assert_eq!(it.state("stays").await, "active", "at effect {}", it.n);
        assert_eq!(what_is_there(&it.proxy).await, names(&["database:stays", "role:stays"]), "at effect {}", it.n);
        assert_eq!(it.rows(&tenant).await, "50", "at effect {}", it.n);
    }
    drop(superuser);
    assert!(it.n > 6, "only {} effects: what was killed?", it.n);
}

#[tokio::test]
async fn drain_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "drain").await;
    let tenant = it.with_rows("drained").await;
    loop {
        let lived = it.succeed("POST", "/v1/tenants/drained/drain", &json!({ "deadline_ms": 1_000 })).await;
        assert_eq!(it.state("drained").await, "drained", "at effect {}", it.n);
        assert!(it.proxy.connect(&tenant).try_login().await.is_err(), "at effect {}", it.n);
        assert_eq!(it.api.post("/v1/tenants/drained/resume", json!({})).await.status, 200);
        assert_eq!(it.rows(&tenant).await, "50", "at effect {}", it.n);
        if lived {
            assert!(it.n > 8, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

#[tokio::test]
async fn rotate_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "rotate").await;
    it.with_rows("turned").await;
    loop {
        let lived = it.succeed("POST", "/v1/tenants/turned/rotate", &json!({})).await;
        // Catalog and PostgreSQL have the same verifier, whoever knows the password.
        let here = "SELECT roles->0->>'verifier' FROM tenantry.tenants WHERE name = 'turned'";
        let there = "SELECT rolpassword FROM pg_authid WHERE rolname = 'turned'";
        assert_eq!(cluster().sql_in("tenantry_control", here).await, cluster().sql(there).await, "at effect {}", it.n);
        if lived {
            assert!(it.n > 4, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

#[tokio::test]
async fn archive_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "archive").await;
    let tenant = it.with_rows("kept").await;
    loop {
        let lived = it.succeed("POST", "/v1/tenants/kept/archive", &json!({ "deadline_ms": 1_000 })).await;
        assert_eq!(it.state("kept").await, "archived", "at effect {}", it.n);
        let mut there = what_is_there(&it.proxy).await;
        let stored = there.iter().filter(|name| name.starts_with("file:")).count();
        there.retain(|name| !name.starts_with("file:"));
        assert_eq!(there, names(&["role:kept"]), "at effect {}", it.n);
        let archives = it.api.get("/v1/archives").await.body["items"].as_array().map_or(0, Vec::len);
        assert_eq!((stored, archives), (usize::try_from(it.n).expect("small"), stored), "at effect {}", it.n);
        let back = it.api.post("/v1/tenants/kept/restore", json!({})).await;
        assert_eq!(back.status, 200, "{}", back.body);
        assert_eq!(it.rows(&tenant).await, "50", "at effect {}", it.n);
        if lived {
            assert!(it.n > 25, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

/// One pg_dump that says its version, and fails.
fn broken_programs(proxy: &Proxy) -> std::path::PathBuf {
    let dir = proxy.dir().join("broken");
    std::fs::create_dir(&dir).expect("a directory");
    std::os::unix::fs::symlink(bin_dir().join("pg_restore"), dir.join("pg_restore")).expect("a link");
    let real = bin_dir().join("pg_dump");
    let script = format!(
        "#!/bin/sh\ntest \"$1\" = --version && exec {} --version\necho half of it\necho it broke >&2\nexit 1\n",
        real.display()
    );
    std::fs::write(dir.join("pg_dump"), script).expect("a script");
    std::fs::set_permissions(dir.join("pg_dump"), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    dir
}

/// Who may connect to a database by which grant.
async fn grants(database: &str) -> Option<String> {
    let sql = format!(
        "SELECT string_agg(line, ', ' ORDER BY line) FROM ( \
           SELECT a.grantee::regrole || ' ' || a.privilege_type || ' ' || a.is_grantable AS line \
           FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a WHERE d.datname = '{database}') AS it"
    );
    cluster().sql(&sql).await
}

#[tokio::test]
async fn the_way_back_of_archive_survives_kill_9_at_every_effect_and_gives_everybody_what_they_had() {
    let old = cluster().tenant("legacy").await;
    let (proxy, api) = control_proxy().await;
    let broken = broken_programs(&proxy);
    proxy.reload(&proxy.settings().set("admin.postgres_bin", broken.display().to_string()).text());
    cluster().sql(&format!("GRANT {} TO tenantry_control WITH ADMIN OPTION", old.role)).await;
    // Of PUBLIC's rights on one database and of a role's that may pass them on; the other has its owner's alone.
    cluster()
        .sql(&format!("CREATE ROLE reader; GRANT CONNECT ON DATABASE {} TO reader WITH GRANT OPTION", old.name))
        .await;
    let verifier = cluster().sql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", old.role)).await;
    let adopted = api.post(&format!("/v1/tenants/{}/adopt", old.name), json!({ "verifier": verifier })).await;
    assert_eq!(adopted.status, 201, "{}", adopted.body);
    api.post(&format!("/v1/tenants/{}/pause", old.name), json!({})).await;
    let (before, there) = (grants(&old.name).await, what_is_there(&proxy).await);
    assert!(before.as_ref().is_some_and(|all| all.contains("- CONNECT") && all.contains("reader CONNECT true")));

    let mut it = Mortal::new((proxy, api), "back").await;
    let path = format!("/v1/tenants/{}/archive", old.name);
    loop {
        let lived = it.fail("POST", &path, &json!({ "deadline_ms": 1_000 })).await;
        assert_eq!(grants(&old.name).await, before, "at effect {}", it.n);
        assert_eq!(it.state(&old.name).await, "paused", "at effect {}", it.n);
        assert_eq!(what_is_there(&it.proxy).await, there, "at effect {}", it.n);
        if lived {
            assert!(it.n > 7, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

#[tokio::test]
async fn archive_that_is_cancelled_after_kill_9_at_any_effect_is_done_or_undone() {
    let mut it = Mortal::new(control_proxy().await, "archive").await;
    let tenant = it.with_rows("kept").await;
    let (mut done, mut undone) = (0, 0);
    loop {
        let ended = it.cancel("POST", "/v1/tenants/kept/archive", &json!({ "deadline_ms": 1_000 })).await;
        let mut there = what_is_there(&it.proxy).await;
        let stored = there.iter().filter(|name| name.starts_with("file:")).count();
        there.retain(|name| !name.starts_with("file:"));
        if ended == Some(true) {
            undone += 1;
            assert_eq!(it.state("kept").await, "active", "at effect {}", it.n);
            assert_eq!(there, names(&["database:kept", "role:kept"]), "at effect {}", it.n);
        } else {
            done += 1;
            assert_eq!(it.state("kept").await, "archived", "at effect {}", it.n);
            assert_eq!(there, names(&["role:kept"]), "at effect {}", it.n);
            let back = it.api.post("/v1/tenants/kept/restore", json!({})).await;
            assert_eq!(back.status, 200, "{}", back.body);
        }
        assert_eq!(stored, done, "an archive for each that was done, at effect {}", it.n);
        assert_eq!(it.rows(&tenant).await, "50", "at effect {}", it.n);
        if ended.is_none() {
            assert!(undone > 15 && done > 4, "{undone} undone, {done} done");
            return;
        }
    }
}

#[tokio::test]
async fn restore_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "restore").await;
    let tenant = it.with_rows("kept").await;
    loop {
        let kept = it.api.post("/v1/tenants/kept/archive", json!({ "deadline_ms": 1_000 })).await;
        assert_eq!(kept.status, 200, "{}", kept.body);
        let lived = it.succeed("POST", "/v1/tenants/kept/restore", &json!({})).await;
        assert_eq!(it.state("kept").await, "active", "at effect {}", it.n);
        let mut there = what_is_there(&it.proxy).await;
        there.retain(|name| !name.starts_with("file:"));
        assert_eq!(there, names(&["database:kept", "role:kept"]), "at effect {}", it.n);
        assert_eq!(it.rows(&tenant).await, "50", "at effect {}", it.n);
        if lived {
            assert!(it.n > 15, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

#[tokio::test]
async fn delete_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "delete").await;
    loop {
        let tenant = it.with_rows("gone").await;
        let body = json!({ "confirm": "gone", "without_archive": true, "deadline_ms": 1_000 });
        let lived = it.succeed("DELETE", "/v1/tenants/gone", &body).await;
        assert_eq!(it.api.get("/v1/tenants/gone").await.status, 404, "at effect {}", it.n);
        assert_eq!(what_is_there(&it.proxy).await, names(&[]), "at effect {}", it.n);
        let refused = it.proxy.connect(&tenant).try_login().await;
        assert!(refused.is_err(), "a route is left, at effect {}", it.n);
        if lived {
            assert!(it.n > 12, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

#[tokio::test]
async fn delete_that_is_cancelled_after_kill_9_at_any_effect_is_done_or_undone() {
    let mut it = Mortal::new(control_proxy().await, "delete").await;
    let (mut tenant, mut undone) = (it.with_rows("gone").await, 0);
    loop {
        let body = json!({ "confirm": "gone", "without_archive": true, "deadline_ms": 1_000 });
        let ended = it.cancel("DELETE", "/v1/tenants/gone", &body).await;
        if ended == Some(true) {
            undone += 1;
            assert_eq!(it.state("gone").await, "active", "at effect {}", it.n);
            assert_eq!(it.rows(&tenant).await, "50", "at effect {}", it.n);
        } else {
            assert_eq!(what_is_there(&it.proxy).await, names(&[]), "at effect {}", it.n);
        }
        match ended {
            Some(true) => {}
            Some(false) => tenant = it.with_rows("gone").await,
            None => {
                assert!(undone > 6, "{undone} undone");
                return;
            }
        }
    }
}

#[tokio::test]
async fn separate_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "separate").await;
    let first = it.api.create("first").await;
    loop {
        let name = format!("apart_{}", it.n + 1);
        let made = it.api.post("/v1/tenants", json!({ "name": name, "shared_role": first.role })).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let shared = Tenant { name: name.clone(), ..first.clone() };
        it.proxy.connect(&shared).login().await.run("CREATE TABLE t AS SELECT 1 AS n").await;
        let lived = it.succeed("POST", &format!("/v1/tenants/{name}/separate"), &json!({})).await;
        let owner = "SELECT tableowner FROM pg_tables WHERE tablename = 't'";
        assert_eq!(cluster().sql_in(&name, owner).await.as_ref(), Some(&name), "at effect {}", it.n);
        let kept = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'first'";
        assert_eq!(cluster().sql(kept).await.as_deref(), Some("first"), "at effect {}", it.n);
        assert_eq!(it.rows(&shared).await, "1", "the old login works on, at effect {}", it.n);
        it.delete(&name).await;
        assert_eq!(what_is_there(&it.proxy).await, names(&["database:first", "role:first"]), "at effect {}", it.n);
        if lived {
            assert!(it.n > 10, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

#[tokio::test]
async fn the_end_of_a_separation_survives_kill_9_at_every_effect() {
    let mut it = Mortal::new(control_proxy().await, "retire").await;
    let first = it.api.create("first").await;
    loop {
        let name = format!("apart_{}", it.n + 1);
        let made = it.api.post("/v1/tenants", json!({ "name": name, "shared_role": first.role })).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let path = format!("/v1/tenants/{name}/separate");
        let own = tenant_of(&it.api.post(&path, json!({})).await.body);
        // Somebody shares the new role by now: its database is nobody else's, either.
        let guest = format!("guest_{}", it.n + 1);
        let made = it.api.post("/v1/tenants", json!({ "name": guest, "shared_role": own.role })).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let shared = Tenant { name: name.clone(), ..first.clone() };
        it.proxy.connect(&shared).login().await.run("CREATE TABLE t AS SELECT 1 AS n").await;
        let lived = it.succeed("POST", &path, &json!({ "finish": true })).await;
        assert_eq!(it.rows(&own).await, "1", "at effect {}", it.n);
        assert!(it.proxy.connect(&shared).try_login().await.is_err(), "at effect {}", it.n);
        let owners = format!(
            "SELECT string_agg(pg_get_userbyid(datdba), ' ' ORDER BY datname) FROM pg_database \
             WHERE datname IN ('first', '{name}', '{guest}')"
        );
        let wanted = format!("{name} first {name}");
        assert_eq!(cluster().sql(&owners).await, Some(wanted), "at effect {}", it.n);
        it.delete(&guest).await;
        it.delete(&name).await;
        assert_eq!(what_is_there(&it.proxy).await, names(&["database:first", "role:first"]), "at effect {}", it.n);
        if lived {
            assert!(it.n > 6, "only {} effects: what was killed?", it.n);
            return;
        }
    }
}

/// pg_dump and pg_restore whose first run each is the end of the process that started them; they themselves run on.
fn deadly_programs(proxy: &Proxy) -> std::path::PathBuf {
    let dir = proxy.dir().join("deadly");
    std::fs::create_dir(&dir).expect("a directory");
    for name in ["pg_dump", "pg_restore"] {
        let (real, mark) = (bin_dir().join(name), dir.join(format!("{name}.ran")));
        let script = format!(
            "#!/bin/sh\ntest \"$1\" = --version && exec {real} --version\n\
             if ! test -e {mark}; then : > {mark}; kill -9 $PPID; fi\nexec {real} \"$@\"\n",
            real = real.display(),
            mark = mark.display()
        );
        std::fs::write(dir.join(name), script).expect("a script");
        std::fs::set_permissions(dir.join(name), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    dir
}

#[tokio::test]
async fn a_death_while_pg_dump_or_pg_restore_runs_is_survived() {
    let it = Mortal::new(control_proxy().await, "none").await;
    let tenant = it.with_rows("kept").await;
    let programs = deadly_programs(&it.proxy);
    it.proxy.reload(&it.proxy.settings().set("admin.postgres_bin", programs.display().to_string()).text());
    it.proxy.restart(&[]).await;
    it.newest_job().await;
    for (verb, state, deaths) in [("archive", "archived", 2), ("restore", "active", 1)] {
        it.api.try_send("POST", &format!("/v1/tenants/kept/{verb}"), Some(&json!({})), &[]).await;
        let mut died = 0;
        while it.state_if_over().await.as_deref() != Some(state) {
            if !it.proxy.runs() {
                died += 1;
                it.proxy.restart(&[]).await;
            }
        }
        assert_eq!(died, deaths, "{verb}");
        let _ = std::fs::remove_file(programs.join("pg_restore.ran"));
        let mut there = what_is_there(&it.proxy).await;
        there.retain(|name| !name.starts_with("database:kept") && !name.ends_with(".dump"));
        assert_eq!(there, names(&["role:kept"]), "{verb}");
    }
    assert_eq!(it.rows(&tenant).await, "50");
}
