//! Comparing two adapters by what they do, not by how they are written.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::Serialize;

use super::delta::{delta_rows, shape};
use super::expand::counterpart;
use crate::adapter::{Adapter, ModuleKey};
use crate::error::{Code, Error, Result};
use crate::kind::{Kind, Module, Slot};
use crate::linalg::low_rank_norms;
use crate::tensor::Tensor;

/// Rows of a delta that are held at a time, in elements.
const TILE: usize = 1 << 22;

/// One module of a comparison.
#[derive(Debug, Clone, Serialize)]
pub struct ModuleDiff {
    /// The canonical path with its component.
    pub module: String,
    /// Relative Frobenius norm of the difference; 1 if only one side has the module.
    pub relative_error: f64,
    /// `equal`, `close`, `differs`, `only-a`, `only-b`, `incomparable`.
    pub state: &'static str,
}

/// A comparison.
#[derive(Debug, Clone, Serialize)]
pub struct DiffReport {
    /// Version of this document.
    pub schema: u32,
    /// The first file.
    pub a: String,
    /// The second file.
    pub b: String,
    /// Whether every module is within the tolerance.
    pub equal: bool,
    /// The tolerance.
    pub tolerance: f64,
    /// Modules of both together.
    pub modules: usize,
    /// The largest relative error.
    pub max_relative_error: f64,
    /// The modules that are not bit for bit the same in effect.
    pub differences: Vec<ModuleDiff>,
}

/// Compares module by module. Both adapters must be of one family.
pub fn diff(a: &Adapter, b: &Adapter, tolerance: f64) -> Result<DiffReport> {
    if a.family_table().name != b.family_table().name {
        let message = format!("one file is {}, the other {}", a.family_table().name, b.family_table().name);
        return Err(Error::new(Code::InvalidArgument, message)
            .at(b.source.path())
            .hint("say `--family` if both are the same"));
    }
    a.ensure_apart()?;
    b.ensure_apart()?;
    let compared: Vec<ModuleDiff> = pairs(a, b)
        .par_iter()
        .map(|(key, x, y)| {
            let (error, state) = match (x, y) {
                (Some(x), Some(y)) => compare(x, y, tolerance),
                (Some(x), None) => alone(x, "only-a"),
                (None, Some(y)) => alone(y, "only-b"),
                (None, None) => (0.0, "equal"),
            };
            ModuleDiff { module: a.display(key), relative_error: error, state }
        })
        .collect();
    let max = compared.iter().map(|m| m.relative_error).fold(0.0, f64::max);
    Ok(DiffReport {
        schema: 1,
        a: a.source.path().to_string_lossy().into_owned(),
        b: b.source.path().to_string_lossy().into_owned(),
        equal: compared.iter().all(|m| m.relative_error <= tolerance),
        tolerance,
        modules: compared.len(),
        max_relative_error: max,
        differences: compared.into_iter().filter(|m| m.state != "equal").collect(),
    })
}

/// What both adapters have under a name.
type Pair<'a> = (&'a ModuleKey, Option<Cow<'a, Module>>, Option<Cow<'a, Module>>);

/// The modules of both, side by side. A fused module that one of them could not cut meets the parts of the other, joined.
fn pairs<'a>(a: &'a Adapter, b: &'a Adapter) -> Vec<Pair<'a>> {
    let whole = |x: &'a Adapter, y: &'a Adapter| {
        x.modules.iter().filter_map(move |(key, placed)| Some((key, counterpart(x, key, &placed.address, y)?)))
    };
    let (of_b, of_a): (BTreeMap<_, _>, BTreeMap<_, _>) = (whole(a, b).collect(), whole(b, a).collect());
    let met: BTreeSet<&ModuleKey> = of_a.values().chain(of_b.values()).flat_map(|(keys, _)| keys).collect();
    let own = |adapter: &'a Adapter, key| adapter.modules.get(key).map(|placed| Cow::Borrowed(&placed.module));
    let joined = |found: &BTreeMap<&ModuleKey, (Vec<ModuleKey>, Module)>, key| {
        found.get(key).map(|(_, module)| Cow::Owned(module.clone()))
    };
    let keys: BTreeSet<&'a ModuleKey> = a.modules.keys().chain(b.modules.keys()).collect();
    let pair = |key| (key, own(a, key).or_else(|| joined(&of_a, key)), own(b, key).or_else(|| joined(&of_b, key)));
    keys.into_iter().filter(|key| !met.contains(key)).map(pair).collect()
}

/// A module that only one side has is no difference if it does nothing.
fn alone(module: &Module, state: &'static str) -> (f64, &'static str) {
    if zero_delta(module) && is_zero(module, Slot::DiffB) { (0.0, "equal") } else { (1.0, state) }
}

