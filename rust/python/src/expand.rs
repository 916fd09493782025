//! Adapters as plain LoRA.

use std::path::PathBuf;

use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::ops::expand::{Expand, expand};
use lorafmt_core::ops::resize::{Criterion, RankRule};
use lorafmt_core::weights::Checkpoint;
use pyo3::prelude::*;
use serde_json::Value;

use crate::enter::enter;
use crate::{Adapter, options, to_json};

/// The adapter as plain LoRA, its tensors yet to be computed or to be written, and what happened as JSON.
#[pyfunction(name = "expand")]
#[pyo3(signature = (adapter, options, base_weights=None))]
pub(crate) fn expand_adapter(
    py: Python<'_>,
    adapter: Py<Adapter>,
    options: &str,
    base_weights: Option<PathBuf>,
) -> PyResult<(Adapter, String)> {
    enter(py, None, |control| {
        let adapter = adapter.get().sound()?;
        let how = how(options)?;
        let base = base_weights.map(|path| Checkpoint::open(&adapter.registry, &path, &[adapter.family]));
        let (inner, report) = expand(adapter, base.transpose()?.as_ref(), &how, control)?;
        Ok((Adapter { inner, problems: Vec::new() }, to_json(&report)))
    })
}

fn how(json: &str) -> Result<Expand> {
    let written = options::parse(json)?;
    let value: Value = serde_json::from_str(json).unwrap_or_default();
    let number = |name: &str| value.get(name).and_then(Value::as_f64);
    let limit = match value.get("rank") {
        None | Some(Value::Null) => None,
        Some(rank) => Some(rank.as_u64().ok_or_else(|| {
            Error::new(Code::InvalidArgument, format!("`rank` is {rank}")).hint("a whole number of at least 1")
        })? as usize),
    };
    let criterion = match (number("energy"), number("max_error")) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Code::InvalidArgument, "`energy` and `max_error` are both given")
                .hint("give one of them; `rank` may go with either"));
        }
        (energy, error) => energy.map(Criterion::Energy).or(error.map(Criterion::MaxError)),
    };
    let rule = (limit.is_some() || criterion.is_some()).then_some(RankRule { limit, criterion });
    let seed = value.get("seed").and_then(Value::as_u64).unwrap_or(0);
    Ok(Expand { rule, dtype: written.dtype, lossy: written.lossy, seed })
}
