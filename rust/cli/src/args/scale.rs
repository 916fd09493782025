use std::path::PathBuf;

use clap::Args;

use super::{Assignment, Places, Writing};

const EXAMPLES: &str = "\
Examples:
  lorafmt scale style.safetensors --strength 0.8 -o weaker.safetensors
  lorafmt scale style.safetensors --text-encoder-strength 0 -o no-te.safetensors
  lorafmt scale style.safetensors --block '**.attn=0.5' -o half.safetensors
  lorafmt scale mix.nunchaku.safetensors --lora face=0.5 -o new.safetensors";

/// Multiply the effect of an adapter, as a whole or by place
///
/// All numbers are factors on what the file does now: scaling by 0.5 twice leaves a quarter. The output is of the
/// source's dialect. A file for a quantized model is taken apart by its metadata, and each adapter inside can have a
/// factor of its own.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ScaleArgs {
    /// An adapter file, PEFT folder or address; `-` reads standard input
    #[arg(value_name = "SRC", value_hint = clap::ValueHint::FilePath)]
    pub(crate) source: PathBuf,
    /// Write to this file, or for peft a folder; `-` is stdout
    #[arg(short, long, value_name = "OUT", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// The factor on everything [default: 1]
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub(crate) strength: Option<f64>,
    /// The dialect to write, if not that of the source
    #[arg(long, value_name = "DIALECT")]
    pub(crate) to: Option<String>,
    /// Read the file as this model family, or one size of it (`lorafmt formats` lists both)
    #[arg(long, value_name = "FAMILY")]
    pub(crate) family: Option<String>,
    #[command(flatten)]
    pub(crate) writing: Writing,
    /// The checkpoint of a native file without metadata
    #[arg(long, value_name = "BASE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) base: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) places: Places,
    /// Times S in one adapter inside (repeatable)
    ///
    /// For files for a quantized model: an adapter by its name in the metadata, or its number. `lorafmt inspect` shows
    /// both.
    #[arg(long, help_heading = "Strengths by place", value_name = "NAME=S")]
    pub(crate) lora: Vec<Assignment>,
}
