//! The components of families, compiled, with all their rows.

use std::collections::BTreeMap;

use super::pattern::{Template, alternatives};
use super::raw::{self, OneOrMany};
use super::source::{Sources, invalid};
use super::{Component, Op, Row};
use crate::error::Result;

/// The numbers that rows of a component may name.
struct Numbers<'r> {
    sizes: raw::Sizes,
    lists: &'r raw::Lists,
    variant: Option<&'r str>,
}

/// The components of a family in one of its sizes.
pub(super) fn compile(sources: &Sources, raw: &raw::Family, size: Option<&str>) -> Result<Vec<Component>> {
    let file = raw.name.as_str();
    let variant = raw.variant.iter().find(|v| Some(v.name.as_str()) == size);
    if variant.is_some() != size.is_some() || (size.is_none() && !raw.variant.is_empty()) {
        return Err(invalid(file, "each `[[variant]]` begins with its name"));
    }
    let (mut sizes, mut blocks) = (raw.sizes.clone(), raw.blocks.clone());
    if let Some(variant) = variant {
        sizes.extend(variant.sizes.clone());
        blocks.extend(variant.blocks.clone());
    }
    let name = variant.map(|v| v.name.as_str());
    let mut components = Vec::new();
    for part in &raw.component {
        let own;
        let (namespaces, rows, blocks, numbers) = match &part.r#use {
            Some(name_of) => {
                let found = sources.shared(file, name_of)?;
                let (mut all, mut counts) = (found.sizes.clone(), found.blocks.clone());
                if found.open {
                    all.extend(sizes.clone());
                    counts.extend(blocks.clone());
                }
                own = counts;
                (&found.namespaces, &found.rows, &own, Numbers { sizes: all, lists: &found.lists, variant: name })
            }
            None => {
                let numbers = Numbers { sizes: sizes.clone(), lists: &raw.lists, variant: name };
                (&part.namespaces, &part.rows, &blocks, numbers)
            }
        };
        if namespaces.is_empty() {
            return Err(invalid(file, format!("component `{}` has no namespaces", part.name)));
        }
        let entries = |of: &BTreeMap<String, Vec<String>>| of.get(&namespaces[0]).cloned().unwrap_or_default();
        let mut component = Component {
            name: part.name.clone(),
            lists: numbers.lists.iter().map(|(list, of)| (list.clone(), entries(of))).collect(),
            shared: part.r#use.clone(),
            namespaces: namespaces.clone(),
            rows: Vec::new(),
            variables: Vec::new(),
            blocks: blocks.clone(),
        };
        for row in rows {
            add(file, &mut component, row, &numbers)?;
        }
        components.push(component);
    }
    Ok(components)
}

/// Adds a row that a dialect brings; it has no sizes or lists.
pub(super) fn extend(file: &str, component: &mut Component, row: &raw::Row) -> Result<()> {
    let lists = raw::Lists::new();
    add(file, component, row, &Numbers { sizes: raw::Sizes::new(), lists: &lists, variant: None })
}

/// Adds what one written row stands for: itself once for each entry of the lists that it names.
fn add(file: &str, component: &mut Component, raw: &raw::Row, numbers: &Numbers<'_>) -> Result<()> {
    if raw.variants.as_ref().is_some_and(|all| !all.iter().any(|v| numbers.variant == Some(v.as_str()))) {
        return Ok(());
    }
    if let Some(unknown) = raw.names.keys().find(|n| !component.namespaces.contains(n)) {
        return Err(invalid(file, format!("`{unknown}` is no namespace of `{}`", component.name)));
    }
    for names in listed(file, &raw.names, numbers.lists)? {
        add_row(file, component, raw, &names, &numbers.sizes)?;
    }
    Ok(())
}

type Names = BTreeMap<String, String>;

