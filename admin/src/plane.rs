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
use tenantry_config::{Control, Server, Settings, TenantState};
use tokio::sync::{Mutex, Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    catalog::{Catalog, CatalogError, disk, model::Known},
    fuse::Fuse,
    lifecycle::StepError,
    view::Plane,
};

/// Other processes' changes are looked for this often.
const FOLLOW: Duration = Duration::from_secs(1);

/// The control plane of one process.
pub struct ControlPlane {
    pub catalog: Catalog,
    pub data: Arc<dyn Plane>,
    /// There may be a job to do.
    pub new_job: Notify,
    /// A job has ended.
    pub job_over: Notify,
    pub fuse: Fuse,
    file: ArcSwap<Settings>,
    /// What is served: for those who keep something in step with it.
    merged: watch::Sender<Arc<Settings>>,
    known: ArcSwap<Known>,
    state_dir: PathBuf,
    applying: Mutex<BTreeSet<String>>,
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
    let fresh = async {
        catalog.migrate().await?;
        catalog.load().await
    };
    match fresh.await {
        Ok(known) => {
            save(state_dir, &known);
            (Some(known), true)
        }
        Err(error) => {
            tracing::error!(%error, "the catalog cannot be read; serving the last known one");
            match disk::load(state_dir) {
                Ok(known) => (known, false),
                Err(error) => {
                    tracing::error!(%error, "the last known catalog cannot be read either; serving the settings file only");
                    (None, false)
                }
            }
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
            applying: Mutex::default(),
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

    /// A new settings file: what it says holds at once. An error changes nothing.
    pub fn reload(&self, file: Settings) -> Result<(), String> {
        let (merged, _) = self.known().merge(&file);
        self.data.apply(merged.clone())?;
        self.merged.send_replace(Arc::new(merged));
        self.file.store(Arc::new(file));
        Ok(())
    }

    /// A suspended tenant gives up the server connections that it has opened since.
    pub async fn release(&self, tenant: &str) -> Result<(), String> {
        let _one_change_at_a_time = self.applying.lock().await;
        if self.data.release(tenant) {
            return Ok(());
        }
        // Woken, and suspended again.
        let merged = self.merged.borrow().clone();
        let mut awake = Settings::clone(&merged);
        for (id, its) in &mut awake.tenants {
            if id.as_str() == tenant && its.standing.state == TenantState::Suspended {
                its.standing.state = TenantState::Active;
            }
        }
        self.data.apply(awake)?;
        self.data.apply(Settings::clone(&merged))
    }

    /// Reads the catalog and applies what it says.
    pub async fn refresh(&self) -> Result<(), CatalogError> {
        let mut told = self.applying.lock().await;
        let known = self.catalog.load().await;
        self.is_within_reach.store(known.is_ok(), Relaxed);
        let known = known?;
        if known.revision < self.known().revision && known.catalog == self.known().catalog {
            // Somebody restored an old copy of the control database. Routes of tenants that are there must not be lost to it.
            return Err(CatalogError::Garbage(format!(
                "its revision went back from {} to {}; remove catalog.json and restart if that was meant",
                self.known().revision,
                known.revision
            )));
        }
        let (merged, problems) = known.merge(&self.file());
        for problem in &problems {
            if told.insert(problem.clone()) {
                tracing::warn!("{problem}");
            }
        }
        let (state_dir, copy) = (self.state_dir.clone(), known.clone());
        let _ = tokio::task::spawn_blocking(move || save(&state_dir, &copy)).await;
        self.data.apply(merged.clone()).map_err(CatalogError::Garbage)?;
        self.merged.send_replace(Arc::new(merged));
        self.known.store(Arc::new(known));
        Ok(())
    }

    /// Follows what other processes change, until `stop`.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut is_known = self.is_within_reach();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(FOLLOW) => {}
            }
            let outcome = async {
                if !is_known {
                    self.catalog.migrate().await?;
                }
                if !is_known || self.catalog.revision().await? != self.known().revision {
                    self.refresh().await?;
                }
                Ok::<_, CatalogError>(())
            };
            let outcome = outcome.await;
            self.is_within_reach.store(outcome.is_ok(), Relaxed);
            match (&outcome, is_known) {
                (Err(error), true) => {
                    tracing::error!(%error, "the catalog is out of reach; what is known of it is served on")
                }
                (Ok(()), false) => tracing::info!("the catalog is within reach"),
                _ => {}
            }
            is_known = outcome.is_ok();
        }
    }
}
