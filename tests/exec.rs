//! `tenantry exec`: a command once per tenant, with a login that is made for it and gone with it.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use serde_json::{Value, json};
use tenantry_testkit::{Api, Proxy, Tenant, cluster, control::control_proxy, eventually, proxy::binary, within};

/// `tenantry exec ...` against the proxy's API.
struct Exec<'a> {
    api: &'a Api,
    logs: PathBuf,
}

impl<'a> Exec<'a> {
    fn new(proxy: &Proxy, api: &'a Api) -> Self {
        Self { api, logs: proxy.dir().join("logs") }
    }

    fn start(&self, words: &[&str]) -> Child {
        let psql = ["/usr/bin/psql".into(), cluster().program("psql")].into_iter().find(|path: &PathBuf| path.exists());
        let path = format!("{}:/usr/bin:/bin", psql.as_deref().and_then(Path::parent).expect("psql").display());
        let mut command = Command::new(binary());
        command.arg("exec").args(["--json", "--logs"]).arg(&self.logs).args(words).env("PATH", path);
        command.env("TENANTRY_URL", format!("http://{}", self.api.base)).env("TENANTRY_TOKEN", &self.api.token);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("tenantry")
    }

    /// Exit code, and the report.
    async fn run(&self, words: &[&str]) -> (i32, Value) {
        end(self.start(words)).await
    }

    fn log(&self, tenant: &str) -> String {
        std::fs::read_to_string(self.logs.join(format!("{tenant}.log"))).unwrap_or_default()
    }
}

async fn end(child: Child) -> (i32, Value) {
    let done = tokio::task::spawn_blocking(move || child.wait_with_output().expect("an end"));
    let Output { status, stdout, stderr } =
        within("it ends", std::time::Duration::from_secs(120), done).await.expect("no panic");
    let text = String::from_utf8_lossy(&stdout);
    let report = serde_json::from_str(text.trim());
    let report = report.unwrap_or_else(|_| panic!("{status}: {text}{}", String::from_utf8_lossy(&stderr)));
    (status.code().unwrap_or(-1), report)
}

/// `name:state` of its tenants, in order.
fn states(rollout: &Value) -> String {
    let of =
        |turn: &Value| format!("{}:{}", turn["name"].as_str().unwrap_or("?"), turn["state"].as_str().unwrap_or("?"));
    rollout["tenants"].as_array().unwrap_or_else(|| panic!("{rollout}")).iter().map(of).collect::<Vec<_>>().join(" ")
}

fn turn<'a>(rollout: &'a Value, name: &str) -> &'a Value {
    let found = rollout["tenants"].as_array().expect("tenants").iter().find(|turn| turn["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {rollout}"))
}

async fn in_database(name: &str, sql: &str) -> String {
    cluster().sql_in(name, sql).await.unwrap_or_default()
}

/// Roles that a command logs in as.
async fn logins() -> String {
    cluster().sql("SELECT count(*)::text FROM pg_roles WHERE rolname ~ '-exec$'").await.unwrap_or_default()
}

