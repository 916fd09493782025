//! From keys to the canonical adapter. Every tensor ends in a module, as a note, or in the list of unknown ones.

mod shapes;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::adapter::{Adapter, Address, ModuleKey, Placed};
use crate::alpha::{AlphaConfig, noted_alpha, read_alpha};
use crate::detect::{Given, Meaning, detect, family_warning};
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::kind::{AlphaSource, Kind, Module, Refusal, Slot, rank_of};
use crate::native::Reading;
use crate::report::Warning;
use crate::table::{AlphaPolicy, Hit, Op, Registry, Row, SuffixMatch};
use crate::tensor::Tensor;

/// The tensors of one module as the file groups them: by prefix and address.
struct Group<'s> {
    hit: Hit,
    slots: BTreeMap<Slot, (usize, SuffixMatch<'s>)>,
    /// The first claim under the same name, if this is a further one.
    first: Option<usize>,
}

impl Group<'_> {
    /// Whether a tensor belongs to this claim: its slot is free, and of a pair both halves are spelled alike.
    fn takes(&self, slot: Slot, suffix: &SuffixMatch<'_>) -> bool {
        let other = match slot {
            Slot::Down => Slot::Up,
            Slot::Up => Slot::Down,
            _ => return !self.slots.contains_key(&slot),
        };
        !self.slots.contains_key(&slot) && self.slots.get(&other).is_none_or(|(_, half)| half.is_paired_with(suffix))
    }
}

