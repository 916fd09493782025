use std::sync::Arc;

use lorafmt_core::Result;
use lorafmt_core::cast::Loss;
use lorafmt_core::io::{Layout, Source, WriteOptions, write_file, write_to};
use lorafmt_core::plan::Output;
use lorafmt_core::sample::{SampleOptions, sample};
use lorafmt_core::tensor::Tensor;

use super::Context;
use crate::args::SampleArgs;
use crate::output::{self, Sampled};
use crate::sources::{Found, Input};
use crate::targets::{Goal, check, explicit};
use crate::{ExitStatus, interrupt};

pub(super) fn run(args: &SampleArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let goal = explicit(&args.output)?;
    check(std::slice::from_ref(&goal), args.dry_run, context.out.json, &[])?;
    let options = SampleOptions {
        family: args.family.clone(),
        dialect: args.dialect.clone(),
        rank: args.rank,
        alpha: args.alpha,
        dtype: args.dtype.dtype(),
        seed: args.seed,
        top_level: args.top_level,
        text_encoders: args.text_encoders,
    };
    let dialect = registry.dialects[registry.dialect(&args.dialect)?].name.clone();
    let family = registry.families[registry.family(&args.family)?].name.clone();
    let found = Found { inputs: vec![Input::new(&args.output)], many: false };
    Ok(context.answer_all(&found, context.out.view, |_, input, progress| {
        let source = Arc::new(sample(&registry, &options)?);
        let outputs = outputs(&source);
        let layout = Layout::new(&outputs, source.metadata());
        let control = interrupt::control();
        progress.begin(&input.path.to_string_lossy(), &control);
        let written = match &goal {
            _ if args.dry_run => Ok(Loss::default()),
            Goal::Stdout => output::binary().and_then(|mut out| write_to(&mut out, &layout, &control)),
            Goal::File(path) => write_file(path, &layout, WriteOptions { overwrite: args.force }, &control),
        };
        progress.end(&control);
        written?;
        Ok(Sampled {
            path: input.path.to_string_lossy().into_owned(),
            dialect: dialect.clone(),
            family: family.clone(),
            rank: args.rank,
            seed: args.seed,
            tensors: outputs.len(),
            bytes: layout.len() as u64,
            dry_run: args.dry_run,
        })
    }))
}

/// Every tensor under its own name.
fn outputs(source: &Arc<Source>) -> Vec<Output> {
    let output = |(i, info): (usize, &lorafmt_core::io::TensorInfo)| Output {
        key: info.name.clone(),
        tensor: Tensor::input(source, i),
    };
    source.tensors().iter().enumerate().map(output).collect()
}
