//! Operations on canonical adapters. They know no key, no dialect and no family.

mod delta;
mod diff;
pub(crate) mod factors;
pub mod merge;
pub mod resize;

pub use delta::{delta_rows, shape};
pub use diff::{DiffReport, ModuleDiff, diff};
