//! What will be written: tensors under their keys, metadata, and where every input tensor went.

use std::sync::Arc;

use crate::io::Source;
use crate::ops::merge::MergeReport;
use crate::ops::resize::ResizeReport;
use crate::report::{AlphaCount, Fidelity, TensorCount, Warning};
use crate::tensor::Tensor;

/// A tensor of the output.
#[derive(Debug, Clone)]
pub struct Output {
    /// The key.
    pub key: String,
    /// The tensor.
    pub tensor: Tensor,
}

/// Where an input tensor went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// Nothing has claimed it.
    Unknown,
    /// Left out, on request.
    Dropped,
    /// Written where the target's loaders ignore it.
    Carried,
    /// Written where the target's loaders read it.
    Used,
}

/// The hash of an input in the metadata, as long as it has not been computed.
#[derive(Debug, Clone)]
pub struct Digest {
    /// What stands in its place: as long as the hash, and nothing else.
    pub placeholder: String,
    /// The input.
    pub source: Arc<Source>,
}

impl Digest {
    /// The hash of an input that is a file.
    pub fn new(source: &Arc<Source>, number: usize) -> Self {
        Self { placeholder: format!("{:z<64}", format!("sha256-of-input-{number}-")), source: Arc::clone(source) }
    }

    /// The hash. Reads every byte of the input.
    pub fn compute(&self) -> String {
        self.source.sha256().unwrap_or_default()
    }
}

/// A conversion that has been decided but not computed.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The tensors.
    pub outputs: Vec<Output>,
    /// The header's metadata.
    pub metadata: Vec<(String, String)>,
    /// Hashes of inputs that the metadata tells: they are computed while the tensors are written.
    pub digests: Vec<Digest>,
    /// A file to write beside the tensors (`adapter_config.json`), as name and text.
    pub sidecar: Option<(String, String)>,
    /// The fate of every input tensor.
    pub fates: Vec<Fate>,
    /// Modules of the target.
    pub modules: usize,
    /// Where scales were found.
    pub alpha: AlphaCount,
    /// What happens to the numbers.
    pub fidelity: Fidelity,
    /// Bound on the relative rounding error.
    pub rounding: f64,
    /// What deserves a word.
    pub warnings: Vec<Warning>,
    /// What happened to ranks, if they were changed.
    pub resize: Option<ResizeReport>,
    /// What merging lost, if deltas were merged.
    pub merge: Option<MergeReport>,
}

impl Plan {
    /// Tensors that are written as they are: no conversion stands behind them.
    pub fn of_outputs(outputs: Vec<Output>, metadata: Vec<(String, String)>) -> Self {
        Self {
            modules: 0,
            outputs,
            metadata,
            digests: Vec::new(),
            sidecar: None,
            fates: Vec::new(),
            alpha: AlphaCount::default(),
            fidelity: Fidelity::Exact,
            rounding: 0.0,
            warnings: Vec::new(),
            resize: None,
            merge: None,
        }
    }

    /// Takes into account what the outputs from `start` on say about fidelity and rounding; `least` is what is known of
    /// them besides.
    pub(crate) fn judge(&mut self, start: usize, least: Fidelity) {
        for output in &self.outputs[start..] {
            let fidelity = match &output.tensor {
                t if t.is_narrowed() => Fidelity::Approximate,
                t if t.is_scaled() => Fidelity::Rescaled,
                _ => Fidelity::Exact,
            };
            self.fidelity = self.fidelity.max(fidelity).max(least);
            self.rounding = self.rounding.max(output.tensor.rounding());
        }
    }

    /// The fates, counted.
    pub fn count(&self) -> TensorCount {
        count(&self.fates)
    }

    /// The metadata with its hashes. Reads every byte of the inputs that it has hashes of.
    pub fn full_metadata(&self) -> Vec<(String, String)> {
        let mut metadata = self.metadata.clone();
        for digest in &self.digests {
            let hash = digest.compute();
            metadata.iter_mut().for_each(|(_, v)| *v = v.replace(&digest.placeholder, &hash));
        }
        metadata
    }

    /// The tensor of that key.
    pub fn get(&self, key: &str) -> Option<&Tensor> {
        self.outputs.iter().find(|o| o.key == key).map(|o| &o.tensor)
    }
}

/// Fates, counted.
pub(crate) fn count(fates: &[Fate]) -> TensorCount {
    let of = |fate: Fate| fates.iter().filter(|f| **f == fate).count();
    TensorCount {
        input: fates.len(),
        used: of(Fate::Used),
        carried: of(Fate::Carried),
        dropped: of(Fate::Dropped),
        unknown: of(Fate::Unknown),
    }
}
