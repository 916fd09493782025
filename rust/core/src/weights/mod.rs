//! Base checkpoints: reading the weights that adapters change, and what is done with both.
//!
//! A checkpoint is one file or many; its tensors are named in any namespace of its family. [`Checkpoint`] answers for
//! canonical modules, whatever tensor holds them. Nothing is loaded: weights are lazy tensors over mapped files.

mod behind;
mod checkpoint;
mod extract;
mod files;
mod fuse;
mod names;
mod output;
mod round;
mod undo;

pub use behind::open_behind;
pub use checkpoint::Checkpoint;
pub use extract::{ExtractOptions, ExtractReport, Extracted, extract};
pub use fuse::{CheckpointReport, FuseOptions, FuseReport, FusedTensor, UndoReport, Written, fuse};
pub use undo::{UnfuseOptions, UnfuseReport, unfuse};

#[cfg(test)]
mod tests;
