//! The record of what became of each file: one JSON document a line, added to as files are done.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::hash::parsed;
use crate::error::{Error, Result};
use crate::report::Warning;

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The output was made.
    Done,
    /// The output is that of a file with the same content.
    Linked,
    /// No adapter, so nothing was made.
    Skipped,
    /// An error.
    Failed,
    /// As an earlier run left it; never written to a manifest.
    Unchanged,
}

/// A line of the manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Version of this document.
    pub schema: u32,
    /// What became of it.
    pub outcome: Outcome,
    /// The path or address.
    pub source: String,
    /// Its size in bytes.
    pub size: u64,
    /// What changes when it does: its time of change, or the store's version.
    pub version: String,
    /// What changes when files beside it do that decide the result; absent if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside: Option<String>,
    /// `xxh3:` and the XXH3-128 of the source; absent where it was not needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// What was to be done, as a hash: it differs when the options do.
    pub step: String,
    /// The dialect that was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialect: Option<String>,
    /// The family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// The kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The ranks of the source's modules, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<usize>,
    /// The path or address of the output.
    pub output: String,
    /// The hash of the output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_hash: Option<String>,
    /// The size of the output.
    pub bytes: u64,
    /// The source whose output it shares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicate_of: Option<String>,
    /// Time it took.
    pub seconds: f64,
    /// Warnings.
    #[serde(default)]
    pub warnings: Vec<Line>,
    /// The error, as in the JSON of commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Value>,
}

/// A warning in a record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// A stable name.
    pub code: String,
    /// The module it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// A sentence.
    pub detail: String,
}

impl From<Warning> for Line {
    fn from(warning: Warning) -> Self {
        Self { code: warning.code, module: warning.module, detail: warning.detail }
    }
}

/// What the next run needs of a record. A million of them take some 100 MB.
#[derive(Debug, Clone, Copy)]
struct Known {
    outcome: Outcome,
    size: u64,
    version: u64,
    beside: u64,
    step: u64,
    hash: Option<u128>,
}

/// An output that was recorded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Made {
    pub bytes: u64,
    pub hash: Option<u128>,
}

/// What earlier runs recorded; of several records of a source and an output the last counts.
#[derive(Debug, Default)]
pub struct Manifest {
    /// By the hashes of both.
    sources: FxHashMap<(u128, u128), Known>,
    outputs: FxHashMap<u128, Made>,
}

impl Manifest {
    /// Reads a manifest; one that does not exist is empty. A last line that a killed run left unfinished does not count.
    pub fn read(path: &Path) -> Result<Self> {
        let mut manifest = Self::default();
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(manifest),
            Err(e) => return Err(Error::io(path, "read the manifest", e)),
        };
        for line in BufReader::new(file).split(b'\n') {
            let line = line.map_err(|e| Error::io(path, "read the manifest", e))?;
            if let Ok(record) = serde_json::from_slice::<Record>(&line) {
                manifest.add(&record);
            }
        }
        Ok(manifest)
    }

    fn add(&mut self, record: &Record) {
        let output = xxh3_128(record.output.as_bytes());
        let known = Known {
            outcome: record.outcome,
            size: record.size,
            version: xxh3_64(record.version.as_bytes()),
            beside: xxh3_64(record.beside.as_deref().unwrap_or_default().as_bytes()),
            step: xxh3_64(record.step.as_bytes()),
            hash: record.hash.as_deref().and_then(parsed),
        };
        self.sources.insert((xxh3_128(record.source.as_bytes()), output), known);
        if matches!(record.outcome, Outcome::Done | Outcome::Linked) {
            let made = Made { bytes: record.bytes, hash: record.output_hash.as_deref().and_then(parsed) };
            self.outputs.insert(output, made);
        }
    }

    /// Records of sources.
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// The output that an earlier run recorded, whoever's it was.
    pub(super) fn output(&self, output: &str) -> Option<Made> {
        self.outputs.get(&xxh3_128(output.as_bytes())).copied()
    }

    /// Whether a source was done with this step into this output, or skipped; by size and version, or by a hash.
    pub(super) fn has(&self, wanted: &Wanted<'_>) -> Option<Outcome> {
        let key = (xxh3_128(wanted.source.as_bytes()), xxh3_128(wanted.output.as_bytes()));
        let known = self.sources.get(&key)?;
        let same = match wanted.hash {
            Some(hash) => known.hash == Some(hash),
            None => known.size == wanted.size && known.version == xxh3_64(wanted.version.as_bytes()),
        };
        let same = same && known.beside == xxh3_64(wanted.beside.unwrap_or_default().as_bytes());
        let finished = known.outcome != Outcome::Failed;
        (same && finished && known.step == xxh3_64(wanted.step.as_bytes())).then_some(known.outcome)
    }
}

/// What is asked of a manifest.
pub(super) struct Wanted<'a> {
    pub source: &'a str,
    pub size: u64,
    pub version: &'a str,
    pub beside: Option<&'a str>,
    pub step: &'a str,
    pub output: &'a str,
    pub hash: Option<u128>,
}

/// Adds records to a manifest. Those that come while the disk is busy are written together, so that waiting for it does
/// not cost a wait for each.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    sender: Option<Sender<String>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Journal {
    /// Opens a manifest for adding; it is made if there is none. Cuts off what a killed run left of a line.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |doing: &'static str| move |e| Error::io(path, doing, e);
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create the folder", e))?;
        }
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).open(path).map_err(fail("open the manifest"))?;
        let whole = whole_lines(&mut file).map_err(fail("read the manifest"))?;
        file.set_len(whole).map_err(fail("write the manifest"))?;
        let (sender, receiver) = channel();
        let own = path.to_path_buf();
        let thread =
            std::thread::spawn(move || write(file, &receiver).map_err(|e| Error::io(&own, "write the manifest", e)));
        Ok(Self { path: path.to_path_buf(), sender: Some(sender), thread: Some(thread) })
    }

    /// Adds a record. It is on the disk when [`Journal::close`] returns, mostly long before.
    pub fn add(&self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record).map_err(|e| Error::io(&self.path, "write the manifest", e.into()))?;
        match self.sender.as_ref().map(|s| s.send(line)) {
            Some(Ok(())) => Ok(()),
            // The thread ends before us only by an error, which closing tells.
            _ => Err(Error::io(&self.path, "write the manifest", std::io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Waits until all is on the disk.
    pub fn close(mut self) -> Result<()> {
        drop(self.sender.take());
        let result = self.thread.take().map(JoinHandle::join);
        result.map_or(Ok(()), |joined| joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }
}

fn write(mut file: File, lines: &Receiver<String>) -> std::io::Result<()> {
    while let Ok(first) = lines.recv() {
        let mut text = first;
        text.push('\n');
        for line in lines.try_iter() {
            text.push_str(&line);
            text.push('\n');
        }
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
    }
    Ok(())
}

/// The length of a file up to the end of its last whole line.
fn whole_lines(file: &mut File) -> std::io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut block = [0; 4096];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(at) = part.iter().rposition(|&b| b == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}
