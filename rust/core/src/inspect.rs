//! What a file is, from its header and its small tensors alone.

mod fix;
mod loaders;

use std::collections::BTreeMap;

use serde::Serialize;

pub use fix::quoted;
pub use loaders::Loader;

use crate::adapter::Adapter;
use crate::convert::kind_name;
use crate::error::{Error, Result};
use crate::kind::Slot;
use crate::native::NativeInfo;
use crate::native::manifest::{Entry, Manifest};
use crate::ops::{Weights, weights};
use crate::report::{AlphaCount, Warning};

/// Metadata that says most about a file, most telling first.
pub const TELLING: [&str; 10] = [
    "modelspec.title",
    "ss_output_name",
    "ss_base_model_version",
    "modelspec.architecture",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "lora_alpha",
    "software",
    "base_model",
];

/// How a part of the keys is spelled.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Spelling {
    /// The dialect that the keys count for.
    pub dialect: String,
    /// How many keys.
    pub keys: usize,
}

/// What a file is.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Version of this document.
    pub schema: u32,
    /// As given.
    pub path: String,
    /// Size of the file.
    pub bytes: u64,
    /// The dialect, `mixed` if the keys are of several.
    pub dialect: String,
    /// The dialects of the keys.
    pub dialects: Vec<Spelling>,
    /// The family.
    pub family: String,
    /// Which of its sizes, if the model comes in several.
    pub variant: Option<String>,
    /// The names of all families that explain the keys equally well, each once.
    pub families: Vec<String>,
    /// Share of the keys that are understood.
    pub coverage: f64,
    /// The kind of most modules.
    pub kind: String,
    /// Tensors of the file.
    pub tensors: usize,
    /// Canonical modules by component.
    pub modules: BTreeMap<String, usize>,
    /// Tensors by element type.
    pub dtypes: BTreeMap<String, usize>,
    /// Modules by rank.
    pub ranks: BTreeMap<usize, usize>,
    /// The rank, if all modules have one and the same.
    pub rank: Option<usize>,
    /// Modules by scale.
    pub scales: BTreeMap<String, usize>,
    /// Where scales were found.
    pub alpha: AlphaCount,
    /// Input width of a widened module (FLUX Control: 128, Fill: 384).
    pub widened: BTreeMap<String, usize>,
    /// The base and the adapters of a native file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub native: Option<Native>,
    /// What its weights look like, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    /// Programs that load it, or not.
    pub loaders: Vec<Loader>,
    /// The header's metadata.
    pub metadata: BTreeMap<String, String>,
    /// Keys that no table knows.
    pub unknown: Vec<String>,
    /// What deserves a word.
    pub warnings: Vec<Warning>,
    /// What makes a conversion impossible.
    pub problems: Vec<serde_json::Value>,
}

/// What a native file says of itself, and what its sizes say.
#[derive(Debug, Clone, Serialize)]
pub struct Native {
    /// The fingerprint of the base that it fits; `None` if the file does not say.
    pub fingerprint: Option<String>,
    /// The name of the base's file.
    pub base: Option<String>,
    /// What the base is quantized to.
    pub precision: Option<String>,
    /// Where each adapter's ranks start.
    pub layout: Option<String>,
    /// Layers by rank of the base's own branch; empty if the file does not say.
    pub base_ranks: BTreeMap<usize, usize>,
    /// Layers by total rank, the base's included.
    pub ranks: BTreeMap<usize, usize>,
    /// Whether its adapters can be read only with the base.
    pub needs_base: bool,
    /// The adapters inside.
    pub adapters: Vec<NativeAdapter>,
}

/// An adapter inside a native file.
#[derive(Debug, Clone, Serialize)]
pub struct NativeAdapter {
    /// Its name.
    pub name: String,
    /// The hash of the file it came from.
    pub hash: Option<String>,
    /// The strength that is multiplied in.
    pub strength: serde_json::Value,
    /// Layers by rank.
    pub ranks: BTreeMap<usize, usize>,
}

