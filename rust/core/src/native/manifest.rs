//! What a native adapter says of itself in its metadata: the base it fits, and what the ranks behind the base's are.
//!
//! One entry of the header, a JSON object. Ranges of ranks stand under layer names; a name with `*` for its block number
//! speaks for all blocks that have no entry of their own. The runtime ignores it.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::assemble::MAX_TOTAL_RANK;
use crate::error::{Code, Error, Result};
use crate::io::Source;

/// The name of the entry.
pub const KEY: &str = "lorafmt.native";

/// Version of what is written.
const VERSION: u32 = 1;

/// The entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this description.
    pub version: u32,
    /// The checkpoint that the adapter fits.
    pub base: BaseEntry,
    /// `aligned`: every adapter starts on a multiple of 16 ranks; `packed`: no ranks between adapters.
    pub layout: String,
    /// The adapters, in the order of their ranks.
    pub adapters: Vec<Entry>,
}

/// The base in a manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaseEntry {
    /// See [`super::Base::fingerprint`].
    pub fingerprint: String,
    /// The name of its file.
    pub name: String,
    /// What its weights are quantized to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// Ranks of its own branches, by layer.
    pub ranks: BTreeMap<String, usize>,
    /// Whether its smoothing factors are multiplied into the branches of attention layers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub smoothed: bool,
}

/// One adapter in a manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// `sha256:` and the hash of the file it was read from, where there was a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// The strength that is multiplied in: a number, an object of numbers by place, or a list of such that multiply.
    pub strength: serde_json::Value,
    /// Its ranks, by layer: first and one after the last. Layers that it does not touch are absent.
    pub ranks: BTreeMap<String, (usize, usize)>,
    /// Keys of bias differences that are its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vectors: Vec<String>,
}

impl Manifest {
    pub(super) fn new(base: BaseEntry, layout: &str, adapters: Vec<Entry>) -> Self {
        Self { version: VERSION, base, layout: layout.to_owned(), adapters }
    }

    /// The manifest of a file, if it has one.
    pub fn of(source: &Source) -> Result<Option<Self>> {
        let Some(text) = source.metadata_value(KEY) else { return Ok(None) };
        let bad = |message: String| {
            let hint = "the entry was damaged: convert the original adapters again";
            Error::new(Code::InvalidConfig, message).key(KEY).at(source.path()).hint(hint)
        };
        let manifest: Self = serde_json::from_str(text).map_err(|e| bad(format!("the entry cannot be read: {e}")))?;
        if manifest.version != VERSION {
            let message = format!("the entry is of version {}, this program reads {VERSION}", manifest.version);
            return Err(bad(message).hint("use the version of lorafmt that wrote it, or a newer one"));
        }
        if manifest.adapters.len() > MAX_TOTAL_RANK {
            return Err(bad(format!(
                "the entry names {} adapters, for which no layer has room",
                manifest.adapters.len()
            )));
        }
        Ok(Some(manifest))
    }
}

impl Entry {
    /// Its ranks in a layer; empty if it does not touch it.
    pub fn range(&self, layer: &str) -> Range<usize> {
        lookup(&self.ranks, layer).map_or(0..0, |&(start, end)| start..end)
    }
}

impl BaseEntry {
    /// The ranks of a layer's own branch.
    pub fn rank(&self, layer: &str) -> usize {
        lookup(&self.ranks, layer).copied().unwrap_or(0)
    }
}

/// The entry of a layer, else that of its pattern.
fn lookup<'m, V>(map: &'m BTreeMap<String, V>, layer: &str) -> Option<&'m V> {
    map.get(layer).or_else(|| map.get(&pattern(layer)))
}

/// A name with `*` in place of its first number: the block's.
fn pattern(layer: &str) -> String {
    let mut done = false;
    let part = |p: &str| match !done && p.bytes().all(|b| b.is_ascii_digit()) {
        true => {
            done = true;
            "*".to_owned()
        }
        false => p.to_owned(),
    };
    layer.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// Values by layer, with those that most blocks share under the pattern of their name. `absent` stands for layers that
/// lack a value where others of their pattern have one.
pub(super) fn compress<V: Clone + Ord>(values: &BTreeMap<String, Option<V>>, absent: V) -> BTreeMap<String, V> {
    let mut groups: BTreeMap<String, Vec<(&String, &Option<V>)>> = BTreeMap::new();
    for (layer, value) in values {
        groups.entry(pattern(layer)).or_default().push((layer, value));
    }
    let mut out = BTreeMap::new();
    for (pattern, members) in groups {
        let common = most_common(members.iter().map(|(_, v)| *v)).cloned().flatten();
        for (layer, value) in &members {
            if **value != common {
                out.insert((*layer).clone(), Option::clone(value).unwrap_or_else(|| absent.clone()));
            }
        }
        if let Some(common) = common {
            out.insert(pattern, common);
        }
    }
    out
}

/// The value that occurs most often; of several the smallest.
pub(super) fn most_common<V: Ord>(values: impl Iterator<Item = V>) -> Option<V> {
    let mut counts: BTreeMap<V, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    counts.into_iter().reduce(|best, other| if other.1 > best.1 { other } else { best }).map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_undone_by_looking_up() {
        let layers = |n: u32| format!("blocks.{n}.fc.1");
        let values: BTreeMap<String, Option<(usize, usize)>> = (0..9)
            .map(|n| {
                (
                    layers(n),
                    if n == 4 {
                        None
                    } else if n == 7 {
                        Some((32, 40))
                    } else {
                        Some((32, 48))
                    },
                )
            })
            .chain([("x_embedder".to_owned(), Some((0, 4)))])
            .collect();
        let map = compress(&values, (0, 0));
        assert_eq!(map.len(), 4);
        let entry = Entry { name: String::new(), hash: None, strength: 1.0.into(), ranks: map, vectors: vec![] };
        for (layer, value) in &values {
            let want = value.unwrap_or((0, 0));
            assert_eq!(entry.range(layer), want.0..want.1, "{layer}");
        }
        assert_eq!(entry.range("blocks.3.other"), 0..0);
    }
}
