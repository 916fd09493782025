use std::sync::Arc;
use std::time::Instant;

use lorafmt_core::Result;
use lorafmt_core::compose::Composition;
use lorafmt_core::convert::{self, ConvertOptions};
use lorafmt_core::ops::expand::{Expand, expand};
use lorafmt_core::table::Registry;
use lorafmt_core::weights::Checkpoint;

use super::Context;
use super::writing::{Job, options, own_dialect};
use crate::args::ExpandArgs;
use crate::output::{Plain, Progress};
use crate::sources::{self, Input};
use crate::targets::{self, Goal};
use crate::{ExitStatus, interrupt};

/// What is the same for all files of a run.
struct Task<'a> {
    args: &'a ExpandArgs,
    registry: Arc<Registry>,
    options: ConvertOptions,
    how: Expand,
    base: Option<Checkpoint>,
    hashed: bool,
}

pub(super) fn run(args: &ExpandArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let given = context.given(&registry, &args.reading)?;
    args.to.as_deref().map(|to| registry.dialect(to)).transpose()?;
    let rule = args.ranks.rule();
    rule.map_or(Ok(()), |rule| rule.check())?;
    targets::folder(args.out_dir.as_deref())?;
    let found = sources::find(&args.inputs, args.out_dir.as_deref())?;
    let goals = targets::choose(args.output.as_deref(), args.out_dir.as_deref(), &found, "lora")?;
    targets::check(&goals, args.writing.dry_run, context.out.json, &[args.base_weights.as_deref()])?;
    let base =
        args.base_weights.as_deref().map(|path| Checkpoint::open(&registry, path, &given.families)).transpose()?;
    let options =
        ConvertOptions { from: args.reading.from.clone(), ..options("", args.reading.family.as_ref(), &args.writing) };
    let how = Expand { rule, dtype: options.dtype, lossy: options.lossy, seed: args.seed };
    let task = Task { args, registry, options, how, base, hashed: context.out.json };
    Ok(context.answer_all(&found, context.out.view, |i, input, progress| task.expand(input, &goals[i], progress)))
}

impl Task<'_> {
    fn expand(&self, input: &Input, goal: &Goal, progress: &Progress) -> Result<Plain> {
        let started = Instant::now();
        let adapter = convert::open(&self.registry, input.open(Some(progress))?, &self.options, None)?;
        let options = ConvertOptions { to: own_dialect(self.args.to.as_deref(), &adapter)?, ..self.options.clone() };
        let (plain, _) = expand(&adapter, self.base.as_ref(), &self.how, &interrupt::control())?;
        let job = Job {
            options: &options,
            goal,
            dry_run: self.args.writing.dry_run,
            force: self.args.writing.force,
            folders: self.args.out_dir.is_some(),
            many: true,
            hashed: self.hashed,
            name: &input.path,
            started,
        };
        job.run(&Composition::of(&plain), progress).map(Plain)
    }
}
