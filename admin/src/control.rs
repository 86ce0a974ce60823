//! Tenantry's own login at a server: made for a piece of work, ended with it.

use std::time::Duration;

use tenantry_config::{Control, RoleSecret, Server, ServerTlsMode};
use tenantry_proxy::net::tls::{Connector, TlsError};
use tokio_postgres::{
    Client, Config,
    config::{SslMode, SslNegotiation},
};
use tokio_postgres_rustls::MakeRustlsConnect;

/// From dial to the end of the login.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A peer that says nothing at all, not even that it got our bytes, is gone after about half a minute.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 4);
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
/// In PostgreSQL: no statement of ours waits long for others, nor keeps them waiting.
const OPTIONS: &str = "-c lock_timeout=5s -c statement_timeout=10s";

/// Why there is no control connection. Its text is for the log.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("{0}")]
    Tls(#[from] TlsError),
    #[error("{}", words(.0))]
    Postgres(#[from] tokio_postgres::Error),
    #[error("no login within {CONNECT_LIMIT:?}")]
    Timeout,
}

/// PostgreSQL's own message where there is one: the crate's `Display` says only "db error".
pub fn words(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(
        || std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}")),
        |error| error.message().to_owned(),
    )
}

/// How to log in to a database of the server.
pub fn config(server: &Server, control: &Control, database: &str) -> Result<(Config, MakeRustlsConnect), ControlError> {
    let mut config = Config::new();
    config.host(&server.host).port(server.port).user(&control.role).dbname(database);
    config.connect_timeout(CONNECT_LIMIT).application_name("tenantry").options(OPTIONS);
    let (idle, interval, probes) = KEEPALIVE;
    config.keepalives_idle(idle).keepalives_interval(interval).keepalives_retries(probes);
    config.tcp_user_timeout(UNACKNOWLEDGED);
    config.ssl_mode(match server.tls.mode {
        ServerTlsMode::Disable => SslMode::Disable,
        ServerTlsMode::Prefer => SslMode::Prefer,
        ServerTlsMode::Require | ServerTlsMode::VerifyCa | ServerTlsMode::VerifyFull => SslMode::Require,
    });
    if server.tls.direct {
        config.ssl_negotiation(SslNegotiation::Direct);
    }
    if let RoleSecret::Plain(password) = &control.secret {
        config.password(password.expose());
    }
    let tls = MakeRustlsConnect::new(Connector::load(&server.tls, &server.host)?.client_config());
    Ok((config, tls))
}

/// Logs in to the control database. The connection ends when the client is dropped.
pub async fn connect(server: &Server, control: &Control) -> Result<Client, ControlError> {
    connect_to(server, control, &control.database).await
}

/// The same, to any database.
pub async fn connect_to(server: &Server, control: &Control, database: &str) -> Result<Client, ControlError> {
    let (config, tls) = config(server, control, database)?;
    let connected = tokio::time::timeout(CONNECT_LIMIT, config.connect(tls)).await;
    let (client, connection) = connected.map_err(|_| ControlError::Timeout)??;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %words(&error), "a control connection broke");
        }
    });
    Ok(client)
}
