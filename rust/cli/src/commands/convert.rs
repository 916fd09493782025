use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::{Composition, Unknown};
use lorafmt_core::convert::{self, ConvertOptions, Target, is_folder_name};
use lorafmt_core::io::{Layout, WriteOptions};
use lorafmt_core::report::{Report, Warning};
use lorafmt_core::table::{AlphaPolicy, Dialect, Registry};
use lorafmt_core::{Code, Error, Result};

use super::Context;
use crate::args::{ConvertArgs, LossyArg, UnknownArg};
use crate::output::{self, Converted, Progress};
use crate::sources::{self, Input};
use crate::targets::{self, Goal};
use crate::{ExitStatus, interrupt};

/// What is the same for all files of a run.
struct Task<'a> {
    args: &'a ConvertArgs,
    registry: Arc<Registry>,
    options: ConvertOptions,
    /// Number of the dialect.
    dialect: usize,
    /// Whether the reports tell the hashes of the sources.
    hashed: bool,
}

pub(super) fn run(args: &ConvertArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let dialect = registry.dialect(&args.to)?;
    context.given(&registry, &args.reading)?;
    if !args.strength.is_finite() {
        return Err(Error::new(Code::InvalidArgument, format!("a strength of {} makes no sense", args.strength)));
    }
    let found = sources::find(&args.inputs, args.out_dir.as_deref())?;
    let goals = targets::choose(args, &found, &registry.dialects[dialect].name)?;
    if context.out.json && !args.dry_run && goals.contains(&Goal::Stdout) {
        let error = Error::new(Code::InvalidArgument, "`--json` and `-o -` both write to standard output");
        return Err(error.hint("name a file with `-o`"));
    }
    let task = Task { args, registry, options: options(args), dialect, hashed: context.out.json };
    let work = |i: usize, input: &Input, progress: &Progress| task.convert(input, &goals[i], progress);
    Ok(context.answer_all(&found, context.out.view, work))
}

fn options(args: &ConvertArgs) -> ConvertOptions {
    ConvertOptions {
        to: args.to.clone(),
        from: args.reading.from.clone(),
        family: args.reading.family.clone(),
        dtype: args.dtype.dtype(),
        strength: args.strength,
        unknown: match args.unknown {
            UnknownArg::Error => Unknown::Error,
            UnknownArg::Drop => Unknown::Drop,
            UnknownArg::Keep => Unknown::Keep,
        },
        lossy: args.lossy == LossyArg::Allow,
        ..ConvertOptions::default()
    }
}

impl Task<'_> {
    fn dialect(&self) -> &Dialect {
        &self.registry.dialects[self.dialect]
    }

    fn convert(&self, input: &Input, goal: &Goal, progress: &Progress) -> Result<Converted> {
        let started = Instant::now();
        let adapter = convert::open(&self.registry, input.open()?, &self.options)?;
        let adapter = &adapter;
        // Every byte is read for the hash; that takes as long as the conversion, so both happen at once.
        let (report, sha256) = std::thread::scope(|scope| {
            let hash = self.hashed.then(|| scope.spawn(|| adapter.source.sha256()));
            let report = match self.args.dry_run {
                true => self.plan(adapter, goal),
                false => self.write(adapter, goal, input, progress),
            };
            let report = report.map(|mut converted| {
                converted.report.seconds = started.elapsed().as_secs_f64();
                converted
            });
            (report, hash.and_then(|h| h.join().ok().flatten()))
        });
        let mut converted = report?;
        converted.report.source.sha256 = sha256;
        Ok(converted)
    }

    fn write(&self, adapter: &Adapter, goal: &Goal, input: &Input, progress: &Progress) -> Result<Converted> {
        let control = interrupt::control();
        control.check()?;
        progress.begin(&input.path.to_string_lossy(), &control);
        let result = match goal {
            Goal::Stdout => output::binary().and_then(|mut out| {
                convert::convert(&Composition::of(adapter), &self.options, Target::Stream(&mut out), &control)
            }),
            Goal::File(path) => self.make_folder(path).and_then(|()| {
                let write = WriteOptions { overwrite: self.args.force };
                convert::convert(&Composition::of(adapter), &self.options, Target::File(path, write), &control)
            }),
        };
        progress.end(&control);
        Ok(converted(adapter, result?, *goal == Goal::Stdout))
    }

    /// Folders are only made below `--out-dir`.
    fn make_folder(&self, path: &Path) -> Result<()> {
        match path.parent() {
            Some(folder) if self.args.out_dir.is_some() => {
                std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create the folder", e))
            }
            _ => Ok(()),
        }
    }

    fn plan(&self, adapter: &Adapter, goal: &Goal) -> Result<Converted> {
        let path = match goal {
            Goal::File(path) => path.as_path(),
            Goal::Stdout => Path::new("-"),
        };
        let folder = *goal != Goal::Stdout && self.dialect().alpha == AlphaPolicy::Config && is_folder_name(path);
        let composition = Composition::of(adapter);
        let plan = convert::plan(&composition, &self.options, folder)?;
        let bytes = Layout::new(&plan.outputs, &plan.metadata).len();
        let mut report = convert::report(&composition, &plan, &self.dialect().name, bytes);
        let exists = if folder { path.join("adapter_model.safetensors") } else { path.to_path_buf() };
        if !self.args.force && exists.symlink_metadata().is_ok() {
            let detail = "the output exists already; without `--force` nothing would be written";
            report.warnings.push(Warning::new(Code::OutputExists.as_str(), None, detail));
        }
        let planned = output::planned(&plan, path.to_string_lossy().into_owned());
        let mut converted = converted(adapter, report, *goal == Goal::Stdout);
        converted.planned = Some(planned);
        Ok(converted)
    }
}

fn converted(adapter: &Adapter, report: Report, stdout: bool) -> Converted {
    // Parts of one fused module share its tensors, so its first tensor tells how many modules the file has.
    let firsts: BTreeSet<usize> = adapter.modules.values().filter_map(|p| p.module.inputs.first().copied()).collect();
    Converted { report, modules: firsts.len(), stdout, planned: None }
}
