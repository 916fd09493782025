//! Layers of a quantized model, and the canonical modules that they stand for.

use std::ops::Range;

use super::pattern::{Skeleton, Template, Variables, alternatives};
use super::{Component, raw};

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
    /// Its input is the output of attention.
    pub attention: bool,
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
            let variables = template.matches(&skeleton.digits, component.variables.len())?;
            (template.render(&variables) == name).then_some((i, variables))
        })
    }
}

pub(super) fn compile(raw: &raw::Native, family: usize, component: usize, table: &Component) -> Result<Native, String> {
    let mut layers: Vec<Layer> = Vec::new();
    for row in &raw.layers {
        layers.push(layer(row, table)?);
    }
    for (at, row) in raw.layers.iter().enumerate() {
        let Some(values) = &row.values else { continue };
        let fed = raw
            .layers
            .iter()
            .position(|l| l.layer == *values)
            .ok_or_else(|| format!("no layer is called `{values}`"))?;
        layers[at].values = Some(fed);
    }
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
    })
}

fn layer(raw: &raw::Layer, table: &Component) -> Result<Layer, String> {
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
    let own = (modules.len() == 1).then(|| modules[0].clone());
    let vector = match raw.vector.as_deref() {
        None => own,
        Some("") => None,
        Some(text) => Some(template(text)?),
    };
    let name = template(&raw.layer)?;
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
        attention: raw.attention,
        values: None,
    })
}
