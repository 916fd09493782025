//! What an operation did, as data.

use serde::Serialize;

use crate::kind::AlphaSource;
use crate::ops::expand::ExpandReport;
use crate::ops::merge::MergeReport;
use crate::ops::resize::ResizeReport;

/// Something that deserves a word but is no error.
#[derive(Debug, Clone, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct Warning {
    /// A stable name.
    pub code: String,
    /// The module it is about.
    pub module: Option<String>,
    /// A sentence for people.
    pub detail: String,
}

impl Warning {
    /// A warning.
    pub fn new(code: &str, module: Option<String>, detail: impl Into<String>) -> Self {
        Self { code: code.to_owned(), module, detail: detail.into() }
    }
}

/// How much of the input's arithmetic was touched. The worst of all modules counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Fidelity {
    /// Only names changed, or factors were cut and shared: every number is a copied bit pattern.
    #[default]
    Exact,
    /// Factors were joined into new ones (stacked, block-diagonal): the delta is the same, to the bit.
    Regrouped,
    /// A scale was multiplied into factors: rounded once.
    Rescaled,
    /// A cast lost precision, or parts were left out.
    Approximate,
}

/// Where every input tensor went. The four numbers add up to `in`.
#[derive(Debug, Clone, Copy, Default, Serialize, PartialEq, Eq)]
pub struct TensorCount {
    /// Tensors of the input.
    #[serde(rename = "in")]
    pub input: usize,
    /// Part of the output, as the target dialect's loaders read it.
    pub used: usize,
    /// In the output, but in a place that the target's loaders ignore.
    pub carried: usize,
    /// Not in the output, on request.
    pub dropped: usize,
    /// Not understood and not in the output.
    pub unknown: usize,
}

/// Modules by the place where their scale was found.
#[derive(Debug, Clone, Copy, Default, Serialize, PartialEq, Eq)]
pub struct AlphaCount {
    /// Alpha tensors.
    pub tensor: usize,
    /// Header metadata.
    pub metadata: usize,
    /// `adapter_config.json`.
    pub config: usize,
    /// None: alpha is the rank.
    pub rank: usize,
}

impl AlphaCount {
    /// Counts one module.
    pub fn add(&mut self, source: AlphaSource) {
        *match source {
            AlphaSource::Tensor => &mut self.tensor,
            AlphaSource::Metadata => &mut self.metadata,
            AlphaSource::Config => &mut self.config,
            AlphaSource::Rank => &mut self.rank,
        } += 1;
    }
}

/// The input of a conversion.
#[derive(Debug, Clone, Serialize)]
pub struct SourceReport {
    /// As given.
    pub path: String,
    /// The dialect, `mixed` if several.
    pub dialect: String,
    /// The family.
    pub family: String,
    /// The kind of most modules, `mixed` if several.
    pub kind: String,
    /// SHA-256 of the file; only computed when asked for.
    pub sha256: Option<String>,
    /// Its name in a composition: that of the file, or of the adapter inside a native one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its strength in a composition, where that is one number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
}

/// The output of a conversion.
#[derive(Debug, Clone, Serialize)]
pub struct TargetReport {
    /// Where it was written; `None` for a dry run or a result in memory.
    pub path: Option<String>,
    /// The dialect.
    pub dialect: String,
    /// Size of the file.
    pub bytes: u64,
    /// Tensors in the file.
    pub tensors: usize,
}

/// What a conversion did.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of this document.
    pub schema: u32,
    /// The input.
    pub source: SourceReport,
    /// All inputs of a composition, the first included.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceReport>,
    /// The output.
    pub target: TargetReport,
    /// Where every input tensor went.
    pub tensors: TensorCount,
    /// Modules of the target that were written.
    pub modules: usize,
    /// Where scales were found.
    pub alpha: AlphaCount,
    /// What happened to the numbers.
    pub fidelity: Fidelity,
    /// Bound on the relative rounding error of every written number.
    pub max_relative_error: f64,
    /// What happened to ranks, if they were changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize: Option<ResizeReport>,
    /// What happened to modules that were made plain LoRA, if any were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expand: Option<ExpandReport>,
    /// What merging lost, if deltas were merged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merge: Option<MergeReport>,
    /// What deserves a word.
    pub warnings: Vec<Warning>,
    /// Wall time.
    pub seconds: f64,
}
