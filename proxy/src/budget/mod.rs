//! How many connections a server may be asked to hold, and which tenant gets the next one.
//!
//! `permit` is the hard cap and `cap` what it is now; `fair` shares it: floors, ceilings, weights. Pure: no clock, no I/O.

pub mod cap;
pub mod fair;
pub mod permit;
pub mod share;
