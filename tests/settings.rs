//! The settings file, from outside: `tenantry check`, start and SIGHUP.

use serde_json::json;
use tenantry_testkit::{
    Api, Load, ProxyBuilder, cluster,
    control::{control_builder, control_role},
    eventually, one_server,
    proxy::check,
};

#[tokio::test]
async fn check_accepts_a_good_file() {
    let tenant = cluster().tenant("settings").await;
    let output = check(&ProxyBuilder::new(cluster()).tenant(&tenant).set("admin.address", "").text());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn check_tells_all_problems_at_once_with_code_64() {
    let text = "[listen]\naddresses = [\"nowhere\"]\n[pool]\npool_sise = 3\npool_mode = \"fast\"\nquery_wait_timeout = \"soon\"\n\
                [servers.main]\nhost = \"127.0.0.1\"\nport = 700000\n[tenants.acme]\nserver = \"mian\"\n";
    let output = check(text);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert_eq!(output.status.code(), Some(64), "{said}");
    for word in ["nowhere", "pool_sise", "pool_size", "fast", "soon", "servers.main.port", "mian"] {
        assert!(said.contains(word), "nothing about {word} in:\n{said}");
    }
}

#[test]
fn check_of_a_file_that_is_no_toml_is_64() {
    let output = check("[listen\n");
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn a_password_in_a_bad_file_is_not_repeated() {
    let text = "[servers.main]\nhost = \"127.0.0.1\"\n[tenants.acme]\n[[tenants.acme.roles]]\nname = \"app\"\n\
                password = \"canary-1234\"\npassword_env = \"NOPE\"\npasword = \"canary-1234\"\n";
    let output = check(text);
    let said = [output.stdout, output.stderr].concat();
    assert_eq!(output.status.code(), Some(64));
    assert!(!String::from_utf8_lossy(&said).contains("canary-1234"));
}

#[tokio::test]
async fn reload_adds_a_tenant_without_an_error_for_the_others() {
    let (tenant, proxy) = one_server("settings").await;
    let newcomer = cluster().tenant("settings").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("BEGIN").await;
    assert!(proxy.connect(&newcomer).try_login().await.is_err());
    proxy.reload(&proxy.settings().tenant(&newcomer).text());
    eventually("the new tenant is served", async || {
        let mut client = proxy.connect(&newcomer).try_login().await.ok()?;
        Some(assert_eq!(client.value("SELECT current_database()").await, newcomer.name))
    })
    .await;
    client.run("COMMIT").await;
    assert_eq!(client.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_bad_file_changes_nothing() {
    let (tenant, proxy) = one_server("settings").await;
    let mut client = proxy.connect(&tenant).login().await;
    let before = proxy.log().lines().count();
    proxy.reload("[pool]\npool_sise = 1\n");
    eventually("the reload is in the log", async || (proxy.log().lines().count() > before).then_some(())).await;
    assert!(proxy.log().contains("pool_sise"), "{}", proxy.log());
    assert_eq!(client.value("SELECT 1").await, "1");
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1");
    // A good one after it counts again.
    let newcomer = cluster().tenant("settings").await;
    proxy.reload(&proxy.settings().tenant(&newcomer).text());
    eventually("the new tenant is served", async || proxy.connect(&newcomer).try_login().await.ok()).await;
}

#[tokio::test]
async fn incident_h05_a_pool_size_is_reloaded_there_and_back() {
    let (tenant, proxy) = one_server("settings").await;
    for size in [3, 1, 2, 1, 3] {
        proxy.reload(&proxy.settings().set("pool.pool_size", size).text());
        // So many transactions at once, and (by the queue) no more.
        eventually(format!("pool_size = {size}"), async || {
            let mut clients = Vec::new();
            let mut open = 0;
            for _ in 0..4 {
                let mut client = proxy.connect(&tenant).login().await;
                client.send(&tenantry_testkit::say::query("BEGIN")).await;
                match client.next_within(std::time::Duration::from_millis(150)).await {
                    Some(_) => open += 1,
                    None => {}
                }
                clients.push(client);
            }
            (open == size).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_new_password_counts_after_reload() {
    let (tenant, proxy) = one_server("settings").await;
    let mut old = proxy.connect(&tenant).login().await;
    assert_eq!(old.value("SELECT 1").await, "1");
    cluster().sql(&format!("ALTER ROLE {} PASSWORD 'brand-new-password'", tenant.role)).await;
    let text = proxy.settings().text().replace(&tenant.password, "brand-new-password");
    proxy.reload(&text);
    eventually("the new password works", async || {
        let mut client = proxy.connect(&tenant).password("brand-new-password").try_login().await.ok()?;
        Some(assert_eq!(client.value("SELECT 1").await, "1"))
    })
    .await;
    proxy.connect(&tenant).try_login().await.err().expect("the old one").fatal("28P01");
    assert_eq!(old.value("SELECT 'still here'").await, "still here");
}

#[tokio::test]
async fn incident_h05_a_password_goes_there_and_back_under_load_without_an_error() {
    let tenant = cluster().tenant("settings").await;
    let proxy = ProxyBuilder::new(cluster())
        .tenant(&tenant)
        .set("pool.pool_size", 2)
        // Logins to the server go on all the time.
        .set("pool.server_lifetime", "50ms")
        .start()
        .await;
    let load = Load::start(&proxy.connect(&tenant)).await;
    for password in ["brand-new-password", tenant.password.as_str()] {
        proxy.reload(&proxy.settings().text().replace(&tenant.password, password));
        let connect = proxy.connect(&tenant).password(password);
        eventually("the new password counts", async || connect.try_login().await.ok()).await;
        // PostgreSQL has the old one still, then the new one.
        load.outlives_its_connections(&tenant).await;
        cluster().sql(&format!("ALTER ROLE {} PASSWORD '{password}'", tenant.role)).await;
        load.outlives_its_connections(&tenant).await;
    }
    load.stop().await;
}

#[tokio::test]
async fn sigterm_lets_a_transaction_finish_and_tells_the_idle() {
    let (tenant, proxy) = one_server("settings").await;
    let mut busy = proxy.connect(&tenant).login().await;
    let mut idle = proxy.connect(&tenant).login().await;
    busy.run("BEGIN; CREATE TABLE kept (n int)").await;
    proxy.signal("TERM");
    idle.until_end().await.fatal("57P01");
    let answer = busy.query("COMMIT").await;
    assert!(answer.trace().iter().any(|line| line == "C COMMIT"), "{:?}", answer.trace());
    assert_eq!(proxy.exit().await, 0, "{}", proxy.log());
    assert_eq!(cluster().sql_in(&tenant.name, "SELECT to_regclass('kept') IS NOT NULL").await.as_deref(), Some("t"));
    eventually("no session is left", async || cluster().sessions(&tenant).await.is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_second_sigterm_is_now() {
    let (tenant, proxy) = one_server("settings").await;
    let mut busy = proxy.connect(&tenant).login().await;
    busy.run("BEGIN").await;
    proxy.signal("TERM");
    let mut tries = 0;
    while proxy.runs() && tries < 200 {
        proxy.signal("TERM");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        tries += 1;
    }
    assert!(!proxy.runs(), "it goes on after {tries} signals");
    eventually("no session is left", async || cluster().sessions(&tenant).await.is_empty().then_some(())).await;
}

#[tokio::test]
async fn metrics_are_served_and_hold_no_secret() {
    let (tenant, proxy) = one_server("settings").await;
    proxy.connect(&tenant).login().await.run("SELECT 'canary-in-sql'").await;
    let metrics = proxy.metrics().await;
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(metrics.contains("tenantry_"), "{metrics}");
    assert!(!metrics.contains("canary-in-sql") && !metrics.contains(&tenant.password));
    assert!(!proxy.log().contains("canary-in-sql"), "SQL text in the log");
}

#[tokio::test]
async fn check_tells_what_each_tenant_gets_when_everybody_wants_all() {
    let (a, b) = (cluster().tenant("checked").await, cluster().tenant("checked").await);
    let settings = ProxyBuilder::new(cluster())
        .tenant(&a)
        .tenant(&b)
        .set("admin.address", "")
        .set("servers.main.cap", 9)
        .set(&format!("tenants.{}.floor", a.name), 3)
        .set(&format!("tenants.{}.weight", b.name), 2);
    let output = check(&settings.text());
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = |tenant: &str| -> Vec<String> {
        let mut lines = told.lines().filter(|line| line.split_whitespace().next() == Some(tenant));
        lines.next_back().expect("a line").split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(words(&a.name)[2..], ["3", "off", "1", "3", "9"], "{told}");
    assert_eq!(words(&b.name)[2..], ["0", "off", "2", "6", "9"], "{told}");
    // An auto cap is known once the server was asked.
    let impossible = settings.set("servers.main.cap", "auto").set("pool.pool_size", 500);
    let impossible = impossible.set(&format!("tenants.{}.floor", a.name), 500);
    let output = check(&impossible.text());
    assert_eq!(output.status.code(), Some(64), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("less than the 500 of all floors"), "{output:?}");
}

#[tokio::test]
async fn check_shows_the_tenants_of_the_catalog_where_it_can_be_read() {
    control_role(cluster()).await;
    let written = cluster().tenant("written").await;
    let settings = control_builder(ProxyBuilder::new(cluster()).tenant(&written));
    let told = |settings: &ProxyBuilder| {
        let output = check(&settings.clone().set("admin.address", "").text());
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // Before the first start there is none, which is nothing wrong.
    let (code, said) = told(&settings);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the catalog cannot be read, so its tenants are not in this"), "{said}");
    let proxy = settings.clone().start().await;
    let api = Api::new(&proxy, "admin").await;
    let made = api.post("/v1/tenants", json!({ "name": "made", "spec": { "floor": 4, "ceiling": 9 } })).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let (code, said) = told(&settings);
    assert_eq!(code, Some(0), "{said}");
    let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(lines.iter().any(|words| words.starts_with(&["made", "made"]) && words.contains(&"skipped:")), "{said}");
    assert!(lines.iter().any(|words| words == &["made", "main", "4", "9", "1", "9", "30"]), "{said}");
    // Together with the file's they may be too many.
    let name = format!("tenants.{}", written.name);
    let (code, said) = told(&settings.clone().set(&format!("{name}.floor"), 27).set(&format!("{name}.pool_size"), 27));
    assert_eq!(code, Some(64), "{said}");
    assert!(said.contains("its cap of 30 is less than the 31 of all floors"), "{said}");
}

#[tokio::test]
async fn check_logs_in_with_the_control_role_too() {
    let tenant = cluster().tenant("settings").await;
    let control = |role: &str| {
        ProxyBuilder::new(cluster()).tenant(&tenant).set("admin.address", "").set("servers.main.control.role", role)
    };
    let output = check(&control("postgres").text());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.lines().any(|line| line.contains("(control)") && line.contains("ok")), "{said}");
    let output = check(&control("nobody_of_that_name").text());
    assert_eq!(output.status.code(), Some(69), "{}", String::from_utf8_lossy(&output.stdout));
}
