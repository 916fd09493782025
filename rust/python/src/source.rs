//! Bytes that Python owns, in both directions.

use std::path::{Path, PathBuf};

use lorafmt_core::dtype::Dtype;
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::io::{Bytes, Control, Local, Source, TensorInfo};
use lorafmt_core::kind::Module;
use lorafmt_core::ops;
use lorafmt_core::plan::Plan;
use lorafmt_remote::{Address, is_remote};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rayon::prelude::*;

use crate::enter::enter;

/// Rows of a delta computed at a time, in elements.
const TILE: usize = 1 << 18;

/// Memory that a Python object owns: address, size, and the object that keeps it alive.
///
/// The limited API of Python 3.10 has no buffer protocol, so arrays hand over their address; the package's own code
/// is the only caller and checks that they are contiguous and in host memory.
#[derive(FromPyObject)]
pub(crate) struct Buffer(usize, usize, #[allow(dead_code, reason = "keeps the memory alive")] Py<PyAny>);

impl AsRef<[u8]> for Buffer {
    #[allow(unsafe_code)]
    fn as_ref(&self) -> &[u8] {
        if self.1 == 0 {
            return &[];
        }
        // SAFETY: address and size are those of an array that `self.2` keeps alive, in host memory, contiguous.
        // Writing to it from another thread while it is read is the caller's race, as with any array library.
        unsafe { std::slice::from_raw_parts(self.0 as *const u8, self.1) }
    }
}

impl Buffer {
    #[allow(unsafe_code, clippy::mut_from_ref)]
    fn as_mut(&self) -> &mut [u8] {
        if self.1 == 0 {
            return &mut [];
        }
        // SAFETY: as above; the package allocates these arrays for this one call and gives each to one tensor only.
        unsafe { std::slice::from_raw_parts_mut(self.0 as *mut u8, self.1) }
    }
}

/// What Python may pass as an input.
#[derive(FromPyObject)]
pub(crate) enum SourceArgument<'py> {
    /// A file's content.
    Content(Bound<'py, PyBytes>),
    /// A path.
    Path(PathBuf),
    /// A file that was fetched, its address, and whether what belongs beside it is there, too.
    Fetched(PathBuf, String, bool),
    /// Tensors as `(key, dtype, shape, buffer)`, and metadata.
    Tensors(Vec<(String, String, Vec<usize>, Buffer)>, Vec<(String, String)>),
}

/// The same without a tie to the interpreter.
pub(crate) enum Prepared {
    Content(Py<PyBytes>, usize, usize),
    Path(PathBuf),
    Fetched(PathBuf, String, bool),
    Tensors(Vec<(String, String, Vec<usize>, Buffer)>, Vec<(String, String)>),
}

impl SourceArgument<'_> {
    pub(crate) fn prepare(self) -> PyResult<Prepared> {
        Ok(match self {
            SourceArgument::Content(bytes) => {
                let slice = bytes.as_bytes();
                let (address, len) = (slice.as_ptr() as usize, slice.len());
                Prepared::Content(bytes.unbind(), address, len)
            }
            SourceArgument::Path(path) => Prepared::Path(path),
            SourceArgument::Fetched(path, address, whole) => Prepared::Fetched(path, address, whole),
            SourceArgument::Tensors(tensors, metadata) => Prepared::Tensors(tensors, metadata),
        })
    }
}

impl Prepared {
    pub(crate) fn open(self) -> Result<Source> {
        match self {
            Prepared::Path(path) => Source::open(&path),
            Prepared::Fetched(path, address, whole) => {
                let source = Source::fetched(Path::new(&address), Local::Kept(path.clone()))?;
                Ok(source.with_beside(Box::new(move |name| match read_beside(&path, name) {
                    Ok(None) if !whole => Err(Error::new(Code::Offline, format!("`{name}` is not in the cache"))),
                    read => read,
                })))
            }
            // Bytes objects never change or move, and the buffer keeps this one alive: no copy.
            Prepared::Content(owner, address, len) => {
                Source::from_bytes(Path::new("<bytes>"), Box::new(Buffer(address, len, owner.into_any())))
            }
            Prepared::Tensors(tensors, metadata) => {
                let entry = |(name, dtype, shape, buffer): (String, String, Vec<usize>, Buffer)| {
                    let dtype = Dtype::from_name(&dtype).ok_or_else(|| {
                        Error::new(Code::InvalidArgument, format!("`{name}` has the unknown dtype `{dtype}`"))
                            .key(&name)
                    })?;
                    Ok((TensorInfo { name, dtype, shape, range: 0..0 }, Box::new(buffer) as Bytes))
                };
                let tensors = tensors.into_iter().map(entry).collect::<Result<Vec<_>>>()?;
                Source::from_tensors(Path::new("<dict>"), metadata, tensors)
            }
        }
    }
}

