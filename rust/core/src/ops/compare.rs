//! Comparing two modules by their deltas.

use std::collections::BTreeSet;

use super::delta::{delta_rows, shape};
use super::factors::{Downs, Ups, factors};
use super::norm::{SIDE, each_tile, norm_squared, plain, square};
use crate::kind::{Kind, Module, Slot};
use crate::linalg::{Compared, Product, compare_products};
use crate::tensor::Tensor;

/// The highest rank to which LoHa and LoKr are expanded to be compared by factors. Above it, and up to where forming
/// rows of the delta costs as much, tiles are no slower.
const MAX_RANK: usize = 256;

/// What two modules have in common.
pub(super) struct Verdict {
    /// Relative Frobenius norm of the difference, that of biases and magnitudes if it is larger.
    pub(super) relative_error: f64,
    /// `equal`, `close`, `differs`, `only-a`, `only-b`, `incomparable`.
    pub(super) state: &'static str,
    /// Of the deltas; `None` where there are none to compare.
    pub(super) numbers: Option<Compared>,
}

/// A module that only one side has is no difference if it does nothing.
pub(super) fn alone(module: &Module, state: &'static str) -> Verdict {
    let module = module.tightened();
    let norm = if module.kind == Kind::Bias { Some(0.0) } else { norm_squared(&module) };
    let first = state == "only-a";
    let numbers = norm.map(|n| Compared {
        a: if first { n } else { 0.0 },
        b: if first { 0.0 } else { n },
        difference: n,
        inner: 0.0,
    });
    let nothing = zero_delta(&module) && is_zero(&module, Slot::DiffB);
    let (relative_error, state) = if nothing { (0.0, "equal") } else { (1.0, state) };
    Verdict { relative_error, state, numbers }
}

/// Compares two modules of one name.
pub(super) fn compare(a: &Module, b: &Module, tolerance: f64) -> Verdict {
    let (a, b) = (a.tightened(), b.tightened());
    let rest = side_tensors(&a, &b);
    let (main, numbers) = deltas(&a, &b);
    let Some(error) = main.or_else(|| vectors(&a, &b)) else {
        return Verdict { relative_error: 1.0, state: "incomparable", numbers: None };
    };
    let error = error.max(rest);
    let state = match error {
        0.0 => "equal",
        e if e <= tolerance => "close",
        _ => "differs",
    };
    Verdict { relative_error: error, state, numbers }
}

/// The relative error of the deltas, and all numbers of them.
fn deltas(a: &Module, b: &Module) -> (Option<f64>, Option<Compared>) {
    if zero_delta(a) && zero_delta(b) {
        return (Some(0.0), Some(Compared { a: 0.0, b: 0.0, difference: 0.0, inner: 0.0 }));
    }
    if same_factors(a, b) {
        return (Some(0.0), norm_squared(a).map(|n| times(n, 1.0)));
    }
    let Some((size_a, size_b)) = shape(a).zip(shape(b)) else { return (None, None) };
    if size_a != size_b {
        let numbers = norm_squared(a).zip(norm_squared(b));
        return (Some(1.0), numbers.map(|(a, b)| Compared { a, b, difference: a.max(b), inner: f64::NAN }));
    }
    if let Some(factor) = multiple(a, b) {
        let error = (1.0 - factor).abs() / factor.abs().max(1.0);
        return (Some(error), norm_squared(a).map(|n| times(n, factor)));
    }
    let numbers = low_rank(a, b).or_else(|| dense(a, b));
    (numbers.map(|n| ratio(n.difference, n.a, n.b)), numbers)
}

/// The numbers of a delta whose squared norm is `n` and `factor` times the same.
fn times(n: f64, factor: f64) -> Compared {
    let apart = 1.0 - factor;
    Compared { a: n, b: factor * factor * n, difference: apart * apart * n, inner: factor * n }
}

fn is_zero(module: &Module, slot: Slot) -> bool {
    module.get(slot).is_none_or(|t| t.is_zero(0..t.rows(), 0..t.cols()))
}

