//! Generators: `docs` writes the reference pages from the tables and the code, `stubs` the type stubs of the native
//! Python module from the built library. With `--check` they only compare, and exit with 1 where a file differs.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod docs;
mod markdown;
mod stubs;
mod tables;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "usage: cargo run -p xtask -- docs [--check]
       cargo run -p xtask -- stubs [--check] LIBRARY";

/// Generated files: path from the root of the repository, text.
type Files = BTreeMap<String, String>;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["docs"] => write(&docs::pages(), Some(docs::FOLDER)),
        ["docs", "--check"] => check(&docs::pages(), Some(docs::FOLDER), "docs"),
        ["stubs", "--check", library] => {
            stubs::files(Path::new(library)).and_then(|files| check(&files, None, "stubs LIBRARY"))
        }
        ["stubs", library] => stubs::files(Path::new(library)).and_then(|files| write(&files, None)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::from(2)
    })
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(".")).to_path_buf()
}

/// Writes what differs. `owned` is a folder in which every file is generated: others are removed.
fn write(files: &Files, owned: Option<&str>) -> Result<ExitCode, Failure> {
    for stale in stale(files, owned)? {
        std::fs::remove_file(root().join(stale))?;
    }
    for (name, text) in files {
        let path = root().join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        if std::fs::read_to_string(&path).ok().as_ref() != Some(text) {
            std::fs::write(&path, text)?;
            println!("wrote {name}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check(files: &Files, owned: Option<&str>, command: &str) -> Result<ExitCode, Failure> {
    let mut wrong = Vec::new();
    for (name, text) in files {
        match std::fs::read_to_string(root().join(name)) {
            Ok(have) if have == *text => {}
            Ok(_) => wrong.push(format!("{name} is out of date")),
            Err(_) => wrong.push(format!("{name} is missing")),
        }
    }
    wrong.extend(stale(files, owned)?.iter().map(|name| format!("{name} is not generated any more")));
    if wrong.is_empty() {
        println!("{} generated files are up to date", files.len());
        return Ok(ExitCode::SUCCESS);
    }
    wrong.iter().for_each(|line| eprintln!("{line}"));
    eprintln!("hint: `cargo run -p xtask -- {command}` writes them");
    Ok(ExitCode::from(1))
}

/// Files in the owned folder that no generator writes.
fn stale(files: &Files, owned: Option<&str>) -> std::io::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut open: Vec<String> = owned.into_iter().map(str::to_owned).collect();
    while let Some(inner) = open.pop() {
        let Ok(entries) = std::fs::read_dir(root().join(&inner)) else { continue };
        for entry in entries {
            let entry = entry?;
            let name = format!("{inner}/{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                open.push(name);
            } else if !files.contains_key(&name) {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}
