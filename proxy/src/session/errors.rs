//! Every error that Tenantry itself tells a client: SQLSTATE, severity, text, and a stable `proxy_code` in the DETAIL.
//!
//! No text names an address, a secret or another tenant.

use tenantry_wire::{
    error::{ErrorResponse, Fields, Severity, sqlstate},
    frame::FrameError,
    startup::StartupError,
};

use super::registry::EndReason;
use crate::{
    pool::{
        LoginError, Pool,
        decision::Refusal,
        explain::{Blocked, Explanation},
    },
    tenant::Tenant,
};

/// No server connection for this request.
#[must_use]
pub fn refused(refusal: Refusal, pool: &Pool) -> ErrorResponse {
    let full = |message: &str| ErrorResponse::error(sqlstate::TOO_MANY_CONNECTIONS, message);
    match refusal {
        Refusal::Timeout(why) => match why.blocked {
            Blocked::Paused => ErrorResponse::error(
                sqlstate::CANNOT_CONNECT_NOW,
                "the database is paused, and was not resumed in time",
            )
            .detail(format!("proxy_code=PAUSED tenant={} {}", pool.tenant(), figures(&why))),
            Blocked::ServerDown => {
                ErrorResponse::error(sqlstate::CANNOT_CONNECT_NOW, "the database server cannot be reached")
                    .detail(format!("proxy_code=SERVER_DOWN tenant={} waited_ms={}", pool.tenant(), why.waited))
            }
            Blocked::ServerFull | Blocked::TenantFull => full("the database server takes no more connections")
                .detail(format!("proxy_code=SERVER_FULL tenant={} {}", pool.tenant(), figures(&why))),
            _ => full("query_wait_timeout: no server connection became free in time").detail(format!(
                "proxy_code=QUERY_WAIT_TIMEOUT tenant={} {}",
                pool.tenant(),
                figures(&why)
            )),
        }
        .hint(why.blocked.remedy()),
        Refusal::QueueFull(why) => full("max_waiters: too many clients are waiting for a server connection")
            .detail(format!("proxy_code=MAX_WAITERS tenant={} {}", pool.tenant(), figures(&why)))
            .hint(format!("Retry later, or raise max_waiters. {}", why.blocked.remedy())),
        Refusal::Shut => ErrorResponse::error(sqlstate::CANNOT_CONNECT_NOW, "the database takes no new transactions")
            .detail(format!("proxy_code=DRAINING tenant={}", pool.tenant()))
            .hint(DRAINING_HINT),
        Refusal::LoginRefused => login_refused(pool),
    }
}

const DRAINING_HINT: &str = "It is being drained for maintenance; try again later.";

/// A login to a tenant that is on its way to, or in, a state without transactions.
#[must_use]
pub fn drained() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::CANNOT_CONNECT_NOW, "the database takes no new connections")
        .detail("proxy_code=DRAINING")
        .hint(DRAINING_HINT)
}

/// Only told to who proved a role of it.
#[must_use]
pub fn archived(database: &str) -> ErrorResponse {
    no_database(database).hint("It was archived, and can be restored: ask whoever runs this server.")
}

/// `proxy_code` of a refusal, and the limit behind it; a wait is counted by the limit that its DETAIL names.
const LIMITS: [(&str, &str); 10] = [
    ("LOGINS", "logins_under_way"),
    ("MAX_CLIENTS", "max_client_conn"),
    ("TENANT_MAX_CLIENTS", "tenant_max_client_conn"),
    ("FAILED_LOGINS", "max_failed_logins"),
    ("MAX_WAITERS", "max_waiters"),
    ("MAX_PINNED", "max_pinned"),
    ("MESSAGE_MEMORY", "max_message_memory"),
    ("NOTIFICATIONS", "notifications"),
    ("MESSAGE_SIZE", "max_message_size"),
    ("SERVER_DOWN", Blocked::ServerDown.as_str()),
];

