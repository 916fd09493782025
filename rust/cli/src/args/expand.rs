use std::path::PathBuf;

use clap::Args;

use super::{Inputs, RankArgs, Reading, Writing};

const EXAMPLES: &str = "\
Examples:
  lorafmt expand lokr.safetensors -o lora.safetensors
  lorafmt expand lokr.safetensors --rank 64 --to diffusers
  lorafmt expand dora.safetensors --base-weights flux1-dev.safetensors --rank 32
  lorafmt expand -r adapters --energy 0.99 --out-dir plain";

/// Make plain LoRA of LoHa, LoKr, Tucker, DoRA, GLoRA, OFT, IA3 and full differences
///
/// Kinds of low rank are written exactly unless a rank is asked for; then, and for differences of full rank, what is
/// written is the best of that rank, and the error is shown. Plain LoRA, norms and biases stay as they are. The output is
/// `{stem}.lora.safetensors` beside the source unless `-o` or `--out-dir` says otherwise, and of the source's dialect
/// unless `--to` does.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExpandArgs {
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
    /// The checkpoint that the adapter was made for, for kinds that need its weights
    ///
    /// A `.safetensors` file, a `.safetensors.index.json`, or a folder with either. DoRA, GLoRA, OFT and IA3 change a
    /// weight in a way that depends on it.
    #[arg(long, value_name = "BASE", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) base_weights: Option<PathBuf>,
    /// Of the random directions in which differences of full rank are searched
    #[arg(long, default_value_t = 0, value_name = "N", hide_short_help = true)]
    pub(crate) seed: u64,
    /// Write to this file, or for peft a folder; `-` is stdout
    #[arg(short, long, value_name = "OUT", conflicts_with = "out_dir", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// Write into this folder, which is made if missing
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(crate) out_dir: Option<PathBuf>,
    /// The dialect to write, if not that of the source
    #[arg(long, value_name = "DIALECT")]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) reading: Reading,
    #[command(flatten)]
    pub(crate) writing: Writing,
}
