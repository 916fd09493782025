//! A Hugging Face hub: its files through the cache of `huggingface_hub`.

mod answer;
mod cache;
mod check;
mod download;
mod settings;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use lorafmt_core::io::{Control, Local, Object};
use lorafmt_core::{Code, Error, Result};
use reqwest::header::{HeaderMap, LINK};
use reqwest::{Method, Response, Url};
use serde::Deserialize;

use crate::HubAddress;
use crate::http::{Http, Request, content_range, is_partial};
use crate::retry::{Retries, Trouble};
use answer::{refused, text};
use cache::Cache;
use settings::Settings;
pub(crate) use settings::expanded;

/// Names under which libraries look for the adapter of a repository, in this order.
const DEFAULT_NAMES: [&str; 2] = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"];

/// Names of files that a message lists.
const MOST_NAMES: usize = 8;

/// A hub.
pub(crate) struct Hub {
    settings: Settings,
    cache: Cache,
    http: Http,
    retries: Retries,
    /// Whether a server answered a range with the whole file.
    rangeless: AtomicBool,
}

/// One file at one commit.
#[derive(Debug, Clone)]
pub(crate) struct Pinned {
    at: HubAddress,
    commit: String,
    /// Names the blob: a SHA-256 for large files, git's hash for small ones.
    etag: String,
    /// In bytes, if the server tells.
    pub(crate) size: Option<u64>,
}