/// The limit that is behind an error of ours, if one is.
#[must_use]
pub fn limit_of(error: &ErrorResponse) -> Option<&'static str> {
    let mut words = error.detail.as_deref()?.split(' ').filter_map(|word| word.split_once('='));
    let (_, code) = words.next().filter(|(key, _)| *key == "proxy_code")?;
    if let Some((_, limit)) = LIMITS.iter().find(|(of, _)| *of == code) {
        return Some(limit);
    }
    let (_, word) = words.find(|(key, _)| *key == "limit")?;
    Blocked::ALL.iter().map(|limit| limit.as_str()).find(|limit| *limit == word)
}

/// What held a client up, in figures: of its own tenant, and never of another.
fn figures(why: &Explanation) -> String {
    format!(
        "limit={} waited_ms={} ahead={} waiting={} pool_size={}/{} tenant_connections={}/{}",
        why.blocked.as_str(),
        why.waited,
        why.ahead,
        why.waiting,
        why.size,
        why.pool_size,
        why.held,
        if why.ceiling == u32::MAX { "off".to_owned() } else { why.ceiling.to_string() },
    )
}

/// The server turned the pool's login down.
#[must_use]
pub fn login_refused(pool: &Pool) -> ErrorResponse {
    let detail = format!("proxy_code=SERVER_LOGIN tenant={}", pool.tenant());
    match pool.login_error() {
        Some(LoginError::Server(body)) => {
            let fields = Fields::new(&body);
            // What it says of authorization names our own address, and pg_hba.conf.
            let may_tell = fields.code().is_some_and(|code| !code.starts_with("28"));
            let message =
                fields.message().filter(|_| may_tell).unwrap_or("the server refused the login of this role").to_owned();
            ErrorResponse::fatal(known_code(fields.code()), message).detail(detail)
        }
        Some(LoginError::Ours(message)) => ErrorResponse::fatal(sqlstate::CONNECTION_FAILURE, message)
            .detail(detail)
            .hint("`tenantry check` says what is wrong."),
        None => ErrorResponse::fatal(sqlstate::CONNECTION_FAILURE, "the login to the server failed").detail(detail),
    }
}

/// PostgreSQL's reasons to refuse a login, as our constants; anything else is a connection failure.
fn known_code(code: Option<&str>) -> &'static str {
    [
        sqlstate::INVALID_PASSWORD,
        sqlstate::INVALID_AUTHORIZATION,
        sqlstate::INVALID_CATALOG_NAME,
        sqlstate::TOO_MANY_CONNECTIONS,
        sqlstate::CANNOT_CONNECT_NOW,
        "42501",
        "55000",
    ]
    .into_iter()
    .find(|known| Some(*known) == code)
    .unwrap_or(sqlstate::CONNECTION_FAILURE)
}

#[must_use]
pub fn cancelled_in_queue() -> ErrorResponse {
    ErrorResponse::error(sqlstate::QUERY_CANCELED, "canceling statement due to user request")
        .detail("proxy_code=CANCELED_IN_QUEUE")
        .hint("It was still waiting for a server connection; nothing was sent.")
}

#[must_use]
pub fn ended(reason: EndReason) -> ErrorResponse {
    let (code, message, token) = match reason {
        EndReason::IdleTimeout => {
            (sqlstate::IDLE_SESSION_TIMEOUT, "terminating connection due to client_idle_timeout", "CLIENT_IDLE_TIMEOUT")
        }
        EndReason::IdleTransactionTimeout => (
            sqlstate::IDLE_IN_TRANSACTION_TIMEOUT,
            "terminating connection due to idle_transaction_timeout",
            "IDLE_TRANSACTION_TIMEOUT",
        ),
        EndReason::TransactionTimeout => {
            (sqlstate::TRANSACTION_TIMEOUT, "terminating connection due to transaction_timeout", "TRANSACTION_TIMEOUT")
        }
        EndReason::Shutdown | EndReason::ShutdownNow => {
            (sqlstate::ADMIN_SHUTDOWN, "terminating connection: Tenantry is shutting down", "SHUTDOWN")
        }
        EndReason::Drained | EndReason::DrainedNow => {
            (sqlstate::ADMIN_SHUTDOWN, "terminating connection: the database is being drained", "DRAINED")
        }
        EndReason::Dropped => {
            (sqlstate::DATABASE_DROPPED, "terminating connection: the database was dropped", "DROPPED")
        }
        EndReason::Moved => (
            sqlstate::ADMIN_SHUTDOWN,
            "terminating connection: its transaction was open, and the database is being moved",
            "MOVED",
        ),
        EndReason::Killed => {
            (sqlstate::ADMIN_SHUTDOWN, "terminating connection due to administrator command", "KILLED")
        }
    };
    ErrorResponse::fatal(code, message).detail(format!("proxy_code={token}"))
}

