//! Files of lorafmt that are somewhere else: on a Hugging Face hub (`hf://`) or in a bucket (`s3://`).
//!
//! [`Remote`] is a [`Store`] of the core over both. Everything async is in here and nothing of it shows: all calls block.
//! Files of a hub go through the cache that `huggingface_hub` uses, in its layout; files of a bucket into temporary ones.
//! [`Remote::glance`] reads a header, and what else is looked at, by ranged requests.

#![forbid(unsafe_code)]

mod address;
mod glance;
mod http;
mod hub;
mod retry;
mod s3;

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lorafmt_core::io::{Beside, Control, Local, Object, Source, Store};
use lorafmt_core::{Code, Error, Result};

pub use address::{Address, HubAddress, S3Address, is_remote};
use hub::Hub;
use s3::Buckets;

/// How often a running transfer looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);

/// The hub and the buckets that the environment tells of. Clones share connections.
///
/// Nothing is connected to, and no file is read, before the first call.
#[derive(Clone)]
pub struct Remote(Arc<Inner>);

struct Inner {
    env: Env,
    runtime: tokio::runtime::Runtime,
    hub: OnceLock<Result<Hub>>,
    buckets: OnceLock<Buckets>,
}

/// Values by names.
type Lookup = dyn Fn(&str) -> Option<String> + Send + Sync;

/// The environment, as a function of names; empty values count as unset.
#[derive(Clone)]
pub(crate) struct Env(Arc<Lookup>);

impl Env {
    pub(crate) fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    }

    /// `1`, `true`, `yes` and `on`, in any case.
    pub(crate) fn is_true(&self, name: &str) -> bool {
        let value = self.get(name).unwrap_or_default();
        ["1", "true", "yes", "on"].iter().any(|word| value.eq_ignore_ascii_case(word))
    }
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Remote")
    }
}

impl Remote {
    /// Everything is set by environment variables; the documentation lists them.
    pub fn from_env() -> Result<Self> {
        Self::with_env(|name| std::env::var(name).ok())
    }

    /// The same with another environment than the process's.
    pub fn with_env(env: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.map_err(|e| Error::new(Code::Io, format!("cannot start threads for transfers: {e}")))?;
        let env = Env(Arc::new(env));
        Ok(Self(Arc::new(Inner { env, runtime, hub: OnceLock::new(), buckets: OnceLock::new() })))
    }

    fn hub(&self) -> Result<&Hub> {
        let hub = self.0.hub.get_or_init(|| Hub::new(&self.0.env));
        hub.as_ref().map_err(Error::duplicate)
    }

    fn buckets(&self) -> &Buckets {
        self.0.buckets.get_or_init(|| Buckets::new(self.0.env.clone()))
    }

    /// Runs a transfer to its end, or until somebody asks to stop. What it wrote so far is removed then.
    fn block<T>(&self, control: &Control, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.0.runtime.block_on(async {
            let stopped = async {
                loop {
                    if let Err(error) = control.check() {
                        return error;
                    }
                    tokio::time::sleep(LOOK).await;
                }
            };
            tokio::select! {
                // Looked at first: what was to stop before it began does not begin.
                biased;
                error = stopped => Err(error),
                result = work => result,
            }
        })
    }

    /// The file as a local one, whole and of the length that was said.
    pub fn fetch(&self, url: &str, control: &Control) -> Result<Local> {
        let fetched = match Address::parse(url)? {
            Address::Hub(at) => {
                let hub = self.hub()?;
                self.block(control, hub.fetch_one(&at, control))
            }
            Address::S3(at) => self.block(control, self.buckets().fetch(&at, control)),
        };
        fetched.map_err(|e| e.at(Path::new(url)))
    }

    /// The address of the one file that an address stands for: a repository or a folder of a hub has one if it holds a
    /// single adapter, or one under a name that libraries load by default.
    pub fn file(&self, url: &str, control: &Control) -> Result<String> {
        match Address::parse(url)? {
            Address::Hub(at) => {
                let hub = self.hub()?;
                self.block(control, hub.one_file(&at)).map(|at| at.to_string()).map_err(|e| e.at(Path::new(url)))
            }
            Address::S3(at) => Ok(at.to_string()),
        }
    }

    /// Reads text files beside a remote file.
    fn beside(&self, url: &str) -> Beside {
        let (remote, url) = (self.clone(), url.to_owned());
        Box::new(move |name| remote.text(&Address::parse(&url)?.sibling(name)))
    }

    /// A small text file; `None` if there is none.
    fn text(&self, at: &Address) -> Result<Option<String>> {
        let url = at.to_string();
        let control = Control::default();
        let fetched = match at {
            // The name is known: nothing has to be found out about it.
            Address::Hub(at) => {
                self.block(&control, self.hub()?.fetch(at, &control)).map_err(|e| e.at(Path::new(&url)))
            }
            Address::S3(_) => self.fetch(&url, &control),
        };
        let local = match fetched {
            Ok(local) => local,
            Err(e) if e.code() == Code::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let text = std::fs::read_to_string(&local).map_err(|e| Error::io(Path::new(&url), "read the file", e))?;
        Ok(Some(text))
    }
}

impl Store for Remote {
    fn list(&self, at: &str, each: &mut dyn FnMut(Object) -> Result<()>) -> Result<()> {
        let control = Control::default();
        let listed = match Address::parse(at)? {
            Address::Hub(at) => {
                let hub = self.hub()?;
                self.block(&control, hub.list(&at, each))
            }
            Address::S3(at) => self.block(&control, self.buckets().list(&at, each)),
        };
        listed.map_err(|e| e.at(Path::new(at)))
    }

    fn open(&self, url: &str, control: &Control) -> Result<Source> {
        let url = self.file(url, control)?;
        let local = self.fetch(&url, control)?;
        Ok(Source::fetched(Path::new(&url), local)?.with_beside(self.beside(&url)))
    }

    fn put(&self, file: &Path, url: &str) -> Result<()> {
        let put = match Address::parse(url)? {
            Address::Hub(_) => Err(Error::new(Code::RemoteReadOnly, "lorafmt writes nothing to a hub")),
            Address::S3(at) => self.block(&Control::default(), self.buckets().put(file, &at)),
        };
        put.map_err(|e| e.at(Path::new(url)))
    }

    fn stat(&self, url: &str) -> Result<Option<Object>> {
        let control = Control::default();
        let found = match Address::parse(url)? {
            Address::Hub(at) => {
                let hub = self.hub()?;
                self.block(&control, hub.stat(&at))
            }
            Address::S3(at) => self.block(&control, self.buckets().stat(&at)),
        };
        found.map_err(|e| e.at(Path::new(url)))
    }
}
