//! Several Tenantry processes on one catalog: what one does, the clients of all see alike.

use serde_json::json;
use tenantry_testkit::{
    Api, Client, Proxy, ProxyBuilder, Tenant, cluster,
    control::{control_builder, control_proxy},
    eventually,
};

/// A second process with the catalog of the first, once it knows its tenants.
async fn another(tenant: &str, api: &Api) -> Proxy {
    let proxy = control_builder(ProxyBuilder::new(cluster())).start().await;
    let there = api.at(&proxy);
    let path = format!("/v1/tenants/{tenant}");
    eventually("it knows the tenant", async || (there.get(&path).await.status == 200).then_some(())).await;
    proxy
}

async fn client(proxy: &Proxy, tenant: &Tenant) -> Client {
    let mut client = proxy.connect(tenant).login().await;
    client.run("SELECT 1").await;
    client
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rename_waits_for_the_transactions_of_every_process() {
    let (first, api) = control_proxy().await;
    let tenant = api.create("before").await;
    let second = another("before", &api).await;
    let (mut here, mut there) = (client(&first, &tenant).await, client(&second, &tenant).await);
    here.run("CREATE TABLE t (n int)").await;
    there.run("BEGIN").await;
    there.run("INSERT INTO t VALUES (1)").await;
    let renaming = tokio::spawn({
        let api = api.clone();
        async move { api.post("/v1/tenants/before/rename", json!({ "to": "after" })).await }
    });
    eventually("clients are held", async || (api.get("/v1/tenants/before").await.body["held"] == true).then_some(()))
        .await;
    there.run("INSERT INTO t VALUES (2)").await;
    there.run("COMMIT").await;
    let renamed = renaming.await.expect("no panic");
    assert_eq!(renamed.status, 200, "{}", renamed.body);
    for client in [&mut here, &mut there] {
        assert_eq!(client.value("SELECT current_database()").await, "after");
        assert_eq!(client.value("SELECT count(*) FROM t").await, "2");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_transactions_of_every_process_and_counts_them() {
    let (first, api) = control_proxy().await;
    let tenant = api.create("drained").await;
    let second = another("drained", &api).await;
    let (_here, mut there) = (client(&first, &tenant).await, client(&second, &tenant).await);
    there.run("CREATE TABLE t (n int)").await;
    there.run("BEGIN").await;
    there.run("INSERT INTO t VALUES (1)").await;
    let drained = api.post("/v1/tenants/drained/drain", json!({ "deadline_ms": 1 })).await;
    assert_eq!(drained.status, 200, "{}", drained.body);
    let told = &drained.body["job"]["result"]["drain"];
    assert_eq!((&told["under_way"], &told["cut"]), (&json!(1), &json!(1)), "{told}");
    let end = there.until_end().await;
    assert_eq!(end.faults().first().map(|fault| fault.code.clone()).as_deref(), Some("57P01"));
    assert!(cluster().sessions(&tenant).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_was_killed_holds_up_nobody() {
    let (_first, api) = control_proxy().await;
    let tenant = api.create("before").await;
    let second = another("before", &api).await;
    let _client = client(&second, &tenant).await;
    drop(second);
    let renamed = api.post("/v1/tenants/before/rename", json!({ "to": "after", "wait_ms": 3_000 })).await;
    assert_eq!(renamed.status, 200, "{}", renamed.body);
}
