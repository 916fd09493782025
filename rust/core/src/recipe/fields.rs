//! What the keys of a recipe mean: our own, and those of AI-Toolkit's configurations.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::tree::{Entry, Node, Value};
use super::{Fault, Found, Recipe, RecipeLora, choices, split_unless};
use crate::ops::merge::Choices;
use crate::strength::{Request, Selector, Strength, Weights};
use crate::table::edit_distance;

/// The keys of each mapping. `job`, `config` and `meta` are those of a whole job file.
const RECIPE: &[&str] = &["loras", "to", "base", "output", "dtype", "layout", "model", "job", "config", "meta"];
const LORA: &[&str] =
    &["path", "strength", "text_encoder_strength", "components", "blocks", "block_weights", "density"];
const MODEL: &[&str] = &["lora_path", "lora_weight", "lora_paths"];
const MODEL_LORA: &[&str] = &["path", "weight"];
/// Options of `model` that are none of ours, one a line.
const MODEL_OPTIONS: &str = include_str!("../../data/model-options.txt");

/// The texts that an option can be.
const DTYPES: &[&str] = &["keep", "bf16", "fp16", "fp32"];
const LAYOUTS: &[&str] = &["aligned", "packed"];

/// Longest key for which a similar one is looked up: comparing takes the square of its length.
const LONGEST_KEY: usize = 100;

/// The recipe that a tree says. Paths in it start at `folder`, if one is given.
pub(super) fn recipe(root: &Node, folder: Option<&Path>) -> Found<Recipe> {
    let mut read = Reader { folder, loras: Vec::new() };
    let mut recipe = Recipe {
        loras: Vec::new(),
        to: None,
        base: None,
        output: None,
        dtype: None,
        layout: None,
        choices: Choices::default(),
    };
    if let Value::List(items) = &root.value {
        read.loras(items)?;
    } else {
        let top = map(root, "a recipe")?;
        let job = get(top, "job")?.is_some() || get(top, "config")?.is_some();
        if !job {
            check_keys(top, "a recipe", &[RECIPE, choices::KEYS].concat())?;
        }
        if let Some(node) = get(top, "loras")? {
            read.loras(list(node, "`loras`")?)?;
        }
        if let Some(node) = get(top, "model")? {
            read.model(node)?;
        }
        if let Some(node) = get(top, "config")? {
            read.config(node)?;
        }
        recipe.to = option(top, "to", &[])?;
        recipe.base = get(top, "base")?.map(|node| read.path(node, "`base`")).transpose()?;
        recipe.output = get(top, "output")?.map(|node| read.path(node, "`output`")).transpose()?;
        recipe.dtype = option(top, "dtype", DTYPES)?;
        recipe.layout = option(top, "layout", LAYOUTS)?;
        recipe.choices = choices::read(top)?;
    }
    if read.loras.is_empty() {
        return Err(Fault::new(root.at, "the recipe names no LoRA"));
    }
    Ok(Recipe { loras: read.loras, ..recipe })
}

/// Collects the LoRAs of a file.
struct Reader<'a> {
    folder: Option<&'a Path>,
    loras: Vec<RecipeLora>,
}

