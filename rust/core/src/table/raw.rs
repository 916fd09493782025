//! The TOML of tables, as written. Unknown fields are errors, so a typing mistake cannot pass as a default.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A family file: how the modules of one model architecture are named and shaped.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Family {
    pub name: String,
    pub title: String,
    #[serde(default)]
    pub hints: Vec<String>,
    #[serde(default)]
    pub blocks: BTreeMap<String, u32>,
    pub component: Vec<Component>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Component {
    pub name: String,
    /// A shared component file that gives namespaces and rows.
    pub r#use: Option<String>,
    #[serde(default)]
    pub namespaces: Vec<String>,
    #[serde(default)]
    pub rows: Vec<Row>,
}

/// A component file: a text encoder that several families have.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shared {
    pub name: String,
    pub namespaces: Vec<String>,
    pub rows: Vec<Row>,
    #[serde(default)]
    pub blocks: BTreeMap<String, u32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(usize),
    Many(Vec<usize>),
}

impl OneOrMany {
    pub(super) fn to_vec(&self) -> Vec<usize> {
        match self {
            OneOrMany::One(n) => vec![*n],
            OneOrMany::Many(all) => all.clone(),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(super) enum RawOp {
    #[default]
    Rename,
    Fuse,
    SwapHalves,
    Only,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Row {
    #[serde(default)]
    pub op: RawOp,
    pub r#in: Option<OneOrMany>,
    pub out: OneOrMany,
    #[serde(default)]
    pub param: BTreeMap<String, String>,
    /// The name in each namespace; the loader checks that no other field is among them.
    #[serde(flatten)]
    pub names: BTreeMap<String, String>,
}

/// A dialect file: how one tool spells an adapter.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Dialect {
    pub name: String,
    pub title: String,
    #[serde(default)]
    pub aliases: Vec<String>,
    #[serde(default = "last")]
    pub order: u32,
    #[serde(default)]
    pub write: bool,
    pub alpha: super::AlphaPolicy,
    #[serde(default)]
    pub hints: Vec<String>,
    #[serde(default)]
    pub uniform: bool,
    #[serde(default)]
    pub column_magnitude: bool,
    #[serde(default)]
    pub reserved: Vec<String>,
    pub spelling: BTreeMap<String, String>,
    #[serde(default)]
    pub loaders: BTreeMap<String, BTreeMap<String, String>>,
    pub place: Vec<Place>,
    /// Layers of quantized models.
    #[serde(default)]
    pub native: Vec<Native>,
    /// Names of its own for modules of a family.
    #[serde(default)]
    pub extend: Vec<Extend>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Native {
    pub families: Vec<String>,
    pub component: String,
    pub down: Vec<String>,
    pub up: Vec<String>,
    pub smooth: Vec<String>,
    pub smooth_orig: Vec<String>,
    pub layers: Vec<Layer>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Layer {
    pub module: String,
    pub layer: String,
    pub later: Option<String>,
    pub vector: Option<String>,
    pub columns: Option<[usize; 2]>,
    pub interleave: Option<usize>,
    pub joint: Option<String>,
    #[serde(default)]
    pub attention: bool,
    pub values: Option<String>,
}

fn last() -> u32 {
    1000
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Place {
    pub families: Vec<String>,
    pub component: String,
    pub namespace: String,
    pub prefix: String,
    #[serde(default)]
    pub also: Vec<String>,
    #[serde(default)]
    pub carried: bool,
    pub spelled_as: Option<String>,
    #[serde(default = "yes")]
    pub write: bool,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Extend {
    pub families: Vec<String>,
    pub component: String,
    pub namespace: String,
    pub rows: Vec<Row>,
}
