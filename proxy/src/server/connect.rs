//! Dialling PostgreSQL and logging in: address, TLS, authentication, and proof of being where the route says.
//!
//! The whole of it stands under one deadline, the caller's. Nothing a client sent goes into the startup packet: its
//! settings are replayed later, inside its own session.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tenantry_config::ServerTlsMode;
use tenantry_wire::{
    error::{Fields, sqlstate},
    frame::{self, HEADER},
    message, sasl,
    sasl::Authentication,
    scram::{self, ClientBinding, ClientExchange},
    startup::{self, CancelKey},
    tag::backend,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::{conn::ServerConn, credentials::Credentials, settings::Settings, statements::Prepared};
use crate::{
    budget::cap::Room,
    net::{
        is_out_of_descriptors,
        stream::Stream,
        tls::{self, Connector},
    },
    pool::decision::{DialFailure, SlotId},
};

/// Most bytes of one message that a server may send before or right after login.
const MAX_LOGIN_MESSAGE: usize = 64 * 1024;

/// Where a server is and how its link is protected.
#[derive(Debug)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
    pub tls_mode: ServerTlsMode,
    pub direct_tls: bool,
    pub connector: Connector,
    pub tcp_user_timeout: std::time::Duration,
    /// Used while the resolver is dead.
    pub last_good: Mutex<Option<SocketAddr>>,
}

