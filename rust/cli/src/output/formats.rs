//! The dialects and families of the tables: a matrix for people, everything for machines.

use std::fmt::Write;

use lorafmt_core::table::{AlphaPolicy, Component, Dialect, Family, Program, Registry, Row, Rule};
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

/// Families down, dialects across; then the sizes in which families come, and what dialects are also called.
pub(crate) fn matrix(registry: &Registry, view: &View) -> String {
    let names = registry.family_names();
    let first = widest(&names, "family");
    let last = registry.dialects.len().saturating_sub(1);
    // Nothing fills the last column.
    let width = |d: usize| if d == last { 0 } else { registry.dialects[d].name.chars().count().max("write".len()) };
    let mut out = paint(BOLD, format!("{:first$}", "family"));
    for (d, dialect) in registry.dialects.iter().enumerate() {
        let _ = write!(out, " {}", paint(BOLD, format!("{:1$}", clean(&dialect.name), width(d))));
    }
    for name in &names {
        let Some(family) = registry.families.iter().position(|f| f.name == *name) else { continue };
        let _ = write!(out, "\n{:first$}", clean(name));
        for (d, dialect) in registry.dialects.iter().enumerate() {
            let text = support(dialect, family);
            let style = if text == "-" { DIM } else { GREEN };
            let _ = write!(out, " {}", paint(style, format!("{text:0$}", width(d))));
        }
    }
    out += "\n";
    let sizes = names.iter().map(|name| {
        let all = registry.families.iter().filter(|f| f.name == *name);
        (*name, all.filter_map(|f| f.variant.as_deref()).collect::<Vec<_>>())
    });
    let sizes: Vec<(&str, Vec<&str>)> = sizes.filter(|(_, sizes)| !sizes.is_empty()).collect();
    list(&mut out, ("family", "sizes"), sizes.iter().map(|(name, sizes)| (*name, sizes.join(", "), "")));
    let about = |d: &'_ Dialect| (d.aliases.join(", "), if view.verbose { d.title.clone() } else { String::new() });
    let dialects: Vec<(&str, (String, String))> =
        registry.dialects.iter().map(|d| (d.name.as_str(), about(d))).collect();
    let dialects = dialects.iter().map(|(name, (aliases, title))| (*name, aliases.clone(), title.as_str()));
    list(&mut out, ("dialect", "also called"), dialects);
    out
}

fn widest(names: &[&str], head: &str) -> usize {
    names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(head.len())
}

/// Names with something about each, and a line below where there is more.
fn list<'t>(out: &mut String, head: (&str, &str), lines: impl Iterator<Item = (&'t str, String, &'t str)>) {
    let lines: Vec<_> = lines.collect();
    let width = widest(&lines.iter().map(|(name, ..)| *name).collect::<Vec<_>>(), head.0);
    let _ = writeln!(out, "\n{}  {}", paint(BOLD, format!("{:width$}", head.0)), paint(BOLD, head.1));
    for (name, text, more) in lines {
        let line = format!("{name:width$}  {text}");
        let _ = writeln!(out, "{}", clean(line.trim_end()));
        if !more.is_empty() {
            let _ = writeln!(out, "  {}", paint(DIM, clean(more)));
        }
    }
}

/// Everything in the tables.
pub(crate) fn machine(registry: &Registry) -> Value {
    json!({
        "schema": 1,
        "dialects": registry.dialects.iter().map(|d| dialect(registry, d)).collect::<Vec<_>>(),
        "families": registry.families.iter().map(family).collect::<Vec<_>>(),
        "programs": registry.programs().iter().map(program).collect::<Vec<_>>(),
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
    let places = dialect.places.all().map(|place| {
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

fn program(program: &Program) -> Value {
    let rule = |r: &Rule| {
        json!({
            "dialects": r.dialects,
            "families": r.families,
            "kinds": r.kinds,
            "answer": r.answer.name(),
            "note": r.note,
            "source": r.source,
        })
    };
    json!({
        "name": program.name,
        "version": program.version,
        "rules": program.rules.iter().map(rule).collect::<Vec<_>>(),
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
        "order": family.order,
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
