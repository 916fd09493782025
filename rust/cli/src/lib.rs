//! The command line of lorafmt.
//!
//! [`run`] is the whole program: the binary and Python's `python -m lorafmt` both call it. Arguments are described in
//! `args`, each command does its work in `commands`, and only `output` prints.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod interrupt;
mod output;
mod pool;
mod sources;
mod targets;

use std::ffi::OsString;

/// How a run ended, as the exit code of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Done.
    Success = 0,
    /// The answer is no: a check failed, a difference was found, `--strict` met a warning.
    No = 1,
    /// Wrong usage, or an input that cannot be read or is not supported.
    Failure = 2,
    /// Some of many files failed.
    Partial = 3,
    /// Stopped by the user.
    Interrupted = 130,
}

/// Runs one command line (including the program's name).
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitStatus {
    let args: Vec<OsString> = args.into_iter().collect();
    match args::parse(&args) {
        Ok(cli) => commands::dispatch(cli),
        Err(error) => output::usage(&error, args::wants_json(&args)),
    }
}

/// The command line as clap describes it, for generators of documentation and completions.
pub fn command() -> clap::Command {
    args::command()
}
