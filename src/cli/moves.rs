//! `tenantry tenant move` and what may follow it, as clap sees them.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{Api, How};

/// To another server.
#[derive(Debug, Args)]
pub struct Move {
    pub name: String,
    /// A server of the settings.
    #[arg(long, value_name = "SERVER")]
    pub to: String,
    /// By replication while the application runs, or by a dump while its clients wait.
    #[arg(long, value_enum, default_value_t = Method::Online)]
    pub method: Method,
    #[command(flatten)]
    pub pause: Pause,
    /// Streams of pg_dump and pg_restore, with --method dump.
    #[arg(long, value_name = "N")]
    pub streams: Option<u32>,
    #[command(flatten)]
    pub how: How,
    #[command(flatten)]
    pub api: Api,
}

/// Back to where it was.
#[derive(Debug, Args)]
pub struct RollbackMove {
    pub name: String,
    /// What was written since the old copy followed may stay behind, at the place that is left, which need not answer: for a copy
    /// that does not follow (any more), or a server that is lost.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub pause: Pause,
    #[command(flatten)]
    pub how: How,
    #[command(flatten)]
    pub api: Api,
}

/// For good.
#[derive(Debug, Args)]
pub struct ConfirmMove {
    pub name: String,
    #[command(flatten)]
    pub how: How,
    #[command(flatten)]
    pub api: Api,
}

/// The pause of its clients at the end.
#[derive(Debug, Args)]
pub struct Pause {
    /// How long open transactions may take then; past it nothing is moved. Without it 30s, or what query_wait_timeout allows.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub wait: Option<Duration>,
    /// Past it, cancel what runs, and end sessions whose transaction stays open.
    #[arg(long)]
    pub cancel: bool,
    /// How much is compared meanwhile: every table in full, or what takes no time.
    #[arg(long, value_enum)]
    pub verify: Option<Verify>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Method {
    Online,
    Dump,
}

impl Method {
    pub fn word(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Dump => "dump",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    Full,
    Fast,
}

impl Verify {
    pub fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Fast => "fast",
        }
    }
}
