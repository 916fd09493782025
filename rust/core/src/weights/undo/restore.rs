//! Taking a fused checkpoint back to what it was.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::rice::decode;
use super::{KEY, combined, hashed};
use crate::dtype::Dtype;
use crate::error::{Code, Error, Result};
use crate::io::{Control, Header, Pending, Source, TensorInfo, WriteOptions, parse_head, write_at};
use crate::pool::Pool;
use crate::table::Registry;
use crate::weights::files::Files;
use crate::weights::output::{Folder, Role, copied, copy_range, listing, refuse_output};

/// How to take a checkpoint back.
#[derive(Debug, Clone, Default)]
pub struct UnfuseOptions {
    /// Only say what would be done.
    pub dry_run: bool,
    /// Replace an existing output.
    pub overwrite: bool,
}

/// What was taken back.
#[derive(Debug, Clone, Serialize)]
pub struct UnfuseReport {
    /// Version of this document.
    pub schema: u32,
    /// The fused checkpoint.
    pub fused: String,
    /// The undo file.
    pub undo: String,
    /// The name of the checkpoint that it was.
    pub base: String,
    /// Where it was written; `None` for a dry run.
    pub path: Option<String>,
    /// Bytes of its weights.
    pub bytes: u64,
    /// Tensors that were restored.
    pub tensors: usize,
    /// Files that were restored.
    pub restored: usize,
    /// Files that were copied as they are.
    pub copied: usize,
    /// Wall time.
    pub seconds: f64,
}

