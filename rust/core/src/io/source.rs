//! Where tensor bytes come from: a mapped file, bytes in memory, or tensors that somebody else owns.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use super::header::{Header, TensorInfo, parse};
use super::partial::{self, Presence};
use super::store::Local;
use crate::error::{Code, Error, Result};

/// Bytes that outlive the source and can be read from any thread.
pub type Bytes = Box<dyn AsRef<[u8]> + Send + Sync>;

/// Reads a text file beside a file that is somewhere else, by its name; `None` if there is none.
pub type Beside = Box<dyn Fn(&str) -> Result<Option<String>> + Send + Sync>;

/// The bytes of a file, and what removes the file once they are no longer needed.
struct Fetched(Bytes, #[allow(dead_code, reason = "a temporary file lives as long as it does")] Local);

impl AsRef<[u8]> for Fetched {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

enum Backing {
    /// A whole safetensors file; tensor ranges point into it.
    Whole(Bytes),
    /// One buffer for each tensor.
    Parts(Vec<Bytes>),
}

/// An opened input. Nothing but the header has been read.
pub struct Source {
    path: PathBuf,
    backing: Backing,
    header: Header,
    sha256: OnceLock<Option<String>>,
    /// Which tensors are here, where not all of them are.
    presence: Option<Presence>,
    /// How a file beside it is read, where it is no local file.
    beside: Option<Beside>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("path", &self.path).field("tensors", &self.header.tensors.len()).finish()
    }
}

impl Source {
    /// Maps a file. A folder with an `adapter_model.safetensors`, as PEFT writes one, stands for that file.
    ///
    /// The mapping is shared and read-only: no tensor byte is copied. A file that another process truncates while
    /// it is mapped ends the process with a bus error, as with every memory-mapped reader.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "open the file", e))?;
        if meta.is_dir() {
            let inner = path.join("adapter_model.safetensors");
            if inner.is_file() {
                return Self::open(&inner);
            }
            return Err(Error::new(Code::IsADirectory, "this is a folder").at(path));
        }
        let file = File::open(path).map_err(|e| Error::io(path, "open the file", e))?;
        if !meta.is_file() {
            // A pipe or a device has no length to map.
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut &file, &mut bytes).map_err(|e| Error::io(path, "read the file", e))?;
            return Self::from_bytes(path, Box::new(bytes));
        }
        if meta.len() == 0 {
            return Err(Error::new(Code::Truncated, "the file is empty").at(path));
        }
        Self::from_bytes(path, map(&file).map_err(|e| Error::io(path, "map the file", e))?)
    }

    /// A file that was fetched from somewhere else; `path` is what messages call it, and recognition goes by.
    ///
    /// A temporary file is removed when the source is dropped.
    pub fn fetched(path: &Path, local: Local) -> Result<Self> {
        let file = File::open(local.as_ref()).map_err(|e| Error::io(local.as_ref(), "open the file", e))?;
        let empty = file.metadata().map_err(|e| Error::io(local.as_ref(), "open the file", e))?.len() == 0;
        let bytes: Bytes = match empty {
            true => Box::new(Vec::new()),
            false => map(&file).map_err(|e| Error::io(local.as_ref(), "map the file", e))?,
        };
        Self::from_bytes(path, Box::new(Fetched(bytes, local)))
    }

    /// A file of `len` bytes of which only some are here: the header at least, as pieces with their places.
    ///
    /// Tensors that are not here read as zeros, and asking for one is noted: see [`Source::missed`].
    pub fn partial(path: &Path, len: u64, pieces: &[(u64, Vec<u8>)]) -> Result<Self> {
        let bytes = partial::sparse(len, pieces).map_err(|e| e.at(path))?;
        let source = Self::from_bytes(path, bytes)?;
        let presence = Presence::of(source.tensors(), pieces);
        Ok(Self { presence: Some(presence), ..source })
    }

    /// Numbers of the tensors that were asked for and are not here. If there are any, whatever was made of this source
    /// is void: fetch them and begin again.
    pub fn missed(&self) -> Vec<usize> {
        self.presence.as_ref().map(Presence::missed).unwrap_or_default()
    }

    /// Files beside it are read by `beside` and not looked for in a folder.
    #[must_use]
    pub fn with_beside(self, beside: Beside) -> Self {
        Self { beside: Some(beside), ..self }
    }

    /// A text file beside it, with its path; `None` if there is none.
    pub(crate) fn beside(&self, name: &str) -> Result<Option<(PathBuf, String)>> {
        let path = self.path.parent().unwrap_or(Path::new("")).join(name);
        let read = match &self.beside {
            Some(read) => return Ok(read(name)?.map(|text| (path, text))),
            None => std::fs::read_to_string(&path),
        };
        match read {
            Ok(text) => Ok(Some((path, text))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(&path, "read the configuration", e)),
        }
    }

    /// Reads a file that is already in memory; `path` is what messages call it.
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self> {
        let header = parse((*bytes).as_ref()).map_err(|e| e.at(path))?;
        Ok(Self::new(path, Backing::Whole(bytes), header))
    }

    fn new(path: &Path, backing: Backing, header: Header) -> Self {
        Self { path: path.to_path_buf(), backing, header, sha256: OnceLock::new(), presence: None, beside: None }
    }

    /// Tensors that live in memory, as `(info, bytes)`; the ranges of the infos are ignored.
    pub fn from_tensors(
        path: &Path,
        metadata: Vec<(String, String)>,
        tensors: Vec<(TensorInfo, Bytes)>,
    ) -> Result<Self> {
        let (mut infos, mut parts) = (Vec::new(), Vec::new());
        for (mut info, bytes) in tensors {
            let have = (*bytes).as_ref().len();
            let want = info.shape.iter().try_fold(info.dtype.size(), |n, &d| n.checked_mul(d));
            if want != Some(have) {
                let message =
                    format!("`{}` is {} of shape {:?} but has {have} bytes", info.name, info.dtype.name(), info.shape);
                return Err(Error::new(Code::InvalidOffsets, message).key(&info.name).at(path));
            }
            info.range = 0..have;
            infos.push(info);
            parts.push(bytes);
        }
        Ok(Self::new(path, Backing::Parts(parts), Header { metadata, tensors: infos }))
    }

    /// What messages call it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata entries.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.header.metadata
    }

    /// The file up to its first tensor: the length of the header and the header; `None` where there is no file.
    pub(crate) fn head(&self) -> Option<&[u8]> {
        let Backing::Whole(bytes) = &self.backing else { return None };
        let bytes = (**bytes).as_ref();
        let length = u64::from_le_bytes(*bytes.first_chunk::<8>()?) as usize;
        bytes.get(..8 + length)
    }

    /// The value of a metadata entry.
    pub fn metadata_value(&self, key: &str) -> Option<&str> {
        self.header.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// The tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The bytes of tensor number `index`; not copied.
    pub fn bytes(&self, index: usize) -> &[u8] {
        if let Some(presence) = &self.presence {
            presence.ask(index);
        }
        match &self.backing {
            Backing::Whole(bytes) => (**bytes).as_ref().get(self.header.tensors[index].range.clone()).unwrap_or(&[]),
            Backing::Parts(parts) => (*parts[index]).as_ref(),
        }
    }

    /// The size in bytes: of the file, or of all tensors where there is no file.
    pub fn len(&self) -> usize {
        match &self.backing {
            Backing::Whole(bytes) => (**bytes).as_ref().len(),
            Backing::Parts(parts) => parts.iter().map(|p| (**p).as_ref().len()).sum(),
        }
    }

    /// Whether there are no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether both hold the same tensors under the same names. Reads bytes only where everything else agrees.
    pub fn same_as(&self, other: &Source) -> bool {
        let mine = || self.header.tensors.iter().map(|t| (&t.name, t.dtype, &t.shape));
        mine().eq(other.header.tensors.iter().map(|t| (&t.name, t.dtype, &t.shape)))
            && (0..self.header.tensors.len()).all(|i| self.bytes(i) == other.bytes(i))
    }

    /// The SHA-256 of the file in lower-case hexadecimal; `None` where there is no whole file. Reads every byte, once.
    pub fn sha256(&self) -> Option<String> {
        let compute = || match &self.backing {
            _ if !self.is_file() => None,
            Backing::Whole(bytes) => {
                let digest = Sha256::digest((**bytes).as_ref());
                Some(digest.iter().map(|b| format!("{b:02x}")).collect())
            }
            Backing::Parts(_) => None,
        };
        self.sha256.get_or_init(compute).clone()
    }

    /// Whether [`Source::sha256`] gives a hash.
    pub fn is_file(&self) -> bool {
        matches!(self.backing, Backing::Whole(_)) && self.presence.is_none()
    }
}

fn map(file: &File) -> std::io::Result<Bytes> {
    // SAFETY: the mapping is read-only and private to its source. Another process could change the file, which would
    // change the bytes under us; they are only ever read as plain numbers, for which every bit pattern is a value, and
    // all offsets were checked against the mapping's own length, which cannot change.
    #[allow(unsafe_code)]
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(Box::new(map))
}
