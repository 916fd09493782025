//! From the branches of a native adapter back to canonical modules.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slotted;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::assemble::Layout;
use super::base::{Base, BaseLayer, Smoothing};
use super::manifest::{Entry, Manifest};
use super::pack::{Branch, Side, TILE, unpack};
use super::scaling::{divide_columns, multiply_rows, multiply_vector};
use super::vector::unpack_vector;
use crate::adapter::{Adapter, Address, ModuleKey, Placed};
use crate::decode::decode;
use crate::detect::Given;
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::kind::{Kind, Module, Slot};
use crate::table::pattern::Variables;
use crate::table::{Layer, Native, Registry};
use crate::tensor::Tensor;

/// What is special about an adapter that was read from packed branches.
#[derive(Debug, Clone)]
pub struct NativeInfo {
    /// What the file says of itself.
    pub manifest: Option<Manifest>,
    /// The one of its adapters that this is, if it was taken apart.
    pub entry: Option<Entry>,
    /// Whether its modules still have the base's own ranks in them, or its smoothing: only with the base can they go.
    pub needs_base: bool,
    /// Names of its layers.
    pub layers: Vec<String>,
    /// Layers by total rank, the base's included.
    pub ranks: BTreeMap<usize, usize>,
    /// Tensors that make no module: branches that are the base's alone, and zeros.
    pub spent: Vec<usize>,
}

/// A layer of a file.
struct Found {
    layer: usize,
    variables: Variables,
    name: String,
    down: Option<usize>,
    up: Option<usize>,
}

/// The keys of a native adapter.
pub struct Branches {
    pub(crate) dialect: usize,
    pub(crate) family: usize,
    /// Which tensors are branches and bias differences.
    pub(crate) owned: Vec<bool>,
    native: usize,
    layers: Vec<Found>,
    vectors: Vec<Vector>,
}

/// A bias difference of a file.
struct Vector {
    /// The canonical modules that it belongs to, with their rows.
    parts: Vec<(String, usize)>,
    /// The layer, if it is that of one.
    layer: Option<(usize, Variables)>,
    /// The tensor.
    index: usize,
}

/// The branches of a file, if it has any.
pub(crate) fn recognise(registry: &Registry, source: &Source) -> Result<Option<Branches>> {
    for (dialect, table) in registry.dialects.iter().enumerate() {
        for (number, native) in table.natives.iter().enumerate() {
            let Some(branches) = find(registry, source, native) else { continue };
            if let Some(weight) = source.tensors().iter().find(|t| t.name.ends_with(".qweight")) {
                let message =
                    format!("`{}` is a quantized weight: this is a base checkpoint, not an adapter", weight.name);
                let hint = "name it with `--base`, and the adapter as the input";
                return Err(Error::new(Code::NotAnAdapter, message).key(&weight.name).at(source.path()).hint(hint));
            }
            return Ok(Some(Branches { dialect, native: number, ..branches }));
        }
    }
    Ok(None)
}

fn find(registry: &Registry, source: &Source, native: &Native) -> Option<Branches> {
    let component = &registry.families[native.family].components[native.component];
    let mut layers: BTreeMap<String, Found> = BTreeMap::new();
    let mut owned = vec![false; source.tensors().len()];
    for (index, info) in source.tensors().iter().enumerate() {
        let Some((name, last)) = info.name.rsplit_once('.') else { continue };
        let (down, up) = (native.down[0] == last, native.up[0] == last);
        if !(down || up) {
            continue;
        }
        let Some((layer, variables)) = native.find(component, name) else { continue };
        let found = layers.entry(name.to_owned()).or_insert_with(|| Found {
            layer,
            variables,
            name: name.to_owned(),
            down: None,
            up: None,
        });
        *(if down { &mut found.down } else { &mut found.up }) = Some(index);
        owned[index] = true;
    }
    // Modulation layers have the names of plain modules; they are branches only beside others.
    if !layers.values().any(|f| native.layers[f.layer].interleave.is_none()) {
        return None;
    }
    let mut vectors = Vec::new();
    for (index, info) in source.tensors().iter().enumerate() {
        let Some(path) = info.name.strip_suffix(".bias").filter(|_| info.shape.len() == 1) else { continue };
        let layer = native.find_vector(component, path);
        let parts = match &layer {
            Some((layer, variables)) => {
                let layer = &native.layers[*layer];
                layer.modules.iter().map(|m| m.render(variables)).zip(layer.outputs.iter().copied()).collect()
            }
            None => match component.canonical(path) {
                Some((row, part, _)) => vec![(path.to_owned(), component.rows[row].outputs[part])],
                None => continue,
            },
        };
        owned[index] = true;
        vectors.push(Vector { parts, layer, index });
    }
    let layers = layers.into_values().collect();
    Some(Branches { dialect: 0, family: native.family, owned, native: 0, layers, vectors })
}

