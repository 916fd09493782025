//! What the weights of an adapter look like: norms, ranks and energies of every module, block and component.
//!
//! Deltas include their scale and are never formed: the singular values of a product of thin factors are those of a
//! small matrix ([`crate::linalg::thin_svd`]).

mod measure;
mod values;

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use self::measure::{Measured, measure};
pub use self::values::Spectrum;
pub(crate) use self::values::median;
use self::values::{energy_by_rank, rank_for_energy};
use super::delta::shape;
use super::place::Place;
use crate::adapter::Adapter;
use crate::error::Result;
use crate::report::Warning;

/// What could be said of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// All that its kind has.
    Ok,
    /// It does nothing: its delta is zero.
    Dead,
    /// It holds NaN or infinite values, or such that the delta is.
    NotFinite,
    /// The norm, but no spectrum: it is too large to be decomposed.
    NormOnly,
    /// Nothing: its kind has no delta without the base weights.
    Unmeasured,
}

/// One module.
#[derive(Debug, Clone, Serialize)]
pub struct ModuleWeights {
    /// The canonical path with its component.
    pub module: String,
    /// The component.
    pub component: String,
    /// The path of its block; `None` outside of blocks.
    pub block: Option<String>,
    /// The kind.
    pub kind: &'static str,
    /// Outputs and inputs; `None` for kinds without a delta.
    pub shape: Option<(usize, usize)>,
    /// The rank that alpha is divided by, where there is one.
    pub rank: Option<usize>,
    /// The factor on the delta, which all numbers include.
    pub scale: f64,
    /// What could be said of it.
    pub status: Status,
    /// Frobenius norm of the delta.
    pub norm: Option<f64>,
    /// Share of the sum of squared norms of the whole adapter.
    pub share: Option<f64>,
    /// What the singular values say; `None` where the delta is zero, not finite or too large.
    pub spectrum: Option<Spectrum>,
    /// Euclidean norm of the differences of biases and norm layers.
    pub vector_norm: Option<f64>,
    /// What the numbers leave out.
    pub note: Option<&'static str>,
}

/// A block, a component or the whole.
#[derive(Debug, Clone, Serialize)]
pub struct GroupWeights {
    /// The component; empty for the whole.
    pub component: String,
    /// The path of the block; `None` for what is outside of blocks, and for components.
    pub block: Option<String>,
    /// Its modules.
    pub modules: usize,
    /// Root of the sum of squared norms.
    pub norm: f64,
    /// Share of the sum of squared norms of the whole adapter; 0 if that is zero.
    pub share: f64,
    /// Median over its modules.
    pub stable_rank: Option<f64>,
    /// Median over its modules.
    pub effective_rank: Option<f64>,
    /// Share of the energy that is left if every module is truncated to a rank, over modules with a spectrum.
    pub energy_by_rank: BTreeMap<usize, f64>,
    /// The smallest rank for all modules that keeps each share.
    pub rank_for_energy: BTreeMap<&'static str, usize>,
}

/// The weights of an adapter.
#[derive(Debug, Clone, Serialize)]
pub struct Weights {
    /// All modules together.
    pub total: GroupWeights,
    /// Component by component.
    pub components: Vec<GroupWeights>,
    /// Block by block, in the order of the model; what is outside of blocks comes last.
    pub blocks: Vec<GroupWeights>,
    /// Modules that do nothing.
    pub dead: Vec<String>,
    /// Modules with NaN or infinite values; no sum includes them.
    pub not_finite: Vec<String>,
    /// Module by module, in canonical order.
    pub modules: Vec<ModuleWeights>,
    /// Sums over modules of the squares of the k-th singular values; as many as the highest rank, which may be many.
    #[serde(skip)]
    pub energies: Vec<f64>,
}

