//! Which dialect and family a file is: by how many of its keys each explains, with shapes; metadata only breaks ties.

mod family;
mod shape;

use std::sync::Arc;

pub(crate) use family::{ambiguous, expert, other_families};

use crate::error::{Code, Error, Result};
use crate::io::{Source, TensorInfo};
use crate::kind::Slot;
use crate::native::{Base, Branches, recognise};
use crate::table::{Dialect, Hit, Read, Registry};

/// What a file was recognised as.
#[derive(Debug, Clone)]
pub struct Detection {
    /// The dialect; `None` if the keys are of several.
    pub dialect: Option<usize>,
    /// How many keys each dialect explains, most first.
    pub dialects: Vec<(usize, usize)>,
    /// The family.
    pub family: usize,
    /// All families that explain the keys equally well, the chosen one first.
    pub candidates: Vec<usize>,
    /// How the family was chosen where several fit: `None` if only one did.
    pub tie_break: Option<&'static str>,
    /// Keys that the family explains.
    pub known: usize,
    /// All keys.
    pub total: usize,
}

impl Detection {
    /// Share of keys that are explained, from 0 to 1.
    pub fn coverage(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.known as f64 / self.total as f64 }
    }

    /// The names of all families that explain the keys equally well, each once, whatever their sizes.
    pub fn candidate_names(&self, registry: &Registry) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for &family in &self.candidates {
            let name = &registry.families[family].name;
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// The name of the dialect, `mixed` if there are several.
    pub fn dialect_name<'r>(&self, registry: &'r Registry) -> &'r str {
        self.dialect.map_or("mixed", |d| registry.dialects[d].name.as_str())
    }
}

/// What the caller knows already.
#[derive(Debug, Clone, Default)]
pub struct Given {
    /// The families that it may be of; any, if there are none.
    pub families: Vec<usize>,
    /// The dialect.
    pub dialect: Option<usize>,
    /// The quantized base, whose branches are taken off a native adapter.
    pub base: Option<Arc<Base>>,
    /// Which of the adapters in a native file is wanted; all, if none is named.
    pub only: Option<usize>,
}

/// A key with the one meaning it has in the chosen family; `None` for an unknown key.
pub type Meaning<'s> = Option<(Read<'s>, Hit)>;

/// A recognised file: what it is, the meaning of each key, and the branches of a quantized model among them.
pub type Recognised<'s> = (Detection, Vec<Meaning<'s>>, Option<Branches>);

/// Recognises a file and reads all its keys.
pub fn detect<'s>(registry: &Registry, source: &'s Source, given: &Given) -> Result<Recognised<'s>> {
    let tensors = source.tensors();
    if tensors.is_empty() {
        return Err(Error::new(Code::NoModules, "the file holds no tensors").at(source.path()));
    }
    if let Some(branches) = recognise(registry, source)? {
        return Ok(of_branches(registry, tensors, branches));
    }
    let (explained, candidates, tie_break) = family::choose(registry, source, given)?;
    let meanings = explained.meanings;
    let known = meanings.iter().flatten().count();
    let (dialect, dialects) = choose_dialect(registry, source, &meanings);
    let family = explained.family;
    let detection = Detection { dialect, dialects, family, candidates, tie_break, known, total: tensors.len() };
    Ok((detection, meanings, None))
}

/// A file with branches of a quantized model is of that model's family.
fn of_branches<'s>(registry: &Registry, tensors: &'s [TensorInfo], branches: Branches) -> Recognised<'s> {
    let (dialect, family) = (branches.dialect, branches.family);
    let read = |(i, t): (usize, &'s TensorInfo)| if branches.owned[i] { None } else { meaning(registry, family, t) };
    let meanings: Vec<Meaning<'s>> = tensors.iter().enumerate().map(read).collect();
    let known = meanings.iter().flatten().count() + branches.owned.iter().filter(|o| **o).count();
    let detection = Detection {
        dialect: Some(dialect),
        dialects: vec![(dialect, known)],
        family,
        candidates: vec![family],
        tie_break: None,
        known,
        total: tensors.len(),
    };
    (detection, meanings, Some(branches))
}

