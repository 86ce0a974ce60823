//! What each fuzz target does with its bytes. `tests/fuzz_replay.rs` runs the same on the corpus, without libFuzzer.
//!
//! Every function fails by panicking.

mod accept;
mod login;
mod messages;
mod text;

pub use accept::accept;
pub use login::{sasl, startup};
pub use messages::{backend, frontend};
pub use text::signs;
