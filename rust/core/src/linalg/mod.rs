//! Small dense linear algebra in float64. Knows nothing of adapters. Single-threaded: callers run many at once.
//!
//! The only importer of the linear-algebra crate, which is built without threads of its own; everything else speaks in
//! [`Matrix`].

mod matrix;
mod norms;
mod panels;
mod range;
mod thin;

pub use matrix::{Matrix, Svd, eigh, svd};
pub use norms::{Compared, Product, compare_products, product_norm2};
pub(crate) use panels::{Blocks, MOST_TERMS, Panels, TALL, WIDE, multiply};
pub use range::{Sketch, Sketched, sketch};
pub use thin::{Tall, ThinSvd, tall_singular_values, thin_root, thin_svd};
