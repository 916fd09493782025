//! An adapter out of two checkpoints: what a tuned one has that its base had not.
//!
//! Weight by weight the difference `D = tuned - base` streams through in tiles of rows and is decomposed by a
//! randomised range finder (see [`crate::linalg::sketch`]); both checkpoints may name their tensors in any namespace.
//! The error of a module is exact: `||D||` is summed on the way, and what is kept are singular values of a projection.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use super::Checkpoint;
use super::fuse::CheckpointReport;
use super::names::Leaf;
use crate::adapter::{Adapter, Address, ModuleKey, Placed};
use crate::cast::common_dtype;
use crate::detect::Detection;
use crate::dtype::Dtype;
use crate::error::{Code, Error, Result};
use crate::io::{Control, Source};
use crate::kind::{Kind, Module, Slot};
use crate::linalg::{Matrix, Sketch, Sketched, sketch};
use crate::ops::resize::RankRule;
use crate::report::Warning;
use crate::table::{Dialect, Op};
use crate::tensor::Tensor;

/// Singular values that are looked for first where a criterion decides on the rank.
const FIRST: usize = 64;

/// How to extract.
#[derive(Debug, Clone, Default)]
pub struct ExtractOptions {
    /// Which rank is enough.
    pub rule: RankRule,
    /// The element type of factors; `None` for that of the tuned weights.
    pub dtype: Option<Dtype>,
    /// Passes over a weight before the last one; `None` for that of [`Sketch::of_rank`].
    pub niter: Option<usize>,
    /// Of the random directions.
    pub seed: u64,
    /// Leave out what the target cannot hold, instead of stopping.
    pub lossy: bool,
}

/// What became of one weight.
#[derive(Debug, Clone, Serialize)]
pub struct Extracted {
    /// The module with its component, as the adapter names it.
    pub module: String,
    /// Its rank in the adapter.
    pub rank: usize,
    /// The Frobenius norm of the difference.
    pub norm: f64,
    /// The share of the squared norm that the rank keeps.
    pub energy: f64,
    /// The relative Frobenius error, before the factors are rounded to their type.
    pub relative_error: f64,
}

/// What was extracted.
#[derive(Debug, Clone, Serialize)]
pub struct ExtractReport {
    /// The tuned checkpoint.
    pub tuned: CheckpointReport,
    /// Its base.
    pub base: CheckpointReport,
    /// The weights that changed.
    pub modules: Vec<Extracted>,
    /// Biases, norms and other parameters that changed and are in the adapter.
    pub parameters: usize,
    /// Parameters that are the same in both.
    pub unchanged: usize,
    /// Parameters that changed, or that only one of the two has, and are not in the adapter.
    pub dropped: Vec<String>,
    /// The highest rank.
    pub max_rank: usize,
    /// The root of the sum of squared errors over that of squared norms, of all weights.
    pub relative_error: f64,
    /// Wall time of extracting, without writing.
    pub seconds: f64,
}

/// One module of the adapter to be.
struct Goal {
    key: ModuleKey,
    address: Address,
    /// What messages call it.
    name: String,
    /// The canonical modules that it stands for.
    parts: Vec<String>,
}

/// What was found for one module.
#[derive(Default)]
struct Found {
    tensors: BTreeMap<Slot, Tensor>,
    kind: Option<Kind>,
    weight: Option<Extracted>,
    /// Squared norm and squared error of its weight.
    squares: (f64, f64),
    parameters: usize,
    unchanged: usize,
    dropped: Vec<(String, String)>,
}

