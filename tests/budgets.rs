//! Budgets on a real PostgreSQL: floors, ceilings, weights, the cap, and what a client is told when one of them holds it up.

use std::sync::Arc;

use serde_json::{Value, json};
use tenantry_testkit::{
    Api, Client, Cluster, FakeConn, FakeServer, Proxy, ProxyBuilder, Tenant, cluster,
    control::{control_builder, control_role},
    eventually, say,
};
use tokio::sync::Semaphore;

async fn proxy_for(cluster: &Cluster, tenants: &[&Tenant], settings: &[(&str, toml::Value)]) -> Proxy {
    let start = tenants.iter().fold(ProxyBuilder::new(cluster), |builder, tenant| builder.tenant(tenant));
    settings.iter().fold(start, |builder, (key, value)| builder.set(key, value.clone())).start().await
}

/// A client in an open transaction.
async fn holder(proxy: &Proxy, tenant: &Tenant) -> Client {
    let mut client = proxy.connect(tenant).login().await;
    client.run("BEGIN").await;
    client
}

/// A client whose query waits for a server connection; there are `waiting` of them then.
async fn waiter(proxy: &Proxy, tenant: &Tenant, waiting: u32) -> Client {
    let mut client = proxy.connect(tenant).login().await;
    client.send(&say::query("SELECT 1")).await;
    are_waiting(proxy, tenant, waiting).await;
    client
}

async fn are_waiting(proxy: &Proxy, tenant: &Tenant, waiting: u32) {
    let name = format!("tenantry_waiting_clients{{tenant=\"{}\"", tenant.name);
    eventually(format!("{waiting} waiting"), async || {
        let metrics = proxy.metrics().await;
        let line = metrics.lines().find(|line| line.starts_with(&name))?;
        line.ends_with(&format!(" {waiting}")).then_some(())
    })
    .await;
}

fn key(tenant: &Tenant, name: &str) -> String {
    format!("tenants.{}.{name}", tenant.name)
}

#[tokio::test]
async fn a_tenant_below_its_floor_is_next_whoever_waits_longer() {
    let (noisy, quiet) = (cluster().tenant("noisy").await, cluster().tenant("quiet").await);
    let floor = key(&quiet, "floor");
    let proxy = proxy_for(cluster(), &[&noisy, &quiet], &[("servers.main.cap", 2.into()), (&floor, 1.into())]).await;
    let mut first = holder(&proxy, &noisy).await;
    let mut second = holder(&proxy, &noisy).await;
    let mut older = waiter(&proxy, &noisy, 1).await;
    // The first login of a tenant needs a connection, as a query does.
    let connect = proxy.connect(&quiet);
    let entitled = tokio::spawn(async move { connect.login().await.value("SELECT 1").await });
    are_waiting(&proxy, &quiet, 1).await;
    first.run("COMMIT").await;
    assert_eq!(entitled.await.expect("served"), "1");
    second.run("COMMIT").await;
    assert_eq!(older.until_ready().await.ok().value(), "1");
}

#[tokio::test]
async fn what_lies_idle_within_a_floor_stays_while_others_wait() {
    let (noisy, quiet) = (cluster().tenant("noisy").await, cluster().tenant("quiet").await);
    let floor = key(&quiet, "floor");
    let proxy = proxy_for(cluster(), &[&noisy, &quiet], &[("servers.main.cap", 2.into()), (&floor, 1.into())]).await;
    let mut client = proxy.connect(&quiet).login().await;
    let backend = client.backend().await;
    let mut busy = holder(&proxy, &noisy).await;
    let mut waiting = waiter(&proxy, &noisy, 1).await;
    assert_eq!(client.backend().await, backend, "its own connection, at once");
    busy.run("COMMIT").await;
    assert_eq!(waiting.until_ready().await.ok().value(), "1");
}

