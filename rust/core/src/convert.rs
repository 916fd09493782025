//! Conversion from end to end, for the command line and Python alike.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::adapter::{Adapter, ModuleKey};
use crate::cast::Loss;
use crate::compose::{Composition, Term, Unknown};
use crate::decode::decode;
use crate::detect::Given;
use crate::dtype::Dtype;
use crate::encode::{Algebra, EncodeOptions, MAX_RANK, encode};
use crate::error::{Code, Error, Result};
use crate::io::{Control, Layout, Pending, Source, WriteOptions, refuse_existing, write_file, write_to};
use crate::kind::Kind;
use crate::native::{Base, NativeOptions};
use crate::ops::expand::settled;
use crate::plan::{Fate, Plan};
use crate::report::{Report, SourceReport, TargetReport, Warning};
use crate::table::{AlphaPolicy, Dialect, Registry};

/// What a conversion is asked to do.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// The dialect to write, by name or alias.
    pub to: String,
    /// The dialect that the input is said to be.
    pub from: Option<String>,
    /// The family that the input is said to be.
    pub family: Option<String>,
    /// The element type of factors; `None` keeps the input's.
    pub dtype: Option<Dtype>,
    /// A factor on every delta.
    pub strength: f64,
    /// Unknown keys.
    pub unknown: Unknown,
    /// Leave out what the target cannot hold.
    pub lossy: bool,
    /// The highest rank of a plain form of LoHa and LoKr (see [`EncodeOptions::max_rank`]).
    pub max_rank: Option<usize>,
    /// The input width of modules that have several (see [`EncodeOptions::width`]).
    pub width: Option<usize>,
    /// The quantized base, for dialects that are written behind one (see [`EncodeOptions::native`]).
    pub native: Option<NativeOptions>,
    /// What is done to every module before it is written (see [`EncodeOptions::algebra`]).
    pub algebra: Algebra,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            to: String::new(),
            from: None,
            family: None,
            dtype: None,
            strength: 1.0,
            unknown: Unknown::Error,
            lossy: false,
            max_rank: None,
            width: None,
            native: None,
            algebra: Algebra::default(),
        }
    }
}

