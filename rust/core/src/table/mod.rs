//! Dialects and families as data, compiled to one hash lookup.
//!
//! Every table is read in both directions: a key is found through its digit-run form (see [`pattern`]) and a module
//! is spelled by rendering the same template. The four operations of a row have named inverses: `rename` is its own,
//! `fuse` is undone by cutting, `swap_halves` undoes itself, and `only` limits a row to parameters that are replaced
//! or shifted (norms, embeddings).

mod compile;
mod family;
mod load;
mod loaders;
mod lookup;
mod native;
pub mod pattern;
mod place;
mod raw;
mod source;
mod words;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use serde::Deserialize;

pub use compile::{Components, Natives, Places};
pub use loaders::{Answer, Program, Rule};
pub use lookup::{Hit, Read, SuffixMatch};
pub(crate) use lookup::{Routes, edit_distance, form};
pub use native::{Layer, Native};
use pattern::Template;

use crate::error::{Code, Error, Result};
use crate::kind::Slot;

/// What stands between the canonical modules of a row and its other names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// The same module under another name.
    Rename,
    /// The other name is all canonical modules of the row, stacked by output rows.
    Fuse,
    /// The other name has the two halves of the output rows exchanged.
    SwapHalves,
    /// The same parameter under another name; no factors, only replacement or difference.
    Only,
}

impl Op {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Op::Rename => "rename",
            Op::Fuse => "fuse",
            Op::SwapHalves => "swap_halves",
            Op::Only => "only",
        }
    }
}

/// What a dialect does with the scale of a LoRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlphaPolicy {
    /// An alpha tensor beside the factors.
    Tensor,
    /// Multiplied into the factors.
    Folded,
    /// In `adapter_config.json`; folded where there is no place for that file.
    Config,
}

/// One row of a family: canonical modules and what other namespaces call them.
#[derive(Debug, Clone)]
pub struct Row {
    /// The operation.
    pub op: Op,
    /// Canonical modules: several for `fuse`, one otherwise.
    pub canonical: Vec<Template>,
    /// The name in each namespace of the component; `None` where it has none. Index 0 (canonical) is empty for `fuse`.
    pub names: Vec<Option<Template>>,
    /// The parameter's name in each namespace, for `only`.
    pub params: Vec<Option<String>>,
    /// Input widths that occur, kernel included; the first is that of the base model. Empty for vectors.
    pub inputs: Vec<usize>,
    /// Output rows of each canonical module.
    pub outputs: Vec<usize>,
    /// The axes of a convolution's kernel; empty for a linear layer.
    pub kernel: Vec<usize>,
}

impl Row {
    /// Output rows of all canonical modules together.
    pub fn output(&self) -> usize {
        self.outputs.iter().sum()
    }
}

/// A part of a model that adapters target: the transformer, a text encoder.
#[derive(Debug, Clone)]
pub struct Component {
    /// The name, as diffusers calls the part of the pipeline.
    pub name: String,
    /// The component file that gave its rows, if one did.
    pub shared: Option<String>,
    /// Namings of its modules; the first is canonical.
    pub namespaces: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
    /// Block variables, by number.
    pub variables: Vec<String>,
    blocks: BTreeMap<String, u32>,
    /// Canonical entries of the lists that rows may name.
    lists: BTreeMap<String, Vec<String>>,
}

impl Component {
    /// The canonical paths of all its modules; one that stands in several rows comes several times.
    pub fn paths(&self) -> impl Iterator<Item = String> {
        let templates = self.rows.iter().flat_map(|row| &row.canonical);
        templates.flat_map(|template| self.instances_of(template).into_iter().map(|v| template.render(&v)))
    }

    /// The block numbers of every instance of a row.
    pub fn instances(&self, row: &Row) -> Vec<pattern::Variables> {
        self.instances_of(&row.canonical[0])
    }

    /// The block numbers of every instance of a template.
    pub fn instances_of(&self, template: &Template) -> Vec<pattern::Variables> {
        let mut all = vec![vec![0; self.variables.len()]];
        for (variable, below) in template.bounds() {
            let numbered = |v: &pattern::Variables, n: u32| {
                let mut v = v.clone();
                v[variable] = n;
                v
            };
            all = all.iter().flat_map(|v| (0..below).map(move |n| numbered(v, n))).collect();
        }
        all
    }

