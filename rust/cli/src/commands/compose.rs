use std::borrow::Cow;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::ValueEnum;
use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::{Composition, Term, agree};
use lorafmt_core::convert::{self, ConvertOptions};
use lorafmt_core::encode::Algebra;
use lorafmt_core::native::Base;
use lorafmt_core::recipe::{self, Recipe, split_strength};
use lorafmt_core::strength::{Request, Strength};
use lorafmt_core::table::Registry;
use lorafmt_core::{Code, Error, Result};
use lorafmt_remote::is_remote;
use rayon::prelude::*;

use super::writing::{Job, native_options, open_base, options};
use super::{Context, strengths};
use crate::ExitStatus;
use crate::args::{ComposeArgs, DtypeArg, LayoutArg, Places, typed};
use crate::output::{Converted, Progress};
use crate::sources::{Found, Input};
use crate::targets;

/// Which adapters are composed, each with its strength.
pub(super) struct Ingredients {
    /// The files, each once.
    inputs: Vec<Input>,
    /// Numbers of files, with strengths.
    terms: Vec<(usize, Request)>,
    /// Densities of single terms.
    densities: Vec<Option<f64>>,
}

pub(super) fn run(args: &ComposeArgs, context: &mut Context) -> Result<ExitStatus> {
    let registry = context.registry()?;
    let recipe = args.recipe.as_deref().map(recipe::read).transpose().map_err(|e| match e.code() {
        Code::IsADirectory => e.hint("name the file of the recipe"),
        _ => e,
    })?;
    let args = &completed(args, recipe.as_ref(), &registry)?;
    let choices = args.merge.choices(&args.ranks).or(recipe.as_ref().map(|r| r.choices.clone()).unwrap_or_default());
    let ingredients = ingredients(args, recipe)?;
    let output = args.output.as_deref().ok_or_else(|| {
        Error::new(Code::InvalidArgument, "neither the command line nor the recipe names an output")
            .hint("name it with `-o OUT`, or under `output` in the recipe")
    })?;
    let goal = targets::explicit(output)?;
    let mut inputs: Vec<Option<&Path>> = ingredients.inputs.iter().map(|i| Some(i.path.as_path())).collect();
    inputs.extend([args.native.base.as_deref(), args.recipe.as_deref()]);
    targets::check(std::slice::from_ref(&goal), args.writing.dry_run, context.out.json, &inputs)?;
    let base = open_base(&registry, args.native.base.as_deref())?;
    let to = args.to.as_deref().unwrap_or(&registry.dialects[0].name);
    let native = native_options(&args.native, base.as_ref());
    let algebra = Algebra::of(&choices, ingredients.densities.clone())?;
    let options = ConvertOptions { native, algebra, ..options(to, args.family.as_ref(), &args.writing) };
    convert::given(&registry, options.family.as_deref(), None)?;
    let found = Found { inputs: vec![Input::new(output)], many: false };
    let hashed = context.out.json;
    Ok(context.answer_all(&found, context.out.view, |_, input, progress| {
        let started = Instant::now();
        let job = Job {
            options: &options,
            goal: &goal,
            dry_run: args.writing.dry_run,
            force: args.writing.force,
            folders: false,
            many: false,
            hashed,
            name: &input.path,
            started,
        };
        compose(&registry, &ingredients, base.as_ref(), &job, progress)
    }))
}

/// The options of the command line, and those of the recipe that it leaves open.
fn completed(args: &ComposeArgs, recipe: Option<&Recipe>, registry: &Registry) -> Result<ComposeArgs> {
    let mut args = args.clone();
    if let Some(to) = args.to.as_deref() {
        registry.dialect(to)?;
    }
    let Some(recipe) = recipe else { return Ok(args) };
    if let (None, Some(to)) = (&args.to, &recipe.to) {
        registry.dialect(to).map_err(|e| args.recipe.iter().fold(e, |e, path| e.at(path)))?;
    }
    args.to = args.to.or_else(|| recipe.to.clone());
    args.output = args.output.or_else(|| recipe.output.as_deref().map(file));
    args.native.base = args.native.base.or_else(|| recipe.base.clone());
    // The recipe's reader knows the same words.
    let layout = recipe.layout.as_deref().and_then(|name| LayoutArg::from_str(name, true).ok());
    args.native.layout = args.native.layout.or(layout);
    let dtype = recipe.dtype.as_deref().and_then(|name| DtypeArg::from_str(name, true).ok());
    args.writing.dtype = args.writing.dtype.or(dtype);
    Ok(args)
}

/// A path of a recipe: no name in it means standard input or output.
fn file(path: &Path) -> PathBuf {
    if path.as_os_str() == "-" { Path::new(".").join(path) } else { path.to_path_buf() }
}

