//! Which family a file is of.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::shape::{fits, is_size, kronecker};
use super::{Detection, Given, Meaning, level};
use crate::error::{Code, Error, Result};
use crate::io::{Source, TensorInfo};
use crate::kind::{Kind, Slot};
use crate::table::{Hit, Op, Read, Registry, Routes, form};

/// Families that a message names, of those that fit alike.
const SHOWN: usize = 4;

/// Keys by which it is decided which family is tried first.
const SAMPLE: usize = 32;

/// A file as one of a family.
pub(super) struct Explained<'s> {
    pub family: usize,
    pub meanings: Vec<Meaning<'s>>,
    /// Keys whose tensors have shapes that the modules can have.
    score: usize,
}

impl Explained<'_> {
    /// Whether a key is one of the model itself, not of a text encoder.
    fn meets_model(&self) -> bool {
        self.meanings.iter().flatten().any(|(_, hit)| hit.component == 0)
    }

    fn is_whole(&self) -> bool {
        self.meanings.iter().all(Option::is_some)
    }
}

/// The forms of a file's keys.
struct Forms {
    texts: Vec<String>,
    /// How many keys have each.
    counts: Vec<usize>,
    /// Which one a key has.
    of: Vec<usize>,
}

impl Forms {
    fn of(tensors: &[TensorInfo]) -> Self {
        let mut numbers: FxHashMap<String, usize> = FxHashMap::default();
        let mut forms = Self { texts: Vec::new(), counts: Vec::new(), of: Vec::with_capacity(tensors.len()) };
        for info in tensors {
            let text = form(&info.name);
            let number = match numbers.get(&text) {
                Some(&number) => number,
                None => {
                    forms.texts.push(text.clone());
                    forms.counts.push(0);
                    numbers.insert(text, forms.texts.len() - 1);
                    forms.texts.len() - 1
                }
            };
            forms.counts[number] += 1;
            forms.of.push(number);
        }
        forms
    }
}

/// Reads a file as one of a family; `None` if that explains fewer than `least` keys with their shapes.
///
/// A name that several components have, two text encoders of one build, is that of the component whose shapes its tensors
/// have; the module's other tensors follow those that tell.
fn explain<'s>(
    registry: &Registry,
    source: &'s Source,
    forms: &Forms,
    given: &Given,
    family: usize,
    least: usize,
) -> Option<Explained<'s>> {
    let tensors = source.tensors();
    let dialect = given.dialect.map(|d| &registry.dialects[d]);
    let mut left = tensors.len().checked_sub(least)?;
    let mut reads = Vec::with_capacity(tensors.len());
    let mut told: FxHashMap<&str, usize> = FxHashMap::default();
    let mut routes: Vec<Option<Routes<'_>>> = forms.texts.iter().map(|_| None).collect();
    for (info, &number) in tensors.iter().zip(&forms.of) {
        let routes = routes[number].get_or_insert_with(|| registry.routes(family, &forms.texts[number]));
        let mut read = registry.read_by(family, routes, &info.name);
        if let (Some(read), Some(dialect)) = (&mut read, dialect) {
            read.hits.retain(|hit| level(dialect, hit, read.suffix.slot, read.suffix.suffix) > 0);
        }
        let read = read.filter(|r| !r.hits.is_empty());
        match read.as_ref().map(|r| (r, fitting(registry, r, info))) {
            Some((read, fit)) if !fit.is_empty() => {
                if fit.len() < read.hits.len() {
                    told.entry(read.suffix.base).or_insert(read.hits[fit[0]].component);
                }
            }
            _ if left == 0 => return None,
            _ => left -= 1,
        }
        reads.push(read);
    }
    let settle = |read: Read<'s>| {
        let own = told.get(read.suffix.base).and_then(|c| read.hits.iter().find(|hit| hit.component == *c));
        let hit = own.or(read.hits.first())?.clone();
        Some((read, hit))
    };
    let meanings = reads.into_iter().map(|read| read.and_then(settle)).collect();
    Some(Explained { family, meanings, score: least + left })
}

/// Which of the modules that a key can mean have a shape that fits.
fn fitting(registry: &Registry, read: &Read<'_>, info: &TensorInfo) -> Vec<usize> {
    let fits = |hit: &Hit| fits(registry, hit, read.suffix.slot, &info.shape);
    (0..read.hits.len()).filter(|&at| fits(&read.hits[at])).collect()
}

