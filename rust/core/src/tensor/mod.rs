//! Lazy tensors: an output tensor is a list of rectangles placed on a zero background.
//!
//! Slicing, stacking, block-diagonal fusing, swapping of halves, scaling and casting all keep this one flat form.
//! Rectangles that come to lie beside each other again, as they were in their input, merge: so fusing what was split
//! is recognised as a plain copy, without a rule for it. Nothing is computed before [`Tensor::read`].

mod contract;
mod derived;
mod linear;
mod piece;

use std::ops::Range;
use std::sync::Arc;

pub use derived::{Derived, Pairing};
use piece::{Origin, Piece};

use crate::cast::{Loss, common_dtype, convert, load};
use crate::dtype::{Dtype, read_f64};
use crate::io::Source;

/// A tensor that has not been computed yet. Cloning copies the description, never data.
#[derive(Debug, Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    dtype: Dtype,
    pieces: Vec<Piece>,
}

/// Seen as a matrix, the first dimension is the rows and all others together are the columns.
fn matrix(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [rows, rest @ ..] => (*rows, rest.iter().product()),
    }
}

impl Tensor {
    /// Tensor number `index` of a source, as it is.
    pub fn input(source: &Arc<Source>, index: usize) -> Self {
        let info = &source.tensors()[index];
        Self::whole(Origin::Input(Arc::clone(source), index), info.dtype, info.shape.clone())
    }

    /// A tensor of given little-endian bytes.
    pub fn constant(dtype: Dtype, shape: Vec<usize>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self::whole(Origin::Constant(bytes.into()), dtype, shape)
    }

    /// A float32 scalar.
    pub fn scalar(value: f32) -> Self {
        Self::constant(Dtype::F32, vec![], value.to_le_bytes().to_vec())
    }

    /// All zeros.
    pub fn zeros(dtype: Dtype, shape: Vec<usize>) -> Self {
        Self { shape, dtype, pieces: Vec::new() }
    }

    fn whole(origin: Origin, dtype: Dtype, shape: Vec<usize>) -> Self {
        let (rows, cols) = matrix(&shape);
        let piece = Piece { origin, dtype, stride: cols, from: (0, 0), at: (0, 0), rows, cols, scale: 1.0 };
        let pieces = if rows * cols == 0 { vec![] } else { vec![piece] };
        Self { shape, dtype, pieces }
    }

    /// The shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The element type of the result.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Length of the first dimension; 1 for a scalar.
    pub fn rows(&self) -> usize {
        matrix(&self.shape).0
    }

    /// Product of all dimensions but the first; 1 for vectors and scalars.
    pub fn cols(&self) -> usize {
        matrix(&self.shape).1
    }

    /// Bytes of the result.
    pub fn nbytes(&self) -> usize {
        self.rows() * self.cols() * self.dtype.size()
    }

    /// Numbers of the input tensors it reads.
    pub fn inputs(&self) -> Vec<usize> {
        let mut inputs = Vec::new();
        for piece in &self.pieces {
            match &piece.origin {
                Origin::Input(_, index) => inputs.push(*index),
                Origin::Constant(_) => {}
                Origin::Derived(derived) => inputs.extend(derived.parts().iter().flat_map(|p| p.inputs())),
            }
        }
        inputs.sort_unstable();
        inputs.dedup();
        inputs
    }

    /// Whether any element is multiplied.
    pub fn is_scaled(&self) -> bool {
        let inside = |d: &Arc<dyn Derived>| d.computes() || d.parts().iter().any(|p| p.is_scaled());
        self.pieces.iter().any(|p| p.scale != 1.0 || p.derived().is_some_and(inside))
    }

    /// Whether any element is cast to a type that may not hold it.
    pub fn is_narrowed(&self) -> bool {
        let narrows = |p: &Piece| match p.derived() {
            // What is computed is rounded once to the type that was asked for: that of its parts is what counts.
            Some(d) if d.computes() => d.parts().iter().any(|t| !t.dtype.fits_in(self.dtype)),
            Some(d) => !p.dtype.fits_in(self.dtype) || d.parts().iter().any(|t| t.is_narrowed()),
            None => !p.dtype.fits_in(self.dtype),
        };
        self.pieces.iter().any(narrows)
    }

