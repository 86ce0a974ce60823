//! `tenantry`: parse, load settings, build the rooms, run, drain, exit code. Nothing else happens here.

mod check;
mod cli;
mod client;
mod commands;
mod demo;
mod exec;
mod failure;
mod import;
mod log;
mod migrate;
mod moves;
mod output;
mod rollout;
mod serve;

use std::{num::NonZeroU32, process::ExitCode};

use clap::Parser;
use tenantry_config::OrAuto;

use crate::{
    cli::{Cli, Command},
    failure::Failure,
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error),
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Serve(args) => {
            let settings = args.source.load()?;
            on_runtime(settings.process.workers, serve::run(args, settings))
        }
        Command::Check(args) => on_runtime(OrAuto::Auto, check::run(args)),
        Command::Demo(args) => on_runtime(OrAuto::Auto, demo::run(args)),
        Command::Tenant(args) => on_runtime(OrAuto::Auto, commands::tenant(*args)),
        Command::Server(args) => on_runtime(OrAuto::Auto, commands::server(args)),
        Command::Migrate(args) => on_runtime(OrAuto::Auto, migrate::run(*args)),
        Command::Exec(args) => on_runtime(OrAuto::Auto, exec::run(*args)),
        Command::Rollout(args) => on_runtime(OrAuto::Auto, rollout::run(args)),
        Command::Job(args) => on_runtime(OrAuto::Auto, commands::job(args)),
        Command::Audit(args) => on_runtime(OrAuto::Auto, commands::audit(args)),
        Command::Token(args) => on_runtime(OrAuto::Auto, commands::token(args)),
        Command::Completion { shell } => commands::completion(shell),
        Command::Version => output::line(&format!("tenantry {}", env!("CARGO_PKG_VERSION"))),
    }
}

fn on_runtime(workers: OrAuto<NonZeroU32>, work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(worker_threads(workers))
        .enable_all()
        .build()
        .map_err(Failure::internal("cannot start the runtime"))?;
    let done = runtime.block_on(work);
    // What is still open after the drain's deadline is not waited for.
    runtime.shutdown_background();
    done
}

/// `available_parallelism` knows the cgroup's quota and the CPUs we are bound to.
fn worker_threads(workers: OrAuto<NonZeroU32>) -> usize {
    match workers {
        OrAuto::Is(workers) => usize::try_from(workers.get()).unwrap_or(usize::MAX),
        OrAuto::Auto => (std::thread::available_parallelism().map_or(1, usize::from) / 2).max(1),
    }
}
