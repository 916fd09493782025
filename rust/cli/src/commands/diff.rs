use std::path::Path;
use std::sync::Arc;

use lorafmt_core::adapter::Adapter;
use lorafmt_core::decode::decode;
use lorafmt_core::detect::Given;
use lorafmt_core::ops::diff;
use lorafmt_core::{Code, Error, Result};

use super::Context;
use super::writing::open_base;
use crate::ExitStatus;
use crate::args::{ByArg, DiffArgs};
use crate::output::differences;
use crate::sources::Input;

pub(super) fn run(args: &DiffArgs, context: &mut Context) -> Result<ExitStatus> {
    if !(args.tolerance.is_finite() && args.tolerance >= 0.0) {
        return Err(Error::new(Code::InvalidArgument, format!("a tolerance of {} makes no sense", args.tolerance)));
    }
    let (a, b) = (Input::new(&args.a), Input::new(&args.b));
    if a.is_stdin() && b.is_stdin() {
        return Err(Error::new(Code::InvalidArgument, "standard input can be read only once"));
    }
    let registry = context.registry()?;
    let base = open_base(&registry, args.base.as_deref())?;
    let given = Given { base, ..context.given(&registry, &args.reading)? };
    let open = |input: Input| match input.open(None) {
        Ok(source) => decode(&registry, &Arc::new(source), &given),
        Err(error) if error.code() == Code::IsADirectory => Err(error.hint("name a file, or a PEFT folder")),
        Err(error) => Err(error),
    };
    let (a, b) = (open(a)?, open(b)?);
    let mut report = diff(&a, &b, args.tolerance)?;
    if args.by != Some(ByArg::Module) {
        report.by_module.clear();
    }
    if context.out.json {
        context.out.document(&serde_json::to_value(&report).unwrap_or_default());
    } else {
        let view = context.out.view;
        context.out.answer(&differences(&report, args.by, &view));
    }
    let warned = |adapter: &Adapter, path: &Path| {
        context.out.warnings(&adapter.warnings, Some(path));
        !adapter.warnings.is_empty()
    };
    let warned = [warned(&a, &args.a), warned(&b, &args.b)].contains(&true);
    Ok(if report.equal && !(warned && context.global.strict) { ExitStatus::Success } else { ExitStatus::No })
}
