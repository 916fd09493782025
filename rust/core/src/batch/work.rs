//! The threads that work through a list.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use rayon::{ThreadPool, ThreadPoolBuilder};
use xxhash_rust::xxh3::xxh3_128;

use super::duplicates::{Claim, Contents, Original, same};
use super::hash::{hash_file, hash_places, spelled};
use super::listing::{Entry, Listing, config_beside};
use super::manifest::{Journal, Line, Manifest, Outcome, Record, Wanted};
use super::step::{Made, Step};
use super::{BatchOptions, Duplicates, Observer, Stop, Summary, is_address, store_for};
use crate::convert::is_folder_name;
use crate::error::{Code, Error, Result};
use crate::io::{Control, Store, WriteOptions};

/// Smaller files are never worth several threads.
const WIDE: u64 = 8 << 20;

/// Threads that wait for a store, for each core.
const WAITING: usize = 4;

/// Works through a list. The error is one of the run itself; those of files are in the manifest and counted.
pub fn run(
    listing: &Listing,
    step: &Step,
    options: &BatchOptions,
    store: Option<&dyn Store>,
    observer: &dyn Observer,
) -> Result<Summary> {
    let started = Instant::now();
    observer.listed(listing.files, listing.bytes);
    let manifest = Manifest::read(&options.manifest)?;
    let journal = Journal::open(&options.manifest)?;
    let cores = rayon::current_num_threads();
    let workers = options.workers.unwrap_or(if store.is_some() { cores * WAITING } else { cores }).max(1);
    let runner = Runner {
        step,
        fingerprint: step.fingerprint(),
        options,
        store,
        observer,
        manifest,
        journal: &journal,
        shared_sizes: &listing.shared_sizes,
        contents: Contents::default(),
        wide: OnceLock::new(),
        cores,
        left: AtomicU64::new(listing.files),
        workers: workers as u64,
        summary: Mutex::new(Summary { schema: 1, files: listing.files, ..Summary::default() }),
    };
    let entries = Mutex::new(listing.entries()?);
    let next = || entries.lock().unwrap_or_else(PoisonError::into_inner).next().transpose();
    let worked: Result<()> = std::thread::scope(|scope| {
        let spawn = |number| {
            scope.spawn({
                let (runner, next) = (&runner, &next);
                move || runner.work(number, next)
            })
        };
        let threads: Vec<_> = (0..workers).map(spawn).collect();
        let join = |t: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
        };
        // All are waited for, then the first error counts.
        threads.into_iter().map(join).collect::<Vec<_>>().into_iter().collect()
    });
    let mut summary = runner.summary.into_inner().unwrap_or_else(PoisonError::into_inner);
    journal.close()?;
    worked?;
    let through = summary.done + summary.linked + summary.unchanged + summary.skipped + summary.failed;
    summary.left = summary.files - through;
    summary.manifest = options.manifest.to_string_lossy().into_owned();
    summary.seconds = started.elapsed().as_secs_f64();
    Ok(summary)
}

struct Runner<'a> {
    step: &'a Step,
    fingerprint: String,
    options: &'a BatchOptions,
    store: Option<&'a dyn Store>,
    observer: &'a dyn Observer,
    manifest: Manifest,
    journal: &'a Journal,
    shared_sizes: &'a rustc_hash::FxHashSet<u64>,
    contents: Contents,
    /// All cores, for the last files.
    wide: OnceLock<Option<ThreadPool>>,
    cores: usize,
    /// Files that nobody has taken yet.
    left: AtomicU64,
    workers: u64,
    summary: Mutex<Summary>,
}

/// How one file ended: with a record, or broken off.
enum End {
    Recorded(Box<Record>),
    Broken,
}

/// Whether a content was there before.
enum Found<'c> {
    /// It was, and has its output.
    Shared,
    /// It was not. The claim, where others may share what comes of it.
    New(Option<Claim<'c>>),
}

/// What decides the result of a content: that, and what lies beside it.
fn key(content: &str, entry: &Entry) -> u128 {
    xxh3_128(format!("{content} {}", entry.beside.as_deref().unwrap_or_default()).as_bytes())
}

