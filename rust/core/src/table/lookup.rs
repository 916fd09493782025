//! From a key to the modules it can mean.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::pattern::{Skeleton, Template, Variables, digits, skeleton};
use super::source::Sources;
use super::words::words;
use super::{Component, Dialect, Op, Place, Registry};
use crate::error::{Code, Error, Result};
use crate::kind::Slot;

/// How a key ends.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ending {
    head: String,
    /// What follows the name of a PEFT adapter, if there is one.
    tail: Option<String>,
}

impl Ending {
    /// What stands before it, and the adapter's name.
    fn strip<'k>(&self, key: &'k str) -> Option<(&'k str, Option<&'k str>)> {
        let Some(tail) = &self.tail else { return Some((key.strip_suffix(self.head.as_str())?, None)) };
        let front = key.strip_suffix(tail.as_str())?;
        // The name has no dot, so it begins behind the last one, with which the head ends.
        let (_, name) = front.rsplit_once('.').filter(|(_, name)| !name.is_empty())?;
        Some((front[..front.len() - name.len()].strip_suffix(self.head.as_str())?, Some(name)))
    }
}

/// A spelling of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Suffix {
    ending: Ending,
    /// How the forms of such keys end.
    form: Ending,
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
struct Entry {
    component: usize,
    namespace: usize,
    row: usize,
    /// `None` for all canonical modules of the row together.
    part: Option<usize>,
    template: Template,
    with_param: bool,
}

/// A prefix and the components that it can stand before.
#[derive(Debug, Clone)]
struct Prefix {
    text: Arc<str>,
    form: String,
    components: Vec<usize>,
}

impl Prefix {
    /// Whether what follows has underscores for dots.
    fn is_flat(&self) -> bool {
        self.text.ends_with('_')
    }

    /// What follows, if a text begins with `prefix`: the prefix itself, or its form.
    fn strip<'k>(&self, prefix: &str, text: &'k str) -> Option<&'k str> {
        let path = text.strip_prefix(prefix)?;
        // Some trainers leave an underscore where the flattened path ended with a dot.
        Some(if self.is_flat() { path.trim_end_matches('_') } else { path })
    }
}

/// The ways in which keys of one form can be read as keys of a family: suffixes in the order in which they are tried,
/// with the prefixes that leave the skeleton of some path, and what has that skeleton.
///
/// A file has thousands of keys and some hundred forms, and all that depends on the letters alone is worked out once.
#[derive(Debug)]
pub(crate) struct Routes<'r>(Vec<(&'r Suffix, Vec<Way<'r>>)>);

/// A prefix, and the paths that can follow it.
type Way<'r> = (&'r Prefix, &'r [Entry]);

/// A key with a `#` for every number that stands by itself: keys that differ in block numbers have one form.
pub(crate) fn form(key: &str) -> String {
    let mut out = String::with_capacity(key.len());
    let parts = |c: char| matches!(c, '.' | '_');
    for part in key.split_inclusive(parts) {
        let word = part.trim_end_matches(parts);
        let number = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
        out.push_str(if number { "#" } else { word });
        out.push_str(&part[word.len()..]);
    }
    out
}

/// How the modules of a family are found.
#[derive(Debug, Clone)]
pub(super) struct Names {
    /// Everything that can be looked up, by skeleton.
    paths: FxHashMap<String, Vec<Entry>>,
    /// All prefixes of all dialects, longest first.
    prefixes: Vec<Prefix>,
    /// Block variables, by component.
    variables: Vec<usize>,
}

/// The words that names have, by which a key shows what families it can be of.
#[derive(Debug, Clone)]
pub(super) struct Vocabulary {
    numbers: FxHashMap<String, u32>,
    /// By family: which of the words its names have, or what stands around names.
    families: Vec<Vec<u64>>,
}

impl Vocabulary {
    pub(super) fn of(sources: &Sources) -> Self {
        let mut numbers: FxHashMap<String, u32> = FxHashMap::default();
        let mut number = |word: &str| match numbers.get(word) {
            Some(&n) => n,
            None => {
                let n = u32::try_from(numbers.len()).expect("tables have some thousand words");
                numbers.insert(word.to_owned(), n);
                n
            }
        };
        let free: Vec<u32> = sources.free_words().map(&mut number).collect();
        let own: Vec<Vec<u32>> = sources.sizes.iter().map(|s| sources.words(s).map(&mut number).collect()).collect();
        let families = own.into_iter().map(|own| {
            let mut bits = vec![0u64; numbers.len().div_ceil(64)];
            own.into_iter().chain(free.iter().copied()).for_each(|n| bits[n as usize / 64] |= 1 << (n % 64));
            bits
        });
        Self { families: families.collect(), numbers }
    }

