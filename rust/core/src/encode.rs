//! From the canonical adapter to the keys of a dialect.

mod peft;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::adapter::{Adapter, Address, ModuleKey, Placed};
use crate::dtype::Dtype;
use crate::error::{Code, Error, Result};
use crate::kind::{Kind, Module, Refusal, Slot};
use crate::meta;
use crate::plan::{Fate, Output, Plan};
use crate::report::{AlphaCount, Fidelity, Warning};
use crate::table::pattern::Variables;
use crate::table::{AlphaPolicy, Dialect, Op, Place, Row};
use crate::tensor::Tensor;

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

/// How to encode.
#[derive(Debug, Clone, Copy)]
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
}

/// A module on its way into the dialect: named, fused and folded.
struct Spelled<'a> {
    place: &'a Place,
    /// Whose suffixes it gets: the target's own, or those that its table names for a carried component.
    dialect: &'a Dialect,
    row: &'a Row,
    path: String,
    module: Module,
    /// Whether the scale is left to the configuration file.
    configured: bool,
}

/// Decides every tensor of the output. Reads factors only where equality or zeros must be known.
pub fn encode(adapter: &Adapter, options: &EncodeOptions) -> Result<Plan> {
    let dialect = &adapter.registry.dialects[options.dialect];
    if !dialect.writes(adapter.family) {
        let message = format!("`{}` cannot be written for {}", dialect.name, adapter.family_table().name);
        return Err(Error::new(Code::UnsupportedTarget, message));
    }
    let mut encoder = Encoder {
        adapter,
        dialect,
        options,
        fates: vec![Fate::Unknown; adapter.source.tensors().len()],
        warnings: adapter.warnings.clone(),
        alpha: AlphaCount::default(),
        lost: Vec::new(),
    };
    let mut spelled = Vec::new();
    for component in 0..adapter.family_table().components.len() {
        spelled.extend(encoder.component(component)?);
    }
    encoder.finish(spelled)
}

/// Canonical modules that make one module of the target.
type Members<'a> = Vec<(&'a ModuleKey, &'a Placed)>;

struct Encoder<'a> {
    adapter: &'a Adapter,
    dialect: &'a Dialect,
    options: &'a EncodeOptions,
    fates: Vec<Fate>,
    warnings: Vec<Warning>,
    alpha: AlphaCount,
    /// What was left out under `--lossy allow`.
    lost: Vec<String>,
}

