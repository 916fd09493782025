use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::{MergeArgs, NativeArgs, Places, RankArgs, Writing};

const EXAMPLES: &str = "\
Examples:
  lorafmt compose style.safetensors:0.8 face.safetensors:0.5 -o both.safetensors
  lorafmt compose a.safetensors b.safetensors --rank 16 -o both.safetensors
  lorafmt compose a.safetensors b.safetensors --method ties --density .5 -o c.safetensors
  lorafmt compose --recipe mix.yaml --to nunchaku --base svdq.safetensors";

/// Add up several adapters, each at its strength, in one file
///
/// The output does to the model what all of them do together: its ranks are theirs side by side, so nothing is lost
/// but what rounding takes. `--rank` reduces them, and `--method` merges by another rule. `style.safetensors:0.8` is cut at the last colon if a number follows and no file has the whole name;
/// a strength can be negative. Options for places apply to the adapters of the command line; a recipe has its own.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ComposeArgs {
    /// Adapters with their strengths; `-` reads stdin
    ///
    /// Files, PEFT folders, or addresses (hf://, s3://).
    #[arg(required_unless_present = "recipe", value_name = "SRC[:STRENGTH]", value_hint = clap::ValueHint::FilePath)]
    pub(crate) sources: Vec<OsString>,
    /// Write to this file, or for peft a folder; `-` is stdout
    #[arg(short, long, required_unless_present = "recipe", value_name = "OUT", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// The dialect to write; the first that `formats` lists
    #[arg(long, value_name = "DIALECT")]
    pub(crate) to: Option<String>,
    /// Take adapters and options from this file
    ///
    /// A YAML, TOML or JSON file. Its adapters come first; options of the command line count before those of the recipe. Paths in it start at its
    /// folder. Configurations of AI-Toolkit are read, too: the LoRAs of their `model` section.
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) recipe: Option<PathBuf>,
    /// Read the files as this model family, or one size of it (`lorafmt formats` lists both)
    #[arg(long, value_name = "FAMILY", hide_short_help = true)]
    pub(crate) family: Option<String>,
    #[command(flatten)]
    pub(crate) writing: Writing,
    #[command(flatten)]
    pub(crate) merge: MergeArgs,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
    #[command(flatten)]
    pub(crate) places: Places,
    #[command(flatten)]
    pub(crate) native: NativeArgs,
}
