//! The first packets of a connection: TLS or not, cancel or startup, then login and welcome, all under one deadline.
//!
//! Nothing a peer sends here is believed or costs more than its own connection: sizes are bounded by `startup`, requests
//! for encryption are counted, and no tenant is charged, nor is it counted as a client, before it has proved who it is.

use std::sync::Arc;

use bytes::BytesMut;
use tenantry_config::ClientTlsMode;
use tenantry_wire::{
    error::ErrorResponse,
    startup::{self, First, Startup, TLS_HANDSHAKE},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

use super::{errors, lobby::Guest, login, relay::Session, welcome};
use crate::{
    directory::Directory,
    net::{stream::Stream, tls},
};

/// A connection during login.
pub(super) struct Greeting {
    pub stream: Stream,
    pub input: BytesMut,
    pub output: BytesMut,
    /// Hash of the certificate that the client saw, for SCRAM-SHA-256-PLUS.
    pub end_point: Option<Arc<[u8]>>,
    /// When the login must be over.
    pub deadline: Instant,
    /// Until it has proved who it is.
    guest: Option<Guest>,
}

/// Why a login ended before a session began.
#[derive(Debug)]
pub(super) enum Refused {
    /// Closed without a word.
    Silently,
    Saying(ErrorResponse),
}

impl From<std::io::Error> for Refused {
    fn from(_: std::io::Error) -> Self {
        Self::Silently
    }
}

impl From<ErrorResponse> for Refused {
    fn from(error: ErrorResponse) -> Self {
        Self::Saying(errors::fatal(error))
    }
}

impl Greeting {
    pub(super) async fn send(&mut self) -> Result<(), Refused> {
        self.stream.write_all(&self.output).await?;
        self.stream.flush().await?;
        self.output.clear();
        Ok(())
    }

    pub(super) async fn receive(&mut self) -> Result<(), Refused> {
        if self.stream.read_buf(&mut self.input).await? == 0 {
            return Err(Refused::Silently);
        }
        self.spoke();
        Ok(())
    }

    fn spoke(&mut self) {
        if let Some(guest) = &mut self.guest {
            guest.spoke();
        }
    }
}

/// Serves one accepted connection up to the end of its login; a session that begins gets a task of its own, so that the
/// memory of the login goes with the login.
pub async fn serve(directory: Arc<Directory>, stream: Stream, guest: Guest) {
    let deadline = Instant::now() + directory.settings().listen.client_login_timeout;
    let (input, output, told_to_go) = (BytesMut::new(), BytesMut::new(), guest.told_to_go());
    let mut greeting = Greeting { stream, input, output, end_point: None, deadline, guest: Some(guest) };
    let outcome = tokio::select! {
        biased;
        outcome = tokio::time::timeout_at(deadline, greet(&directory, &mut greeting)) => outcome,
        () = told_to_go.notified() => {
            directory.count_refusal(&errors::too_many_logins());
            return;
        }
    };
    match outcome {
        Ok(Ok(Some(ready))) => {
            let Greeting { stream, input, .. } = greeting;
            begin(&directory, stream, input, ready);
        }
        Ok(Ok(None) | Err(Refused::Silently)) | Err(_) => {}
        Ok(Err(Refused::Saying(error))) => {
            directory.count_refusal(&error);
            error.write(&mut greeting.output);
            // A client that does not read its refusal does not get it.
            let goodbye = async {
                greeting.send().await.ok();
                greeting.stream.shutdown().await.ok();
            };
            let _ = tokio::time::timeout(std::time::Duration::from_secs(1), goodbye).await;
        }
    }
}

fn begin(directory: &Arc<Directory>, stream: Stream, input: BytesMut, ready: welcome::Ready) {
    let limits = directory.limits();
    let welcome::Ready { registered, pool, mode, settings, guards } = ready;
    let mut session = Session::new(stream, registered, pool, mode, settings, limits);
    if !input.is_empty() {
        session.input = input;
    }
    directory.spawn(async move {
        let _counted = guards;
        session.run().await;
    });
}

/// `None`: there is nothing more to do (a cancel request).
async fn greet(directory: &Arc<Directory>, greeting: &mut Greeting) -> Result<Option<welcome::Ready>, Refused> {
    direct_tls(directory, greeting).await?;
    let mut asked_tls = greeting.stream.is_tls();
    let mut asked_gss = greeting.stream.is_tls();
    let startup = loop {
        match first(greeting).await? {
            First::CancelRequest(key) => {
                directory.registry().cancel(&key);
                return Ok(None);
            }
            First::SslRequest if asked_tls => return Err(errors::unsupported_protocol_code("1234.5679").into()),
            First::GssEncRequest if asked_gss => return Err(errors::unsupported_protocol_code("1234.5680").into()),
            First::SslRequest => {
                asked_tls = true;
                answer_tls(directory, greeting).await?;
                asked_gss |= greeting.stream.is_tls();
            }
            First::GssEncRequest => {
                asked_gss = true;
                refuse_leftover(greeting, "GSSAPI encryption")?;
                greeting.output.extend_from_slice(b"N");
                greeting.send().await?;
            }
            First::Startup(startup) => break startup,
        }
    };
    admit(directory, greeting, startup).await.map(Some)
}

async fn admit(
    directory: &Arc<Directory>,
    greeting: &mut Greeting,
    startup: Startup,
) -> Result<welcome::Ready, Refused> {
    if startup.needs_negotiation() {
        startup.write_negotiation(&mut greeting.output);
    }
    if matches!(greeting.stream, Stream::Tcp(_)) && directory.settings().listen.tls.mode == ClientTlsMode::Require {
        return Err(errors::tls_required().into());
    }
    directory.admits_another()?;
    let admitted = login::prove(directory, greeting, &startup).await?;
    let client = directory.client_guard()?;
    greeting.guest = None;
    welcome::welcome(directory, greeting, &startup, admitted, client).await
}

/// Reads one packet of the start.
async fn first(greeting: &mut Greeting) -> Result<First, Refused> {
    loop {
        match startup::decode(&greeting.input) {
            Ok(Some((first, length))) => {
                bytes::Buf::advance(&mut greeting.input, length);
                return Ok(first);
            }
            Ok(None) => greeting.receive().await?,
            Err(error) => return Err(errors::startup(&error).map_or(Refused::Silently, Refused::Saying)),
        }
    }
}

/// Bytes that came before our answer were sent in the clear, and must never be taken for encrypted ones.
fn refuse_leftover(greeting: &Greeting, request: &str) -> Result<(), Refused> {
    if greeting.input.is_empty() { Ok(()) } else { Err(errors::plaintext_after(request).into()) }
}

async fn answer_tls(directory: &Directory, greeting: &mut Greeting) -> Result<(), Refused> {
    refuse_leftover(greeting, "SSL")?;
    let tcp = matches!(greeting.stream, Stream::Tcp(_));
    let Some(acceptor) = directory.acceptor().filter(|_| tcp) else {
        greeting.output.extend_from_slice(b"N");
        return greeting.send().await;
    };
    greeting.output.extend_from_slice(b"S");
    greeting.send().await?;
    handshake(&acceptor, greeting, false).await
}

/// A client that begins with a TLS handshake (`sslnegotiation=direct`).
async fn direct_tls(directory: &Directory, greeting: &mut Greeting) -> Result<(), Refused> {
    let Stream::Tcp(tcp) = &greeting.stream else { return Ok(()) };
    if !begins_with_tls(tcp).await? {
        return Ok(());
    }
    greeting.spoke();
    let acceptor = directory.acceptor().ok_or(Refused::Silently)?;
    handshake(&acceptor, greeting, true).await
}

async fn begins_with_tls(tcp: &TcpStream) -> Result<bool, Refused> {
    let mut byte = [0u8; 1];
    Ok(tcp.peek(&mut byte).await? == 1 && byte == [TLS_HANDSHAKE])
}

async fn handshake(acceptor: &tls::Acceptor, greeting: &mut Greeting, direct: bool) -> Result<(), Refused> {
    // The stream changes its type: it is taken out and put back encrypted, or lost with the connection.
    let (placeholder, _) = tokio::net::UnixStream::pair()?;
    let Stream::Tcp(tcp) = std::mem::replace(&mut greeting.stream, Stream::Unix(placeholder)) else {
        return Err(Refused::Silently);
    };
    let (encrypted, end_point) = acceptor.accept(tcp).await?;
    if direct && !tls::client_agreed_on_alpn(&encrypted) {
        return Err(Refused::Silently);
    }
    greeting.stream = Stream::Tls(Box::new(encrypted.into()));
    greeting.end_point = end_point;
    Ok(())
}
