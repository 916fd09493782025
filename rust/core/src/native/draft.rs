//! The metadata entry of a native adapter, while it is made.

use std::collections::{BTreeMap, BTreeSet};

use super::manifest::{BaseEntry, Entry, KEY, Manifest, compress};
use crate::compose::Term;
use crate::plan::Digest;

/// The metadata entry while modules outside the layers are still to come.
pub(crate) struct Draft {
    pub(super) base: BaseEntry,
    pub(super) layout: &'static str,
    /// Ranges of each term, by layer.
    pub(super) ranks: Vec<BTreeMap<String, Option<(usize, usize)>>>,
    pub(super) vectors: Vec<BTreeSet<String>>,
}

impl Draft {
    /// Notes a module outside the layers: the terms that have it, with their ranks one after the other.
    pub(crate) fn outside(&mut self, name: &str, terms: &[(usize, Option<usize>)]) {
        // Whoever does not have it must be seen not to: others under one pattern may speak for all blocks.
        for ranks in &mut self.ranks {
            ranks.insert(name.to_owned(), None);
        }
        let mut start = 0;
        for &(term, rank) in terms {
            match rank {
                Some(rank) => {
                    self.ranks[term].insert(name.to_owned(), Some((start, start + rank)));
                    start += rank;
                }
                None => drop(self.vectors[term].insert(name.to_owned())),
            }
        }
    }

    /// The entry, and the hashes that it still lacks.
    pub(crate) fn finish(self, terms: &[Term<'_>], strength: f64) -> ((String, String), Vec<Digest>) {
        let (hashes, digests): (Vec<_>, Vec<_>) = terms.iter().enumerate().map(|(n, t)| t.hash(n)).unzip();
        let entry = |(((term, hash), ranks), vectors): (((&Term<'_>, Option<String>), _), BTreeSet<String>)| Entry {
            name: term.name.clone(),
            hash,
            strength: term.written_strength(strength),
            ranks: compress(&ranks, (0, 0)),
            vectors: vectors.into_iter().collect(),
        };
        let entries = terms.iter().zip(hashes).zip(self.ranks).zip(self.vectors).map(entry);
        // An adapter of strength zero has left nothing in the file.
        let entries = entries.filter(|e| !e.ranks.is_empty() || !e.vectors.is_empty()).collect();
        let manifest = Manifest::new(self.base, self.layout, entries);
        let entry = (KEY.to_owned(), serde_json::to_string(&manifest).unwrap_or_default());
        (entry, digests.into_iter().flatten().collect())
    }
}
