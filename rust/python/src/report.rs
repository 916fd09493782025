//! Many files as one page.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::io::{Pending, Source, WriteOptions, refuse_existing};
use lorafmt_core::library::{Survey, survey};
use lorafmt_core::{convert, page};
use pyo3::prelude::*;

use crate::enter::enter;
use crate::source::{Prepared, SourceArgument};
use crate::{Adapter, options, registry, to_json};

/// What a page can be about.
#[derive(FromPyObject)]
pub(crate) enum Subject<'py> {
    /// An adapter that was opened.
    Open(Py<Adapter>),
    /// One that was not.
    Source(SourceArgument<'py>),
}

/// An input that is opened once, when its turn comes.
enum Waiting {
    Open(Arc<Source>),
    Closed(Mutex<Option<Prepared>>),
}

impl Waiting {
    fn new(subject: Subject<'_>) -> PyResult<Self> {
        Ok(match subject {
            Subject::Open(adapter) => Waiting::Open(Arc::clone(&adapter.get().inner.source)),
            Subject::Source(source) => Waiting::Closed(Mutex::new(Some(source.prepare()?))),
        })
    }

    fn path(&self) -> PathBuf {
        match self {
            Waiting::Open(source) => source.path().to_path_buf(),
            Waiting::Closed(prepared) => match prepared.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                Some(Prepared::Path(path)) => path.clone(),
                Some(Prepared::Fetched(_, address, _)) => PathBuf::from(address),
                Some(Prepared::Content(..)) => Path::new("<bytes>").to_path_buf(),
                Some(Prepared::Tensors(..)) | None => Path::new("<dict>").to_path_buf(),
            },
        }
    }

    fn open(&self) -> Result<Arc<Source>> {
        match self {
            Waiting::Open(source) => Ok(Arc::clone(source)),
            Waiting::Closed(prepared) => {
                let prepared = prepared.lock().unwrap_or_else(PoisonError::into_inner).take();
                let twice = || Error::new(Code::InvalidArgument, "an input was asked for twice");
                prepared.ok_or_else(twice)?.open().map(Arc::new)
            }
        }
    }
}

/// Reads adapters, writes a page of them, if there is a path, and returns the data as JSON. `progress(done, total)` counts
/// files.
#[pyfunction]
#[pyo3(signature = (subjects, path, options, weights, overwrite, progress=None))]
pub(crate) fn report(
    py: Python<'_>,
    subjects: Vec<Subject<'_>>,
    path: Option<PathBuf>,
    options: &str,
    weights: bool,
    overwrite: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let inputs = subjects.into_iter().map(Waiting::new).collect::<PyResult<Vec<_>>>()?;
    let given = options::parse(options);
    enter(py, progress.as_ref(), |control| {
        let (registry, given, writing) = (registry(), given?, WriteOptions { overwrite });
        if let Some(path) = &path {
            refuse_existing(path, writing)?;
        }
        let given = convert::given(&registry, given.family.as_deref(), given.from.as_deref())?;
        let names: Vec<PathBuf> = inputs.iter().map(Waiting::path).collect();
        let names: Vec<&Path> = names.iter().map(PathBuf::as_path).collect();
        let how = Survey { weights, given };
        let library = survey(&registry, &names, |i| inputs[i].open(), &how, control, |_| {})?;
        if let Some(path) = &path {
            Pending::text(path, &page::html(&library))?.commit(writing)?;
        }
        Ok(to_json(&library))
    })
}
