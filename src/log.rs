//! The log: standard error, as text or JSON, with a filter that a reload may change.

use tenantry_config::{Log, LogFormat};
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt};

use crate::failure::Failure;

/// Changes the filter of the running process.
#[derive(Debug)]
pub struct Filter(reload::Handle<EnvFilter, Registry>);

/// Installs the process's subscriber; called once.
pub fn start(settings: &Log) -> Result<Filter, Failure> {
    let (filter, handle) = reload::Layer::new(parse(settings)?);
    let registry = tracing_subscriber::registry().with(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let installed = match settings.format {
        LogFormat::Text => {
            registry.with(lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))).try_init()
        }
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    installed.map_err(Failure::internal("cannot start the log"))?;
    Ok(Filter(handle))
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
    pub fn reload(&self, settings: &Log) -> Result<(), Failure> {
        self.0.reload(parse(settings)?).map_err(Failure::internal("cannot change the log's filter"))
    }
}
