//! Errors and warnings as text.

use std::fmt::Write;
use std::path::Path;

use clap::error::ErrorKind;
use lorafmt_core::report::Warning;
use lorafmt_core::{Code, Error};
use serde_json::json;

use super::text::{BOLD, CYAN, RED, YELLOW, clean, clean_lines, paint, path};
use crate::ExitStatus;

/// Warnings of one code that are shown without `-v`.
const SHOWN: usize = 3;

/// What and where, then why, then what helps.
pub(super) fn text(error: &Error) -> String {
    let mut out = format!("{}: {}\n", paint(RED, "error"), paint(BOLD, clean_lines(&error.to_string())));
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let _ = writeln!(out, "  caused by: {}", clean_lines(&inner.to_string()));
        cause = inner.source();
    }
    let _ = writeln!(out, "{}: {}", paint(CYAN, "hint"), clean_lines(error.hint_text()));
    out
}

/// Warnings, those of one code together.
pub(super) fn warnings(warnings: &[Warning], file: Option<&Path>, all: bool) -> String {
    let file = file.map_or_else(String::new, |p| format!("{}: ", path(p)));
    let mut codes: Vec<&str> = Vec::new();
    for warning in warnings {
        if !codes.contains(&warning.code.as_str()) {
            codes.push(&warning.code);
        }
    }
    let mut out = String::new();
    let mut line = |code: &str, text: &str| {
        let _ = writeln!(out, "{}: {file}[{}] {}", paint(YELLOW, "warning"), clean(code), clean(text));
    };
    for code in codes {
        let same: Vec<&Warning> = warnings.iter().filter(|w| w.code == code).collect();
        let shown = if all { same.len() } else { SHOWN };
        for warning in same.iter().take(shown) {
            match warning.module.as_deref().filter(|m| !warning.detail.contains(*m)) {
                Some(module) => line(code, &format!("{module}: {}", warning.detail)),
                None => line(code, &warning.detail),
            }
        }
        if same.len() > shown {
            line(code, &format!("and {} more (-v shows all)", same.len() - shown));
        }
    }
    out
}

/// Prints what clap found wrong with the arguments, or the help or version that was asked for.
pub(crate) fn usage(error: &clap::Error, as_json: bool) -> ExitStatus {
    let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if asked || !as_json {
        // A reader that went away has seen what it wanted.
        let _ = error.print();
        return if asked { ExitStatus::Success } else { ExitStatus::Failure };
    }
    let rendered = error.render().to_string();
    let line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut paragraphs = rendered.split("\n\n");
    let message = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is needed".to_owned(),
        _ => line(paragraphs.next().unwrap_or_default().trim_start_matches("error: ")),
    };
    let mut problem = Error::new(Code::InvalidArgument, message);
    if let Some(tip) = paragraphs.find_map(|p| p.trim_start().strip_prefix("tip: ")) {
        problem = problem.hint(line(tip));
    }
    let mut out = super::Output { json: true, view: super::View::default(), progress: false, failure: None };
    out.document(&json!({"schema": 1, "error": problem.to_json()}));
    ExitStatus::Failure
}
