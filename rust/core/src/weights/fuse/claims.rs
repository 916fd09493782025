//! Which tensors of a checkpoint the adapters of a composition change, and in which rows.

use std::collections::BTreeMap;
use std::ops::Range;

use super::change::Change;
use crate::adapter::{ModuleKey, Placed};
use crate::compose::{Composition, Ledger};
use crate::error::{Code, Error, Result};
use crate::kind::{Module, Refusal, Slot};
use crate::ops::Based;
use crate::ops::expand::weight_of;
use crate::plan::Fate;
use crate::report::Warning;
use crate::table::Op;
use crate::tensor::Tensor;
use crate::weights::Checkpoint;
use crate::weights::checkpoint::At;
use crate::weights::names::Leaf;

/// One adapter module over some rows of a base tensor.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    /// Rows of the base tensor.
    pub(super) rows: Range<usize>,
    /// The row of the module that is the first of them.
    pub(super) from: usize,
    /// Whether the two halves of the rows are exchanged between both.
    pub(super) swapped: bool,
    /// Number of the module.
    pub(super) module: usize,
}

/// A base tensor that is changed.
#[derive(Debug)]
pub(super) struct Touched {
    /// Number of the parameter.
    pub(super) parameter: usize,
    pub(super) claims: Vec<Claim>,
}

/// An adapter module at its strength.
#[derive(Debug)]
pub(super) struct Piece {
    /// What messages call it.
    pub(super) name: String,
    pub(super) module: Module,
    /// For a kind that says its difference only together with the weight: the weight, and the strength.
    based: Option<(Tensor, f64)>,
}

impl Piece {
    /// What it does to a parameter.
    pub(super) fn change(&self, leaf: Leaf) -> Option<Change> {
        match (leaf, &self.based) {
            (Leaf::Bias, _) => Change::on_bias(&self.module),
            (Leaf::Weight, None) => Change::on_weight(&self.module),
            (Leaf::Weight, Some((weight, strength))) => {
                // It was tried when the module was taken in.
                let based = Based::new(&self.module, weight).ok()?;
                Some(Change::Based { strength: *strength, based })
            }
        }
    }
}

/// What a composition does to a checkpoint.
#[derive(Debug, Default)]
pub(super) struct Claims {
    pub(super) modules: Vec<Piece>,
    /// In the order of the checkpoint's tensors.
    pub(super) touched: Vec<Touched>,
}

impl Claims {
    /// The tensors that are changed.
    pub(super) fn tensors<'a>(&'a self, checkpoint: &'a Checkpoint) -> impl Iterator<Item = At> + 'a {
        self.touched.iter().map(|t| checkpoint.parameters()[t.parameter].at)
    }

    /// The files that hold them.
    pub(super) fn shards(&self, checkpoint: &Checkpoint) -> Vec<usize> {
        let mut shards: Vec<usize> = self.tensors(checkpoint).map(|at| at.0).collect();
        shards.dedup();
        shards
    }
}

struct Gatherer<'a, 'c> {
    checkpoint: &'a Checkpoint,
    ledger: &'a mut Ledger<'c>,
    lossy: bool,
    modules: Vec<Piece>,
    touched: BTreeMap<(usize, usize), Touched>,
}

/// Finds a place in the checkpoint for every module. What has none is an error, or left out if that is allowed.
pub(super) fn gather(
    checkpoint: &Checkpoint,
    composition: &Composition<'_>,
    ledger: &mut Ledger<'_>,
    lossy: bool,
) -> Result<Claims> {
    let mut gatherer = Gatherer { checkpoint, ledger, lossy, modules: Vec::new(), touched: BTreeMap::new() };
    for (term, t) in composition.terms().iter().enumerate() {
        t.adapter.ensure_apart()?;
        for (key, placed) in &t.adapter.modules {
            gatherer.module(term, key, placed)?;
        }
    }
    let Gatherer { modules, touched, .. } = gatherer;
    let mut claims = Claims { modules, touched: touched.into_values().collect() };
    for touched in &mut claims.touched {
        replaced_once(checkpoint, &claims.modules, touched)?;
    }
    Ok(claims)
}

