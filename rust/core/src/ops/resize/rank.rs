//! Which rank is enough.

use crate::error::{Code, Error, Result};

/// What must be kept of the singular values of a module, as the smallest rank that keeps it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Criterion {
    /// The sum of squares: at least this share of the whole.
    Energy(f64),
    /// The relative Frobenius error: at most this. An error of e keeps an energy of 1 - e^2.
    MaxError(f64),
    /// Every singular value above the largest one divided by this (`sv_ratio` of sd-scripts, `resize_lora.py`).
    SvRatio(f64),
    /// The root of the sum of squares: at least this share of the whole (`sv_fro` of sd-scripts).
    SvFro(f64),
    /// The sum: at least this share of the whole (`sv_cumulative` of sd-scripts).
    SvCumulative(f64),
}

impl Criterion {
    /// The name of its option.
    pub fn name(self) -> &'static str {
        match self {
            Criterion::Energy(_) => "energy",
            Criterion::MaxError(_) => "max-error",
            Criterion::SvRatio(_) => "sv-ratio",
            Criterion::SvFro(_) => "sv-fro",
            Criterion::SvCumulative(_) => "sv-cumulative",
        }
    }

    /// Whether sd-scripts has it, which keeps one rank more than the smallest that fulfils it.
    pub fn is_kohyas(self) -> bool {
        matches!(self, Criterion::SvRatio(_) | Criterion::SvFro(_) | Criterion::SvCumulative(_))
    }

    /// An error for a number that makes no sense.
    pub fn check(self) -> Result<()> {
        let (number, fits, range) = match self {
            Criterion::Energy(x) | Criterion::SvFro(x) | Criterion::SvCumulative(x) => {
                (x, x > 0.0 && x <= 1.0, "above 0 and at most 1")
            }
            Criterion::MaxError(x) => (x, (0.0..1.0).contains(&x), "at least 0 and below 1"),
            Criterion::SvRatio(x) => (x, x >= 1.0 && x.is_finite(), "at least 1"),
        };
        match fits {
            true => Ok(()),
            false => {
                let name = self.name();
                let hint = format!("`{name}` is a number {range}");
                Err(Error::new(Code::InvalidArgument, format!("`{name}` of {number} makes no sense")).hint(hint))
            }
        }
    }

    /// The smallest rank that fulfils it; 0 where there is nothing to keep. `s` falls; `rest` is the sum of squares of
    /// singular values that are not in it, which cannot be kept.
    pub fn rank(self, s: &[f64], rest: f64) -> usize {
        match self {
            Criterion::Energy(share) => by_tail(s, rest, |x| x * x, 1.0 - share),
            Criterion::SvFro(share) => by_tail(s, rest, |x| x * x, 1.0 - share * share),
            Criterion::MaxError(error) => by_tail(s, rest, |x| x * x, error * error),
            Criterion::SvCumulative(share) => by_tail(s, 0.0, |x| x, 1.0 - share),
            Criterion::SvRatio(ratio) => s.iter().take_while(|x| **x * ratio > s[0]).count().max(s.len().min(1)),
        }
    }
}

/// The smallest rank whose tail is at most a share of the whole. Tails are summed from their small end, so that they
/// are right however small they are.
fn by_tail(s: &[f64], rest: f64, size: impl Fn(f64) -> f64, share: f64) -> usize {
    let total: f64 = rest + s.iter().rev().map(|x| size(*x)).sum::<f64>();
    // The share itself is rounded: 1 - 0.9 is not 0.1.
    let allowed = total * share * (1.0 + 1e-12);
    let mut tail = rest;
    let dropped = s.iter().rev().take_while(|x| {
        tail += size(**x);
        tail <= allowed
    });
    (s.len() - dropped.count()).max(s.len().min(1))
}

/// How the rank of every module is chosen: the criterion, but no more than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RankRule {
    /// The highest rank.
    pub limit: Option<usize>,
    /// What must be kept.
    pub criterion: Option<Criterion>,
}

impl RankRule {
    /// A fixed rank.
    pub fn fixed(rank: usize) -> Self {
        Self { limit: Some(rank), criterion: None }
    }

    /// An error for numbers that make no sense.
    pub fn check(self) -> Result<()> {
        if self.limit == Some(0) {
            return Err(Error::new(Code::InvalidArgument, "a rank of 0 leaves nothing")
                .hint("name a rank of at least 1, or leave the adapter out"));
        }
        self.criterion.map_or(Ok(()), Criterion::check)
    }

    /// The rank for singular values `s`, at least 1 (see [`Criterion::rank`]).
    pub fn rank(self, s: &[f64], rest: f64) -> usize {
        let enough = self.criterion.map_or(usize::MAX, |c| c.rank(s, rest));
        enough.min(self.limit.unwrap_or(usize::MAX)).max(1)
    }
}

/// A limit on all modules together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// Bytes of all factors.
    Bytes(u64),
    /// The mean rank of all modules.
    MeanRank(f64),
}

/// One module that shares in a budget.
#[derive(Debug, Clone)]
pub(super) struct Share<'a> {
    /// Singular values, largest first.
    pub(super) s: &'a [f64],
    /// Bytes of one rank.
    pub(super) bytes: u64,
    /// A rank that is given already.
    pub(super) fixed: Option<usize>,
}

