//! Operations on canonical adapters. They know no key, no dialect and no family.

mod compare;
mod delta;
mod diff;
pub(crate) mod factors;
pub mod merge;
mod norm;
mod normalize;
mod place;
pub mod resize;
mod spectrum;

pub use delta::{delta_rows, shape};
pub use diff::{DiffReport, GroupDiff, ModuleDiff, diff};
pub use normalize::KeySet;
pub use spectrum::{GroupWeights, ModuleWeights, Spectrum, Status, Weights, weights};