impl Reader<'_> {
    fn loras(&mut self, items: &[Node]) -> Found<()> {
        for item in items {
            let lora = match &item.value {
                Value::Text(text) => self.short(item, text)?,
                Value::Map(entries) => self.lora(item, entries)?,
                _ => return Err(wrong(item, "a LoRA", "a path or a mapping")),
            };
            self.loras.push(lora);
        }
        Ok(())
    }

    /// `style.safetensors:0.8`
    fn short(&self, node: &Node, text: &str) -> Found<RecipeLora> {
        let exists = |path: &Path| self.folder.is_some_and(|folder| folder.join(path).exists());
        let (path, strength) = split_unless(text.as_ref(), exists);
        let strength = Request::from(finite(node, strength, || format!("the strength of `{}`", path.display()))?);
        Ok(RecipeLora { path: self.resolve(node, path, "the path of a LoRA")?, strength, density: None })
    }

    fn lora(&self, node: &Node, entries: &[Entry]) -> Found<RecipeLora> {
        check_keys(entries, "a LoRA", LORA)?;
        let (path, name) = self.named(node, entries)?;
        let mut strength = Strength::uniform(number(entries, "strength", name)?.unwrap_or(1.0));
        strength.text_encoders = number(entries, "text_encoder_strength", name)?;
        if let Some(node) = get(entries, "components")? {
            for entry in factors(node, "`components`")? {
                let what = || format!("the strength of `{}` of `{name}`", entry.key);
                strength.components.insert(entry.key.clone(), numeric(&entry.node, what)?);
            }
        }
        if let Some(node) = get(entries, "blocks")? {
            for entry in factors(node, "`blocks`")? {
                let selector = Selector::parse(&entry.key).map_err(|e| Fault {
                    key: Some(entry.key.clone()),
                    hint: Some(e.hint_text().to_owned()),
                    ..Fault::new(entry.at, e.message())
                })?;
                let what = || format!("the factor of `{}` of `{name}`", entry.key);
                strength.blocks.push((selector, numeric(&entry.node, what)?));
            }
        }
        let weights = get(entries, "block_weights")?.map(|node| weights(node, name)).transpose()?;
        let density = number(entries, "density", name)?;
        Ok(RecipeLora { path, strength: Request { plain: strength, weights, scales: Vec::new() }, density })
    }

    /// The `model` section of one of AI-Toolkit's configurations.
    fn model(&mut self, node: &Node) -> Found<()> {
        let entries = map(node, "`model`")?;
        let options = MODEL_OPTIONS.lines().filter(|line| !line.starts_with('#'));
        let known: Vec<&str> = MODEL.iter().copied().chain(options).collect();
        check_keys(entries, "`model`", &known)?;
        let weight = get(entries, "lora_weight")?;
        match (get(entries, "lora_path")?, weight) {
            (Some(node), _) => {
                let path = self.path(node, "`lora_path`")?;
                let strength = number(entries, "lora_weight", text(node, "`lora_path`")?)?.unwrap_or(1.0).into();
                self.loras.push(RecipeLora { path, strength, density: None });
            }
            (None, Some(weight)) => return Err(Fault::new(weight.at, "`lora_weight` without a `lora_path`")),
            (None, None) => {}
        }
        let Some(node) = get(entries, "lora_paths")? else { return Ok(()) };
        for item in list(node, "`lora_paths`")? {
            let entries = map(item, "an entry of `lora_paths`")?;
            check_keys(entries, "an entry of `lora_paths`", MODEL_LORA)?;
            let (path, name) = self.named(item, entries)?;
            let strength = number(entries, "weight", name)?.unwrap_or(1.0).into();
            self.loras.push(RecipeLora { path, strength, density: None });
        }
        Ok(())
    }

    /// The `config` section of a whole job file, of which everything else belongs to AI-Toolkit.
    fn config(&mut self, node: &Node) -> Found<()> {
        let Some(processes) = get(map(node, "`config`")?, "process")? else { return Ok(()) };
        for process in list(processes, "`process`")? {
            if let Some(model) = get(map(process, "an entry of `process`")?, "model")? {
                self.model(model)?;
            }
        }
        Ok(())
    }

    /// The `path` of an entry, and how messages call it.
    fn named<'a>(&self, node: &Node, entries: &'a [Entry]) -> Found<(PathBuf, &'a str)> {
        let path = get(entries, "path")?.ok_or_else(|| Fault::new(node.at, "the LoRA has no `path`"))?;
        Ok((self.path(path, "`path`")?, text(path, "`path`")?))
    }

    fn path(&self, node: &Node, what: &str) -> Found<PathBuf> {
        self.resolve(node, text(node, what)?.into(), what)
    }

    fn resolve(&self, node: &Node, path: PathBuf, what: &str) -> Found<PathBuf> {
        match self.folder {
            _ if path.as_os_str().is_empty() => Err(Fault::new(node.at, format!("{what} is empty"))),
            // An address is one wherever the recipe lies.
            _ if path.to_str().is_some_and(|text| text.contains("://")) => Ok(path),
            Some(folder) => Ok(folder.join(path)),
            None => Ok(path),
        }
    }
}

/// Block weights: the name of a preset, a text of numbers, or a list of them.
fn weights(node: &Node, name: &str) -> Found<Weights> {
    let what = |at: usize| format!("block weight {} of `{name}`", at + 1);
    let weights = match &node.value {
        Value::Text(text) => Weights::parse(text),
        Value::List(items) => {
            let numbers = items.iter().enumerate().map(|(at, item)| numeric(item, || what(at)));
            Ok(Weights::Vector(numbers.collect::<Found<_>>()?))
        }
        _ => return Err(wrong(node, "`block_weights`", "the name of a preset or a list of numbers")),
    };
    let fault = |e: crate::Error| Fault { hint: Some(e.hint_text().to_owned()), ..Fault::new(node.at, e.message()) };
    weights.and_then(|weights| weights.check().map(|()| weights)).map_err(fault)
}

