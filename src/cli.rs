//! The command line, as clap sees it. Flags only; what they mean is in each command's own file.

pub mod moves;
mod rollouts;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use tenantry_config::Overrides;

pub use self::rollouts::{Exec, Migrate, Rollout, Waves};

const EXIT_CODES: &str = "\
Exit codes:
  0   done
  1   a rollout stopped, or some of its tenants failed: the report says which, and --resume goes on
  64  the settings or the command line are wrong; every problem is told at once
  65  the API refused it: a value, a state, or something that is not there
  69  an address, a server or a tenant is not available
  70  internal failure
  77  the token is missing, wrong, or does not allow it";

/// PostgreSQL connection pooler and tenant manager.
#[derive(Debug, Parser)]
#[command(name = "tenantry", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve clients until told to stop.
    ///
    /// SIGHUP reads the settings again; if they are wrong, the old ones stay. SIGTERM or SIGINT lets open transactions
    /// finish, up to --drain-timeout; a second one stops at once.
    #[command(after_help = EXIT_CODES)]
    Serve(Serve),
    /// Say what is wrong with the settings, then log in to every database as every role.
    #[command(after_help = EXIT_CODES)]
    Check(Check),
    /// Start PostgreSQL with three tenants, and Tenantry in front of it, and clean up at the end.
    #[command(after_help = EXIT_CODES)]
    Demo(Demo),
    /// Make, change, move and remove tenants, through the API.
    #[command(subcommand, after_help = EXIT_CODES)]
    Tenant(Box<Tenant>),
    /// The PostgreSQL servers behind Tenantry, through the API.
    #[command(subcommand)]
    Server(Server),
    /// Apply files of SQL to the databases of many tenants, in waves.
    #[command(after_help = EXIT_CODES)]
    Migrate(Box<Migrate>),
    /// Run a command once per tenant, with its DATABASE_* variables set, in waves.
    #[command(after_help = EXIT_CODES)]
    Exec(Box<Exec>),
    /// What `migrate` and `exec` began: look at it, follow it, stop it.
    #[command(subcommand)]
    Rollout(Rollout),
    /// Durable work: look at it, follow it, turn it back.
    #[command(subcommand)]
    Job(Job),
    /// Tokens for the API. `create` goes to the catalog itself, with the settings; so the first one can be made.
    #[command(subcommand)]
    Token(Token),
    /// Who changed what through the API, and whether that log is whole.
    #[command(subcommand)]
    Audit(Audit),
    /// Print what a shell needs to complete commands, e.g. `tenantry completion bash`.
    Completion { shell: clap_complete::Shell },
    /// Print the version.
    Version,
}

/// Where the API is, and who asks.
#[derive(Debug, Args)]
pub struct Api {
    /// The API.
    #[arg(long, value_name = "URL", env = "TENANTRY_URL", default_value = "http://127.0.0.1:9930", global = true)]
    pub url: String,
    /// A token that `tenantry token create` made; better in the variable, or in --token-file, than in the list of processes.
    #[arg(long, value_name = "TOKEN", env = "TENANTRY_TOKEN", hide_env_values = true, global = true)]
    pub token: Option<String>,
    /// File with the token.
    #[arg(long, value_name = "FILE", env = "TENANTRY_TOKEN_FILE", global = true)]
    pub token_file: Option<PathBuf>,
    /// Roots that sign the API's certificate (PEM); without it the system's.
    #[arg(long, value_name = "FILE", env = "TENANTRY_CA_FILE", global = true)]
    pub ca_file: Option<PathBuf>,
    /// Certificate that we show the API (PEM), where it wants one (admin.client_ca_file).
    #[arg(long, value_name = "FILE", env = "TENANTRY_CERT_FILE", requires = "key_file", global = true)]
    pub cert_file: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "FILE", env = "TENANTRY_KEY_FILE", requires = "cert_file", global = true)]
    pub key_file: Option<PathBuf>,
    /// JSON in place of a table.
    #[arg(long, global = true)]
    pub json: bool,
}

