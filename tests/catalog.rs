//! The control database lost, mixed up, put back or silent: no tenant loses its route, and nobody waits without end.

use serde_json::json;
use tenantry_testkit::{
    Relay, cluster,
    control::{control_behind, control_proxy},
    eventually,
    relay::Mode,
};

const LOST: &str = "the catalog is out of reach";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_catalog_that_was_dropped_costs_nobody_its_route() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("kept").await;
    let mut client = proxy.connect(&tenant).login().await;
    client.run("SELECT 1").await;
    let kept = std::fs::read(proxy.dir().join("catalog.json")).expect("the last known catalog");
    cluster().sql_in("tenantry_control", "DROP SCHEMA tenantry CASCADE").await;
    eventually("it is noticed", async || proxy.log().contains(LOST).then_some(())).await;

    assert_eq!(client.value("SELECT 2").await, "2");
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 3").await, "3");
    let made = "SELECT count(*) FROM pg_namespace WHERE nspname = 'tenantry'";
    assert_eq!(cluster().sql_in("tenantry_control", made).await.as_deref(), Some("0"), "no new one is made");
    proxy.restart(&[]).await;
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 4").await, "4", "from disk");
    assert_eq!(api.get("/v1/tenants/kept").await.status, 200);
    assert!(api.post("/v1/tenants", json!({ "name": "late" })).await.status >= 500);
    assert_eq!(std::fs::read(proxy.dir().join("catalog.json")).expect("still there"), kept);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_copy_of_the_catalog_is_not_served() {
    let (proxy, api) = control_proxy().await;
    let tenant = api.create("kept").await;
    proxy.connect(&tenant).login().await.run("SELECT 1").await;
    // As from a backup that was made before.
    let older = "TRUNCATE tenantry.tenants CASCADE; UPDATE tenantry.meta SET revision = 0";
    cluster().sql_in("tenantry_control", older).await;
    eventually("it is noticed", async || proxy.log().contains(LOST).then_some(())).await;
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 2").await, "2");
    proxy.restart(&[]).await;
    assert_eq!(proxy.connect(&tenant).login().await.value("SELECT 3").await, "3");
    // That was meant: the operator says so.
    std::fs::remove_file(proxy.dir().join("catalog.json")).expect("removed");
    proxy.restart(&[]).await;
    eventually("it is taken", async || (api.get("/v1/tenants/kept").await.status == 404).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_database_that_keeps_silent_is_told_as_503_and_the_data_plane_goes_on() {
    let relay = Relay::start(cluster().address()).await;
    let (proxy, api) = control_behind(&relay).await;
    let made = api.post("/v1/tenants", json!({ "name": "alive", "server": "data" })).await;
    let tenant = tenantry_testkit::control::tenant_of(&made.body);
    let mut client = proxy.connect(&tenant).login().await;
    relay.mode(Mode::Blackhole);
    let refused = api.post("/v1/tenants", json!({ "name": "late", "server": "data" })).await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(client.value("SELECT 1").await, "1");
    relay.mode(Mode::Pass);
    relay.reset();
    eventually("the API writes again", async || {
        let reply = api.post("/v1/tenants", json!({ "name": "late", "server": "data" })).await;
        matches!(reply.status, 201 | 409).then_some(())
    })
    .await;
}