/// The adapter that makes `base` what `tuned` is, in terms of the modules that the dialect of that number writes, and
/// what happened. Modules run in parallel; of each weight only some rows are held.
pub fn extract(
    tuned: &Checkpoint,
    base: &Checkpoint,
    dialect: usize,
    options: &ExtractOptions,
    control: &Control,
) -> Result<(Adapter, ExtractReport)> {
    let started = Instant::now();
    options.rule.check()?;
    if options.rule == RankRule::default() {
        return Err(Error::new(
            Code::RankNeeded,
            "a difference of weights has full rank, and nothing says how much of it is enough",
        ));
    }
    let registry = base.registry();
    if tuned.family() != base.family() {
        let name = |c: &Checkpoint| registry.families[c.family()].name.clone();
        let message = format!("it is {}, but the base `{}` is {}", name(tuned), base.path().display(), name(base));
        return Err(Error::new(Code::FamilyMismatch, message).at(tuned.path()));
    }
    let target = &registry.dialects[dialect];
    if !target.writes(base.family()) {
        let message = format!("`{}` cannot be written for {}", target.name, registry.families[base.family()].name);
        return Err(Error::new(Code::UnsupportedTarget, message));
    }
    let run = Run { tuned, base, target, options, control };
    let goals = run.goals();
    let bytes = |goal: &Goal| run.weights(goal).map_or(0, |(_, base)| base.nbytes());
    control.expect(goals.iter().map(bytes).sum());
    let found: Vec<Found> = goals.par_iter().with_max_len(1).map(|goal| run.goal(goal)).collect::<Result<_>>()?;
    let (mut adapter, mut report) = run.gather(goals, found, dialect)?;
    run.alone(&mut adapter, &mut report);
    if adapter.modules.is_empty() {
        let message = match report.dropped.is_empty() {
            true => "both checkpoints hold the same weights: there is nothing to extract".to_owned(),
            false => format!("nothing that changed has a place in `{}`; one is `{}`", target.name, report.dropped[0]),
        };
        return Err(Error::new(Code::NoModules, message).at(tuned.path()));
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok((adapter, report))
}

struct Run<'a> {
    tuned: &'a Checkpoint,
    base: &'a Checkpoint,
    target: &'a Dialect,
    options: &'a ExtractOptions,
    control: &'a Control,
}

