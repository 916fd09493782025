//! The overview: what can be read and written, and how everything is spelled.

use std::collections::BTreeMap;

use lorafmt_core::kind::{Kind, Slot};
use lorafmt_core::table::{AlphaPolicy, Dialect, Registry};

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
        ("Who loads what", loaders(registry)),
    ] {
        out += &format!("\n## {title}\n\n{text}");
    }
    out
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

fn link(dialect: &Dialect) -> String {
    format!("[`{0}`](dialects/{0}.md)", dialect.name)
}

fn support(registry: &Registry) -> String {
    let mut head = vec!["dialect".to_owned()];
    head.extend(registry.families.iter().map(|f| format!("[{}](families/{}.md)", f.title, f.name)));
    let row = |d: &Dialect| {
        let cells = (0..registry.families.len()).map(|f| ability(d, f).to_owned());
        std::iter::once(link(d)).chain(cells).collect()
    };
    table(&head, &registry.dialects.iter().map(row).collect::<Vec<_>>())
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
    let row = |d: &Dialect| vec![link(d), d.title.clone(), codes(&d.aliases), scale(d.alpha).to_owned()];
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
    for (f, family) in registry.families.iter().enumerate() {
        for (c, component) in family.components.iter().enumerate() {
            for dialect in &registry.dialects {
                for place in dialect.places.iter().filter(|p| (p.family, p.component) == (f, c)) {
                    rows.push(vec![
                        code(&family.name),
                        code(&component.name),
                        link(dialect),
                        code(&place.prefix),
                        codes(&place.also),
                        match (place.write && dialect.write, place.carried) {
                            (false, _) => "read only",
                            (true, true) => "carried: loaders of the dialect ignore it",
                            (true, false) => "",
                        }
                        .to_owned(),
                    ]);
                }
            }
        }
    }
    table(&["family", "component", "dialect", "prefix", "also read", "note"], &rows)
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

fn loaders(registry: &Registry) -> String {
    let mut rows = Vec::new();
    for dialect in &registry.dialects {
        for (topic, programs) in &dialect.loaders {
            for (program, says) in programs {
                rows.push(vec![link(dialect), code(topic), program.clone(), says.clone()]);
            }
        }
    }
    table(&["dialect", "family", "program", "loads it"], &rows)
}
