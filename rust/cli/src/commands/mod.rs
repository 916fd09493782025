//! The commands. Each reads its arguments, calls the engine, and hands answers to `output`.

mod batch;
mod check;
mod compose;
mod convert;
mod detect;
mod diff;
mod expand;
mod extract;
mod formats;
mod fuse;
mod inspect;
mod normalize;
mod parquet;
mod python;
mod quantize;
mod ray;
mod report;
mod resize;
mod sample;
mod scale;
mod shell;
mod split;
mod strengths;
mod writing;

use std::path::Path;
use std::sync::Arc;

use lorafmt_core::detect::Given;
use lorafmt_core::error::Kind;
use lorafmt_core::table::Registry;
use lorafmt_core::{Code, Error, Result, convert::given};

use crate::args::{Cli, Command, Global, Reading};
use crate::output::{self, Answer, Output, Progress, View};
use crate::sources::{Found, Input};
use crate::{ExitStatus, interrupt, pool};

/// What every command has at hand.
pub(crate) struct Context {
    pub(crate) global: Global,
    pub(crate) out: Output,
}

/// Runs the command and returns the status of the process.
pub(crate) fn dispatch(cli: Cli) -> ExitStatus {
    let mut context = Context { out: Output::new(&cli.global), global: cli.global };
    interrupt::install();
    pool::configure(context.global.jobs);
    let result = match &cli.command {
        Command::Inspect(args) => inspect::run(args, &mut context),
        Command::Detect(args) => detect::run(args, &mut context),
        Command::Check(args) => check::run(args, &mut context),
        Command::Convert(args) => convert::run(args, &mut context),
        Command::Batch(args) => batch::run(args, &mut context),
        Command::Compose(args) => compose::run(args, &mut context),
        Command::Normalize(args) => normalize::run(args, &mut context),
        Command::Resize(args) => resize::run(args, &mut context),
        Command::Scale(args) => scale::run(args, &mut context),
        Command::Expand(args) => expand::run(args, &mut context),
        Command::Fuse(args) => fuse::run(args, &mut context),
        Command::Unfuse(args) => fuse::undo(args, &mut context),
        Command::Extract(args) => extract::run(args, &mut context),
        Command::Diff(args) => diff::run(args, &mut context),
        Command::Report(args) => report::run(args, &mut context),
        Command::Quantize(args) => quantize::run(args, &context),
        Command::Sample(args) => sample::run(args, &mut context),
        Command::Formats(_) => formats::run(&mut context),
        Command::Completions(args) => shell::completions(args, &mut context),
        Command::Man(args) => shell::man(args, &mut context),
    };
    let status = result.unwrap_or_else(|error| {
        context.out.error(&error);
        output::status(&error)
    });
    context.out.finish(status)
}

impl Context {
    /// The tables: the built-in ones and those of `--table`.
    fn registry(&self) -> Result<Arc<Registry>> {
        let read =
            |path: &std::path::PathBuf| std::fs::read_to_string(path).map_err(|e| Error::io(path, "read the table", e));
        match self.global.table.as_slice() {
            [] => Ok(Registry::builtin()),
            [one] => Registry::with_tables(&[read(one)?]).map_err(|e| e.at(one)),
            several => Registry::with_tables(&several.iter().map(read).collect::<Result<Vec<_>>>()?),
        }
    }

    fn given(&self, registry: &Registry, reading: &Reading) -> Result<Given> {
        given(registry, reading.family.as_deref(), reading.from.as_deref())
    }

