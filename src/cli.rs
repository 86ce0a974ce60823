//! The command line, as clap sees it. Flags only; what they mean is in each command's own file.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use tenantry_config::Overrides;

const EXIT_CODES: &str = "\
Exit codes:
  0   done
  64  the settings or the command line are wrong; every problem is told at once
  69  an address, a server or a tenant is not available
  70  internal failure";

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
    /// Print the version.
    Version,
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
