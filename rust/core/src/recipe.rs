//! Recipes: a composition written down in a YAML, TOML or JSON file.
//!
//! A text of any of the three becomes one tree whose nodes know where they stand (`tree`); what the tree says is
//! read from there (`fields`). So messages, the order of keys and what is allowed are the same for all formats.
//!
//! ```yaml
//! loras:                                        # or only the list
//!   - style.safetensors:0.8                     # a path, and a strength unless it is 1
//!   - path: person.safetensors                  # all paths start at the recipe's folder
//!     strength: 0.7
//!     text_encoder_strength: 0.5
//!     components: {text_encoder_2: 0}
//!     blocks: {"transformer_blocks.0-9": 0.5}   # the last that matches counts
//!     block_weights: ALL0.5                     # a preset, or a list of numbers
//! to: nunchaku
//! base: svdq-int4.safetensors
//! output: out.safetensors
//! dtype: bf16                                   # keep, bf16, fp16, fp32
//! layout: aligned                               # aligned, packed
//! ```
//!
//! The `model` section of AI-Toolkit's configurations is read too, alone or in a whole job file: `lora_path` with
//! `lora_weight`, and `lora_paths` of `path` and `weight`.

mod fields;
#[cfg(test)]
mod tests;
mod tree;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};
use crate::strength::Request;

/// Longest text that is read. A recipe is a page; a model named by mistake is not taken into memory.
const LONGEST: usize = 1 << 20;

/// How a recipe is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// TOML.
    Toml,
    /// YAML.
    Yaml,
}

impl Format {
    /// In the order in which they are tried: almost every text is YAML of some kind.
    const ALL: [Format; 3] = [Format::Json, Format::Toml, Format::Yaml];

    /// The format that the extension of a file names.
    pub fn of(path: &Path) -> Option<Self> {
        const EXTENSIONS: [(&str, Format); 4] =
            [("json", Format::Json), ("toml", Format::Toml), ("yaml", Format::Yaml), ("yml", Format::Yaml)];
        let extension = path.extension()?;
        EXTENSIONS.iter().find(|(name, _)| extension.eq_ignore_ascii_case(name)).map(|(_, format)| *format)
    }

    fn name(self) -> &'static str {
        match self {
            Format::Json => "JSON",
            Format::Toml => "TOML",
            Format::Yaml => "YAML",
        }
    }
}

/// Which adapters are composed, how strongly, and what becomes of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// The adapters, at least one, in the order of the file.
    pub loras: Vec<RecipeLora>,
    /// The dialect to write.
    pub to: Option<String>,
    /// The base model's file.
    pub base: Option<PathBuf>,
    /// The file to write.
    pub output: Option<PathBuf>,
    /// The type of written factors: `keep`, `bf16`, `fp16` or `fp32`.
    pub dtype: Option<String>,
    /// The layout of the written file: `aligned` or `packed`.
    pub layout: Option<String>,
}

/// One adapter of a recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct RecipeLora {
    /// The adapter's file.
    pub path: PathBuf,
    /// How strongly it counts.
    pub strength: Request,
}

/// Reads a recipe. Its extension says how it is written, else its content; paths in it start at its folder.
pub fn read(path: &Path) -> Result<Recipe> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, "open the recipe", e))?;
    file.take(LONGEST as u64 + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, "read the recipe", e))?;
    let text = text(&bytes).map_err(|e| e.at(path))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    recipe(text, Format::of(path), Some(folder)).map_err(|e| e.at(path))
}

/// Reads the text of a recipe. Paths stay as they are written, and no file is looked for.
pub fn parse(text: &str, format: Option<Format>) -> Result<Recipe> {
    recipe(text, format, None)
}

/// Splits `style.safetensors:0.8` at its last colon into a path and a strength. The strength is 1 where there is no
/// number behind a colon, and where a file of the whole name exists. `nan` and `inf` count as numbers, to be refused
/// by [`Request::check`].
pub fn split_strength(text: &OsStr) -> (PathBuf, f64) {
    split_unless(text, Path::exists)
}

fn split_unless(text: &OsStr, exists: impl Fn(&Path) -> bool) -> (PathBuf, f64) {
    match last_colon(text) {
        Some((path, number)) if !exists(Path::new(text)) => (path, number),
        _ => (text.into(), 1.0),
    }
}

#[cfg(unix)]
fn last_colon(text: &OsStr) -> Option<(PathBuf, f64)> {
    use std::os::unix::ffi::OsStrExt;
    // File names need not be UTF-8 here.
    let bytes = text.as_bytes();
    let at = bytes.iter().rposition(|byte| *byte == b':').filter(|at| *at > 0)?;
    let number = std::str::from_utf8(&bytes[at + 1..]).ok()?.parse().ok()?;
    Some((OsStr::from_bytes(&bytes[..at]).into(), number))
}

#[cfg(not(unix))]
fn last_colon(text: &OsStr) -> Option<(PathBuf, f64)> {
    let (path, number) = text.to_str()?.rsplit_once(':').filter(|(path, _)| !path.is_empty())?;
    Some((path.into(), number.parse().ok()?))
}

fn recipe(text: &str, format: Option<Format>, folder: Option<&Path>) -> Result<Recipe> {
    // Editors of some systems put a mark in front.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let read = || {
        if text.len() > LONGEST {
            return Err(too_long());
        }
        if text.trim().is_empty() {
            return Err(Fault::new(0, "the file is empty"));
        }
        fields::recipe(&tree::read(text, format)?, folder)
    };
    read().map_err(|fault: Fault| fault.place(text))
}

/// The bytes as text.
fn text(bytes: &[u8]) -> Result<&str> {
    if bytes.len() > LONGEST {
        return Err(too_long().place(""));
    }
    std::str::from_utf8(bytes).map_err(|e| {
        let valid = std::str::from_utf8(&bytes[..e.valid_up_to()]).unwrap_or_default();
        Fault::new(valid.len(), "the file is not UTF-8 text").place(valid)
    })
}

fn too_long() -> Fault {
    Fault::new(0, format!("longer than {LONGEST} bytes, which no recipe is"))
}

/// What is wrong, and at which byte.
#[derive(Debug)]
struct Fault {
    at: usize,
    message: String,
    key: Option<String>,
    hint: Option<String>,
}

type Found<T> = std::result::Result<T, Fault>;

impl Fault {
    fn new(at: usize, message: impl Into<String>) -> Self {
        Self { at, message: message.into(), key: None, hint: None }
    }

    /// The error, with the line and the column of the byte.
    fn place(self, text: &str) -> Error {
        // Parsers may count into the middle of a character.
        let before = (0..=self.at.min(text.len())).rev().find_map(|at| text.get(..at)).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        let mut error = Error::new(Code::InvalidRecipe, format!("line {line}, column {column}: {}", self.message));
        if let Some(key) = self.key {
            error = error.key(key);
        }
        if let Some(hint) = self.hint {
            error = error.hint(hint);
        }
        error
    }
}
