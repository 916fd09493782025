//! From a key to the modules it can mean.

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;

use super::pattern::{Skeleton, Template, Variables};
use super::{Dialect, Family, Op, Registry};
use crate::error::{Code, Error, Result};
use crate::kind::Slot;

/// A spelling of a slot; `infix` is the place of a PEFT adapter's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Suffix {
    head: String,
    /// What follows the adapter's name, if there is one.
    tail: Option<String>,
    slot: Slot,
    /// Which of the slot's spellings it is; down and up list theirs in the same order.
    index: usize,
}

/// A suffix found at the end of a key.
#[derive(Debug, Clone)]
pub struct SuffixMatch<'k> {
    /// The slot.
    pub slot: Slot,
    /// The key without the suffix.
    pub base: &'k str,
    /// The suffix as it stands in the key.
    pub suffix: &'k str,
    /// The name of a PEFT adapter in the suffix.
    pub adapter: Option<&'k str>,
    spelling: usize,
}

impl SuffixMatch<'_> {
    /// Whether this and another suffix are the two halves of one spelling (`.lora_A.weight`, `.lora_B.weight`).
    pub fn is_paired_with(&self, other: &SuffixMatch<'_>) -> bool {
        self.spelling == other.spelling
    }
}

/// A path of a family, in one of its namespaces.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    family: usize,
    component: usize,
    namespace: usize,
    row: usize,
    /// `None` for all canonical modules of the row together.
    part: Option<usize>,
    template: Template,
    variables: usize,
    with_param: bool,
}

/// A prefix and every component it can stand before.
#[derive(Debug, Clone)]
pub(super) struct Prefix {
    text: String,
    /// Family and component.
    targets: BTreeSet<(usize, usize)>,
}

/// One meaning of a key's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// Number of the family.
    pub family: usize,
    /// Number of the component.
    pub component: usize,
    /// Number of the namespace whose name it is.
    pub namespace: usize,
    /// Number of the row.
    pub row: usize,
    /// Which canonical module of the row; `None` for all of them, stacked.
    pub part: Option<usize>,
    /// Block numbers.
    pub variables: Variables,
    /// The prefix before the path.
    pub prefix: String,
    /// Whether the path ends with the parameter's name.
    pub with_param: bool,
}

/// What a key says.
#[derive(Debug, Clone)]
pub struct Read<'k> {
    /// The suffix.
    pub suffix: SuffixMatch<'k>,
    /// Every module it can mean, over all families.
    pub hits: Vec<Hit>,
}

/// Longest path for which a similar one is looked up.
const LONGEST_PATH: usize = 400;

/// The suffixes to try, longest literal part first.
pub(super) fn suffixes(table: &BTreeMap<String, Vec<String>>, dialects: &[Dialect]) -> Result<Vec<Suffix>, String> {
    let mut out: Vec<Suffix> = Vec::new();
    let mut add = |slot: Slot, index: usize, text: &str| {
        let (head, tail) = match text.split_once('*') {
            Some((head, tail)) => (head.to_owned(), Some(tail.to_owned())),
            None => (text.to_owned(), None),
        };
        let suffix = Suffix { head, tail, slot, index };
        if !out.iter().any(|s| (s.slot, &s.head, &s.tail) == (slot, &suffix.head, &suffix.tail)) {
            out.push(suffix);
        }
    };
    for (name, spellings) in table {
        let slot = Slot::from_name(name).ok_or_else(|| format!("no slot is called `{name}`"))?;
        for (index, text) in spellings.iter().enumerate() {
            add(slot, index, text);
        }
    }
    for dialect in dialects {
        for (&slot, text) in &dialect.spelling {
            // Which magnitude it is shows in the shape, so both are read as one slot.
            if !text.contains("param}") && slot != Slot::MagnitudeIn {
                add(slot, usize::MAX, text);
            }
        }
    }
    out.sort_by_key(|s| std::cmp::Reverse(s.head.len() + s.tail.as_ref().map_or(0, String::len)));
    Ok(out)
}

