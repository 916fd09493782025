//! The keys of a recipe that say how adapters become one: `method` and its numbers, `rank` and its criteria.

use super::fields::{either, get, numeric, text, wrong};
use super::tree::{Entry, Node, Value};
use super::{Fault, Found};
use crate::ops::merge::{Choices, Rule, Sign, Space, Way};
use crate::ops::resize::{Criterion, RankRule};

pub(super) const KEYS: &[&str] = &[
    "method",
    "rule",
    "space",
    "density",
    "sign",
    "normalize",
    "rescale",
    "epsilon",
    "gamma",
    "lambda",
    "seed",
    "rank",
    "energy",
    "max_error",
];

/// Reads the keys; whether they go together is seen where all choices are known.
pub(super) fn read(top: &[Entry]) -> Found<Choices> {
    let ways: Vec<&str> = Way::all().map(Way::name).collect();
    Ok(Choices {
        way: word(top, "method", Way::from_name, &ways)?,
        rule: word(top, "rule", Rule::from_name, &names(Rule::ALL, Rule::name))?,
        space: word(top, "space", Space::from_name, &names(Space::ALL, Space::name))?,
        sign: word(top, "sign", Sign::from_name, &names(Sign::ALL, Sign::name))?,
        density: number(top, "density")?,
        normalize: flag(top, "normalize")?,
        rescale: flag(top, "rescale")?,
        epsilon: number(top, "epsilon")?,
        gamma: number(top, "gamma")?,
        lambda: number(top, "lambda")?,
        seed: count(top, "seed")?,
        rank: rank(top)?,
    })
}

fn rank(top: &[Entry]) -> Found<Option<RankRule>> {
    let limit = count(top, "rank")?.map(|n| n as usize);
    let (energy, error) = (number(top, "energy")?, number(top, "max_error")?);
    if let (Some(_), Some(_), Some(node)) = (energy, error, get(top, "max_error")?) {
        return Err(Fault::new(node.at, "`energy` and `max_error` say the same in two ways; choose one"));
    }
    let criterion = energy.map(Criterion::Energy).or(error.map(Criterion::MaxError));
    Ok((limit.is_some() || criterion.is_some()).then_some(RankRule { limit, criterion }))
}

fn names<T: Copy>(all: &[T], name: fn(T) -> &'static str) -> Vec<&'static str> {
    all.iter().map(|x| name(*x)).collect()
}

fn word<T>(top: &[Entry], key: &str, read: fn(&str) -> Option<T>, known: &[&str]) -> Found<Option<T>> {
    let Some(node) = get(top, key)? else { return Ok(None) };
    let text = text(node, &format!("`{key}`"))?;
    match read(text) {
        Some(value) => Ok(Some(value)),
        None => Err(Fault::new(node.at, format!("`{key}` is `{text}`; it can be {}", either(known)))),
    }
}

fn number(top: &[Entry], key: &str) -> Found<Option<f64>> {
    get(top, key)?.map(|node| numeric(node, || format!("`{key}`"))).transpose()
}

fn count(top: &[Entry], key: &str) -> Found<Option<u64>> {
    let whole = |node: &Node| match node.value {
        Value::Number(n) if n >= 0.0 && n.fract() == 0.0 && n < 2f64.powi(53) => Ok(n as u64),
        _ => Err(wrong(node, &format!("`{key}`"), "a whole number")),
    };
    get(top, key)?.map(whole).transpose()
}

fn flag(top: &[Entry], key: &str) -> Found<Option<bool>> {
    let flag = |node: &Node| match node.value {
        Value::Bool(flag) => Ok(flag),
        _ => Err(wrong(node, &format!("`{key}`"), "true or false")),
    };
    get(top, key)?.map(flag).transpose()
}
