//! Writing an undo file while a checkpoint is fused.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value, json};

use super::rice::encode;
use super::{KEY, combined, hashed};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::io::write_at;
use crate::weights::Checkpoint;

/// One tile of a changed tensor.
pub(in crate::weights) struct Record {
    payload: Vec<u8>,
    original: [u8; 32],
    fused: [u8; 32],
}

struct Entry {
    key: String,
    len: u64,
    /// What the metadata says of it; nothing of headers.
    facts: Option<Value>,
}

struct State {
    at: u64,
    entries: Vec<Entry>,
}

/// An undo file on its way. Bodies come first, behind a gap that the header will fill.
pub(in crate::weights) struct Recorder<'a> {
    checkpoint: &'a Checkpoint,
    file: File,
    path: &'a Path,
    gap: u64,
    state: Mutex<State>,
}

impl<'a> Recorder<'a> {
    /// A recorder for these tensors and files (numbers of shards) into `file`, which is called `path`.
    pub(in crate::weights) fn new(
        checkpoint: &'a Checkpoint,
        tensors: &[(usize, usize)],
        shards: &[usize],
        file: &File,
        path: &'a Path,
    ) -> Result<Self> {
        let file = file.try_clone().map_err(|e| Error::io(path, "write the undo file", e))?;
        // As long as the header can become: numbers of all digits, and hashes.
        let facts = facts("f".repeat(64), "f".repeat(64), Dtype::F8E4M3, &[]);
        let mut longest: Vec<Entry> = Vec::new();
        for &(shard, tensor) in tensors {
            let key = tensor_key(checkpoint, shard, tensor);
            let shape = &checkpoint.shards()[shard].source.tensors()[tensor].shape;
            let mut facts = facts.clone();
            facts["shape"] = json!(shape);
            longest.push(Entry { key, len: u64::MAX / 4, facts: Some(facts) });
        }
        for &shard in shards {
            longest.push(Entry { key: header_key(checkpoint, shard), len: u64::MAX / 4, facts: None });
        }
        let gap = (8 + head(checkpoint, &longest).len() as u64).next_multiple_of(8);
        Ok(Self { checkpoint, file, path, gap, state: Mutex::new(State { at: gap, entries: Vec::new() }) })
    }

    /// What is kept of a tile.
    pub(in crate::weights) fn tile(dtype: Dtype, original: &[u8], fused: &[u8], rows: usize) -> Record {
        let code = encode(dtype, original, fused);
        let code = if code.len() < original.len() { &code } else { original };
        let mut payload = Vec::with_capacity(8 + code.len());
        payload.extend_from_slice(&(rows as u32).to_le_bytes());
        payload.extend_from_slice(&(code.len() as u32).to_le_bytes());
        payload.extend_from_slice(code);
        Record { payload, original: hashed(original), fused: hashed(fused) }
    }

    /// Keeps a tensor, of which these are the tiles from the first row to the last.
    pub(in crate::weights) fn add(&self, shard: usize, tensor: usize, tiles: &[Record]) -> Result<()> {
        let info = &self.checkpoint.shards()[shard].source.tensors()[tensor];
        let payload: Vec<u8> = tiles.iter().flat_map(|t| &t.payload).copied().collect();
        let original = combined(tiles.iter().map(|t| &t.original));
        let fused = combined(tiles.iter().map(|t| &t.fused));
        let facts = facts(original, fused, info.dtype, &info.shape);
        self.append(tensor_key(self.checkpoint, shard, tensor), &payload, Some(facts))
    }

    fn append(&self, key: String, payload: &[u8], facts: Option<Value>) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        write_at(&self.file, payload, state.at).map_err(|e| Error::io(self.path, "write the undo file", e))?;
        state.at += payload.len() as u64;
        state.entries.push(Entry { key, len: payload.len() as u64, facts });
        Ok(())
    }

    /// Keeps the headers of files that were written anew, and writes that of the undo file. Returns its size.
    pub(in crate::weights) fn finish(self, shards: &[usize]) -> Result<u64> {
        for &shard in shards {
            let head = self.checkpoint.shards()[shard].source.head().unwrap_or_default();
            self.append(header_key(self.checkpoint, shard), head, None)?;
        }
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut text = head(self.checkpoint, &state.entries);
        text.resize(self.gap as usize - 8, b' ');
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut text);
        write_at(&self.file, &bytes, 0).map_err(|e| Error::io(self.path, "write the undo file", e))?;
        Ok(state.at)
    }
}

fn facts(original: String, fused: String, dtype: Dtype, shape: &[usize]) -> Value {
    json!({"original": original, "fused": fused, "dtype": dtype.name(), "shape": shape})
}

fn head(checkpoint: &Checkpoint, entries: &[Entry]) -> Vec<u8> {
    let facts = entries.iter().filter_map(|e| Some((e.key.clone(), e.facts.clone()?)));
    let name = checkpoint.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let family = &checkpoint.registry().families[checkpoint.family()].name;
    let undo = json!({
        "schema": 1,
        "base": {"name": name, "family": family},
        "tensors": facts.collect::<Map<String, Value>>(),
    });
    let mut json = Map::new();
    json.insert("__metadata__".to_owned(), json!({"format": "pt", KEY: undo.to_string()}));
    let mut at = 0u64;
    for entry in entries {
        let end = at.saturating_add(entry.len);
        json.insert(entry.key.clone(), json!({"dtype": "U8", "shape": [entry.len], "data_offsets": [at, end]}));
        at = if entry.len > u64::MAX / 8 { at.max(entry.len) } else { end };
    }
    Value::Object(json).to_string().into_bytes()
}

/// A file in keys: its path below the folder, or nothing for a single file, which may be renamed.
fn place(checkpoint: &Checkpoint, shard: usize) -> String {
    let parts = checkpoint.shards()[shard].relative.iter().map(|p| p.to_string_lossy());
    if checkpoint.files().folder { parts.collect::<Vec<_>>().join("/") } else { String::new() }
}

fn tensor_key(checkpoint: &Checkpoint, shard: usize, tensor: usize) -> String {
    format!("tensor:{}:{}", place(checkpoint, shard), checkpoint.key((shard, tensor)))
}

fn header_key(checkpoint: &Checkpoint, shard: usize) -> String {
    format!("header:{}", place(checkpoint, shard))
}
