//! Small dense linear algebra in float64. Knows nothing of adapters. Single-threaded: callers run many at once.
//!
//! The only importer of the linear-algebra crate, which is built without threads of its own; everything else speaks in
//! [`Matrix`].

mod matrix;
mod norms;
mod range;
mod thin;

pub use matrix::{Matrix, Svd, eigh, svd};
pub use norms::low_rank_norms;
pub use range::{Sketch, Sketched, sketch};
pub use thin::{Tall, ThinSvd, thin_root, thin_svd};
