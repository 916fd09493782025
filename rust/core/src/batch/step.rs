//! What is done with each file.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::listing::Wanted;
use super::{is_address, store_for};
use crate::adapter::Adapter;
use crate::compose::{Composition, Term, agree};
use crate::convert::{self, ConvertOptions, Target};
use crate::decode::decode;
use crate::detect::Given;
use crate::encode::Algebra;
use crate::error::{Code, Error, Result};
use crate::io::{Control, Source, Store, WriteOptions};
use crate::native::Base;
use crate::ops::KeySet;
use crate::recipe;
use crate::report::{Report, Warning};
use crate::table::Registry;

/// What kind of step.
#[derive(Debug, Clone)]
pub enum Work {
    /// Each file is written by the options alone: converted, or resized by their algebra.
    Each,
    /// Each file is brought to a set of modules before.
    Complete(Arc<KeySet>),
    /// Each source is a recipe.
    Recipe,
}

/// A step: the same for all files.
#[derive(Debug, Clone)]
pub struct Step {
    /// The tables.
    pub registry: Arc<Registry>,
    /// What is written, and how; an empty dialect stands for that of the source.
    pub options: ConvertOptions,
    /// The quantized base, opened once.
    pub base: Option<Arc<Base>>,
    /// What is done.
    pub work: Work,
    /// What decides the result beside the options: the content of user tables, the file that says what modules there are.
    pub also: String,
}

/// What came of one file.
pub(super) struct Made {
    pub report: Report,
    pub ranks: BTreeSet<usize>,
    /// Whether the result depends on the source's name, too.
    pub by_name: bool,
}

impl Step {
    /// What kind of files the step takes.
    pub fn wanted(&self) -> Wanted {
        if matches!(self.work, Work::Recipe) { Wanted::Recipes } else { Wanted::Adapters }
    }

    /// A hash of all that decides what is made of a file, the version of lorafmt included.
    pub fn fingerprint(&self) -> String {
        let ConvertOptions { to, from, family, dtype, strength, unknown, lossy, max_rank, width, native, algebra } =
            &self.options;
        let base = self.base.as_ref().map(|b| b.fingerprint().to_owned());
        let native = native.as_ref().map(|n| (n.layout, n.precision));
        let kept = match &self.work {
            Work::Complete(_) => "complete",
            Work::Each => "each",
            Work::Recipe => "recipe",
        };
        let asked = (to, from, family, dtype, strength, unknown, lossy, max_rank, width);
        let all = (env!("CARGO_PKG_VERSION"), asked, native, base, algebra, kept, &self.also);
        format!("{:016x}", xxh3_64(format!("{all:?}").as_bytes()))
    }

    /// Makes the output of one source, a path or an address.
    pub(super) fn run(
        &self,
        source: &str,
        store: Option<&dyn Store>,
        output: &Path,
        write: WriteOptions,
        control: &Control,
    ) -> Result<Made> {
        let open = |name: &str| match is_address(name) {
            true => self.open(store_for(store, name)?.open(name, control)?),
            false => self.open(Source::open(Path::new(name))?),
        };
        match &self.work {
            Work::Recipe => self.cook(source, open, output, write, control),
            Work::Each => self.write(&open(source)?, 0, output, write, control),
            Work::Complete(keys) => {
                let (adapter, added) = keys.complete(&open(source)?)?;
                self.write(&adapter, added, output, write, control)
            }
        }
    }

    fn open(&self, source: Source) -> Result<Adapter> {
        let source = Arc::new(source);
        let given = convert::given(&self.registry, self.options.family.as_deref(), self.options.from.as_deref())?;
        let given = Given { base: self.base.clone(), ..given };
        decode(&self.registry, &source, &given).map_err(|error| {
            // A model, a VAE, embeddings: no family explains them, and nothing in them looks like an adapter's.
            let adapters = || source.tensors().iter().any(|t| self.registry.is_adapters(&t.name));
            match error.code() {
                Code::UnknownFamily if !adapters() => {
                    Error::new(Code::NotAnAdapter, "no key is named as those of adapters are")
                }
                _ => error,
            }
        })
    }

    fn write(
        &self,
        adapter: &Adapter,
        added: usize,
        output: &Path,
        write: WriteOptions,
        control: &Control,
    ) -> Result<Made> {
        let options = ConvertOptions { to: self.dialect(adapter)?, ..self.options.clone() };
        let mut report = convert::convert(&Composition::of(adapter), &options, Target::File(output, write), control)?;
        if added > 0 {
            let detail = format!("{added} modules were added as zeros");
            report.warnings.push(Warning::new("added-modules", None, detail));
        }
        let native = self.registry.dialects[self.registry.dialect(&options.to)?].native(adapter.family).is_some();
        let by_name = native || matches!(adapter.detection.tie_break, Some("name" | "unsure"));
        Ok(Made { report, ranks: ranks(adapter), by_name })
    }

    /// The dialect to write: that of the source, unless one was asked for.
    fn dialect(&self, adapter: &Adapter) -> Result<String> {
        if !self.options.to.is_empty() {
            return Ok(self.options.to.clone());
        }
        adapter.own_dialect().map(|d| d.name.clone())
    }

    fn cook(
        &self,
        source: &str,
        open: impl Fn(&str) -> Result<Adapter>,
        output: &Path,
        write: WriteOptions,
        control: &Control,
    ) -> Result<Made> {
        if is_address(source) {
            return Err(Error::new(Code::InvalidArgument, "recipes are read from files").hint("fetch it first"));
        }
        let recipe = recipe::read(Path::new(source))?;
        let asked = |own: &str| if own.is_empty() { None } else { Some(own.to_owned()) };
        let first = || self.registry.dialects[0].name.clone();
        let to = asked(&self.options.to).or(recipe.to.clone()).unwrap_or_else(first);
        if recipe.base.is_some() && self.base.is_none() {
            return Err(Error::new(
                Code::BaseNeeded,
                "the recipe names a base; in a batch all recipes have the same one",
            )
            .hint("name it with `--base`"));
        }
        let densities = recipe.loras.iter().map(|l| l.density).collect();
        let options = ConvertOptions { to, algebra: Algebra::of(&recipe.choices, densities)?, ..self.options.clone() };
        let open = |lora: &recipe::RecipeLora| open(&lora.path.to_string_lossy()).map_err(|e| e.at(&lora.path));
        let adapters = recipe.loras.iter().map(open).collect::<Result<Vec<_>>>()?;
        let agreed = agree(&adapters.iter().collect::<Vec<_>>())?;
        let mut terms = Vec::with_capacity(agreed.len());
        for (lora, adapter) in recipe.loras.iter().zip(&agreed) {
            let strength = lora.strength.resolve(adapter.family_table()).map_err(|e| e.at(&lora.path))?;
            terms.push(Term::new(adapter, strength));
        }
        let report = convert::convert(&Composition::new(terms)?, &options, Target::File(output, write), control)?;
        Ok(Made { report, ranks: adapters.iter().flat_map(ranks).collect(), by_name: true })
    }
}

/// The ranks of an adapter's modules.
fn ranks(adapter: &Adapter) -> BTreeSet<usize> {
    adapter.modules.values().filter_map(|p| p.module.rank()).collect()
}