/// Whether the weight is left as it is. A bias by itself is a layer whose delta is zero.
fn zero_delta(module: &Module) -> bool {
    let zero_factors = is_zero(module, Slot::Up) || is_zero(module, Slot::Down);
    module.kind == Kind::Bias || (module.kind == Kind::Lora && !module.is_dora() && zero_factors)
}

/// Whether the deltas are equal for having equal factors.
fn same_factors(a: &Module, b: &Module) -> bool {
    let factors = |m: &'_ Module| {
        m.tensors.iter().filter(|(s, _)| !SIDE.contains(s)).map(|(s, t)| (*s, t.clone())).collect::<Vec<_>>()
    };
    let (x, y) = (factors(a), factors(b));
    a.kind == b.kind
        && a.scale == b.scale
        && x.len() == y.len()
        && x.iter().zip(&y).all(|((s, p), (t, q))| s == t && p.same_as(q))
}

/// Biases and magnitudes, which no delta shows.
fn side_tensors(a: &Module, b: &Module) -> f64 {
    SIDE.into_iter().map(|slot| relative(a.get(slot), b.get(slot))).fold(0.0, f64::max)
}

/// Kinds without a delta: tensor by tensor.
fn vectors(a: &Module, b: &Module) -> Option<f64> {
    if a.kind != b.kind || a.scale != b.scale {
        return None;
    }
    let slots: BTreeSet<Slot> = a.tensors.keys().chain(b.tensors.keys()).copied().collect();
    Some(slots.into_iter().map(|slot| relative(a.get(slot), b.get(slot))).fold(0.0, f64::max))
}

fn relative(a: Option<&Tensor>, b: Option<&Tensor>) -> f64 {
    let values = |t: Option<&Tensor>| t.map(Tensor::to_f64).unwrap_or_default();
    let (mut x, mut y) = (values(a), values(b));
    let n = x.len().max(y.len());
    x.resize(n, 0.0);
    y.resize(n, 0.0);
    ratio(x.iter().zip(&y).map(|(p, q)| (p - q) * (p - q)).sum::<f64>(), square(&x), square(&y))
}

/// sqrt(difference) over the larger norm; NaN counts as a full difference.
pub(super) fn ratio(difference: f64, a: f64, b: f64) -> f64 {
    if difference == 0.0 {
        return 0.0;
    }
    let ratio = (difference / a.max(b)).sqrt();
    if ratio.is_nan() { 1.0 } else { ratio }
}

/// Through the factors, of what has a plain form of a modest rank: accurate to rounding, never m x n.
fn low_rank(a: &Module, b: &Module) -> Option<Compared> {
    let (a, b) = (plain(a, MAX_RANK)?, plain(b, MAX_RANK)?);
    let ((up_a, down_a), (up_b, down_b)) = (factors(&a)?, factors(&b)?);
    Some(compare_products(
        Product { factor: a.scale, b: &Ups(up_a), a: &Downs(down_a) },
        Product { factor: b.scale, b: &Ups(up_b), a: &Downs(down_b) },
    ))
}

/// The number by which b's delta is a multiple of a's, if its factors are exact multiples: as after folding a scale
/// that is a power of two. Much cheaper than comparing directions.
fn multiple(a: &Module, b: &Module) -> Option<f64> {
    let ((up_a, down_a), (up_b, down_b)) = (factors(a)?, factors(b)?);
    let factor = b.scale / a.scale * up_a.multiple(up_b)? * down_a.multiple(down_b)?;
    factor.is_finite().then_some(factor)
}

/// Row by row.
fn dense(a: &Module, b: &Module) -> Option<Compared> {
    let mut sums = Compared { a: 0.0, b: 0.0, difference: 0.0, inner: 0.0 };
    each_tile(a, |rows, x| {
        let y = delta_rows(b, rows)?;
        let pairs = || x.iter().zip(&y);
        sums.difference += pairs().map(|(p, q)| (p - q) * (p - q)).sum::<f64>();
        sums.inner += pairs().map(|(p, q)| p * q).sum::<f64>();
        sums.a += square(&x);
        sums.b += square(&y);
        Some(())
    })?;
    Some(sums)
}
