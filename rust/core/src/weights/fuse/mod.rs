//! Adding adapters to the weights of a base checkpoint.
//!
//! `W' = round(W + sum_i s_i scale_i B_i A_i)`: the sum over all adapters is taken in float64 and rounded once. The
//! checkpoint streams through in tiles of rows; whatever no adapter changes is copied as it is.

mod change;
mod claims;
mod quick;
mod report;
mod work;
mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use self::claims::{Claims, Touched, gather};
pub use self::report::{CheckpointReport, FuseReport, FusedTensor, UndoReport, Written};
use self::work::Measure;
use self::write::{Rewrite, Storing};
use crate::compose::{Composition, Ledger, Term, Unknown};
use crate::convert::describe;
use crate::error::{Code, Error, Result};
use crate::io::{Control, Pending, WriteOptions, refuse_existing};
use crate::plan::count;
use crate::report::{SourceReport, Warning};
use crate::weights::Checkpoint;
use crate::weights::checkpoint::At;
use crate::weights::output::{Folder, Role, copied, listing, refuse_output};
use crate::weights::undo::Recorder;

/// The metadata entry that says what was fused.
const FUSED: &str = "lorafmt.fused";

/// Below this gain a tensor has lost much of what was added.
const WEAK: f64 = 0.9;

/// How to fuse.
#[derive(Debug, Clone, Default)]
pub struct FuseOptions {
    /// Leave out modules that the base has no place for, and kinds that cannot be fused.
    pub lossy: bool,
    /// Adapter keys that no table knows.
    pub unknown: Unknown,
    /// Give FP8 tensors with a scale a new one, from their new numbers.
    pub rescale: bool,
    /// Round up and down by chance, from this seed, instead of to the nearest.
    pub stochastic: Option<u64>,
    /// Write an undo file.
    pub undo: Option<PathBuf>,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Replace existing outputs.
    pub overwrite: bool,
}

