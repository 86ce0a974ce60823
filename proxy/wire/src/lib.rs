#![doc = include_str!("../README.md")]

pub mod error;
pub mod extended;
pub mod frame;
pub mod message;
pub mod sasl;
pub mod scram;
pub mod startup;
pub mod tag;
