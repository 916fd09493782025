//! Reading and checking tables.

use std::collections::{BTreeMap, BTreeSet};

use super::pattern::{Template, alternatives};
use super::{Component, Dialect, Family, Op, Place, Registry, Row, lookup, native, raw};
use crate::error::{Code, Error, Result};
use crate::kind::Slot;

const SLOTS: &str = include_str!("../../data/slots.toml");

/// The built-in tables: file name (for messages) and text.
macro_rules! builtin {
    ($($path:literal)*) => { &[$(($path, include_str!(concat!("../../data/", $path)))),*] };
}

const COMPONENTS: &[(&str, &str)] = builtin!["components/clip-l.toml" "components/t5-xxl.toml"];
const FAMILIES: &[(&str, &str)] = builtin!["families/flux1.toml" "families/chroma.toml"];
const DIALECTS: &[(&str, &str)] = builtin![
    "dialects/aitoolkit.toml" "dialects/bfl.toml" "dialects/comfyui.toml" "dialects/diffusers.toml"
    "dialects/kohya.toml" "dialects/lycoris.toml" "dialects/nunchaku.toml" "dialects/onetrainer.toml"
    "dialects/peft.toml" "dialects/xlabs.toml"
];

fn invalid(file: &str, message: impl std::fmt::Display) -> Error {
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
    let mut families: Vec<(String, raw::Family)> = Vec::new();
    let mut dialects: Vec<(String, raw::Dialect)> = Vec::new();
    for (file, text) in FAMILIES {
        families.push(((*file).to_owned(), parse(file, text)?));
    }
    for (file, text) in DIALECTS {
        dialects.push(((*file).to_owned(), parse(file, text)?));
    }
    for text in extra {
        let probe: toml::Table = parse("given", text)?;
        let name = probe.get("name").and_then(toml::Value::as_str).unwrap_or("given").to_owned();
        if probe.contains_key("component") {
            families.retain(|(_, f)| f.name != name);
            families.push((name.clone(), parse(&name, text)?));
        } else {
            dialects.retain(|(_, d)| d.name != name);
            dialects.push((name.clone(), parse(&name, text)?));
        }
    }
    let mut compiled: Vec<Family> =
        families.into_iter().map(|(file, raw)| family(&file, raw, &shared)).collect::<Result<_>>()?;
    for (file, raw) in &dialects {
        extend(file, raw, &mut compiled)?;
    }
    let mut dialects: Vec<Dialect> =
        dialects.into_iter().map(|(file, raw)| dialect(&file, raw, &compiled)).collect::<Result<_>>()?;
    dialects.sort_by(|a, b| a.order.cmp(&b.order).then_with(|| a.name.cmp(&b.name)));
    check_names(&dialects)?;
    check_spelled_as(&dialects)?;
    let spellings: BTreeMap<String, Vec<String>> = parse("slots.toml", SLOTS)?;
    let suffixes = lookup::suffixes(&spellings, &dialects).map_err(|e| invalid("slots.toml", e))?;
    let paths = lookup::paths(&compiled)?;
    let prefixes = lookup::prefixes(&dialects);
    Ok(Registry { families: compiled, dialects, suffixes, paths, prefixes })
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

fn family(file: &str, raw: raw::Family, shared: &BTreeMap<String, raw::Shared>) -> Result<Family> {
    let mut components = Vec::new();
    for part in raw.component {
        let (namespaces, rows, blocks) = match &part.r#use {
            Some(name) => {
                let found =
                    shared.get(name).ok_or_else(|| invalid(file, format!("no component is called `{name}`")))?;
                (found.namespaces.clone(), found.rows.clone(), found.blocks.clone())
            }
            None => (part.namespaces, part.rows, raw.blocks.clone()),
        };
        if namespaces.is_empty() {
            return Err(invalid(file, format!("component `{}` has no namespaces", part.name)));
        }
        let mut component = Component { name: part.name, namespaces, rows: Vec::new(), variables: Vec::new(), blocks };
        for row in &rows {
            add_row(file, &mut component, row)?;
        }
        components.push(component);
    }
    Ok(Family { name: raw.name, title: raw.title, hints: raw.hints, components })
}