/// What a key is in a family.
fn meaning<'s>(registry: &Registry, family: usize, info: &'s TensorInfo) -> Meaning<'s> {
    let read = registry.read_in(family, &info.name)?;
    let hit = read.hits.first()?.clone();
    Some((read, hit))
}

/// How well a dialect explains a key: 0 not at all; 1 for the prefix, one more each for the names and the suffix that
/// the dialect itself writes.
pub(crate) fn level(dialect: &Dialect, hit: &Hit, slot: Slot, suffix: &str) -> usize {
    let here = |p: &&crate::table::Place| *p.prefix == *hit.prefix || p.also.iter().any(|also| **also == *hit.prefix);
    let places = dialect.places.of(hit.family).iter().filter(|p| p.component == hit.component).filter(here);
    let names = places.map(|p| usize::from(p.namespace == hit.namespace)).max();
    names.map_or(0, |names| 1 + names + usize::from(dialect.spells(slot, suffix)))
}

fn choose_dialect(
    registry: &Registry,
    source: &Source,
    meanings: &[Meaning<'_>],
) -> (Option<usize>, Vec<(usize, usize)>) {
    let texts = family::said(source);
    let speaks = |d: &Dialect| d.hints.iter().any(|h| texts.iter().any(|t| t.contains(h.as_str())));
    let mut speaking = (0..registry.dialects.len()).filter(|&d| speaks(&registry.dialects[d]));
    let hinted = speaking.next().filter(|_| speaking.next().is_none());
    // (keys explained, quality, hinted by metadata) for each dialect, in table order.
    let mut scores = vec![(0usize, 0usize, false); registry.dialects.len()];
    for (read, hit) in meanings.iter().flatten() {
        for (d, dialect) in registry.dialects.iter().enumerate() {
            let level = level(dialect, hit, read.suffix.slot, read.suffix.suffix);
            scores[d].0 += usize::from(level > 0);
            scores[d].1 += level;
            scores[d].2 = hinted == Some(d);
        }
    }
    let known = meanings.iter().flatten().count();
    let best = (0..scores.len()).max_by_key(|&d| (scores[d], std::cmp::Reverse(d))).unwrap_or(0);
    if scores[best].0 == known {
        return (Some(best), vec![(best, known)]);
    }
    let mut counts = vec![0usize; registry.dialects.len()];
    for (read, hit) in meanings.iter().flatten() {
        let rank = |d: usize| {
            (level(&registry.dialects[d], hit, read.suffix.slot, read.suffix.suffix), d == best, std::cmp::Reverse(d))
        };
        let owner = (0..counts.len()).max_by_key(|&d| rank(d)).unwrap_or(best);
        counts[owner] += 1;
    }
    let mut dialects: Vec<(usize, usize)> = counts.into_iter().enumerate().filter(|(_, n)| *n > 0).collect();
    dialects.sort_by_key(|&(d, n)| (std::cmp::Reverse(n), d));
    match dialects.as_slice() {
        [(only, _)] => (Some(*only), dialects.clone()),
        _ => (None, dialects),
    }
}

/// Warnings about how the family was chosen.
pub fn family_warning(registry: &Registry, detection: &Detection) -> Option<crate::report::Warning> {
    let why = match detection.tie_break {
        Some("order" | "unsure") => "which comes first",
        Some("name") => "as the file's name says",
        _ => return None,
    };
    let names: Vec<String> = detection.candidates.iter().map(|&f| registry.families[f].label()).collect();
    let detail = format!(
        "the keys fit {} alike; read as {}, {why}; `--family` says otherwise",
        names.join(" and "),
        registry.families[detection.family].label()
    );
    Some(crate::report::Warning::new(Code::AmbiguousFamily.as_str(), None, detail))
}
