//! Writing one composition, or only planning it: what `convert`, `compose` and `scale` have in common.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use lorafmt_core::adapter::Adapter;
use lorafmt_core::compose::{Composition, Unknown};
use lorafmt_core::convert::{self, ConvertOptions, Target, is_folder_name};
use lorafmt_core::io::{Layout, WriteOptions};
use lorafmt_core::native::{Base, NativeOptions};
use lorafmt_core::report::Warning;
use lorafmt_core::table::{AlphaPolicy, Registry};
use lorafmt_core::{Code, Error, Result};

use crate::args::{LossyArg, NativeArgs, PrecisionArg, UnknownArg, Writing};
use crate::interrupt;
use crate::output::{self, Converted, Part, Progress};
use crate::sources::Input;
use crate::targets::Goal;

/// The base, opened once for all files; what is elsewhere is fetched.
pub(super) fn open_base(registry: &Registry, path: Option<&Path>) -> Result<Option<Arc<Base>>> {
    let open = |path| Base::read(registry, Arc::new(Input::new(path).open(None)?));
    path.map(|path| open(path).map(Arc::new)).transpose()
}

pub(super) fn native_options(args: &NativeArgs, base: Option<&Arc<Base>>) -> Option<NativeOptions> {
    base.map(|base| NativeOptions {
        base: Arc::clone(base),
        layout: args.layout.map(|l| l.layout()).unwrap_or_default(),
        precision: args.precision.map(PrecisionArg::precision),
        describe: true,
    })
}

/// What all commands that write are asked for.
pub(super) fn options(to: &str, family: Option<&String>, writing: &Writing) -> ConvertOptions {
    ConvertOptions {
        to: to.to_owned(),
        family: family.cloned(),
        dtype: writing.dtype.and_then(|d| d.dtype()),
        unknown: match writing.unknown {
            UnknownArg::Error => Unknown::Error,
            UnknownArg::Drop => Unknown::Drop,
            UnknownArg::Keep => Unknown::Keep,
        },
        lossy: writing.lossy == LossyArg::Allow,
        max_rank: writing.max_rank,
        width: writing.widen,
        ..ConvertOptions::default()
    }
}

/// The dialect to write: that of the source, unless another one is asked for.
pub(super) fn own_dialect(to: Option<&str>, adapter: &Adapter) -> Result<String> {
    to.map_or_else(|| adapter.own_dialect().map(|d| d.name.clone()), |to| Ok(to.to_owned()))
}

/// One output to be.
pub(super) struct Job<'a> {
    pub(super) options: &'a ConvertOptions,
    pub(super) goal: &'a Goal,
    pub(super) dry_run: bool,
    pub(super) force: bool,
    /// Whether missing folders are made.
    pub(super) folders: bool,
    /// Whether there can be several outputs, for which a folder would do.
    pub(super) many: bool,
    /// Whether the report tells the hashes of the sources.
    pub(super) hashed: bool,
    /// What progress calls it.
    pub(super) name: &'a Path,
    /// When work on it began.
    pub(super) started: Instant,
}

impl Job<'_> {
    /// Writes the composition, or plans it.
    pub(super) fn run(&self, composition: &Composition<'_>, progress: &Progress) -> Result<Converted> {
        // Every byte is read for the hashes; that takes as long as the conversion, so both happen at once.
        let mut converted = std::thread::scope(|scope| {
            for source in composition.sources().iter().filter(|_| self.hashed) {
                scope.spawn(|| source.sha256());
            }
            let converted = if self.dry_run { self.plan(composition) } else { self.write(composition, progress) };
            converted.map(|mut converted| {
                converted.report.seconds = self.started.elapsed().as_secs_f64();
                converted
            })
        })?;
        if self.hashed {
            let hashes: Vec<_> = composition.terms().iter().map(|t| t.adapter.source.sha256()).collect();
            let report = &mut converted.report;
            report.source.sha256 = hashes.first().cloned().flatten();
            report.sources.iter_mut().zip(hashes).for_each(|(source, hash)| source.sha256 = hash);
        }
        Ok(converted)
    }

    fn write(&self, composition: &Composition<'_>, progress: &Progress) -> Result<Converted> {
        let control = interrupt::control();
        control.check()?;
        progress.begin(&self.name.to_string_lossy(), &control);
        let write = |target: Target<'_>| convert::convert(composition, self.options, target, &control);
        let result = match self.goal {
            Goal::Stdout => output::binary().and_then(|mut out| write(Target::Stream(&mut out))),
            Goal::File(path) => {
                self.make_folder(path).and_then(|()| write(Target::File(path, WriteOptions { overwrite: self.force })))
            }
        };
        progress.end(&control);
        let report = result.map_err(|e| match e.code() {
            Code::IsADirectory if !self.many => e.hint("name a file"),
            _ => e,
        })?;
        Ok(self.converted(composition, report))
    }

    /// Folders are only made below `--out-dir`.
    fn make_folder(&self, path: &Path) -> Result<()> {
        match path.parent() {
            Some(folder) if self.folders => {
                std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create the folder", e))
            }
            _ => Ok(()),
        }
    }

    fn plan(&self, composition: &Composition<'_>) -> Result<Converted> {
        let path = match self.goal {
            Goal::File(path) => path.as_path(),
            Goal::Stdout => Path::new("-"),
        };
        let registry = &composition.first().registry;
        let dialect = &registry.dialects[registry.dialect(&self.options.to)?];
        let folder = *self.goal != Goal::Stdout && dialect.alpha == AlphaPolicy::Config && is_folder_name(path);
        let mut plan = convert::plan(composition, self.options, folder)?;
        let bytes = Layout::of(&plan).len();
        if self.hashed {
            plan.metadata = plan.full_metadata();
        }
        let mut report = convert::report(composition, &plan, &dialect.name, bytes);
        let exists = if folder { path.join("adapter_model.safetensors") } else { path.to_path_buf() };
        if !self.force && *self.goal != Goal::Stdout && exists.symlink_metadata().is_ok() {
            let detail = "the output exists already; without `--force` nothing would be written";
            report.warnings.push(Warning::new(Code::OutputExists.as_str(), None, detail));
        }
        let planned = output::planned(&plan, path.to_string_lossy().into_owned());
        Ok(Converted { planned: Some(planned), ..self.converted(composition, report) })
    }

    fn converted(&self, composition: &Composition<'_>, report: lorafmt_core::report::Report) -> Converted {
        let part = |t: &lorafmt_core::compose::Term<'_>| Part {
            name: t.name.clone(),
            path: t.adapter.source.path().to_string_lossy().into_owned(),
            strength: t.strength.clone(),
        };
        // Parts of one fused module share its tensors, so its first tensor tells how many modules the file has.
        let modules = composition.first().modules.values();
        let firsts: BTreeSet<usize> = modules.filter_map(|p| p.module.inputs.first().copied()).collect();
        Converted {
            report,
            modules: composition.is_single().then_some(firsts.len()),
            parts: if composition.is_single() { vec![] } else { composition.terms().iter().map(part).collect() },
            stdout: *self.goal == Goal::Stdout,
            planned: None,
        }
    }
}
