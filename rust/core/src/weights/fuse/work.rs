//! One base tensor on its way: its changes in float64, and its rows rounded once.

use std::ops::{AddAssign, Range};
use std::sync::Arc;

use super::change::{Change, rows_of};
use super::claims::{Claim, Claims, Touched};
use super::quick::{Part, Rows};
use crate::cast::load;
use crate::dtype::{Dtype, read_f64};
use crate::io::Source;
use crate::linalg::{MOST_TERMS, Matrix, Panels, TALL};
use crate::simd::{Simd, WithSimd, run};
use crate::weights::Checkpoint;
use crate::weights::checkpoint::At;
use crate::weights::round::{Rounding, store};

/// Elements that one thread computes at a time: half a MiB of float64, which stays in the second-level cache.
const TILE: usize = 1 << 16;

/// The same where nothing but the bytes is held.
const QUICK_TILE: usize = 1 << 18;

/// Elements that are rounded and measured at a time: they stay in the first-level cache.
const CHUNK: usize = 512;

/// Buffers of one thread, used again for every tile.
#[derive(Default)]
pub(super) struct Scratch {
    delta: Vec<f64>,
    /// The bytes of the tile.
    pub(super) bytes: Vec<u8>,
}

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
    /// Of each change the right factor in float32, where it is a product that can be computed so.
    panels: Vec<Option<Panels>>,
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
        let changes: Vec<_> = touched.claims.iter().filter_map(change).collect();
        let panels = |(_, change): &(Claim, Change)| match change {
            Change::Factors { down, times: None, .. } if down.cols() == whole.cols() => Panels::new(down),
            _ => None,
        };
        let quick = whole.dtype() == Dtype::BF16 && old.0.is_empty();
        Self {
            panels: if quick { changes.iter().map(panels).collect() } else { Vec::new() },
            source: &checkpoint.shards()[parameter.at.0].source,
            tensor: parameter.at.1,
            rows: whole.rows(),
            cols: whole.cols(),
            changes,
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
        let step = match self.panels.iter().any(Option::is_some) {
            true => (QUICK_TILE / self.cols.max(1)).next_multiple_of(TALL).max(TALL),
            false => (TILE / self.cols.max(1)).max(1),
        };
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

    /// Some rows of the base.
    fn base(&self, rows: &Range<usize>) -> Vec<f64> {
        let mut base = vec![0.0; rows.len() * self.cols];
        load(self.dtype(), self.original(rows), &mut base);
        if !self.old.0.is_empty() {
            for (row, line) in rows.clone().zip(base.chunks_exact_mut(self.cols.max(1))) {
                let scale = self.old.of(row);
                line.iter_mut().for_each(|v| *v *= scale);
            }
        }
        base
    }

    /// The numbers of the changes that cover some rows, each with the rows of its own that go there.
    fn covering(&self, rows: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let covers = |claim: &Claim| claim.rows.start <= rows.start && rows.end <= claim.rows.end;
        self.changes.iter().enumerate().filter(move |(_, (claim, _))| covers(claim)).map(|(i, (claim, _))| {
            let count = claim.rows.len();
            let shift = if claim.swapped { count / 2 } else { 0 };
            let first = claim.from + (rows.start - claim.rows.start + shift) % count;
            (i, first..first + rows.len())
        })
    }

    /// The changes of some rows as products in float32; `None` if one of them is none.
    fn parts(&self, rows: &Range<usize>) -> Option<Vec<Part<'_>>> {
        let quick = |(i, window): (usize, Range<usize>)| Some((i, window, self.panels.get(i)?.as_ref()?));
        let found: Vec<_> = self.covering(rows).map(quick).collect::<Option<_>>()?;
        let terms = found.iter().map(|(_, _, panels)| panels.terms()).sum();
        let part = |(i, window, panels): (usize, Range<usize>, _)| match &self.changes[i].1 {
            Change::Factors { scale, up, .. } => Some(Part::new(*scale, rows_of(up, window), panels, terms)),
            _ => None,
        };
        let parts: Vec<_> = found.into_iter().filter_map(part).collect();
        (terms <= MOST_TERMS && Part::in_range(&parts)).then_some(parts)
    }

    /// What is wanted to be added to some rows; `buffer` is used again.
    fn wanted(&self, rows: &Range<usize>, mut buffer: Vec<f64>) -> Matrix {
        buffer.clear();
        buffer.resize(rows.len() * self.cols, 0.0);
        let mut delta = Matrix::new(rows.len(), self.cols, buffer);
        for (i, window) in self.covering(rows) {
            let change = &self.changes[i].1;
            match change {
                Change::Replaced(tensor) => {
                    let (values, base) = (tensor.rows_f64(window), self.base(rows));
                    delta.data_mut().iter_mut().zip(values.iter().zip(base)).for_each(|(d, (v, b))| *d = v - b);
                }
                _ => change.add(window, &mut delta),
            }
        }
        delta
    }

    /// What takes the place of some rows, which is not the base plus a difference: that could round.
    fn replaced(&self, rows: &Range<usize>) -> Option<Vec<f64>> {
        match self.changes.as_slice() {
            [(claim, Change::Replaced(tensor))] if claim.rows == (0..self.rows) && !claim.swapped => {
                Some(tensor.rows_f64(claim.from + rows.start..claim.from + rows.end))
            }
            _ => None,
        }
    }

    /// Computes the bytes of some rows into the scratch, from its first on.
    pub(super) fn tile(&self, rows: &Range<usize>, rounding: Rounding<'_>, scratch: &mut Scratch) -> Measure {
        let base = self.original(rows);
        if scratch.bytes.len() < base.len() {
            scratch.bytes.resize(base.len(), 0);
        }
        let out = &mut scratch.bytes[..base.len()];
        if let (Rounding::Nearest, Some(parts)) = (rounding, self.parts(rows)) {
            return run(Rows { parts: &parts, rows: rows.len(), cols: self.cols, base, out });
        }
        let delta = self.wanted(rows, std::mem::take(&mut scratch.delta));
        let replaced = self.replaced(rows);
        let (delta_ref, replaced) = (delta.data(), replaced.as_deref());
        let measure = run(Added { work: self, rows, delta: delta_ref, replaced, rounding, out });
        scratch.delta = delta.into_data();
        measure
    }

    /// The largest size of a number in each row of a tile, once changed.
    pub(super) fn largest(&self, rows: &Range<usize>) -> Vec<f64> {
        let (base, delta) = (self.base(rows), self.wanted(rows, Vec::new()));
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

/// Some rows with what is added to them, or takes their place, in float64.
struct Added<'a> {
    work: &'a Work<'a>,
    rows: &'a Range<usize>,
    delta: &'a [f64],
    replaced: Option<&'a [f64]>,
    rounding: Rounding<'a>,
    out: &'a mut [u8],
}