async fn create_all(api: &Api, names: &[&str]) -> Vec<Tenant> {
    let mut made = Vec::new();
    for name in names {
        made.push(api.create(name).await);
    }
    made
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_runs_as_each_tenants_owner_through_a_session_of_its_own() {
    let (proxy, api) = control_proxy().await;
    create_all(&api, &["blog", "shop"]).await;
    let exec = Exec::new(&proxy, &api);
    // What is left in the session is there in the next transaction, and what is made is the owner's.
    let sql = "SELECT current_database() || ' as ' || current_user || ', ' || current_setting('lock_timeout'); \
               CREATE TEMP TABLE mine (n int); SELECT pg_advisory_lock(5); CREATE TABLE t AS SELECT 1 AS n; SELECT count(*) FROM mine; \
               SELECT 'locks ' || count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 5 AND pid = pg_backend_pid()";
    let words = ["--tenants", "*", "--lock-timeout", "1234ms", "--", "psql", "-X", "-At", "-v", "ON_ERROR_STOP=1"];
    let mut words = words.to_vec();
    sql.split("; ").for_each(|statement| words.extend(["-c", statement]));
    let (code, report) = exec.run(&words).await;
    assert_eq!((code, states(&report).as_str()), (0, "blog:done shop:done"), "{report} {}", exec.log("blog"));
    for name in ["blog", "shop"] {
        let log = exec.log(name);
        assert!(log.contains(&format!("{name} as {name}, 1234ms")) && log.contains("locks 1"), "{log}");
        assert_eq!(in_database(name, "SELECT tableowner FROM pg_tables WHERE tablename = 't'").await, name);
    }
    assert_eq!(logins().await, "0");
    assert_eq!(api.get("/v1/tenants/shop").await.body["roles"], json!(["shop"]), "the way in is closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_second_session_makes_is_the_owners_too() {
    second_sessions(json!({})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_second_session_makes_is_the_owners_too_where_each_begins_wiped() {
    second_sessions(json!({ "isolation": "strict" })).await;
}

async fn second_sessions(spec: Value) {
    let (proxy, api) = control_proxy().await;
    let made = api.post("/v1/tenants", json!({ "name": "shop", "spec": spec })).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let exec = Exec::new(&proxy, &api);
    in_database("shop", "SET ROLE shop; CREATE SCHEMA app").await;
    cluster().sql("ALTER ROLE shop SET search_path = app").await;
    let script =
        "psql -X -c 'CREATE TABLE a ()' && psql -X -c 'CREATE TABLE b ()' && psql -X -At -c 'SELECT current_user'";
    let (code, report) = exec.run(&["--tenants", "shop", "--", "sh", "-c", script]).await;
    assert_eq!(code, 0, "{report} {}", exec.log("shop"));
    assert!(exec.log("shop").trim_end().ends_with("\nshop"), "{}", exec.log("shop"));
    let owners = "SELECT string_agg(tablename || ' ' || tableowner, ', ' ORDER BY tablename) FROM pg_tables WHERE schemaname = 'app'";
    // Where the owner's own sessions would have made them.
    assert_eq!(in_database("shop", owners).await, "a shop, b shop");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_stops_after_failures_reports_their_last_lines_and_resumes_there() {
    let (proxy, api) = control_proxy().await;
    let names = ["a1", "a2", "a3", "a4", "a5", "a6"];
    create_all(&api, &names).await;
    in_database("a3", "SET ROLE a3; CREATE TABLE t ()").await;
    let exec = Exec::new(&proxy, &api);
    let script = "echo run >> $LOGS/$DATABASE_NAME.runs; psql -X -v ON_ERROR_STOP=1 -c 'CREATE TABLE t ()'";
    let script = script.replace("$LOGS", &exec.logs.display().to_string());
    let words = ["--tenants", "a*", "--canary", "a2", "--wave", "2", "--parallel", "2", "--", "sh", "-c", &script];
    let (code, report) = exec.run(&words).await;
    assert_eq!((code, &report["state"]), (1, &json!("stopped")), "{report}");
    // The wave of the one that failed comes to its end, the next does not begin.
    assert_eq!(states(&report), "a2:done a1:done a3:failed a4:waiting a5:waiting a6:waiting");
    assert_eq!(turn(&report, "a3")["error"], "exit status 1");
    let output = turn(&report, "a3")["output"].as_str().unwrap_or_default();
    assert!(output.contains("relation \"t\" already exists"), "{output}");
    assert_eq!(logins().await, "0");
    in_database("a3", "DROP TABLE t").await;
    let id = report["id"].to_string();
    let (code, report) = exec.run(&["--resume", &id, "--retries", "1"]).await;
    assert_eq!((code, &report["state"]), (0, &json!("succeeded")), "{report}");
    for name in names {
        let runs = std::fs::read_to_string(exec.logs.join(format!("{name}.runs"))).unwrap_or_default();
        assert_eq!(runs.lines().count(), if name == "a3" { 2 } else { 1 }, "{name}");
    }
    assert_eq!(logins().await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupt_ends_the_commands_and_one_that_was_killed_leaves_no_login() {
    let (proxy, api) = control_proxy().await;
    create_all(&api, &["blog", "shop"]).await;
    let exec = Exec::new(&proxy, &api);
    let words =
        ["--tenants", "*", "--canary", "0", "--parallel", "2", "--", "psql", "-X", "-c", "SELECT pg_sleep(600)"];
    let both_sleep = async || {
        eventually("both sleep", async || {
            let asleep =
                "SELECT count(*)::text FROM pg_stat_activity WHERE usename LIKE '%-exec' AND wait_event = 'PgSleep'";
            (cluster().sql(asleep).await? == "2").then_some(())
        })
        .await;
    };
    let child = exec.start(&words);
    both_sleep().await;
    let kill = |pid: u32, signal: &str| {
        let done = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill");
        assert!(done.success());
    };
    kill(child.id(), "-INT");
    let (code, report) = end(child).await;
    assert_eq!((code, &report["state"]), (1, &json!("cancelled")), "{report}");
    assert_eq!(logins().await, "0");

    // A terminal that is closed is an interrupt, too. What runs has a process group of its own and would stay.
    let id = report["id"].to_string();
    let child = exec.start(&["--resume", &id]);
    both_sleep().await;
    kill(child.id(), "-HUP");
    let (code, report) = end(child).await;
    assert_eq!((code, &report["state"]), (1, &json!("cancelled")), "{report}");
    assert_eq!(logins().await, "0");

    // Killed, it tells nobody: the API finds out, closes the logins and stops the rollout.
    let mut child = exec.start(&["--resume", &id]);
    both_sleep().await;
    // Nobody else's word counts while it is there, nor that of a runner before it.
    let stranger = json!({ "ended": [], "verifier": "SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk:c2VydmVy" });
    let refused = api.post(&format!("/v1/rollouts/{id}/outcomes"), stranger).await;
    assert_eq!(refused.status, 409, "{}", refused.body);
    kill(child.id(), "-KILL");
    child.wait().expect("an end");
    // As if 31 s had gone by.
    let silence = "UPDATE tenantry.rollouts SET seen_at = seen_at - interval '31 s'";
    cluster().sql_in("tenantry_control", silence).await;
    let rollout = eventually("it stopped", async || {
        let rollout = api.try_send("GET", &format!("/v1/rollouts/{id}"), None, &[]).await?.body;
        (rollout["state"] == "failed" || rollout["state"] == "stopped").then_some(rollout)
    })
    .await;
    assert!(turn(&rollout, "shop")["error"].as_str().unwrap_or_default().contains("nothing was heard"), "{rollout}");
    eventually("no login is left", async || (logins().await == "0").then_some(())).await;
    let (code, report) = exec.run(&["--tenants", "shop", "--", "true"]).await;
    assert_eq!(code, 0, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_go_on_meanwhile_and_the_login_is_for_that_tenant_alone() {
    let (proxy, api) = control_proxy().await;
    let tenants = create_all(&api, &["blog", "shop"]).await;
    let exec = Exec::new(&proxy, &api);
    let script = format!(
        "psql -X -At -c 'SELECT 1' && PGDATABASE=blog psql -X -At -c 'SELECT 2'; touch {0}/up; sleep 1000",
        exec.logs.display()
    );
    let child = exec.start(&["--tenants", "shop", "--", "sh", "-c", &script]);
    eventually("it runs", async || exec.logs.join("up").exists().then_some(())).await;
    let log = exec.log("shop");
    assert!(log.contains("\n1\n") && !log.contains("\n2\n") && log.contains("FATAL"), "{log}");
    for tenant in &tenants {
        assert_eq!(proxy.connect(tenant).login().await.value("SELECT current_user").await, tenant.role);
    }
    // A tenant with a command under way has no other job.
    let renamed = api.post("/v1/tenants/shop/rename", json!({ "to": "store" })).await;
    assert_eq!(
        (renamed.status, renamed.body["type"].as_str()),
        (409, Some("urn:tenantry:problem:busy")),
        "{}",
        renamed.body
    );
    let id = api.get("/v1/rollouts").await.body["items"][0]["id"].to_string();
    assert_eq!(api.post(&format!("/v1/rollouts/{id}/cancel"), json!({})).await.status, 202);
    let (code, report) = end(child).await;
    assert_eq!((code, &report["state"]), (1, &json!("cancelled")), "{report}");
    assert_eq!(logins().await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_goes_on_when_tenantry_was_gone_for_longer_than_a_runner_may_be_silent() {
    let (proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    let exec = Exec::new(&proxy, &api);
    let (begun, end_it) = (exec.logs.join("begun"), exec.logs.join("end"));
    let script = format!("touch {}; until test -e {}; do sleep 0.1; done", begun.display(), end_it.display());
    let child = exec.start(&["--tenants", "shop", "--", "sh", "-c", &script]);
    eventually("it has begun", async || begun.exists().then_some(())).await;
    proxy.signal("KILL");
    proxy.exit().await;
    // As if that had taken 60 s.
    cluster().sql_in("tenantry_control", "UPDATE tenantry.rollouts SET seen_at = seen_at - interval '60 s'").await;
    proxy.restart(&[]).await;
    std::fs::write(&end_it, "").expect("a file");
    let (code, report) = end(child).await;
    assert_eq!((code, &report["state"]), (0, &json!("succeeded")), "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_survives_kill_9_of_tenantry_at_every_effect_and_no_login_is_left() {
    let (proxy, api) = control_proxy().await;
    create_all(&api, &["shop"]).await;
    let exec = Exec::new(&proxy, &api);
    let answers = async || {
        eventually("it answers again", async || {
            let tenant = api.try_send("GET", "/v1/tenants/shop", None, &[]).await?;
            (tenant.status == 200).then_some(tenant.body)
        })
        .await
    };
    let mut effects = 0;
    for n in 1u32.. {
        assert!(n < 100, "it never lived to see its end");
        proxy.restart(&["--die-at", &n.to_string(), "--die-in", "exec"]).await;
        answers().await;
        let mark = exec.logs.join(format!("{n}.runs"));
        let script = format!("echo run >> {}", mark.display());
        let mut child = exec.start(&["--tenants", "shop", "--", "sh", "-c", &script]);
        let lived = eventually("it is over, or dead", || {
            let is_over = child.try_wait().expect("a child").is_some();
            let seen = if proxy.runs() { is_over.then_some(true) } else { Some(false) };
            async move { seen }
        })
        .await;
        if !lived {
            effects += 1;
            proxy.restart(&[]).await;
        }
        let (code, report) = end(child).await;
        assert_eq!((code, &report["state"]), (0, &json!("succeeded")), "at effect {n}: {report}");
        let runs = std::fs::read_to_string(&mark).unwrap_or_default();
        assert_eq!(runs.lines().count(), 1, "at effect {n}");
        assert_eq!(answers().await["roles"], json!(["shop"]), "at effect {n}");
        assert_eq!(logins().await, "0", "at effect {n}");
        if lived {
            assert!(effects > 12, "only {effects} effects: what was killed?");
            return;
        }
    }
}