/// A row of a listing.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl Hub {
    pub(crate) fn new(env: &crate::Env) -> Result<Self> {
        let settings = Settings::from_env(env)?;
        let http = Http::new(settings.token.clone(), settings.patience)?;
        let retries = Retries::from_env(env)?;
        let rangeless = AtomicBool::new(false);
        Ok(Self { cache: Cache::new(settings.cache.clone(), settings.symlinks), settings, http, retries, rangeless })
    }

    /// The address of a page or a file.
    fn url(&self, parts: &[&str], path: &str) -> Result<Url> {
        let mut url = self.settings.endpoint.clone();
        {
            let no_base = |()| Error::new(Code::InvalidArgument, "`HF_ENDPOINT` is no address of a server");
            let mut segments = url.path_segments_mut().map_err(no_base)?;
            segments.pop_if_empty().extend(parts.iter().flat_map(|p| p.split('/')));
            segments.extend(path.split('/').filter(|p| !p.is_empty()));
        }
        Ok(url)
    }

    /// The address of a file; a revision is one part of it, whatever slashes it has.
    fn file_url(&self, at: &HubAddress, revision: &str) -> Result<Url> {
        self.with_revision(&[&at.repo, "resolve"], revision, &at.path)
    }

    fn with_revision(&self, parts: &[&str], revision: &str, path: &str) -> Result<Url> {
        let mut url = self.url(parts, "")?;
        let wrong = |()| Error::new(Code::InvalidArgument, "`HF_ENDPOINT` is no address of a server");
        url.path_segments_mut().map_err(wrong)?.push(revision).extend(path.split('/').filter(|p| !p.is_empty()));
        Ok(url)
    }

    fn request(&self, method: Method, url: Url) -> Request {
        Request { method, url, range: None, patience: self.settings.etag_patience, abroad: false }
    }

    /// What a file is: one request, without its content. `retries` is for how often it is tried again.
    async fn look(&self, at: &HubAddress, retries: Retries) -> Result<Pinned> {
        let url = self.file_url(at, at.revision())?;
        let request = self.request(Method::HEAD, url);
        retries
            .run(async || {
                let response = self.http.send(&request).await?;
                if !(response.status().is_success() || response.status().is_redirection()) {
                    self.remember(&response, at);
                    return Err(refused(&response, at).into());
                }
                pinned(at, response.headers(), response.status().is_redirection()).map_err(Trouble::from)
            })
            .await
    }

    /// Notes in the cache that there is no such file, so that this is known offline.
    fn remember(&self, response: &Response, at: &HubAddress) {
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        if header("x-error-code") == Some("EntryNotFound")
            && let Some(commit) = header("x-repo-commit").filter(|c| cache::is_commit(c))
        {
            // A cache that cannot be written to is no obstacle to the answer.
            let _ = self.cache.note_missing(at, commit);
        }
    }

    /// The same, or the file in the cache: at that commit, or the last one that was fetched of a branch while the hub
    /// cannot be reached or does not let anybody in.
    async fn locate(&self, at: &HubAddress) -> Result<Place> {
        if cache::is_commit(at.revision())
            && let Some(path) = self.cache.find(at)
        {
            return Ok(Place::Cached(path));
        }
        let cached = self.cache.find(at);
        if self.settings.offline {
            return match cached {
                Some(path) => Ok(Place::Cached(path)),
                None if self.cache.is_missing(at) => {
                    Err(Error::new(Code::NotFound, format!("`{}` has no `{}`", at.repo, at.path)))
                }
                None => Err(self.not_cached(at)),
            };
        }
        let retries = if cached.is_some() { Retries(0) } else { self.retries };
        match (self.look(at, retries).await, cached) {
            (Ok(pinned), _) => Ok(Place::There(pinned)),
            (Err(error), Some(path)) if may_use_cache(&error) => Ok(Place::Cached(path)),
            (Err(error), _) => Err(error),
        }
    }

    fn not_cached(&self, at: &HubAddress) -> Error {
        let message = format!("it is not in the cache ({}), and HF_HUB_OFFLINE is set", self.settings.cache.display());
        let command = match at.revision.as_deref() {
            Some(revision) => format!("hf download {} {} --revision {revision}", at.repo, at.path),
            None => format!("hf download {} {}", at.repo, at.path),
        };
        Error::new(Code::Offline, message).hint(format!("unset HF_HUB_OFFLINE, or fetch it first: `{command}`"))
    }

    /// A file, from the cache or into it.
    pub(crate) async fn fetch(&self, at: &HubAddress, control: &Control) -> Result<Local> {
        match self.locate(at).await? {
            Place::Cached(path) => Ok(Local::Kept(path)),
            Place::There(pinned) => self.take(&pinned, control).await.map(Local::Kept),
        }
    }

    /// The same for the file or the one adapter that an address stands for.
    pub(crate) async fn fetch_one(&self, at: &HubAddress, control: &Control) -> Result<Local> {
        let at = self.one_file(at).await?;
        match self.fetch(&at, control).await {
            Err(error) => Err(self.with_names(error, &at).await),
            fetched => fetched,
        }
    }

    /// Fetches a file into the cache, unless it is there.
    async fn take(&self, pinned: &Pinned, control: &Control) -> Result<PathBuf> {
        if let Some(path) = self.cache.at_commit(&pinned.at, &pinned.commit) {
            // A cache that cannot be written to is no obstacle to reading it.
            let _ = self.cache.note_revision(&pinned.at, &pinned.commit);
            return Ok(path);
        }
        let slot = self.cache.slot(&pinned.at, &pinned.commit, &pinned.etag)?;
        let _lock = slot.lock().await?;
        if !slot.has_blob() {
            let mut part = slot.part()?;
            self.download(pinned, &mut part, control).await?;
            slot.publish(part)?;
        }
        self.cache.note_revision(&pinned.at, &pinned.commit)?;
        slot.link()
    }

    /// What is at an address; `None` if the repository has no such file.
    pub(crate) async fn stat(&self, at: &HubAddress) -> Result<Option<Object>> {
        if at.path.is_empty() {
            return Ok(None);
        }
        let object = |size, version| Object { url: at.to_string(), size, version };
        match self.locate(at).await {
            Ok(Place::There(Pinned { etag, size: Some(size), .. })) => Ok(Some(object(size, etag))),
            Ok(Place::There(Pinned { at: pinned, commit, etag, size: None })) => {
                let pinned = HubAddress { revision: Some(commit), ..pinned };
                let size = self.part(&pinned, 0..1).await?.1;
                Ok(size.map(|size| object(size, etag)))
            }
            Ok(Place::Cached(path)) => cache::describe(&path).map(|(size, version)| Some(object(size, version))),
            Err(e) if e.code() == Code::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Calls `each` for every file at or below an address.
    pub(crate) async fn list(&self, at: &HubAddress, each: &mut dyn FnMut(Object) -> Result<()>) -> Result<()> {
        if at.path.contains('.')
            && let Some(object) = self.stat(at).await?
        {
            return each(object);
        }
        if self.settings.offline {
            let found = self.cache.list(at)?;
            return match found.is_empty() {
                true => Err(self.not_cached(at)),
                false => found.into_iter().try_for_each(each),
            };
        }
        let mut next = Some(self.with_revision(&["api/models", &at.repo, "tree"], at.revision(), &at.path)?);
        if let Some(url) = &mut next {
            url.query_pairs_mut().append_pair("recursive", "true");
        }
        while let Some(url) = next {
            let (entries, following) = self.page(at, url).await?;
            next = following;
            for entry in entries.into_iter().filter(|e| e.kind == "file") {
                let (size, version) = entry.lfs.map_or((entry.size, entry.oid), |lfs| (lfs.size, lfs.oid));
                each(Object { url: at.with_path(entry.path).to_string(), size, version })?;
            }
        }
        Ok(())
    }

    /// A page of a listing, and the address of the next one.
    async fn page(&self, at: &HubAddress, url: Url) -> Result<(Vec<Entry>, Option<Url>)> {
        let request = self.request(Method::GET, url);
        let work = async || {
            let response = self.http.send(&request).await?;
            if !response.status().is_success() {
                return Err(refused(&response, at).into());
            }
            let following = next_page(response.headers(), &request.url);
            let body = text(response, &request.url).await?;
            let entries = serde_json::from_str(&body)
                .map_err(|e| Error::new(Code::Server, format!("the hub's list of files cannot be read: {e}")));
            Ok((entries?, following))
        };
        self.retries.run(work).await
    }

    /// The file that an address stands for: itself, or the one adapter that a folder holds.
    pub(crate) async fn one_file(&self, at: &HubAddress) -> Result<HubAddress> {
        if std::path::Path::new(&at.path).extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
            return Ok(at.clone());
        }
        if at.path.rsplit('/').next().is_some_and(|name| name.contains('.')) && self.stat(at).await?.is_some() {
            return Ok(at.clone());
        }
        let names = self.adapters(at).await?;
        let folder = if at.path.is_empty() { String::new() } else { format!("{}/", at.path) };
        let default = DEFAULT_NAMES.iter().map(|name| format!("{folder}{name}")).find(|name| names.contains(name));
        match (default, names.as_slice()) {
            (Some(name), _) => Ok(at.with_path(name)),
            (None, [only]) => Ok(at.with_path(only)),
            (None, []) => Err(Error::new(Code::NotFound, "there is no .safetensors file")
                .hint("check the path; lorafmt reads .safetensors files")),
            (None, several) => {
                let message = format!("it holds {} .safetensors files", several.len());
                let example = at.with_path(&several[0]);
                let hint = format!("name one of them, such as `{example}`, or add `--recursive`: {}", listed(several));
                Err(Error::new(Code::AmbiguousAddress, message).hint(hint))
            }
        }
    }

    /// Paths of the adapter files at or below an address, sorted.
    async fn adapters(&self, at: &HubAddress) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let prefix = at.with_path("").to_string().len() + 1;
        let mut take = |object: Object| {
            if object.url.to_ascii_lowercase().ends_with(".safetensors") {
                names.extend(object.url.get(prefix..).map(str::to_owned));
            }
            Ok(())
        };
        self.list(at, &mut take).await?;
        names.sort();
        Ok(names)
    }

    /// A missing file's error names the files that there are.
    async fn with_names(&self, error: Error, at: &HubAddress) -> Error {
        if error.code() != Code::NotFound {
            return error;
        }
        match Box::pin(self.adapters(&at.with_path(""))).await {
            Ok(names) if !names.is_empty() => error.hint(format!("the repository has {}", listed(&names))),
            _ => error,
        }
    }

    /// A file as something to read ranges of; `Err` of its path if it is in the cache.
    pub(crate) async fn ranged(&self, at: &HubAddress) -> Result<std::result::Result<(HubAddress, u64), PathBuf>> {
        let pinned = match self.locate(at).await {
            Ok(Place::Cached(path)) => return Ok(Err(path)),
            Ok(Place::There(pinned)) => pinned,
            Err(error) => return Err(self.with_names(error, at).await),
        };
        if let Some(path) = self.cache.at_commit(at, &pinned.commit) {
            return Ok(Err(path));
        }
        let at = HubAddress { revision: Some(pinned.commit.clone()), ..at.clone() };
        match pinned.size {
            Some(size) => Ok(Ok((at, size))),
            None => match self.part(&at, 0..1).await?.1 {
                Some(size) => Ok(Ok((at, size))),
                None => Err(Error::new(Code::Server, "the hub does not tell the size of the file")),
            },
        }
    }

    /// Whether ranges are what is asked for, as far as is known.
    pub(crate) fn knows_ranges(&self) -> bool {
        !self.rangeless.load(Ordering::Relaxed)
    }

    /// Some bytes of a file at a commit, and the length of the whole.
    pub(crate) async fn part(&self, at: &HubAddress, range: Range<u64>) -> Result<(Vec<u8>, Option<u64>)> {
        let url = self.file_url(at, at.revision())?;
        let range_text = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
        let patience = self.settings.patience;
        let request = Request { method: Method::GET, url, range: Some(range_text), patience, abroad: true };
        let work = async || {
            let response = self.http.send(&request).await?;
            if !response.status().is_success() {
                return Err(refused(&response, at).into());
            }
            let (start, whole) = match is_partial(response.status()) {
                true => content_range(response.headers()).unwrap_or((range.start, None)),
                // A server that knows no ranges sends everything.
                false => {
                    self.rangeless.store(true, Ordering::Relaxed);
                    (0, response.content_length())
                }
            };
            let bytes = answer::window(response, &request.url, start, &range).await?;
            Ok((bytes, whole))
        };
        self.retries.run(work).await
    }
}

