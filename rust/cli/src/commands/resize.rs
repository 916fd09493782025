use std::sync::Arc;
use std::time::Instant;

use lorafmt_core::compose::Composition;
use lorafmt_core::convert::{self, ConvertOptions};
use lorafmt_core::encode::Algebra;
use lorafmt_core::ops::resize::{Budget, Criterion, Method, RankRule, Resize, Target};
use lorafmt_core::strength::Selector;
use lorafmt_core::table::Registry;
use lorafmt_core::{Code, Error, Result};

use super::Context;
use super::writing::{Job, options, own_dialect};
use crate::ExitStatus;
use crate::args::{ResizeArgs, ResizeMethod};
use crate::output::{Converted, Progress};
use crate::sources::{self, Input};
use crate::targets::{self, Goal};

/// What is the same for all files of a run.
struct Task<'a> {
    args: &'a ResizeArgs,
    registry: Arc<Registry>,
    options: ConvertOptions,
    hashed: bool,
}

pub(super) fn run(args: &ResizeArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    context.given(&registry, &args.reading)?;
    args.to.as_deref().map(|to| registry.dialect(to)).transpose()?;
    let resize = resize(args)?;
    targets::folder(args.out_dir.as_deref())?;
    let found = sources::find(&args.inputs, args.out_dir.as_deref())?;
    let goals = targets::choose(args.output.as_deref(), args.out_dir.as_deref(), &found, &ending(args))?;
    targets::check(&goals, args.writing.dry_run, context.out.json, &[])?;
    let options = ConvertOptions {
        from: args.reading.from.clone(),
        algebra: Algebra { resize: Some(resize), ..Algebra::default() },
        ..options("", args.reading.family.as_ref(), &args.writing)
    };
    let task = Task { args, registry, options, hashed: context.out.json };
    Ok(context.answer_all(&found, context.out.view, |i, input, progress| task.resize(input, &goals[i], progress)))
}

/// What the options ask for.
fn resize(args: &ResizeArgs) -> Result<Resize> {
    let places =
        args.rank_at.iter().map(|at| Ok((Selector::parse(&at.selector)?, at.rank))).collect::<Result<Vec<_>>>()?;
    let kohyas = args
        .sv_ratio
        .map(Criterion::SvRatio)
        .or(args.sv_fro.map(Criterion::SvFro))
        .or(args.sv_cumulative.map(Criterion::SvCumulative));
    let budget = args.bytes.map(|n| Budget::Bytes(n.0)).or(args.mean_rank.map(Budget::MeanRank));
    let rule = match (args.ranks.rule(), kohyas) {
        (rule, None) => rule,
        (rule, criterion) => Some(RankRule { criterion, ..rule.unwrap_or_default() }),
    };
    let target = match (budget, rule) {
        (Some(budget), _) => Target::Budget(budget),
        (None, Some(rule)) => Target::Rule(rule),
        (None, None) if !places.is_empty() => Target::Rule(RankRule::default()),
        (None, None) => {
            return Err(Error::new(Code::InvalidArgument, "no rank is given")
                .hint("add `--rank N`, `--energy E`, `--max-error E`, `--bytes N` or `--mean-rank N`"));
        }
    };
    let method = match args.method {
        ResizeMethod::Svd => Method::Svd,
        ResizeMethod::Rsvd => Method::Rsvd { niter: args.niter, oversample: args.oversample },
        ResizeMethod::Random => Method::Random,
        ResizeMethod::SparseRandom => Method::SparseRandom(args.density),
        ResizeMethod::Pad => Method::Pad,
        ResizeMethod::Orthogonal => Method::Orthogonal,
    };
    let resize = Resize { methods: vec![method], target, places, seed: args.seed };
    resize.check()?;
    Ok(resize)
}

/// The end of the output's name.
fn ending(args: &ResizeArgs) -> String {
    match (args.ranks.rank, args.ranks.energy.is_some() || args.ranks.max_error.is_some()) {
        (Some(rank), false) => format!("r{rank}"),
        _ => "resized".to_owned(),
    }
}

impl Task<'_> {
    fn resize(&self, input: &Input, goal: &Goal, progress: &Progress) -> Result<Converted> {
        let started = Instant::now();
        let adapter = convert::open(&self.registry, input.open(Some(progress))?, &self.options, None)?;
        let options = ConvertOptions { to: own_dialect(self.args.to.as_deref(), &adapter)?, ..self.options.clone() };
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
        job.run(&Composition::of(&adapter), progress)
    }
}
