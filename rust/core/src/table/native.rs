//! Layers of a quantized model, and the canonical modules that they stand for.

use std::ops::Range;

use super::pattern::{Skeleton, Template, Variables, alternatives};
use super::{Component, raw};
use crate::native::vector::GROUP;

/// What adapters to a quantized model hold beside plain modules: the low-rank branches of its layers.
#[derive(Debug, Clone)]
pub struct Native {
    /// Number of the family.
    pub family: usize,
    /// Number of the component.
    pub component: usize,
    /// The layers, in the order of their tables.
    pub layers: Vec<Layer>,
    /// What checkpoints call the tensors of a layer: the first is what adapters are written with.
    pub down: Vec<String>,
    /// As `down`, for the other factor.
    pub up: Vec<String>,
    /// The vector that inputs are divided by.
    pub smooth: Vec<String>,
    /// The vector that the weights were multiplied with, where that is another.
    pub smooth_orig: Vec<String>,
    /// Whether checkpoints hold the whole model, so that what is not in them is not in the model.
    pub whole: bool,
    /// Whether bias differences of layers stand under the layers' names in the order of the kernels, to be added to the
    /// checkpoint's; else under names of modules in their own order.
    pub packed_vectors: bool,
    /// Whether a layer has one rank in all blocks.
    pub even: bool,
    /// Canonical modules that are quantized without a branch, so that nothing can be added to them.
    pub closed: Vec<Template>,
    /// Modules outside the layers that make values of attention, and the layer behind it.
    pub feeds: Vec<(Template, usize)>,
}

/// A layer of a quantized model.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The canonical modules that make it, stacked by output rows.
    pub modules: Vec<Template>,
    /// Output rows of each module.
    pub outputs: Vec<usize>,
    /// Input columns.
    pub input: usize,
    /// Input columns of its module, of which it may have a part.
    pub width: usize,
    /// Its name in adapters and in checkpoints.
    pub name: Template,
    /// Its name in single-file checkpoints of the second generation.
    pub later: Template,
    /// Where bias differences go; `None` where another layer of the module takes them.
    pub vector: Option<Template>,
    /// The part of the module's inputs that it has; `None` for all.
    pub columns: Option<Range<usize>>,
    /// For a modulation layer, how many parts its rows interleave.
    pub interleave: Option<usize>,
    /// Layers of one block with the same word have one rank.
    pub joint: Option<String>,
    /// Its input is the output of attention; layers of one block with the same word have the same attention.
    pub attention: Option<String>,
    /// The layer whose input is attention over the values that the last part makes.
    pub values: Option<usize>,
}

impl Layer {
    /// Output rows of all modules together.
    pub fn output(&self) -> usize {
        self.outputs.iter().sum()
    }
}

impl Native {
    /// The layer and block numbers that a name in an adapter stands for.
    pub fn find(&self, component: &Component, name: &str) -> Option<(usize, Variables)> {
        self.search(component, name, |l| Some(&l.name))
    }

    /// The layer and block numbers whose bias differences have this name.
    pub fn find_vector(&self, component: &Component, name: &str) -> Option<(usize, Variables)> {
        self.search(component, name, |l| l.vector.as_ref())
    }

    fn search(
        &self,
        component: &Component,
        name: &str,
        of: impl Fn(&Layer) -> Option<&Template>,
    ) -> Option<(usize, Variables)> {
        let skeleton = Skeleton::of(name)?;
        self.layers.iter().enumerate().find_map(|(i, layer)| {
            let template = of(layer)?;
            if template.skeleton() != skeleton.text {
                return None;
            }
            let variables = template.matches(&skeleton.digits, component.variables.len())?;
            (template.render(&variables) == name).then_some((i, variables))
        })
    }
}

