//! PostgreSQL is right: the same bytes, to it directly and through Tenantry, must give the same messages.

use crate::{
    client::{Client, Connect},
    postgres::{Cluster, Tenant},
    proxy::Proxy,
};

/// What a script does.
#[derive(Debug, Clone)]
pub enum Step {
    Send(Vec<u8>),
    /// Each byte on its own.
    Bytewise(Vec<u8>),
    /// Reads up to so many ReadyForQuery.
    Ready(usize),
    /// Reads up to the first message with this tag.
    Until(u8),
    /// Says no more, and reads to the end.
    HalfClose,
    /// Reads to the end.
    End,
}

/// Sends and reads up to one ReadyForQuery.
pub fn ask(bytes: impl Into<Vec<u8>>) -> Vec<Step> {
    vec![Step::Send(bytes.into()), Step::Ready(1)]
}

/// The same script with each byte on its own.
pub fn bytewise(steps: &[Step]) -> Vec<Step> {
    let split = |step: &Step| match step {
        Step::Send(bytes) => Step::Bytewise(bytes.clone()),
        other => other.clone(),
    };
    steps.iter().map(split).collect()
}

/// Runs a script as it is, from a login on.
pub async fn trace(connect: &Connect, steps: &[Step]) -> Vec<String> {
    let mut client = connect.login().await;
    run(&mut client, steps).await
}

/// Runs a script on a session.
pub async fn run(client: &mut Client, steps: &[Step]) -> Vec<String> {
    let mut lines = Vec::new();
    for step in steps {
        match step {
            Step::Send(bytes) => client.send(bytes).await,
            Step::Bytewise(bytes) => client.send_bytewise(bytes).await,
            Step::Ready(count) => {
                for _ in 0..*count {
                    lines.extend(client.until_ready().await.trace());
                }
            }
            Step::Until(tag) => lines.extend(client.until(*tag).await.trace()),
            Step::HalfClose => {
                client.half_close().await;
                lines.extend(client.until_end().await.trace());
            }
            Step::End => lines.extend(client.until_end().await.trace()),
        }
    }
    lines
}

/// Fails unless both give the same trace, which it returns; then the session's server connection must still be usable by another client.
#[track_caller]
pub fn same<'a>(
    cluster: &'a Cluster,
    proxy: &'a Proxy,
    tenant: &'a Tenant,
    steps: &'a [Step],
) -> impl Future<Output = Vec<String>> + 'a {
    let place = std::panic::Location::caller();
    async move {
        let direct = trace(&cluster.direct(tenant), steps).await;
        let pooled = trace(&proxy.connect(tenant), steps).await;
        assert!(
            direct == pooled,
            "{place}: through Tenantry it differs from PostgreSQL\n--- PostgreSQL\n{}\n--- Tenantry\n{}\n",
            direct.join("\n"),
            pooled.join("\n")
        );
        let mut next = proxy.connect(tenant).login().await;
        assert_eq!(next.value("SELECT 'next'").await, "next", "{place}: the next client");
        direct
    }
}
