use std::path::Path;
use std::sync::Arc;

use lorafmt_core::check::{CheckReport, check};
use lorafmt_core::error::Kind;
use lorafmt_core::{Error, Result};

use super::Context;
use crate::ExitStatus;
use crate::args::CheckArgs;
use crate::sources;

pub(super) fn run(args: &CheckArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let given = context.given(&registry, &args.reading)?;
    let found = sources::find(&args.inputs, None)?;
    Ok(context.answer_all(&found, context.out.view, |_, input, progress| {
        let result = input.open(Some(progress)).and_then(|source| check(&registry, &Arc::new(source), &given));
        result.or_else(|error| answer(error, &input.path))
    }))
}

/// Bytes that could be read and are not what they should be: that is what was asked, and the answer is no.
fn answer(error: Error, path: &Path) -> Result<CheckReport> {
    if error.code().kind() != Kind::Format {
        return Err(error);
    }
    Ok(CheckReport {
        schema: 1,
        path: path.to_string_lossy().into_owned(),
        ok: false,
        tensors: 0,
        modules: 0,
        problems: vec![error.to_json()],
        warnings: Vec::new(),
    })
}
