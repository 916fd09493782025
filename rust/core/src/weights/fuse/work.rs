//! One base tensor on its way: its changes in float64, and its rows rounded once.

use std::ops::{AddAssign, Range};
use std::sync::Arc;

use super::change::Change;
use super::claims::{Claim, Claims, Touched};
use crate::cast::load;
use crate::dtype::{Dtype, read_f64};
use crate::io::Source;
use crate::linalg::Matrix;
use crate::weights::Checkpoint;
use crate::weights::checkpoint::At;
use crate::weights::round::{Rounding, store};

/// Elements that one thread computes at a time: half a MiB of float64, which stays in the second-level cache.
const TILE: usize = 1 << 16;

/// How a change came out: sums over elements.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Measure {
    /// Of the wanted change squared.
    pub(super) wanted: f64,
    /// Of the change that was stored times the wanted one.
    pub(super) along: f64,
    /// Of the difference of both squared.
    pub(super) missed: f64,
    /// Finite numbers out of the type's range.
    pub(super) outside: usize,
}

impl AddAssign for Measure {
    fn add_assign(&mut self, other: Self) {
        self.wanted += other.wanted;
        self.along += other.along;
        self.missed += other.missed;
        self.outside += other.outside;
    }
}

/// What FP8 numbers are multiplied with: nothing, one number, or one for each row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scales(Vec<f64>);

impl Scales {
    fn of(&self, row: usize) -> f64 {
        match self.0.as_slice() {
            [] => 1.0,
            [one] => *one,
            all => all[row],
        }
    }
}

/// A base tensor with everything that is needed to compute its rows.
pub(super) struct Work<'a> {
    source: &'a Arc<Source>,
    tensor: usize,
    rows: usize,
    cols: usize,
    changes: Vec<(Claim, Change)>,
    /// The scale that the numbers have.
    old: Scales,
    /// The scale that they get.
    new: Scales,
}

impl<'a> Work<'a> {
    /// Loads the factors that change a tensor.
    pub(super) fn new(checkpoint: &'a Checkpoint, claims: &Claims, touched: &Touched) -> Self {
        let parameter = &checkpoint.parameters()[touched.parameter];
        let whole = checkpoint.whole(parameter);
        let change = |claim: &Claim| {
            let change = claims.modules[claim.module].change(parameter.leaf);
            change.map(|change| (claim.clone(), change))
        };
        let number = |(shard, tensor): At| {
            let source = &checkpoint.shards()[shard].source;
            let dtype = source.tensors()[tensor].dtype;
            source.bytes(tensor).chunks_exact(dtype.size()).map(|b| read_f64(dtype, b)).collect()
        };
        let old = Scales(parameter.scale.map(number).unwrap_or_default());
        Self {
            source: &checkpoint.shards()[parameter.at.0].source,
            tensor: parameter.at.1,
            rows: whole.rows(),
            cols: whole.cols(),
            changes: touched.claims.iter().filter_map(change).collect(),
            new: old.clone(),
            old,
        }
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.source.tensors()[self.tensor].dtype
    }

    /// Bytes of one row.
    pub(super) fn line(&self) -> usize {
        self.cols * self.dtype().size()
    }

    /// The rows, cut so that every change covers a tile whole or not at all.
    pub(super) fn tiles(&self) -> Vec<Range<usize>> {
        let mut cuts = vec![0, self.rows];
        for (claim, _) in &self.changes {
            let middle = claim.rows.start + claim.rows.len() / 2;
            cuts.extend([claim.rows.start, claim.rows.end]);
            cuts.extend(claim.swapped.then_some(middle));
        }
        cuts.sort_unstable();
        cuts.dedup();
        let step = (TILE / self.cols.max(1)).max(1);
        let pieces = |w: &[usize]| {
            let (start, end) = (w[0], w[1]);
            (start..end).step_by(step).map(move |row| row..end.min(row + step)).collect::<Vec<_>>()
        };
        cuts.windows(2).flat_map(pieces).collect()
    }