/// What is said about a tenant.
#[derive(Debug, Args)]
pub struct Spec {
    /// The application that it is a fork of.
    #[arg(long)]
    pub application: Option<String>,
    /// Who looks after it.
    #[arg(long)]
    pub owner: Option<String>,
    /// Where it stands: experiment, pilot, production.
    #[arg(long)]
    pub stage: Option<String>,
    /// When it was deployed, YYYY-MM-DD.
    #[arg(long, value_name = "DATE")]
    pub deployed: Option<String>,
    /// Server connections that are always available to it.
    #[arg(long, value_name = "N")]
    pub floor: Option<u32>,
    /// Most server connections that it may have.
    #[arg(long, value_name = "N")]
    pub ceiling: Option<u32>,
    /// Its part of what is left while several wait.
    #[arg(long, value_name = "N")]
    pub weight: Option<u32>,
    /// When a server connection goes back to the pool: transaction, session or statement.
    #[arg(long, value_name = "MODE")]
    pub pool_mode: Option<String>,
    /// What keeps one client's session state from another: tracked, or strict, which wipes a server connection before each use.
    #[arg(long, value_name = "HOW")]
    pub isolation: Option<String>,
    /// Unnamed statements are shared and kept prepared like named ones: true or false.
    #[arg(long, value_name = "BOOL")]
    pub reuse_unnamed_statements: Option<bool>,
    /// Most server connections of one of its roles.
    #[arg(long, value_name = "N")]
    pub pool_size: Option<u32>,
    /// Most client connections.
    #[arg(long, value_name = "N")]
    pub max_client_conn: Option<u32>,
}

/// How a change is made.
#[derive(Debug, Args)]
pub struct How {
    /// Only tell the steps.
    #[arg(long)]
    pub dry_run: bool,
    /// Do not wait for the job.
    #[arg(long)]
    pub no_wait: bool,
}

/// How credentials are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum EnvFormat {
    /// DATABASE_HOST=... lines.
    Env,
    /// An override for docker compose.
    Compose,
}

