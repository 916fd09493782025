//! Several adapters as one: what is written is the weighted sum of their deltas.
//!
//! A composition holds its adapters side by side until they are encoded: each is joined into the target's modules by
//! itself, so that factors it shares stay shared, and only then are the terms of a module put together.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::adapter::{Adapter, ModuleKey, Placed};
use crate::decode::decode;
use crate::detect::{Given, expert};
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::kind::{Kind, Module, Refusal};
use crate::native::manifest::Entry;
use crate::plan::{Digest, Fate, Output, Plan};
use crate::report::{AlphaCount, Fidelity, Warning};
use crate::strength::{Selector, Strength};
use crate::table::Dialect;
use crate::tensor::Tensor;

/// One adapter of a composition.
#[derive(Debug, Clone)]
pub struct Term<'a> {
    /// The adapter.
    pub adapter: &'a Adapter,
    /// How strongly it counts.
    pub strength: Strength,
    /// What reports and metadata call it.
    pub name: String,
    /// The number of its first tensor among those of all sources.
    start: usize,
    /// What an earlier composition wrote of it, if it comes out of one.
    origin: Option<&'a Entry>,
}

impl<'a> Term<'a> {
    /// A term; its name is that of the file, without ending.
    pub fn new(adapter: &'a Adapter, strength: Strength) -> Self {
        let path = adapter.source.path();
        // Of a folder as PEFT writes it every file has the same name.
        let folder = path.parent().filter(|_| path.file_name().is_some_and(|n| n == "adapter_model.safetensors"));
        let named = folder.and_then(Path::file_name).or(path.file_stem());
        let stem = named.map(|s| s.to_string_lossy().into_owned());
        let origin = adapter.native.as_ref().and_then(|n| n.entry.as_ref());
        let name = origin.map(|e| e.name.clone()).or(stem).unwrap_or_default();
        Self { adapter, strength, name, start: 0, origin }
    }

    /// The hash of the file it was first read from, `None` where there was no file; where it has yet to be computed,
    /// a placeholder and what it stands for.
    pub(crate) fn hash(&self, number: usize) -> (Option<String>, Option<Digest>) {
        match self.origin {
            Some(entry) => (entry.hash.clone(), None),
            None if !self.adapter.source.is_file() => (None, None),
            None => {
                let digest = Digest::new(&self.adapter.source, number);
                (Some(format!("sha256:{}", digest.placeholder)), Some(digest))
            }
        }
    }

    /// Whether it is one of several adapters that its file was composed of.
    pub(crate) fn is_part(&self) -> bool {
        self.origin.is_some()
    }

    /// The strength that its numbers have by now: a number, or an object of numbers by place.
    pub(crate) fn written_strength(&self, factor: f64) -> Value {
        let strength = self.strength.times(factor);
        let before = self.origin.map(|e| &e.strength);
        match (before.map(Value::as_f64), strength.everywhere()) {
            (None, _) | (Some(Some(1.0)), _) => strength.to_json(),
            (Some(Some(before)), Some(now)) => json!(before * now),
            // Several places, several times: both are told.
            (Some(_), _) => json!([before, strength.to_json()]),
        }
    }

    /// The same under another name.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The strength of a module.
    pub(crate) fn strength_of(&self, key: &ModuleKey) -> f64 {
        self.strength.of(&self.adapter.component(key.component).name, key.component == 0, &key.path)
    }

    /// The number of one of its tensors among those of all sources.
    pub(crate) fn number(&self, index: usize) -> usize {
        self.start + index
    }
}

/// Adapters to one model that are written as one.
#[derive(Debug, Clone)]
pub struct Composition<'a> {
    terms: Vec<Term<'a>>,
    sources: Vec<&'a Arc<Source>>,
    /// Whether modules of strength zero are left out, rather than written as zeros.
    skips_zero: bool,
}

