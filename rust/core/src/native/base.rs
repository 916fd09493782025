//! The quantized checkpoint behind a native adapter. Only its header and the tensors that matter are touched.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};
use sha2::{Digest, Sha256};

use super::manifest::Manifest;
use super::pack::{Branch, TILE};
use super::vector::vector_position;
use crate::dtype::Dtype;
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::table::{Component, Layer, Native, Registry};
use crate::tensor::Tensor;

/// Bytes of a factor that are hashed at its beginning, its middle and its end.
const SAMPLE: usize = 512;

/// What the weights of a checkpoint are quantized to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 4-bit integers, one scale for 64 inputs.
    Int4,
    /// NVIDIA's 4-bit floating point, one FP8 scale for 16 inputs.
    Fp4,
}

impl Precision {
    /// The name in messages and metadata.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Int4 => "int4",
            Precision::Fp4 => "fp4",
        }
    }

    /// The precision of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "int4" => Some(Precision::Int4),
            "fp4" | "nvfp4" => Some(Precision::Fp4),
            _ => None,
        }
    }
}

/// Whether the inputs of a layer reach it already divided by its smoothing factor.
///
/// The quantizer may fold the factor of an attention output into the values before it: then the layer's own `smooth` is
/// all ones while `smooth_orig` keeps the factor (deepcompressor: `backend/nunchaku`).
#[derive(Debug, Clone)]
pub enum Smoothing {
    /// The low-rank branch sees the plain inputs.
    Plain,
    /// The branch sees inputs divided by this vector, in the order of the channels.
    Fused(Arc<[f64]>),
    /// `smooth` is all ones and `smooth_orig` is absent: nothing tells.
    Unknown,
}

/// What the base has for one layer.
#[derive(Debug, Clone)]
pub struct BaseLayer {
    /// Its own branch, down and up; `None` if it has none.
    pub branch: Option<(Branch, Branch)>,
    /// The element type of the branch, or of what else the layer has.
    pub dtype: Option<Dtype>,
    /// The element type of its bias, if it has one.
    pub bias: Option<Dtype>,
    /// How its inputs are smoothed.
    pub smoothing: Smoothing,
}

impl BaseLayer {
    /// Ranks of its own branch.
    pub fn rank(&self) -> usize {
        self.branch.as_ref().map_or(0, |(down, _)| down.ranks)
    }
}

/// An opened base checkpoint.
#[derive(Debug)]
pub struct Base {
    source: Arc<Source>,
    family: String,
    layers: BTreeMap<String, BaseLayer>,
    fingerprint: String,
    precision: Option<Precision>,
    name: String,
    smoothed: bool,
    /// Whether it is only what a native file carries of it.
    carried: bool,
    /// Parameters that are not quantized, if it is the whole model.
    plain: Option<FxHashSet<String>>,
}

impl Base {
    /// Opens a checkpoint: `transformer_blocks.safetensors`, or a single file of either generation.
    ///
    /// Maps the file and reads its header, the smoothing factors of attention outputs, and samples of the branches.
    pub fn open(registry: &Registry, path: &Path) -> Result<Self> {
        Self::read(registry, Arc::new(Source::open(path)?))
    }

    /// Reads a checkpoint that is open already.
    pub fn read(registry: &Registry, source: Arc<Source>) -> Result<Self> {
        Self::of(registry, &source).map_err(|e| e.at(source.path()))
    }

    fn of(registry: &Registry, source: &Arc<Source>) -> Result<Self> {
        let index: FxHashMap<&str, usize> =
            source.tensors().iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        let natives = registry.dialects.iter().flat_map(|d| &d.natives);
        // Models share some names of layers: the one with the most of them it is.
        let best = natives
            .map(|native| (Reader { registry, native, source, index: &index }.found(), native))
            .max_by_key(|(found, _)| found.len());
        let Some((found, native)) = best.filter(|(found, _)| !found.is_empty()) else {
            return Err(not_a_base(registry, source));
        };
        let reader = Reader { registry, native, source, index: &index };
        let layers = reader.layers(&found)?;
        if layers.values().all(|l| l.branch.is_none() && l.dtype.is_none()) {
            return Err(not_a_base(registry, source));
        }
        Ok(Self {
            source: Arc::clone(source),
            family: registry.families[native.family].name.clone(),
            fingerprint: fingerprint(&layers),
            precision: reader.precision(),
            name: source.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
            smoothed: layers.values().any(|l| matches!(l.smoothing, Smoothing::Fused(_))),
            carried: false,
            plain: native.whole.then(|| reader.plain()),
            layers,
        })
    }