#[derive(Debug, Subcommand)]
pub enum Tenant {
    /// A new tenant: role, database, budget, route. Prints how to connect; the password is told this once.
    Create {
        name: String,
        /// A server of the settings.
        #[arg(long)]
        server: Option<String>,
        /// A role that is there already, and shared with other tenants, owns the database.
        #[arg(long, value_name = "ROLE")]
        shared_role: Option<String>,
        /// Fill it from this archive.
        #[arg(long, value_name = "N")]
        archive: Option<i64>,
        /// Extension to install; may be repeated.
        #[arg(long = "extension", value_name = "NAME")]
        extensions: Vec<String>,
        /// Setting of the database, NAME=VALUE; may be repeated.
        #[arg(long = "setting", value_name = "NAME=VALUE", value_parser = key_value)]
        settings: Vec<(String, String)>,
        /// Print only the DATABASE_* variables.
        #[arg(long, value_name = "FORMAT", num_args = 0..=1, default_missing_value = "env")]
        env: Option<EnvFormat>,
        /// A retry with the same key makes no second one.
        #[arg(long, value_name = "KEY")]
        idempotency_key: Option<String>,
        #[command(flatten)]
        spec: Spec,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        api: Api,
    },
    /// Make a tenant of a database and a role that are there already.
    Adopt {
        name: String,
        #[arg(long)]
        server: Option<String>,
        /// The database; without it the tenant's name.
        #[arg(long)]
        database: Option<String>,
        /// The role that its clients log in with; without it the database's owner.
        #[arg(long)]
        role: Option<String>,
        /// File with the role's SCRAM verifier (pg_authid.rolpassword).
        #[arg(long, value_name = "FILE")]
        verifier_file: Option<PathBuf>,
        #[command(flatten)]
        spec: Spec,
        #[command(flatten)]
        api: Api,
    },
    /// All tenants.
    List {
        #[command(flatten)]
        api: Api,
    },
    /// One tenant.
    Show {
        name: String,
        #[command(flatten)]
        api: Api,
    },
    /// Change what is said about a tenant: budget, mode, owner, stage.
    Update {
        name: String,
        #[command(flatten)]
        spec: Spec,
        #[command(flatten)]
        api: Api,
    },
    /// Another name, for the database too. Clients wait a moment; the old name goes on working.
    Rename {
        name: String,
        to: String,
        /// How long open transactions may take; past it nothing is renamed. Without it 30s, or what query_wait_timeout allows.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
        wait: Option<Duration>,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        api: Api,
    },
    /// To another server, with its roles and their passwords. The old copy is kept until `confirm-move` or `rollback-move`.
    ///
    /// `job cancel` at any time before the route changes leaves everything as it was.
    Move(moves::Move),
    /// Back to the server where it was before it was moved.
    RollbackMove(moves::RollbackMove),
    /// Drop the copy that a move left at the old server: there is no way back then.
    ConfirmMove(moves::ConfirmMove),
    /// Hold new transactions.
    Pause {
        name: String,
        #[command(flatten)]
        api: Api,
    },
    /// Let transactions run again.
    Resume {
        name: String,
        #[command(flatten)]
        api: Api,
    },
    /// Give up the server connections until the next query.
    Suspend {
        name: String,
        #[command(flatten)]
        api: Api,
    },
    /// End a suspension.
    Wake {
        name: String,
        #[command(flatten)]
        api: Api,
    },
    /// Refuse new transactions, let those under way finish, end what is left.
    Drain {
        name: String,
        /// Past it transactions are cancelled, then cut.
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
        deadline: Duration,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        api: Api,
    },
    /// Dump it, prove the dump by a restore, and drop the database.
    Archive {
        name: String,
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
        deadline: Duration,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        api: Api,
    },
    /// Bring an archived tenant back.
    Restore {
        name: String,
        /// Number of the archive; without it the newest.
        #[arg(long, value_name = "N")]
        archive: Option<i64>,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        api: Api,
    },
    /// Fill a tenant, whose tables are there and empty, with the rows of an SQLite file: all of them, compared, or none.
    ///
    /// The file may be in use: a copy as of one moment is made first, with what is in its write-ahead log. Of a Django
    /// project, both must have the same migrations; run `migrate` in both first.
    Import {
        name: String,
        /// The SQLite file.
        file: PathBuf,
        /// Do everything, tell every problem, and roll it back.
        #[arg(long)]
        dry_run: bool,
        /// A table whose rows give way to those of the file; may be repeated. Those that Django's `migrate` fills do anyway.
        #[arg(long, value_name = "TABLE")]
        replace: Vec<String>,
        /// Do not wait for the job.
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        api: Api,
    },
    /// Drop a tenant's database and the roles made for it.
    Delete {
        name: String,
        /// The name once more: that it is meant.
        #[arg(long, value_name = "NAME")]
        confirm: String,
        /// There need be no archive of it.
        #[arg(long)]
        without_archive: bool,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        api: Api,
    },
    /// A new password; the old one stays good for a while.
    Rotate {
        name: String,
        /// Without it the owner's.
        #[arg(long)]
        role: Option<String>,
        /// How long the old one is good, too, at most a week; 0s: not at all. Without it an hour, where that can be.
        #[arg(long, value_parser = humantime::parse_duration)]
        grace: Option<std::time::Duration>,
        #[arg(long, value_name = "FORMAT", num_args = 0..=1, default_missing_value = "env")]
        env: Option<EnvFormat>,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        api: Api,
    },
    /// From the role that it shares with other tenants to one of its own. The old one works on until `--finish`.
    Separate {
        name: String,
        /// What the new role is called; without it like the tenant.
        #[arg(long)]
        role: Option<String>,
        /// The old role gets in no more: when every client has the new login.
        #[arg(long, conflicts_with_all = ["role", "env"])]
        finish: bool,
        #[arg(long, value_name = "FORMAT", num_args = 0..=1, default_missing_value = "env")]
        env: Option<EnvFormat>,
        #[command(flatten)]
        how: How,
        #[command(flatten)]
        api: Api,
    },
    /// The DATABASE_* variables of a tenant. Nobody keeps the password: give it in DATABASE_PASSWORD, or `rotate`.
    Env {
        name: String,
        #[arg(long, value_name = "FORMAT", default_value = "env")]
        format: EnvFormat,
        #[arg(long, env = "DATABASE_PASSWORD", hide_env_values = true, value_name = "PASSWORD")]
        password: Option<String>,
        #[command(flatten)]
        api: Api,
    },
    /// Its clients, and why they keep their server connections.
    Clients {
        name: String,
        /// Only those that keep one.
        #[arg(long)]
        pinned: bool,
        #[command(flatten)]
        api: Api,
    },
    /// Why its clients wait, or would.
    Explain {
        name: String,
        #[command(flatten)]
        api: Api,
    },
}

#[derive(Debug, Subcommand)]
pub enum Server {
    /// All servers.
    List {
        #[command(flatten)]
        api: Api,
    },
}

