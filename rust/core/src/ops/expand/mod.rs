//! Every kind of adapter as plain LoRA: exactly where the rank of its difference is low, else the best of a rank.
//!
//! Norms, biases and replaced parameters are no differences of a weight matrix and stay as they are, as does what is
//! plain LoRA already. A fused module that its kind did not let cut is cut now.

mod cut;
mod place;

use rayon::prelude::*;
use serde::Serialize;

use self::cut::{Cut, Cutter, Trouble};
use self::place::put;
pub(crate) use self::place::{counterpart, settled, weight_of};
use super::based::Based;
use super::delta::shape;
use super::resize::RankRule;
use crate::adapter::{Adapter, ModuleKey, Placed};
use crate::convert::kind_name;
use crate::dtype::{Dtype, read_f64};
use crate::error::{Code, Error, Result};
use crate::io::Control;
use crate::kind::{Kind, Module, Slot};
use crate::report::Warning;
use crate::weights::Checkpoint;

/// How adapters are made plain.
#[derive(Debug, Clone, Default)]
pub struct Expand {
    /// Which rank is enough; `None` for the exact one, which differences that need the base weights do not have.
    pub rule: Option<RankRule>,
    /// The element type that factors will be written in; `None` for that of the input's. Computed factors are rounded to
    /// it once.
    pub dtype: Option<Dtype>,
    /// Leave out what cannot be made plain, instead of stopping.
    pub lossy: bool,
    /// Of the random directions in which full-rank differences are searched.
    pub seed: u64,
}

/// What happened to one module.
#[derive(Debug, Clone, Serialize)]
pub struct Expanded {
    /// The canonical path with its component, as the file had it.
    pub module: String,
    /// The kind it was.
    pub kind: &'static str,
    /// The rank of its exact plain form.
    pub rank_before: usize,
    /// The rank it has now.
    pub rank_after: usize,
    /// The Frobenius norm of its difference; `None` where it was not needed.
    pub norm: Option<f64>,
    /// The Frobenius norm of what is lost, relative to that; 0 for exact forms, whose numbers are rounded once.
    pub relative_error: f64,
}

/// What happened to all modules.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ExpandReport {
    /// Modules that are plain LoRA now and were not.
    pub expanded: usize,
    /// Modules that stayed as they were: plain LoRA, norms, biases.
    pub kept: usize,
    /// Modules that were left out.
    pub left_out: usize,
    /// The highest rank of those that were made plain.
    pub max_rank: usize,
    /// The root of the sum of squared errors over that of squared norms, of the modules whose norm is known.
    pub relative_error: f64,
    /// The modules that were made plain.
    pub modules: Vec<Expanded>,
}

/// What an adapter was before it was made plain, and what happened.
#[derive(Debug, Clone)]
pub struct Expansion {
    /// The kind of the file.
    pub kind: &'static str,
    /// Numbers of the input tensors that were left out.
    pub left_out: Vec<usize>,
    /// Module by module.
    pub report: ExpandReport,
}

/// What became of one module.
enum Outcome {
    Kept,
    Plain(Box<Module>, Expanded),
    LeftOut(Error),
}

/// The adapter as plain LoRA. `base` has the weights for kinds that need them; modules are computed in parallel, and of a
/// weight only some rows are held at a time.
///
/// Errors: `weights-needed` without a base for kinds that need one, `missing-weight` where the base lacks a module,
/// `rank-needed` where a difference has full rank and no rule says how much of it is enough, `not-finite`.
pub fn expand(
    adapter: &Adapter,
    base: Option<&Checkpoint>,
    how: &Expand,
    control: &Control,
) -> Result<(Adapter, ExpandReport)> {
    how.rule.map_or(Ok(()), RankRule::check)?;
    adapter.ensure_apart()?;
    if let Some(base) = base.filter(|b| b.family() != adapter.family) {
        let theirs = &base.registry().families[base.family()].name;
        let message = format!("the base is {theirs}, the adapter {}", adapter.family_table().name);
        return Err(Error::new(Code::FamilyMismatch, message).at(base.path()));
    }
    let run = Run { adapter, base, how };
    let modules: Vec<(&ModuleKey, &Placed)> = adapter.modules.iter().collect();
    let outcomes: Vec<Outcome> = modules
        .par_iter()
        .map(|(key, placed)| {
            control.check()?;
            run.module(key, placed)
        })
        .collect::<Result<_>>()?;
    run.gather(modules.into_iter().zip(outcomes))
}

