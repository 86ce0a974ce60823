#![doc = include_str!("../README.md")]

mod check;
mod floors;
mod keys;
mod layers;
mod load;
mod name;
mod problem;
mod reference;
mod secret;
mod settings;
mod state;
mod value;

pub use floors::{Floors, Overpromised, floors_fit, floors_still_fit};
pub use layers::Overrides;
pub use load::load;
pub use name::{NameError, TenantId};
pub use problem::{Problem, Problems};
pub use reference::reference;
pub use secret::{Secret, SecretError};
pub use settings::*;
pub use state::{IllegalTransition, TenantEvent, TenantState};

#[cfg(test)]
mod tests;