/// Where a file is found.
enum Place {
    Cached(PathBuf),
    There(Pinned),
}

/// Failures that say nothing about the file: then the cache counts, as for `huggingface_hub`.
fn may_use_cache(error: &Error) -> bool {
    matches!(error.code(), Code::Network | Code::Server | Code::Unauthorized | Code::Forbidden | Code::Gated)
}

/// What the headers of an answer say of a file.
fn pinned(at: &HubAddress, headers: &HeaderMap, redirected: bool) -> Result<Pinned> {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let lacks = |what: &str| {
        Error::new(Code::Server, format!("the answer does not name the {what}, so this is no Hugging Face hub"))
            .hint("check `HF_ENDPOINT` and the proxy")
    };
    let commit = header("x-repo-commit").filter(|c| cache::is_commit(c)).ok_or_else(|| lacks("commit"))?;
    let etag = header("x-linked-etag").or_else(|| header("etag")).map(|e| bare_etag(&e));
    let etag = etag.filter(|e| cache::is_name(e)).ok_or_else(|| lacks("content's hash"))?;
    let length = header("x-linked-size").or_else(|| header("content-length").filter(|_| !redirected));
    Ok(Pinned { at: at.clone(), commit, etag, size: length.and_then(|l| l.parse().ok()) })
}

fn bare_etag(text: &str) -> String {
    text.strip_prefix("W/").unwrap_or(text).trim_matches('"').to_owned()
}

/// `Link: <address>; rel="next"`.
fn next_page(headers: &HeaderMap, base: &Url) -> Option<Url> {
    let links = headers.get(LINK)?.to_str().ok()?;
    let link = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    let next = base.join(link.split_once('<')?.1.split_once('>')?.0).ok()?;
    (next.origin() == base.origin()).then_some(next)
}

fn listed(names: &[String]) -> String {
    let shown = names.iter().take(MOST_NAMES).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(MOST_NAMES) {
        Some(more @ 1..) => format!("{shown} and {more} more"),
        _ => shown,
    }
}
