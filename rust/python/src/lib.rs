//! `lorafmt._lorafmt`: argument conversion and nothing else. Reports cross the border as the JSON of the public contract,
//! so Python and the command line cannot drift apart.

mod base;
mod batch;
mod choices;
mod compose;
mod enter;
mod expand;
mod options;
mod report;
mod resize;
mod source;
mod weights;

use std::path::PathBuf;
use std::sync::Arc;

use lorafmt_core::adapter::{Adapter as CoreAdapter, ModuleKey, Placed};
use lorafmt_core::check::check as core_check;
use lorafmt_core::compose::Term;
use lorafmt_core::convert;
use lorafmt_core::decode::decode_lenient;
use lorafmt_core::detect::Given;
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::io::{Layout, WriteOptions, write_file};
use lorafmt_core::native::disassemble;
use lorafmt_core::plan::{Output, Plan as CorePlan};
use lorafmt_core::strength::Strength;
use lorafmt_core::table::Registry;
use lorafmt_core::tensor::Tensor;
use lorafmt_core::{inspect as core_inspect, ops};
use lorafmt_remote::Remote;
use pyo3::prelude::*;
use serde_json::Value;

use base::Base;
use compose::{converted, plan, write};
use enter::enter;
use expand::expand_adapter;
use resize::completed;
use source::{Buffer, SourceArgument, fill};

/// The tables in use: the built-in ones, and those registered since.
static REGISTRY: std::sync::RwLock<Option<Arc<Registry>>> = std::sync::RwLock::new(None);
static TABLES: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());

fn registry() -> Arc<Registry> {
    let current = REGISTRY.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    current.as_ref().map_or_else(Registry::builtin, Arc::clone)
}

/// Adds a table (TOML text) for this process; an equal name replaces.
#[pyfunction]
fn register_table(py: Python<'_>, text: String) -> PyResult<()> {
    enter(py, None, |_| {
        let mut tables = TABLES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut wanted = tables.clone();
        wanted.push(text);
        let compiled = Registry::with_tables(&wanted)?;
        *REGISTRY.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(compiled);
        *tables = wanted;
        Ok(())
    })
}

/// The tables that were added, as text, in their order.
#[pyfunction]
fn tables() -> Vec<String> {
    TABLES.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
}

fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
}

/// An adapter that has been read; its tensors stay where they are.
#[pyclass(frozen, module = "lorafmt._lorafmt")]
struct Adapter {
    inner: CoreAdapter,
    problems: Vec<Error>,
}

impl Adapter {
    /// The adapter, unless reading it met a problem.
    fn sound(&self) -> Result<&CoreAdapter> {
        match self.problems.first() {
            Some(problem) => Err(problem.duplicate()),
            None => Ok(&self.inner),
        }
    }

    fn find(&self, name: &str) -> Result<(&ModuleKey, &Placed)> {
        let adapter = self.sound()?;
        let by_path = |full: bool| {
            adapter.modules.iter().find(|(k, _)| if full { adapter.display(k) == name } else { k.path == name })
        };
        by_path(true).or_else(|| by_path(false)).ok_or_else(|| {
            Error::new(Code::UnknownKey, format!("no module is called `{name}`"))
                .hint("iterate over the adapter to see its modules")
        })
    }
}