impl Weights {
    /// A warning for every module that is not finite.
    pub fn warnings(&self) -> Vec<Warning> {
        let detail = "holds NaN or infinite values and is left out of all sums; `lorafmt check` names the tensors";
        self.not_finite.iter().map(|m| Warning::new("not-finite", Some(m.clone()), format!("{m} {detail}"))).collect()
    }
}

/// Measures all modules. Reads every factor once; an error if they still hold the branches of a quantized base.
pub fn weights(adapter: &Adapter) -> Result<Weights> {
    adapter.ensure_apart()?;
    let modules: Vec<_> = adapter.modules.iter().collect();
    let measured: Vec<Measured> = modules.par_iter().map(|(_, placed)| measure(&placed.module)).collect();
    let (mut whole, mut blocks) = (Sums::default(), BTreeMap::<Place, Sums>::new());
    let mut components: BTreeMap<usize, Sums> = BTreeMap::new();
    let mut rows = Vec::with_capacity(modules.len());
    for ((key, placed), measured) in modules.into_iter().zip(measured) {
        let place = Place::of(adapter, key, &placed.address);
        let spectrum = measured.values.as_ref().and_then(|s| Spectrum::of(s, measured.limit));
        let block = blocks.entry(place.clone()).or_default();
        for sums in [&mut whole, components.entry(key.component).or_default(), block] {
            sums.add(&measured, spectrum.as_ref());
        }
        rows.push(ModuleWeights {
            module: adapter.display(key),
            component: place.component(adapter).to_owned(),
            block: place.block,
            kind: placed.module.kind_name(),
            shape: shape(&placed.module),
            rank: placed.module.tightened().rank(),
            scale: placed.module.scale,
            status: measured.status,
            norm: measured.norm,
            share: None,
            spectrum,
            vector_norm: measured.vector_norm,
            note: measured.note,
        });
    }
    let energy = whole.energy;
    for row in &mut rows {
        row.share = row.norm.map(|n| share(n * n, energy));
    }
    let named = |status| rows.iter().filter(|m| m.status == status).map(|m| m.module.clone()).collect();
    let component = |(c, sums): (usize, Sums)| sums.group(&adapter.component(c).name, None, energy);
    let block = |(place, sums): (Place, Sums)| sums.group(place.component(adapter), place.block.clone(), energy);
    Ok(Weights {
        dead: named(Status::Dead),
        not_finite: named(Status::NotFinite),
        total: whole.group("", None, energy),
        components: components.into_iter().map(component).collect(),
        blocks: blocks.into_iter().map(block).collect(),
        modules: rows,
        energies: whole.energies,
    })
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// Sums over modules.
#[derive(Default)]
struct Sums {
    modules: usize,
    energy: f64,
    /// Sums of the squares of the k-th singular values.
    energies: Vec<f64>,
    limit: usize,
    stable: Vec<f64>,
    effective: Vec<f64>,
}

impl Sums {
    fn add(&mut self, module: &Measured, spectrum: Option<&Spectrum>) {
        self.modules += 1;
        self.energy += module.norm.map_or(0.0, |n| n * n);
        let values = module.values.as_deref().unwrap_or_default();
        self.energies.resize(self.energies.len().max(values.len()), 0.0);
        self.energies.iter_mut().zip(values).for_each(|(sum, s)| *sum += s * s);
        self.limit = self.limit.max(module.limit);
        self.stable.extend(spectrum.map(|s| s.stable_rank));
        self.effective.extend(spectrum.map(|s| s.effective_rank));
    }

    fn group(&self, component: &str, block: Option<String>, whole: f64) -> GroupWeights {
        GroupWeights {
            component: component.to_owned(),
            block,
            modules: self.modules,
            norm: self.energy.sqrt(),
            share: share(self.energy, whole),
            stable_rank: median(self.stable.iter().copied()),
            effective_rank: median(self.effective.iter().copied()),
            energy_by_rank: energy_by_rank(&self.energies, self.limit),
            rank_for_energy: rank_for_energy(&self.energies),
        }
    }
}
