use std::path::PathBuf;

use clap::Args;

use super::{DtypeArg, LossyArg, RankArgs};

const EXAMPLES: &str = "\
Examples:
  lorafmt extract tuned.safetensors base.safetensors -o l.safetensors --rank 32
  lorafmt extract tuned FLUX.1-dev -o lora.safetensors --energy 0.9 --to kohya
  lorafmt extract tuned.safetensors base.safetensors -o l.safetensors --rank 8 -n";

/// Make an adapter of the difference of two checkpoints
///
/// Every weight that changed is decomposed by a randomised singular value decomposition, streamed, and its error is shown.
/// The two checkpoints may be sharded or not and name their tensors differently. Biases and norms that changed are
/// written where the dialect holds them.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExtractArgs {
    /// The tuned checkpoint: a file, an index, or a folder
    #[arg(value_name = "TUNED", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) tuned: PathBuf,
    /// The checkpoint that it was tuned from
    #[arg(value_name = "BASE", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) base: PathBuf,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
    /// Write to this file, or for peft a folder; `-` is stdout
    #[arg(short, long, value_name = "OUT", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// The dialect to write; the first that `formats` lists
    #[arg(long, value_name = "DIALECT")]
    pub(crate) to: Option<String>,
    /// The type of the factors: keep, bf16, fp16, fp32
    ///
    /// `keep`, the default, is that of the tuned weights.
    #[arg(long, value_enum, default_value = "keep", value_name = "TYPE", hide_possible_values = true)]
    pub(crate) dtype: DtypeArg,
    /// Read both as this model family, or one size of it (`lorafmt formats` lists both)
    #[arg(long, value_name = "FAMILY")]
    pub(crate) family: Option<String>,
    /// What the dialect cannot hold: error, allow
    #[arg(long, value_enum, default_value = "error", value_name = "HOW", hide_possible_values = true)]
    pub(crate) lossy: LossyArg,
    /// Passes over each weight before the last one
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) niter: Option<usize>,
    /// Of the random directions
    #[arg(long, default_value_t = 0, value_name = "N", hide_short_help = true)]
    pub(crate) seed: u64,
    /// Print the plan and write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Replace existing outputs
    #[arg(long)]
    pub(crate) force: bool,
}
