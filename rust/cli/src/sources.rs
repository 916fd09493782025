//! From the arguments to the files: paths, addresses, standard input, and what is inside folders.

use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use lorafmt_core::io::{self, Source, Store};
use lorafmt_core::{Code, Error, Result};
use lorafmt_remote::{Address, Remote, is_remote};

use crate::args::Inputs;
use crate::interrupt;
use crate::output::Progress;

/// What is elsewhere. Set up when it is first needed: most runs need nothing of it.
static REMOTE: OnceLock<Result<Remote>> = OnceLock::new();

/// Hubs and buckets, as the environment tells.
pub(crate) fn remote() -> Result<&'static Remote> {
    REMOTE.get_or_init(Remote::from_env).as_ref().map_err(Error::duplicate)
}

/// One input.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    /// As given, or as found in a folder: a path or an address.
    pub(crate) path: PathBuf,
    /// The folder it was found in, relative to the one that was given.
    pub(crate) below: PathBuf,
    /// Why it could not even be looked at.
    problem: Option<ErrorKind>,
}

/// The inputs of a command.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) inputs: Vec<Input>,
    /// Whether the answer is a list: several arguments, or a folder's content.
    pub(crate) many: bool,
}

impl Input {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), below: PathBuf::new(), problem: None }
    }

    pub(crate) fn is_stdin(&self) -> bool {
        self.path.as_os_str() == "-"
    }

    /// The address, if it is one.
    pub(crate) fn address(&self) -> Option<&str> {
        self.path.to_str().filter(|text| is_remote(text))
    }

    /// Opens the file; standard input is read to its end, and what is elsewhere is fetched.
    pub(crate) fn open(&self, progress: Option<&Progress>) -> Result<Source> {
        if let Some(kind) = self.problem {
            return Err(Error::io(&self.path, "read the folder", kind.into()));
        }
        if let Some(url) = self.address() {
            let control = interrupt::control();
            control.check()?;
            progress.inspect(|p| p.begin(url, &control));
            let source = remote().and_then(|remote| remote.open(url, &control));
            progress.inspect(|p| p.end(&control));
            return source;
        }
        if !self.is_stdin() {
            return Source::open(&self.path);
        }
        let mut stdin = std::io::stdin().lock();
        if stdin.is_terminal() {
            return Err(Error::new(Code::InvalidArgument, "standard input is a terminal")
                .at(&self.path)
                .hint("pipe a file into lorafmt, or name one"));
        }
        let mut bytes = Vec::new();
        stdin.read_to_end(&mut bytes).map_err(|e| Error::io(&self.path, "read the input", e))?;
        Source::from_bytes(&self.path, Box::new(bytes))
    }

    /// Calls `work` with the file, of what is elsewhere only with the parts that it looks at. It may be called several
    /// times, and must not look at the file afterwards.
    pub(crate) fn glance<T>(&self, work: impl Fn(Arc<Source>) -> Result<T>) -> Result<T> {
        match self.address() {
            Some(url) => remote()?.glance(url, &interrupt::control(), work),
            None => work(Arc::new(self.open(None)?)),
        }
    }

    /// The folder beside whose content an output goes, and the output's name without ending. What is elsewhere has the
    /// current folder.
    pub(crate) fn place(&self) -> (PathBuf, OsString) {
        if let Some(address) = self.address().and_then(|url| Address::parse(url).ok()) {
            return (PathBuf::new(), address.stem().into());
        }
        let name = |path: &Path| match path.is_dir() {
            true => path.file_name().map(OsString::from),
            false => path.file_stem().map(OsString::from),
        };
        match name(&self.path) {
            Some(stem) => (self.path.parent().unwrap_or(Path::new("")).to_path_buf(), stem),
            // `.` and `..` have a name only once they are resolved.
            None => {
                let whole = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
                let stem = name(&whole).unwrap_or_else(|| "adapter".into());
                (whole.parent().unwrap_or(Path::new("")).to_path_buf(), stem)
            }
        }
    }
}

/// The files that the arguments stand for. Folders are walked in sorted order, without `skip` and hidden files.
pub(crate) fn find(args: &Inputs, skip: Option<&Path>) -> Result<Found> {
    if args.sources.iter().filter(|s| s.as_os_str() == "-").count() > 1 {
        return Err(Error::new(Code::InvalidArgument, "standard input can be read only once"));
    }
    let mut inputs = Vec::new();
    let mut many = args.sources.len() > 1;
    for source in &args.sources {
        if args.recursive
            && let Some(url) = source.to_str().filter(|text| is_remote(text))
        {
            many = true;
            inputs.extend(listed(url)?);
        } else if args.recursive && source.is_dir() {
            many = true;
            let found = walk(source, skip);
            if found.is_empty() {
                return Err(Error::new(Code::NotFound, "the folder holds no .safetensors file").at(source));
            }
            inputs.extend(found);
        } else {
            inputs.push(Input::new(source));
        }
    }
    Ok(Found { inputs, many })
}

/// The adapter files at or below an address, sorted.
fn listed(url: &str) -> Result<Vec<Input>> {
    let mut found: Vec<String> = Vec::new();
    remote()?.list(url, &mut |object| {
        if is_adapter(Path::new(&object.url)) {
            found.push(object.url);
        }
        Ok(())
    })?;
    if found.is_empty() {
        return Err(Error::new(Code::NotFound, "there is no .safetensors file").at(Path::new(url)));
    }
    found.sort();
    let top = Address::parse(url)?.to_string();
    let input = |url: String| {
        let below = url.strip_prefix(top.trim_end_matches('/')).unwrap_or("").trim_start_matches('/');
        let below = Path::new(below).parent().unwrap_or(Path::new("")).to_path_buf();
        Input { path: url.into(), below, problem: None }
    };
    Ok(found.into_iter().map(input).collect())
}

fn is_adapter(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
}

fn walk(root: &Path, skip: Option<&Path>) -> Vec<Input> {
    let input = |found| match found {
        io::Found::File(path) if is_adapter(&path) => {
            let below = path.parent().and_then(|p| p.strip_prefix(root).ok()).unwrap_or(Path::new(""));
            Some(Input { below: below.to_path_buf(), path, problem: None })
        }
        io::Found::File(_) => None,
        // A folder that cannot be listed is an input that fails; a link of another file to nowhere is none.
        io::Found::Unreadable(path, kind) => {
            let matters = kind != ErrorKind::NotFound || is_adapter(&path);
            matters.then(|| Input { path, below: PathBuf::new(), problem: Some(kind) })
        }
    };
    io::walk(root, skip).filter_map(input).collect()
}
