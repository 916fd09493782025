//! Which dialect and family a file is: by how many of its keys each explains, with shapes; metadata only breaks ties.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Code, Error, Result};
use crate::io::{Source, TensorInfo};
use crate::kind::{Kind, Slot};
use crate::native::{Base, Branches, recognise};
use crate::table::{Dialect, Hit, Op, Read, Registry};

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
    let branches = recognise(registry, source)?;
    let owned = |i: usize| branches.as_ref().is_some_and(|b| b.owned[i]);
    let read = |(i, t): (usize, &'s TensorInfo)| if owned(i) { None } else { registry.read(&t.name) };
    let mut reads: Vec<Option<Read<'s>>> = tensors.iter().enumerate().map(read).collect();
    if let Some(branches) = branches {
        let meanings: Vec<Meaning<'s>> =
            reads.into_iter().map(|r| r.and_then(|r| in_family(r, branches.family))).collect();
        let known = meanings.iter().flatten().count() + branches.owned.iter().filter(|o| **o).count();
        let (dialect, family) = (branches.dialect, branches.family);
        let detection = Detection {
            dialect: Some(dialect),
            dialects: vec![(dialect, known)],
            family,
            candidates: vec![family],
            tie_break: None,
            known,
            total: tensors.len(),
        };
        return Ok((detection, meanings, Some(branches)));
    }
    if let Some(dialect) = given.dialect {
        for read in reads.iter_mut().flatten() {
            read.hits.retain(|hit| level(&registry.dialects[dialect], hit, read.suffix.slot, read.suffix.suffix) > 0);
        }
    }
    let scores: Vec<usize> = (0..registry.families.len())
        .map(|family| {
            let fits = |(read, info): (&Option<Read<'_>>, &TensorInfo)| {
                read.as_ref()
                    .is_some_and(|r| hit_in(r, family).is_some_and(|h| fits(registry, h, r.suffix.slot, &info.shape)))
            };
            reads.iter().zip(tensors).filter(|&(r, t)| fits((r, t))).count()
        })
        .collect();
    let (family, candidates, tie_break) = choose_family(registry, source, &reads, &scores, given)?;
    let meanings: Vec<Meaning<'s>> = reads.into_iter().map(|r| r.and_then(|r| in_family(r, family))).collect();
    let known = meanings.iter().flatten().count();
    let (dialect, dialects) = choose_dialect(registry, source, &meanings);
    let detection = Detection { dialect, dialects, family, candidates, tie_break, known, total: tensors.len() };
    Ok((detection, meanings, None))
}

fn in_family<'s>(read: Read<'s>, family: usize) -> Meaning<'s> {
    hit_in(&read, family).cloned().map(|hit| (read, hit))
}

fn hit_in<'r>(read: &'r Read<'_>, family: usize) -> Option<&'r Hit> {
    read.hits.iter().find(|h| h.family == family)
}

/// Whether the shape is one that the tensor can have in this module. Of a product only one factor is seen at a time, so
/// there it is enough that the other can make up the rest.
fn fits(registry: &Registry, hit: &Hit, slot: Slot, shape: &[usize]) -> bool {
    let row = &registry.families[hit.family].components[hit.component].rows[hit.row];
    let output = hit.part.map_or_else(|| row.output(), |part| row.outputs[part]);
    let rows = shape.first().copied().unwrap_or(1);
    let cols = shape.iter().skip(1).product::<usize>();
    let area: usize = row.kernel.iter().product();
    // Beside a core a factor has the channels alone.
    let channels = |cols: usize| row.inputs.iter().any(|&width| width == cols || width == cols * area);
    let divides = |part: usize, whole: usize| part > 0 && whole.is_multiple_of(part);
    match slot {
        Slot::Down => channels(cols),
        Slot::Up | Slot::Bias | Slot::DiffB | Slot::WNorm | Slot::BNorm => rows == output,
        Slot::Diff | Slot::Set => rows == output && (row.inputs.is_empty() || row.inputs.contains(&cols)),
        // With a core the factors of the output are transposed.
        Slot::HadaW1A | Slot::HadaW2A => rows == output || cols == output,
        Slot::HadaW1B | Slot::HadaW2B => channels(cols),
        Slot::LokrW1 => divides(rows, output) && row.inputs.iter().any(|&width| divides(cols, width)),
        Slot::LokrW2 => divides(rows, output) && row.inputs.iter().any(|&width| divides(cols, width)),
        Slot::LokrW1A => divides(rows, output),
        Slot::LokrW1B => row.inputs.iter().any(|&width| divides(cols, width)),
        Slot::LokrW2A => divides(rows, output) || divides(cols, output),
        Slot::LokrW2B => row.inputs.iter().any(|&width| divides(cols, width)),
        Slot::Magnitude => rows == output || channels(cols) || cols == 1 && channels(rows),
        _ => true,
    }
}

