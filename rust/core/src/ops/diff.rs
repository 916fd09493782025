//! Comparing two adapters by what they do, not by how they are written.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::Serialize;

use super::compare::{Verdict, alone, compare, ratio};
use super::expand::counterpart;
use super::place::Place;
use crate::adapter::{Adapter, ModuleKey};
use crate::error::{Code, Error, Result};
use crate::kind::Module;
use crate::linalg::Compared;

/// One module of a comparison.
#[derive(Debug, Clone, Serialize)]
pub struct ModuleDiff {
    /// The canonical path with its component.
    pub module: String,
    /// Relative Frobenius norm of the difference; 1 if only one side has the module.
    pub relative_error: f64,
    /// `equal`, `close`, `differs`, `only-a`, `only-b`, `incomparable`.
    pub state: &'static str,
    /// Frobenius norm of the first delta; `None` where there is no delta, or one that is not finite.
    pub norm_a: Option<f64>,
    /// Frobenius norm of the second delta.
    pub norm_b: Option<f64>,
    /// Their inner product over both norms; `None` where one is zero or their sizes differ.
    pub cosine: Option<f64>,
}

/// Several modules of a comparison together.
#[derive(Debug, Clone, Serialize)]
pub struct GroupDiff {
    /// The component.
    pub component: String,
    /// The block; `None` for what is outside of blocks.
    pub block: Option<String>,
    /// Modules of both together.
    pub modules: usize,
    /// Root of the sum of the squared norms of the first deltas.
    pub norm_a: f64,
    /// The same of the second.
    pub norm_b: f64,
    /// Sum of the inner products over both norms; `None` where one is zero.
    pub cosine: Option<f64>,
    /// Root of the sum of squared differences, over the larger norm.
    pub relative_error: f64,
}

/// A comparison.
#[derive(Debug, Clone, Serialize)]
pub struct DiffReport {
    /// Version of this document.
    pub schema: u32,
    /// The first file.
    pub a: String,
    /// The second file.
    pub b: String,
    /// Whether every module is within the tolerance.
    pub equal: bool,
    /// The tolerance.
    pub tolerance: f64,
    /// Modules of both together.
    pub modules: usize,
    /// The largest relative error.
    pub max_relative_error: f64,
    /// Modules with deltas that could be measured: those that the next four numbers are about.
    pub measured: usize,
    /// Root of the sum of the squared norms of all deltas of the first.
    pub norm_a: f64,
    /// The same of the second.
    pub norm_b: f64,
    /// Sum of the inner products over both norms; `None` where one is zero.
    pub cosine: Option<f64>,
    /// Root of the sum of squared differences, over the larger norm.
    pub relative_error: f64,
    /// The same for each block.
    pub by_block: Vec<GroupDiff>,
    /// The modules that are not bit for bit the same in effect.
    pub differences: Vec<ModuleDiff>,
    /// All modules; not in the document unless asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub by_module: Vec<ModuleDiff>,
}

/// Compares module by module. Both adapters must be of one family.
pub fn diff(a: &Adapter, b: &Adapter, tolerance: f64) -> Result<DiffReport> {
    if a.family != b.family {
        let message = format!("one file is {}, the other {}", a.family_table().label(), b.family_table().label());
        return Err(Error::new(Code::InvalidArgument, message)
            .at(b.source.path())
            .hint("say `--family` if both are the same"));
    }
    a.ensure_apart()?;
    b.ensure_apart()?;
    let pairs = pairs(a, b);
    let verdicts: Vec<Verdict> =
        pairs.par_iter().filter_map(|(_, x, y)| verdict(x.as_deref(), y.as_deref(), tolerance)).collect();
    let mut all = Sums::default();
    let mut blocks: BTreeMap<Place, Sums> = BTreeMap::new();
    let mut modules = Vec::with_capacity(verdicts.len());
    for ((key, ..), verdict) in pairs.iter().zip(&verdicts) {
        let placed = a.modules.get(key).or_else(|| b.modules.get(key));
        let place = placed.map(|p| Place::of(a, key, &p.address));
        all.add(verdict);
        place.into_iter().for_each(|p| blocks.entry(p).or_default().add(verdict));
        modules.push(module(a.display(key), verdict));
    }
    let group = |(place, sums): (Place, Sums)| sums.group(place.component(a).to_owned(), place.block);
    let total = all.group(String::new(), None);
    Ok(DiffReport {
        schema: 1,
        a: a.source.path().to_string_lossy().into_owned(),
        b: b.source.path().to_string_lossy().into_owned(),
        equal: modules.iter().all(|m| m.relative_error <= tolerance),
        tolerance,
        modules: modules.len(),
        max_relative_error: modules.iter().map(|m| m.relative_error).fold(0.0, f64::max),
        measured: all.measured,
        norm_a: total.norm_a,
        norm_b: total.norm_b,
        cosine: total.cosine,
        relative_error: total.relative_error,
        by_block: blocks.into_iter().map(group).collect(),
        differences: modules.iter().filter(|m| m.state != "equal").cloned().collect(),
        by_module: modules,
    })
}

