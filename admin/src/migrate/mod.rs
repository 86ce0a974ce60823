//! Changes to many tenants at once: who is when, and what a migration's file is. Pure.
//!
//! What always holds: nothing here reads a clock, a file or the network; the same states give the same next move.

pub mod script;
pub mod waves;