/// How to read the branches.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Reading<'b> {
    /// The base, whose ranks and smoothing are taken off.
    pub(crate) base: Option<&'b Base>,
    /// Only the adapter of that number in the manifest.
    pub(crate) only: Option<usize>,
}

impl Branches {
    /// The ranks of the base that a file with metadata carries in itself.
    fn own_base(&self, registry: &Registry, source: &Arc<Source>, manifest: &Manifest) -> Result<Base> {
        let native = &registry.dialects[self.dialect].natives[self.native];
        let input = |index: usize| Tensor::input(source, index);
        let mut layers = BTreeMap::new();
        for found in &self.layers {
            let (Some(down), Some(up)) = (found.down, found.up) else { continue };
            let ranks = manifest.base.rank(&found.name);
            let sound = ranks.is_multiple_of(TILE) && ranks <= input(down).cols() && ranks <= input(up).cols();
            if !sound {
                let message =
                    format!("the metadata gives `{}` {ranks} ranks of the base, which it does not have", found.name);
                return Err(Error::new(Code::InvalidPacking, message)
                    .key(&source.tensors()[down].name)
                    .at(source.path()));
            }
            let branch = |index: usize| Branch { packed: input(index), ranks };
            let layer = &native.layers[found.layer];
            let vector = layer.vector.as_ref().map(|v| format!("{}.bias", v.render(&found.variables)));
            let bias = vector.and_then(|v| source.tensors().iter().find(|t| t.name == v)).map(|t| t.dtype);
            let plain = layer.interleave.is_none();
            let held = BaseLayer {
                branch: (plain && ranks > 0).then(|| (branch(down), branch(up))),
                dtype: Some(input(down).dtype()),
                bias,
                smoothing: Smoothing::Plain,
            };
            layers.insert(found.name.clone(), held);
        }
        Ok(Base::within(source, &registry.families[self.family].name, manifest, layers))
    }

    /// Adds the modules of the branches to an adapter that has all others. Problems of single layers are returned.
    pub(crate) fn place(&self, adapter: &mut Adapter, reading: Reading<'_>) -> Result<Vec<Error>> {
        let manifest = Manifest::of(&adapter.source)?;
        if let (Some(base), Some(manifest)) = (reading.base, &manifest)
            && base.fingerprint() != manifest.base.fingerprint
        {
            let message = format!(
                "it was made for `{}` (fingerprint {}), the base has {}",
                manifest.base.name,
                manifest.base.fingerprint,
                base.fingerprint()
            );
            return Err(Error::new(Code::WrongBase, message).at(adapter.source.path()));
        }
        if let (Some(base), Some(manifest)) = (reading.base, &manifest)
            && base.smoothed() != manifest.base.smoothed
        {
            let message = "the base tells another smoothing of its attention outputs than the file was made for";
            return Err(Error::new(Code::WrongBase, message).at(adapter.source.path()));
        }
        // What a file carries of its base says nothing that its metadata does not say, and has no smoothing factors.
        let reading = Reading { base: reading.base.filter(|b| !b.is_carried()), ..reading };
        let entry = match (reading.only, &manifest) {
            (Some(number), Some(manifest)) => manifest.adapters.get(number).cloned(),
            _ => None,
        };
        let smoothed = manifest.as_ref().is_some_and(|m| m.base.smoothed);
        adapter.native = Some(NativeInfo {
            needs_base: reading.base.is_none() && (manifest.is_none() || smoothed),
            manifest,
            entry,
            layers: self.layers.iter().map(|l| l.name.clone()).collect(),
            ranks: BTreeMap::new(),
            spent: Vec::new(),
        });
        if adapter.native.as_ref().is_some_and(|n| n.entry.is_some()) {
            keep_own(adapter)?;
        }
        let registry = Arc::clone(&adapter.registry);
        let native = &registry.dialects[self.dialect].natives[self.native];
        let mut problems = Vec::new();
        for found in &self.layers {
            match self.layer(adapter, native, found, reading.base) {
                Err(problem) if problem.code() == Code::WrongBase => return Err(problem),
                Err(problem) => problems.push(problem),
                Ok(modules) => {
                    for (path, module) in modules {
                        add(adapter, native.component, &path, module)?;
                    }
                }
            }
        }
        let fed = reading.base.map(|b| b.fed(native, adapter.component(native.component))).unwrap_or_default();
        for (path, factor) in &fed {
            let key = ModuleKey { component: native.component, path: path.clone() };
            if let Some(placed) = adapter.modules.get_mut(&key) {
                multiply_rows(&mut placed.module, factor);
            }
        }
        self.vectors(adapter, reading.base, &fed, &mut problems);
        if let (Some(number), Some(manifest)) =
            (reading.only, adapter.native.as_mut().and_then(|n| n.manifest.as_mut()))
        {
            // Many adapters of one file would each remember all others.
            manifest.adapters = manifest.adapters.get(number).cloned().into_iter().collect();
        }
        Ok(problems)
    }

