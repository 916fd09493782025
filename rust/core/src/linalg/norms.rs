//! Comparing products of thin factors without forming them, accurate to rounding even for nearly equal ones.

use std::ops::Range;

use super::matrix::Matrix;
use super::thin::{Tall, gram, thin_root};

/// Squared norms below this share of what they could be without cancellation show the rounding of Gram matrices.
const CANCELLED: f64 = 1e-5;

/// The m x n matrix `factor * b a` of thin factors, given b (m x R) and the transpose of a (n x R).
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// A number in front.
    pub factor: f64,
    /// The left factor.
    pub b: &'a dyn Tall,
    /// The transpose of the right factor.
    pub a: &'a dyn Tall,
}

/// Two matrices of one size: squared Frobenius norms, and the inner product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compared {
    /// Of the first.
    pub a: f64,
    /// Of the second.
    pub b: f64,
    /// Of their difference.
    pub difference: f64,
    /// The sum of all products of elements at one place.
    pub inner: f64,
}

/// The squared Frobenius norm of a product.
pub fn product_norm2(x: Product<'_>) -> f64 {
    let (b, a) = (gram(x.b), gram(x.a));
    let all = 0..x.b.cols();
    let bound = size(&b, &a, all.clone()).powi(2);
    let norm = trace(&b, &a, all.clone(), all.clone());
    // NaN is handed on: no root is better.
    let norm =
        if norm < CANCELLED * bound { core(&thin_root(x.b), &thin_root(x.a), all, 1.0).norm_squared() } else { norm };
    x.factor * x.factor * norm
}

/// Compares `x` and `y`, both m x n.
///
/// Where the two differ much, through the Gram matrices of the factors: with columns `b_k` and rows `a_k` of both, the
/// inner product is the sum over all pairs of `(b_k . b_l) (a_k . a_l)`. Where that cancels, through the triangular
/// factors of a QR factorisation of both side by side: in the bases it gives, the products are the small matrices
/// `R_b R_a^T`, which are compared element by element and lose nothing. Costs (m + n) R^2, ten times as much in the
/// second case.
pub fn compare_products(x: Product<'_>, y: Product<'_>) -> Compared {
    let (b, a) = (Beside(x.b, y.b), Beside(x.a, y.a));
    let (first, second) = (0..x.b.cols(), x.b.cols()..x.b.cols() + y.b.cols());
    let (gram_b, gram_a) = (gram(&b), gram(&a));
    let sizes =
        [(x.factor, first.clone()), (y.factor, second.clone())].map(|(f, r)| f.abs() * size(&gram_b, &gram_a, r));
    let part =
        |f: f64, rows: &Range<usize>, cols: &Range<usize>| f * trace(&gram_b, &gram_a, rows.clone(), cols.clone());
    let mut out = Compared {
        a: part(x.factor * x.factor, &first, &first),
        b: part(y.factor * y.factor, &second, &second),
        difference: 0.0,
        inner: part(x.factor * y.factor, &first, &second),
    };
    out.difference = out.a + out.b - 2.0 * out.inner;
    let cancelled = out.a < CANCELLED * sizes[0].powi(2)
        || out.b < CANCELLED * sizes[1].powi(2)
        || out.difference < CANCELLED * (sizes[0] + sizes[1]).powi(2);
    if cancelled {
        let (root_b, root_a) = (thin_root(&b), thin_root(&a));
        let (p, q) = (core(&root_b, &root_a, first, x.factor), core(&root_b, &root_a, second, y.factor));
        let pairs = || p.data().iter().zip(q.data());
        out.a = p.norm_squared();
        out.b = q.norm_squared();
        out.difference = pairs().map(|(s, t)| (s - t) * (s - t)).sum();
        out.inner = pairs().map(|(s, t)| s * t).sum();
    }
    out
}

/// The sum over pairs of the products of two Gram matrices.
fn trace(b: &Matrix, a: &Matrix, rows: Range<usize>, cols: Range<usize>) -> f64 {
    let of = |i: usize| cols.clone().map(|j| b.get(i, j) * a.get(i, j)).sum::<f64>();
    rows.map(of).sum()
}

/// The largest norm that the product can have: the sum of those of its terms.
fn size(b: &Matrix, a: &Matrix, terms: Range<usize>) -> f64 {
    terms.map(|k| (b.get(k, k) * a.get(k, k)).sqrt()).sum()
}

/// `factor * root_b root_a^T` over some of the columns.
fn core(root_b: &Matrix, root_a: &Matrix, terms: Range<usize>, factor: f64) -> Matrix {
    let pick =
        |m: &Matrix, factor: f64| Matrix::from_fn(m.rows(), terms.len(), |i, k| factor * m.get(i, terms.start + k));
    pick(root_b, factor).times_transpose(&pick(root_a, 1.0))
}