impl<'a> Composition<'a> {
    /// A composition of terms of one family; a term of strength zero costs nothing.
    pub fn new(terms: Vec<Term<'a>>) -> Result<Self> {
        let Some(first) = terms.first() else {
            return Err(
                Error::new(Code::InvalidArgument, "there is nothing to compose").hint("name at least one adapter")
            );
        };
        let family = first.adapter.family_table().label();
        for term in &terms {
            term.strength.check().map_err(|e| e.at(term.adapter.source.path()))?;
            check_components(term)?;
            let other = term.adapter.family_table().label();
            if family != other {
                let message = format!("it is {other}, but `{}` is {family}", first.adapter.source.path().display());
                let hint = "adapters add only to the model they were made for; `--family` says what keys do not";
                return Err(Error::new(Code::FamilyMismatch, message).at(term.adapter.source.path()).hint(hint));
            }
        }
        Ok(Self { skips_zero: true, ..Self::numbered(terms) })
    }

    /// A single adapter as it is.
    pub fn of(adapter: &'a Adapter) -> Self {
        Self::numbered(vec![Term::new(adapter, Strength::uniform(1.0))])
    }

    /// Gives every tensor a number of its own. Terms of one source share its tensors.
    fn numbered(mut terms: Vec<Term<'a>>) -> Self {
        let mut sources: Vec<&'a Arc<Source>> = Vec::new();
        for term in &mut terms {
            let source = &term.adapter.source;
            let at = sources.iter().position(|s| Arc::ptr_eq(s, source)).unwrap_or_else(|| {
                sources.push(source);
                sources.len() - 1
            });
            term.start = sources[..at].iter().map(|s| s.tensors().len()).sum();
        }
        Self { terms, sources, skips_zero: false }
    }

    /// The same terms with other adapters of the same sources, one for each.
    pub(crate) fn with<'b>(&'b self, adapters: &[&'b Adapter]) -> Composition<'b> {
        let term = |(term, adapter): (&'b Term<'a>, &&'b Adapter)| Term {
            adapter,
            strength: term.strength.clone(),
            name: term.name.clone(),
            start: term.start,
            origin: term.origin,
        };
        Composition {
            terms: self.terms.iter().zip(adapters).map(term).collect(),
            sources: self.sources.clone(),
            skips_zero: self.skips_zero,
        }
    }

    /// The terms.
    pub fn terms(&self) -> &[Term<'a>] {
        &self.terms
    }

    /// Whether it is one adapter as it is, rather than a composition that happens to have one term.
    pub fn is_single(&self) -> bool {
        !self.skips_zero
    }

    /// The files behind the terms, each once.
    pub fn sources(&self) -> &[&'a Arc<Source>] {
        &self.sources
    }

    /// The first adapter: it speaks for the tables and the family of all.
    pub fn first(&self) -> &'a Adapter {
        self.terms[0].adapter
    }

    /// Tensors of all sources together.
    pub fn tensors(&self) -> usize {
        self.sources.iter().map(|s| s.tensors().len()).sum()
    }

    /// The source and the key of a tensor, by its number.
    pub fn tensor(&self, mut number: usize) -> Option<(&Source, &str)> {
        for source in &self.sources {
            match source.tensors().get(number) {
                Some(info) => return Some((source, &info.name)),
                None => number -= source.tensors().len(),
            }
        }
        None
    }
}

/// A component that the family does not have is a mistake: its strength would count nowhere.
fn check_components(term: &Term<'_>) -> Result<()> {
    let known: Vec<&str> = term.adapter.family_table().components.iter().map(|c| c.name.as_str()).collect();
    match term.strength.components.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let message = format!("{} has no component `{name}`", term.adapter.family_table().name);
            Err(Error::new(Code::InvalidArgument, message).hint(format!("components: {}", known.join(", "))))
        }
    }
}

/// The same adapters, read again where that makes them of one family: a file whose keys fit several families takes
/// that of the others.
pub fn agree<'a>(adapters: &[&'a Adapter]) -> Result<Vec<Cow<'a, Adapter>>> {
    let fits = |family: usize| adapters.iter().all(|a| a.detection.candidates.contains(&family));
    let own = adapters.iter().map(|a| a.family);
    let common = own.chain(adapters.iter().flat_map(|a| a.detection.candidates.iter().copied())).find(|f| fits(*f));
    let one = |adapter: &&'a Adapter| match common {
        Some(family) if family != adapter.family => {
            let given = Given { families: vec![family], ..Given::default() };
            decode(&adapter.registry, &adapter.source, &given).map(Cow::Owned)
        }
        _ => Ok(Cow::Borrowed(*adapter)),
    };
    adapters.iter().map(one).collect()
}

