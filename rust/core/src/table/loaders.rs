//! Who loads what: programs, and what they make of files of a dialect, family and kind.

use serde::Deserialize;

use super::source::invalid;
use super::{Dialect, Family};
use crate::error::Result;

/// What a program makes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Nothing of it, or it stops.
    No,
    /// Some of it.
    Part,
    /// All of it.
    Yes,
}

impl Answer {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Answer::No => "no",
            Answer::Part => "part",
            Answer::Yes => "yes",
        }
    }
}

/// A program that loads adapters.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// What was run or read.
    #[serde(default)]
    pub version: String,
    /// The first rule that fits decides; what none fits is not known.
    pub rules: Vec<Rule>,
}

/// What a program makes of some files. What is not named can be anything.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Dialects.
    pub dialects: Option<Vec<String>>,
    /// Families.
    pub families: Option<Vec<String>>,
    /// Kinds.
    pub kinds: Option<Vec<String>>,
    /// Texts: it is about files that have one of them in some key.
    pub keys: Option<Vec<String>>,
    /// Texts: it is about files that have none of them in any key.
    pub without: Option<Vec<String>>,
    /// What happens.
    pub answer: Answer,
    /// What is lost, or why it stops.
    #[serde(default)]
    pub note: String,
    /// How that is known.
    pub source: String,
}

impl Program {
    /// What it makes of a file; `None` if that is not known. `has` tells whether a text is in some key of the file, and
    /// is asked only where it decides.
    pub fn rule(&self, dialect: &str, family: &str, kind: &str, has: impl Fn(&str) -> bool) -> Option<&Rule> {
        let is = |list: &Option<Vec<String>>, name: &str| list.as_ref().is_none_or(|all| all.iter().any(|n| n == name));
        let about = |r: &&Rule| is(&r.dialects, dialect) && is(&r.families, family) && is(&r.kinds, kind);
        let any = |texts: &Vec<String>| texts.iter().any(|text| has(text));
        let fits = |r: &&Rule| r.keys.as_ref().is_none_or(any) && !r.without.as_ref().is_some_and(any);
        self.rules.iter().filter(about).find(fits)
    }
}

impl Rule {
    /// For people: `yes`, or what goes wrong.
    pub fn text(&self) -> String {
        match self.answer {
            Answer::Yes => "yes".to_owned(),
            Answer::Part => format!("in part: {}", self.note),
            Answer::No => format!("no: {}", self.note),
        }
    }
}

/// The file of programs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Programs {
    pub loader: Vec<Program>,
}

/// Adds the programs that a dialect's own table names; their rules are about that dialect.
pub(super) fn merge(all: &mut Vec<Program>, dialect: &str, own: Vec<Program>) {
    for mut program in own {
        for rule in &mut program.rules {
            rule.dialects.get_or_insert_with(|| vec![dialect.to_owned()]);
        }
        match all.iter_mut().find(|p| p.name == program.name) {
            Some(known) => {
                program.rules.append(&mut known.rules);
                known.rules = program.rules;
            }
            None => all.push(program),
        }
    }
}

/// Names in rules are those of something, and what is not wholly right has a note.
pub(super) fn check(programs: &[Program], dialects: &[Dialect], families: &[Family]) -> Result<()> {
    for program in programs {
        let wrong = |message: String| Err(invalid("loaders.toml", format!("{}: {message}", program.name)));
        for rule in &program.rules {
            let mut named = rule.dialects.iter().flatten();
            if let Some(name) = named.find(|n| !dialects.iter().any(|d| d.name == **n)) {
                return wrong(format!("no dialect is called `{name}`"));
            }
            let mut named = rule.families.iter().flatten();
            if let Some(name) = named.find(|n| !families.iter().any(|f| f.name == **n)) {
                return wrong(format!("no family is called `{name}`"));
            }
            let empty = |texts: &Option<Vec<String>>| {
                texts.as_ref().is_some_and(|t| t.is_empty() || t.iter().any(String::is_empty))
            };
            if empty(&rule.keys) || empty(&rule.without) {
                return wrong("`keys` and `without` are texts that keys have in them".to_owned());
            }
            if rule.answer != Answer::Yes && rule.note.is_empty() {
                return wrong("a rule that does not say yes says why".to_owned());
            }
            if rule.source.is_empty() {
                return wrong("a rule has no source".to_owned());
            }
        }
    }
    Ok(())
}
