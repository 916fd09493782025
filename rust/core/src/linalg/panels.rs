//! Products in float32 with a bound on the error of every element.
//!
//! Let `d = sum_k u_k v_k` be an element, with K terms in all, and `e = 2^-24` the unit roundoff of float32. With `u`
//! rounded to float32 and `v` a float32 number, each term carries one rounding of `u`, at most one of its product, and
//! at most K of sums, in whatever order and with fused operations or without: the error is at most
//! `(K + 3) e sum |u_k v_k|`, but for terms of second order (Higham 2002, section 3.1), and `sum |u_k v_k|` is at most
//! `|u| |v|`. The bound here is `(K + 8) e |u| |v|`, with norms that are rounded up, so that the second order, the
//! rounding of the bound itself, and that of a sum in float64 all fit into it. Products that underflow are not in it:
//! they are off by less than `K 2^-148` together.

use super::Matrix;
use crate::simd::Simd;

/// Columns of a panel: two vectors of 16 numbers, or more of fewer.
pub(crate) const WIDE: usize = 32;

/// Rows of a block. Each panel is read once for them, from the second-level cache.
pub(crate) const TALL: usize = 12;

/// Rows that are computed together: with two vectors each, they and their factors fit into 16 registers; of the widest
/// vectors there are 32, which take the whole block.
const FEW: usize = 6;

/// More terms than this are not bounded: the second order would show.
pub(crate) const MOST_TERMS: usize = 1 << 12;

/// Factors smaller than this count as this: what is lost where they underflow is covered, and bounds do not.
const LEAST: f64 = f64::from_bits((1023 - 100) << 52);

/// Rounds up what was computed in float64, however it is rounded to float32 and used there a few times.
const UP: f64 = 1.0 + 1.0 / (1 << 20) as f64;

/// A right factor, in panels of columns that lie one after the other, row by row within each; filled up with zeros.
#[derive(Debug)]
pub(crate) struct Panels {
    terms: usize,
    panels: Vec<f32>,
    norms: Vec<f32>,
}

impl Panels {
    /// Packs a factor; `None` if float32 does not hold its numbers.
    pub(crate) fn new(right: &Matrix) -> Option<Self> {
        let (terms, cols) = (right.rows(), right.cols());
        if terms == 0 || right.data().iter().any(|v| f64::from(*v as f32) != *v) {
            return None;
        }
        let count = cols.div_ceil(WIDE);
        let mut panels = vec![0.0; count * terms * WIDE];
        let mut squares = vec![0.0; count * WIDE];
        for k in 0..terms {
            let row = right.row(k);
            row.iter().zip(&mut squares).for_each(|(v, s)| *s += square(*v));
            for (panel, part) in row.chunks(WIDE).enumerate() {
                let at = (panel * terms + k) * WIDE;
                panels[at..at + part.len()].iter_mut().zip(part).for_each(|(p, v)| *p = *v as f32);
            }
        }
        Some(Self { terms, panels, norms: squares.iter().map(|s| (s.sqrt() * UP) as f32).collect() })
    }

    /// Terms of the sum.
    pub(crate) fn terms(&self) -> usize {
        self.terms
    }

    /// Norms of the columns, rounded up; as many as the panels have.
    pub(crate) fn norms(&self) -> &[f32] {
        &self.norms
    }

    /// The largest norm of a column.
    pub(crate) fn largest(&self) -> f64 {
        self.norms.iter().copied().fold(0.0, f32::max).into()
    }

    /// Some columns of all terms.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> &[[f32; WIDE]] {
        let size = self.terms * WIDE;
        self.panels[panel * size..(panel + 1) * size].as_chunks().0
    }
}

fn square(v: f64) -> f64 {
    let v = if v.abs() < LEAST { LEAST } else { v };
    v * v
}

/// A left factor times a scale, in blocks of rows, term by term within each; filled up with zeros.
#[derive(Debug)]
pub(crate) struct Blocks {
    terms: usize,
    blocks: Vec<f32>,
    bounds: Vec<f32>,
    largest: f64,
}

impl Blocks {
    /// Packs a factor of a product with as many terms, together with others, as `all`.
    pub(crate) fn new(scale: f64, left: &Matrix, all: usize) -> Self {
        let terms = left.cols();
        let mut blocks = vec![0.0; left.rows().next_multiple_of(TALL) * terms];
        let mut bounds = Vec::with_capacity(left.rows());
        let mut largest = 0.0f64;
        for row in 0..left.rows() {
            let block = &mut blocks[row / TALL * TALL * terms..];
            let mut norm2 = 0.0;
            for (k, v) in left.row(row).iter().map(|v| scale * v).enumerate() {
                block[k * TALL + row % TALL] = v as f32;
                norm2 += square(v);
            }
            largest = largest.max(norm2.sqrt());
            bounds.push(((all + 8) as f64 * f64::from(f32::EPSILON) / 2.0 * norm2.sqrt() * UP) as f32);
        }
        Self { terms, blocks, bounds, largest }
    }

    /// The largest norm of a row.
    pub(crate) fn largest(&self) -> f64 {
        self.largest
    }

    /// What a row brings into the bound of its elements: times the norm of the column.
    pub(crate) fn bound(&self, row: usize) -> f32 {
        self.bounds[row]
    }

    #[inline(always)]
    fn block(&self, block: usize) -> &[[f32; TALL]] {
        let size = self.terms * TALL;
        self.blocks[block * size..(block + 1) * size].as_chunks().0
    }
}

