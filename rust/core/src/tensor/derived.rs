//! Tensors whose elements are moved in ways that rectangles cannot say, or computed from those of others.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::Tensor;
use crate::cast::Loss;
use crate::dtype::Dtype;

/// A matrix that is computed on reading.
pub trait Derived: Debug + Send + Sync {
    /// The tensors it is computed from.
    fn parts(&self) -> Vec<&Tensor>;

    /// The element type of what [`Derived::read`] gives.
    fn dtype(&self) -> Dtype;

    /// Rows and columns.
    fn size(&self) -> (usize, usize);

    /// Whether its elements are new numbers; otherwise they are those of its parts in other places.
    fn computes(&self) -> bool {
        false
    }

    /// Rows that are best read together; the writer cuts its tiles there.
    fn block(&self) -> usize {
        1
    }

    /// Computes some rows into `out`, which has exactly their size.
    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss;
}

/// How an axis of a product runs over those of its two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Both factors have this axis: index i is index i of both.
    Same,
    /// Index i is (i / n, i mod n), where n is the second factor's length: as in a Kronecker product.
    Cross,
}

impl Pairing {
    fn len(self, a: usize, b: usize) -> usize {
        match self {
            Pairing::Same => a,
            Pairing::Cross => a * b,
        }
    }

    fn of(self, index: usize, b: usize) -> (usize, usize) {
        match self {
            Pairing::Same => (index, index),
            Pairing::Cross => (index / b, index % b),
        }
    }
}

/// Elementwise products of two matrices, in float64: Kronecker and Khatri-Rao products, rows or columns times a vector.
#[derive(Debug)]
struct Product {
    a: Tensor,
    b: Tensor,
    rows: Pairing,
    cols: Pairing,
}

impl Derived for Product {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.a, &self.b]
    }

    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn size(&self) -> (usize, usize) {
        (self.rows.len(self.a.rows(), self.b.rows()), self.cols.len(self.a.cols(), self.b.cols()))
    }

    fn computes(&self) -> bool {
        true
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let cols = self.size().1;
        let (mut left, mut right) = (Line::default(), Line::default());
        for (row, target) in rows.zip(out.chunks_exact_mut(cols.max(1) * 8)) {
            let (i, j) = self.rows.of(row, self.b.rows());
            let (x, y) = (left.get(&self.a, i), right.get(&self.b, j));
            let mut put = target.as_chunks_mut::<8>().0.iter_mut();
            match self.cols {
                Pairing::Same => put.zip(x.iter().zip(y)).for_each(|(t, (x, y))| *t = (x * y).to_le_bytes()),
                Pairing::Cross => {
                    for x in x {
                        put.by_ref().zip(y).for_each(|(t, y)| *t = (x * y).to_le_bytes());
                    }
                }
            }
        }
        Loss::default()
    }
}

/// The row of a tensor that was read last.
#[derive(Default)]
struct Line {
    row: Option<usize>,
    values: Vec<f64>,
}

impl Line {
    fn get(&mut self, tensor: &Tensor, row: usize) -> &[f64] {
        if self.row != Some(row) {
            self.values = tensor.rows_f64(row..row + 1);
            self.row = Some(row);
        }
        &self.values
    }
}

/// The sum of matrices of one size, in float64.
#[derive(Debug)]
struct Sum(Vec<Tensor>);

impl Derived for Sum {
    fn parts(&self) -> Vec<&Tensor> {
        self.0.iter().collect()
    }

    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn size(&self) -> (usize, usize) {
        (self.0[0].rows(), self.0[0].cols())
    }

    fn computes(&self) -> bool {
        true
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let mut total = self.0[0].rows_f64(rows.clone());
        for part in &self.0[1..] {
            total.iter_mut().zip(part.rows_f64(rows.clone())).for_each(|(t, v)| *t += v);
        }
        out.as_chunks_mut::<8>().0.iter_mut().zip(total).for_each(|(o, v)| *o = v.to_le_bytes());
        Loss::default()
    }
}

/// Rows in another order: row `d * splits + s` is row `s * (rows / splits) + d` of the inner matrix, or the reverse.
#[derive(Debug)]
struct Interleaved {
    inner: Tensor,
    splits: usize,
    reverse: bool,
}

impl Interleaved {
    /// The row of the inner matrix.
    fn of(&self, row: usize) -> usize {
        let each = self.inner.rows() / self.splits;
        match self.reverse {
            false => (row % self.splits) * each + row / self.splits,
            true => (row % each) * self.splits + row / each,
        }
    }
}

impl Derived for Interleaved {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.inner]
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn size(&self) -> (usize, usize) {
        (self.inner.rows(), self.inner.cols())
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let line = self.inner.cols() * self.inner.dtype().size();
        let (splits, mut loss) = (self.splits, Loss::default());
        if self.reverse || line == 0 {
            for (row, target) in rows.zip(out.chunks_exact_mut(line.max(1))) {
                let from = self.of(row);
                loss |= self.inner.read(from..from + 1, target);
            }
            return loss;
        }
        // Every split's rows lie together in the inner matrix: read them at once.
        let first = rows.start / splits;
        let count = rows.end.div_ceil(splits) - first;
        let mut scratch = vec![0; count * line];
        for split in 0..splits {
            let from = split * (self.inner.rows() / splits) + first;
            loss |= self.inner.read(from..from + count, &mut scratch);
            for (d, source) in scratch.chunks_exact(line).enumerate() {
                let row = (first + d) * splits + split;
                if rows.contains(&row) {
                    let at = (row - rows.start) * line;
                    out[at..at + line].copy_from_slice(source);
                }
            }
        }
        loss
    }
}