impl Runner<'_> {
    fn work(&self, worker: usize, next: &dyn Fn() -> Result<Option<Entry>>) -> Result<()> {
        // Whatever this thread computes, it computes alone.
        let _alone = ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
        while !self.is_over() {
            let Some(entry) = next()? else { break };
            self.left.fetch_sub(1, Ordering::Relaxed);
            let control = self.observer.begin(worker, &entry.source);
            let record = match self.guarded(&entry, &control) {
                End::Recorded(record) => *record,
                End::Broken => {
                    self.stop(Stop::Interrupted);
                    break;
                }
            };
            if record.outcome != Outcome::Unchanged {
                self.journal.add(&record)?;
            }
            self.count(&record);
            self.observer.end(worker, &record);
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        if self.observer.stopped() {
            self.stop(Stop::Interrupted);
        }
        self.lock().stopped.is_some()
    }

    fn stop(&self, why: Stop) {
        self.lock().stopped.get_or_insert(why);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Summary> {
        self.summary.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, record: &Record) {
        let mut summary = self.lock();
        let counter = match record.outcome {
            Outcome::Done => &mut summary.done,
            Outcome::Linked => &mut summary.linked,
            Outcome::Skipped => &mut summary.skipped,
            Outcome::Failed => &mut summary.failed,
            Outcome::Unchanged => &mut summary.unchanged,
        };
        *counter += 1;
        if matches!(record.outcome, Outcome::Done | Outcome::Linked) {
            summary.bytes += record.bytes;
            summary.warned += u64::from(!record.warnings.is_empty());
        }
        if self.options.max_failures.is_some_and(|most| summary.failed >= most.max(1)) {
            summary.stopped.get_or_insert(Stop::TooManyFailures);
        }
    }

    /// One file. A panic is a bug, and still no reason to lose the files behind it.
    fn guarded(&self, entry: &Entry, control: &Control) -> End {
        let started = Instant::now();
        let entry = &self.completed(entry);
        let mut record = self.blank(entry);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.one(entry, control, &mut record)));
        let error = match caught {
            Ok(Ok(())) => None,
            Ok(Err(error)) if error.code() == Code::Interrupted => return End::Broken,
            Ok(Err(error)) => {
                let error = error.at(Path::new(&entry.source));
                if error.code() == Code::DiskFull {
                    self.stop(Stop::DiskFull);
                }
                let passed = error.code() == Code::NotAnAdapter && !entry.named;
                record.outcome = if passed { Outcome::Skipped } else { Outcome::Failed };
                Some(error.to_json())
            }
            Err(panic) => {
                record.outcome = Outcome::Failed;
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
                Some(serde_json::json!({"code": "panic", "message": text, "path": entry.source, "key": null,
                    "hint": "this is a bug of lorafmt; please report it with the file"}))
            }
        };
        record.error = error;
        record.seconds = started.elapsed().as_secs_f64();
        End::Recorded(Box::new(record))
    }

    /// Of a single file of a store nobody has yet looked at the folder: whether there is a configuration in it.
    fn completed<'e>(&self, entry: &'e Entry) -> Cow<'e, Entry> {
        let alone = entry.named && entry.beside.is_none() && is_address(&entry.source);
        let Some(config) = config_beside(&entry.source).filter(|_| alone) else { return Cow::Borrowed(entry) };
        let beside = match store_for(self.store, &config).and_then(|store| store.stat(&config)) {
            Ok(None) => return Cow::Borrowed(entry),
            Ok(Some(object)) => object.version,
            // The store cannot say, so this file is like no other. If that matters, opening it says why.
            Err(_) => format!("unknown {}", entry.source),
        };
        Cow::Owned(Entry { beside: Some(beside), ..entry.clone() })
    }

    fn blank(&self, entry: &Entry) -> Record {
        let out = &self.options.out;
        let output = match is_address(out) {
            true => format!("{}/{}", out.trim_end_matches('/'), entry.output),
            false => Path::new(out).join(&entry.output).to_string_lossy().into_owned(),
        };
        Record {
            schema: 1,
            outcome: Outcome::Done,
            source: entry.source.clone(),
            size: entry.size,
            version: entry.version.clone(),
            beside: entry.beside.clone(),
            hash: None,
            step: self.fingerprint.clone(),
            dialect: None,
            family: None,
            kind: None,
            ranks: Vec::new(),
            output,
            output_hash: None,
            bytes: 0,
            duplicate_of: None,
            seconds: 0.0,
            warnings: Vec::new(),
            error: None,
        }
    }

    fn one(&self, entry: &Entry, control: &Control, record: &mut Record) -> Result<()> {
        if let Some(problem) = &entry.problem {
            return Err(Error::new(Code::Io, format!("cannot be read: {problem}")));
        }
        let local = !is_address(&entry.source);
        let mut hash = match local && (self.options.verify || self.options.hash) {
            true => Some(hash_file(Path::new(&entry.source))?),
            false => None,
        };
        if let Some(bytes) = self.unchanged(entry, record, hash)? {
            record.outcome = Outcome::Unchanged;
            record.bytes = bytes;
            return Ok(());
        }
        let found = self.duplicate(entry, record, &mut hash)?;
        record.hash = hash.map(spelled);
        let claim = match found {
            Found::Shared => return Ok(()),
            Found::New(claim) => claim,
        };
        let made = self.make(entry, record, control)?;
        let by_name = made.by_name;
        self.describe(record, made);
        if let Some(claim) = claim {
            let source = local.then(|| PathBuf::from(&entry.source));
            let stem = by_name.then(|| entry.stem().to_owned());
            claim.settle(Original { record: record.clone(), source, stem });
        }
        Ok(())
    }

    fn describe(&self, record: &mut Record, made: Made) {
        let Made { report, ranks, .. } = made;
        record.dialect = Some(report.source.dialect);
        record.family = Some(report.source.family);
        record.kind = Some(report.source.kind);
        record.ranks = ranks.into_iter().collect();
        record.bytes = report.target.bytes;
        record.warnings = report.warnings.into_iter().map(Line::from).collect();
        let output = Path::new(&record.output);
        if self.options.hash && output.is_file() {
            record.output_hash = hash_file(output).ok().map(spelled);
        }
    }

    /// The bytes of the output, if an earlier run made it of the same source in the same way, and it is still there.
    fn unchanged(&self, entry: &Entry, record: &Record, hash: Option<u128>) -> Result<Option<u64>> {
        if self.options.force {
            return Ok(None);
        }
        let wanted = Wanted {
            source: &entry.source,
            size: entry.size,
            version: &entry.version,
            beside: entry.beside.as_deref(),
            step: &self.fingerprint,
            output: &record.output,
            hash: hash.filter(|_| self.options.verify),
        };
        match self.manifest.has(&wanted) {
            None => Ok(None),
            Some(Outcome::Skipped) => Ok(Some(0)),
            Some(_) => self.recorded(&record.output),
        }
    }

    /// The size of an output that is as an earlier run recorded it.
    fn recorded(&self, output: &str) -> Result<Option<u64>> {
        let Some(made) = self.manifest.output(output) else { return Ok(None) };
        if is_address(output) {
            // A store is asked only on request: that costs a call for each file.
            let there = !self.options.verify
                || store_for(self.store, output)?.stat(output)?.is_some_and(|o| o.size == made.bytes);
            return Ok(there.then_some(made.bytes));
        }
        let path = file_of(Path::new(output));
        let there = std::fs::metadata(&path).is_ok_and(|m| m.len() == made.bytes);
        let same = match made.hash.filter(|_| there && self.options.verify) {
            Some(hash) => hash_file(&path)? == hash,
            None => there,
        };
        Ok(same.then_some(made.bytes))
    }

    /// Looks for a file of the same content that was converted before, and shares its output.
    ///
    /// Few places of a file are compared first: most files that look alike in their size differ there, and the others
    /// are the same. Only where both are false a file is hashed.
    fn duplicate(&self, entry: &Entry, record: &mut Record, hash: &mut Option<u128>) -> Result<Found<'_>> {
        let shares = self.options.duplicates != Duplicates::Convert
            && self.shared_sizes.contains(&entry.size)
            && !is_address(&record.output)
            && !is_folder_name(Path::new(&record.output));
        let local = !is_address(&entry.source);
        // A store's word for the content is its version.
        if !shares || (!local && entry.version.is_empty()) {
            return Ok(Found::New(None));
        }
        let path = Path::new(&entry.source);
        let whole = |hash: u128| format!("whole {}", spelled(hash));
        let first = match (local, *hash) {
            (false, _) => format!("version {} {}", entry.size, entry.version),
            (true, Some(known)) => whole(known),
            (true, None) => format!("places {}", spelled(hash_places(path, entry.size)?)),
        };
        let original = match self.contents.claim(key(&first, entry)) {
            Err(claim) => return Ok(Found::New(Some(claim))),
            Ok(original) => original,
        };
        let other_name = |of: &Original| of.stem.as_ref().is_some_and(|stem| stem != entry.stem());
        if other_name(&original) {
            return Ok(Found::New(None));
        }
        if self.share(&original, entry, record)? {
            return Ok(Found::Shared);
        }
        if !local || hash.is_some() {
            return Ok(Found::New(None));
        }
        match self.contents.claim(key(&whole(*hash.insert(hash_file(path)?)), entry)) {
            Err(claim) => Ok(Found::New(Some(claim))),
            Ok(original) if !other_name(&original) && self.share(&original, entry, record)? => Ok(Found::Shared),
            Ok(_) => Ok(Found::New(None)),
        }
    }

    /// Gives a file the output of another one; `false` where their contents differ.
    fn share(&self, original: &Original, entry: &Entry, record: &mut Record) -> Result<bool> {
        if let Some(source) = &original.source
            && !same(source, Path::new(&entry.source))?
        {
            return Ok(false);
        }
        let (from, to) = (Path::new(&original.record.output), Path::new(&record.output));
        make_folder(to)?;
        self.link(from, to, self.overwrite(&record.output)?)?;
        let first = &original.record;
        record.outcome = Outcome::Linked;
        record.duplicate_of = Some(first.source.clone());
        record.bytes = first.bytes;
        (record.dialect, record.family, record.kind) =
            (first.dialect.clone(), first.family.clone(), first.kind.clone());
        (record.ranks, record.warnings) = (first.ranks.clone(), first.warnings.clone());
        record.output_hash.clone_from(&first.output_hash);
        Ok(true)
    }

    fn link(&self, from: &Path, to: &Path, overwrite: bool) -> Result<()> {
        if !overwrite && to.symlink_metadata().is_ok() {
            return if same(from, to)? { Ok(()) } else { Err(exists(to)) };
        }
        let folder = to.parent().unwrap_or(Path::new("."));
        let fail = |e| Error::io(to, "write the file", e);
        let dir = tempfile::Builder::new().prefix(".lorafmt-").tempdir_in(folder).map_err(fail)?;
        let temp = dir.path().join("output");
        let linked = self.options.duplicates == Duplicates::Link && std::fs::hard_link(from, &temp).is_ok();
        if !linked {
            std::fs::copy(from, &temp).map_err(fail)?;
        }
        std::fs::rename(&temp, to).map_err(fail)
    }

    /// Whether an output may be replaced: on request, or if an earlier run made it and nobody has changed it.
    fn overwrite(&self, output: &str) -> Result<bool> {
        Ok(self.options.force || self.recorded(output)?.is_some())
    }

    fn make(&self, entry: &Entry, record: &Record, control: &Control) -> Result<Made> {
        let alone = entry.size < WIDE || self.left.load(Ordering::Relaxed) + 1 >= self.workers.min(self.cores as u64);
        let write = || self.write(&entry.source, &record.output, control);
        let wide = || self.wide.get_or_init(|| ThreadPoolBuilder::new().num_threads(self.cores).build().ok());
        match if alone { None } else { wide().as_ref() } {
            Some(pool) => pool.install(write),
            None => write(),
        }
    }

    fn write(&self, source: &str, output: &str, control: &Control) -> Result<Made> {
        if is_address(output) {
            return self.upload(source, output, control);
        }
        let path = Path::new(output);
        make_folder(path)?;
        let write = WriteOptions { overwrite: self.overwrite(output)? };
        match self.step.run(source, self.store, path, write, control) {
            Err(error) if error.code() == Code::OutputExists && !is_folder_name(path) => {
                self.adopt(source, path, control)
            }
            result => result,
        }
    }

    /// An output that no record claims. A killed run leaves such: if it is what would be written, it is taken as done.
    fn adopt(&self, source: &str, output: &Path, control: &Control) -> Result<Made> {
        let folder = output.parent().unwrap_or(Path::new("."));
        let fail = |e| Error::io(folder, "create a folder in the folder", e);
        let dir = tempfile::Builder::new().prefix(".lorafmt-").tempdir_in(folder).map_err(fail)?;
        let temp = dir.path().join(output.file_name().unwrap_or_default());
        let made = self.step.run(source, self.store, &temp, WriteOptions::default(), control)?;
        if same(&temp, output)? { Ok(made) } else { Err(exists(output)) }
    }

    fn upload(&self, source: &str, output: &str, control: &Control) -> Result<Made> {
        let store = store_for(self.store, output)?;
        if !self.overwrite(output)? && store.stat(output)?.is_some() {
            return Err(exists(Path::new(output)));
        }
        let dir = tempfile::tempdir().map_err(|e| Error::io(&std::env::temp_dir(), "create a folder", e))?;
        let name = output.rsplit('/').next().unwrap_or(output);
        if is_folder_name(Path::new(name)) {
            return Err(Error::new(Code::UnsupportedTarget, "a folder cannot be written to a store")
                .hint("let outputs end with `.safetensors`"));
        }
        let temp = dir.path().join(name);
        let made = self.step.run(source, self.store, &temp, WriteOptions::default(), control)?;
        store.put(&temp, output)?;
        Ok(made)
    }
}

fn make_folder(output: &Path) -> Result<()> {
    match output.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(folder) => std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create the folder", e)),
        None => Ok(()),
    }
}

/// The file of an output, which can be a folder.
fn file_of(output: &Path) -> PathBuf {
    if output.is_dir() { output.join("adapter_model.safetensors") } else { output.to_path_buf() }
}

fn exists(output: &Path) -> Error {
    Error::new(Code::OutputExists, "the output exists already, and the manifest does not know it").at(output)
}