impl WithSimd for Added<'_> {
    type Output = Measure;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Measure {
        let (work, cols, dtype) = (self.work, self.work.cols, self.work.dtype());
        let (original, size) = (work.original(self.rows), dtype.size());
        let mut measure = Measure::default();
        let (mut bases, mut sums) = ([0.0; CHUNK], [0.0; CHUNK]);
        for (line, row) in self.rows.clone().enumerate() {
            let (old, new) = (work.old.of(row), work.new.of(row));
            for start in (0..cols).step_by(CHUNK) {
                let count = CHUNK.min(cols - start);
                let here = line * cols + start..line * cols + start + count;
                let (base, values) = (&mut bases[..count], &mut sums[..count]);
                let delta = &self.delta[here.clone()];
                load(dtype, &original[here.start * size..here.end * size], base);
                if old != 1.0 {
                    base.iter_mut().for_each(|b| *b *= old);
                }
                match self.replaced {
                    Some(replaced) => values.copy_from_slice(&replaced[here.clone()]),
                    None => values.iter_mut().zip(base.iter().zip(delta)).for_each(|(v, (b, d))| *v = b + d),
                }
                if new != 1.0 {
                    values.iter_mut().for_each(|v| *v /= new);
                }
                let out = &mut self.out[here.start * size..here.end * size];
                measure.outside += store(values, dtype, self.rounding, (row * cols + start) as u64, out);
                load(dtype, out, values);
                measure += measured(new, values, base, delta);
            }
        }
        measure
    }
}

#[inline(always)]
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
