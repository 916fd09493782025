//! Frobenius norms of deltas, by the shortest exact way that a kind offers.

use std::ops::Range;

use super::delta::{delta_rows, shape};
use super::factors::{Downs, Ups, factors};
use crate::kind::{Kind, Module, Slot};
use crate::linalg::{Product, product_norm2};
use crate::tensor::Tensor;

/// Elements of a delta that are held at a time.
const TILE: usize = 1 << 20;

/// Biases and magnitudes: what a module has beside its delta.
pub(super) const SIDE: [Slot; 3] = [Slot::DiffB, Slot::Magnitude, Slot::MagnitudeIn];

/// The same delta as a plain LoRA of at most `max_rank` (what is plain already has any rank), without biases and
/// magnitudes; `None` if there is no such form.
pub(super) fn plain(module: &Module, max_rank: usize) -> Option<Module> {
    let mut bare = module.clone();
    bare.tensors.retain(|slot, _| !SIDE.contains(slot));
    let plain = bare.expanded(max_rank).ok()?;
    factors(&plain).is_some().then_some(plain)
}

/// Calls `take` with the rows of a delta, tile by tile, as long as it has any.
pub(super) fn each_tile(module: &Module, mut take: impl FnMut(Range<usize>, Vec<f64>) -> Option<()>) -> Option<()> {
    let (rows, cols) = shape(module)?;
    let step = (TILE / cols.max(1)).max(1);
    (0..rows).step_by(step).try_for_each(|start| {
        let range = start..rows.min(start + step);
        take(range.clone(), delta_rows(module, range)?)
    })
}

/// The squared Frobenius norm of the delta, with the scale; `None` for kinds that have none without base weights.
///
/// LoRA: through Gram matrices of the factors. LoKr: |kron(a, b)| = |a| |b|. Others: the rows themselves.
pub(super) fn norm_squared(module: &Module) -> Option<f64> {
    if let Some((up, down)) = factors(module) {
        return Some(product_norm2(Product { factor: module.scale, b: &Ups(up), a: &Downs(down) }));
    }
    if let Some(parts) = kronecker(module) {
        return Some(module.scale * module.scale * parts.iter().map(KronFactor::norm_squared).product::<f64>());
    }
    let mut sum = 0.0;
    each_tile(module, |_, rows| {
        sum += square(&rows);
        Some(())
    })?;
    Some(sum)
}

/// The sum of squares.
pub(super) fn square(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum()
}

/// A factor of a Kronecker product: stored whole, or as a product itself.
pub(super) enum KronFactor<'a> {
    Whole(&'a Tensor),
    Product(&'a Tensor, &'a Tensor),
}

impl KronFactor<'_> {
    fn norm_squared(&self) -> f64 {
        match self {
            KronFactor::Whole(tensor) => square(&tensor.to_f64()),
            KronFactor::Product(a, b) => product_norm2(Product { factor: 1.0, b: &Ups(a), a: &Downs(b) }),
        }
    }
}

/// Both factors of a LoKr; `None` for other kinds and for those with a Tucker core.
pub(super) fn kronecker(module: &Module) -> Option<[KronFactor<'_>; 2]> {
    if module.kind != Kind::Lokr || module.get(Slot::LokrT2).is_some() {
        return None;
    }
    let factor = |whole, a, b| match module.get(whole) {
        Some(tensor) => Some(KronFactor::Whole(tensor)),
        None => Some(KronFactor::Product(module.get(a)?, module.get(b)?)),
    };
    let first = factor(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B)?;
    Some([first, factor(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B)?])
}
