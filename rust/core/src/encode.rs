//! From the canonical adapter to the keys of a dialect.

mod algebra;
mod join;
mod merge;
mod names;
mod peft;
mod unsure;

use std::collections::BTreeMap;

pub use algebra::Algebra;
use names::path;
pub(crate) use names::{keys, target_row};

use crate::adapter::{Adapter, Address, ModuleKey};
use crate::compose::{Composition, Ledger, Unknown};
use crate::dtype::Dtype;
use crate::error::{Code, Error, Result};
use crate::kind::{Kind, Module, Slot};
use crate::meta;
use crate::native::{Assembled, NativeOptions, assemble};
use crate::ops::merge::MergedModule;
use crate::ops::resize::ResizeReport;
use crate::plan::{Fate, Output, Plan};
use crate::report::{Fidelity, Warning};
use crate::table::pattern::Variables;
use crate::table::{AlphaPolicy, Dialect, Op, Place, Row};
use crate::tensor::Tensor;

/// How to encode.
#[derive(Debug, Clone)]
pub struct EncodeOptions {
    /// Number of the dialect.
    pub dialect: usize,
    /// The element type of factors; `None` keeps the input's. FP8 becomes bfloat16 even then, which holds every FP8
    /// value: no runtime multiplies FP8 factors.
    pub dtype: Option<Dtype>,
    /// A factor on every delta.
    pub strength: f64,
    /// Unknown keys.
    pub unknown: Unknown,
    /// Leave out what the dialect cannot hold, instead of stopping.
    pub lossy: bool,
    /// Whether a configuration file can be written beside the tensors.
    pub sidecar: bool,
    /// The highest rank of the plain form that LoHa and LoKr take on where their own cannot be written; `None` for
    /// that of [`MAX_RANK`] where several adapters meet, and for no plain form elsewhere.
    pub max_rank: Option<usize>,
    /// Widens modules that have several input widths to this one (FLUX.1 Control: 128, Fill: 384).
    pub width: Option<usize>,
    /// For dialects of quantized models: the base, and how its branches are continued.
    pub native: Option<NativeOptions>,
    /// What is done to every module before it is written.
    pub algebra: Algebra,
}

/// The highest rank of a plain form that nobody asked for.
pub const MAX_RANK: usize = 128;

/// A module on its way into the dialect: named, fused and folded.
#[derive(Clone)]
struct Spelled<'a> {
    place: &'a Place,
    /// Whose suffixes it gets: the target's own, or those that its table names for a carried component.
    dialect: &'a Dialect,
    row: &'a Row,
    path: String,
    /// The canonical modules that it is made of.
    keys: Vec<ModuleKey>,
    module: Module,
    /// Whether the scale is left to the configuration file.
    configured: bool,
}

/// Decides every tensor of the output. Reads factors only where equality or zeros must be known.
pub fn encode(composition: &Composition<'_>, options: &EncodeOptions) -> Result<Plan> {
    let adapter = composition.first();
    let dialect = &adapter.registry.dialects[options.dialect];
    if !dialect.writes(adapter.family) {
        let message = format!("`{}` cannot be written for {}", dialect.name, adapter.family_table().name);
        return Err(Error::new(Code::UnsupportedTarget, message));
    }
    // The branches that a file carries in itself are enough to write it anew behind them, and for nothing else.
    let behind = options.native.as_ref().filter(|_| dialect.native(adapter.family).is_some());
    let at_home = |source| behind.is_some_and(|n| n.base.is_within(source));
    for term in composition.terms() {
        if !at_home(&term.adapter.source) {
            term.adapter.ensure_apart()?;
        }
    }
    let ledger = Ledger::new(composition, dialect, options.lossy, options.strength);
    options.algebra.check()?;
    composition.terms().iter().try_for_each(|term| unsure::check(term.adapter, dialect))?;
    let mut encoder = Encoder {
        adapter,
        dialect,
        options,
        ledger,
        widened: Vec::new(),
        branches: None,
        resized: None,
        merged: Vec::new(),
    };
    let mut spelled = Vec::new();
    for component in 0..adapter.family_table().components.len() {
        spelled.extend(encoder.component(component)?);
    }
    encoder.resize(&mut spelled)?;
    let mut finished = Vec::with_capacity(spelled.len());
    for component in spelled.chunk_by(|a, b| a.place.component == b.place.component) {
        let mut component: Vec<_> = component.iter().map(|s| encoder.fold(s.clone())).collect();
        encoder.make_uniform(&mut component)?;
        finished.append(&mut component);
    }
    encoder.finish(finished)
}

