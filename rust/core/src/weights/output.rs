//! Writing checkpoints: copies of what does not change, and a folder that appears whole or not at all.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::files::Files;
use crate::error::{Code, Error, Result};
use crate::io::{Control, Pending, WriteOptions, refuse_existing};

/// Bytes that are copied between two looks at the control.
const CHUNK: u64 = 64 << 20;

/// Endings of files that hold weights: those that were not fused are not copied beside those that were.
const WEIGHTS: [&str; 9] = ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "onnx", "msgpack", "h5"];

/// Copies a range of one file into another, inside the kernel where it can (and by sharing blocks where the file system
/// can).
pub(super) fn copy_range(
    from: &mut File,
    range: Range<usize>,
    to: &mut File,
    at: usize,
    control: &Control,
) -> std::io::Result<()> {
    from.seek(SeekFrom::Start(range.start as u64))?;
    to.seek(SeekFrom::Start(at as u64))?;
    let mut left = range.len() as u64;
    while left > 0 {
        let step = left.min(CHUNK);
        if std::io::copy(&mut std::io::Read::take(&mut *from, step), to)? != step {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        left -= step;
        control.advance(step as usize);
        if control.check().is_err() {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
    }
    Ok(())
}

/// Copies a whole file beside its target.
pub(super) fn copied(from: &Path, to: &Path, control: &Control) -> Result<Pending> {
    let fail = |e| Error::io(from, "copy the file", e);
    let mut source = File::open(from).map_err(fail)?;
    let len = source.metadata().map_err(fail)?.len() as usize;
    let fill = |file: &File| {
        let mut file = file.try_clone().map_err(fail)?;
        let done = copy_range(&mut source, 0..len, &mut file, 0, control);
        control.check()?;
        done.map_err(fail)
    };
    Ok(Pending::filled(to, fill)?.0)
}

/// A file of the checkpoint's folder.
pub(super) enum Role {
    /// A shard, by its number.
    Shard(usize),
    /// Something else that belongs to the checkpoint: an index, a configuration.
    Other,
}

/// Files that are taken along with what they are, and other weights that are not.
pub(super) type Listing = (Vec<(PathBuf, Role)>, Vec<PathBuf>);

/// Every file of a checkpoint's folder below its root, sorted, and the other weights that are not taken along.
///
/// Of a folder with weights of its own only the files in it are taken; of a pipeline's all folders. Hidden files stay.
pub(super) fn listing(files: &Files) -> Result<Listing> {
    let own = files.groups.iter().any(|g| g.folder.as_os_str().is_empty());
    let (mut found, mut left) = (Vec::new(), Vec::new());
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let place = files.root.join(&folder);
        let place = if place.as_os_str().is_empty() { PathBuf::from(".") } else { place };
        let fail = |e| Error::io(&place, "read the folder", e);
        for entry in std::fs::read_dir(&place).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let relative = folder.join(&name);
            if name.starts_with('.') {
                continue;
            }
            if entry.path().is_dir() {
                if !own {
                    folders.push(relative);
                }
                continue;
            }
            match role(files, &folder, &name) {
                Some(role) => found.push((relative, role)),
                None => left.push(relative),
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    left.sort();
    Ok((found, left))
}

/// What a file is; `None` for weights that are none of the checkpoint's, in a folder where those are.
fn role(files: &Files, folder: &Path, name: &str) -> Option<Role> {
    let mut shard = 0;
    for group in &files.groups {
        if group.folder == folder {
            if let Some(at) = group.files.iter().position(|f| f == name) {
                return Some(Role::Shard(shard + at));
            }
            if group.index.as_ref().is_some_and(|i| i.name == name) {
                return Some(Role::Other);
            }
        }
        shard += group.files.len();
    }
    let ending = Path::new(name).extension().map(|e| e.to_string_lossy().to_lowercase());
    let weights = ending.is_some_and(|e| WEIGHTS.contains(&e.as_str())) || name.ends_with(".index.json");
    let beside = folder.as_os_str().is_empty() || files.groups.iter().any(|g| g.folder == folder);
    (!(weights && beside)).then_some(Role::Other)
}

/// A folder that is made beside its target and gets its name when all is in it. Dropping it removes it.
pub(super) struct Folder {
    temp: tempfile::TempDir,
    target: PathBuf,
    overwrite: bool,
}

impl Folder {
    /// Refuses a target that is there and not empty, unless it may be written into.
    pub(super) fn beside(target: &Path, write: WriteOptions) -> Result<Self> {
        refuse_folder(target, write)?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".lorafmt-").suffix(".tmp");
        #[cfg(unix)]
        {
            // Reduced by the umask, as for any other program's folder.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o777));
        }
        let temp = builder.tempdir_in(&parent).map_err(|e| Error::io(&parent, "create a folder in the folder", e))?;
        Ok(Self { temp, target: target.to_path_buf(), overwrite: write.overwrite })
    }

    /// Where a file goes for now; makes the folders above it.
    pub(super) fn place(&self, relative: &Path) -> Result<PathBuf> {
        let path = self.temp.path().join(relative);
        let above = path.parent().unwrap_or(self.temp.path());
        std::fs::create_dir_all(above).map_err(|e| Error::io(above, "create the folder", e))?;
        Ok(path)
    }

    /// Gives it its name; into a folder that is there, file by file.
    pub(super) fn commit(self, files: &[PathBuf]) -> Result<()> {
        let fail = |e| Error::io(&self.target, "name the finished folder", e);
        if !self.target.exists() || is_empty(&self.target) {
            // An empty folder gives way.
            let _ = std::fs::remove_dir(&self.target);
            std::fs::rename(self.temp.path(), &self.target).map_err(fail)?;
            return Ok(());
        }
        if !self.overwrite {
            return Err(Error::new(Code::OutputExists, "the output folder exists already").at(&self.target));
        }
        for relative in files {
            let target = self.target.join(relative);
            let above = target.parent().unwrap_or(&self.target);
            std::fs::create_dir_all(above).map_err(fail)?;
            std::fs::rename(self.temp.path().join(relative), &target).map_err(fail)?;
        }
        Ok(())
    }
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// An error if the folder is there and holds something that may not be replaced.
pub(super) fn refuse_folder(target: &Path, write: WriteOptions) -> Result<()> {
    if target.is_dir() {
        return match write.overwrite || is_empty(target) {
            true => Ok(()),
            false => Err(Error::new(Code::OutputExists, "the output folder exists already").at(target)),
        };
    }
    match target.symlink_metadata() {
        Ok(_) => {
            let message = "the base is a folder, and so is what is made of it; here is a file";
            Err(Error::new(Code::OutputExists, message).at(target).hint("name a folder"))
        }
        Err(_) => Ok(()),
    }
}

/// An error if the output is the checkpoint itself, or lies in its folder.
pub(super) fn refuse_same(files: &Files, input: &Path, output: &Path) -> Result<()> {
    let whole = |path: &Path| path.canonicalize().ok();
    let root = if files.root.as_os_str().is_empty() { Path::new(".") } else { &files.root };
    let same = if files.folder {
        // What does not exist yet is where its parent is.
        let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let place = whole(output).or_else(|| whole(parent));
        whole(root).zip(place).is_some_and(|(root, place)| place.starts_with(&root))
    } else {
        whole(input).zip(whole(output)).is_some_and(|(a, b)| a == b)
    };
    match same {
        true => Err(Error::new(Code::SameFile, "the output is the base itself, or lies in its folder").at(output)),
        false => Ok(()),
    }
}

/// An error if the output may not be written.
pub(super) fn refuse_output(files: &Files, input: &Path, output: &Path, write: WriteOptions) -> Result<()> {
    refuse_same(files, input, output)?;
    if files.folder { refuse_folder(output, write) } else { refuse_existing(output, write) }
}
