#![doc = include_str!("../README.md")]

mod control;
pub mod fence;
mod http;
pub mod jobs;
mod metrics;
mod routes;
mod sql;
mod view;

pub use http::{Listener, serve};
pub use metrics::{Kind, METRICS, Metric, recorder};
pub use view::{Status, View};