/// Where every tensor went, and what deserves a word: kept while a composition is encoded.
pub(crate) struct Ledger<'a> {
    pub(crate) composition: &'a Composition<'a>,
    pub(crate) dialect: &'a Dialect,
    /// Leave out what the target cannot hold, instead of stopping.
    lossy: bool,
    /// A factor on every delta.
    strength: f64,
    pub(crate) fates: Vec<Fate>,
    pub(crate) warnings: Vec<Warning>,
    pub(crate) alpha: AlphaCount,
    /// What was left out under `--lossy allow`.
    pub(crate) lost: Vec<String>,
    /// Parameters that replace those of the model, by term: they have no strength.
    unscaled: Vec<usize>,
    /// Modules of strength zero, by term.
    pub(crate) zero: Vec<usize>,
}

impl<'a> Ledger<'a> {
    pub(crate) fn new(composition: &'a Composition<'a>, dialect: &'a Dialect, lossy: bool, strength: f64) -> Self {
        let mut warnings: Vec<Warning> = Vec::new();
        for warning in composition.terms.iter().flat_map(|t| &t.adapter.warnings) {
            if !warnings.contains(warning) {
                warnings.push(warning.clone());
            }
        }
        Self {
            composition,
            dialect,
            lossy,
            strength,
            fates: fates(composition),
            warnings,
            alpha: AlphaCount::default(),
            lost: Vec::new(),
            unscaled: vec![0; composition.terms.len()],
            zero: vec![0; composition.terms.len()],
        }
    }

    /// A module of a term without its strength, and that; with its tensors numbered over all sources. `None` if it is
    /// zero. What a strength does not change has one of 1.
    pub(crate) fn weighed(&mut self, term: usize, key: &ModuleKey, placed: &Placed) -> Option<(Module, f64)> {
        let start = self.composition.terms[term].start;
        let own = self.composition.terms[term].strength_of(key);
        let mut module = placed.module.clone();
        module.inputs.iter_mut().for_each(|i| *i += start);
        if own == 0.0 && self.composition.skips_zero {
            self.zero[term] += 1;
            self.mark(&module, Fate::Dropped);
            return None;
        }
        let strength = own * self.strength;
        if module.kind == Kind::Set && strength != 1.0 {
            self.unscaled[term] += 1;
            return Some((module, 1.0));
        }
        Some((module, strength))
    }

    /// A module of a term at its strength, with its tensors numbered over all sources. `None` if that is zero, or if
    /// the module was left out.
    pub(crate) fn strengthened(&mut self, term: usize, key: &ModuleKey, placed: &Placed) -> Result<Option<Module>> {
        let Some((module, strength)) = self.weighed(term, key, placed) else { return Ok(None) };
        match module.strengthened(strength) {
            Ok(module) => Ok(Some(module)),
            Err(Refusal(reason)) => {
                let name = self.composition.terms[term].adapter.display(key);
                self.lose(Code::UnsupportedStrength, &name, &module, &reason)?;
                Ok(None)
            }
        }
    }

    /// Says what the strengths did to whole terms.
    pub(crate) fn summarise_strengths(&mut self) {
        for (term, (&unscaled, &zero)) in self.composition.terms.iter().zip(self.unscaled.iter().zip(&self.zero)) {
            if unscaled > 0 {
                let detail = format!(
                    "{unscaled} parameters of `{}` replace those of the model; a strength does not change them",
                    term.name
                );
                self.warnings.push(Warning::new("unscaled-parameter", None, detail));
            }
            if zero > 0 {
                let detail = format!("{zero} modules of `{}` have strength 0 and are left out", term.name);
                self.warnings.push(Warning::new("zero-strength", None, detail));
            }
        }
        let terms = &self.composition.terms;
        let mut selectors: Vec<&Selector> = Vec::new();
        for (selector, _) in terms.iter().flat_map(|t| &t.strength.blocks) {
            if !selector.is_of_table() && !selectors.contains(&selector) {
                selectors.push(selector);
            }
        }
        for selector in selectors {
            self.note_unmatched(selector);
        }
        self.note_repeated();
        self.note_experts();
    }

