//! Singular value decompositions of small matrices, and of products of thin ones.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

/// A singular value decomposition `u * diag(s) * vt` with k values.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
    /// rows x k, row by row; its columns are orthonormal.
    pub u: Vec<f64>,
    /// The singular values, largest first.
    pub s: Vec<f64>,
    /// k x cols, row by row; its rows are orthonormal.
    pub vt: Vec<f64>,
}

impl Svd {
    /// How many singular values are not rounding errors of the first.
    pub fn numeric_rank(&self) -> usize {
        let first = self.s.first().copied().unwrap_or(0.0);
        let floor = first * f64::EPSILON * self.rows.max(self.cols).max(8) as f64;
        self.s.iter().filter(|s| **s > floor).count()
    }

    /// The first k columns of `u`, rows x k.
    pub fn left(&self, k: usize) -> Vec<f64> {
        let width = self.s.len().max(1);
        self.u.chunks_exact(width).flat_map(|row| &row[..k.min(self.s.len())]).copied().collect()
    }

    /// The first k rows of `vt`, k x cols.
    pub fn right(&self, k: usize) -> Vec<f64> {
        self.vt[..k.min(self.s.len()) * self.cols].to_vec()
    }
}

/// A matrix that is stored row by row, as `faer` sees it.
pub(super) fn view(values: &[f64], rows: usize, cols: usize) -> MatRef<'_, f64> {
    MatRef::from_row_major_slice(values, rows, cols)
}

/// Row by row.
pub(super) fn flat(matrix: MatRef<'_, f64>) -> Vec<f64> {
    let mut out = Vec::with_capacity(matrix.nrows() * matrix.ncols());
    for i in 0..matrix.nrows() {
        out.extend((0..matrix.ncols()).map(|j| matrix[(i, j)]));
    }
    out
}

/// `a * b` on one thread.
pub(super) fn times(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul(out.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

/// `a` (m x k) times `b` (k x n), all row by row, on one thread.
pub fn product(m: usize, k: usize, n: usize, a: &[f64], b: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    if m * n * k > 0 {
        let target = MatMut::from_row_major_slice_mut(&mut out, m, n);
        matmul(target, Accum::Replace, view(a, m, k), view(b, k, n), 1.0, Par::Seq);
    }
    out
}

/// The decomposition of a matrix that is stored row by row; `None` if it holds NaN or infinities.
///
/// Costs m n min(m, n): for factors, not for weights.
pub fn svd(rows: usize, cols: usize, values: &[f64]) -> Option<Svd> {
    of_view(view(values, rows, cols))
}

pub(super) fn of_view(matrix: MatRef<'_, f64>) -> Option<Svd> {
    let (rows, cols) = (matrix.nrows(), matrix.ncols());
    if rows * cols == 0 {
        return Some(Svd { rows, cols, u: vec![], s: vec![], vt: vec![] });
    }
    if !(0..cols).all(|j| (0..rows).all(|i| matrix[(i, j)].is_finite())) {
        return None;
    }
    let found = matrix.thin_svd().ok()?;
    let s = found.S().column_vector();
    let s: Vec<f64> = (0..s.nrows()).map(|i| s[i]).collect();
    Some(Svd { rows, cols, u: flat(found.U()), s, vt: flat(found.V().transpose()) })
}

/// The decomposition of `b * a`, where `b` is m x r and `a` is r x n, both row by row; `None` if they hold NaN or
/// infinities. Has min(m, n, r) values.
///
/// By QR of both factors and the decomposition of the r x r core (Golub and Van Loan, Matrix Computations, 5.2 and
/// 8.6): costs (m + n) r^2 + r^3 and (m + n) r of memory; m x n is never formed.
pub fn svd_of_product(m: usize, r: usize, n: usize, b: &[f64], a: &[f64]) -> Option<Svd> {
    if m * r * n == 0 {
        return Some(Svd { rows: m, cols: n, u: vec![], s: vec![], vt: vec![] });
    }
    if !b.iter().chain(a).all(|v| v.is_finite()) {
        return None;
    }
    let (left, right) = (view(b, m, r).qr(), view(a, r, n).transpose().qr());
    let core = of_view(times(left.thin_R(), right.thin_R().transpose()).as_ref())?;
    let k = core.s.len();
    let (q_left, q_right) = (left.compute_thin_Q(), right.compute_thin_Q());
    let u = times(q_left.as_ref(), view(&core.u, core.rows, k));
    let vt = times(view(&core.vt, k, core.cols), q_right.transpose());
    Some(Svd { rows: m, cols: n, u: flat(u.as_ref()), s: core.s, vt: flat(vt.as_ref()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize, seed: u64) -> Vec<f64> {
        (0..count as u64).map(|i| super::super::range::gaussian(seed, i)).collect()
    }

    fn rebuilt(svd: &Svd) -> Vec<f64> {
        let k = svd.s.len();
        let scaled: Vec<f64> = svd.u.chunks_exact(k).flat_map(|r| r.iter().zip(&svd.s).map(|(x, s)| x * s)).collect();
        product(svd.rows, k, svd.cols, &scaled, &svd.vt)
    }

    #[test]
    fn products_are_rebuilt() {
        for (m, r, n) in [(9, 3, 7), (4, 6, 5), (1, 1, 1), (30, 2, 40)] {
            let (b, a) = (noise(m * r, 1), noise(r * n, 2));
            let want = product(m, r, n, &b, &a);
            let thin = svd_of_product(m, r, n, &b, &a).expect("finite");
            assert_eq!(thin.s.len(), r.min(m).min(n));
            for svd in [thin.clone(), svd(m, n, &want).expect("finite")] {
                assert!(svd.s.windows(2).all(|w| w[0] >= w[1]));
                let worst = rebuilt(&svd).iter().zip(&want).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                assert!(worst < 1e-12, "{m} {r} {n}: {worst}");
            }
            assert_eq!(thin.numeric_rank(), r.min(m).min(n));
        }
    }

    #[test]
    fn rank_is_seen_and_nan_refused() {
        let column = noise(6, 3);
        let twice: Vec<f64> = column.iter().flat_map(|v| [*v, 2.0 * v]).collect();
        assert_eq!(svd(6, 2, &twice).expect("finite").numeric_rank(), 1);
        assert_eq!(svd(2, 2, &[0.0; 4]).expect("finite").numeric_rank(), 0);
        assert!(svd(1, 2, &[1.0, f64::NAN]).is_none());
        assert!(svd_of_product(1, 1, 1, &[f64::INFINITY], &[1.0]).is_none());
    }
}
