//! Fewer ranks from random samples of the delta.

use std::convert::Infallible;

use super::{RankRule, Resized};
use crate::dtype::Dtype;
use crate::kind::{Kind, Module, Slot};
use crate::linalg::{Matrix, Sketch, sketch};
use crate::ops::delta::{delta_rows, shape};
use crate::tensor::Tensor;

/// Replaces the factors, or a full difference, by those of the leading singular values. `None` for NaN and infinities.
pub(super) fn shrink(
    module: &mut Module,
    rule: RankRule,
    (niter, oversample): (usize, usize),
    seed: u64,
    done: &mut Resized,
) -> Option<()> {
    let mut plain = module.clone();
    plain.scale = 1.0;
    let (rows, cols) = shape(&plain)?;
    let how = Sketch { rank: rule.limit.unwrap_or(done.rank_before).min(done.rank_before), oversample, niter, seed };
    let tile = |rows| Ok::<_, Infallible>(delta_rows(&plain, rows).unwrap_or_default());
    let found = match sketch(rows, cols, how, tile) {
        Ok(found) => found?,
        Err(never) => match never {},
    };
    let s = &found.svd.s;
    let energy: f64 = s.iter().map(|x| x * x).sum();
    // What is left of the norm is that of singular values that were not followed, or rounding.
    let rest = Some(found.norm2 - energy).filter(|rest| *rest > 1e-12 * found.norm2).unwrap_or(0.0);
    let rank = rule.rank(s, rest).min(s.iter().filter(|x| **x > 0.0).count().max(1)).min(done.rank_before);
    if rank == done.rank_before && module.kind == Kind::Lora {
        return Some(());
    }
    let kept: f64 = s[..rank.min(s.len())].iter().map(|x| x * x).sum();
    let share: Vec<f64> = s.iter().map(|x| x.sqrt()).collect();
    let (u, v) = (found.svd.u.first_cols(rank).scaled_cols(&share), found.svd.v.first_cols(rank).scaled_cols(&share));
    put(module, &u, &v.transposed());
    done.rank_after = rank;
    let scale = module.scale.abs();
    done.measured(found.norm2.sqrt() * scale, (found.norm2 - kept).max(0.0).sqrt() * scale);
    Some(())
}

/// Puts factors in the place of those of a module, or of its full difference, in the type that it has.
fn put(module: &mut Module, up: &Matrix, down: &Matrix) {
    let (dtype, inner) = match (module.get(Slot::Diff), module.get(Slot::Down)) {
        (Some(diff), _) => (diff.dtype(), diff.shape()[1..].to_vec()),
        (None, Some(down)) => (down.dtype(), down.shape()[1..].to_vec()),
        (None, None) => (Dtype::F32, vec![down.cols()]),
    };
    let dtype = if dtype.is_fp8() { Dtype::BF16 } else { dtype };
    let ones = std::iter::repeat_n(1, inner.len().saturating_sub(1));
    let up_shape: Vec<usize> = [up.rows(), up.cols()].into_iter().chain(ones).collect();
    let down_shape: Vec<usize> = std::iter::once(down.rows()).chain(inner).collect();
    module.tensors.remove(&Slot::Diff);
    module.tensors.insert(Slot::Up, Tensor::computed(up, dtype).reshaped(up_shape));
    module.tensors.insert(Slot::Down, Tensor::computed(down, dtype).reshaped(down_shape));
    module.kind = Kind::Lora;
    module.alpha = None;
    module.approximate = true;
    module.without_origin();
}
