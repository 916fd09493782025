//! Small dense linear algebra in float64. Knows nothing of adapters. Single-threaded: callers run many at once.

/// Frobenius norm of the m x n matrix `sum_k b_k a_k^T`, given the columns `b_k` (length m) and rows `a_k` (length n)
/// one after the other.
///
/// Through the triangular factors of a Householder QR of both (Golub and Van Loan, Matrix Computations, 5.2): costs
/// (m + n) R^2 and loses nothing to cancellation, unlike the trace of Gram matrices.
pub fn low_rank_norm(m: usize, n: usize, b: &[f64], a: &[f64]) -> f64 {
    let rank = b.len().checked_div(m).unwrap_or(0);
    if rank == 0 || n == 0 {
        return 0.0;
    }
    let (rb, ra) = (triangular_factor(m, b), triangular_factor(n, a));
    // Both are upper trapezoidal, columns of length min(m, rank) and min(n, rank), padded to `rank`.
    let mut sum = 0.0;
    for i in 0..rank {
        for j in 0..rank {
            let entry: f64 = (i.max(j)..rank).map(|k| rb[k * rank + i] * ra[k * rank + j]).sum();
            sum += entry * entry;
        }
    }
    sum.sqrt()
}

/// The R of a QR factorisation of the matrix with the given columns of length `rows`; column-major, `rank` x `rank`.
fn triangular_factor(rows: usize, columns: &[f64]) -> Vec<f64> {
    let rank = columns.len() / rows;
    let mut work = columns.to_vec();
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
    let mut factor = vec![0.0; rank * rank];
    for k in 0..rank {
        let height = (k + 1).min(rows);
        factor[k * rank..k * rank + height].copy_from_slice(&work[k * rows..k * rows + height]);
    }
    factor
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

    #[test]
    fn agrees_with_the_dense_norm() {
        for (m, n, rank) in [(7, 5, 3), (3, 9, 4), (2, 2, 6), (40, 30, 8), (1, 1, 1)] {
            let (b, a) = (noise(m * rank, 1), noise(n * rank, 2));
            let (fast, slow) = (low_rank_norm(m, n, &b, &a), dense_norm(m, n, &b, &a));
            assert!((fast - slow).abs() <= 1e-12 * slow.max(1.0), "{m} {n} {rank}: {fast} {slow}");
        }
    }

    #[test]
    fn sees_differences_far_below_the_root_of_epsilon() {
        let (m, n) = (50, 40);
        let (b, a) = (noise(m, 3), noise(n, 4));
        let shifted: Vec<f64> = b.iter().map(|v| -v * (1.0 + 1e-12)).collect();
        let difference = low_rank_norm(m, n, &[b.clone(), shifted].concat(), &[a.clone(), a.clone()].concat());
        let relative = difference / low_rank_norm(m, n, &b, &a);
        assert!((relative - 1e-12).abs() < 1e-14, "{relative}");
    }
}
