use std::path::PathBuf;

use clap::Args;

use super::{Inputs, NativeArgs, Reading, Writing};

const EXAMPLES: &str = "\
Examples:
  lorafmt convert style.safetensors --to diffusers
  lorafmt convert style.safetensors --to peft -o style-peft
  lorafmt convert -r loras --to comfyui --out-dir converted --dtype bf16
  lorafmt convert style.safetensors --to nunchaku --base svdq.safetensors";

/// Turn adapters of any dialect into another one
///
/// The output is `{stem}.{dialect}.safetensors` beside the source unless `-o` or `--out-dir` says otherwise. It is
/// never visible under its name before it is whole, and never replaces a file without `--force`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    /// The dialect to write (`lorafmt formats` lists them)
    #[arg(long, value_name = "DIALECT")]
    pub(crate) to: String,
    /// Write to this file, or for peft a folder; `-` is stdout
    #[arg(short, long, value_name = "OUT", conflicts_with = "out_dir", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// Write into this folder, which is made if missing
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(crate) out_dir: Option<PathBuf>,
    /// Write the adapters inside a native file to a file each
    ///
    /// The files are `{stem}.{name of the adapter}.{dialect}.safetensors`. What the metadata says of the ranks tells the
    /// adapters apart; the strengths they were composed at stay in them.
    #[arg(long, conflicts_with = "output")]
    pub(crate) split: bool,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// Multiply the effect of the adapter
    #[arg(long, default_value_t = 1.0, value_name = "S", allow_negative_numbers = true)]
    pub(crate) strength: f64,
    #[command(flatten)]
    pub(crate) writing: Writing,
    #[command(flatten)]
    pub(crate) native: NativeArgs,
}
