//! A client that says exactly the bytes it is told to, and reads messages with a deadline.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use rustls::pki_types::ServerName;
use tenantry_wire::{
    sasl::{self, Authentication},
    scram::{self, ClientBinding, ClientExchange, ClientSecret},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::client::TlsStream;
use zeroize::Zeroizing;

use crate::{
    answer::{Answer, Message},
    postgres::Tenant,
    say, tls,
    wait::{DEADLINE, within},
};

/// Where to connect.
#[derive(Debug, Clone)]
pub enum Endpoint {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// How the link is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    Plain,
    /// SSLRequest first.
    Tls,
    /// The handshake first.
    DirectTls,
}

/// How to connect and log in.
#[derive(Debug, Clone)]
pub struct Connect {
    pub endpoint: Endpoint,
    pub protection: Protection,
    pub minor: u16,
    pub user: String,
    pub database: String,
    pub password: String,
    pub parameters: Vec<(String, String)>,
}

impl Connect {
    pub fn new(endpoint: Endpoint, tenant: &Tenant, database: &str) -> Self {
        Self {
            endpoint,
            protection: Protection::Plain,
            minor: 0,
            user: tenant.role.clone(),
            database: database.to_owned(),
            password: tenant.password.clone(),
            parameters: Vec::new(),
        }
    }

    #[must_use]
    pub fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.user);
        self
    }

    #[must_use]
    pub fn database(mut self, database: &str) -> Self {
        database.clone_into(&mut self.database);
        self
    }

    #[must_use]
    pub fn password(mut self, password: &str) -> Self {
        password.clone_into(&mut self.password);
        self
    }

    #[must_use]
    pub fn parameter(mut self, name: &str, value: &str) -> Self {
        self.parameters.push((name.to_owned(), value.to_owned()));
        self
    }

    #[must_use]
    pub fn minor(mut self, minor: u16) -> Self {
        self.minor = minor;
        self
    }

    #[must_use]
    pub fn protection(mut self, protection: Protection) -> Self {
        self.protection = protection;
        self
    }

    /// Connected and protected, nothing said yet.
    pub async fn open(&self) -> io::Result<Client> {
        let stream = match &self.endpoint {
            Endpoint::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
            Endpoint::Tcp(address) => {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                self.protect(tcp).await?
            }
        };
        Ok(Client {
            stream,
            input: BytesMut::new(),
            deadline: DEADLINE,
            parameters: BTreeMap::new(),
            key: None,
            minor: self.minor,
        })
    }

    async fn protect(&self, mut tcp: TcpStream) -> io::Result<Stream> {
        if self.protection == Protection::Plain {
            return Ok(Stream::Tcp(tcp));
        }
        if self.protection == Protection::Tls {
            tcp.write_all(&say::packet(say::SSL_REQUEST, b"")).await?;
            let answer = tcp.read_u8().await?;
            if answer != b'S' {
                return Err(io::Error::other(format!("TLS refused with {:?}", char::from(answer))));
            }
        }
        let name = ServerName::try_from("localhost").expect("a name");
        let connector = tls::connector(self.protection == Protection::DirectTls);
        Ok(Stream::Tls(Box::new(connector.connect(name, tcp).await?)))
    }

    /// Logs in; `Err` has what came in place of the first ReadyForQuery.
    pub async fn try_login(&self) -> Result<Client, Answer> {
        let Ok(mut client) = self.open().await else { return Err(Answer { messages: vec![], closed: true }) };
        match client.login(self).await {
            answer if answer.status().is_some() => Ok(client),
            answer => Err(answer),
        }
    }

    /// Logs in.
    #[track_caller]
    pub fn login(&self) -> impl Future<Output = Client> + '_ {
        let place = std::panic::Location::caller();
        async move {
            match self.try_login().await {
                Ok(client) => client,
                Err(answer) => panic!("{place}: login refused: {:#?}", answer.trace()),
            }
        }
    }
}

/// A connection.
pub struct Client {
    stream: Stream,
    input: BytesMut,
    /// Longest wait for one message.
    pub deadline: Duration,
    /// What the server reported last.
    pub parameters: BTreeMap<String, String>,
    /// Process and secret of BackendKeyData.
    pub key: Option<(u32, Vec<u8>)>,
    minor: u16,
}