/// An address in a recipe, whose reader has put the recipe's folder before it. Paths that exist are none.
fn address_in(recipe: Option<&Path>, path: &Path) -> Option<PathBuf> {
    let folder = recipe?.parent().filter(|folder| !folder.as_os_str().is_empty());
    let text = match folder {
        Some(folder) => path.to_str()?.strip_prefix(folder.to_str()?)?.trim_start_matches('/'),
        None => path.to_str()?,
    };
    (!path.exists() && is_remote(text)).then(|| text.into())
}

/// The adapters of the recipe, then those of the command line.
fn ingredients(args: &ComposeArgs, recipe: Option<Recipe>) -> Result<Ingredients> {
    if args.sources.is_empty() && !args.places.is_empty() {
        let message = "strengths by place apply to the adapters of the command line, and there are none";
        let hint = "write `text_encoder_strength`, `components`, `blocks` or `block_weights` into the recipe";
        return Err(Error::new(Code::InvalidArgument, message).hint(hint));
    }
    let mut ingredients = Ingredients { inputs: Vec::new(), terms: Vec::new(), densities: Vec::new() };
    for lora in recipe.into_iter().flat_map(|r| r.loras) {
        let path = address_in(args.recipe.as_deref(), &lora.path).unwrap_or_else(|| file(&lora.path));
        ingredients.add(&path, lora.strength, lora.density);
    }
    ingredients.add_all(&args.sources, &args.places)?;
    Ok(ingredients)
}

impl Ingredients {
    /// Adapters of the command line.
    pub(super) fn of(sources: &[OsString], places: &Places) -> Result<Self> {
        let mut ingredients = Self { inputs: Vec::new(), terms: Vec::new(), densities: Vec::new() };
        ingredients.add_all(sources, places)?;
        Ok(ingredients)
    }

    fn add_all(&mut self, sources: &[OsString], places: &Places) -> Result<()> {
        for source in sources {
            let (path, number) = split_strength(&typed(source));
            // An error about the number names the source; one about a place does not.
            Strength::uniform(number).check().map_err(|e| e.at(&path))?;
            if path.as_os_str() == "-" && self.inputs.iter().any(Input::is_stdin) {
                return Err(Error::new(Code::InvalidArgument, "standard input can be read only once"));
            }
            self.add(&path, strengths::strength(number, places)?, None);
        }
        Ok(())
    }

    /// The files, read.
    pub(super) fn open(
        &self,
        registry: &Arc<Registry>,
        options: &ConvertOptions,
        base: Option<&Arc<Base>>,
        progress: Option<&Progress>,
    ) -> Result<Vec<Adapter>> {
        let open = |input: &Input| {
            let source = input.open(progress).map_err(|e| explained(e, &input.path))?;
            convert::open(registry, source, options, base.cloned()).map_err(|e| e.at(&input.path))
        };
        let opened: Vec<Result<Adapter>> = self.inputs.par_iter().map(open).collect();
        opened.into_iter().collect()
    }

    /// The adapters at their strengths.
    pub(super) fn terms<'a>(&self, agreed: &'a [Cow<'_, Adapter>]) -> Result<Vec<Term<'a>>> {
        let term = |(number, request): &(usize, Request)| {
            let adapter: &Adapter = &agreed[*number];
            let strength = request.resolve(adapter.family_table()).map_err(|e| e.at(adapter.source.path()))?;
            Ok(Term::new(adapter, strength))
        };
        self.terms.iter().map(term).collect()
    }

    fn add(&mut self, path: &Path, strength: Request, density: Option<f64>) {
        let known = self.inputs.iter().position(|i| i.path == path);
        let number = known.unwrap_or_else(|| {
            self.inputs.push(Input::new(path));
            self.inputs.len() - 1
        });
        self.terms.push((number, strength));
        self.densities.push(density);
    }
}

fn compose(
    registry: &Arc<Registry>,
    ingredients: &Ingredients,
    base: Option<&Arc<Base>>,
    job: &Job<'_>,
    progress: &Progress,
) -> Result<Converted> {
    let adapters = ingredients.open(registry, job.options, base, Some(progress))?;
    let agreed: Vec<Cow<'_, Adapter>> = agree(&adapters.iter().collect::<Vec<_>>())?;
    let terms = ingredients.terms(&agreed)?;
    job.run(&Composition::new(terms)?, progress)
}

/// A file that is missing, while one without what follows the last colon is there: that was meant as a strength.
fn explained(error: Error, path: &Path) -> Error {
    if error.code() == Code::IsADirectory {
        return error.hint("name a file, or a PEFT folder");
    }
    let Some((stem, tail)) = path.to_str().and_then(|p| p.rsplit_once(':')) else { return error };
    if error.code() != Code::NotFound || !Path::new(stem).exists() {
        return error;
    }
    let problem = match tail.parse::<f64>() {
        Ok(_) => "two numbers follow the name".to_owned(),
        Err(_) if tail.is_empty() => "no number follows the colon".to_owned(),
        Err(_) => format!("`{tail}` is no number"),
    };
    error.hint(format!("{problem}; a strength is written like `{stem}:0.8`"))
}