    /// Answers for every file, in order, and says how it went all in all.
    fn answer_all<A: Answer>(
        &mut self,
        found: &Found,
        view: View,
        work: impl Fn(usize, &Input, &Progress) -> Result<A> + Sync,
    ) -> ExitStatus {
        let inputs = &found.inputs;
        let width = inputs.iter().map(|i| i.path.to_string_lossy().chars().count()).max();
        let view = View { paths: width.unwrap_or(0), ..view };
        let progress = self.out.progress(inputs.len());
        let mut tally = Tally::default();
        let one = |i: usize| {
            if interrupt::stopped() {
                return Err(Error::new(Code::Interrupted, "interrupted"));
            }
            work(i, &inputs[i], &progress).map_err(|e| named(e, &inputs[i].path))
        };
        pool::in_order(inputs.len(), self.global.jobs, one, |i, result| {
            progress.count();
            tally.count(&result, self.global.strict);
            progress.suspend(|| match (self.out.json, found.many) {
                (false, many) => self.show(&inputs[i].path, result, &view, many),
                (true, false) => self.out.document(&document(&inputs[i].path, result, false)),
                (true, true) => self.out.element(&document(&inputs[i].path, result, true), i == 0),
            });
        });
        drop(progress);
        if self.out.json && found.many && !inputs.is_empty() {
            self.out.end_of_array();
        }
        if found.many {
            self.out.note(&tally.summary());
        }
        tally.status()
    }

    fn show<A: Answer>(&mut self, path: &Path, result: Result<A>, view: &View, many: bool) {
        match result {
            Ok(answer) => {
                let text = answer.human(view);
                if answer.aside() {
                    self.out.note(&text)
                } else {
                    self.out.answer(&text)
                }
                if !answer.says_warnings() {
                    self.out.warnings(answer.warnings(), many.then_some(path));
                }
            }
            Err(error) if output::is_closed_pipe(&error) => {}
            // Said once for all, in the summary.
            Err(error) if many && error.code() == Code::Interrupted => {}
            Err(error) => self.out.complain(&error),
        }
    }
}

/// Errors say which file they are about, unless they are about the arguments.
fn named(error: Error, path: &Path) -> Error {
    if error.code().kind() == Kind::Usage { error } else { error.at(path) }
}

/// The JSON of one file; in a list, a failure says which file it was.
fn document<A: Answer>(path: &Path, result: Result<A>, many: bool) -> serde_json::Value {
    let error = match result {
        Ok(answer) => return answer.json(),
        Err(error) => error.to_json(),
    };
    match many {
        true => serde_json::json!({"schema": 1, "path": path.to_string_lossy(), "error": error}),
        false => serde_json::json!({"schema": 1, "error": error}),
    }
}

/// How many files ended how.
#[derive(Debug, Default)]
struct Tally {
    yes: usize,
    no: usize,
    failed: usize,
    interrupted: usize,
}

impl Tally {
    fn count<A: Answer>(&mut self, result: &Result<A>, strict: bool) {
        let counter = match result {
            Ok(answer) if !answer.is_yes() || (strict && !answer.warnings().is_empty()) => &mut self.no,
            Ok(_) => &mut self.yes,
            Err(error) if output::is_closed_pipe(error) => &mut self.yes,
            Err(error) if error.code() == Code::Interrupted => &mut self.interrupted,
            Err(_) => &mut self.failed,
        };
        *counter += 1;
    }

    fn status(&self) -> ExitStatus {
        match self {
            Tally { interrupted: 1.., .. } => ExitStatus::Interrupted,
            Tally { failed: 1.., yes: 0, no: 0, .. } => ExitStatus::Failure,
            Tally { failed: 1.., .. } => ExitStatus::Partial,
            Tally { no: 1.., .. } => ExitStatus::No,
            _ => ExitStatus::Success,
        }
    }

    /// A line where not all is well.
    fn summary(&self) -> String {
        let done = self.yes + self.no;
        let all = done + self.failed + self.interrupted;
        match (self.failed, self.interrupted) {
            (0, 0) => String::new(),
            // The error has said all.
            (1, 0) if all == 1 => String::new(),
            (failed, 0) => format!("{done} of {all} files done, {failed} failed\n"),
            (_, _) => format!("interrupted: {done} of {all} files done\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_decides() {
        let tally = |yes, no, failed, interrupted| Tally { yes, no, failed, interrupted }.status();
        assert_eq!(tally(2, 0, 0, 0), ExitStatus::Success);
        assert_eq!(tally(2, 1, 0, 0), ExitStatus::No);
        assert_eq!(tally(0, 0, 1, 0), ExitStatus::Failure);
        assert_eq!(tally(0, 0, 2, 0), ExitStatus::Failure);
        assert_eq!(tally(0, 1, 1, 0), ExitStatus::Partial);
        assert_eq!(tally(5, 1, 1, 1), ExitStatus::Interrupted);
    }
}
