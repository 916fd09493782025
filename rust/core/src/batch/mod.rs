//! Whole libraries of adapters: one step for every file, resumable, with a record of each.
//!
//! A run first lists what it was given into a temporary file, with an output for each source; two sources with one output
//! are an error before any work. Then a few threads take entries from that list, one file each. A file is read, built and
//! written by a thread of its own, which scales better than sharing a pool does; only the last files, for which there
//! are more threads than work, get all of them. What became of a file is a line of the manifest, from which the next run
//! knows what is done.

mod beside;
mod duplicates;
mod hash;
mod listing;
mod manifest;
mod naming;
mod request;
mod step;
mod work;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Code, Error, Result};
use crate::io::{Control, Store};

pub use listing::{Entry, Listing, Sources, Wanted};
pub use manifest::{Journal, Manifest, Outcome, Record};
pub use naming::Naming;
pub use request::{Op, Request};
pub use step::{Step, Work};
pub use work::run;

/// What to do with files of the same content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Duplicates {
    /// Convert one, and give its output further names: a hard link, or a copy where the file system has none.
    #[default]
    Link,
    /// Convert one, and copy its output.
    Copy,
    /// Convert each.
    Convert,
}

/// How a run goes about it.
#[derive(Debug, Clone)]
pub struct BatchOptions {
    /// The folder, or the address of a store's, that outputs go below.
    pub out: String,
    /// The file of records.
    pub manifest: PathBuf,
    /// Replace outputs that no record claims, and redo what is done.
    pub force: bool,
    /// Compare hashes with the manifest's in place of size and time.
    pub verify: bool,
    /// Stop after this many failures.
    pub max_failures: Option<u64>,
    /// Threads that take files; `None` for one a core, and more for stores.
    pub workers: Option<usize>,
    /// Files of the same content.
    pub duplicates: Duplicates,
    /// Hash every source and output, for the manifest.
    pub hash: bool,
}

/// Watches a run. All calls come from several threads.
pub trait Observer: Sync {
    /// All is listed: files and their bytes.
    fn listed(&self, _files: u64, _bytes: u64) {}
    /// A worker begins with a file. The control tells how far it is, and can stop it.
    fn begin(&self, _worker: usize, _source: &str) -> Arc<Control> {
        Arc::new(Control::default())
    }
    /// A file is through.
    fn end(&self, _worker: usize, _record: &Record) {}
    /// Whether to begin no further file.
    fn stopped(&self) -> bool {
        false
    }
}

/// How a run ended.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// Version of this document.
    pub schema: u32,
    /// Files listed.
    pub files: u64,
    /// Converted now.
    pub done: u64,
    /// Given the output of a file with the same content.
    pub linked: u64,
    /// Done by an earlier run, and unchanged.
    pub unchanged: u64,
    /// Not adapters.
    pub skipped: u64,
    /// Failed.
    pub failed: u64,
    /// Not begun, or broken off, because the run was stopped.
    pub left: u64,
    /// Files with warnings, of those converted now.
    pub warned: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Wall time, listing included.
    pub seconds: f64,
    /// The manifest.
    pub manifest: String,
    /// What stopped the run before its end, if anything did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Stop>,
}

/// Why a run ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// The user asked for it.
    Interrupted,
    /// `max_failures` was reached.
    TooManyFailures,
    /// The device has no room.
    DiskFull,
}

/// Whether a text is the address of a store.
pub(crate) fn is_address(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| !scheme.is_empty() && !scheme.contains(['/', '.']))
}

pub(crate) fn store_for<'s>(store: Option<&'s dyn Store>, address: &str) -> Result<&'s dyn Store> {
    store.ok_or_else(|| {
        Error::new(Code::InvalidArgument, "addresses of stores cannot be used here")
            .at(Path::new(address))
            .hint("name local paths")
    })
}