/// Adapters with their names, the base, and the layout.
type Disassembled = (Vec<(String, Adapter)>, Base, &'static str);

#[pymethods]
impl Adapter {
    /// Reads an adapter; `base` is taken off a native one. Problems are kept; they are raised by whatever needs a sound
    /// one.
    #[staticmethod]
    #[pyo3(signature = (source, options="{}", base=None))]
    fn open(py: Python<'_>, source: SourceArgument<'_>, options: &str, base: Option<Py<Base>>) -> PyResult<Self> {
        let source = source.prepare()?;
        let options = options::parse(options);
        enter(py, None, |_| {
            let (registry, options) = (registry(), options?);
            let given = convert::given(&registry, options.family.as_deref(), options.from.as_deref())?;
            let given = Given { base: base.map(|b| Arc::clone(&b.get().inner)), ..given };
            let (inner, problems) = decode_lenient(&registry, &Arc::new(source.open()?), &given)?;
            Ok(Self { inner, problems })
        })
    }

    /// The adapters inside a native file with their names, the base whose branches they continue, and the layout.
    #[pyo3(signature = (base=None))]
    fn disassemble(&self, py: Python<'_>, base: Option<Py<Base>>) -> PyResult<Disassembled> {
        enter(py, None, |_| {
            let base = base.map(|b| Arc::clone(&b.get().inner));
            let apart = disassemble(&self.inner.registry, &self.inner.source, base)?;
            let named = |inner: CoreAdapter| {
                let name = Term::new(&inner, Strength::uniform(1.0)).name;
                (name, Self { inner, problems: Vec::new() })
            };
            let adapters = apart.adapters.into_iter().map(named).collect();
            Ok((adapters, Base { inner: apart.base }, apart.layout.name()))
        })
    }

    /// Raises the first problem, if there is one.
    fn ensure_sound(&self, py: Python<'_>) -> PyResult<()> {
        enter(py, None, |_| self.sound().map(drop))
    }

    /// What the file of an address is, as JSON. Its header is read, and of its tensors those that say something of it.
    #[staticmethod]
    #[pyo3(signature = (url, options="{}", base=None))]
    fn glance(py: Python<'_>, url: &str, options: &str, base: Option<Py<Base>>) -> PyResult<String> {
        let options = options::parse(options);
        enter(py, None, |control| {
            let (registry, options) = (registry(), options?);
            let given = convert::given(&registry, options.family.as_deref(), options.from.as_deref())?;
            let given = Given { base: base.map(|b| Arc::clone(&b.get().inner)), ..given };
            Remote::from_env()?.glance(url, control, |source| {
                let (adapter, problems) = decode_lenient(&registry, &source, &given)?;
                Ok(to_json(&core_inspect::inspect(&adapter, &problems)))
            })
        })
    }

    /// What it is, as JSON; with `weights` also what its weights look like.
    #[pyo3(signature = (weights=false))]
    fn inspect(&self, py: Python<'_>, weights: bool) -> PyResult<String> {
        enter(py, None, |_| {
            let inspection = core_inspect::inspect(&self.inner, &self.problems);
            let inspection = if weights { inspection.with_weights(&self.inner)? } else { inspection };
            Ok(to_json(&inspection))
        })
    }

    /// Names of its modules with their component, in order.
    fn modules(&self, py: Python<'_>) -> PyResult<Vec<(String, String)>> {
        enter(py, None, |_| {
            let adapter = self.sound()?;
            let name = |k: &ModuleKey| (adapter.component(k.component).name.clone(), k.path.clone());
            Ok(adapter.modules.keys().map(name).collect())
        })
    }

    /// The strength that JSON says of each module, in the order of `modules`.
    fn strengths(&self, py: Python<'_>, strength: &str) -> PyResult<Vec<f64>> {
        enter(py, None, |_| {
            let adapter = self.sound()?;
            let strength = compose::strength(adapter, Some(strength))?;
            strength.check()?;
            let of = |k: &ModuleKey| strength.of(&adapter.component(k.component).name, k.component == 0, &k.path);
            Ok(adapter.modules.keys().map(of).collect())
        })
    }

    /// Kind, rank, scale, shape and slots of a module, as JSON.
    fn module(&self, py: Python<'_>, name: &str) -> PyResult<String> {
        enter(py, None, |_| {
            let (_, placed) = self.find(name)?;
            let module = placed.module.tightened();
            let slots: serde_json::Map<String, Value> = module
                .tensors
                .iter()
                .map(|(s, t)| (s.name().to_owned(), serde_json::json!([t.dtype().name(), t.shape()])))
                .collect();
            Ok(to_json(&serde_json::json!({
                "kind": module.kind_name(), "rank": module.rank(), "scale": module.scale,
                "alpha_source": module.alpha_source.name(), "shape": ops::shape(&module), "slots": slots,
            })))
        })
    }

    /// Computes the delta of a module, times `strength`, into a float32 or float64 buffer of its shape.
    fn delta_into(&self, py: Python<'_>, name: &str, strength: f64, buffer: Buffer) -> PyResult<()> {
        enter(py, None, |control| {
            let (_, placed) = self.find(name)?;
            self.inner.ensure_apart()?;
            source::delta_into(&placed.module, strength, &buffer, control)
        })
    }

    /// Checks structure, pairs, shapes, names and values; JSON.
    fn check(&self, py: Python<'_>) -> PyResult<String> {
        enter(py, None, |_| {
            let given = Given { families: vec![self.inner.family], ..Given::default() };
            core_check(&self.inner.registry, &self.inner.source, &given).map(|report| to_json(&report))
        })
    }
}

/// Tensors that are decided but not computed.
#[pyclass(frozen, module = "lorafmt._lorafmt")]
struct Plan {
    inner: CorePlan,
    report: Option<String>,
}

#[pymethods]
impl Plan {
    /// The tensors of a source under their own keys, unread and unchanged.
    #[staticmethod]
    fn raw(py: Python<'_>, source: SourceArgument<'_>) -> PyResult<Self> {
        let source = source.prepare()?;
        enter(py, None, |_| {
            let source = Arc::new(source.open()?);
            let output = |i: usize| Output { key: source.tensors()[i].name.clone(), tensor: Tensor::input(&source, i) };
            let outputs = (0..source.tensors().len()).map(output).collect();
            let inner = CorePlan::of_outputs(outputs, source.metadata().to_vec());
            Ok(Self { inner, report: None })
        })
    }

    /// Key, element type and shape of every tensor.
    fn tensors(&self) -> Vec<(String, &'static str, Vec<usize>)> {
        self.inner.outputs.iter().map(|o| (o.key.clone(), o.tensor.dtype().name(), o.tensor.shape().to_vec())).collect()
    }

    /// The metadata of the file to be.
    fn metadata(&self) -> Vec<(String, String)> {
        self.inner.full_metadata()
    }

    /// The report as JSON, if this is a conversion.
    fn report(&self) -> Option<String> {
        self.report.clone()
    }

    /// Computes every tensor into the buffer at its position.
    fn fill(&self, py: Python<'_>, buffers: Vec<Buffer>) -> PyResult<()> {
        enter(py, None, |control| fill(&self.inner, &buffers, control))
    }

    /// Writes a file of these tensors and this metadata.
    fn write(&self, py: Python<'_>, path: PathBuf, metadata: Vec<(String, String)>, overwrite: bool) -> PyResult<()> {
        enter(py, None, |control| {
            let layout = Layout::new(&self.inner.outputs, &metadata);
            write_file(&path, &layout, WriteOptions { overwrite }, control).map(drop)
        })
    }
}

/// Checks structure, pairs, shapes, names and values; JSON.
#[pyfunction]
#[pyo3(signature = (source, options="{}"))]
fn check(py: Python<'_>, source: SourceArgument<'_>, options: &str) -> PyResult<String> {
    let source = source.prepare()?;
    let options = options::parse(options);
    enter(py, None, |_| {
        let (registry, options) = (registry(), options?);
        let given = convert::given(&registry, options.family.as_deref(), options.from.as_deref())?;
        core_check(&registry, &Arc::new(source.open()?), &given).map(|report| to_json(&report))
    })
}

/// Compares two adapters by their deltas; JSON. `by_module` lists modules that are equal, too.
#[pyfunction]
#[pyo3(signature = (a, b, tolerance, by_module=false))]
fn diff(py: Python<'_>, a: &Adapter, b: &Adapter, tolerance: f64, by_module: bool) -> PyResult<String> {
    enter(py, None, |_| {
        let mut report = ops::diff(a.sound()?, b.sound()?, tolerance)?;
        if !by_module {
            report.by_module.clear();
        }
        Ok(to_json(&report))
    })
}

/// Names of dialects (with whether each is written) and of families, then those of single sizes.
#[pyfunction]
fn formats() -> (Vec<(String, bool)>, Vec<String>) {
    let registry = registry();
    let dialects = registry.dialects.iter().map(|d| (d.name.clone(), d.write)).collect();
    let mut families: Vec<String> = registry.family_names().into_iter().map(str::to_owned).collect();
    families.extend(registry.families.iter().filter(|f| f.variant.is_some()).map(|f| f.label()));
    (dialects, families)
}

/// Names of the components of all families.
#[pyfunction]
fn components() -> Vec<String> {
    let registry = registry();
    let mut names: Vec<String> = registry.families.iter().flat_map(|f| &f.components).map(|c| c.name.clone()).collect();
    names.sort();
    names.dedup();
    names
}

/// The dialect of branches behind a quantized base.
#[pyfunction]
fn native_dialect() -> Option<String> {
    registry().dialects.iter().find(|d| !d.natives.is_empty()).map(|d| d.name.clone())
}

/// Every error code.
#[pyfunction]
fn error_codes() -> Vec<&'static str> {
    Code::ALL.iter().map(|c| c.as_str()).collect()
}

/// Runs the command line and returns the exit code.
#[pyfunction]
fn run(py: Python<'_>, args: Vec<std::ffi::OsString>) -> u8 {
    py.detach(|| lorafmt::run(args) as u8)
}

/// The native part of lorafmt. Private: the package's own modules are the interface.
#[pymodule(gil_used = false)]
mod _lorafmt {

    #[pymodule_export]
    use super::batch::{batch, batch_plan};

    #[pymodule_export]
    use super::report::report;

    #[pymodule_export]
    use super::source::address;

    #[pymodule_export]
    use super::weights::{extract, fuse, unfuse};

    #[pymodule_export]
    use super::{
        Adapter, Base, Plan, check, completed, components, converted, diff, error_codes, expand_adapter, formats,
        native_dialect, plan, register_table, run, tables, write,
    };

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
