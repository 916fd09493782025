//! From canonical modules to the branches of a quantized model.

mod claims;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use claims::Claim;

use super::base::{Base, BaseLayer, Precision, Smoothing};
use super::draft::Draft;
use super::manifest::{BaseEntry, compress};
use super::pack::{Side, TILE, pack};
use super::scaling::{divide_rows, divide_vector, multiply_columns};
use super::vector::pack_vector;
use crate::adapter::ModuleKey;
use crate::compose::Ledger;
use crate::dtype::Dtype;
use crate::encode::{MAX_RANK, Member};
use crate::error::{Code, Error, Result};
use crate::kind::{Kind, Module, Refusal, Slot};
use crate::plan::{Fate, Output};
use crate::report::Warning;
use crate::table::{Component, Layer, Native, Op};
use crate::tensor::Tensor;

/// The highest total rank of a layer: the kernels keep one scale for 16 ranks, 64 of them (nunchaku: `MAX_RANK`).
pub const MAX_TOTAL_RANK: usize = 1024;

/// Where each adapter's ranks start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// On multiples of 16, so that each has rank scales of its own.
    #[default]
    Aligned,
    /// Right behind the one before, as Nunchaku itself composes them.
    Packed,
}

impl Layout {
    /// The name in options and metadata.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Aligned => "aligned",
            Layout::Packed => "packed",
        }
    }

    /// The layout of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Layout::Aligned, Layout::Packed].into_iter().find(|l| l.name() == name)
    }
}

/// How native branches are made.
#[derive(Debug, Clone)]
pub struct NativeOptions {
    /// The checkpoint whose branches come first.
    pub base: Arc<Base>,
    /// Where each adapter's ranks start.
    pub layout: Layout,
    /// What the base is expected to be quantized to.
    pub precision: Option<Precision>,
    /// Whether the metadata is wanted: it holds hashes over the inputs.
    pub describe: bool,
}

/// The branches of all layers.
pub(crate) struct Assembled {
    pub(crate) outputs: Vec<Output>,
    pub(crate) draft: Option<Draft>,
    /// Layers that some adapter touches.
    pub(crate) modules: usize,
}

/// A canonical module of one term.
struct Part {
    term: usize,
    module: Module,
}

/// What the terms do to one layer of the base.
struct Target<'a> {
    layer: &'a Layer,
    name: String,
    /// The block that it stands in.
    block: String,
    base: &'a BaseLayer,
    /// Folded factors by term.
    terms: Vec<(usize, Module)>,
    /// Ranks behind the base's.
    added: usize,
    /// First rank and rank of each term, counted from the first of the base.
    ranges: Vec<(usize, usize)>,
}

impl Target<'_> {
    fn total(&self) -> usize {
        self.base.rank() + self.added
    }
}

/// Makes the branches. Members that belong to no layer come back: they are plain modules of the adapter.
pub(crate) fn assemble<'m>(
    ledger: &mut Ledger<'_>,
    native: &Native,
    options: &NativeOptions,
    dtype: Option<Dtype>,
    max_rank: Option<usize>,
    members: Vec<Member<'m>>,
) -> Result<(Assembled, Vec<Member<'m>>)> {
    let first = ledger.composition.first();
    let base = &options.base;
    check_base(base, &first.family_table().name, options.precision)?;
    let component = first.component(native.component);
    let terms = ledger.composition.terms().len();
    let mut assembler = Assembler {
        ledger,
        native,
        component,
        base,
        layout: options.layout,
        dtype: dtype.filter(|d| d.size() == 2).unwrap_or(Dtype::BF16),
        max_rank: max_rank.unwrap_or(MAX_RANK),
        parts: BTreeMap::new(),
        fed: base.fed(native, component),
        biases: BTreeMap::new(),
        vectors: vec![BTreeSet::new(); terms],
    };
    let rest = assembler.sort(members)?;
    let targets = assembler.targets()?;
    let targets = assembler.ranked(targets)?;
    let mut outputs = Vec::new();
    for target in &targets {
        assembler.branches(target, &mut outputs);
    }
    assembler.vectors(&mut outputs);
    assembler.judge_smoothing();
    let draft = options.describe.then(|| assembler.draft(&targets));
    let modules = targets.iter().filter(|t| !t.terms.is_empty()).count();
    Ok((Assembled { outputs, draft, modules }, rest))
}