/// A parameter that one adapter replaces is left alone by all others, or replaced by the same numbers.
fn replaced_once(checkpoint: &Checkpoint, modules: &[Piece], touched: &mut Touched) -> Result<()> {
    let set = |c: &Claim| modules[c.module].module.get(Slot::Set);
    let Some(first) = touched.claims.iter().find_map(set) else { return Ok(()) };
    if touched.claims.iter().all(|c| set(c).is_some_and(|other| other.same_as(first))) {
        touched.claims.truncate(1);
        return Ok(());
    }
    let key = checkpoint.key(checkpoint.parameters()[touched.parameter].at);
    let message = format!(
        "`{}` is replaced by one adapter and changed by another (`{key}` of the base)",
        modules[touched.claims[0].module].name
    );
    Err(Error::new(Code::IncompatibleModules, message).hint("fuse without one of them"))
}

impl Gatherer<'_, '_> {
    fn module(&mut self, term: usize, key: &ModuleKey, placed: &Placed) -> Result<()> {
        let adapter = self.ledger.composition.terms()[term].adapter;
        let name = adapter.display(key);
        // A strength of zero asks for nothing, whatever the kind is.
        let strength = self.ledger.composition.terms()[term].strength_of(key);
        let needs_weight = strength != 0.0 && Based::needs_weight(&placed.module);
        let weight = if strength == 0.0 { Ok(None) } else { Change::size_on_weight(&placed.module) };
        let mut weight = match weight {
            Ok(weight) => weight,
            Err(reason) => {
                let hint = "`lorafmt expand` makes it a plain LoRA; `--lossy allow` leaves it out";
                let error = Error::new(Code::UnsupportedKind, format!("`{name}` {reason}")).hint(hint);
                return self.lose(term, &name, placed, error);
            }
        };
        let mut based = None;
        let module = match needs_weight {
            false => self.ledger.strengthened(term, key, placed)?,
            true => match self.on_weight(term, key, placed) {
                Ok(found) => {
                    weight = Some((found.rows(), found.cols()));
                    based = Some((found, strength));
                    Some(self.at_strength(term, placed, strength))
                }
                Err(error) => return self.lose(term, &name, placed, error),
            },
        };
        let Some(module) = module else { return Ok(()) };
        let sizes = [(Leaf::Weight, weight), (Leaf::Bias, Change::on_bias(&module).map(|c| c.size()))];
        let mut found = Vec::new();
        for (leaf, size) in sizes {
            let Some(size) = size else { continue };
            match self.places(term, key, placed, leaf, size) {
                Ok(places) => found.extend(places),
                Err(error) => return self.lose(term, &name, placed, error),
            }
        }
        self.ledger.mark(&module, Fate::Used);
        self.ledger.alpha.add(module.alpha_source);
        let number = self.modules.len();
        self.modules.push(Piece { name, module, based });
        for (parameter, claim) in found {
            let at = self.checkpoint.parameters()[parameter].at;
            let touched = self.touched.entry(at).or_insert_with(|| Touched { parameter, claims: Vec::new() });
            touched.claims.push(Claim { module: number, ..claim });
        }
        Ok(())
    }

    /// The weight that a module says its difference together with.
    fn on_weight(&self, term: usize, key: &ModuleKey, placed: &Placed) -> Result<Tensor> {
        let adapter = self.ledger.composition.terms()[term].adapter;
        let name = adapter.display(key);
        let weight = weight_of(adapter, self.checkpoint, key, &placed.address);
        let weight = weight.ok_or_else(|| missing(&name, "weight"))?;
        match Based::new(&placed.module, &weight) {
            Ok(_) => Ok(weight),
            Err(Refusal(reason)) => Err(Error::new(Code::UnsupportedKind, format!("`{name}` {reason}"))),
        }
    }