/// An error for a key that is not one of `known`.
fn check_keys(entries: &[Entry], what: &str, known: &[&str]) -> Found<()> {
    let Some(entry) = entries.iter().find(|entry| !known.contains(&entry.key.as_str())) else { return Ok(()) };
    let key = entry.key.as_str();
    // Of equally similar ones the one of the same length, as where letters are exchanged.
    let distance = |name: &&str| (edit_distance(key, name), key.len().abs_diff(name.len()));
    let candidates = known.iter().copied().filter(|_| key.len() <= LONGEST_KEY);
    let nearest = candidates.min_by_key(distance).filter(|name| distance(name).0 <= key.len() / 3 + 1);
    let help = match nearest {
        Some(name) => format!("; did you mean `{name}`?"),
        None if known.len() <= RECIPE.len() => format!("; it can have {}", either(known)),
        None => String::new(),
    };
    Err(Fault { key: Some(key.to_owned()), ..Fault::new(entry.at, format!("{what} has no key `{key}`{help}")) })
}

/// The value of a key; nothing where it is null.
pub(super) fn get<'a>(entries: &'a [Entry], key: &str) -> Found<Option<&'a Node>> {
    let mut found = entries.iter().filter(|entry| entry.key == key);
    let first = found.next();
    match found.next() {
        Some(second) => Err(twice(second)),
        None => Ok(first.map(|entry| &entry.node).filter(|node| !matches!(node.value, Value::Null))),
    }
}

/// The entries of a mapping whose keys are free, each of which may stand there once.
fn factors<'a>(node: &'a Node, what: &str) -> Found<&'a [Entry]> {
    let entries = map(node, what)?;
    let mut seen = BTreeSet::new();
    match entries.iter().find(|entry| !seen.insert(&entry.key)) {
        Some(second) => Err(twice(second)),
        None => Ok(entries),
    }
}

fn twice(entry: &Entry) -> Fault {
    Fault { key: Some(entry.key.clone()), ..Fault::new(entry.at, format!("`{}` stands here twice", entry.key)) }
}

fn map<'a>(node: &'a Node, what: &str) -> Found<&'a [Entry]> {
    match &node.value {
        Value::Map(entries) => Ok(entries),
        _ => Err(wrong(node, what, "a mapping")),
    }
}

fn list<'a>(node: &'a Node, what: &str) -> Found<&'a [Node]> {
    match &node.value {
        Value::List(items) => Ok(items),
        _ => Err(wrong(node, what, "a list")),
    }
}

pub(super) fn text<'a>(node: &'a Node, what: &str) -> Found<&'a str> {
    match &node.value {
        Value::Text(text) => Ok(text),
        _ => Err(wrong(node, what, "text, in quotes")),
    }
}

/// An optional text out of `known`, or any where that is empty.
fn option(entries: &[Entry], key: &str, known: &[&str]) -> Found<Option<String>> {
    let Some(node) = get(entries, key)? else { return Ok(None) };
    let text = text(node, &format!("`{key}`"))?;
    if known.is_empty() || known.contains(&text) {
        return Ok(Some(text.to_owned()));
    }
    Err(Fault::new(node.at, format!("`{key}` is `{text}`; it can be {}", either(known))))
}

fn number(entries: &[Entry], key: &str, name: &str) -> Found<Option<f64>> {
    get(entries, key)?.map(|node| numeric(node, || format!("`{key}` of `{name}`"))).transpose()
}

pub(super) fn numeric(node: &Node, what: impl Fn() -> String) -> Found<f64> {
    match node.value {
        Value::Number(number) => finite(node, number, what),
        _ => Err(wrong(node, &what(), "a number")),
    }
}

fn finite(node: &Node, number: f64, what: impl Fn() -> String) -> Found<f64> {
    if number.is_finite() {
        return Ok(number);
    }
    Err(Fault::new(node.at, format!("{} is {number}, which is no finite number", what())))
}

pub(super) fn wrong(node: &Node, what: &str, wanted: &str) -> Fault {
    Fault::new(node.at, format!("{what} is {}; it must be {wanted}", shown(node)))
}

/// A value, for messages.
fn shown(node: &Node) -> String {
    match &node.value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::Text(text) => format!("the text `{text}`"),
        Value::List(_) => "a list".to_owned(),
        Value::Map(_) => "a mapping".to_owned(),
    }
}

pub(super) fn either(known: &[&str]) -> String {
    let quoted: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.join(""),
    }
}
