//! One page for a family, in all its sizes: its modules under every name, with shapes, and what becomes of it where.

use std::collections::{BTreeMap, BTreeSet};

use lorafmt_core::table::{Dialect, Family, Op, Registry};

use super::places::{self, note};
use super::{components, loaders};
use crate::markdown::{GENERATED, code, codes, table};
use crate::tables::Tables;

pub(super) fn page(registry: &Registry, tables: &Tables, name: &str) -> String {
    let sizes: Vec<usize> = (0..registry.families.len()).filter(|&f| registry.families[f].name == name).collect();
    let family = &registry.families[sizes[0]];
    let mut out = format!("{GENERATED}# {} (`{name}`)\n\n{}\n\n", family.title, tables.family(name).about);
    let with = |wanted: fn(&Dialect, usize) -> bool| {
        let dialects = registry.dialects.iter().filter(|d| wanted(d, sizes[0]));
        dialects.map(|d| format!("[`{0}`](../dialects/{0}.md)", d.name)).collect::<Vec<_>>().join(", ")
    };
    out += &format!("- Read from: {}\n", with(|d, f| d.reads(f)));
    out += &format!("- Written as: {}\n", with(|d, f| d.writes(f)));
    out += &format!(
        "- Metadata and file names that speak for it where keys fit several families: {}\n",
        codes(&family.hints)
    );
    let parts = family.components.iter().map(|c| format!("[`{0}`](#{0})", c.name));
    out += &format!("- Components: {}\n", parts.collect::<Vec<_>>().join(", "));
    out += &format!("\n## Sizes\n\n{}", numbers(registry, tables, &sizes));
    out += &format!("\n## Prefixes\n\n{}", prefixes(registry, sizes[0]));
    out += &format!("\n## Who loads it\n\n{}", loaders::of_family(registry, sizes[0]));
    out += "\n## Modules\n\n";
    out += LEGEND;
    let mut shown = BTreeMap::new();
    for (c, component) in family.components.iter().enumerate() {
        out += &format!("\n### {}\n\n{}.\n\n", component.name, counts(registry, &sizes, c));
        let Some(shared) = &component.shared else {
            out += &components::rows(&tables.part(name, c));
            continue;
        };
        let first = shown.insert(shared, &component.name);
        out += &match (first, tables.users(shared).len()) {
            (Some(first), _) => format!("The same rows as [`{first}`](#{first}).\n"),
            (None, 1) => components::rows(&tables.part(name, c)),
            (None, _) => format!("The rows of [`{shared}`](../components.md#{}).\n", shared.replace('.', "")),
        };
    }
    out
}

pub(super) const LEGEND: &str = "\
    `fuse` stacks the modules of the first column by output rows; `swap_halves` exchanges the two halves of the output\n\
    rows; `only` marks parameters that are replaced or shifted and never get factors. The first column has the canonical\n\
    names. `{a,b}` stands for one module each, in the same order in every column; `{name}` is a block number, from 0, or\n\
    an entry of a list below; named widths have their numbers above.\n";

/// Blocks, widths and modules of every size.
fn numbers(registry: &Registry, tables: &Tables, sizes: &[usize]) -> String {
    let source = tables.family(&registry.families[sizes[0]].name);
    let of = |f: usize, field| source.numbers(field, registry.families[f].variant.as_deref());
    let named: Vec<(&str, &str)> = ["blocks", "sizes"]
        .into_iter()
        .flat_map(|field| of(sizes[0], field).into_keys().map(move |name| (field, name)))
        .collect();
    let mut head = vec!["`--family`".to_owned()];
    head.extend(named.iter().map(|(field, name)| match *field {
        "blocks" => format!("blocks `{{{name}}}`"),
        _ => format!("`{name}`"),
    }));
    head.push("layers".to_owned());
    let row = |&f: &usize| {
        let mut cells = vec![code(&registry.families[f].label())];
        cells.extend(named.iter().map(|(field, name)| of(f, field)[name].to_string()));
        let layers: usize = (0..registry.families[f].components.len()).map(|c| layers(&registry.families[f], c)).sum();
        cells.push(layers.to_string());
        cells
    };
    let rows: Vec<Vec<String>> = sizes.iter().map(row).collect();
    let several = match sizes.len() {
        1 => String::new(),
        _ => format!("\n`--family {}` means whichever of them the shapes fit.\n", registry.families[sizes[0]].name),
    };
    table(&head, &rows) + &several
}

/// How many layers a component has in each size.
fn counts(registry: &Registry, sizes: &[usize], component: usize) -> String {
    let mut counts: Vec<(usize, Vec<String>)> = Vec::new();
    for &f in sizes {
        let count = layers(&registry.families[f], component);
        let size = registry.families[f].variant.clone().unwrap_or_default();
        match counts.iter_mut().find(|(n, _)| *n == count) {
            Some((_, all)) => all.push(size),
            None => counts.push((count, vec![size])),
        }
    }
    match counts.as_slice() {
        [(count, _)] => format!("{count} layers"),
        several => several.iter().map(|(n, s)| format!("{}: {n} layers", s.join(", "))).collect::<Vec<_>>().join("; "),
    }
}

/// Distinct canonical layers; parameters under `only` are none.
fn layers(family: &Family, component: usize) -> usize {
    let component = &family.components[component];
    let templates = component.rows.iter().filter(|r| r.op != Op::Only).flat_map(|r| &r.canonical);
    let paths = templates.flat_map(|t| component.instances_of(t).into_iter().map(|v| t.render(&v)));
    paths.collect::<BTreeSet<_>>().len()
}

fn prefixes(registry: &Registry, family: usize) -> String {
    let mut rows = Vec::new();
    for (c, component) in registry.families[family].components.iter().enumerate() {
        for dialect in &registry.dialects {
            for place in dialect.places.of(family).iter().filter(|p| p.component == c) {
                rows.push(vec![
                    code(&component.name),
                    places::link("../", dialect),
                    code(&place.prefix),
                    codes(&place.also),
                    code(&component.namespaces[place.namespace]),
                    note(dialect, place).to_owned(),
                ]);
            }
        }
    }
    let text = "Every name below is read behind every prefix; these are written.\n\n";
    text.to_owned() + &table(&["component", "dialect", "prefix", "also read", "names", "note"], &rows)
}
