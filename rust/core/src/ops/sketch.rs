//! A few numbers that stand for all deltas of an adapter, so that any two adapters of a model can be compared at once.
//!
//! Number k of a sketch is `sum over modules of u_k^T D v_k`, where u_k and v_k are vectors of random signs that depend
//! on the seed, the module's canonical name and the place in the vector, and on nothing else. The product of two such
//! numbers has the inner product of the adapters as its mean (Johnson and Lindenstrauss 1984; of matrices in bilinear
//! form: Alon, Matias and Szegedy 1996), so the cosine of two sketches estimates the cosine of the adapters. For a cosine
//! c its standard error is about `(1 - c^2) / sqrt(PROBES)`, more where few modules weigh most; [`Similarity`] tells the
//! one that the numbers themselves show. Scaled copies have a cosine of 1, without error.

use rayon::prelude::*;

use super::delta::shape;
use super::factors::{Downs, Ups, factors};
use super::norm::{KronFactor, each_tile, kronecker, plain};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::io::Control;
use crate::kind::{Kind, Module, Slot};
use crate::linalg::{Matrix, Tall};
use crate::random::Counter;
use crate::tensor::Tensor;

/// Numbers of a sketch: the signs of one place, in all vectors, are the bits of one word.
pub const PROBES: usize = u64::BITS as usize;

/// All sketches that are compared have one seed.
const SEED: u64 = 0;

/// Rows of a factor that are read at a time.
const TILE: usize = 512;

/// The highest rank to which LoHa is expanded. Above it rows of the delta cost less.
const MAX_RANK: usize = 256;

/// Vectors that are added to a parameter.
const VECTORS: [Slot; 3] = [Slot::DiffB, Slot::WNorm, Slot::BNorm];

/// What stands for the deltas of an adapter.
#[derive(Debug, Clone)]
pub struct DeltaSketch {
    /// The numbers.
    pub values: [f64; PROBES],
    /// Whether they see all that the adapter does. They do not see magnitudes, parameters that are replaced, kinds
    /// without a delta of their own, and what is not finite.
    pub complete: bool,
}

/// How like two adapters are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Similarity {
    /// The estimate of the cosine.
    pub cosine: f64,
    /// Its standard error.
    pub error: f64,
    /// How many times the first the second is, if it is a multiple.
    pub ratio: f64,
}

impl DeltaSketch {
    /// How like the deltas of two adapters of one family are; `None` if one of them does nothing.
    pub fn similarity(&self, other: &Self) -> Option<Similarity> {
        let (a, b) = (dot(&self.values, &self.values), dot(&other.values, &other.values));
        if a == 0.0 || b == 0.0 {
            return None;
        }
        let inner = dot(&self.values, &other.values);
        let cosine = (inner / (a.sqrt() * b.sqrt())).clamp(-1.0, 1.0);
        // How much each pair of numbers moves the estimate (the influence function of a correlation).
        let n = PROBES as f64;
        let moved = self.values.iter().zip(&other.values).map(|(x, y)| {
            let (x, y) = (x * (n / a).sqrt(), y * (n / b).sqrt());
            (x * y - cosine * (x * x + y * y) / 2.0).powi(2)
        });
        let error = (moved.sum::<f64>() / ((n - 1.0) * n)).sqrt();
        Some(Similarity { cosine, error, ratio: inner / a })
    }

    /// The norm of the difference over the larger norm, estimated; 0 if both do nothing.
    pub fn distance(&self, other: &Self) -> f64 {
        let larger = dot(&self.values, &self.values).max(dot(&other.values, &other.values));
        let difference: f64 = self.values.iter().zip(&other.values).map(|(x, y)| (x - y) * (x - y)).sum();
        if larger > 0.0 { (difference / larger).sqrt() } else { 0.0 }
    }

