//! What fusing did, as data.

use serde::Serialize;

use super::work::Measure;
use crate::report::{AlphaCount, SourceReport, TensorCount, Warning};
use crate::weights::Checkpoint;

/// A checkpoint in a report.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointReport {
    /// As it was named.
    pub path: String,
    /// The family.
    pub family: String,
    /// Its files.
    pub files: usize,
    /// Its tensors.
    pub tensors: usize,
    /// Bytes of its files.
    pub bytes: u64,
}

impl CheckpointReport {
    /// The report of an opened checkpoint.
    pub(in crate::weights) fn of(checkpoint: &Checkpoint) -> Self {
        let shards = checkpoint.shards();
        Self {
            path: checkpoint.path().to_string_lossy().into_owned(),
            family: checkpoint.registry().families[checkpoint.family()].name.clone(),
            files: shards.len(),
            tensors: shards.iter().map(|s| s.source.tensors().len()).sum(),
            bytes: shards.iter().map(|s| s.source.len() as u64).sum(),
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// The file or folder; `None` for a dry run.
    pub path: Option<String>,
    /// Bytes of its weights.
    pub bytes: u64,
    /// Files that were written anew.
    pub rewritten: usize,
    /// Files that were copied as they are.
    pub copied: usize,
}

/// The undo file.
#[derive(Debug, Clone, Serialize)]
pub struct UndoReport {
    /// Where it was written.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Bytes of the tensors that it restores.
    pub restores: u64,
}

/// One base tensor that was changed.
#[derive(Debug, Clone, Serialize)]
pub struct FusedTensor {
    /// Its key in the base.
    pub key: String,
    /// Its element type.
    pub dtype: String,
    /// The adapters' modules that changed it, each once.
    pub modules: Vec<String>,
    /// The Frobenius norm of the wanted change; `None` if nothing was computed.
    pub norm: Option<f64>,
    /// How much of the wanted change arrived: the projection of the stored change on it, 1 if all did. `None` where no
    /// change was wanted or nothing was computed.
    pub gain: Option<f64>,
    /// ||stored change - wanted change|| / ||wanted change||.
    pub err: Option<f64>,
    /// Finite numbers that left the range of the type.
    pub outside: usize,
}

impl FusedTensor {
    pub(super) fn measured(mut self, measure: Measure) -> Self {
        self.norm = Some(measure.wanted.sqrt());
        if measure.wanted > 0.0 {
            self.gain = Some(measure.along / measure.wanted);
            self.err = Some((measure.missed / measure.wanted).sqrt());
        }
        self.outside = measure.outside;
        self
    }
}

/// What fusing did, or would do.
#[derive(Debug, Clone, Serialize)]
pub struct FuseReport {
    /// Version of this document.
    pub schema: u32,
    /// The base.
    pub base: CheckpointReport,
    /// The adapters, each with its strength.
    pub sources: Vec<SourceReport>,
    /// What was written.
    pub target: Written,
    /// The undo file, if one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undo: Option<UndoReport>,
    /// Where every tensor of the adapters went.
    pub tensors: TensorCount,
    /// Modules of the adapters that were added.
    pub modules: usize,
    /// Where scales were found.
    pub alpha: AlphaCount,
    /// The base tensors that were changed.
    pub fused: Vec<FusedTensor>,
    /// The least gain; `None` if nothing was computed.
    pub gain: Option<f64>,
    /// The largest error.
    pub err: Option<f64>,
    /// What deserves a word.
    pub warnings: Vec<Warning>,
    /// Wall time.
    pub seconds: f64,
    /// Bytes of the changed tensors.
    #[serde(skip)]
    pub(super) restores: u64,
}