    /// Adds the bias differences.
    fn vectors(
        &self,
        adapter: &mut Adapter,
        base: Option<&Base>,
        fed: &BTreeMap<String, Arc<[f64]>>,
        problems: &mut Vec<Error>,
    ) {
        let registry = Arc::clone(&adapter.registry);
        let native = &registry.dialects[self.dialect].natives[self.native];
        for found in &self.vectors {
            let factor = match &found.layer {
                Some((l, variables)) => base.and_then(|b| b.folded_into(native, &native.layers[*l], variables)),
                None => fed.get(&found.parts[0].0).map(|factor| &**factor),
            };
            if let Err(problem) = vector(adapter, native, found, factor) {
                problems.push(problem);
            }
        }
    }

    /// The canonical modules of one layer.
    fn layer(
        &self,
        adapter: &mut Adapter,
        native: &Native,
        found: &Found,
        base: Option<&Base>,
    ) -> Result<Vec<(String, Module)>> {
        let source = Arc::clone(&adapter.source);
        let name = |index: usize| source.tensors()[index].name.as_str();
        let (down, up) = match (found.down, found.up) {
            (Some(down), Some(up)) => (down, up),
            (alone, other) => {
                let key = name(alone.or(other).unwrap_or(0));
                return Err(Error::new(Code::UnpairedModule, format!("`{key}` lacks its partner")).key(key));
            }
        };
        let layer = &native.layers[found.layer];
        let (d, u) = (Tensor::input(&source, down), Tensor::input(&source, up));
        let (left, right) = match layer.interleave {
            Some(splits) if u.rows().is_multiple_of(splits) => (d.clone(), u.deinterleaved(splits)),
            Some(_) => (d.clone(), u.clone()),
            None => (unpack(&d, Side::Down, name(down))?, unpack(&u, Side::Up, name(up))?),
        };
        check_size(layer, &left, &right, name(down), name(up))?;
        let held = base.map(|b| {
            b.layer(&found.name).ok_or_else(|| {
                let message = format!("the base has no layer `{}`", found.name);
                Error::new(Code::WrongBase, message).key(name(down)).at(source.path())
            })
        });
        let held = held.transpose()?;
        let info = adapter.native.as_mut().ok_or_else(|| Error::new(Code::InvalidPacking, "not a native adapter"))?;
        *info.ranks.entry(left.rows()).or_default() += 1;
        if let (Some(held), None) = (held, &info.manifest) {
            check_branch(held, &d, &u, name(down)).map_err(|e| e.at(source.path()))?;
        }
        if let Some(manifest) = &info.manifest {
            check_ranges(manifest, layer, &found.name, left.rows()).map_err(|e| e.key(name(down)))?;
        }
        let ranges = own_ranks(info, held, &found.name, left.rows());
        let described = info.manifest.is_some();
        let exact = |r: Range<usize>| if described { r } else { trim(&left, &right, r) };
        let ranges: Vec<Range<usize>> = ranges.into_iter().map(exact).filter(|r| !r.is_empty()).collect();
        if ranges.is_empty() {
            info.spent.extend([down, up]);
            return Ok(Vec::new());
        }
        let downs: Vec<Tensor> = ranges.iter().map(|r| left.slice_rows(r.clone())).collect();
        let ups: Vec<Tensor> = ranges.iter().map(|r| right.slice_cols(r.clone())).collect();
        let factors = [(Slot::Down, Tensor::stack_rows(&downs)), (Slot::Up, Tensor::stack_cols(&ups))];
        let mut module = Module::new(Kind::Lora, BTreeMap::from(factors));
        module.inputs = vec![down, up];
        if let Some(Smoothing::Fused(factor)) = held.map(|l| &l.smoothing) {
            divide_columns(&mut module, factor);
        }
        let factor = base.and_then(|b| b.folded_into(native, layer, &found.variables));
        let modules = apart(layer, &found.variables, &module, factor);
        if let (true, Some(info)) = (modules.is_empty(), adapter.native.as_mut()) {
            info.spent.extend([down, up]);
        }
        Ok(modules)
    }
}

