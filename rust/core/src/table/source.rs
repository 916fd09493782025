//! The tables as they are written, read as far as they are needed.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use serde::de::DeserializeOwned;

use super::words::words;
use super::{loaders, raw};
use crate::error::{Code, Error, Result};

const LOADERS: &str = include_str!("../../data/loaders.toml");
const SLOTS: &str = include_str!("../../data/slots.toml");

/// A built-in table: its name, its text and the words in that.
struct Listed {
    name: &'static str,
    text: &'static str,
    words: &'static [&'static str],
}

include!(concat!(env!("OUT_DIR"), "/tables.rs"));

pub(super) fn invalid(file: &str, message: impl std::fmt::Display) -> Error {
    Error::new(Code::InvalidTable, format!("table `{file}`: {message}"))
}

fn parse<T: DeserializeOwned>(file: &str, text: &str) -> Result<T> {
    toml::from_str(text).map_err(|e| invalid(file, e.to_string().trim_end()))
}

/// A table that is read when it is first needed.
#[derive(Debug)]
struct Table<T> {
    name: String,
    text: Cow<'static, str>,
    words: Vec<Cow<'static, str>>,
    read: OnceLock<T>,
}

impl<T: DeserializeOwned> Table<T> {
    fn listed(listed: &Listed) -> Self {
        let words = listed.words.iter().map(|w| Cow::Borrowed(*w)).collect();
        Self { name: listed.name.to_owned(), text: Cow::Borrowed(listed.text), words, read: OnceLock::new() }
    }

    fn given(name: &str, text: &str) -> Self {
        let all: BTreeSet<&str> = words(text).collect();
        let words = all.into_iter().map(|w| Cow::Owned(w.to_owned())).collect();
        Self { name: name.to_owned(), text: Cow::Owned(text.to_owned()), words, read: OnceLock::new() }
    }

    fn get(&self) -> Result<&T> {
        if let Some(read) = self.read.get() {
            return Ok(read);
        }
        let read = parse(&self.name, &self.text)?;
        Ok(self.read.get_or_init(|| read))
    }
}

/// A family in one of its sizes.
#[derive(Debug)]
pub(super) struct Size {
    /// Number of its file.
    pub family: usize,
    pub variant: Option<String>,
    pub head: raw::Head,
}

/// All tables.
#[derive(Debug)]
pub(super) struct Sources {
    shared: BTreeMap<String, Table<raw::Shared>>,
    families: Vec<Table<raw::Family>>,
    /// By their order.
    pub dialects: Vec<raw::Dialect>,
    /// By the order of families, sizes as their table has them.
    pub sizes: Vec<Size>,
    pub spellings: BTreeMap<String, Vec<String>>,
    /// Programs that dialects name.
    own: Vec<(String, Vec<super::Program>)>,
}

impl Sources {
    /// The built-in tables and `extra` ones, each of which takes the place of one of its name.
    pub(super) fn with(extra: &[String]) -> Result<Self> {
        let mut families: Vec<Table<raw::Family>> = FAMILIES.iter().map(Table::listed).collect();
        let mut dialects = Vec::new();
        for listed in DIALECTS {
            dialects.push(parse::<raw::Dialect>(listed.name, listed.text)?);
        }
        for text in extra {
            let probe: toml::Table = parse("given", text)?;
            let name = probe.get("name").and_then(toml::Value::as_str).unwrap_or("given").to_owned();
            if probe.contains_key("component") {
                families.retain(|f| f.name != name);
                families.push(Table::given(&name, text));
            } else {
                dialects.retain(|d: &raw::Dialect| d.name != name);
                dialects.push(parse(&name, text)?);
            }
        }
        dialects.sort_by(|a, b| a.order.cmp(&b.order).then_with(|| a.name.cmp(&b.name)));
        let own = dialects.iter_mut().map(|d| (d.name.clone(), std::mem::take(&mut d.loader))).collect();
        let mut sizes = Vec::new();
        for (family, table) in families.iter().enumerate() {
            let head: raw::Head = parse(&table.name, head(&table.text))?;
            let variants = variants(&table.text);
            let names = if variants.is_empty() { vec![None] } else { variants.into_iter().map(Some).collect() };
            sizes.extend(names.into_iter().map(|variant| Size { family, variant, head: head.clone() }));
        }
        sizes.sort_by(|a, b| (a.head.order, &a.head.name).cmp(&(b.head.order, &b.head.name)));
        let shared = COMPONENTS.iter().map(|listed| (listed.name.to_owned(), Table::listed(listed))).collect();
        Ok(Self { shared, families, dialects, sizes, spellings: parse("slots.toml", SLOTS)?, own })
    }

    /// The file of a family.
    pub(super) fn family(&self, number: usize) -> Result<&raw::Family> {
        self.families[number].get()
    }

    /// The file of a component, on behalf of a family's.
    pub(super) fn shared(&self, file: &str, name: &str) -> Result<&raw::Shared> {
        let missing = || invalid(file, format!("no component is called `{name}`"));
        let found = self.shared.get(name).ok_or_else(missing)?.get()?;
        if found.name != name {
            return Err(invalid(name, "a component is called as its file is"));
        }
        Ok(found)
    }

    /// The words that names of a size's modules can have; those of components that it may use are among them.
    pub(super) fn words(&self, size: &Size) -> impl Iterator<Item = &str> {
        let table = &self.families[size.family];
        let used = |name: &&String| table.text.contains(&format!("\"{name}\""));
        let parts = self.shared.keys().filter(used).flat_map(|name| &self.shared[name].words);
        let extensions = self.dialects.iter().flat_map(|d| &d.extend);
        let extensions = extensions.filter(|e| e.families.contains(&size.head.name));
        let rows = extensions.flat_map(|e| &e.rows).flat_map(|row| row.names.values().chain(row.param.values()));
        table.words.iter().chain(parts).map(AsRef::as_ref).chain(rows.flat_map(|name| words(name)))
    }

    /// The words of what stands before and behind names, in any dialect.
    pub(super) fn free_words(&self) -> impl Iterator<Item = &str> {
        let texts = self.dialects.iter().flat_map(|d| {
            let prefixes = d.place.iter().flat_map(|p| p.also.iter().chain([&p.prefix]));
            d.spelling.values().chain(prefixes)
        });
        self.spellings.values().flatten().chain(texts).flat_map(|text| words(text))
    }

    /// The programs that load adapters.
    pub(super) fn programs(&self) -> Result<Vec<super::Program>> {
        let mut all = parse::<loaders::Programs>("loaders.toml", LOADERS)?.loader;
        for (dialect, own) in &self.own {
            loaders::merge(&mut all, dialect, own.clone());
        }
        Ok(all)
    }
}

/// The lines before the first section.
fn head(text: &str) -> &str {
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        if line.trim_start().starts_with('[') {
            break;
        }
        end += line.len();
    }
    &text[..end]
}

/// The names of the sizes: the line after each `[[variant]]`.
fn variants(text: &str) -> Vec<String> {
    let mut lines = text.lines().map(str::trim);
    let mut out = Vec::new();
    while let Some(line) = lines.next() {
        if line.starts_with("[[variant]]") {
            let name = lines.next().and_then(|l| l.strip_prefix("name")).map(str::trim_start);
            let name = name.and_then(|l| l.strip_prefix('=')).map(str::trim);
            let name = name.and_then(|l| l.strip_prefix('"')).and_then(|l| l.split_once('"'));
            out.push(name.map_or_else(String::new, |(name, _)| name.to_owned()));
        }
    }
    out
}
