//! From a proved login to the first ReadyForQuery: the pool, the session's settings, its parameters and its cancel key.
//!
//! Settings of the startup packet that could be wrong are tried on a server connection here, so that a bad one is told at
//! connect, in PostgreSQL's words, as on a direct connection. What was tried once is remembered.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use tenantry_config::PoolMode;
use tenantry_wire::{
    error::Fields,
    frame::{self, HEADER},
    message,
    startup::{self, Startup},
    tag::{backend, status},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::Instant,
};

use super::{
    errors,
    hello::{Greeting, Refused},
    login::Admitted,
    probe,
    registry::{Registered, Watch, limit},
};
use crate::{
    clock::Millis,
    directory::{ClientGuard, Directory},
    pool::{
        Pool,
        decision::Refusal,
        lease::{Handoff, Lease},
        server::Asked,
        stats::Stats,
    },
    server::{
        conn::{Parameters, is_setting},
        settings::Settings,
        upkeep,
    },
    tenant::{Seat, TenantGuard},
};

/// Everything a session begins with.
pub(super) struct Ready {
    pub registered: Registered,
    pub pool: Arc<Pool>,
    pub mode: PoolMode,
    pub settings: Settings,
    /// Count it out at the end.
    pub guards: (ClientGuard, TenantGuard),
}

/// Secret bytes of a cancel key: protocol 3.0 has room for four.
const SHORT_SECRET: usize = 4;
const LONG_SECRET: usize = 32;

pub(super) async fn welcome(
    directory: &Arc<Directory>,
    greeting: &mut Greeting,
    startup: &Startup,
    admitted: Admitted,
    client: ClientGuard,
) -> Result<Ready, Refused> {
    let Admitted { seat: Seat { pool, guard: tenant_guard }, learned } = admitted;
    if let Some(credentials) = learned {
        pool.learn_credentials(credentials);
    }
    let asked = requested(startup)?;
    let (baseline, settings) = establish(&pool, asked, greeting.deadline).await?;
    let settings = pool.share(settings);
    Stats::count(&pool.stats.logins);
    let secret = if startup.agreed_minor() >= 2 { LONG_SECRET } else { SHORT_SECRET };
    let limits = &pool.settings().pool;
    let watch = Watch {
        client_idle: limit(limits.client_idle_timeout),
        idle_transaction: limit(limits.idle_transaction_timeout),
        transaction: limit(limits.transaction_timeout),
        query: limit(limits.query_timeout),
    };
    let registered = directory.registry().register(Arc::clone(&pool), secret, watch, Millis::now());
    for (name, value) in baseline.iter() {
        let value = if is_setting(name) { settings.get(&name.to_ascii_lowercase()).unwrap_or(value) } else { value };
        message::write_parameter_status(&mut greeting.output, name, value);
    }
    message::write_backend_key_data(&mut greeting.output, &registered.shared.key);
    greeting.output.extend_from_slice(&message::ready_for_query(status::IDLE));
    greeting.send().await?;
    let mode = pool.mode();
    Ok(Ready { registered, pool, mode, settings, guards: (client, tenant_guard) })
}

/// The settings that the startup packet asks for.
fn requested(startup: &Startup) -> Result<Settings, Refused> {
    let mut pairs = Vec::new();
    for (name, value) in &startup.parameters {
        match name.as_str() {
            "user" | "database" | "replication" => {}
            "options" => pairs.extend(startup::split_options(value).map_err(|word| errors::bad_options(&word))?),
            _ => pairs.push((name.clone(), value.clone())),
        }
    }
    Ok(pairs.into_iter().map(|(k, v)| canonical(&k, v)).collect())
}

/// The one spelling that nearly every driver sends needs no asking.
fn canonical(name: &str, value: String) -> (String, String) {
    let name = name.to_ascii_lowercase();
    let plain: String = value.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    let utf8 = name == "client_encoding" && matches!(plain.as_str(), "utf8" | "unicode");
    let value = if utf8 { "UTF8".to_owned() } else { value };
    (name, value)
}

/// What a fresh connection reports, and the session's settings as PostgreSQL spells them.
async fn establish(pool: &Arc<Pool>, asked: Settings, deadline: Instant) -> Result<(Parameters, Settings), Refused> {
    if let Some(baseline) = pool.welcome() {
        let own = beyond(&asked, &baseline);
        if own.iter().all(|(name, value)| is_harmless(name, value)) {
            return Ok((baseline, own));
        }
        if let Some(known) = pool.tried(&own) {
            return Ok((baseline, known));
        }
    }
    let mut lease = borrow(pool, deadline).await?;
    let Some(conn) = lease.conn() else { return Err(Refused::Silently) };
    let baseline = Arc::clone(&conn.baseline);
    let own = beyond(&asked, &baseline);
    if own.iter().all(|(name, value)| is_harmless(name, value)) {
        lease.release(Millis::now());
        return Ok((baseline, own));
    }
    let settings = try_out(lease, &own).await?;
    pool.remember_tried(own, settings.clone());
    Ok((baseline, settings))
}