/// The server connection broke. `certain`: the transaction is rolled back for sure; else nobody knows.
#[must_use]
pub fn server_lost(certain: bool) -> ErrorResponse {
    if certain {
        ErrorResponse::fatal(sqlstate::CONNECTION_FAILURE, "the connection to the database server was lost")
            .detail("proxy_code=SERVER_LOST")
            .hint("An open transaction was rolled back.")
    } else {
        ErrorResponse::fatal(
            sqlstate::TRANSACTION_RESOLUTION_UNKNOWN,
            "the connection to the database server was lost before the outcome was known",
        )
        .detail("proxy_code=SERVER_LOST")
        .hint("The statement may or may not have been committed.")
    }
}

/// The connection that listened for the client is gone, and what was notified since may be lost. `words`: PostgreSQL's last
/// ErrorResponse on it, which the client would have got on a connection of its own.
#[must_use]
pub fn listening_lost(words: Option<&[u8]>) -> ErrorResponse {
    let fields = words.map(Fields::new);
    let code = fields.and_then(|fields| fields.code());
    let known = [sqlstate::ADMIN_SHUTDOWN, sqlstate::CRASH_SHUTDOWN, sqlstate::IDLE_SESSION_TIMEOUT];
    let error = match (known.into_iter().find(|known| Some(*known) == code), fields.and_then(|f| f.message())) {
        (Some(code), Some(message)) => ErrorResponse::fatal(code, message),
        _ => ErrorResponse::fatal(sqlstate::CONNECTION_FAILURE, "the connection to the database server was lost"),
    };
    error
        .detail("proxy_code=LISTENER_LOST")
        .hint("Notifications may have been missed: connect again, LISTEN again, then look at what they are about.")
}

/// The client does not read what it listens to.
#[must_use]
pub fn mail_ran_over(limit: usize) -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::OUT_OF_MEMORY, "too many notifications that were not read")
        .detail(format!("proxy_code=NOTIFICATIONS limit_bytes={limit}"))
        .hint("Read notifications as they come, and not in the middle of a long transaction.")
}

#[must_use]
pub fn server_broke_protocol() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::CONNECTION_FAILURE, "the database server sent an invalid message")
        .detail("proxy_code=SERVER_PROTOCOL")
}

#[must_use]
pub fn settings_lost(message: &str) -> ErrorResponse {
    ErrorResponse::fatal(
        sqlstate::CONNECTION_FAILURE,
        format!("the session's settings could not be restored: {message}"),
    )
    .detail("proxy_code=SETTINGS")
    .hint("Connect again.")
}

#[must_use]
pub fn malformed(error: &FrameError) -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::PROTOCOL_VIOLATION, error.to_string()).detail("proxy_code=MALFORMED")
}

#[must_use]
pub fn message_too_large(limit: usize) -> ErrorResponse {
    ErrorResponse::error(
        sqlstate::PROGRAM_LIMIT_EXCEEDED,
        format!("a named Parse is larger than max_message_size ({limit} bytes)"),
    )
    .detail("proxy_code=MESSAGE_SIZE")
    .hint("Send it as an unnamed statement, or raise listen.max_message_size.")
}

