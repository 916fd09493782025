//! Matrices that are computed from others by sums of products: contractions, and transposes.

use std::ops::Range;
use std::sync::Arc;

use super::{Derived, Tensor};
use crate::cast::{Loss, common_dtype};
use crate::dtype::Dtype;
use crate::linalg::Matrix;

/// Rows and columns exchanged; elements are moved, not computed.
#[derive(Debug)]
struct Transposed(Tensor);

impl Derived for Transposed {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.0]
    }

    fn dtype(&self) -> Dtype {
        self.0.dtype()
    }

    fn size(&self) -> (usize, usize) {
        (self.0.cols(), self.0.rows())
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let (count, size) = (rows.len(), self.0.dtype().size());
        let lines = self.0.rows();
        let columns = self.0.slice_cols(rows);
        let mut bytes = vec![0; lines * count * size];
        let loss = columns.read(0..lines, &mut bytes);
        for (i, line) in bytes.chunks_exact((count * size).max(1)).enumerate() {
            for (j, element) in line.chunks_exact(size).enumerate() {
                let at = (j * lines + i) * size;
                out[at..at + size].copy_from_slice(element);
            }
        }
        loss
    }
}

/// `out[p, j, k] = sum_q core[p, q, k] right[q, j]`, in float64.
#[derive(Debug)]
struct Contracted {
    core: Tensor,
    right: Tensor,
    /// Elements of the kernel.
    kernel: usize,
}

impl Derived for Contracted {
    fn parts(&self) -> Vec<&Tensor> {
        vec![&self.core, &self.right]
    }

    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn size(&self) -> (usize, usize) {
        (self.core.rows(), self.right.cols() * self.kernel)
    }

    fn computes(&self) -> bool {
        true
    }

    fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Loss {
        let right = self.right.to_matrix();
        for (row, target) in rows.zip(out.chunks_exact_mut(self.size().1.max(1) * 8)) {
            let core = Matrix::new(right.rows(), self.kernel, self.core.rows_f64(row..row + 1));
            store(right.transpose_times(&core).data(), target);
        }
        Loss::default()
    }
}

fn store(values: &[f64], out: &mut [u8]) {
    out.as_chunks_mut::<8>().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes());
}

impl Tensor {
    /// All elements as a float64 matrix.
    pub fn to_matrix(&self) -> Matrix {
        Matrix::new(self.rows(), self.cols(), self.to_f64())
    }

    /// A float64 matrix as a tensor of another type; every number is rounded once, here.
    pub fn of_matrix(matrix: &Matrix, dtype: Dtype) -> Self {
        let mut bytes = vec![0; matrix.data().len() * 8];
        store(matrix.data(), &mut bytes);
        let exact = Self::constant(Dtype::F64, vec![matrix.rows(), matrix.cols()], bytes);
        if dtype == Dtype::F64 {
            return exact;
        }
        let mut rounded = Vec::new();
        exact.cast(dtype).read_rows_into(0..matrix.rows(), &mut rounded);
        Self::constant(dtype, vec![matrix.rows(), matrix.cols()], rounded)
    }

    /// Rows and columns exchanged, of a tensor seen as a matrix.
    #[must_use]
    pub fn transposed(&self) -> Self {
        Self::derived(Arc::new(Transposed(self.clone())))
    }

    /// `out[p, j, ..] = sum_q self[p, q, ..] right[q, j]`: a Tucker core of shape (p, q, kernel) times a matrix (q, j).
    /// Of the wider type of the two; every element is rounded once. The second dimension of `self` is `right`'s first.
    #[must_use]
    pub fn contracted(&self, right: &Tensor) -> Self {
        let kernel = self.shape().get(2..).unwrap_or(&[]);
        let shape = [&[self.rows(), right.cols()], kernel].concat();
        let contracted = Contracted { core: self.clone(), right: right.clone(), kernel: kernel.iter().product() };
        Self::derived(Arc::new(contracted)).cast(common_dtype(self.dtype(), right.dtype())).reshaped(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(shape: &[usize]) -> Tensor {
        let n = shape.iter().product::<usize>();
        let bytes: Vec<u8> = (0..n).flat_map(|i| (i as f32 + 1.0).to_le_bytes()).collect();
        Tensor::constant(Dtype::F32, shape.to_vec(), bytes)
    }

    #[test]
    fn transposes_any_rows() {
        let t = count(&[2, 3]).transposed();
        assert_eq!((t.shape(), t.rounding()), ([3, 2].as_slice(), 0.0));
        assert_eq!(t.to_f64(), [1., 4., 2., 5., 3., 6.]);
        assert_eq!(t.slice_rows(1..3).to_f64(), [2., 5., 3., 6.]);
        assert_eq!(t.transposed().to_f64(), count(&[2, 3]).to_f64());
    }

    #[test]
    fn contracts_by_hand() {
        // core[p, q, k] = 1 + 4 p + 2 q + k; right = [[1, 2, 3], [4, 5, 6]].
        let out = count(&[2, 2, 2]).contracted(&count(&[2, 3]));
        assert_eq!((out.shape(), out.dtype()), ([2, 3, 2].as_slice(), Dtype::F32));
        let want = |p: usize, j: usize, k: usize| {
            (0..2).map(|q| (1 + 4 * p + 2 * q + k) as f64 * (1 + 3 * q + j) as f64).sum::<f64>()
        };
        let all: Vec<f64> = (0..12).map(|i| want(i / 6, i / 2 % 3, i % 2)).collect();
        assert_eq!(out.to_f64(), all);
        assert_eq!(out.slice_rows(1..2).to_f64(), all[6..]);
    }
}