    /// A selector that names nothing is worth a word.
    pub(crate) fn note_unmatched(&mut self, selector: &Selector) {
        let hit = |t: &Term<'_>| {
            t.adapter
                .modules
                .keys()
                .any(|k| selector.matches(&t.adapter.component(k.component).name, k.component == 0, &k.path))
        };
        if !self.composition.terms.iter().any(hit) {
            let detail = format!("`{selector}` matches no module");
            self.warnings.push(Warning::new("unmatched-selector", None, detail));
        }
    }

    /// Adapters for different experts of a model, by their names: added, they suit neither.
    fn note_experts(&mut self) {
        let mut first: Option<(&str, &Path)> = None;
        for term in self.composition.terms.iter().map(|t| &t.adapter) {
            let Some(own) = expert(&term.registry, term.family, &term.source) else { continue };
            let (other, path) = *first.get_or_insert((own, term.source.path()));
            if own != other {
                let (a, b) = (path.display(), term.source.path().display());
                let detail = format!("by their names `{a}` is for the expert `{other}`, and `{b}` for `{own}`");
                self.warnings.push(Warning::new("mixed-experts", None, detail));
                return;
            }
        }
    }

    /// The same file twice is allowed, and worth a word.
    fn note_repeated(&mut self) {
        let terms = &self.composition.terms;
        for (i, term) in terms.iter().enumerate() {
            let same = |other: &&Term<'_>| {
                let (a, b) = (&term.adapter.source, &other.adapter.source);
                !std::ptr::eq(term.adapter, other.adapter) && !Arc::ptr_eq(a, b) && a.same_as(b)
                    || std::ptr::eq(term.adapter, other.adapter)
            };
            if terms[..i].iter().any(|t| same(&t)) {
                let detail = format!("`{}` is given more than once; its strengths add", term.name);
                self.warnings.push(Warning::new("repeated-adapter", None, detail));
            }
        }
    }

    pub(crate) fn mark(&mut self, module: &Module, fate: Fate) {
        for &input in &module.inputs {
            self.fates[input] = self.fates[input].max(fate);
        }
    }

    /// An error, or a note that the module was left out.
    pub(crate) fn lose(&mut self, code: Code, name: &str, module: &Module, reason: &str) -> Result<()> {
        let message = format!("`{name}` {reason}");
        if !self.lossy {
            let mut error = Error::new(code, format!("{message} (target `{}`)", self.dialect.name));
            error = match module.inputs.first().and_then(|&i| self.composition.tensor(i)) {
                Some((source, key)) => error.at(source.path()).key(key),
                None => error.at(self.composition.first().source.path()),
            };
            let able = self.able(module);
            let mut ways = Vec::new();
            ways.extend((!able.is_empty()).then(|| format!("`--to {}` can hold it", able.join("` or `--to "))));
            ways.extend(module.has_plain_form().then(|| "`lorafmt expand` makes plain LoRA of it".to_owned()));
            if code == Code::UnsupportedKind && !reason.contains("--max-rank") && !ways.is_empty() {
                error = error.hint(format!("{}; `--lossy allow` leaves such modules out", ways.join("; ")));
            }
            return Err(error);
        }
        self.mark(module, Fate::Dropped);
        self.warnings.push(Warning::new(code.as_str(), Some(name.to_owned()), format!("left out: {message}")));
        self.lost.push(name.to_owned());
        Ok(())
    }

    /// Dialects that spell every slot of a module, for hints.
    fn able(&self, module: &Module) -> Vec<&'a str> {
        let first = self.composition.first();
        let dialects = first.registry.dialects.iter().filter(|d| {
            d.writes(first.family) && d.name != self.dialect.name && module.tensors.keys().all(|s| d.holds(*s))
        });
        dialects.map(|d| d.name.as_str()).collect()
    }

    /// The plan, with all that was noted on the way; `used` modules are where loaders of the target read them.
    pub(crate) fn close(mut self, mut plan: Plan, unknown: Unknown, used: usize) -> Result<Plan> {
        self.unknown_keys(unknown, &mut plan.outputs)?;
        if used == 0 && self.zero.iter().any(|n| *n > 0) && self.lost.is_empty() {
            let hint = "give at least one adapter a strength that is not 0";
            return Err(Error::new(Code::NoModules, "every module has strength 0: nothing would be written")
                .at(self.composition.first().source.path())
                .hint(hint));
        }
        if used == 0 {
            let message = format!("no module has a place in `{}`: nothing would be written", self.dialect.name);
            return Err(Error::new(Code::NoModules, message).at(self.composition.first().source.path()));
        }
        self.summarise_strengths();
        let full = |t: &Term<'_>| t.strength.everywhere() == Some(1.0);
        if self.strength != 1.0 || !self.composition.terms.iter().all(full) {
            plan.fidelity = plan.fidelity.max(Fidelity::Rescaled);
        }
        let left_out = |t: &Term<'_>| t.adapter.expansion.as_ref().is_some_and(|e| !e.left_out.is_empty());
        if !self.lost.is_empty() || self.composition.terms.iter().any(left_out) {
            plan.fidelity = Fidelity::Approximate;
        }
        plan.fates = self.fates;
        plan.alpha = self.alpha;
        plan.warnings = self.warnings;
        Ok(plan)
    }

    /// What becomes of keys that no table knows.
    pub(crate) fn unknown_keys(&mut self, how: Unknown, outputs: &mut Vec<Output>) -> Result<()> {
        let composition = self.composition;
        let mut seen: Vec<&Arc<Source>> = Vec::new();
        for term in &composition.terms {
            let (adapter, source) = (term.adapter, &term.adapter.source);
            if seen.iter().any(|s| Arc::ptr_eq(s, source)) {
                continue;
            }
            seen.push(source);
            for &index in &adapter.unknown {
                let name = &source.tensors()[index].name;
                match how {
                    Unknown::Error => return Err(unknown_key(adapter, name)),
                    Unknown::Drop => {
                        self.fates[term.number(index)] = Fate::Dropped;
                        self.lost.push(name.clone());
                        self.warnings.push(Warning::new("unknown-key", None, format!("left out: `{name}`")));
                    }
                    Unknown::Keep => {
                        self.fates[term.number(index)] = Fate::Carried;
                        if let Some(reserved) = self.dialect.reserved.iter().find(|r| name.contains(r.as_str())) {
                            let detail = format!(
                                "`{name}` holds `{reserved}`, which makes {} take the file for another dialect",
                                self.dialect.name
                            );
                            self.warnings.push(Warning::new("diverting-key", None, detail));
                        }
                        outputs.push(Output { key: name.clone(), tensor: Tensor::input(source, index) });
                    }
                }
            }
        }
        let mut keys: Vec<&str> = outputs.iter().map(|o| o.key.as_str()).collect();
        keys.sort_unstable();
        match keys.windows(2).find(|w| w[0] == w[1]) {
            Some(twice) => {
                Err(Error::new(Code::DuplicateModule, format!("two tensors would be written as `{}`", twice[0]))
                    .at(composition.first().source.path()))
            }
            None => Ok(()),
        }
    }
}

