//! Why a command ends with something other than 0, and the exit code that says so (those of `sysexits.h`).

use std::{fmt::Display, process::ExitCode};

use tenantry_config::Problems;
use tenantry_proxy::StartError;

/// A command's end. Each variant is one exit code.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// 1: a rollout stopped, or some of its tenants failed.
    #[error("{0}")]
    Incomplete(String),
    /// 64: the settings or the command line are wrong; repeating changes nothing.
    #[error("{0}")]
    Usage(String),
    /// 65: the API understood, and refused.
    #[error("{0}")]
    Refused(String),
    /// 77: the token does not do.
    #[error("{0}")]
    Forbidden(String),
    /// 69: an address, a server or a tenant is not available; repeating may help.
    #[error("{0}")]
    Unavailable(String),
    /// 70: our own fault, or the machine's.
    #[error("{0}")]
    Internal(String),
}

impl Failure {
    pub fn unavailable<E: Display>(what: impl Display) -> impl FnOnce(E) -> Self {
        move |error| Self::Unavailable(format!("{what}: {error}"))
    }

    pub fn internal<E: Display>(what: impl Display) -> impl FnOnce(E) -> Self {
        move |error| Self::Internal(format!("{what}: {error}"))
    }

    fn code(&self) -> u8 {
        match self {
            Self::Incomplete(_) => 1,
            Self::Usage(_) => 64,
            Self::Refused(_) => 65,
            Self::Forbidden(_) => 77,
            Self::Unavailable(_) => 69,
            Self::Internal(_) => 70,
        }
    }

    /// Says it on standard error.
    pub fn report(&self) -> ExitCode {
        eprintln!("{self}");
        ExitCode::from(self.code())
    }
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Self::Usage(problems.to_string())
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Listen { .. } => Self::Unavailable(error.to_string()),
            StartError::Tls(_) | StartError::NoServer { .. } => Self::Usage(error.to_string()),
        }
    }
}

/// What clap has to say: help on standard output with 0, everything else with 64.
pub fn usage(error: &clap::Error) -> ExitCode {
    let is_help = !error.use_stderr();
    // Nobody to tell if standard output is gone.
    let _ = error.print();
    if is_help { ExitCode::SUCCESS } else { ExitCode::from(64) }
}
