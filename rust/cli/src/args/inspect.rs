use clap::Args;

use super::{Inputs, Reading};

const EXAMPLES: &str = "\
Examples:
  lorafmt inspect style.safetensors
  lorafmt inspect style.safetensors --meta
  lorafmt inspect -r loras --json | jq '.[].family'";

/// Tell what a file is, and who can load it
///
/// Reads the header and the alphas, never the weights, so it takes the same few milliseconds for a file of any size. Only
/// of files for a quantized model it looks into the factors, to tell the base's part from the adapters'.
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
}
