use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Reading;

const EXAMPLES: &str = "\
Examples:
  lorafmt diff style.safetensors style.diffusers.safetensors
  lorafmt diff a.safetensors b.safetensors --by block
  lorafmt diff a.safetensors a.nunchaku.safetensors --base svdq.safetensors
  lorafmt diff a.safetensors b.safetensors --json | jq .max_relative_error";

/// By what modules are compared besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ByArg {
    /// Norms, cosine and error of each block
    Block,
    /// The same of each module, those that are equal included
    Module,
}

/// Compare two adapters by their effect, module by module
///
/// Dialect, order, scale and rank do not matter, only what the adapters add to each weight. Exits with 1 if any module
/// differs by more than the tolerance (relative Frobenius norm).
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DiffArgs {
    /// The first adapter, a path or an address
    #[arg(value_name = "A", value_hint = clap::ValueHint::FilePath)]
    pub(crate) a: PathBuf,
    /// The second one
    #[arg(value_name = "B", value_hint = clap::ValueHint::FilePath)]
    pub(crate) b: PathBuf,
    /// The largest relative difference that counts as equal
    #[arg(long, default_value_t = 1e-6, value_name = "T", allow_negative_numbers = true)]
    pub(crate) tolerance: f64,
    /// Show norms, cosine similarity and error of the whole and of each block or module
    #[arg(long, value_name = "WHAT", value_enum)]
    pub(crate) by: Option<ByArg>,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// The quantized checkpoint behind a native file; its branches are no part
    ///
    /// Needed for native files that lack metadata, and for those whose base smooths the outputs of attention.
    #[arg(long, value_name = "BASE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) base: Option<PathBuf>,
}
