//! Keyword arguments about merging and ranks, our own and those of PEFT's `add_weighted_adapter`.

use lorafmt_core::encode::Algebra;
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::ops::merge::{Choices, Rule, Sign, Space, Way};
use lorafmt_core::ops::resize::{Criterion, RankRule};
use serde_json::Value;

/// What is done to a composition of `terms` adapters.
pub(crate) fn algebra(value: &Value, terms: usize) -> Result<Algebra> {
    let named = Choices {
        way: word(value, "method", Way::from_name, Way::all().map(Way::name))?,
        rule: word(value, "rule", Rule::from_name, Rule::ALL.iter().map(|x| x.name()))?,
        space: word(value, "space", Space::from_name, Space::ALL.iter().map(|x| x.name()))?,
        sign: word(value, "sign", Sign::from_name, Sign::ALL.iter().map(|x| x.name()))?,
        density: number(value, "density"),
        normalize: value.get("normalize").and_then(Value::as_bool),
        rescale: value.get("rescale").and_then(Value::as_bool),
        epsilon: number(value, "epsilon"),
        gamma: number(value, "gamma"),
        lambda: number(value, "lambda"),
        seed: value.get("seed").and_then(Value::as_u64),
        rank: rank(value),
    };
    let choices = match value.get("combination_type").and_then(Value::as_str) {
        None => named,
        Some(name) => named.or(Choices::from_peft(name).ok_or_else(|| {
            bad(format!("`combination_type` is `{name}`"))
                .hint("one of those of PEFT, such as ties_svd, or use `method`")
        })?),
    };
    Algebra::of(&choices, densities(value, terms)?)
}

/// The densities of single adapters, if a list is given.
fn densities(value: &Value, terms: usize) -> Result<Vec<Option<f64>>> {
    let Some(list) = value.get("density").and_then(Value::as_array) else { return Ok(vec![None; terms]) };
    if list.len() != terms {
        let hint = "give one number for all, or one for each";
        return Err(bad(format!("there are {} densities for {terms} adapters", list.len())).hint(hint));
    }
    Ok(list.iter().map(Value::as_f64).collect())
}

fn rank(value: &Value) -> Option<RankRule> {
    let limit = value.get("rank").and_then(Value::as_u64).map(|n| n as usize);
    let criterion =
        number(value, "energy").map(Criterion::Energy).or(number(value, "max_error").map(Criterion::MaxError));
    (limit.is_some() || criterion.is_some()).then_some(RankRule { limit, criterion })
}

fn number(value: &Value, name: &str) -> Option<f64> {
    value.get(name).and_then(Value::as_f64)
}

fn word<T>(
    value: &Value,
    key: &str,
    read: fn(&str) -> Option<T>,
    known: impl Iterator<Item = &'static str>,
) -> Result<Option<T>> {
    let Some(name) = value.get(key).and_then(Value::as_str) else { return Ok(None) };
    match read(name) {
        Some(word) => Ok(Some(word)),
        None => {
            let known: Vec<&str> = known.collect();
            Err(bad(format!("`{key}` is `{name}`")).hint(format!("one of: {}", known.join(", "))))
        }
    }
}

fn bad(what: String) -> Error {
    Error::new(Code::InvalidArgument, what)
}
