//! The only place that prints. Answers go to standard output, as text or as one JSON document; everything else goes to
//! standard error.

mod batch;
mod check;
mod convert;
mod detect;
mod diff;
mod errors;
mod expand;
mod extract;
mod formats;
mod fuse;
mod inspect;
mod progress;
mod ranks;
mod report;
mod sample;
mod text;
mod weights;

use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;

use anstream::{AutoStream, ColorChoice};
use lorafmt_core::error::Kind;
use lorafmt_core::report::Warning;
use lorafmt_core::{Code, Error};
use serde_json::{Value, json};

use crate::ExitStatus;
use crate::args::{ColorArg, Global};

pub(crate) use batch::Watch;
pub(crate) use convert::{Converted, Part, planned};
pub(crate) use detect::Detected;
pub(crate) use diff::differences;
pub(crate) use errors::usage;
pub(crate) use expand::Plain;
pub(crate) use extract::ExtractedAdapter;
pub(crate) use formats::{machine, matrix};
pub(crate) use fuse::{Fused, Unfused};
pub(crate) use progress::Progress;
pub(crate) use report::Surveyed;
pub(crate) use sample::Sampled;

/// How much is shown, and for whom.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct View {
    /// Show what is otherwise cut short.
    pub(crate) verbose: bool,
    /// Show no more than is asked for.
    pub(crate) quiet: bool,
    /// Show all metadata.
    pub(crate) meta: bool,
    /// Standard output is a terminal.
    pub(crate) terminal: bool,
    /// Width of the longest path.
    pub(crate) paths: usize,
}

/// What a command says of one file.
pub(crate) trait Answer: Send {
    /// The JSON document.
    fn json(&self) -> Value;
    /// The text, with its line ends; empty if there is nothing to say.
    fn human(&self, view: &View) -> String;
    /// What deserves a word.
    fn warnings(&self) -> &[Warning];
    /// Whether the text has the warnings in it.
    fn says_warnings(&self) -> bool {
        false
    }
    /// Whether the answer is yes.
    fn is_yes(&self) -> bool {
        true
    }
    /// Whether the text is about what was done rather than the thing asked for, and standard output is taken.
    fn aside(&self) -> bool {
        false
    }
}

/// Standard output and standard error, as the options want them.
pub(crate) struct Output {
    pub(crate) json: bool,
    pub(crate) view: View,
    progress: bool,
    /// Why standard output failed. A reader that went away is no failure.
    failure: Option<std::io::Error>,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Self {
        color(global.color).write_global();
        let view = View {
            verbose: global.verbose > 0,
            quiet: global.quiet > 0,
            terminal: std::io::stdout().is_terminal(),
            ..View::default()
        };
        let progress = std::io::stderr().is_terminal() && !global.json && !global.no_progress && !view.quiet;
        Self { json: global.json, view, progress, failure: None }
    }

    /// Bars for work on `files` files; invisible where they are not wanted.
    pub(crate) fn progress(&self, files: usize) -> Progress {
        Progress::new(self.progress, files)
    }

    /// Prints text that was asked for.
    pub(crate) fn answer(&mut self, text: &str) {
        self.print(|out| out.write_all(text.as_bytes()));
    }

    /// Prints the JSON document.
    pub(crate) fn document(&mut self, value: &Value) {
        self.print(|out| writeln!(out, "{value:#}"));
    }

    /// Prints one of several JSON documents, which together are one array; `first` begins it.
    pub(crate) fn element(&mut self, value: &Value, first: bool) {
        let text = format!("{value:#}").replace('\n', "\n  ");
        let before = if first { "[" } else { "," };
        self.print(|out| write!(out, "{before}\n  {text}"));
    }

    /// Ends the array of JSON documents.
    pub(crate) fn end_of_array(&mut self) {
        self.print(|out| writeln!(out, "\n]"));
    }

    fn print(&mut self, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) {
        let mut out = AutoStream::auto(std::io::stdout()).lock();
        if let Err(error) = write(&mut out).and_then(|()| out.flush())
            && error.kind() != ErrorKind::BrokenPipe
        {
            self.failure.get_or_insert(error);
        }
    }

    /// Prints a remark, unless remarks are not wanted.
    pub(crate) fn note(&self, text: &str) {
        if !self.view.quiet && !self.json {
            say(text);
        }
    }

    /// Prints warnings; `path` says whose, where there are several files.
    pub(crate) fn warnings(&self, warnings: &[Warning], path: Option<&Path>) {
        self.note(&errors::warnings(warnings, path, self.view.verbose));
    }

    /// Prints an error: text on standard error, or the JSON document.
    pub(crate) fn error(&mut self, error: &Error) {
        if self.json {
            self.document(&json!({"schema": 1, "error": error.to_json()}));
        } else {
            self.complain(error);
        }
    }

    /// Prints an error as text.
    pub(crate) fn complain(&self, error: &Error) {
        if !self.json {
            say(&errors::text(error));
        }
    }

    /// The status, once all is printed.
    pub(crate) fn finish(mut self, status: ExitStatus) -> ExitStatus {
        match self.failure.take() {
            Some(error) if status == ExitStatus::Success => {
                say(&errors::text(&Error::io(Path::new("-"), "write the output", error)));
                ExitStatus::Failure
            }
            _ => status,
        }
    }
}

/// The status of a run that ended with this error.
pub(crate) fn status(error: &Error) -> ExitStatus {
    match error.code().kind() {
        Kind::Interrupted => ExitStatus::Interrupted,
        _ => ExitStatus::Failure,
    }
}

/// Whether the error only says that the reader of standard output went away.
pub(crate) fn is_closed_pipe(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|e| e.downcast_ref::<std::io::Error>());
    error.path() == Some(Path::new("-")) && cause.is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}

/// Standard output for bytes; refused where a terminal would show them.
pub(crate) fn binary() -> Result<impl Write, Error> {
    let out = std::io::stdout().lock();
    if out.is_terminal() {
        return Err(Error::new(Code::InvalidArgument, "a binary file is not written to a terminal")
            .hint("redirect standard output, or name a file with `-o`"));
    }
    Ok(out)
}

/// Whether the environment forbids colours.
pub(crate) fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
}

fn color(wish: ColorArg) -> ColorChoice {
    let forced = || std::env::var_os("FORCE_COLOR").is_some_and(|v| !v.is_empty() && v != "0");
    match wish {
        _ if no_color() => ColorChoice::Never,
        ColorArg::Never => ColorChoice::Never,
        ColorArg::Always => ColorChoice::Always,
        ColorArg::Auto if forced() => ColorChoice::Always,
        // anstream knows CLICOLOR_FORCE, TERM and terminals.
        ColorArg::Auto => ColorChoice::Auto,
    }
}

/// Prints a JSON document in one line. A reader that went away is no failure, and nobody could be told of others.
fn line(value: &Value) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// Writes to standard error; nobody could be told if that fails.
fn say(text: &str) {
    let mut out = AutoStream::auto(std::io::stderr()).lock();
    let _ = out.write_all(text.as_bytes());
}