    /// Largest relative rounding error of an element: 0 for copies, exact casts and powers of two.
    pub fn rounding(&self) -> f64 {
        let of = |p: &Piece| {
            let exact_scale = p.scale == 0.0 || p.scale.abs().log2().fract() == 0.0;
            let here = if exact_scale && p.dtype.fits_in(self.dtype) { 0.0 } else { self.dtype.unit_roundoff() };
            match p.derived() {
                Some(d) if d.computes() => self.dtype.unit_roundoff(),
                Some(d) => d.parts().iter().map(|t| t.rounding()).fold(here, f64::max),
                None => here,
            }
        };
        self.pieces.iter().map(of).fold(0.0, f64::max)
    }

    /// The bytes of some rows, where they lie in a source just as they are wanted.
    pub fn stored(&self, rows: Range<usize>) -> Option<&[u8]> {
        match self.pieces.as_slice() {
            [p] if (p.rows, p.cols) == (self.rows(), self.cols()) && p.dtype == self.dtype && p.scale == 1.0 => {
                p.run_of(rows)
            }
            _ => None,
        }
    }

    /// Rows that are best read together.
    pub fn block(&self) -> usize {
        match self.pieces.as_slice() {
            [p] if p.from.0 == 0 => p.derived().map_or(1, |d| d.block()),
            _ => 1,
        }
    }

    /// The same elements under another shape of equal size and equal first dimension (or as a vector of it).
    #[must_use]
    pub fn reshaped(mut self, shape: Vec<usize>) -> Self {
        assert_eq!(matrix(&shape), matrix(&self.shape), "reshape keeps rows and columns");
        self.shape = shape;
        self
    }

    /// The rows `range`; views, not copies.
    #[must_use]
    pub fn slice_rows(&self, range: Range<usize>) -> Self {
        self.window(range, 0..self.cols())
    }

    /// The columns `range` of a matrix; views, not copies.
    #[must_use]
    pub fn slice_cols(&self, range: Range<usize>) -> Self {
        self.window(0..self.rows(), range)
    }