#[must_use]
pub fn out_of_memory() -> ErrorResponse {
    ErrorResponse::error(
        sqlstate::OUT_OF_MEMORY,
        "clients make Tenantry hold too many large messages (named Parse) at once: max_message_memory is reached",
    )
    .detail("proxy_code=MESSAGE_MEMORY")
    .hint("Try again, send it as an unnamed statement, or raise listen.max_message_memory.")
}

#[must_use]
pub fn internal() -> ErrorResponse {
    ErrorResponse::fatal("XX000", "internal error").detail("proxy_code=INTERNAL")
}

#[must_use]
pub fn no_transactions() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::FEATURE_NOT_SUPPORTED, "transaction blocks not allowed in statement pooling mode")
        .detail("proxy_code=STATEMENT_MODE")
        .hint("Use pool_mode = \"transaction\" for this tenant or role.")
}

#[must_use]
pub fn too_many_pinned(pool: &Pool) -> ErrorResponse {
    let limit = pool.settings().pool.max_pinned;
    ErrorResponse::fatal(
        sqlstate::TOO_MANY_CONNECTIONS,
        "too many sessions hold state that ties them to a server connection",
    )
    .detail(format!("proxy_code=MAX_PINNED tenant={} pinned={limit}", pool.tenant()))
    .hint(
        "The limit is max_pinned. Temporary tables, session locks, WITH HOLD cursors, PREPARE, setseed(), LOAD and set_config() \
         of a name that is not written there hold one.",
    )
}

#[must_use]
pub fn sequence_elsewhere() -> ErrorResponse {
    ErrorResponse::error(
        sqlstate::FEATURE_NOT_SUPPORTED,
        "lastval() and currval() only work in the transaction that called nextval()",
    )
    .detail("proxy_code=SEQUENCE_STATE")
    .hint("Use INSERT ... RETURNING, ask in the same transaction, or use pool_mode = \"session\" for this tenant or role.")
}

/// PostgreSQL's own words, and the routine by which drivers (asyncpg) know it whatever the language.
#[must_use]
pub fn stale_plan() -> ErrorResponse {
    let mut error = ErrorResponse::error(sqlstate::FEATURE_NOT_SUPPORTED, "cached plan must not change result type");
    error.routine = Some("RevalidateCachedQuery");
    error
}

#[must_use]
pub fn no_unnamed_statement() -> ErrorResponse {
    ErrorResponse::error(sqlstate::INVALID_STATEMENT_NAME, "unnamed prepared statement does not exist")
}

#[must_use]
pub fn too_many_statements() -> ErrorResponse {
    ErrorResponse::error(sqlstate::PROGRAM_LIMIT_EXCEEDED, "too many prepared statements in one session")
        .detail("proxy_code=STATEMENTS")
        .hint("Close statements that are no longer used.")
}

// Before login.

#[must_use]
pub fn startup(error: &StartupError) -> Option<ErrorResponse> {
    let code = match error {
        StartupError::Length => return None,
        StartupError::Version(..) => sqlstate::FEATURE_NOT_SUPPORTED,
        StartupError::Terminator | StartupError::Encoding => sqlstate::PROTOCOL_VIOLATION,
    };
    Some(ErrorResponse::fatal(code, error.to_string()))
}

#[must_use]
pub fn no_user() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::INVALID_AUTHORIZATION, "no PostgreSQL user name specified in startup packet")
}

#[must_use]
pub fn plaintext_after(request: &str) -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::PROTOCOL_VIOLATION, format!("received unencrypted data after {request} request"))
        .hint("This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.")
}

#[must_use]
pub fn unsupported_protocol_code(code: &str) -> ErrorResponse {
    ErrorResponse::fatal(
        sqlstate::FEATURE_NOT_SUPPORTED,
        format!("unsupported frontend protocol: {code} is not expected here"),
    )
}

#[must_use]
pub fn tls_required() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::INVALID_AUTHORIZATION, "this listener takes TLS connections only")
        .detail("proxy_code=TLS_REQUIRED")
        .hint("Connect with sslmode=require.")
}