    /// A module whose kind is not linear in a strength, with its tensors numbered over all sources; of its bias, which
    /// is, the strength.
    fn at_strength(&self, term: usize, placed: &Placed, strength: f64) -> Module {
        let mut module = placed.module.clone();
        module.inputs.iter_mut().for_each(|i| *i = self.ledger.composition.terms()[term].number(*i));
        if let Some(bias) = module.tensors.remove(&Slot::DiffB) {
            module.tensors.insert(Slot::DiffB, bias.scaled(strength));
        }
        module
    }

    /// The rows of base tensors that a parameter of a module stands for: one place for each of its canonical modules.
    fn places(
        &self,
        term: usize,
        key: &ModuleKey,
        placed: &Placed,
        leaf: Leaf,
        size: (usize, usize),
    ) -> Result<Vec<(usize, Claim)>> {
        let adapter = self.ledger.composition.terms()[term].adapter;
        let row = adapter.row(key, &placed.address);
        let parts = placed.address.part.map_or(0..row.canonical.len(), |part| part..part + 1);
        let name = adapter.display(key);
        let swapped = row.op == Op::SwapHalves && placed.address.namespace != 0;
        let mut out = Vec::new();
        let mut from = 0;
        for part in parts {
            let path = row.canonical[part].render(&placed.address.variables);
            let what = if leaf == Leaf::Bias { "bias" } else { "weight" };
            let Some(held) = self.checkpoint.held(key.component, &path, leaf) else {
                return Err(missing(&name, what));
            };
            let parameter = self.checkpoint.parameter(held);
            let base_key = self.checkpoint.key(parameter.at);
            let wrong = |message: String| {
                Error::new(Code::WrongBase, message).hint("the base and the adapter are of different models")
            };
            if let Some(misfit) = &parameter.misfit {
                return Err(wrong(format!("`{base_key}` of the base, which `{name}` changes, {misfit}")));
            }
            let cols = self.checkpoint.whole(parameter).cols();
            let rows = held.rows.len();
            // A module of the row's other widths is one of the first inputs, as it is when adapters are added.
            let fits = size.1 == cols || (size.1 < cols && row.inputs.contains(&size.1));
            if !fits || size.0 < from + rows {
                let have = self.checkpoint.whole(parameter);
                return Err(wrong(format!(
                    "`{name}` changes {} x {} numbers, and `{base_key}` of the base has shape {:?}",
                    size.0,
                    size.1,
                    have.shape()
                )));
            }
            let claim = Claim { rows: held.rows.clone(), from, swapped: swapped != parameter.swapped, module: 0 };
            out.push((held.parameter, claim));
            from += rows;
        }
        Ok(out)
    }

    /// An error, or a note that a module was left out.
    fn lose(&mut self, term: usize, name: &str, placed: &Placed, error: Error) -> Result<()> {
        let term = &self.ledger.composition.terms()[term];
        let inputs = &placed.module.inputs;
        if !self.lossy {
            let source = &term.adapter.source;
            let key = inputs.first().map(|&i| source.tensors()[i].name.clone());
            let message = format!("{} (base `{}`)", error.message(), self.checkpoint.path().display());
            let error = Error::new(error.code(), message).hint(error.hint_text()).at(source.path());
            return Err(key.into_iter().fold(error, Error::key));
        }
        for &input in inputs {
            let fate = &mut self.ledger.fates[term.number(input)];
            *fate = (*fate).max(Fate::Dropped);
        }
        let detail = format!("left out: {}", error.message());
        self.ledger.warnings.push(Warning::new(error.code().as_str(), Some(name.to_owned()), detail));
        self.ledger.lost.push(name.to_owned());
        Ok(())
    }
}

fn missing(name: &str, what: &str) -> Error {
    let hint = "name a base that has it (a pipeline's folder has all components), or add `--lossy allow`";
    Error::new(Code::MissingWeight, format!("the base has no {what} for `{name}`")).hint(hint)
}
