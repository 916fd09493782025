use std::path::PathBuf;

use clap::Args;

const EXAMPLES: &str = "\
Examples:
  lorafmt unfuse fused.safetensors --undo fused.undo.safetensors -o base.safetensors
  lorafmt unfuse fused/transformer --undo fused.undo.safetensors -o base/transformer";

/// Restore a base checkpoint from a fused one, to the bit
///
/// Needs the file that `lorafmt fuse --undo` wrote, and no adapters. An undo file of another checkpoint is refused, and
/// nothing is written then.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct UnfuseArgs {
    /// The fused checkpoint: a file, an index, or a folder
    #[arg(value_name = "FUSED", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) fused: PathBuf,
    /// The undo file
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) undo: PathBuf,
    /// Write to this file; to this folder, if the checkpoint is one
    #[arg(short, long, value_name = "OUT", value_hint = clap::ValueHint::AnyPath)]
    pub(crate) output: PathBuf,
    /// Say what would be restored and write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Replace existing outputs
    #[arg(long)]
    pub(crate) force: bool,
}
