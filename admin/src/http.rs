//! The listener: at most so many connections, each with a deadline, none with a body that anybody reads.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, Semaphore},
};
use tokio_util::sync::CancellationToken;

use crate::{
    fence::Fences,
    routes::{self, App},
    view::{Status, View},
};

/// Prometheus, a load balancer and a person need three; a fleet of them not more than this.
const MAX_CONNECTIONS: usize = 64;
/// For the request's headers, from accept or from the last answer.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// For one connection, however busy; a scraper that keeps its connection alive reconnects without noticing.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10 * 60);
/// Bytes of the request's head (hyper's least is 8 KiB).
const MAX_HEAD_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// After a failed accept (no file descriptors left): long enough not to spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A bound listener, not yet serving.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        TcpListener::bind(address).await.map(Self)
    }

    /// # Errors
    /// The socket is gone.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Answers until `stop`; open connections are cut then, for a scrape can be repeated.
pub async fn serve(
    listener: Listener,
    view: Arc<dyn View>,
    status: Arc<Status>,
    fences: Arc<Fences>,
    recorder: PrometheusHandle,
    stop: CancellationToken,
) {
    let app = Arc::new(App { view, status, fences, recorder, scraping: Mutex::new(()) });
    let service = TowerToHyperService::new(routes::router(app));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.0.accept() => accepted,
        };
        let tcp = match accepted {
            Ok((tcp, _)) => tcp,
            Err(error) => {
                tracing::warn!(%error, "the admin listener could not accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        // No place: dropped, and the scraper sees a closed connection rather than a wait without end.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let (service, stop) = (service.clone(), stop.clone());
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                () = stop.cancelled() => {}
                () = answer(tcp, service) => {}
            }
        });
    }
}

async fn answer(tcp: TcpStream, service: TowerToHyperService<axum::Router>) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(tcp), service);
    // What goes wrong with one scraper's connection is the scraper's to see.
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_LIMIT, connection).await {
        tracing::debug!(%error, "a connection to the admin listener ended");
    }
}
