//! A base checkpoint by its canonical modules.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::files::Files;
use super::names::{Leaf, Meaning, Names, row, scales};
use crate::dtype::{Dtype, read_f64};
use crate::error::{Code, Error, Result};
use crate::io::Source;
use crate::table::pattern::Variables;
use crate::table::{Component, Op, Registry};
use crate::tensor::{Pairing, Tensor};

/// One file of a checkpoint.
#[derive(Debug)]
pub(crate) struct Shard {
    /// The mapped file.
    pub(crate) source: Arc<Source>,
    /// The path below the checkpoint's root.
    pub(crate) relative: PathBuf,
    /// Number of the group of files it belongs to.
    pub(crate) group: usize,
}

/// The number of a shard, and of a tensor in it.
pub(crate) type At = (usize, usize);

/// A tensor of the checkpoint that is a parameter of one or several canonical modules.
#[derive(Debug, Clone)]
pub(crate) struct Parameter {
    /// Where it is.
    pub(crate) at: At,
    pub(crate) leaf: Leaf,
    pub(crate) component: usize,
    pub(crate) row: usize,
    /// Which canonical module of the row; `None` for all of them, stacked.
    pub(crate) part: Option<usize>,
    pub(crate) variables: Variables,
    /// Whether its two halves of rows are exchanged against the canonical module.
    pub(crate) swapped: bool,
    /// What FP8 numbers are multiplied with.
    pub(crate) scale: Option<At>,
    /// Why it cannot be used, if it cannot.
    pub(crate) misfit: Option<String>,
}

/// Where the parameter of a canonical module is.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    /// Number of the parameter.
    pub(crate) parameter: usize,
    /// Its rows there.
    pub(crate) rows: Range<usize>,
}

/// A base checkpoint, opened: one or several mapped files of which only headers have been read.
#[derive(Debug)]
pub struct Checkpoint {
    registry: Arc<Registry>,
    family: usize,
    path: PathBuf,
    files: Files,
    shards: Vec<Shard>,
    parameters: Vec<Parameter>,
    held: FxHashMap<(usize, String, Leaf), Held>,
}

impl Checkpoint {
    /// Opens a checkpoint: a `.safetensors` file, a `*.safetensors.index.json`, or a folder that holds either
    /// (a component's folder as diffusers writes it, or a whole pipeline's with `transformer/`, `text_encoder/`, ...).
    ///
    /// The family is recognised by names and shapes, unless it is given. Missing shards, an index that names absent
    /// tensors, tensors that stand twice and cut files are errors.
    pub fn open(registry: &Arc<Registry>, path: &Path, families: &[usize]) -> Result<Self> {
        let files = Files::find(registry, path)?;
        let mut shards = Vec::new();
        for (number, group) in files.groups.iter().enumerate() {
            for name in &group.files {
                let relative = group.folder.join(name);
                let source = Arc::new(Source::open(&files.root.join(&relative))?);
                shards.push(Shard { source, relative, group: number });
            }
        }
        check_shards(&files, &shards)?;
        let meanings = meanings(registry, &files, &shards);
        let family = choose(registry, &shards, &meanings, families).map_err(|e| e.at(path))?;
        let mut checkpoint = Self {
            registry: Arc::clone(registry),
            family,
            path: path.to_path_buf(),
            files,
            shards,
            parameters: Vec::new(),
            held: FxHashMap::default(),
        };
        for (at, mut found) in meanings {
            found.retain(|m| m.hit.family == family);
            checkpoint.add(at, &found)?;
        }
        Ok(checkpoint)
    }

    /// The number of the family.
    pub fn family(&self) -> usize {
        self.family
    }

    /// The tables it was read with.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// As it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The weight of a canonical module as a lazy matrix `[out, in]` (of a convolution `[out, in * kh * kw]`), a vector
    /// for norms; `None` if the checkpoint lacks it, or has it in a shape that no table knows.
    ///
    /// Cut and permuted out of whatever tensor of the checkpoint holds it; FP8 numbers times their scale, exactly
    /// (type F32 then). No byte is copied.
    pub fn weight(&self, component: usize, path: &str) -> Option<Tensor> {
        let weight = self.tensor(component, path, Leaf::Weight)?;
        let (rows, cols) = (weight.rows(), weight.cols());
        Some(if weight.shape().len() > 2 { weight.reshaped(vec![rows, cols]) } else { weight })
    }

    /// The bias of a canonical module, a vector; `None` if the checkpoint lacks it.
    pub fn bias(&self, component: usize, path: &str) -> Option<Tensor> {
        self.tensor(component, path, Leaf::Bias)
    }

    fn tensor(&self, component: usize, path: &str, leaf: Leaf) -> Option<Tensor> {
        let held = self.held(component, path, leaf)?;
        let parameter = self.parameter(held);
        if parameter.misfit.is_some() {
            return None;
        }
        let part = self.whole(parameter).slice_rows(held.rows.clone());
        if parameter.swapped { part.swap_halves() } else { Some(part) }
    }

