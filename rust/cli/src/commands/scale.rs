use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::{Composition, Term};
use lorafmt_core::convert::{self, ConvertOptions};
use lorafmt_core::native::{Base, NativeOptions, disassemble};
use lorafmt_core::strength::{Request, Strength};
use lorafmt_core::table::Registry;
use lorafmt_core::{Code, Error, Result};

use super::writing::{Job, open_base, options, own_dialect};
use super::{Context, strengths};
use crate::ExitStatus;
use crate::args::{Assignment, ScaleArgs};
use crate::output::{Converted, Progress};
use crate::sources::{Found, Input};
use crate::targets::{self, Goal};

/// What the command line says.
struct Task<'a> {
    args: &'a ScaleArgs,
    registry: Arc<Registry>,
    strength: Request,
    base: Option<Arc<Base>>,
    goal: Goal,
    hashed: bool,
}

pub(super) fn run(args: &ScaleArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    convert::given(&registry, args.family.as_deref(), args.to.as_deref())?;
    if args.strength.is_none() && args.places.is_empty() && args.lora.is_empty() {
        let message = "no factor is given: the output would be the source once more";
        let hint = "add `--strength S`, or one of the strengths by place";
        return Err(Error::new(Code::InvalidArgument, message).hint(hint));
    }
    let strength = strengths::strength(args.strength.unwrap_or(1.0), &args.places)?;
    for Assignment { name, number } in &args.lora {
        let hint = "write a number like 0.8 or -1";
        if !number.is_finite() {
            let message = format!("the factor of `{name}` is {number}, which is no finite number");
            return Err(Error::new(Code::InvalidArgument, message).hint(hint));
        }
    }
    let goal = targets::explicit(&args.output)?;
    let inputs = [Some(args.source.as_path()), args.base.as_deref()];
    targets::check(std::slice::from_ref(&goal), args.writing.dry_run, context.out.json, &inputs)?;
    let base = open_base(&registry, args.base.as_deref())?;
    let task = Task { args, registry, strength, base, goal, hashed: context.out.json };
    let found = Found { inputs: vec![Input::new(&args.source)], many: false };
    Ok(context.answer_all(&found, context.out.view, |_, input, progress| task.scale(input, progress)))
}

impl Task<'_> {
    fn scale(&self, input: &Input, progress: &Progress) -> Result<Converted> {
        let started = Instant::now();
        let source = input.open(Some(progress)).map_err(|e| match e.code() {
            Code::IsADirectory => e.hint("name a file, or a PEFT folder"),
            _ => e,
        })?;
        let plain = options("", self.args.family.as_ref(), &self.args.writing);
        let adapter = convert::open(&self.registry, source, &plain, self.base.clone())?;
        let to = own_dialect(self.args.to.as_deref(), &adapter)?;
        if adapter.native.is_some() {
            return self.native(&adapter, &ConvertOptions { to, ..plain }, started, progress);
        }
        if !self.args.lora.is_empty() {
            let message = "`--lora` is about the adapters inside a native file, and this is none";
            let hint = "`--block SELECTOR=S` scales a part of one adapter";
            return Err(Error::new(Code::InvalidArgument, message).at(&input.path).hint(hint));
        }
        let terms = vec![Term::new(&adapter, self.strength_for(&adapter)?)];
        self.job(&ConvertOptions { to, ..plain }, &input.path, started).run(&Composition::new(terms)?, progress)
    }

    fn strength_for(&self, adapter: &Adapter) -> Result<Strength> {
        self.strength.resolve(adapter.family_table()).map_err(|e| e.at(adapter.source.path()))
    }

    /// A file for a quantized model: each adapter inside with a strength of its own, behind the same base.
    fn native(
        &self,
        adapter: &Adapter,
        options: &ConvertOptions,
        started: Instant,
        progress: &Progress,
    ) -> Result<Converted> {
        let inside = disassemble(&self.registry, &adapter.source, self.base.clone())?;
        let mut terms: Vec<Term<'_>> = inside.adapters.iter().map(|a| Term::new(a, Strength::default())).collect();
        let names: Vec<String> = terms.iter().map(|t| t.name.clone()).collect();
        let factors = factors(&names, &self.args.lora).map_err(|e| e.at(adapter.source.path()))?;
        for (term, factor) in terms.iter_mut().zip(factors) {
            term.strength = self.strength_for(adapter)?.times(factor);
        }
        let dialect = &self.registry.dialects[self.registry.dialect(&options.to)?];
        // The base inside the file knows no smoothing: what leaves the native form needs the real one.
        let native = dialect.native(adapter.family).map(|_| NativeOptions {
            base: inside.base,
            layout: inside.layout,
            precision: None,
            describe: true,
        });
        let options = ConvertOptions { native, ..options.clone() };
        self.job(&options, adapter.source.path(), started).run(&Composition::new(terms)?, progress)
    }

    fn job<'j>(&'j self, options: &'j ConvertOptions, name: &'j Path, started: Instant) -> Job<'j> {
        Job {
            options,
            goal: &self.goal,
            dry_run: self.args.writing.dry_run,
            force: self.args.writing.force,
            folders: false,
            many: false,
            hashed: self.hashed,
            name,
            started,
        }
    }
}

/// The factor of each adapter, by its name or its number.
fn factors(names: &[String], wanted: &[Assignment]) -> Result<Vec<f64>> {
    let mut factors: Vec<Option<f64>> = vec![None; names.len()];
    let usage = |message: String, hint: String| Err(Error::new(Code::InvalidArgument, message).hint(hint));
    let listed = || {
        let line = |(i, name): (usize, &String)| format!("{} `{name}`", i + 1);
        format!("it holds {}", names.iter().enumerate().map(line).collect::<Vec<_>>().join(", "))
    };
    for Assignment { name, number } in wanted {
        let called: Vec<usize> = (0..names.len()).filter(|&i| names[i] == *name).collect();
        let counted = name.parse().ok().and_then(|n: usize| n.checked_sub(1)).filter(|n| *n < names.len());
        let at = match (called.as_slice(), counted) {
            ([one], _) => *one,
            ([], Some(at)) => at,
            ([], None) => return usage(format!("no adapter in it is called `{name}`"), listed()),
            (several, _) => {
                let message = format!("{} adapters in it are called `{name}`", several.len());
                return usage(message, format!("use their numbers: {}", listed()));
            }
        };
        if factors[at].replace(*number).is_some() {
            return usage(format!("`--lora` gives `{}` two factors", names[at]), "multiply them".to_owned());
        }
    }
    Ok(factors.into_iter().map(|f| f.unwrap_or(1.0)).collect())
}
