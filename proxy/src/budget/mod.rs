//! How many connections a server may be asked to hold.
//!
//! `permit` is the hard cap; sharing it fairly between tenants is decided on top of it. Pure: no clock, no I/O.

pub mod permit;
