//! `tenantry`: parse, load settings, build the rooms, run, drain, exit code. Nothing else happens here.

mod check;
mod cli;
mod demo;
mod failure;
mod log;
mod output;
mod serve;

use std::process::ExitCode;

use clap::Parser;

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
    if let Command::Version = cli.command {
        return output::line(&format!("tenantry {}", env!("CARGO_PKG_VERSION")));
    }
    // As many workers as the cgroup grants CPU: `available_parallelism` reads its quota.
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .map_err(Failure::internal("cannot start the runtime"))?;
    let done = runtime.block_on(async {
        match cli.command {
            Command::Serve(args) => serve::run(args).await,
            Command::Check(args) => check::run(args).await,
            Command::Demo(args) => demo::run(args).await,
            Command::Version => Ok(()),
        }
    });
    // What is still open after the drain's deadline is not waited for.
    runtime.shutdown_background();
    done
}
