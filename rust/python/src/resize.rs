//! Ranks: the keyword arguments of `resize`, and adapters of one key set.

use lorafmt_core::adapter::Adapter as CoreAdapter;
use lorafmt_core::compose::{Composition, Term, agree};
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::ops::KeySet;
use lorafmt_core::ops::resize::{Budget, Criterion, Method, RankRule, Resize, Target};
use lorafmt_core::strength::Selector;
use pyo3::prelude::*;
use serde_json::Value;

use crate::Adapter;
use crate::enter::enter;

/// A criterion by the name of its keyword argument.
type Named = (&'static str, fn(f64) -> Criterion);

/// The change of ranks that the options ask for, if they do.
pub(crate) fn parse(options: &Value) -> Result<Option<Resize>> {
    let Some(given) = options.get("resize").filter(|v| !v.is_null()) else { return Ok(None) };
    let number = |name: &str| given.get(name).and_then(Value::as_f64);
    let count = |name: &str| given.get(name).and_then(Value::as_u64);
    let criteria: [Named; 5] = [
        ("energy", Criterion::Energy),
        ("max_error", Criterion::MaxError),
        ("sv_ratio", Criterion::SvRatio),
        ("sv_fro", Criterion::SvFro),
        ("sv_cumulative", Criterion::SvCumulative),
    ];
    let criterion = criteria.iter().find_map(|(name, make)| number(name).map(make));
    let rule = RankRule { limit: count("rank").map(|n| n as usize), criterion };
    let target = match (count("bytes"), number("mean_rank")) {
        (Some(bytes), _) => Target::Budget(Budget::Bytes(bytes)),
        (None, Some(mean)) => Target::Budget(Budget::MeanRank(mean)),
        (None, None) => Target::Rule(rule),
    };
    let places = given.get("ranks").and_then(Value::as_object).into_iter().flatten();
    let place = |(selector, rank): (&String, &Value)| {
        Ok((Selector::parse(selector)?, rank.as_u64().unwrap_or_default() as usize))
    };
    let resize = Resize {
        methods: methods(given)?,
        target,
        places: places.map(place).collect::<Result<_>>()?,
        seed: count("seed").unwrap_or_default(),
    };
    resize.check()?;
    Ok(Some(resize))
}

fn methods(given: &Value) -> Result<Vec<Method>> {
    let count = |name: &str, default: u64| given.get(name).and_then(Value::as_u64).unwrap_or(default) as usize;
    let known = [
        Method::Svd,
        Method::Rsvd { niter: count("niter", 4), oversample: count("oversample", 10) },
        Method::Random,
        Method::SparseRandom(given.get("density").and_then(Value::as_f64).unwrap_or(0.1)),
        Method::Pad,
        Method::Orthogonal,
    ];
    let names = given.get("method").and_then(Value::as_str).unwrap_or("svd");
    let one = |name: &str| {
        known.iter().copied().find(|m| m.name() == name).ok_or_else(|| {
            let all = known.iter().map(|m| m.name()).collect::<Vec<_>>().join(", ");
            Error::new(Code::InvalidArgument, format!("`method` is `{name}`")).hint(format!("one of: {all}"))
        })
    };
    names.split('+').map(one).collect()
}

/// The adapters with the modules of all of them, or those of `like`, as zeros where they lack one.
#[pyfunction]
#[pyo3(signature = (adapters, like=None))]
pub(crate) fn completed(
    py: Python<'_>,
    adapters: Vec<Py<Adapter>>,
    like: Option<Py<Adapter>>,
) -> PyResult<Vec<Adapter>> {
    enter(py, None, |_| {
        let all: Vec<&CoreAdapter> = adapters.iter().chain(&like).map(|a| a.get().sound()).collect::<Result<_>>()?;
        let agreed = agree(&all)?;
        Composition::new(agreed.iter().map(|a| Term::new(a, 1.0.into())).collect())?;
        let wanted = if like.is_some() { agreed.len() - 1 } else { 0 };
        let keys = KeySet::union(agreed[wanted..].iter().map(AsRef::as_ref))?;
        let one =
            |adapter: &CoreAdapter| keys.complete(adapter).map(|(inner, _)| Adapter { inner, problems: Vec::new() });
        agreed[..adapters.len()].iter().map(|a| one(a)).collect()
    })
}
