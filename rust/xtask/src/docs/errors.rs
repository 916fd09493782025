//! Every error code.

use lorafmt_core::Code;
use lorafmt_core::error::Kind;

use crate::markdown::{GENERATED, table};

/// What a class of problem is for callers: its name, the exit status, the Python exception.
fn class(kind: Kind) -> [&'static str; 3] {
    match kind {
        Kind::NotFound => ["not found", "2", "`InputNotFoundError`, a `FileNotFoundError`"],
        Kind::Exists => ["exists", "2", "`OutputExistsError`, a `FileExistsError`"],
        Kind::Io => ["input/output", "2", "`FileError`, an `OSError`"],
        Kind::Access => ["access", "2", "`AccessError`, a `PermissionError`"],
        Kind::Network => ["network", "2", "`NetworkError`, a `ConnectionError`"],
        Kind::Format => ["format", "2", "`FormatError`, a `ValueError`"],
        Kind::Unsupported => ["unsupported", "2", "`UnsupportedError`, a `NotImplementedError`"],
        Kind::Usage => ["usage", "2", "`UsageError`, a `ValueError`"],
        Kind::Interrupted => ["interrupted", "130", "`KeyboardInterrupt`"],
        _ => ["other", "2", "`LorafmtError`"],
    }
}

pub(super) fn page() -> String {
    let mut out = format!(
        "{GENERATED}# Errors\n\n\
         Codes are stable: a code keeps its name and its meaning. The command line prints `error: ...` and `hint: ...` on\n\
         standard error; with `--json` the same is an object on standard output:\n\n\
         ```json\n{{\"schema\": 1, \"error\": {{\"code\": \"unknown-key\", \"message\": \"...\", \"path\": \"...\", \"key\": \"...\", \"hint\": \"...\"}}}}\n```\n\n\
         The exit status is that of a single file. See [exit codes](../exit-codes.md) for many files, and for `check` and\n\
         `diff`, whose status 1 is an answer and no error.\n\n"
    );
    let rows: Vec<Vec<String>> = Code::ALL
        .iter()
        .map(|c| {
            let [class, exit, _] = class(c.kind());
            vec![format!("[`{0}`](#{0})", c.as_str()), class.to_owned(), exit.to_owned(), c.when().to_owned()]
        })
        .collect();
    out += &table(&["code", "class", "exit", "when"], &rows);
    for c in Code::ALL {
        let [class, exit, exception] = class(c.kind());
        out += &format!("\n## {}\n\n{}\n\n", c.as_str(), c.when());
        out += &format!("- Class: {class}; exit status {exit}; in Python {exception}.\n");
        out += &format!("- What helps: {}.\n", c.help());
    }
    out
}
