//! A native file as one file for each adapter inside.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::{Composition, Term};
use lorafmt_core::convert::ConvertOptions;
use lorafmt_core::native::{NativeOptions, disassemble};
use lorafmt_core::strength::Strength;
use lorafmt_core::{Code, Error, Result};

use super::Context;
use super::convert::Task;
use crate::ExitStatus;
use crate::sources::{Found, Input};
use crate::targets::{self, Goal};

/// Bytes of an adapter's name that its file gets.
const LONGEST: usize = 100;

/// One adapter of a file, how it is written, and where.
struct Part {
    adapter: Adapter,
    options: ConvertOptions,
    goal: Goal,
}

pub(super) fn run(task: &Task<'_>, found: &Found, context: &mut Context) -> Result<ExitStatus> {
    let (mut inputs, mut parts) = (Vec::new(), Vec::new());
    for input in &found.inputs {
        // A file that cannot be taken apart fails by itself.
        let opened = open(task, input).map_or_else(|e| vec![Err(e)], |parts| parts.into_iter().map(Ok).collect());
        inputs.extend(opened.iter().map(|_| input.clone()));
        parts.extend(opened);
    }
    let files = || inputs.iter().zip(&parts).filter_map(|(input, part)| Some((input, &part.as_ref().ok()?.goal)));
    targets::refuse_collisions(files())?;
    let goals: Vec<Goal> = files().map(|(_, goal)| goal.clone()).collect();
    targets::check(&goals, task.args.writing.dry_run, context.out.json, &[task.args.native.base.as_deref()])?;
    let found = Found { inputs, many: true };
    Ok(context.answer_all(&found, context.out.view, |i, input, progress| {
        let Part { adapter, options, goal } = parts[i].as_ref().map_err(Error::duplicate)?;
        task.job(options, goal, input, Instant::now()).run(&Composition::of(adapter), progress)
    }))
}

/// The adapters inside a file.
fn open(task: &Task<'_>, input: &Input) -> Result<Vec<Part>> {
    if input.is_stdin() {
        let error = Error::new(Code::InvalidArgument, "standard input has no name to make those of the outputs from");
        return Err(error.hint("name a file"));
    }
    let source = Arc::new(input.open(None)?);
    let inside = disassemble(&task.registry, &source, task.base.clone()).map_err(|e| match e.code() {
        Code::InvalidArgument => {
            e.hint("only files for a quantized model are split; convert this one without `--split`")
        }
        _ => e,
    })?;
    let dialect = &task.registry.dialects[task.registry.dialect(&task.args.to)?];
    let own = NativeOptions {
        base: Arc::clone(&inside.base),
        layout: task.args.native.layout.map_or(inside.layout, |l| l.layout()),
        precision: None,
        describe: true,
    };
    let names: Vec<String> = inside.adapters.iter().map(|a| Term::new(a, Strength::default()).name).collect();
    let part = |(adapter, name): (Adapter, String)| {
        // What leaves the native form needs the real base: the one inside the file knows no smoothing.
        let native = dialect.native(adapter.family).map(|_| task.options.native.clone().unwrap_or_else(|| own.clone()));
        let ending = format!("{name}.{}", dialect.name);
        let goal = targets::by_name(input, task.args.out_dir.as_deref(), &ending)?;
        Ok(Part { adapter, options: ConvertOptions { native, ..task.options.clone() }, goal })
    };
    inside.adapters.into_iter().zip(file_names(&names)).map(part).collect()
}

/// Names of adapters as parts of file names: no two are equal, on file systems that ignore case neither.
fn file_names(names: &[String]) -> Vec<String> {
    let mut taken = BTreeSet::new();
    let mut out = Vec::new();
    for (at, name) in names.iter().enumerate() {
        let (plain, number) = (safe(name), at + 1);
        let candidate = |attempt: usize| match attempt {
            0 if plain.is_empty() => number.to_string(),
            0 => plain.clone(),
            1 => format!("{plain}-{number}"),
            more => format!("{plain}-{number}-{more}"),
        };
        out.extend((0..).map(candidate).find(|c| taken.insert(c.to_lowercase())));
    }
    out
}

/// Letters, digits and a few signs; everything else, such as separators of paths, becomes `_`.
fn safe(name: &str) -> String {
    let sign = |c: char| if c.is_alphanumeric() || "-_+. ".contains(c) { c } else { '_' };
    let mut text: String = name.trim().trim_start_matches('.').chars().map(sign).collect();
    while text.len() > LONGEST {
        text.pop();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_are_safe_and_differ() {
        let names = |names: &[&str]| file_names(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(names(&["style", "face v2"]), ["style", "face v2"]);
        assert_eq!(
            names(&["../../etc/x", "a\\b:c", "\u{1b}[31m", ".hidden"]),
            ["_.._etc_x", "a_b_c", "__31m", "hidden"]
        );
        assert_eq!(names(&["a", "A", "a"]), ["a", "A-2", "a-3"]);
        assert_eq!(names(&["a", "a-3", "a", "", "4"]), ["a", "a-3", "a-3-2", "4", "4-5"]);
        assert!(names(&["\u{fc}".repeat(300).as_str()])[0].len() <= LONGEST);
    }
}