/// Everything that can be looked up, by skeleton. Two meanings of one name within a namespace are an error.
pub(super) fn paths(families: &[Family]) -> Result<FxHashMap<String, Vec<Entry>>> {
    let mut map: FxHashMap<String, Vec<Entry>> = FxHashMap::default();
    for (f, family) in families.iter().enumerate() {
        for (c, component) in family.components.iter().enumerate() {
            let mut add = |namespace: usize, row: usize, part: Option<usize>, template: &Template, with_param: bool| {
                let entry = Entry {
                    family: f,
                    component: c,
                    namespace,
                    row,
                    part,
                    template: template.clone(),
                    variables: component.variables.len(),
                    with_param,
                };
                let bucket = map.entry(template.skeleton()).or_default();
                let twin = bucket
                    .iter()
                    .find(|e| (e.family, e.component, e.namespace) == (f, c, namespace) && e.template == *template);
                match twin {
                    // A canonical module may stand in several rows (fused differently in different namespaces).
                    Some(_) if namespace == 0 => Ok(()),
                    Some(_) => Err(Error::new(
                        Code::InvalidTable,
                        format!("family `{}` names `{}` twice", family.name, template.skeleton()),
                    )),
                    None => {
                        bucket.push(entry);
                        Ok(())
                    }
                }
            };
            for (r, row) in component.rows.iter().enumerate() {
                for (part, template) in row.canonical.iter().enumerate() {
                    add(0, r, Some(part), template, false)?;
                    if let Some(param) = &row.params[0] {
                        add(0, r, Some(part), &template.with_suffix(&format!(".{param}")), true)?;
                    }
                }
                for (namespace, template) in row.names.iter().enumerate().skip(1) {
                    let Some(template) = template else { continue };
                    let whole = if row.op == Op::Fuse { None } else { Some(0) };
                    add(namespace, r, whole, template, false)?;
                    if let Some(param) = &row.params[namespace] {
                        add(namespace, r, whole, &template.with_suffix(&format!(".{param}")), true)?;
                    }
                    // A fused module may be written as numbered slices.
                    if row.op == Op::Fuse {
                        for part in 0..row.canonical.len() {
                            add(namespace, r, Some(part), &template.with_suffix(&format!(".{part}")), false)?;
                        }
                    }
                }
            }
        }
    }
    Ok(map)
}

/// All prefixes of all dialects, longest first.
pub(super) fn prefixes(dialects: &[Dialect]) -> Vec<Prefix> {
    let mut map: BTreeMap<&str, BTreeSet<(usize, usize)>> = BTreeMap::new();
    for place in dialects.iter().flat_map(|d| &d.places) {
        for text in place.also.iter().chain([&place.prefix]) {
            map.entry(text).or_default().insert((place.family, place.component));
        }
    }
    let mut out: Vec<Prefix> =
        map.into_iter().map(|(text, targets)| Prefix { text: text.to_owned(), targets }).collect();
    out.sort_by_key(|p| std::cmp::Reverse(p.text.len()));
    out
}

impl Suffix {
    fn strip<'k>(&self, key: &'k str) -> Option<SuffixMatch<'k>> {
        let (base, adapter) = match &self.tail {
            None => (key.strip_suffix(self.head.as_str())?, None),
            Some(tail) => {
                let front = key.strip_suffix(tail.as_str())?;
                let at = front.rfind(self.head.as_str())?;
                let name = &front[at + self.head.len()..];
                if name.is_empty() || name.contains('.') {
                    return None;
                }
                (&front[..at], Some(name))
            }
        };
        Some(SuffixMatch { slot: self.slot, base, suffix: &key[base.len()..], adapter, spelling: self.index })
    }
}