impl Budget {
    /// The rank of every module: the singular values that bring most energy for what they cost, over all modules, as
    /// long as the budget lasts. Every module keeps at least one rank. Optimal for the total Frobenius error up to the
    /// last step. An error if not even those fit.
    pub(super) fn ranks(self, shares: &[Share<'_>]) -> Result<Vec<usize>> {
        let cost = |share: &Share<'_>| match self {
            Budget::Bytes(_) => share.bytes as f64,
            Budget::MeanRank(_) => 1.0,
        };
        let whole = match self {
            Budget::Bytes(bytes) => bytes as f64,
            Budget::MeanRank(mean) => mean * shares.len() as f64,
        };
        let mut ranks: Vec<usize> = shares.iter().map(|s| s.fixed.unwrap_or(1)).collect();
        let least: f64 = shares.iter().zip(&ranks).map(|(s, k)| cost(s) * *k as f64).sum();
        if !whole.is_finite() || least > whole {
            return Err(self.too_small(least));
        }
        let mut steps: Vec<(f64, usize, usize)> = Vec::new();
        for (at, share) in shares.iter().enumerate().filter(|(_, s)| s.fixed.is_none()) {
            steps.extend(share.s.iter().enumerate().skip(1).map(|(k, s)| (s * s / cost(share), at, k)));
        }
        steps.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
        let mut left = whole - least;
        for (_, at, k) in steps {
            // A module whose next step did not fit takes no later one.
            if ranks[at] == k && cost(&shares[at]) <= left {
                ranks[at] += 1;
                left -= cost(&shares[at]);
            }
        }
        Ok(ranks)
    }

    fn too_small(self, least: f64) -> Error {
        let (message, hint) = match self {
            Budget::Bytes(bytes) => (
                format!("{bytes} bytes are too few: one rank for each module takes {least}"),
                format!("give at least {least} bytes"),
            ),
            Budget::MeanRank(mean) => {
                (format!("a mean rank of {mean} makes no sense"), "give a number of at least 1".to_owned())
            }
        };
        Error::new(Code::InvalidArgument, message).hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_rank_that_is_enough() {
        // Squares: 16, 4, 1, 1 of 22; sum 8.
        let s = [4.0, 2.0, 1.0, 1.0];
        let cases = [
            (Criterion::Energy(16.0 / 22.0), 1),
            (Criterion::Energy(0.73), 2),
            (Criterion::Energy(1.0), 4),
            (Criterion::MaxError(0.0), 4),
            (Criterion::MaxError((2f64 / 22.0).sqrt()), 2),
            (Criterion::MaxError(0.3), 3),
            (Criterion::SvFro((20f64 / 22.0).sqrt()), 2),
            (Criterion::SvCumulative(0.5), 1),
            (Criterion::SvCumulative(0.75), 2),
            (Criterion::SvRatio(2.0), 1),
            (Criterion::SvRatio(2.1), 2),
            (Criterion::SvRatio(1.0), 1),
            (Criterion::SvRatio(100.0), 4),
        ];
        for (criterion, rank) in cases {
            assert_eq!(criterion.rank(&s, 0.0), rank, "{criterion:?}");
            assert_eq!(criterion.rank(&[], 0.0), 0);
        }
        // What was not found counts as lost.
        assert_eq!((Criterion::Energy(0.5).rank(&s, 0.0), Criterion::Energy(0.5).rank(&s, 18.0)), (1, 2));
        let rule = RankRule { limit: Some(2), criterion: Some(Criterion::Energy(1.0)) };
        assert_eq!((rule.rank(&s, 0.0), rule.rank(&[], 0.0)), (2, 1));
    }

    #[test]
    fn numbers_that_make_no_sense() {
        for criterion in [
            Criterion::Energy(0.0),
            Criterion::Energy(1.1),
            Criterion::Energy(f64::NAN),
            Criterion::MaxError(1.0),
            Criterion::MaxError(-0.1),
            Criterion::SvRatio(0.5),
            Criterion::SvRatio(f64::INFINITY),
        ] {
            assert_eq!(criterion.check().expect_err("no sense").code(), Code::InvalidArgument, "{criterion:?}");
        }
        assert!(RankRule::fixed(0).check().is_err() && RankRule::fixed(1).check().is_ok());
    }

    #[test]
    fn a_budget_goes_where_it_brings_most() {
        let share = |s, bytes| Share { s, bytes, fixed: None };
        let (large, small) = ([4.0, 3.0, 0.1], [2.0, 1.9, 1.8]);
        let shares = [share(&large, 100), share(&small, 10)];
        // One each costs 110; small's others cost 20, large's second 100.
        assert_eq!(Budget::Bytes(130).ranks(&shares).expect("enough"), [1, 3]);
        assert_eq!(Budget::Bytes(229).ranks(&shares).expect("enough"), [1, 3]);
        assert_eq!(Budget::Bytes(230).ranks(&shares).expect("enough"), [2, 3]);
        assert!(Budget::Bytes(109).ranks(&shares).is_err());
        assert_eq!(Budget::MeanRank(1.5).ranks(&shares).expect("enough"), [2, 1]);
        assert!(Budget::MeanRank(0.5).ranks(&shares).is_err());
        assert!(Budget::MeanRank(f64::NAN).ranks(&shares).is_err());
        let fixed = [Share { fixed: Some(2), ..shares[0].clone() }, shares[1].clone()];
        assert_eq!(Budget::MeanRank(2.0).ranks(&fixed).expect("enough"), [2, 2]);
    }
}