    /// The numbers of a name's words; `None` if no table has one of them.
    fn numbers(&self, name: &str) -> Option<Vec<u32>> {
        words(name).map(|word| self.numbers.get(word).copied()).collect()
    }

    fn has(&self, family: usize, numbers: &[u32]) -> bool {
        numbers.iter().all(|&n| self.families[family][n as usize / 64] >> (n % 64) & 1 == 1)
    }
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
    pub prefix: Arc<str>,
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
            Some((head, _)) if !head.ends_with('.') => return Err(format!("`{text}` needs a dot before the `*`")),
            Some((head, tail)) => (head.to_owned(), Some(tail.to_owned())),
            None => (text.to_owned(), None),
        };
        let formed = Ending { head: form(&head), tail: tail.as_deref().map(form) };
        let suffix = Suffix { ending: Ending { head, tail }, form: formed, slot, index };
        if !out.iter().any(|s| (s.slot, &s.ending) == (slot, &suffix.ending)) {
            out.push(suffix);
        }
        Ok(())
    };
    for (name, spellings) in table {
        let slot = Slot::from_name(name).ok_or_else(|| format!("no slot is called `{name}`"))?;
        for (index, text) in spellings.iter().enumerate() {
            add(slot, index, text)?;
        }
    }
    for dialect in dialects {
        for (&slot, text) in &dialect.spelling {
            // Which magnitude it is shows in the shape, so both are read as one slot.
            if !text.contains("param}") && slot != Slot::MagnitudeIn {
                add(slot, usize::MAX, text)?;
            }
        }
    }
    let length = |ending: &Ending| ending.head.len() + ending.tail.as_ref().map_or(0, String::len);
    out.sort_by_key(|s| std::cmp::Reverse(length(&s.ending)));
    Ok(out)
}

impl Names {
    /// Two meanings of one name within a namespace are an error.
    pub(super) fn of(family: &str, components: &[Component], places: &[Vec<Place>]) -> Result<Self> {
        let mut paths: FxHashMap<String, Vec<Entry>> = FxHashMap::default();
        for (c, component) in components.iter().enumerate() {
            add_component(&mut paths, family, c, component)?;
        }
        let mut map: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
        for place in places.iter().flatten() {
            for text in place.also.iter().chain([&place.prefix]) {
                map.entry(text).or_default().insert(place.component);
            }
        }
        let prefix = |(text, components): (&str, BTreeSet<usize>)| Prefix {
            text: Arc::from(text),
            form: form(text),
            components: components.into_iter().collect(),
        };
        let mut prefixes: Vec<Prefix> = map.into_iter().map(prefix).collect();
        prefixes.sort_by_key(|p| std::cmp::Reverse(p.text.len()));
        Ok(Self { paths, prefixes, variables: components.iter().map(|c| c.variables.len()).collect() })
    }

    /// The modules that a key without its suffix can mean, one a component.
    fn resolve(&self, family: usize, base: &str, prefixes: &[Way<'_>]) -> Vec<Hit> {
        let mut hits: Vec<Hit> = Vec::new();
        for (prefix, entries) in prefixes {
            let Some(path) = prefix.strip(&prefix.text, base) else { continue };
            let Some(digits) = digits(path) else { continue };
            for entry in *entries {
                if !prefix.components.contains(&entry.component) {
                    continue;
                }
                let Some(variables) = entry.template.matches(&digits, self.variables[entry.component]) else {
                    continue;
                };
                // With dots in the prefix, the path is dotted too and must be the very name.
                if !prefix.is_flat() && !entry.template.is(path, &variables) {
                    continue;
                }
                // Where two namespaces share a name the canonical one stands for both: it comes first.
                if !hits.iter().any(|h| h.component == entry.component) {
                    hits.push(entry.hit(family, variables, Arc::clone(&prefix.text)));
                }
            }
        }
        hits
    }

    /// The prefixes after which the form of a key without its suffix goes on with the skeleton of some path.
    fn prefixes(&self, form: &str) -> Vec<Way<'_>> {
        let entries = |prefix: &Prefix| self.paths.get(&skeleton(prefix.strip(&prefix.form, form)?));
        self.prefixes.iter().filter_map(|prefix| Some((prefix, entries(prefix)?.as_slice()))).collect()
    }

