//! Undo files: what a fused checkpoint was before, to the bit.
//!
//! A safetensors file. For every tensor that fusing changed it holds the steps from the fused numbers to the original
//! ones (see [`rice`]), tile by tile: rows and bytes as 32-bit numbers, then the code, or the original bytes where they
//! are not longer. For every file that was written anew it holds the original header. The metadata names the hashes of
//! the tensors before and after, so that an undo file of another checkpoint is told before anything is written.

mod record;
mod restore;
mod rice;

pub use restore::{UnfuseOptions, UnfuseReport, unfuse};

pub(super) use record::Recorder;

/// The metadata entry.
const KEY: &str = "lorafmt.undo";

/// Hashes of a tensor: SHA-256 of those of its tiles one after the other.
fn combined<'h>(tiles: impl Iterator<Item = &'h [u8; 32]>) -> String {
    use sha2::Digest;
    let mut hash = sha2::Sha256::new();
    tiles.for_each(|tile| hash.update(tile));
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn hashed(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}
