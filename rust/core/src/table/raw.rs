//! The TOML of tables, as written. Unknown fields are errors, so a typing mistake cannot pass as a default.

use std::collections::BTreeMap;

use serde::Deserialize;

/// What stands at the top of a family file, before its first section.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Head {
    pub name: String,
    pub title: String,
    #[serde(default = "last")]
    pub order: u32,
    #[serde(default)]
    pub hints: Vec<String>,
    #[serde(default)]
    pub experts: BTreeMap<String, Vec<String>>,
}

/// A family file: how the modules of one model architecture are named and shaped.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Family {
    pub name: String,
    /// Read in its [`Head`].
    #[serde(rename = "title")]
    pub _title: String,
    /// Read in its [`Head`].
    #[serde(default = "last", rename = "order")]
    pub _order: u32,
    /// Read in its [`Head`].
    #[serde(default, rename = "hints")]
    pub _hints: Vec<String>,
    /// Read in its [`Head`].
    #[serde(default, rename = "experts")]
    pub _experts: BTreeMap<String, Vec<String>>,
    /// Dialects that are written for it; `None` for all that have a place for it.
    pub dialects: Option<Vec<String>>,
    #[serde(default)]
    pub sizes: Sizes,
    #[serde(default)]
    pub blocks: BTreeMap<String, u32>,
    #[serde(default)]
    pub lists: Lists,
    #[serde(default)]
    pub variant: Vec<Variant>,
    pub component: Vec<Component>,
}

/// Named widths.
pub(super) type Sizes = BTreeMap<String, usize>;

/// Paths that belong together: list by list, the entries in each namespace.
pub(super) type Lists = BTreeMap<String, BTreeMap<String, Vec<String>>>;

/// A size in which a model comes: what differs from the family's own numbers.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Variant {
    pub name: String,
    #[serde(default)]
    pub sizes: Sizes,
    #[serde(default)]
    pub blocks: BTreeMap<String, u32>,
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
    /// Where dialects put it, as far as their own tables do not say so.
    #[serde(default)]
    pub places: BTreeMap<String, Exception>,
}

/// What differs for one component from what a dialect does with all components of its name.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Exception {
    pub prefix: Option<OneOrMany<String>>,
    pub namespace: Option<String>,
    pub carried: Option<bool>,
    pub write: Option<bool>,
}

/// A component file: a part that several models have, or one model twice.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shared {
    pub name: String,
    pub namespaces: Vec<String>,
    pub rows: Vec<Row>,
    /// Whether sizes and block counts are those of the family.
    #[serde(default)]
    pub open: bool,
    #[serde(default)]
    pub sizes: Sizes,
    #[serde(default)]
    pub blocks: BTreeMap<String, u32>,
    #[serde(default)]
    pub lists: Lists,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(super) fn as_slice(&self) -> &[T] {
        match self {
            OneOrMany::One(one) => std::slice::from_ref(one),
            OneOrMany::Many(all) => all,
        }
    }
}

/// A width: a number, or sums and products of numbers and named sizes, as `3*hidden + 2*ffn`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Width {
    Number(usize),
    Text(String),
}

impl Width {
    pub(super) fn value(&self, sizes: &Sizes) -> Result<usize, String> {
        let text = match self {
            Width::Number(n) => return Ok(*n),
            Width::Text(text) => text,
        };
        let factor = |word: &str| match (word.parse(), sizes.get(word)) {
            (Ok(n), _) | (Err(_), Some(&n)) => Ok(n),
            _ => Err(format!("`{text}` uses the unknown size `{word}`")),
        };
        let term = |term: &str| term.split('*').map(|word| factor(word.trim())).product::<Result<usize, String>>();
        text.split('+').map(term).sum()
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
    pub r#in: Option<OneOrMany<Width>>,
    pub out: OneOrMany<Width>,
    /// Of a convolution: its length on every axis, or on both if it is one number.
    pub kernel: Option<OneOrMany<usize>>,
    #[serde(default)]
    pub param: BTreeMap<String, String>,
    /// The sizes of the model that have it; `None` for all.
    pub variants: Option<Vec<String>>,
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
    pub place: Vec<Place>,
    /// Programs that load it, beside those of the common table.
    #[serde(default)]
    pub loader: Vec<super::Program>,
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
    #[serde(default)]
    pub whole: bool,
    #[serde(default)]
    pub packed_vectors: bool,
    #[serde(default)]
    pub even: bool,
    /// Canonical modules that are quantized without a branch.
    #[serde(default)]
    pub closed: Vec<String>,
    #[serde(default)]
    pub feeds: Vec<Feed>,
    pub layers: Vec<Layer>,
}

/// A module outside the layers that makes the values of attention, and the layer behind that attention.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Feed {
    pub module: String,
    pub layer: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Layer {
    pub module: String,
    pub layer: String,
    pub later: Option<String>,
    pub vector: Option<String>,
    pub columns: Option<[usize; 2]>,
    pub interleave: Option<usize>,
    pub joint: Option<String>,
    pub attention: Option<String>,
    pub values: Option<String>,
}

fn last() -> u32 {
    1000
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Place {
    /// Families; `None` for all that have the component and one of the namespaces.
    pub families: Option<Vec<String>>,
    /// Components, by name; `None` for any.
    pub component: Option<OneOrMany<String>>,
    /// The component, by the file that gives its rows.
    pub r#use: Option<String>,
    /// Whose names are written: the first that the component has.
    pub namespace: OneOrMany<String>,
    /// `{component}` is the component's name.
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
    /// Whether modules that no row here names have their canonical names.
    #[serde(default)]
    pub rest: bool,
    pub rows: Vec<Row>,
}
