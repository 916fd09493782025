//! The records of a run as a Parquet table. It is written by pyarrow, which the Python package calls.

use std::path::Path;
use std::process::Stdio;

use lorafmt_core::{Code, Error, Result};

use super::python;

const PROGRAM: &str = "import sys; from lorafmt._batch import main; sys.exit(main(sys.argv[1:]))";

/// What Python answers where a file that is no table of records is in the way.
const EXISTS: i32 = 3;

/// What it answers where a file could not be read or written.
const FAILED: i32 = 4;

/// An error, before there is any work, if the table could not be written after it.
pub(super) fn ready(table: &Path, force: bool) -> Result<()> {
    let folder = table.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        std::fs::metadata(folder).map_err(|e| Error::io(folder, "write into the folder", e))?;
    }
    if force || !table.exists() { call(&[], table) } else { call(&[table], table) }
}

/// Writes the records of a manifest to `table`, whole or not at all. A run that did not begin has none.
pub(super) fn write(manifest: &Path, table: &Path) -> Result<()> {
    if manifest.exists() { call(&[manifest, table], table) } else { Ok(()) }
}

fn call(arguments: &[&Path], table: &Path) -> Result<()> {
    let mut command = python::interpreter(PROGRAM);
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
    let ended = command.output().map_err(|error| python::not_started(&command, "pyarrow", error))?;
    match ended.status.code() {
        Some(0) => Ok(()),
        Some(EXISTS) => Err(Error::new(Code::OutputExists, "the file exists, and is no table of records").at(table)),
        code => {
            let said = String::from_utf8_lossy(&ended.stderr);
            let why = said.trim().lines().last().unwrap_or("it says nothing").to_owned();
            if code == Some(FAILED) {
                return Err(Error::new(Code::Io, format!("the table cannot be written: {why}")).at(table));
            }
            Err(Error::new(Code::MissingPackage, format!("Python cannot write the table: {why}")).at(table).hint(
                "`pip install \"lorafmt[parquet]\"`, and name the interpreter in LORAFMT_PYTHON if it is not `python3`",
            ))
        }
    }
}
