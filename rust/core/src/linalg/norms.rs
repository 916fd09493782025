//! Norms of low-rank products, accurate to rounding even for differences of nearly equal ones.

use std::ops::Range;

/// Rows that are factored at a time: with a few dozen columns they stay in the second-level cache.
const CHUNK: usize = 256;

/// Frobenius norms of the m x n matrices `sum_k b_k a_k^T` over each range of `groups`, given the columns `b_k` (length
/// m) and rows `a_k` (length n) one after the other.
///
/// Through the triangular factors of a Householder QR of both (Golub and Van Loan, Matrix Computations, 5.2): costs
/// (m + n) R^2 once for all groups and loses nothing to cancellation, unlike the trace of Gram matrices.
pub fn low_rank_norms(m: usize, n: usize, b: &[f64], a: &[f64], groups: &[Range<usize>]) -> Vec<f64> {
    let rank = b.len().checked_div(m).unwrap_or(0);
    if rank == 0 || n == 0 {
        return vec![0.0; groups.len()];
    }
    let (rb, ra) = (triangular_factor(m, b), triangular_factor(n, a));
    groups.iter().map(|group| product_norm(rank, &rb, &ra, group.clone())).collect()
}

/// Norm of `rb[:, group] ra[:, group]^T`; both column-major, upper triangular.
fn product_norm(rank: usize, rb: &[f64], ra: &[f64], group: Range<usize>) -> f64 {
    let mut row = vec![0.0; rank];
    let mut sum = 0.0;
    for i in 0..rank {
        row.fill(0.0);
        for k in group.clone() {
            let factor = rb[k * rank + i];
            if factor != 0.0 {
                row.iter_mut().zip(&ra[k * rank..(k + 1) * rank]).for_each(|(r, x)| *r += factor * x);
            }
        }
        sum += dot(&row, &row);
    }
    sum.sqrt()
}

/// The R of a QR factorisation of the matrix with the given columns of length `rows`; column-major, `rank` x `rank`.
///
/// Chunk by chunk of rows, each together with the factor so far (Demmel et al. 2012, communication-avoiding QR): the
/// whole matrix passes through the cache once.
fn triangular_factor(rows: usize, columns: &[f64]) -> Vec<f64> {
    let rank = columns.len() / rows;
    let mut factor = vec![0.0; rank * rank];
    let step = CHUNK.max(rank);
    let mut work = Vec::new();
    for start in (0..rows).step_by(step) {
        let count = step.min(rows - start);
        work.clear();
        for k in 0..rank {
            work.extend_from_slice(&factor[k * rank..(k + 1) * rank]);
            work.extend_from_slice(&columns[k * rows + start..k * rows + start + count]);
        }
        eliminate(rank + count, rank, &mut work);
        for k in 0..rank {
            factor[k * rank..(k + 1) * rank].copy_from_slice(&work[k * (rank + count)..][..rank]);
        }
    }
    factor
}

/// Householder QR in place; leaves R in the upper triangle and zeros below it.
fn eliminate(rows: usize, rank: usize, work: &mut [f64]) {
    for k in 0..rank.min(rows) {
        let (left, right) = work.split_at_mut((k + 1) * rows);
        let pivot = &mut left[k * rows + k..];
        let norm = dot(pivot, pivot).sqrt();
        if norm == 0.0 {
            continue;
        }
        let head = if pivot[0] > 0.0 { -norm } else { norm };
        pivot[0] -= head;
        let factor = 2.0 / dot(pivot, pivot);
        for column in right.chunks_exact_mut(rows) {
            let tail = &mut column[k..];
            let weight = factor * dot(pivot, tail);
            tail.iter_mut().zip(pivot.iter()).for_each(|(t, p)| *t -= weight * p);
        }
        pivot.fill(0.0);
        pivot[0] = head;
    }
}

/// Eight partial sums, so that the loop becomes vector code.
fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (xs, x_rest) = x.as_chunks::<8>();
    let (ys, y_rest) = y.as_chunks::<8>();
    for (p, q) in xs.iter().zip(ys) {
        for i in 0..8 {
            sums[i] += p[i] * q[i];
        }
    }
    sums.iter().sum::<f64>() + x_rest.iter().zip(y_rest).map(|(p, q)| p * q).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dense_norm(m: usize, n: usize, b: &[f64], a: &[f64]) -> f64 {
        let rank = b.len() / m;
        let mut sum = 0.0;
        for i in 0..m {
            for j in 0..n {
                let entry: f64 = (0..rank).map(|k| b[k * m + i] * a[k * n + j]).sum();
                sum += entry * entry;
            }
        }
        sum.sqrt()
    }

    fn noise(count: usize, seed: u64) -> Vec<f64> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / 2f64.powi(31) - 0.5
        };
        (0..count).map(|_| next()).collect()
    }

    fn norm(m: usize, n: usize, b: &[f64], a: &[f64]) -> f64 {
        let rank = b.len() / m;
        low_rank_norms(m, n, b, a, std::slice::from_ref(&(0..rank)))[0]
    }

    #[test]
    fn agrees_with_the_dense_norm() {
        for (m, n, rank) in [(7, 5, 3), (3, 9, 4), (2, 2, 6), (700, 530, 8), (1, 1, 1)] {
            let (b, a) = (noise(m * rank, 1), noise(n * rank, 2));
            let (fast, slow) = (norm(m, n, &b, &a), dense_norm(m, n, &b, &a));
            assert!((fast - slow).abs() <= 1e-12 * slow.max(1.0), "{m} {n} {rank}: {fast} {slow}");
        }
    }

    #[test]
    fn groups_are_norms_of_their_own() {
        let (m, n) = (300, 20);
        let (b, a) = (noise(m * 5, 5), noise(n * 5, 6));
        let norms = low_rank_norms(m, n, &b, &a, &[0..2, 2..5]);
        for (group, fast) in [(0..2, norms[0]), (2..5, norms[1])] {
            let slow = dense_norm(m, n, &b[group.start * m..group.end * m], &a[group.start * n..group.end * n]);
            assert!((fast - slow).abs() <= 1e-12 * slow, "{group:?}: {fast} {slow}");
        }
    }

    #[test]
    fn sees_differences_far_below_the_root_of_epsilon() {
        let (m, n) = (50, 40);
        let (b, a) = (noise(m, 3), noise(n, 4));
        let shifted: Vec<f64> = b.iter().map(|v| -v * (1.0 + 1e-12)).collect();
        let difference = norm(m, n, &[b.clone(), shifted].concat(), &[a.clone(), a.clone()].concat());
        let relative = difference / norm(m, n, &b, &a);
        assert!((relative - 1e-12).abs() < 1e-14, "{relative}");
    }
}
