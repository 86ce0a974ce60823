//! Sockets: streams of both sides and the listeners.

pub mod memory;
pub mod stream;
pub mod tls;
