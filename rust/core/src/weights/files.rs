//! Which files make a checkpoint: one file, an index with its shards, a component's folder, or a pipeline's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::error::{Code, Error, Result};
use crate::table::Registry;

const INDEX: &str = ".safetensors.index.json";

/// The weights of one component, or of a whole checkpoint where nothing tells components apart.
#[derive(Debug, Clone, Default)]
pub(crate) struct Group {
    /// The component's name, if a folder is called by it.
    pub(crate) component: Option<String>,
    /// The folder below the root; empty for the root itself.
    pub(crate) folder: PathBuf,
    /// The index, if the group is sharded.
    pub(crate) index: Option<Index>,
    /// Names of the files in the folder.
    pub(crate) files: Vec<String>,
}

/// What an index file says.
#[derive(Debug, Clone)]
pub(crate) struct Index {
    /// Its name in the folder.
    pub(crate) name: String,
    /// Tensor -> file.
    pub(crate) map: BTreeMap<String, String>,
}

/// The files of a checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    /// The folder that everything is in.
    pub(crate) root: PathBuf,
    /// Whether the checkpoint is a folder (also one that was named by its index), rather than one file.
    pub(crate) folder: bool,
    /// The groups.
    pub(crate) groups: Vec<Group>,
}

impl Files {
    /// Finds the files behind `path`.
    pub(crate) fn find(registry: &Registry, path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "open the checkpoint", e))?;
        if meta.is_dir() {
            return folder(registry, path);
        }
        let root = path.parent().map(Path::to_path_buf).unwrap_or_default();
        let name = file_name(path)?;
        if name.ends_with(INDEX) {
            let group = sharded(&root, Path::new(""), &name, own_component(registry, &root))?;
            return Ok(Self { root, folder: true, groups: vec![group] });
        }
        let group = Group { component: own_component(registry, &root), files: vec![name], ..Group::default() };
        Ok(Self { root, folder: false, groups: vec![group] })
    }
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|n| n.to_str()).map(str::to_owned);
    name.ok_or_else(|| Error::new(Code::InvalidArgument, "the name of the file is no text").at(path))
}

/// The names of all components of all families.
fn component_names(registry: &Registry) -> BTreeSet<&str> {
    registry.families.iter().flat_map(|f| &f.components).map(|c| c.name.as_str()).collect()
}

/// The component that the folder is called by.
fn own_component(registry: &Registry, folder: &Path) -> Option<String> {
    let whole = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let whole = whole.canonicalize().ok()?;
    let name = whole.file_name()?.to_str()?;
    component_names(registry).contains(name).then(|| name.to_owned())
}

/// A component's folder holds weights itself; a pipeline's has a folder for each component.
fn folder(registry: &Registry, root: &Path) -> Result<Files> {
    let pipeline = root.join("model_index.json").is_file();
    if !pipeline && let Some(group) = weights(root, Path::new(""), own_component(registry, root))? {
        return Ok(Files { root: root.to_path_buf(), folder: true, groups: vec![group] });
    }
    let mut groups = Vec::new();
    for name in component_names(registry) {
        let below = Path::new(name);
        if root.join(below).is_dir()
            && let Some(group) = weights(root, below, Some(name.to_owned()))?
        {
            groups.push(group);
        }
    }
    if groups.is_empty() {
        let error = Error::new(Code::NotFound, "the folder holds no weights (.safetensors) of a known component");
        return Err(error.at(root).hint("name a .safetensors file, its index, a component's folder or a pipeline's"));
    }
    Ok(Files { root: root.to_path_buf(), folder: true, groups })
}

/// The weights in a folder; `None` if there are none.
fn weights(root: &Path, below: &Path, component: Option<String>) -> Result<Option<Group>> {
    let place = root.join(below);
    let mut names: Vec<String> = Vec::new();
    let listed = std::fs::read_dir(&place).map_err(|e| Error::io(&place, "read the folder", e))?;
    for entry in listed {
        let entry = entry.map_err(|e| Error::io(&place, "read the folder", e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && (name.ends_with(INDEX) || is_weights(&name)) && !entry.path().is_dir() {
            names.push(name);
        }
    }
    names.sort();
    let several = |names: &[String]| {
        let message = format!("the folder holds several sets of weights: {}", names.join(", "));
        Err(Error::new(Code::InvalidArgument, message).at(&place).hint("name one of these files"))
    };
    let indices: Vec<String> = names.iter().filter(|n| n.ends_with(INDEX)).cloned().collect();
    match indices.as_slice() {
        [one] => return sharded(root, below, one, component).map(Some),
        [] => {}
        more => return several(more),
    }
    match names.as_slice() {
        [] => Ok(None),
        [_] => Ok(Some(Group { component, folder: below.to_path_buf(), index: None, files: names })),
        more => match numbered(more) {
            Some(missing) => {
                let message = format!("the index of the shards is missing ({})", missing.join(", "));
                Err(Error::new(Code::InvalidIndex, message).at(&place))
            }
            None => several(more),
        },
    }
}

pub(crate) fn is_weights(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
}

/// The names if all of them are numbered as shards are (`NAME-00001-of-00003.safetensors`).
fn numbered(names: &[String]) -> Option<&[String]> {
    names.iter().all(|n| n.contains("-of-")).then_some(names)
}

fn sharded(root: &Path, below: &Path, name: &str, component: Option<String>) -> Result<Group> {
    let path = root.join(below).join(name);
    let bad = |message: String| Error::new(Code::InvalidIndex, message).at(&path);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, "read the index", e))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| bad(format!("the index is not valid: {e}")))?;
    let listed =
        json.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("the index has no `weight_map`".into()))?;
    let mut map = BTreeMap::new();
    for (tensor, file) in listed {
        let file = file.as_str().filter(|f| is_plain(f));
        let file = file.ok_or_else(|| bad(format!("the index says no file name for `{tensor}`")).key(tensor))?;
        map.insert(tensor.clone(), file.to_owned());
    }
    let files: BTreeSet<String> = map.values().cloned().collect();
    if files.is_empty() {
        return Err(bad("the index names no tensors".into()));
    }
    for file in &files {
        if !root.join(below).join(file).is_file() {
            return Err(
                bad(format!("the shard `{file}` is missing")).hint("download the checkpoint again, all of its files")
            );
        }
    }
    let index = Some(Index { name: name.to_owned(), map });
    Ok(Group { component, folder: below.to_path_buf(), index, files: files.into_iter().collect() })
}

/// Whether a name in an index stays in its folder.
fn is_plain(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) && is_weights(file)
}
