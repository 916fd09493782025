//! What the weights of a file look like, in as few numbers as a page can show.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{share, short};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::inspect::quoted;
use crate::kind::Kind;
use crate::ops::{GroupWeights, ModuleWeights, Weights, median, weights};

/// Singular values that are noted. The energy is counted over all.
const VALUES: usize = 128;

/// Modules that are noted.
const MODULES: usize = 8;

/// Names of modules that are noted.
const NAMES: usize = 20;

/// A rank that keeps this much of the energy, and is at most half of what there is, is worth a word.
const PLENTY: f64 = 0.99;

/// LoRA with a magnitude, as reports call it.
const DORA: &str = "dora";

/// What the weights of a file look like. Numbers have four digits.
#[derive(Debug, Clone, Serialize)]
pub struct Measures {
    /// Root of the sum of the squared norms of all deltas.
    pub norm: f64,
    /// Median over modules.
    pub stable_rank: Option<f64>,
    /// Median over modules.
    pub effective_rank: Option<f64>,
    /// The root of the sum, over modules, of the squares of the k-th singular values; at most 128.
    pub values: Vec<f64>,
    /// The share of the energy that is left if every module is truncated to rank k.
    pub kept: Vec<f64>,
    /// The smallest rank for all modules that keeps each share.
    pub rank_for_energy: BTreeMap<&'static str, usize>,
    /// A much lower rank that keeps nearly all.
    pub smaller: Option<Smaller>,
    /// Block by block, in the order of the model; what is outside of blocks comes last. Where the model's table knows no
    /// blocks, paths with one number are one.
    pub blocks: Vec<BlockMeasure>,
    /// The modules that weigh most.
    pub largest: Vec<ModuleMeasure>,
    /// Modules that do nothing.
    pub dead: Names,
    /// Modules with NaN or infinite values; no sum includes them.
    pub not_finite: Names,
}

/// A rank that would do.
#[derive(Debug, Clone, Serialize)]
pub struct Smaller {
    /// The rank.
    pub rank: usize,
    /// Share of the energy that is kept.
    pub kept: f64,
    /// The command.
    pub command: String,
}

/// A block.
#[derive(Debug, Clone, Serialize)]
pub struct BlockMeasure {
    /// The component.
    pub component: String,
    /// The path of the block; `None` for what is outside of blocks.
    pub block: Option<String>,
    /// Its modules.
    pub modules: usize,
    /// Root of the sum of squared norms.
    pub norm: f64,
    /// Share of the sum of squared norms of the whole adapter.
    pub share: f64,
    /// Median over its modules.
    pub effective_rank: Option<f64>,
}

/// A module.
#[derive(Debug, Clone, Serialize)]
pub struct ModuleMeasure {
    /// The canonical path with its component.
    pub module: String,
    /// Frobenius norm of the delta.
    pub norm: f64,
    /// Share of the sum of squared norms of the whole adapter.
    pub share: f64,
    /// The rank that alpha is divided by, where there is one.
    pub rank: Option<usize>,
    /// See [`crate::ops::Spectrum::effective_rank`].
    pub effective_rank: Option<f64>,
}

/// Modules by name.
#[derive(Debug, Clone, Serialize)]
pub struct Names {
    /// How many there are.
    pub count: usize,
    /// The first of them.
    pub first: Vec<String>,
}

impl Measures {
    /// Reads every factor once; an error where deltas are not known without a base.
    pub(super) fn of(adapter: &Adapter, path: &str) -> Result<Self> {
        let weights = weights(adapter)?;
        let total = &weights.total;
        Ok(Self {
            norm: short(total.norm),
            stable_rank: total.stable_rank.map(short),
            effective_rank: total.effective_rank.map(short),
            values: weights.energies.iter().take(VALUES).map(|e| short(e.sqrt())).collect(),
            kept: kept(&weights.energies),
            rank_for_energy: total.rank_for_energy.clone(),
            smaller: smaller(&weights, path),
            blocks: blocks(&weights),
            largest: largest(&weights.modules),
            dead: names(&weights.dead),
            not_finite: names(&weights.not_finite),
        })
    }
}

/// Tails are summed, so that shares near one are right.
fn kept(energies: &[f64]) -> Vec<f64> {
    let mut tails: Vec<f64> = energies.to_vec();
    for k in (1..tails.len()).rev() {
        tails[k - 1] += tails[k];
    }
    let Some(&total) = tails.first().filter(|t| **t > 0.0) else { return Vec::new() };
    let after = tails.iter().skip(1).chain([&0.0]).take(VALUES);
    after.map(|tail| share(1.0 - tail / total)).collect()
}

