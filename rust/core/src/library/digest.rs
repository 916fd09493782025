//! A hash of what an adapter holds, whatever the order of its tensors and the metadata around them.

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use crate::adapter::Adapter;

/// Hashes of the tensors, and of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Digest {
    /// Of names, types, shapes and bytes of all tensors, and of the scale of every module, which may stand elsewhere.
    pub(super) tensors: [u8; 32],
    /// Of the file up to its first tensor. Together with `tensors` it stands for the whole file.
    pub(super) head: [u8; 32],
}

impl Digest {
    /// Reads every byte.
    pub(super) fn of(adapter: &Adapter) -> Self {
        let source = &adapter.source;
        let mut order: Vec<usize> = (0..source.tensors().len()).collect();
        order.sort_by(|&a, &b| source.tensors()[a].name.cmp(&source.tensors()[b].name));
        let bodies: Vec<_> = order.par_iter().map(|&i| Sha256::digest(source.bytes(i))).collect();
        let mut all = Sha256::new();
        for (&i, body) in order.iter().zip(&bodies) {
            let info = &source.tensors()[i];
            for text in [info.name.as_str(), info.dtype.name(), &format!("{:?}", info.shape)] {
                all.update((text.len() as u64).to_le_bytes());
                all.update(text);
            }
            all.update(body);
        }
        for placed in adapter.modules.values() {
            all.update(placed.module.scale.to_le_bytes());
        }
        let head = source.head().unwrap_or_default();
        Self { tensors: all.finalize().into(), head: Sha256::digest(head).into() }
    }
}
