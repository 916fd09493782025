//! The dialects and families of the tables: a matrix for people, everything for machines.

use std::fmt::Write;

use lorafmt_core::table::{AlphaPolicy, Component, Dialect, Family, Registry, Row};
use serde_json::{Map, Value, json};

use super::View;
use super::text::{BOLD, DIM, GREEN, clean, paint};

fn support(dialect: &Dialect, family: usize) -> &'static str {
    match (dialect.reads(family), dialect.writes(family)) {
        (true, true) => "both",
        (true, false) => "read",
        (false, true) => "write",
        (false, false) => "-",
    }
}

/// Dialects down, families across.
pub(crate) fn matrix(registry: &Registry, view: &View) -> String {
    let name_width = registry.dialects.iter().map(|d| d.name.chars().count()).max().unwrap_or(0).max("dialect".len());
    let family_width = |f: &Family| f.name.chars().count().max("write".len());
    let mut out = paint(BOLD, format!("{:name_width$}", "dialect"));
    for family in &registry.families {
        let _ = write!(out, "  {}", paint(BOLD, format!("{:1$}", clean(&family.name), family_width(family))));
    }
    let _ = writeln!(out, "  {}", paint(BOLD, "also called"));
    for dialect in &registry.dialects {
        let _ = write!(out, "{:name_width$}", clean(&dialect.name));
        for (f, family) in registry.families.iter().enumerate() {
            let text = support(dialect, f);
            let style = if text == "-" { DIM } else { GREEN };
            let _ = write!(out, "  {}", paint(style, format!("{text:0$}", family_width(family))));
        }
        let line = format!("  {}", dialect.aliases.join(", "));
        let _ = writeln!(out, "{}", clean(line.trim_end()));
        if view.verbose {
            let _ = writeln!(out, "  {}", paint(DIM, clean(&dialect.title)));
        }
    }
    out
}

/// Everything in the tables.
pub(crate) fn machine(registry: &Registry) -> Value {
    json!({
        "schema": 1,
        "dialects": registry.dialects.iter().map(|d| dialect(registry, d)).collect::<Vec<_>>(),
        "families": registry.families.iter().map(family).collect::<Vec<_>>(),
    })
}

fn dialect(registry: &Registry, dialect: &Dialect) -> Value {
    let alpha = match dialect.alpha {
        AlphaPolicy::Tensor => "tensor",
        AlphaPolicy::Folded => "folded",
        AlphaPolicy::Config => "config",
    };
    let names =
        registry.families.iter().enumerate().map(|(f, family)| (family.name.clone(), support(dialect, f).into()));
    let families: Map<String, Value> = names.collect();
    let spelling: Map<String, Value> =
        dialect.spelling.iter().map(|(slot, text)| (slot.name().to_owned(), text.clone().into())).collect();
    let places = dialect.places.iter().map(|place| {
        let family = &registry.families[place.family];
        let component = &family.components[place.component];
        json!({
            "family": family.name,
            "component": component.name,
            "namespace": component.namespaces[place.namespace],
            "prefix": place.prefix,
            "also": place.also,
            "carried": place.carried,
            "write": place.write,
        })
    });
    json!({
        "name": dialect.name,
        "title": dialect.title,
        "aliases": dialect.aliases,
        "families": families,
        "order": dialect.order,
        "write": dialect.write,
        "alpha": alpha,
        "uniform": dialect.uniform,
        "column_magnitude": dialect.column_magnitude,
        "hints": dialect.hints,
        "reserved": dialect.reserved,
        "spelling": spelling,
        "places": places.collect::<Vec<_>>(),
    })
}

fn family(family: &Family) -> Value {
    let component = |c: &Component| {
        json!({
            "name": c.name,
            "namespaces": c.namespaces,
            "rows": c.rows.iter().map(|r| row(c, r)).collect::<Vec<_>>(),
        })
    };
    json!({
        "name": family.name,
        "variant": family.variant,
        "title": family.title,
        "hints": family.hints,
        "components": family.components.iter().map(component).collect::<Vec<_>>(),
    })
}

fn row(component: &Component, row: &Row) -> Value {
    let text = |t: &lorafmt_core::table::pattern::Template| t.text(&component.variables);
    let mut names = Map::new();
    let mut params = Map::new();
    for (n, namespace) in component.namespaces.iter().enumerate() {
        let name = match n {
            0 => Some(row.canonical.iter().map(text).collect::<Vec<_>>().into()),
            _ => row.names[n].as_ref().map(|t| Value::from(text(t))),
        };
        names.extend(name.map(|name| (namespace.clone(), name)));
        params.extend(row.params[n].as_ref().map(|param| (namespace.clone(), param.clone().into())));
    }
    json!({"op": row.op.name(), "names": names, "params": params, "in": row.inputs, "out": row.outputs, "kernel": row.kernel})
}
