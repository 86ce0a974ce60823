//! Sockets: streams of both sides and the listeners.

pub mod memory;
pub mod stream;
pub mod tls;

use std::io;

use nix::errno::Errno;

/// This process or this machine has no file descriptor left: nothing is known of whoever is at the other end.
#[must_use]
pub fn is_out_of_descriptors(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw);
    matches!(code, Some(Errno::EMFILE | Errno::ENFILE))
}
