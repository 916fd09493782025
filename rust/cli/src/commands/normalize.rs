use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::{Composition, agree};
use lorafmt_core::convert::{self, ConvertOptions};
use lorafmt_core::encode::Algebra;
use lorafmt_core::io::Source;
use lorafmt_core::ops::KeySet;
use lorafmt_core::ops::resize::{Method, RankRule, Resize, Target};
use lorafmt_core::report::Warning;
use lorafmt_core::{Error, Result};
use rayon::prelude::*;

use super::Context;
use super::writing::{Job, options};
use crate::ExitStatus;
use crate::args::NormalizeArgs;
use crate::output::{Converted, Progress};
use crate::sources::{self, Input};
use crate::targets::{self, Goal};

/// What is the same for all files of a run.
struct Task<'a> {
    args: &'a NormalizeArgs,
    options: ConvertOptions,
    keys: KeySet,
    /// What there is to say about all files together.
    warning: Option<Warning>,
    hashed: bool,
}

pub(super) fn run(args: &NormalizeArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    context.given(&registry, &args.reading)?;
    let to = args.to.as_deref().unwrap_or(&registry.dialects[0].name);
    registry.dialect(to)?;
    let resize = Resize {
        methods: vec![Method::Svd, Method::Pad],
        target: Target::Rule(RankRule::fixed(args.rank)),
        places: Vec::new(),
        seed: 0,
    };
    resize.check()?;
    targets::folder(Some(&args.out_dir))?;
    let found = sources::find(&args.inputs, Some(&args.out_dir))?;
    let goals = targets::choose(None, Some(&args.out_dir), &found, &format!("r{}", args.rank))?;
    targets::check(&goals, args.writing.dry_run, context.out.json, &[args.like.as_deref()])?;
    let options = ConvertOptions {
        from: args.reading.from.clone(),
        algebra: Algebra { resize: Some(resize), ..Algebra::default() },
        ..options(to, args.reading.family.as_ref(), &args.writing)
    };
    let open = |source: Result<Source>, path: &Path| {
        source.and_then(|s| convert::open(&registry, s, &options, None)).map_err(|e| e.at(path))
    };
    let opened: Vec<Result<Adapter>> = found.inputs.par_iter().map(|i| open(i.open(None), &i.path)).collect();
    let like = args.like.as_deref().map(|path| open(Input::new(path).open(None), path)).transpose()?;
    let good: Vec<&Adapter> = opened.iter().flatten().chain(&like).collect();
    let agreed = agree(&good)?;
    same_family(&agreed)?;
    let keys = match &like {
        Some(_) => KeySet::union(agreed.last().map(AsRef::as_ref).into_iter())?,
        None => KeySet::union(agreed.iter().map(AsRef::as_ref))?,
    };
    let warning = mixed_types(&agreed).filter(|_| options.dtype.is_none());
    let mut agreed = agreed.into_iter();
    let adapters: Vec<Result<Cow<'_, Adapter>, &Error>> =
        opened.iter().map(|o| o.as_ref().map(|_| agreed.next().expect("one for each that was opened"))).collect();
    let task = Task { args, options, keys, warning, hashed: context.out.json };
    Ok(context.answer_all(&found, context.out.view, |i, input, progress| match &adapters[i] {
        Ok(adapter) => task.normalize(adapter, input, &goals[i], progress),
        Err(error) => Err(error.duplicate()),
    }))
}

/// Adapters to different models have no keys in common.
fn same_family(adapters: &[Cow<'_, Adapter>]) -> Result<()> {
    let terms = adapters.iter().map(|a| lorafmt_core::compose::Term::new(a, 1.0.into()));
    if adapters.is_empty() { Ok(()) } else { Composition::new(terms.collect()).map(drop) }
}

/// Factors of several types are no obstacle here, but one for the programs that swap them.
fn mixed_types(adapters: &[Cow<'_, Adapter>]) -> Option<Warning> {
    let modules = adapters.iter().flat_map(|a| a.modules.values());
    let types: BTreeSet<&str> = modules.flat_map(|p| p.module.tensors.values().map(|t| t.dtype().name())).collect();
    (types.len() > 1).then(|| {
        let all = types.into_iter().collect::<Vec<_>>().join(", ");
        Warning::new("mixed-dtypes", None, format!("the files hold {all}; `--dtype` gives all of them one"))
    })
}

impl Task<'_> {
    fn normalize(&self, adapter: &Adapter, input: &Input, goal: &Goal, progress: &Progress) -> Result<Converted> {
        let started = Instant::now();
        let (adapter, added) = self.keys.complete(adapter)?;
        let job = Job {
            options: &self.options,
            goal,
            dry_run: self.args.writing.dry_run,
            force: self.args.writing.force,
            folders: true,
            many: true,
            hashed: self.hashed,
            name: &input.path,
            started,
        };
        let mut done = job.run(&Composition::of(&adapter), progress)?;
        if added > 0 {
            let detail = format!("{added} of {} modules were added as zeros", self.keys.len());
            done.report.warnings.push(Warning::new("added-modules", None, detail));
        }
        done.report.warnings.extend(self.warning.clone());
        Ok(done)
    }
}
