#![doc = include_str!("../README.md")]

pub mod api;
pub mod catalog;
pub mod control;
pub mod fence;
pub mod fleet;
pub mod fuse;
mod http;
pub mod import;
pub mod jobs;
mod lifecycle;
mod metrics;
pub mod migrate;
pub mod plane;
mod routes;
mod sql;
mod view;

pub use http::{Listener, Parts, serve, tls};
pub use metrics::{Kind, METRICS, Metric, recorder};
pub use view::{Plane, Status, View};
