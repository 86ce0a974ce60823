//! What the control plane's rooms share: the catalog, the last known state of it, and the way to the data plane.
//!
//! What always holds: what the data plane serves is the settings file with the known catalog laid over it, applied whole,
//! one change after the other; what is applied was read from the catalog, and is on disk.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tenantry_config::{Control, Server, Settings, floors_still_fit};
use time::OffsetDateTime;
use tokio::sync::{Mutex, Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    catalog::{
        Catalog, CatalogError, accept, disk,
        model::{Entry, Known, RoleRow},
    },
    fleet::{Everywhere, Fleet},
    fuse::Fuse,
    lifecycle::{StepError, copies::Copies},
    metrics::Followed,
    view::Plane,
};

/// Other processes' changes are looked for this often, and a sign of life is left.
const FOLLOW: Duration = Duration::from_millis(250);

/// The control plane of one process.
pub struct ControlPlane {
    pub catalog: Catalog,
    pub data: Arc<dyn Plane>,
    /// There may be a job to do.
    pub new_job: Notify,
    /// A job has ended.
    pub job_over: Notify,
    pub fuse: Fuse,
    pub fleet: Fleet,
    /// What copies of moves cost that follow, where this process runs the jobs.
    pub copies: Copies,
    file: ArcSwap<Settings>,
    /// What is served: for those who keep something in step with it.
    merged: watch::Sender<Arc<Settings>>,
    known: ArcSwap<Known>,
    state_dir: PathBuf,
    /// One reading of the catalog at a time; and what was told of what it could not take over.
    reading: Mutex<BTreeSet<String>>,
    /// One change of what is served at a time.
    serving: parking_lot::Mutex<()>,
    /// The control database answered last time.
    is_within_reach: AtomicBool,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ControlPlane")
    }
}

/// The catalog as it is, or as it was last known; and whether it is fresh. `None`: nobody knows it.
pub async fn first_known(catalog: &Catalog, state_dir: &std::path::Path) -> (Option<Known>, bool) {
    let mut may_begin = true;
    let kept = disk::load(state_dir).unwrap_or_else(|error| {
        tracing::error!(%error, "the last known catalog cannot be read");
        // But there was one.
        may_begin = false;
        None
    });
    may_begin &= kept.is_none();
    let fresh = async {
        catalog.migrate(may_begin).await?;
        let fresh = catalog.load().await?;
        kept.as_ref().map_or(Ok(()), |kept| accept(kept, &fresh))?;
        Ok::<_, CatalogError>(fresh)
    };
    match fresh.await {
        Ok(known) => {
            save(state_dir, &known);
            (Some(known), true)
        }
        Err(error) => {
            let what = if kept.is_some() { "the last known one" } else { "the settings file only" };
            tracing::error!(%error, "the catalog cannot be read; serving {what}");
            (kept, false)
        }
    }
}

fn save(state_dir: &std::path::Path, known: &Known) {
    if let Err(error) = disk::save(state_dir, known) {
        tracing::error!(%error, "the last known catalog cannot be kept; without the control database the next start would be without it");
    }
}

impl ControlPlane {
    /// `data` serves `file` with `known` laid over it already.
    pub fn new(
        catalog: Catalog,
        data: Arc<dyn Plane>,
        file: Settings,
        (known, is_fresh): (Option<Known>, bool),
        fuse: Fuse,
    ) -> Arc<Self> {
        Arc::new(Self {
            catalog,
            data,
            new_job: Notify::new(),
            job_over: Notify::new(),
            fuse,
            state_dir: file.admin.state_dir.clone(),
            merged: watch::Sender::new(Arc::new(known.as_ref().map_or_else(|| file.clone(), |k| k.merge(&file).0))),
            file: ArcSwap::from_pointee(file),
            known: ArcSwap::from_pointee(known.unwrap_or_default()),
            fleet: Fleet::default(),
            copies: Copies::default(),
            reading: Mutex::default(),
            serving: parking_lot::Mutex::default(),
            is_within_reach: AtomicBool::new(is_fresh),
        })
    }