/// Writes the checkpoint with the adapters added, to a file, or to a folder where the checkpoint is one: shards keep
/// their layout, those without a changed tensor are copied, and so are configurations.
pub fn fuse(
    checkpoint: &Checkpoint,
    composition: &Composition<'_>,
    output: &Path,
    options: &FuseOptions,
    control: &Control,
) -> Result<FuseReport> {
    let started = Instant::now();
    check(checkpoint, composition)?;
    refuse_outputs(checkpoint, composition, output, options)?;
    // The ledger's dialect is only there for messages about targets, of which there is none.
    let mut ledger = Ledger::new(composition, &checkpoint.registry().dialects[0], options.lossy, 1.0);
    let claims = gather(checkpoint, composition, &mut ledger, options.lossy)?;
    unknown_keys(&mut ledger, options.unknown)?;
    nothing_done(&claims, &ledger)?;
    ledger.summarise_strengths();
    let mut report = planned(checkpoint, &claims, ledger);
    if !options.dry_run {
        let job = Job::new(checkpoint, composition, &claims, options, output, control)?;
        let (outcome, done) = match &options.undo {
            None => job.run(None)?,
            Some(path) => {
                let (pending, (outcome, done)) = Pending::filled(path, |file| job.run(Some((file, path))))?;
                pending.commit(job.write)?;
                (outcome, done)
            }
        };
        outcome.commit(job.write)?;
        report.finish(done, output, options);
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// The adapters must be of the base's family.
fn check(checkpoint: &Checkpoint, composition: &Composition<'_>) -> Result<()> {
    let first = composition.first();
    let (base, adapter) = (&checkpoint.registry().families[checkpoint.family()].name, &first.family_table().name);
    if base == adapter {
        return Ok(());
    }
    let message = format!("it is {adapter}, but the base `{}` is {base}", checkpoint.path().display());
    let hint = "adapters fit only the model they were made for; `--family` says what keys do not";
    Err(Error::new(Code::FamilyMismatch, message).at(first.source.path()).hint(hint))
}

fn refuse_outputs(
    checkpoint: &Checkpoint,
    composition: &Composition<'_>,
    output: &Path,
    options: &FuseOptions,
) -> Result<()> {
    let write = WriteOptions { overwrite: options.overwrite || options.dry_run };
    refuse_output(checkpoint.files(), checkpoint.path(), output, write)?;
    let whole = |path: &Path| path.canonicalize().ok();
    for path in options.undo.as_deref().into_iter().chain([output]) {
        let same = |input: &Path| whole(input).is_some_and(|input| whole(path) == Some(input));
        let adapters = composition.sources().iter().any(|s| same(s.path()));
        if adapters || checkpoint.shards().iter().any(|s| same(s.source.path())) {
            return Err(Error::new(Code::SameFile, "input and output are the same file").at(path));
        }
    }
    let Some(undo) = &options.undo else { return Ok(()) };
    if undo == output || whole(undo).is_some_and(|path| whole(output) == Some(path)) {
        return Err(Error::new(Code::SameFile, "the undo file and the output are the same file").at(undo));
    }
    refuse_existing(undo, write)
}

fn unknown_keys(ledger: &mut Ledger<'_>, how: Unknown) -> Result<()> {
    if how == Unknown::Keep {
        let message = "a base carries no keys of adapters along";
        return Err(Error::new(Code::InvalidArgument, message).hint("`--unknown drop` leaves them out"));
    }
    // Under `Keep` alone something would be put out.
    ledger.unknown_keys(how, &mut Vec::new())
}

fn nothing_done(claims: &Claims, ledger: &Ledger<'_>) -> Result<()> {
    if !claims.touched.is_empty() {
        return Ok(());
    }
    let message = match ledger.lost.is_empty() && ledger.zero.iter().any(|n| *n > 0) {
        true => "every module has strength 0: nothing would change",
        false => "no module has a place in the base: nothing would change",
    };
    Err(Error::new(Code::NoModules, message).at(ledger.composition.first().source.path()))
}

/// The report of what has not been computed.
fn planned(checkpoint: &Checkpoint, claims: &Claims, ledger: Ledger<'_>) -> FuseReport {
    let source = |t: &Term<'_>| SourceReport {
        name: Some(t.name.clone()),
        strength: t.strength.everywhere(),
        ..describe(t.adapter)
    };
    let shards = checkpoint.shards();
    let touched = |t: &Touched| {
        let at = checkpoint.parameters()[t.parameter].at;
        let mut modules: Vec<String> = t.claims.iter().map(|c| claims.modules[c.module].name.clone()).collect();
        modules.sort();
        modules.dedup();
        FusedTensor {
            key: checkpoint.key(at).to_owned(),
            dtype: shards[at.0].source.tensors()[at.1].dtype.name().to_owned(),
            modules,
            norm: None,
            gain: None,
            err: None,
            outside: 0,
        }
    };
    let rewritten = claims.shards(checkpoint).len();
    FuseReport {
        schema: 1,
        base: CheckpointReport::of(checkpoint),
        sources: ledger.composition.terms().iter().map(source).collect(),
        target: Written { path: None, bytes: 0, rewritten, copied: shards.len() - rewritten },
        undo: None,
        tensors: count(&ledger.fates),
        modules: claims.modules.len(),
        alpha: ledger.alpha,
        fused: claims.touched.iter().map(touched).collect(),
        gain: None,
        err: None,
        warnings: ledger.warnings,
        seconds: 0.0,
        restores: claims.tensors(checkpoint).map(|at| shards[at.0].source.bytes(at.1).len() as u64).sum(),
    }
}

/// Everything that writing needs.
struct Job<'a> {
    checkpoint: &'a Checkpoint,
    claims: &'a Claims,
    storing: Storing,
    /// What the metadata says of the adapters.
    fused: Vec<Value>,
    /// New scales of FP8 tensors.
    scales: BTreeMap<At, Vec<u8>>,
    /// The files that are written anew.
    shards: Vec<usize>,
    output: &'a Path,
    write: WriteOptions,
    control: &'a Control,
}

/// What was written: the measures of the changed tensors in their order, bytes of weights, the undo file's size, and
/// weights beside those that were not taken along.
struct Done {
    measures: Vec<Measure>,
    bytes: u64,
    undo: Option<u64>,
    left: Vec<PathBuf>,
}

/// An output that does not have its name yet.
enum Outcome {
    File(Pending),
    Folder(Folder, Vec<PathBuf>),
}

impl Outcome {
    fn commit(self, write: WriteOptions) -> Result<()> {
        match self {
            Outcome::File(pending) => pending.commit(write),
            Outcome::Folder(folder, files) => folder.commit(&files),
        }
    }
}

impl<'a> Job<'a> {
    fn new(
        checkpoint: &'a Checkpoint,
        composition: &Composition<'_>,
        claims: &'a Claims,
        options: &FuseOptions,
        output: &'a Path,
        control: &'a Control,
    ) -> Result<Self> {
        let storing = Storing { seed: options.stochastic };
        let fused = |t: &Term<'_>| json!({"name": t.name, "strength": t.strength.to_json(), "sha256": t.adapter.source.sha256()});
        let fused = composition.terms().iter().map(fused).collect();
        let write = WriteOptions { overwrite: options.overwrite };
        let bytes = checkpoint.shards().iter().map(|s| s.source.len()).sum();
        control.expect(bytes);
        let scales = if options.rescale { write::new_scales(checkpoint, claims, control)? } else { BTreeMap::new() };
        let mut shards = claims.shards(checkpoint);
        shards.extend(scales.keys().map(|at| at.0));
        shards.sort_unstable();
        shards.dedup();
        Ok(Self { checkpoint, claims, storing, fused, scales, shards, output, write, control })
    }

