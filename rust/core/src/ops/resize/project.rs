//! Fewer ranks by random projection (Johnson and Lindenstrauss 1984; sparse: Achlioptas 2003). A baseline: the noise is
//! far above the error of a decomposition.

use super::Method;
use crate::error::{Code, Error, Result};
use crate::linalg::Matrix;
use crate::random::Counter;

/// An error for a density that makes no sense.
pub(super) fn check_density(density: f64) -> Result<()> {
    match density > 0.0 && density <= 1.0 {
        true => Ok(()),
        false => Err(Error::new(Code::InvalidArgument, format!("a density of {density} makes no sense"))
            .hint("the density of a sparse projection is above 0 and at most 1")),
    }
}

/// `x = p^T` and `y = p` for a k x R matrix p with E[p^T p] = 1, so that the projected delta is unbiased.
///
/// Normal elements have the variance 1 / k. Of a sparse matrix every row has `density * R` of them (at least one), at
/// random places, so their variance is R / (k times their number).
pub(super) fn sketch(method: Method, rank: usize, k: usize, seed: u64, name: &str) -> (Matrix, Matrix) {
    let random = Counter::new(seed, name);
    let mut p = Matrix::from_fn(k, rank, |i, j| random.normal((i * rank + j) as u64) / (k as f64).sqrt());
    if let Method::SparseRandom(density) = method {
        let places = Counter::new(seed, &format!("{name}: places"));
        let kept = ((density * rank as f64) as usize).clamp(1, rank);
        let factor = (rank as f64 / kept as f64).sqrt();
        for (i, row) in p.data_mut().chunks_exact_mut(rank).enumerate() {
            let mut order: Vec<usize> = (0..rank).collect();
            order.sort_by(|a, b| {
                let at = |j: usize| places.uniform((i * rank + j) as u64);
                at(*a).total_cmp(&at(*b)).then(a.cmp(b))
            });
            order[..kept].iter().for_each(|j| row[*j] *= factor);
            order[kept..].iter().for_each(|j| row[*j] = 0.0);
        }
    }
    (p.transposed(), p)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mean of p^T p over many names is the identity.
    fn unbiased(method: Method) {
        let (rank, k, rounds) = (6, 3, 4000);
        let mut mean = Matrix::zeros(rank, rank);
        for round in 0..rounds {
            mean.add_gram(&sketch(method, rank, k, 1, &round.to_string()).1);
        }
        for i in 0..rank {
            for j in 0..rank {
                let value = mean.get(i, j) / f64::from(rounds);
                let wanted = f64::from(u8::from(i == j));
                assert!((value - wanted).abs() < 0.1, "{method:?} {i} {j}: {value}");
            }
        }
    }

    #[test]
    fn projections_are_unbiased() {
        unbiased(Method::Random);
        unbiased(Method::SparseRandom(0.5));
        // Too few ranks for the density: one element a row is left, never none.
        unbiased(Method::SparseRandom(0.1));
    }
}
