use lorafmt_core::Result;

use super::Context;
use crate::ExitStatus;
use crate::output::{machine, matrix};

pub(super) fn run(context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    if context.out.json {
        context.out.document(&machine(&registry));
    } else {
        let text = matrix(&registry, &context.out.view);
        context.out.answer(&text);
    }
    Ok(ExitStatus::Success)
}
