//! From options to strengths.

use lorafmt_core::Result;
use lorafmt_core::strength::{Request, Selector, Strength, Weights};

use crate::args::Places;

/// A strength with those by place; all of them are numbers. It becomes selectors by the family of the adapter.
pub(super) fn strength(all: f64, places: &Places) -> Result<Request> {
    let block = |a: &crate::args::Assignment| Ok((Selector::parse(&a.name)?, a.number));
    let plain = Strength {
        all,
        text_encoders: places.text_encoder_strength,
        components: places.component.iter().map(|a| (a.name.clone(), a.number)).collect(),
        blocks: places.block.iter().map(block).collect::<Result<_>>()?,
    };
    let weights = places.blocks.as_deref().map(Weights::parse).transpose()?;
    let request = Request { plain, weights, scales: Vec::new() };
    request.check()?;
    Ok(request)
}
