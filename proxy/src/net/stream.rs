//! A connection's bytes, whatever carries them: TCP, a Unix socket, TLS over TCP.

use std::{
    io,
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// One of ours to a client or to a server.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<tokio_rustls::TlsStream<TcpStream>>),
}

impl Stream {
    #[must_use]
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(tcp) => Some(tcp),
            Self::Tls(tls) => Some(tls.get_ref().0),
            Self::Unix(_) => None,
        }
    }

    /// Who is at the other end; none for a Unix socket.
    #[must_use]
    pub fn peer(&self) -> Option<IpAddr> {
        self.tcp().and_then(|tcp| tcp.peer_addr().ok()).map(|address| address.ip())
    }

    /// Whether bytes or the end of the stream are waiting in the kernel: one `recv(MSG_PEEK)` that never waits.
    #[must_use]
    pub fn has_input(&self) -> bool {
        let mut one = [std::mem::MaybeUninit::uninit()];
        let peeked = match self {
            Self::Unix(unix) => SockRef::from(unix).peek(&mut one),
            _ => match self.tcp() {
                Some(tcp) => SockRef::from(tcp).peek(&mut one),
                None => return false,
            },
        };
        !matches!(peeked, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
    }

    /// Options of a link to a server or a client: no delay, keepalive, and a limit for data that nobody acknowledges.
    pub fn tune(&self, user_timeout: Option<Duration>) {
        let Some(tcp) = self.tcp() else { return };
        // An option that the platform refuses costs a feature, not the connection.
        let _ = tcp.set_nodelay(true);
        let socket = SockRef::from(tcp);
        if let Some(limit) = user_timeout {
            let third = (limit / 3).max(Duration::from_secs(1));
            let keepalive = socket2::TcpKeepalive::new().with_time(third).with_interval(third).with_retries(2);
            let _ = socket.set_tcp_keepalive(&keepalive);
            let _ = socket.set_tcp_user_timeout(Some(limit));
        } else {
            let _ = socket.set_keepalive(true);
        }
    }

    /// Reads into `buf`, at most once. `Ok(0)` is the end of the stream.
    pub fn poll_read_into(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(buf);
        match Pin::new(self).poll_read(cx, &mut buf) {
            Poll::Ready(Ok(())) => Poll::Ready(Ok(buf.filled().len())),
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(_) | Self::Unix(_) => Poll::Ready(Ok(())),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Self::Unix(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_shutdown(cx),
        }
    }
}

/// Bytes on their way out that the kernel has not taken yet. Empty, and without memory, most of the time.
#[derive(Debug, Default)]
pub struct Outgoing {
    pub buf: BytesMut,
    /// TLS has taken the bytes but not yet written its records.
    flushing: bool,
    /// The kernel took no more at the last try.
    stalled: bool,
}

impl Outgoing {
    /// The kernel took no more at the last try, and will wake us.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Nothing is left to write.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.buf.is_empty() && !self.flushing
    }

    /// Writes what is kept, then `fresh`, as far as the kernel takes it; the rest is copied and kept.
    /// `Ready` when all of it is out, `Pending` (with the waker registered) when not.
    pub fn poll_send(&mut self, stream: &mut Stream, cx: &mut Context<'_>, mut fresh: &[u8]) -> Poll<io::Result<()>> {
        if !self.buf.is_empty() {
            self.buf.extend_from_slice(fresh);
            fresh = &[];
        }
        self.stalled = false;
        loop {
            let bytes = if self.buf.is_empty() { fresh } else { &self.buf };
            if bytes.is_empty() {
                break;
            }
            match Pin::new(&mut *stream).poll_write(cx, bytes) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => {
                    self.flushing = stream.is_tls();
                    if self.buf.is_empty() {
                        fresh = fresh.get(n..).unwrap_or_default();
                    } else {
                        self.buf.advance(n);
                    }
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => {
                    if self.buf.is_empty() {
                        self.buf.extend_from_slice(fresh);
                    }
                    self.stalled = true;
                    return Poll::Pending;
                }
            }
        }
        // What is rare keeps no memory: an idle client owns no buffer. (A buffer that was read to its end has no capacity, and
        // its memory all the same.)
        self.buf = BytesMut::new();
        if self.flushing {
            match Pin::new(stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.flushing = false,
                other => {
                    self.stalled = other.is_pending();
                    return other;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}
