//! One client from accept to goodbye.
//!
//! In the order that a client meets them: `hello` (first packets, TLS), `login` (who is it), `relay` (the session proper:
//! `requests` to the server, `answers` from it, `evidence` of what it left behind, `lend`, `heal` and `sequences` for what
//! must look as on one connection, `listening` to the tenant's hub), `vanish` (what becomes of its server connection). Pure,
//! and tested without a socket: `attempts`, `lobby`, `look`, `state`, `owed`, `statements`, `pin`, `probe`.

mod answers;
pub mod attempts;
pub mod errors;
mod evidence;
mod heal;
pub mod hello;
mod lend;
mod listening;
pub mod lobby;
mod login;
pub mod look;
pub mod owed;
pub mod pin;
pub mod probe;
pub mod registry;
mod relay;
pub use relay::Limits;
mod requests;
mod run;
mod sequences;
pub mod state;
pub mod statements;
mod vanish;
mod welcome;
