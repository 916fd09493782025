//! Operations on canonical adapters. They know no key, no dialect and no family.

mod based;
mod delta;
mod diff;
pub mod expand;
pub(crate) mod factors;
pub mod merge;
mod normalize;
pub mod resize;
mod rotation;

pub use based::Based;
pub use delta::{delta_rows, shape};
pub use diff::{DiffReport, ModuleDiff, diff};
pub use normalize::KeySet;