    /// The row, its part and the block numbers of a canonical module.
    pub fn canonical(&self, path: &str) -> Option<(usize, usize, pattern::Variables)> {
        let skeleton = pattern::Skeleton::of(path)?;
        self.rows.iter().enumerate().find_map(|(r, row)| {
            row.canonical.iter().enumerate().find_map(|(part, template)| {
                let variables = template.matches(&skeleton.digits, self.variables.len())?;
                (template.render(&variables) == path).then_some((r, part, variables))
            })
        })
    }

    /// The number of a namespace.
    pub fn namespace(&self, name: &str) -> Option<usize> {
        self.namespaces.iter().position(|n| n == name)
    }
}

/// A base-model architecture, in one of its sizes.
#[derive(Debug, Clone)]
pub struct Family {
    /// The name, part of the public contract.
    pub name: String,
    /// Which of the sizes that bear this name, if it has several.
    pub variant: Option<String>,
    /// The name for people.
    pub title: String,
    /// Smaller for families that are much more common: of several that explain a file alike, that one is meant.
    pub order: u32,
    /// Lower-case substrings of metadata that speak for this family.
    pub hints: Vec<String>,
    /// Models of one shape that a pipeline holds side by side, with words of file names for each.
    pub experts: BTreeMap<String, Vec<String>>,
    /// Its components, worked out when they are needed.
    pub components: Components,
}

impl Family {
    /// The name with the size, for messages.
    pub fn label(&self) -> String {
        self.variant.as_ref().map_or_else(|| self.name.clone(), |size| format!("{}-{size}", self.name))
    }

    /// The number of a component.
    pub fn component(&self, name: &str) -> Option<usize> {
        self.components.iter().position(|c| c.name == name)
    }
}

/// Where a dialect puts a component of a family.
#[derive(Debug, Clone)]
pub struct Place {
    /// Number of the family.
    pub family: usize,
    /// Number of the component.
    pub component: usize,
    /// Number of the namespace.
    pub namespace: usize,
    /// The prefix that is written.
    pub prefix: String,
    /// Further prefixes that are read.
    pub also: Vec<String>,
    /// Whether loaders of the dialect ignore the component: it is carried along and counted so.
    pub carried: bool,
    /// The dialect whose suffixes and scale it has, where not its own (for carried components).
    pub spelled_as: Option<String>,
    /// Whether it is written, or only read.
    pub write: bool,
}

impl Place {
    /// What stands before a suffix in a key: the module's path behind the prefix, flat where that is.
    pub fn key(&self, path: &str) -> String {
        match self.prefix.ends_with('_') {
            true => format!("{}{}", self.prefix, path.replace('.', "_")),
            false => format!("{}{path}", self.prefix),
        }
    }
}

/// How a tool spells an adapter.
#[derive(Debug, Clone)]
pub struct Dialect {
    /// The name, part of the public contract.
    pub name: String,
    /// The name for people.
    pub title: String,
    /// Other names for `--from` and `--to`.
    pub aliases: Vec<String>,
    /// Smaller wins where two dialects explain a file equally well.
    pub order: u32,
    /// Whether it can be written.
    pub write: bool,
    /// Where the scale goes.
    pub alpha: AlphaPolicy,
    /// Lower-case substrings of metadata that speak for this dialect.
    pub hints: Vec<String>,
    /// Whether a component has biases (or magnitudes) for all its modules or for none.
    pub uniform: bool,
    /// Whether a DoRA magnitude is a column, `[out, 1]`, rather than a vector.
    pub column_magnitude: bool,
    /// Substrings of keys that make loaders of this dialect take the file for another one.
    pub reserved: Vec<String>,
    /// The suffix written for each slot it can hold.
    pub spelling: BTreeMap<Slot, String>,
    /// Where it puts what.
    pub places: Places,
    /// The layers of quantized models that it makes branches for.
    pub natives: Natives,
    /// Last parts of names of branches, in all of them.
    pub native_ends: Vec<String>,
}

impl Dialect {
    /// The place that is written for a component.
    pub fn place(&self, family: usize, component: usize) -> Option<&Place> {
        self.places.of(family).iter().find(|p| p.write && p.component == component)
    }

    /// The quantized model of a family, if it writes branches for one.
    pub fn native(&self, family: usize) -> Option<&Native> {
        self.natives.of(family)
    }

    /// Whether it can be written for a family.
    pub fn writes(&self, family: usize) -> bool {
        self.write && self.places.of(family).iter().any(|p| p.write && !p.carried)
    }

    /// Whether it has a spelling for a slot; a bias difference may take the place of a factor's bias.
    pub fn holds(&self, slot: Slot) -> bool {
        self.spelling.contains_key(&slot) || (slot == Slot::DiffB && self.spelling.contains_key(&Slot::Bias))
    }