impl Tensor {
    /// A matrix that is computed on reading.
    pub fn derived(derived: Arc<dyn Derived>) -> Self {
        let (rows, cols) = derived.size();
        let dtype = derived.dtype();
        Self::whole(super::Origin::Derived(derived), dtype, vec![rows, cols])
    }

    /// Elementwise products; `dtype` is the wider of the two, and every element is rounded once.
    ///
    /// `Cross`, `Cross` is the Kronecker product; `Same`, `Cross` and `Cross`, `Same` are the Khatri-Rao products over
    /// rows and over columns. Axes paired by `Same` are of one length; the products of all others are taken.
    pub fn product(a: &Tensor, b: &Tensor, rows: Pairing, cols: Pairing) -> Self {
        let dtype = crate::cast::common_dtype(a.dtype(), b.dtype());
        let product = Product { a: a.clone(), b: b.clone(), rows, cols };
        Self::derived(Arc::new(product)).cast(dtype)
    }

    /// The sum of tensors of one shape, rounded once to the widest of their types.
    pub fn sum(parts: &[Tensor]) -> Self {
        let [one] = parts else {
            let dtype = parts.iter().map(Tensor::dtype).reduce(crate::cast::common_dtype).expect("at least one part");
            let shape = parts[0].shape().to_vec();
            return Self::derived(Arc::new(Sum(parts.to_vec()))).cast(dtype).reshaped(shape);
        };
        one.clone()
    }

    /// Rows of `splits` equal parts interleaved: row `d * splits + s` is row d of part s. `splits` divides the rows.
    #[must_use]
    pub fn interleaved(&self, splits: usize) -> Self {
        self.reordered(splits, false)
    }

    /// The reverse of [`Tensor::interleaved`].
    #[must_use]
    pub fn deinterleaved(&self, splits: usize) -> Self {
        self.reordered(splits, true)
    }

    fn reordered(&self, splits: usize, reverse: bool) -> Self {
        if splits <= 1 || self.pieces.is_empty() {
            return self.clone();
        }
        let shape = self.shape().to_vec();
        Self::derived(Arc::new(Interleaved { inner: self.clone(), splits, reverse })).reshaped(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(rows: usize, cols: usize) -> Tensor {
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| (i as f32 + 1.0).to_le_bytes()).collect();
        Tensor::constant(Dtype::F32, vec![rows, cols], bytes)
    }

    #[test]
    fn products_by_hand() {
        let (a, b) = (count(1, 2), count(2, 2));
        let kron = Tensor::product(&a, &b, Pairing::Cross, Pairing::Cross);
        assert_eq!((kron.shape(), kron.dtype()), ([2, 4].as_slice(), Dtype::F32));
        assert_eq!(kron.to_f64(), [1., 2., 2., 4., 3., 4., 6., 8.]);
        let rows = Tensor::product(&count(2, 2), &b, Pairing::Same, Pairing::Cross);
        assert_eq!(rows.to_f64(), [1., 2., 2., 4., 9., 12., 12., 16.]);
        let scaled = Tensor::product(&b, &count(1, 2), Pairing::Cross, Pairing::Same);
        assert_eq!(scaled.to_f64(), [1., 4., 3., 8.]);
        assert!(scaled.is_scaled() && scaled.rounding() > 0.0 && !scaled.is_narrowed());
    }

    #[test]
    fn parts_of_derived_tensors_are_rectangles_too() {
        let kron = Tensor::product(&count(2, 3), &count(3, 2), Pairing::Cross, Pairing::Cross);
        let all = kron.to_f64();
        let part = Tensor::stack_rows(&[kron.slice_rows(4..6), kron.slice_rows(1..2)]).slice_cols(1..4).scaled(0.5);
        let want: Vec<f64> =
            [4, 5, 1].iter().flat_map(|&r: &usize| all[r * 6 + 1..r * 6 + 4].iter().map(|v| v * 0.5)).collect();
        assert_eq!(part.to_f64(), want);
        let mut bytes = Vec::new();
        part.read_rows_into(1..3, &mut bytes);
        let read: Vec<f64> = bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        assert_eq!(read, want[3..]);
    }

    #[test]
    fn interleaving_and_back() {
        let t = count(12, 2);
        let mixed = t.interleaved(3);
        let want: Vec<f64> = (0..12).flat_map(|r| t.rows_f64((r % 3) * 4 + r / 3..(r % 3) * 4 + r / 3 + 1)).collect();
        assert_eq!(mixed.to_f64(), want);
        let mut bytes = Vec::new();
        mixed.read_rows_into(1..8, &mut bytes);
        let read: Vec<f64> = bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        assert_eq!(read, want[2..16]);
        assert_eq!(mixed.deinterleaved(3).to_f64(), t.to_f64());
        assert_eq!(mixed.rounding(), 0.0);
    }

    #[test]
    fn sums_round_once() {
        let tiny = count(2, 2).scaled(2f64.powi(-30));
        let sum = Tensor::sum(&[count(2, 2), tiny.clone(), tiny]);
        assert_eq!(sum.to_f64()[0], 1.0 + 2f64.powi(-29));
        assert_eq!(Tensor::sum(&[count(2, 2)]).rounding(), 0.0);
    }
}
