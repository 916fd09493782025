//! What singular values say.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::ops::resize::Criterion;

/// Ranks whose retained energy is told, where they are below the rank there is.
const RANKS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];

/// Shares of the energy for which the rank is told.
const SHARES: [(&str, f64); 4] = [("0.9", 0.9), ("0.95", 0.95), ("0.99", 0.99), ("0.999", 0.999)];

/// What the singular values S_1 >= ... >= S_k of a delta say.
#[derive(Debug, Clone, Serialize)]
pub struct Spectrum {
    /// Singular values above rounding: k.
    pub rank: usize,
    /// The largest one, S_1.
    pub spectral_norm: f64,
    /// sum S^2 / S_1^2.
    pub stable_rank: f64,
    /// exp(-sum p ln p) with p = S^2 / sum S^2 (Roy and Vetterli 2007).
    pub effective_rank: f64,
    /// S_1 / S_k.
    pub condition: f64,
    /// Share of sum S^2 that the best approximation of each rank keeps.
    pub energy_by_rank: BTreeMap<usize, f64>,
    /// The smallest rank that keeps each share.
    pub rank_for_energy: BTreeMap<&'static str, usize>,
}

impl Spectrum {
    /// Of singular values, largest first, of factors of rank `limit`; `None` if there are none.
    pub(super) fn of(s: &[f64], limit: usize) -> Option<Self> {
        let (first, last) = (*s.first()?, *s.last()?);
        // Shares first: squares of very large or very small values would leave float64.
        let shares: Vec<f64> = s.iter().map(|x| (x / first) * (x / first)).collect();
        let total: f64 = shares.iter().rev().sum();
        let entropy: f64 = shares.iter().rev().map(|x| x / total).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
        Some(Self {
            rank: s.len(),
            spectral_norm: first,
            stable_rank: total,
            effective_rank: entropy.exp(),
            condition: first / last,
            energy_by_rank: energy_by_rank(&shares, limit),
            rank_for_energy: rank_for_energy(&shares),
        })
    }
}

/// The share of the sum that the first k of `energies` have, for ranks below `limit`. Tails are summed, so that shares
/// near one are right.
pub(super) fn energy_by_rank(energies: &[f64], limit: usize) -> BTreeMap<usize, f64> {
    let sum = |values: &[f64]| values.iter().rev().sum::<f64>();
    let total = sum(energies);
    let kept = |k: usize| 1.0 - sum(&energies[k.min(energies.len())..]) / total;
    match total > 0.0 {
        true => RANKS.into_iter().take_while(|k| *k < limit).map(|k| (k, kept(k))).collect(),
        false => BTreeMap::new(),
    }
}

/// The smallest rank that keeps each share: what `resize` would choose.
pub(super) fn rank_for_energy(energies: &[f64]) -> BTreeMap<&'static str, usize> {
    let roots: Vec<f64> = energies.iter().map(|e| e.sqrt()).collect();
    let enough = |share: f64| Criterion::Energy(share).rank(&roots, 0.0);
    match energies.iter().any(|e| *e > 0.0) {
        true => SHARES.into_iter().map(|(name, share)| (name, enough(share))).collect(),
        false => BTreeMap::new(),
    }
}

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { (sorted[middle - 1] + upper) / 2.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let s = Spectrum::of(&[4.0, 2.0, 2.0, 1.0], 8).expect("four values");
        assert_eq!((s.rank, s.spectral_norm, s.stable_rank, s.condition), (4, 4.0, 25.0 / 16.0, 4.0));
        let p = [16.0 / 25.0, 4.0 / 25.0, 4.0 / 25.0, 1.0 / 25.0];
        let entropy: f64 = p.iter().map(|p: &f64| -p * p.ln()).sum();
        assert!((s.effective_rank - entropy.exp()).abs() < 1e-12);
        let kept: Vec<(usize, f64)> = s.energy_by_rank.into_iter().collect();
        assert_eq!(kept.iter().map(|k| k.0).collect::<Vec<_>>(), [1, 2, 4]);
        for ((_, have), want) in kept.iter().zip([0.64, 0.8, 1.0]) {
            assert!((have - want).abs() < 1e-15, "{have} {want}");
        }
        assert_eq!(s.rank_for_energy.values().copied().collect::<Vec<_>>(), [3, 3, 4, 4]);
    }

    #[test]
    fn equal_values_count_fully() {
        let s = Spectrum::of(&[1e-200; 10], 10).expect("ten values");
        assert!((s.stable_rank - 10.0).abs() < 1e-12 && (s.effective_rank - 10.0).abs() < 1e-12);
        assert_eq!(s.rank_for_energy["0.9"], 9);
        assert!(Spectrum::of(&[], 4).is_none());
        assert_eq!((energy_by_rank(&[0.0], 4).len(), rank_for_energy(&[]).len()), (0, 0));
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }
}
