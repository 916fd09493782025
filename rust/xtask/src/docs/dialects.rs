//! One page for a dialect, with real keys.

use std::collections::BTreeMap;

use lorafmt_core::kind::Slot;
use lorafmt_core::table::{Component, Dialect, Op, Place, Registry, Row};

use super::formats::{ability, scale};
use super::names;
use crate::markdown::{GENERATED, code, codes, lines, table};

pub(super) fn page(registry: &Registry, index: usize) -> String {
    let dialect = &registry.dialects[index];
    let mut out = format!("{GENERATED}# `{}`\n\n{}.\n\n", dialect.name, dialect.title);
    let abilities = registry.families.iter().enumerate();
    let abilities: Vec<String> = abilities
        .filter(|(f, _)| dialect.reads(*f))
        .map(|(f, family)| format!("[{}](../families/{}.md): {}", family.title, family.name, ability(dialect, f)))
        .collect();
    out += &format!("- Support: {}\n", abilities.join("; "));
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
    out += &format!("\n## Suffixes\n\n{}", suffixes(dialect));
    if !dialect.loaders.is_empty() {
        out += &format!("\n## Who loads it\n\n{}", loaders(dialect));
    }
    out += "\n## Keys\n\nThe last column is the same module (of a fused one, its first part) under\n\
            another of its names; lorafmt reads every name behind every prefix.\n";
    for place in &dialect.places {
        out += &examples(registry, dialect, place);
    }
    out
}

fn suffixes(dialect: &Dialect) -> String {
    let row = |(slot, text): (&Slot, &String)| vec![code(slot.name()), code(text)];
    table(&["slot", "suffix"], &dialect.spelling.iter().map(row).collect::<Vec<_>>())
}

fn loaders(dialect: &Dialect) -> String {
    let mut rows = Vec::new();
    for (family, programs) in &dialect.loaders {
        for (program, says) in programs {
            rows.push(vec![code(family), program.clone(), says.clone()]);
        }
    }
    table(&["family", "program", "loads it"], &rows)
}

fn examples(registry: &Registry, dialect: &Dialect, place: &Place) -> String {
    let family = &registry.families[place.family];
    let component = &family.components[place.component];
    let mut out = format!("\n### {}, {}\n\n", family.title, component.name);
    let mut facts = vec![format!("prefix {}", code(&place.prefix))];
    if !place.also.is_empty() {
        facts.push(format!("also read behind {}", codes(&place.also)));
    }
    facts.push(format!("names {}", code(&component.namespaces[place.namespace])));
    if !(place.write && dialect.write) {
        facts.push("read only".to_owned());
    } else if place.carried {
        facts.push("carried: loaders of the dialect ignore the component".to_owned());
    }
    out += &format!("{}.\n\n", capitalised(&facts.join("; ")));
    let rows: Vec<Vec<String>> =
        chosen(component, place).into_iter().filter_map(|row| example(dialect, component, place, row)).collect();
    out + &table(&["operation", "key", "another name"], &rows)
}

fn capitalised(text: &str) -> String {
    let (head, tail) = text.split_at(text.len().min(1));
    head.to_uppercase() + tail
}

/// At most two rows of each operation that have a name here, one within blocks and one outside if there are both.
fn chosen<'a>(component: &'a Component, place: &Place) -> Vec<&'a Row> {
    let mut seen: BTreeMap<(&str, bool), usize> = BTreeMap::new();
    let named = component.rows.iter().filter(|row| !names(row, place.namespace).is_empty());
    named
        .filter(|row| {
            let inside = !row.canonical[0].bounds().is_empty();
            let count = seen.entry((row.op.name(), inside)).or_default();
            *count += 1;
            *count <= 2
        })
        .collect()
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
