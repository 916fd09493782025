//! The leading singular vectors of a matrix that is only seen by tiles of rows.

use std::ops::Range;

use super::matrix::{Matrix, Svd, svd};
use crate::random::Counter;

/// Elements of a tile.
const TILE: usize = 1 << 20;

/// How well a matrix is sketched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sketch {
    /// Singular values that are wanted.
    pub rank: usize,
    /// Further directions that are followed, so that the wanted ones are accurate.
    pub oversample: usize,
    /// Passes before the last one; each multiplies by `A^T A`.
    pub niter: usize,
    /// Of the random directions to begin with.
    pub seed: u64,
}

impl Sketch {
    /// Ten further directions (or a tenth of the rank) and three passes before the last one.
    pub fn of_rank(rank: usize) -> Self {
        Self { rank, oversample: (rank / 10).max(10), niter: 3, seed: 0 }
    }
}

/// What a sketch found.
#[derive(Debug, Clone)]
pub struct Sketched {
    /// Singular values and vectors: as many as were followed, the further directions included.
    pub svd: Svd,
    /// The squared Frobenius norm of the whole matrix.
    pub norm2: f64,
}

/// The leading part of the singular value decomposition of an m x n matrix, given by `tile`: the rows of a range, row by
/// row. `None` if it holds NaN or infinities. The first error of `tile` ends it.
///
/// A randomised range finder over the row space (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). Each pass
/// over the rows accumulates `A^T (A V)`, which is two half-steps of their power iteration in one reading of the matrix,
/// and orthonormalises it; the last one projects. With `niter` passes before it the singular values count to the power
/// `2 niter`. Where all directions are followed the result is the whole decomposition. Memory: (m + n) (rank +
/// oversample) and one tile. The same seed gives the same result on any number of threads.
pub fn sketch<E>(
    m: usize,
    n: usize,
    how: Sketch,
    mut tile: impl FnMut(Range<usize>) -> Result<Vec<f64>, E>,
) -> Result<Option<Sketched>, E> {
    let width = how.rank.saturating_add(how.oversample).min(m).min(n);
    let random = Counter::new(how.seed, "sketch");
    let mut basis = Matrix::from_fn(n, width, |i, j| random.normal((i * width + j) as u64));
    // Without a pass before it the last one would project on noise.
    for _ in 0..how.niter.max(1) {
        let mut next = Matrix::zeros(n, width);
        each_tile(m, n, &mut tile, |_, rows| next.add_transpose_product(rows, &rows.times(&basis)))?;
        if !next.is_finite() {
            return Ok(None);
        }
        basis = next.orthonormalised();
    }
    let mut image = Matrix::zeros(m, width);
    let mut norm2 = 0.0;
    each_tile(m, n, &mut tile, |range, rows| {
        norm2 += rows.norm_squared();
        image.data_mut()[range.start * width..range.end * width].copy_from_slice(rows.times(&basis).data());
    })?;
    let Some(Svd { u, s, v }) = svd(&image).filter(|_| norm2.is_finite()) else { return Ok(None) };
    Ok(Some(Sketched { svd: Svd { u, s, v: basis.times(&v) }, norm2 }))
}

/// Gives all rows to `work`, some at a time.
fn each_tile<E>(
    m: usize,
    n: usize,
    tile: &mut impl FnMut(Range<usize>) -> Result<Vec<f64>, E>,
    mut work: impl FnMut(Range<usize>, &Matrix),
) -> Result<(), E> {
    let step = (TILE / n.max(1)).max(1);
    for start in (0..m).step_by(step) {
        let range = start..m.min(start + step);
        let rows = Matrix::new(range.len(), n, tile(range.clone())?);
        work(range, &rows);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn noise(rows: usize, cols: usize, seed: u64) -> Matrix {
        let random = Counter::new(seed, "noise");
        Matrix::from_fn(rows, cols, |i, j| random.normal((i * cols + j) as u64))
    }

    fn sketched(a: &Matrix, how: Sketch) -> Sketched {
        let n = a.cols();
        let rows = |r: Range<usize>| Ok::<_, Infallible>(a.data()[r.start * n..r.end * n].to_vec());
        sketch(a.rows(), n, how, rows).expect("no error").expect("finite")
    }

    /// A matrix whose singular values fall like those of a weight difference.
    fn decaying(m: usize, n: usize) -> Matrix {
        let r = m.min(n);
        let fall: Vec<f64> = (0..r).map(|j| (1.0 + j as f64).powf(-0.8)).collect();
        noise(m, r, 1).scaled_cols(&fall).times(&noise(r, n, 2))
    }

    #[test]
    fn leading_values_are_those_of_the_whole() {
        for (m, n) in [(80, 60), (60, 300), (900, 40)] {
            let a = decaying(m, n);
            let exact = svd(&a).expect("finite");
            let found = sketched(&a, Sketch::of_rank(8));
            assert!((found.norm2 / a.norm_squared() - 1.0).abs() < 1e-12);
            for (x, y) in found.svd.s[..8].iter().zip(&exact.s) {
                assert!((x / y - 1.0).abs() < 1e-4, "{m} {n}: {x} {y}");
            }
            let error = |s: &[f64]| (found.norm2 - s[..8].iter().map(|v| v * v).sum::<f64>()).sqrt();
            assert!(error(&found.svd.s) / error(&exact.s) - 1.0 < 1e-4);
        }
    }

    #[test]
    fn with_all_directions_it_is_exact() {
        let a = decaying(12, 9);
        let Svd { u, s, v } = sketched(&a, Sketch::of_rank(9)).svd;
        for (x, y) in u.scaled_cols(&s).times_transpose(&v).data().iter().zip(a.data()) {
            assert!((x - y).abs() < 1e-12, "{x} {y}");
        }
    }

    #[test]
    fn nothing_and_nan() {
        let zero = sketched(&Matrix::zeros(5, 4), Sketch::of_rank(2));
        assert!(zero.norm2 == 0.0 && zero.svd.s.iter().all(|s| *s == 0.0));
        let bad = |_: Range<usize>| Ok::<_, Infallible>(vec![f64::NAN; 6]);
        assert!(sketch(2, 3, Sketch::of_rank(1), bad).expect("no error").is_none());
        let fails = |_: Range<usize>| Err::<Vec<f64>, _>("gone");
        assert_eq!(sketch(2, 3, Sketch::of_rank(1), fails).err(), Some("gone"));
    }
}