    fn window(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for p in &self.pieces {
            let top = p.at.0.max(rows.start);
            let bottom = (p.at.0 + p.rows).min(rows.end);
            let left = p.at.1.max(cols.start);
            let right = (p.at.1 + p.cols).min(cols.end);
            if top < bottom && left < right {
                pieces.push(Piece {
                    from: (p.from.0 + top - p.at.0, p.from.1 + left - p.at.1),
                    at: (top - rows.start, left - cols.start),
                    rows: bottom - top,
                    cols: right - left,
                    ..p.clone()
                });
            }
        }
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows.len();
        }
        if cols.len() != self.cols() {
            shape = vec![rows.len(), cols.len()];
        }
        Self { shape, dtype: self.dtype, pieces }
    }

    /// Puts another tensor into this frame, with its upper left corner at `at`. It must fit, and cover nothing.
    pub fn put(&mut self, other: &Tensor, at: (usize, usize)) {
        debug_assert!(at.0 + other.rows() <= self.rows() && at.1 + other.cols() <= self.cols());
        self.place(other, at);
    }

    fn place(&mut self, other: &Tensor, at: (usize, usize)) {
        for p in &other.pieces {
            let mut p = p.clone();
            p.at = (p.at.0 + at.0, p.at.1 + at.1);
            match self.pieces.last_mut() {
                Some(last) if last.continues_down(&p) => last.rows += p.rows,
                Some(last) if last.continues_right(&p) => last.cols += p.cols,
                _ => self.pieces.push(p),
            }
        }
    }

    /// One above the other. All parts have the same columns.
    #[must_use]
    pub fn stack_rows(parts: &[Tensor]) -> Self {
        let rows = parts.iter().map(Tensor::rows).sum();
        let mut out = Self::frame(parts, rows, parts[0].cols());
        let mut shape = parts[0].shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows;
            out.shape = shape;
        }
        let mut row = 0;
        for part in parts {
            debug_assert_eq!(part.cols(), parts[0].cols());
            out.place(part, (row, 0));
            row += part.rows();
        }
        out
    }

    /// Side by side. All parts have the same rows.
    #[must_use]
    pub fn stack_cols(parts: &[Tensor]) -> Self {
        let cols = parts.iter().map(Tensor::cols).sum();
        let mut out = Self::frame(parts, parts[0].rows(), cols);
        let mut col = 0;
        for part in parts {
            debug_assert_eq!(part.rows(), parts[0].rows());
            out.place(part, (0, col));
            col += part.cols();
        }
        out
    }

    /// Along the diagonal, zeros elsewhere.
    #[must_use]
    pub fn block_diagonal(parts: &[Tensor]) -> Self {
        let rows = parts.iter().map(Tensor::rows).sum();
        let cols = parts.iter().map(Tensor::cols).sum();
        let mut out = Self::frame(parts, rows, cols);
        let mut at = (0, 0);
        for part in parts {
            out.place(part, at);
            at = (at.0 + part.rows(), at.1 + part.cols());
        }
        out
    }

    /// Both in one frame, where no element is covered by both; `None` otherwise. Shapes and types agree.
    pub fn overlaid(&self, other: &Tensor) -> Option<Self> {
        let clash = |p: &Piece| other.pieces.iter().any(|q| p.overlaps(q));
        if self.shape != other.shape || self.pieces.iter().any(clash) {
            return None;
        }
        let mut out = self.clone();
        out.dtype = common_dtype(self.dtype, other.dtype);
        out.place(other, (0, 0));
        Some(out)
    }

    /// The same matrix in the upper left corner of a larger one of zeros.
    #[must_use]
    pub fn padded(&self, rows: usize, cols: usize) -> Self {
        if (rows, cols) == (self.rows(), self.cols()) {
            return self.clone();
        }
        let mut out = Self::zeros(self.dtype, vec![rows, cols]);
        out.place(self, (0, 0));
        out
    }

    /// Column i moved to column `to[i]` of a matrix with `cols` columns, zeros elsewhere. No two go to one place.
    #[must_use]
    pub fn spread_cols(&self, to: &[usize], cols: usize) -> Self {
        let mut out = Self::zeros(self.dtype, vec![self.rows(), cols]);
        let mut from = 0;
        while from < to.len() {
            let run = (from..to.len()).take_while(|&i| to[i] == to[from] + (i - from)).count();
            out.place(&self.slice_cols(from..from + run), (0, to[from]));
            from += run;
        }
        out
    }

    fn frame(parts: &[Tensor], rows: usize, cols: usize) -> Self {
        // Parts of different types meet in the widest of them, so that nothing is rounded by joining.
        let widest = parts.iter().map(|p| p.dtype).reduce(common_dtype).expect("at least one part");
        Self::zeros(widest, vec![rows, cols])
    }

    /// The two halves of the rows exchanged; an odd number of rows has no halves.
    pub fn swap_halves(&self) -> Option<Self> {
        let rows = self.rows();
        if !rows.is_multiple_of(2) {
            return None;
        }
        let mut out = Self::stack_rows(&[self.slice_rows(rows / 2..rows), self.slice_rows(0..rows / 2)]);
        out.shape.clone_from(&self.shape);
        Some(out)
    }

    /// Every element times `factor`: computed in float32 (float64 for float64) and rounded once, on reading.
    #[must_use]
    pub fn scaled(mut self, factor: f64) -> Self {
        if factor != 1.0 {
            for p in &mut self.pieces {
                p.scale *= factor;
            }
        }
        self
    }

    /// Another element type for the result.
    #[must_use]
    pub fn cast(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// Whether both are the same bits: by description where that suffices, else by comparing bytes.
    pub fn same_as(&self, other: &Tensor) -> bool {
        if self.shape != other.shape || self.dtype != other.dtype {
            return false;
        }
        let alike = self.pieces.len() == other.pieces.len()
            && self
                .pieces
                .iter()
                .zip(&other.pieces)
                .all(|(a, b)| a.like(b) && (a.from, a.at, a.rows, a.cols) == (b.from, b.at, b.rows, b.cols));
        if alike {
            return true;
        }
        match (self.contiguous(), other.contiguous()) {
            (Some(a), Some(b)) => a == b,
            _ => {
                let (mut a, mut b) = (Vec::new(), Vec::new());
                (0..self.rows()).all(|row| {
                    self.read_rows_into(row..row + 1, &mut a);
                    other.read_rows_into(row..row + 1, &mut b);
                    a == b
                })
            }
        }
    }

    /// The bytes of the result if they lie in one run of an input as they are.
    pub fn contiguous(&self) -> Option<&[u8]> {
        match self.pieces.as_slice() {
            [p] if p.scale == 1.0
                && p.dtype == self.dtype
                && p.at == (0, 0)
                && (p.rows, p.cols) == (self.rows(), self.cols()) =>
            {
                p.run()
            }
            _ => None,
        }
    }

    /// Whether every element in the window is zero (of either sign). Stops at the first that is not.
    pub fn is_zero(&self, rows: Range<usize>, cols: Range<usize>) -> bool {
        self.window(rows, cols).pieces.iter().all(|p| {
            let size = p.dtype.size();
            let zero = |_, row: &[u8]| {
                row.iter().all(|&b| b == 0) || row.chunks_exact(size).all(|e| read_f64(p.dtype, e) == 0.0)
            };
            p.scale == 0.0 || p.each_row(0..p.rows, zero).0
        })
    }

    /// Which columns hold anything but zeros in some rows. Stops as soon as all do.
    pub fn used_columns(&self, rows: Range<usize>) -> Vec<bool> {
        let mut used = vec![false; self.cols()];
        for p in self.window(rows, 0..self.cols()).pieces.iter().filter(|p| p.scale != 0.0) {
            let seen = &mut used[p.at.1..p.at.1 + p.cols];
            p.each_row(0..p.rows, |_, row| {
                for (seen, e) in seen.iter_mut().zip(row.chunks_exact(p.dtype.size())) {
                    *seen = *seen || (e.iter().any(|b| *b != 0) && read_f64(p.dtype, e) != 0.0);
                }
                !seen.iter().all(|u| *u)
            });
        }
        used
    }

    /// The number `c` with `other == c * self`, element by element and exactly; 1 if both are zero.
    pub fn multiple(&self, other: &Tensor) -> Option<f64> {
        if self.shape != other.shape {
            return None;
        }
        let mut factor: Option<f64> = None;
        for row in 0..self.rows() {
            let (mine, theirs) = (self.rows_f64(row..row + 1), other.rows_f64(row..row + 1));
            for (x, y) in mine.iter().zip(&theirs) {
                if *x == 0.0 && *y == 0.0 {
                    continue;
                }
                let factor = *factor.get_or_insert(y / x);
                if !factor.is_finite() || factor == 0.0 || factor * x != *y {
                    return None;
                }
            }
        }
        Some(factor.unwrap_or(1.0))
    }

    /// All elements as float64, row by row.
    pub fn to_f64(&self) -> Vec<f64> {
        self.rows_f64(0..self.rows())
    }

    /// The elements of some rows as float64; scales are applied in float64 and nothing is rounded.
    pub fn rows_f64(&self, rows: Range<usize>) -> Vec<f64> {
        let cols = self.cols();
        let mut out = vec![0.0; rows.len() * cols];
        for p in &self.window(rows, 0..cols).pieces {
            p.each_row(0..p.rows, |r, row| {
                let start = (p.at.0 + r) * cols + p.at.1;
                let target = &mut out[start..start + p.cols];
                load(p.dtype, row, target);
                if p.scale != 1.0 {
                    target.iter_mut().for_each(|value| *value *= p.scale);
                }
                true
            });
        }
        out
    }

    /// Replaces `buffer` by the bytes of some rows.
    pub fn read_rows_into(&self, rows: Range<usize>, buffer: &mut Vec<u8>) {
        buffer.clear();
        buffer.resize(rows.len() * self.cols() * self.dtype.size(), 0);
        self.read(rows, buffer);
    }

    /// Computes some rows into `out`, which must have exactly their size. Returns whether values
    /// left the range of the type.
    pub fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let (cols, size) = (self.cols(), self.dtype.size());
        assert_eq!(out.len(), rows.len() * cols * size, "output has the size of the rows");
        if !self.covers() {
            out.fill(0);
        }
        let mut loss = Loss::default();
        for p in &self.pieces {
            let top = p.at.0.max(rows.start);
            let bottom = (p.at.0 + p.rows).min(rows.end);
            if top >= bottom {
                continue;
            }
            let wanted = top - p.at.0..bottom - p.at.0;
            let target = &mut out[(top - rows.start) * cols * size..(bottom - rows.start) * cols * size];
            if p.cols == cols && p.stride == cols {
                // Full width: one run of memory on both sides.
                if let Some(source) = p.run_of(wanted.clone()) {
                    loss |= convert(p.dtype, source, p.scale, self.dtype, target);
                    continue;
                }
                if let Some(derived) = p.derived().filter(|_| p.scale == 1.0 && p.dtype == self.dtype) {
                    loss |= derived.read(p.from.0 + wanted.start..p.from.0 + wanted.end, target);
                    continue;
                }
            }
            let mut here = Loss::default();
            let (_, inner) = p.each_row(wanted.clone(), |row, source| {
                let start = ((row - wanted.start) * cols + p.at.1) * size;
                here |= convert(p.dtype, source, p.scale, self.dtype, &mut target[start..start + p.cols * size]);
                true
            });
            loss |= here;
            loss |= inner;
        }
        loss
    }

    fn covers(&self) -> bool {
        self.pieces.iter().map(|p| p.rows * p.cols).sum::<usize>() == self.rows() * self.cols()
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor::constant(Dtype::F32, shape.to_vec(), bytes)
    }

    fn count(rows: usize, cols: usize) -> Tensor {
        let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
        f32s(&[rows, cols], &values)
    }

    #[test]
    fn stacking_slices_is_a_copy_again() {
        let t = count(6, 3);
        let parts = [t.slice_rows(0..2), t.slice_rows(2..3), t.slice_rows(3..6)];
        let whole = Tensor::stack_rows(&parts);
        assert!(whole.contiguous().is_some());
        assert!(whole.same_as(&t));
        let swapped = t.swap_halves().expect("even");
        assert!(swapped.contiguous().is_none());
        assert!(swapped.swap_halves().expect("even").contiguous().is_some());
    }

    #[test]
    fn block_diagonal_has_zeros_elsewhere() {
        let out = Tensor::block_diagonal(&[f32s(&[1, 2], &[1., 2.]), f32s(&[2, 1], &[3., 4.])]);
        assert_eq!(out.shape(), [3, 3]);
        assert_eq!(out.to_f64(), [1., 2., 0., 0., 0., 3., 0., 0., 4.]);
        let mut bytes = Vec::new();
        out.read_rows_into(1..3, &mut bytes);
        assert_eq!(bytes, f32s(&[2, 3], &[0., 0., 3., 0., 0., 4.]).contiguous().expect("plain"));
    }

    #[test]
    fn windows_agree_with_whole() {
        let t = Tensor::stack_cols(&[count(4, 2), count(4, 3).scaled(0.5)]);
        let all = t.to_f64();
        let rows = t.slice_rows(1..3).to_f64();
        assert_eq!(rows, all[5..15]);
        let cols = t.slice_cols(1..4).to_f64();
        assert_eq!(cols[0..3], all[1..4]);
    }

    #[test]
    fn scaling_rounds_once_from_float32() {
        let values = [1.0f32, 1.0 / 3.0, -2.5e-3];
        let bytes: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let t = Tensor::constant(Dtype::BF16, vec![3], bytes).scaled(0.7);
        let mut out = Vec::new();
        t.read_rows_into(0..3, &mut out);
        for (o, v) in out.chunks_exact(2).zip(values) {
            let want = bf16::from_f32(bf16::from_f32(v).to_f32() * 0.7f32);
            assert_eq!(bf16::from_le_bytes([o[0], o[1]]), want);
        }
        assert!(t.rounding() > 0.0 && t.is_scaled() && !t.is_narrowed());
    }

    #[test]
    fn leaving_the_range_is_seen() {
        let t = f32s(&[1], &[1e30]).cast(Dtype::F16);
        assert!(t.read(0..1, &mut [0, 0]).overflow);
        assert_eq!(f32s(&[1], &[1.0]).cast(Dtype::F16).read(0..1, &mut [0, 0]), Loss::default());
        assert!(f32s(&[1], &[1e-9]).cast(Dtype::F16).read(0..1, &mut [0, 0]).underflow);
    }

    #[test]
    fn multiples_are_exact_or_none() {
        let t = count(3, 2);
        assert_eq!(t.multiple(&t.clone().scaled(-0.25)), Some(-0.25));
        assert_eq!(t.multiple(&t), Some(1.0));
        assert_eq!(t.multiple(&count(2, 3)), None);
        let mut other: Vec<f32> = (0..6).map(|i| i as f32).collect();
        other[5] = 5.5;
        assert_eq!(t.multiple(&f32s(&[3, 2], &other)), None);
        let zero = Tensor::zeros(Dtype::F32, vec![3, 2]);
        assert_eq!((zero.multiple(&zero), t.multiple(&zero), zero.multiple(&t)), (Some(1.0), None, None));
    }

    #[test]
    fn zero_test_knows_negative_zero() {
        let t = f32s(&[2, 2], &[0.0, -0.0, 1.0, 0.0]);
        assert!(t.is_zero(0..1, 0..2) && !t.is_zero(0..2, 0..2) && t.is_zero(0..2, 1..2));
    }
}
