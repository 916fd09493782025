//! The cache of `huggingface_hub`, in its layout, which this program shares with it and with itself:
//!
//! ```text
//! models--user--repo/blobs/{etag}                    the content
//! models--user--repo/snapshots/{commit}/{path}       a link to it
//! models--user--repo/refs/{revision}                 the commit that a branch or a tag was when it was last asked for
//! models--user--repo/.no_exist/{commit}/{path}       that the commit has no such file
//! .locks/models--user--repo/{etag}.lock              held while the content is fetched
//! ```
//!
//! A blob gets its name when it is whole and checked. The lock only saves two processes from fetching one file twice:
//! each writes to a file of its own.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lorafmt_core::io::Object;
use lorafmt_core::{Error, Result};
use tempfile::NamedTempFile;

use crate::HubAddress;

/// What tells programs that make backups to pass over the folder.
const TAG: &str =
    "Signature: 8a477f597d28d172789f06886806bc55\n# This file is a cache directory tag created by lorafmt.\n";

/// How often a lock that somebody else has is tried.
const LOOK: Duration = Duration::from_millis(50);

/// The folder of the cache.
pub(super) struct Cache {
    root: PathBuf,
    symlinks: bool,
}

/// The place of one file at one commit.
pub(super) struct Slot {
    blob: PathBuf,
    pointer: PathBuf,
    /// From the pointer's folder to the blob.
    relative: PathBuf,
    lock: PathBuf,
    symlinks: bool,
}

/// A lock that is held as long as this lives.
pub(super) struct Lock(#[allow(dead_code, reason = "dropping it gives the lock back")] Option<File>);

/// A blob that is not whole yet. Dropping it removes it.
pub(super) struct Part(NamedTempFile);

/// A whole commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a hash from a server can be the name of a file.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() < 200 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}

/// Size and version of a file in the cache.
pub(super) fn describe(path: &Path) -> Result<(u64, String)> {
    let size = path.metadata().map_err(|e| Error::io(path, "read the cache", e))?.len();
    let blob = path.read_link().ok().and_then(|target| Some(target.file_name()?.to_string_lossy().into_owned()));
    Ok((size, blob.unwrap_or_default()))
}

fn folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io(path, "create a folder of the cache", e))
}

impl Cache {
    pub(super) fn new(root: PathBuf, symlinks: bool) -> Self {
        Self { root, symlinks }
    }

    fn repo(&self, at: &HubAddress) -> PathBuf {
        self.root.join(repo_folder(at))
    }

    /// The commit that a revision was when it was last asked for.
    fn commit(&self, at: &HubAddress) -> Option<String> {
        if is_commit(at.revision()) {
            return Some(at.revision().to_owned());
        }
        let noted = std::fs::read_to_string(self.repo(at).join("refs").join(at.revision())).ok()?;
        Some(noted.trim().to_owned()).filter(|c| is_commit(c))
    }

    /// The file as it was when its revision was last asked for.
    pub(super) fn find(&self, at: &HubAddress) -> Option<PathBuf> {
        self.at_commit(at, &self.commit(at)?)
    }

    /// The file at a commit.
    pub(super) fn at_commit(&self, at: &HubAddress, commit: &str) -> Option<PathBuf> {
        let path = self.repo(at).join("snapshots").join(commit).join(&at.path);
        path.is_file().then_some(path)
    }

    /// Notes that a commit has no such file.
    pub(super) fn note_missing(&self, at: &HubAddress, commit: &str) -> Result<()> {
        let path = self.missing(at, commit);
        folder(path.parent().unwrap_or(&path))?;
        File::create(&path).map_err(|e| Error::io(&path, "write to the cache", e))?;
        self.note_revision(at, commit)
    }

    /// Whether there was no such file when the revision was last asked for.
    pub(super) fn is_missing(&self, at: &HubAddress) -> bool {
        self.commit(at).is_some_and(|commit| self.missing(at, &commit).is_file())
    }

    fn missing(&self, at: &HubAddress, commit: &str) -> PathBuf {
        self.repo(at).join(".no_exist").join(commit).join(&at.path)
    }

    /// The files at or below an address, sorted by name.
    pub(super) fn list(&self, at: &HubAddress) -> Result<Vec<Object>> {
        let Some(commit) = self.commit(at) else { return Ok(Vec::new()) };
        let top = self.repo(at).join("snapshots").join(commit);
        let mut found = Vec::new();
        walk(&top.join(&at.path), &at.path, &mut |path, name| {
            let (size, version) = describe(path)?;
            found.push(Object { url: at.with_path(name).to_string(), size, version });
            Ok(())
        })?;
        found.sort_by(|a, b| a.url.cmp(&b.url));
        Ok(found)
    }

