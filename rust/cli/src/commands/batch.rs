use std::path::{Path, PathBuf};
use std::sync::Arc;

use lorafmt_core::batch::{self, BatchOptions, Duplicates, Listing, Naming, Op, Request, Sources, Step, Stop, Summary};
use lorafmt_core::convert::ConvertOptions;
use lorafmt_core::io::Store;
use lorafmt_core::table::Registry;
use lorafmt_core::{Code, Error, Result};
use lorafmt_remote::is_remote;

use super::writing::{native_options, open_base, options};
use super::{Context, parquet, ray};
use crate::ExitStatus;
use crate::args::{BatchArgs, DuplicatesArg, OpArg};
use crate::output::Watch;
use crate::sources::remote;

pub(super) fn run(args: &BatchArgs, context: &mut Context) -> Result<ExitStatus> {
    let table = args.run.parquet.as_deref().filter(|_| !args.writing.dry_run);
    table.map(|table| parquet::ready(table, args.writing.force)).transpose()?;
    let status = match args.run.engine.as_str() {
        "local" => here(args, context)?,
        engine if engine == "ray" || engine.starts_with("ray:") => ray::run(args, context)?,
        other => {
            return Err(Error::new(Code::InvalidArgument, format!("no engine is called `{other}`"))
                .hint("one of: local, ray, ray:ADDRESS"));
        }
    };
    table.map(|table| parquet::write(&manifest(args)?, table)).transpose()?;
    Ok(status)
}

/// On this machine.
fn here(args: &BatchArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let (step, ending) = step(args, context, &registry)?;
    let naming = Naming::new(args.name.as_deref(), &ending)?;
    let store = store(args)?;
    let sources = Sources {
        named: args.sources.clone(),
        lists: args.files_from.clone(),
        plans: args.plan.clone(),
        wanted: step.wanted(),
    };
    let listing = Listing::of(&sources, &naming, &args.out_dir, store)?;
    if args.writing.dry_run {
        return dry_run(&listing, context);
    }
    let options = BatchOptions {
        out: args.out_dir.clone(),
        manifest: manifest(args)?,
        force: args.writing.force,
        verify: args.run.verify_hash,
        max_failures: args.run.max_failures,
        workers: args.run.workers.map(Into::into),
        duplicates: match args.run.duplicates {
            DuplicatesArg::Link => Duplicates::Link,
            DuplicatesArg::Copy => Duplicates::Copy,
            DuplicatesArg::Convert => Duplicates::Convert,
        },
        hash: args.run.hash,
    };
    let watch = Watch::new(&context.out, listing.files);
    let summary = batch::run(&listing, &step, &options, store, &watch)?;
    drop(watch);
    context.out.summary(&summary, listing.others);
    Ok(status(&summary, context.global.strict))
}

/// What is done with each file, and how outputs end.
fn step(args: &BatchArgs, context: &Context, registry: &Arc<Registry>) -> Result<(Step, String)> {
    let base = open_base(registry, args.native.base.as_deref())?;
    let options = ConvertOptions {
        from: args.reading.from.clone(),
        strength: args.strength,
        native: native_options(&args.native, base.as_ref()),
        ..options(args.to.as_deref().unwrap_or(""), args.reading.family.as_ref(), &args.writing)
    };
    let op = match args.op {
        OpArg::Convert => Op::Convert,
        OpArg::Resize => Op::Resize,
        OpArg::Normalize => Op::Normalize,
        OpArg::Compose => Op::Compose,
    };
    let request =
        Request { op, options, rule: args.ranks.rule(), like: args.like.clone(), base, tables: tables(context)? };
    request.step(registry)
}

/// User tables decide what is made, too.
pub(super) fn tables(context: &Context) -> Result<String> {
    let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(|e| Error::io(path, "read the table", e));
    context.global.table.iter().map(read).collect()
}

/// Beside the outputs, unless those are elsewhere.
fn manifest(args: &BatchArgs) -> Result<PathBuf> {
    match &args.run.manifest {
        Some(path) => Ok(path.clone()),
        None if args.out_dir.contains("://") => {
            Err(Error::new(Code::InvalidArgument, "outputs go to a store, and records need a local file")
                .hint("name it with `--manifest FILE`"))
        }
        None => Ok(Path::new(&args.out_dir).join("manifest.jsonl")),
    }
}

/// What reads and writes addresses, if there can be any: lists, plans and recipes show them only when they are read.
fn store(args: &BatchArgs) -> Result<Option<&'static dyn Store>> {
    let hidden = !args.files_from.is_empty() || !args.plan.is_empty() || args.op == OpArg::Compose;
    let named = args.sources.iter().chain([&args.out_dir]).any(|name| is_remote(name));
    (hidden || named).then(|| remote().map(|r| r as &dyn Store)).transpose()
}

fn dry_run(listing: &Listing, context: &mut Context) -> Result<ExitStatus> {
    for entry in listing.entries()? {
        context.out.planned(&entry?);
    }
    Ok(ExitStatus::Success)
}

pub(super) fn status(summary: &Summary, strict: bool) -> ExitStatus {
    let well = summary.done + summary.linked + summary.unchanged + summary.skipped;
    match summary {
        Summary { stopped: Some(Stop::Interrupted), .. } => ExitStatus::Interrupted,
        Summary { failed: 1.., .. } if well == 0 => ExitStatus::Failure,
        Summary { failed: 1.., .. } | Summary { stopped: Some(_), .. } => ExitStatus::Partial,
        Summary { warned: 1.., .. } if strict => ExitStatus::No,
        _ => ExitStatus::Success,
    }
}