struct Run<'a> {
    adapter: &'a Adapter,
    base: Option<&'a Checkpoint>,
    how: &'a Expand,
}

impl Run<'_> {
    fn module(&self, key: &ModuleKey, placed: &Placed) -> Result<Outcome> {
        let module = &placed.module;
        if stays(module) {
            return Ok(Outcome::Kept);
        }
        match self.plain(key, placed) {
            Ok(cut) => {
                let expanded = Expanded {
                    module: self.adapter.display(key),
                    kind: placed.module.kind_name(),
                    rank_before: cut.rank_before,
                    rank_after: cut.rank_after(),
                    norm: cut.norm,
                    relative_error: cut.relative_error(),
                };
                Ok(Outcome::Plain(Box::new(finished(module, cut)), expanded))
            }
            Err(error) if self.how.lossy && error.code().kind() == crate::error::Kind::Unsupported => {
                Ok(Outcome::LeftOut(error))
            }
            Err(error) => Err(error),
        }
    }

    fn plain(&self, key: &ModuleKey, placed: &Placed) -> Result<Cut> {
        let module = placed.module.tightened();
        let cutter = Cutter { rule: self.how.rule, dtype: self.how.dtype, seed: self.how.seed };
        let found = match Based::needs_weight(&module) {
            false => cutter.factored(&module),
            true => {
                let weight = self.weight(key, placed)?;
                Based::new(&module, &weight).map_err(Trouble::Refused).and_then(|based| cutter.based(&module, &based))
            }
        };
        found.map_err(|trouble| self.explained(key, &module, trouble))
    }

    fn weight(&self, key: &ModuleKey, placed: &Placed) -> Result<crate::tensor::Tensor> {
        let (name, kind) = (self.adapter.display(key), placed.module.kind_name());
        let Some(base) = self.base else {
            let message = format!("`{name}` is {kind}, whose difference is not known without the base weights");
            return Err(self.about(&placed.module, Error::new(Code::WeightsNeeded, message)));
        };
        weight_of(self.adapter, base, key, &placed.address).ok_or_else(|| {
            let message = format!("`{name}` is {kind}, and `{}` lacks its weight", base.path().display());
            self.about(&placed.module, Error::new(Code::MissingWeight, message))
        })
    }

    fn explained(&self, key: &ModuleKey, module: &Module, trouble: Trouble) -> Error {
        let name = self.adapter.display(key);
        let kind = module.kind_name();
        let error = match trouble {
            Trouble::Refused(refusal) => Error::new(Code::UnsupportedKind, format!("`{name}` {}", refusal.0)),
            Trouble::NeedsRule => {
                let size = shape(module).map_or_else(String::new, |(m, n)| format!(" ({m}x{n})"));
                Error::new(Code::RankNeeded, format!("`{name}` is {kind}, whose difference{size} has full rank"))
            }
            Trouble::NotFinite => {
                let error = Error::new(Code::NotFinite, format!("`{name}` holds NaN or infinite values"));
                return match self.spoiled(module) {
                    Some(key) => error.key(key).at(self.adapter.source.path()),
                    // Then it is the weight.
                    None => match self.base.filter(|_| Based::needs_weight(module)) {
                        Some(base) => error.at(base.path()),
                        None => self.about(module, error),
                    },
                };
            }
        };
        self.about(module, error)
    }

    /// Names the file, and a key of the module.
    fn about(&self, module: &Module, error: Error) -> Error {
        let source = &self.adapter.source;
        match module.inputs.first().and_then(|&i| source.tensors().get(i)) {
            Some(info) => error.key(&info.name).at(source.path()),
            None => error.at(source.path()),
        }
    }

    /// The first tensor of a module with NaN or infinities in it.
    fn spoiled(&self, module: &Module) -> Option<String> {
        let source = &self.adapter.source;
        module.inputs.iter().find_map(|&index| {
            let info = source.tensors().get(index)?;
            let mut elements = source.bytes(index).chunks_exact(info.dtype.size().max(1));
            let bad = info.dtype.is_float() && elements.any(|e| !read_f64(info.dtype, e).is_finite());
            bad.then(|| info.name.clone())
        })
    }

    fn gather<'m>(
        &self,
        outcomes: impl Iterator<Item = ((&'m ModuleKey, &'m Placed), Outcome)>,
    ) -> Result<(Adapter, ExpandReport)> {
        let mut out = Adapter { modules: Default::default(), ..self.adapter.clone() };
        let mut report = ExpandReport::default();
        let mut left_out = Vec::new();
        for ((key, placed), outcome) in outcomes {
            let module = match outcome {
                Outcome::Kept => {
                    report.kept += 1;
                    placed.module.clone()
                }
                Outcome::Plain(module, expanded) => {
                    report.modules.push(expanded);
                    *module
                }
                Outcome::LeftOut(error) => {
                    report.left_out += 1;
                    left_out.extend(&placed.module.inputs);
                    let detail = format!("left out: {}", error.message());
                    let name = self.adapter.display(key);
                    out.warnings.push(Warning::new(error.code().as_str(), Some(name), detail));
                    continue;
                }
            };
            put(&mut out, key, &placed.address, module).map_err(|e| self.about(&placed.module, e))?;
        }
        report.close();
        out.warnings.extend(report.wide(&out));
        out.expansion = Some(Expansion { kind: kind_name(self.adapter), left_out, report: report.clone() });
        Ok((out, report))
    }
}

