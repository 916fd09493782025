//! The reference pages.

mod cli;
mod dialects;
mod errors;
mod families;
mod formats;

use std::collections::BTreeMap;

use lorafmt_core::table::pattern::Template;
use lorafmt_core::table::{Component, Registry, Row};

/// The folder of the reference; every file in it is generated.
pub(crate) const FOLDER: &str = "docs/reference";

/// Every page by its path from the root of the repository.
pub(crate) fn pages() -> BTreeMap<String, String> {
    let registry = Registry::builtin();
    let mut pages = BTreeMap::from([
        ("cli.md".to_owned(), cli::page()),
        ("formats.md".to_owned(), formats::page(&registry)),
        ("errors.md".to_owned(), errors::page()),
    ]);
    for (index, dialect) in registry.dialects.iter().enumerate() {
        pages.insert(format!("dialects/{}.md", dialect.name), dialects::page(&registry, index));
    }
    for (index, family) in registry.families.iter().enumerate() {
        pages.insert(format!("families/{}.md", family.name), families::page(&registry, index));
    }
    pages.into_iter().map(|(name, text)| (format!("{FOLDER}/{name}"), text)).collect()
}

/// A template with its block variables as `{name}`.
fn symbolic(template: &Template, component: &Component) -> String {
    template.text(&component.variables)
}

/// What a row is called in a namespace: all its canonical modules, or the one other name.
fn names(row: &Row, namespace: usize) -> Vec<&Template> {
    if namespace == 0 { row.canonical.iter().collect() } else { row.names[namespace].iter().collect() }
}
