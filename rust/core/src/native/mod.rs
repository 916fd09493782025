//! Adapters in the form that a quantized runtime loads: low-rank branches packed behind those of one base checkpoint.
//!
//! The base's own branch comes first in every layer, so such a file is right for the checkpoint it was made from and
//! for no other; its metadata says which one that was, and what the ranks behind it are.

mod assemble;
mod base;
mod draft;
pub mod manifest;
pub mod pack;
mod read;
mod scaling;
pub mod vector;

pub(crate) use assemble::{Assembled, assemble};
pub use assemble::{Layout, MAX_TOTAL_RANK, NativeOptions};
pub use base::{Base, BaseLayer, Precision, Smoothing};
pub use read::{Branches, Disassembled, NativeInfo, disassemble};
pub(crate) use read::{Reading, entry_name, needs_base, recognise};
