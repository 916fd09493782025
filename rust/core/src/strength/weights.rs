//! Block weights: one number for each block, in a vector or under a name.
//!
//! A vector means something for a family only; its numbers become factors of selectors. The tables say which place each
//! number is for (`layout`).

use serde_json::Value;

use super::Selector;
use super::layout::{Layout, Run, Tables};
use crate::error::{Code, Error, Result};
use crate::table::Family;

/// Block weights as they were asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// By the name of a preset.
    Preset(String),
    /// One number for each slot of the layout of that length.
    Vector(Vec<f64>),
}

impl Weights {
    /// Reads `MIDD`, `1,0,0.5` or `[1, 0, 0.5]`.
    pub fn parse(text: &str) -> Result<Self> {
        let trimmed = text.trim();
        let inside = trimmed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let list = inside.unwrap_or(trimmed);
        if inside.is_none() && !list.contains(',') && list.parse::<f64>().is_err() {
            return match list {
                "" => Err(bad("the block weights are empty")),
                name => Ok(Self::Preset(name.to_owned())),
            };
        }
        let number = |(at, item): (usize, &str)| {
            let item = item.trim();
            item.parse::<f64>().map_err(|_| bad(format!("block weight {} is `{item}`, which is no number", at + 1)))
        };
        list.split(',').enumerate().map(number).collect::<Result<_>>().map(Self::Vector)
    }

    /// Reads the name of a preset, a text of numbers, or a list of them.
    pub fn from_json(json: &Value) -> Result<Self> {
        match json {
            Value::String(text) => Self::parse(text),
            Value::Array(items) => {
                let number = |(at, item): (usize, &Value)| {
                    item.as_f64().ok_or_else(|| bad(format!("block weight {} is {item}, which is no number", at + 1)))
                };
                items.iter().enumerate().map(number).collect::<Result<_>>().map(Self::Vector)
            }
            other => Err(bad(format!("the block weights are {other}"))),
        }
    }

    /// An error for the first number that is NaN or infinite.
    pub fn check(&self) -> Result<()> {
        let Self::Vector(numbers) = self else { return Ok(()) };
        match numbers.iter().position(|number| !number.is_finite()) {
            None => Ok(()),
            Some(at) => Err(bad(format!("block weight {} is {}, which is no finite number", at + 1, numbers[at]))),
        }
    }

    /// The weights as factors of selectors, of which the last that matches counts. Places whose factor is that of
    /// everything else are left out.
    pub(super) fn selectors(&self, family: &Family) -> Result<Vec<(Selector, f64)>> {
        let tables = Tables::get();
        match self {
            Self::Vector(numbers) => expanded(tables.layout(family, numbers.len())?, numbers),
            Self::Preset(name) => {
                let preset = tables.preset(name, family)?;
                if let Some(all) = preset.all {
                    return Ok(if all == 1.0 { Vec::new() } else { vec![(Selector::of_table("*:")?, all)] });
                }
                let layouts = tables.layouts(family);
                let fitting =
                    preset.vectors.iter().find_map(|v| Some((layouts.iter().find(|l| l.len() == v.len())?, v)));
                let (layout, numbers) = fitting.ok_or_else(|| {
                    let message = format!("the preset `{name}` is not for {}", family.title);
                    Error::new(Code::InvalidArgument, message).hint(tables.known(family))
                })?;
                expanded(layout, numbers)
            }
        }
    }
}

fn bad(message: impl Into<String>) -> Error {
    let hint = "give the name of a preset such as `ALL`, or numbers with commas between";
    Error::new(Code::InvalidArgument, message).hint(hint)
}

/// The base first, so that every other slot counts before it.
fn expanded(layout: &Layout, numbers: &[f64]) -> Result<Vec<(Selector, f64)>> {
    let mut rest = numbers;
    let mut parts: Vec<(&Run, &[f64])> = Vec::new();
    for run in &layout.runs {
        let (own, others) = rest.split_at(run.count);
        parts.push((run, own));
        rest = others;
    }
    let base = parts.iter().find(|(run, _)| run.is_base()).map_or(1.0, |(_, own)| own[0]);
    let mut out = Vec::new();
    if base != 1.0 {
        out.push((Selector::of_table("*:")?, base));
    }
    for (run, own) in parts.iter().filter(|(run, _)| !run.is_base()) {
        for (indices, factor) in by_value(own).into_iter().filter(|(_, factor)| *factor != base) {
            for place in &run.places {
                out.push((Selector::of_table(&place.replace('#', &ranges(&indices)))?, factor));
            }
        }
    }
    Ok(out)
}

/// Where each number stands; numbers in the order of their first place.
pub(super) fn by_value(numbers: &[f64]) -> Vec<(Vec<usize>, f64)> {
    let mut out: Vec<(Vec<usize>, f64)> = Vec::new();
    for (at, number) in numbers.iter().enumerate() {
        match out.iter_mut().find(|(_, known)| known == number) {
            Some((places, _)) => places.push(at),
            None => out.push((vec![at], *number)),
        }
    }
    out
}

/// Numbers in ascending order as a selector writes them: `0-4,7`.
pub(super) fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let text = |(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}