/// An alpha is the module's, whatever the spelling of its factors: further claims under one name have it too.
fn share_alphas(groups: &mut [Group<'_>]) {
    for at in 0..groups.len() {
        let alpha = groups[at].first.and_then(|first| groups[first].slots.get(&Slot::Alpha)).cloned();
        if let Some(alpha) = alpha {
            groups[at].slots.entry(Slot::Alpha).or_insert(alpha);
        }
    }
}

/// Reads an adapter; the first problem is an error. Unknown keys are none: they are in [`Adapter::unknown`].
pub fn decode(registry: &Arc<Registry>, source: &Arc<Source>, given: &Given) -> Result<Adapter> {
    let (adapter, problems) = decode_lenient(registry, source, given)?;
    match problems.into_iter().next() {
        Some(problem) => Err(problem),
        None => Ok(adapter),
    }
}

/// Reads what can be read and returns the problems beside it.
pub fn decode_lenient(registry: &Arc<Registry>, source: &Arc<Source>, given: &Given) -> Result<(Adapter, Vec<Error>)> {
    let reading = (given.base.clone(), given.only);
    let (detection, meanings, branches) = detect(registry, source, given)?;
    let config = peft_config(registry, detection.family, source, &meanings)?;
    let alphas = AlphaConfig::read(source, config.as_ref().map(|(p, text)| (p.as_path(), text.as_str())))?;
    let mut adapter = Adapter {
        registry: Arc::clone(registry),
        source: Arc::clone(source),
        family: detection.family,
        modules: BTreeMap::new(),
        unknown: (0..meanings.len())
            .filter(|&i| meanings[i].is_none() && !branches.as_ref().is_some_and(|b| b.owned[i]))
            .collect(),
        warnings: family_warning(registry, &detection).into_iter().collect(),
        detection,
        native: None,
        expansion: None,
    };
    let mut decoder =
        Decoder { source, alphas: &alphas, problems: Vec::new(), conflicts: Vec::new(), zeros: Vec::new() };
    for group in decoder.group(&meanings) {
        decoder.place(&mut adapter, group);
    }
    if let Some(branches) = branches {
        let reading = Reading { base: reading.0.as_deref(), only: reading.1 };
        decoder.problems.extend(branches.place(&mut adapter, reading)?);
    }
    decoder.summarise(&mut adapter);
    let problems = decoder.problems.into_iter().map(|e| e.at(source.path())).collect();
    Ok((adapter, problems))
}

/// `adapter_config.json` beside the file, for files in the dialect that keeps its scale there.
fn peft_config(
    registry: &Registry,
    family: usize,
    source: &Source,
    meanings: &[Meaning<'_>],
) -> Result<Option<(PathBuf, String)>> {
    let keeps_config = |prefix: &str| {
        let dialects = registry.dialects.iter().filter(|d| d.alpha == AlphaPolicy::Config);
        dialects.flat_map(|d| d.places.of(family)).any(|p| p.prefix == prefix || p.also.iter().any(|a| a == prefix))
    };
    let path = source.path();
    let named = path.file_name().is_some_and(|n| n == "adapter_model.safetensors");
    if !named && !meanings.iter().flatten().any(|(_, hit)| keeps_config(&hit.prefix)) {
        return Ok(None);
    }
    source.beside("adapter_config.json")
}

struct Decoder<'a> {
    source: &'a Arc<Source>,
    alphas: &'a AlphaConfig,
    problems: Vec<Error>,
    /// Modules whose alpha tensor contradicts the metadata.
    conflicts: Vec<String>,
    /// Modules whose alpha tensor is zero.
    zeros: Vec<String>,
}

impl Decoder<'_> {
    fn group<'s>(&mut self, meanings: &[Meaning<'s>]) -> Vec<Group<'s>> {
        let mut groups: Vec<Group<'s>> = Vec::new();
        // The path as written belongs to the key: `attn_to_q` and `attn_to_q_` are two claims on one module. So do
        // two spellings of one slot, of which the second opens a further claim.
        type GroupKey<'k> = (&'k str, usize, usize, Option<usize>, bool, usize);
        let mut index: FxHashMap<GroupKey<'s>, usize> = FxHashMap::default();
        let mut adapter: Option<(&str, usize)> = None;
        for (i, meaning) in meanings.iter().enumerate() {
            let Some((read, hit)) = meaning else { continue };
            if let Some(name) = read.suffix.adapter {
                let (first, at) = *adapter.get_or_insert((name, i));
                if first != name {
                    self.report_second_adapter((first, at), (name, i));
                    continue;
                }
            }
            let slot = self.exact_slot(read.suffix.slot, i);
            let mut first = None;
            for claim in 0.. {
                let key = (read.suffix.base, hit.component, hit.row, hit.part, hit.with_param, claim);
                let at = *index.entry(key).or_insert_with(|| {
                    groups.push(Group { hit: hit.clone(), slots: BTreeMap::new(), first });
                    groups.len() - 1
                });
                first = first.or(Some(at));
                if groups[at].takes(slot, &read.suffix) {
                    groups[at].slots.insert(slot, (i, read.suffix.clone()));
                    break;
                }
            }
        }
        share_alphas(&mut groups);
        groups
    }

    /// Once a pair: further keys of the second adapter say nothing new.
    fn report_second_adapter(&mut self, first: (&str, usize), second: (&str, usize)) {
        if self.problems.iter().any(|p| p.code() == Code::SeveralAdapters) {
            return;
        }
        let key = |at: usize| self.source.tensors()[at].name.as_str();
        let (one, two) = (key(first.1), key(second.1));
        let message = format!("the file holds two adapters, `{}` (`{one}`) and `{}` (`{two}`)", first.0, second.0);
        self.problems.push(Error::new(Code::SeveralAdapters, message).key(two));
    }

    /// Which magnitude it is shows only in the shape: `[1, in]` is over the input axis.
    fn exact_slot(&self, slot: Slot, tensor: usize) -> Slot {
        let shape = &self.source.tensors()[tensor].shape;
        match (slot, shape.as_slice()) {
            (Slot::Magnitude, [1, input, ..]) if *input > 1 => Slot::MagnitudeIn,
            _ => slot,
        }
    }

    fn place(&mut self, adapter: &mut Adapter, group: Group<'_>) {
        let component = group.hit.component;
        let row = adapter.component(component).rows[group.hit.row].clone();
        let module = match self.build(adapter, &group, &row) {
            Ok(module) => module,
            Err(problem) => return self.problems.push(problem),
        };
        for (path, address, module) in canonical(&group.hit, &row, module) {
            let key = ModuleKey { component, path };
            match adapter.modules.entry(key) {
                Entry::Vacant(entry) => drop(entry.insert(Placed { address, module })),
                Entry::Occupied(mut entry) => match entry.get().module.plus(&module) {
                    Ok(sum) => {
                        entry.get_mut().module = sum;
                        let name = format!(
                            "{}.{}",
                            adapter.registry.families[adapter.family].components[component].name,
                            entry.key().path
                        );
                        let detail = "several keys claim this module; their ranks stand side by side, which adds them";
                        adapter.warnings.push(Warning::new("added-contributions", Some(name), detail));
                    }
                    Err(Refusal(reason)) => {
                        let (tensor, _) = group.slots.values().next().expect("a group has a key");
                        let error = Error::new(Code::DuplicateModule, format!("`{}` {reason}", entry.key().path));
                        self.problems.push(error.key(&self.source.tensors()[*tensor].name));
                    }
                },
            }
        }
    }

    /// One module of the file.
    fn build(&mut self, adapter: &Adapter, group: &Group<'_>, row: &Row) -> Result<Module> {
        let kind = self.kind(group)?;
        self.check_complete(adapter, group, kind)?;
        let mut tensors: BTreeMap<Slot, Tensor> = BTreeMap::new();
        for (&slot, (index, _)) in &group.slots {
            if !matches!(slot, Slot::Alpha | Slot::Reshape) {
                let tensor = Tensor::input(self.source, *index);
                // Of a convolution, or beside a core, 1x1 is what a factor looks like.
                let convolution = group.slots.contains_key(&Slot::Mid) || !row.kernel.is_empty();
                tensors.insert(slot, if convolution { tensor } else { as_matrix(slot, tensor) });
            }
        }
        shapes::check(self.source, group, row, kind, &tensors)?;
        if let Some(magnitude) = tensors.remove(&Slot::Magnitude) {
            let rows = magnitude.rows();
            tensors.insert(Slot::Magnitude, magnitude.reshaped(vec![rows]));
        }
        let mut module = Module::new(kind, tensors);
        module.inputs = group.slots.values().map(|(index, _)| *index).collect();
        self.resolve_scale(adapter, group, row, &mut module)?;
        if let Some(bias) = module.tensors.remove(&Slot::Bias) {
            // PEFT multiplies the bias of `lora_B` with the scale; a bias difference stands by itself.
            module.tensors.insert(Slot::DiffB, bias.scaled(module.scale));
        }
        Ok(module)
    }

    fn kind(&self, group: &Group<'_>) -> Result<Kind> {
        let mut kinds: Vec<(Kind, usize)> = Vec::new();
        for (slot, (index, _)) in &group.slots {
            if let Some(kind) = slot.kind()
                && !kinds.iter().any(|(k, _)| *k == kind)
            {
                kinds.push((kind, *index));
            }
        }
        let name = |index: usize| self.source.tensors()[index].name.as_str();
        let has_bias = group.slots.contains_key(&Slot::DiffB) || group.slots.contains_key(&Slot::Bias);
        match kinds.as_slice() {
            [(kind, _)] => Ok(*kind),
            [] if has_bias => Ok(Kind::Bias),
            [] => {
                let (index, _) = group.slots.values().next().expect("a group has a key");
                let message = format!("`{}` stands alone: its module has no factors", name(*index));
                Err(Error::new(Code::UnpairedModule, message).key(name(*index)))
            }
            [(a, i), (b, j), ..] => {
                let message =
                    format!("`{}` is {} but `{}` of the same module is {}", name(*i), a.name(), name(*j), b.name());
                Err(Error::new(Code::MixedKinds, message).key(name(*j)))
            }
        }
    }

    fn check_complete(&self, adapter: &Adapter, group: &Group<'_>, kind: Kind) -> Result<()> {
        for choices in Slot::required(kind) {
            if choices.iter().any(|all| all.iter().all(|s| group.slots.contains_key(s))) {
                continue;
            }
            // Complain about the choice that was begun, if one was.
            let begun =
                choices.iter().find(|all| all.iter().any(|s| group.slots.contains_key(s))).unwrap_or(&choices[0]);
            let missing = begun.iter().find(|s| !group.slots.contains_key(s)).expect("the choice is incomplete");
            let (index, found) = group
                .slots
                .iter()
                .find(|(s, _)| s.kind() == Some(kind))
                .map(|(_, v)| v)
                .expect("the kind came from a slot");
            if kind == Kind::Ia3 {
                let name = &self.source.tensors()[*index].name;
                let message = format!("`{name}` is a whole weight: this looks like a model, not an adapter to one");
                return Err(Error::new(Code::NotAnAdapter, message).key(name));
            }
            let have = &self.source.tensors()[*index].name;
            let want = adapter.registry.partner(found, *missing);
            return Err(Error::new(Code::UnpairedModule, format!("`{have}` lacks its partner `{want}`")).key(have));
        }
        Ok(())
    }

    fn resolve_scale(&mut self, adapter: &Adapter, group: &Group<'_>, row: &Row, module: &mut Module) -> Result<()> {
        let index = group.slots.get(&Slot::Alpha).map(|(index, _)| *index);
        module.alpha = index.map(|i| Tensor::input(self.source, i));
        // Without a decomposed factor there is no rank to divide by, and trainers store any number there.
        let Some(rank) = rank_of(&module.tensors) else {
            if let (Some(factor), Some(w1)) = (self.alphas.full_lokr(), module.tensors.get_mut(&Slot::LokrW1)) {
                *w1 = w1.clone().scaled(factor);
            }
            return Ok(());
        };
        let tensor = index.map(|i| read_alpha(self.source, i)).transpose()?;
        // PEFT's patterns are over the names that the file itself uses.
        let own = match (group.hit.namespace, group.hit.part) {
            (0, Some(part)) => Some(&row.canonical[part]),
            (namespace, _) => row.names[namespace].as_ref(),
        };
        let path = own.map_or_else(String::new, |t| t.render(&group.hit.variables));
        let component = &adapter.component(group.hit.component).name;
        let scale = self.alphas.resolve(component, &path, rank.max(1), tensor);
        module.scale = scale.value;
        module.alpha_source = scale.source;
        if scale.conflict.is_some() {
            self.conflicts.push(path.clone());
        }
        if scale.zero {
            module.alpha = None;
            self.zeros.push(path);
        }
        Ok(())
    }

    fn summarise(&mut self, adapter: &mut Adapter) {
        let texts = [
            (&self.conflicts, "alpha-conflict", "the alpha tensor differs from the metadata; the tensor counts"),
            (&self.zeros, "zero-alpha", "the alpha tensor is zero, which trainers read as \"not set\""),
        ];
        let bare = |p: &&Placed| p.module.rank().is_some() && p.module.alpha_source == AlphaSource::Rank;
        let without = adapter.modules.values().filter(bare).count();
        if let (Some(alpha), 1..) = (noted_alpha(self.source), without) {
            let detail = format!(
                "the header notes alpha {alpha}, but {without} modules have no alpha tensor: they count at scale 1, as in every loader"
            );
            adapter.warnings.push(Warning::new("alpha-metadata-unused", None, detail));
        }
        for (modules, code, text) in texts {
            if let Some(first) = modules.first() {
                let detail = format!("in {} modules, the first `{first}`: {text}", modules.len());
                adapter.warnings.push(Warning::new(code, Some(first.clone()), detail));
            }
        }
    }
}

