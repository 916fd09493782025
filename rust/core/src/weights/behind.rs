//! The base of some adapters: each can say what the other's family is.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use super::Checkpoint;
use crate::adapter::Adapter;
use crate::compose::agree;
use crate::decode::decode;
use crate::detect::Given;
use crate::error::{Code, Result};
use crate::table::Registry;

/// Opens the base of adapters. A base that fits several families takes that of the adapters, and adapters whose keys fit
/// that of the base are read as such.
pub fn open_behind<'a>(
    registry: &Arc<Registry>,
    path: &Path,
    families: &[usize],
    adapters: &[&'a Adapter],
) -> Result<(Checkpoint, Vec<Cow<'a, Adapter>>)> {
    let agreed = agree(adapters)?;
    let checkpoint = match (Checkpoint::open(registry, path, families), agreed.first()) {
        (Err(error), Some(first)) if error.code() == Code::AmbiguousFamily => {
            Checkpoint::open(registry, path, &[first.family]).map_err(|_| error)?
        }
        (opened, _) => opened?,
    };
    let family = checkpoint.family();
    let fits = |adapter: &Cow<'_, Adapter>| adapter.detection.candidates.contains(&family);
    if agreed.iter().all(|a| a.family == family) || !agreed.iter().all(fits) {
        return Ok((checkpoint, agreed));
    }
    let again = |adapter: &Cow<'a, Adapter>| {
        let given = Given { families: vec![family], ..Given::default() };
        decode(&adapter.registry, &adapter.source, &given).map(Cow::Owned)
    };
    let agreed = agreed.iter().map(again).collect::<Result<_>>()?;
    Ok((checkpoint, agreed))
}