#[derive(Debug, Subcommand)]
pub enum Job {
    /// The newest jobs.
    List {
        /// Only those of this tenant.
        #[arg(long)]
        tenant: Option<String>,
        #[command(flatten)]
        api: Api,
    },
    /// One job.
    Show {
        id: i64,
        #[command(flatten)]
        api: Api,
    },
    /// Follow a job to its end.
    Watch {
        id: i64,
        #[command(flatten)]
        api: Api,
    },
    /// Turn a job back, where there still is a way back.
    Cancel {
        id: i64,
        #[command(flatten)]
        api: Api,
    },
}

#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make a token, and print it: this once.
    Create {
        /// Whose it is, or what for.
        #[arg(long)]
        label: String,
        /// viewer looks, operator changes what can be changed back, admin deletes and makes tokens.
        #[arg(long, default_value = "operator")]
        access: String,
        /// How long it is good.
        #[arg(long, default_value_t = 90)]
        days: u32,
        #[command(flatten)]
        source: Source,
    },
    /// All tokens, without their secrets.
    List {
        #[command(flatten)]
        api: Api,
    },
    /// End a token.
    Delete {
        id: String,
        #[command(flatten)]
        api: Api,
    },
}

#[derive(Debug, Subcommand)]
pub enum Audit {
    /// The newest rows.
    List {
        /// At most so many.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=500))]
        limit: u32,
        #[command(flatten)]
        api: Api,
    },
    /// Follow the chain of all rows: one that was changed or taken out is found. Note down what it prints: with it the next
    /// time also shows rows taken away at the end.
    Verify {
        #[command(flatten)]
        api: Api,
    },
}

/// Where the settings come from.
#[derive(Debug, Args)]
pub struct Source {
    /// File with the settings.
    #[arg(long, value_name = "FILE", env = "TENANTRY_CONFIG", default_value = "tenantry.toml")]
    pub config: PathBuf,
    /// Set one key, over file and environment: pool.pool_size=5. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
}

impl Source {
    /// Reads the settings: file, environment, flags.
    pub fn load(&self) -> Result<tenantry_config::Settings, tenantry_config::Problems> {
        tenantry_config::load(Some(&self.config), &flags(Overrides::from_env(), &self.set))
    }
}

/// `--set` as the uppermost layer.
pub fn flags(under: Overrides, set: &[(String, String)]) -> Overrides {
    set.iter().fold(under, |all, (key, value)| all.flag(key, value))
}

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub source: Source,
    /// How long open transactions may take to finish after the first SIGTERM.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_timeout: Duration,
    /// End as by kill -9 at the n-th effect of a job. For tests; not in a release build.
    #[cfg(debug_assertions)]
    #[arg(long, value_name = "N", hide = true)]
    pub die_at: Option<u64>,
    /// Only effects of jobs of this kind that begin from now on count, or (`back`) those of the way back.
    #[cfg(debug_assertions)]
    #[arg(long, value_name = "KIND", hide = true)]
    pub die_in: Option<String>,
}

#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    pub source: Source,
    /// JSON in place of a table.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Demo {
    /// Query every tenant over TLS, print what was verified, and end: 0 if all of it held.
    #[arg(long)]
    pub check: bool,
    /// Keep the cluster, the settings and the log in this directory (new or empty).
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// Port for clients, 0 for any; without it 6432, or any if that is taken.
    #[arg(long, value_name = "N")]
    pub port: Option<u16>,
    /// Directory of PostgreSQL's programs; without it the usual places are searched, PostgreSQL 16 first.
    #[arg(long, value_name = "DIR", env = "TENANTRY_POSTGRES_BIN")]
    pub postgres_bin: Option<PathBuf>,
    /// Set one key over the demo's own settings: pool.pool_size=5. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE, e.g. pool.pool_size=5".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn clap_finds_no_fault() {
        Cli::command().debug_assert();
    }

    #[test]
    fn set_splits_at_the_first_equals_sign() {
        let cli = Cli::try_parse_from(["tenantry", "serve", "--set", "log.filter=a=b", "--set", "x.y="]).unwrap();
        let Command::Serve(serve) = cli.command else { panic!("not serve") };
        assert_eq!(serve.source.set, [("log.filter".to_owned(), "a=b".to_owned()), ("x.y".to_owned(), String::new())]);
        assert!(Cli::try_parse_from(["tenantry", "serve", "--set", "nothing"]).is_err());
    }
}
