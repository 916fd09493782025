//! The reference pages.

mod cli;
mod components;
mod dialects;
mod errors;
mod families;
mod formats;
mod loaders;
mod places;

use std::collections::BTreeMap;

use lorafmt_core::table::pattern::Template;
use lorafmt_core::table::{Registry, Row};

use crate::tables::Tables;

/// The folder of the reference; every file in it is generated.
pub(crate) const FOLDER: &str = "docs/reference";

/// Every page by its path from the root of the repository.
pub(crate) fn pages() -> BTreeMap<String, String> {
    let (registry, tables) = (Registry::builtin(), Tables::read());
    let mut pages = BTreeMap::from([
        ("cli.md".to_owned(), cli::page()),
        ("formats.md".to_owned(), formats::page(&registry)),
        ("errors.md".to_owned(), errors::page()),
        ("components.md".to_owned(), components::page(&tables)),
        ("loaders.md".to_owned(), loaders::page(&registry)),
    ]);
    for (index, dialect) in registry.dialects.iter().enumerate() {
        pages.insert(format!("dialects/{}.md", dialect.name), dialects::page(&registry, index));
    }
    for name in registry.family_names() {
        pages.insert(format!("families/{name}.md"), families::page(&registry, &tables, name));
    }
    pages.into_iter().map(|(name, text)| (format!("{FOLDER}/{name}"), text)).collect()
}

/// What a row is called in a namespace: all its canonical modules, or the one other name.
fn names(row: &Row, namespace: usize) -> Vec<&Template> {
    if namespace == 0 { row.canonical.iter().collect() } else { row.names[namespace].iter().collect() }
}