/// The file as every family that explains most of its keys with their shapes.
///
/// No family explains more keys than it has the words of. So families are tried in the order of that number, and no more
/// of them once it is below what one explains; and trying ends with the key that makes it too few. A typical file takes
/// the tables of a few families, and one pass over its keys.
fn best<'s>(registry: &Registry, source: &'s Source, given: &Given) -> Vec<Explained<'s>> {
    let mut bounds = vec![0usize; registry.families.len()];
    let forms = Forms::of(source.tensors());
    for (text, count) in forms.texts.iter().zip(&forms.counts) {
        registry.possible(text).into_iter().for_each(|family| bounds[family] += count);
    }
    let allowed = |f: &usize| given.families.is_empty() || given.families.contains(f);
    let mut order: Vec<usize> = (0..bounds.len()).filter(allowed).filter(|&f| bounds[f] > 0).collect();
    order.sort_by_key(|&f| (std::cmp::Reverse(bounds[f]), f));
    // Of those that have the words of most keys, the one that explains most of a few goes first: it leaves little to try.
    let front = order.partition_point(|&f| bounds[f] == bounds[order[0]]);
    if front > 1 {
        order[..front].sort_by_cached_key(|&f| std::cmp::Reverse(explained_of_some(registry, source, f)));
    }
    let mut found: Vec<Explained<'s>> = Vec::new();
    for family in order {
        let most = found.first().map_or(1, |e| e.score);
        if bounds[family] < most {
            break;
        }
        let Some(explained) = explain(registry, source, &forms, given, family, most) else { continue };
        if explained.score > most {
            found.clear();
        }
        found.push(explained);
    }
    found.sort_by_key(|e| e.family);
    found
}

/// How many of some keys, spread over the file, a family explains with their shapes.
fn explained_of_some(registry: &Registry, source: &Source, family: usize) -> usize {
    let tensors = source.tensors();
    let some = tensors.iter().step_by(tensors.len().div_ceil(SAMPLE));
    some.filter(|info| registry.read_in(family, &info.name).is_some_and(|r| !fitting(registry, &r, info).is_empty()))
        .count()
}

type Choice<'s> = (Explained<'s>, Vec<usize>, Option<&'static str>);

/// The family, with all that explain the file as well and what decided among them.
pub(super) fn choose<'s>(registry: &Registry, source: &'s Source, given: &Given) -> Result<Choice<'s>> {
    let found = best(registry, source, given);
    // Text encoders are shared by many families: beside unknown keys they prove none.
    let proven = found.iter().any(|e| e.meets_model()) || found.iter().any(Explained::is_whole);
    let asked = !given.families.is_empty();
    let other = || best(registry, source, &Given { dialect: given.dialect, ..Given::default() });
    // A family whose model is not met, while that of another one is, was named by mistake.
    let mistaken = || {
        let own = found.first().map_or(0, |e| e.score);
        other().iter().any(|e| e.score > own && e.meets_model())
    };
    // So was one that has the names and other shapes, while another one has both.
    let misfits = |e: &Explained<'_>| {
        let fit =
            |(info, (read, hit)): (&TensorInfo, &(Read<'_>, Hit))| fits(registry, hit, read.suffix.slot, &info.shape);
        let known =
            source.tensors().iter().zip(&e.meanings).filter_map(|(info, meaning)| Some((info, meaning.as_ref()?)));
        !known.into_iter().all(fit)
    };
    let doubtful = || found.iter().all(|e| !e.meets_model() || misfits(e));
    let refused = if asked { doubtful() && mistaken() } else { !proven };
    if found.is_empty() || refused {
        return Err(no_family(registry, source, given, &found, &other()));
    }
    let tied = ended(registry, closest(registry, source, found));
    let candidates: Vec<usize> = tied.iter().map(|e| e.family).collect();
    let (at, tie_break) = decide(registry, source, given, &tied);
    let chosen = tied.into_iter().nth(at).expect("one of them");
    Ok((chosen, candidates, tie_break))
}

