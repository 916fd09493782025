//! Several deltas as one by a rule that looks at their elements: TIES, DARE, DELLA and their relatives.
//!
//! A delta can be looked at in three ways, and the same rule ([`blend`]) works on all of them:
//!
//! - by its **core** ([`core`]): the deltas of a module in two bases that all of them share. Nothing is lost, the ranks
//!   may differ, and the result does not depend on how a delta was factored.
//! - by **itself** ([`full`]): what PEFT calls `*_svd`, and what mergekit does. The result has full rank and is
//!   compressed again, which loses much; how much is reported.
//! - by its **factors** ([`factors`]), as PEFT's methods without `_svd` do. Different factors of one delta give
//!   different results.

mod blend;
mod choices;
mod core;
mod cut;
mod factors;
mod full;
mod options;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Serialize;

pub use choices::{Choices, Way};
pub use options::{MergeOptions, Method, Rule, Sign, Space};

use crate::dtype::Dtype;
use crate::kind::{Kind, Module, Refusal, Slot};
use crate::linalg::Matrix;
use crate::report::Warning;
use crate::tensor::Tensor;

/// A module of one term of a composition, which is not yet multiplied by its strength: rules differ in when they do it.
#[derive(Debug, Clone, Copy)]
pub struct Weighted<'a> {
    /// The module.
    pub module: &'a Module,
    /// The strength of the term at this module.
    pub weight: f64,
    /// The number of the term in the composition.
    pub term: usize,
}

