//! What is computed by the Python package, in a process of its own.

use std::process::{Command, Stdio};

use lorafmt_core::{Code, Error, Result};

/// The interpreter with a program. Python names itself where it runs the command.
pub(super) fn interpreter(program: &str) -> Command {
    let python = std::env::var_os("LORAFMT_PYTHON").unwrap_or_else(|| "python3".into());
    let mut command = Command::new(python);
    command.arg("-c").arg(program).stdin(Stdio::null());
    command
}

/// The error of an interpreter that cannot be started; `with` is what it needs beside lorafmt.
pub(super) fn not_started(command: &Command, with: &str, error: std::io::Error) -> Error {
    let python = command.get_program().as_ref();
    Error::new(Code::NotFound, format!("cannot start Python: {error}"))
        .at(python)
        .hint(format!("name an interpreter that has lorafmt and {with} in LORAFMT_PYTHON"))
}

/// Runs a command to its end; it says by itself what comes of it.
pub(super) fn status(mut command: Command, with: &str) -> Result<Option<i32>> {
    let ended = command.status();
    ended.map(|status| status.code()).map_err(|error| not_started(&command, with, error))
}