#[derive(Deserialize)]
struct Document {
    base: Named,
    tensors: BTreeMap<String, Facts>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Facts {
    original: String,
    fused: String,
    dtype: String,
    shape: Vec<usize>,
}

/// An opened undo file.
struct Undo {
    source: Source,
    document: Document,
}

/// A file that is restored: the original header, and where its tensors come from.
struct Restore {
    fused: Arc<Source>,
    head: Vec<u8>,
    original: Header,
    /// For each tensor of the original its number in the fused file, and if it was changed that in the undo file.
    tensors: Vec<(usize, Option<usize>)>,
    /// What errors and keys call the file.
    place: String,
}

/// Writes what `fused` was before it was fused, to the bit. Nothing is written if the undo file is of another
/// checkpoint.
pub fn unfuse(
    registry: &Registry,
    fused: &Path,
    undo: &Path,
    output: &Path,
    options: &UnfuseOptions,
    control: &Control,
) -> Result<UnfuseReport> {
    let started = Instant::now();
    let write = WriteOptions { overwrite: options.overwrite };
    let files = Files::find(registry, fused)?;
    let undo = Undo::open(undo)?;
    refuse_output(&files, fused, output, write)?;
    let mut shards: Vec<(PathBuf, Option<Restore>)> = Vec::new();
    for relative in files.groups.iter().flat_map(|g| g.files.iter().map(|f| g.folder.join(f))) {
        let parts: Vec<_> = relative.iter().map(|p| p.to_string_lossy()).collect();
        let place = if files.folder { parts.join("/") } else { String::new() };
        let restore = undo.restore(&files.root.join(&relative), place)?;
        shards.push((relative, restore));
    }
    let all: usize =
        shards.iter().flat_map(|(_, r)| r).map(|r| r.tensors.iter().filter(|t| t.1.is_some()).count()).sum();
    if all != undo.document.tensors.len() {
        let message = format!(
            "the undo file is of {} tensors, and the checkpoint has {all} of them",
            undo.document.tensors.len()
        );
        return Err(undo.wrong(message).at(fused));
    }
    let mut report = UnfuseReport {
        schema: 1,
        fused: fused.to_string_lossy().into_owned(),
        undo: undo.source.path().to_string_lossy().into_owned(),
        base: undo.document.base.name.clone(),
        path: None,
        bytes: 0,
        tensors: all,
        restored: shards.iter().filter(|(_, r)| r.is_some()).count(),
        copied: shards.iter().filter(|(_, r)| r.is_none()).count(),
        seconds: 0.0,
    };
    for (relative, restore) in &shards {
        let path = files.root.join(relative);
        let len = match restore {
            Some(restore) => restore.len(),
            None => std::fs::metadata(&path).map_err(|e| Error::io(&path, "open the file", e))?.len() as usize,
        };
        report.bytes += len as u64;
        control.expect(len);
    }
    if !options.dry_run {
        if files.folder {
            write_folder(&undo, &files, &shards, output, write, control)?;
        } else if let [(_, Some(restore))] = shards.as_slice() {
            restore.pending(&undo, output, control)?.commit(write)?;
        }
        report.path = Some(output.to_string_lossy().into_owned());
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

fn write_folder(
    undo: &Undo,
    files: &Files,
    shards: &[(PathBuf, Option<Restore>)],
    output: &Path,
    write: WriteOptions,
    control: &Control,
) -> Result<()> {
    let folder = Folder::beside(output, write)?;
    let (listed, _) = listing(files)?;
    for (relative, role) in &listed {
        let target = folder.place(relative)?;
        let pending = match role {
            Role::Shard(number) => match &shards[*number].1 {
                Some(restore) => restore.pending(undo, &target, control)?,
                None => copied(&files.root.join(relative), &target, control)?,
            },
            Role::Other => copied(&files.root.join(relative), &target, control)?,
        };
        pending.commit(WriteOptions::default())?;
    }
    folder.commit(&listed.into_iter().map(|(path, _)| path).collect::<Vec<_>>())
}

impl Undo {
    fn open(path: &Path) -> Result<Self> {
        let source = Source::open(path)?;
        let text = source.metadata_value(KEY).ok_or_else(|| {
            Error::new(Code::WrongUndo, "this is no undo file").at(path).hint("name the file that `fuse --undo` wrote")
        })?;
        let document = serde_json::from_str(text)
            .map_err(|e| Error::new(Code::WrongUndo, format!("the undo file cannot be read: {e}")).at(path))?;
        Ok(Self { document, source })
    }

    fn wrong(&self, message: String) -> Error {
        Error::new(Code::WrongUndo, format!("{message} (undo file `{}`)", self.source.path().display()))
    }

    fn find(&self, key: &str) -> Option<usize> {
        self.source.tensors().iter().position(|t| t.name == key)
    }

    /// What it takes to restore a file; `None` if the file was not changed.
    fn restore(&self, path: &Path, place: String) -> Result<Option<Restore>> {
        let Some(head) = self.find(&format!("header:{place}")) else { return Ok(None) };
        let head = self.source.bytes(head).to_vec();
        let fused = Arc::new(Source::open(path)?);
        let original = parse_head(&head).map_err(|e| self.wrong(e.message().to_owned()).at(path))?;
        let wrong = |message: String, info: &TensorInfo| Err(self.wrong(message).key(&info.name).at(path));
        let mut tensors = Vec::new();
        for info in &original.tensors {
            let found = fused.tensors().iter().position(|t| t.name == info.name);
            let Some(at) =
                found.filter(|&i| (fused.tensors()[i].dtype, &fused.tensors()[i].shape) == (info.dtype, &info.shape))
            else {
                return wrong(format!("the checkpoint has no `{}` as its base had it", info.name), info);
            };
            let key = format!("tensor:{place}:{}", info.name);
            let record = self.find(&key);
            if let Some(facts) = self.document.tensors.get(&key)
                && (record.is_none() || facts.shape != info.shape || Dtype::from_name(&facts.dtype) != Some(info.dtype))
            {
                return wrong(format!("the undo file is damaged at `{}`", info.name), info);
            }
            tensors.push((at, record));
        }
        if original.tensors.len() != fused.tensors().len() {
            return Err(self.wrong("the checkpoint has tensors that its base had not".to_owned()).at(path));
        }
        Ok(Some(Restore { fused, head, original, tensors, place }))
    }
}

impl Restore {
    fn len(&self) -> usize {
        self.original.tensors.iter().map(|t| t.range.end).max().unwrap_or(self.head.len())
    }

    fn pending(&self, undo: &Undo, target: &Path, control: &Control) -> Result<Pending> {
        let fail = |e| Error::io(target, "write the file", e);
        let fill = |file: &File| {
            file.set_len(self.len() as u64).map_err(fail)?;
            write_at(file, &self.head, 0).map_err(fail)?;
            control.advance(self.head.len());
            let fused = self.fused.path();
            let mut from = File::open(fused).map_err(|e| Error::io(fused, "open the file", e))?;
            let mut to = file.try_clone().map_err(fail)?;
            for (info, (at, record)) in self.original.tensors.iter().zip(&self.tensors) {
                match record {
                    Some(record) => self.tensor(undo, info, *at, *record, file, target, control)?,
                    None => {
                        let range = self.fused.tensors()[*at].range.clone();
                        let done = copy_range(&mut from, range, &mut to, info.range.start, control);
                        control.check()?;
                        done.map_err(fail)?;
                    }
                }
            }
            Ok(())
        };
        Ok(Pending::filled(target, fill)?.0)
    }

    #[allow(clippy::too_many_arguments, reason = "one call, of a tensor's two sources and its target")]
    fn tensor(
        &self,
        undo: &Undo,
        info: &TensorInfo,
        at: usize,
        record: usize,
        file: &File,
        target: &Path,
        control: &Control,
    ) -> Result<()> {
        let wrong = |message: &str| {
            let message = format!("{message} at `{}`", info.name);
            Err(undo.wrong(message).key(&info.name).at(self.fused.path()))
        };
        let Some(facts) = undo.document.tensors.get(&format!("tensor:{}:{}", self.place, info.name)) else {
            return wrong("the undo file is damaged");
        };
        let rows = info.shape.first().copied().unwrap_or(1);
        let line = info.range.len() / rows.max(1);
        let Some(tiles) = tiles(undo.source.bytes(record), rows) else { return wrong("the undo file is damaged") };
        let changed = self.fused.bytes(at);
        let buffers = Pool::default();
        let restored: Result<Vec<_>> = tiles
            .par_iter()
            .with_max_len(1)
            .map(|(rows, code)| {
                control.check()?;
                let bytes = rows.start * line..rows.end * line;
                let fused = &changed[bytes.clone()];
                buffers.with(|buffer: &mut Vec<u8>| {
                    buffer.resize(fused.len(), 0);
                    if code.len() == fused.len() {
                        buffer.copy_from_slice(code);
                    } else if !decode(info.dtype, code, fused, buffer) {
                        return Ok(None);
                    }
                    write_at(file, buffer, (info.range.start + bytes.start) as u64)
                        .map_err(|e| Error::io(target, "write the file", e))?;
                    control.advance(buffer.len());
                    Ok(Some((hashed(fused), hashed(buffer))))
                })
            })
            .collect();
        let hashes: Option<Vec<_>> = restored?.into_iter().collect();
        let hashes = hashes.unwrap_or_default();
        if combined(hashes.iter().map(|h| &h.0)) != facts.fused {
            return wrong("the checkpoint is another than the undo file was written for");
        }
        if combined(hashes.iter().map(|h| &h.1)) != facts.original {
            return wrong("the undo file is damaged");
        }
        Ok(())
    }
}

/// Rows and code of every tile; `None` if they do not make up the tensor.
fn tiles(mut payload: &[u8], rows: usize) -> Option<Vec<(Range<usize>, &[u8])>> {
    let (mut out, mut row) = (Vec::new(), 0usize);
    while !payload.is_empty() {
        let number = |bytes: &[u8]| Some(u32::from_le_bytes(*bytes.first_chunk::<4>()?) as usize);
        let (count, len) = (number(payload)?, number(payload.get(4..)?)?);
        let code = payload.get(8..8usize.checked_add(len)?)?;
        let end = row.checked_add(count).filter(|end| *end <= rows && count > 0)?;
        out.push((row..end, code));
        row = end;
        payload = &payload[8 + len..];
    }
    (row == rows).then_some(out)
}
