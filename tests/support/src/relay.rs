//! A TCP link that can be made to break, between any two.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
};

/// How bytes pass, from now on, on all connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// Nothing passes and nothing is lost; the sender's buffers fill up.
    Stall,
    /// What comes is thrown away.
    Blackhole,
    /// New connections are reset at once; old ones pass.
    Refuse,
    /// Each read is held this long.
    Delay(Duration),
    /// Every byte on its own.
    Bytewise,
}

/// Listens until dropped.
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    target: SocketAddr,
    mode: watch::Sender<Mode>,
    /// Counted up to end all connections there are.
    cuts: watch::Sender<Cut>,
    /// Bytes from the server after which a connection is reset.
    reset_after: AtomicU64,
    accepted: AtomicUsize,
    turns: Mutex<Turns>,
}

/// What went to the server, apart where the server said something in between.
#[derive(Debug, Default)]
struct Turns {
    sent: Vec<Vec<u8>>,
    answered: bool,
}

impl Turns {
    fn pass(&mut self, up: bool, bytes: &[u8]) {
        if !up {
            self.answered = true;
            return;
        }
        if std::mem::take(&mut self.answered) || self.sent.is_empty() {
            self.sent.push(Vec::new());
        }
        self.sent.last_mut().expect("one at least").extend_from_slice(bytes);
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Cut {
    number: u64,
    reset: bool,
}

impl Relay {
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            target,
            mode: watch::Sender::new(Mode::Pass),
            cuts: watch::Sender::new(Cut::default()),
            reset_after: AtomicU64::new(u64::MAX),
            accepted: AtomicUsize::new(0),
            turns: Mutex::default(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { address, shared, task }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn mode(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
    }

    /// Ends all connections that there are with RST.
    pub fn reset(&self) {
        self.cut(true);
    }

    /// Ends all connections that there are with FIN.
    pub fn close(&self) {
        self.cut(false);
    }

    fn cut(&self, reset: bool) {
        self.shared.cuts.send_modify(|cut| *cut = Cut { number: cut.number + 1, reset });
    }

    /// Connections accepted from now on are reset after `bytes` from the server.
    pub fn reset_after(&self, bytes: u64) {
        self.shared.reset_after.store(bytes, Ordering::Relaxed);
    }

    /// What went to the server since the last call, one entry for each round trip; of use with one connection.
    pub fn take_turns(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.shared.turns.lock().expect("no panic inside")).sent
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        self.reset();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((near, _)) = listener.accept().await else { continue };
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        if *shared.mode.borrow() == Mode::Refuse {
            let _ = SockRef::from(&near).set_linger(Some(Duration::ZERO));
            continue;
        }
        tokio::spawn(join(near, Arc::clone(&shared)));
    }
}

async fn join(mut near: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    cuts.mark_unchanged();
    let limit = shared.reset_after.load(Ordering::Relaxed);
    let Ok(mut far) = TcpStream::connect(shared.target).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let reset = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = far.split();
        let note = |up| {
            let shared = &shared;
            move |bytes: &[u8]| shared.turns.lock().expect("no panic inside").pass(up, bytes)
        };
        let up = pump(near_read, far_write, shared.mode.subscribe(), u64::MAX, note(true));
        let down = pump(far_read, near_write, shared.mode.subscribe(), limit, note(false));
        tokio::select! {
            _ = cuts.changed() => cuts.borrow().reset,
            // A direction that ended passes its FIN on and leaves the other alone; an error or the limit ends both.
            ended = async { tokio::try_join!(up, down) } => ended.is_err(),
        }
    };
    if reset {
        let _ = SockRef::from(&near).set_linger(Some(Duration::ZERO));
        let _ = SockRef::from(&far).set_linger(Some(Duration::ZERO));
    }
}

async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut mode: watch::Receiver<Mode>,
    limit: u64,
    note: impl Fn(&[u8]),
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    let mut left = limit;
    loop {
        unstalled(&mut mode).await;
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        let passing = n.min(usize::try_from(left).unwrap_or(usize::MAX));
        let bytes = &buffer[..passing];
        note(bytes);
        match unstalled(&mut mode).await {
            Mode::Blackhole => {}
            Mode::Bytewise => {
                for byte in bytes {
                    to.write_all(&[*byte]).await?;
                    tokio::task::yield_now().await;
                }
            }
            Mode::Delay(time) => {
                tokio::time::sleep(time).await;
                to.write_all(bytes).await?;
            }
            Mode::Pass | Mode::Refuse | Mode::Stall => to.write_all(bytes).await?,
        }
        left -= passing as u64;
        if left == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
    }
}

/// Waits while the link is stalled, then says how it is.
async fn unstalled(mode: &mut watch::Receiver<Mode>) -> Mode {
    match mode.wait_for(|mode| *mode != Mode::Stall).await {
        Ok(mode) => *mode,
        Err(_) => Mode::Pass,
    }
}