    /// A base tensor in the checkpoint's own order of rows, times its scale.
    pub(crate) fn whole(&self, parameter: &Parameter) -> Tensor {
        let tensor = self.input(parameter.at);
        let Some(at) = parameter.scale else { return tensor };
        let scale = self.input(at);
        let shape = tensor.shape().to_vec();
        match scale.rows() * scale.cols() {
            1 => tensor.scaled(scale.to_f64()[0]).cast(Dtype::F32),
            rows => Tensor::product(&tensor, &scale.reshaped(vec![rows, 1]), Pairing::Same, Pairing::Cross)
                .cast(Dtype::F32)
                .reshaped(shape),
        }
    }

    fn input(&self, (shard, tensor): At) -> Tensor {
        Tensor::input(&self.shards[shard].source, tensor)
    }

    /// Where a parameter of a canonical module is.
    pub(crate) fn held(&self, component: usize, path: &str, leaf: Leaf) -> Option<&Held> {
        self.held.get(&(component, path.to_owned(), leaf))
    }

    pub(crate) fn parameter(&self, held: &Held) -> &Parameter {
        &self.parameters[held.parameter]
    }

    pub(crate) fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    pub(crate) fn files(&self) -> &Files {
        &self.files
    }

    /// The key of a tensor.
    pub(crate) fn key(&self, (shard, tensor): At) -> &str {
        &self.shards[shard].source.tensors()[tensor].name
    }

    pub(crate) fn component_table(&self, component: usize) -> &Component {
        &self.registry.families[self.family].components[component]
    }

    /// The canonical modules of a parameter with their rows.
    pub(crate) fn modules(&self, parameter: &Parameter) -> Vec<(String, Range<usize>)> {
        let row = &self.component_table(parameter.component).rows[parameter.row];
        let parts = parameter.part.map_or(0..row.canonical.len(), |part| part..part + 1);
        let mut start = 0;
        parts
            .map(|part| {
                let rows = start..start + row.outputs[part];
                start = rows.end;
                (row.canonical[part].render(&parameter.variables), rows)
            })
            .collect()
    }

    /// Takes a tensor in, by the first meaning that its shape fits.
    fn add(&mut self, at: At, meanings: &[Meaning]) -> Result<()> {
        let info = &self.shards[at.0].source.tensors()[at.1];
        let fits = |m: &&Meaning| m.fits(&self.registry, &info.shape);
        let Some(meaning) = meanings.iter().find(fits).or(meanings.first()) else { return Ok(()) };
        let table = row(&self.registry, &meaning.hit);
        let mut misfit = None;
        if !fits(&meaning) {
            misfit = Some(format!("has shape {:?}, which no module of that name has", info.shape));
        } else if !info.dtype.is_float() {
            misfit = Some(format!("is {}, not floating point", info.dtype.name()));
        }
        let mut parameter = Parameter {
            at,
            leaf: meaning.leaf,
            component: meaning.hit.component,
            row: meaning.hit.row,
            part: meaning.hit.part,
            variables: meaning.hit.variables.clone(),
            swapped: table.op == Op::SwapHalves && meaning.hit.namespace != 0,
            scale: None,
            misfit,
        };
        self.add_scale(&mut parameter);
        let number = self.parameters.len();
        for (path, rows) in self.modules(&parameter) {
            let held = Held { parameter: number, rows };
            let twin = self.held.insert((parameter.component, path, parameter.leaf), held);
            if let Some(twin) = twin {
                let (one, two) = (self.key(self.parameter(&twin).at), self.key(at));
                let message = format!("`{one}` and `{two}` are the same parameter of the model");
                let error = Error::new(Code::DuplicateModule, message).key(two);
                return Err(error.at(&self.path).hint("the checkpoint holds two models, or one under two names"));
            }
        }
        self.parameters.push(parameter);
        Ok(())
    }

    /// Finds what FP8 weights are multiplied with.
    fn add_scale(&self, parameter: &mut Parameter) {
        let source = &self.shards[parameter.at.0].source;
        let info = &source.tensors()[parameter.at.1];
        let Some((path, _)) = info.name.rsplit_once('.').filter(|_| info.dtype.is_fp8()) else { return };
        let found = scales().iter().find_map(|suffix| self.find(parameter.at.0, &format!("{path}.{suffix}")));
        let Some(at) = found else { return };
        let scale = &self.shards[at.0].source.tensors()[at.1];
        let (count, rows) = (scale.shape.iter().product::<usize>(), info.shape.first().copied().unwrap_or(1));
        if !scale.dtype.is_float() || scale.dtype.is_fp8() || (count != 1 && count != rows) {
            let shape = &scale.shape;
            parameter.misfit = Some(format!("has a scale `{}` of shape {shape:?}, which is not known", scale.name));
            return;
        }
        let bytes = self.shards[at.0].source.bytes(at.1);
        let sound = |b: &[u8]| (f64::MIN_POSITIVE..f64::INFINITY).contains(&read_f64(scale.dtype, b));
        if !bytes.chunks_exact(scale.dtype.size()).all(sound) {
            parameter.misfit = Some(format!("has a scale `{}` that is not positive and finite", scale.name));
            return;
        }
        parameter.scale = Some(at);
    }

