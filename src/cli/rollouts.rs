//! The command line of rollouts: `migrate`, `exec`, `rollout`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use super::Api;

/// Which tenants, in which waves.
#[derive(Debug, Args)]
pub struct Waves {
    /// Names, or patterns of them ('exp_*'), with commas between; '*' is all.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub tenants: Vec<String>,
    /// Only forks of this application.
    #[arg(long)]
    pub application: Option<String>,
    /// Only tenants in this stage.
    #[arg(long)]
    pub stage: Option<String>,
    /// So many tenants go first, or those of these names; one of them that fails stops everything. 0: none.
    #[arg(long, value_name = "N|NAMES", default_value = "1")]
    pub canary: String,
    /// Tenants of each wave after the canary: a number, or a percentage of all; without it all in one.
    #[arg(long, value_name = "N|N%")]
    pub wave: Option<String>,
    /// Tenants under way at once.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub parallel: u32,
    /// After so many failures nobody else begins.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub stop_after: u32,
    /// How long a statement waits for a lock: for as long clients may wait behind it.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = humantime::parse_duration)]
    pub lock_timeout: Duration,
    /// How long a statement may take; 0s: no limit. Without it 5min, and of a command what the tenant has.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub statement_timeout: Option<Duration>,
    /// How long a tenant is waited for that another job has, while others have their turns; then it has failed.
    #[arg(long, value_name = "TIME", default_value = "10min", value_parser = humantime::parse_duration)]
    pub busy_timeout: Duration,
    /// Only tell who would have a turn, and when.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on with this rollout: those that failed and those that were not reached. The rest of the words is as it was then.
    #[arg(long, value_name = "N", conflicts_with_all = ["tenants", "application", "stage", "canary", "wave", "parallel",
        "stop_after", "lock_timeout", "busy_timeout", "statement_timeout", "dry_run"])]
    pub resume: Option<i64>,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// Directory with files NNNN_name.sql, applied in the order of their numbers, each in one transaction. One that begins
    /// with `-- tenantry: no-transaction` is done statement by statement, outside of transactions.
    #[arg(required_unless_present = "resume", conflicts_with = "resume")]
    pub dir: Option<PathBuf>,
    #[command(flatten)]
    pub waves: Waves,
    /// How often a file is tried again whose locks were not to be had.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=1000), conflicts_with = "resume")]
    pub lock_retries: u32,
    /// Files may have lower numbers than those that were applied.
    #[arg(long, conflicts_with = "resume")]
    pub out_of_order: bool,
    /// Do not wait for the end.
    #[arg(long)]
    pub no_wait: bool,
    #[command(flatten)]
    pub api: Api,
}

#[derive(Debug, Args)]
pub struct Exec {
    #[command(flatten)]
    pub waves: Waves,
    /// How long a command may take, together with its retries.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration, conflicts_with = "resume")]
    pub timeout: Duration,
    /// How often a command that failed is run again at once.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub retries: u32,
    /// Directory for the commands' output, a file for each tenant; without it a new one.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    #[command(flatten)]
    pub api: Api,
    /// The command and its words, after `--`: run as it is, without a shell.
    #[arg(last = true, value_name = "COMMAND", required_unless_present = "resume", conflicts_with = "resume")]
    pub command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Rollout {
    /// The newest rollouts.
    List {
        #[command(flatten)]
        api: Api,
    },
    /// One rollout, and where each of its tenants is.
    Show {
        id: i64,
        #[command(flatten)]
        api: Api,
    },
    /// Follow a rollout to its end.
    Watch {
        id: i64,
        #[command(flatten)]
        api: Api,
    },
    /// Stop it: nobody else begins, and what is under way turns back where it can.
    Cancel {
        id: i64,
        #[command(flatten)]
        api: Api,
    },
}