    /// The base that a native adapter carries in itself: the first ranks of its layers, as its metadata counts them.
    pub(crate) fn within(
        source: &Arc<Source>,
        family: &str,
        manifest: &Manifest,
        layers: BTreeMap<String, BaseLayer>,
    ) -> Self {
        Self {
            source: Arc::clone(source),
            family: family.to_owned(),
            fingerprint: manifest.base.fingerprint.clone(),
            precision: manifest.base.precision.as_deref().and_then(Precision::from_name),
            name: manifest.base.name.clone(),
            smoothed: manifest.base.smoothed,
            carried: true,
            plain: None,
            layers,
        }
    }

    /// Whether it is what a native file carries of its base: branches without smoothing factors.
    pub(crate) fn is_carried(&self) -> bool {
        self.carried
    }

    /// Whether these are branches that a file carries in itself.
    pub(crate) fn is_within(&self, source: &Arc<Source>) -> bool {
        Arc::ptr_eq(&self.source, source)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.source.path()
    }

    /// The name of the checkpoint's file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether its smoothing factors are multiplied into the branches of attention layers.
    pub fn smoothed(&self) -> bool {
        self.smoothed
    }

    /// The name of its family.
    pub fn family(&self) -> &str {
        &self.family
    }

    /// What its weights are quantized to, if that shows.
    pub fn precision(&self) -> Option<Precision> {
        self.precision
    }

    /// A short hash over names, types, sizes and samples of its branches: equal for all layouts of one checkpoint.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// A layer by its name in adapters; `None` for one of a block that the base does not have.
    pub fn layer(&self, name: &str) -> Option<&BaseLayer> {
        self.layers.get(name)
    }

    /// What the values of attention are divided by before they reach the layer behind it, if that is folded into the
    /// last part of this layer.
    pub(crate) fn folded_into(&self, native: &Native, layer: &Layer, variables: &[u32]) -> Option<&[f64]> {
        let fed = self.layer(&native.layers[layer.values?].name.render(variables))?;
        match &fed.smoothing {
            Smoothing::Fused(factor) => Some(factor),
            _ => None,
        }
    }

    /// Whether the model has a 16-bit parameter of that name; `None` if the checkpoint is not the whole model.
    pub(crate) fn has(&self, parameter: &str) -> Option<bool> {
        self.plain.as_ref().map(|all| all.contains(parameter))
    }

    /// What the rows of modules outside the layers are divided by, by path: the factor of the layer that they feed.
    pub(crate) fn fed(&self, native: &Native, component: &Component) -> BTreeMap<String, Arc<[f64]>> {
        let mut out = BTreeMap::new();
        for (module, layer) in &native.feeds {
            for variables in component.instances_of(module) {
                let fed = self.layer(&native.layers[*layer].name.render(&variables));
                if let Some(Smoothing::Fused(factor)) = fed.map(|l| &l.smoothing) {
                    out.insert(module.render(&variables), Arc::clone(factor));
                }
            }
        }
        out
    }

    /// Names and layers.
    pub fn layers(&self) -> &BTreeMap<String, BaseLayer> {
        &self.layers
    }

    /// The rank of most of its branches.
    pub fn rank(&self) -> usize {
        super::manifest::most_common(self.layers.values().map(BaseLayer::rank).filter(|r| *r > 0)).unwrap_or(0)
    }
}

fn not_a_base(registry: &Registry, source: &Source) -> Error {
    let families: Vec<&str> =
        registry.dialects.iter().flat_map(|d| &d.natives).map(|n| registry.families[n.family].name.as_str()).collect();
    let key = source.tensors().first().map_or("nothing", |t| t.name.as_str());
    let message = format!("it has no quantized layers of {}; it holds `{key}`", families.join(" or "));
    Error::new(Code::InvalidBase, message).at(source.path())
}

