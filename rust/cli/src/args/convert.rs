use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lorafmt_core::dtype::Dtype;

use super::{Inputs, NativeArgs, Reading};

const EXAMPLES: &str = "\
Examples:
  lorafmt convert style.safetensors --to diffusers
  lorafmt convert style.safetensors --to peft -o style-peft
  lorafmt convert -r loras --to comfyui --out-dir converted --dtype bf16
  lorafmt convert style.safetensors --to kohya --dry-run";

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
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// The element type of the factors
    #[arg(long, value_enum, default_value = "keep", value_name = "TYPE")]
    pub(crate) dtype: DtypeArg,
    /// Multiply the effect of the adapter
    #[arg(long, default_value_t = 1.0, value_name = "S", allow_negative_numbers = true)]
    pub(crate) strength: f64,
    /// What to do with keys that no table knows
    #[arg(long, value_enum, default_value = "error", value_name = "HOW")]
    pub(crate) unknown: UnknownArg,
    /// Whether to leave out what the target cannot hold
    #[arg(long, value_enum, default_value = "error", value_name = "HOW")]
    pub(crate) lossy: LossyArg,
    /// Write LoHa and LoKr as LoRA where that is exact and takes at most N ranks
    #[arg(long, value_name = "N")]
    pub(crate) max_rank: Option<usize>,
    /// Widen the inputs of modules that come in several widths to N, with zeros
    #[arg(long, value_name = "N")]
    pub(crate) widen: Option<usize>,
    #[command(flatten)]
    pub(crate) native: NativeArgs,
    /// Print the plan and write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Replace existing outputs
    #[arg(long)]
    pub(crate) force: bool,
}

/// An element type of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// That of the input
    Keep,
    /// bfloat16
    #[value(alias = "bfloat16")]
    Bf16,
    /// float16
    #[value(alias = "f16", alias = "float16")]
    Fp16,
    /// float32
    #[value(alias = "f32", alias = "float32")]
    Fp32,
}

impl DtypeArg {
    /// `None` for that of the input.
    pub(crate) fn dtype(self) -> Option<Dtype> {
        match self {
            DtypeArg::Keep => None,
            DtypeArg::Bf16 => Some(Dtype::BF16),
            DtypeArg::Fp16 => Some(Dtype::F16),
            DtypeArg::Fp32 => Some(Dtype::F32),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum UnknownArg {
    /// Stop
    Error,
    /// Leave them out
    Drop,
    /// Carry them under their own names
    Keep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LossyArg {
    /// Stop
    Error,
    /// Leave it out and say so
    Allow,
}
