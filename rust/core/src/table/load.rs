//! From tables to a registry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use super::compile::{Components, Lazy, Natives, Places};
use super::lookup::{self, Vocabulary};
use super::source::{Sources, invalid};
use super::{Dialect, Family, Registry, loaders, place, raw};
use crate::error::Result;
use crate::kind::Slot;

/// The built-in tables together with `extra` ones. Without any, families are worked out when they are needed; with some,
/// all are at once, so that a mistake shows.
pub(super) fn registry(extra: &[String]) -> Result<Registry> {
    let sources = Arc::new(Sources::with(extra)?);
    let numbers = 0..sources.sizes.len();
    let compiled: Arc<[Lazy]> = match extra {
        [] => numbers.map(|number| Lazy::later(&sources, number)).collect(),
        _ => numbers.map(|number| Lazy::now(&sources, number)).collect::<Result<_>>()?,
    };
    let families: Vec<Family> = sources
        .sizes
        .iter()
        .zip(compiled.iter())
        .map(|(size, lazy)| Family {
            name: size.head.name.clone(),
            variant: size.variant.clone(),
            title: size.head.title.clone(),
            order: size.head.order,
            hints: size.head.hints.clone(),
            experts: size.head.experts.clone(),
            components: Components(lazy.clone()),
        })
        .collect();
    let dialects: Vec<Dialect> = (0..sources.dialects.len())
        .map(|number| dialect(&sources.dialects[number], number, &families, &compiled))
        .collect::<Result<_>>()?;
    check_names(&dialects)?;
    let suffixes = lookup::suffixes(&sources.spellings, &dialects).map_err(|e| invalid("slots.toml", e))?;
    let vocabulary = Vocabulary::of(&sources);
    let registry = Registry { families, dialects, programs: OnceLock::new(), sources, compiled, suffixes, vocabulary };
    if !extra.is_empty() {
        check(&registry)?;
    }
    Ok(registry)
}

/// Everything that cannot be seen in one table alone. Works all families out.
pub(super) fn check(registry: &Registry) -> Result<()> {
    let (sources, families, dialects) = (&registry.sources, &registry.families, &registry.dialects);
    let known = |name: &String| dialects.iter().any(|d| d.name == *name);
    for raw in &sources.dialects {
        place::check(raw, families)?;
        let named = raw.native.iter().flat_map(|n| &n.families).chain(raw.extend.iter().flat_map(|e| &e.families));
        if let Some(name) = named.into_iter().find(|name| !families.iter().any(|f| f.name == **name)) {
            return Err(invalid(&raw.name, format!("no family is called `{name}`")));
        }
        if let Some(name) = raw.place.iter().filter_map(|p| p.spelled_as.as_ref()).find(|name| !known(name)) {
            return Err(invalid(&raw.name, format!("no dialect is called `{name}`")));
        }
    }
    for size in &sources.sizes {
        let table = sources.family(size.family)?;
        let mut named = table.dialects.iter().flatten().chain(table.component.iter().flat_map(|c| c.places.keys()));
        if let Some(name) = named.find(|name| !known(name)) {
            return Err(invalid(&table.name, format!("no dialect is called `{name}`")));
        }
    }
    loaders::check(&sources.programs()?, dialects, families)
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

fn dialect(raw: &raw::Dialect, number: usize, families: &[Family], compiled: &Arc<[Lazy]>) -> Result<Dialect> {
    let file = raw.name.as_str();
    let mut spelling = BTreeMap::new();
    for (name, suffix) in &raw.spelling {
        let slot = Slot::from_name(name).ok_or_else(|| invalid(file, format!("no slot is called `{name}`")))?;
        spelling.insert(slot, suffix.clone());
    }
    let of = (0..families.len()).filter(|&f| raw.native.iter().any(|n| n.families.contains(&families[f].name)));
    let ends = raw.native.iter().flat_map(|n| [&n.down[..], &n.up[..]]).flatten().cloned();
    Ok(Dialect {
        name: raw.name.clone(),
        title: raw.title.clone(),
        aliases: raw.aliases.clone(),
        order: raw.order,
        write: raw.write,
        alpha: raw.alpha,
        hints: raw.hints.clone(),
        uniform: raw.uniform,
        column_magnitude: raw.column_magnitude,
        reserved: raw.reserved.clone(),
        spelling,
        native_ends: ends.collect(),
        places: Places { dialect: number, families: Arc::clone(compiled) },
        natives: Natives { dialect: number, of: of.collect(), families: Arc::clone(compiled), all: OnceLock::new() },
    })
}
