//! A PostgreSQL that says what a real one cannot be made to say.
//!
//! A script is an async function of one connection. Cancel requests are counted and answered by closing.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::{BufMut, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{answer::Message, postgres::Tenant, say};

/// Listens until dropped.
pub struct FakeServer {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    cancels: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

/// One connection, after its startup packet was read.
pub struct FakeConn {
    stream: TcpStream,
    input: BytesMut,
    /// 0 for the first connection.
    pub number: usize,
    pub user: String,
    pub database: String,
}

impl FakeServer {
    /// Runs `script` for every connection; when it returns, the connection is closed.
    pub async fn start<F, Fut>(script: F) -> Self
    where
        F: Fn(FakeConn) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (accepted, cancels) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (script, logins, canceled) = (Arc::new(script), Arc::clone(&accepted), Arc::clone(&cancels));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, logins, canceled) = (Arc::clone(&script), Arc::clone(&logins), Arc::clone(&canceled));
                tokio::spawn(async move {
                    match FakeConn::greet(stream, &logins).await {
                        Some(conn) => script(conn).await,
                        None => {
                            canceled.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        Self { address, accepted, cancels, task }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections that sent a startup packet.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    pub fn cancels(&self) -> usize {
        self.cancels.load(Ordering::Relaxed)
    }

    /// A tenant that exists nowhere else.
    pub fn tenant() -> Tenant {
        Tenant { name: "fake".to_owned(), role: "fake_owner".to_owned(), password: "secret-of-the-fake".to_owned() }
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeConn {
    /// Reads up to the startup packet; `None` for a cancel request or silence.
    async fn greet(mut stream: TcpStream, logins: &AtomicUsize) -> Option<Self> {
        loop {
            let length = stream.read_u32().await.ok()?;
            let mut body = vec![0; usize::try_from(length).ok()?.checked_sub(4)?];
            stream.read_exact(&mut body).await.ok()?;
            match u32::from_be_bytes(*body.first_chunk::<4>()?) {
                say::SSL_REQUEST | say::GSSENC_REQUEST => stream.write_all(b"N").await.ok()?,
                say::CANCEL_REQUEST => return None,
                _ => {
                    let number = logins.fetch_add(1, Ordering::Relaxed);
                    let words: Vec<&[u8]> = body[4..].split(|b| *b == 0).collect();
                    let find = |name: &str| {
                        let pair = words.chunks(2).find(|pair| pair[0] == name.as_bytes());
                        pair.map(|pair| String::from_utf8_lossy(pair[1]).into_owned()).unwrap_or_default()
                    };
                    let (user, database) = (find("user"), find("database"));
                    return Some(Self { stream, input: BytesMut::new(), number, user, database });
                }
            }
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// The next message of Tenantry's; `None` at the end.
    pub async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some((&head, _)) = self.input.split_first_chunk::<5>() {
                let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                if self.input.len() > length {
                    return Some(Message { tag: head[0], body: self.input.split_to(length + 1).freeze().slice(5..) });
                }
            }
            if !matches!(self.stream.read_buf(&mut self.input).await, Ok(n) if n > 0) {
                return None;
            }
        }
    }

    /// Reads until the other side closes.
    pub async fn drain(&mut self) {
        while self.next().await.is_some() {}
    }

    /// AuthenticationOk, parameters, key, ReadyForQuery, and the answer to whether this is the right place.
    pub async fn login(&mut self) {
        self.send(&greeting()).await;
    }

    /// The next simple query that is the client's own; what Tenantry asks for itself is answered here.
    pub async fn query(&mut self) -> Option<String> {
        loop {
            let message = self.next().await?;
            if message.tag != b'Q' {
                continue;
            }
            let text = message.words(0).join("");
            if text.contains("current_database()") {
                let place = [self.database.clone(), self.user.clone()];
                let place: Vec<&str> = place.iter().map(String::as_str).collect();
                let place = [&place[..], &["97", "1"]].concat();
                let answer =
                    [columns(&["a", "b", "slots", "connections"]), row(&place), complete("SELECT 1"), ready(b'I')]
                        .concat();
                self.send(&answer).await;
            } else if text.contains("'print'") {
                // Nothing here leaves anything.
                let print = [columns(&["kind", "name", "value"]), row(&["print", "0", ""]), complete("SELECT 1")];
                self.send(&[print.concat(), ready(b'I')].concat()).await;
            } else if text.contains("pg_catalog.") || text.is_empty() {
                self.send(&[complete("SELECT 0"), ready(b'I')].concat()).await;
            } else {
                return Some(text);
            }
        }
    }

    /// Answers everything decently from now on.
    pub async fn behave(&mut self) {
        while let Some(text) = self.query().await {
            self.send(&[columns(&["text"]), row(&[&text]), complete("SELECT 1"), ready(b'I')].concat()).await;
        }
    }
}

/// From AuthenticationOk to the first ReadyForQuery.
pub fn greeting() -> Vec<u8> {
    let mut out = authentication(0, b"");
    for (name, value) in [
        ("server_version", "16.14"),
        ("server_encoding", "UTF8"),
        ("client_encoding", "UTF8"),
        ("DateStyle", "ISO, MDY"),
        ("TimeZone", "UTC"),
        ("integer_datetimes", "on"),
        ("standard_conforming_strings", "on"),
    ] {
        out.extend(parameter(name, value));
    }
    out.extend(say::message(b'K', &[0, 0, 0, 7, 1, 2, 3, 4]));
    out.extend(ready(b'I'));
    out
}

pub fn authentication(kind: u32, data: &[u8]) -> Vec<u8> {
    say::message(b'R', &[&kind.to_be_bytes()[..], data].concat())
}

pub fn parameter(name: &str, value: &str) -> Vec<u8> {
    say::message(b'S', format!("{name}\0{value}\0").as_bytes())
}

pub fn ready(status: u8) -> Vec<u8> {
    say::message(b'Z', &[status])
}

pub fn complete(tag: &str) -> Vec<u8> {
    say::message(b'C', format!("{tag}\0").as_bytes())
}

pub fn error(severity: &str, code: &str, text: &str) -> Vec<u8> {
    say::message(b'E', format!("S{severity}\0V{severity}\0C{code}\0M{text}\0\0").as_bytes())
}

pub fn notice(severity: &str, code: &str, text: &str) -> Vec<u8> {
    say::message(b'N', format!("S{severity}\0V{severity}\0C{code}\0M{text}\0\0").as_bytes())
}

/// RowDescription of text columns.
pub fn columns(names: &[&str]) -> Vec<u8> {
    let mut body = BytesMut::new();
    body.put_u16(u16::try_from(names.len()).expect("few"));
    for name in names {
        body.put_slice(name.as_bytes());
        body.put_slice(&[0, 0, 0, 0, 0, 0, 0]);
        body.put_u32(25);
        body.put_i16(-1);
        body.put_i32(-1);
        body.put_u16(0);
    }
    say::message(b'T', &body)
}

pub fn row(values: &[&str]) -> Vec<u8> {
    let mut body = BytesMut::new();
    body.put_u16(u16::try_from(values.len()).expect("few"));
    for value in values {
        body.put_u32(u32::try_from(value.len()).expect("short"));
        body.put_slice(value.as_bytes());
    }
    say::message(b'D', &body)
}
