use clap::Args;

use super::{Inputs, Reading};

const EXAMPLES: &str = "\
Examples:
  lorafmt check style.safetensors
  lorafmt check -r loras --json
  lorafmt check --strict style.safetensors && echo sound";

/// Check files: structure, pairs, NaN and Inf, unknown keys
///
/// Reads every tensor. Exits with 1 if anything is wrong.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    #[command(flatten)]
    pub(crate) reading: Reading,
}
