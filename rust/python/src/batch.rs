//! Whole libraries of adapters.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lorafmt_core::batch::{
    self as engine, BatchOptions, Duplicates, Listing, Naming, Observer, Op, Record, Request, Sources,
};
use lorafmt_core::error::{Code, Error, Result};
use lorafmt_core::io::{Control, Store};
use lorafmt_core::ops::resize::{Criterion, RankRule};
use lorafmt_remote::{Remote, is_remote};
use pyo3::prelude::*;
use serde_json::Value;

use crate::base::Base;
use crate::enter::enter;
use crate::{TABLES, options, registry, to_json};

/// Works through a library and returns the summary.
#[pyfunction]
#[pyo3(signature = (options, base=None, progress=None))]
pub(crate) fn batch(
    py: Python<'_>,
    options: &str,
    base: Option<Py<Base>>,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    enter(py, progress.as_ref(), |control| {
        let asked = Asked::read(options, base.map(|b| Arc::clone(&b.get().inner)))?;
        let store = asked.store()?;
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
#[pyo3(signature = (options, base=None))]
pub(crate) fn batch_plan(py: Python<'_>, options: &str, base: Option<Py<Base>>) -> PyResult<Vec<String>> {
    enter(py, None, |_| {
        let asked = Asked::read(options, base.map(|b| Arc::clone(&b.get().inner)))?;
        let store = asked.store()?;
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

    /// What reads and writes addresses, if there can be any: lists, plans and recipes show them only when they are read.
    fn store(&self) -> Result<Option<Remote>> {
        let hidden = ["files_from", "plans"].iter().any(|name| !self.list(name).is_empty());
        let hidden = hidden || self.request.op == Op::Compose;
        let named =
            self.list("sources").iter().chain(self.text("out_dir").map(str::to_owned).iter()).any(|n| is_remote(n));
        (hidden || named).then(Remote::from_env).transpose()
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
