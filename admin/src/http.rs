//! The listener: at most so many connections, each with a deadline.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

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
    sync::{Mutex, Semaphore},
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

/// Answers until `stop`; open connections are cut then, for a scrape can be repeated.
pub async fn serve(listener: Listener, parts: Parts, stop: CancellationToken) {
    let Parts { view, status, fences, recorder, plane, tls } = parts;
    let app = Arc::new(App { view, status, fences, recorder, scraping: Mutex::new(()) });
    let mut router = routes::router(app);
    if let Some(plane) = plane {
        router = router.merge(api::router(plane));
    }
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
        // No place: dropped, and the scraper sees a closed connection rather than a wait without end.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let router = router.clone().layer(Extension(Peer(Some(peer.ip()))));
        let (service, stop, tls) = (TowerToHyperService::new(router), stop.clone(), tls.clone());
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                () = stop.cancelled() => {}
                () = serve_one(tcp, tls, service) => {}
            }
        });
    }
}

async fn serve_one(tcp: TcpStream, tls: Option<TlsAcceptor>, service: TowerToHyperService<Router>) {
    let Some(tls) = tls else { return answer(tcp, service).await };
    match tokio::time::timeout(HEADER_LIMIT, tls.accept(tcp)).await {
        Ok(Ok(stream)) => answer(stream, service).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake of the admin listener failed"),
        Err(_) => {}
    }
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, service: TowerToHyperService<Router>) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    // What goes wrong with one scraper's connection is the scraper's to see.
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_LIMIT, connection).await {
        tracing::debug!(%error, "a connection to the admin listener ended");
    }
}