/// Adds what one written row stands for: a `fuse` row is one row, any other is one for each alternative of its braces.
fn add_row(file: &str, component: &mut Component, raw: &raw::Row) -> Result<()> {
    if let Some(unknown) = raw.names.keys().find(|n| !component.namespaces.contains(n)) {
        return Err(invalid(file, format!("`{unknown}` is no namespace of `{}`", component.name)));
    }
    let canonical = raw.names.get(&component.namespaces[0]).ok_or_else(|| {
        invalid(file, format!("a row of `{}` has no `{}` name", component.name, component.namespaces[0]))
    })?;
    let canonical = alternatives(canonical);
    let outputs = raw.out.to_vec();
    let inputs = raw.r#in.as_ref().map(raw::OneOrMany::to_vec).unwrap_or_default();
    let names: Vec<Option<Vec<String>>> =
        component.namespaces.iter().map(|n| raw.names.get(n).map(|t| alternatives(t))).collect();
    let params: Vec<Option<String>> = component.namespaces.iter().map(|n| raw.param.get(n).cloned()).collect();
    let op = match raw.op {
        raw::RawOp::Rename => Op::Rename,
        raw::RawOp::Fuse => Op::Fuse,
        raw::RawOp::SwapHalves => Op::SwapHalves,
        raw::RawOp::Only => Op::Only,
    };
    let Component { variables, blocks, rows, .. } = component;
    let mut template = |text: &str| Template::parse(text, blocks, variables).map_err(|e| invalid(file, e));
    if op == Op::Fuse {
        if outputs.len() != canonical.len() || names.iter().skip(1).flatten().any(|n| n.len() != 1) {
            return Err(invalid(file, format!("`fuse` row {canonical:?} needs one `out` a part and one fused name")));
        }
        let parts = canonical.iter().map(|t| template(t)).collect::<Result<_>>()?;
        let mut others = vec![None];
        for name in names.into_iter().skip(1) {
            others.push(name.map(|n| template(&n[0])).transpose()?);
        }
        rows.push(Row { op, canonical: parts, names: others, params, inputs, outputs });
        return Ok(());
    }
    if outputs.len() != 1 || names.iter().flatten().any(|n| n.len() != canonical.len()) {
        return Err(invalid(
            file,
            format!("row {canonical:?} needs one `out`, and equally many names in every namespace"),
        ));
    }
    for (i, path) in canonical.iter().enumerate() {
        let mut others = Vec::new();
        for name in &names {
            others.push(name.as_ref().map(|n| template(&n[i])).transpose()?);
        }
        let row = Row {
            op,
            canonical: vec![template(path)?],
            names: others,
            params: params.clone(),
            inputs: inputs.clone(),
            outputs: outputs.clone(),
        };
        rows.push(row);
    }
    Ok(())
}

/// Adds the namespaces that a dialect brings with it.
fn extend(file: &str, raw: &raw::Dialect, families: &mut [Family]) -> Result<()> {
    for extension in &raw.extend {
        for name in &extension.families {
            let family = families.iter_mut().find(|f| f.name == *name);
            let family = family.ok_or_else(|| invalid(file, format!("no family is called `{name}`")))?;
            let component = family.components.iter_mut().find(|c| c.name == extension.component);
            let component = component
                .ok_or_else(|| invalid(file, format!("`{name}` has no component `{}`", extension.component)))?;
            if component.namespaces.contains(&extension.namespace) {
                return Err(invalid(file, format!("`{name}` has a namespace `{}` already", extension.namespace)));
            }
            component.namespaces.push(extension.namespace.clone());
            for row in &mut component.rows {
                row.names.push(None);
                row.params.push(None);
            }
            for row in &extension.rows {
                add_row(file, component, row)?;
            }
        }
    }
    Ok(())
}

fn dialect(file: &str, raw: raw::Dialect, families: &[Family]) -> Result<Dialect> {
    let mut places = Vec::new();
    for place in raw.place {
        for name in &place.families {
            let (family, component) = find(file, families, name, &place.component)?;
            let namespace = families[family].components[component].namespace(&place.namespace);
            let namespace = namespace.ok_or_else(|| {
                invalid(file, format!("`{}` of `{name}` has no namespace `{}`", place.component, place.namespace))
            })?;
            places.push(Place {
                family,
                component,
                namespace,
                prefix: place.prefix.clone(),
                also: place.also.clone(),
                carried: place.carried,
                spelled_as: place.spelled_as.clone(),
                write: place.write,
            });
        }
    }
    let mut natives = Vec::new();
    for table in &raw.native {
        for name in &table.families {
            let (family, component) = find(file, families, name, &table.component)?;
            let compiled = native::compile(table, family, component, &families[family].components[component]);
            natives.push(compiled.map_err(|e| invalid(file, e))?);
        }
    }
    let mut spelling = BTreeMap::new();
    for (name, suffix) in raw.spelling {
        let slot = Slot::from_name(&name).ok_or_else(|| invalid(file, format!("no slot is called `{name}`")))?;
        spelling.insert(slot, suffix);
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
        loaders: raw.loaders,
        places,
        natives,
    })
}

/// The numbers of a family and of its component.
fn find(file: &str, families: &[Family], name: &str, component: &str) -> Result<(usize, usize)> {
    let family = families.iter().position(|f| f.name == *name);
    let family = family.ok_or_else(|| invalid(file, format!("no family is called `{name}`")))?;
    let found = families[family].component(component);
    Ok((family, found.ok_or_else(|| invalid(file, format!("`{name}` has no component `{component}`")))?))
}
