//! The listeners: TCP and a Unix socket.
//!
//! An accept that fails never ends the process and never spins: when file descriptors run out, a spare one serves to
//! accept, refuse and close, and accepting pauses.

use std::{fs::File, io, net::SocketAddr, os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::net::{TcpListener, TcpSocket, UnixListener};

use crate::{
    directory::{Directory, StartError},
    net::{is_out_of_descriptors, stream::Stream},
    session::{errors, hello},
};

const BACKLOG: u32 = 1024;
/// After a failed accept, this long until the next.
const PAUSE: Duration = Duration::from_millis(10);
/// A failing accept is logged once in so many pauses.
const LOG_EVERY: u32 = 500;

/// A bound socket.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

pub(crate) fn tcp(address: SocketAddr) -> Result<Listener, StartError> {
    let bind = || -> io::Result<TcpListener> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bind().map(Listener::Tcp).map_err(|source| StartError::Listen { place: address.to_string(), source })
}

pub(crate) fn unix(path: &PathBuf, mode: u32) -> Result<Listener, StartError> {
    let bind = || -> io::Result<UnixListener> {
        // A socket that nobody answers is left from a process that died; one that answers is somebody else's.
        if path.exists() {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        Ok(listener)
    };
    bind().map(Listener::Unix).map_err(|source| StartError::Listen { place: path.display().to_string(), source })
}

impl Listener {
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(tcp) => tcp.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    async fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Tcp(tcp) => Stream::Tcp(tcp.accept().await?.0),
            Self::Unix(unix) => Stream::Unix(unix.accept().await?.0),
        })
    }
}

/// Accepts until the directory stops.
pub(crate) async fn run(listener: Listener, directory: Arc<Directory>) {
    let mut spare = File::open("/dev/null").ok();
    let mut failures = 0u32;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = directory.stopped() => return,
        };
        match accepted {
            Ok(stream) => {
                failures = 0;
                admit(&directory, stream);
            }
            Err(error) => {
                if failures.is_multiple_of(LOG_EVERY) {
                    tracing::error!(%error, "cannot accept connections; pausing");
                }
                failures = failures.wrapping_add(1);
                if is_out_of_descriptors(&error) && spare.take().is_some() {
                    refuse_one(&listener).await;
                }
                spare = spare.or_else(|| File::open("/dev/null").ok());
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn admit(directory: &Arc<Directory>, stream: Stream) {
    stream.tune(None);
    let guest = directory.receive(stream.peer());
    let work = hello::serve(Arc::clone(directory), stream, guest);
    directory.spawn(work);
}

/// With the spare descriptor free, tells the next client why it cannot be served.
async fn refuse_one(listener: &Listener) {
    let Ok(Ok(mut stream)) = tokio::time::timeout(PAUSE, listener.accept()).await else { return };
    let mut out = BytesMut::new();
    errors::too_many_clients("file descriptors").write(&mut out);
    let _ = tokio::time::timeout(PAUSE, tokio::io::AsyncWriteExt::write_all(&mut stream, &out)).await;
}
