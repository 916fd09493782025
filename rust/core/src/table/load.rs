//! Reading and checking tables.

use std::collections::{BTreeMap, BTreeSet};

use super::pattern::Template;
use super::{Component, Dialect, Family, Op, Registry, family, loaders, lookup, native, place, raw};
use crate::error::{Code, Error, Result};
use crate::kind::Slot;

const LOADERS: &str = include_str!("../../data/loaders.toml");
const SLOTS: &str = include_str!("../../data/slots.toml");

include!(concat!(env!("OUT_DIR"), "/tables.rs"));

pub(super) fn invalid(file: &str, message: impl std::fmt::Display) -> Error {
    Error::new(Code::InvalidTable, format!("table `{file}`: {message}"))
}

fn parse<T: serde::de::DeserializeOwned>(file: &str, text: &str) -> Result<T> {
    toml::from_str(text).map_err(|e| invalid(file, e.to_string().trim_end()))
}

/// Compiles the built-in tables together with `extra` ones.
pub(super) fn registry(extra: &[String]) -> Result<Registry> {
    let mut shared = BTreeMap::new();
    for (file, text) in COMPONENTS {
        let component: raw::Shared = parse(file, text)?;
        shared.insert(component.name.clone(), component);
    }
    let (mut own, mut dialects) = (Vec::new(), Vec::new());
    for (file, text) in FAMILIES {
        own.push(parse::<raw::Family>(file, text)?);
    }
    for (file, text) in DIALECTS {
        dialects.push(parse::<raw::Dialect>(file, text)?);
    }
    for text in extra {
        let probe: toml::Table = parse("given", text)?;
        let name = probe.get("name").and_then(toml::Value::as_str).unwrap_or("given").to_owned();
        if probe.contains_key("component") {
            own.retain(|f| f.name != name);
            own.push(parse(&name, text)?);
        } else {
            dialects.retain(|d| d.name != name);
            dialects.push(parse(&name, text)?);
        }
    }
    own.sort_by(|a, b| a.order.cmp(&b.order).then_with(|| a.name.cmp(&b.name)));
    let mut programs = parse::<loaders::Programs>("loaders.toml", LOADERS)?.loader;
    for raw in &mut dialects {
        loaders::merge(&mut programs, &raw.name, std::mem::take(&mut raw.loader));
    }
    let mut families = Vec::new();
    for raw in &own {
        families.extend(family::compile(&raw.name, raw, &shared)?);
    }
    for raw in &dialects {
        extend(&raw.name, raw, &mut families)?;
    }
    let mut dialects: Vec<Dialect> =
        dialects.into_iter().map(|raw| dialect(raw, &families, &own)).collect::<Result<_>>()?;
    dialects.sort_by(|a, b| a.order.cmp(&b.order).then_with(|| a.name.cmp(&b.name)));
    check_names(&dialects)?;
    check_spelled_as(&dialects)?;
    check_dialects(&dialects, &own)?;
    loaders::check(&programs, &dialects, &families)?;
    let spellings: BTreeMap<String, Vec<String>> = parse("slots.toml", SLOTS)?;
    let suffixes = lookup::suffixes(&spellings, &dialects).map_err(|e| invalid("slots.toml", e))?;
    let paths = lookup::paths(&families)?;
    let prefixes = lookup::prefixes(&dialects);
    Ok(Registry { families, dialects, programs, suffixes, paths, prefixes })
}

fn check_names(dialects: &[Dialect]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for dialect in dialects {
        for name in dialect.aliases.iter().chain([&dialect.name]) {
            if !seen.insert(name) {
                return Err(invalid(&dialect.name, format!("the name `{name}` is taken")));
            }
        }
    }
    Ok(())
}

fn check_spelled_as(dialects: &[Dialect]) -> Result<()> {
    for dialect in dialects {
        for name in dialect.places.iter().filter_map(|p| p.spelled_as.as_ref()) {
            if !dialects.iter().any(|d| d.name == *name) {
                return Err(invalid(&dialect.name, format!("no dialect is called `{name}`")));
            }
        }
    }
    Ok(())
}