/// Two tall matrices side by side.
struct Beside<'a>(&'a dyn Tall, &'a dyn Tall);

impl Tall for Beside<'_> {
    fn rows(&self) -> usize {
        self.0.rows()
    }

    fn cols(&self) -> usize {
        self.0.cols() + self.1.cols()
    }

    fn read(&self, rows: Range<usize>) -> Matrix {
        let (left, right) = (self.0.read(rows.clone()), self.1.read(rows.clone()));
        let mut data = Vec::with_capacity(rows.len() * self.cols());
        for i in 0..rows.len() {
            data.extend_from_slice(left.row(i));
            data.extend_from_slice(right.row(i));
        }
        Matrix::new(rows.len(), self.cols(), data)
    }
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

    fn product<'a>(factor: f64, b: &'a Matrix, a: &'a Matrix) -> Product<'a> {
        Product { factor, b, a }
    }

    /// Element by element, from the definition.
    fn dense(x: Product<'_>) -> Vec<f64> {
        let (b, a) = (x.b.read(0..x.b.rows()), x.a.read(0..x.a.rows()));
        let entry = |i: usize, j: usize| (0..b.cols()).map(|k| b.get(i, k) * a.get(j, k)).sum::<f64>();
        (0..b.rows()).flat_map(|i| (0..a.rows()).map(move |j| (i, j))).map(|(i, j)| x.factor * entry(i, j)).collect()
    }

    fn close(x: f64, y: f64, size: f64) {
        assert!((x - y).abs() <= 1e-12 * size.max(f64::MIN_POSITIVE), "{x} {y}");
    }

    fn agrees(x: Product<'_>, y: Product<'_>) {
        let (p, q) = (dense(x), dense(y));
        let sum = |f: &dyn Fn(f64, f64) -> f64| p.iter().zip(&q).map(|(s, t)| f(*s, *t)).sum::<f64>();
        let (a, b) = (sum(&|s, _| s * s), sum(&|_, t| t * t));
        let found = compare_products(x, y);
        close(found.a, a, a);
        close(found.b, b, b);
        close(found.inner, sum(&|s, t| s * t), a.max(b));
        close(found.difference, sum(&|s, t| (s - t) * (s - t)), a.max(b));
        close(product_norm2(x), a, a);
    }

    #[test]
    fn agrees_with_the_dense_matrices() {
        for (m, n, r, s) in [(7, 5, 3, 2), (3, 9, 4, 4), (2, 2, 6, 1), (700, 530, 8, 3), (1, 1, 1, 1)] {
            let (b, a, c, d) = (noise(m, r, 1), noise(n, r, 2), noise(m, s, 3), noise(n, s, 4));
            agrees(product(1.0, &b, &a), product(1.0, &c, &d));
            agrees(product(-0.25, &b, &a), product(3.0, &c, &d));
            agrees(product(1.0, &b, &a), product(1.0, &b, &a));
        }
    }

    #[test]
    fn nothing_has_no_norm() {
        let (b, a) = (noise(5, 2, 1), noise(4, 2, 2));
        let (zero, none) = (Matrix::zeros(5, 2), Matrix::zeros(5, 0));
        assert_eq!(product_norm2(product(1.0, &zero, &a)), 0.0);
        assert_eq!(product_norm2(product(1.0, &none, &Matrix::zeros(4, 0))), 0.0);
        let found = compare_products(product(1.0, &b, &a), product(1.0, &zero, &a));
        assert_eq!((found.b, found.inner), (0.0, 0.0));
        close(found.difference, found.a, found.a);
    }

    #[test]
    fn sees_differences_far_below_the_root_of_epsilon() {
        let (b, a) = (noise(50, 1, 3), noise(40, 1, 4));
        let shifted = b.clone().scaled_cols(&[1.0 + 1e-12]);
        let found = compare_products(product(1.0, &b, &a), product(1.0, &shifted, &a));
        let relative = (found.difference / found.a).sqrt();
        assert!((relative - 1e-12).abs() < 1e-14, "{relative}");
    }

    #[test]
    fn cancellation_within_one_product_is_seen() {
        // The same twice, one time negative, and a millionth of something else.
        let (b, a, c) = (noise(60, 2, 1), noise(50, 2, 2), noise(60, 2, 5));
        let both =
            Matrix::from_fn(60, 4, |i, j| if j < 2 { b.get(i, j) + 1e-6 * c.get(i, j) } else { -b.get(i, j - 2) });
        let same = Matrix::from_fn(50, 4, |i, j| a.get(i, j % 2));
        let want = product_norm2(product(1e-6, &c, &a));
        let have = product_norm2(product(1.0, &both, &same));
        assert!((have / want - 1.0).abs() < 1e-8, "{have} {want}");
    }
}