/// Nothing is known of any tensor yet, but of those that say nothing by themselves: zeros, and branches of the base.
fn fates(composition: &Composition<'_>) -> Vec<Fate> {
    let mut fates = vec![Fate::Unknown; composition.tensors()];
    for term in &composition.terms {
        for &index in term.adapter.native.iter().flat_map(|n| &n.spent) {
            fates[term.number(index)] = Fate::Used;
        }
        for &index in term.adapter.expansion.iter().flat_map(|e| &e.left_out) {
            fates[term.number(index)] = Fate::Dropped;
        }
    }
    fates
}

fn unknown_key(adapter: &Adapter, name: &str) -> Error {
    let read_as = adapter.detection.dialect_name(&adapter.registry);
    let mut message = format!("`{name}` is unknown (file read as {read_as} {})", adapter.family_table().label());
    let others = adapter.families_of(name);
    if !others.is_empty() {
        message += &format!("; it is a key of {}", others.join(", "));
    } else if let Some(nearest) = adapter.nearest(name) {
        message += &format!("; the nearest known key is `{nearest}`");
    }
    Error::new(Code::UnknownKey, message).key(name).at(adapter.source.path())
}

/// What to do with keys that no table knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unknown {
    /// Stop.
    #[default]
    Error,
    /// Leave them out and say so.
    Drop,
    /// Carry them under their own names.
    Keep,
}
