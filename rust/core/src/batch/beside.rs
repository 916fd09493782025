//! What a result depends on besides the source itself: PEFT's configuration, the adapters of a recipe.

use std::path::Path;
use std::time::UNIX_EPOCH;

use xxhash_rust::xxh3::Xxh3;

use super::hash::spelled;
use super::is_address;
use super::listing::Wanted;
use crate::recipe;

/// The file in which PEFT keeps scales.
pub(super) const CONFIG: &str = "adapter_config.json";

/// A hash of the files beside a local source that decide what is made of it; `None` if there are none.
///
/// Of a configuration the content counts, wherever it lies; of a recipe's adapters where they are and when they changed.
pub(super) fn beside(source: &Path, wanted: Wanted) -> Option<String> {
    match wanted {
        Wanted::Adapters => configuration(source).map(|text| spelled(xxhash_rust::xxh3::xxh3_128(&text))),
        Wanted::Recipes => ingredients(source),
    }
}

fn configuration(source: &Path) -> Option<Vec<u8>> {
    std::fs::read(source.with_file_name(CONFIG)).ok()
}

fn ingredients(source: &Path) -> Option<String> {
    // A recipe that cannot be read is an error when its turn comes.
    let recipe = recipe::read(source).ok()?;
    let mut state = Xxh3::new();
    for lora in &recipe.loras {
        let address = lora.path.to_str().is_some_and(is_address);
        let path = if address { None } else { std::path::absolute(&lora.path).ok() };
        let path = path.unwrap_or_else(|| lora.path.clone());
        let path = if path.is_dir() { path.join("adapter_model.safetensors") } else { path };
        state.update(path.as_os_str().as_encoded_bytes());
        let meta = std::fs::metadata(&path).ok();
        state.update(meta.map_or_else(String::new, |meta| format!("{} {}", meta.len(), version(&meta))).as_bytes());
        state.update(&configuration(&path).unwrap_or_default());
        state.update(&[0]);
    }
    Some(spelled(state.digest128()))
}

/// The time of change, in seconds since 1970.
pub(super) fn version(meta: &std::fs::Metadata) -> String {
    let time = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    time.map_or_else(String::new, |t| format!("{}.{:09}", t.as_secs(), t.subsec_nanos()))
}
