//! Many files at once: a record of each, and what only shows side by side.
//!
//! Files are read one after the other by a few threads, and nothing of a file stays but its record (some kilobytes) and
//! its sketch. A file that cannot be read is a record too.

mod advice;
mod digest;
mod measures;
mod record;
mod twins;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

pub use advice::{Advice, Finding, Level};
pub use measures::{BlockMeasure, Measures, ModuleMeasure, Names, Smaller};
pub use record::{FileRecord, Profile};
pub use twins::{Group, NEAR, Near, Relation};

use crate::detect::Given;
use crate::error::Result;
use crate::io::{Control, Source};
use crate::table::Registry;

/// Files that are worked on at a time. Each is computed by the whole thread pool, so more would only hold more of them.
const FILES_AT_A_TIME: usize = 4;

/// How a library is read.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// Measure the weights, hash them and compare the files: reads every byte. Without it headers and alphas only.
    pub weights: bool,
    /// What is known of all files already.
    pub given: Given,
}

/// What there is to say about many files.
#[derive(Debug, Clone, Serialize)]
pub struct Library {
    /// Version of this document.
    pub schema: u32,
    /// The version of lorafmt.
    pub version: &'static str,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Whether weights were measured.
    pub weights: bool,
    /// Sums over all files.
    pub totals: Totals,
    /// The files, in the order given.
    pub files: Vec<FileRecord>,
    /// Files that hold the same, in the order of their first.
    pub groups: Vec<Group>,
    /// Wall time.
    pub seconds: f64,
}

/// Sums over all files.
#[derive(Debug, Clone, Default, Serialize, PartialEq, Eq)]
pub struct Totals {
    /// All of them.
    pub files: usize,
    /// Their bytes, of those that could be opened.
    pub bytes: u64,
    /// Files that could not be read as adapters.
    pub failed: usize,
    /// Files with problems, those that failed not counted.
    pub problems: usize,
    /// Files with warnings and no problems.
    pub warnings: usize,
    /// Different families.
    pub families: usize,
    /// Different dialects.
    pub dialects: usize,
    /// Files whose tensors another file has, too; the first of each group is not counted.
    pub duplicates: usize,
    /// What they take: the sum of each group without its largest file.
    pub duplicate_bytes: u64,
    /// Files whose delta another file has in another form, or nearly has.
    pub similar: usize,
}

impl Library {
    fn new(survey: &Survey, mut files: Vec<FileRecord>, started: Instant) -> Self {
        let groups = twins::find(&mut files);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self {
            schema: 1,
            version: env!("CARGO_PKG_VERSION"),
            created: now,
            weights: survey.weights,
            totals: Totals::of(&files, &groups),
            files,
            groups,
            seconds: started.elapsed().as_secs_f64(),
        }
    }
}

impl Totals {
    fn of(files: &[FileRecord], groups: &[Group]) -> Self {
        let distinct = |of: fn(&Profile) -> &str| {
            let mut all: Vec<&str> = files.iter().filter_map(|f| f.adapter.as_ref()).map(of).collect();
            all.sort_unstable();
            all.dedup();
            all.len()
        };
        let copies = || groups.iter().filter(|g| g.relation.is_copy());
        let in_other_forms = |i: usize| groups.iter().any(|g| !g.relation.is_copy() && g.files.contains(&i));
        Self {
            files: files.len(),
            bytes: files.iter().filter_map(|f| f.bytes).sum(),
            failed: files.iter().filter(|f| f.error.is_some()).count(),
            problems: files.iter().filter(|f| f.error.is_none() && f.worst() == Some(Level::Problem)).count(),
            warnings: files.iter().filter(|f| f.error.is_none() && f.worst() == Some(Level::Warning)).count(),
            families: distinct(|p| &p.family),
            dialects: distinct(|p| &p.dialect),
            duplicates: copies().map(|g| g.files.len() - 1).sum(),
            duplicate_bytes: copies().map(|g| g.spare_bytes).sum(),
            similar: (0..files.len()).filter(|&i| !files[i].near.is_empty() || in_other_forms(i)).count(),
        }
    }
}

/// Reads files and compares them. `open` opens one by its number; `each` is told of every record, in no order.
///
/// A file that fails is a record with its error. Errors: `interrupted` alone.
pub fn survey(
    registry: &Arc<Registry>,
    paths: &[&Path],
    open: impl Fn(usize) -> Result<Arc<Source>> + Sync,
    survey: &Survey,
    control: &Control,
    mut each: impl FnMut(&FileRecord),
) -> Result<Library> {
    let started = Instant::now();
    control.expect(paths.len());
    let threads = FILES_AT_A_TIME.min(rayon::current_num_threads()).min(paths.len()).max(1);
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, results) = mpsc::channel();
    let mut records: Vec<Option<FileRecord>> = paths.iter().map(|_| None).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, stopped, open) = (sender.clone(), &next, &stopped, &open);
            scope.spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(path) = paths.get(i) else { return };
                    let record = record::record(registry, path, || open(i), survey, control);
                    if sender.send((i, record)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (i, record) in results {
            match record {
                Ok(record) => {
                    control.advance(1);
                    each(&record);
                    records[i] = Some(record);
                }
                Err(error) => {
                    stopped.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(())
    })?;
    Ok(Library::new(survey, records.into_iter().flatten().collect(), started))
}

/// Four digits of a number: enough to be read and drawn.
fn short(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// A share with five digits behind the point that is 1 only if it is all.
fn share(value: f64) -> f64 {
    // What the multiplication adds behind its last digit is none.
    (value * 1e5 + 1e-9).floor() / 1e5
}