impl Registry {
    /// Reads a key: the longest suffix that leaves a path some family knows. `None` if there is none.
    pub fn read<'k>(&self, key: &'k str) -> Option<Read<'k>> {
        for suffix in &self.suffixes {
            let Some(found) = suffix.strip(key) else { continue };
            let mut hits = self.resolve(found.base);
            hits.retain(|hit| {
                let only = self.families[hit.family].components[hit.component].rows[hit.row].op == Op::Only;
                // A bare parameter name means "replace it"; factors of a norm make no sense.
                let fits = if only { found.slot.fits_only() } else { found.slot != Slot::Set };
                fits && (!found.suffix.is_empty() || hit.with_param)
            });
            if !hits.is_empty() {
                return Some(Read { suffix: found, hits });
            }
        }
        None
    }

    /// Every module that a key without its suffix can mean.
    fn resolve(&self, base: &str) -> Vec<Hit> {
        let mut hits: Vec<Hit> = Vec::new();
        for prefix in &self.prefixes {
            let Some(path) = base.strip_prefix(prefix.text.as_str()) else { continue };
            let flat = prefix.text.ends_with('_');
            // Some trainers leave an underscore where the flattened path ended with a dot.
            let path = if flat { path.trim_end_matches('_') } else { path };
            let Some(skeleton) = Skeleton::of(path) else { continue };
            let Some(entries) = self.paths.get(&skeleton.text) else { continue };
            for entry in entries {
                if !prefix.targets.contains(&(entry.family, entry.component)) {
                    continue;
                }
                let Some(variables) = entry.template.matches(&skeleton.digits, entry.variables) else { continue };
                // With dots in the prefix, the path is dotted too and must be the very name.
                if !flat && entry.template.render(&variables) != path {
                    continue;
                }
                let hit = Hit {
                    family: entry.family,
                    component: entry.component,
                    namespace: entry.namespace,
                    row: entry.row,
                    part: entry.part,
                    variables,
                    prefix: prefix.text.clone(),
                    with_param: entry.with_param,
                };
                // Where two namespaces share a name the canonical one stands for both: it comes first.
                let twin = hits.iter().any(|h| (h.family, h.component) == (hit.family, hit.component));
                if !twin {
                    hits.push(hit);
                }
            }
        }
        hits
    }

    /// Every module of every family that bears this dotted name in one of its namespaces, the canonical one first.
    pub(crate) fn named(&self, path: &str) -> Vec<Hit> {
        let Some(skeleton) = Skeleton::of(path) else { return Vec::new() };
        let entries = self.paths.get(&skeleton.text).into_iter().flatten().filter(|e| !e.with_param);
        let hit = |entry: &Entry| {
            let variables = entry.template.matches(&skeleton.digits, entry.variables)?;
            (entry.template.render(&variables) == path).then(|| Hit {
                family: entry.family,
                component: entry.component,
                namespace: entry.namespace,
                row: entry.row,
                part: entry.part,
                variables,
                prefix: String::new(),
                with_param: false,
            })
        };
        entries.filter_map(hit).collect()
    }

    /// The spelling that `slot` has beside a key of this suffix: `.lora_up.weight` beside `.lora_down.weight`.
    pub fn partner(&self, found: &SuffixMatch<'_>, slot: Slot) -> String {
        let same_list = self.suffixes.iter().find(|s| s.slot == slot && s.index == found.spelling);
        let suffix = same_list.or_else(|| self.suffixes.iter().filter(|s| s.slot == slot).min_by_key(|s| s.index));
        let suffix = suffix.map_or_else(String::new, |s| match &s.tail {
            Some(tail) => format!("{}{}{tail}", s.head, found.adapter.unwrap_or("default")),
            None => s.head.clone(),
        });
        format!("{}{suffix}", found.base)
    }

    /// The known key that is most like an unknown one, for messages.
    pub fn nearest(&self, key: &str) -> Option<String> {
        let found = self.suffixes.iter().filter(|s| !s.head.is_empty()).find_map(|s| s.strip(key));
        let (base, suffix) = found.map_or((key, ""), |f| (f.base, f.suffix));
        let prefix = self.prefixes.iter().find(|p| base.starts_with(&p.text))?;
        let path = &base[prefix.text.len()..];
        // No module has such a name, and comparing takes the square of its length.
        if path.len() > LONGEST_PATH {
            return None;
        }
        let flat = prefix.text.ends_with('_');
        let plain = |text: &str| text.replace('.', "_");
        let digits: Vec<u32> = Skeleton::of(path).map(|s| s.digits).unwrap_or_default();
        let mut best: Option<(usize, String)> = None;
        let mut skeletons: Vec<(&String, &Vec<Entry>)> = self.paths.iter().collect();
        skeletons.sort_by_key(|(text, _)| text.as_str());
        for (_, entries) in skeletons {
            for entry in entries.iter().filter(|e| prefix.targets.contains(&(e.family, e.component))) {
                let bounds = entry.template.bounds();
                let variables: Vec<u32> = (0..entry.variables)
                    .map(|v| {
                        let wanted = digits.first().copied().unwrap_or(0);
                        bounds.get(&v).map_or(0, |below| wanted.min(below.saturating_sub(1)))
                    })
                    .collect();
                let candidate = entry.template.render(&variables);
                let distance = edit_distance(&plain(path), &plain(&candidate));
                if best.as_ref().is_none_or(|(least, _)| distance < *least) {
                    best = Some((distance, if flat { plain(&candidate) } else { candidate }));
                }
            }
        }
        best.filter(|(distance, _)| *distance <= path.len() / 2 + 2)
            .map(|(_, path)| format!("{}{path}{suffix}", prefix.text))
            .filter(|found| found != key && self.read(found).is_some())
    }
}

/// Levenshtein distance in bytes.
pub(crate) fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
