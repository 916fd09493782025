//! From what was named to a list of files, with an output for each. The list is a temporary file: a library of a million
//! adapters is listed and worked through in a few megabytes.

use std::collections::hash_map::Entry as Taken;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use globset::{GlobBuilder, GlobMatcher};
use rustc_hash::{FxHashMap, FxHashSet};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::beside::{CONFIG, beside, version};
use super::naming::Naming;
use super::{is_address, store_for};
use crate::error::{Code, Error, Result};
use crate::io::{Found, Object, Store, walk};

/// What files are taken out of folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// `.safetensors`.
    Adapters,
    /// `.yaml`, `.yml`, `.toml`, `.json`.
    Recipes,
}

impl Wanted {
    fn takes(self, name: &str) -> bool {
        let endings: &[&str] = match self {
            Wanted::Adapters => &["safetensors"],
            Wanted::Recipes => &["yaml", "yml", "toml", "json"],
        };
        name.rsplit_once('.').is_some_and(|(_, end)| endings.iter().any(|e| end.eq_ignore_ascii_case(e)))
    }
}

/// What a user named.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Files, folders, patterns, and addresses of stores.
    pub named: Vec<String>,
    /// Files with one of those a line; `-` is standard input. Empty lines and those that begin with `#` do not count.
    pub lists: Vec<PathBuf>,
    /// Files with an [`Entry`] a line, as a dry run prints them.
    pub plans: Vec<PathBuf>,
    /// What is taken out of folders.
    pub wanted: Wanted,
}

/// A file of the list: what a plan has a line for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// Its path or address.
    pub source: String,
    /// The output, relative to the output folder.
    pub output: String,
    /// Its size in bytes.
    pub size: u64,
    /// What changes when it does.
    pub version: String,
    /// What changes when files beside it do that decide the result; absent if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside: Option<String>,
    /// Whether the user named this very file: then it cannot be skipped in silence.
    pub named: bool,
    /// Why it could not even be looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl Entry {
    /// The name without its ending: what outputs are called after.
    pub(super) fn stem(&self) -> &str {
        stem(&self.source)
    }
}

/// The list.
#[derive(Debug)]
pub struct Listing {
    file: File,
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Other files that were passed over.
    pub others: u64,
    /// Sizes that several files have: only those can be of the same content.
    pub(super) shared_sizes: FxHashSet<u64>,
    /// Of stores: hash of a folder's address -> version of the configuration in it.
    configs: Arc<FxHashMap<u128, String>>,
}

impl Listing {
    /// Lists all sources. Two that would be written to one output are an error, as is a source that does not exist.
    pub fn of(sources: &Sources, naming: &Naming, out: &str, store: Option<&dyn Store>) -> Result<Self> {
        let file = tempfile::tempfile().map_err(|e| Error::io(&std::env::temp_dir(), "list the sources", e))?;
        let writer = BufWriter::new(file.try_clone().map_err(|e| Error::io(Path::new("."), "list the sources", e))?);
        let shared_sizes = FxHashSet::default();
        let listing = Self { file, files: 0, bytes: 0, others: 0, shared_sizes, configs: Arc::default() };
        let outputs = FxHashMap::default();
        let mut lister = Lister {
            listing,
            writer,
            naming,
            out,
            store,
            outputs,
            sizes: FxHashMap::default(),
            configs: FxHashMap::default(),
            wanted: sources.wanted,
        };
        for named in &sources.named {
            lister.name(named, false)?;
        }
        for list in &sources.lists {
            lister.list(list)?;
        }
        for plan in &sources.plans {
            lister.plan(plan)?;
        }
        lister.finish()
    }

    /// Goes on adding at the end.
    fn go_on(&mut self) -> Result<()> {
        let fail = |e| Error::io(&std::env::temp_dir(), "list the sources", e);
        self.file.seek(SeekFrom::End(0)).map(drop).map_err(fail)
    }

    /// The entries, from the first.
    pub fn entries(&self) -> Result<impl Iterator<Item = Result<Entry>> + use<>> {
        let fail = |e| Error::io(&std::env::temp_dir(), "read the list of sources", e);
        let mut file = self.file.try_clone().map_err(fail)?;
        file.seek(SeekFrom::Start(0)).map_err(fail)?;
        let configs = Arc::clone(&self.configs);
        Ok(BufReader::new(file).lines().map(move |line| {
            let line = line.map_err(fail)?;
            let mut entry: Entry = serde_json::from_str(&line).map_err(|e| fail(e.into()))?;
            // Stores name files in an order of their own: a configuration may come after its weights.
            if entry.beside.is_none() && is_address(&entry.source) {
                entry.beside = configs.get(&folder_hash(&entry.source)).cloned();
            }
            Ok(entry)
        }))
    }
}

/// Size, version, and what is beside it.
type State = (u64, String, Option<String>);

struct Lister<'a> {
    listing: Listing,
    writer: BufWriter<File>,
    naming: &'a Naming,
    out: &'a str,
    store: Option<&'a dyn Store>,
    wanted: Wanted,
    /// Hash of an output -> number of its source.
    outputs: FxHashMap<u128, u64>,
    /// Size -> whether several files have it.
    sizes: FxHashMap<u64, bool>,
    /// See [`Listing`].
    configs: FxHashMap<u128, String>,
}

