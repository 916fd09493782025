//! From options to strengths.

use lorafmt_core::Result;
use lorafmt_core::strength::{Selector, Strength};

use crate::args::Places;

/// A strength with those by place; all of them are numbers.
pub(super) fn strength(all: f64, places: &Places) -> Result<Strength> {
    let block = |a: &crate::args::Assignment| Ok((Selector::parse(&a.name)?, a.number));
    let strength = Strength {
        all,
        text_encoders: places.text_encoder_strength,
        components: places.component.iter().map(|a| (a.name.clone(), a.number)).collect(),
        blocks: places.block.iter().map(block).collect::<Result<_>>()?,
    };
    strength.check()?;
    Ok(strength)
}
