//! Where the results of a conversion go, decided for all sources before the first is read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lorafmt_core::{Code, Error, Result};

use crate::sources::{Found, Input};

/// Where one result goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Goal {
    File(PathBuf),
    Stdout,
}

fn usage(message: impl Into<String>, hint: &str) -> Error {
    Error::new(Code::InvalidArgument, message).hint(hint)
}

/// One goal for each input, all different and none of them an input.
pub(crate) fn choose(output: Option<&Path>, out_dir: Option<&Path>, found: &Found, ending: &str) -> Result<Vec<Goal>> {
    let goals: Vec<Goal> = match output {
        Some(_) if found.inputs.len() > 1 => {
            let hint = "use `--out-dir DIR` instead of `-o`";
            return Err(usage(format!("one output for {} sources", found.inputs.len()), hint));
        }
        Some(path) => found.inputs.iter().map(|_| explicit(path)).collect::<Result<_>>()?,
        None => found.inputs.iter().map(|i| by_name(i, out_dir, ending)).collect::<Result<_>>()?,
    };
    refuse_collisions(found.inputs.iter().zip(&goals))?;
    Ok(goals)
}

/// What holds for every command: nothing is written over what is read, and standard output takes one thing only.
pub(crate) fn check(goals: &[Goal], dry_run: bool, json: bool, inputs: &[Option<&Path>]) -> Result<()> {
    if json && !dry_run && goals.contains(&Goal::Stdout) {
        return Err(usage("`--json` and `-o -` both write to standard output", "name a file with `-o`"));
    }
    let inputs: BTreeSet<PathBuf> = inputs.iter().flatten().filter_map(|path| path.canonicalize().ok()).collect();
    goals.iter().try_for_each(|goal| refuse_inputs(goal, &inputs))
}

pub(crate) fn folder(path: Option<&Path>) -> Result<()> {
    match path.filter(|d| d.exists() && !d.is_dir()) {
        Some(file) => Err(usage("`--out-dir` names a file", "name a folder").at(file)),
        None => Ok(()),
    }
}

pub(crate) fn explicit(path: &Path) -> Result<Goal> {
    if path.as_os_str() == "-" {
        return Ok(Goal::Stdout);
    }
    // Replacing a device or a pipe by a file is never what was meant.
    if path.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        let hint = "`-o -` writes to standard output, which can be redirected";
        return Err(usage("the output is a device or a pipe", hint).at(path));
    }
    Ok(Goal::File(path.to_path_buf()))
}

/// `{stem}.{ending}.safetensors`, beside the input or below a folder.
pub(crate) fn by_name(input: &Input, out_dir: Option<&Path>, ending: &str) -> Result<Goal> {
    if input.is_stdin() {
        return Err(usage("standard input has no name to make the output's from", "name the output with `-o`"));
    }
    let (beside, mut name) = input.place();
    name.push(format!(".{ending}.safetensors"));
    let folder = out_dir.map_or(beside, |d| d.join(&input.below));
    Ok(Goal::File(folder.join(name)))
}

/// Outputs of several inputs are all different, and none of them is an input.
pub(crate) fn refuse_collisions<'a>(pairs: impl Iterator<Item = (&'a Input, &'a Goal)> + Clone) -> Result<()> {
    let sources: BTreeSet<PathBuf> = pairs.clone().filter_map(|(i, _)| i.path.canonicalize().ok()).collect();
    let mut taken: BTreeMap<PathBuf, &Input> = BTreeMap::new();
    for (input, goal) in pairs {
        refuse_inputs(goal, &sources)?;
        let Goal::File(path) = goal else { continue };
        let whole = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        if let Some(other) = taken.insert(whole, input) {
            let (one, two) = (other.path.display(), input.path.display());
            let message = format!("`{one}` and `{two}` would both be written to it");
            return Err(usage(message, "convert them one by one with `-o`, or into different folders").at(path));
        }
    }
    Ok(())
}

fn refuse_inputs(goal: &Goal, inputs: &BTreeSet<PathBuf>) -> Result<()> {
    match goal {
        Goal::File(path) if path.is_file() && path.canonicalize().is_ok_and(|p| inputs.contains(&p)) => {
            Err(Error::new(Code::SameFile, "the output is one of the inputs").at(path))
        }
        _ => Ok(()),
    }
}
