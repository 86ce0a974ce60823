//! What Tenantry's end-to-end tests are made of.
//!
//! `postgres`: a private PostgreSQL per test process. `proxy`: the real binary with settings of the test's own. `client`
//! and `say`: the protocol in raw bytes. `relay`: a TCP link that breaks on command. `fake_server`: a PostgreSQL that
//! lies. `oracle`: the same bytes to PostgreSQL directly and through Tenantry. `load`: clients that must never get an error.
//!
//! What always holds: nothing is shared between test processes but two read-only caches (binaries, template data
//! directory); whatever a test started ends with its process, also when that is killed; no wait is without a deadline.

pub mod answer;
pub mod client;
pub mod control;
pub mod fake_server;
pub mod load;
pub mod oracle;
pub mod postgres;
pub mod proxy;
pub mod relay;
pub mod say;
pub mod supervisor;
pub mod tls;
pub mod wait;

pub use answer::{Answer, Fault, Message};
pub use client::{Client, Connect, Endpoint};
pub use control::{Api, Reply, control_builder, control_proxy};
pub use fake_server::{FakeConn, FakeServer};
pub use load::Load;
pub use oracle::Step;
pub use postgres::{Cluster, Tenant, cluster};
pub use proxy::{Proxy, ProxyBuilder};
pub use relay::{Mode, Relay};
pub use wait::{DEADLINE, eventually, within};

/// A tenant of the shared cluster behind a pool with one server connection, so that the next client gets what the last one left.
pub async fn one_server(hint: &str) -> (Tenant, Proxy) {
    let tenant = cluster().tenant(hint).await;
    let proxy = ProxyBuilder::new(cluster()).tenant(&tenant).set("pool.pool_size", 1).start().await;
    (tenant, proxy)
}