    /// Every module that bears this dotted name in one of its namespaces, the canonical one first.
    fn named<'n>(&'n self, family: usize, path: &'n str, skeleton: &'n Skeleton) -> impl Iterator<Item = Hit> + 'n {
        let entries = self.paths.get(&skeleton.text).into_iter().flatten().filter(|e| !e.with_param);
        entries.filter_map(move |entry| {
            let variables = entry.template.matches(&skeleton.digits, self.variables[entry.component])?;
            entry.template.is(path, &variables).then(|| entry.hit(family, variables, Arc::from("")))
        })
    }
}

impl Entry {
    fn hit(&self, family: usize, variables: Variables, prefix: Arc<str>) -> Hit {
        Hit {
            family,
            component: self.component,
            namespace: self.namespace,
            row: self.row,
            part: self.part,
            variables,
            prefix,
            with_param: self.with_param,
        }
    }
}

fn add_component(
    paths: &mut FxHashMap<String, Vec<Entry>>,
    family: &str,
    number: usize,
    component: &Component,
) -> Result<()> {
    let mut add = |namespace: usize, row: usize, part: Option<usize>, template: &Template, with_param: bool| {
        let bucket = paths.entry(template.skeleton()).or_default();
        let same = |e: &Entry| (e.component, e.namespace) == (number, namespace) && e.template == *template;
        if bucket.iter().any(same) {
            // A canonical module may stand in several rows (fused differently in different namespaces).
            if namespace == 0 {
                return Ok(());
            }
            let message = format!("family `{family}` names `{}` twice", template.skeleton());
            return Err(Error::new(Code::InvalidTable, message));
        }
        bucket.push(Entry { component: number, namespace, row, part, template: template.clone(), with_param });
        Ok(())
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
    Ok(())
}

impl Suffix {
    fn strip<'k>(&self, key: &'k str) -> Option<SuffixMatch<'k>> {
        let (base, adapter) = self.ending.strip(key)?;
        Some(SuffixMatch { slot: self.slot, base, suffix: &key[base.len()..], adapter, spelling: self.index })
    }
}