impl<'a> Encoder<'a> {
    /// The dialect that lends its suffixes to a place.
    fn speller(&self, place: &Place) -> &'a Dialect {
        let named = place.spelled_as.as_ref();
        named.and_then(|name| self.adapter.registry.dialects.iter().find(|d| d.name == *name)).unwrap_or(self.dialect)
    }

    /// All modules of one component, spelled.
    fn component(&mut self, component: usize) -> Result<Vec<Spelled<'a>>> {
        let modules: Members<'a> = self.adapter.modules.iter().filter(|(key, _)| key.component == component).collect();
        let Some(place) = self.dialect.place(self.adapter.family, component) else {
            for (key, placed) in modules {
                self.lose(Code::UnsupportedModule, key, &placed.module, "has no place there")?;
            }
            return Ok(Vec::new());
        };
        let dialect = self.speller(place);
        let mut spelled = Vec::new();
        for (row, variables, members) in self.targets(place, modules)? {
            let Some(module) = self.join(place, row, &members)? else { continue };
            let path = match (place.namespace, members[0].1.address.part) {
                (0, Some(part)) => row.canonical[part].render(&variables),
                _ => row.names[place.namespace].as_ref().expect("targets only gives named rows").render(&variables),
            };
            let module = self.without_bias(dialect, members[0].0, module)?;
            if let Some(reason) = self.unspellable(dialect, row, &module) {
                self.lose(Code::UnsupportedKind, members[0].0, &module, &reason)?;
                continue;
            }
            spelled.push(self.fold(Spelled { place, dialect, row, path, module, configured: false }));
        }
        self.make_uniform(&mut spelled)?;
        Ok(spelled)
    }

    /// Which rows of the namespace the modules belong to, in a fixed order.
    fn targets(&mut self, place: &Place, modules: Members<'a>) -> Result<Vec<(&'a Row, Variables, Members<'a>)>> {
        let component = self.adapter.component(place.component);
        let mut groups: BTreeMap<(usize, Variables, usize), Members<'a>> = BTreeMap::new();
        for (key, placed) in modules {
            let row = self.target_row(place, key, &placed.address);
            let Some(row) = row else {
                self.lose(Code::UnsupportedModule, key, &placed.module, "has no name there")?;
                continue;
            };
            // In the canonical namespace every part stands by itself.
            let part = if place.namespace == 0 { placed.address.part.map_or(0, |p| p + 1) } else { 0 };
            groups.entry((row, placed.address.variables.clone(), part)).or_default().push((key, placed));
        }
        Ok(groups
            .into_iter()
            .map(|((row, variables, _), members)| (&component.rows[row], variables, members))
            .collect())
    }

    /// The row under which a module is written.
    fn target_row(&self, place: &Place, key: &ModuleKey, address: &Address) -> Option<usize> {
        let rows = &self.adapter.component(place.component).rows;
        if place.namespace == 0 {
            return Some(address.row);
        }
        let named = |row: &Row| row.names[place.namespace].is_some();
        let Some(part) = address.part.filter(|_| address.namespace == 0) else {
            return named(&rows[address.row]).then_some(address.row);
        };
        let template = &self.adapter.row(key, address).canonical[part];
        rows.iter().position(|row| named(row) && row.canonical.contains(template))
    }

    /// The one module that the members make under the row's name in the target namespace.
    fn join(&mut self, place: &Place, row: &'a Row, members: &[(&'a ModuleKey, &'a Placed)]) -> Result<Option<Module>> {
        let (key, first) = members[0];
        let joined = match (first.address.namespace, place.namespace) {
            // Its kind did not let it be made canonical, and the target wants it so: hear the reason again.
            (1.., 0) => match row.op {
                Op::Fuse => refused_cut(row, &first.module),
                _ => first.module.swap_halves(),
            },
            _ if members.len() > 1 && members.iter().any(|(_, m)| m.address.namespace > 0) => {
                Err(Refusal("is claimed twice: whole and in parts".to_owned()))
            }
            (1.., _) => Ok(first.module.clone()),
            (0, 0) => Ok(first.module.tightened()),
            (0, _) => match row.op {
                Op::Rename | Op::Only => Ok(first.module.tightened()),
                Op::SwapHalves => first.module.swap_halves(),
                Op::Fuse => self.fuse(row, members),
            },
        };
        match joined.and_then(|m| m.strengthened(self.options.strength)) {
            Ok(module) => Ok(Some(module)),
            Err(Refusal(reason)) => {
                let code = if self.options.strength == 1.0 { Code::UnsupportedKind } else { Code::UnsupportedStrength };
                for (_, placed) in &members[1..] {
                    self.mark(&placed.module, Fate::Dropped);
                }
                self.lose(code, key, &first.module, &reason)?;
                Ok(None)
            }
        }
    }

    fn fuse(&self, row: &Row, members: &[(&ModuleKey, &Placed)]) -> Result<Module, Refusal> {
        let part_of = |path: &str, address: &Address| {
            row.canonical
                .iter()
                .position(|t| t.render(&address.variables) == path)
                .expect("the row was found by this name")
        };
        let mut parts: Vec<Option<&Module>> = vec![None; row.canonical.len()];
        for (key, placed) in members {
            parts[part_of(&key.path, &placed.address)] = Some(&placed.module);
        }
        Module::fuse(&parts, &row.outputs)
    }

    /// A bias that the dialect cannot hold is left out by itself, if losses are allowed: the layer does without it.
    fn without_bias(&mut self, dialect: &Dialect, key: &ModuleKey, mut module: Module) -> Result<Module> {
        let held = [Slot::DiffB, Slot::Bias].iter().any(|slot| dialect.spelling.contains_key(slot));
        if held || module.kind == Kind::Bias {
            return Ok(module);
        }
        if let Some(bias) = module.tensors.remove(&Slot::DiffB) {
            let inputs = bias.inputs();
            let mut lost = Module::new(Kind::Bias, BTreeMap::from([(Slot::DiffB, bias)]));
            lost.inputs = inputs;
            self.lose(Code::UnsupportedKind, key, &lost, "has a bias, which it cannot hold")?;
            module.inputs.retain(|input| !lost.inputs.contains(input));
        }
        Ok(module)
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
                self.lose_named(Code::UnsupportedKind, &self.name_of(&out), &out.module, reason)?;
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
        self.warnings.push(Warning::new("bias-completed", Some(component.clone()), detail));
        Ok(())
    }

    fn name_of(&self, spelled: &Spelled<'_>) -> String {
        format!("{}.{}", self.adapter.component(spelled.place.component).name, spelled.path)
    }

    fn mark(&mut self, module: &Module, fate: Fate) {
        for &input in &module.inputs {
            self.fates[input] = self.fates[input].max(fate);
        }
    }

    /// An error, or a note that the module was left out.
    fn lose(&mut self, code: Code, key: &ModuleKey, module: &Module, reason: &str) -> Result<()> {
        self.lose_named(code, &self.adapter.display(key), module, reason)
    }

    fn lose_named(&mut self, code: Code, name: &str, module: &Module, reason: &str) -> Result<()> {
        let message = format!("`{name}` {reason}");
        if !self.options.lossy {
            let key = module.inputs.first().map(|&i| self.adapter.source.tensors()[i].name.clone());
            let mut error =
                Error::new(code, format!("{message} (target `{}`)", self.dialect.name)).at(self.adapter.source.path());
            if let Some(key) = key {
                error = error.key(key);
            }
            let able = self.able(module);
            if code == Code::UnsupportedKind && !able.is_empty() {
                error = error.hint(format!(
                    "`--to {}` can hold it; `--lossy allow` leaves such modules out",
                    able.join("` or `--to ")
                ));
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
        let dialects = self.adapter.registry.dialects.iter().filter(|d| {
            d.writes(self.adapter.family)
                && d.name != self.dialect.name
                && module
                    .tensors
                    .keys()
                    .all(|s| d.spelling.contains_key(s) || (*s == Slot::DiffB && d.spelling.contains_key(&Slot::Bias)))
        });
        dialects.map(|d| d.name.as_str()).collect()
    }

    fn finish(mut self, spelled: Vec<Spelled<'a>>) -> Result<Plan> {
        let used = spelled.iter().filter(|s| !s.place.carried).count();
        let mut plan = Plan {
            outputs: Vec::new(),
            metadata: meta::carry(
                self.adapter.source.metadata(),
                self.dialect.alpha == AlphaPolicy::Tensor && self.options.strength == 1.0,
            ),
            sidecar: None,
            fates: Vec::new(),
            modules: spelled.len(),
            alpha: AlphaCount::default(),
            fidelity: Fidelity::Exact,
            rounding: 0.0,
            warnings: Vec::new(),
        };
        let mut carried: BTreeMap<usize, usize> = BTreeMap::new();
        for s in &spelled {
            self.mark(&s.module, if s.place.carried { Fate::Carried } else { Fate::Used });
            if s.module.rank().is_some() {
                self.alpha.add(s.module.alpha_source);
            }
            if s.place.carried {
                *carried.entry(s.place.component).or_default() += 1;
            }
            let start = plan.outputs.len();
            self.outputs(s, &mut plan.outputs);
            judge(&mut plan, start, s.module.regrouped);
        }
        for (component, modules) in carried {
            let name = self.adapter.component(component).name.clone();
            let detail = format!("{modules} modules have no loader in `{}`; they are carried along", self.dialect.name);
            self.warnings.push(Warning::new("carried-component", Some(name), detail));
        }
        if self.dialect.alpha == AlphaPolicy::Config {
            let config = peft::config(&spelled);
            if self.options.sidecar {
                plan.sidecar = Some(("adapter_config.json".to_owned(), format!("{config:#}\n")));
            } else {
                plan.metadata.push(("adapter_config".to_owned(), config.to_string()));
            }
        }
        self.unknown_keys(&mut plan)?;
        if used == 0 {
            let message = format!("no module has a place in `{}`: nothing would be written", self.dialect.name);
            return Err(Error::new(Code::NoModules, message).at(self.adapter.source.path()));
        }
        if self.options.strength != 1.0 {
            plan.fidelity = plan.fidelity.max(Fidelity::Rescaled);
        }
        if !self.lost.is_empty() {
            plan.fidelity = Fidelity::Approximate;
        }
        plan.fates = self.fates;
        plan.alpha = self.alpha;
        plan.warnings = self.warnings;
        Ok(plan)
    }

    /// The tensors of one module under their keys.
    fn outputs(&self, s: &Spelled<'_>, out: &mut Vec<Output>) {
        let flat = s.place.prefix.ends_with('_');
        let base = if flat {
            format!("{}{}", s.place.prefix, s.path.replace('.', "_"))
        } else {
            format!("{}{}", s.place.prefix, s.path)
        };
        let param = s.row.params[s.place.namespace].as_deref();
        let mut push = |slot: Slot, tensor: Tensor| {
            let suffix = s.dialect.suffix(slot, param).expect("checked by unspellable");
            out.push(Output { key: format!("{base}{suffix}"), tensor });
        };
        for (&slot, tensor) in &s.module.tensors {
            let tensor = self.typed(tensor.clone());
            match slot {
                Slot::DiffB if !s.dialect.spelling.contains_key(&Slot::DiffB) => push(Slot::Bias, tensor),
                Slot::Magnitude if s.dialect.column_magnitude => {
                    let rows = tensor.rows();
                    push(slot, tensor.reshaped(vec![rows, 1]));
                }
                _ => push(slot, tensor),
            }
        }
        if s.dialect.spelling.contains_key(&Slot::Alpha) {
            let writes = s.dialect.alpha == AlphaPolicy::Tensor || s.module.kind != Kind::Lora;
            match (&s.module.alpha, s.module.rank()) {
                (Some(alpha), _) if writes => push(
                    Slot::Alpha,
                    if alpha.dtype().is_fp8() { alpha.clone().cast(Dtype::F32) } else { alpha.clone() },
                ),
                (None, Some(rank)) if writes => {
                    push(Slot::Alpha, Tensor::scalar((s.module.scale * rank as f64) as f32))
                }
                _ => {}
            }
        }
        // Wider inputs than the base model has: ComfyUI pads the base weight to the shape given here.
        let wide = s.module.get(Slot::Down).filter(|d| s.row.inputs.first().is_some_and(|&base| d.cols() > base));
        if let (Some(down), true) = (wide, s.dialect.spelling.contains_key(&Slot::Reshape)) {
            let shape = [s.row.output() as i64, down.cols() as i64];
            let bytes: Vec<u8> = shape.iter().flat_map(|n| n.to_le_bytes()).collect();
            push(Slot::Reshape, Tensor::constant(Dtype::I64, vec![2], bytes));
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

    fn unknown_keys(&mut self, plan: &mut Plan) -> Result<()> {
        let source = &self.adapter.source;
        for &index in &self.adapter.unknown {
            let name = &source.tensors()[index].name;
            match self.options.unknown {
                Unknown::Error => {
                    let read_as = self.adapter.detection.dialect_name(&self.adapter.registry);
                    let mut message =
                        format!("`{name}` is unknown (file read as {read_as} {})", self.adapter.family_table().name);
                    if let Some(nearest) = self.adapter.registry.nearest(name) {
                        message += &format!("; the nearest known key is `{nearest}`");
                    }
                    return Err(Error::new(Code::UnknownKey, message).key(name).at(source.path()));
                }
                Unknown::Drop => {
                    self.fates[index] = Fate::Dropped;
                    self.lost.push(name.clone());
                    self.warnings.push(Warning::new("unknown-key", None, format!("left out: `{name}`")));
                }
                Unknown::Keep => {
                    self.fates[index] = Fate::Carried;
                    if let Some(reserved) = self.dialect.reserved.iter().find(|r| name.contains(r.as_str())) {
                        let detail = format!(
                            "`{name}` holds `{reserved}`, which makes {} take the file for another dialect",
                            self.dialect.name
                        );
                        self.warnings.push(Warning::new("diverting-key", None, detail));
                    }
                    plan.outputs.push(Output { key: name.clone(), tensor: Tensor::input(source, index) });
                }
            }
        }
        let mut keys: Vec<&str> = plan.outputs.iter().map(|o| o.key.as_str()).collect();
        keys.sort_unstable();
        match keys.windows(2).find(|w| w[0] == w[1]) {
            Some(twice) => {
                Err(Error::new(Code::DuplicateModule, format!("two tensors would be written as `{}`", twice[0]))
                    .at(source.path()))
            }
            None => Ok(()),
        }
    }
}

/// Why a fused module stayed whole: the reason of the first part that cannot be cut. Others of its parts may well be
/// cut, so asking for one of them is not enough.
fn refused_cut(row: &Row, module: &Module) -> Result<Module, Refusal> {
    let parts: Arc<[usize]> = Arc::from(row.outputs.as_slice());
    let refused = (0..parts.len()).find_map(|part| module.cut(&parts, part).err());
    Err(refused.unwrap_or_else(|| Refusal("cannot be cut into parts".to_owned())))
}

/// What the tensors from `start` on say about fidelity and rounding.
fn judge(plan: &mut Plan, start: usize, regrouped: bool) {
    for output in &plan.outputs[start..] {
        let fidelity = match &output.tensor {
            t if t.is_narrowed() => Fidelity::Approximate,
            t if t.is_scaled() => Fidelity::Rescaled,
            _ if regrouped => Fidelity::Regrouped,
            _ => Fidelity::Exact,
        };
        plan.fidelity = plan.fidelity.max(fidelity);
        plan.rounding = plan.rounding.max(output.tensor.rounding());
    }
}