fn choose_family(
    registry: &Registry,
    source: &Source,
    reads: &[Option<Read<'_>>],
    scores: &[usize],
    given: &Given,
) -> Result<(usize, Vec<usize>, Option<&'static str>)> {
    let allowed = |f: &usize| given.families.is_empty() || given.families.contains(f);
    let best = (0..scores.len()).filter(allowed).map(|f| scores[f]).max().unwrap_or(0);
    // Text encoders are shared by many families: beside unknown keys they prove none.
    let main = |f: usize| reads.iter().flatten().any(|read| hit_in(read, f).is_some_and(|hit| hit.component == 0));
    let proven = || (0..scores.len()).filter(|&f| scores[f] > 0).any(main) || reads.iter().all(Option::is_some);
    if best == 0 || (given.families.is_empty() && !proven()) {
        return Err(no_family(registry, source, reads, &given.families, scores));
    }
    // A family whose model is not met, while that of another one is, was named by mistake.
    if !given.families.is_empty() && !given.families.iter().any(|&f| main(f)) {
        let better = (0..scores.len()).any(|f| scores[f] > best && main(f));
        if better {
            return Err(no_family(registry, source, reads, &given.families, scores));
        }
    }
    let tied: Vec<usize> = (0..scores.len()).filter(allowed).filter(|&f| scores[f] == best).collect();
    let tied = ended(registry, reads, closest(registry, source, reads, tied));
    if tied.len() == 1 {
        return Ok((tied[0], tied, None));
    }
    // What an adapter is put behind says what it is for.
    let behind = given.base.as_ref().and_then(|base| registry.families.iter().position(|f| f.name == base.family()));
    if let Some(family) = behind.filter(|f| tied.contains(f)) {
        return Ok((family, tied, Some("base")));
    }
    let hints = || tied.iter().map(|&f| (f, registry.families[f].hints.as_slice()));
    if let Some(family) = hinted(&said(source), hints(), registry) {
        return Ok((family, tied, Some("metadata")));
    }
    if let Some(family) = hinted(&[name_of(source)], hints(), registry) {
        return Ok((family, tied, Some("name")));
    }
    // Families that name and shape every key alike give one result: take the first and say so. Of others the first is
    // good enough to look at, and not to write.
    let same = tied.windows(2).all(|pair| reads.iter().flatten().all(|read| alike(registry, read, pair[0], pair[1])));
    Ok((tied[0], tied, Some(if same { "order" } else { "unsure" })))
}

/// The error for a file that may be of several families, where that makes a difference.
pub(crate) fn ambiguous(registry: &Registry, detection: &Detection, source: &Source, why: &str) -> Error {
    let names: Vec<String> = detection.candidates.iter().map(|&f| registry.families[f].label()).collect();
    Error::new(Code::AmbiguousFamily, format!("the file fits {} equally well{why}", names.join(" and ")))
        .at(source.path())
        .hint(format!("add `--family {}`", names.join("` or `--family ")))
}

/// Of families that every key fits by itself, those whose modules most Kronecker products fit as wholes.
fn closest(registry: &Registry, source: &Source, reads: &[Option<Read<'_>>], tied: Vec<usize>) -> Vec<usize> {
    let mut products: BTreeMap<&str, (usize, BTreeMap<Slot, &[usize]>)> = BTreeMap::new();
    for (at, (read, info)) in reads.iter().zip(source.tensors()).enumerate() {
        if let Some(read) = read.as_ref().filter(|r| r.suffix.slot.kind() == Some(Kind::Lokr)) {
            let module = products.entry(read.suffix.base).or_insert_with(|| (at, BTreeMap::new()));
            module.1.insert(read.suffix.slot, &info.shape);
        }
    }
    if tied.len() < 2 || products.is_empty() {
        return tied;
    }
    let fitting = |family: usize| {
        let whole = |(at, slots): &&(usize, BTreeMap<Slot, &[usize]>)| {
            let hit = reads[*at].as_ref().and_then(|read| hit_in(read, family));
            hit.is_some_and(|hit| kronecker(slots).is_some_and(|size| is_size(registry, hit, size)))
        };
        products.values().filter(whole).count()
    };
    best_of(tied, fitting)
}

/// Of families that every key fits, those whose kinds of blocks mostly end where the file's do.
fn ended(registry: &Registry, reads: &[Option<Read<'_>>], tied: Vec<usize>) -> Vec<usize> {
    if tied.len() < 2 {
        return tied;
    }
    let complete = |family: usize| {
        let mut last: BTreeMap<(usize, usize), (u32, u32)> = BTreeMap::new();
        for hit in reads.iter().flatten().filter_map(|read| hit_in(read, family)) {
            let row = &registry.families[family].components[hit.component].rows[hit.row];
            for (variable, below) in row.canonical[hit.part.unwrap_or(0)].bounds() {
                let number = hit.variables[variable];
                let entry = last.entry((hit.component, variable)).or_insert((0, below));
                *entry = (entry.0.max(number), entry.1.max(below));
            }
        }
        last.values().filter(|(number, below)| number + 1 == *below).count()
    };
    best_of(tied, complete)
}

/// Those of the highest count.
fn best_of(tied: Vec<usize>, count: impl Fn(usize) -> usize) -> Vec<usize> {
    let counts: Vec<usize> = tied.iter().map(|&f| count(f)).collect();
    let best = counts.iter().copied().max().unwrap_or(0);
    tied.into_iter().zip(counts).filter(|(_, count)| *count == best).map(|(f, _)| f).collect()
}

/// The size of the product of two factors, each whole or a product itself.
fn kronecker(slots: &BTreeMap<Slot, &[usize]>) -> Option<(usize, usize)> {
    let rows = |slot: Slot| slots.get(&slot)?.first().copied();
    let cols = |slot: Slot| Some(slots.get(&slot)?.iter().skip(1).product::<usize>());
    let factor = |whole: Slot, a: Slot, b: Slot| {
        let pair = || Some((rows(a)?, cols(b)?));
        rows(whole).zip(cols(whole)).or_else(pair)
    };
    let one = factor(Slot::LokrW1, Slot::LokrW1A, Slot::LokrW1B)?;
    let two = factor(Slot::LokrW2, Slot::LokrW2A, Slot::LokrW2B)?;
    Some((one.0 * two.0, one.1 * two.1))
}

fn is_size(registry: &Registry, hit: &Hit, (rows, cols): (usize, usize)) -> bool {
    let row = &registry.families[hit.family].components[hit.component].rows[hit.row];
    rows == hit.part.map_or_else(|| row.output(), |part| row.outputs[part]) && row.inputs.contains(&cols)
}

/// Whether a key is the same canonical module to both families.
fn alike(registry: &Registry, read: &Read<'_>, a: usize, b: usize) -> bool {
    let describe = |family: usize| {
        hit_in(read, family).map(|hit| {
            let component = &registry.families[family].components[hit.component];
            let row = &component.rows[hit.row];
            let parts = hit.part.map_or(0..row.canonical.len(), |part| part..part + 1);
            let names: Vec<String> = row.canonical[parts.clone()].iter().map(|t| t.render(&hit.variables)).collect();
            let swapped = row.op == Op::SwapHalves && hit.namespace != 0;
            (&component.name, names, &row.outputs[parts], swapped)
        })
    };
    describe(a) == describe(b)
}

/// What the metadata says of the model, in lower case.
fn said(source: &Source) -> Vec<String> {
    let keys = ["ss_base_model_version", "modelspec.architecture", "software", "base_model", "ot_branch"];
    keys.iter().filter_map(|k| source.metadata_value(k)).map(str::to_lowercase).collect()
}

/// The file's name in lower case, words joined by hyphens.
fn name_of(source: &Source) -> String {
    let stem = source.path().file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    stem.replace(['_', ' '], "-")
}

/// The one candidate of whose hints the texts hold one; of several sizes of one family the first.
fn hinted<'h>(
    texts: &[String],
    candidates: impl Iterator<Item = (usize, &'h [String])>,
    registry: &Registry,
) -> Option<usize> {
    let plain = |text: &str| text.replace('_', "-");
    let holds = |hint: &String| texts.iter().any(|t| t.contains(hint.as_str()) || plain(t).contains(&plain(hint)));
    let found: Vec<usize> = candidates.filter(|(_, hints)| hints.iter().any(holds)).map(|(f, _)| f).collect();
    let one = found.windows(2).all(|pair| registry.families[pair[0]].name == registry.families[pair[1]].name);
    found.first().copied().filter(|_| one)
}

/// Why no family was found, or not the one that was asked for: what fits better, a shape that fits nothing, or a key
/// that nothing knows.
fn no_family(
    registry: &Registry,
    source: &Source,
    reads: &[Option<Read<'_>>],
    given: &[usize],
    scores: &[usize],
) -> Error {
    let wanted = |f: usize| given.is_empty() || given.contains(&f);
    let total = source.tensors().len();
    let first = source.tensors().first().map_or("", |t| t.name.as_str());
    let best = scores.iter().copied().max().unwrap_or(0);
    if let (Some(&asked), 1..) = (given.first(), best) {
        let asked = &registry.families[asked].name;
        let own = given.iter().map(|&f| scores[f]).max().unwrap_or(0);
        let fitting: Vec<usize> = (0..scores.len()).filter(|&f| scores[f] == best && !given.contains(&f)).collect();
        let labels: Vec<String> = fitting.iter().map(|&f| registry.families[f].label()).collect();
        if !labels.is_empty() {
            let names = labels.join(", ");
            let message = format!("{asked} explains {own} of {total} keys; {names} explains {best}");
            let hint = format!("leave `--family` out, or add `--family {}`", labels[0]);
            return Error::new(Code::UnknownFamily, message).key(first).at(source.path()).hint(hint);
        }
    }
    let pairs = || reads.iter().zip(source.tensors()).filter_map(|(r, t)| Some((r.as_ref()?, t)));
    let known = |read: &Read<'_>| read.hits.iter().any(|hit| wanted(hit.family));
    let misfit = |(read, info): &(&Read<'_>, &TensorInfo)| {
        known(read) && !read.hits.iter().any(|hit| fits(registry, hit, read.suffix.slot, &info.shape))
    };
    if let Some((read, info)) = pairs().find(misfit) {
        let family = read.hits.iter().map(|hit| hit.family).find(|&f| wanted(f)).unwrap_or(read.hits[0].family);
        let (family, shape) = (registry.families[family].label(), &info.shape);
        let message = format!("`{}` has shape {shape:?}, which no module of that name has in {family}", info.name);
        return Error::new(Code::ShapeMismatch, message).key(&info.name).at(source.path());
    }
    let strange = reads.iter().zip(source.tensors()).find(|(read, _)| read.is_none()).map(|(_, info)| info);
    let key = strange.map_or(first, |t| t.name.as_str());
    let what = match given.first() {
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

/// How well a dialect explains a key: 0 not at all; 1 for the prefix, one more each for the names and the suffix that
/// the dialect itself writes.
pub(crate) fn level(dialect: &Dialect, hit: &Hit, slot: Slot, suffix: &str) -> usize {
    let places = dialect.places.iter().filter(|p| {
        (p.family, p.component) == (hit.family, hit.component)
            && (p.prefix == hit.prefix || p.also.contains(&hit.prefix))
    });
    let names = places.map(|p| usize::from(p.namespace == hit.namespace)).max();
    let spelled = dialect.suffix(slot, None).is_some_and(|s| s == suffix);
    names.map_or(0, |names| 1 + names + usize::from(spelled))
}

fn choose_dialect(
    registry: &Registry,
    source: &Source,
    meanings: &[Meaning<'_>],
) -> (Option<usize>, Vec<(usize, usize)>) {
    let texts = said(source);
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
