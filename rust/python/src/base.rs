//! Quantized checkpoints.

use std::borrow::Cow;
use std::sync::Arc;

use lorafmt_core::native::Base as CoreBase;
use pyo3::prelude::*;

use crate::enter::enter;
use crate::registry;
use crate::source::SourceArgument;

/// An opened base checkpoint: its header, and views of its branches.
#[pyclass(frozen, module = "lorafmt._lorafmt")]
pub(crate) struct Base {
    pub(crate) inner: Arc<CoreBase>,
}

#[pymethods]
impl Base {
    /// Opens a checkpoint.
    #[staticmethod]
    fn open(py: Python<'_>, source: SourceArgument<'_>) -> PyResult<Self> {
        let source = source.prepare()?;
        enter(py, None, |_| Ok(Self { inner: Arc::new(CoreBase::read(&registry(), Arc::new(source.open()?))?) }))
    }

    /// The file's path or address.
    fn path(&self) -> Cow<'_, str> {
        self.inner.path().to_string_lossy()
    }

    /// Family, fingerprint, precision, rank of most branches, and number of layers.
    fn facts(&self) -> (String, String, Option<&'static str>, usize, usize) {
        let base = &self.inner;
        let precision = base.precision().map(|p| p.name());
        (base.family().to_owned(), base.fingerprint().to_owned(), precision, base.rank(), base.layers().len())
    }
}