/// Where a result goes.
pub enum Target<'a> {
    /// A file; for the dialect with a configuration file, also a folder (a path without `.safetensors`).
    File(&'a Path, WriteOptions),
    /// A stream.
    Stream(&'a mut dyn std::io::Write),
    /// Nowhere: only the report is wanted.
    Nowhere,
}

/// Names given by the user, as numbers of the tables.
pub fn given(registry: &Registry, family: Option<&str>, from: Option<&str>) -> Result<Given> {
    Ok(Given {
        families: family.map(|name| registry.sizes(name)).transpose()?.unwrap_or_default(),
        dialect: from.map(|name| registry.dialect(name)).transpose()?,
        ..Given::default()
    })
}

/// Opens and reads an adapter; `base` is taken off a native one.
pub fn open(
    registry: &Arc<Registry>,
    source: Source,
    options: &ConvertOptions,
    base: Option<Arc<Base>>,
) -> Result<Adapter> {
    let given = given(registry, options.family.as_deref(), options.from.as_deref())?;
    let given = Given { base, ..given };
    decode(registry, &Arc::new(source), &given)
}

/// Decides a conversion without computing it.
pub fn plan(composition: &Composition<'_>, options: &ConvertOptions, sidecar: bool) -> Result<Plan> {
    if !options.strength.is_finite() {
        return Err(Error::new(Code::InvalidArgument, format!("a strength of {} makes no sense", options.strength)));
    }
    let adapter = composition.first();
    let dialect = adapter.registry.dialect(&options.to)?;
    let encode_options = EncodeOptions {
        dialect,
        dtype: options.dtype,
        strength: options.strength,
        unknown: options.unknown,
        lossy: options.lossy,
        sidecar,
        max_rank: options.max_rank,
        width: options.width,
        native: options.native.clone(),
        algebra: options.algebra.clone(),
    };
    let native = adapter.registry.dialects[dialect].native(adapter.family).is_some();
    match native && !options.algebra.is_none() {
        true => in_two_steps(composition, &encode_options),
        false => settle_and_encode(composition, &encode_options),
    }
    .map_err(|e| e.at(adapter.source.path()))
}

/// Branches behind a base are made of adapters as they are: what changes modules is done before, in memory.
fn in_two_steps(composition: &Composition<'_>, options: &EncodeOptions) -> Result<Plan> {
    let first = composition.first();
    let plain = |d: &&Dialect| d.writes(first.family) && d.native(first.family).is_none();
    let dialect = first.registry.dialects.iter().position(|d| plain(&d)).ok_or_else(|| {
        Error::new(Code::UnsupportedTarget, format!("no dialect can hold {} meanwhile", first.family_table().name))
    })?;
    let changed = settle_and_encode(composition, &EncodeOptions { dialect, native: None, ..options.clone() })?;
    let mut bytes = Vec::new();
    write_to(&mut bytes, &Layout::of(&changed), &Control::default())?;
    let names: Vec<&str> = composition.terms().iter().map(|t| t.name.as_str()).collect();
    let source = Source::from_bytes(Path::new(&names.join("+")), Box::new(bytes))?;
    let given = Given { families: vec![first.family], ..Given::default() };
    let adapter = decode(&first.registry, &Arc::new(source), &given)?;
    let second = EncodeOptions { algebra: Algebra::default(), strength: 1.0, ..options.clone() };
    let mut plan = encode(&Composition::of(&adapter), &second)?;
    plan.fates = carried_on(composition, changed.fates, &adapter, &plan.fates);
    plan.alpha = changed.alpha;
    plan.fidelity = plan.fidelity.max(changed.fidelity);
    plan.rounding = plan.rounding.max(changed.rounding);
    plan.warnings.splice(0..0, changed.warnings);
    (plan.merge, plan.resize) = (changed.merge, changed.resize);
    Ok(plan)
}

/// Where inputs went in the end: no further than the second step took the modules that the first made of them.
fn carried_on(composition: &Composition<'_>, mut first: Vec<Fate>, made: &Adapter, second: &[Fate]) -> Vec<Fate> {
    let mut reached: BTreeMap<usize, Fate> = BTreeMap::new();
    for term in composition.terms() {
        for (key, placed) in &term.adapter.modules {
            let Some(made) = made.modules.get(key) else { continue };
            let fate = made.module.inputs.iter().map(|&input| second[input]).max().unwrap_or(Fate::Unknown);
            for number in placed.module.inputs.iter().map(|&input| term.number(input)) {
                // A tensor that several modules share goes as far as the furthest of them.
                reached.entry(number).and_modify(|f| *f = fate.max(*f)).or_insert(fate);
            }
        }
    }
    reached.into_iter().for_each(|(number, fate)| first[number] = first[number].min(fate));
    first
}

fn settle_and_encode(composition: &Composition<'_>, options: &EncodeOptions) -> Result<Plan> {
    let settled = settle(composition, options.dialect, options.max_rank);
    let adapters: Vec<&Adapter> = settled.iter().map(AsRef::as_ref).collect();
    encode(&composition.with(&adapters), options)
}

/// The adapters of a composition, with fused modules that their kind does not let cut in their plain form, where the
/// dialect wants their parts and the rank allows it.
fn settle<'a>(composition: &Composition<'a>, dialect: usize, max_rank: Option<usize>) -> Vec<Cow<'a, Adapter>> {
    let limit = max_rank.or((composition.terms().len() > 1).then_some(MAX_RANK));
    let one = |term: &Term<'a>| {
        let adapter = term.adapter;
        let dialect = &adapter.registry.dialects[dialect];
        // Layers of a quantized model take modules as they stand.
        let elsewhere = dialect.native(adapter.family).is_none();
        let by_part = |key: &ModuleKey| dialect.place(adapter.family, key.component).is_some_and(|p| p.namespace == 0);
        let moved = limit.filter(|_| elsewhere).and_then(|limit| settled(adapter, limit, by_part));
        moved.map_or(Cow::Borrowed(adapter), Cow::Owned)
    };
    composition.terms().iter().map(one).collect()
}

/// Writes a composition. The report's time does not include opening the sources, and their hashes are left open.
pub fn convert(
    composition: &Composition<'_>,
    options: &ConvertOptions,
    target: Target<'_>,
    control: &Control,
) -> Result<Report> {
    let started = Instant::now();
    let registry = &composition.first().registry;
    let dialect = &registry.dialects[registry.dialect(&options.to)?];
    let folder = match &target {
        Target::File(path, _) => dialect.alpha == AlphaPolicy::Config && is_folder_name(path),
        _ => false,
    };
    let plan = plan(composition, options, folder)?;
    let layout = Layout::of(&plan);
    let mut written: Option<PathBuf> = None;
    let loss = match target {
        Target::Nowhere => Loss::default(),
        Target::Stream(out) => write_to(out, &layout, control)?,
        Target::File(path, write) if folder => {
            refuse_same(composition, &path.join("adapter_model.safetensors"))?;
            written = Some(path.to_path_buf());
            write_folder(path, &plan, &layout, write, control)?
        }
        Target::File(path, write) => {
            refuse_same(composition, path)?;
            written = Some(path.to_path_buf());
            write_file(path, &layout, write, control)?
        }
    };
    let mut report = report(composition, &plan, &dialect.name, layout.len());
    report.target.path = written.map(|p| p.to_string_lossy().into_owned());
    report.seconds = started.elapsed().as_secs_f64();
    let ranges = [
        (loss.overflow, "overflow", "finite values became infinite"),
        (loss.underflow, "underflow", "values that are not zero became zero"),
    ];
    for (happened, code, what) in ranges {
        if happened {
            let detail = format!("{what} in the output's element type; choose `--dtype bf16` or `fp32`");
            report.warnings.push(Warning::new(code, None, detail));
        }
    }
    Ok(report)
}

