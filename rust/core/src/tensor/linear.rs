//! Products of a tensor and a small matrix, computed on reading.

use std::ops::Range;
use std::sync::Arc;

use super::{Derived, Tensor};
use crate::cast::Loss;
use crate::dtype::Dtype;
use crate::linalg::Matrix;

/// `tensor @ small`: every row by itself.
#[derive(Debug)]
struct Mapped {
    tensor: Tensor,
    small: Matrix,
}

impl Derived for Mapped {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.tensor]
    }

    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn size(&self) -> (usize, usize) {
        (self.tensor.rows(), self.small.cols())
    }

    fn computes(&self) -> bool {
        true
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let left = Matrix::new(rows.len(), self.tensor.cols(), self.tensor.rows_f64(rows));
        store(&left.times(&self.small), out)
    }
}

/// `small @ tensor`: every row is made of all rows of the tensor.
#[derive(Debug)]
struct Combined {
    small: Matrix,
    tensor: Tensor,
}

/// Columns of the tensor that are combined at a time.
const COLUMNS: usize = 1024;

impl Derived for Combined {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.tensor]
    }

    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn size(&self) -> (usize, usize) {
        (self.small.rows(), self.tensor.cols())
    }

    fn computes(&self) -> bool {
        true
    }

    fn block(&self) -> usize {
        self.small.rows()
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let (inner, cols) = (self.small.cols(), self.tensor.cols());
        let small = Matrix::new(rows.len(), inner, self.small.data()[rows.start * inner..rows.end * inner].to_vec());
        for start in (0..cols).step_by(COLUMNS) {
            let window = start..cols.min(start + COLUMNS);
            let part = Matrix::new(inner, window.len(), self.tensor.slice_cols(window.clone()).to_f64());
            let product = small.times(&part);
            for (row, line) in out.chunks_exact_mut(cols * 8).enumerate() {
                let target = line[window.start * 8..window.end * 8].as_chunks_mut::<8>().0;
                target.iter_mut().zip(product.row(row)).for_each(|(t, v)| *t = v.to_le_bytes());
            }
        }
        Loss::default()
    }
}

fn store(values: &Matrix, out: &mut [u8]) -> Loss {
    out.as_chunks_mut::<8>().0.iter_mut().zip(values.data()).for_each(|(o, v)| *o = v.to_le_bytes());
    Loss::default()
}

impl Tensor {
    /// A matrix that has been computed, rounded once to `dtype` and held in memory.
    pub fn computed(values: &Matrix, dtype: Dtype) -> Self {
        let bytes: Vec<u8> = values.data().iter().flat_map(|v| v.to_le_bytes()).collect();
        let exact = Self::constant(Dtype::F64, vec![values.rows(), values.cols()], bytes).cast(dtype);
        let mut rounded = Vec::new();
        exact.read_rows_into(0..exact.rows(), &mut rounded);
        Self::constant(dtype, exact.shape().to_vec(), rounded)
    }

    /// `self @ small` as a lazy tensor of this one's type: computed in float64 and rounded once. The rows keep their
    /// shape where the other dimensions are 1, as those of an `up` factor of a convolution.
    #[must_use]
    pub fn times(&self, small: Matrix) -> Self {
        let shape = reshaped(self.shape(), self.rows(), small.cols());
        Self::derived(Arc::new(Mapped { tensor: self.clone(), small })).cast(self.dtype()).reshaped(shape)
    }

    /// `small @ self` as a lazy tensor of this one's type: computed in float64 and rounded once. All dimensions but the
    /// first stay as they are.
    #[must_use]
    pub fn combined(&self, small: Matrix) -> Self {
        let mut shape = self.shape().to_vec();
        if let Some(first) = shape.first_mut() {
            *first = small.rows();
        }
        Self::derived(Arc::new(Combined { small, tensor: self.clone() })).cast(self.dtype()).reshaped(shape)
    }
}

/// The shape of `rows` x `cols` elements like that of a matrix with dimensions of 1 behind it.
fn reshaped(like: &[usize], rows: usize, cols: usize) -> Vec<usize> {
    let ones = like.iter().skip(2).take_while(|d| **d == 1).count();
    match ones == like.len().saturating_sub(2) {
        true => [rows, cols].into_iter().chain(std::iter::repeat_n(1, ones)).collect(),
        false => vec![rows, cols],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(shape: &[usize]) -> Tensor {
        let bytes: Vec<u8> = (0..shape.iter().product()).flat_map(|i| (i as f32 + 1.0).to_le_bytes()).collect();
        Tensor::constant(Dtype::F32, shape.to_vec(), bytes)
    }

    #[test]
    fn products_by_hand() {
        let up = count(&[3, 2, 1, 1]).times(Matrix::new(2, 1, vec![1.0, -1.0]));
        assert_eq!((up.shape(), up.dtype()), ([3, 1, 1, 1].as_slice(), Dtype::F32));
        assert_eq!(up.to_f64(), [-1., -1., -1.]);
        let down = count(&[2, 1, 3]).combined(Matrix::new(3, 2, vec![1., 0., 0., 1., 1., 1.]));
        assert_eq!(down.shape(), [3, 1, 3]);
        assert_eq!(down.to_f64(), [1., 2., 3., 4., 5., 6., 5., 7., 9.]);
        assert_eq!(down.slice_rows(1..3).slice_cols(1..3).to_f64(), [5., 6., 7., 9.]);
        assert!(down.is_scaled() && down.rounding() > 0.0 && !down.is_narrowed());
    }

    #[test]
    fn wide_tensors_are_combined_in_parts() {
        let wide = count(&[2, 2 * COLUMNS + 5]);
        let sum = wide.combined(Matrix::new(1, 2, vec![2.0, 1.0])).to_f64();
        let (x, y) = (wide.rows_f64(0..1), wide.rows_f64(1..2));
        assert!(sum.iter().zip(x.iter().zip(&y)).all(|(s, (x, y))| *s == 2.0 * x + y));
    }
}
