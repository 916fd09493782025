//! One file of a checkpoint anew: its header with a word on what was fused, the same order and offsets, copied ranges,
//! and computed tiles.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::claims::{Claims, Touched};
use super::work::{Measure, Scratch, Work};
use crate::error::{Code, Error, Result};
use crate::io::{Control, Source, write_at};
use crate::pool::Pool;
use crate::random::Counter;
use crate::weights::Checkpoint;
use crate::weights::checkpoint::At;
use crate::weights::output::copy_range;
use crate::weights::round::Rounding;
use crate::weights::undo::Recorder;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Storing {
    /// Rounds by chance, from this seed.
    pub(super) seed: Option<u64>,
}

/// Everything that one file needs.
pub(super) struct Rewrite<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) claims: &'a Claims,
    pub(super) shard: usize,
    pub(super) storing: Storing,
    /// New bytes of tensors of scales.
    pub(super) scales: &'a BTreeMap<At, Vec<u8>>,
    /// The metadata entry to add.
    pub(super) entry: (&'a str, String),
    pub(super) undo: Option<&'a Recorder<'a>>,
    pub(super) control: &'a Control,
}

/// The header of a file with one more metadata entry, which replaces one of its name.
pub(super) fn header(source: &Source, entry: (&str, &str)) -> Result<Vec<u8>> {
    let head = source.head().unwrap_or_default();
    let text = head.get(8..).unwrap_or_default();
    let mut json: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|e| Error::new(Code::InvalidHeader, format!("the header is not valid: {e}")).at(source.path()))?;
    match json.get_mut("__metadata__").and_then(Value::as_object_mut) {
        Some(metadata) => {
            metadata.insert(entry.0.to_owned(), entry.1.into());
        }
        None => {
            let metadata = Map::from_iter([(entry.0.to_owned(), entry.1.into())]);
            json.shift_insert(0, "__metadata__".to_owned(), metadata.into());
        }
    }
    let mut text = Value::Object(json).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.append(&mut text);
    Ok(out)
}

/// What a rewritten file holds: the measures of its changed tensors, in their order.
pub(super) struct Rewritten {
    pub(super) measures: Vec<Measure>,
    pub(super) bytes: usize,
}