    fn run(&self, undo: Option<(&File, &Path)>) -> Result<(Outcome, Done)> {
        let tensors: Vec<At> = self.claims.tensors(self.checkpoint).chain(self.scales.keys().copied()).collect();
        let recorder =
            undo.map(|(file, path)| Recorder::new(self.checkpoint, &tensors, &self.shards, file, path)).transpose()?;
        let mut done = Done { measures: Vec::new(), bytes: 0, undo: None, left: Vec::new() };
        let outcome = match self.checkpoint.files().folder {
            false => Outcome::File(self.file(0, self.output, recorder.as_ref(), &mut done)?),
            true => self.folder(recorder.as_ref(), &mut done)?,
        };
        done.undo = recorder.map(|recorder| recorder.finish(&self.shards)).transpose()?;
        Ok((outcome, done))
    }

    /// One file, anew or copied.
    fn file(&self, shard: usize, target: &Path, undo: Option<&Recorder<'_>>, done: &mut Done) -> Result<Pending> {
        let source = &self.checkpoint.shards()[shard].source;
        if !self.shards.contains(&shard) {
            done.bytes += source.len() as u64;
            return copied(source.path(), target, self.control);
        }
        let rewrite = Rewrite {
            checkpoint: self.checkpoint,
            claims: self.claims,
            shard,
            storing: self.storing,
            scales: &self.scales,
            entry: (FUSED, self.entry(shard)),
            undo,
            control: self.control,
        };
        let (pending, rewritten) = Pending::filled(target, |file| rewrite.write(file, target))?;
        done.measures.extend(rewritten.measures);
        done.bytes += rewritten.bytes as u64;
        Ok(pending)
    }

    fn folder(&self, undo: Option<&Recorder<'_>>, done: &mut Done) -> Result<Outcome> {
        let files = self.checkpoint.files();
        let folder = Folder::beside(self.output, self.write)?;
        let (listed, left) = listing(files)?;
        // Shards in their order, as the measures are.
        let (mut shards, mut others) = (Vec::new(), Vec::new());
        for (relative, role) in listed {
            match role {
                Role::Shard(number) => shards.push((number, relative)),
                Role::Other => others.push(relative),
            }
        }
        shards.sort();
        let mut made = Vec::new();
        for (number, relative) in shards {
            self.file(number, &folder.place(&relative)?, undo, done)?.commit(WriteOptions::default())?;
            made.push(relative);
        }
        // No tensor changes its size or its file, so an index stays true.
        for relative in others {
            let from = files.root.join(&relative);
            copied(&from, &folder.place(&relative)?, self.control)?.commit(WriteOptions::default())?;
            made.push(relative);
        }
        done.left = left;
        Ok(Outcome::Folder(folder, made))
    }

    /// The metadata entry of a file: what was fused before, and now.
    fn entry(&self, shard: usize) -> String {
        let before = self.checkpoint.shards()[shard].source.metadata_value(FUSED);
        let mut all: Vec<Value> = before.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        all.extend(self.fused.iter().cloned());
        Value::Array(all).to_string()
    }
}

impl FuseReport {
    fn finish(&mut self, done: Done, output: &Path, options: &FuseOptions) {
        let fused = std::mem::take(&mut self.fused);
        self.fused = fused.into_iter().zip(done.measures).map(|(tensor, measure)| tensor.measured(measure)).collect();
        let gains = self.fused.iter().filter_map(|t| t.gain);
        self.gain = gains.clone().reduce(f64::min);
        self.err = self.fused.iter().filter_map(|t| t.err).reduce(f64::max);
        let weak: Vec<&FusedTensor> = self.fused.iter().filter(|t| t.gain.is_some_and(|g| g < WEAK)).collect();
        if let Some(worst) = weak.iter().min_by(|a, b| a.gain.unwrap_or(1.0).total_cmp(&b.gain.unwrap_or(1.0))) {
            let detail = format!(
                "{} of {} tensors keep less than {WEAK} of what was added, the least {:.2} (`{}`, {}): \
                 the type is too coarse for changes this small",
                weak.len(),
                self.fused.len(),
                worst.gain.unwrap_or(1.0),
                worst.key,
                worst.dtype
            );
            self.warnings.push(Warning::new("weak-fuse", None, detail));
        }
        let outside: usize = self.fused.iter().map(|t| t.outside).sum();
        if outside > 0 {
            let detail =
                format!("{outside} numbers left the range of their type; `--rescale` widens that of scaled FP8");
            self.warnings.push(Warning::new("overflow", None, detail));
        }
        for path in &done.left {
            let detail =
                format!("`{}` holds other weights, in which nothing is fused, and is not copied", path.display());
            self.warnings.push(Warning::new("not-copied", None, detail));
        }
        let restores = self.restores;
        self.target.path = Some(output.to_string_lossy().into_owned());
        self.target.bytes = done.bytes;
        self.undo = options.undo.as_ref().zip(done.undo).map(|(path, bytes)| UndoReport {
            path: path.to_string_lossy().into_owned(),
            bytes,
            restores,
        });
    }
}
