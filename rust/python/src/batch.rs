//! Whole libraries of adapters.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lorafmt_core::batch::{
    self as engine, BatchOptions, Duplicates, Listing, Naming, Observer, Op, Record, Request, Sources,
};
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::io::{Control, Local, Object, Store};
use lorafmt_core::ops::resize::{Criterion, RankRule};
use pyo3::prelude::*;
use serde_json::Value;

use crate::base::Base;
use crate::enter::enter;
use crate::{TABLES, options, registry, to_json};

/// Works through a library and returns the summary. `store` reads and writes addresses: an object with `list`, `fetch`,
/// `put` and `stat`, as `lorafmt.storage` has one.
#[pyfunction]
#[pyo3(signature = (options, base=None, store=None, progress=None))]
pub(crate) fn batch(
    py: Python<'_>,
    options: &str,
    base: Option<Py<Base>>,
    store: Option<Py<PyAny>>,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let store = store.map(Outside);
    enter(py, progress.as_ref(), |control| {
        let asked = Asked::read(options, base.map(|b| Arc::clone(&b.get().inner)))?;
        let store = store.as_ref().map(|s| s as &dyn Store);
        let (listing, step) = asked.listing(store)?;
        let watch = Watch { control, files: AtomicU64::new(0) };
        let summary = engine::run(&listing, &step, &asked.options()?, store, &watch)?;
        let mut value = serde_json::to_value(summary).unwrap_or_default();
        value["other_files"] = listing.others.into();
        Ok(value.to_string())
    })
}

/// The plan of a library: the JSON of an entry for each file. Nothing is written.
#[pyfunction]
#[pyo3(signature = (options, base=None, store=None))]
pub(crate) fn batch_plan(
    py: Python<'_>,
    options: &str,
    base: Option<Py<Base>>,
    store: Option<Py<PyAny>>,
) -> PyResult<Vec<String>> {
    let store = store.map(Outside);
    enter(py, None, |_| {
        let asked = Asked::read(options, base.map(|b| Arc::clone(&b.get().inner)))?;
        let (listing, _) = asked.listing(store.as_ref().map(|s| s as &dyn Store))?;
        listing.entries()?.map(|entry| entry.map(|e| to_json(&e))).collect()
    })
}

/// Keyword arguments.
struct Asked {
    value: Value,
    request: Request,
}

impl Asked {
    fn read(json: &str, base: Option<Arc<lorafmt_core::native::Base>>) -> Result<Self> {
        let value: Value = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        let text = |name: &str| value.get(name).and_then(Value::as_str);
        let number = |name: &str| value.get(name).and_then(Value::as_f64);
        let mut convert = options::parse(json)?;
        convert.native = base.as_ref().map(|b| options::native(json, b, true)).transpose()?;
        let criterion = number("energy").map(Criterion::Energy).or(number("max_error").map(Criterion::MaxError));
        let limit = value.get("rank").and_then(Value::as_u64).map(|n| n as usize);
        let request = Request {
            op: one_of("op", text("op").unwrap_or("convert"), &Op::ALL.map(|op| (op.name(), op)))?,
            options: convert,
            rule: (limit.is_some() || criterion.is_some()).then_some(RankRule { limit, criterion }),
            like: text("like").map(PathBuf::from),
            base,
            tables: TABLES.lock().unwrap_or_else(std::sync::PoisonError::into_inner).concat(),
        };
        Ok(Self { value, request })
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.value.get(name).and_then(Value::as_str)
    }

    fn list(&self, name: &str) -> Vec<String> {
        let all = self.value.get(name).and_then(Value::as_array).into_iter().flatten();
        all.filter_map(Value::as_str).map(str::to_owned).collect()
    }

    fn listing(&self, store: Option<&dyn Store>) -> Result<(Listing, engine::Step)> {
        let (step, ending) = self.request.clone().step(&registry())?;
        let naming = Naming::new(self.text("name"), &ending)?;
        let paths = |name: &str| self.list(name).into_iter().map(PathBuf::from).collect();
        let sources = Sources {
            named: self.list("sources"),
            lists: paths("files_from"),
            plans: paths("plans"),
            wanted: step.wanted(),
        };
        Ok((Listing::of(&sources, &naming, self.text("out_dir").unwrap_or(""), store)?, step))
    }