/// Whom to log in as, and where that must lead.
#[derive(Debug, Clone)]
pub struct Login {
    pub database: String,
    pub role: String,
    pub credentials: Credentials,
    pub max_prepared_statements: u32,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot reach the server: {0}")]
    Unreachable(#[source] io::Error),
    #[error("the server closed the connection during login")]
    Closed,
    #[error("TLS: {0}")]
    Tls(#[from] tls::TlsError),
    #[error("the server does not speak TLS, which its tls.mode demands")]
    TlsRefused,
    #[error("received unencrypted data after SSL request")]
    PlaintextInjected,
    /// PostgreSQL's own words: the body of its ErrorResponse.
    #[error("{}", Fields::new(.0).message().unwrap_or("the server refused the login"))]
    Refused(Bytes),
    #[error("the server asks for {0}, which needs {1}")]
    Credentials(&'static str, &'static str),
    #[error("SCRAM: {0}")]
    Scram(#[from] scram::ScramError),
    #[error("the server sent {0}, which has no place in a login")]
    Protocol(&'static str),
    #[error("expected database {expected:?} and got {found:?}")]
    WrongPlace { expected: String, found: String },
    /// The server had let us in.
    #[error("the server ended the session right after the login: {0}")]
    Ended(#[source] Box<ConnectError>),
    #[error("the login took longer than server_connect_timeout")]
    Timeout {
        /// The server had taken the connection.
        reached: bool,
    },
}

impl ConnectError {
    /// What it means for those who wait.
    #[must_use]
    pub fn failure(&self) -> DialFailure {
        match self {
            // Our own machine has no descriptor or port left: nothing is known of the server.
            Self::Unreachable(e) if is_out_of_descriptors(e) || e.kind() == io::ErrorKind::AddrNotAvailable => {
                DialFailure::Later
            }
            Self::Unreachable(_) | Self::Closed => DialFailure::ServerDown,
            // It was reached: one database may be locked, and the others not; or somebody terminates this role's sessions.
            Self::Timeout { reached: true } | Self::Ended(_) => DialFailure::Later,
            Self::Timeout { reached: false } => DialFailure::ServerDown,
            Self::Refused(body) => match Fields::new(body).code() {
                // Starting up, shutting down, in recovery: later, for everybody.
                Some("57P03" | "57P01" | "57P02") => DialFailure::ServerDown,
                // Too many connections. Whose limit it is says only the routine that raised it, which is not translated.
                Some("53300") => match Fields::new(body).routine() {
                    Some("CheckMyDatabase" | "InitializeSessionUserId") => DialFailure::TenantFull,
                    _ => DialFailure::ServerFull,
                },
                // Wrong for good: authorization, no such database, no privilege, not allowed.
                Some(code) if ["28", "3D", "42", "55", "0A"].iter().any(|class| code.starts_with(class)) => {
                    DialFailure::Refused
                }
                _ => DialFailure::Later,
            },
            Self::Tls(tls::TlsError::Handshake { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                ) =>
            {
                DialFailure::ServerDown
            }
            Self::WrongPlace { .. }
            | Self::Tls(_)
            | Self::TlsRefused
            | Self::PlaintextInjected
            | Self::Credentials(..)
            | Self::Scram(_)
            | Self::Protocol(_) => DialFailure::Refused,
        }
    }
}

impl ConnectError {
    /// PostgreSQL has another password for the role.
    #[must_use]
    pub fn is_wrong_password(&self) -> bool {
        matches!(self, Self::Refused(body) if Fields::new(body).code() == Some(sqlstate::INVALID_PASSWORD))
    }

    /// The same after PostgreSQL let us in: an end without a reason of the whole server's is this session's own.
    fn after_login(self) -> Self {
        let is_own = match &self {
            Self::Closed => true,
            Self::Unreachable(e) => !is_out_of_descriptors(e),
            Self::Refused(body) => Fields::new(body).code() == Some("57P01"),
            _ => false,
        };
        if is_own { Self::Ended(Box::new(self)) } else { self }
    }
}

impl From<io::Error> for ConnectError {
    fn from(e: io::Error) -> Self {
        if e.kind() == io::ErrorKind::UnexpectedEof { Self::Closed } else { Self::Unreachable(e) }
    }
}

impl From<frame::FrameError> for ConnectError {
    fn from(_: frame::FrameError) -> Self {
        Self::Protocol("a malformed message")
    }
}

/// A login that came to nothing.
#[derive(Debug)]
pub struct NoLogin {
    pub error: ConnectError,
    /// What PostgreSQL may still count: its end is to be waited for.
    pub half_open: Option<Stream>,
}

/// Connects and logs in within `limit`; tells what room the server has, if the server does.
pub async fn connect_within(
    limit: Duration,
    endpoint: &Endpoint,
    login: &Login,
    slot: SlotId,
) -> Result<(ServerConn, Option<Room>), NoLogin> {
    let mut link = None;
    let logged_in = tokio::time::timeout(limit, async {
        let link = link.insert(Link { stream: open(endpoint).await?, input: BytesMut::new(), output: BytesMut::new() });
        log_in(link, login).await
    });
    let logged_in = logged_in.await.unwrap_or_else(|_| Err(ConnectError::Timeout { reached: false }));
    let half_open = link.map(|link| link.stream);
    match (logged_in, half_open) {
        (Ok(LoggedIn { key, baseline, place: Place { room, begins_as_another } }), Some(stream)) => {
            let conn = ServerConn {
                stream,
                slot,
                key,
                label: Settings::default(),
                baseline: Arc::new(baseline),
                prepared: Prepared::new(login.max_prepared_statements),
                defaults: Vec::new(),
                unnamed: None,
                sequences_of: 0,
                plans: 0,
                used: false,
                hinted: false,
                begins_as_another,
                kept: Vec::new(),
            };
            Ok((conn, room))
        }
        (Err(ConnectError::Timeout { .. }), half_open) => {
            Err(NoLogin { error: ConnectError::Timeout { reached: half_open.is_some() }, half_open })
        }
        (Err(error), half_open) => Err(NoLogin { error, half_open }),
        (Ok(_), None) => Err(NoLogin { error: ConnectError::Closed, half_open: None }),
    }
}

/// What a login brought.
struct LoggedIn {
    key: CancelKey,
    baseline: Vec<(String, String)>,
    place: Place,
}

/// What the server says of where we are.
struct Place {
    room: Option<Room>,
    /// The role begins its sessions as another one.
    begins_as_another: bool,
}

async fn log_in(link: &mut Link, login: &Login) -> Result<LoggedIn, ConnectError> {
    startup::write_startup(&mut link.output, 0, &[("user", &login.role), ("database", &login.database)]);
    link.send().await?;
    authenticate(link, login).await?;
    let (key, baseline) = greet(link).await.map_err(ConnectError::after_login)?;
    let place = prove_place(link, login).await.map_err(ConnectError::after_login)?;
    if !link.input.is_empty() {
        return Err(ConnectError::Protocol("more than it was asked for"));
    }
    Ok(LoggedIn { key, baseline, place })
}

/// Sends a CancelRequest on a connection of its own and waits until PostgreSQL has closed it, which it does after it
/// signalled the backend.
pub async fn cancel(endpoint: &Endpoint, key: &CancelKey) -> Result<(), ConnectError> {
    let mut stream = open(endpoint).await?;
    let mut out = BytesMut::new();
    startup::write_cancel_request(&mut out, key);
    stream.write_all(&out).await?;
    stream.flush().await?;
    let mut rest = [0u8; 64];
    while matches!(stream.read(&mut rest).await, Ok(n) if n > 0) {}
    Ok(())
}

async fn open(endpoint: &Endpoint) -> Result<Stream, ConnectError> {
    if endpoint.host.starts_with('/') {
        let path = format!("{}/.s.PGSQL.{}", endpoint.host, endpoint.port);
        return Ok(Stream::Unix(UnixStream::connect(path).await?));
    }
    let tcp = dial(endpoint).await?;
    let stream = Stream::Tcp(tcp);
    stream.tune(Some(endpoint.tcp_user_timeout));
    let Stream::Tcp(tcp) = stream else { return Err(ConnectError::Closed) };
    secure(endpoint, tcp).await
}

async fn dial(endpoint: &Endpoint) -> Result<TcpStream, ConnectError> {
    let mut last_error = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    let resolved: Vec<SocketAddr> = match tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port)).await {
        Ok(addresses) => addresses.collect(),
        Err(e) => {
            last_error = e;
            // The resolver is dead: the address that worked last is still the best guess.
            endpoint.last_good.lock().iter().copied().collect()
        }
    };
    for address in resolved {
        match TcpStream::connect(address).await {
            Ok(tcp) => {
                *endpoint.last_good.lock() = Some(address);
                return Ok(tcp);
            }
            Err(e) => last_error = e,
        }
    }
    Err(ConnectError::Unreachable(last_error))
}

async fn secure(endpoint: &Endpoint, mut tcp: TcpStream) -> Result<Stream, ConnectError> {
    if endpoint.tls_mode == ServerTlsMode::Disable {
        return Ok(Stream::Tcp(tcp));
    }
    if !endpoint.direct_tls {
        let mut out = BytesMut::new();
        startup::write_ssl_request(&mut out);
        tcp.write_all(&out).await?;
        let mut answer = [0u8; 1];
        tcp.read_exact(&mut answer).await?;
        match answer {
            [b'S'] => {}
            [b'N'] if endpoint.tls_mode == ServerTlsMode::Prefer => return Ok(Stream::Tcp(tcp)),
            [b'N'] => return Err(ConnectError::TlsRefused),
            _ => return Err(ConnectError::Protocol("neither yes nor no to TLS")),
        }
        let probe = Stream::Tcp(tcp);
        if probe.has_input() {
            return Err(ConnectError::PlaintextInjected);
        }
        let Stream::Tcp(plain) = probe else { return Err(ConnectError::Closed) };
        tcp = plain;
    }
    let tls = endpoint.connector.connect(tcp).await?;
    Ok(Stream::Tls(Box::new(tls.into())))
}

/// The connection during login: whole messages at a time, bounded.
struct Link {
    stream: Stream,
    input: BytesMut,
    output: BytesMut,
}

impl Link {
    async fn send(&mut self) -> Result<(), ConnectError> {
        self.stream.write_all(&self.output).await?;
        self.stream.flush().await?;
        self.output.clear();
        Ok(())
    }

    /// The next message that is not a notice; an ErrorResponse is an `Err`.
    async fn next(&mut self) -> Result<(u8, Bytes), ConnectError> {
        loop {
            if let Some(header) = frame::server_header(&self.input)? {
                if header.body > MAX_LOGIN_MESSAGE {
                    return Err(ConnectError::Protocol("a message that is too long"));
                }
                if self.input.len() >= header.total() {
                    let body = self.input.split_to(header.total()).freeze().slice(HEADER..);
                    match header.tag {
                        backend::ERROR_RESPONSE => return Err(ConnectError::Refused(body)),
                        backend::NOTICE_RESPONSE => continue,
                        tag => return Ok((tag, body)),
                    }
                }
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(ConnectError::Closed);
            }
        }
    }

    async fn authentication(&mut self) -> Result<Bytes, ConnectError> {
        match self.next().await? {
            (backend::AUTHENTICATION, body) => Ok(body),
            (backend::NEGOTIATE_PROTOCOL_VERSION, _) => Err(ConnectError::Protocol("a protocol negotiation")),
            _ => Err(ConnectError::Protocol("something else than an authentication request")),
        }
    }

    /// For channel binding.
    fn end_point(&self) -> Option<Vec<u8>> {
        match &self.stream {
            Stream::Tls(tls) => match tls.as_ref() {
                tokio_rustls::TlsStream::Client(client) => tls::peer_end_point(client),
                tokio_rustls::TlsStream::Server(_) => None,
            },
            Stream::Tcp(_) | Stream::Unix(_) => None,
        }
    }
}

async fn authenticate(link: &mut Link, login: &Login) -> Result<(), ConnectError> {
    let request = link.authentication().await?;
    match Authentication::read(&request).ok_or(ConnectError::Protocol("a malformed authentication request"))? {
        Authentication::Ok => return Ok(()),
        Authentication::Cleartext => {
            let Credentials::Password(password) = &login.credentials else {
                return Err(ConnectError::Credentials("a cleartext password", "a plain password in the settings"));
            };
            // Over plaintext TCP a password in the clear is anybody's.
            if matches!(link.stream, Stream::Tcp(_)) {
                return Err(ConnectError::Credentials(
                    "a cleartext password without TLS",
                    "TLS to the server (tls.mode)",
                ));
            }
            message::write_password(&mut link.output, password.as_bytes())?;
        }
        Authentication::Md5(salt) => {
            let response = match &login.credentials {
                Credentials::Password(p) => Some(scram::md5_password(login.role.as_bytes(), p.as_bytes(), salt)),
                Credentials::Md5(stored) => scram::md5_from_stored(stored, salt),
                Credentials::None | Credentials::ScramKeys { .. } => None,
            };
            let needs = ConnectError::Credentials("an md5 password", "a plain or md5 password in the settings");
            message::write_password(&mut link.output, response.ok_or(needs)?.as_bytes())?;
        }
        Authentication::Sasl(mechanisms) => {
            let binding = binding(link, &mechanisms)?;
            scram_exchange(link, login, binding).await?;
        }
        Authentication::SaslContinue(_) | Authentication::SaslFinal(_) => {
            return Err(ConnectError::Protocol("a SASL step out of order"));
        }
        Authentication::Other(_) => {
            return Err(ConnectError::Credentials("a method other than password or SCRAM", "another pg_hba.conf line"));
        }
    }
    if !link.output.is_empty() {
        link.send().await?;
    }
    match Authentication::read(&link.authentication().await?) {
        Some(Authentication::Ok) => Ok(()),
        _ => Err(ConnectError::Protocol("no AuthenticationOk")),
    }
}

fn binding(link: &Link, mechanisms: &[&str]) -> Result<ClientBinding, ConnectError> {
    let offered = |name| mechanisms.contains(&name);
    match link.end_point() {
        Some(hash) if offered(sasl::SCRAM_SHA_256_PLUS) => Ok(ClientBinding::EndPoint(hash)),
        Some(_) if offered(sasl::SCRAM_SHA_256) => Ok(ClientBinding::NotOffered),
        None if offered(sasl::SCRAM_SHA_256) => Ok(ClientBinding::Unsupported),
        _ => Err(ConnectError::Credentials("a SASL mechanism other than SCRAM-SHA-256", "another pg_hba.conf line")),
    }
}

async fn scram_exchange(link: &mut Link, login: &Login, binding: ClientBinding) -> Result<(), ConnectError> {
    let secret = login.credentials.scram();
    let secret = secret.ok_or(ConnectError::Credentials(
        "SCRAM",
        "a plain password in the settings, or a client that logged in with SCRAM since the start",
    ))?;
    let mut exchange = ClientExchange::new(secret, scram::encode_nonce(&rand::random()), binding);
    let (mechanism, first) = exchange.first();
    sasl::write_initial_response(&mut link.output, mechanism, &first)?;
    link.send().await?;
    let challenge = link.authentication().await?;
    let Some(Authentication::SaslContinue(data)) = Authentication::read(&challenge) else {
        return Err(ConnectError::Protocol("no SASL challenge"));
    };
    exchange.read_server_first(data)?;
    // PBKDF2 is milliseconds of CPU: not on a thread that serves queries.
    let worked = tokio::task::spawn_blocking(move || exchange.client_final().map(|proof| (exchange, proof))).await;
    let (mut exchange, proof) = worked.map_err(|_| ConnectError::Closed)??;
    sasl::write_response(&mut link.output, &proof)?;
    link.send().await?;
    let last = link.authentication().await?;
    let Some(Authentication::SaslFinal(data)) = Authentication::read(&last) else {
        return Err(ConnectError::Protocol("no SASL outcome"));
    };
    Ok(exchange.verify_server_final(data)?)
}

/// From AuthenticationOk to the first ReadyForQuery.
async fn greet(link: &mut Link) -> Result<(CancelKey, Vec<(String, String)>), ConnectError> {
    let mut key = None;
    let mut baseline = Vec::new();
    loop {
        match link.next().await? {
            (backend::PARAMETER_STATUS, body) => {
                let pair = message::read_parameter_status(&body);
                let (name, value) = pair.ok_or(ConnectError::Protocol("a malformed ParameterStatus"))?;
                baseline.push((name.to_owned(), value.to_owned()));
            }
            (backend::BACKEND_KEY_DATA, body) => key = message::read_backend_key_data(&body),
            (backend::READY_FOR_QUERY, body) if body.as_ref() == b"I" => break,
            _ => return Err(ConnectError::Protocol("an unexpected message after authentication")),
        }
    }
    let key = key.ok_or(ConnectError::Protocol("no BackendKeyData"))?;
    Ok((key, baseline))
}

/// What room the server has for connections. Everybody may ask this; `reserved_connections` is there since PostgreSQL 16.
/// A process without a database (the checkpointer) is no connection. Autovacuum and parallel workers have one and count too,
/// though they take none of these slots: what kind a process is, is not shown to everybody, and a cap that is a few too low
/// for five seconds does no harm. No operator: a tenant's own could stand in its way.
macro_rules! room_columns {
    () => {
        "pg_catalog.current_setting('max_connections'), \
         pg_catalog.current_setting('superuser_reserved_connections'), \
         pg_catalog.current_setting('reserved_connections', true), \
         (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_get_activity(NULL) WHERE datid IS NOT NULL)"
    };
}

const ROOM_COLUMNS: usize = 4;

/// Asked on connections that are open already.
pub const ROOM: &str = concat!("SELECT ", room_columns!());
/// `session_user`, not `current_user`: a role may begin its sessions as another one (`ALTER ROLE ... SET role`), which the
/// last column tells.
const PLACE_AND_ROOM: &str =
    concat!("SELECT pg_catalog.current_database(), session_user, ", room_columns!(), ", current_user");

/// Asks the server where we are: a mis-route must be impossible, not improbable. Tells what room the server has, if it can.
async fn prove_place(link: &mut Link, login: &Login) -> Result<Place, ConnectError> {
    message::write_query(&mut link.output, PLACE_AND_ROOM)?;
    link.send().await?;
    let mut place = None;
    loop {
        match link.next().await? {
            (backend::DATA_ROW, body) => place = Some(body),
            (backend::READY_FOR_QUERY, _) => break,
            _ => {}
        }
    }
    let body = place.ok_or(ConnectError::Protocol("no answer to where we are"))?;
    let row = message::read_data_row(&body).unwrap_or_default();
    let expected = [login.database.as_bytes(), login.role.as_bytes()];
    if row.iter().copied().take(expected.len()).eq(expected.map(Some)) {
        let now = row.get(expected.len() + ROOM_COLUMNS).copied().flatten();
        let begins_as_another = now.is_some_and(|now| now != login.role.as_bytes());
        return Ok(Place { room: room(row.get(expected.len()..).unwrap_or_default()), begins_as_another });
    }
    let show = |words: &[&[u8]]| {
        words.iter().map(|w| String::from_utf8_lossy(w).into_owned()).collect::<Vec<_>>().join(" as ")
    };
    let found: Vec<&[u8]> = row.iter().take(expected.len()).map(|v| v.unwrap_or_default()).collect();
    Err(ConnectError::WrongPlace { expected: show(&expected), found: show(&found) })
}

/// Reads the columns of `ROOM`; `None` if PostgreSQL did not tell.
pub fn room(row: &[Option<&[u8]>]) -> Option<Room> {
    let number = |n: usize| std::str::from_utf8((*row.get(n)?)?).ok()?.parse::<u32>().ok();
    let reserved = number(1)?.saturating_add(number(2).unwrap_or(0));
    Some(Room { slots: number(0)?.saturating_sub(reserved), connections: number(3)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_after_the_login_says_nothing_of_the_whole_server() {
        let refused = |code: &str| {
            let mut body = BytesMut::new();
            for (field, value) in [('S', "FATAL"), ('C', code), ('M', "m")] {
                body.extend_from_slice(format!("{field}{value}\0").as_bytes());
            }
            body.extend_from_slice(b"\0");
            ConnectError::Refused(body.freeze())
        };
        let reset = || ConnectError::Unreachable(io::ErrorKind::ConnectionReset.into());
        for own in [refused("57P01"), ConnectError::Closed, reset()] {
            assert_eq!(own.failure(), DialFailure::ServerDown);
            assert_eq!(own.after_login().failure(), DialFailure::Later);
        }
        assert_eq!(refused("57P03").after_login().failure(), DialFailure::ServerDown);
        assert_eq!(refused("3D000").after_login().failure(), DialFailure::Refused);
    }
}
