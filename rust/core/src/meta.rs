//! The header's metadata: carried word for word, less what the conversion makes untrue.

use serde_json::{Value, json};

use crate::alpha::is_alpha_metadata;
use crate::compose::{Composition, Term};
use crate::native::manifest;

/// The entry in which a composition says what it was made of.
pub(crate) const COMPOSED: &str = "lorafmt.composed";

/// Hashes over the tensors of the input; they are not those of the output.
const HASHES: [&str; 3] = ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"];

/// Ranks that a file states beside its alpha; without the alpha they would be half a sentence.
const RANKS: [&str; 3] = ["ss_network_dim", "rank", "r"];

/// The metadata of the output.
///
/// Entries about scales go, or the next reader would apply a folded scale a second time. Only the trainer's own
/// `ss_*` notes stay, and those only if `alphas_kept`: every module still has its alpha tensor, which counts first.
pub fn carry(metadata: &[(String, String)], alphas_kept: bool) -> Vec<(String, String)> {
    let untrue = |key: &str| {
        let tail = key.rsplit('.').next().unwrap_or(key);
        let about_scale = is_alpha_metadata(key) || RANKS.contains(&tail);
        HASHES.contains(&key) || key == manifest::KEY || (about_scale && !(alphas_kept && key.starts_with("ss_")))
    };
    let mut out: Vec<(String, String)> = metadata.iter().filter(|(k, _)| !untrue(k)).cloned().collect();
    // Loaders of the torch world ask for it.
    if !out.iter().any(|(k, _)| k == "format") {
        out.push(("format".to_owned(), "pt".to_owned()));
    }
    out
}

/// The metadata of a composition at a strength: of several files, the entries on which all agree, and what it was made
/// of. `alpha_tensors` says whether every module keeps its alpha.
pub(crate) fn of(composition: &Composition<'_>, alpha_tensors: bool, strength: f64) -> Vec<(String, String)> {
    let first = composition.first().source.metadata();
    if let [term] = composition.terms() {
        // Of a part, or at another strength, it would say what is not so any more.
        let same = !term.is_part() && strength == 1.0 && term.strength.everywhere() == Some(1.0);
        let mut out = carry(first, alpha_tensors && same);
        out.retain(|(key, _)| same || key != COMPOSED);
        return out;
    }
    let agreed = |entry: &&(String, String)| composition.sources().iter().all(|s| s.metadata().contains(entry));
    let mut out = carry(&first.iter().filter(agreed).cloned().collect::<Vec<_>>(), false);
    let term = |t: &Term<'_>| json!({"name": t.name, "strength": t.strength.to_json()});
    let terms: Vec<Value> = composition.terms().iter().map(term).collect();
    out.push((COMPOSED.to_owned(), Value::Array(terms).to_string()));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_all_but_the_untrue() {
        let pairs = [("ss_tag", "x"), ("sshs_model_hash", "1"), ("ss_network_alpha", "8"), ("ss_network_dim", "16")];
        let meta: Vec<(String, String)> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let keys = |m: Vec<(String, String)>| m.into_iter().map(|(k, _)| k).collect::<Vec<_>>();
        assert_eq!(keys(carry(&meta, false)), ["ss_tag", "format"]);
        assert_eq!(keys(carry(&meta, true)), ["ss_tag", "ss_network_alpha", "ss_network_dim", "format"]);
    }
}
