//! `tenantry serve`: builds the rooms, waits for signals, drains.
//!
//! What always holds: settings that are wrong change nothing and are told once; every way out goes through the drain or
//! a second signal.

use std::{net::SocketAddr, sync::Arc};

use metrics_exporter_prometheus::PrometheusHandle;
use tenantry_admin::{
    Listener, Status,
    fence::{self, Fences},
};
use tenantry_config::{ClientTlsMode, Listen, Settings};
use tenantry_proxy::directory::Directory;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{cli, failure::Failure, log};

pub async fn run(args: cli::Serve, settings: Settings) -> Result<(), Failure> {
    let filter = log::start(&settings.log)?;
    let recorder = tenantry_admin::recorder().map_err(Failure::internal("cannot install the metrics"))?;
    // Before anything is started, so that no early signal is lost to the default action.
    let mut signals = Signals::new()?;
    let mut running = Running::start(settings, recorder).await?;
    while let Told::Reload = signals.next().await {
        running.reload(&args.source, &filter);
    }
    running.status.set_draining();
    tracing::info!(deadline = ?args.drain_timeout, "stopping: open transactions may finish");
    tokio::select! {
        () = running.directory.drain(args.drain_timeout) => tracing::info!("stopped"),
        () = signals.stop() => tracing::warn!("stopped at once by a second signal"),
    }
    Ok(())
}

/// The rooms of a serving process; the admin listener ends when this is dropped.
#[derive(Debug)]
pub struct Running {
    pub directory: Arc<Directory>,
    pub status: Arc<Status>,
    /// Where `/metrics` is, if it is.
    pub admin: Option<SocketAddr>,
    settings: watch::Sender<Arc<Settings>>,
    _stop_admin: DropGuard,
}

impl Running {
    pub async fn start(settings: Settings, recorder: PrometheusHandle) -> Result<Self, Failure> {
        // First the smaller one: a port that is taken is told before a client was accepted.
        let listener = match settings.admin.address {
            Some(address) => Some(
                Listener::bind(address)
                    .await
                    .map_err(Failure::unavailable(format_args!("cannot listen on {address} (admin.address)")))?,
            ),
            None => None,
        };
        let directory = Directory::start(settings.clone()).await?;
        let status = Arc::new(Status::default());
        let stop = CancellationToken::new();
        let admin = listener.as_ref().and_then(|listener| listener.address().ok());
        let fences = Arc::new(Fences::default());
        if let Some(listener) = listener {
            let (view, status, fences) = (Arc::clone(&directory), Arc::clone(&status), Arc::clone(&fences));
            tokio::spawn(tenantry_admin::serve(listener, view, status, fences, recorder, stop.clone()));
        }
        tracing::info!(clients = ?directory.addresses(), admin = ?admin, tenants = settings.tenants.len(), "serving");
        let (settings, latest) = watch::channel(Arc::new(settings));
        tokio::spawn(fence::keep(latest, fences, stop.clone()));
        Ok(Self { directory, status, admin, settings, _stop_admin: stop.drop_guard() })
    }

    /// The settings as they are now on disk; if they are wrong, the old ones stay.
    fn reload(&mut self, source: &cli::Source, filter: &log::Filter) {
        let applied = self.apply(source, filter);
        self.status.set_settings_stale(applied.is_err());
        match applied {
            Ok(()) => tracing::info!("settings reloaded"),
            Err(failure) => tracing::error!(problems = %failure, "settings not reloaded; the old ones stay"),
        }
    }

    fn apply(&mut self, source: &cli::Source, filter: &log::Filter) -> Result<(), Failure> {
        let fresh = source.load()?;
        log::check(&fresh.log)?;
        self.directory.reload(fresh.clone())?;
        filter.reload(&fresh.log)?;
        let old = Arc::clone(&self.settings.borrow());
        let (listen, was) = (&fresh.listen, &old.listen);
        let without = |listen: &Listen| listen.tls.mode == ClientTlsMode::Disable;
        let fixed = [
            ("listen.addresses", listen.addresses != was.addresses),
            ("listen.unix_socket_dir", listen.unix_socket_dir != was.unix_socket_dir),
            ("listen.unix_socket_mode", listen.unix_socket_mode != was.unix_socket_mode),
            ("listen.tls.mode", without(listen) != without(was)),
            ("process.workers", fresh.process != old.process),
            ("admin.address", fresh.admin != old.admin),
            ("log.format", fresh.log.format != old.log.format),
        ];
        for (key, _) in fixed.into_iter().filter(|(_, changed)| *changed) {
            tracing::warn!(key, "changed, but counts only from the next start");
        }
        self.settings.send_replace(Arc::new(fresh));
        Ok(())
    }
}

enum Told {
    Reload,
    Stop,
}

struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(Failure::internal("cannot listen to signals"));
        Ok(Self {
            hangup: listen(SignalKind::hangup())?,
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.hangup.recv() => Told::Reload,
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::Stop,
        }
    }

    /// The next wish to stop; while draining a reload has no meaning.
    async fn stop(&mut self) {
        while let Told::Reload = self.next().await {}
    }
}