    /// Where a file goes. Makes the folders.
    pub(super) fn slot(&self, at: &HubAddress, commit: &str, etag: &str) -> Result<Slot> {
        let (repo, locks) = (self.repo(at), self.root.join(".locks").join(repo_folder(at)));
        let pointer = repo.join("snapshots").join(commit).join(&at.path);
        let blobs = repo.join("blobs");
        for path in [&blobs, &locks, pointer.parent().unwrap_or(&repo)] {
            folder(path)?;
        }
        let tag = self.root.join("CACHEDIR.TAG");
        if !tag.exists() {
            // Only a courtesy to other programs.
            let _ = std::fs::write(tag, TAG);
        }
        let mut relative = PathBuf::from("../..");
        at.path.split('/').skip(1).for_each(|_| relative.push(".."));
        Ok(Slot {
            relative: relative.join("blobs").join(etag),
            blob: blobs.join(etag),
            pointer,
            lock: locks.join(format!("{etag}.lock")),
            symlinks: self.symlinks,
        })
    }

    /// Notes which commit a branch or a tag is now.
    pub(super) fn note_revision(&self, at: &HubAddress, commit: &str) -> Result<()> {
        if at.revision() == commit || self.commit(at).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.repo(at).join("refs").join(at.revision());
        let parent = path.parent().unwrap_or(&path);
        folder(parent)?;
        let fail = |e| Error::io(&path, "write to the cache", e);
        let mut temp = builder(".tmp").tempfile_in(parent).map_err(fail)?;
        temp.write_all(commit.as_bytes()).map_err(fail)?;
        temp.persist(&path).map_err(|e| fail(e.error))?;
        Ok(())
    }
}

fn repo_folder(at: &HubAddress) -> String {
    format!("models--{}", at.repo.replace('/', "--"))
}

fn walk(path: &Path, name: &str, each: &mut dyn FnMut(&Path, &str) -> Result<()>) -> Result<()> {
    if path.is_file() {
        return each(path, name);
    }
    let Ok(entries) = std::fs::read_dir(path) else { return Ok(()) };
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(path, "read the cache", e))?;
        let last = entry.file_name().to_string_lossy().into_owned();
        let name = if name.is_empty() { last } else { format!("{name}/{last}") };
        walk(&entry.path(), &name, each)?;
    }
    Ok(())
}

/// Temporary files that others may read once they have a name, as the umask allows.
fn builder(suffix: &str) -> tempfile::Builder<'_, '_> {
    let mut builder = tempfile::Builder::new();
    builder.suffix(suffix);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder
}

impl Slot {
    pub(super) fn has_blob(&self) -> bool {
        self.blob.is_file() || (!self.symlinks && self.pointer.is_file())
    }

    /// Waits for whoever is fetching the same file. Where the file system knows no locks, nobody waits.
    pub(super) async fn lock(&self) -> Result<Lock> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let Ok(file) = options.open(&self.lock) else { return Ok(Lock(None)) };
        let mut lock = fd_lock::RwLock::new(file);
        loop {
            // Closing the file gives the lock back; the guard would do so at the end of this block.
            let tried = lock.try_write().map(std::mem::forget);
            match tried {
                Ok(()) => return Ok(Lock(Some(lock.into_inner()))),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => tokio::time::sleep(LOOK).await,
                Err(_) => return Ok(Lock(None)),
            }
        }
    }

    /// A new file beside the blob to be.
    pub(super) fn part(&self) -> Result<Part> {
        let fail = |e| Error::io(&self.blob, "write to the cache", e);
        let (folder, name) = (self.blob.parent().unwrap_or(&self.blob), self.blob.file_name().unwrap_or_default());
        let mut builder = builder(".incomplete");
        let prefix = format!("{}.", name.to_string_lossy());
        builder.prefix(&prefix);
        builder.tempfile_in(folder).map(Part).map_err(fail)
    }

    /// Gives a whole blob its name.
    pub(super) fn publish(&self, part: Part) -> Result<()> {
        let fail = |e| Error::io(&self.blob, "write to the cache", e);
        part.0.as_file().sync_all().map_err(fail)?;
        part.0.persist(&self.blob).map(drop).map_err(|e| fail(e.error))
    }

    /// Links the commit's path to the blob. Where there are no links, the blob itself is moved there.
    pub(super) fn link(&self) -> Result<PathBuf> {
        let fail = |e| Error::io(&self.pointer, "write to the cache", e);
        if self.pointer.is_file() {
            return Ok(self.pointer.clone());
        }
        // What is there is a link to nothing.
        let _ = std::fs::remove_file(&self.pointer);
        let linked = if self.symlinks {
            symlink(&self.relative, &self.pointer)
        } else {
            Err(std::io::ErrorKind::Unsupported.into())
        };
        match linked {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(_) => std::fs::rename(&self.blob, &self.pointer).map_err(fail)?,
        }
        Ok(self.pointer.clone())
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

impl Part {
    /// Adds bytes at the end.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let path = self.0.path().to_path_buf();
        self.0.as_file_mut().write_all(bytes).map_err(|e| Error::io(&path, "write to the cache", e))
    }

    /// Begins again from nothing.
    pub(super) fn clear(&mut self) -> Result<()> {
        let path = self.0.path().to_path_buf();
        let file = self.0.as_file_mut();
        file.set_len(0).and_then(|()| file.rewind()).map_err(|e| Error::io(&path, "write to the cache", e))
    }
}