/// What both adapters have under a name.
type Pair<'a> = (&'a ModuleKey, Option<Cow<'a, Module>>, Option<Cow<'a, Module>>);

/// The modules of both, side by side. A fused module that one of them could not cut meets the parts of the other, joined.
fn pairs<'a>(a: &'a Adapter, b: &'a Adapter) -> Vec<Pair<'a>> {
    let whole = |x: &'a Adapter, y: &'a Adapter| {
        x.modules.iter().filter_map(move |(key, placed)| Some((key, counterpart(x, key, &placed.address, y)?)))
    };
    let (of_b, of_a): (BTreeMap<_, _>, BTreeMap<_, _>) = (whole(a, b).collect(), whole(b, a).collect());
    let met: BTreeSet<&ModuleKey> = of_a.values().chain(of_b.values()).flat_map(|(keys, _)| keys).collect();
    let own = |adapter: &'a Adapter, key| adapter.modules.get(key).map(|placed| Cow::Borrowed(&placed.module));
    let joined = |found: &BTreeMap<&ModuleKey, (Vec<ModuleKey>, Module)>, key| {
        found.get(key).map(|(_, module)| Cow::Owned(module.clone()))
    };
    let keys: BTreeSet<&'a ModuleKey> = a.modules.keys().chain(b.modules.keys()).collect();
    let pair = |key| (key, own(a, key).or_else(|| joined(&of_a, key)), own(b, key).or_else(|| joined(&of_b, key)));
    keys.into_iter().filter(|key| !met.contains(key)).map(pair).collect()
}

fn verdict(a: Option<&Module>, b: Option<&Module>, tolerance: f64) -> Option<Verdict> {
    match (a, b) {
        (Some(a), Some(b)) => Some(compare(a, b, tolerance)),
        (Some(a), None) => Some(alone(a, "only-a")),
        (None, Some(b)) => Some(alone(b, "only-b")),
        (None, None) => None,
    }
}

fn module(module: String, verdict: &Verdict) -> ModuleDiff {
    let numbers = verdict.numbers.as_ref();
    let norm = |of: fn(&Compared) -> f64| numbers.map(|n| of(n).sqrt()).filter(|n| n.is_finite());
    ModuleDiff {
        module,
        relative_error: verdict.relative_error,
        state: verdict.state,
        norm_a: norm(|n| n.a),
        norm_b: norm(|n| n.b),
        cosine: numbers.and_then(|n| cosine(n.inner, n.a, n.b)),
    }
}

/// Of an inner product and squared norms. Rounding may lead past 1, the angle may not.
fn cosine(inner: f64, a: f64, b: f64) -> Option<f64> {
    let cosine = inner / (a.sqrt() * b.sqrt());
    cosine.is_finite().then(|| cosine.clamp(-1.0, 1.0))
}

/// Sums over modules.
#[derive(Default)]
struct Sums {
    modules: usize,
    measured: usize,
    a: f64,
    b: f64,
    difference: f64,
    inner: f64,
}

impl Sums {
    fn add(&mut self, verdict: &Verdict) {
        self.modules += 1;
        let finite = |n: &&Compared| n.a.is_finite() && n.b.is_finite();
        let Some(n) = verdict.numbers.as_ref().filter(finite) else { return };
        self.measured += 1;
        self.a += n.a;
        self.b += n.b;
        self.difference += n.difference;
        // Deltas of different sizes have no inner product.
        self.inner += if n.inner.is_nan() { 0.0 } else { n.inner };
    }

    fn group(&self, component: String, block: Option<String>) -> GroupDiff {
        GroupDiff {
            component,
            block,
            modules: self.modules,
            norm_a: self.a.sqrt(),
            norm_b: self.b.sqrt(),
            cosine: cosine(self.inner, self.a, self.b),
            relative_error: ratio(self.difference, self.a, self.b),
        }
    }
}