impl Lister<'_> {
    /// One name: a file, a folder, a pattern or an address. `listed`: it stood in a list, so its own folders count.
    fn name(&mut self, name: &str, listed: bool) -> Result<()> {
        if is_address(name) {
            return self.address(name);
        }
        let path = Path::new(name);
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => self.folder(path),
            Ok(meta) => {
                let dir = if listed { relative(path.parent().unwrap_or(Path::new(""))) } else { String::new() };
                self.add(name, &dir, (meta.len(), version(&meta), beside(path, self.wanted)), true)
            }
            Err(_) if name.contains(['*', '?', '[', '{']) => self.pattern(name),
            // In a list one of many may be gone; it fails by itself.
            Err(e) if listed => {
                let dir = relative(path.parent().unwrap_or(Path::new("")));
                self.broken(name, &dir, &e)
            }
            Err(e) => Err(Error::io(path, "open the file", e)),
        }
    }

    fn list(&mut self, path: &Path) -> Result<()> {
        let fail = |e| Error::io(path, "read the list", e);
        let reader: Box<dyn BufRead> = match path.as_os_str() == "-" {
            true => Box::new(std::io::stdin().lock()),
            false => Box::new(BufReader::new(File::open(path).map_err(fail)?)),
        };
        for line in reader.lines() {
            let line = line.map_err(fail)?;
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                self.name(line, true)?;
            }
        }
        Ok(())
    }

    fn plan(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(|e| Error::io(path, "read the plan", e))?;
        for line in BufReader::new(file).lines() {
            let line = line.map_err(|e| Error::io(path, "read the plan", e))?;
            let entry: Entry = serde_json::from_str(&line).map_err(|e| {
                Error::new(Code::InvalidArgument, format!("a line is no entry of a plan: {e}"))
                    .at(path)
                    .hint("`lorafmt batch --dry-run --json` prints plans")
            })?;
            self.enter(entry)?;
        }
        Ok(())
    }

    fn folder(&mut self, root: &Path) -> Result<()> {
        let inside = |out: &Path| out.canonicalize().ok().zip(root.canonicalize().ok());
        let out = inside(Path::new(self.out)).filter(|_| !is_address(self.out));
        if out.as_ref().is_some_and(|(out, root)| out == root) {
            let message = "outputs would go into the very folder that is read, and be sources of the next run";
            return Err(Error::new(Code::InvalidArgument, message).at(root).hint("name another `--out-dir`"));
        }
        self.walk(root, out.as_ref().map(|(out, _)| out.as_path()), |_| true)
    }

    fn walk(&mut self, root: &Path, skip: Option<&Path>, takes: impl Fn(&Path) -> bool) -> Result<()> {
        for found in walk(root, skip) {
            let path = match found {
                Found::File(path) if takes(&path) => path,
                Found::File(_) => continue,
                Found::Unreadable(path, kind) => {
                    let name = path.to_string_lossy();
                    // A link of another file to nowhere is no failure.
                    if kind != std::io::ErrorKind::NotFound || self.wanted.takes(&name) {
                        self.broken(&name, "", &std::io::Error::from(kind))?;
                    }
                    continue;
                }
            };
            let Some(name) = path.to_str() else {
                self.broken(&path.to_string_lossy(), "", &"the name is not UTF-8")?;
                continue;
            };
            if !self.wanted.takes(name) {
                self.listing.others += 1;
                continue;
            }
            let dir = relative(path.parent().and_then(|p| p.strip_prefix(root).ok()).unwrap_or(Path::new("")));
            match std::fs::metadata(&path) {
                Ok(meta) => {
                    let beside = beside(&path, self.wanted);
                    self.add(name, &dir, (meta.len(), version(&meta), beside), false)?;
                }
                Err(e) => self.broken(name, &dir, &e)?,
            }
        }
        Ok(())
    }

    fn pattern(&mut self, pattern: &str) -> Result<()> {
        let matcher = matcher(pattern)?;
        let plain = |c: &Component<'_>| !c.as_os_str().to_string_lossy().contains(['*', '?', '[', '{']);
        let root: PathBuf = Path::new(pattern).components().take_while(plain).collect();
        let root = if root.as_os_str().is_empty() { PathBuf::from(".") } else { root };
        let before = self.listing.files;
        // The walk names files as they begin: `./a` where the pattern says `a`.
        let named = |path: &Path| matcher.is_match(path.strip_prefix(".").unwrap_or(path));
        self.walk(&root, Some(Path::new(self.out)), named)?;
        match self.listing.files == before {
            true => Err(Error::new(Code::NotFound, "nothing has such a name").at(Path::new(pattern))),
            false => Ok(()),
        }
    }

    fn address(&mut self, address: &str) -> Result<()> {
        let store = store_for(self.store, address)?;
        let mut found = 0u64;
        store.list(address, &mut |object: Object| {
            let config = object.url.rsplit('/').next() == Some(CONFIG);
            if config {
                self.configs.insert(folder_hash(&object.url), object.version.clone());
            }
            if config || !self.wanted.takes(&object.url) {
                self.listing.others += 1;
                return Ok(());
            }
            found += 1;
            let below = object.url.strip_prefix(address).unwrap_or("").trim_start_matches('/');
            let dir = below.rsplit_once('/').map_or("", |(dir, _)| dir).to_owned();
            let named = object.url == address;
            self.add(&object.url, &dir, (object.size, object.version, None), named)
        })?;
        match found {
            0 => Err(Error::new(Code::NotFound, "nothing is there that could be read").at(Path::new(address))),
            _ => Ok(()),
        }
    }

    fn add(&mut self, source: &str, dir: &str, state: State, named: bool) -> Result<()> {
        let (size, version, beside) = state;
        let output = self.naming.of(dir, stem(source)).map_err(|e| e.at(Path::new(source)))?;
        self.enter(Entry { source: source.to_owned(), output, size, version, beside, named, problem: None })
    }

    fn enter(&mut self, entry: Entry) -> Result<()> {
        match self.outputs.entry(xxh3_128(entry.output.as_bytes())) {
            Taken::Vacant(free) => drop(free.insert(self.listing.files)),
            Taken::Occupied(taken) => {
                let other = *taken.get();
                return self.met(&entry, other);
            }
        }
        self.sizes.entry(entry.size).and_modify(|several| *several = true).or_insert(false);
        self.listing.bytes += entry.size;
        self.write(&entry)
    }

    fn broken(&mut self, source: &str, dir: &str, problem: &dyn std::fmt::Display) -> Result<()> {
        let output = self.naming.of(dir, stem(source)).unwrap_or_default();
        let (source, problem) = (source.to_owned(), Some(problem.to_string()));
        self.write(&Entry { source, output, size: 0, version: String::new(), beside: None, named: true, problem })
    }

    fn write(&mut self, entry: &Entry) -> Result<()> {
        self.listing.files += 1;
        let fail = |e| Error::io(&std::env::temp_dir(), "list the sources", e);
        serde_json::to_writer(&mut self.writer, entry).map_err(|e| fail(e.into()))?;
        self.writer.write_all(b"\n").map_err(fail)
    }

    /// A second source with an output that is taken: an error, unless it is the very same file, named twice. The other one
    /// is looked up in the list.
    fn met(&mut self, entry: &Entry, other: u64) -> Result<()> {
        self.writer.flush().map_err(|e| Error::io(&std::env::temp_dir(), "list the sources", e))?;
        let other = self.listing.entries()?.nth(other as usize).transpose()?;
        // The list is read through the same open file that is added to.
        self.listing.go_on()?;
        match other {
            Some(other) if other.source == entry.source => Ok(()),
            other => {
                let name = other.map_or_else(|| "another source".to_owned(), |o| format!("`{}`", o.source));
                let message = format!("{name} and `{}` would both be written to it", entry.source);
                Err(Error::new(Code::InvalidArgument, message)
                    .at(&Path::new(self.out).join(&entry.output))
                    .hint("name one folder that holds both, or make names differ with `--name`"))
            }
        }
    }

    fn finish(mut self) -> Result<Listing> {
        self.writer.flush().map_err(|e| Error::io(&std::env::temp_dir(), "list the sources", e))?;
        let Self { mut listing, sizes, configs, .. } = self;
        listing.configs = Arc::new(configs);
        listing.shared_sizes = sizes.into_iter().filter(|(_, several)| *several).map(|(size, _)| size).collect();
        Ok(listing)
    }
}

fn matcher(pattern: &str) -> Result<GlobMatcher> {
    let relative = pattern.strip_prefix("./").unwrap_or(pattern);
    let glob = GlobBuilder::new(relative).literal_separator(true).build();
    glob.map(|g| g.compile_matcher())
        .map_err(|e| Error::new(Code::InvalidArgument, format!("`{pattern}` is no pattern: {}", e.kind())))
}

/// A folder as part of an output's name: without a root and without `.` and `..`, as `rsync --files-from` does.
fn relative(path: &Path) -> String {
    let normal = |c: Component<'_>| match c {
        Component::Normal(part) => Some(part.to_string_lossy().into_owned()),
        _ => None,
    };
    path.components().filter_map(normal).collect::<Vec<_>>().join("/")
}

/// A hash of the folder that an address is in.
fn folder_hash(address: &str) -> u128 {
    xxh3_128(address.rsplit_once('/').map_or("", |(folder, _)| folder).as_bytes())
}

/// The address of the configuration that would be beside a file.
pub(super) fn config_beside(address: &str) -> Option<String> {
    address.rsplit_once('/').map(|(folder, _)| format!("{folder}/{CONFIG}"))
}

/// The last part of a path or an address, without its ending.
fn stem(source: &str) -> &str {
    let name = source.rsplit(['/', '\\']).find(|p| !p.is_empty()).unwrap_or(source);
    name.rsplit_once('.').map_or(name, |(stem, _)| if stem.is_empty() { name } else { stem })
}