/// A canonical module of one term, at its strength.
pub(crate) struct Member<'a> {
    pub(crate) term: usize,
    pub(crate) key: &'a ModuleKey,
    pub(crate) address: &'a Address,
    pub(crate) module: Module,
    /// The strength, where it is not in the module yet.
    pub(crate) weight: f64,
}

/// Canonical modules that make one module of the target, term by term.
type Members<'a> = Vec<Member<'a>>;

/// A module of the target, and what it is made of.
struct Goal<'a> {
    row: &'a Row,
    /// Which canonical module of the row it is, if the target names those.
    part: Option<usize>,
    variables: Variables,
    members: Members<'a>,
}

/// A module of the target, as each term has it.
struct Draft<'a> {
    row: &'a Row,
    path: String,
    /// The canonical modules that it is made of.
    keys: Vec<ModuleKey>,
    terms: Vec<Joined>,
}

/// What one term makes under the name of a module of the target.
struct Joined {
    term: usize,
    module: Module,
    /// The strength, where it is not in the module yet.
    weight: f64,
}

struct Encoder<'a> {
    /// The first adapter: the tables and the family are those of all.
    adapter: &'a Adapter,
    dialect: &'a Dialect,
    options: &'a EncodeOptions,
    ledger: Ledger<'a>,
    /// Modules whose inputs were widened with zeros.
    widened: Vec<String>,
    /// The branches of a quantized model.
    branches: Option<Assembled>,
    /// What happened to ranks.
    resized: Option<ResizeReport>,
    /// What happened to merged modules.
    merged: Vec<MergedModule>,
}

