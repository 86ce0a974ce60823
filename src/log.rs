//! The log: standard error, as text or JSON, with a filter that a reload may change.
//!
//! What always holds: nobody waits for whoever reads it. Lines go through a queue to a thread of their own; where that is full,
//! they are dropped, and counted.

use tenantry_config::{Log, LogFormat};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

use crate::failure::Failure;

/// Lines that may wait to be written.
const QUEUE: usize = 10_000;

/// Changes the filter of the running process; when it is dropped, what waits is written.
#[derive(Debug)]
pub struct Filter {
    handle: reload::Handle<EnvFilter, Registry>,
    dropped: ErrorCounter,
    _writes: WorkerGuard,
}

/// Installs the process's subscriber; called once.
pub fn start(settings: &Log) -> Result<Filter, Failure> {
    let (filter, handle) = reload::Layer::new(parse(settings)?);
    let registry = tracing_subscriber::registry().with(filter);
    let (writer, _writes) = queue(std::io::stderr());
    let dropped = writer.error_counter();
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let installed = match settings.format {
        LogFormat::Text => {
            registry.with(lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))).try_init()
        }
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    installed.map_err(Failure::internal("cannot start the log"))?;
    Ok(Filter { handle, dropped, _writes })
}

/// What is written to `out` by a thread of its own, which alone waits for it.
fn queue(out: impl std::io::Write + Send + 'static) -> (NonBlocking, WorkerGuard) {
    NonBlockingBuilder::default().buffered_lines_limit(QUEUE).lossy(true).finish(out)
}

/// Whether the filter can be read.
pub fn check(settings: &Log) -> Result<(), Failure> {
    parse(settings).map(drop)
}

fn parse(settings: &Log) -> Result<EnvFilter, Failure> {
    EnvFilter::builder()
        .parse(&settings.filter)
        .map_err(|error| Failure::Usage(format!("log.filter: \"{}\" is no filter: {error}", settings.filter)))
}

impl Filter {
    /// How many lines were dropped so far.
    pub fn dropped(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let dropped = self.dropped.clone();
        move || u64::try_from(dropped.dropped_lines()).unwrap_or(u64::MAX)
    }

    pub fn reload(&self, settings: &Log) -> Result<(), Failure> {
        self.handle.reload(parse(settings)?).map_err(Failure::internal("cannot change the log's filter"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_log_that_nobody_reads_holds_up_nobody_and_drops_are_counted() {
        let (_unread, pipe) = std::io::pipe().unwrap();
        let (mut writer, _writes) = queue(pipe);
        let line = [b'x'; 200];
        // More than the pipe and the queue hold together.
        for _ in 0..2 * QUEUE {
            writer.write_all(&line).unwrap();
        }
        assert!(writer.error_counter().dropped_lines() > 0);
    }
}