/// Factors of a linear layer that a trainer saved as those of a 1x1 convolution are matrices again.
fn as_matrix(slot: Slot, tensor: Tensor) -> Tensor {
    match (slot, tensor.shape()) {
        (Slot::Down | Slot::Up, &[rows, cols, 1, 1]) => tensor.reshaped(vec![rows, cols]),
        _ => tensor,
    }
}

/// A module of the file as canonical modules. What its kind does not let cut or permute stays whole under its own name.
fn canonical(hit: &Hit, row: &Row, module: Module) -> Vec<(String, Address, Module)> {
    let address = |part: Option<usize>, namespace: usize| Address {
        row: hit.row,
        part,
        namespace,
        variables: hit.variables.clone(),
    };
    let whole = |module: Module| {
        let name = row.names[hit.namespace].as_ref().expect("the hit came from this name");
        vec![(name.render(&hit.variables), address(hit.part, hit.namespace), module)]
    };
    let one =
        |part: usize, module: Module| (row.canonical[part].render(&hit.variables), address(Some(part), 0), module);
    match (row.op, hit.namespace, hit.part) {
        (Op::Fuse, _, None) => {
            let parts: Arc<[usize]> = Arc::from(row.outputs.as_slice());
            let cut: Result<Vec<Module>, Refusal> = (0..parts.len()).map(|j| module.cut(&parts, j)).collect();
            match cut {
                Ok(cut) => cut.into_iter().enumerate().map(|(j, m)| one(j, m)).collect(),
                Err(_) => whole(module),
            }
        }
        (Op::SwapHalves, 1.., _) => match module.swap_halves() {
            Ok(swapped) => vec![one(0, swapped)],
            Err(_) => whole(module),
        },
        (_, _, part) => vec![one(part.unwrap_or(0), module)],
    }
}
