//! Sockets: streams of both sides and the listeners.

pub mod stream;
pub mod tls;