    /// The settings file as it was last read.
    #[must_use]
    pub fn file(&self) -> Arc<Settings> {
        self.file.load_full()
    }

    /// What is served, from now on.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<Settings>> {
        self.merged.subscribe()
    }

    #[must_use]
    pub fn known(&self) -> Arc<Known> {
        self.known.load_full()
    }

    #[must_use]
    pub fn is_within_reach(&self) -> bool {
        self.is_within_reach.load(Relaxed)
    }

    /// The server that holds the catalog, and how we log in there.
    pub fn control_of<'a>(&self, settings: &'a Settings) -> Result<(&'a Server, &'a Control), StepError> {
        let name = settings.admin.catalog.as_deref().unwrap_or_default();
        self.server_of(settings, name)
    }

    /// A server and how we log in there.
    pub fn server_of<'a>(&self, settings: &'a Settings, name: &str) -> Result<(&'a Server, &'a Control), StepError> {
        let server = settings
            .servers
            .get(name)
            .ok_or_else(|| StepError::Refused(format!("no server named {name} in the settings")))?;
        let control = server.control.as_ref();
        let control = control
            .ok_or_else(|| StepError::Refused(format!("there is no [servers.{name}.control] in the settings")))?;
        Ok((server, control))
    }

    /// A new settings file: what it says holds at once. An error changes nothing, but one of a new control login, which is
    /// only found when the rest is served.
    pub fn reload(&self, file: Settings) -> Result<(), String> {
        let login = self.control_of(&file).ok().map(|(server, control)| (server.clone(), control.clone()));
        let was = self.file();
        let has_changed = self.control_of(&was).ok() != login.as_ref().map(|(server, control)| (server, control));
        self.serve(|_, known| (Arc::new(file), known))?;
        match login.filter(|_| has_changed) {
            Some((server, control)) => self.catalog.log_in_as(&server, &control).map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    /// Serves other settings or another catalog: the one place that changes what is served, one change after the other.
    fn serve(
        &self,
        change: impl FnOnce(Arc<Settings>, Arc<Known>) -> (Arc<Settings>, Arc<Known>),
    ) -> Result<Vec<String>, String> {
        let _one_at_a_time = self.serving.lock();
        let before = self.known();
        let (file, known) = change(self.file(), Arc::clone(&before));
        let (merged, problems) = known.merge(&file);
        if !Arc::ptr_eq(&file, &self.file()) {
            // Whoever writes the file is told; what is in the catalog was asked about when it was written there.
            let (now, wanted) = (self.file(), &merged);
            let place = |settings: &Settings, server: &str| {
                settings.servers.get(server).map(|server| (server.host.clone(), server.port))
            };
            // What another host has, nobody knows yet.
            let slots = |server: &str| {
                if place(&now, server) == place(wanted, server) { self.data.slots(server) } else { None }
            };
            floors_still_fit(&self.merged.borrow(), &merged, slots).map_err(|over| over.to_string())?;
        }
        self.data.apply(merged.clone())?;
        self.merged.send_replace(Arc::new(merged));
        self.file.store(file);
        self.known.store(Arc::clone(&known));
        self.fleet.applied(&before, &known, self.data.as_ref());
        Ok(problems)
    }

    /// For a scrape.
    pub(crate) fn followed(&self) -> Vec<Followed> {
        let seen = self.copies.all().into_iter();
        seen.filter_map(|seen| Some(Followed { tenant: seen.tenant, server: seen.server, bytes: seen.bytes? }))
            .collect()
    }

    /// A suspended tenant gives up the server connections that it has opened since.
    pub fn release(&self, tenant: &str) {
        self.data.release(tenant);
    }

    /// Reads the catalog and serves what it says. One that must not be believed changes nothing.
    pub async fn refresh(&self) -> Result<(), CatalogError> {
        let mut told = self.reading.lock().await;
        let read = self.catalog.load().await;
        let read = read.and_then(|known| accept(&self.known(), &known).map(|()| known));
        self.is_within_reach.store(read.is_ok(), Relaxed);
        let known = Arc::new(read?);
        // First on disk: what is served is served again after a crash.
        let (state_dir, copy) = (self.state_dir.clone(), Arc::clone(&known));
        let _ = tokio::task::spawn_blocking(move || save(&state_dir, &copy)).await;
        let problems = self.serve(|file, _| (file, known)).map_err(CatalogError::Garbage)?;
        for problem in problems {
            if told.insert(problem.clone()) {
                tracing::warn!("{problem}");
            }
        }
        Ok(())
    }

    /// What a tenant's clients do, in this process.
    #[must_use]
    pub fn here(&self, entry: &Entry) -> Everywhere {
        self.fleet.here(entry, self.data.as_ref())
    }

    /// What a tenant's clients do, in all processes that serve this revision.
    pub async fn everywhere(&self, entry: &Entry, revision: i64) -> Result<Everywhere, CatalogError> {
        self.fleet.everywhere(&self.catalog, entry, revision, self.data.as_ref()).await
    }

    /// Follows what other processes change and tells them of this one, until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut was_told = !self.is_within_reach();
        let mut looked_at = OffsetDateTime::UNIX_EPOCH;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(FOLLOW) => {}
            }
            let now = OffsetDateTime::now_utc();
            let is_served =
                !self.known().has_grace_until(looked_at, now) || self.serve(|file, known| (file, known)).is_ok();
            if is_served {
                looked_at = now;
            }
            let outcome = self.look().await;
            self.is_within_reach.store(outcome.is_ok(), Relaxed);
            match (&outcome, was_told) {
                (Err(error), false) => {
                    tracing::error!(%error, "the catalog is out of reach; what is known of it is served on")
                }
                (Ok(()), true) => tracing::info!("the catalog is within reach"),
                _ => {}
            }
            was_told = outcome.is_err();
        }
    }

    /// Tells the others that this process serves, from now on.
    pub async fn join(&self) {
        self.fleet.applied(&self.known(), &self.known(), self.data.as_ref());
        if self.is_within_reach()
            && let Err(error) = self.report().await
        {
            tracing::warn!(%error, "other Tenantry processes do not know of this one yet");
        }
    }

    async fn look(&self) -> Result<(), CatalogError> {
        if !self.is_within_reach() {
            self.catalog.migrate(self.known().catalog.is_empty()).await?;
        }
        if !self.is_within_reach() || self.catalog.revision().await? != self.known().revision {
            self.refresh().await?;
        }
        self.forget_former_passwords().await?;
        self.report().await
    }

    /// Whose time is over; whichever process comes first.
    async fn forget_former_passwords(&self) -> Result<(), CatalogError> {
        let now = OffsetDateTime::now_utc();
        let is_over = |row: &RoleRow| row.former.as_ref().is_some_and(|former| former.until <= now);
        let known = self.known();
        let late: Vec<i64> =
            known.tenants.iter().filter(|entry| entry.roles.iter().any(is_over)).map(|entry| entry.number).collect();
        for number in &late {
            let forget = |entry: &mut Entry| {
                entry.roles.iter_mut().filter(|row| is_over(row)).for_each(|row| row.former = None);
                Ok::<_, std::convert::Infallible>(())
            };
            self.catalog.change_tenant(*number, forget).await?;
        }
        if late.is_empty() { Ok(()) } else { self.refresh().await }
    }

    async fn report(&self) -> Result<(), CatalogError> {
        let settings = self.file();
        let login = self.control_of(&settings).map_err(|error| CatalogError::Away(error.to_string()))?;
        // In this order: what is told is of this revision or a later one.
        let revision = self.fleet.revision();
        self.fleet.report(login, revision, &self.known(), self.data.as_ref()).await
    }

    /// This process ends: nobody need wait for it.
    pub async fn leave(&self) {
        let _ = self.fleet.leave(&self.catalog).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::SocketAddr, sync::mpsc, thread};

    use tenantry_proxy::{
        directory::{Activity, ClientSnapshot, Snapshot},
        pool::explain::Explanation,
    };

    use super::*;
    use crate::view::View;

    /// Keeps what it was told to serve; waits before the first.
    struct Recorder {
        served: parking_lot::Mutex<Vec<Settings>>,
        gate: parking_lot::Mutex<mpsc::Receiver<()>>,
    }

    impl View for Recorder {
        fn is_ready(&self) -> bool {
            true
        }

        fn snapshot(&self) -> Snapshot {
            unimplemented()
        }

        fn refusals(&self) -> BTreeMap<String, u64> {
            BTreeMap::new()
        }
    }

    fn unimplemented() -> Snapshot {
        panic!("nobody asks for it here")
    }

    impl Plane for Recorder {
        fn apply(&self, settings: Settings) -> Result<(), String> {
            if self.served.lock().is_empty() {
                self.gate.lock().recv().map_err(|error| error.to_string())?;
            }
            self.served.lock().push(settings);
            Ok(())
        }

        fn activity(&self, _: &str, _: Option<i64>) -> Option<Activity> {
            None
        }

        fn clients(&self, _: &str, _: Option<i64>) -> Option<Vec<ClientSnapshot>> {
            None
        }

        fn cancel_running(&self, _: &str, _: Option<i64>) -> usize {
            0
        }

        fn end_sessions(&self, _: &str, _: Option<i64>, _: bool) -> usize {
            0
        }

        fn end_transactions(&self, _: &str, _: Option<i64>) -> usize {
            0
        }

        fn release(&self, _: &str) {}

        fn client_key(&self, _: &str, _: &str) -> Option<tenantry_wire::scram::ClientKey> {
            None
        }

        fn explain(&self, _: &str) -> Vec<(String, Explanation)> {
            Vec::new()
        }

        fn addresses(&self) -> Vec<SocketAddr> {
            Vec::new()
        }
    }

    fn known(revision: i64) -> Known {
        Known { catalog: "abc123".to_owned(), revision, ..Known::default() }
    }

    #[test]
    fn a_reload_and_a_new_catalog_at_once_are_both_served_in_the_end() {
        let (open, gate) = mpsc::sync_channel(1);
        let data = Arc::new(Recorder { served: parking_lot::Mutex::default(), gate: parking_lot::Mutex::new(gate) });
        let (server, control) = (
            Server::default(),
            tenantry_config::Control {
                role: "r".to_owned(),
                database: "d".to_owned(),
                secret: tenantry_config::RoleSecret::None,
                connection_limits: false,
            },
        );
        let catalog = Catalog::new(
            &Server {
                host: "127.0.0.1".to_owned(),
                tls: tenantry_config::ServerTls { mode: tenantry_config::ServerTlsMode::Disable, ..server.tls.clone() },
                ..server
            },
            &control,
        )
        .expect("a pool");
        let plane = ControlPlane::new(
            catalog,
            Arc::clone(&data) as Arc<dyn Plane>,
            Settings::default(),
            (Some(known(1)), true),
            Fuse::default(),
        );
        let reading = thread::spawn({
            let plane = Arc::clone(&plane);
            move || plane.serve(|file, _| (file, Arc::new(known(2))))
        });
        let reloading = thread::spawn({
            let plane = Arc::clone(&plane);
            let mut file = Settings::default();
            file.pool.pool_size = 7;
            move || plane.reload(file)
        });
        open.send(()).expect("somebody waits");
        reading.join().expect("no panic").expect("served");
        reloading.join().expect("no panic").expect("served");
        let last = data.served.lock().last().cloned().expect("served");
        assert_eq!((last.pool.pool_size, plane.known().revision, plane.file().pool.pool_size), (7, 2, 7));
    }
}