impl Run<'_> {
    /// The modules that the target writes, of all that both checkpoints have: fused where it fuses, if all parts are
    /// there, so that they share a rank.
    fn goals(&self) -> Vec<Goal> {
        let mut out: BTreeMap<ModuleKey, Goal> = BTreeMap::new();
        let mut taken: BTreeSet<(usize, String)> = BTreeSet::new();
        for parameter in self.base.parameters() {
            let component = self.base.component_table(parameter.component);
            let namespace = self.target.place(self.base.family(), parameter.component).map_or(0, |p| p.namespace);
            for (path, _) in self.base.modules(parameter) {
                if !self.shared(parameter.component, &path) || !taken.insert((parameter.component, path.clone())) {
                    continue;
                }
                let Some((row, part, variables)) = component.canonical(&path) else { continue };
                let template = &component.rows[row].canonical[part];
                let fused =
                    component.rows.iter().enumerate().find(|(_, r)| {
                        namespace != 0 && r.names[namespace].is_some() && r.canonical.contains(template)
                    });
                let mut goal = Goal {
                    key: ModuleKey { component: parameter.component, path: path.clone() },
                    address: Address { row, part: Some(part), namespace: 0, variables },
                    name: format!("{}.{path}", component.name),
                    parts: vec![path],
                };
                if let Some((row, table)) = fused.filter(|(_, r)| r.op == Op::Fuse) {
                    let parts: Vec<String> =
                        table.canonical.iter().map(|t| t.render(&goal.address.variables)).collect();
                    let both = |leaf| parts.iter().all(|p| self.has(parameter.component, p, leaf));
                    let any = |leaf| parts.iter().any(|p| self.has(parameter.component, p, leaf));
                    if both(Leaf::Weight) && (both(Leaf::Bias) || !any(Leaf::Bias)) {
                        let name = table.names[namespace].as_ref().map(|t| t.render(&goal.address.variables));
                        goal.key.path = name.unwrap_or_default();
                        goal.name = format!("{}.{}", component.name, goal.key.path);
                        goal.address = Address { row, part: None, namespace, ..goal.address };
                        taken.extend(parts.iter().map(|p| (parameter.component, p.clone())));
                        goal.parts = parts;
                    }
                }
                out.insert(goal.key.clone(), goal);
            }
        }
        out.into_values().collect()
    }

    fn has(&self, component: usize, path: &str, leaf: Leaf) -> bool {
        [self.tuned, self.base].iter().all(|c| c.held(component, path, leaf).is_some())
    }

    /// Whether both have something of a module.
    fn shared(&self, component: usize, path: &str) -> bool {
        self.has(component, path, Leaf::Weight) || self.has(component, path, Leaf::Bias)
    }

    /// The parameter of a goal in both checkpoints, its parts stacked.
    fn both(&self, goal: &Goal, leaf: Leaf) -> Option<(Tensor, Tensor)> {
        let of = |c: &Checkpoint| {
            let part = |path: &String| match leaf {
                Leaf::Weight => c.weight(goal.key.component, path),
                Leaf::Bias => c.bias(goal.key.component, path),
            };
            let parts: Vec<Tensor> = goal.parts.iter().map(part).collect::<Option<_>>()?;
            Some(Tensor::stack_rows(&parts))
        };
        of(self.tuned).zip(of(self.base))
    }

    fn weights(&self, goal: &Goal) -> Option<(Tensor, Tensor)> {
        self.both(goal, Leaf::Weight)
    }

    fn goal(&self, goal: &Goal) -> Result<Found> {
        self.control.check()?;
        let mut found = Found::default();
        for leaf in [Leaf::Weight, Leaf::Bias] {
            let Some((tuned, base)) = self.both(goal, leaf) else { continue };
            let (one, two) = ((tuned.rows(), tuned.cols()), (base.rows(), base.cols()));
            if one != two {
                let why =
                    format!("is {} x {} in the tuned checkpoint and {} x {} in the base", one.0, one.1, two.0, two.1);
                found.dropped.push((goal.name.clone(), why));
            } else if same(&tuned, &base) {
                found.unchanged += 1;
            } else {
                let row = &self.base.component_table(goal.key.component).rows[goal.address.row];
                let plain = leaf == Leaf::Weight && row.op != Op::Only;
                let done = if plain {
                    self.weight(goal, &tuned, &base, &mut found)
                } else {
                    self.vector(goal, leaf, &tuned, &base, &mut found)
                };
                done.map_err(|e| e.at(self.tuned.path()))?;
            }
            if leaf == Leaf::Weight {
                self.control.advance(base.nbytes());
            }
        }
        Ok(found)
    }

    /// A weight: the leading part of its difference.
    fn weight(&self, goal: &Goal, tuned: &Tensor, base: &Tensor, found: &mut Found) -> Result<()> {
        let Some((rank, sketched)) = self.decomposed(tuned, base)? else {
            return Err(Error::new(Code::NotFinite, format!("`{}` holds NaN or infinite values", goal.name)));
        };
        let s = &sketched.svd.s;
        if sketched.norm2 == 0.0 {
            found.unchanged += 1;
            return Ok(());
        }
        let kept: f64 = s[..rank].iter().rev().map(|x| x * x).sum();
        let missed = (sketched.norm2 - kept).max(0.0);
        let roots: Vec<f64> = s[..rank].iter().map(|x| x.sqrt()).collect();
        let dtype = self.options.dtype.unwrap_or_else(|| factor_dtype(tuned.dtype()));
        let factor = |vectors: &Matrix| vectors.first_cols(rank).scaled_cols(&roots);
        found.tensors.insert(Slot::Up, Tensor::of_matrix(&factor(&sketched.svd.u), dtype));
        found.tensors.insert(Slot::Down, Tensor::of_matrix(&factor(&sketched.svd.v).transposed(), dtype));
        found.kind = Some(Kind::Lora);
        found.squares = (sketched.norm2, missed);
        found.weight = Some(Extracted {
            module: goal.name.clone(),
            rank,
            norm: sketched.norm2.sqrt(),
            energy: kept / sketched.norm2,
            relative_error: (missed / sketched.norm2).sqrt(),
        });
        Ok(())
    }

    /// The rank that is enough, and at least as many singular values; more are followed until they are enough.
    fn decomposed(&self, tuned: &Tensor, base: &Tensor) -> Result<Option<(usize, Sketched)>> {
        let (m, n) = (base.rows(), base.cols());
        let rule = self.options.rule;
        let full = m.min(n);
        let limit = rule.limit.unwrap_or(full).min(full);
        let mut wanted = if rule.criterion.is_some() { limit.min(FIRST) } else { limit };
        loop {
            let mut how = Sketch { seed: self.options.seed, ..Sketch::of_rank(wanted) };
            how.niter = self.options.niter.unwrap_or(how.niter);
            let tile = |rows: Range<usize>| {
                self.control.check()?;
                let mut values = tuned.rows_f64(rows.clone());
                values.iter_mut().zip(base.rows_f64(rows)).for_each(|(t, b)| *t -= b);
                Ok::<_, Error>(values)
            };
            let Some(sketched) = sketch(m, n, how, tile)? else { return Ok(None) };
            let s = &sketched.svd.s;
            let rest = (sketched.norm2 - s.iter().rev().map(|x| x * x).sum::<f64>()).max(0.0);
            // Rounding of what was found in full is no rest.
            let rest = if s.len() == full { 0.0 } else { rest };
            let rank = rule.rank(s, rest).min(s.len());
            if rank <= wanted.saturating_sub(usize::from(rule.criterion.is_some() && wanted < limit)) || wanted >= limit
            {
                return Ok(Some((rank.min(limit), sketched)));
            }
            wanted = (2 * wanted).min(limit);
        }
    }

    /// A bias, a norm or an embedding: as the target holds it, or dropped.
    fn vector(&self, goal: &Goal, leaf: Leaf, tuned: &Tensor, base: &Tensor, found: &mut Found) -> Result<()> {
        let only = self.base.component_table(goal.key.component).rows[goal.address.row].op == Op::Only;
        let choices: &[(Slot, Kind)] = match (only, leaf) {
            (true, Leaf::Weight) if base.cols() == 1 => {
                &[(Slot::WNorm, Kind::Norm), (Slot::Diff, Kind::Full), (Slot::Set, Kind::Set)]
            }
            (true, Leaf::Weight) => &[(Slot::Diff, Kind::Full), (Slot::Set, Kind::Set)],
            (true, Leaf::Bias) => &[(Slot::BNorm, Kind::Norm), (Slot::DiffB, Kind::Bias)],
            (false, _) => &[(Slot::DiffB, Kind::Bias)],
        };
        let fits = |kind: Kind| found.kind.is_none_or(|have| have == kind || kind == Kind::Bias);
        let Some((slot, kind)) = choices.iter().find(|(slot, kind)| self.target.holds(*slot) && fits(*kind)) else {
            let what = if leaf == Leaf::Bias { "has another bias" } else { "is another parameter" };
            found.dropped.push((goal.name.clone(), format!("{what}, which `{}` cannot hold", self.target.name)));
            return Ok(());
        };
        let dtype = common_dtype(tuned.dtype(), base.dtype());
        let tensor = match slot {
            Slot::Set => tuned.clone(),
            _ => Tensor::sum(&[tuned.clone(), base.clone().scaled(-1.0)]).cast(dtype),
        };
        found.tensors.insert(*slot, tensor);
        found.kind.get_or_insert(*kind);
        found.parameters += 1;
        Ok(())
    }

    fn gather(&self, goals: Vec<Goal>, found: Vec<Found>, dialect: usize) -> Result<(Adapter, ExtractReport)> {
        let registry = self.base.registry();
        let family = self.base.family();
        let source = Source::from_tensors(self.tuned.path(), Vec::new(), Vec::new())?;
        let detection = Detection {
            dialect: Some(dialect),
            dialects: vec![(dialect, 0)],
            family,
            candidates: vec![family],
            tie_break: None,
            known: 0,
            total: 0,
        };
        let mut adapter = Adapter {
            registry: Arc::clone(registry),
            source: Arc::new(source),
            family,
            detection,
            modules: BTreeMap::new(),
            unknown: Vec::new(),
            warnings: Vec::new(),
            native: None,
            expansion: None,
        };
        let mut report = ExtractReport {
            tuned: CheckpointReport::of(self.tuned),
            base: CheckpointReport::of(self.base),
            modules: Vec::new(),
            parameters: 0,
            unchanged: 0,
            dropped: Vec::new(),
            max_rank: 0,
            relative_error: 0.0,
            seconds: 0.0,
        };
        let (mut norms, mut errors) = (0.0, 0.0);
        for (goal, found) in goals.into_iter().zip(found) {
            report.unchanged += found.unchanged;
            for (name, why) in found.dropped {
                self.drop(&mut adapter, &mut report, &name, &why)?;
            }
            let Some(kind) = found.kind else { continue };
            if self.target.place(family, goal.key.component).is_none() {
                let why = format!("changed, and `{}` has no place for its component", self.target.name);
                self.drop(&mut adapter, &mut report, &goal.name, &why)?;
                continue;
            }
            report.parameters += found.parameters;
            norms += found.squares.0;
            errors += found.squares.1;
            report.max_rank = report.max_rank.max(found.weight.as_ref().map_or(0, |w| w.rank));
            report.modules.extend(found.weight);
            adapter
                .modules
                .insert(goal.key, Placed { address: goal.address, module: Module::new(kind, found.tensors) });
        }
        report.relative_error = if norms > 0.0 { (errors / norms).sqrt() } else { 0.0 };
        Ok((adapter, report))
    }

    /// Left out with a word, or an error.
    fn drop(&self, adapter: &mut Adapter, report: &mut ExtractReport, name: &str, why: &str) -> Result<()> {
        if !self.options.lossy {
            let hint = "choose another target with `--to`, or add `--lossy allow` to leave such parameters out";
            return Err(Error::new(Code::UnsupportedKind, format!("`{name}` {why}")).at(self.tuned.path()).hint(hint));
        }
        adapter.warnings.push(Warning::new(
            "dropped-parameter",
            Some(name.to_owned()),
            format!("left out: `{name}` {why}"),
        ));
        report.dropped.push(name.to_owned());
        Ok(())
    }

    /// Says which parameters only one of both has: they have no difference.
    fn alone(&self, adapter: &mut Adapter, report: &mut ExtractReport) {
        for (one, other, whose) in [(self.tuned, self.base, "tuned checkpoint"), (self.base, self.tuned, "base")] {
            let mut names: Vec<String> = Vec::new();
            for parameter in one.parameters() {
                let component = &one.component_table(parameter.component).name;
                let absent = |(path, _): &(String, Range<usize>)| {
                    other.held(parameter.component, path, parameter.leaf).is_none()
                };
                names.extend(
                    one.modules(parameter).into_iter().filter(absent).map(|(path, _)| format!("{component}.{path}")),
                );
            }
            names.sort();
            names.dedup();
            if let Some(first) = names.first() {
                let detail = format!(
                    "{} modules are only in the {whose} and have no difference, such as `{first}`",
                    names.len()
                );
                adapter.warnings.push(Warning::new("unmatched-module", None, detail));
                report.dropped.append(&mut names);
            }
        }
    }
}

/// Whether both are the same numbers in the same type: compared as bytes, without arithmetic.
fn same(a: &Tensor, b: &Tensor) -> bool {
    a.dtype() == b.dtype() && a.clone().reshaped(b.shape().to_vec()).same_as(b)
}

/// The type of factors beside weights of this type: FP8 is too coarse for them.
fn factor_dtype(dtype: Dtype) -> Dtype {
    if dtype.is_fp8() { Dtype::BF16 } else { dtype }
}
