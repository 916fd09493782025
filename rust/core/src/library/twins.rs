//! Files that hold the same, or nearly the same.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::record::{FileRecord, Trace};
use super::short;
use crate::inspect::quoted;
use crate::ops::{DeltaSketch, Similarity};

/// Two files are near duplicates if the cosine of their deltas is estimated to be at least this, or the negative of it.
pub const NEAR: f64 = 0.98;

/// Sketches that differ by no more are of the same delta: what is left is the order of sums in float64.
const SAME: f64 = 1e-6;

/// Files that are noted as near to one.
const NEAREST: usize = 5;

/// What files have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Relation {
    /// Every byte.
    File,
    /// Every tensor and scale; metadata or order differ.
    Tensors,
    /// What they do, to six digits, in different forms.
    Delta,
}

impl Relation {
    /// Whether one of the files is enough.
    pub fn is_copy(self) -> bool {
        self != Relation::Delta
    }
}

/// Files that hold the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// What they have in common.
    pub relation: Relation,
    /// Their numbers.
    pub files: Vec<usize>,
    /// Bytes of all but the largest; 0 where the files are different forms.
    pub spare_bytes: u64,
    /// The command that compares two of different forms.
    pub command: Option<String>,
}

/// A file that is nearly the same as another one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Near {
    /// Its number.
    pub file: usize,
    /// The estimated cosine of the deltas.
    pub cosine: f64,
    /// The standard error of that.
    pub error: f64,
    /// How many times this one it is.
    pub ratio: f64,
    /// Whether one of them does more than was compared (magnitudes, replaced parameters).
    pub partial: bool,
    /// The command that compares them in full.
    pub command: String,
}

/// Notes the files near to each, and returns those that are the same.
pub(super) fn find(files: &mut [FileRecord]) -> Vec<Group> {
    let traced: Vec<(usize, &Trace)> =
        files.iter().enumerate().filter_map(|(i, f)| Some((i, f.trace.as_ref()?))).collect();
    let classes = classes(&traced);
    let near: Vec<(usize, Vec<Near>)> = traced
        .par_iter()
        .map(|&(i, trace)| {
            let others = traced.iter().filter(|(j, _)| classes[&i] != classes[j]);
            (i, nearest(files, i, trace, others))
        })
        .collect();
    let groups = groups(files, &traced, &classes);
    for (i, near) in near {
        files[i].near = near;
    }
    groups
}

/// Every file's class of equal deltas, named by its first file.
fn classes(traced: &[(usize, &Trace)]) -> BTreeMap<usize, usize> {
    let mut classes: BTreeMap<usize, usize> = BTreeMap::new();
    // One of each class.
    let mut firsts: Vec<(usize, &Trace)> = Vec::new();
    for &(i, trace) in traced {
        match firsts.iter().find(|(_, first)| same(first, trace)) {
            Some(&(first, _)) => classes.insert(i, first),
            None => {
                firsts.push((i, trace));
                classes.insert(i, i)
            }
        };
    }
    classes
}

fn same(a: &Trace, b: &Trace) -> bool {
    let whole = |t: &DeltaSketch| t.complete && t.values.iter().any(|x| *x != 0.0);
    let sketches = || a.sketch.as_ref().zip(b.sketch.as_ref());
    a.digest.tensors == b.digest.tensors
        || a.family == b.family && sketches().is_some_and(|(x, y)| whole(x) && whole(y) && x.distance(y) <= SAME)
}

fn nearest<'t>(
    files: &[FileRecord],
    i: usize,
    trace: &Trace,
    others: impl Iterator<Item = &'t (usize, &'t Trace)>,
) -> Vec<Near> {
    let Some(own) = &trace.sketch else { return Vec::new() };
    let alike = |(j, other): &(usize, &Trace)| {
        let sketch = other.sketch.as_ref().filter(|_| other.family == trace.family)?;
        let found = own.similarity(sketch).filter(|s| s.cosine.abs() >= NEAR)?;
        Some((*j, found, !own.complete || !sketch.complete))
    };
    let mut found: Vec<(usize, Similarity, bool)> = others.filter_map(alike).collect();
    found.sort_by(|a, b| b.1.cosine.abs().total_cmp(&a.1.cosine.abs()));
    let near = |(j, s, partial): (usize, Similarity, bool)| Near {
        file: j,
        // A cosine of 1 is one that is 1, as far as numbers tell.
        cosine: (s.cosine * 1e6).round() / 1e6,
        error: short(s.error),
        ratio: short(s.ratio),
        partial,
        command: compare(&files[i].path, &files[j].path),
    };
    found.into_iter().take(NEAREST).map(near).collect()
}

fn compare(a: &str, b: &str) -> String {
    format!("lorafmt diff {} {}", quoted(a), quoted(b))
}

fn groups(files: &[FileRecord], traced: &[(usize, &Trace)], classes: &BTreeMap<usize, usize>) -> Vec<Group> {
    let mut by_class: BTreeMap<usize, Vec<(usize, &Trace)>> = BTreeMap::new();
    for &(i, trace) in traced {
        by_class.entry(classes[&i]).or_default().push((i, trace));
    }
    let mut out = Vec::new();
    for members in by_class.into_values().filter(|m| m.len() > 1) {
        let mut by_tensors: BTreeMap<[u8; 32], Vec<(usize, &Trace)>> = BTreeMap::new();
        for &(i, trace) in &members {
            by_tensors.entry(trace.digest.tensors).or_default().push((i, trace));
        }
        for copies in by_tensors.into_values().filter(|c| c.len() > 1) {
            let relation = match copies.iter().all(|(_, t)| t.digest == copies[0].1.digest) {
                true => Relation::File,
                false => Relation::Tensors,
            };
            out.push(copies_of(files, relation, copies.into_iter().map(|c| c.0).collect()));
        }
        let (first, trace) = members[0];
        let other = members.iter().find(|(_, t)| t.digest.tensors != trace.digest.tensors);
        if let Some(&(other, _)) = other {
            let command = Some(compare(&files[first].path, &files[other].path));
            let files = members.into_iter().map(|m| m.0).collect();
            out.push(Group { relation: Relation::Delta, files, spare_bytes: 0, command });
        }
    }
    out.sort_by_key(|g| (g.files[0], g.relation));
    out
}

fn copies_of(all: &[FileRecord], relation: Relation, files: Vec<usize>) -> Group {
    let sizes = || files.iter().filter_map(|&i| all[i].bytes);
    let spare_bytes = sizes().sum::<u64>() - sizes().max().unwrap_or(0);
    Group { relation, files, spare_bytes, command: None }
}
