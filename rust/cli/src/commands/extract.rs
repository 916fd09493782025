use std::time::Instant;

use lorafmt_core::Result;
use lorafmt_core::compose::Composition;
use lorafmt_core::convert::ConvertOptions;
use lorafmt_core::weights::{Checkpoint, ExtractOptions, extract};

use super::Context;
use super::fuse::watched;
use super::writing::Job;
use crate::ExitStatus;
use crate::args::{ExtractArgs, LossyArg};
use crate::output::ExtractedAdapter;
use crate::sources::{Found, Input};
use crate::targets;

pub(super) fn run(args: &ExtractArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let family = args.family.as_deref().map(|name| registry.sizes(name)).transpose()?.unwrap_or_default();
    let to = args.to.clone().unwrap_or_else(|| registry.dialects[0].name.clone());
    let dialect = registry.dialect(&to)?;
    let goal = targets::explicit(&args.output)?;
    let inputs = [Some(args.tuned.as_path()), Some(args.base.as_path())];
    targets::check(std::slice::from_ref(&goal), args.dry_run, context.out.json, &inputs)?;
    let how = ExtractOptions {
        rule: args.ranks.rule().unwrap_or_default(),
        dtype: args.dtype.dtype(),
        niter: args.niter,
        seed: args.seed,
        lossy: args.lossy == LossyArg::Allow,
    };
    let options = ConvertOptions { to, lossy: how.lossy, ..ConvertOptions::default() };
    let found = Found { inputs: vec![Input::new(&args.output)], many: false };
    Ok(context.answer_all(&found, context.out.view, |_, input, progress| {
        let started = Instant::now();
        let base = Checkpoint::open(&registry, &args.base, &family)?;
        let tuned = Checkpoint::open(&registry, &args.tuned, &[base.family()])?;
        let (adapter, report) =
            watched(progress, &input.path, |control| extract(&tuned, &base, dialect, &how, control))?;
        let job = Job {
            options: &options,
            goal: &goal,
            dry_run: args.dry_run,
            force: args.force,
            folders: false,
            many: false,
            hashed: false,
            name: &input.path,
            started,
        };
        let converted = job.run(&Composition::of(&adapter), progress)?;
        Ok(ExtractedAdapter { converted, report })
    }))
}
