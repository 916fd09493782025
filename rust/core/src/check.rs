//! Whether a file is sound: structure, pairs, shapes, unknown keys, and numbers that are none.

use std::sync::Arc;

use rayon::prelude::*;
use serde::Serialize;

use crate::adapter::Adapter;
use crate::decode::decode_lenient;
use crate::detect::Given;
use crate::dtype::{Dtype, read_f64};
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::report::Warning;
use crate::table::Registry;

/// Unknown keys for which the nearest known one is looked up.
const SUGGESTIONS: usize = 20;

/// The result of a check.
#[derive(Debug, Clone, Serialize)]
pub struct CheckReport {
    /// Version of this document.
    pub schema: u32,
    /// As given.
    pub path: String,
    /// Whether nothing is wrong.
    pub ok: bool,
    /// Tensors looked at.
    pub tensors: usize,
    /// Modules understood.
    pub modules: usize,
    /// What is wrong, as error objects.
    pub problems: Vec<serde_json::Value>,
    /// What deserves a word.
    pub warnings: Vec<Warning>,
}

/// Checks a file. Reads every tensor once. A file that cannot be opened is an error, one that is wrong is an answer.
pub fn check(registry: &Arc<Registry>, source: &Arc<Source>, given: &Given) -> Result<CheckReport> {
    let (adapter, mut problems) = decode_lenient(registry, source, given)?;
    problems.extend(unknown_keys(&adapter, SUGGESTIONS));
    problems.extend(not_finite(source));
    Ok(CheckReport {
        schema: 1,
        path: source.path().to_string_lossy().into_owned(),
        ok: problems.is_empty(),
        tensors: source.tensors().len(),
        modules: adapter.modules.len(),
        problems: problems.into_iter().map(|e| e.at(source.path()).to_json()).collect(),
        warnings: adapter.warnings,
    })
}

/// An error for each key that no table knows, the first `suggestions` with the nearest one that is known: comparing with
/// every known name takes a while, and nobody reads thousands of suggestions.
pub(crate) fn unknown_keys(adapter: &Adapter, suggestions: usize) -> impl Iterator<Item = Error> + '_ {
    adapter.unknown.iter().enumerate().map(move |(count, &index)| {
        let name = &adapter.source.tensors()[index].name;
        let nearest = if count < suggestions { adapter.nearest(name) } else { None };
        let nearest = nearest.map_or_else(String::new, |n| format!("; the nearest known key is `{n}`"));
        Error::new(Code::UnknownKey, format!("`{name}` is unknown{nearest}")).key(name)
    })
}

/// An error for each tensor that holds values which are no numbers. Reads every tensor.
pub(crate) fn not_finite(source: &Source) -> Vec<Error> {
    let tensors = (0..source.tensors().len()).into_par_iter();
    let bad = tensors.filter_map(|index| {
        let info = &source.tensors()[index];
        let count = count_not_finite(info.dtype, source.bytes(index));
        let message = format!("`{}` holds {count} values that are NaN or infinite", info.name);
        (count > 0).then(|| Error::new(Code::NotFinite, message).key(&info.name))
    });
    bad.collect()
}

/// How many elements are NaN or infinite. The common types are tested by their exponent bits.
fn count_not_finite(dtype: Dtype, bytes: &[u8]) -> usize {
    let halves = |mask: u16| bytes.as_chunks::<2>().0.iter().filter(|b| u16::from_le_bytes(**b) & mask == mask).count();
    match dtype {
        Dtype::BF16 => halves(0x7f80),
        Dtype::F16 => halves(0x7c00),
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().filter(|b| !f32::from_le_bytes(**b).is_finite()).count(),
        d if d.is_float() => bytes.chunks_exact(d.size()).filter(|b| !read_f64(d, b).is_finite()).count(),
        _ => 0,
    }
}
