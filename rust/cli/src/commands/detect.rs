use lorafmt_core::Result;
use lorafmt_core::detect::{Detection, detect, family_warning};
use lorafmt_core::table::Registry;

use super::Context;
use crate::ExitStatus;
use crate::args::DetectArgs;
use crate::output::Detected;
use crate::sources;

pub(super) fn run(args: &DetectArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let given = context.given(&registry, &args.reading)?;
    let found = sources::find(&args.inputs, None)?;
    Ok(context.answer_all(&found, context.out.view, |_, input, _| {
        input.glance(|source| {
            let (detection, ..) = detect(&registry, &source, &given)?;
            Ok(describe(&registry, &detection, source.path().to_string_lossy().into_owned()))
        })
    }))
}

fn describe(registry: &Registry, detection: &Detection, path: String) -> Detected {
    let family = &registry.families[detection.family];
    let dialect = |&(d, keys): &(usize, usize)| (registry.dialects[d].name.clone(), keys);
    Detected {
        path,
        dialect: detection.dialect_name(registry).to_owned(),
        dialects: detection.dialects.iter().map(dialect).collect(),
        family: family.name.clone(),
        variant: family.variant.clone(),
        families: detection.candidate_names(registry),
        coverage: detection.coverage(),
        tensors: detection.total,
        warnings: family_warning(registry, detection).into_iter().collect(),
    }
}
