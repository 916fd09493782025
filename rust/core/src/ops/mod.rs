//! Operations on canonical adapters. They know no key, no dialect and no family.

mod based;
mod delta;
mod diff;
mod expand;
pub(crate) mod factors;
pub mod merge;
mod resize;
mod rotation;

pub use based::Based;
pub use delta::{delta_rows, shape};
pub use diff::{DiffReport, ModuleDiff, diff};
pub(crate) use expand::settled;
pub use expand::{Expand, ExpandReport, Expanded, Expansion, expand};
pub use resize::{Budget, Criterion, Method, RankRule, Resize, ResizeReport, Resized, Target};
pub(crate) use resize::{Item, Problem};