impl Rewrite<'_> {
    fn source(&self) -> &Source {
        &self.checkpoint.shards()[self.shard].source
    }

    /// The changed tensors of this file.
    pub(super) fn touched(&self) -> Vec<&Touched> {
        let here = |t: &&Touched| self.checkpoint.parameters()[t.parameter].at.0 == self.shard;
        self.claims.touched.iter().filter(here).collect()
    }

    /// Writes the file, which errors call `path`.
    pub(super) fn write(&self, file: &File, path: &Path) -> Result<Rewritten> {
        let fail = |e| Error::io(path, "write the file", e);
        let source = self.source();
        let head = header(source, (self.entry.0, &self.entry.1))?;
        let old = source.head().map_or(0, <[u8]>::len);
        let bytes = source.len() - old + head.len();
        file.set_len(bytes as u64).map_err(fail)?;
        write_at(file, &head, 0).map_err(fail)?;
        self.control.advance(old);
        let place = |tensor: usize| source.tensors()[tensor].range.start - old + head.len();
        let one = |touched: &Touched| {
            let mut work = Work::new(self.checkpoint, self.claims, touched);
            let parameter = &self.checkpoint.parameters()[touched.parameter];
            if let Some((at, bytes)) = parameter.scale.and_then(|at| self.scales.get_key_value(&at)) {
                work.rescale(self.checkpoint.shards()[at.0].source.tensors()[at.1].dtype, bytes);
            }
            self.tensor(&work, touched, file, path, place(parameter.at.1))
        };
        self.copy(file, path, &place)?;
        self.patch(file, path, &place)?;
        // What is recorded stands in the order of the tensors. Else two at a time: while the last tiles of one are
        // computed, the factors of the other are read; more of them would only hold more memory.
        let at_a_time = if self.undo.is_some() { 1 } else { 2 };
        let mut measures = Vec::new();
        for some in self.touched().chunks(at_a_time) {
            let done: Result<Vec<_>> = some.par_iter().with_max_len(1).map(|touched| one(touched)).collect();
            measures.extend(done?);
        }
        Ok(Rewritten { measures, bytes })
    }

    /// Writes new scales.
    fn patch(&self, file: &File, path: &Path, place: &dyn Fn(usize) -> usize) -> Result<()> {
        let source = self.source();
        for (&(_, tensor), bytes) in self.scales.iter().filter(|((shard, _), _)| *shard == self.shard) {
            write_at(file, bytes, place(tensor) as u64).map_err(|e| Error::io(path, "write the file", e))?;
            self.control.advance(bytes.len());
            if let Some(undo) = self.undo {
                let info = &source.tensors()[tensor];
                let rows = info.shape.first().copied().unwrap_or(1);
                undo.add(self.shard, tensor, &[Recorder::tile(info.dtype, source.bytes(tensor), bytes, rows)])?;
            }
        }
        Ok(())
    }

    fn tensor(&self, work: &Work<'_>, touched: &Touched, file: &File, path: &Path, start: usize) -> Result<Measure> {
        let parameter = &self.checkpoint.parameters()[touched.parameter];
        let key = self.checkpoint.key(parameter.at);
        let stream = self.storing.seed.map(|seed| Counter::new(seed, key));
        let rounding = stream.as_ref().map_or(Rounding::Nearest, Rounding::Stochastic);
        let tiles = work.tiles();
        let scratches = Pool::default();
        let done: Result<Vec<_>> = tiles
            .par_iter()
            .with_max_len(1)
            .map(|rows| {
                self.control.check()?;
                scratches.with(|scratch: &mut Scratch| {
                    let measure = work.tile(rows, rounding, scratch);
                    let buffer = &scratch.bytes[..rows.len() * work.line()];
                    write_at(file, buffer, (start + rows.start * work.line()) as u64)
                        .map_err(|e| Error::io(path, "write the file", e))?;
                    self.control.advance(buffer.len());
                    let undo = self.undo.map(|_| Recorder::tile(work.dtype(), work.original(rows), buffer, rows.len()));
                    Ok((measure, undo))
                })
            })
            .collect();
        let mut total = Measure::default();
        let mut records = Vec::new();
        for (measure, record) in done? {
            total += measure;
            records.extend(record);
        }
        if let Some(undo) = self.undo {
            undo.add(self.shard, parameter.at.1, &records)?;
        }
        Ok(total)
    }

    /// Copies what does not change, in runs as long as can be.
    fn copy(&self, file: &File, path: &Path, place: &dyn Fn(usize) -> usize) -> Result<()> {
        let source = self.source();
        let mut changed = vec![false; source.tensors().len()];
        self.touched().iter().for_each(|t| changed[self.checkpoint.parameters()[t.parameter].at.1] = true);
        self.scales.keys().filter(|(shard, _)| *shard == self.shard).for_each(|(_, tensor)| changed[*tensor] = true);
        let mut order: Vec<usize> = (0..changed.len()).filter(|&i| !changed[i]).collect();
        order.sort_by_key(|&i| source.tensors()[i].range.start);
        // Ranges with where they go: header and body keep their order, so what is one run here is one there.
        let mut runs: Vec<(Range<usize>, usize)> = Vec::new();
        for tensor in order {
            let range = source.tensors()[tensor].range.clone();
            match runs.last_mut() {
                Some((last, _)) if last.end == range.start => last.end = range.end,
                _ => runs.push((range, place(tensor))),
            }
        }
        let mut from = File::open(source.path()).map_err(|e| Error::io(source.path(), "open the file", e))?;
        let mut to = file.try_clone().map_err(|e| Error::io(path, "write the file", e))?;
        for (run, at) in runs {
            let done = copy_range(&mut from, run, &mut to, at, self.control);
            self.control.check()?;
            done.map_err(|e| Error::io(path, "write the file", e))?;
        }
        Ok(())
    }
}

/// Scales for the FP8 tensors that have one, so that their largest changed numbers just fit.
pub(super) fn new_scales(checkpoint: &Checkpoint, claims: &Claims, control: &Control) -> Result<BTreeMap<At, Vec<u8>>> {
    let mut out = BTreeMap::new();
    for touched in &claims.touched {
        let Some(at) = checkpoint.parameters()[touched.parameter].scale else { continue };
        let work = Work::new(checkpoint, claims, touched);
        let largest: Result<Vec<Vec<f64>>> =
            work.tiles().par_iter().with_max_len(1).map(|rows| control.check().map(|()| work.largest(rows))).collect();
        let dtype = checkpoint.shards()[at.0].source.tensors()[at.1].dtype;
        out.insert(at, work.fitting(dtype, &largest?.concat()));
    }
    Ok(out)
}
