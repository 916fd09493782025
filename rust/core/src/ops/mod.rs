//! Operations on canonical adapters. They know no key, no dialect and no family.

mod based;
mod compare;
mod delta;
mod diff;
pub mod expand;
pub(crate) mod factors;
pub mod merge;
mod norm;
mod normalize;
mod place;
pub mod resize;
mod rotation;
mod sketch;
mod spectrum;

pub use based::Based;
pub use delta::{delta_rows, shape};
pub use diff::{DiffReport, GroupDiff, ModuleDiff, diff};
pub use normalize::KeySet;
pub use sketch::{DeltaSketch, PROBES, Similarity, delta_sketch};
pub(crate) use spectrum::median;
pub use spectrum::{GroupWeights, ModuleWeights, Spectrum, Status, Weights, weights};