impl<'a> Encoder<'a> {
    /// All modules of one component, spelled.
    fn component(&mut self, component: usize) -> Result<Vec<Spelled<'a>>> {
        let modules = self.members(component)?;
        let modules = self.without_branches(component, modules)?;
        let Some(place) = self.dialect.place(self.adapter.family, component) else {
            for m in modules {
                self.lose(Code::UnsupportedModule, m.key, &m.module, "has no place there")?;
            }
            return Ok(Vec::new());
        };
        self.warn_of_one_place(place, &modules);
        let dialect = self.adapter.registry.speller(self.dialect, place);
        let mut spelled = Vec::new();
        let mut drafts = Vec::new();
        for Goal { row, part, variables, members } in self.targets(place, modules)? {
            let mut keys: Vec<ModuleKey> = members.iter().map(|m| m.key.clone()).collect();
            keys.dedup();
            let path = path(place, row, part, &variables, &keys[0]);
            let terms = self.join_terms(place, dialect, row, members)?;
            let draft = Draft { row, path, keys, terms };
            if self.options.algebra.merge.is_some() {
                drafts.push(draft);
            } else if let Some(module) = self.add_up(&draft)? {
                spelled.extend(self.spell(place, dialect, draft, module)?);
            }
        }
        for (draft, module) in self.merge(place, drafts)? {
            spelled.extend(self.spell(place, dialect, draft, module)?);
        }
        Ok(spelled)
    }

    /// Where a dialect has one place for two parts of a model, its files do not say of which they are.
    fn warn_of_one_place(&mut self, place: &Place, modules: &Members<'a>) {
        let family = self.adapter.family_table();
        let alike = |other: &Place| other.prefix == place.prefix && other.namespace == place.namespace;
        let earlier = (0..place.component).find(|&c| self.dialect.place(self.adapter.family, c).is_some_and(alike));
        let Some(earlier) = earlier.filter(|_| !modules.is_empty()) else { return };
        let (own, other) = (&family.components[place.component].name, &family.components[earlier].name);
        let detail = format!(
            "in `{}`, files of {own} and of {other} look alike: keep its name to tell them apart",
            self.dialect.name
        );
        self.ledger.warnings.push(Warning::new("one-place", Some(own.clone()), detail));
    }

    /// A module under its name, unless the dialect cannot spell it.
    fn spell(
        &mut self,
        place: &'a Place,
        dialect: &'a Dialect,
        draft: Draft<'a>,
        module: Module,
    ) -> Result<Option<Spelled<'a>>> {
        let Draft { row, path, keys, .. } = draft;
        let reason = self.unspellable(dialect, row, &module).or_else(|| self.stops(place, &module));
        if let Some(reason) = reason {
            self.lose(Code::UnsupportedKind, &keys[0], &module, &reason)?;
            return Ok(None);
        }
        Ok(Some(Spelled { place, dialect, row, path, keys, module, configured: false }))
    }

    /// The modules of one component of all terms: at their strengths, unless a rule wants those apart.
    fn members(&mut self, component: usize) -> Result<Members<'a>> {
        let mut members = Vec::new();
        for (term, t) in self.ledger.composition.terms().iter().enumerate() {
            for (key, placed) in t.adapter.modules.iter().filter(|(key, _)| key.component == component) {
                let weighed = match self.options.algebra.merge {
                    Some(_) => self.ledger.weighed(term, key, placed),
                    None => self.ledger.strengthened(term, key, placed)?.map(|module| (module, 1.0)),
                };
                if let Some((module, weight)) = weighed {
                    members.push(Member { term, key, address: &placed.address, module, weight });
                }
            }
        }
        Ok(members)
    }

    /// Makes the branches of a quantized model; what is left are plain modules.
    fn without_branches(&mut self, component: usize, members: Members<'a>) -> Result<Members<'a>> {
        let Some(native) = self.dialect.native(self.adapter.family).filter(|n| n.component == component) else {
            return Ok(members);
        };
        let Some(options) = &self.options.native else {
            let message = format!("`{}` is written behind the branches of a quantized base", self.dialect.name);
            return Err(Error::new(Code::BaseNeeded, message));
        };
        let (dtype, max_rank) = (self.options.dtype, self.options.max_rank);
        let (branches, rest) = assemble(&mut self.ledger, native, options, dtype, max_rank, members)?;
        self.branches = Some(branches);
        Ok(rest)
    }

    /// Which rows of the namespace the modules belong to, in a fixed order.
    fn targets(&mut self, place: &Place, modules: Members<'a>) -> Result<Vec<Goal<'a>>> {
        let component = self.adapter.component(place.component);
        let mut groups: BTreeMap<(usize, Variables, Option<usize>), Members<'a>> = BTreeMap::new();
        for member in modules {
            let row = target_row(self.adapter, place, member.key, member.address);
            let Some(row) = row else {
                self.lose(Code::UnsupportedModule, member.key, &member.module, "has no name there")?;
                continue;
            };
            let (row, part) = row;
            groups.entry((row, member.address.variables.clone(), part)).or_default().push(member);
        }
        Ok(groups
            .into_iter()
            .map(|((row, variables, part), members)| Goal { row: &component.rows[row], part, variables, members })
            .collect())
    }

    /// Why the dialect cannot spell a module, if it cannot.
    fn unspellable(&self, dialect: &Dialect, row: &Row, module: &Module) -> Option<String> {
        let spells = |slot: Slot| dialect.spelling.contains_key(&slot);
        // The bias of `lora_B` belongs to a layer; a norm has none.
        let layer = row.op != Op::Only;
        module.tensors.keys().find_map(|&slot| match slot {
            Slot::DiffB if spells(Slot::DiffB) || (layer && spells(Slot::Bias)) => None,
            slot if spells(slot) => None,
            Slot::MagnitudeIn => {
                Some("is DoRA over the input axis, which it cannot hold without the base weights".to_owned())
            }
            Slot::Magnitude => Some("is DoRA, which it cannot hold".to_owned()),
            Slot::DiffB => Some("has a bias, which it cannot hold".to_owned()),
            Slot::Mid => Some("has a Tucker core (`lora_mid`), which it cannot hold".to_owned()),
            _ => Some(format!("is {}, which it cannot hold", module.kind.name())),
        })
    }

    /// Why the runtime of a quantized model stops at a module that is only carried: it looks up every vector.
    fn stops(&self, place: &Place, module: &Module) -> Option<String> {
        let looked_up = place.carried && self.dialect.native(self.adapter.family).is_some_and(|n| !n.whole);
        let vector = module.tensors.iter().any(|(slot, t)| *slot != Slot::Magnitude && t.shape().len() == 1);
        (looked_up && vector).then(|| "has a bias or a norm, at which its loader stops".to_owned())
    }

    /// Puts the scale where the dialect keeps it.
    fn fold(&self, mut spelled: Spelled<'a>) -> Spelled<'a> {
        let (module, dialect) = (&spelled.module, spelled.dialect);
        let spells_alpha = dialect.spelling.contains_key(&Slot::Alpha);
        let bias_scales = module.get(Slot::DiffB).is_some() && !dialect.spelling.contains_key(&Slot::DiffB);
        let is_lora = module.kind == Kind::Lora;
        let keep = match dialect.alpha {
            AlphaPolicy::Tensor => true,
            AlphaPolicy::Folded => !is_lora && spells_alpha,
            // PEFT multiplies a bias with the scale, so such a module is better off with scale 1.
            AlphaPolicy::Config => is_lora && self.options.sidecar && !bias_scales,
        };
        // A scale that an alpha cannot say (zero means "not set", and it must be finite) goes into the factors.
        let alpha = module.rank().map_or(1.0, |rank| (module.scale * rank as f64) as f32);
        let keep = keep && (module.alpha.is_some() || (alpha.is_finite() && alpha != 0.0));
        spelled.configured = dialect.alpha == AlphaPolicy::Config && keep;
        if !keep || module.rank().is_none() {
            let alpha = if spells_alpha { module.alpha.clone() } else { None };
            spelled.module = spelled.module.folded();
            if spelled.module.rank().is_none() {
                // LoKr of two full factors: the number means nothing, and goes along where it has a name.
                spelled.module.alpha = alpha;
            }
        }
        spelled
    }

    /// Gives every module of a component a bias if one has one, and refuses magnitudes that only some have.
    fn make_uniform(&mut self, spelled: &mut Vec<Spelled<'a>>) -> Result<()> {
        if !spelled.iter().any(|s| s.dialect.uniform) {
            return Ok(());
        }
        let layers = |s: &&mut Spelled<'a>| matches!(s.module.kind, Kind::Lora | Kind::Bias);
        if spelled.iter().any(|s| s.module.is_dora()) {
            let plain: Vec<usize> = (0..spelled.len())
                .filter(|&i| spelled[i].module.kind == Kind::Lora && !spelled[i].module.is_dora())
                .collect();
            let reason = "is plain LoRA among DoRA modules; its loaders would give it a magnitude of zero";
            for i in plain.into_iter().rev() {
                let out = spelled.remove(i);
                let name = self.name_of(&out);
                self.ledger.lose(Code::UnsupportedKind, &name, &out.module, reason)?;
            }
        }
        if !spelled.iter().any(|s| s.module.get(Slot::DiffB).is_some()) {
            return Ok(());
        }
        for s in spelled.iter_mut().filter(layers) {
            let output = match s.row.op {
                Op::Fuse => s.module.get(Slot::Up).or_else(|| s.module.get(Slot::DiffB)).map_or(0, Tensor::rows),
                _ => s.row.output(),
            };
            let like = s.module.tensors.values().next().map_or(Dtype::F32, Tensor::dtype);
            s.module.tensors.entry(Slot::DiffB).or_insert_with(|| Tensor::zeros(like, vec![output]));
            if s.module.kind == Kind::Bias {
                let width = s.row.inputs.first().copied().unwrap_or(1);
                s.module.kind = Kind::Lora;
                s.module.tensors.insert(Slot::Down, Tensor::zeros(like, vec![1, width]));
                s.module.tensors.insert(Slot::Up, Tensor::zeros(like, vec![output, 1]));
            }
        }
        let component = &self.adapter.component(spelled[0].place.component).name;
        let detail =
            "some modules have a bias; the others were given a zero one, without which loaders leave it uninitialised";
        self.ledger.warnings.push(Warning::new("bias-completed", Some(component.clone()), detail));
        Ok(())
    }

    fn name_of(&self, spelled: &Spelled<'_>) -> String {
        format!("{}.{}", self.adapter.component(spelled.place.component).name, spelled.path)
    }

    fn lose(&mut self, code: Code, key: &ModuleKey, module: &Module, reason: &str) -> Result<()> {
        let name = self.adapter.display(key);
        self.ledger.lose(code, &name, module, reason)
    }

    fn finish(mut self, spelled: Vec<Spelled<'a>>) -> Result<Plan> {
        let mut used = spelled.iter().filter(|s| !s.place.carried).count();
        let alpha_tensors = self.dialect.alpha == AlphaPolicy::Tensor;
        let metadata = meta::of(self.ledger.composition, alpha_tensors, self.options.strength);
        let mut plan = Plan { modules: spelled.len(), ..Plan::of_outputs(Vec::new(), metadata) };
        if let Some(branches) = self.branches.take() {
            used += branches.modules;
            plan.modules += branches.modules;
            plan.outputs = branches.outputs;
            if let Some(draft) = branches.draft {
                let (entry, digests) = draft.finish(self.ledger.composition.terms(), self.options.strength);
                // The entry says the same and more.
                plan.metadata.retain(|(key, _)| key != meta::COMPOSED);
                plan.metadata.push(entry);
                plan.digests = digests;
            }
            plan.judge(0, Fidelity::Regrouped);
        }
        let mut carried: BTreeMap<usize, usize> = BTreeMap::new();
        for s in &spelled {
            self.ledger.mark(&s.module, if s.place.carried { Fate::Carried } else { Fate::Used });
            if s.module.rank().is_some() {
                self.ledger.alpha.add(s.module.alpha_source);
            }
            if s.place.carried {
                *carried.entry(s.place.component).or_default() += 1;
            }
            let start = plan.outputs.len();
            self.outputs(s, &mut plan.outputs);
            let least = match (s.module.approximate, s.module.regrouped) {
                (true, _) => Fidelity::Approximate,
                (false, true) => Fidelity::Regrouped,
                (false, false) => Fidelity::Exact,
            };
            plan.judge(start, least);
        }
        for (component, modules) in carried {
            let name = self.adapter.component(component).name.clone();
            let detail = format!("{modules} modules have no loader in `{}`; they are carried along", self.dialect.name);
            self.ledger.warnings.push(Warning::new("carried-component", Some(name), detail));
        }
        if let Some(first) = self.widened.first() {
            let detail =
                format!("{} modules have narrower inputs in some adapters, widened with zeros", self.widened.len());
            self.ledger.warnings.push(Warning::new("widened-inputs", Some(first.clone()), detail));
        }
        if self.dialect.alpha == AlphaPolicy::Config {
            let config = peft::config(&spelled, &self.adapter.family_table().components);
            if self.options.sidecar {
                plan.sidecar = Some(("adapter_config.json".to_owned(), format!("{config:#}\n")));
            } else {
                plan.metadata.push(("adapter_config".to_owned(), config.to_string()));
            }
        }
        plan.resize = self.resized.take();
        plan.merge = self.merge_report();
        self.ledger.close(plan, self.options.unknown, used)
    }

    /// The tensors of one module under their keys.
    fn outputs(&self, s: &Spelled<'_>, out: &mut Vec<Output>) {
        let base = s.place.key(&s.path);
        let param = s.row.params[s.place.namespace].as_deref();
        let mut push = |slot: Slot, tensor: Tensor| {
            let suffix = s.dialect.suffix(slot, param).expect("checked by unspellable");
            out.push(Output { key: format!("{base}{suffix}"), tensor });
        };
        for (&slot, tensor) in &s.module.tensors {
            let tensor = shaped(s.row, slot, self.typed(tensor.clone()));
            match slot {
                Slot::DiffB if !s.dialect.spelling.contains_key(&Slot::DiffB) => push(Slot::Bias, tensor),
                Slot::Magnitude if s.dialect.column_magnitude => {
                    let rows = tensor.rows();
                    push(slot, tensor.reshaped(vec![rows, 1]));
                }
                Slot::Up => push(slot, beside(tensor, s.module.get(Slot::Down))),
                _ => push(slot, tensor),
            }
        }
        if s.dialect.spelling.contains_key(&Slot::Alpha) {
            let writes = s.dialect.alpha == AlphaPolicy::Tensor || s.module.kind != Kind::Lora;
            match (&s.module.alpha, s.module.rank()) {
                (Some(alpha), _) if writes => {
                    let alpha = if alpha.dtype().is_fp8() { alpha.clone().cast(Dtype::F32) } else { alpha.clone() };
                    // A vector of one element is one, too (see `stops`).
                    let scalar = self.dialect.native(self.adapter.family).is_some();
                    push(Slot::Alpha, if scalar { alpha.reshaped(Vec::new()) } else { alpha });
                }
                (None, Some(rank)) if writes => {
                    push(Slot::Alpha, Tensor::scalar((s.module.scale * rank as f64) as f32))
                }
                _ => {}
            }
        }
        // Wider inputs than the base model has: ComfyUI pads the base weight to the shape given here.
        let wide = s.module.get(Slot::Down).filter(|d| s.row.inputs.first().is_some_and(|&base| d.cols() > base));
        if let (Some(down), true) = (wide, s.dialect.spelling.contains_key(&Slot::Reshape)) {
            let area: usize = s.row.kernel.iter().product();
            let shape: Vec<usize> =
                [s.row.output(), down.cols() / area].into_iter().chain(s.row.kernel.iter().copied()).collect();
            let bytes: Vec<u8> = shape.iter().flat_map(|&n| (n as i64).to_le_bytes()).collect();
            push(Slot::Reshape, Tensor::constant(Dtype::I64, vec![shape.len()], bytes));
        }
    }

    /// The tensor in the element type of the output.
    fn typed(&self, tensor: Tensor) -> Tensor {
        match (tensor.dtype(), self.options.dtype) {
            (have, _) if !have.is_float() => tensor,
            (_, Some(want)) => tensor.cast(want),
            (have, None) if have.is_fp8() => tensor.cast(Dtype::BF16),
            _ => tensor,
        }
    }
}

/// A factor or difference of a convolution in the shape that its layer has.
fn shaped(row: &Row, slot: Slot, tensor: Tensor) -> Tensor {
    let (rows, cols, area) = (tensor.rows(), tensor.cols(), row.kernel.iter().product::<usize>());
    if row.kernel.is_empty() {
        return tensor;
    }
    let points = vec![1; row.kernel.len()];
    let (channels, kernel) = match slot {
        Slot::Down | Slot::Diff if row.inputs.contains(&cols) => (cols / area, &row.kernel),
        // Beside a core, which has the kernel.
        Slot::Down | Slot::Up => (cols, &points),
        _ => return tensor,
    };
    tensor.reshaped([rows, channels].into_iter().chain(kernel.iter().copied()).collect())
}

/// Up with as many dimensions as down has: of a convolution it is one of 1x1.
fn beside(up: Tensor, down: Option<&Tensor>) -> Tensor {
    let dimensions = down.map_or(2, |d| d.shape().len());
    if dimensions <= 2 || up.shape().len() == dimensions {
        return up;
    }
    let mut shape = vec![1; dimensions];
    (shape[0], shape[1]) = (up.rows(), up.cols());
    up.reshaped(shape)
}