    fn options(&self) -> Result<BatchOptions> {
        let flag = |name: &str| self.value.get(name).and_then(Value::as_bool).unwrap_or(false);
        let count = |name: &str| self.value.get(name).and_then(Value::as_u64);
        let out = self.text("out_dir").unwrap_or("").to_owned();
        let manifest = match self.text("manifest") {
            Some(path) => PathBuf::from(path),
            None if out.contains("://") => {
                return Err(
                    bad("outputs go to a store, and records need a local file".to_owned()).hint("pass `manifest=`")
                );
            }
            None => Path::new(&out).join("manifest.jsonl"),
        };
        let ways = [("link", Duplicates::Link), ("copy", Duplicates::Copy), ("convert", Duplicates::Convert)];
        Ok(BatchOptions {
            out,
            manifest,
            force: flag("overwrite"),
            verify: flag("verify_hash"),
            max_failures: count("max_failures"),
            workers: count("workers").map(|n| n as usize),
            duplicates: one_of("duplicates", self.text("duplicates").unwrap_or("link"), &ways)?,
            hash: flag("hash"),
        })
    }
}

fn bad(message: String) -> Error {
    Error::new(Code::InvalidArgument, message)
}

fn one_of<T: Copy>(what: &str, have: &str, choices: &[(&str, T)]) -> Result<T> {
    choices.iter().find(|(name, _)| *name == have).map(|(_, value)| *value).ok_or_else(|| {
        let all = choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        bad(format!("`{what}` is `{have}`")).hint(format!("one of: {all}"))
    })
}

/// Counts files for Python's callback.
struct Watch<'c> {
    control: &'c Control,
    files: AtomicU64,
}

impl Observer for Watch<'_> {
    fn listed(&self, files: u64, _: u64) {
        self.control.expect(files as usize);
    }

    fn end(&self, _: usize, _: &Record) {
        self.files.fetch_add(1, Ordering::Relaxed);
        self.control.advance(1);
    }

    fn stopped(&self) -> bool {
        self.control.check().is_err()
    }
}

/// A store that Python has.
struct Outside(Py<PyAny>);

impl Outside {
    /// Calls a method; what it raises is the error of that address.
    fn call<T>(&self, address: &str, work: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> Result<T> {
        Python::attach(|py| work(self.0.bind(py)).map_err(|e| raised(py, &e).at(Path::new(address))))
    }
}

/// An exception as an error; one of this package keeps its code and its hint.
fn raised(py: Python<'_>, error: &PyErr) -> Error {
    let value = error.value(py);
    let text = |name: &str| value.getattr(name).ok().and_then(|v| v.extract::<String>().ok());
    let code = text("code").and_then(|name| Code::ALL.iter().copied().find(|c| c.as_str() == name));
    let plain = value.str().map_or_else(|_| "an exception".to_owned(), |t| t.to_string());
    let message = plain.split("\nhint:").next().unwrap_or(&plain).to_owned();
    let made = Error::new(code.unwrap_or(Code::Io), message);
    match text("hint") {
        Some(hint) => made.hint(hint),
        None => made,
    }
}

impl Store for Outside {
    fn list(&self, at: &str, each: &mut dyn FnMut(Object) -> Result<()>) -> Result<()> {
        let found: Vec<(String, u64, String)> = self.call(at, |store| store.call_method1("list", (at,))?.extract())?;
        found.into_iter().try_for_each(|(url, size, version)| each(Object { url, size, version }))
    }

    fn fetch(&self, url: &str) -> Result<Local> {
        let (path, kept): (PathBuf, bool) = self.call(url, |store| store.call_method1("fetch", (url,))?.extract())?;
        match kept {
            true => Ok(Local::Kept(path)),
            false => tempfile::TempPath::try_from_path(&path)
                .map(Local::Temporary)
                .map_err(|e| Error::io(&path, "keep the download", e)),
        }
    }

    fn put(&self, file: &Path, url: &str) -> Result<()> {
        self.call(url, |store| store.call_method1("put", (file, url)).map(drop))
    }

    fn stat(&self, url: &str) -> Result<Option<Object>> {
        let found: Option<(String, u64, String)> =
            self.call(url, |store| store.call_method1("stat", (url,))?.extract())?;
        Ok(found.map(|(url, size, version)| Object { url, size, version }))
    }
}
