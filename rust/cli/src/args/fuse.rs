use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::{LossyArg, Places, UnknownArg};

const EXAMPLES: &str = "\
Examples:
  lorafmt fuse flux1-dev.safetensors style.safetensors:0.8 -o styled.safetensors
  lorafmt fuse FLUX.1-dev/transformer a.safetensors b.safetensors:0.5 -o fused
  lorafmt fuse base.safetensors a.safetensors -o f.safetensors --undo f.undo
  lorafmt fuse base-fp8.safetensors a.safetensors -o f.safetensors --stochastic 0";

/// Add adapters to the weights of a base checkpoint
///
/// All adapters are summed in float64 and rounded once to the type of each weight. The base may be a file, an index of
/// shards, a component's folder or a whole pipeline's, in any naming of its family; what no adapter changes is copied as it
/// is. The report says of each tensor how much of the change arrived: coarse types (FP8) round small changes away.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct FuseArgs {
    /// The checkpoint: a file, an index, or a folder
    #[arg(value_name = "BASE", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) base: PathBuf,
    /// Adapters with their strengths; `-` reads stdin
    #[arg(required = true, value_name = "SRC[:STRENGTH]", value_hint = clap::ValueHint::FilePath)]
    pub(crate) sources: Vec<OsString>,
    /// Write to this file; to this folder, if the base is one
    #[arg(short, long, value_name = "OUT", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) output: PathBuf,
    /// Also write what `lorafmt unfuse` needs to restore the base to the bit
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) undo: Option<PathBuf>,
    /// Round up and down by chance, from this seed, instead of to the nearest
    ///
    /// Right on average, where the nearest number would be the old one. The same seed gives the same bytes.
    #[arg(long, value_name = "SEED")]
    pub(crate) stochastic: Option<u64>,
    /// Give FP8 weights that have a scale a new one, from their new numbers
    #[arg(long)]
    pub(crate) rescale: bool,
    /// Read all files as this model family, or one size of it (`lorafmt formats` lists both)
    #[arg(long, value_name = "FAMILY")]
    pub(crate) family: Option<String>,
    /// Unknown keys of adapters: error, drop
    #[arg(long, value_enum, default_value = "error", value_name = "HOW", hide_possible_values = true)]
    pub(crate) unknown: UnknownArg,
    /// What has no place in the base: error, allow
    ///
    /// `allow` leaves out modules whose weights the base lacks, and says so.
    #[arg(long, value_enum, default_value = "error", value_name = "HOW", hide_possible_values = true)]
    pub(crate) lossy: LossyArg,
    /// Say what would be changed and write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Replace existing outputs
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) places: Places,
}
