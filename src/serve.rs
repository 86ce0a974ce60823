//! `tenantry serve`: builds the rooms, waits for signals, drains.
//!
//! What always holds: settings that are wrong change nothing and are told once; every way out goes through the drain or
//! a second signal.

use std::{net::SocketAddr, sync::Arc};

use metrics_exporter_prometheus::PrometheusHandle;
use tenantry_admin::{
    Listener, Parts, Plane, Status, View,
    catalog::{Catalog, disk, model::Known},
    fence::{self, Fences},
    fuse::Fuse,
    jobs::runner,
    plane::{self, ControlPlane},
};
use tenantry_config::{ClientTlsMode, Control, Listen, Server, Settings, floors_fit, floors_still_fit};
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
    let mut running = Running::start(settings, recorder, fuse(&args)).await?;
    running.status.count_dropped_lines(filter.dropped());
    while let Told::Reload = signals.next().await {
        running.reload(&args.source, &filter);
    }
    running.status.set_draining();
    tracing::info!(deadline = ?args.drain_timeout, "stopping: open transactions may finish");
    tokio::select! {
        () = running.directory.drain(args.drain_timeout) => tracing::info!("stopped"),
        () = signals.stop() => tracing::warn!("stopped at once by a second signal"),
    }
    if let Some(plane) = &running.plane {
        plane.leave().await;
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
    /// The control plane, where there is a catalog.
    pub plane: Option<Arc<ControlPlane>>,
    settings: watch::Sender<Arc<Settings>>,
    _stop_admin: DropGuard,
}

impl Running {
    pub async fn start(settings: Settings, recorder: PrometheusHandle, fuse: Fuse) -> Result<Self, Failure> {
        // First the smaller one: a port that is taken is told before a client was accepted.
        let listener = match settings.admin.address {
            Some(address) => Some(
                Listener::bind(address)
                    .await
                    .map_err(Failure::unavailable(format_args!("cannot listen on {address} (admin.address)")))?,
            ),
            None => None,
        };
        let tls = tenantry_admin::tls(&settings.admin).map_err(Failure::Usage)?;
        let mut served = settings.clone();
        let mut start = None;
        if let Some((server, control)) = catalog_login(&settings) {
            let catalog = Catalog::new(server, control).map_err(Failure::unavailable("the catalog (admin.catalog)"))?;
            let known = plane::first_known(&catalog, &settings.admin.state_dir).await;
            if let Some(known) = &known.0 {
                let (merged, told) = known.merge(&settings);
                told.iter().for_each(|problem| tracing::warn!("{problem}"));
                served = merged;
            }
            refuse_open_door(&settings, known.0.as_ref())?;
            start = Some((catalog, known));
        }
        // What is too much is scaled down rather than kept from serving: whoever has to mend it needs a database, too.
        if let Err(over) = floors_fit(&served, |_| None) {
            tracing::warn!("{over}; until then each is scaled down in proportion");
        }
        let directory = Directory::start(served.clone()).await?;
        let plane = start.map(|(catalog, known)| {
            ControlPlane::new(catalog, Arc::clone(&directory) as Arc<dyn Plane>, settings.clone(), known, fuse)
        });
        if let Some(plane) = &plane {
            plane.join().await;
        }
        let status = Arc::new(Status::default());
        let stop = CancellationToken::new();
        let admin = listener.as_ref().and_then(|listener| listener.address().ok());
        let fences = Arc::new(Fences::default());
        if let Some(listener) = listener {
            let view = Arc::clone(&directory) as Arc<dyn View>;
            let (status, fences, plane) = (Arc::clone(&status), Arc::clone(&fences), plane.clone());
            let parts = Parts { view, status, fences, recorder, plane, tls };
            tokio::spawn(tenantry_admin::serve(listener, parts, stop.clone()));
        }
        tracing::info!(clients = ?directory.addresses(), admin = ?admin, tenants = served.tenants.len(), "serving");
        let (settings, mut latest) = watch::channel(Arc::new(settings));
        if let Some(plane) = &plane {
            latest = plane.watch();
            tokio::spawn(Arc::clone(plane).follow(stop.clone()));
            tokio::spawn(runner::run(Arc::clone(plane), stop.clone()));
        }
        tokio::spawn(fence::keep(latest, fences, stop.clone()));
        Ok(Self { directory, status, admin, plane, settings, _stop_admin: stop.drop_guard() })
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
        match &self.plane {
            Some(plane) => plane.reload(fresh.clone()).map_err(Failure::Usage)?,
            None => {
                let slots = |server: &str| self.directory.slots(server);
                floors_still_fit(&self.settings.borrow(), &fresh, slots)
                    .map_err(|over| Failure::Usage(over.to_string()))?;
                self.directory.reload(fresh.clone())?;
            }
        }
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
            ("admin.address", fresh.admin.address != old.admin.address),
            ("admin.catalog", fresh.admin.catalog != old.admin.catalog),
            ("admin.state_dir", fresh.admin.state_dir != old.admin.state_dir),
            ("admin.cert_file", fresh.admin.cert_file != old.admin.cert_file),
            ("admin.client_ca_file", fresh.admin.client_ca_file != old.admin.client_ca_file),
            ("log.format", fresh.log.format != old.log.format),
        ];
        for (key, _) in fixed.into_iter().filter(|(_, changed)| *changed) {
            tracing::warn!(key, "changed, but counts only from the next start");
        }
        self.settings.send_replace(Arc::new(fresh));
        Ok(())
    }
}

#[cfg(debug_assertions)]
fn fuse(args: &cli::Serve) -> Fuse {
    Fuse::of(args.die_at, args.die_in.clone())
}

#[cfg(not(debug_assertions))]
fn fuse(_: &cli::Serve) -> Fuse {
    Fuse::default()
}

/// Where the catalog is, and how we log in there.
pub fn catalog_login(settings: &Settings) -> Option<(&Server, &Control)> {
    let server = settings.servers.get(settings.admin.catalog.as_ref()?)?;
    Some((server, server.control.as_ref()?))
}

/// A catalog may be made where none was ever known: else the control database has lost it.
pub fn may_begin(settings: &Settings) -> bool {
    matches!(disk::load(&settings.admin.state_dir), Ok(None))
}

/// An API that others can reach must have somebody who may use it: else whoever comes first would be told so for ever.
fn refuse_open_door(settings: &Settings, known: Option<&Known>) -> Result<(), Failure> {
    let beyond = settings.admin.address.filter(|address| !address.ip().is_loopback());
    // Nobody knows: then nobody is let in either.
    let has_token = known.is_none_or(|known| !known.tokens.is_empty());
    match beyond {
        Some(address) if !has_token && settings.admin.client_ca_file.is_none() => Err(Failure::Usage(format!(
            "admin.address: {address} is open beyond this machine, and the API has no credentials; make a token first \
             (`tenantry token create --access admin --label NAME`), set admin.client_ca_file, or listen on 127.0.0.1"
        ))),
        _ => Ok(()),
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