    /// The bytes of some rows of the base.
    pub(super) fn original(&self, rows: &Range<usize>) -> &'a [u8] {
        let line = self.line();
        &self.source.bytes(self.tensor)[rows.start * line..rows.end * line]
    }

    /// Some rows of the base, and what is wanted to be added to them.
    fn wanted(&self, rows: &Range<usize>) -> (Vec<f64>, Matrix) {
        let mut base = vec![0.0; rows.len() * self.cols];
        load(self.dtype(), self.original(rows), &mut base);
        if !self.old.0.is_empty() {
            for (row, line) in rows.clone().zip(base.chunks_exact_mut(self.cols.max(1))) {
                let scale = self.old.of(row);
                line.iter_mut().for_each(|v| *v *= scale);
            }
        }
        let mut delta = Matrix::zeros(rows.len(), self.cols);
        for (claim, change) in self.changes.iter().filter(|(c, _)| c.rows.start <= rows.start && rows.end <= c.rows.end)
        {
            let count = claim.rows.len();
            let shift = if claim.swapped { count / 2 } else { 0 };
            let first = claim.from + (rows.start - claim.rows.start + shift) % count;
            let window = first..first + rows.len();
            match change {
                Change::Replaced(tensor) => {
                    let values = tensor.rows_f64(window);
                    delta.data_mut().iter_mut().zip(values.iter().zip(&base)).for_each(|(d, (v, b))| *d = v - b);
                }
                _ => change.add(window, &mut delta),
            }
        }
        (base, delta)
    }

    /// Computes some rows into `out`, which gets their bytes.
    pub(super) fn tile(&self, rows: &Range<usize>, rounding: Rounding<'_>, out: &mut Vec<u8>) -> Measure {
        let (base, delta) = self.wanted(rows);
        let mut values: Vec<f64> = base.iter().zip(delta.data()).map(|(b, d)| b + d).collect();
        if let [(claim, Change::Replaced(tensor))] = self.changes.as_slice()
            && claim.rows == (0..self.rows)
            && !claim.swapped
        {
            // What takes the place of the base is not the base plus a difference, which could round.
            values = tensor.rows_f64(claim.from + rows.start..claim.from + rows.end);
        }
        let scaled = !self.new.0.is_empty();
        if scaled {
            for (row, line) in rows.clone().zip(values.chunks_exact_mut(self.cols.max(1))) {
                let scale = self.new.of(row);
                line.iter_mut().for_each(|v| *v /= scale);
            }
        }
        let dtype = self.dtype();
        out.clear();
        out.resize(values.len() * dtype.size(), 0);
        let outside = store(&values, dtype, rounding, (rows.start * self.cols) as u64, out);
        load(dtype, out, &mut values);
        let mut measure = Measure { outside, ..Measure::default() };
        let width = self.cols.max(1);
        let lines = values.chunks_exact(width).zip(base.chunks_exact(width).zip(delta.data().chunks_exact(width)));
        for (row, (stored, (base, delta))) in rows.clone().zip(lines) {
            let scale = if scaled { self.new.of(row) } else { 1.0 };
            measure += measured(scale, stored, base, delta);
        }
        measure
    }

    /// The largest size of a number in each row of a tile, once changed.
    pub(super) fn largest(&self, rows: &Range<usize>) -> Vec<f64> {
        let (base, delta) = self.wanted(rows);
        let width = self.cols.max(1);
        let line =
            |(base, delta): (&[f64], &[f64])| base.iter().zip(delta).map(|(b, d)| (b + d).abs()).fold(0.0, f64::max);
        base.chunks_exact(width).zip(delta.data().chunks_exact(width)).map(line).collect()
    }

    /// The bytes of scales, stored as `dtype`, with which the largest numbers (row by row) just fit.
    pub(super) fn fitting(&self, dtype: Dtype, largest: &[f64]) -> Vec<u8> {
        let top = if self.dtype() == Dtype::F8E4M3 { 448.0 } else { 57344.0 };
        let fit = |largest: f64, old: f64| if largest > 0.0 { largest / top } else { old };
        let wanted: Vec<f64> = match self.old.0.as_slice() {
            [one] => vec![fit(largest.iter().copied().fold(0.0, f64::max), *one)],
            all => all.iter().zip(largest).map(|(old, largest)| fit(*largest, *old)).collect(),
        };
        let mut bytes = vec![0; wanted.len() * dtype.size()];
        store(&wanted, dtype, Rounding::Nearest, 0, &mut bytes);
        bytes
    }

    /// Gives the numbers another scale, stored as `dtype`.
    pub(super) fn rescale(&mut self, dtype: Dtype, bytes: &[u8]) {
        self.new.0.resize(bytes.len() / dtype.size(), 0.0);
        load(dtype, bytes, &mut self.new.0);
    }
}

fn measured(scale: f64, stored: &[f64], base: &[f64], delta: &[f64]) -> Measure {
    // Four partial sums of each, so that the loop becomes vector code.
    let mut sums = [[0.0f64; 4]; 3];
    let mut add = |lane: usize, s: f64, b: f64, d: f64| {
        let change = s * scale - b;
        let miss = change - d;
        sums[0][lane] += d * d;
        sums[1][lane] += change * d;
        sums[2][lane] += miss * miss;
    };
    let ((s4, s1), (b4, b1), (d4, d1)) = (stored.as_chunks::<4>(), base.as_chunks::<4>(), delta.as_chunks::<4>());
    for (s, (b, d)) in s4.iter().zip(b4.iter().zip(d4)) {
        (0..4).for_each(|lane| add(lane, s[lane], b[lane], d[lane]));
    }
    s1.iter().zip(b1.iter().zip(d1)).for_each(|(s, (b, d))| add(0, *s, *b, *d));
    let total = |s: &[f64; 4]| s.iter().sum();
    Measure { wanted: total(&sums[0]), along: total(&sums[1]), missed: total(&sums[2]), outside: 0 }
}
