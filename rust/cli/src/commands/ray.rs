//! The engine of a cluster is Python's: this starts it, and tells what it says.

use std::process::Stdio;

use lorafmt_core::batch::Summary;
use lorafmt_core::{Code, Error, Result};
use serde_json::{Value, json};

use super::{Context, batch, python};
use crate::ExitStatus;
use crate::args::{BatchArgs, DtypeArg, DuplicatesArg, LossyArg, OpArg, UnknownArg};

const PROGRAM: &str = "import sys; from lorafmt._ray import main; sys.exit(main(sys.argv[1:]))";

pub(super) fn run(args: &BatchArgs, context: &mut Context) -> Result<ExitStatus> {
    if args.writing.dry_run || !args.plan.is_empty() || !context.global.table.is_empty() {
        return Err(Error::new(Code::InvalidArgument, "`--engine ray` takes no `--dry-run`, `--plan` and `--table`"));
    }
    let paths = args.files_from.iter().chain(&args.like).chain(&args.run.manifest).chain(&args.native.base);
    if let Some(path) = paths.into_iter().find(|path| path.to_str().is_none()) {
        return Err(Error::new(Code::InvalidArgument, "the name is not UTF-8").at(path));
    }
    let address = args.run.engine.strip_prefix("ray:");
    let texts = [options(args), json!(args.native.base), json!(address)].map(|value| value.to_string());
    let mut command = python::interpreter(PROGRAM);
    command.args(texts).stdout(Stdio::piped());
    let child = command.spawn().and_then(std::process::Child::wait_with_output);
    let output = child.map_err(|error| python::not_started(&command, "Ray", error))?;
    let said: Option<Summary> = output.stdout.split(|&b| b == b'\n').find_map(|line| serde_json::from_slice(line).ok());
    match said {
        Some(summary) => {
            context.out.summary(&summary, 0);
            Ok(batch::status(&summary, context.global.strict))
        }
        // Python has said why on standard error.
        None => Ok(ExitStatus::Failure),
    }
}

/// The keyword arguments of Python's `batch`, as its native part takes them.
fn options(args: &BatchArgs) -> Value {
    json!({
        "sources": args.sources,
        "files_from": args.files_from,
        "out_dir": args.out_dir,
        "op": match args.op {
            OpArg::Convert => "convert",
            OpArg::Resize => "resize",
            OpArg::Normalize => "normalize",
            OpArg::Compose => "compose",
        },
        "to": args.to,
        "name": args.name,
        "strength": args.strength,
        "like": args.like,
        "rank": args.ranks.rank,
        "energy": args.ranks.energy,
        "max_error": args.ranks.max_error,
        "from": args.reading.from,
        "family": args.reading.family,
        "dtype": match args.writing.dtype {
            Some(DtypeArg::Bf16) => "bf16",
            Some(DtypeArg::Fp16) => "fp16",
            Some(DtypeArg::Fp32) => "fp32",
            Some(DtypeArg::Keep) | None => "keep",
        },
        "unknown": match args.writing.unknown {
            UnknownArg::Error => "error",
            UnknownArg::Drop => "drop",
            UnknownArg::Keep => "keep",
        },
        "lossy": if args.writing.lossy == LossyArg::Allow { "allow" } else { "error" },
        "max_rank": args.writing.max_rank,
        "widen": args.writing.widen,
        "layout": args.native.layout.map(|l| l.layout().name()),
        "precision": args.native.precision.map(|p| p.precision().name()),
        "manifest": args.run.manifest,
        "verify_hash": args.run.verify_hash,
        "hash": args.run.hash,
        "max_failures": args.run.max_failures,
        "duplicates": match args.run.duplicates {
            DuplicatesArg::Link => "link",
            DuplicatesArg::Copy => "copy",
            DuplicatesArg::Convert => "convert",
        },
        "workers": args.run.workers,
        "overwrite": args.writing.force,
    })
}
