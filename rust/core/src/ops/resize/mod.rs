//! Another rank for a module: fewer ranks with the least error, or more with the same delta.
//!
//! Downwards the delta `scale * up @ down` is decomposed through its factors ([`thin_svd`]), which is exact and never
//! forms it; the new factors are `up @ x` and `y @ down` with small x and y, computed when they are written. The scale
//! stays what it is, so that alpha becomes scale * new rank, and singular values are shared evenly by both factors.

mod grow;
mod project;
mod rank;
mod sampled;

use rayon::prelude::*;
use serde::Serialize;

pub use rank::{Budget, Criterion, RankRule};

use self::rank::Share;
use super::factors::{Downs, Ups, factors};
use crate::error::Result;
use crate::kind::{Kind, Module, Slot};
use crate::linalg::{ThinSvd, thin_svd};
use crate::report::Warning;
use crate::strength::Selector;
use crate::tensor::Tensor;

/// How ranks are changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// Fewer ranks: the singular value decomposition, which has the least error (Eckart and Young 1936).
    Svd,
    /// The same from random samples of the delta: for differences that are not of low rank. It is formed in tiles.
    Rsvd {
        /// Power iterations.
        niter: usize,
        /// Directions that are followed beside the wanted ones.
        oversample: usize,
    },
    /// Fewer ranks by a random projection with normal elements.
    Random,
    /// Fewer ranks by a random projection most of whose elements are zero: this share of them is not.
    SparseRandom(f64),
    /// More ranks, filled with zeros: nothing else changes.
    Pad,
    /// More ranks: `down` is completed by orthonormal rows, `up` by zeros.
    Orthogonal,
}

impl Method {
    /// The name of its option.
    pub fn name(self) -> &'static str {
        match self {
            Method::Svd => "svd",
            Method::Rsvd { .. } => "rsvd",
            Method::Random => "random",
            Method::SparseRandom(_) => "sparse-random",
            Method::Pad => "pad",
            Method::Orthogonal => "orthogonal",
        }
    }

    /// Whether it gives more ranks rather than fewer.
    pub fn grows(self) -> bool {
        matches!(self, Method::Pad | Method::Orthogonal)
    }
}

/// How far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Module by module.
    Rule(RankRule),
    /// All modules together.
    Budget(Budget),
}

/// A change of ranks.
#[derive(Debug, Clone)]
pub struct Resize {
    /// How modules with more ranks than wanted, and with fewer, are changed. What has no method stays as it is.
    pub methods: Vec<Method>,
    /// How far.
    pub target: Target,
    /// Ranks of single modules; the last selector that matches counts.
    pub places: Vec<(Selector, usize)>,
    /// Of everything random.
    pub seed: u64,
}

/// What happened to one module.
#[derive(Debug, Clone, Serialize)]
pub struct Resized {
    /// Its name, as the target has it.
    pub module: String,
    /// The rank before.
    pub rank_before: usize,
    /// The rank after.
    pub rank_after: usize,
    /// The Frobenius norm of the delta; `None` where it was not needed.
    pub norm: Option<f64>,
    /// The Frobenius norm of the difference, relative to that of the delta.
    pub relative_error: f64,
    /// The share of the delta's energy (sum of squared singular values) that was kept.
    pub energy: f64,
}

impl Resized {
    fn unchanged(module: &str, rank: usize) -> Self {
        Self {
            module: module.to_owned(),
            rank_before: rank,
            rank_after: rank,
            norm: None,
            relative_error: 0.0,
            energy: 1.0,
        }
    }

    /// Notes the norm of the delta and that of what was lost.
    fn measured(&mut self, norm: f64, error: f64) {
        self.norm = Some(norm);
        if norm > 0.0 {
            self.relative_error = error / norm;
            self.energy = (1.0 - self.relative_error.powi(2)).max(0.0);
        }
    }
}

/// What happened to all modules.
#[derive(Debug, Clone, Serialize)]
pub struct ResizeReport {
    /// The methods that were used.
    pub method: String,
    /// Modules that have another rank now.
    pub changed: usize,
    /// The mean rank after.
    pub mean_rank: f64,
    /// The root of the sum of squared errors over that of squared norms, of the modules that changed.
    pub relative_error: f64,
    /// The modules that have a rank.
    pub modules: Vec<Resized>,
}

/// A module that is resized.
pub(crate) struct Item<'m> {
    pub(crate) name: String,
    pub(crate) module: &'m mut Module,
    /// A rank of its own.
    pub(crate) rank: Option<usize>,
}

