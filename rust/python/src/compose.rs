//! Conversions and compositions: one list of adapters with their strengths, written, computed into memory, or planned.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lorafmt_core::adapter::Adapter as CoreAdapter;
use lorafmt_core::compose::{Composition, Term, agree};
use lorafmt_core::convert::{self, ConvertOptions, Target};
use lorafmt_core::decode::decode_lenient;
use lorafmt_core::detect::Given;
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::io::{Layout, Source, WriteOptions};
use lorafmt_core::strength::{Request, Strength};
use pyo3::prelude::*;

use crate::base::Base;
use crate::enter::enter;
use crate::{Adapter, Plan, choices, options, to_json};

/// Adapters with the JSON of their strengths; a single one without strength is converted as it is.
pub(crate) type Terms = Vec<(Py<Adapter>, Option<String>)>;

/// Calls `work` with the composition of the terms, and the options.
fn composed<T>(
    terms: &Terms,
    json: &str,
    base: Option<&Py<Base>>,
    describe: bool,
    work: impl FnOnce(&Composition<'_>, &ConvertOptions) -> Result<T>,
) -> Result<T> {
    let mut options = options::parse(json)?;
    if options.algebra.is_none() {
        let chosen = serde_json::from_str(json).unwrap_or_default();
        options.algebra = choices::algebra(&chosen, terms.len())?;
    }
    options.native = base.map(|b| options::native(json, &b.get().inner, describe)).transpose()?;
    let adapters: Vec<&CoreAdapter> = terms.iter().map(|(a, _)| a.get().sound()).collect::<Result<_>>()?;
    if let ([adapter], [(_, None)]) = (adapters.as_slice(), terms.as_slice()) {
        return work(&Composition::of(adapter), &options);
    }
    let agreed = agree(&adapters)?;
    let term =
        |(adapter, (_, given)): (_, &(_, Option<String>))| Ok(Term::new(adapter, strength(adapter, given.as_deref())?));
    let terms = agreed.iter().map(AsRef::as_ref).zip(terms).map(term).collect::<Result<Vec<_>>>()?;
    work(&Composition::new(terms)?, &options)
}

/// The strength that JSON says, for the family of the adapter.
pub(crate) fn strength(adapter: &CoreAdapter, given: Option<&str>) -> Result<Strength> {
    let Some(text) = given else { return Ok(Strength::default()) };
    let bad = |e| Error::new(Code::InvalidArgument, format!("a strength of `{text}` makes no sense: {e}"));
    Request::from_json(&serde_json::from_str(text).map_err(bad)?)?.resolve(adapter.family_table())
}

/// Writes a file and returns the report as JSON. `progress(done, total)` is called now and then.
#[pyfunction]
#[pyo3(signature = (terms, path, options, overwrite, base=None, progress=None))]
pub(crate) fn write(
    py: Python<'_>,
    terms: Terms,
    path: PathBuf,
    options: &str,
    overwrite: bool,
    base: Option<Py<Base>>,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    enter(py, progress.as_ref(), |control| {
        composed(&terms, options, base.as_ref(), true, |composition, options| {
            let target = Target::File(&path, WriteOptions { overwrite });
            convert::convert(composition, options, target, control).map(|report| to_json(&report))
        })
    })
}

/// The adapter that is made, computed into memory, and the report as JSON.
#[pyfunction]
#[pyo3(signature = (terms, options, base=None, progress=None))]
pub(crate) fn converted(
    py: Python<'_>,
    terms: Terms,
    options: &str,
    base: Option<Py<Base>>,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Adapter, String)> {
    enter(py, progress.as_ref(), |control| {
        composed(&terms, options, base.as_ref(), true, |composition, options| {
            let mut bytes = Vec::new();
            let report = convert::convert(composition, options, Target::Stream(&mut bytes), control)?;
            // A name of its own: beside the input's there may be a configuration, which has been applied by now.
            let source = Source::from_bytes(Path::new("<converted>"), Box::new(bytes))?;
            let first = composition.first();
            let base = base.as_ref().map(|b| Arc::clone(&b.get().inner));
            let given = Given { families: vec![first.family], base, ..Given::default() };
            let (inner, problems) = decode_lenient(&first.registry, &Arc::new(source), &given)?;
            Ok((Adapter { inner, problems }, to_json(&report)))
        })
    })
}

/// Decides what will be written; nothing is computed yet. Without `describe` no input is hashed for the metadata.
#[pyfunction]
#[pyo3(signature = (terms, options, base=None, describe=true))]
pub(crate) fn plan(
    py: Python<'_>,
    terms: Terms,
    options: &str,
    base: Option<Py<Base>>,
    describe: bool,
) -> PyResult<Plan> {
    if terms.is_empty() {
        let error = Error::new(Code::InvalidArgument, "there is nothing to compose");
        return Err(crate::enter::exception(py, &error.hint("name at least one adapter")));
    }
    enter(py, None, |_| {
        composed(&terms, options, base.as_ref(), describe, |composition, options| {
            let inner = convert::plan(composition, options, false)?;
            let registry = &composition.first().registry;
            let dialect = &registry.dialects[registry.dialect(&options.to)?].name;
            let bytes = Layout::of(&inner).len();
            let report = convert::report(composition, &inner, dialect, bytes);
            Ok(Plan { inner, report: Some(to_json(&report)) })
        })
    })
}