impl Client {
    /// Says who it is and answers whatever it is asked, up to ReadyForQuery or the end.
    pub async fn login(&mut self, who: &Connect) -> Answer {
        let mut parameters = vec![("user", who.user.as_str()), ("database", who.database.as_str())];
        parameters.extend(who.parameters.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        self.send(&say::startup(self.minor, &parameters)).await;
        self.authenticate(&who.user, &who.password).await
    }

    /// Everything after the startup packet.
    pub async fn authenticate(&mut self, user: &str, password: &str) -> Answer {
        let mut exchange = None;
        let mut answer = Answer::default();
        while let Some(message) = self.next().await {
            if message.tag == b'R' {
                let reply = respond(&message.body, user, password, &mut exchange);
                self.send(&reply).await;
            }
            let done = message.tag == b'Z';
            answer.messages.push(message);
            if done {
                return answer;
            }
        }
        answer.closed = true;
        answer
    }

    /// Writes; a peer that is gone shows when reading.
    pub async fn send(&mut self, bytes: &[u8]) {
        let write = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        let _ = within("writing", self.deadline, write).await;
    }

    /// Each byte in a packet of its own, as far as TCP_NODELAY grants it.
    pub async fn send_bytewise(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.send(&[*byte]).await;
            tokio::task::yield_now().await;
        }
    }

    /// The next message; `None` at the end of the connection.
    pub async fn next(&mut self) -> Option<Message> {
        match tokio::time::timeout(self.deadline, self.read_message()).await {
            Ok(message) => message,
            Err(_) => panic!("no message within {:?}; so far of one: {:?}", self.deadline, self.input),
        }
    }

    /// The next message if it comes within `limit`; the connection's end panics.
    pub async fn next_within(&mut self, limit: Duration) -> Option<Message> {
        match tokio::time::timeout(limit, self.read_message()).await {
            Ok(Some(message)) => Some(message),
            Ok(None) => panic!("the connection ended"),
            Err(_) => None,
        }
    }

    async fn read_message(&mut self) -> Option<Message> {
        loop {
            if let Some((&head, _)) = self.input.split_first_chunk::<5>() {
                let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                assert!(length >= 4, "a message of length {length}");
                if self.input.len() > length {
                    let body = self.input.split_to(length + 1).freeze().slice(5..);
                    let message = Message { tag: head[0], body };
                    self.note(&message);
                    return Some(message);
                }
            }
            match self.stream.read_buf(&mut self.input).await {
                Ok(0) => {
                    assert!(self.input.is_empty(), "an orderly end inside a message: {:?}", self.input);
                    return None;
                }
                Ok(_) => {}
                // A reset may cut a message.
                Err(_) => return None,
            }
        }
    }

    /// A single byte that is no message, as the answer to SSLRequest.
    pub async fn byte(&mut self) -> Option<u8> {
        if self.input.is_empty() {
            let read = within("a byte", self.deadline, self.stream.read_buf(&mut self.input)).await;
            if !matches!(read, Ok(n) if n > 0) {
                return None;
            }
        }
        Some(self.input.split_to(1)[0])
    }

    fn note(&mut self, message: &Message) {
        match message.tag {
            b'S' => {
                let words = message.words(0);
                self.parameters.insert(words[0].clone(), words.get(1).cloned().unwrap_or_default());
            }
            b'K' => {
                let (process, secret) = message.body.split_first_chunk::<4>().expect("a process id");
                self.key = Some((u32::from_be_bytes(*process), secret.to_vec()));
            }
            _ => {}
        }
    }

    /// Up to and including the first message with `tag`, or to the end.
    pub async fn until(&mut self, tag: u8) -> Answer {
        let mut answer = Answer::default();
        while let Some(message) = self.next().await {
            let done = message.tag == tag;
            answer.messages.push(message);
            if done {
                return answer;
            }
        }
        answer.closed = true;
        answer
    }

    pub async fn until_ready(&mut self) -> Answer {
        self.until(b'Z').await
    }

    /// Everything up to the connection's end.
    pub async fn until_end(&mut self) -> Answer {
        self.until(0).await
    }

    /// Sends and reads up to ReadyForQuery.
    pub async fn ask(&mut self, bytes: &[u8]) -> Answer {
        self.send(bytes).await;
        self.until_ready().await
    }

    /// A simple query.
    pub async fn query(&mut self, sql: &str) -> Answer {
        self.ask(&say::query(sql)).await
    }

    /// A simple query that must succeed and give one value.
    #[track_caller]
    pub fn value<'a>(&'a mut self, sql: &'a str) -> impl Future<Output = String> + 'a {
        let place = std::panic::Location::caller();
        async move {
            let answer = self.query(sql).await;
            match (answer.faults().is_empty(), answer.rows().as_slice()) {
                (true, [row]) if row.len() == 1 => row[0].clone().unwrap_or_else(|| "NULL".to_owned()),
                _ => panic!("{place}: {sql}: {:#?}", answer.trace()),
            }
        }
    }