fn is_zero(module: &Module, slot: Slot) -> bool {
    module.get(slot).is_none_or(|t| t.is_zero(0..t.rows(), 0..t.cols()))
}

/// Whether the weight is left as it is. A bias by itself is a layer whose delta is zero.
fn zero_delta(module: &Module) -> bool {
    let zero_factors = is_zero(module, Slot::Up) || is_zero(module, Slot::Down);
    module.kind == Kind::Bias || (module.kind == Kind::Lora && !module.is_dora() && zero_factors)
}

fn compare(a: &Module, b: &Module, tolerance: f64) -> (f64, &'static str) {
    let (a, b) = (a.tightened(), b.tightened());
    let rest = side_tensors(&a, &b);
    let main = if same_factors(&a, &b) || (zero_delta(&a) && zero_delta(&b)) {
        Some(0.0)
    } else if a.kind == Kind::Lora && b.kind == Kind::Lora && a.get(Slot::Mid).is_none() && b.get(Slot::Mid).is_none() {
        low_rank(&a, &b)
    } else {
        dense(&a, &b)
    };
    match main.or_else(|| vectors(&a, &b)) {
        None => (1.0, "incomparable"),
        Some(error) => {
            let error = error.max(rest);
            (
                error,
                if error == 0.0 {
                    "equal"
                } else if error <= tolerance {
                    "close"
                } else {
                    "differs"
                },
            )
        }
    }
}

/// Biases and magnitudes: what a module has beside its delta.
const SIDE: [Slot; 3] = [Slot::DiffB, Slot::Magnitude, Slot::MagnitudeIn];

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

fn square(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum()
}

/// sqrt(difference) over the larger norm; NaN counts as a full difference.
fn ratio(difference: f64, a: f64, b: f64) -> f64 {
    if difference == 0.0 {
        return 0.0;
    }
    let ratio = (difference / a.max(b)).sqrt();
    if ratio.is_nan() { 1.0 } else { ratio }
}

/// ||B1 A1 - B2 A2|| through the R factors of [B1, -B2] and [A1; A2]^T: accurate to rounding, never m x n.
fn low_rank(a: &Module, b: &Module) -> Option<f64> {
    if shape(a)? != shape(b)? {
        return Some(1.0);
    }
    if let Some(factor) = multiple(a, b) {
        return Some((1.0 - factor).abs() / factor.abs().max(1.0));
    }
    let (m, n) = shape(a)?;
    let columns = |t: &Tensor, scale: f64| {
        transpose(&t.to_f64(), t.rows(), t.cols()).iter().map(|v| v * scale).collect::<Vec<f64>>()
    };
    let (ups, downs) = (
        [columns(a.get(Slot::Up)?, a.scale), columns(b.get(Slot::Up)?, -b.scale)],
        [a.get(Slot::Down)?.to_f64(), b.get(Slot::Down)?.to_f64()],
    );
    let (rank_a, rank_b) = (ups[0].len() / m.max(1), ups[1].len() / m.max(1));
    let groups = [0..rank_a + rank_b, 0..rank_a, rank_a..rank_a + rank_b];
    let norms = low_rank_norms(m, n, &ups.concat(), &downs.concat(), &groups);
    Some(ratio(norms[0] * norms[0], norms[1] * norms[1], norms[2] * norms[2]))
}

/// The number by which b's delta is a multiple of a's, if its factors are exact multiples: as after folding a scale
/// that is a power of two. Much cheaper than comparing directions.
fn multiple(a: &Module, b: &Module) -> Option<f64> {
    let of = |slot: Slot| a.get(slot)?.multiple(b.get(slot)?);
    let factor = b.scale / a.scale * of(Slot::Up)? * of(Slot::Down)?;
    factor.is_finite().then_some(factor)
}

fn transpose(values: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    (0..rows * cols).map(|i| values[(i % rows) * cols + i / rows]).collect()
}

fn dense(a: &Module, b: &Module) -> Option<f64> {
    if shape(a)? != shape(b)? {
        return Some(1.0);
    }
    let (rows, cols) = shape(a)?;
    let step = (TILE / cols.max(1)).max(1);
    let (mut difference, mut norm_a, mut norm_b) = (0.0, 0.0, 0.0);
    let mut row = 0;
    while row < rows {
        let end = rows.min(row + step);
        let (x, y) = (delta_rows(a, row..end)?, delta_rows(b, row..end)?);
        difference += x.iter().zip(&y).map(|(p, q)| (p - q) * (p - q)).sum::<f64>();
        norm_a += square(&x);
        norm_b += square(&y);
        row = end;
    }
    Some(ratio(difference, norm_a, norm_b))
}
