#![doc = include_str!("../README.md")]

mod backoff;
pub mod budget;
pub mod clock;
pub mod directory;
mod listen;
pub mod net;
pub mod pool;
pub mod server;
pub mod session;
pub mod tenant;

pub use directory::{Directory, Snapshot, StartError};
