//! The words between the core and whoever calls it: what is known, what is asked, what is decided. Plain data.

use smallvec::SmallVec;

use super::{explain::Explanation, waiters::WaiterId};

/// A pool within one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u32);

/// A server connection within one server: an index that is used again after `closed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub usize);

/// What a pool may do; times in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLimits {
    pub size: u32,
    pub min_size: u32,
    pub max_waiters: usize,
    pub query_wait_timeout: u64,
    pub round_robin: bool,
    pub lifetime: u64,
    pub idle_timeout: u64,
    pub check_delay: u64,
}

/// What a pool does with those who ask it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gate {
    #[default]
    Open,
    /// They wait; connections close as they come to rest.
    Held,
    /// They are refused; connections close as they come to rest.
    Shut,
}

/// What a server may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerLimits {
    /// `None`: what PostgreSQL has, without the reserve.
    pub cap: Option<u32>,
    pub reserve: u32,
    pub max_connecting: u32,
    /// First pause after a failed dial; doubled up to 4 times this, so that a server that is back is found soon.
    pub login_retry: u64,
}

/// What the shell must do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Connect and log in for this pool, then report `dialed` or `dial_failed`.
    Dial { slot: SlotId, pool: PoolId },
    /// Close this idle slot's connection, then report `closed`.
    Close { slot: SlotId },
    /// Ask this idle connection for a sign of life, then `checked` it or close it.
    Check { slot: SlotId },
    /// Tell this waiter no; it has left the queue.
    Refuse { waiter: WaiterId, refusal: Refusal },
}

pub type Actions = SmallVec<[Action; 4]>;

/// Why nobody gets a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Waited longer than `query_wait_timeout`.
    Timeout(Explanation),
    /// `max_waiters` are waiting already.
    QueueFull(Explanation),
    /// The tenant takes no new transactions.
    Shut,
    /// The server turned the login down for good (password, database, role); its error is with the pool.
    LoginRefused,
}

/// How a dial failed. Each cause holds up exactly those whom it concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DialFailure {
    /// Nobody answers, or "starting up": holds for every pool of the server.
    ServerDown,
    /// PostgreSQL has no room for anybody (53300): the cap shrinks for a while, and everybody waits on.
    ServerFull,
    /// PostgreSQL has no room for this role or database (53300 of a CONNECTION LIMIT): only this pool waits.
    TenantFull,
    /// Only this pool's login failed, and may succeed later (a timeout inside the login, a passing error).
    Later,
    /// Only this pool's login failed, and will again (password, database): its waiters are told at once.
    Refused,
}

/// What a session that asked for a connection gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkout {
    Ready(SlotId),
    Queued(WaiterId),
    Refused(Refusal),
}

/// What becomes of a connection that was given back in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rested {
    /// It goes to this waiter.
    Hand(WaiterId),
    /// It stays in the pool.
    Idle,
    /// It is asked what room the server has, then `checked`.
    Check,
    /// It is to be closed.
    Close,
}

/// What sharing costs; milliseconds, and only ever grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waste {
    /// Time in which the cap kept somebody waiting.
    pub contended: u64,
    /// The same, times the connections that stood idle meanwhile.
    pub idle: u64,
}