    /// A simple query that must succeed.
    #[track_caller]
    pub fn run<'a>(&'a mut self, sql: &'a str) -> impl Future<Output = Answer> + 'a {
        let place = std::panic::Location::caller();
        async move {
            let answer = self.query(sql).await;
            assert!(answer.faults().is_empty() && !answer.closed, "{place}: {sql}: {:#?}", answer.trace());
            answer
        }
    }

    /// Makes the view `on_server`: the statements of the server connection as they are. A client that asks
    /// `pg_prepared_statements` itself is shown its own.
    pub async fn make_on_server(&mut self) {
        self.run("CREATE OR REPLACE VIEW on_server AS SELECT * FROM pg_prepared_statements").await;
    }

    /// The id of the server process that answers.
    pub async fn backend(&mut self) -> i32 {
        self.value("SELECT pg_backend_pid()").await.parse().expect("a pid")
    }

    /// Says no more, but goes on reading.
    pub async fn half_close(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    /// Gone without a word: RST.
    pub fn vanish(self) {
        let linger = |tcp: &TcpStream| socket2::SockRef::from(tcp).set_linger(Some(Duration::ZERO));
        match &self.stream {
            Stream::Tcp(tcp) => linger(tcp).expect("SO_LINGER"),
            Stream::Tls(tls) => linger(tls.get_ref().0).expect("SO_LINGER"),
            Stream::Unix(_) => {}
        }
    }

    /// Terminate, then close.
    pub async fn leave(mut self) {
        self.send(&say::terminate()).await;
    }

    /// The CancelRequest that fits this session.
    pub fn cancel_request(&self) -> Vec<u8> {
        let (process, secret) = self.key.as_ref().expect("BackendKeyData came");
        say::cancel(*process, secret)
    }
}

/// Sends a CancelRequest on its own connection and waits until that is closed, without a byte in answer.
pub async fn send_cancel(endpoint: &Endpoint, request: &[u8]) {
    let silence = async {
        let mut rest = Vec::new();
        match endpoint {
            Endpoint::Tcp(address) => {
                let mut stream = TcpStream::connect(address).await?;
                stream.write_all(request).await?;
                stream.read_to_end(&mut rest).await?;
            }
            Endpoint::Unix(path) => {
                let mut stream = UnixStream::connect(path).await?;
                stream.write_all(request).await?;
                stream.read_to_end(&mut rest).await?;
            }
        }
        Ok::<_, io::Error>(rest)
    };
    // A reset is an end as well.
    let rest = within("the end of a cancel connection", DEADLINE, silence).await.unwrap_or_default();
    assert!(rest.is_empty(), "a cancel request was answered: {rest:?}");
}

fn respond(body: &[u8], user: &str, password: &str, exchange: &mut Option<ClientExchange>) -> Vec<u8> {
    let mut out = BytesMut::new();
    match Authentication::read(body).expect("an authentication request") {
        Authentication::Ok => {}
        Authentication::Cleartext => out.extend(say::message(b'p', &[password.as_bytes(), &[0]].concat())),
        Authentication::Md5(salt) => {
            let hash = scram::md5_password(user.as_bytes(), password.as_bytes(), salt);
            out.extend(say::message(b'p', &[hash.as_bytes(), &[0]].concat()));
        }
        Authentication::Sasl(mechanisms) => {
            assert!(mechanisms.contains(&sasl::SCRAM_SHA_256), "{mechanisms:?}");
            let secret = ClientSecret::Password(Zeroizing::new(password.as_bytes().to_vec()));
            let new = ClientExchange::new(secret, scram::encode_nonce(&rand::random()), ClientBinding::Unsupported);
            let (mechanism, first) = new.first();
            sasl::write_initial_response(&mut out, mechanism, &first).expect("short");
            *exchange = Some(new);
        }
        Authentication::SaslContinue(data) => {
            let exchange = exchange.as_mut().expect("SASL began");
            exchange.read_server_first(data).expect("a good challenge");
            sasl::write_response(&mut out, &exchange.client_final().expect("a proof")).expect("short");
        }
        Authentication::SaslFinal(data) => {
            exchange.as_mut().expect("SASL began").verify_server_final(data).expect("the server knows the verifier");
        }
        Authentication::Other(kind) => panic!("authentication method {kind}"),
    }
    out.to_vec()
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_flush(cx),
            Self::Unix(s) => Pin::new(s).poll_flush(cx),
            Self::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Self::Unix(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
