//! What is wrong with a file, who loads it, and the command that helps.

use serde::Serialize;

use crate::adapter::Adapter;
use crate::check::{not_finite, unknown_keys};
use crate::error::{Code, Error};
use crate::inspect::{Inspection, Loader, quoted};

/// Messages of one code that are noted.
const MESSAGES: usize = 5;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Worth knowing: nothing is wrong with the file.
    Note,
    /// Deserves a word.
    Warning,
    /// Wrong.
    Problem,
}

/// What was found of one code.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// The code of the error or the warning.
    pub code: String,
    /// How often.
    pub count: usize,
    /// The first few, as sentences.
    pub messages: Vec<String>,
    /// What helps, in words.
    pub hint: Option<String>,
    /// The command that helps: mostly one that makes a file without it.
    pub command: Option<String>,
}

/// Programs that do the same with a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// Their names.
    pub programs: Vec<String>,
    /// `yes`, or what goes wrong; `not known` if no source tells.
    pub loads: String,
    /// The command that makes a file which they load.
    pub command: Option<String>,
}

/// Every program: those that load it first, those of which nothing is known last.
pub(super) fn advice(file: &Inspection) -> Vec<Advice> {
    let mut out: Vec<Advice> = Vec::new();
    for loader in &file.loaders {
        let command = file.fix(loader);
        match out.iter_mut().find(|a| a.loads == loader.loads && a.command == command) {
            Some(same) => same.programs.push(loader.name.clone()),
            None => out.push(Advice { programs: vec![loader.name.clone()], loads: loader.loads.clone(), command }),
        }
    }
    let rank = |a: &Advice| match a.loads.as_str() {
        Loader::UNKNOWN => 2,
        _ if a.command.is_none() => 0,
        _ => 1,
    };
    out.sort_by_key(rank);
    out
}

/// Everything that is wrong, worst first. `read` says whether tensors may be read, `trouble` why weights could not be
/// measured.
pub(super) fn findings(
    adapter: &Adapter,
    problems: &[Error],
    file: &Inspection,
    read: bool,
    trouble: Option<&Error>,
) -> Vec<Finding> {
    let mut out = Vec::new();
    for problem in problems {
        add(&mut out, Level::Problem, problem.code().as_str(), problem.message(), Some(problem.hint_text()));
    }
    for problem in unknown_keys(adapter, MESSAGES) {
        add(&mut out, Level::Problem, problem.code().as_str(), problem.message(), Some(problem.hint_text()));
    }
    for problem in if read { not_finite(&adapter.source) } else { Vec::new() } {
        add(&mut out, Level::Problem, problem.code().as_str(), problem.message(), Some(problem.hint_text()));
    }
    for warning in &file.warnings {
        let help = Code::ALL.iter().find(|c| c.as_str() == warning.code).map(|c| c.help());
        add(&mut out, Level::Warning, &warning.code, &warning.detail, help);
    }
    if let Some(error) = trouble {
        let message = format!("the weights could not be measured: {}", error.message());
        add(&mut out, Level::Note, error.code().as_str(), &message, Some(error.hint_text()));
    }
    for finding in &mut out {
        finding.command = command(&finding.code, file, adapter);
    }
    out.sort_by_key(|f| std::cmp::Reverse(f.level));
    out
}

fn add(out: &mut Vec<Finding>, level: Level, code: &str, message: &str, hint: Option<&str>) {
    let at = out.iter().position(|f| f.level == level && f.code == code).unwrap_or_else(|| {
        let hint = hint.map(str::to_owned);
        out.push(Finding { level, code: code.to_owned(), count: 0, messages: Vec::new(), hint, command: None });
        out.len() - 1
    });
    out[at].count += 1;
    if out[at].messages.len() < MESSAGES {
        out[at].messages.push(message.to_owned());
    }
}

/// The command that gets rid of it or tells more, where one does.
fn command(code: &str, file: &Inspection, adapter: &Adapter) -> Option<String> {
    let path = quoted(&file.path);
    let own = adapter.detection.dialect.map(|d| &adapter.registry.dialects[d]).filter(|d| d.writes(adapter.family));
    match code {
        // Only of a file that can be written at all.
        c if c == Code::UnknownKey.as_str() && file.problems.is_empty() => {
            own.map(|d| format!("lorafmt convert {path} --to {} --unknown drop", d.name))
        }
        c if c == Code::BaseNeeded.as_str() => Some(format!("lorafmt inspect {path} --weights --base BASE")),
        c if c == Code::NotFinite.as_str() => Some(format!("lorafmt check {path} -v")),
        _ => None,
    }
}
