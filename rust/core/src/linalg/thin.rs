//! The singular value decomposition of a product of thin factors, without ever forming the product.

use std::ops::Range;

use super::matrix::{Matrix, Svd, eigh, svd};

/// Elements that are read at a time.
const CHUNK: usize = 1 << 17;

/// Singular values below this share of |b| |a| are rounding of the Gram matrices: the root of float64's epsilon.
const NOISE: f64 = 1.5e-8;

/// The same where factors were reduced by Householder transformations.
const FINE_NOISE: f64 = 1e-13;

/// Below this share of |b| |a| the product has cancelled so far that the noise of Gram matrices would be seen.
const CANCELLED: f64 = 1e-2;

/// A tall thin matrix that is read some rows at a time.
pub trait Tall {
    /// Rows: many.
    fn rows(&self) -> usize;
    /// Columns: few.
    fn cols(&self) -> usize;
    /// Some rows.
    fn read(&self, rows: Range<usize>) -> Matrix;
}

impl Tall for Matrix {
    fn rows(&self) -> usize {
        self.rows()
    }

    fn cols(&self) -> usize {
        self.cols()
    }

    fn read(&self, rows: Range<usize>) -> Matrix {
        let (count, cols) = (rows.len(), self.cols());
        Matrix::new(count, cols, self.data()[rows.start * cols..rows.end * cols].to_vec())
    }
}

fn chunks(tall: &dyn Tall) -> impl Iterator<Item = Matrix> + '_ {
    let (rows, cols) = (tall.rows(), tall.cols());
    let step = (CHUNK / cols.max(1)).max(cols).max(1);
    (0..rows).step_by(step).map(move |start| tall.read(start..rows.min(start + step)))
}

/// `t^T t`, cols x cols.
pub(super) fn gram(tall: &dyn Tall) -> Matrix {
    let mut sum = Matrix::zeros(tall.cols(), tall.cols());
    chunks(tall).for_each(|chunk| sum.add_gram(&chunk));
    sum
}

/// A square matrix R with R^T R = t^T t, by Householder QR of chunk after chunk, each below the R so far (Demmel et al.
/// 2012, communication-avoiding QR). Accurate to rounding however near to singular `t` is.
pub fn thin_root(tall: &dyn Tall) -> Matrix {
    let cols = tall.cols();
    let mut root = Matrix::zeros(cols, cols);
    for chunk in chunks(tall) {
        let mut stacked = root.into_data();
        let rows = cols + chunk.rows();
        stacked.extend_from_slice(chunk.data());
        root = Matrix::new(rows, cols, stacked).triangle();
    }
    root
}

/// The decomposition `b a = sum_j s_j u_j v_j^T` of a product of thin factors, in terms of the factors:
/// `s_j u_j = b p_j` and `s_j v_j = a^T q_j`.
#[derive(Debug, Clone)]
pub struct ThinSvd {
    /// Singular values, largest first: those above rounding, at most R.
    pub s: Vec<f64>,
    /// R x len(s).
    pub p: Matrix,
    /// R x len(s).
    pub q: Matrix,
    /// Roots of `b^T b` and `a a^T`, R x R.
    roots: (Matrix, Matrix),
}

impl ThinSvd {
    /// Small matrices x (R x k) and y (k x R) with `(b x)(y a)` = the best approximation of rank k, its singular values
    /// shared evenly by both sides. k is at most `len(s)`.
    pub fn truncated(&self, k: usize) -> (Matrix, Matrix) {
        let share: Vec<f64> = self.s[..k].iter().map(|s| s.sqrt().recip()).collect();
        let x = self.p.first_cols(k).scaled_cols(&share);
        let y = self.q.first_cols(k).scaled_cols(&share).transposed();
        (x, y)
    }

    /// The Frobenius norm of the product.
    pub fn norm(&self) -> f64 {
        self.tail(0)
    }

    /// The Frobenius norm of the product without its `k` largest singular values: the least error of a rank of k.
    pub fn tail(&self, k: usize) -> f64 {
        self.s.iter().skip(k).rev().map(|s| s * s).sum::<f64>().sqrt()
    }