/// The ranks that the metadata gives a layer must be there: the base's own first, then those of one adapter after the
/// other.
fn check_ranges(manifest: &Manifest, layer: &Layer, name: &str, total: usize) -> Result<()> {
    let mut taken = if layer.interleave.is_none() { manifest.base.rank(name) } else { 0 };
    let mut sound = taken.is_multiple_of(TILE) && taken <= total;
    for range in manifest.adapters.iter().map(|a| a.range(name)).filter(|r| *r != (0..0)) {
        sound &= taken <= range.start && range.start < range.end && range.end <= total;
        taken = range.end;
    }
    if sound {
        return Ok(());
    }
    let message = format!("the metadata tells ranks of `{name}` that do not fit its {total}");
    Err(Error::new(Code::InvalidPacking, message))
}

/// The ranks of a layer that are not the base's: those of one adapter, of all, or all that there are.
fn own_ranks(info: &NativeInfo, held: Option<&BaseLayer>, layer: &str, total: usize) -> Vec<Range<usize>> {
    let within = |r: Range<usize>| r.start.min(total)..r.end.min(total);
    match (&info.entry, &info.manifest) {
        (Some(entry), _) => vec![within(entry.range(layer))],
        (None, Some(manifest)) => manifest.adapters.iter().map(|a| within(a.range(layer))).collect(),
        (None, None) => vec![within(held.map_or(0, BaseLayer::rank)..total)],
    }
}

/// Without the ranks at the end that are only there to fill a tile.
fn trim(down: &Tensor, up: &Tensor, range: Range<usize>) -> Range<usize> {
    let idle = |r: usize| down.is_zero(r..r + 1, 0..down.cols()) || up.is_zero(0..up.rows(), r..r + 1);
    let end = range.clone().rev().find(|r| !idle(*r)).map_or(range.start, |last| last + 1);
    range.start..end
}

fn check_size(layer: &Layer, down: &Tensor, up: &Tensor, down_name: &str, up_name: &str) -> Result<()> {
    let misfit = |name: &str, what: String| Err(Error::new(Code::ShapeMismatch, format!("`{name}` {what}")).key(name));
    if down.cols() != layer.input {
        return misfit(down_name, format!("has {} inputs, the layer {}", down.cols(), layer.input));
    }
    if up.rows() != layer.output() {
        return misfit(up_name, format!("has {} outputs, the layer {}", up.rows(), layer.output()));
    }
    if down.rows() != up.cols() {
        let message = format!("`{down_name}` has rank {}, `{up_name}` has rank {}", down.rows(), up.cols());
        return Err(Error::new(Code::RankMismatch, message).key(up_name));
    }
    Ok(())
}

/// Without metadata only the bytes can tell whether a file continues the branches of this base.
fn check_branch(held: &BaseLayer, down: &Tensor, up: &Tensor, key: &str) -> Result<()> {
    let Some((d, u)) = &held.branch else { return Ok(()) };
    let continues = |branch: &Branch, stored: &Tensor| {
        let tiles = |t: &Tensor| t.cols() / TILE * TILE * TILE * t.dtype().size();
        let (mine, whole) = (tiles(&branch.packed), tiles(stored));
        let (Some(a), Some(b)) = (branch.packed.contiguous(), stored.contiguous()) else { return false };
        branch.packed.dtype() == stored.dtype()
            && branch.packed.rows() == stored.rows()
            && mine > 0
            && mine <= whole
            && a.chunks_exact(mine).zip(b.chunks_exact(whole)).all(|(a, b)| a == &b[..mine])
    };
    if continues(d, down) && continues(u, up) {
        return Ok(());
    }
    let message = format!("`{key}` does not start with the branch of the base");
    Err(Error::new(Code::WrongBase, message).key(key))
}

