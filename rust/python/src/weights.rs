//! Base checkpoints: adapters into their weights, out again, and out of two of them.

use std::path::PathBuf;
use std::sync::Arc;

use lorafmt_core::adapter::Adapter as CoreAdapter;
use lorafmt_core::compose::{Composition, Term};
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::ops::resize::{Criterion, RankRule};
use lorafmt_core::table::Registry;
use lorafmt_core::weights::{Checkpoint, ExtractOptions, FuseOptions, UnfuseOptions, open_behind};
use lorafmt_core::weights::{extract as core_extract, fuse as core_fuse, unfuse as core_unfuse};
use pyo3::prelude::*;
use serde_json::Value;

use crate::compose::{Terms, strength};
use crate::enter::enter;
use crate::{Adapter, options, registry, to_json};

/// The families that a name stands for; any, if there is none.
fn family(registry: &Registry, name: Option<&str>) -> Result<Vec<usize>> {
    name.map(|name| registry.sizes(name)).transpose().map(Option::unwrap_or_default)
}

/// Writes a checkpoint with adapters added; the report as JSON.
#[pyfunction]
#[pyo3(signature = (base, terms, path, options, undo=None, progress=None))]
pub(crate) fn fuse(
    py: Python<'_>,
    base: PathBuf,
    terms: Terms,
    path: PathBuf,
    options: &str,
    undo: Option<PathBuf>,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    enter(py, progress.as_ref(), |control| {
        let (given, value) = (options::parse(options)?, document(options)?);
        let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
        let how = FuseOptions {
            lossy: given.lossy,
            unknown: given.unknown,
            rescale: flag("rescale"),
            stochastic: value.get("stochastic").and_then(Value::as_u64),
            undo,
            dry_run: flag("dry_run"),
            overwrite: flag("overwrite"),
        };
        let adapters: Vec<&CoreAdapter> = terms.iter().map(|(a, _)| a.get().sound()).collect::<Result<_>>()?;
        let registry = adapters.first().map_or_else(registry, |a| Arc::clone(&a.registry));
        let wanted = family(&registry, given.family.as_deref())?;
        let (checkpoint, agreed) = open_behind(&registry, &base, &wanted, &adapters)?;
        let term = |(adapter, (_, given)): (_, &(_, Option<String>))| {
            Ok(Term::new(adapter, strength(adapter, given.as_deref())?))
        };
        let terms = agreed.iter().map(AsRef::as_ref).zip(&terms).map(term).collect::<Result<Vec<_>>>()?;
        core_fuse(&checkpoint, &Composition::new(terms)?, &path, &how, control).map(|report| to_json(&report))
    })
}

/// Restores what a fused checkpoint was; the report as JSON.
#[pyfunction]
#[pyo3(signature = (fused, undo, path, dry_run, overwrite, progress=None))]
pub(crate) fn unfuse(
    py: Python<'_>,
    fused: PathBuf,
    undo: PathBuf,
    path: PathBuf,
    dry_run: bool,
    overwrite: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    enter(py, progress.as_ref(), |control| {
        let how = UnfuseOptions { dry_run, overwrite };
        core_unfuse(&registry(), &fused, &undo, &path, &how, control).map(|report| to_json(&report))
    })
}

/// The adapter that two checkpoints differ by, and what was found as JSON.
#[pyfunction]
#[pyo3(signature = (tuned, base, options, progress=None))]
pub(crate) fn extract(
    py: Python<'_>,
    tuned: PathBuf,
    base: PathBuf,
    options: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Adapter, String)> {
    enter(py, progress.as_ref(), |control| {
        let (given, value) = (options::parse(options)?, document(options)?);
        let registry = registry();
        let number = |name: &str| value.get(name).and_then(Value::as_f64);
        let count = |name: &str| value.get(name).and_then(Value::as_u64).map(|n| n as usize);
        let criterion = match (number("energy"), number("max_error")) {
            (Some(_), Some(_)) => {
                return Err(Error::new(Code::InvalidArgument, "`energy` and `max_error` are both given")
                    .hint("give one of them; `rank` may go with either"));
            }
            (energy, error) => energy.map(Criterion::Energy).or(error.map(Criterion::MaxError)),
        };
        let how = ExtractOptions {
            rule: RankRule { limit: count("rank"), criterion },
            dtype: given.dtype,
            niter: count("niter"),
            seed: value.get("seed").and_then(Value::as_u64).unwrap_or(0),
            lossy: given.lossy,
        };
        let dialect = registry.dialect(&given.to)?;
        let base = Checkpoint::open(&registry, &base, &family(&registry, given.family.as_deref())?)?;
        let tuned = Checkpoint::open(&registry, &tuned, &[base.family()])?;
        let (inner, report) = core_extract(&tuned, &base, dialect, &how, control)?;
        Ok((Adapter { inner, problems: Vec::new() }, to_json(&report)))
    })
}

fn document(json: &str) -> Result<Value> {
    serde_json::from_str(json).map_err(|e| Error::new(Code::InvalidArgument, e.to_string()))
}