fn native(info: &NativeInfo) -> Native {
    let manifest = info.manifest.as_ref();
    let adapter = |entry: &Entry| {
        let mut ranks = BTreeMap::new();
        for layer in &info.layers {
            let rank = entry.range(layer).len();
            if rank > 0 {
                *ranks.entry(rank).or_default() += 1;
            }
        }
        NativeAdapter { name: entry.name.clone(), hash: entry.hash.clone(), strength: entry.strength.clone(), ranks }
    };
    Native {
        fingerprint: manifest.map(|m| m.base.fingerprint.clone()),
        base: manifest.map(|m| m.base.name.clone()),
        precision: manifest.and_then(|m| m.base.precision.clone()),
        layout: manifest.map(|m| m.layout.clone()),
        base_ranks: manifest.map(|m| base_ranks(info, m)).unwrap_or_default(),
        ranks: info.ranks.clone(),
        needs_base: info.needs_base,
        adapters: manifest.map(|m| m.adapters.iter().map(adapter).collect()).unwrap_or_default(),
    }
}

fn base_ranks(info: &NativeInfo, manifest: &Manifest) -> BTreeMap<usize, usize> {
    let mut ranks = BTreeMap::new();
    for rank in info.layers.iter().map(|layer| manifest.base.rank(layer)).filter(|r| *r > 0) {
        *ranks.entry(rank).or_default() += 1;
    }
    ranks
}

/// Describes an adapter as it was read, with the problems met on the way.
pub fn inspect(adapter: &Adapter, problems: &[Error]) -> Inspection {
    let registry = &adapter.registry;
    let source = &adapter.source;
    let detection = &adapter.detection;
    let mut out = Inspection {
        schema: 1,
        path: source.path().to_string_lossy().into_owned(),
        bytes: source.len() as u64,
        dialect: detection.dialect_name(registry).to_owned(),
        dialects: detection
            .dialects
            .iter()
            .map(|&(d, keys)| Spelling { dialect: registry.dialects[d].name.clone(), keys })
            .collect(),
        family: adapter.family_table().name.clone(),
        variant: adapter.family_table().variant.clone(),
        families: detection.candidate_names(registry),
        coverage: detection.coverage(),
        kind: kind_name(adapter).to_owned(),
        tensors: source.tensors().len(),
        modules: BTreeMap::new(),
        dtypes: BTreeMap::new(),
        ranks: BTreeMap::new(),
        rank: None,
        scales: BTreeMap::new(),
        alpha: AlphaCount::default(),
        widened: BTreeMap::new(),
        native: adapter.native.as_ref().map(native),
        weights: None,
        loaders: Vec::new(),
        metadata: source.metadata().iter().cloned().collect(),
        unknown: adapter.unknown.iter().map(|&i| source.tensors()[i].name.clone()).collect(),
        warnings: adapter.warnings.clone(),
        problems: problems.iter().map(Error::to_json).collect(),
    };
    for info in source.tensors() {
        *out.dtypes.entry(info.dtype.name().to_owned()).or_default() += 1;
    }
    for (key, placed) in &adapter.modules {
        *out.modules.entry(adapter.component(key.component).name.clone()).or_default() += 1;
        let module = &placed.module;
        if let Some(rank) = module.rank() {
            *out.ranks.entry(rank).or_default() += 1;
            *out.scales.entry(format!("{}", (module.scale * 1e6).round() / 1e6)).or_default() += 1;
            out.alpha.add(module.alpha_source);
        }
        let base = adapter.row(key, &placed.address).inputs.first().copied();
        let width = module.get(Slot::Down).map(crate::tensor::Tensor::cols);
        if let (Some(base), Some(width)) = (base, width)
            && width != base
        {
            out.widened.insert(adapter.display(key), width);
        }
    }
    if let (1, Some(rank)) = (out.ranks.len(), out.ranks.keys().next()) {
        out.rank = Some(*rank);
    }
    out.loaders = loaders::all(adapter);
    out
}

impl Inspection {
    /// The same with what the weights look like. Reads them all.
    pub fn with_weights(mut self, adapter: &Adapter) -> Result<Self> {
        let weights = weights(adapter)?;
        self.warnings.extend(weights.warnings());
        self.weights = Some(weights);
        Ok(self)
    }
}