/// A layer as the canonical modules that make it; those that are zero are none.
fn apart(layer: &Layer, variables: &[u32], module: &Module, values: Option<&[f64]>) -> Vec<(String, Module)> {
    let outputs: Arc<[usize]> = Arc::from(layer.outputs.as_slice());
    let last = layer.modules.len() - 1;
    let mut out = Vec::new();
    for (part, template) in layer.modules.iter().enumerate() {
        let mut own = match last {
            0 => module.clone(),
            _ => match module.cut(&outputs, part) {
                Ok(own) => own.tightened(),
                Err(_) => continue,
            },
        };
        let Some(up) = own.get(Slot::Up).filter(|up| last == 0 || !up.is_zero(0..up.rows(), 0..up.cols())) else {
            continue;
        };
        debug_assert_eq!(up.rows(), layer.outputs[part]);
        if let (true, Some(factor)) = (part == last, values) {
            multiply_rows(&mut own, factor);
        }
        if let (Some(columns), Some(down)) = (&layer.columns, own.tensors.get_mut(&Slot::Down)) {
            let mut wide = Tensor::zeros(down.dtype(), vec![down.rows(), layer.width]);
            wide.put(down, (0, columns.start));
            *down = wide;
        }
        out.push((template.render(variables), own));
    }
    out
}

/// Adds a module; one that has another part of the inputs joins it there.
fn add(adapter: &mut Adapter, component: usize, path: &str, module: Module) -> Result<()> {
    let found = adapter.component(component).canonical(path);
    let (row, part, variables) =
        found.ok_or_else(|| Error::new(Code::UnknownKey, format!("no module is called `{path}`")))?;
    let address = Address { row, part: Some(part), namespace: 0, variables };
    match adapter.modules.entry(ModuleKey { component, path: path.to_owned() }) {
        Slotted::Vacant(entry) => drop(entry.insert(Placed { address, module })),
        Slotted::Occupied(mut entry) => {
            let there = &mut entry.get_mut().module;
            *there =
                there.beside(&module).map_err(|r| Error::new(Code::DuplicateModule, format!("`{path}` {}", r.0)))?;
        }
    }
    Ok(())
}

/// A bias difference, in the parts that its modules have.
fn vector(adapter: &mut Adapter, native: &Native, found: &Vector, factor: Option<&[f64]>) -> Result<()> {
    let component = native.component;
    let Vector { parts, index, .. } = found;
    let index = *index;
    let source = Arc::clone(&adapter.source);
    let key = source.tensors()[index].name.as_str();
    let whole = Tensor::input(&source, index);
    let rows: usize = parts.iter().map(|(_, n)| n).sum();
    if whole.rows() != rows {
        let message = format!("`{key}` has {} elements, its modules {rows} outputs", whole.rows());
        return Err(Error::new(Code::ShapeMismatch, message).key(key));
    }
    let packed = native.packed_vectors && found.layer.is_some();
    let whole = if packed { unpack_vector(&whole) } else { whole };
    let info = adapter.native.as_mut().ok_or_else(|| Error::new(Code::InvalidPacking, "not a native adapter"))?;
    let foreign = match (&info.entry, &info.manifest) {
        (Some(entry), Some(manifest)) => {
            let owners = manifest.adapters.iter().filter(|a| a.vectors.iter().any(|v| v == key)).count();
            let own = entry.vectors.iter().any(|v| v == key);
            if own && owners > 1 {
                let message = format!("`{key}` is the sum of {owners} adapters' biases, which cannot be told apart");
                let hint = "convert the file as a whole, or compose the original adapters anew";
                return Err(Error::new(Code::UnsupportedModule, message).key(key).hint(hint));
            }
            !own
        }
        _ => false,
    };
    if foreign || whole.is_zero(0..whole.rows(), 0..1) {
        info.spent.push(index);
        return Ok(());
    }
    let mut at = 0;
    for (number, (path, rows)) in parts.iter().enumerate() {
        let mut bias = whole.slice_rows(at..at + rows);
        at += rows;
        if let Some(factor) = factor.filter(|_| number + 1 == parts.len()) {
            bias = multiply_vector(&bias, factor);
        }
        let key = ModuleKey { component, path: path.clone() };
        if let Some(placed) = adapter.modules.get_mut(&key) {
            placed.module.tensors.insert(Slot::DiffB, bias);
            placed.module.inputs.push(index);
        } else if !bias.is_zero(0..bias.rows(), 0..1) {
            let mut module = Module::new(Kind::Bias, BTreeMap::from([(Slot::DiffB, bias)]));
            module.inputs = vec![index];
            add(adapter, component, path, module)?;
        }
    }
    Ok(())
}