impl ExpandReport {
    /// Sums up the modules.
    fn close(&mut self) {
        self.expanded = self.modules.len();
        self.max_rank = self.modules.iter().map(|m| m.rank_after).max().unwrap_or(0);
        let known = self.modules.iter().filter_map(|m| Some((m.norm?, m.relative_error)));
        let (norm, error) =
            known.fold((0.0, 0.0), |(n, e), (norm, error)| (n + norm * norm, e + (norm * error).powi(2)));
        self.relative_error = if norm > 0.0 { (error / norm).sqrt() } else { 0.0 };
    }

    /// A word on modules that are larger as factors than as a whole.
    fn wide(&self, adapter: &Adapter) -> Option<Warning> {
        let larger = |m: &&Module| match (m.get(Slot::Up), m.get(Slot::Down)) {
            (Some(up), Some(down)) => m.regrouped && down.rows() * (up.rows() + down.cols()) > up.rows() * down.cols(),
            _ => false,
        };
        let count = adapter.modules.values().map(|p| &p.module).filter(larger).count();
        (count > 0 && self.expanded > 0).then(|| {
            let detail = format!(
                "{count} modules have more numbers as factors than as a whole difference; `--rank`, `--energy` or `--max-error` makes them smaller"
            );
            Warning::new("rank-high", None, detail)
        })
    }
}

/// What is no difference of a weight matrix, or plain already.
fn stays(module: &Module) -> bool {
    match module.kind {
        Kind::Lora => !module.is_dora() && !module.has_core(),
        Kind::Full => module.get(Slot::Diff).is_none_or(|t| t.cols() == 1) && !module.is_dora(),
        Kind::Norm | Kind::Set | Kind::Bias => true,
        Kind::Loha | Kind::Lokr | Kind::Oft | Kind::Glora | Kind::Ia3 => false,
    }
}

/// The module that was, with other factors.
fn finished(module: &Module, cut: Cut) -> Module {
    let approximate = cut.relative_error() > 0.0;
    let mut tensors = std::collections::BTreeMap::from([(Slot::Down, cut.down), (Slot::Up, cut.up)]);
    tensors.extend(module.get(Slot::DiffB).map(|bias| (Slot::DiffB, bias.clone())));
    let mut out = Module::new(Kind::Lora, tensors);
    out.scale = cut.scale;
    out.alpha = cut.alpha;
    out.alpha_source = module.alpha_source;
    out.inputs.clone_from(&module.inputs);
    out.regrouped = true;
    out.approximate = module.approximate || approximate;
    out
}
