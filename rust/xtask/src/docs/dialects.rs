//! One page for a dialect, with real keys.

use std::collections::BTreeSet;

use lorafmt_core::kind::Slot;
use lorafmt_core::table::{Component, Dialect, Op, Place, Registry, Row};

use super::formats::scale;
use super::names;
use super::places::{self, Group, groups};
use crate::markdown::{GENERATED, code, codes, lines, table};

/// Families of which keys are shown, for each prefix.
const FAMILIES: usize = 2;

pub(super) fn page(registry: &Registry, index: usize) -> String {
    let dialect = &registry.dialects[index];
    let mut out = format!("{GENERATED}# `{}`\n\n{}.\n\n", dialect.name, dialect.title);
    let with = |wanted: &dyn Fn(usize) -> bool| {
        let all = places::families(registry).into_iter().filter(|&f| wanted(f));
        let all: Vec<String> = all.map(|f| format!("[`{0}`](../families/{0}.md)", registry.families[f].name)).collect();
        if all.is_empty() { "(nothing)".to_owned() } else { all.join(", ") }
    };
    out += &format!("- Read and written: {}\n", with(&|f| dialect.writes(f)));
    out += &format!("- Only read: {}\n", with(&|f| dialect.reads(f) && !dialect.writes(f)));
    out += &format!("- Also called: {}\n", codes(&dialect.aliases));
    out += &format!("- Scale: {}\n", scale(dialect.alpha));
    if dialect.uniform {
        out += "- If one module of a component has a bias or a magnitude, all must have one.\n";
    }
    if dialect.column_magnitude {
        out += "- A DoRA magnitude over the outputs has the shape `[out, 1]`.\n";
    }
    if !dialect.reserved.is_empty() {
        out += &format!(
            "- Any of {} anywhere in a key makes its loaders take the whole file for another dialect.\n",
            codes(&dialect.reserved)
        );
    }
    out += "- Who loads it: [the table of programs](../loaders.md), and the page of each family\n";
    out += &format!("\n## Suffixes\n\n{}", suffixes(dialect));
    out += "\n## Keys\n\nReal keys of a few families for each prefix. The last column is the same module (of a fused one, its first part)\n\
            under another of its names; lorafmt reads every name behind every prefix.\n";
    for group in groups(registry, dialect) {
        out += &examples(registry, &group);
    }
    out
}

fn suffixes(dialect: &Dialect) -> String {
    let row = |(slot, text): (&Slot, &String)| vec![code(slot.name()), code(text)];
    table(&["slot", "suffix"], &dialect.spelling.iter().map(row).collect::<Vec<_>>())
}

fn examples(registry: &Registry, group: &Group<'_>) -> String {
    let place = group.first();
    let mut out = format!("\n### {}, names `{}`\n\n", code(&place.prefix), group.namespace);
    out += &format!("For {}", codes(group.components(registry)));
    out += &format!(" of {}.", codes(group.families(registry)));
    if !place.also.is_empty() {
        out += &format!(" Also read behind {}.", codes(&place.also));
    }
    let note = places::note(group.dialect, place);
    if !note.is_empty() {
        out += &format!(" {}.", capitalised(note));
    }
    let mut rows = Vec::new();
    let mut shown: Vec<&str> = Vec::new();
    for place in &group.places {
        let family = &registry.families[place.family];
        if shown.len() == FAMILIES || shown.contains(&family.name.as_str()) {
            continue;
        }
        shown.push(&family.name);
        let component = &family.components[place.component];
        for row in chosen(component, place) {
            rows.extend(example(group.dialect, component, place, row).map(|mut cells| {
                cells.insert(0, code(&family.name));
                cells
            }));
        }
    }
    out + "\n\n" + &table(&["family", "operation", "key", "another name"], &rows)
}

fn capitalised(text: &str) -> String {
    let (head, tail) = text.split_at(text.len().min(1));
    head.to_uppercase() + tail
}

/// One row of each operation that has a name here, within blocks and outside if there are both.
fn chosen<'a>(component: &'a Component, place: &Place) -> Vec<&'a Row> {
    let mut seen: BTreeSet<(&str, bool)> = BTreeSet::new();
    let named = component.rows.iter().filter(|row| !names(row, place.namespace).is_empty());
    named.filter(|row| seen.insert((row.op.name(), !row.canonical[0].bounds().is_empty()))).collect()
}

fn example(dialect: &Dialect, component: &Component, place: &Place, row: &Row) -> Option<Vec<String>> {
    let numbers = vec![0; component.variables.len()];
    let slots: &[Slot] = match row.op {
        Op::Only => &[Slot::Set, Slot::Diff, Slot::WNorm],
        _ => &[Slot::Down, Slot::Up, Slot::Alpha],
    };
    let keys = |namespace: usize| -> Vec<String> {
        let suffixes: Vec<String> =
            slots.iter().filter_map(|s| dialect.suffix(*s, row.params[namespace].as_deref())).collect();
        let Some(path) = names(row, namespace).first().map(|t| t.render(&numbers)) else { return Vec::new() };
        let path = if place.prefix.ends_with('_') { path.replace('.', "_") } else { path };
        suffixes.iter().map(|suffix| format!("{}{path}{suffix}", place.prefix)).collect()
    };
    let own = keys(place.namespace);
    let other = (0..component.namespaces.len()).filter(|n| *n != place.namespace).map(keys).find(|k| !k.is_empty());
    (!own.is_empty()).then(|| vec![row.op.name().to_owned(), lines(own), other.map_or_else(|| "-".to_owned(), lines)])
}
