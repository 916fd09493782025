//! What a file is, on one screen.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use lorafmt_core::inspect::{Inspection, Loader, Native, TELLING};
use lorafmt_core::report::Warning;
use lorafmt_core::strength::Strength;
use serde_json::Value;

use super::text::{
    BOLD, DIM, GREEN, RED, YELLOW, by_place, bytes, clean, clean_lines, number, paint, percent, plural, shortened,
};
use super::weights::table;
use super::{Answer, View};

/// Lines of a list that are shown without `-v`.
pub(super) const SHOWN: usize = 5;
/// Characters of a metadata value that are shown without `--meta`.
const VALUE: usize = 48;
impl Answer for Inspection {
    fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    fn human(&self, view: &View) -> String {
        let mut out = String::new();
        let dtypes = counts(&self.dtypes, ", ", |dtype, n| match self.dtypes.len() {
            1 => dtype.to_string(),
            _ => format!("{dtype} x{n}"),
        });
        let _ = writeln!(out, "{}   {}   {dtypes}", paint(BOLD, clean(&self.path)), bytes(self.bytes));
        row(&mut out, "dialect", &identity(self));
        row(&mut out, "modules", &modules(self));
        if let Some(native) = &self.native {
            quantized(native, &mut out, view);
        }
        loads_in(self, &mut out);
        metadata(self, &mut out, view);
        let unknown: Vec<String> = self.unknown.iter().map(|key| clean(key).into_owned()).collect();
        list(&mut out, "unknown", &unknown, view.verbose);
        let problem = |p: &Value, field: &str| clean_lines(p[field].as_str().unwrap_or_default());
        let problems = self
            .problems
            .iter()
            .map(|p| format!("{} {}", paint(RED, format!("[{}]", problem(p, "code"))), problem(p, "message")));
        list(&mut out, "problems", &problems.collect::<Vec<_>>(), view.verbose);
        if let Some(weights) = &self.weights {
            table(weights, &mut out, view);
        }
        let warnings = self
            .warnings
            .iter()
            .map(|w| format!("{} {}", paint(YELLOW, format!("[{}]", clean(&w.code))), clean(&w.detail)));
        let mut warnings: Vec<String> = warnings.collect();
        if warnings.is_empty() {
            warnings.push("none".to_owned());
        }
        list(&mut out, "warnings", &warnings, view.verbose);
        out
    }

    fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    fn says_warnings(&self) -> bool {
        true
    }
}

fn identity(file: &Inspection) -> String {
    let spelled = match file.dialects.len() {
        0 | 1 => file.dialect.clone(),
        _ => {
            let parts: Vec<String> = file.dialects.iter().map(|s| format!("{} x{}", s.dialect, s.keys)).collect();
            format!("{}: {}", file.dialect, parts.join(", "))
        }
    };
    let others: Vec<&str> = file.families.iter().map(String::as_str).filter(|f| *f != file.family).collect();
    let or = if others.is_empty() { String::new() } else { format!(" (or {})", others.join(", ")) };
    let coverage = percent(file.coverage);
    let family = file.variant.as_ref().map_or(file.family.clone(), |size| format!("{} {size}", file.family));
    let (dim, family, kind) = (|text| paint(DIM, text), paint(BOLD, family), &file.kind);
    let keys = plural(file.tensors, "key", "keys");
    let spelled = paint(BOLD, spelled);
    format!("{spelled} ({coverage} of {keys})   {} {family}{or}   {} {kind}", dim("family"), dim("kind"))
}

fn modules(file: &Inspection) -> String {
    let modules = counts(&file.modules, ", ", |component, n| format!("{n} {}", clean(component)));
    let mut parts = vec![if modules.is_empty() { "none".to_owned() } else { modules }];
    if !file.ranks.is_empty() {
        let spread = |name: &str, one: &str, many: String, distinct: usize| match distinct {
            1 => format!("{name} {one}"),
            _ => format!("{name}s {many}"),
        };
        let ranks = counts(&file.ranks, ", ", |rank, n| format!("{rank} x{n}"));
        let rank = file.rank.map(|r| r.to_string()).unwrap_or_default();
        parts.push(spread("rank", &rank, ranks, file.ranks.len()));
        let scales = counts(&file.scales, ", ", |scale, n| format!("{scale} x{n}"));
        let scale = file.scales.keys().next().cloned().unwrap_or_default();
        parts.push(format!("{} ({})", spread("scale", &scale, scales, file.scales.len()), alpha_source(file)));
    }
    if !file.widened.is_empty() {
        parts.push(counts(&file.widened, ", ", |module, width| format!("{} takes {width} inputs", clean(module))));
    }
    parts.join("   ")
}

