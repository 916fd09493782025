//! From the keys of a base checkpoint to the modules they can mean: prefixes as data, names from the family's tables.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Deserialize;

use crate::table::{Component, Family, Hit, Op, Registry, Row};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    scales: Vec<String>,
    prefixes: Prefixes,
    #[serde(default)]
    place: Vec<Place>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Prefixes {
    main: Vec<String>,
    other: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    families: Option<Vec<String>>,
    component: Option<String>,
    /// The component, by the file that gives its rows.
    r#use: Option<String>,
    prefixes: Vec<String>,
}

impl Place {
    fn is_for(&self, family: &Family, component: &Component) -> bool {
        self.families.as_ref().is_none_or(|all| all.contains(&family.name))
            && self.component.as_ref().is_none_or(|name| *name == component.name)
            && self.r#use.as_ref().is_none_or(|name| component.shared.as_ref() == Some(name))
    }
}

fn raw() -> &'static Raw {
    static RAW: OnceLock<Raw> = OnceLock::new();
    RAW.get_or_init(|| {
        toml::from_str(include_str!("../../data/checkpoints.toml"))
            .expect("the built-in table is valid: a test reads it")
    })
}

/// Suffixes, without their dot, of what FP8 weights are multiplied with.
pub(super) fn scales() -> &'static [String] {
    &raw().scales
}

/// Which parameter of a module a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Leaf {
    /// The weight; of a norm or an embedding the parameter that its row names.
    Weight,
    /// The bias.
    Bias,
}

/// A meaning of a base tensor.
#[derive(Debug, Clone)]
pub(super) struct Meaning {
    pub(super) hit: Hit,
    pub(super) leaf: Leaf,
}

impl Meaning {
    /// Whether a tensor of this shape can be it.
    pub(super) fn fits(&self, registry: &Registry, shape: &[usize]) -> bool {
        let row = row(registry, &self.hit);
        let output = self.hit.part.map_or_else(|| row.output(), |part| row.outputs[part]);
        let inputs: &[usize] = if self.leaf == Leaf::Bias { &[] } else { &row.inputs };
        match shape {
            [rows] => *rows == output && inputs.is_empty(),
            [rows, rest @ ..] if !inputs.is_empty() => *rows == output && inputs.contains(&rest.iter().product()),
            // Some files keep vectors with axes of length one.
            _ => inputs.is_empty() && shape.iter().product::<usize>() == output,
        }
    }
}

pub(super) fn row<'r>(registry: &'r Registry, hit: &Hit) -> &'r Row {
    &registry.families[hit.family].components[hit.component].rows[hit.row]
}

/// Prefixes of every component of every family.
pub(super) struct Names<'r> {
    registry: &'r Registry,
    /// Longest first: prefix, and the (family, component) pairs it can stand before.
    prefixes: Vec<(String, Vec<(usize, usize)>)>,
}

impl<'r> Names<'r> {
    pub(super) fn new(registry: &'r Registry) -> Self {
        let mut map: BTreeMap<String, Vec<(usize, usize)>> = BTreeMap::new();
        for (f, family) in registry.families.iter().enumerate() {
            for (c, component) in family.components.iter().enumerate() {
                let general = if c == 0 { &raw().prefixes.main } else { &raw().prefixes.other };
                let own = raw().place.iter().filter(|p| p.is_for(family, component)).flat_map(|p| &p.prefixes);
                for prefix in general.iter().chain(own) {
                    let targets = map.entry(prefix.replace("{component}", &component.name)).or_default();
                    if !targets.contains(&(f, c)) {
                        targets.push((f, c));
                    }
                }
            }
        }
        let mut prefixes: Vec<_> = map.into_iter().collect();
        prefixes.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        Self { registry, prefixes }
    }

    /// Every meaning of a key, over all families.
    pub(super) fn meanings(&self, key: &str) -> Vec<Meaning> {
        let Some((path, last)) = key.rsplit_once('.') else { return Vec::new() };
        let mut out: Vec<Meaning> = Vec::new();
        for (prefix, targets) in &self.prefixes {
            let Some(path) = path.strip_prefix(prefix.as_str()) else { continue };
            for mut hit in self.registry.named(path) {
                let Some(leaf) = self.leaf(&hit, last).filter(|_| targets.contains(&(hit.family, hit.component)))
                else {
                    continue;
                };
                hit.prefix = std::sync::Arc::from(prefix.as_str());
                let twin = |m: &Meaning| (m.hit.family, m.hit.component, m.leaf) == (hit.family, hit.component, leaf);
                if !out.iter().any(twin) {
                    out.push(Meaning { hit, leaf });
                }
            }
        }
        out
    }

    fn leaf(&self, hit: &Hit, last: &str) -> Option<Leaf> {
        let row = row(self.registry, hit);
        let param = row.params[hit.namespace].as_deref().filter(|_| row.op == Op::Only).unwrap_or("weight");
        match last {
            _ if last == param => Some(Leaf::Weight),
            "bias" => Some(Leaf::Bias),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_of_the_table_exists() {
        let registry = Registry::builtin();
        for place in &raw().place {
            let mut parts = registry.families.iter().flat_map(|f| f.components.iter().map(move |c| (f, c)));
            assert!(parts.any(|(family, component)| place.is_for(family, component)), "{place:?}");
        }
    }

    #[test]
    fn names_of_every_namespace_with_prefixes() {
        let registry = Registry::builtin();
        let names = Names::new(&registry);
        // What several families have means the same in all of them.
        let one = |key: &str| names.meanings(key).into_iter().min_by_key(|m| m.hit.family);
        let fused = one("model.diffusion_model.double_blocks.3.img_attn.qkv.weight").expect("known");
        assert_eq!((fused.hit.part, fused.leaf), (None, Leaf::Weight));
        assert!(fused.fits(&registry, &[9216, 3072]) && !fused.fits(&registry, &[3072, 3072]));
        let split = one("transformer_blocks.3.attn.to_v.bias").expect("known");
        assert_eq!((split.hit.part, split.leaf), (Some(2), Leaf::Bias));
        let norm = one("double_blocks.0.img_attn.norm.query_norm.scale").expect("known");
        assert!(norm.leaf == Leaf::Weight && norm.fits(&registry, &[128]));
        assert!(one("double_blocks.0.img_attn.norm.query_norm.weight").is_none());
        assert!(one("double_blocks.19.img_attn.qkv.weight").is_none());
        assert_eq!(
            one("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight")
                .expect("known")
                .hit
                .component,
            1
        );
    }
}
