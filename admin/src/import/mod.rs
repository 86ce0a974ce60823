//! An SQLite file on its way into a tenant: what is in it, what fits the tables that are there, and each value as PostgreSQL
//! would print it.
//!
//! What always holds: nothing here knows a server; a value is written as it is or named as a problem, never bent to fit
//! (but a REAL in a column of decimals, as Django reads it, which is counted); memory is bounded by the largest value, whatever
//! the size of the file.

mod convert;
mod decimal;
pub mod file;
mod json;
mod moment;
pub mod plan;
pub mod problems;
pub mod spool;
mod sum;

pub use convert::{Form, Kind};
pub use file::copy;
pub use sum::hash;