fn smaller(weights: &Weights, path: &str) -> Option<Smaller> {
    // Other kinds have to be made plain first.
    let plain = |m: &&ModuleWeights| m.rank.is_some() && [Kind::Lora.name(), DORA].contains(&m.kind);
    if weights.modules.iter().filter(|m| m.norm.is_some()).any(|m| !plain(&m)) {
        return None;
    }
    let highest = weights.modules.iter().filter_map(|m| m.rank).max()?;
    let enough = |(rank, kept): &(&usize, &f64)| **kept >= PLENTY && *rank * 2 <= highest;
    let (&rank, &kept) = weights.total.energy_by_rank.iter().find(enough)?;
    let command = format!("lorafmt resize {} --rank {rank}", quoted(path));
    Some(Smaller { rank, kept: share(kept), command })
}

/// The blocks that the model's table knows, and of each component then those that paths alone tell.
fn blocks(weights: &Weights) -> Vec<BlockMeasure> {
    let mut out = Vec::new();
    for group in &weights.blocks {
        match group.block {
            Some(_) => out.push(block(group)),
            None => out.extend(numbered(weights, &group.component)),
        }
    }
    out
}

/// The modules of a component outside of known blocks, by their paths up to the first number.
fn numbered(weights: &Weights, component: &str) -> Vec<BlockMeasure> {
    let mut groups: BTreeMap<Option<(&str, u32)>, Vec<&ModuleWeights>> = BTreeMap::new();
    for module in weights.modules.iter().filter(|m| m.component == component && m.block.is_none()) {
        let path = module.module.strip_prefix(component).map_or("", |p| p.trim_start_matches('.'));
        groups.entry(stem(path)).or_default().push(module);
    }
    // What has no number comes last.
    let last = groups.remove(&None);
    let named = groups.into_iter().map(|(key, modules)| (key.map(|(stem, n)| format!("{stem}{n}")), modules));
    named
        .chain(last.map(|modules| (None, modules)))
        .map(|(name, modules)| together(component, name, &modules))
        .collect()
}

/// The path before its first number, and the number.
fn stem(path: &str) -> Option<(&str, u32)> {
    let mut start = 0;
    for part in path.split('.') {
        if let Ok(number) = part.parse() {
            return Some((&path[..start], number));
        }
        start += part.len() + 1;
    }
    None
}

fn together(component: &str, block: Option<String>, modules: &[&ModuleWeights]) -> BlockMeasure {
    let effective = modules.iter().filter_map(|m| m.spectrum.as_ref()).map(|s| s.effective_rank);
    BlockMeasure {
        component: component.to_owned(),
        block,
        modules: modules.len(),
        norm: short(modules.iter().filter_map(|m| m.norm).map(|n| n * n).sum::<f64>().sqrt()),
        share: short(modules.iter().filter_map(|m| m.share).sum()),
        effective_rank: median(effective).map(short),
    }
}

fn block(group: &GroupWeights) -> BlockMeasure {
    BlockMeasure {
        component: group.component.clone(),
        block: group.block.clone(),
        modules: group.modules,
        norm: short(group.norm),
        share: short(group.share),
        effective_rank: group.effective_rank.map(short),
    }
}

fn largest(modules: &[ModuleWeights]) -> Vec<ModuleMeasure> {
    let mut by_share: Vec<&ModuleWeights> = modules.iter().filter(|m| m.share.is_some_and(|s| s > 0.0)).collect();
    by_share.sort_by(|a, b| b.share.unwrap_or(0.0).total_cmp(&a.share.unwrap_or(0.0)));
    let measure = |m: &&ModuleWeights| ModuleMeasure {
        module: m.module.clone(),
        norm: short(m.norm.unwrap_or(0.0)),
        share: short(m.share.unwrap_or(0.0)),
        rank: m.rank,
        effective_rank: m.spectrum.as_ref().map(|s| short(s.effective_rank)),
    };
    by_share.iter().take(MODULES).map(measure).collect()
}

fn names(all: &[String]) -> Names {
    Names { count: all.len(), first: all.iter().take(NAMES).cloned().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_paths() {
        assert_eq!(stem("up_blocks.1.attentions.0.proj_in"), Some(("up_blocks.", 1)));
        assert_eq!(stem("mid_block.resnets.0.conv1"), Some(("mid_block.resnets.", 0)));
        assert_eq!((stem("conv_in"), stem("")), (None, None));
    }

    #[test]
    fn what_ranks_keep() {
        assert_eq!(kept(&[6.0, 3.0, 1.0]), [0.6, 0.9, 1.0]);
        assert_eq!(kept(&[0.0, 0.0]), [0.0; 0]);
        // Nearly all is not all.
        assert_eq!(kept(&[1.0, 1e-9]), [0.99999, 1.0]);
        assert_eq!(kept(&vec![1.0; 1000]).len(), VALUES);
    }
}