/// Why modules were not merged.
#[derive(Debug, Clone)]
pub enum Trouble {
    /// There is no rule for them.
    Refused(Refusal),
    /// The module at this place among those given holds NaN or infinities.
    NotFinite(usize),
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, Trouble> {
    Err(Trouble::Refused(Refusal(reason.into())))
}

/// What happened to one module.
#[derive(Debug, Clone, Serialize)]
pub struct MergedModule {
    /// Its name.
    pub module: String,
    /// Terms that have it.
    pub terms: usize,
    /// The rank of the result; `None` where it has none.
    pub rank: Option<usize>,
    /// The Frobenius norm of what the rule says; `None` where it is not computed.
    pub norm: Option<f64>,
    /// What the written delta differs from it, relative to that norm: where a full delta is compressed again. Of
    /// `linear`, what the result differs from the weighted sum of the deltas, relative to that.
    pub relative_error: Option<f64>,
}

/// The result for one module.
#[derive(Debug, Clone)]
pub struct Merged {
    /// Its factors are computed when they are written, or held where they had to be computed at once.
    pub module: Module,
    /// What was lost.
    pub report: MergedModule,
}

/// What happened to all modules.
#[derive(Debug, Clone, Serialize)]
pub struct MergeReport {
    /// The method.
    pub method: &'static str,
    /// Whose conventions.
    pub rule: &'static str,
    /// Whose elements.
    pub space: &'static str,
    /// Of random choices.
    pub seed: u64,
    /// The root of the sum of squared errors over that of squared norms; `None` where there is no error.
    pub relative_error: Option<f64>,
    /// The modules.
    pub modules: Vec<MergedModule>,
}

/// A delta by its factors, or what becomes of one.
struct Factored {
    up: Tensor,
    down: Tensor,
    scale: f64,
    weight: f64,
    term: usize,
}

/// Factors of a result, of scale 1.
struct Product {
    up: Tensor,
    down: Tensor,
    norm: Option<f64>,
    relative_error: Option<f64>,
}

/// Merges the modules that the terms of a composition have in one place. `name` is that of the module, for random
/// choices and the report; `rank` is the rank that a full delta is compressed to, the highest of the terms unless given.
///
/// Kinds: plain LoRA, full differences, norms and biases. What has no factors is merged element by element.
pub fn merge(
    terms: &[Weighted<'_>],
    options: &MergeOptions,
    name: &str,
    rank: Option<usize>,
) -> Result<Merged, Trouble> {
    let kind = common_kind(terms)?;
    if kind == Kind::Set {
        let modules: Vec<&Module> = terms.iter().map(|t| t.module).collect();
        let module = Module::sum(&modules).map_err(Trouble::Refused)?;
        return Ok(Merged { module, report: report(name, terms.len(), None) });
    }
    for (at, term) in terms.iter().enumerate() {
        if !term.module.tensors.values().all(is_finite) {
            return Err(Trouble::NotFinite(at));
        }
    }
    let mut tensors = BTreeMap::new();
    let mut product = None;
    let factored = factored(terms)?;
    if !factored.is_empty() {
        let found = match options.space() {
            Space::Core => self::core::merge(&factored, options, name),
            Space::Delta => full::merge(&factored, options, name, rank)?,
            Space::Factors => factors::merge(&factored, options, name)?,
        };
        tensors.insert(Slot::Up, found.up.clone());
        tensors.insert(Slot::Down, found.down.clone());
        product = Some(found);
    }
    for slot in [Slot::Diff, Slot::DiffB, Slot::WNorm, Slot::BNorm] {
        let parts: Vec<(&Tensor, &Weighted<'_>)> =
            terms.iter().filter_map(|t| Some((t.module.get(slot)?, t))).collect();
        if parts.windows(2).any(|w| w[0].0.shape() != w[1].0.shape()) {
            return refuse("has differences of other shapes in each of them");
        }
        if !parts.is_empty() {
            tensors.insert(slot, factors::elements(parts, options, &format!("{name} {}", slot.name())));
        }
    }
    Ok(Merged { module: assembled(kind, tensors, terms), report: report(name, terms.len(), product.as_ref()) })
}

fn assembled(kind: Kind, tensors: BTreeMap<Slot, Tensor>, terms: &[Weighted<'_>]) -> Module {
    let mut module = Module::new(kind, tensors);
    let sources = terms.iter().map(|t| t.module.alpha_source);
    module.alpha_source = sources.min().unwrap_or(module.alpha_source);
    module.inputs = terms.iter().flat_map(|t| t.module.inputs.iter().copied()).collect();
    module.inputs.sort_unstable();
    module.inputs.dedup();
    module.regrouped = true;
    module.approximate = true;
    module
}

fn report(name: &str, terms: usize, product: Option<&Product>) -> MergedModule {
    MergedModule {
        module: name.to_owned(),
        terms,
        rank: product.map(|p| p.down.rows()),
        norm: product.and_then(|p| p.norm),
        relative_error: product.and_then(|p| p.relative_error),
    }
}

/// The kind of the result. A bias alone goes with any layer.
fn common_kind(terms: &[Weighted<'_>]) -> Result<Kind, Trouble> {
    if terms.iter().any(|t| t.module.is_dora()) {
        return refuse("is DoRA in one of them, which merges with nothing else");
    }
    if terms.iter().any(|t| t.module.get(Slot::Mid).is_some()) {
        return refuse("has a Tucker core (`lora_mid`) in one of them, which cannot be merged");
    }
    let mut kinds: Vec<Kind> = terms.iter().map(|t| t.module.kind).filter(|k| *k != Kind::Bias).collect();
    kinds.dedup();
    match kinds.as_slice() {
        [] => Ok(Kind::Bias),
        [kind @ (Kind::Lora | Kind::Full | Kind::Norm | Kind::Set)] => Ok(*kind),
        [kind] => refuse(format!("is {}, and only LoRA and full differences are merged", kind.name())),
        [a, b, ..] => refuse(format!("is {} in one and {} in another of them", a.name(), b.name())),
    }
}

/// The factors of all terms, brought to one input width with zeros.
fn factored(terms: &[Weighted<'_>]) -> Result<Vec<Factored>, Trouble> {
    let mut parts = Vec::new();
    for Weighted { module, weight, term } in terms {
        if let (Some(up), Some(down)) = (module.get(Slot::Up), module.get(Slot::Down)) {
            let (up, down) = (up.clone(), down.clone());
            parts.push(Factored { up, down, scale: module.scale, weight: *weight, term: *term });
        }
    }
    let outputs = |p: &Factored| p.up.rows();
    if let Some(w) = parts.windows(2).find(|w| outputs(&w[0]) != outputs(&w[1])) {
        let (a, b) = (outputs(&w[0]), outputs(&w[1]));
        return refuse(format!("has {a} outputs in one and {b} in another of them"));
    }
    let width = parts.iter().map(|p| p.down.cols()).max().unwrap_or(0);
    for part in &mut parts {
        if part.down.cols() < width && part.down.shape().len() > 2 {
            let (a, b) = (part.down.cols(), width);
            return refuse(format!("has {a} inputs in one and {b} in another of them"));
        }
        part.down = part.down.padded(part.down.rows(), width);
    }
    Ok(parts)
}

fn is_finite(tensor: &Tensor) -> bool {
    let step = ((1 << 18) / tensor.cols().max(1)).max(1);
    let mut starts = (0..tensor.rows()).step_by(step);
    starts.all(|start| tensor.rows_f64(start..tensor.rows().min(start + step)).iter().all(|x| x.is_finite()))
}

/// The type that holds the factors of all terms.
fn dtype<'t>(tensors: impl Iterator<Item = &'t Tensor>) -> Dtype {
    tensors.map(Tensor::dtype).reduce(crate::cast::common_dtype).unwrap_or(Dtype::F32)
}

/// Numbers that are held: in float32, or float64 for that type.
fn held(matrix: &Matrix, dtype: Dtype, shape: Vec<usize>) -> Tensor {
    let (stored, bytes): (Dtype, Vec<u8>) = match dtype {
        Dtype::F64 => (Dtype::F64, matrix.data().iter().flat_map(|x| x.to_le_bytes()).collect()),
        _ => (Dtype::F32, matrix.data().iter().flat_map(|x| (*x as f32).to_le_bytes()).collect()),
    };
    Tensor::constant(stored, shape, bytes).cast(dtype)
}

/// The shapes of `up` and `down` of another rank.
fn shapes(part: &Factored, rank: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut up, mut down) = (part.up.shape().to_vec(), part.down.shape().to_vec());
    up[1] = rank;
    down[0] = rank;
    (up, down)
}

/// What happened to all modules, and what deserves a word.
pub fn summary(options: &MergeOptions, modules: Vec<MergedModule>) -> (MergeReport, Vec<Warning>) {
    let square = |x: f64| x * x;
    let lossy = || modules.iter().filter_map(|m| Some((m.norm?, m.relative_error?)));
    let norm: f64 = lossy().map(|(norm, _)| square(norm)).sum();
    let error: f64 = lossy().map(|(norm, error)| square(norm * error)).sum();
    let total = lossy().next().map(|_| if norm > 0.0 { (error / norm).sqrt() } else { 0.0 });
    let mut warnings = Vec::new();
    let mut warn = |code: &str, detail: String| warnings.push(Warning::new(code, None, detail));
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    match (options.method, options.space(), total) {
        (Method::Linear, _, Some(total)) => warn(
            "linear-merge",
            format!(
                "factors were added, not deltas: the result differs from the weighted sum by {} of it; \
                 `cat` is the exact sum",
                percent(total)
            ),
        ),
        (_, Space::Factors, _) => {
            let detail = "the rule saw factors: another factorisation of the same adapters gives another result";
            warn("factor-space", detail.to_owned());
        }
        (_, Space::Delta, Some(total)) => {
            let detail = format!("compressing the merged deltas to these ranks lost {} of them", percent(total));
            warn("recompression-loss", detail);
        }
        _ => {}
    }
    let report = MergeReport {
        method: options.method.name(),
        rule: options.rule().name(),
        space: options.space().name(),
        seed: options.seed,
        relative_error: total,
        modules,
    };
    (report, warnings)
}