impl Registry {
    /// Reads a key: the longest suffix that leaves a path some family knows. `None` if there is none.
    ///
    /// Works out every family whose names have the key's words.
    pub fn read<'k>(&self, key: &'k str) -> Option<Read<'k>> {
        let form = form(key);
        self.read_as(&self.possible(&form), &form, key)
    }

    /// Reads a key as one of a family's.
    pub(crate) fn read_in<'k>(&self, family: usize, key: &'k str) -> Option<Read<'k>> {
        self.read_as(&[family], &form(key), key)
    }

    fn read_as<'k>(&self, families: &[usize], form: &str, key: &'k str) -> Option<Read<'k>> {
        self.suffixes.iter().find_map(|suffix| {
            let (found, (base, _)) = (suffix.strip(key)?, suffix.form.strip(form)?);
            let of = |&family: &usize| {
                let prefixes = self.compiled[family].names.prefixes(base);
                self.hits(family, &found, &prefixes)
            };
            let hits: Vec<Hit> = families.iter().flat_map(of).collect();
            (!hits.is_empty()).then_some(Read { suffix: found, hits })
        })
    }

    /// How keys of a form can be read as keys of a family.
    pub(crate) fn routes(&self, family: usize, form: &str) -> Routes<'_> {
        let names = &self.compiled[family].names;
        let route = |suffix: &'_ Suffix| {
            let prefixes = names.prefixes(suffix.form.strip(form)?.0);
            (!prefixes.is_empty()).then_some(prefixes)
        };
        Routes(self.suffixes.iter().filter_map(|suffix| Some((suffix, route(suffix)?))).collect())
    }

    /// Reads a key as one of a family's, of whose form these are the routes.
    pub(crate) fn read_by<'k>(&self, family: usize, routes: &Routes<'_>, key: &'k str) -> Option<Read<'k>> {
        routes.0.iter().find_map(|(suffix, prefixes)| {
            let found = suffix.strip(key)?;
            let hits = self.hits(family, &found, prefixes);
            (!hits.is_empty()).then_some(Read { suffix: found, hits })
        })
    }

    /// Whether a key looks like one of an adapter, of whatever dialect: it ends as theirs do, or says so in its name.
    pub(crate) fn is_adapters(&self, key: &str) -> bool {
        // Bare parameters are what models have, too.
        let own = |suffix: &Suffix| !suffix.ending.head.is_empty() && suffix.ending.head != ".weight";
        let ends = |suffix: &Suffix| own(suffix) && suffix.strip(key).is_some();
        key.to_ascii_lowercase().contains("lora") || self.suffixes.iter().any(ends)
    }

    fn hits(&self, family: usize, found: &SuffixMatch<'_>, prefixes: &[Way<'_>]) -> Vec<Hit> {
        let mut hits = self.compiled[family].names.resolve(family, found.base, prefixes);
        hits.retain(|hit| {
            let only = self.families[hit.family].components[hit.component].rows[hit.row].op == Op::Only;
            // A bare parameter name means "replace it"; factors of a norm make no sense.
            let fits = if only { found.slot.fits_only() } else { found.slot != Slot::Set };
            fits && (!found.suffix.is_empty() || hit.with_param)
        });
        hits
    }

    /// The families whose names, with what stands around names, have all words of a key. A family that is not among them
    /// cannot explain it. Digits are no words, so a form has those of its keys.
    pub(crate) fn possible(&self, key: &str) -> Vec<usize> {
        // The name of a PEFT adapter can be any word.
        let named = self.suffixes.iter().filter(|s| s.ending.tail.is_some()).find_map(|s| s.strip(key));
        let Some(numbers) = self.vocabulary.numbers(named.map_or(key, |n| n.base)) else { return Vec::new() };
        (0..self.families.len()).filter(|&family| self.vocabulary.has(family, &numbers)).collect()
    }

    /// Every module of every family that bears this dotted name in one of its namespaces, the canonical one first.
    pub(crate) fn named(&self, path: &str) -> Vec<Hit> {
        let Some(skeleton) = Skeleton::of(path) else { return Vec::new() };
        let named = |family: usize| self.compiled[family].names.named(family, path, &skeleton).collect::<Vec<_>>();
        self.possible(path).into_iter().flat_map(named).collect()
    }

    /// The spelling that `slot` has beside a key of this suffix: `.lora_up.weight` beside `.lora_down.weight`.
    pub fn partner(&self, found: &SuffixMatch<'_>, slot: Slot) -> String {
        let same_list = self.suffixes.iter().find(|s| s.slot == slot && s.index == found.spelling);
        let suffix = same_list.or_else(|| self.suffixes.iter().filter(|s| s.slot == slot).min_by_key(|s| s.index));
        let suffix = suffix.map_or_else(String::new, |s| match &s.ending.tail {
            Some(tail) => format!("{}{}{tail}", s.ending.head, found.adapter.unwrap_or("default")),
            None => s.ending.head.clone(),
        });
        format!("{}{suffix}", found.base)
    }

    /// The known key that is most like an unknown one, for messages.
    pub fn nearest(&self, key: &str) -> Option<String> {
        (0..self.families.len()).filter_map(|family| self.closest(family, key)).min().map(|(_, key)| key)
    }

    /// The key of a family that is most like an unknown one.
    pub(crate) fn nearest_in(&self, family: usize, key: &str) -> Option<String> {
        self.closest(family, key).map(|(_, key)| key)
    }

    /// The same with how far it is.
    fn closest(&self, family: usize, key: &str) -> Option<(usize, String)> {
        let found = self.suffixes.iter().filter(|s| !s.ending.head.is_empty()).find_map(|s| s.strip(key));
        let (base, suffix) = found.map_or((key, ""), |f| (f.base, f.suffix));
        let names = &self.compiled[family].names;
        let prefix = names.prefixes.iter().find(|p| base.starts_with(&*p.text))?;
        let path = &base[prefix.text.len()..];
        // No module has such a name, and comparing takes the square of its length.
        if path.len() > LONGEST_PATH {
            return None;
        }
        let flat = prefix.text.ends_with('_');
        let plain = |text: &str| text.replace('.', "_");
        let digits: Vec<u32> = Skeleton::of(path).map(|s| s.digits).unwrap_or_default();
        let entries = names.paths.values().flatten().filter(|e| prefix.components.contains(&e.component));
        let candidate = |entry: &Entry| {
            let bounds = entry.template.bounds();
            let variables: Vec<u32> = (0..names.variables[entry.component])
                .map(|v| {
                    let wanted = digits.first().copied().unwrap_or(0);
                    bounds.get(&v).map_or(0, |below| wanted.min(below.saturating_sub(1)))
                })
                .collect();
            let candidate = entry.template.render(&variables);
            let distance = edit_distance(&plain(path), &plain(&candidate));
            (distance, if flat { plain(&candidate) } else { candidate })
        };
        let (distance, candidate) = entries.map(candidate).min().filter(|(d, _)| *d <= path.len() / 2 + 2)?;
        let found = format!("{}{candidate}{suffix}", prefix.text);
        (found != key && self.read_in(family, &found).is_some()).then_some((distance, found))
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