/// Values that PostgreSQL takes as they are.
fn is_harmless(name: &str, value: &str) -> bool {
    let printable = value.len() < 64 && value.bytes().all(|b| (b' '..=b'~').contains(&b));
    name == "application_name" && printable || name == "client_encoding" && value == "UTF8"
}

/// The settings without those that a fresh connection has anyway.
fn beyond(asked: &Settings, baseline: &[(String, String)]) -> Settings {
    let same = |name: &str, value: &str| baseline.iter().any(|(k, v)| k.eq_ignore_ascii_case(name) && v == value);
    asked.iter().filter(|(k, v)| !same(k, v)).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

/// A connection for the login itself. The wait ends a little before the login's own deadline, however late it began, so
/// that the client is told why and not merely cut off.
async fn borrow(pool: &Arc<Pool>, deadline: Instant) -> Result<Lease, Refused> {
    loop {
        // Its tenant may move to another server while the login waits.
        let pool = &pool.latest();
        let handoff = Arc::new(Handoff::default());
        let refusal = match pool.server.checkout(pool, &handoff, Millis::now()) {
            Asked::Lease(lease) => return Ok(lease),
            Asked::Refused(refusal) => refusal,
            Asked::Waiting(mut waiting) => {
                let wait = std::future::poll_fn(|cx| waiting.poll(cx));
                match tokio::time::timeout(patience(deadline), wait).await {
                    Ok(Ok(lease)) => return Ok(lease),
                    Ok(Err(refusal)) => refusal,
                    Err(_) => Refusal::Timeout(waiting.explain()),
                }
            }
        };
        if !pool.has_moved() || matches!(refusal, Refusal::Timeout(_)) {
            return Err(errors::refused(refusal, pool).into());
        }
    }
}

fn patience(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()) * 9 / 10
}

/// Makes the settings on a connection; PostgreSQL's refusal becomes the client's.
async fn try_out(mut lease: Lease, wanted: &Settings) -> Result<Settings, Refused> {
    let outcome = match lease.conn() {
        Some(conn) => {
            let sql = probe::replay("", &conn.label.difference(wanted), false);
            conn.label = wanted.clone();
            ask(conn, &sql).await
        }
        None => return Err(Refused::Silently),
    };
    match outcome {
        Ok(None) => {
            let settled = lease.conn().map(|c| c.label.clone()).unwrap_or_default();
            lease.release(Millis::now());
            Ok(settled)
        }
        Ok(Some(error)) => {
            lease.begin_reset(Millis::now());
            let server = Arc::clone(&lease.pool().server);
            let limit = lease.pool().settings().pool.rollback_timeout;
            server.spawn(async move {
                let Some(conn) = lease.conn() else { return };
                if let Ok(Ok(())) = tokio::time::timeout(limit, upkeep::reset(conn, false)).await {
                    lease.release(Millis::now());
                }
            });
            Err(Refused::Saying(error))
        }
        Err(()) => Err(errors::server_lost(true).into()),
    }
}

/// Runs one simple query; `Some` is PostgreSQL's error, made fatal.
async fn ask(
    conn: &mut crate::server::conn::ServerConn,
    sql: &str,
) -> Result<Option<tenantry_wire::error::ErrorResponse>, ()> {
    let mut out = BytesMut::new();
    conn.forget_unnamed();
    message::write_query(&mut out, sql).map_err(drop)?;
    conn.stream.write_all(&out).await.map_err(drop)?;
    conn.stream.flush().await.map_err(drop)?;
    let mut input = BytesMut::new();
    let mut error = None;
    loop {
        while let Some(header) = frame::server_header(&input).map_err(drop)? {
            if input.len() < header.total() {
                break;
            }
            let whole = input.split_to(header.total());
            let body = whole.get(HEADER..).unwrap_or_default();
            match header.tag {
                backend::READY_FOR_QUERY => return Ok(error),
                backend::PARAMETER_STATUS => {
                    if let Some((name, value)) = message::read_parameter_status(body) {
                        conn.reported(name, value);
                    }
                }
                backend::ERROR_RESPONSE => error = Some(errors::bad_startup_setting(&Fields::new(body))),
                _ => {}
            }
        }
        if input.len() > 64 * 1024 || conn.stream.read_buf(&mut input).await.map_err(drop)? == 0 {
            return Err(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_for_a_connection_ends_before_the_login_must_however_much_of_it_is_gone() {
        let now = Instant::now();
        for left in [60, 10, 1].map(Duration::from_secs) {
            let patience = patience(now + left);
            assert!(patience < left && patience > left / 2, "{patience:?} of {left:?}");
        }
        assert_eq!(patience(now), Duration::ZERO);
    }
}
