//! A dense matrix, and its factorisations.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::Solve;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

/// A dense float64 matrix, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl Matrix {
    /// A matrix of given elements, row by row; `data` has `rows * cols` of them.
    pub fn new(rows: usize, cols: usize, data: Vec<f64>) -> Self {
        assert_eq!(data.len(), rows * cols, "one number for each element");
        Self { rows, cols, data }
    }

    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self::new(rows, cols, vec![0.0; rows * cols])
    }

    /// Element by element.
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> f64) -> Self {
        let mut data = Vec::with_capacity(rows * cols);
        for i in 0..rows {
            data.extend((0..cols).map(|j| f(i, j)));
        }
        Self::new(rows, cols, data)
    }

    /// Ones on the diagonal.
    pub fn identity(n: usize) -> Self {
        Self::from_fn(n, n, |i, j| f64::from(u8::from(i == j)))
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The elements, row by row.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// The elements, row by row.
    pub fn data_mut(&mut self) -> &mut [f64] {
        &mut self.data
    }

    /// The elements, row by row.
    pub fn into_data(self) -> Vec<f64> {
        self.data
    }

    /// One element.
    pub fn get(&self, row: usize, col: usize) -> f64 {
        self.data[row * self.cols + col]
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// Rows and columns exchanged; copied.
    #[must_use]
    pub fn transposed(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self.get(j, i))
    }

    /// The first `cols` columns; copied.
    #[must_use]
    pub fn first_cols(&self, cols: usize) -> Self {
        Self::from_fn(self.rows, cols, |i, j| self.get(i, j))
    }

    /// Column j times `factors[j]`.
    #[must_use]
    pub fn scaled_cols(mut self, factors: &[f64]) -> Self {
        for row in self.data.chunks_exact_mut(self.cols.max(1)) {
            row.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
        }
        self
    }

    /// Row i times `factors[i]`.
    #[must_use]
    pub fn scaled_rows(mut self, factors: &[f64]) -> Self {
        for (row, f) in self.data.chunks_exact_mut(self.cols.max(1)).zip(factors) {
            row.iter_mut().for_each(|x| *x *= f);
        }
        self
    }

    /// `self @ other`.
    #[must_use]
    pub fn times(&self, other: &Matrix) -> Self {
        product(self.view(), other.view())
    }

    /// `self^T @ other`.
    #[must_use]
    pub fn transpose_times(&self, other: &Matrix) -> Self {
        product(self.view().transpose(), other.view())
    }

    /// `self @ other^T`.
    #[must_use]
    pub fn times_transpose(&self, other: &Matrix) -> Self {
        product(self.view(), other.view().transpose())
    }

    /// Adds `factor * a @ b`.
    pub fn add_product(&mut self, factor: f64, a: &Matrix, b: &Matrix) {
        matmul(self.view_mut(), Accum::Add, a.view(), b.view(), factor, Par::Seq);
    }

    /// Adds `a^T @ b`.
    pub fn add_transpose_product(&mut self, a: &Matrix, b: &Matrix) {
        matmul(self.view_mut(), Accum::Add, a.view().transpose(), b.view(), 1.0, Par::Seq);
    }

    /// Adds `a^T @ a`.
    pub fn add_gram(&mut self, a: &Matrix) {
        matmul(self.view_mut(), Accum::Add, a.view().transpose(), a.view(), 1.0, Par::Seq);
    }

    /// The sum of the squares of all elements.
    pub fn norm_squared(&self) -> f64 {
        self.data.iter().map(|x| x * x).sum()
    }

    /// The Frobenius norm.
    pub fn norm(&self) -> f64 {
        self.norm_squared().sqrt()
    }

    /// Whether no element is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        self.data.iter().all(|x| x.is_finite())
    }

    /// The x with `self @ x = right`, by LU with partial pivoting; `self` is square and not singular.
    #[must_use]
    pub fn solve(&self, right: &Matrix) -> Self {
        from_faer(self.view().partial_piv_lu().solve(right.view()).as_ref())
    }

    /// The Q of a thin Householder QR factorisation: orthonormal columns, `rows` x `min(rows, cols)`.
    #[must_use]
    pub fn orthonormalised(&self) -> Self {
        from_faer(self.view().qr().compute_thin_Q().as_ref())
    }

    /// The R of a Householder QR factorisation, `min(rows, cols)` x `cols`.
    #[must_use]
    pub fn triangle(&self) -> Self {
        from_faer(self.view().qr().thin_R())
    }

    fn view(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(&self.data, self.rows, self.cols)
    }

    fn view_mut(&mut self) -> MatMut<'_, f64> {
        MatMut::from_row_major_slice_mut(&mut self.data, self.rows, self.cols)
    }
}

fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Matrix {
    let mut out = Matrix::zeros(a.nrows(), b.ncols());
    matmul(out.view_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

fn from_faer(m: MatRef<'_, f64>) -> Matrix {
    Matrix::from_fn(m.nrows(), m.ncols(), |i, j| m[(i, j)])
}

/// `u diag(s) v^T`, thin: with k = min(m, n), u is m x k, v is n x k, and s falls.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Left singular vectors as columns.
    pub u: Matrix,
    /// Singular values, largest first.
    pub s: Vec<f64>,
    /// Right singular vectors as columns.
    pub v: Matrix,
}

/// The singular value decomposition; `None` if the matrix holds NaN or infinities.
pub fn svd(a: &Matrix) -> Option<Svd> {
    if !a.is_finite() {
        return None;
    }
    if a.rows == 0 || a.cols == 0 {
        return Some(Svd { u: Matrix::zeros(a.rows, 0), s: Vec::new(), v: Matrix::zeros(a.cols, 0) });
    }
    let svd = a.view().thin_svd().ok()?;
    let s = svd.S().column_vector().iter().copied().collect();
    Some(Svd { u: from_faer(svd.U()), s, v: from_faer(svd.V()) })
}

/// Eigenvalues, largest first, and eigenvectors as columns, of a symmetric matrix; `None` if it holds NaN or
/// infinities.
pub fn eigh(a: &Matrix) -> Option<(Vec<f64>, Matrix)> {
    if !a.is_finite() {
        return None;
    }
    if a.rows == 0 {
        return Some((Vec::new(), Matrix::zeros(0, 0)));
    }
    let eigen = a.view().self_adjoint_eigen(Side::Lower).ok()?;
    let values: Vec<f64> = eigen.S().column_vector().iter().rev().copied().collect();
    let vectors: Mat<f64> = eigen.U().reverse_cols().to_owned();
    Some((values, from_faer(vectors.as_ref())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut state = seed;
        Matrix::from_fn(rows, cols, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / 2f64.powi(31) - 0.5
        })
    }

    fn distance(a: &Matrix, b: &Matrix) -> f64 {
        a.data().iter().zip(b.data()).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn products_by_hand() {
        let a = Matrix::new(2, 3, vec![1., 2., 3., 4., 5., 6.]);
        let b = Matrix::new(3, 1, vec![1., 0., -1.]);
        assert_eq!(a.times(&b).data(), [-2., -2.]);
        assert_eq!(a.transpose_times(&a).data(), [17., 22., 27., 22., 29., 36., 27., 36., 45.]);
        assert_eq!(a.times_transpose(&a).data(), [14., 32., 32., 77.]);
    }

    #[test]
    fn decompositions_give_the_matrix_back() {
        for (rows, cols) in [(5, 3), (3, 5), (4, 4), (1, 1)] {
            let a = noise(rows, cols, 7);
            let Svd { u, s, v } = svd(&a).expect("finite");
            assert!(s.windows(2).all(|w| w[0] >= w[1]));
            assert!(distance(&u.scaled_cols(&s).times_transpose(&v), &a) < 1e-12);
            let g = a.transpose_times(&a);
            let (values, vectors) = eigh(&g).expect("finite");
            assert!(values.windows(2).all(|w| w[0] >= w[1]));
            assert!(distance(&vectors.clone().scaled_cols(&values).times_transpose(&vectors), &g) < 1e-12);
        }
        assert!(svd(&Matrix::new(1, 1, vec![f64::NAN])).is_none());
    }

    #[test]
    fn solves() {
        let (a, x) = (noise(5, 5, 3), noise(5, 2, 4));
        assert!(distance(&a.solve(&a.times(&x)), &x) < 1e-10);
    }

    #[test]
    fn qr_is_orthonormal() {
        let a = noise(9, 4, 3);
        let q = a.orthonormalised();
        assert!(distance(&q.transpose_times(&q), &Matrix::identity(4)) < 1e-12);
        assert!(distance(&q.times(&a.triangle()), &a) < 1e-12);
    }
}