#[tokio::test]
async fn a_ceiling_holds_over_all_roles_and_is_named_in_the_error() {
    let tenant = cluster().tenant("ceiling").await;
    let jobs = cluster().role(&tenant, "jobs").await;
    let ceiling = key(&tenant, "ceiling");
    let settings = [(ceiling.as_str(), 1.into()), ("pool.query_wait_timeout", "300ms".into())];
    let proxy = proxy_for(cluster(), &[&tenant, &jobs], &settings).await;
    let mut web = proxy.connect(&tenant).login().await;
    assert_eq!(web.value("SELECT 1").await, "1");
    // Its one connection is idle, and of the other role.
    let mut job = proxy.connect(&jobs).login().await;
    assert_eq!(job.value("SELECT current_user").await, jobs.role);
    web.run("BEGIN").await;
    let fault = job.query("SELECT 2").await.error("53300");
    assert!(format!("{fault:?}").contains("limit=ceiling"), "{fault:?}");
    web.run("COMMIT").await;
    assert_eq!(job.value("SELECT 3").await, "3", "it stayed connected");
}

#[tokio::test]
async fn an_auto_cap_is_what_postgresql_has_without_the_reserve() {
    let own = Cluster::start_with("max_connections = 20\nsuperuser_reserved_connections = 3").leaked();
    let tenant = own.tenant("auto").await;
    let proxy = proxy_for(own, &[&tenant], &[("servers.main.reserve", 12.into())]).await;
    let mut holders = Vec::new();
    for _ in 0..5 {
        holders.push(holder(&proxy, &tenant).await);
    }
    assert_eq!(proxy.metric("tenantry_server_cap").await, 5.0);
    let mut sixth = waiter(&proxy, &tenant, 1).await;
    assert_eq!(own.sessions(&tenant).await.len(), 5);
    assert!(proxy.metrics().await.lines().any(|line| line.contains("limit=\"server_cap\"") && line.ends_with(" 1")));
    holders.pop().expect("five").run("COMMIT").await;
    assert_eq!(sixth.until_ready().await.ok().value(), "1");
}

#[tokio::test]
async fn the_cap_yields_to_the_connections_of_others() {
    let own = Cluster::start_with("max_connections = 20\nsuperuser_reserved_connections = 3").leaked();
    let tenant = own.tenant("others").await;
    let mut others = Vec::new();
    for _ in 0..12 {
        others.push(own.direct(&tenant).login().await);
    }
    let proxy = proxy_for(own, &[&tenant], &[("servers.main.cap", 15.into())]).await;
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 1").await, "1");
    // The test's own sessions count, too.
    let cap = proxy.metric("tenantry_server_cap").await;
    assert!((1.0..=5.0).contains(&cap), "17 slots, 12 of them others', and the cap is {cap}");
}

#[tokio::test]
async fn the_cap_yields_to_others_that_come_later_although_nothing_is_dialled() {
    let own = Cluster::start_with("max_connections = 20\nsuperuser_reserved_connections = 3").leaked();
    let tenant = own.tenant("later").await;
    let proxy = proxy_for(own, &[&tenant], &[("servers.main.cap", 15.into())]).await;
    let mut holders = [holder(&proxy, &tenant).await, holder(&proxy, &tenant).await, holder(&proxy, &tenant).await];
    for client in &mut holders {
        client.run("COMMIT").await;
    }
    let before = proxy.metric("tenantry_server_cap").await;
    assert!(before >= 13.0, "nobody else is there, and the cap is {before}");
    let connects = proxy.metric("tenantry_server_connects_total").await;
    let mut others = Vec::new();
    for _ in 0..12 {
        others.push(own.direct(&tenant).login().await);
    }
    let [mut client, ..] = holders;
    let busy = tokio::spawn(async move {
        loop {
            client.run("SELECT 1").await;
        }
    });
    let yields = async || (proxy.metric("tenantry_server_cap").await <= 5.0).then_some(());
    eventually("the cap yields", yields).await;
    busy.abort();
    assert_eq!(proxy.metric("tenantry_server_connects_total").await, connects, "nothing was dialled meanwhile");
}