/// Why a module was not resized.
pub(crate) enum Problem {
    /// Its factors hold NaN or infinities.
    NotFinite(usize),
    /// Anything else.
    Error(crate::error::Error),
}

impl From<crate::error::Error> for Problem {
    fn from(error: crate::error::Error) -> Self {
        Problem::Error(error)
    }
}

impl Resize {
    /// An error for numbers that make no sense.
    pub fn check(&self) -> Result<()> {
        if let Target::Rule(rule) = self.target {
            rule.check()?;
        }
        if let Some(density) = self.methods.iter().find_map(|m| match m {
            Method::SparseRandom(density) => Some(*density),
            _ => None,
        }) {
            project::check_density(density)?;
        }
        self.places.iter().try_for_each(|(_, rank)| RankRule::fixed(*rank).check())
    }

    /// Resizes every module that has a rank. Modules of other kinds must not be among them.
    pub(crate) fn run(&self, items: &mut [Item<'_>]) -> Result<(ResizeReport, Vec<Warning>), Problem> {
        let ranks = match self.target {
            Target::Rule(_) => None,
            Target::Budget(budget) => Some(self.shared(budget, items)?),
        };
        let one = |(at, item): (usize, &mut Item<'_>)| {
            let fixed = item.rank.or_else(|| ranks.as_ref().map(|r| r[at]));
            self.resize(item, fixed).ok_or(Problem::NotFinite(at))
        };
        let done: Vec<(Resized, bool)> = items.par_iter_mut().enumerate().map(one).collect::<Result<_, _>>()?;
        Ok(self.report(done))
    }

    /// The rank of every module under a budget. Only singular values are kept meanwhile.
    fn shared(&self, budget: Budget, items: &[Item<'_>]) -> Result<Vec<usize>, Problem> {
        let values = |(at, item): (usize, &Item<'_>)| match decomposed(item.module) {
            Some(thin) => Ok(thin.s),
            None => Err(Problem::NotFinite(at)),
        };
        let spectra: Vec<Vec<f64>> = items.par_iter().enumerate().map(values).collect::<Result<_, _>>()?;
        // A delta counts as strongly as it is applied.
        let applied = |(item, s): (&Item<'_>, Vec<f64>)| s.into_iter().map(|x| x * item.module.scale.abs()).collect();
        let spectra: Vec<Vec<f64>> = items.iter().zip(spectra).map(applied).collect();
        let shares: Vec<Share<'_>> = items
            .iter()
            .zip(&spectra)
            .map(|(item, s)| Share { s, bytes: rank_bytes(item.module), fixed: item.rank })
            .collect();
        Ok(budget.ranks(&shares)?)
    }

    /// One module; also whether the wanted rank was more than the smaller side. `None` for NaN and infinities.
    fn resize(&self, item: &mut Item<'_>, fixed: Option<usize>) -> Option<(Resized, bool)> {
        let (rows, cols) = super::shape(item.module)?;
        let side = rows.min(cols);
        // What is no product yet has the rank of its smaller side.
        let before = factors(item.module).map_or(side, |(_, down)| down.rows());
        let rule = match (fixed, self.target) {
            (None, Target::Rule(rule)) => rule,
            (fixed, _) => RankRule { limit: fixed, criterion: None },
        };
        let padded = self.methods.contains(&Method::Pad);
        let clamped = rule.limit.is_some_and(|k| k > side) && !padded;
        let mut done = Resized::unchanged(&item.name, before);
        let shrinks = self.methods.iter().copied().find(|m| !m.grows());
        if let Some(method) = shrinks.filter(|_| rule.criterion.is_some() || rule.limit.is_some_and(|k| k < before)) {
            self.shrink(item, method, rule, &mut done)?;
        }
        let grows = self.methods.iter().copied().find(|m| m.grows());
        if let (Some(method), Some(limit)) = (grows, rule.limit) {
            let wanted = if padded { limit } else { limit.min(side) };
            if wanted > done.rank_after {
                grow::grow(item.module, method, wanted, self.seed, &item.name)?;
                done.rank_after = wanted;
            }
        }
        Some((done, clamped))
    }

    /// Fewer ranks, if the rule gives fewer.
    fn shrink(&self, item: &mut Item<'_>, method: Method, rule: RankRule, done: &mut Resized) -> Option<()> {
        if let Method::Rsvd { niter, oversample } = method {
            return sampled::shrink(item.module, rule, (niter, oversample), self.seed, done);
        }
        let thin = decomposed(item.module)?;
        let wanted = rule.rank(&thin.s, 0.0);
        if wanted >= done.rank_before {
            return Some(());
        }
        let (small, error) = match method {
            Method::Svd => (thin.truncated(wanted.min(thin.s.len())), thin.tail(wanted)),
            _ => {
                let small = project::sketch(method, done.rank_before, wanted, self.seed, &item.name);
                let error = thin.residual(&small.0, &small.1);
                (small, error)
            }
        };
        done.rank_after = replace(item.module, small);
        done.measured(thin.norm() * item.module.scale.abs(), error * item.module.scale.abs());
        Some(())
    }

    fn report(&self, done: Vec<(Resized, bool)>) -> (ResizeReport, Vec<Warning>) {
        let mut warnings = Vec::new();
        let clamped: Vec<&Resized> = done.iter().filter(|(_, clamped)| *clamped).map(|(r, _)| r).collect();
        if let Some(first) = clamped.first() {
            let detail = format!(
                "{} modules have a side smaller than the wanted rank, which is as many ranks as they can use",
                clamped.len()
            );
            warnings.push(Warning::new("rank-clamped", Some(first.module.clone()), detail));
        }
        if let Target::Rule(RankRule { criterion: Some(criterion), .. }) = self.target
            && criterion.is_kohyas()
        {
            let detail =
                format!("`{}` keeps the smallest rank that is enough; sd-scripts keeps one more", criterion.name());
            warnings.push(Warning::new("smallest-rank", None, detail));
        }
        let modules: Vec<Resized> = done.into_iter().map(|(r, _)| r).collect();
        let unmet = |r: &&Resized| match self.target {
            Target::Rule(RankRule { limit: Some(limit), .. }) => {
                (r.rank_after > limit) || (r.rank_after < limit && self.methods.iter().any(|m| m.grows()))
            }
            _ => false,
        };
        let kept = modules.iter().filter(unmet).filter(|r| r.rank_after == r.rank_before).count();
        if kept > 0 && self.places.is_empty() {
            let detail = format!("{kept} modules keep their rank: `{}` does not change it that way", self.name());
            warnings.push(Warning::new("rank-kept", None, detail));
        }
        let squares = |f: fn(&Resized) -> f64| modules.iter().map(f).sum::<f64>();
        let norm = squares(|r| r.norm.unwrap_or(0.0).powi(2));
        let error = squares(|r| (r.norm.unwrap_or(0.0) * r.relative_error).powi(2));
        let report = ResizeReport {
            method: self.name(),
            changed: modules.iter().filter(|r| r.rank_before != r.rank_after).count(),
            mean_rank: squares(|r| r.rank_after as f64) / modules.len().max(1) as f64,
            relative_error: if norm > 0.0 { (error / norm).sqrt() } else { 0.0 },
            modules,
        };
        (report, warnings)
    }

    fn name(&self) -> String {
        self.methods.iter().map(|m| m.name()).collect::<Vec<_>>().join("+")
    }
}

/// Bytes of one rank: a column of `up` and a row of `down`.
fn rank_bytes(module: &Module) -> u64 {
    factors(module).map_or(0, |(up, down)| (up.rows() * up.dtype().size() + down.cols() * down.dtype().size()) as u64)
}

/// The decomposition of `up @ down`, without the scale; `None` for NaN and infinities.
pub(crate) fn decomposed(module: &Module) -> Option<ThinSvd> {
    let (up, down) = factors(module)?;
    thin_svd(&Ups(up), &Downs(down))
}

/// Puts `up @ x` and `y @ down` in the place of the factors; a delta of nothing gets one rank of zeros. Returns the rank.
fn replace(module: &mut Module, (x, y): (crate::linalg::Matrix, crate::linalg::Matrix)) -> usize {
    let rank = x.cols().max(1);
    let zeros = |t: &Tensor, rows: Option<usize>| {
        let mut shape = t.shape().to_vec();
        shape[rows.unwrap_or(1)] = 1;
        Tensor::zeros(t.dtype(), shape)
    };
    for (slot, tensor) in &mut module.tensors {
        *tensor = match slot {
            Slot::Up if x.cols() == 0 => zeros(tensor, None),
            Slot::Down if x.cols() == 0 => zeros(tensor, Some(0)),
            Slot::Up => tensor.times(x.clone()),
            Slot::Down => tensor.combined(y.clone()),
            _ => continue,
        };
    }
    module.alpha = None;
    module.approximate = true;
    module.without_origin();
    debug_assert_eq!(module.kind, Kind::Lora);
    rank
}
