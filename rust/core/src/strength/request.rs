//! A strength as it is asked for: some of it means something for a family only.

use serde_json::Value;

use super::{Scale, Strength, Weights};
use crate::error::{Code, Error, Result};
use crate::table::Family;

/// A strength whose block weights and nested scales have yet to become selectors of a family's modules.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Request {
    /// What is the same for every family. Its selectors count before the rest.
    pub plain: Strength,
    /// One number for each block.
    pub weights: Option<Weights>,
    /// Nested scales, by component. They count before `weights`.
    pub scales: Vec<(String, Scale)>,
}

impl From<Strength> for Request {
    fn from(plain: Strength) -> Self {
        Self { plain, ..Self::default() }
    }
}

impl From<f64> for Request {
    fn from(all: f64) -> Self {
        Strength::uniform(all).into()
    }
}

impl Request {
    /// An error for the first number that is NaN or infinite.
    pub fn check(&self) -> Result<()> {
        self.plain.check()?;
        self.weights.as_ref().map_or(Ok(()), Weights::check)
    }

    /// The strength for adapters of a family.
    ///
    /// Errors: a vector of a length that the family has no layout for, a preset that it has not, and scales of modules
    /// or blocks that it lacks (`invalid-argument`).
    pub fn resolve(&self, family: &Family) -> Result<Strength> {
        self.check()?;
        let mut blocks = self.weights.as_ref().map_or_else(|| Ok(Vec::new()), |w| w.selectors(family))?;
        for (component, scale) in &self.scales {
            blocks.extend(scale.selectors(family, component)?);
        }
        blocks.extend(self.plain.blocks.iter().cloned());
        Ok(Strength { blocks, ..self.plain.clone() })
    }

    /// Reads what [`Strength::from_json`] reads, and `block_weights` (a preset, or a list of numbers) and `scales`
    /// (nested, by component).
    pub fn from_json(json: &Value) -> Result<Self> {
        let Value::Object(object) = json else { return Strength::from_json(json).map(Self::from) };
        let mut rest = object.clone();
        let weights = rest.shift_remove("block_weights").map(|value| Weights::from_json(&value)).transpose()?;
        let scales = match rest.shift_remove("scales") {
            None => Vec::new(),
            Some(Value::Object(parts)) => {
                let scale = |(name, value): (String, Value)| {
                    let scale = Scale::from_json(&name, &value)?;
                    Ok((name, scale))
                };
                parts.into_iter().map(scale).collect::<Result<_>>()?
            }
            Some(other) => {
                let message = format!("`scales` of a strength is {other}");
                return Err(Error::new(Code::InvalidArgument, message).hint("write scales by component"));
            }
        };
        Ok(Self { plain: Strength::from_json(&rest.into())?, weights, scales })
    }
}