#[tokio::test]
async fn a_login_that_came_to_nothing_keeps_its_permit_until_the_server_has_closed_its_end() {
    let may_close = Arc::new(Semaphore::new(0));
    let waits = Arc::clone(&may_close);
    let server = FakeServer::start(move |conn: FakeConn| {
        let waits = Arc::clone(&waits);
        async move {
            waits.acquire().await.expect("open").forget();
            drop(conn);
        }
    })
    .await;
    let tenant = FakeServer::tenant();
    let proxy = ProxyBuilder::to(server.address())
        .tenant(&tenant)
        .set("servers.main.cap", 1)
        .set("pool.server_connect_timeout", "200ms")
        .start()
        .await;
    let who = proxy.connect(&tenant);
    let client = tokio::spawn(async move { who.try_login().await.is_ok() });
    let failures = async |n: f64| {
        let failed = async || (proxy.metric("tenantry_server_connect_failures_total").await >= n).then_some(());
        eventually(format!("{n} logins timed out"), failed).await;
    };
    failures(1.0).await;
    // Long after every back-off: it has gone from closing to lingering.
    let lingers = async || {
        let state = "state=\"lingering\"} 1";
        proxy.metrics().await.lines().any(|line| line.ends_with(state)).then_some(())
    };
    eventually("it takes long to close", lingers).await;
    assert_eq!((proxy.metric("tenantry_server_permits").await, server.accepted()), (1.0, 1));
    may_close.add_permits(1);
    failures(2.0).await;
    assert_eq!((proxy.metric("tenantry_server_permits").await, server.accepted()), (1.0, 2));
    client.abort();
}

