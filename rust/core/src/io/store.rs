//! Files that are somewhere else: in a bucket, on a hub. The engine knows what it needs of them, and no protocol.

use std::path::{Path, PathBuf};

use tempfile::TempPath;

use super::{Control, Source};
use crate::error::Result;

/// One file of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its whole address, such as `s3://bucket/key` or `hf://user/repo@rev/file`.
    pub url: String,
    /// Its size in bytes.
    pub size: u64,
    /// What changes when the content does: an ETag, a hash, a time of change. Empty if the store tells none.
    pub version: String,
}

/// A file of a store that is now on a local disk.
#[derive(Debug)]
pub enum Local {
    /// In a cache, which stays.
    Kept(PathBuf),
    /// Removed when this is dropped.
    Temporary(TempPath),
}

impl AsRef<Path> for Local {
    fn as_ref(&self) -> &Path {
        match self {
            Local::Kept(path) => path,
            Local::Temporary(path) => path,
        }
    }
}

/// A place that holds files by address. All calls block; several threads call at once.
///
/// Retries and time limits are the store's own: an error that comes out is final for that file.
pub trait Store: Send + Sync {
    /// Calls `each` for every file at or below an address, as the store's pages come; `each` can stop it by an error.
    fn list(&self, at: &str, each: &mut dyn FnMut(Object) -> Result<()>) -> Result<()>;

    /// The file, whole and of the length that the store said; called by its address, with files beside it at hand.
    fn open(&self, url: &str, control: &Control) -> Result<Source>;

    /// Puts a local file under an address. After an error nothing new is visible there.
    fn put(&self, file: &Path, url: &str) -> Result<()>;

    /// What is under an address; `None` if nothing is.
    fn stat(&self, url: &str) -> Result<Option<Object>>;
}