    fn empty() -> Self {
        Self { values: [0.0; PROBES], complete: true }
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Sketches all deltas. Reads every factor once, and of each only some rows are held.
pub fn delta_sketch(adapter: &Adapter, control: &Control) -> Result<DeltaSketch> {
    adapter.ensure_apart()?;
    let modules: Vec<_> = adapter.modules.iter().collect();
    let parts: Vec<DeltaSketch> = modules
        .par_iter()
        .map(|(key, placed)| {
            control.check()?;
            Ok(of_module(&placed.module, &adapter.display(key)))
        })
        .collect::<Result<_>>()?;
    // In order, so that the sum does not depend on threads.
    let mut out = DeltaSketch::empty();
    for part in parts {
        out.complete &= part.complete;
        out.values.iter_mut().zip(part.values).for_each(|(sum, x)| *sum += x);
    }
    Ok(out)
}

/// The part of one module, by its canonical name.
fn of_module(module: &Module, name: &str) -> DeltaSketch {
    let module = &module.tightened();
    let mut out = DeltaSketch::empty();
    let vectors = VECTORS.iter().copied().chain(vector_difference(module).then_some(Slot::Diff));
    for slot in vectors {
        if let Some(tensor) = module.get(slot) {
            add(&mut out.values, 1.0, &vector(tensor, &format!("{name} {}", slot.name())));
        }
    }
    match module.kind {
        Kind::Bias | Kind::Norm => {}
        Kind::Full if vector_difference(module) => {}
        Kind::Set => out.complete = false,
        _ => match matrix(module, name) {
            Some(values) => add(&mut out.values, 1.0, &values),
            None => out.complete = false,
        },
    }
    out.complete &= !module.is_dora();
    if out.values.iter().any(|x| !x.is_finite()) {
        return DeltaSketch { complete: false, ..DeltaSketch::empty() };
    }
    out
}

/// Whether the stored difference is one of a vector.
fn vector_difference(module: &Module) -> bool {
    module.kind == Kind::Full && module.get(Slot::Diff).is_some_and(|t| t.shape().len() < 2)
}

fn add(sum: &mut [f64; PROBES], factor: f64, values: &[f64; PROBES]) {
    sum.iter_mut().zip(values).for_each(|(s, x)| *s += factor * x);
}

/// The random signs of one side of a module.
struct Signs(Counter);

impl Signs {
    fn new(name: &str, side: &str) -> Self {
        Self(Counter::new(SEED, &format!("{name} {side}")))
    }

    /// One row for each place, one column for each vector.
    fn read(&self, places: std::ops::Range<usize>) -> Matrix {
        let mut data = Vec::with_capacity(places.len() * PROBES);
        for place in places.clone() {
            let bits = self.0.bits(place as u64);
            data.extend((0..PROBES).map(|k| sign(bits, k)));
        }
        Matrix::new(places.len(), PROBES, data)
    }
}

/// 1 or -1, by one bit.
fn sign(bits: u64, k: usize) -> f64 {
    f64::from_bits(1f64.to_bits() | (bits >> k & 1) << 63)
}

fn vector(tensor: &Tensor, name: &str) -> [f64; PROBES] {
    let signs = Counter::new(SEED, name);
    let mut out = [0.0; PROBES];
    for (i, x) in tensor.to_f64().into_iter().enumerate() {
        let bits = signs.bits(i as u64);
        out.iter_mut().enumerate().for_each(|(k, sum)| *sum += x * sign(bits, k));
    }
    out
}

/// `u_k^T D v_k` for every k, by the shortest exact way that the kind offers; `None` if it has no delta of its own.
fn matrix(module: &Module, name: &str) -> Option<[f64; PROBES]> {
    let (rows, cols) = (Signs::new(name, "rows"), Signs::new(name, "cols"));
    if let Some(parts) = kronecker(module) {
        return Some(kronecker_probes(&parts, module.scale, &rows, &cols));
    }
    let (m, n) = shape(module)?;
    let expanded = plain(module, MAX_RANK.min(m.min(n)));
    let bare = expanded.as_ref().unwrap_or(module);
    if let Some((up, down)) = factors(bare) {
        let (left, right) = (contracted(&Ups(up), &rows), contracted(&Downs(down), &cols));
        return Some(paired(&left, &right, bare.scale));
    }
    dense(module, &rows, &cols)
}

/// `tall^T @ signs`, rank x PROBES.
fn contracted(tall: &dyn Tall, signs: &Signs) -> Matrix {
    let mut out = Matrix::zeros(tall.cols(), PROBES);
    for start in (0..tall.rows()).step_by(TILE) {
        let places = start..tall.rows().min(start + TILE);
        out.add_transpose_product(&tall.read(places.clone()), &signs.read(places));
    }
    out
}

/// Column by column, the inner products of two matrices, times `factor`.
fn paired(x: &Matrix, y: &Matrix, factor: f64) -> [f64; PROBES] {
    let mut out = [0.0; PROBES];
    for i in 0..x.rows() {
        let pairs = x.row(i).iter().zip(y.row(i));
        out.iter_mut().zip(pairs).for_each(|(sum, (x, y))| *sum += factor * x * y);
    }
    out
}

/// From the rows of the delta, some at a time.
fn dense(module: &Module, rows: &Signs, cols: &Signs) -> Option<[f64; PROBES]> {
    let (_, n) = shape(module)?;
    let right = cols.read(0..n);
    let mut out = [0.0; PROBES];
    each_tile(module, |range, values| {
        let tile = Matrix::new(range.len(), n, values);
        add(&mut out, 1.0, &paired(&rows.read(range), &tile.times(&right), 1.0));
        Some(())
    })?;
    Some(out)
}

/// `u^T kron(a, b) v` is the inner product of a and `U b V^T`, where U and V are u and v, row by row, as matrices.
fn kronecker_probes(parts: &[KronFactor<'_>; 2], scale: f64, rows: &Signs, cols: &Signs) -> [f64; PROBES] {
    let whole = |part: &KronFactor<'_>| match part {
        KronFactor::Whole(t) => Matrix::new(t.rows(), t.cols(), t.to_f64()),
        KronFactor::Product(a, b) => {
            Matrix::new(a.rows(), a.cols(), a.to_f64()).times(&Matrix::new(b.rows(), b.cols(), b.to_f64()))
        }
    };
    let (a, b) = (whole(&parts[0]), whole(&parts[1]));
    let words = |signs: &Signs, count: usize| (0..count as u64).map(|i| signs.0.bits(i)).collect::<Vec<_>>();
    let (left, right) = (words(rows, a.rows() * b.rows()), words(cols, a.cols() * b.cols()));
    std::array::from_fn(|k| {
        let u = Matrix::from_fn(a.rows(), b.rows(), |i, j| sign(left[i * b.rows() + j], k));
        let v = Matrix::from_fn(a.cols(), b.cols(), |i, j| sign(right[i * b.cols() + j], k));
        scale * dot(a.data(), u.times(&b).times_transpose(&v).data())
    })
}

#[cfg(test)]
mod tests;