pub(super) fn compile(raw: &raw::Native, family: usize, component: usize, table: &Component) -> Result<Native, String> {
    let rows: Vec<raw::Layer> = raw.layers.iter().flat_map(|row| listed(row, table)).collect();
    let numbered =
        |name: &str| rows.iter().position(|l| l.layer == name).ok_or_else(|| format!("no layer is called `{name}`"));
    let mut layers: Vec<Layer> = Vec::new();
    for row in &rows {
        let values = row.values.as_deref().map(numbered).transpose()?;
        layers.push(Layer { values, ..layer(row, table, raw.packed_vectors)? });
    }
    let mut variables = table.variables.clone();
    let mut template = |text: &str| Template::parse(text, &table.blocks, &mut variables);
    let mut feeds = Vec::new();
    for feed in raw.feeds.iter().flat_map(|feed| listed(feed, table)) {
        feeds.push((template(&feed.module)?, numbered(&feed.layer)?));
    }
    let closed = raw.closed.iter().flat_map(|text| alternatives(text));
    let closed = closed.map(|text| template(&text)).collect::<Result<_, _>>()?;
    let names = [&raw.down, &raw.up, &raw.smooth, &raw.smooth_orig];
    if names.iter().any(|n| n.is_empty()) {
        return Err("a native table names its tensors".to_owned());
    }
    Ok(Native {
        family,
        component,
        layers,
        down: raw.down.clone(),
        up: raw.up.clone(),
        smooth: raw.smooth.clone(),
        smooth_orig: raw.smooth_orig.clone(),
        whole: raw.whole,
        packed_vectors: raw.packed_vectors,
        even: raw.even,
        closed,
        feeds,
    })
}

/// What is written once for all entries of a list of the family.
trait Listed: Clone {
    /// Its names.
    fn names(&mut self) -> Vec<&mut String>;
}

impl Listed for raw::Layer {
    fn names(&mut self) -> Vec<&mut String> {
        let others = [&mut self.later, &mut self.vector, &mut self.values].into_iter().flatten();
        [&mut self.module, &mut self.layer].into_iter().chain(others).collect()
    }
}

impl Listed for raw::Feed {
    fn names(&mut self) -> Vec<&mut String> {
        vec![&mut self.module, &mut self.layer]
    }
}

/// The row for each entry of the lists that it names.
fn listed<T: Listed>(row: &T, table: &Component) -> Vec<T> {
    let mut probe = row.clone();
    let names = probe.names();
    let used = |word: &String| names.iter().any(|n| n.contains(word));
    let words = table.lists.iter().map(|(list, entries)| (format!("{{{list}}}"), entries));
    let Some((word, entries)) = words.into_iter().find(|(word, _)| used(word)) else { return vec![row.clone()] };
    let one = |entry: &String| {
        let mut own = row.clone();
        own.names().into_iter().for_each(|name| *name = name.replace(&word, entry));
        listed(&own, table)
    };
    entries.iter().flat_map(one).collect()
}

fn layer(raw: &raw::Layer, table: &Component, packed: bool) -> Result<Layer, String> {
    let mut variables = table.variables.clone();
    let mut template = |text: &str| Template::parse(text, &table.blocks, &mut variables);
    let modules: Vec<Template> = alternatives(&raw.module).iter().map(|t| template(t)).collect::<Result<_, _>>()?;
    let mut outputs = Vec::new();
    let mut input = 0;
    for module in &modules {
        let found = table.rows.iter().find_map(|r| Some((r, r.canonical.iter().position(|t| t == module)?)));
        let (row, part) = found.ok_or_else(|| format!("`{}` has modules that no row names", raw.layer))?;
        outputs.push(row.outputs[part]);
        input = row.inputs.first().copied().unwrap_or(0);
    }
    let columns = raw.columns.map(|[start, end]| start..end);
    if columns.as_ref().is_some_and(|c| c.start >= c.end || c.end > input || modules.len() != 1) {
        return Err(format!("the columns of `{}` are none of its module", raw.layer));
    }
    let rows: usize = outputs.iter().sum();
    if raw.interleave.is_some_and(|n| n == 0 || !rows.is_multiple_of(n)) {
        return Err(format!("the rows of `{}` do not interleave so", raw.layer));
    }
    if packed && !rows.is_multiple_of(GROUP) {
        return Err(format!("the {rows} rows of `{}` are no whole groups of {GROUP}", raw.layer));
    }
    let name = template(&raw.layer)?;
    let vector = match raw.vector.as_deref() {
        None if packed => Some(name.clone()),
        None => (modules.len() == 1).then(|| modules[0].clone()),
        Some("") => None,
        Some(text) => Some(template(text)?),
    };
    Ok(Layer {
        later: raw.later.as_deref().map(&mut template).transpose()?.unwrap_or_else(|| name.clone()),
        name,
        modules,
        outputs,
        input: columns.as_ref().map_or(input, Range::len),
        width: input,
        vector,
        columns,
        interleave: raw.interleave,
        joint: raw.joint.clone(),
        attention: raw.attention.clone(),
        values: None,
    })
}