/// The dialects that families name exist.
fn check_dialects(dialects: &[Dialect], own: &[raw::Family]) -> Result<()> {
    for family in own {
        let named = family.dialects.iter().flatten();
        let mut all = named.chain(family.component.iter().flat_map(|c| c.places.keys()));
        if let Some(name) = all.find(|name| !dialects.iter().any(|d| d.name == **name)) {
            return Err(invalid(&family.name, format!("no dialect is called `{name}`")));
        }
    }
    Ok(())
}

/// Adds the namespaces that a dialect brings with it.
fn extend(file: &str, raw: &raw::Dialect, families: &mut [Family]) -> Result<()> {
    for extension in &raw.extend {
        for name in &extension.families {
            for (f, c) in find(file, families, name, &extension.component)? {
                let component = &mut families[f].components[c];
                if component.namespaces.contains(&extension.namespace) {
                    return Err(invalid(file, format!("`{name}` has a namespace `{}` already", extension.namespace)));
                }
                component.namespaces.push(extension.namespace.clone());
                for row in &mut component.rows {
                    row.names.push(None);
                    row.params.push(None);
                }
                let own = component.rows.len();
                for row in &extension.rows {
                    family::extend(file, component, row)?;
                }
                absorb(component, own);
                if extension.rest {
                    name_rest(component);
                }
            }
        }
    }
    Ok(())
}

/// Rows from the number `own` on that only name a module again give their name to the row that it has.
fn absorb(component: &mut Component, own: usize) {
    for new in component.rows.split_off(own) {
        let known = component.rows.iter_mut().filter(|_| new.op == Op::Rename);
        match known.into_iter().find(|row| row.op == Op::Rename && row.canonical == new.canonical) {
            Some(row) => {
                let last = row.names.len() - 1;
                row.names[last].clone_from(&new.names[last]);
            }
            None => component.rows.push(new),
        }
    }
}

/// Gives modules that the last namespace does not name their canonical names there. A row that exchanges halves does so
/// under every other name, and stays without one.
fn name_rest(component: &mut Component) {
    let named = component.rows.iter().filter(|r| r.names.last().is_some_and(Option::is_some));
    let named: Vec<Template> = named.flat_map(|r| r.canonical.clone()).collect();
    for row in &mut component.rows {
        if let ([own], Some(name)) = (row.canonical.as_slice(), row.names.last_mut())
            && row.op != Op::SwapHalves
            && !named.contains(own)
        {
            *name = Some(own.clone());
            let last = row.params.len() - 1;
            row.params[last] = row.params[0].clone();
        }
    }
}

fn dialect(raw: raw::Dialect, families: &[Family], own: &[raw::Family]) -> Result<Dialect> {
    let file = raw.name.as_str();
    let places = place::compile(file, &raw, families, own)?;
    let mut natives = Vec::new();
    for table in &raw.native {
        for name in &table.families {
            for (family, component) in find(file, families, name, &table.component)? {
                let compiled = native::compile(table, family, component, &families[family].components[component]);
                natives.push(compiled.map_err(|e| invalid(file, e))?);
            }
        }
    }
    let mut spelling = BTreeMap::new();
    for (name, suffix) in &raw.spelling {
        let slot = Slot::from_name(name).ok_or_else(|| invalid(file, format!("no slot is called `{name}`")))?;
        spelling.insert(slot, suffix.clone());
    }
    Ok(Dialect {
        name: raw.name,
        title: raw.title,
        aliases: raw.aliases,
        order: raw.order,
        write: raw.write,
        alpha: raw.alpha,
        hints: raw.hints,
        uniform: raw.uniform,
        column_magnitude: raw.column_magnitude,
        reserved: raw.reserved,
        spelling,
        places,
        natives,
    })
}

/// The numbers of a family, in each of its sizes, and of its component.
fn find(file: &str, families: &[Family], name: &str, component: &str) -> Result<Vec<(usize, usize)>> {
    let sizes: Vec<usize> = (0..families.len()).filter(|&f| families[f].name == name).collect();
    if sizes.is_empty() {
        return Err(invalid(file, format!("no family is called `{name}`")));
    }
    let missing = || invalid(file, format!("`{name}` has no component `{component}`"));
    sizes.into_iter().map(|f| Ok((f, families[f].component(component).ok_or_else(missing)?))).collect()
}