    /// The Frobenius norm of `b a - (b x)(y a)`, for any x (R x k) and y (k x R).
    pub fn residual(&self, x: &Matrix, y: &Matrix) -> f64 {
        let mut left = Matrix::identity(x.rows());
        left.add_product(-1.0, x, y);
        self.roots.0.times(&left).times_transpose(&self.roots.1).norm()
    }
}

/// Decomposes `b a`, given b (m x R) and the transpose of a (n x R). `None` if they hold NaN or infinities.
///
/// With R_b^T R_b = b^T b and R_a^T R_a = a a^T, the singular values of the R x R matrix R_b R_a^T = U S V^T are those
/// of the product, and p = R_a^T V, q = R_b^T U. Costs (m + n) R^2 + R^3. The roots come from Gram matrices, which
/// costs a tenth of a QR factorisation and is accurate to 1e-8 of |b| |a|; where the product has cancelled down to
/// where that would be seen, they come from Householder QR instead.
pub fn thin_svd(b: &dyn Tall, a: &dyn Tall) -> Option<ThinSvd> {
    let (gram_b, gram_a) = (gram(b), gram(a));
    // Every pair of a column of b and a row of a is brought to equal norms: how factors share their size is nobody's
    // business.
    let balance: Vec<f64> = (0..b.cols())
        .map(|i| (gram_a.get(i, i) / gram_b.get(i, i)).powf(0.25))
        .map(|f| if f.is_finite() && f > 0.0 { f } else { 1.0 })
        .collect();
    let inverse: Vec<f64> = balance.iter().map(|f| f.recip()).collect();
    let square = |gram: Matrix, f: &[f64]| gram.scaled_cols(f).scaled_rows(f);
    let roots = (root(&square(gram_b, &balance))?, root(&square(gram_a, &inverse))?);
    let (mut thin, share) = decompose(roots, NOISE)?;
    if share < CANCELLED {
        let fine = (thin_root(b).scaled_cols(&balance), thin_root(a).scaled_cols(&inverse));
        thin = decompose(fine, FINE_NOISE)?.0;
    }
    let ThinSvd { s, p, q, roots } = thin;
    let roots = (roots.0.scaled_cols(&inverse), roots.1.scaled_cols(&balance));
    Some(ThinSvd { s, p: p.scaled_rows(&balance), q: q.scaled_rows(&inverse), roots })
}

/// A root of a Gram matrix by its eigenvalues; rounding below zero counts as zero.
fn root(gram: &Matrix) -> Option<Matrix> {
    let (values, vectors) = eigh(gram)?;
    let roots: Vec<f64> = values.iter().map(|v| v.max(0.0).sqrt()).collect();
    Some(vectors.scaled_cols(&roots).transposed())
}

