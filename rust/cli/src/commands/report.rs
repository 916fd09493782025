use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use lorafmt_core::io::{Pending, WriteOptions, refuse_existing};
use lorafmt_core::library::{FileRecord, Library, Survey, survey};
use lorafmt_core::{Error, Result, page};

use super::Context;
use crate::args::ReportArgs;
use crate::output::{Surveyed, binary};
use crate::sources;
use crate::targets::{self, Goal};
use crate::{ExitStatus, interrupt};

pub(super) fn run(args: &ReportArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let how = Survey { weights: !args.no_weights, given: context.given(&registry, &args.reading)? };
    let found = sources::find(&args.inputs, None)?;
    let goal = args.output.as_deref().map(targets::explicit).transpose()?;
    let options = WriteOptions { overwrite: args.force };
    let paths: Vec<&Path> = found.inputs.iter().map(|i| i.path.as_path()).collect();
    let inputs: Vec<Option<&Path>> = paths.iter().copied().map(Some).collect();
    targets::check(goal.as_slice(), args.dry_run, context.out.json, &inputs)?;
    if let (Some(Goal::File(path)), false) = (&goal, args.dry_run) {
        refuse_existing(path, options)?;
    }
    let control = interrupt::control();
    let progress = context.out.progress(paths.len());
    let open = |i: usize| found.inputs[i].open(Some(&progress)).map(Arc::new);
    let library = survey(&registry, &paths, open, &how, &control, |_| progress.count());
    drop(progress);
    let library = library?;
    let surveyed = Surveyed { library: &library, output: args.output.as_deref(), dry_run: args.dry_run };
    if let (Some(goal), false) = (&goal, args.dry_run) {
        write(goal, &page::html(&library), options)?;
    }
    if context.out.json {
        context.out.document(&surveyed.json());
    } else {
        let view = context.out.view;
        context.out.note(&surveyed.failures(&view));
        let text = surveyed.human(&view);
        if goal == Some(Goal::Stdout) && !args.dry_run { context.out.note(&text) } else { context.out.answer(&text) }
    }
    Ok(status(&library, context.global.strict))
}

fn write(goal: &Goal, html: &str, options: WriteOptions) -> Result<()> {
    match goal {
        Goal::File(path) => Pending::text(path, html)?.commit(options),
        Goal::Stdout => {
            let mut out = binary()?;
            let written = out.write_all(html.as_bytes()).and_then(|()| out.flush());
            written.map_err(|e| Error::io(Path::new("-"), "write the output", e))
        }
    }
}

/// As for all commands: files that failed count, what is wrong with the others is the answer.
fn status(library: &Library, strict: bool) -> ExitStatus {
    let (all, failed) = (library.totals.files, library.totals.failed);
    let clean = |f: &FileRecord| f.worst().is_none_or(|level| level < lorafmt_core::library::Level::Warning);
    match failed {
        0 if strict && !library.files.iter().all(clean) => ExitStatus::No,
        0 => ExitStatus::Success,
        _ if failed == all => ExitStatus::Failure,
        _ => ExitStatus::Partial,
    }
}