fn check_base(base: &Base, family: &str, precision: Option<Precision>) -> Result<()> {
    if base.family() != family {
        let message = format!("the base is a {} model, the adapter is for {family}", base.family());
        return Err(Error::new(Code::WrongBase, message)
            .at(base.path())
            .hint("name a quantized checkpoint of the same family"));
    }
    match (precision, base.precision()) {
        (Some(asked), Some(found)) if asked != found => {
            let message = format!("the base is quantized to {}, but {} was asked for", found.name(), asked.name());
            Err(Error::new(Code::WrongBase, message).at(base.path()))
        }
        _ => Ok(()),
    }
}

struct Assembler<'l, 'c, 'a> {
    ledger: &'l mut Ledger<'c>,
    native: &'a Native,
    component: &'a Component,
    base: &'a Base,
    layout: Layout,
    /// Of modulation layers, which have no branch in the base.
    dtype: Dtype,
    max_rank: usize,
    /// Canonical modules of the layers, by path.
    parts: BTreeMap<String, Vec<Part>>,
    /// What rows of modules outside the layers are divided by.
    fed: BTreeMap<String, Arc<[f64]>>,
    /// Bias differences by canonical path.
    biases: BTreeMap<String, Vec<(usize, Tensor)>>,
    /// Keys of the bias differences that each term has a part in.
    vectors: Vec<BTreeSet<String>>,
}