#[must_use]
pub fn authentication_failed(role: &str) -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::INVALID_PASSWORD, format!("password authentication failed for user \"{role}\""))
}

/// The same for every name, so that it tells nobody which ones exist.
#[must_use]
pub fn too_many_failed_logins(role: &str) -> ErrorResponse {
    authentication_failed(role)
        .detail("proxy_code=FAILED_LOGINS")
        .hint("Too many logins failed from this address (max_failed_logins); wait a minute.")
}

#[must_use]
pub fn no_database(database: &str) -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::INVALID_CATALOG_NAME, format!("database \"{database}\" does not exist"))
}

#[must_use]
pub fn too_many_clients(setting: &str) -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::TOO_MANY_CONNECTIONS, format!("no more connections allowed ({setting})"))
        .detail("proxy_code=MAX_CLIENTS")
        .hint("The server as a whole has all the clients it takes; try again later.")
}

/// As many connections are on their way to become clients as there may be clients.
#[must_use]
pub fn too_many_logins() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::TOO_MANY_CONNECTIONS, "too many logins under way")
        .detail("proxy_code=LOGINS")
        .hint("Try again; if it lasts, raise max_client_conn, or look who opens connections and says nothing.")
}

/// Only told to who proved a role of it.
#[must_use]
pub fn too_many_of_tenant(tenant: &Tenant) -> ErrorResponse {
    let most = tenant.settings.max_client_conn.unwrap_or(u32::MAX);
    ErrorResponse::fatal(sqlstate::TOO_MANY_CONNECTIONS, "no more connections allowed (the database's max_client_conn)")
        .detail(format!("proxy_code=TENANT_MAX_CLIENTS tenant={} clients={most}/{most}", tenant.id))
        .hint("Close connections that are not used, or raise the tenant's max_client_conn.")
}

#[must_use]
pub fn replication() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::FEATURE_NOT_SUPPORTED, "replication connections are not pooled")
        .hint("Connect to the server directly.")
}

#[must_use]
pub fn bad_options(word: &str) -> ErrorResponse {
    ErrorResponse::fatal("42601", format!("invalid command-line argument for server process: {word}"))
}

#[must_use]
pub fn bad_login_message() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::PROTOCOL_VIOLATION, "expected a password message during authentication")
}

#[must_use]
pub fn shutting_down() -> ErrorResponse {
    ErrorResponse::fatal(sqlstate::CANNOT_CONNECT_NOW, "Tenantry is shutting down")
}

/// Before a session begins every error is fatal.
#[must_use]
pub fn fatal(error: ErrorResponse) -> ErrorResponse {
    error.with_severity(Severity::Fatal)
}

/// A setting of the startup packet that PostgreSQL does not take.
#[must_use]
pub fn bad_startup_setting(fields: &Fields<'_>) -> ErrorResponse {
    let known = ["22023", "42704", "42501", "55P02", "22P02"].into_iter().find(|c| Some(*c) == fields.code());
    ErrorResponse::fatal(known.unwrap_or("22023"), fields.message().unwrap_or("invalid startup setting"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_counted_by_the_limit_behind_it() {
        let of = |detail: &str| limit_of(&ErrorResponse::error("53300", "").detail(detail));
        assert_eq!(of("proxy_code=QUERY_WAIT_TIMEOUT tenant=a limit=ceiling waited_ms=1"), Some("ceiling"));
        assert_eq!(of("proxy_code=MAX_WAITERS tenant=a limit=ceiling waited_ms=1"), Some("max_waiters"));
        assert_eq!(of("proxy_code=SERVER_DOWN tenant=limit waited_ms=1"), Some("server_down"));
        assert_eq!(limit_of(&too_many_clients("max_client_conn")), Some("max_client_conn"));
        assert_eq!(limit_of(&too_many_failed_logins("a")), Some("max_failed_logins"));
        assert_eq!(of("proxy_code=SHUTDOWN"), None);
        assert_eq!(limit_of(&shutting_down()), None);
    }
}
