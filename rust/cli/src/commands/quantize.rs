//! Weights are quantized by the runtime, which is Python's: this starts it.

use std::path::Path;

use lorafmt_core::{Code, Error, Result};
use serde_json::json;

use super::{Context, python};
use crate::ExitStatus;
use crate::args::QuantizeArgs;

const PROGRAM: &str = "import sys; from lorafmt._quantize import main; sys.exit(main(sys.argv[1]))";

pub(super) fn run(args: &QuantizeArgs, context: &Context) -> Result<ExitStatus> {
    let options = json!({
        "model": text(&args.model)?,
        "out": text(&args.output)?,
        "rank": args.rank,
        "maxima": args.maxima.as_deref().map(text).transpose()?,
        "alpha": args.alpha,
        "modulation": !args.no_modulation,
        "dry_run": args.dry_run,
        "overwrite": args.force,
        "json": context.out.json,
        "quiet": context.global.quiet > 0,
        "progress": !context.global.no_progress && context.global.quiet == 0,
    });
    let mut command = python::interpreter(PROGRAM);
    command.arg(options.to_string());
    Ok(match python::status(command, "torch")? {
        Some(0) => ExitStatus::Success,
        Some(130) => ExitStatus::Interrupted,
        _ => ExitStatus::Failure,
    })
}

/// A path that goes into JSON.
fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::new(Code::InvalidArgument, "the name is not UTF-8").at(path))
}
