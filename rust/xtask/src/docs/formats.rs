//! The overview: what can be read and written, and how everything is spelled.

use std::collections::BTreeMap;

use lorafmt_core::kind::{Kind, Slot};
use lorafmt_core::table::{AlphaPolicy, Dialect, Registry};

use super::places::{families, groups, link, note};
use crate::markdown::{GENERATED, code, codes, table};

pub(super) fn page(registry: &Registry) -> String {
    let mut out = format!("{GENERATED}# Formats\n\n");
    out += "What lorafmt reads and writes, generated from its tables. A file may mix dialects; every key is read by itself.\n";
    for (title, text) in [
        ("Support", support(registry)),
        ("Dialects", dialects(registry)),
        ("Kinds of adapter", kinds(registry)),
        ("Prefixes", prefixes(registry)),
        ("Suffixes", suffixes(registry)),
    ] {
        out += &format!("\n## {title}\n\n{text}");
    }
    out + "\n## Who loads what\n\nSee [the table of programs](loaders.md).\n"
}

/// Read, write or both, for a dialect and a family.
pub(super) fn ability(dialect: &Dialect, family: usize) -> &'static str {
    match (dialect.reads(family), dialect.writes(family)) {
        (true, true) => "both",
        (true, false) => "read",
        (false, true) => "write",
        (false, false) => "-",
    }
}

/// One line a family, with the sizes in which it comes.
fn support(registry: &Registry) -> String {
    let mut head = vec!["family".to_owned(), "sizes".to_owned()];
    head.extend(registry.dialects.iter().map(|d| link("", d)));
    let row = |f: usize| {
        let family = &registry.families[f];
        let sizes = registry.families.iter().filter(|g| g.name == family.name).filter_map(|g| g.variant.as_deref());
        let cells = registry.dialects.iter().map(|d| ability(d, f).to_owned());
        let name = format!("[{}](families/{1}.md) (`{1}`)", family.title, family.name);
        [name, sizes.collect::<Vec<_>>().join(", ")].into_iter().chain(cells).collect::<Vec<String>>()
    };
    table(&head, &families(registry).into_iter().map(row).collect::<Vec<_>>())
}

/// What a dialect does with the scale, in words.
pub(super) fn scale(policy: AlphaPolicy) -> &'static str {
    match policy {
        AlphaPolicy::Tensor => "alpha tensor beside the factors",
        AlphaPolicy::Folded => "folded into the factors",
        AlphaPolicy::Config => "`adapter_config.json`; folded where there is only one file",
    }
}

fn dialects(registry: &Registry) -> String {
    let row = |d: &Dialect| vec![link("", d), d.title.clone(), codes(&d.aliases), scale(d.alpha).to_owned()];
    table(&["dialect", "what it is", "also called", "scale"], &registry.dialects.iter().map(row).collect::<Vec<_>>())
}

/// Whether a dialect can spell a kind.
pub(super) fn holds(dialect: &Dialect, kind: Kind) -> bool {
    let spells = |slot: &Slot| dialect.spelling.contains_key(slot);
    match Slot::required(kind) {
        [] if kind == Kind::Bias => spells(&Slot::DiffB) || spells(&Slot::Bias),
        [] => Slot::ALL.iter().any(|s| s.kind() == Some(kind) && spells(s)),
        groups => groups.iter().all(|choices| choices.iter().any(|all| all.iter().all(spells))),
    }
}

fn kinds(registry: &Registry) -> String {
    let mut head = vec!["kind".to_owned()];
    head.extend(registry.dialects.iter().map(|d| code(&d.name)));
    let row = |name: String, holds: &dyn Fn(&Dialect) -> bool| -> Vec<String> {
        let cells = registry.dialects.iter().map(|d| if holds(d) { "yes" } else { "-" }.to_owned());
        std::iter::once(name).chain(cells).collect()
    };
    let extra = |name: &str, slot: Slot| row(name.to_owned(), &|d| d.spelling.contains_key(&slot));
    let mut all: Vec<Kind> = Vec::new();
    for kind in Slot::ALL.iter().filter_map(|s| s.kind()).chain([Kind::Bias]) {
        if !all.contains(&kind) {
            all.push(kind);
        }
    }
    let mut rows: Vec<Vec<String>> = all.iter().map(|&k| row(code(k.name()), &|d| holds(d, k))).collect();
    // Those that are LoRA with one more tensor, after LoRA itself.
    rows.insert(1, extra("`lora` with a Tucker core", Slot::Mid));
    rows.insert(2, extra("`dora` over outputs", Slot::Magnitude));
    rows.insert(3, extra("`dora` over inputs", Slot::MagnitudeIn));
    let text = "What a file of the dialect has names for. A module of another kind is an error, unless `--lossy allow` leaves it out.\n\n";
    text.to_owned() + &table(&head, &rows)
}

fn prefixes(registry: &Registry) -> String {
    let mut rows = Vec::new();
    let all = families(registry).len();
    for dialect in &registry.dialects {
        for group in groups(registry, dialect) {
            let named = group.families(registry);
            let place = group.first();
            rows.push(vec![
                link("", dialect),
                code(&place.prefix),
                codes(&place.also),
                code(group.namespace),
                codes(group.components(registry)),
                if named.len() == all { "all".to_owned() } else { codes(named) },
                note(dialect, place).to_owned(),
            ]);
        }
    }
    table(&["dialect", "prefix", "also read", "names", "components", "families", "note"], &rows)
}

fn suffixes(registry: &Registry) -> String {
    let spellings: BTreeMap<String, Vec<String>> =
        toml::from_str(include_str!("../../../core/data/slots.toml")).unwrap_or_default();
    let row = |slot: &Slot| {
        let mut written: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for dialect in registry.dialects.iter().filter(|d| d.write) {
            if let Some(text) = dialect.spelling.get(slot) {
                written.entry(text).or_default().push(&dialect.name);
            }
        }
        let written: Vec<String> =
            written.iter().map(|(text, dialects)| format!("{} ({})", code(text), dialects.join(", "))).collect();
        let read =
            spellings.get(slot.name()).map(|all| codes(all.iter().filter(|s| !s.is_empty()))).unwrap_or_default();
        vec![code(slot.name()), read, written.join("<br>")]
    };
    let text = "`*` stands for the name of a PEFT adapter. `{param}` is the parameter's name (`weight`, `scale`); `{.param}` is it with a dot, \
                or nothing for a weight.\n\n";
    text.to_owned() + &table(&["slot", "read", "written"], &Slot::ALL.iter().map(row).collect::<Vec<_>>())
}