    /// A tensor by its name, in the shard or its siblings.
    fn find(&self, shard: usize, name: &str) -> Option<At> {
        let group = &self.files.groups[self.shards[shard].group];
        let numbers = (0..self.shards.len()).filter(|&s| self.shards[s].group == self.shards[shard].group);
        let named = group.index.as_ref().and_then(|i| i.map.get(name));
        numbers
            .filter(|&s| s == shard || named.is_some_and(|file| self.shards[s].relative.ends_with(file)))
            .find_map(|s| self.shards[s].source.tensors().iter().position(|t| t.name == name).map(|t| (s, t)))
    }
}

/// No tensor twice in a group, and every tensor where the index says.
fn check_shards(files: &Files, shards: &[Shard]) -> Result<()> {
    for (number, group) in files.groups.iter().enumerate() {
        let Some(index) = &group.index else { continue };
        let mut seen: FxHashMap<&str, &Shard> = FxHashMap::default();
        for shard in shards.iter().filter(|s| s.group == number) {
            for info in shard.source.tensors() {
                if let Some(other) = seen.insert(&info.name, shard) {
                    let message =
                        format!("`{}` stands in two shards, also in `{}`", info.name, other.relative.display());
                    return Err(Error::new(Code::DuplicateKey, message).key(&info.name).at(shard.source.path()));
                }
            }
        }
        for (tensor, file) in &index.map {
            if seen.get(tensor.as_str()).is_none_or(|s| s.relative != group.folder.join(file)) {
                let message = format!("the index names `{tensor}` in `{file}`, which does not hold it");
                let path = files.root.join(&group.folder).join(&index.name);
                return Err(Error::new(Code::InvalidIndex, message).key(tensor).at(&path));
            }
        }
    }
    Ok(())
}

/// What every tensor can mean. A folder that is called by a component decides on it.
fn meanings(registry: &Registry, files: &Files, shards: &[Shard]) -> Vec<(At, Vec<Meaning>)> {
    let names = Names::new(registry);
    let mut out = Vec::new();
    for (s, shard) in shards.iter().enumerate() {
        let folder = files.groups[shard.group].component.as_deref();
        for (t, info) in shard.source.tensors().iter().enumerate() {
            let mut found = names.meanings(&info.name);
            let here = |m: &Meaning| {
                let name = &registry.families[m.hit.family].components[m.hit.component].name;
                folder.is_some_and(|f| f == name)
            };
            if found.iter().any(here) {
                found.retain(here);
            }
            out.push(((s, t), found));
        }
    }
    out
}

/// The family that explains most tensors with their shapes.
fn choose(registry: &Registry, shards: &[Shard], meanings: &[(At, Vec<Meaning>)], given: &[usize]) -> Result<usize> {
    let mut scores = vec![0usize; registry.families.len()];
    for ((shard, tensor), found) in meanings {
        let info = &shards[*shard].source.tensors()[*tensor];
        let mut families: Vec<usize> =
            found.iter().filter(|m| m.fits(registry, &info.shape)).map(|m| m.hit.family).collect();
        families.sort_unstable();
        families.dedup();
        families.iter().for_each(|&f| scores[f] += 1);
    }
    if !given.is_empty() {
        (0..scores.len()).filter(|f| !given.contains(f)).for_each(|f| scores[f] = 0);
    }
    let best = scores.iter().copied().max().unwrap_or(0);
    let first = || shards.iter().flat_map(|s| s.source.tensors()).next().map_or("", |t| t.name.as_str());
    match given.first() {
        Some(&family) if best == 0 => {
            let message = format!("it holds no weights of {}; it holds `{}`", registry.families[family].name, first());
            return Err(Error::new(Code::UnknownFamily, message).key(first()));
        }
        None if best == 0 => {
            let message = format!("it holds no weights of a known model family; it holds `{}`", first());
            let hint = "a base is the model itself: its weights as .safetensors, in any of the family's namings";
            return Err(Error::new(Code::UnknownFamily, message).key(first()).hint(hint));
        }
        _ => {}
    }
    let tied: Vec<usize> = (0..scores.len()).filter(|&f| scores[f] == best).collect();
    if let [one] = tied.as_slice() {
        return Ok(*one);
    }
    let names: Vec<String> = tied.iter().map(|&f| registry.families[f].label()).collect();
    let message = format!("the checkpoint fits {} equally well", names.join(" and "));
    Err(Error::new(Code::AmbiguousFamily, message).hint(format!("add `--family {}`", names.join("` or `--family "))))
}
