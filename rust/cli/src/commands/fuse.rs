use std::path::Path;
use std::time::Instant;

use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::{Composition, Unknown};
use lorafmt_core::convert::ConvertOptions;
use lorafmt_core::weights::{FuseOptions, UnfuseOptions, fuse, open_behind, unfuse};
use lorafmt_core::{Code, Error, Result};

use super::Context;
use super::compose::Ingredients;
use crate::args::{FuseArgs, LossyArg, UnfuseArgs, UnknownArg};
use crate::output::{Fused, Progress, Unfused};
use crate::sources::{Found, Input};
use crate::{ExitStatus, interrupt};

pub(super) fn run(args: &FuseArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let family = args.family.as_deref().map(|name| registry.sizes(name)).transpose()?.unwrap_or_default();
    refuse_streams(&args.output)?;
    args.undo.as_deref().map_or(Ok(()), refuse_streams)?;
    let ingredients = Ingredients::of(&args.sources, &args.places)?;
    let options = FuseOptions {
        lossy: args.lossy == LossyArg::Allow,
        unknown: match args.unknown {
            UnknownArg::Error => Unknown::Error,
            UnknownArg::Drop => Unknown::Drop,
            UnknownArg::Keep => Unknown::Keep,
        },
        rescale: args.rescale,
        stochastic: args.stochastic,
        undo: args.undo.clone(),
        dry_run: args.dry_run,
        overwrite: args.force,
    };
    let reading = ConvertOptions { family: args.family.clone(), ..ConvertOptions::default() };
    let found = Found { inputs: vec![Input::new(&args.output)], many: false };
    Ok(context.answer_all(&found, context.out.view, |_, input, progress| {
        let started = Instant::now();
        let adapters = ingredients.open(&registry, &reading, None, Some(progress))?;
        let adapters: Vec<&Adapter> = adapters.iter().collect();
        let (checkpoint, agreed) = open_behind(&registry, &args.base, &family, &adapters)?;
        let composition = Composition::new(ingredients.terms(&agreed)?)?;
        let mut report =
            watched(progress, &input.path, |control| fuse(&checkpoint, &composition, &args.output, &options, control))?;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(Fused { report, output: args.output.to_string_lossy().into_owned(), dry_run: args.dry_run })
    }))
}

pub(super) fn undo(args: &UnfuseArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    refuse_streams(&args.output)?;
    let options = UnfuseOptions { dry_run: args.dry_run, overwrite: args.force };
    let found = Found { inputs: vec![Input::new(&args.output)], many: false };
    Ok(context.answer_all(&found, context.out.view, |_, input, progress| {
        let report = watched(progress, &input.path, |control| {
            unfuse(&registry, &args.fused, &args.undo, &args.output, &options, control)
        })?;
        Ok(Unfused { report, output: args.output.to_string_lossy().into_owned() })
    }))
}

/// Runs `work` with a bar.
pub(super) fn watched<T>(
    progress: &Progress,
    name: &Path,
    work: impl FnOnce(&lorafmt_core::io::Control) -> Result<T>,
) -> Result<T> {
    let control = interrupt::control();
    control.check()?;
    progress.begin(&name.to_string_lossy(), &control);
    let done = work(&control);
    progress.end(&control);
    done
}

/// A checkpoint is written at its places, not in order.
fn refuse_streams(output: &Path) -> Result<()> {
    let device = output.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir());
    match output.as_os_str() == "-" || device {
        true => Err(Error::new(Code::InvalidArgument, "a checkpoint is not written to a stream")
            .at(output)
            .hint("name a file or a folder")),
        false => Ok(()),
    }
}
