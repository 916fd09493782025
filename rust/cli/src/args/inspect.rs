use std::path::PathBuf;

use clap::Args;

use super::{Inputs, Reading};

const EXAMPLES: &str = "\
Examples:
  lorafmt inspect style.safetensors
  lorafmt inspect style.safetensors --weights
  lorafmt inspect hf://user/repo/style.safetensors --meta
  lorafmt inspect -r loras --json | jq '.[].family'";

/// Tell what a file is, and who can load it
///
/// Reads the header and the alphas, so it takes the same few milliseconds for a file of any size. Only of files for a
/// quantized model it looks into the factors, to tell the base's part from the adapters', and with `--weights` it
/// measures them all.
#[derive(Debug, Clone, Args)]
#[command(visible_alias = "info", after_help = EXAMPLES)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// Show all metadata
    #[arg(long)]
    pub(crate) meta: bool,
    /// Measure the weights: norms, ranks and energies by block, modules that do nothing or hold NaN
    ///
    /// Tells how much rank the adapter really uses, and what a lower rank would keep of it. `-v` lists every module.
    #[arg(long)]
    pub(crate) weights: bool,
    /// The quantized checkpoint behind a native file, whose branches are no part of the weights
    #[arg(long, value_name = "BASE", requires = "weights", value_hint = clap::ValueHint::FilePath)]
    pub(crate) base: Option<PathBuf>,
}