/// The report of a plan that has not been carried out; `bytes` is the size of the file to be.
pub fn report(composition: &Composition<'_>, plan: &Plan, dialect: &str, bytes: usize) -> Report {
    let term = |t: &Term<'_>| SourceReport {
        name: Some(t.name.clone()),
        strength: t.strength.everywhere(),
        ..describe(t.adapter)
    };
    Report {
        schema: 1,
        source: describe(composition.first()),
        sources: if composition.is_single() { vec![] } else { composition.terms().iter().map(term).collect() },
        target: TargetReport {
            path: None,
            dialect: dialect.to_owned(),
            bytes: bytes as u64,
            tensors: plan.outputs.len(),
        },
        tensors: plan.count(),
        modules: plan.modules,
        alpha: plan.alpha,
        fidelity: plan.fidelity,
        max_relative_error: plan.rounding,
        resize: plan.resize.clone(),
        expand: composition.first().expansion.as_ref().map(|e| e.report.clone()),
        merge: plan.merge.clone(),
        warnings: plan.warnings.clone(),
        seconds: 0.0,
    }
}

/// Whether an output path means a folder: it is one, or has no `.safetensors` at its end.
pub fn is_folder_name(path: &Path) -> bool {
    path.is_dir() || path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("safetensors"))
}

/// What PEFT's `save_pretrained` writes. Both files are whole before either gets its name.
fn write_folder(
    folder: &Path,
    plan: &Plan,
    layout: &Layout<'_>,
    write: WriteOptions,
    control: &Control,
) -> Result<Loss> {
    let tensors = folder.join("adapter_model.safetensors");
    let (name, text) = plan.sidecar.as_ref().expect("a folder was asked for");
    let config = folder.join(name);
    refuse_existing(&tensors, write)?;
    refuse_existing(&config, write)?;
    let created = !folder.exists();
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create the folder", e))?;
    let result = Pending::tensors(&tensors, layout, control).and_then(|(pending, loss)| {
        let described = Pending::text(&config, text)?;
        pending.commit(write)?;
        described.commit(write)?;
        Ok(loss)
    });
    if result.is_err() && created {
        // Nothing but what this call made can be in it.
        let _ = std::fs::remove_dir_all(folder);
    }
    result
}

fn refuse_same(composition: &Composition<'_>, output: &Path) -> Result<()> {
    let Ok(output_path) = output.canonicalize() else { return Ok(()) };
    let same = |source: &&Arc<Source>| source.path().canonicalize().is_ok_and(|p| p == output_path);
    match composition.sources().iter().any(same) {
        true => Err(Error::new(Code::SameFile, "input and output are the same file").at(output)),
        false => Ok(()),
    }
}

/// The source part of a report.
pub fn describe(adapter: &Adapter) -> SourceReport {
    SourceReport {
        path: adapter.source.path().to_string_lossy().into_owned(),
        dialect: adapter.detection.dialect_name(&adapter.registry).to_owned(),
        family: adapter.family_table().name.clone(),
        kind: adapter.expansion.as_ref().map_or_else(|| kind_name(adapter), |e| e.kind).to_owned(),
        sha256: None,
        name: adapter.native.as_ref().and_then(|n| n.entry.as_ref()).map(|e| e.name.clone()),
        strength: None,
    }
}

/// The kind of the file: that of its layers, `mixed` if they are of several. Biases and norms accompany any kind.
pub fn kind_name(adapter: &Adapter) -> &'static str {
    let mut kinds: Vec<&'static str> = Vec::new();
    let accompanies = |kind: Kind| matches!(kind, Kind::Bias | Kind::Norm | Kind::Set);
    let layers = adapter.modules.values().filter(|p| !accompanies(p.module.kind));
    for placed in layers {
        let name = placed.module.kind_name();
        if !kinds.contains(&name) {
            kinds.push(name);
        }
    }
    match kinds.as_slice() {
        [one] => one,
        [] => adapter.modules.values().next().map_or("none", |p| p.module.kind_name()),
        _ => "mixed",
    }
}
