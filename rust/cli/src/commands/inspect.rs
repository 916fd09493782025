use std::sync::Arc;

use lorafmt_core::decode::decode_lenient;
use lorafmt_core::detect::Given;
use lorafmt_core::io::Source;
use lorafmt_core::{Result, inspect};

use super::Context;
use super::writing::open_base;
use crate::ExitStatus;
use crate::args::InspectArgs;
use crate::output::View;
use crate::sources;

pub(super) fn run(args: &InspectArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let base = open_base(&registry, args.base.as_deref())?;
    let given = Given { base, ..context.given(&registry, &args.reading)? };
    let found = sources::find(&args.inputs, None)?;
    let view = View { meta: args.meta, ..context.out.view };
    let look = |source: Arc<Source>| {
        let (adapter, problems) = decode_lenient(&registry, &source, &given)?;
        let inspection = inspect::inspect(&adapter, &problems);
        if args.weights { inspection.with_weights(&adapter) } else { Ok(inspection) }
    };
    Ok(context.answer_all(&found, view, |_, input, progress| match args.weights {
        true => look(Arc::new(input.open(Some(progress))?)),
        false => input.glance(look),
    }))
}
