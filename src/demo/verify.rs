//! `tenantry demo --check`: a real client at every tenant, and what must not work does not.

use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tenantry_proxy::clock::Millis;
use tokio::time::timeout;
use tokio_postgres::{Client, config::SslMode, error::SqlState};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{Fork, sql};
use crate::{failure::Failure, output};

/// For all that is done at one tenant.
const TENANT_LIMIT: Duration = Duration::from_secs(30);

/// Verifies every tenant and prints a row for each; an error if anything did not hold.
pub async fn all(address: SocketAddr, certificate: &Path, forks: &[Fork]) -> Result<(), Failure> {
    let door = Door { address, tls: trusting(certificate)? };
    let mut rows = Vec::new();
    let mut failed = 0;
    for (fork, other) in forks.iter().zip(forks.iter().cycle().skip(1)) {
        let started = Millis::now();
        let found = timeout(TENANT_LIMIT, verify(&door, fork, other)).await;
        let result = match found.unwrap_or_else(|_| Err(format!("not done after {TENANT_LIMIT:?}"))) {
            Ok(()) => format!("ok, {:?}", Millis::now().since(started)),
            Err(reason) => {
                failed += 1;
                format!("FAILED: {reason}")
            }
        };
        let isolation = format!("{}'s password refused at {}, and for {}", fork.name, other.name, other.name);
        let (name, tls) = (|| fork.name.clone(), "required, certificate verified".to_owned());
        rows.push([name(), name(), name(), tls, "2".to_owned(), isolation, result]);
    }
    let header = ["TENANT", "DATABASE", "ROLE", "TLS", "TRANSACTIONS", "ISOLATION", "RESULT"];
    output::line(&output::table(header, rows))?;
    match failed {
        0 => Ok(()),
        n => Err(Failure::Unavailable(format!("{n} of {} tenants failed", forks.len()))),
    }
}

async fn verify(door: &Door, fork: &Fork, other: &Fork) -> Result<(), String> {
    let Fork { name, password } = fork;
    let mut client = door.connect(name, password, name).await.map_err(|e| format!("login: {}", words(&e)))?;
    whereabouts(&client, name).await?;
    transactions(&mut client).await?;
    // The right password for the wrong database, and for the wrong role.
    refused(door.connect(name, password, &other.name).await, &format!("{name} at {}", other.name))?;
    refused(door.connect(&other.name, password, &other.name).await, &format!("{name}'s password for {}", other.name))
}

async fn whereabouts(client: &Client, name: &str) -> Result<(), String> {
    let row = client.query_one(sql::PLACE, &[]).await.map_err(|e| words(&e))?;
    let (database, role): (&str, &str) = (row.get(0), row.get(1));
    if (database, role) != (name, name) {
        return Err(format!("reached database {database} as {role}"));
    }
    let row = client.query_one(sql::GREETING, &[]).await.map_err(|e| words(&e))?;
    match row.get::<_, &str>(0) {
        text if text == format!("hello from {name}") => Ok(()),
        text => Err(format!("found \"{text}\"")),
    }
}

/// The first leaves a row, the second finds exactly that one; between them the server connection may change.
async fn transactions(client: &mut Client) -> Result<(), String> {
    let left = async {
        let first = client.transaction().await?;
        first.execute(sql::NOTE, &[&"left by the first"]).await?;
        first.commit().await?;
        let second = client.transaction().await?;
        let row = second.query_one(sql::NOTES, &[&"left by the first"]).await?;
        second.rollback().await?;
        Ok::<i64, tokio_postgres::Error>(row.get(0))
    };
    match left.await {
        Ok(1) => Ok(()),
        Ok(n) => Err(format!("the second transaction found {n} rows of the first")),
        Err(error) => Err(words(&error)),
    }
}

fn refused(login: Result<Client, tokio_postgres::Error>, what: &str) -> Result<(), String> {
    let refusals = [
        SqlState::INVALID_PASSWORD,
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        SqlState::INSUFFICIENT_PRIVILEGE,
        SqlState::INVALID_CATALOG_NAME,
    ];
    match login {
        Ok(_) => Err(format!("{what} was let in")),
        Err(error) if error.code().is_some_and(|code| refusals.contains(code)) => Ok(()),
        Err(error) => Err(format!("{what} was not refused but failed: {}", words(&error))),
    }
}

/// The error with what PostgreSQL or Tenantry said; its own Display only says "db error".
fn words(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(
        || std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}")),
        |db| format!("{}: {}", db.code().code(), db.message()),
    )
}

/// The way in, over TLS or not at all.
struct Door {
    address: SocketAddr,
    tls: ClientConfig,
}

impl Door {
    async fn connect(&self, role: &str, password: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::Config::new()
            .host(self.address.ip().to_string())
            .port(self.address.port())
            .user(role)
            .password(password)
            .dbname(database)
            .ssl_mode(SslMode::Require)
            .connect(MakeRustlsConnect::new(self.tls.clone()))
            .await?;
        // Ends with its client; an error of it is the client's next error.
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }
}

/// Trusts the one certificate that Tenantry made for itself, and no other.
fn trusting(certificate: &Path) -> Result<ClientConfig, Failure> {
    let unreadable = || Failure::internal::<String>(certificate.display());
    let pem = fs::read(certificate).map_err(|error| unreadable()(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| unreadable()(error.to_string()))?;
        roots.add(certificate).map_err(|error| unreadable()(error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(|error| unreadable()(error.to_string()))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
