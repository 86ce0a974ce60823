//! The kit itself: without these nothing else can be believed.

use tenantry_testkit::{
    Answer, Client, Endpoint, FakeServer, Mode, Relay, Step, cluster,
    fake_server::{columns, complete, ready, row},
    oracle, say,
};

#[tokio::test]
async fn a_tenant_logs_in_to_postgresql_directly_and_owns_its_database() {
    let tenant = cluster().tenant("kit").await;
    let mut client = cluster().direct(&tenant).login().await;
    assert_eq!(
        client.value("SELECT current_user || '@' || current_database()").await,
        format!("{}@{}", tenant.role, tenant.name)
    );
    client.run("CREATE TABLE t (n int)").await;
    assert_eq!(client.query("SELECT 1/0").await.error("22012").message, "division by zero");
    assert_eq!(cluster().settled(&tenant, 1).await[0].query, "SELECT 1/0");
}

#[tokio::test]
async fn a_wrong_password_is_refused_by_postgresql() {
    let tenant = cluster().tenant("kit").await;
    let refused = cluster().direct(&tenant).password("wrong").try_login().await;
    refused.err().expect("refused").fatal("28P01");
}

#[tokio::test]
async fn a_script_gives_the_same_trace_whole_and_bytewise() {
    let tenant = cluster().tenant("kit").await;
    let steps = oracle::ask([say::unnamed("SELECT $1::text, NULL", &[Some("x")]), say::sync()].concat());
    let whole = oracle::trace(&cluster().direct(&tenant), &steps).await;
    assert_eq!(whole, ["1", "2", "D x|NULL", "C SELECT 1", "Z I"]);
    assert_eq!(oracle::trace(&cluster().direct(&tenant), &oracle::bytewise(&steps)).await, whole);
}

#[tokio::test]
async fn a_relay_passes_stalls_and_resets() {
    let tenant = cluster().tenant("kit").await;
    let relay = Relay::start(cluster().address()).await;
    let mut connect = cluster().direct(&tenant);
    connect.endpoint = Endpoint::Tcp(relay.address());
    let mut client: Client = connect.login().await;
    assert_eq!(client.value("SELECT 1").await, "1");
    relay.mode(Mode::Stall);
    client.send(&say::query("SELECT 2")).await;
    assert!(client.next_within(std::time::Duration::from_millis(100)).await.is_none());
    relay.mode(Mode::Bytewise);
    assert_eq!(client.until_ready().await.value(), "2");
    relay.reset();
    let answer: Answer = client.until_end().await;
    assert!(answer.closed && answer.messages.is_empty());
    relay.reset_after(500);
    relay.mode(Mode::Pass);
    assert!(connect.try_login().await.is_err_and(|answer| answer.closed));
}

#[tokio::test]
async fn a_fake_server_plays_its_script() {
    let server = FakeServer::start(async |mut conn| {
        conn.login().await;
        let text = conn.query().await.unwrap_or_default();
        conn.send(&[columns(&["c"]), row(&[&text]), complete("SELECT 1"), ready(b'I')].concat()).await;
        conn.drain().await;
    })
    .await;
    let tenant = FakeServer::tenant();
    let mut client = tenantry_testkit::Connect::new(Endpoint::Tcp(server.address()), &tenant, "fake").login().await;
    assert_eq!(client.value("hello").await, "hello");
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn a_cluster_of_its_own_restarts_on_the_same_port() {
    let own = tenantry_testkit::Cluster::start().leaked();
    let tenant = own.tenant("kit").await;
    let mut client = own.direct(&tenant).login().await;
    own.shutdown("INT");
    client.until_end().await.fatal("57P01");
    own.start_again().await;
    assert_eq!(own.direct(&tenant).login().await.value("SELECT 1").await, "1");
}

#[tokio::test]
async fn half_close_still_gets_the_answer_from_postgresql() {
    let tenant = cluster().tenant("kit").await;
    let steps = [Step::Send(say::query("SELECT 1")), Step::HalfClose];
    assert_eq!(
        oracle::trace(&cluster().direct(&tenant), &steps).await,
        ["T ?column?:23:0", "D 1", "C SELECT 1", "Z I", "closed"]
    );
}