/// The names for each entry of the lists in them.
fn listed(file: &str, names: &Names, lists: &raw::Lists) -> Result<Vec<Names>> {
    let groups = names.values().flat_map(|n| n.split('{').skip(1)).filter_map(|rest| Some(rest.split_once('}')?.0));
    let Some((list, entries)) = groups.into_iter().find_map(|group| lists.get_key_value(group)) else {
        return Ok(vec![names.clone()]);
    };
    let word = format!("{{{list}}}");
    let count = entries.values().map(Vec::len).next().unwrap_or(0);
    if count == 0 || entries.values().any(|e| e.len() != count) {
        return Err(invalid(file, format!("the list `{list}` needs equally many entries in every namespace")));
    }
    let mut out = Vec::new();
    for at in 0..count {
        let mut made = Names::new();
        for (namespace, name) in names {
            let entry = match entries.get(namespace) {
                Some(all) => name.replace(&word, &all[at]),
                None if name.contains(&word) => {
                    return Err(invalid(file, format!("the list `{list}` has no `{namespace}` entries")));
                }
                None => name.clone(),
            };
            made.insert(namespace.clone(), entry);
        }
        out.extend(listed(file, &made, lists)?);
    }
    Ok(out)
}

/// A `fuse` row is one row, any other is one for each alternative of its braces.
fn add_row(file: &str, component: &mut Component, raw: &raw::Row, names: &Names, sizes: &raw::Sizes) -> Result<()> {
    let canonical = names.get(&component.namespaces[0]).ok_or_else(|| {
        invalid(file, format!("a row of `{}` has no `{}` name", component.name, component.namespaces[0]))
    })?;
    let canonical = alternatives(canonical);
    let kernel = kernel(raw);
    let area: usize = kernel.iter().product();
    let widths = |all: &OneOrMany<raw::Width>| {
        all.as_slice().iter().map(|w| w.value(sizes)).collect::<Result<Vec<usize>, _>>().map_err(|e| invalid(file, e))
    };
    let outputs = widths(&raw.out)?;
    let inputs = raw.r#in.as_ref().map(widths).transpose()?.unwrap_or_default();
    let inputs: Vec<usize> = inputs.into_iter().map(|n| n * area).collect();
    let names: Vec<Option<Vec<String>>> =
        component.namespaces.iter().map(|n| names.get(n).map(|t| alternatives(t))).collect();
    let params: Vec<Option<String>> = component.namespaces.iter().map(|n| raw.param.get(n).cloned()).collect();
    let op = match raw.op {
        raw::RawOp::Rename => Op::Rename,
        raw::RawOp::Fuse => Op::Fuse,
        raw::RawOp::SwapHalves => Op::SwapHalves,
        raw::RawOp::Only => Op::Only,
    };
    let Component { variables, blocks, rows, .. } = component;
    let mut template = |text: &str| Template::parse(text, blocks, variables).map_err(|e| invalid(file, e));
    if op == Op::Fuse {
        if outputs.len() != canonical.len() || names.iter().skip(1).flatten().any(|n| n.len() != 1) {
            return Err(invalid(file, format!("`fuse` row {canonical:?} needs one `out` a part and one fused name")));
        }
        let parts = canonical.iter().map(|t| template(t)).collect::<Result<_>>()?;
        let mut others = vec![None];
        for name in names.into_iter().skip(1) {
            others.push(name.map(|n| template(&n[0])).transpose()?);
        }
        rows.push(Row { op, canonical: parts, names: others, params, inputs, outputs, kernel });
        return Ok(());
    }
    if outputs.len() != 1 || names.iter().flatten().any(|n| n.len() != canonical.len()) {
        return Err(invalid(
            file,
            format!("row {canonical:?} needs one `out`, and equally many names in every namespace"),
        ));
    }
    for (i, path) in canonical.iter().enumerate() {
        let mut others = Vec::new();
        for name in &names {
            others.push(name.as_ref().map(|n| template(&n[i])).transpose()?);
        }
        rows.push(Row {
            op,
            canonical: vec![template(path)?],
            names: others,
            params: params.clone(),
            inputs: inputs.clone(),
            outputs: outputs.clone(),
            kernel: kernel.clone(),
        });
    }
    Ok(())
}

/// The axes of a convolution's kernel; none for a linear layer.
fn kernel(raw: &raw::Row) -> Vec<usize> {
    match &raw.kernel {
        None => Vec::new(),
        Some(OneOrMany::One(n)) => vec![*n, *n],
        Some(OneOrMany::Many(axes)) => axes.clone(),
    }
}
