use std::sync::Arc;
use std::time::Instant;

use lorafmt_core::Result;
use lorafmt_core::compose::Composition;
use lorafmt_core::convert::{self, ConvertOptions};
use lorafmt_core::error::{Code, Error};
use lorafmt_core::native::Base;
use lorafmt_core::table::Registry;

use super::writing::{Job, native_options, open_base, options};
use super::{Context, split};
use crate::ExitStatus;
use crate::args::ConvertArgs;
use crate::output::{Converted, Progress};
use crate::sources::{self, Input};
use crate::targets::{self, Goal};

/// What is the same for all files of a run.
pub(super) struct Task<'a> {
    pub(super) args: &'a ConvertArgs,
    pub(super) registry: Arc<Registry>,
    pub(super) options: ConvertOptions,
    pub(super) base: Option<Arc<Base>>,
    /// Whether the reports tell the hashes of the sources.
    pub(super) hashed: bool,
}

pub(super) fn run(args: &ConvertArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let dialect = registry.dialect(&args.to)?;
    context.given(&registry, &args.reading)?;
    if !args.strength.is_finite() {
        return Err(Error::new(Code::InvalidArgument, format!("a strength of {} makes no sense", args.strength)));
    }
    targets::folder(args.out_dir.as_deref())?;
    let found = sources::find(&args.inputs, args.out_dir.as_deref())?;
    let goals = match args.split {
        true => Vec::new(),
        false => {
            let name = &registry.dialects[dialect].name;
            targets::choose(args.output.as_deref(), args.out_dir.as_deref(), &found, name)?
        }
    };
    targets::check(&goals, args.writing.dry_run, context.out.json, &[args.native.base.as_deref()])?;
    let base = open_base(&registry, args.native.base.as_deref())?;
    let options = ConvertOptions {
        from: args.reading.from.clone(),
        strength: args.strength,
        native: native_options(&args.native, base.as_ref()),
        ..options(&args.to, args.reading.family.as_ref(), &args.writing)
    };
    let task = Task { args, registry, options, base, hashed: context.out.json };
    if args.split {
        return split::run(&task, &found, context);
    }
    let work = |i: usize, input: &Input, progress: &Progress| task.convert(input, &goals[i], progress);
    Ok(context.answer_all(&found, context.out.view, work))
}

impl Task<'_> {
    fn convert(&self, input: &Input, goal: &Goal, progress: &Progress) -> Result<Converted> {
        let started = Instant::now();
        let adapter = convert::open(&self.registry, input.open(Some(progress))?, &self.options, self.base.clone())?;
        self.job(&self.options, goal, input, started).run(&Composition::of(&adapter), progress)
    }

    pub(super) fn job<'j>(
        &self,
        options: &'j ConvertOptions,
        goal: &'j Goal,
        input: &'j Input,
        started: Instant,
    ) -> Job<'j> {
        Job {
            options,
            goal,
            dry_run: self.args.writing.dry_run,
            force: self.args.writing.force,
            folders: self.args.out_dir.is_some(),
            many: true,
            hashed: self.hashed,
            name: &input.path,
            started,
        }
    }
}