/// The base of a native file, and the adapters behind its branches.
fn quantized(native: &Native, out: &mut String, view: &View) {
    let ranks = |map: &BTreeMap<usize, usize>| match map.len() {
        1 => counts(map, "", |rank, _| rank.to_string()),
        _ => counts(map, ", ", |rank, n| format!("{rank} x{n}")),
    };
    let mut parts = vec![match &native.base {
        Some(name) => paint(BOLD, clean(name)),
        None => "not named: the file has no metadata about it".to_owned(),
    }];
    parts.extend(native.precision.as_deref().map(|p| clean(p).into_owned()));
    parts.extend(native.fingerprint.as_deref().map(|f| format!("{} {}", paint(DIM, "fingerprint"), clean(f))));
    if native.needs_base {
        parts.push(paint(YELLOW, "is read only with `--base`"));
    }
    row(out, "base", &parts.join("   "));
    let own = match native.base_ranks.is_empty() {
        true => String::new(),
        false => format!("   of the base {}", ranks(&native.base_ranks)),
    };
    let layout = native.layout.as_deref().map(|l| format!("   {} {}", paint(DIM, "layout"), clean(l)));
    row(out, "ranks", &format!("in all {}{own}{}", ranks(&native.ranks), layout.unwrap_or_default()));
    let mut lines = Vec::new();
    for (i, lora) in native.adapters.iter().enumerate() {
        let name = paint(BOLD, clean(&lora.name));
        let strength = format!("{} {}", paint(DIM, "strength"), strength(&lora.strength));
        let rank = match lora.ranks.is_empty() {
            true => "in none of the layers".to_owned(),
            false => format!("{} {}", paint(DIM, "rank"), ranks(&lora.ranks)),
        };
        let hash = lora.hash.as_deref().filter(|_| view.verbose).map(|h| format!("   {}", clean(h)));
        let hash = hash.unwrap_or_default();
        lines.push(format!("{} {name}   {strength}   {rank}{hash}", i + 1));
    }
    list(out, "adapters", &lines, view.verbose);
}

/// A strength as metadata tells it: a number, numbers by place, or a list of such that are multiplied.
fn strength(told: &Value) -> String {
    match told {
        Value::Array(factors) => factors.iter().map(strength).collect::<Vec<_>>().join(" times "),
        told => match Strength::from_json(told) {
            Ok(s) => format!("{}{}", number(s.all), by_place(&s)),
            Err(_) => clean(&told.to_string()).into_owned(),
        },
    }
}

fn loads_in(file: &Inspection, out: &mut String) {
    if !file.problems.is_empty() {
        return row(out, "loads in", "nothing that is known: see the problems");
    }
    // Of what is not known, the names are enough, unless there is a form that is known to load.
    let silent = |l: &&Loader| l.loads == Loader::UNKNOWN && l.convert_to.is_none();
    let (unknown, told): (Vec<&Loader>, Vec<&Loader>) = file.loaders.iter().partition(silent);
    let width = told.iter().map(|l| l.name.chars().count()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for loader in told {
        let style = match loader.loads.as_str() {
            "yes" => GREEN,
            Loader::UNKNOWN => DIM,
            _ => YELLOW,
        };
        lines.push(format!("{:width$}  {}", clean(&loader.name), paint(style, clean(&loader.loads))));
        lines.extend(file.fix(loader).map(|c| format!("{:width$}  {} {}", "", paint(DIM, "fix:"), clean(&c))));
    }
    if !unknown.is_empty() {
        let names: Vec<_> = unknown.iter().map(|l| clean(&l.name)).collect();
        lines.push(paint(DIM, format!("not known of {}", names.join(", "))));
    }
    list(out, "loads in", &lines, true);
}

fn metadata(file: &Inspection, out: &mut String, view: &View) {
    if view.meta {
        let line = |(key, value): (&String, &String)| format!("{}={}", clean(key), clean(value));
        return list(out, "metadata", &file.metadata.iter().map(line).collect::<Vec<_>>(), true);
    }
    let telling = TELLING.iter().filter_map(|key| file.metadata.get_key_value(*key)).take(SHOWN);
    let shown: Vec<String> = telling.map(|(k, v)| format!("{}={}", clean(k), shortened(&clean(v), VALUE))).collect();
    let rest = file.metadata.len() - shown.len();
    let more = match (shown.len(), rest) {
        (0, 0) => return,
        (_, 0) => String::new(),
        (0, n) => paint(DIM, format!("{} (--meta shows them)", plural(n, "entry", "entries"))),
        (_, n) => paint(DIM, format!("   and {n} more (--meta)")),
    };
    row(out, "metadata", &format!("{}{more}", shown.join("   ")));
}

/// Where the scales come from.
fn alpha_source(file: &Inspection) -> String {
    let a = &file.alpha;
    let places = [
        (a.tensor, "alpha in tensors"),
        (a.metadata, "alpha in the metadata"),
        (a.config, "alpha in adapter_config.json"),
        (a.rank, "no alpha"),
    ];
    let found: Vec<(usize, &str)> = places.into_iter().filter(|(n, _)| *n > 0).collect();
    match found.as_slice() {
        [(_, text)] => (*text).to_owned(),
        several => several.iter().map(|(n, text)| format!("{text} x{n}")).collect::<Vec<_>>().join(", "),
    }
}

fn counts<K: Display, V: Display>(map: &BTreeMap<K, V>, between: &str, text: impl Fn(&K, &V) -> String) -> String {
    map.iter().map(|(k, v)| text(k, v)).collect::<Vec<_>>().join(between)
}

pub(super) fn row(out: &mut String, label: &str, text: &str) {
    let label = if label.is_empty() { " ".repeat(10) } else { paint(DIM, format!("{label:10}")) };
    let _ = writeln!(out, "{label}{text}");
}

pub(super) fn list(out: &mut String, label: &str, lines: &[String], all: bool) {
    let shown = if all { lines.len() } else { SHOWN };
    for (i, line) in lines.iter().take(shown).enumerate() {
        row(out, if i == 0 { label } else { "" }, line);
    }
    if lines.len() > shown {
        row(out, "", &format!("and {} more (-v shows all)", lines.len() - shown));
    }
}