/// Which of the tied it is, and what says so; nothing needs to if there is one.
fn decide(
    registry: &Registry,
    source: &Source,
    given: &Given,
    tied: &[Explained<'_>],
) -> (usize, Option<&'static str>) {
    if tied.len() == 1 {
        return (0, None);
    }
    // What an adapter is put behind says what it is for.
    let behind =
        |base: &crate::native::Base| tied.iter().position(|e| registry.families[e.family].name == base.family());
    if let Some(at) = given.base.as_ref().and_then(|base| behind(base)) {
        return (at, Some("base"));
    }
    if let Some(at) = hinted(registry, &said(source), tied) {
        return (at, Some("metadata"));
    }
    if let Some(at) = hinted(registry, &[name_of(source)], tied) {
        return (at, Some("name"));
    }
    // Families that name and shape every key alike give one result: take the first and say so. Of others the first is
    // good enough to look at, and not to write.
    let same = tied.windows(2).all(|pair| {
        let pairs = pair[0].meanings.iter().zip(&pair[1].meanings);
        pairs.into_iter().all(|(a, b)| describe(registry, a) == describe(registry, b))
    });
    (0, Some(if same { "order" } else { "unsure" }))
}

/// The error for a file that may be of several families, where that makes a difference.
pub(crate) fn ambiguous(registry: &Registry, detection: &Detection, source: &Source, why: &str) -> Error {
    let all: Vec<String> = detection.candidates.iter().map(|&f| registry.families[f].label()).collect();
    let shown = &all[..all.len().min(SHOWN)];
    let more = match all.len() - shown.len() {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    Error::new(Code::AmbiguousFamily, format!("the file fits {}{more} equally well{why}", shown.join(" and ")))
        .at(source.path())
        .hint(format!("add `--family {}`", shown.join("` or `--family ")))
}

/// Of families that every key fits by itself, those whose modules most Kronecker products fit as wholes.
fn closest<'s>(registry: &Registry, source: &Source, tied: Vec<Explained<'s>>) -> Vec<Explained<'s>> {
    let mut products: BTreeMap<&str, (usize, BTreeMap<Slot, &[usize]>)> = BTreeMap::new();
    for (at, info) in source.tensors().iter().enumerate() {
        let read = tied.first().and_then(|e| e.meanings[at].as_ref()).map(|(read, _)| read);
        if let Some(read) = read.filter(|r| r.suffix.slot.kind() == Some(Kind::Lokr)) {
            let module = products.entry(read.suffix.base).or_insert_with(|| (at, BTreeMap::new()));
            module.1.insert(read.suffix.slot, &info.shape);
        }
    }
    best_of(tied, |e| {
        let whole = |(at, slots): &&(usize, BTreeMap<Slot, &[usize]>)| {
            let hit = e.meanings[*at].as_ref().map(|(_, hit)| hit);
            hit.is_some_and(|hit| kronecker(slots).is_some_and(|size| is_size(registry, hit, size)))
        };
        products.values().filter(whole).count()
    })
}

/// Of families that every key fits, those whose kinds of blocks mostly end where the file's do.
fn ended<'s>(registry: &Registry, tied: Vec<Explained<'s>>) -> Vec<Explained<'s>> {
    best_of(tied, |e| {
        let mut last: BTreeMap<(usize, usize), (u32, u32)> = BTreeMap::new();
        for (_, hit) in e.meanings.iter().flatten() {
            let row = &registry.families[e.family].components[hit.component].rows[hit.row];
            for (variable, below) in row.canonical[hit.part.unwrap_or(0)].bounds() {
                let number = hit.variables[variable];
                let entry = last.entry((hit.component, variable)).or_insert((0, below));
                *entry = (entry.0.max(number), entry.1.max(below));
            }
        }
        last.values().filter(|(number, below)| number + 1 == *below).count()
    })
}

/// Those of the highest count.
fn best_of<'s>(tied: Vec<Explained<'s>>, count: impl Fn(&Explained<'s>) -> usize) -> Vec<Explained<'s>> {
    if tied.len() < 2 {
        return tied;
    }
    let counts: Vec<usize> = tied.iter().map(count).collect();
    let best = counts.iter().copied().max().unwrap_or(0);
    tied.into_iter().zip(counts).filter(|(_, count)| *count == best).map(|(e, _)| e).collect()
}

/// The canonical module that a key is: component, names, output rows, and whether halves are exchanged.
fn describe<'r>(registry: &'r Registry, meaning: &Meaning<'_>) -> Option<(&'r str, Vec<String>, &'r [usize], bool)> {
    let (_, hit) = meaning.as_ref()?;
    let component = &registry.families[hit.family].components[hit.component];
    let row = &component.rows[hit.row];
    let parts = hit.part.map_or(0..row.canonical.len(), |part| part..part + 1);
    let names = row.canonical[parts.clone()].iter().map(|t| t.render(&hit.variables)).collect();
    Some((&component.name, names, &row.outputs[parts], row.op == Op::SwapHalves && hit.namespace != 0))
}

