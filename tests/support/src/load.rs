//! Clients that ask all the time and must never get an error.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use tokio::task::JoinHandle;

use crate::{
    client::Connect,
    postgres::{Tenant, cluster},
    wait::eventually,
};

const CLIENTS: usize = 4;

/// A few clients under way.
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// They log in, and ask from now on.
    pub async fn start(connect: &Connect) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            let (mut client, stop) = (connect.login().await, Arc::clone(&stop));
            clients.push(tokio::spawn(async move {
                while !stop.load(Relaxed) {
                    assert_eq!(client.value("SELECT 1").await, "1");
                }
            }));
        }
        Self { stop, clients }
    }

    /// Waits until PostgreSQL has none of the connections any more that it has now, and others instead.
    pub async fn outlives_its_connections(&self, tenant: &Tenant) {
        let pids = async || cluster().sessions(tenant).await.into_iter().map(|s| s.pid).collect::<Vec<_>>();
        let before = pids().await;
        eventually("its connections are replaced", async || {
            assert!(self.clients.iter().all(|client| !client.is_finished()), "a client got an error");
            let now = pids().await;
            (!now.is_empty() && now.iter().all(|pid| !before.contains(pid))).then_some(())
        })
        .await;
    }

    /// Ends; panics if one of them got an error.
    pub async fn stop(self) {
        self.stop.store(true, Relaxed);
        for client in self.clients {
            client.await.expect("no error");
        }
    }
}
