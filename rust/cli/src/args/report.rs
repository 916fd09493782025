use std::path::PathBuf;

use clap::Args;

use super::{Inputs, Reading};

const EXAMPLES: &str = "\
Examples:
  lorafmt report style.safetensors -o style.html
  lorafmt report -r loras -o loras.html
  lorafmt report -r loras --no-weights -o loras.html
  lorafmt report -r loras --json | jq '.groups'";

/// Make one HTML page of files: what they are, what is wrong, which are the same
///
/// The page is one file that asks nothing of a network. It lists all files with filters, and of each the norm of every
/// block, singular values, what a lower rank would keep, who loads it, and the commands that help. Files with the same
/// content, the same effect in other forms, and nearly the same effect are named. A file that cannot be read is listed
/// with its error. Reads every byte, unless `--no-weights` is given.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ReportArgs {
    #[command(flatten)]
    pub(crate) inputs: Inputs,
    #[command(flatten)]
    pub(crate) reading: Reading,
    /// Write the page to this file; `-` is standard output
    #[arg(short, long, value_name = "OUT", required_unless_present = "json", value_hint = clap::ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// Read headers only: no norms, no duplicates, no search for NaN
    #[arg(long)]
    pub(crate) no_weights: bool,
    /// Say what would be written and write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Replace an existing output
    #[arg(long)]
    pub(crate) force: bool,
}
