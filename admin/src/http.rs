//! The listener: at most so many connections, each with a deadline.
//!
//! What always holds: whoever keeps all places, with streams or with silence, keeps nobody from `/healthz` and `/metrics`.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use metrics_exporter_prometheus::PrometheusHandle;
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tenantry_config::Admin;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::{
    api::{self, auth::Peer},
    fence::Fences,
    plane::ControlPlane,
    routes::{self, App},
    view::{Status, View},
};

/// Prometheus, a load balancer and a person need three; a fleet of them not more than this.
const MAX_CONNECTIONS: usize = 64;
/// Beyond those: for one look at health or metrics each, so that a fleet that follows jobs kills no healthy process.
const SPARE_CONNECTIONS: usize = 16;
const SPARE_HEADER_LIMIT: Duration = Duration::from_secs(1);
/// An answer in a spare place, from accept to its last byte; a scrape gets 5 s.
const SPARE_LIMIT: Duration = Duration::from_secs(8);
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

/// What is answered with.
pub struct Parts {
    pub view: Arc<dyn View>,
    pub status: Arc<Status>,
    pub fences: Arc<Fences>,
    pub recorder: PrometheusHandle,
    /// With it there is `/v1`.
    pub plane: Option<Arc<ControlPlane>>,
    /// With it, only HTTPS.
    pub tls: Option<TlsAcceptor>,
}

/// Certificate, key and, for mTLS, whose client certificates are good.
pub fn tls(admin: &Admin) -> Result<Option<TlsAcceptor>, String> {
    let (Some(cert), Some(key)) = (&admin.cert_file, &admin.key_file) else { return Ok(None) };
    let wrong = |key: &str, error: String| format!("admin.{key}: {error}");
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|error| wrong("cert_file", error.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong("key_file", error.to_string()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder =
        builder.with_safe_default_protocol_versions().map_err(|error| wrong("cert_file", error.to_string()))?;
    let builder = match &admin.client_ca_file {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let bad = |error: String| wrong("client_ca_file", error);
            let mut roots = rustls::RootCertStore::empty();
            for root in CertificateDer::pem_file_iter(file).map_err(|error| bad(error.to_string()))? {
                let added =
                    root.map_err(|error| error.to_string()).and_then(|root| roots.add(root).map_err(|e| e.to_string()));
                added.map_err(bad)?;
            }
            let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(clients.map_err(|error| bad(error.to_string()))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| wrong("cert_file", error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// A file comes in over this connection, which may take longer than a connection may live.
#[derive(Debug, Clone, Default)]
pub(crate) struct Busy(Arc<AtomicBool>);

impl Busy {
    /// Until the guard goes.
    pub(crate) fn begin(&self) -> impl Drop + Send + use<> {
        struct Guard(Arc<AtomicBool>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.store(false, Relaxed);
            }
        }
        self.0.store(true, Relaxed);
        Guard(Arc::clone(&self.0))
    }
}

/// What a connection may do, and for how long.
#[derive(Debug, Clone, Copy)]
struct Terms {
    header: Duration,
    whole: Duration,
    keep_alive: bool,
}

const ORDINARY: Terms = Terms { header: HEADER_LIMIT, whole: CONNECTION_LIMIT, keep_alive: true };
const SPARE: Terms = Terms { header: SPARE_HEADER_LIMIT, whole: SPARE_LIMIT, keep_alive: false };

/// The places there are, and what is answered in each.
struct Places {
    ordinary: (Arc<Semaphore>, Router),
    spare: (Arc<Semaphore>, Router),
}

impl Places {
    fn new(app: Arc<App>, plane: Option<Arc<ControlPlane>>) -> Self {
        let health = routes::router(Arc::clone(&app));
        let all = match plane {
            Some(plane) => health.merge(api::router(plane)),
            None => health,
        };
        Self {
            ordinary: (Arc::new(Semaphore::new(MAX_CONNECTIONS)), all),
            spare: (Arc::new(Semaphore::new(SPARE_CONNECTIONS)), routes::spare(app)),
        }
    }

    /// `None`: dropped, and the caller sees a closed connection rather than a wait without end.
    fn take(&self) -> Option<(OwnedSemaphorePermit, Router, Terms)> {
        let free = |(places, router): &(Arc<Semaphore>, Router)| {
            Some((Arc::clone(places).try_acquire_owned().ok()?, router.clone()))
        };
        let with = |terms| move |(place, router)| (place, router, terms);
        free(&self.ordinary).map(with(ORDINARY)).or_else(|| free(&self.spare).map(with(SPARE)))
    }
}

/// Answers until `stop`; open connections are cut then, for a scrape can be repeated.
pub async fn serve(listener: Listener, parts: Parts, stop: CancellationToken) {
    let Parts { view, status, fences, recorder, plane, tls } = parts;
    let app = Arc::new(App { view, status, fences, recorder, plane: plane.clone(), scraping: Mutex::new(()) });
    let places = Places::new(app, plane);
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.0.accept() => accepted,
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "the admin listener could not accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Some((place, router, terms)) = places.take() else { continue };
        let busy = Busy::default();
        let router = router.layer(Extension(Peer(Some(peer.ip())))).layer(Extension(busy.clone()));
        let (service, stop, tls) = (TowerToHyperService::new(router), stop.clone(), tls.clone());
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                () = stop.cancelled() => {}
                () = serve_one(tcp, tls, service, (terms, busy)) => {}
            }
        });
    }
}

async fn serve_one(
    tcp: TcpStream,
    tls: Option<TlsAcceptor>,
    service: TowerToHyperService<Router>,
    (terms, busy): (Terms, Busy),
) {
    let Some(tls) = tls else { return answer(tcp, service, terms, &busy).await };
    match tokio::time::timeout(terms.header, tls.accept(tcp)).await {
        Ok(Ok(stream)) => answer(stream, service, terms, &busy).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake of the admin listener failed"),
        Err(_) => {}
    }
}

async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    service: TowerToHyperService<Router>,
    terms: Terms,
    busy: &Busy,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(terms.header)
        .keep_alive(terms.keep_alive)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    // What goes wrong with one scraper's connection is the scraper's to see.
    let mut connection = std::pin::pin!(connection);
    loop {
        match tokio::time::timeout(terms.whole, &mut connection).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => return tracing::debug!(%error, "a connection to the admin listener ended"),
            // An upload has limits of its own.
            Err(_) if busy.0.load(Relaxed) => {}
            Err(_) => return,
        }
    }
}
