//! `tenantry demo`: a PostgreSQL with three tenants, Tenantry in front of it, and nothing left at the end.
//!
//! What always holds: everything lies in one directory, made here and removed here (unless `--keep`); PostgreSQL is ended
//! by its own process id, whatever happened before; passwords are random, and printed because they are the demo's.

mod guide;
mod place;
mod postgres;
mod sql;
mod verify;

use std::{net::TcpListener, time::Duration};

use rand::{Rng, distr::Alphanumeric};
use serde_json::json;
use tenantry_admin::{
    api::{tokens, types::NewToken},
    catalog::model::Access,
};
use tenantry_config::Overrides;
use tokio::signal::unix::{SignalKind, signal};

use self::{place::Place, postgres::Cluster};
use crate::{cli, client::Client, commands, failure::Failure, log, output, serve::Running};

/// The forks of the demo: each is a database and a role of its own.
const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];
const PASSWORD_CHARACTERS: usize = 24;
/// `--check` leaves no transaction open, and whoever presses Ctrl-C wants the prompt back.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
const CLIENT_PORT: u16 = 6432;
const ADMIN_PORT: u16 = 9930;

/// One fork, as it is told to people and programs.
#[derive(Debug, Clone)]
pub struct Fork {
    /// Tenant, database and role.
    pub name: String,
    pub password: String,
}

pub async fn run(args: cli::Demo) -> Result<(), Failure> {
    // Before anything is started: from here on Ctrl-C ends the demo in order.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::internal("cannot listen to signals"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::internal("cannot listen to signals"))?;
    let place = Place::make(args.keep.clone())?;
    let cluster = tokio::select! {
        cluster = Cluster::start(&place, args.postgres_bin.as_deref()) => cluster?,
        _ = interrupt.recv() => return Ok(()),
        _ = terminate.recv() => return Ok(()),
    };
    let stopped = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let done = with_cluster(&args, &place, &cluster, stopped).await;
    cluster.stop().await;
    place.remove();
    done
}

async fn with_cluster(
    args: &cli::Demo,
    place: &Place,
    cluster: &Cluster,
    stopped: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let control = sql::control_role(cluster).await.map_err(Failure::internal("cannot make the control role"))?;
    let file = place.write("tenantry.toml", &settings(args, place, cluster, &control)?)?;
    let settings = tenantry_config::load(Some(&file), &cli::flags(Overrides::default(), &args.set))?;
    let _log = log::start(&settings.log)?;
    let recorder = tenantry_admin::recorder().map_err(Failure::internal("cannot install the metrics"))?;
    let running = Running::start(settings, recorder, Default::default()).await?;
    let address = running
        .directory
        .addresses()
        .first()
        .copied()
        .ok_or_else(|| Failure::Internal("Tenantry listens nowhere".to_owned()))?;
    let forks = create(&running, place, cluster).await?;
    let certificate = place.certificate();
    let done = if args.check {
        tokio::select! {
            done = verify::all(address, &certificate, &forks) => done,
            () = stopped => Err(Failure::Unavailable("interrupted".to_owned())),
        }
    } else {
        let told = output::line(&guide::text(cluster, address, running.admin, place, &forks));
        if told.is_ok() {
            stopped.await;
        }
        told
    };
    running.directory.drain(DRAIN_LIMIT).await;
    done
}

/// Makes the tenants as anybody would: with a token, one call of the API for each. Leaves the token and each tenant's
/// DATABASE_* variables in files.
async fn create(running: &Running, place: &Place, cluster: &Cluster) -> Result<Vec<Fork>, Failure> {
    let (Some(plane), Some(admin)) = (&running.plane, running.admin) else {
        return Err(Failure::Internal("the demo has no API".to_owned()));
    };
    let wish = NewToken { label: "demo".to_owned(), access: Access::Admin, days: 1 };
    let made = tokens::make(&plane.catalog, "tenantry demo", &wish).await;
    let token = made.map_err(Failure::internal("cannot make a token"))?.token;
    plane.refresh().await.map_err(Failure::internal("cannot read the catalog"))?;
    place.write("token", &token)?;
    let api = cli::Api {
        url: format!("http://{admin}"),
        token: Some(token),
        token_file: None,
        ca_file: None,
        cert_file: None,
        key_file: None,
        json: false,
    };
    let client = Client::new(&api)?;
    let mut forks = Vec::new();
    for name in NAMES {
        let made = client.post("/v1/tenants", &json!({ "name": name, "spec": { "floor": 2 } })).await?;
        place.write(&format!("{name}.env"), &commands::variables(&made["credentials"], cli::EnvFormat::Env))?;
        let password = made["credentials"]["password"].as_str().unwrap_or_default().to_owned();
        let fork = Fork { name: name.to_owned(), password };
        sql::fill(cluster, &fork).await.map_err(Failure::internal("cannot fill a tenant"))?;
        forks.push(fork);
    }
    Ok(forks)
}

/// The demo's `tenantry.toml`: what somebody would write by hand.
fn settings(args: &cli::Demo, place: &Place, cluster: &Cluster, control: &str) -> Result<String, Failure> {
    let port = match args.port {
        // Any; which one must be known here, since it is written down.
        Some(0) => free_port(0)?,
        Some(port) => port,
        None if args.check => free_port(0)?,
        None => free_port(CLIENT_PORT)?,
    };
    let admin = free_port(if args.check || args.port == Some(0) { 0 } else { ADMIN_PORT })?;
    let filter = if args.check { "warn" } else { "info" };
    let text = format!(
        "[listen]\naddresses = [\"127.0.0.1:{port}\"]\ntls = {{ mode = \"allow\", state_dir = {state:?} }}\n\n\
         [admin]\naddress = \"127.0.0.1:{admin}\"\ncatalog = \"main\"\nstate_dir = {state:?}\n\
         archives = {archives:?}\narchives_volatile = true\nimports_dir = {imports:?}\npostgres_bin = {bin:?}\n\n\
         [log]\nfilter = {filter:?}\n\n\
         [pool]\npool_size = 10\n\n\
         [servers.main]\nhost = \"127.0.0.1\"\nport = {server}\ncap = 30\n\
         control = {{ role = \"{role}\", database = \"{role}\", password = {control:?} }}\n",
        role = sql::CONTROL,
        state = place.state(),
        archives = place.path().join("archives"),
        imports = place.path().join("imports"),
        bin = cluster.bin,
        server = cluster.port,
    );
    Ok(text)
}

pub(super) fn password() -> String {
    rand::rng().sample_iter(Alphanumeric).take(PASSWORD_CHARACTERS).map(char::from).collect()
}

/// The wanted port if nobody has it, else any.
pub(super) fn free_port(wanted: u16) -> Result<u16, Failure> {
    let bound = TcpListener::bind(("127.0.0.1", wanted)).or_else(|_| TcpListener::bind(("127.0.0.1", 0)));
    bound
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(Failure::unavailable("no free port on 127.0.0.1"))
}