/// The decomposition from both roots, and its largest singular value as a share of what it could be.
fn decompose(roots: (Matrix, Matrix), noise: f64) -> Option<(ThinSvd, f64)> {
    let (root_b, root_a) = (&roots.0, &roots.1);
    let Svd { u, s, v } = svd(&root_b.times_transpose(root_a))?;
    let bound = (root_b.norm() * root_a.norm()) / (root_b.rows().max(1) as f64).sqrt();
    let rank = s.iter().take_while(|s| **s > noise * bound && **s > 0.0).count();
    let share = s.first().map_or(1.0, |s| if bound > 0.0 { s / bound } else { 1.0 });
    let thin = ThinSvd {
        p: root_a.transpose_times(&v.first_cols(rank)),
        q: root_b.transpose_times(&u.first_cols(rank)),
        s: s[..rank].to_vec(),
        roots,
    };
    Some((thin, share))
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

    fn difference(a: &Matrix, b: &Matrix) -> f64 {
        Matrix::new(a.rows(), a.cols(), a.data().iter().zip(b.data()).map(|(x, y)| x - y).collect()).norm()
    }

    fn rebuilt(thin: &ThinSvd, b: &Matrix, at: &Matrix, k: usize) -> Matrix {
        let (x, y) = thin.truncated(k);
        b.times(&x).times(&y.times_transpose(at))
    }

    #[test]
    fn agrees_with_the_dense_decomposition() {
        for (m, n, r) in [(40, 30, 5), (8, 50, 8), (6, 5, 12), (300, 1, 3), (1, 1, 1)] {
            let (b, at) = (noise(m, r, 1).scaled_cols(&[9.0; 64][..r]), noise(n, r, 2));
            let dense = b.times_transpose(&at);
            let thin = thin_svd(&b, &at).expect("finite");
            let s = svd(&dense).expect("finite").s;
            assert_eq!(thin.s.len(), r.min(m).min(n), "{m} {n} {r}");
            thin.s.iter().zip(&s).for_each(|(x, y)| assert!((x - y).abs() < 1e-10 * s[0], "{x} {y}"));
            assert!(difference(&rebuilt(&thin, &b, &at, thin.s.len()), &dense) < 1e-10 * dense.norm());
            let k = thin.s.len().div_ceil(2);
            let tail = s[k..].iter().map(|x| x * x).sum::<f64>().sqrt();
            let error = difference(&rebuilt(&thin, &b, &at, k), &dense);
            assert!((error - tail).abs() < 1e-9 * dense.norm(), "{error} {tail}");
            assert!((thin.tail(k) - tail).abs() < 1e-9 * dense.norm());
            let (x, y) = (noise(r, k, 8), noise(k, r, 9));
            let wanted = difference(&b.times(&x).times(&y.times_transpose(&at)), &dense);
            assert!((thin.residual(&x, &y) - wanted).abs() < 1e-9 * wanted);
        }
    }

    #[test]
    fn rank_deficient_factors_have_no_noise() {
        let (b, at) = (noise(60, 4, 1), noise(50, 4, 2));
        let twice = |m: &Matrix| Matrix::from_fn(m.rows(), 8, |i, j| m.get(i, j % 4));
        let thin = thin_svd(&twice(&b), &twice(&at)).expect("finite");
        assert_eq!(thin.s.len(), 4);
        let dense = twice(&b).times_transpose(&twice(&at));
        assert!(difference(&rebuilt(&thin, &twice(&b), &twice(&at), 4), &dense) < 1e-7 * dense.norm());
        let zero = thin_svd(&Matrix::zeros(5, 2), &noise(4, 2, 3)).expect("finite");
        assert!(zero.s.is_empty());
    }

    #[test]
    fn cancellation_is_seen() {
        // Two nearly equal adapters, one against the other: a millionth of each is left.
        let (b, at) = (noise(60, 3, 1), noise(50, 3, 2));
        let near = noise(60, 3, 5);
        let both = Matrix::from_fn(60, 6, |i, j| match j {
            0..3 => b.get(i, j),
            _ => -(b.get(i, j - 3) + 1e-6 * near.get(i, j - 3)),
        });
        let same = Matrix::from_fn(50, 6, |i, j| at.get(i, j % 3));
        let dense = near.times_transpose(&at);
        let thin = thin_svd(&both, &same).expect("finite");
        let s = svd(&dense).expect("finite").s;
        thin.s.iter().zip(&s).for_each(|(x, y)| assert!((x - 1e-6 * y).abs() < 1e-14 * s[0], "{x} {y}"));
    }

    #[test]
    fn factors_may_share_their_size_in_any_way() {
        let (b, at) = (noise(60, 3, 1), noise(50, 3, 2));
        let (up, down) = ([1e6, 1e-6, 1.0], [1e-6, 1e6, 1.0]);
        let skewed = thin_svd(&b.clone().scaled_cols(&up), &at.clone().scaled_cols(&down)).expect("finite");
        let plain = thin_svd(&b, &at).expect("finite");
        plain.s.iter().zip(&skewed.s).for_each(|(x, y)| assert!((x - y).abs() < 1e-12, "{x} {y}"));
        let dense = b.times_transpose(&at);
        let back = rebuilt(&skewed, &b.scaled_cols(&up), &at.scaled_cols(&down), 3);
        assert!(difference(&back, &dense) < 1e-9 * dense.norm());
    }
}
