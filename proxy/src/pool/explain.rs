//! Why somebody waits, or was refused: one answer for errors, metrics, console and API. Pure.

/// Which limit keeps a waiter waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// The pool of the (tenant, role) has all it may have.
    PoolSize,
    /// The tenant has all it may have.
    Ceiling,
    /// All connections that may be held on the server are, and others come first.
    ServerCap,
    /// `max_connecting` dials are under way.
    ConnectThrottle,
    /// Nobody answers.
    ServerDown,
    /// PostgreSQL itself has no room for another connection (53300).
    ServerFull,
    /// PostgreSQL has no room for this role or database (CONNECTION LIMIT, 53300).
    TenantFull,
    /// The last login of this pool failed; it is tried again after a pause.
    LoginFails,
    /// Somebody paused the tenant, or is renaming it.
    Paused,
    /// No limit: a connection is there, or one more may be opened at once.
    Nothing,
}

impl Blocked {
    /// Every limit.
    pub const ALL: [Self; 9] = [
        Self::PoolSize,
        Self::Ceiling,
        Self::ServerCap,
        Self::ConnectThrottle,
        Self::ServerDown,
        Self::ServerFull,
        Self::TenantFull,
        Self::LoginFails,
        Self::Paused,
    ];

    /// The word in errors, metrics and the console.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PoolSize => "pool_size",
            Self::Ceiling => "ceiling",
            Self::ServerCap => "server_cap",
            Self::ConnectThrottle => "connect_throttle",
            Self::ServerDown => "server_down",
            Self::ServerFull => "server_full",
            Self::TenantFull => "tenant_full",
            Self::LoginFails => "login_fails",
            Self::Paused => "paused",
            Self::Nothing => "nothing",
        }
    }

    /// What would help.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        match self {
            Self::PoolSize => "Shorten transactions, or raise pool_size.",
            Self::Ceiling => "Shorten transactions, or raise the tenant's ceiling.",
            Self::ServerCap => "Shorten transactions, or raise the tenant's floor or the server's cap.",
            Self::ConnectThrottle => "New connections are being opened; raise max_connecting if it lasts.",
            Self::ServerDown => "Nothing was sent to the server; try again.",
            Self::ServerFull => {
                "Its max_connections is reached, also by connections of others; lower the cap or raise it there."
            }
            Self::TenantFull => {
                "A CONNECTION LIMIT of the role or database is reached; raise it, or lower the ceiling."
            }
            Self::LoginFails => "`tenantry check` says what is wrong.",
            Self::Paused => "Somebody paused this database; it goes on by itself when it is resumed.",
            Self::Nothing => "The next client is served at once.",
        }
    }
}

/// Everything that decides how long a wait takes, at one moment. Times in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explanation {
    pub blocked: Blocked,
    /// How long it has waited; for somebody who is not in the queue, how long its first has.
    pub waited: u64,
    /// Waiters of the same pool before it.
    pub ahead: usize,
    pub waiting: usize,
    /// Connections of the pool, and the most it may have.
    pub size: u32,
    pub pool_size: u32,
    /// Permits of the tenant, and the most it may have.
    pub held: u32,
    pub ceiling: u32,
    /// Permits of the server, and the most there may be now.
    pub permits: u32,
    pub cap: u32,
}
