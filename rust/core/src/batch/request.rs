//! From what a user asks for to a step.

use std::path::PathBuf;
use std::sync::Arc;

use super::step::{Step, Work};
use crate::convert::{self, ConvertOptions};
use crate::encode::Algebra;
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::native::Base;
use crate::ops::KeySet;
use crate::ops::resize::{Method, RankRule, Resize, Target};
use crate::table::Registry;

/// What is done with each file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Write another dialect.
    Convert,
    /// Change ranks.
    Resize,
    /// One set of modules and one rank for all.
    Normalize,
    /// Compose what each recipe names.
    Compose,
}

impl Op {
    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Op::Convert => "convert",
            Op::Resize => "resize",
            Op::Normalize => "normalize",
            Op::Compose => "compose",
        }
    }

    /// All of them.
    pub const ALL: [Op; 4] = [Op::Convert, Op::Resize, Op::Normalize, Op::Compose];
}

/// What a user asks for.
#[derive(Debug, Clone)]
pub struct Request {
    /// What is done.
    pub op: Op,
    /// How outputs are written; without a dialect in that of the source, or the first of the tables.
    pub options: ConvertOptions,
    /// The rank.
    pub rule: Option<RankRule>,
    /// For [`Op::Normalize`]: the adapter whose modules all are to have.
    pub like: Option<PathBuf>,
    /// The quantized base, opened once.
    pub base: Option<Arc<Base>>,
    /// The text of user tables.
    pub tables: String,
}

fn missing(what: &str, hint: &str) -> Error {
    Error::new(Code::InvalidArgument, format!("{what} is not given")).hint(hint)
}

fn ranked(methods: Vec<Method>, rule: RankRule) -> Result<Algebra> {
    let resize = Resize { methods, target: Target::Rule(rule), places: Vec::new(), seed: 0 };
    resize.check()?;
    Ok(Algebra { resize: Some(resize), ..Algebra::default() })
}

impl Request {
    /// The step, and what outputs end with before `.safetensors`. An error where something is missing or makes no sense.
    pub fn step(self, registry: &Arc<Registry>) -> Result<(Step, String)> {
        let Self { op, mut options, rule, like, base, tables: mut also } = self;
        convert::given(registry, options.family.as_deref(), options.from.as_deref())?;
        if !options.strength.is_finite() {
            let message = format!("a strength of {} makes no sense", options.strength);
            return Err(Error::new(Code::InvalidArgument, message));
        }
        if !options.to.is_empty() {
            options.to = registry.dialects[registry.dialect(&options.to)?].name.clone();
        }
        if options.to.is_empty() && matches!(op, Op::Normalize | Op::Compose) {
            options.to = registry.dialects[0].name.clone();
        }
        let by_rank = match rule {
            Some(RankRule { limit: Some(rank), criterion: None }) => format!("r{rank}"),
            _ => "resized".to_owned(),
        };
        let (work, ending) = match op {
            Op::Convert if options.to.is_empty() => {
                return Err(missing("the dialect to write", "add `--to DIALECT`; `lorafmt formats` lists them"));
            }
            Op::Convert => {
                if let Some(rule) = rule {
                    options.algebra = ranked(vec![Method::Svd], rule)?;
                }
                (Work::Each, options.to.clone())
            }
            Op::Resize => {
                let hint = "add `--rank N`, `--energy E` or `--max-error E`";
                options.algebra = ranked(vec![Method::Svd], rule.ok_or_else(|| missing("the rank", hint))?)?;
                (Work::Each, by_rank)
            }
            Op::Normalize => {
                let rank = rule.and_then(|r| r.limit).ok_or_else(|| missing("the rank", "add `--rank N`"))?;
                let hint = "add `--like FILE`: what a file becomes must not depend on which others there are";
                let like = like.ok_or_else(|| missing("the adapter whose modules all are to have", hint))?;
                options.algebra = ranked(vec![Method::Svd, Method::Pad], RankRule::fixed(rank))?;
                let source = Source::open(&like)?;
                also.push_str(&source.sha256().unwrap_or_default());
                let adapter = convert::open(registry, source, &options, None)?;
                (Work::Complete(Arc::new(KeySet::union(std::iter::once(&adapter))?)), by_rank)
            }
            Op::Compose => (Work::Recipe, options.to.clone()),
        };
        Ok((Step { registry: Arc::clone(registry), options, base, work, also }, ending))
    }
}
