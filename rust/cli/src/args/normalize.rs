use std::path::PathBuf;

use clap::Args;

use super::{Inputs, Reading, Writing};

const EXAMPLES: &str = "\
Examples:
  lorafmt normalize -r loras --rank 32 --out-dir uniform
  lorafmt normalize a.safetensors b.safetensors --rank 16 --to diffusers --out-dir uniform
  lorafmt normalize -r new --like uniform/a.r32.safetensors --rank 32 --out-dir uniform";

/// Give a folder of adapters one set of keys and one rank
///
/// Programs that swap adapters in a compiled model (hot-swapping, `torch.compile`) need equal keys and shapes, or they
/// compile again. Modules that an adapter lacks are added as zeros; higher ranks are reduced by singular values, lower
/// ones filled with zeros. The outputs are `{stem}.r{rank}.safetensors`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct NormalizeArgs {
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    /// The rank of every module
    #[arg(long, value_name = "N")]
    pub(crate) rank: usize,
    /// Write into this folder, which is made if missing
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(crate) out_dir: PathBuf,
    /// The dialect to write; the first that `formats` lists
    #[arg(long, value_name = "DIALECT")]
    pub(crate) to: Option<String>,
    /// Take the keys of this adapter instead of those of all sources
    ///
    /// A source with a module that it lacks is refused.
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(crate) like: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) reading: Reading,
    #[command(flatten)]
    pub(crate) writing: Writing,
}