/// What the metadata says of the model, in lower case.
pub(super) fn said(source: &Source) -> Vec<String> {
    let keys = ["ss_base_model_version", "modelspec.architecture", "software", "base_model", "ot_branch"];
    keys.iter().filter_map(|k| source.metadata_value(k)).map(str::to_lowercase).collect()
}

/// The file's name in lower case, words joined by hyphens.
fn name_of(source: &Source) -> String {
    let stem = source.path().file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    stem.replace(['_', ' '], "-")
}

/// The expert of its family that a file is for, as its name says.
pub(crate) fn expert<'r>(registry: &'r Registry, family: usize, source: &Source) -> Option<&'r str> {
    // Hyphens around it, so that a word may ask for one.
    let name = format!("-{}-", name_of(source).replace('.', "-"));
    let mut found =
        registry.families[family].experts.iter().filter(|(_, words)| words.iter().any(|w| name.contains(w.as_str())));
    match (found.next(), found.next()) {
        (Some((one, _)), None) => Some(one),
        _ => None,
    }
}

/// The one of the tied of whose hints the texts hold one; of several sizes of one family the first.
fn hinted(registry: &Registry, texts: &[String], tied: &[Explained<'_>]) -> Option<usize> {
    let plain = |text: &str| text.replace('_', "-");
    let holds = |hint: &String| texts.iter().any(|t| t.contains(hint.as_str()) || plain(t).contains(&plain(hint)));
    let found: Vec<usize> =
        (0..tied.len()).filter(|&at| registry.families[tied[at].family].hints.iter().any(holds)).collect();
    let name = |at: usize| registry.families[tied[at].family].name.as_str();
    let one = found.windows(2).all(|pair| name(pair[0]) == name(pair[1]));
    found.first().copied().filter(|_| one)
}

/// Why no family was found, or not the one that was asked for: what fits better, a shape that fits nothing, or a key
/// that nothing knows.
fn no_family(
    registry: &Registry,
    source: &Source,
    given: &Given,
    own: &[Explained<'_>],
    others: &[Explained<'_>],
) -> Error {
    let wanted = |f: usize| given.families.is_empty() || given.families.contains(&f);
    let (tensors, total) = (source.tensors(), source.tensors().len());
    let first = tensors.first().map_or("", |t| t.name.as_str());
    if let (Some(&asked), Some(fitting)) = (given.families.first(), others.first()) {
        let asked = &registry.families[asked].name;
        let labels: Vec<String> = others.iter().map(|e| registry.families[e.family].label()).collect();
        let (own, best, names) = (own.first().map_or(0, |e| e.score), fitting.score, labels.join(", "));
        let message = format!("{asked} explains {own} of {total} keys; {names} explains {best}");
        let hint = format!("leave `--family` out, or add `--family {}`", labels[0]);
        return Error::new(Code::UnknownFamily, message).key(first).at(source.path()).hint(hint);
    }
    let mut strange = None;
    for info in tensors {
        let Some(read) = registry.read(&info.name) else {
            strange.get_or_insert(&info.name);
            continue;
        };
        let known: Vec<&Hit> = read.hits.iter().filter(|hit| wanted(hit.family)).collect();
        if let Some(hit) = known.first()
            && !known.iter().any(|hit| fits(registry, hit, read.suffix.slot, &info.shape))
        {
            let (family, shape) = (registry.families[hit.family].label(), &info.shape);
            let message = format!("`{}` has shape {shape:?}, which no module of that name has in {family}", info.name);
            return Error::new(Code::ShapeMismatch, message).key(&info.name).at(source.path());
        }
    }
    let key = strange.map_or(first, String::as_str);
    let what = match given.families.first() {
        Some(&family) => format!("no key belongs to {}", registry.families[family].name),
        None => "the keys belong to no known model family".to_owned(),
    };
    let error = Error::new(Code::UnknownFamily, format!("{what}; one is `{key}`")).key(key).at(source.path());
    error.hint(format!("known families: {}; `--table FILE` adds one", registry.family_names().join(", ")))
}

/// The families, other than its own, of whose model a key is.
pub(crate) fn other_families(registry: &Registry, info: &TensorInfo, own: usize) -> Vec<String> {
    let Some(read) = registry.read(&info.name) else { return Vec::new() };
    let fitting = read.hits.iter().filter(|hit| fits(registry, hit, read.suffix.slot, &info.shape));
    let mut names: Vec<String> =
        fitting.map(|hit| hit.family).filter(|&f| f != own).map(|f| registry.families[f].label()).collect();
    names.dedup();
    names
}