#[tokio::test]
async fn a_connection_limit_of_one_database_holds_up_nobody_else() {
    let (fenced, other) = (cluster().tenant("fenced").await, cluster().tenant("other").await);
    cluster().sql(&format!("ALTER DATABASE {} CONNECTION LIMIT 1", fenced.name)).await;
    let settings = [("pool.query_wait_timeout", "500ms".into())];
    let proxy = proxy_for(cluster(), &[&fenced, &other], &settings).await;
    let direct = cluster().direct(&fenced).login().await;
    proxy.connect(&other).login().await.value("SELECT 1").await;
    let cap = proxy.metric("tenantry_server_cap").await;
    let mut held_up = proxy.connect(&fenced).open().await.expect("connected");
    let who = proxy.connect(&fenced);
    let refused = held_up.login(&who);
    let served = async {
        let mut client = proxy.connect(&other).login().await;
        for n in 0..20 {
            assert_eq!(client.value(&format!("SELECT {n}")).await, n.to_string());
        }
        assert_eq!(proxy.metric("tenantry_server_cap").await, cap, "nobody else's room is any less");
    };
    let (answer, ()) = tokio::join!(refused, served);
    let told = if answer.faults().is_empty() { held_up.query("SELECT 1").await } else { answer };
    let fault = told.faults().pop().expect("refused");
    assert_eq!(fault.code, "53300", "{fault:?}");
    assert!(format!("{fault:?}").contains("limit=tenant_full"), "{fault:?}");
    direct.leave().await;
    eventually("it is served once there is room", async || {
        let mut client = proxy.connect(&fenced).try_login().await.ok()?;
        client.query("SELECT 1").await.faults().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_reload_changes_a_budget_and_a_budget_that_cannot_be_changes_nothing() {
    let (noisy, quiet) = (cluster().tenant("noisy").await, cluster().tenant("quiet").await);
    let proxy = proxy_for(cluster(), &[&noisy, &quiet], &[("servers.main.cap", 3.into())]).await;
    let mut holders = Vec::new();
    for _ in 0..3 {
        holders.push(holder(&proxy, &noisy).await);
    }
    let ceiling = proxy.settings().set(&key(&noisy, "ceiling"), 1);
    proxy.reload(&ceiling.text());
    let lowered = async || {
        let name = format!("tenantry_tenant_ceiling{{tenant=\"{}\"", noisy.name);
        proxy.metrics().await.lines().find(|line| line.starts_with(&name))?.ends_with(" 1").then_some(())
    };
    eventually("the new ceiling", lowered).await;
    for mut client in holders {
        client.run("COMMIT").await;
    }
    eventually("one connection is left", async || (cluster().sessions(&noisy).await.len() == 1).then_some(())).await;
    let impossible = ceiling.set(&key(&quiet, "floor"), 3).set(&key(&noisy, "floor"), 1);
    proxy.reload(&impossible.text());
    let stale = async || (proxy.metric("tenantry_settings_stale").await == 1.0).then_some(());
    eventually("refused", stale).await;
    assert!(proxy.log().contains("3 is less than the 4 of all floors"), "{}", proxy.log());
    assert_eq!(proxy.connect(&quiet).login().await.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_reload_whose_floors_do_not_fit_an_auto_cap_is_refused_with_the_sums() {
    let own = Cluster::start_with("max_connections = 20\nsuperuser_reserved_connections = 3").leaked();
    let (a, b) = (own.tenant("one").await, own.tenant("two").await);
    let proxy = proxy_for(own, &[&a, &b], &[("servers.main.reserve", 12.into())]).await;
    // Now it is known: 5.
    assert_eq!(proxy.connect(&a).login().await.value("SELECT 1").await, "1");
    let some = proxy.settings().set(&key(&a, "floor"), 3);
    proxy.reload(&some.clone().set(&key(&b, "floor"), 3).text());
    let stale = async |wanted: f64| {
        let is_told = async || (proxy.metric("tenantry_settings_stale").await == wanted).then_some(());
        eventually(format!("tenantry_settings_stale {wanted}"), is_told).await;
    };
    stale(1.0).await;
    // The log is read by another thread than the metric.
    let sums = "its cap of 5 is less than the 6 of all floors";
    eventually(format!("{sums:?} in the log"), async || proxy.log().contains(sums).then_some(())).await;
    proxy.reload(&some.set(&key(&b, "floor"), 2).text());
    stale(0.0).await;
}

#[tokio::test]
async fn who_is_turned_away_is_told_by_which_limit_and_it_is_counted() {
    let tenant = cluster().tenant("limited").await;
    let (ceiling, clients) = (key(&tenant, "ceiling"), key(&tenant, "max_client_conn"));
    let settings = [(&*ceiling, 1.into()), (&*clients, 2.into()), ("pool.query_wait_timeout", "300ms".into())];
    let proxy = proxy_for(cluster(), &[&tenant], &settings).await;
    let mut busy = holder(&proxy, &tenant).await;
    let mut waits = proxy.connect(&tenant).login().await;
    let fault = proxy.connect(&tenant).try_login().await.err().expect("one too many").fatal("53300");
    let told = format!("{fault:?}");
    assert!(told.contains(&format!("proxy_code=TENANT_MAX_CLIENTS tenant={} clients=2/2", tenant.name)), "{told}");
    assert!(told.contains("raise the tenant's max_client_conn"), "{told}");
    waits.query("SELECT 1").await.error("53300");
    busy.run("COMMIT").await;
    let metrics = proxy.metrics().await;
    for line in [
        format!(
            "tenantry_limit_refusals_total{{tenant=\"{}\",role=\"{}\",limit=\"ceiling\"}} 1",
            tenant.name, tenant.role
        ),
        "tenantry_limit_refusals_total{tenant=\"\",role=\"\",limit=\"tenant_max_client_conn\"} 1".to_owned(),
    ] {
        assert!(metrics.lines().any(|told| told == line), "{line} is not in:\n{metrics}");
    }
    // Counted out again.
    waits.leave().await;
    eventually("there is room", async || proxy.connect(&tenant).try_login().await.ok()).await;
}

#[tokio::test]
async fn the_api_explains_also_who_is_not_held_up_and_databases_that_nobody_wrote_down() {
    control_role(cluster()).await;
    let (tenant, any) = (cluster().tenant("explained").await, cluster().tenant("any").await);
    let builder = ProxyBuilder::new(cluster()).tenant(&tenant).role("*", &any.role, Some(&any.password));
    let proxy = control_builder(builder.set("pool.pool_size", 1)).start().await;
    let api = Api::new(&proxy, "viewer").await;
    let explained = async |name: &str| api.get(&format!("/v1/explain/{name}")).await.body["roles"][0].clone();
    let mut busy = proxy.connect(&tenant).login().await;
    assert_eq!(busy.value("SELECT 1").await, "1");
    let why = explained(&tenant.name).await;
    assert_eq!(
        (&why["blocked"], &why["ahead"], &why["ceiling"]),
        (&json!("nothing"), &json!(0), &Value::Null),
        "{why}"
    );
    busy.run("BEGIN").await;
    let mut waiting = waiter(&proxy, &tenant, 1).await;
    let why = explained(&tenant.name).await;
    assert_eq!((&why["blocked"], &why["ahead"]), (&json!("pool_size"), &json!(1)), "{why}");
    busy.run("COMMIT").await;
    assert_eq!(waiting.until_ready().await.ok().value(), "1");
    assert_eq!(api.get(&format!("/v1/explain/{}", any.name)).await.status, 404, "nobody was there yet");
    assert_eq!(proxy.connect(&any).login().await.value("SELECT 1").await, "1");
    assert_eq!(explained(&any.name).await["blocked"], "nothing");
}

#[tokio::test]
async fn a_raised_ceiling_costs_no_client_an_error_while_the_fence_is_raised() {
    let fenced = cluster().tenant("raised").await;
    let ceiling = key(&fenced, "ceiling");
    let settings = [
        (ceiling.as_str(), 1.into()),
        ("servers.main.control.role", "postgres".into()),
        ("servers.main.control.connection_limits", true.into()),
    ];
    let proxy = proxy_for(cluster(), &[&fenced], &settings).await;
    connection_limit(&fenced, "1").await;
    let mut holders = vec![holder(&proxy, &fenced).await];
    for most in 2..6u32 {
        let mut next = waiter(&proxy, &fenced, 1).await;
        proxy.reload(&proxy.settings().set(&ceiling, most).text());
        assert_eq!(next.until_ready().await.ok().value(), "1");
        next.run("BEGIN").await;
        holders.push(next);
        connection_limit(&fenced, &most.to_string()).await;
    }
    is_fenced(&proxy, &fenced, 1).await;
}

async fn connection_limit(tenant: &Tenant, wanted: &str) {
    let sql = format!("SELECT datconnlimit FROM pg_database WHERE datname = '{}'", tenant.name);
    let limit = async || (cluster().sql(&sql).await.as_deref() == Some(wanted)).then_some(());
    eventually(format!("the limit of {} is {wanted}", tenant.name), limit).await;
}

async fn is_fenced(proxy: &Proxy, tenant: &Tenant, wanted: u8) {
    let line = format!("tenantry_tenant_fenced{{tenant=\"{}\",server=\"main\"}} {wanted}", tenant.name);
    let told = async || proxy.metrics().await.lines().any(|l| l == line).then_some(());
    eventually(line.clone(), told).await;
}

#[tokio::test]
async fn postgresql_itself_keeps_a_tenant_to_its_ceiling_where_that_is_wanted() {
    let (fenced, open) = (cluster().tenant("fenced").await, cluster().tenant("open").await);
    let ceiling = key(&fenced, "ceiling");
    let settings = [
        (ceiling.as_str(), 2.into()),
        ("servers.main.control.role", "postgres".into()),
        ("servers.main.control.connection_limits", true.into()),
    ];
    let proxy = proxy_for(cluster(), &[&fenced, &open], &settings).await;
    connection_limit(&fenced, "2").await;
    connection_limit(&open, "-1").await;
    is_fenced(&proxy, &fenced, 1).await;
    // Around Tenantry, too.
    let direct = [cluster().direct(&fenced).login().await, cluster().direct(&fenced).login().await];
    let answer = cluster().direct(&fenced).try_login().await.err().expect("refused");
    assert_eq!(answer.faults().pop().expect("refused").code, "53300");
    drop(direct);
    proxy.reload(&proxy.settings().set(&ceiling, 3).text());
    connection_limit(&fenced, "3").await;
    proxy.reload(&proxy.settings().set(&ceiling, "off").text());
    connection_limit(&fenced, "-1").await;
}

#[tokio::test]
async fn a_control_role_that_owns_nothing_is_told_of_and_stops_nobody() {
    let (fenced, other) = (cluster().tenant("fenced").await, cluster().tenant("other").await);
    let settings = [
        (&*key(&fenced, "ceiling"), 2.into()),
        ("servers.main.control.role", other.role.clone().into()),
        ("servers.main.control.password", other.password.clone().into()),
        ("servers.main.control.connection_limits", true.into()),
    ];
    let proxy = proxy_for(cluster(), &[&fenced], &settings).await;
    is_fenced(&proxy, &fenced, 0).await;
    assert!(proxy.log().contains("the control role must own the database"), "{}", proxy.log());
    assert!(!proxy.log().contains(&other.password));
    assert_eq!(proxy.connect(&fenced).login().await.value("SELECT 1").await, "1");
}
