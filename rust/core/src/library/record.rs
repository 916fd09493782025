//! What is noted of one file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::advice::{Advice, Finding, Level, advice, findings};
use super::digest::Digest;
use super::measures::Measures;
use super::twins::Near;
use super::{Survey, share};
use crate::adapter::Adapter;
use crate::decode::decode_lenient;
use crate::error::{Code, Error, Result};
use crate::inspect::{Inspection, Native, TELLING, inspect};
use crate::io::{Control, Source};
use crate::ops::{DeltaSketch, delta_sketch};
use crate::table::Registry;

/// Characters of a metadata value that are noted.
const VALUE: usize = 160;

/// One file.
#[derive(Debug, Clone, Serialize)]
pub struct FileRecord {
    /// As given.
    pub path: String,
    /// Its size; `None` if it could not be opened.
    pub bytes: Option<u64>,
    /// Why it could not be read as an adapter, as an error object.
    pub error: Option<Value>,
    /// What it is, if it could.
    pub adapter: Option<Profile>,
    /// What is wrong with it or deserves a word, worst first.
    pub findings: Vec<Finding>,
    /// The files whose deltas are most like its own, those with the very same excepted; the most like first.
    pub near: Vec<Near>,
    /// What it is compared by.
    #[serde(skip)]
    pub(super) trace: Option<Trace>,
}

/// An adapter at a glance.
#[derive(Debug, Clone, Serialize)]
pub struct Profile {
    /// The dialect, `mixed` if the keys are of several.
    pub dialect: String,
    /// The family.
    pub family: String,
    /// Which of its sizes, if the model comes in several.
    pub variant: Option<String>,
    /// All families that explain the keys equally well.
    pub families: Vec<String>,
    /// Share of the keys that are understood.
    pub coverage: f64,
    /// The kind of most modules.
    pub kind: String,
    /// Tensors of the file.
    pub tensors: usize,
    /// Canonical modules by component.
    pub modules: BTreeMap<String, usize>,
    /// The element type of most bytes.
    pub dtype: String,
    /// Tensors by element type.
    pub dtypes: BTreeMap<String, usize>,
    /// The rank, if all modules have one and the same.
    pub rank: Option<usize>,
    /// Modules by rank.
    pub ranks: BTreeMap<usize, usize>,
    /// Modules by scale.
    pub scales: BTreeMap<String, usize>,
    /// The base and the adapters of a native file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub native: Option<Native>,
    /// The most telling metadata, cut short.
    pub metadata: BTreeMap<String, String>,
    /// How many entries there are.
    pub metadata_entries: usize,
    /// Programs, those of one answer together.
    pub loaders: Vec<Advice>,
    /// What its weights look like, if they were measured.
    pub weights: Option<Measures>,
}

/// What a file is compared by.
#[derive(Debug, Clone)]
pub(super) struct Trace {
    pub(super) family: String,
    pub(super) digest: Digest,
    /// `None` if its deltas are not known.
    pub(super) sketch: Option<DeltaSketch>,
}

impl FileRecord {
    /// The worst of what was found.
    pub fn worst(&self) -> Option<Level> {
        self.findings.iter().map(|f| f.level).max()
    }
}

/// Reads one file. Only an interruption is an error.
pub(super) fn record(
    registry: &Arc<Registry>,
    path: &Path,
    open: impl FnOnce() -> Result<Arc<Source>>,
    survey: &Survey,
    control: &Control,
) -> Result<FileRecord> {
    control.check()?;
    let mut record = FileRecord {
        path: path.to_string_lossy().into_owned(),
        bytes: std::fs::metadata(path).ok().filter(|m| m.is_file()).map(|m| m.len()),
        error: None,
        adapter: None,
        findings: Vec::new(),
        near: Vec::new(),
        trace: None,
    };
    let outcome = open().and_then(|source| {
        record.bytes = Some(source.len() as u64);
        read(registry, &source, survey, control, &mut record)
    });
    match outcome {
        Err(error) if error.code() == Code::Interrupted => return Err(error),
        Err(error) => record.error = Some(error.at(path).to_json()),
        Ok(()) => {}
    }
    Ok(record)
}

fn read(
    registry: &Arc<Registry>,
    source: &Arc<Source>,
    survey: &Survey,
    control: &Control,
    record: &mut FileRecord,
) -> Result<()> {
    let (adapter, problems) = decode_lenient(registry, source, &survey.given)?;
    let inspection = inspect(&adapter, &problems);
    let mut trouble = None;
    let mut weights = None;
    if survey.weights {
        match Measures::of(&adapter, &record.path).and_then(|w| Ok((w, delta_sketch(&adapter, control)?))) {
            Ok((measures, sketch)) => {
                weights = Some(measures);
                record.trace = Some(trace(&adapter, Some(sketch)));
            }
            Err(error) if error.code() == Code::Interrupted => return Err(error),
            Err(error) => {
                record.trace = Some(trace(&adapter, None));
                trouble = Some(error);
            }
        }
    }
    record.findings = findings(&adapter, &problems, &inspection, survey.weights, trouble.as_ref());
    record.adapter = Some(profile(&adapter, inspection, &problems, weights));
    Ok(())
}

fn trace(adapter: &Adapter, sketch: Option<DeltaSketch>) -> Trace {
    Trace { family: adapter.family_table().label(), digest: Digest::of(adapter), sketch }
}

fn profile(adapter: &Adapter, file: Inspection, problems: &[Error], weights: Option<Measures>) -> Profile {
    let telling = TELLING.iter().filter_map(|key| file.metadata.get_key_value(*key));
    Profile {
        metadata: telling.map(|(key, value)| (key.clone(), value.chars().take(VALUE).collect())).collect(),
        metadata_entries: file.metadata.len(),
        // A file with problems loads nowhere that is known.
        loaders: if problems.is_empty() { advice(&file) } else { Vec::new() },
        dtype: main_dtype(adapter.source.as_ref()),
        coverage: share(file.coverage),
        dialect: file.dialect,
        family: file.family,
        variant: file.variant,
        families: file.families,
        kind: file.kind,
        tensors: file.tensors,
        modules: file.modules,
        dtypes: file.dtypes,
        rank: file.rank,
        ranks: file.ranks,
        scales: file.scales,
        native: file.native,
        weights,
    }
}

/// The element type that most bytes have.
fn main_dtype(source: &Source) -> String {
    let mut bytes: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, info) in source.tensors().iter().enumerate() {
        *bytes.entry(info.dtype.name()).or_default() += source.bytes(index).len();
    }
    bytes.into_iter().max_by_key(|(_, n)| *n).map(|(name, _)| name.to_owned()).unwrap_or_default()
}