impl<'a> Assembler<'_, '_, 'a> {
    /// Takes out what belongs to layers: factors into `parts`, bias differences into `biases`.
    fn sort<'m>(&mut self, members: Vec<Member<'m>>) -> Result<Vec<Member<'m>>> {
        let claims = self.claims();
        let mut rest = Vec::new();
        for member in members {
            let row = &self.component.rows[member.address.row];
            let whole = member.address.namespace > 0;
            let paths: Vec<String> = match whole {
                true => row.canonical.iter().map(|t| t.render(&member.address.variables)).collect(),
                false => vec![member.key.path.clone()],
            };
            let claimed: Vec<&Claim<'a>> = paths.iter().filter_map(|path| claims.get(path)).collect();
            let inside = claimed.iter().any(|claim| !matches!(claim, Claim::Outside));
            if let Some(reason) = self.unfit(row, &paths, &claimed, &member.module) {
                self.lose(Code::UnsupportedModule, member.key, &member.module, reason)?;
            } else if row.op == Op::Only {
                rest.push(self.parameter(member));
            } else if inside {
                self.take(member, &claims)?;
            } else if whole && member.module.get(Slot::DiffB).is_some() {
                // Its rows are not in canonical order yet, and a vector is written under its canonical name.
                let reason = "has a bias, and rows that its kind does not let permute";
                self.lose(Code::UnsupportedKind, member.key, &member.module, reason)?;
            } else if let Some(member) = self.divided(member)? {
                rest.extend(self.take_bias(member));
            }
        }
        Ok(rest)
    }

    /// Every layer of the model with its name.
    fn instances(&self) -> impl Iterator<Item = (&'a Layer, Vec<u32>, String)> + use<'a> {
        let component = self.component;
        self.native.layers.iter().flat_map(move |layer| {
            let named = move |v: Vec<u32>| {
                let name = layer.name.render(&v);
                (layer, v, name)
            };
            component.instances_of(&layer.name).into_iter().map(named)
        })
    }

    /// A parameter that replaces one of the quantized model is of the model's own type.
    fn parameter<'m>(&self, mut member: Member<'m>) -> Member<'m> {
        let dtype = self.base.layers().values().find_map(|l| l.dtype).unwrap_or(self.dtype);
        let tensors = std::mem::take(&mut member.module.tensors);
        let typed = |t: Tensor| if t.dtype().is_float() { t.cast(dtype) } else { t };
        member.module.tensors = tensors.into_iter().map(|(slot, t)| (slot, typed(t))).collect();
        member
    }

    /// The bias of a module outside the layers is a vector of its own; the rest of the module comes back.
    fn take_bias<'m>(&mut self, mut member: Member<'m>) -> Option<Member<'m>> {
        let Some(bias) = member.module.tensors.remove(&Slot::DiffB) else { return Some(member) };
        self.biases.entry(member.key.path.clone()).or_default().push((member.term, bias));
        if member.module.tensors.is_empty() {
            self.ledger.mark(&member.module, Fate::Used);
            return None;
        }
        Some(member)
    }

    /// One module of the layers, whole or in parts.
    fn take(&mut self, member: Member<'_>, claims: &BTreeMap<String, Claim<'_>>) -> Result<()> {
        match self.plain(&member) {
            Err((code, Refusal(reason))) => self.lose(code, member.key, &member.module, &reason),
            Ok(parts) => {
                let held = |(path, _): &(String, Module)| matches!(claims.get(path), Some(Claim::Layer(_)));
                if !parts.iter().all(held) {
                    let reason = "is of a block that the base does not have";
                    return self.lose(Code::UnsupportedModule, member.key, &member.module, reason);
                }
                self.ledger.mark(&member.module, Fate::Used);
                if member.module.rank().is_some() {
                    self.ledger.alpha.add(member.module.alpha_source);
                }
                for (path, mut module) in parts {
                    if let Some(bias) = module.tensors.remove(&Slot::DiffB) {
                        self.biases.entry(path.clone()).or_default().push((member.term, bias));
                    }
                    if module.kind == Kind::Lora {
                        self.parts.entry(path).or_default().push(Part { term: member.term, module });
                    }
                }
                Ok(())
            }
        }
    }

    /// A member as plain LoRA under canonical names.
    fn plain(&self, member: &Member<'_>) -> Result<Vec<(String, Module)>, (Code, Refusal)> {
        let unsupported = |r: Refusal| (Code::UnsupportedKind, r);
        let say = |text: &str| Err((Code::UnsupportedKind, Refusal(text.to_owned())));
        if member.module.is_dora() {
            return say("is DoRA, which needs the base weights: a quantized base does not hold them");
        }
        let module = member.module.expanded(self.max_rank).map_err(unsupported)?;
        if !matches!(module.kind, Kind::Lora | Kind::Bias) {
            return say(&format!("is {}, which a low-rank branch cannot hold", module.kind_name()));
        }
        if module.get(Slot::Mid).is_some() {
            return say("has a Tucker core (`lora_mid`), which a low-rank branch cannot hold");
        }
        if member.address.namespace == 0 {
            return Ok(vec![(member.key.path.clone(), module)]);
        }
        let row = &self.component.rows[member.address.row];
        let path = |part: usize| row.canonical[part].render(&member.address.variables);
        if row.op == Op::SwapHalves {
            return Ok(vec![(path(0), module.swap_halves().map_err(unsupported)?)]);
        }
        let outputs: Arc<[usize]> = Arc::from(row.outputs.as_slice());
        let cut = |part: usize| Ok((path(part), module.cut(&outputs, part).map_err(unsupported)?));
        (0..outputs.len()).map(cut).collect()
    }

    fn lose(&mut self, code: Code, key: &ModuleKey, module: &Module, reason: &str) -> Result<()> {
        let name = self.ledger.composition.first().display(key);
        self.ledger.lose(code, &name, module, reason)
    }

    /// The layers of the base, each with what the terms do to it.
    fn targets(&mut self) -> Result<Vec<Target<'a>>> {
        let mut targets = Vec::new();
        for (layer, variables, name) in self.instances() {
            let Some(base) = self.base.layer(&name) else { continue };
            let paths: Vec<String> = layer.modules.iter().map(|m| m.render(&variables)).collect();
            let mut terms = Vec::new();
            for term in 0..self.ledger.composition.terms().len() {
                match self.term(layer, &variables, &paths, base, term) {
                    Ok(module) => terms.extend(module.map(|m| (term, m))),
                    Err(Refusal(reason)) => {
                        let t = &self.ledger.composition.terms()[term];
                        let message = format!("`{name}` {reason}");
                        return Err(Error::new(Code::UnsupportedKind, message).at(t.adapter.source.path()));
                    }
                }
            }
            let block = block_of(layer, &variables);
            targets.push(Target { layer, name, block, base, terms, added: 0, ranges: Vec::new() });
        }
        Ok(targets)
    }

    /// The factors of one term in a layer.
    fn term(
        &self,
        layer: &Layer,
        variables: &[u32],
        paths: &[String],
        base: &BaseLayer,
        term: usize,
    ) -> Result<Option<Module>, Refusal> {
        // A file may claim a module twice, whole and in parts: both count.
        let find = |path: &String| {
            let claims: Vec<&Module> = match self.parts.get(path) {
                Some(parts) => parts.iter().filter(|p| p.term == term).map(|p| &p.module).collect(),
                None => Vec::new(),
            };
            match claims.as_slice() {
                [] => Ok(None),
                [one] => Ok(Some((*one).clone())),
                several => Module::sum(several).map(Some),
            }
        };
        let mut parts: Vec<Option<Module>> = paths.iter().map(find).collect::<Result<_, Refusal>>()?;
        if parts.iter().all(Option::is_none) {
            return Ok(None);
        }
        let values = parts.last_mut().and_then(Option::as_mut);
        if let (Some(factor), Some(values)) = (self.base.folded_into(self.native, layer, variables), values) {
            divide_rows(values, factor);
        }
        let mut module = match parts.as_slice() {
            [Some(one)] => one.tightened(),
            _ => Module::fuse(&parts.iter().map(Option::as_ref).collect::<Vec<_>>(), &layer.outputs)?,
        };
        if let (Some(columns), Some(down)) = (&layer.columns, module.tensors.get_mut(&Slot::Down)) {
            *down = down.slice_cols(columns.clone());
        }
        if let Smoothing::Fused(factor) = &base.smoothing {
            multiply_columns(&mut module, factor);
        }
        Ok(Some(module.folded()))
    }

    /// Decides how many ranks each layer gets, and where each term's are.
    fn ranked(&mut self, mut targets: Vec<Target<'a>>) -> Result<Vec<Target<'a>>> {
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (at, target) in targets.iter().enumerate() {
            let (layer, block) = (target.layer, &target.block);
            let group = match (&layer.joint, self.native.even) {
                (Some(joint), false) => format!("{block} {joint}"),
                (None, false) => target.name.clone(),
                (Some(joint), true) => joint.clone(),
                (None, true) => layer.name.text(&self.component.variables),
            };
            groups.entry(group).or_default().push(at);
        }
        let align = |n: usize| n.next_multiple_of(TILE);
        for members in groups.values() {
            let widest = |term: usize| {
                let ranks = members.iter().flat_map(|&at| targets[at].terms.iter().filter(|(t, _)| *t == term));
                ranks.filter_map(|(_, m)| m.rank()).max().unwrap_or(0)
            };
            let room: Vec<usize> = (0..self.ledger.composition.terms().len()).map(widest).collect();
            for &at in members {
                let target = &mut targets[at];
                let mut next = target.base.rank();
                for (term, room) in room.iter().enumerate() {
                    let own = target.terms.iter().find(|(t, _)| *t == term).and_then(|(_, m)| m.rank()).unwrap_or(0);
                    target.ranges.push((next, own));
                    next += if self.layout == Layout::Aligned { align(*room) } else { own };
                }
                target.added = align(next - target.base.rank());
            }
            let total = members.iter().map(|&at| targets[at].total()).max().unwrap_or(0);
            // A layer without a branch of its own gets an empty one, so that an earlier adapter's is replaced.
            let total = total.max(TILE);
            for &at in members {
                targets[at].added += total - targets[at].total();
            }
        }
        self.check_ranks(&targets)?;
        Ok(targets)
    }

    fn check_ranks(&self, targets: &[Target<'_>]) -> Result<()> {
        let high: Vec<&Target<'_>> =
            targets.iter().filter(|t| t.layer.interleave.is_none() && t.total() > MAX_TOTAL_RANK).collect();
        let Some(worst) = high.iter().max_by_key(|t| t.total()) else { return Ok(()) };
        let names: Vec<String> = high.iter().take(8).map(|t| format!("`{}` ({})", t.name, t.total())).collect();
        let more =
            if high.len() > names.len() { format!(" and {} more", high.len() - names.len()) } else { String::new() };
        let message = format!(
            "the ranks of {}{more} exceed {MAX_TOTAL_RANK}, the base's own {} included",
            names.join(", "),
            worst.base.rank()
        );
        let error = Error::new(Code::RankTooHigh, message).at(self.ledger.composition.first().source.path());
        Err(match self.layout {
            Layout::Aligned => error.hint(
                "compose fewer adapters, or reduce their ranks first; `--layout packed` leaves no gaps between them",
            ),
            Layout::Packed => error,
        })
    }

    /// The two factors of a layer.
    fn branches(&self, target: &Target<'_>, outputs: &mut Vec<Output>) {
        let layer = target.layer;
        // Modulation layers have no branch in a checkpoint; one that a file carries is of the file's own type.
        let own = layer.interleave.is_none() || self.base.is_carried();
        let dtype = target.base.dtype.filter(|_| own).unwrap_or(self.dtype);
        let (rows, cols) = (layer.output(), layer.input);
        let mut down = Tensor::zeros(dtype, vec![target.added, cols]);
        let mut up = Tensor::zeros(dtype, vec![rows, target.added]);
        for (term, module) in &target.terms {
            let at = target.ranges[*term].0 - target.base.rank();
            let (Some(d), Some(u)) = (module.get(Slot::Down), module.get(Slot::Up)) else { continue };
            down.put(d, (at, 0));
            up.put(u, (0, at));
        }
        let key = |name: &str| format!("{}.{name}", target.name);
        let (down_key, up_key) = (key(&self.native.down[0]), key(&self.native.up[0]));
        let (down, up) = match (layer.interleave, &target.base.branch) {
            (Some(splits), _) => (down, up.interleaved(splits)),
            (None, Some((d, u))) => (pack(Some(d.clone()), down, Side::Down), pack(Some(u.clone()), up, Side::Up)),
            (None, None) => (pack(None, down, Side::Down), pack(None, up, Side::Up)),
        };
        outputs.push(Output { key: down_key, tensor: down });
        outputs.push(Output { key: up_key, tensor: up });
    }

    /// Bias differences: those of the terms, and zeros for every other layer whose base has a bias, so that loading the
    /// file takes back what an earlier adapter did to it.
    fn vectors(&mut self, outputs: &mut Vec<Output>) {
        let mut biases = std::mem::take(&mut self.biases);
        for (layer, variables, name) in self.instances() {
            let (Some(base), Some(vector)) = (self.base.layer(&name), &layer.vector) else { continue };
            let paths: Vec<String> = layer.modules.iter().map(|m| m.render(&variables)).collect();
            let touched = paths.iter().any(|p| biases.contains_key(p));
            // Biases of modulation layers are restored by the runtime itself; adding zeros restores nothing.
            if !touched && (base.bias.is_none() || layer.interleave.is_some() || self.native.packed_vectors) {
                continue;
            }
            let dtype = base.bias.or(base.dtype).filter(|d| d.size() == 2).unwrap_or(self.dtype);
            let part = |(path, &rows): (&String, &usize)| match biases.get(path) {
                Some(parts) => Tensor::sum(&parts.iter().map(|(_, t)| t.clone()).collect::<Vec<_>>()),
                None => Tensor::zeros(dtype, vec![rows]),
            };
            let mut parts: Vec<Tensor> = paths.iter().zip(&layer.outputs).map(part).collect();
            if let (Some(factor), Some(values)) =
                (self.base.folded_into(self.native, layer, &variables), parts.last_mut())
            {
                *values = divide_vector(values, factor);
            }
            let key = format!("{}.bias", vector.render(&variables));
            for (term, _) in paths.iter().filter_map(|p| biases.remove(p)).flatten() {
                self.vectors[term].insert(key.clone());
            }
            let whole = Tensor::stack_rows(&parts).cast(dtype);
            let tensor = if self.native.packed_vectors { pack_vector(&whole) } else { whole };
            outputs.push(Output { key, tensor });
        }
        for (path, parts) in biases {
            let key = format!("{path}.bias");
            for (term, _) in &parts {
                self.vectors[*term].insert(key.clone());
            }
            let sum = Tensor::sum(&parts.into_iter().map(|(_, t)| t).collect::<Vec<_>>());
            let dtype = if sum.dtype().is_fp8() { Dtype::BF16 } else { sum.dtype() };
            outputs.push(Output { key, tensor: sum.cast(dtype) });
        }
    }

    /// Says where the base does not tell whether its attention outputs are smoothed, or contradicts itself.
    fn judge_smoothing(&mut self) {
        let attention = || {
            self.instances().filter_map(|(layer, variables, name)| {
                let place = format!("{} {}", block_of(layer, &variables), layer.attention.as_ref()?);
                let base = self.base.layer(&name)?;
                Some((name, place, base))
            })
        };
        let unknown: Vec<String> =
            attention().filter(|(.., b)| matches!(b.smoothing, Smoothing::Unknown)).map(|(n, ..)| n).collect();
        let mut seen: BTreeMap<String, &Smoothing> = BTreeMap::new();
        let mut torn = Vec::new();
        for (name, place, base) in attention() {
            match (seen.get(&place), &base.smoothing) {
                (Some(Smoothing::Fused(a)), Smoothing::Fused(b)) if a == b => {}
                (Some(Smoothing::Fused(_)), _) | (Some(_), Smoothing::Fused(_)) => torn.push(name),
                _ => drop(seen.insert(place, &base.smoothing)),
            }
        }
        if let Some(first) = unknown.first() {
            let detail = format!(
                "{} attention outputs of the base do not tell whether their inputs are smoothed already; read as plain",
                unknown.len()
            );
            self.ledger.warnings.push(Warning::new("undetermined-smoothing", Some(first.clone()), detail));
        }
        if let Some(first) = torn.first() {
            let detail = format!(
                "{} attention outputs of the base have another smoothing factor than their partner; each has its own applied",
                torn.len()
            );
            self.ledger.warnings.push(Warning::new("inconsistent-smoothing", Some(first.clone()), detail));
        }
    }

    /// What the metadata will say of the layers.
    fn draft(&self, targets: &[Target<'_>]) -> Draft {
        let base_ranks: BTreeMap<String, Option<usize>> =
            self.base.layers().iter().map(|(n, l)| (n.clone(), Some(l.rank()).filter(|r| *r > 0))).collect();
        let base = BaseEntry {
            fingerprint: self.base.fingerprint().to_owned(),
            name: self.base.name().to_owned(),
            precision: self.base.precision().map(|p| p.name().to_owned()),
            ranks: compress(&base_ranks, 0),
            smoothed: self.base.smoothed(),
        };
        let own = |target: &Target<'_>, term: usize| {
            target.ranges.get(term).filter(|(_, n)| *n > 0).map(|&(at, n)| (at, at + n))
        };
        let ranks = |term: usize| targets.iter().map(|t| (t.name.clone(), own(t, term))).collect();
        Draft {
            base,
            layout: self.layout.name(),
            ranks: (0..self.vectors.len()).map(ranks).collect(),
            vectors: self.vectors.clone(),
        }
    }
}

/// The block that a layer stands in: its name up to the block's number.
fn block_of(layer: &Layer, variables: &[u32]) -> String {
    layer.name.block(variables).map_or_else(String::new, |(head, number)| format!("{head}{number}"))
}