/// Reads a checkpoint through one native table.
struct Reader<'a> {
    registry: &'a Registry,
    native: &'a Native,
    source: &'a Arc<Source>,
    index: &'a FxHashMap<&'a str, usize>,
}

/// A block of the model: the path before its number, and that.
type Block = (String, u32);

impl Reader<'_> {
    fn instances(&self, layer: &Layer) -> Vec<Vec<u32>> {
        self.registry.families[self.native.family].components[self.native.component].instances_of(&layer.name)
    }

    /// What the checkpoint calls a layer's tensor, under either name of the layer.
    fn tensor(&self, layer: &Layer, variables: &[u32], names: &[String]) -> Option<usize> {
        let spelled = [&layer.name, &layer.later].map(|t| t.render(variables));
        spelled.iter().find_map(|l| names.iter().find_map(|n| self.index.get(format!("{l}.{n}").as_str()).copied()))
    }

    /// The quantized layers of the checkpoint, with their blocks.
    fn found(&self) -> BTreeMap<String, Option<Block>> {
        let weight = ["qweight".to_owned()];
        let mut found = BTreeMap::new();
        for layer in self.native.layers.iter().filter(|l| l.interleave.is_none()) {
            for variables in self.instances(layer) {
                let has = [&self.native.down[..], &weight].iter().any(|n| self.tensor(layer, &variables, n).is_some());
                if has {
                    found.insert(layer.name.render(&variables), layer.name.block(&variables));
                }
            }
        }
        found
    }

    /// The layers: those that were found where the checkpoint is the whole model, else all of their blocks.
    fn layers(&self, found: &BTreeMap<String, Option<Block>>) -> Result<BTreeMap<String, BaseLayer>> {
        let blocks: BTreeSet<&Option<Block>> = found.values().collect();
        let mut layers = BTreeMap::new();
        for layer in &self.native.layers {
            for variables in self.instances(layer) {
                let name = layer.name.render(&variables);
                let held = match self.native.whole {
                    true => found.contains_key(&name),
                    false => blocks.contains(&layer.name.block(&variables)),
                };
                if held {
                    layers.insert(name, self.layer(layer, &variables)?);
                }
            }
        }
        Ok(layers)
    }

    /// The parameters that are not of quantized layers.
    fn plain(&self) -> FxHashSet<String> {
        let quantized = |name: &str| {
            let module = name.rsplit_once('.').map_or("", |(module, _)| module);
            self.index.contains_key(format!("{module}.qweight").as_str())
        };
        self.index.keys().filter(|name| !quantized(name)).map(|name| (*name).to_owned()).collect()
    }

    fn layer(&self, layer: &Layer, variables: &[u32]) -> Result<BaseLayer> {
        let one = |name: &str| self.tensor(layer, variables, &[name.to_owned()]);
        let dtype = |index: usize| self.source.tensors()[index].dtype;
        let bias = one("bias").map(dtype);
        let branch = if layer.interleave.is_none() { self.branch(layer, variables)? } else { None };
        let half = |d: &Dtype| matches!(d, Dtype::F16 | Dtype::BF16);
        let of_branch = branch.as_ref().map(|(down, _)| down.packed.dtype());
        let other = || bias.filter(half).or_else(|| one("wscales").map(dtype).filter(half));
        let smoothing = if layer.attention.is_some() { self.smoothing(layer, variables)? } else { Smoothing::Plain };
        Ok(BaseLayer { dtype: of_branch.or_else(other), branch, bias, smoothing })
    }

    fn branch(&self, layer: &Layer, variables: &[u32]) -> Result<Option<(Branch, Branch)>> {
        let info = |index: usize| &self.source.tensors()[index];
        let down = self.tensor(layer, variables, &self.native.down);
        let up = self.tensor(layer, variables, &self.native.up);
        let present = |i: &usize| !info(*i).range.is_empty();
        let (down, up) = match (down.filter(present), up.filter(present)) {
            (None, None) => return Ok(None),
            (Some(down), Some(up)) => (down, up),
            (Some(alone), None) | (None, Some(alone)) => {
                let name = &info(alone).name;
                let message = format!("`{name}` lacks the other factor of its branch");
                return Err(Error::new(Code::InvalidBase, message).key(name));
            }
        };
        for (index, channels) in [(down, layer.input), (up, layer.output())] {
            let info = info(index);
            let sound = matches!(info.shape.as_slice(), [c, r] if *c == channels && r.is_multiple_of(TILE))
                && matches!(info.dtype, Dtype::F16 | Dtype::BF16);
            if !sound {
                let message = format!(
                    "`{}` is {} of shape {:?}; a packed factor of this layer is 16-bit, [{channels}, a multiple of {TILE}]",
                    info.name,
                    info.dtype.name(),
                    info.shape
                );
                return Err(Error::new(Code::InvalidPacking, message).key(&info.name));
            }
        }
        let (d, u) = (info(down), info(up));
        if d.shape[1] != u.shape[1] || d.dtype != u.dtype {
            let message = format!(
                "`{}` is {} of rank {}, `{}` {} of rank {}",
                d.name,
                d.dtype.name(),
                d.shape[1],
                u.name,
                u.dtype.name(),
                u.shape[1]
            );
            return Err(Error::new(Code::InvalidPacking, message).key(&u.name));
        }
        let branch = |index: usize| Branch { packed: Tensor::input(self.source, index), ranks: d.shape[1] };
        Ok(Some((branch(down), branch(up))))
    }

    fn smoothing(&self, layer: &Layer, variables: &[u32]) -> Result<Smoothing> {
        let read = |names: &[String]| -> Result<Option<Vec<f64>>> {
            let Some(index) = self.tensor(layer, variables, names) else { return Ok(None) };
            let info = &self.source.tensors()[index];
            if info.shape != [layer.input] || !info.dtype.is_float() {
                let message =
                    format!("`{}` has shape {:?}, the layer has {} inputs", info.name, info.shape, layer.input);
                return Err(Error::new(Code::InvalidBase, message).key(&info.name));
            }
            let stored = Tensor::input(self.source, index).to_f64();
            if let Some(bad) = stored.iter().find(|v| !(v.is_finite() && **v != 0.0)) {
                let message = format!("`{}` holds {bad}, by which nothing can be divided", info.name);
                return Err(Error::new(Code::InvalidBase, message).key(&info.name));
            }
            Ok(Some((0..layer.input).map(|n| stored[vector_position(n)]).collect()))
        };
        let ones = |v: &Vec<f64>| v.iter().all(|x| *x == 1.0);
        let Some(smooth) = read(&self.native.smooth)? else { return Ok(Smoothing::Unknown) };
        if !ones(&smooth) {
            return Ok(Smoothing::Plain);
        }
        Ok(match read(&self.native.smooth_orig)? {
            None => Smoothing::Unknown,
            Some(original) if ones(&original) => Smoothing::Plain,
            Some(original) => Smoothing::Fused(original.into()),
        })
    }

    /// By the scales of the first quantized layer: one for 16 inputs, or FP8, is NVIDIA's format.
    fn precision(&self) -> Option<Precision> {
        let name = ["wscales".to_owned()];
        let quantized = self.native.layers.iter().filter(|l| l.interleave.is_none());
        let mut instances = quantized.flat_map(|l| self.instances(l).into_iter().map(move |v| (l, v)));
        let (layer, index) = instances.find_map(|(l, v)| Some((l, self.tensor(l, &v, &name)?)))?;
        let info = &self.source.tensors()[index];
        let fine = info.shape.first().is_some_and(|groups| *groups == layer.input / 16);
        Some(if fine || info.dtype.is_fp8() { Precision::Fp4 } else { Precision::Int4 })
    }
}

fn fingerprint(layers: &BTreeMap<String, BaseLayer>) -> String {
    let mut hash = Sha256::new();
    for (name, layer) in layers {
        let Some((down, up)) = &layer.branch else { continue };
        for (side, branch) in [("down", down), ("up", up)] {
            let t = &branch.packed;
            hash.update(format!("{name} {side} {} {:?}\n", t.dtype().name(), t.shape()));
            let bytes = t.contiguous().unwrap_or(&[]);
            for start in [0, bytes.len() / 2, bytes.len().saturating_sub(SAMPLE)] {
                hash.update(&bytes[start..bytes.len().min(start + SAMPLE)]);
            }
        }
    }
    hash.finalize()[..16].iter().map(|b| format!("{b:02x}")).collect()
}
