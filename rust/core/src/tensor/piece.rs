//! A rectangle of a tensor and where its elements come from.

use std::ops::Range;
use std::sync::Arc;

use super::Derived;
use crate::cast::Loss;
use crate::dtype::Dtype;
use crate::io::Source;

/// Bytes of derived rows that are computed at a time.
const SCRATCH: usize = 64 * 1024;

/// Where the elements of a rectangle come from.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    /// Tensor number `.1` of an input.
    Input(Arc<Source>, usize),
    /// Bytes made here: alphas, shapes.
    Constant(Arc<[u8]>),
    /// Computed from other tensors.
    Derived(Arc<dyn Derived>),
}

impl Origin {
    /// Its bytes, unless they have yet to be computed.
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Origin::Input(source, index) => Some(source.bytes(*index)),
            Origin::Constant(bytes) => Some(bytes),
            Origin::Derived(_) => None,
        }
    }

    fn same(&self, other: &Origin) -> bool {
        match (self, other) {
            (Origin::Input(a, i), Origin::Input(b, j)) => Arc::ptr_eq(a, b) && i == j,
            (Origin::Constant(a), Origin::Constant(b)) => Arc::ptr_eq(a, b),
            (Origin::Derived(a), Origin::Derived(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// `rows` x `cols` elements of an input, placed at `at` and multiplied by `scale`.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub(super) origin: Origin,
    pub(super) dtype: Dtype,
    /// Elements in a row of the input.
    pub(super) stride: usize,
    pub(super) from: (usize, usize),
    pub(super) at: (usize, usize),
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) scale: f64,
}

impl Piece {
    /// Whether `next` continues this piece downwards, in the input as in the output.
    pub(super) fn continues_down(&self, next: &Piece) -> bool {
        self.like(next)
            && self.cols == next.cols
            && (next.from.0, next.from.1) == (self.from.0 + self.rows, self.from.1)
            && (next.at.0, next.at.1) == (self.at.0 + self.rows, self.at.1)
    }

    /// Whether `next` continues this piece to the right, in the input as in the output.
    pub(super) fn continues_right(&self, next: &Piece) -> bool {
        self.like(next)
            && self.rows == next.rows
            && (next.from.0, next.from.1) == (self.from.0, self.from.1 + self.cols)
            && (next.at.0, next.at.1) == (self.at.0, self.at.1 + self.cols)
    }

    /// Whether both are of one input, scaled alike.
    pub(super) fn like(&self, other: &Piece) -> bool {
        self.scale == other.scale && self.stride == other.stride && self.origin.same(&other.origin)
    }

    /// Whether both cover some element of the output.
    pub(super) fn overlaps(&self, other: &Piece) -> bool {
        let meet = |a: usize, n: usize, b: usize, m: usize| a < b + m && b < a + n;
        meet(self.at.0, self.rows, other.at.0, other.rows) && meet(self.at.1, self.cols, other.at.1, other.cols)
    }

    /// The derived tensor it is a part of.
    pub(super) fn derived(&self) -> Option<&Arc<dyn Derived>> {
        match &self.origin {
            Origin::Derived(derived) => Some(derived),
            _ => None,
        }
    }

    /// Its bytes if they lie in one run.
    pub(super) fn run(&self) -> Option<&[u8]> {
        self.run_of(0..self.rows)
    }

    /// The bytes of some of its rows if they lie in one run.
    pub(super) fn run_of(&self, rows: Range<usize>) -> Option<&[u8]> {
        if self.cols != self.stride && rows.len() != 1 {
            return None;
        }
        let size = self.dtype.size();
        let start = ((self.from.0 + rows.start) * self.stride + self.from.1) * size;
        self.origin.bytes()?.get(start..start + rows.len() * self.cols * size)
    }

    /// Calls `take(row, bytes)` for some of its rows, counted from its first, until one answers false. Also returns
    /// what was lost in computing them.
    pub(super) fn each_row(&self, rows: Range<usize>, mut take: impl FnMut(usize, &[u8]) -> bool) -> (bool, Loss) {
        let size = self.dtype.size();
        let line = self.stride * size;
        let cut = self.from.1 * size..(self.from.1 + self.cols) * size;
        let Some(derived) = self.derived() else {
            let bytes = self.origin.bytes().unwrap_or(&[]);
            let done = rows.into_iter().all(|row| {
                let start = (self.from.0 + row) * line;
                take(row, &bytes[start + cut.start..start + cut.end])
            });
            return (done, Loss::default());
        };
        let mut loss = Loss::default();
        let step = (SCRATCH / line.max(1)).max(derived.block()).clamp(1, rows.len().max(1));
        let mut scratch = vec![0; step * line];
        for first in rows.clone().step_by(step) {
            let count = step.min(rows.end - first);
            let start = self.from.0 + first;
            loss |= derived.read(start..start + count, &mut scratch[..count * line]);
            for row in 0..count {
                if !take(first + row, &scratch[row * line..][cut.clone()]) {
                    return (false, loss);
                }
            }
        }
        (true, loss)
    }
}