/// Of the modules outside the layers, those of one adapter, and of each only its own ranks.
fn keep_own(adapter: &mut Adapter) -> Result<()> {
    let Some(entry) = adapter.native.as_ref().and_then(|n| n.entry.clone()) else { return Ok(()) };
    let manifest = adapter.native.as_ref().and_then(|n| n.manifest.clone());
    let owners = |name: &String| manifest.iter().flat_map(|m| &m.adapters).filter(|a| a.vectors.contains(name)).count();
    let modules = std::mem::take(&mut adapter.modules);
    let mut spent = Vec::new();
    for (key, mut placed) in modules {
        let name = entry_name(adapter, &key);
        let range = entry.range(&name);
        let module = &mut placed.module;
        let factors = module.tensors.get(&Slot::Down).zip(module.tensors.get(&Slot::Up));
        let keep = match factors {
            Some((down, up)) if range.end <= down.rows() && !range.is_empty() => {
                let own = [(Slot::Down, down.slice_rows(range.clone())), (Slot::Up, up.slice_cols(range))];
                module.tensors.extend(own);
                module.alpha = None;
                true
            }
            Some(_) => false,
            None if entry.vectors.contains(&name) && owners(&name) > 1 => {
                let message = format!(
                    "`{name}` is the sum of {} adapters' differences, which cannot be told apart",
                    owners(&name)
                );
                return Err(Error::new(Code::UnsupportedModule, message).at(adapter.source.path()));
            }
            None => entry.vectors.contains(&name),
        };
        if keep {
            adapter.modules.insert(key, placed);
        } else {
            spent.extend(placed.module.inputs);
        }
    }
    if let Some(info) = adapter.native.as_mut() {
        info.spent.extend(spent);
    }
    Ok(())
}

/// What a manifest calls a module outside the layers: modules of the main component by their path alone.
pub(crate) fn entry_name(adapter: &Adapter, key: &ModuleKey) -> String {
    if key.component == 0 { key.path.clone() } else { adapter.display(key) }
}

/// A native file taken apart.
#[derive(Debug)]
pub struct Disassembled {
    /// Its adapters, in the order of their ranks.
    pub adapters: Vec<Adapter>,
    /// The base whose branches they continue: the one given, or those ranks of the file itself.
    pub base: Arc<Base>,
    /// Where each adapter's ranks start.
    pub layout: Layout,
}

/// Takes a native file apart into its adapters. Without metadata that needs the base, and gives one adapter.
pub fn disassemble(registry: &Arc<Registry>, source: &Arc<Source>, base: Option<Arc<Base>>) -> Result<Disassembled> {
    let Some(branches) = recognise(registry, source)? else {
        return Err(Error::new(Code::InvalidArgument, "it is no native file").at(source.path()));
    };
    let given = |base: &Option<Arc<Base>>, only: Option<usize>| Given {
        families: vec![branches.family],
        base: base.clone(),
        only,
        ..Given::default()
    };
    let Some(manifest) = Manifest::of(source)? else {
        let Some(base) = base else { return Err(needs_base(source.path())) };
        let adapter = decode(registry, source, &given(&Some(Arc::clone(&base)), None))?;
        return Ok(Disassembled { adapters: vec![adapter], base, layout: Layout::Packed });
    };
    if manifest.adapters.is_empty() {
        return Err(Error::new(Code::NoModules, "its metadata names no adapter").at(source.path()));
    }
    // What is wrong with the file as a whole is said before any part of it is read.
    decode(registry, source, &given(&base, None))?;
    let numbers = 0..manifest.adapters.len();
    let adapters = numbers.map(|n| decode(registry, source, &given(&base, Some(n)))).collect::<Result<_>>()?;
    let base = match base {
        Some(base) => base,
        None => Arc::new(branches.own_base(registry, source, &manifest)?),
    };
    Ok(Disassembled { adapters, base, layout: Layout::from_name(&manifest.layout).unwrap_or_default() })
}

/// The error of a native file whose branches cannot be told from the base's.
pub(crate) fn needs_base(path: &Path) -> Error {
    let message = "it is a native file, whose ranks begin with those of its quantized base";
    let hint = "add `--base FILE`, the checkpoint it was made for, so that they can be taken off; or name the original adapter";
    Error::new(Code::BaseNeeded, message).at(path).hint(hint)
}