    /// Whether it is read for a family.
    pub fn reads(&self, family: usize) -> bool {
        !self.places.of(family).is_empty()
    }

    /// The suffix of a slot for a parameter called `param` (`weight`, unless the row says otherwise).
    pub fn suffix(&self, slot: Slot, param: Option<&str>) -> Option<String> {
        let spelled = self.spelling.get(&slot)?;
        let param = param.unwrap_or("weight");
        let optional = if param == "weight" { String::new() } else { format!(".{param}") };
        Some(spelled.replace("{.param}", &optional).replace("{param}", param))
    }

    /// Whether a suffix is the one that it writes for a slot.
    pub(crate) fn spells(&self, slot: Slot, suffix: &str) -> bool {
        match self.spelling.get(&slot) {
            Some(spelled) if spelled.contains('{') => self.suffix(slot, None).is_some_and(|s| s == suffix),
            spelled => spelled.is_some_and(|s| s == suffix),
        }
    }
}

/// A set of tables, compiled.
#[derive(Debug, Clone)]
pub struct Registry {
    /// The families.
    pub families: Vec<Family>,
    /// The dialects, in their order.
    pub dialects: Vec<Dialect>,
    programs: OnceLock<Vec<Program>>,
    sources: Arc<source::Sources>,
    compiled: Arc<[compile::Lazy]>,
    suffixes: Vec<lookup::Suffix>,
    vocabulary: lookup::Vocabulary,
}

impl Registry {
    /// The tables that come with lorafmt, compiled once.
    pub fn builtin() -> Arc<Registry> {
        static BUILTIN: OnceLock<Arc<Registry>> = OnceLock::new();
        let make = || Arc::new(load::registry(&[]).expect("the built-in tables are valid: a test compiles them"));
        Arc::clone(BUILTIN.get_or_init(make))
    }

    /// The built-in tables and further ones, each a TOML text of a family or a dialect, with the same checks.
    ///
    /// A table whose name exists already replaces the built-in one.
    pub fn with_tables(tables: &[String]) -> Result<Arc<Registry>> {
        load::registry(tables).map(Arc::new)
    }

    /// An error if something in the tables is wrong. Works everything out.
    pub fn check(&self) -> Result<()> {
        load::check(self)
    }

    /// Programs that load adapters.
    pub fn programs(&self) -> &[Program] {
        self.programs.get_or_init(|| self.sources.programs().expect("checked where tables are given, and by a test"))
    }

    /// The dialect that lends its suffixes to a place of another one: itself, unless the place names one.
    pub fn speller<'a>(&'a self, dialect: &'a Dialect, place: &Place) -> &'a Dialect {
        let named = place.spelled_as.as_ref();
        named.and_then(|name| self.dialects.iter().find(|d| d.name == *name)).unwrap_or(dialect)
    }

    /// The number of a family; of its first size, if it has several.
    pub fn family(&self, name: &str) -> Result<usize> {
        Ok(self.sizes(name)?[0])
    }

    /// The numbers of a family in all its sizes (`wan`), or in one (`wan-14b`).
    pub fn sizes(&self, name: &str) -> Result<Vec<usize>> {
        let plain = |text: &str| text.replace(['-', '_', '.'], "").to_lowercase();
        let wanted = plain(name);
        let all = |of: &dyn Fn(&Family) -> bool| -> Vec<usize> {
            (0..self.families.len()).filter(|&f| of(&self.families[f])).collect()
        };
        let named = all(&|f| plain(&f.name) == wanted);
        let found = if named.is_empty() { all(&|f| plain(&f.label()) == wanted) } else { named };
        if found.is_empty() {
            return Err(Error::new(Code::InvalidArgument, format!("no family is called `{name}`"))
                .hint(format!("families: {}", self.family_names().join(", "))));
        }
        Ok(found)
    }

    /// The names of all families, each once.
    pub fn family_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.families.iter().map(|f| f.name.as_str()).collect();
        names.dedup();
        names
    }

    /// The number of a dialect, by name or alias.
    pub fn dialect(&self, name: &str) -> Result<usize> {
        let found = self.dialects.iter().position(|d| d.name == name || d.aliases.iter().any(|a| a == name));
        found.ok_or_else(|| {
            let known: Vec<&str> = self.dialects.iter().map(|d| d.name.as_str()).collect();
            Error::new(Code::InvalidArgument, format!("no dialect is called `{name}`"))
                .hint(format!("dialects: {}", known.join(", ")))
        })
    }
}