/// Scheme, repository or whole address, revision, path.
type AddressParts = (&'static str, String, Option<String>, String);

/// An address in its parts: `hf` with a repository, or `url` with the whole text. None for a path.
///
/// With `repository` a bare `user/repo` is one, too.
#[pyfunction]
pub(crate) fn address(py: Python<'_>, text: String, repository: bool) -> PyResult<Option<AddressParts>> {
    enter(py, None, |_| {
        let has_scheme = text.contains("://");
        let parsed = match repository && !has_scheme {
            true => Address::parse(&format!("hf://{text}")),
            false if is_remote(&text) => Address::parse(&text),
            false => return Ok(None),
        };
        match parsed {
            Ok(Address::Hub(at)) => Ok(Some(("hf", at.repo, at.revision, at.path))),
            Err(error) if !has_scheme || text.starts_with("hf://") => Err(error),
            // Python knows more kinds of addresses.
            Ok(Address::S3(_)) | Err(_) => Ok(Some(("url", text, None, String::new()))),
        }
    })
}

/// A text file in the folder of another one; `None` if there is none.
fn read_beside(path: &Path, name: &str) -> Result<Option<String>> {
    let beside = path.with_file_name(name);
    match std::fs::read_to_string(&beside) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(&beside, "read the configuration", e)),
    }
}

/// Computes every output of a plan into the buffer at its position, in parallel.
pub(crate) fn fill(plan: &Plan, buffers: &[Buffer], control: &Control) -> Result<()> {
    if buffers.len() != plan.outputs.len() {
        return Err(Error::new(Code::InvalidArgument, "one buffer a tensor is needed"));
    }
    plan.outputs.par_iter().zip(buffers).try_for_each(|(output, buffer)| {
        control.check()?;
        if buffer.1 != output.tensor.nbytes() {
            return Err(Error::new(
                Code::InvalidArgument,
                format!("the buffer of `{}` has the wrong size", output.key),
            ));
        }
        output.tensor.read(0..output.tensor.rows(), buffer.as_mut());
        Ok(())
    })
}

/// Computes the delta of a module into a buffer of float32 or float64, told apart by its size.
pub(crate) fn delta_into(module: &Module, strength: f64, buffer: &Buffer, control: &Control) -> Result<()> {
    let none = || {
        let kind = module.kind_name();
        Error::new(Code::UnsupportedKind, format!("a {kind} module has no delta without the base weights"))
    };
    if module.is_dora() {
        return Err(none());
    }
    let module = module.tightened();
    let (rows, cols) = ops::shape(&module).ok_or_else(none)?;
    let width = buffer.1 / (rows * cols).max(1);
    if !matches!(width, 4 | 8) || buffer.1 != rows * cols * width {
        return Err(Error::new(Code::InvalidArgument, "the buffer has the wrong size"));
    }
    let step = (TILE / cols.max(1)).max(1);
    buffer.as_mut().par_chunks_mut(step * cols * width).enumerate().try_for_each(|(i, out)| {
        control.check()?;
        let start = i * step;
        let values = ops::delta_rows(&module, start..rows.min(start + step)).ok_or_else(none)?;
        for (target, value) in out.chunks_exact_mut(width).zip(values) {
            let value = value * strength;
            if width == 4 {
                target.copy_from_slice(&(value as f32).to_ne_bytes());
            } else {
                target.copy_from_slice(&value.to_ne_bytes());
            }
        }
        Ok(())
    })
}
