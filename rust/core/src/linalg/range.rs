//! The leading singular vectors of a matrix that is only seen by tiles of rows.

use std::f64::consts::TAU;
use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use super::thin::{Svd, flat, of_view, times, view};

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
/// oversample) and one tile. The same seed gives the same result, whatever the tiles and threads.
pub fn sketch<E>(
    m: usize,
    n: usize,
    how: Sketch,
    mut tile: impl FnMut(Range<usize>) -> Result<Vec<f64>, E>,
) -> Result<Option<Sketched>, E> {
    let width = how.rank.saturating_add(how.oversample).min(m).min(n);
    if width == 0 {
        return Ok(Some(Sketched { svd: Svd { rows: m, cols: n, u: vec![], s: vec![], vt: vec![] }, norm2: 0.0 }));
    }
    let mut basis = Mat::from_fn(n, width, |i, j| gaussian(how.seed, (i * width + j) as u64));
    // Without a pass before it the last one would project on noise.
    for _ in 0..how.niter.max(1) {
        let mut next = Mat::<f64>::zeros(n, width);
        let mut finite = true;
        each_tile(m, n, &mut tile, |_, rows| {
            let image = times(rows, basis.as_ref());
            matmul(next.as_mut(), Accum::Add, rows.transpose(), image.as_ref(), 1.0, Par::Seq);
            finite &= (0..width).all(|j| (0..image.nrows()).all(|i| image[(i, j)].is_finite()));
        })?;
        if !finite || !is_finite(next.as_ref()) {
            return Ok(None);
        }
        basis = next.qr().compute_thin_Q();
    }
    let mut image = vec![0.0; m * width];
    let mut norm2 = 0.0;
    each_tile(m, n, &mut tile, |range, rows| {
        norm2 += square(rows);
        let part = flat(times(rows, basis.as_ref()).as_ref());
        image[range.start * width..range.end * width].copy_from_slice(&part);
    })?;
    if !norm2.is_finite() {
        return Ok(None);
    }
    let Some(inner) = of_view(view(&image, m, width)) else { return Ok(None) };
    let vt = times(view(&inner.vt, inner.s.len(), width), basis.transpose());
    let svd = Svd { rows: m, cols: n, u: inner.u, s: inner.s, vt: flat(vt.as_ref()) };
    Ok(Some(Sketched { svd, norm2 }))
}

/// Gives all rows to `work`, some at a time.
fn each_tile<E>(
    m: usize,
    n: usize,
    tile: &mut impl FnMut(Range<usize>) -> Result<Vec<f64>, E>,
    mut work: impl FnMut(Range<usize>, MatRef<'_, f64>),
) -> Result<(), E> {
    let step = (TILE / n.max(1)).max(1);
    for start in (0..m).step_by(step) {
        let range = start..m.min(start + step);
        let values = tile(range.clone())?;
        work(range.clone(), view(&values, range.len(), n));
    }
    Ok(())
}

fn is_finite(matrix: MatRef<'_, f64>) -> bool {
    (0..matrix.ncols()).all(|j| (0..matrix.nrows()).all(|i| matrix[(i, j)].is_finite()))
}

fn square(matrix: MatRef<'_, f64>) -> f64 {
    matrix.squared_norm_l2()
}

/// A standard normal number that depends on nothing but the seed and its index.
///
/// SplitMix64 (Steele, Lea and Flood 2014) as a function of a counter, and the Box-Muller transform.
pub fn gaussian(seed: u64, index: u64) -> f64 {
    let pair = index / 2;
    let unit = |n: u64| (mix(seed ^ mix(n)) >> 11) as f64 / (1u64 << 53) as f64;
    let radius = (-2.0 * (1.0 - unit(2 * pair)).ln()).sqrt();
    let (sin, cos) = (TAU * unit(2 * pair + 1)).sin_cos();
    radius * if index.is_multiple_of(2) { cos } else { sin }
}

fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::super::thin::{product, svd};
    use super::*;

    fn noise(count: usize, seed: u64) -> Vec<f64> {
        (0..count as u64).map(|i| gaussian(seed, i)).collect()
    }

    fn sketched(m: usize, n: usize, how: Sketch, values: &[f64]) -> Sketched {
        let rows = |r: Range<usize>| Ok::<_, Infallible>(values[r.start * n..r.end * n].to_vec());
        sketch(m, n, how, rows).expect("no error").expect("finite")
    }

    /// A matrix whose singular values fall like those of a weight difference.
    fn decaying(m: usize, n: usize) -> Vec<f64> {
        let r = m.min(n);
        let b: Vec<f64> =
            noise(m * r, 1).iter().enumerate().map(|(i, v)| v / (1.0 + (i % r) as f64).powf(0.8)).collect();
        product(m, r, n, &b, &noise(r * n, 2))
    }

    #[test]
    fn leading_values_are_those_of_the_whole() {
        for (m, n) in [(80, 60), (60, 300), (900, 40)] {
            let values = decaying(m, n);
            let exact = svd(m, n, &values).expect("finite");
            let found = sketched(m, n, Sketch::of_rank(8), &values);
            assert!((found.norm2 / values.iter().map(|v| v * v).sum::<f64>() - 1.0).abs() < 1e-12);
            for (x, y) in found.svd.s[..8].iter().zip(&exact.s) {
                assert!((x / y - 1.0).abs() < 1e-4, "{m} {n}: {x} {y}");
            }
            let error = |s: &[f64]| (found.norm2 - s[..8].iter().map(|v| v * v).sum::<f64>()).sqrt();
            assert!(error(&found.svd.s) / error(&exact.s) - 1.0 < 1e-4);
        }
    }

    #[test]
    fn with_all_directions_it_is_exact() {
        let (m, n) = (12, 9);
        let values = decaying(m, n);
        let found = sketched(m, n, Sketch::of_rank(9), &values).svd;
        let scaled: Vec<f64> = found.u.chunks_exact(9).flat_map(|r| r.iter().zip(&found.s).map(|(x, s)| x * s)).collect();
        for (x, y) in product(m, 9, n, &scaled, &found.vt).iter().zip(&values) {
            assert!((x - y).abs() < 1e-12, "{x} {y}");
        }
    }

    #[test]
    fn nothing_and_nan() {
        let zero = sketched(5, 4, Sketch::of_rank(2), &[0.0; 20]);
        assert!(zero.norm2 == 0.0 && zero.svd.s.iter().all(|s| *s == 0.0));
        let bad = |_: Range<usize>| Ok::<_, Infallible>(vec![f64::NAN; 6]);
        assert!(sketch(2, 3, Sketch::of_rank(1), bad).expect("no error").is_none());
        let fails = |_: Range<usize>| Err::<Vec<f64>, _>("gone");
        assert_eq!(sketch(2, 3, Sketch::of_rank(1), fails).err(), Some("gone"));
    }

    #[test]
    fn numbers_are_normal() {
        let values = noise(40_000, 7);
        let mean = values.iter().sum::<f64>() / 4e4;
        let moment = |p: i32| values.iter().map(|v| v.powi(p)).sum::<f64>() / 4e4;
        assert!(mean.abs() < 0.02 && (moment(2) - 1.0).abs() < 0.03 && (moment(4) - 3.0).abs() < 0.2);
        assert_eq!(gaussian(7, 3).to_bits(), values[3].to_bits());
    }
}
