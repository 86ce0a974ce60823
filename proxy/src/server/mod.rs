//! One connection to PostgreSQL: dialling and logging in, what is known about it, resetting and closing it.

pub mod conn;
pub mod connect;
pub mod credentials;
pub mod named;
pub mod quoted;
pub mod settings;
pub mod signs;
pub mod sql;
pub mod statements;
pub mod upkeep;
pub mod words;
