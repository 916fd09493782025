//! Families and shared components as their tables write them: rows with named widths and lists, which the compiled
//! registry no longer has. The registry has checked them.

use std::collections::BTreeMap;

use toml::{Table, Value};

use crate::root;

/// The tables that pages show as they are written.
pub(crate) struct Tables {
    families: BTreeMap<String, Source>,
    shared: BTreeMap<String, Source>,
}

/// One file.
pub(crate) struct Source {
    /// Its first comment, as one paragraph: what it is, and where names and shapes come from.
    pub about: String,
    table: Table,
}

/// One component with its rows, its own or those of a shared file.
pub(crate) struct Part<'t> {
    pub namespaces: Vec<&'t str>,
    pub rows: Vec<&'t Table>,
    /// The file that gives them.
    pub source: &'t Source,
}

impl Tables {
    pub(crate) fn read() -> Self {
        Self { families: folder("families"), shared: folder("components") }
    }

    pub(crate) fn family(&self, name: &str) -> &Source {
        &self.families[name]
    }

    pub(crate) fn shared(&self) -> impl Iterator<Item = (&str, &Source)> {
        self.shared.iter().map(|(name, source)| (name.as_str(), source))
    }

    /// The families that take a shared component, by name.
    pub(crate) fn users(&self, shared: &str) -> Vec<&str> {
        let uses = |s: &Source| s.components().iter().any(|c| text(c, "use") == Some(shared));
        self.families.iter().filter(|(_, s)| uses(s)).map(|(name, _)| name.as_str()).collect()
    }

    /// The rows of a component of a family.
    pub(crate) fn part<'t>(&'t self, family: &str, component: usize) -> Part<'t> {
        let source = self.family(family);
        let written = source.components()[component];
        match text(written, "use") {
            Some(name) => self.shared[name].part(),
            None => Part { namespaces: texts(&written["namespaces"]), rows: tables(written.get("rows")), source },
        }
    }
}

impl Source {
    pub(crate) fn part(&self) -> Part<'_> {
        let table = &self.table;
        Part { namespaces: texts(&table["namespaces"]), rows: tables(table.get("rows")), source: self }
    }

    fn components(&self) -> Vec<&Table> {
        tables(self.table.get("component"))
    }

    /// Named numbers of a field (`sizes`, `blocks`), of a variant where it has its own.
    pub(crate) fn numbers(&self, field: &str, variant: Option<&str>) -> BTreeMap<&str, i64> {
        let variants = tables(self.table.get("variant"));
        let variant = variants.into_iter().filter(|v| text(v, "name") == variant);
        let written = std::iter::once(&self.table).chain(variant).filter_map(|t| t.get(field)?.as_table());
        written.flatten().map(|(name, n)| (name.as_str(), n.as_integer().unwrap_or_default())).collect()
    }

    /// Paired names: each list with its entries by namespace.
    pub(crate) fn lists(&self) -> Vec<(&str, BTreeMap<&str, Vec<&str>>)> {
        let lists = self.table.get("lists").and_then(Value::as_table);
        lists.into_iter().flatten().map(|(name, value)| (name.as_str(), by_namespace(value))).collect()
    }
}

fn by_namespace(value: &Value) -> BTreeMap<&str, Vec<&str>> {
    value.as_table().into_iter().flatten().map(|(namespace, all)| (namespace.as_str(), texts(all))).collect()
}

fn folder(name: &str) -> BTreeMap<String, Source> {
    let folder = root().join("rust/core/data").join(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths = entries.map(|e| e.expect("readable").path());
    let read = |path: std::path::PathBuf| {
        let file = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let table: Table = toml::from_str(&file).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let name = text(&table, "name").expect("the registry has checked it").to_owned();
        (name, Source { about: about(&file), table })
    };
    paths.filter(|p| p.extension().is_some_and(|e| e == "toml")).map(read).collect()
}

fn about(file: &str) -> String {
    let lines = file.lines().map_while(|line| line.strip_prefix('#'));
    lines.map(str::trim).collect::<Vec<_>>().join("\n")
}

/// A field that is a text.
pub(crate) fn text<'t>(table: &'t Table, field: &str) -> Option<&'t str> {
    table.get(field).and_then(Value::as_str)
}

/// A text, or a list of them.
pub(crate) fn texts(value: &Value) -> Vec<&str> {
    match value {
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        one => one.as_str().into_iter().collect(),
    }
}

fn tables(value: Option<&Value>) -> Vec<&Table> {
    value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_table).collect()
}