/// Computes one block of rows of the sum of some products, over the columns of one panel, into `out` from column `at`.
#[inline(always)]
pub(crate) fn multiply<'a, S: Simd, const N: usize>(
    simd: S,
    factors: &[(&'a Blocks, &'a Panels)],
    (block, panel): (usize, usize),
    out: &mut [[f32; N]; TALL],
    at: usize,
) {
    if S::F32_LANES >= 16 {
        rows::<S, TALL, N>(simd, factors, (block, panel), 0, out, at);
    } else {
        for first in (0..TALL).step_by(FEW) {
            rows::<S, FEW, N>(simd, factors, (block, panel), first, out, at);
        }
    }
}

/// Some rows of a block, from `top` on.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn rows<'a, S: Simd, const ROWS: usize, const N: usize>(
    simd: S,
    factors: &[(&'a Blocks, &'a Panels)],
    (block, panel): (usize, usize),
    top: usize,
    out: &mut [[f32; N]; TALL],
    at: usize,
) {
    // Plain loops: closures and iterators are compiled for the oldest processor unless they are inlined, and they are
    // not always.
    let lanes = S::F32_LANES;
    for first in (0..WIDE).step_by(2 * lanes) {
        let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
        for &(left, right) in factors {
            let (left, right) = (left.block(block), right.panel(panel));
            for k in 0..left.len().min(right.len()) {
                let (left, right) = (&left[k], &right[k]);
                let right = S::as_simd_f32s(&right[first..first + 2 * lanes]).0;
                let (right0, right1) = (right[0], right[1]);
                for row in 0..ROWS {
                    let left = simd.splat_f32s(left[top + row]);
                    sums[row][0] = simd.mul_add_e_f32s(left, right0, sums[row][0]);
                    sums[row][1] = simd.mul_add_e_f32s(left, right1, sums[row][1]);
                }
            }
        }
        for row in 0..ROWS {
            let out = S::as_mut_simd_f32s(&mut out[top + row][at + first..at + first + 2 * lanes]).0;
            out[0] = sums[row][0];
            out[1] = sums[row][1];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Counter;
    use crate::simd::{WithSimd, run};

    struct Whole<'a> {
        left: [&'a Blocks; 2],
        right: [&'a Panels; 2],
        rows: usize,
        cols: usize,
    }

    impl WithSimd for Whole<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut out = vec![0.0; self.rows * self.cols];
            for (block, panel) in
                (0..self.rows.div_ceil(TALL)).flat_map(|b| (0..self.cols.div_ceil(WIDE)).map(move |p| (b, p)))
            {
                let mut tile = [[0f32; WIDE]; TALL];
                multiply(simd, &[0, 1].map(|i| (self.left[i], self.right[i])), (block, panel), &mut tile, 0);
                for (row, line) in (block * TALL..self.rows).zip(&tile) {
                    for (col, v) in (panel * WIDE..self.cols).zip(line) {
                        out[row * self.cols + col] = *v;
                    }
                }
            }
            out
        }
    }

    /// Factors of sizes from 2^-140 to 2^60, with zeros: every element is within its bound of the exact sum.
    #[test]
    fn every_element_is_within_its_bound() {
        let counter = Counter::new(5, "panels");
        let mut next = 0;
        let mut draw = |spread: f64| {
            next += 2;
            let sign = counter.uniform(next) - 0.5;
            let size = (counter.uniform(next + 1) - 0.7) * spread;
            if counter.uniform(next) < 0.1 { 0.0 } else { f64::from((sign * size.exp2()) as f32) }
        };
        for (rows, cols, ranks) in [(1, 1, [1, 1]), (7, 33, [3, 16]), (13, 70, [40, 1]), (6, 32, [300, 2])] {
            for spread in [1.0, 20.0, 200.0] {
                let factors = ranks.map(|rank| {
                    let left = Matrix::from_fn(rows, rank, |_, _| draw(spread));
                    (left, Matrix::from_fn(rank, cols, |_, _| draw(spread)))
                });
                let all = ranks[0] + ranks[1];
                let scales = [0.7, -1.3];
                let left = [0, 1].map(|i| Blocks::new(scales[i], &factors[i].0, all));
                let right = [0, 1].map(|i| Panels::new(&factors[i].1).expect("float32"));
                let op = Whole { left: left.each_ref(), right: right.each_ref(), rows, cols };
                for (at, got) in run(op).iter().enumerate() {
                    let (row, col) = (at / cols, at % cols);
                    let term = |i: usize| {
                        let (a, b) = &factors[i];
                        scales[i] * (0..ranks[i]).map(|k| a.get(row, k) * b.get(k, col)).sum::<f64>()
                    };
                    let bound = |i: usize| f64::from(left[i].bound(row)) * f64::from(right[i].norms()[col]);
                    let (want, bound) = (term(0) + term(1), bound(0) + bound(1) + 2f64.powi(-126));
                    let error = (f64::from(*got) - want).abs();
                    assert!(
                        error <= bound || !got.is_finite(),
                        "{rows} {cols} {ranks:?} {row} {col}: {error:e} {bound:e}"
                    );
                }
            }
        }
    }

    #[test]
    fn numbers_that_float32_does_not_hold_are_refused() {
        for v in [0.1, 1e300, f64::NAN] {
            assert!(Panels::new(&Matrix::new(1, 1, vec![v])).is_none(), "{v}");
        }
        assert!(Panels::new(&Matrix::new(1, 1, vec![0.5])).is_some());
    }
}
